"""`unclip decode`, `unclip vary --noise-level` and `unclip data statistics`."""

import json

import numpy as np
import pytest
from PIL import Image

from unclip.pipelines.session import read_texts

from .conftest import FEW_DECODER_STEPS

DIM = 32


@pytest.fixture
def rows():
    return np.random.default_rng(0).normal(size=(5, DIM)).astype(np.float32)


@pytest.fixture
def file(rows, tmp_path):
    np.save(tmp_path / "emb.npy", rows)
    return tmp_path / "emb.npy"


@pytest.fixture
def decode(unclip, model, tmp_path):
    """Runs `unclip decode` into the folder `out`."""

    def run(file, *more):
        return unclip("decode", file, "--model", model, "--out", tmp_path / "out", *FEW_DECODER_STEPS, *more)

    return run


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def names(folder):
    return sorted(path.name for path in folder.glob("*.png"))


def test_a_picture_of_each_row(decode, file, tmp_path):
    done = decode(file)
    assert done.code == 0, done.err
    assert done.lines == [str(tmp_path / "out" / f"emb-{row:06d}-{row}.png") for row in range(5)]
    texts = read_texts(tmp_path / "out" / "emb-000003-3.png")
    assert (texts["embeddings"], texts["row"], texts["seed"]) == ("emb.npy", "3", "3")


def test_the_same_command_makes_only_the_missing_pictures(decode, file, tmp_path):
    whole = {path: pixels(path) for path in map(str, decode(file, "--batch-size", "2").lines)}
    missing = [str(tmp_path / "out" / f"emb-00000{row}-{row}.png") for row in (1, 4)]
    for path in missing:
        (tmp_path / path).unlink()
    done = decode(file, "--batch-size", "2")
    assert done.lines == missing
    assert "3 of 5 pictures existed already" in done.err
    for path, image in whole.items():
        assert np.abs(pixels(path).astype(int) - image).max() <= 1  # they had another batch
    assert decode(file).lines == []


@pytest.mark.parametrize(
    ("more", "what"), [(["--decoder-guidance", "3"], "settings"), (["--prompt", "a cat"], "prompt"), ([], "embedding")]
)
def test_pictures_that_were_made_otherwise_are_not_kept(decode, file, rows, more, what):
    assert decode(file).code == 0
    if not more:
        np.save(file, rows + 1)
    done = decode(file, *more)
    assert done.code == 1
    assert f"was made with another {what}" in done.err
    assert len(decode(file, *more, "--overwrite").lines) == 5


def test_an_error_in_a_later_row_is_found_before_anything_is_made(decode, file, rows, tmp_path):
    rows[3, 0] = np.nan
    np.save(file, rows)
    done = decode(file)
    assert done.code == 1
    assert "NaN or infinity in row 3" in done.err
    assert names(tmp_path / "out") == []
    assert len(decode(file, "--rows", "0:3").lines) == 3


def test_another_width(decode, rows, tmp_path):
    np.save(tmp_path / "wide.npy", np.zeros((2, 7), np.float32))
    done = decode(tmp_path / "wide.npy")
    assert done.code == 1
    assert "embeddings of width 7, but the model needs width 32" in done.err
    assert decode(tmp_path / "none.npy").code == 1


def test_one_noise_and_copies(decode, rows, tmp_path):
    np.save(tmp_path / "same.npy", np.stack([rows[0], rows[0]]))
    assert decode(tmp_path / "same.npy", "--one-noise", "-n", "2", "--seed", "7").code == 0
    out = tmp_path / "out"
    assert names(out) == [f"same-00000{row}-{seed}.png" for row in (0, 1) for seed in (7, 8)]
    np.testing.assert_array_equal(pixels(out / "same-000000-7.png"), pixels(out / "same-000001-7.png"))
    assert (pixels(out / "same-000000-7.png") != pixels(out / "same-000000-8.png")).any()


def test_rows_have_the_same_pictures_as_in_the_whole_file(decode, file, tmp_path):
    assert decode(file, "--rows", "3:").lines == [str(tmp_path / f"out/emb-00000{row}-{row}.png") for row in (3, 4)]
    part = pixels(tmp_path / "out/emb-000004-4.png")
    assert len(decode(file, "--overwrite").lines) == 5
    assert np.abs(pixels(tmp_path / "out/emb-000004-4.png").astype(int) - part).max() <= 1
    assert decode(file, "--rows", "9:").code == 1
    assert decode(file, "--rows", "3").code == 2


def test_a_sheet_with_labels(decode, rows, tmp_path):
    np.savez(tmp_path / "emb.npz", image_embeds=rows, caption=np.array(list("abcde")))
    done = decode(tmp_path / "emb.npz", "--grid", "--label-column", "caption")
    assert done.code == 0, done.err
    assert done.lines[-1].endswith("emb-0-grid.png")
    assert read_texts(tmp_path / "out/emb-000002-2.png")["label"] == "c"
    with Image.open(tmp_path / "out/emb-0-grid.png") as plain, Image.open(tmp_path / "out/emb-000002-2.png") as one:
        assert plain.height > 2 * one.height  # room for the labels
    assert decode(tmp_path / "emb.npz", "--label-column", "none").code == 1


def test_a_model_without_an_image_encoder(unclip, text_to_image, file, tmp_path):
    done = unclip(
        "decode", file, "--model", text_to_image, "--out", tmp_path / "o", "--rows", "0:1", *FEW_DECODER_STEPS
    )
    assert done.code == 0, done.err


def test_rerun_makes_one_row_again(decode, unclip, file, model, tmp_path):
    assert decode(file, "--batch-size", "3").code == 0
    picture = tmp_path / "out" / "emb-000004-4.png"
    done = unclip("rerun", picture, "--inputs", tmp_path, "--model", model, "--out", tmp_path / "again")
    assert done.code == 0, done.err
    assert (tmp_path / "again" / "emb-000004-4.png").read_bytes() == picture.read_bytes()


def test_statistics_the_report_and_rescaling(decode, unclip, rows, model, tmp_path):
    mean = np.linspace(-2, 2, DIM)
    own = np.random.default_rng(1).normal(size=(200, DIM)) * np.linspace(0.2, 1.5, DIM) + mean
    np.save(tmp_path / "own.npy", own.astype(np.float32))
    done = decode(tmp_path / "own.npy", "--rescale", "norm", "--rows", "0:1")
    assert "rescale needs the statistics" in done.err
    written = unclip("data", "statistics", tmp_path / "own.npy", "--model", model)
    assert written.code == 0, written.err
    try:
        np.save(tmp_path / "unit.npy", (own / np.linalg.norm(own, axis=1, keepdims=True)).astype(np.float16))
        assert "warning" not in decode(tmp_path / "own.npy", "--rows", "0:20").err
        assert "probably normalised; use --rescale norm" in decode(tmp_path / "unit.npy", "--rows", "0:20").err
        fixed = decode(tmp_path / "unit.npy", "--rescale", "norm", "--rows", "0:20", "--overwrite")
        assert (fixed.code, "warning" in fixed.err) == (0, False)
        assert decode(tmp_path / "unit.npy", "--rescale", "dimensions", "--rows", "0:3").code == 1  # too few rows
        varied = unclip("vary", fixed.lines[0], "--model", model, "--noise-level", "500", "--out", tmp_path / "v", "-q",
                        "--seed", "1", *FEW_DECODER_STEPS)  # fmt: skip
        assert varied.code == 0, varied.err
        assert read_texts(tmp_path / varied.lines[0])["settings"]["noise_level"] == 500
        again = unclip(
            "rerun", varied.lines[0], "--inputs", tmp_path / "out", "--model", model, "--out", tmp_path / "w"
        )
        assert again.code == 0, again.err
        assert (pixels(again.lines[0]) == pixels(varied.lines[0])).all()
    finally:
        (model / "embedding_statistics.safetensors").unlink()


def test_noise_level_without_statistics(unclip, model, tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    vary = ["vary", tmp_path / "red.png", "--model", model, "--out", tmp_path / "v", *FEW_DECODER_STEPS]
    done = unclip(*vary, "--noise-level", "5")
    assert done.code == 1
    assert "noise_level needs the statistics" in done.err
    assert unclip(*vary, "--noise-level", "1000").code == 2
    assert unclip(*vary, "--noise-level", "5", "--keep-structure").code == 2
    zero = unclip(*vary, "--noise-level", "0", "--seed", "1")
    plain = unclip(*vary, "--seed", "1", "--overwrite", "--json")
    assert zero.code == plain.code == 0
    assert "noise_level" not in json.loads(plain.out)["settings"]


def test_embeddings_of_another_clip(unclip, decode, model, rows, tmp_path):
    """`unclip train translator`, and pictures through the translator."""
    draw = np.random.default_rng(3)
    other = draw.normal(size=(300, 6)).astype(np.float32)
    np.save(tmp_path / "other.npy", other)
    np.save(tmp_path / "mine.npy", other @ draw.normal(size=(6, DIM)).astype(np.float32) + 1)
    fit = ["train", "translator", tmp_path / "other.npy", tmp_path / "mine.npy", "--out", tmp_path / "t.safetensors"]
    done = unclip(*fit)
    assert done.code == 0, done.err
    assert done.lines == [str(tmp_path / "t.safetensors")]
    assert "on 30 held-out pairs: 100.0% of the variance explained, mean cosine 1.000, 100.0% identified" in done.err
    assert "already exists" in unclip(*fit).err
    assert unclip(*fit, "--overwrite", "-q", "--hidden", "4", "--steps", "50").code == 0

    made = decode(tmp_path / "other.npy", "--translator", tmp_path / "t.safetensors", "--rows", "0:2")
    assert made.code == 0, made.err
    assert read_texts(made.lines[0])["translator"] == "t.safetensors"
    direct = decode(tmp_path / "mine.npy", "--rows", "0:2")
    assert np.abs(pixels(made.lines[1]).astype(int) - pixels(direct.lines[1])).max() <= 4
    again = unclip("rerun", made.lines[1], "--inputs", tmp_path, "--model", model, "--out", tmp_path / "again")
    assert again.code == 0, again.err
    assert (pixels(again.lines[0]) == pixels(made.lines[1])).all()


def test_translators_that_do_not_fit(unclip, decode, rows, file, tmp_path):
    np.save(tmp_path / "narrow.npy", rows[:, :7])
    np.save(tmp_path / "few.npy", rows[:3])
    fit = ["train", "translator", tmp_path / "narrow.npy"]
    assert "has 5 rows, but" in unclip(*fit, tmp_path / "few.npy", "--out", tmp_path / "t.safetensors").err
    assert "20 or more must be left" in unclip(*fit, file, "--out", tmp_path / "t.safetensors").err
    assert unclip(*fit, file, "--out", tmp_path / "t.npy").code == 1
    draw = np.random.default_rng(3)
    for name, width in (("a", 7), ("b", 9)):
        np.save(tmp_path / f"{name}.npy", draw.normal(size=(40, width)).astype(np.float32))
    ab = [tmp_path / "a.npy", tmp_path / "b.npy", "--out", tmp_path / "t.safetensors"]
    assert unclip("train", "translator", *ab).code == 0
    translate = ["--translator", tmp_path / "t.safetensors"]
    assert "t.safetensors translates embeddings of width 7" in decode(file, *translate).err
    assert "embeddings of width 9, but the model needs width 32" in decode(tmp_path / "a.npy", *translate).err
    assert names(tmp_path / "out") == []
