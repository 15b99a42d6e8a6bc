"""`invert`, `vary --keep-structure`, `interpolate`, `edit`, `blend`, `probe`: on a tiny model, and what they refuse."""

import functools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionModelWithProjection

from unclip import UnCLIPImageVariationPipeline, UnCLIPPipeline, UnCLIPScheduler, UNet2DModel, images
from unclip.checkpoints.weights import offload_hooks
from unclip.cli.inputs import read_part
from unclip.cli.latents import ManipulationRun
from unclip.cli.options import Common, Compute, Output
from unclip.cli.probe import sampled
from unclip.errors import InputError
from unclip.images import open_image
from unclip.models.pca import PrincipalComponents
from unclip.pipelines import steps as steps_module
from unclip.pipelines.manipulation import Manipulator
from unclip.stages.manipulation import even_places

from .test_generate import alike

FEW = ["--decoder-steps", "3", "--super-res-steps", "2"]
GUIDED = {"decoder_num_inference_steps": 3, "decoder_guidance_scale": 2.0}


@pytest.fixture
def files(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cat.png")
    Image.new("RGB", (20, 20), "red").save(tmp_path / "dog.png")
    return tmp_path


@pytest.fixture
def run(unclip, model, files, monkeypatch):
    monkeypatch.chdir(files)

    def call(command, *arguments, model=model, steps=FEW):
        return unclip(*command.split(), *arguments, "--model", model, *steps, "--out", "out")

    return call


def names(done):
    assert done.code == 0, done.err
    return [Path(path).name for path in done.lines]


def texts(path):
    with Image.open(path) as image:
        return dict(image.text)  # type: ignore[attr-defined]


def differ(one, other):
    """In more than a rounding here and there: a tiny model with random weights makes little of an embedding."""
    with Image.open(one) as a, Image.open(other) as b:
        return bool((np.asarray(a) != np.asarray(b)).mean() > 0.02)


def test_invert_and_back(run):
    done = run("invert", "cat.png", "dog.png", "--check")
    assert names(done) == [
        "cat.safetensors", "cat-reconstruction.png", "dog.safetensors", "dog-reconstruction.png",
    ]  # fmt: skip
    again = run("invert", "cat.png")
    assert again.code == 1
    assert "--overwrite" in again.err
    assert names(run("invert", "cat.png", "--overwrite")) == ["cat.safetensors"]


def test_the_latent_stands_for_its_picture(run):
    told = json.loads(run("invert", "cat.png", "--check", "--json").lines[0])
    assert told["psnr_db"] > 0
    kept = run("vary", "out/cat.safetensors", "--keep-structure", "--eta", "0", "--seed", 0, steps=[])
    from_picture = run("vary", "cat.png", "--keep-structure", "--eta", "0", "--seed", 0)
    assert texts(kept.lines[0])["settings"] == texts(from_picture.lines[0])["settings"]
    assert alike(kept.lines[0], from_picture.lines[0])


def test_pictures_of_one_name_have_their_own_latents(run, files):
    (files / "a").mkdir()
    Image.new("RGB", (20, 20), "blue").save(files / "a" / "cat.png")
    Image.new("RGB", (20, 20), "green").save(files / "cat-2.png")
    for more in ([], ["--overwrite"]):
        done = run("invert", "cat.png", "a/cat.png", "cat-2.png", "--check", *more)
        assert names(done)[::2] == ["cat.safetensors", "cat-2.safetensors", "cat-2-2.safetensors"]
        assert names(done)[1::2] == [f"cat{end}-reconstruction.png" for end in ("", "-2", "-2-2")]
    assert not alike(done.lines[1], done.lines[3])
    drawn = run("vary", "out/cat-2.safetensors", *KEEP)
    assert alike(drawn.lines[0], done.lines[3])


def test_what_is_in_the_way_of_a_latent_is_found_first(run, monkeypatch):
    names(run("invert", "dog.png"))
    monkeypatch.setattr(Manipulator, "invert", None)  # nothing is computed in vain
    done = run("invert", "cat.png", "dog.png")
    assert (done.code, done.out) == (1, "")
    assert "dog.safetensors already exists" in done.err
    assert not Path("out/cat.safetensors").exists()


@pytest.mark.parametrize("quiet", [False, True])
def test_how_near_the_picture_comes_is_told(run, quiet):
    done = run("invert", "cat.png", "--check", *["--quiet"] * quiet)
    psnr_db = float(texts(done.lines[1])["psnr_db"])
    assert done.err == ("" if quiet else f"cat.png: {psnr_db:.1f} dB\n")


KEEP = ("--keep-structure", "--eta", "0", "--seed", 0)


def test_a_latent_is_decoded_in_the_tiles_it_was_found_in(run):
    names(run("invert", "cat.png", "--super-res", "--check"))
    as_a_whole = Path("out/cat-reconstruction.png").rename("as-a-whole.png")
    names(run("invert", "cat.png", "--super-res", "--check", "--tile", 16, "--overwrite"))
    assert not alike("out/cat-reconstruction.png", as_a_whole)
    for more in ([], ["--tile", 16]):
        done = run("vary", "out/cat.safetensors", *KEEP, *more, "--overwrite", steps=[])
        assert alike(done.lines[0], "out/cat-reconstruction.png")
        assert json.loads(texts(done.lines[0])["settings"])["super_res_tile_px"] == 16
    way = run("interpolate", "out/cat.safetensors", "dog.png", "--super-res", "--frames", 1, steps=[])
    assert alike(way.lines[0], "out/cat-reconstruction.png")
    for command in (
        ("vary", "out/cat.safetensors", *KEEP),
        ("interpolate", "out/cat.safetensors", "dog.png"),
        ("edit", "out/cat.safetensors", "--from", "a cat", "--to", "an apple"),
    ):
        for other, words in ((8, "in tiles of 8 px"), (32, "as a whole")):
            done = run(*command, "--tile", other)
            assert (done.code, done.out) == (1, "")
            assert f"in tiles of 16 px, but would be decoded {words}: leave out --tile {other}" in done.err
    names(run("invert", "cat.png", "--super-res", "--overwrite"))
    assert "as a whole" in run("vary", "out/cat.safetensors", *KEEP, "--tile", 16).err
    whole = run("vary", "out/cat.safetensors", *KEEP, "--tile", 32, "--overwrite")  # as large as the picture
    assert alike(whole.lines[0], as_a_whole)


def test_latents_found_in_other_tiles_are_not_decoded_alike(run, files):
    from unclip.stages.manipulation import BipartiteLatent

    run("invert", "cat.png", "--super-res")
    run("invert", "dog.png", "--super-res", "--tile", 16)
    both = ("out/cat.safetensors", "out/dog.safetensors")
    for command in (("vary", *both, *KEEP), ("interpolate", *both, "--frames", 1)):
        done = run(*command)
        assert (done.code, done.out) == (1, "")
        assert all(path in done.err for path in both)
        assert "use a separate command for each" in done.err
    run("invert", "cat.png", "--overwrite")  # keeps no noise that a tile could spoil
    assert len(names(run("vary", *both, *KEEP))) == 2
    assert len(names(run("vary", both[0], *KEEP, "--tile", 16))) == 1
    latent, about = BipartiteLatent.load(both[1])
    assert about["super_res_tile_px"] == "16"
    latent.save("wordy.safetensors", about={**about, "super_res_tile_px": "-1"})
    done = run("vary", "wordy.safetensors", "dog.png", *KEEP)
    assert (done.code, len(done.lines)) == (3, 1)
    assert "not numbers" in done.err


def test_latents_found_in_other_steps_are_not_decoded_alike(run):
    run("invert", "cat.png")
    run("invert", "dog.png", steps=["--decoder-steps", "4", "--super-res-steps", "2"])
    both = ("out/cat.safetensors", "out/dog.safetensors")
    for command in (("vary", *both, *KEEP), ("interpolate", *both, "--frames", 1)):
        done = run(*command, steps=[])
        assert done.code == 1
        assert all(path in done.err for path in both)
        assert "--decoder-steps" in done.err
        assert len(names(run(*command, steps=["--decoder-steps", "3"]))) == 2


def test_a_latent_beside_others_is_drawn_as_alone(run):
    """Also where it keeps super-resolution's noise, and they do not."""
    run("invert", "cat.png", "--super-res")
    for others in (["dog.png"], ["cat.png", "dog.png"]):
        together = run("vary", *others, "out/cat.safetensors", "dog.png", *KEEP, "-n", 2, "--overwrite")
        assert together.code == 0
        pictures = [Path(path).read_bytes() for path in together.lines]
        alone = run("vary", "out/cat.safetensors", "--keep-structure", "--eta", "0", "--seed", 2 * len(others))
        Path("out/cat-in-a-batch.png").write_bytes(pictures[2 * len(others)])
        assert alike(alone.lines[0], "out/cat-in-a-batch.png")
        dog = run("vary", "dog.png", "--keep-structure", "--eta", "0", "--seed", 2 * len(others) + 2)
        Path("out/dog-in-a-batch.png").write_bytes(pictures[-2])
        assert alike(dog.lines[0], "out/dog-in-a-batch.png")


def test_every_row_of_a_latent_counts(run):
    from unclip.stages.manipulation import BipartiteLatent

    run("invert", "cat.png", "dog.png")
    (cat, about), (dog, _) = (BipartiteLatent.load(f"out/{name}.safetensors") for name in ("cat", "dog"))
    cat.join(dog).save("both.safetensors", about=about)
    done = run("vary", "both.safetensors", "cat.png", "--keep-structure", "--eta", "0", "--seed", 5)
    assert names(done) == [
        "both-variation-5.png", "both-variation-6.png", "cat-variation-7.png",
    ]  # fmt: skip
    assert [texts(path).get("row") for path in done.lines] == ["0", "1", None]
    dog_alone = run("vary", "out/dog.safetensors", "--keep-structure", "--eta", "0", "--seed", 6)
    assert alike(done.lines[1], dog_alone.lines[0])
    path = run("interpolate", "both.safetensors", "cat.png", "--frames", 2)
    assert len(names(path)) == 5
    assert [texts(frame)["to"] for frame in path.lines] == ["both.safetensors"] * 2 + ["cat.png"] * 3
    for command in (["edit", "--from", "a cat", "--to", "an apple"], ["blend"]):
        done = run(command[0], "both.safetensors", *command[1:])
        assert done.code == 1
        assert "2 latents" in done.err


def test_bad_latents_fail_alone(run, files):
    (files / "junk.safetensors").write_bytes(b"junk")
    run("invert", "cat.png")
    from unclip.stages.manipulation import BipartiteLatent

    latent, about = BipartiteLatent.load("out/cat.safetensors")
    latent.save("foreign.safetensors", about={**about, "fingerprint": "of another"})
    latent.save("wordy.safetensors", about={**about, "decoder_num_inference_steps": "many"})
    bad = ("junk.safetensors", "foreign.safetensors", "none.safetensors", "wordy.safetensors")
    done = run("vary", *bad, "dog.png", "out/cat.safetensors", *KEEP[:-1], 3)
    assert done.code == 3
    assert [Path(path).name for path in done.lines] == ["dog-variation-7.png", "cat-variation-8.png"]
    errors = done.err.splitlines()
    assert len(errors) == 4
    assert all(any(name in line for line in errors) for name in bad)
    assert (alone := run("vary", "junk.safetensors", *KEEP)).code == 1
    assert "junk.safetensors" in alone.err
    assert "not numbers" in run("interpolate", "wordy.safetensors", "dog.png").err


def test_the_suffix_of_a_latent_in_capitals(run):
    run("invert", "cat.png")
    Path("out/cat.safetensors").rename("CAT.SAFETENSORS")
    done = run("vary", "CAT.SAFETENSORS", *KEEP, steps=[])
    assert json.loads(texts(done.lines[0])["settings"])["decoder_num_inference_steps"] == 3
    done = run("interpolate", "CAT.SAFETENSORS", "dog.png", "--frames", 1, steps=[])
    assert json.loads(texts(done.lines[0])["settings"])["decoder_num_inference_steps"] == 3


def test_a_cascade_through_a_file(run, model, tmp_path):
    """Its recommended steps are one number for each super-resolution stage."""
    folder = shutil.copytree(model, tmp_path / "cascade")
    pipe = UnCLIPPipeline.from_pretrained(model)
    more = UNet2DModel.from_config({**pipe.super_res_first.config, "sample_size": 64}).eval()
    larger = UnCLIPPipeline.from_pipe(pipe, super_res_2_first=more, super_res_2_scheduler=UnCLIPScheduler())
    larger.save_pretrained(tmp_path / "larger")
    index = json.loads((folder / "model_index.json").read_text())
    own = json.loads((tmp_path / "larger" / "model_index.json").read_text())
    for name in ("super_res_2_first", "super_res_2_scheduler"):
        shutil.copytree(tmp_path / "larger" / name, folder / name)
        index[name] = own[name]
    (folder / "model_index.json").write_text(json.dumps(index))
    steps = {"decoder_num_inference_steps": 3, "super_res_num_inference_steps": [2, 3]}
    (folder / "generation_defaults.json").write_text(json.dumps(steps))
    for more_options in ([], ["--super-res"]):
        told = run("invert", "cat.png", "--check", "--overwrite", *more_options, model=folder, steps=[])
        assert names(told) == ["cat.safetensors", "cat-reconstruction.png"]
        done = run("vary", told.lines[0], *KEEP, "--overwrite", model=folder, steps=[])
        settings = json.loads(texts(done.lines[0])["settings"])
        assert settings["super_res_num_inference_steps"] == [2, 3]
        assert alike(done.lines[0], told.lines[1])
        with Image.open(done.lines[0]) as picture:
            assert picture.size == (64, 64)


def test_eta_and_seeds_vary(run):
    done = run(
        "vary", "cat.png", "dog.png", "--keep-structure", "--eta", "0.8", "-n", 2, "--seed", 5, "--batch-size", 3
    )
    assert names(done) == [
        f"{name}-variation-{seed}.png" for name, seed in (("cat", 5), ("cat", 6), ("dog", 7), ("dog", 8))
    ]
    assert not alike(done.lines[0], done.lines[1])
    assert not alike(done.lines[0], run("vary", "cat.png", "--seed", 5).lines[0])
    assert json.loads(texts(done.lines[0])["settings"])["sampler"] == "ddim"
    assert texts(done.lines[0])["eta"] == "0.8"


@pytest.mark.parametrize(
    "arguments", [["--eta", "0.5"], ["--keep-structure", "--sampler", "dpm"], ["--keep-structure", "--negative", "x"]]
)
def test_what_does_not_go_with_the_structure(run, arguments):
    assert run("vary", "cat.png", *arguments).code == 2


@pytest.mark.parametrize("side", ["--height", "--width", "--size"])
def test_the_structure_is_of_the_models_own_size(run, side):
    done = run("vary", "cat.png", "--keep-structure", side, 64)
    assert done.code == 2
    assert side in done.err


def test_interpolation_of_pictures(run):
    turns = ("--spacing", "turns", "--batch-size", 3)
    done = run("interpolate", "cat.png", "dog.png", "--frames", 3, "--grid", "--film", "gif", *turns)
    assert names(done) == [
        *(f"cat-to-dog-{i:03d}-0.png" for i in range(4)),
        "cat-to-dog-0-grid.png",
        "cat-to-dog-0.gif",
    ]
    facts = [texts(path) for path in done.lines[:4]]
    assert [(each["from"], each["to"], float(each["share"])) for each in facts] == [
        ("cat.png", "dog.png", share) for share in (0, 0.3333, 0.6667, 1)
    ]
    for end, name in ((0, "cat"), (3, "dog")):  # the ends are the reconstructions
        run("invert", f"{name}.png", "--check")
        assert alike(done.lines[end], f"out/{name}-reconstruction.png")
    assert not alike(done.lines[0], done.lines[1])
    with Image.open(done.lines[-1]) as film:
        assert film.n_frames == 6  # there and back, the ends once
        assert film.info["loop"] == 0


def test_frames_stand_where_pictures_differ_equally(run, model, files):
    """By default, and with the settings that the frames are drawn with; every point stays a frame."""
    way = ("interpolate", "cat.png", "dog.png", "cat.png", "--frames", 4, "--decoder-guidance", 2, "--json")
    turns, evenly, batched = (
        [json.loads(line) for line in run(*way, *more).lines]
        for more in (("--spacing", "turns"), (), ("--spacing", "jumps", "--batch-size", 2))
    )
    assert [each["share"] for each in turns] == [0, 0.25, 0.5, 0.75] * 2 + [1]
    assert [each["settings"]["spacing"] for each in (turns[0], evenly[0], batched[0])] == ["turns", "jumps", "jumps"]
    assert [each["share"] for each in batched] == pytest.approx([each["share"] for each in evenly], abs=2e-4)

    tool = Manipulator.from_pretrained(model)
    points = tool.invert([open_image(files / name) for name in ("cat.png", "dog.png", "cat.png")], **GUIDED)
    wanted = even_places(points, 3, functools.partial(tool.decode_small, **GUIDED))
    assert [(each["from"], each["to"]) for each in evenly] == [("cat.png", "dog.png")] * 4 + [
        ("dog.png", "cat.png")
    ] * 5
    assert [(place >= 4) + each["share"] for place, each in enumerate(evenly)] == pytest.approx(wanted, abs=2e-4)
    assert max(abs(a["share"] - b["share"]) for a, b in zip(evenly, turns, strict=True)) > 0.01


def test_the_noise_is_that_of_the_frames(run):
    """With one noise pictures differ otherwise, and so their frames stand elsewhere."""
    way = ("interpolate", "cat.png", "dog.png", "--frames", 3, "--json")
    turned, kept = ([json.loads(line)["share"] for line in run(*way, *more).lines] for more in ((), ("--one-noise",)))
    assert turned != kept


def test_a_way_through_the_rows_of_one_file(run, model, files):
    tool = Manipulator.from_pretrained(model)
    both = tool.invert([open_image(files / name) for name in ("cat.png", "dog.png")])
    tool.save(both, files / "both.safetensors")
    done = run("interpolate", "both.safetensors", "--frames", 2)
    assert names(done) == [f"both-{place:03d}-0.png" for place in range(3)]
    assert "runs twice over the path" in done.err
    tool.save(both.select([0]), files / "one.safetensors")
    done = run("interpolate", "one.safetensors")
    assert done.code == 1
    assert "two or more" in done.err
    assert run("interpolate", "cat.png").code == 2


def test_memory_that_placing_needs(run, monkeypatch):
    def full(*given, **named):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(Manipulator, "decode_small", full)
    done = run("interpolate", "cat.png", "dog.png", "--frames", 3)
    assert (done.code, done.out) == (1, "")
    assert "--batch-size" in done.err
    assert run("interpolate", "cat.png", "dog.png", "--frames", 3, "--spacing", "turns").code == 0


def test_one_noise_keeps_the_first(run):
    turned = run("interpolate", "cat.png", "dog.png", "--frames", 1)
    kept = run("interpolate", "cat.png", "dog.png", "--frames", 1, "--one-noise")
    assert alike(turned.lines[0], kept.lines[0])
    assert not alike(turned.lines[1], kept.lines[1])


def test_the_ends_come_back_in_detail(run):
    plain, fine = (run("interpolate", "cat.png", "dog.png", "--frames", 1, *more) for more in ((), ("--super-res",)))
    for end, name in ((0, "cat"), (1, "dog")):
        run("invert", f"{name}.png", "--super-res", "--check")
        assert alike(fine.lines[end], f"out/{name}-reconstruction.png")
        assert not alike(plain.lines[end], f"out/{name}-reconstruction.png")


def test_a_way_through_several_is_told_of(run):
    done = run("interpolate", "cat.png", "a red apple", "dog.png", "--frames", 1, "--grid", "--film", "gif", "--json")
    *_, sheet, film = map(json.loads, done.lines)
    for told in (sheet, film, texts(sheet["path"])):
        assert [told[name] for name in ("from", "through", "to")] == ["cat.png", "a red apple", "dog.png"]
    assert film["frames"] == 3
    for options, ways in (((), (False, False)), (("--one-noise", "--super-res"), (True, True))):
        done = run("interpolate", "cat.png", "dog.png", "--frames", 1, "--grid", *options)
        for path in done.lines:
            settings = json.loads(texts(path)["settings"])
            assert (settings["one_noise"], settings["super_res"]) == ways
        assert "through" not in texts(done.lines[-1])


def test_interpolation_of_captions_and_mixtures(run):
    done = run("interpolate", "a cat", "a red apple", "--frames", 2, "--seed", 3, "--film", "webp")
    assert names(done)[0] == "a-cat-to-a-red-apple-000-3.png"
    assert not alike(done.lines[0], done.lines[2])
    with Image.open(done.lines[-1]) as film:
        assert film.n_frames == 4
    assert len(names(run("interpolate", "a cat", "dog.png", "--frames", 2))) == 3


def test_a_mixture_of_a_caption_and_a_picture_is_neither(run):
    mixture, caption, picture = (
        run("blend", *parts, "--seed", 2).lines[0] for parts in (("a cat", "dog.png"), ("a cat",), ("dog.png",))
    )
    assert not alike(mixture, caption)
    assert not alike(mixture, picture)
    way = run("interpolate", "a cat", "dog.png", "--frames", 2)
    assert not any(alike(way.lines[1], way.lines[end]) for end in (0, 2))


def test_a_film_needs_its_writer(run, monkeypatch, files):
    monkeypatch.setitem(sys.modules, "av", None)
    done = run("interpolate", "cat.png", "dog.png", "--film", "mp4")
    assert done.code == 1
    assert "pip install av" in done.err
    assert not list(files.rglob("*.mp4"))


def test_mp4(run):
    av = pytest.importorskip("av")
    done = run("interpolate", "cat.png", "dog.png", "--frames", 2, "--film", "mp4")
    with av.open(done.lines[-1]) as film:
        assert sum(1 for _ in film.decode(video=0)) == 4


def test_edit(run):
    done = run("edit", "cat.png", "--from", "a cat", "--to", "a red apple", "--strength", 0.9, "--sweep", 3, "--grid")
    assert names(done)[:3] == [f"cat-to-a-red-apple-{i:03d}-0.png" for i in range(3)]
    assert [float(texts(path)["strength"]) for path in done.lines[:3]] == [0, 0.45, 0.9]
    run("invert", "cat.png", "--check")
    assert alike(done.lines[0], "out/cat-reconstruction.png")
    assert not alike(done.lines[0], done.lines[2])
    by_text = run("edit", "cat.png", "--from", "a cat", "--to", "a red apple", "--strength", 0.9, "--text-space")
    assert names(by_text) == ["cat-to-a-red-apple-0.png"]
    assert not alike(by_text.lines[0], done.lines[2])
    for path, in_text in ((done.lines[0], False), (by_text.lines[0], True)):
        assert json.loads(texts(path)["settings"])["text_space"] is in_text


def test_the_sheet_of_a_sweep_tells_the_strengths(run, monkeypatch):
    below, original = [], images.labelled
    monkeypatch.setattr(images, "labelled", lambda image, text: (below.append(text), original(image, text))[1])
    options = ("--strength", 0.9, "--sweep", 3, "--grid", "--film", "gif", "--json")
    done = run("edit", "cat.png", "--from", "a cat", "--to", "a red apple", *options)
    assert below == ["0", "0.45", "0.9"]
    *_, sheet, film = map(json.loads, done.lines)
    for told in (sheet, film, texts(sheet["path"])):
        assert [told[name] for name in ("image", "from", "to")] == ["cat.png", "a cat", "a red apple"]
        assert (float(told["strength"]), int(told["sweep"])) == (0.9, 3)
    with Image.open(sheet["path"]) as labelled, Image.open(film["path"]) as frames:
        assert labelled.height > frames.height == 32


def test_the_largest_seed(run):
    largest = 2**64 - 1
    done = run("edit", "cat.png", "--from", "a cat", "--to", "a red apple", "--seed", largest)
    assert names(done) == [f"cat-to-a-red-apple-{largest}.png"]


def test_edits_without_a_difference_or_a_picture(run):
    assert "difference is zero" in run("edit", "cat.png", "--from", "a cat", "--to", "a  cat").err
    assert "does not exist" in run("edit", "a cat", "--from", "a", "--to", "b").err
    assert "does not exist" in run("edit", "none.png", "--from", "a", "--to", "b").err
    assert run("edit", "cat.png", "--from", "a", "--to", "b", "--strength", 1.5).code == 2


def test_a_blend_goes_by_its_weights(run):
    blends = {}
    for weight in ("1", "0.5", "0"):
        done = run("blend", f"cat.png:{weight}", "a red apple:0.5", "--seed", 2, "--overwrite")
        assert names(done) == ["cat-and-a-red-apple-2.png"]
        assert texts(done.lines[0])["blend"] == f"cat.png:{weight}; a red apple:0.5"
        blends[weight] = Path("out", f"{weight}.png")
        Path(done.lines[0]).rename(blends[weight])
    assert not alike(blends["1"], blends["0.5"])
    assert not alike(blends["0.5"], blends["0"])
    assert alike(blends["0"], run("blend", "a red apple", "--seed", 2).lines[0])


def test_each_blend_is_that_of_its_own_seed(run):
    parts = ("a red apple", "a cat:0.5", "dog.png:0.2")
    both = run("blend", *parts, "-n", 2, "--seed", 5)
    for seed, path in zip((5, 6), both.lines, strict=True):
        assert alike(path, run("blend", *parts, "--seed", seed).lines[0])
    assert not alike(*both.lines)


def test_several_blends(run):
    done = run("blend", "cat.png", "dog.png", "-n", 3, "--seed", 7, "--grid")
    assert names(done) == [*(f"cat-and-dog-{seed}.png" for seed in (7, 8, 9)), "cat-and-dog-7-grid.png"]
    assert not alike(done.lines[0], done.lines[1])
    assert "cancel" in run("blend", "cat.png:1", "cat.png:-1").err


@pytest.fixture
def recommending(model, tmp_path):
    """The model, with several candidates recommended."""
    folder = shutil.copytree(model, tmp_path / "recommending")
    (folder / "generation_defaults.json").write_text('{"num_prior_candidates": 4, "prior_num_inference_steps": 2}')
    return folder


def test_one_caption_is_blended_as_it_is_generated(run, recommending, monkeypatch):
    drawn, original = [], UnCLIPImageVariationPipeline.__call__

    @functools.wraps(original)
    def spy(*given, image_embeddings=None, **more):
        drawn.append(image_embeddings)
        return original(*given, image_embeddings=image_embeddings, **more)

    monkeypatch.setattr(UnCLIPImageVariationPipeline, "__call__", spy)
    pipe = UnCLIPPipeline.from_pretrained(recommending)
    pipe.set_progress_bar_config(disable=True)
    few = {"decoder_num_inference_steps": 2, "super_res_num_inference_steps": 2, "return_intermediates": True}
    first = []
    for seed in range(6):
        done = run("blend", "a red apple", "--seed", seed, model=recommending)
        assert json.loads(texts(done.lines[0])["settings"])["num_prior_candidates"] == 4
        made = pipe("a red apple", seed=seed, **few, **pipe.recommended).image_embeddings
        torch.testing.assert_close(drawn[-1], made, rtol=0, atol=1e-5)
        alone = pipe("a red apple", seed=seed, **few, **pipe.recommended | {"num_prior_candidates": 1})
        first.append(torch.equal(alone.image_embeddings, made))
    assert not all(first)


CAPTIONS = {
    "blend": ("blend", "a cat", "dog.png"),
    "edit": ("edit", "cat.png", "--from", "a cat", "--to", "a red apple"),
    "interpolate": ("interpolate", "a cat", "dog.png", "--frames", 1),
}


@pytest.mark.parametrize("command", CAPTIONS.values(), ids=CAPTIONS)
def test_how_the_prior_draws(run, recommending, monkeypatch, command):
    asked, original = [], steps_module.sample_best

    def spy(*given, num_candidates, **more):
        asked.append(num_candidates)
        return original(*given, num_candidates=num_candidates, **more)

    monkeypatch.setattr(steps_module, "sample_best", spy)
    is_edit = command[0] == "edit"  # a difference takes one, whatever is recommended for pictures
    for more, model, wanted in (((), recommending, 1 if is_edit else 4), (("--candidates", 3), recommending, 3)):
        done = run(*command, *more, "--json", model=model)
        assert done.code == 0, done.err
        assert json.loads(done.lines[0])["settings"]["num_prior_candidates"] == wanted
        assert asked.pop() == wanted
        assert not asked
    done = run(*command, "--json")
    assert json.loads(done.lines[0])["settings"].get("num_prior_candidates") == (1 if is_edit else None)
    assert asked == [1]
    assert run(*command, "--candidates", 0).code == 2
    for option, value in (("--prior-temperature", 0.5), ("--prior-top-p", 0.9)):
        done = run(*command, option, value)
        assert done.code == 1
        assert "a diffusion prior samples no codes" in done.err


@pytest.mark.parametrize(
    "command",
    [
        ("blend", "cat.png", "dog.png"),
        ("interpolate", "cat.png", "dog.png"),
        ("edit", "cat.png", "--from", "a cat", "--to", "a red apple", "--text-space"),
    ],
)
def test_nothing_is_drawn_where_no_caption_is_read(run, recommending, command):
    for option, value in (("--candidates", 2), ("--prior-temperature", 0.5), ("--prior-top-p", 0.9)):
        done = run(*command, option, value)
        assert (done.code, done.out) == (1, "")
        assert f"leave out {option}" in done.err
    done = run(*command, "--json", model=recommending)
    assert "num_prior_candidates" not in json.loads(done.lines[0])["settings"]


def test_a_latent_brings_its_prompt(run, model, files):
    tool = Manipulator.from_pretrained(model)
    with Image.open(files / "cat.png") as picture:
        settings = {"decoder_num_inference_steps": 3, "super_res_num_inference_steps": 2, "prompt": "a red apple"}
        tool.save(tool.invert(picture, **settings), files / "told.safetensors", settings=settings)
    untold = {name: value for name, value in settings.items() if name != "prompt"}
    tool.save(tool.load(files / "told.safetensors")[0], files / "plain.safetensors", settings=untold)
    told = run("vary", "told.safetensors", "--keep-structure", "--eta", 0, "--seed", 1)
    assert (told.code, texts(told.lines[0])["prompt"]) == (0, "a red apple")
    plain = run("vary", "plain.safetensors", "--keep-structure", "--eta", 0, "--seed", 1)
    asked = run("vary", "plain.safetensors", "--keep-structure", "--eta", 0, "--seed", 1, "--prompt", "a red apple")
    assert differ(told.lines[0], plain.lines[0])
    assert alike(told.lines[0], asked.lines[0])
    path = run("interpolate", "told.safetensors", "dog.png", "--json")
    assert json.loads(path.lines[0])["settings"]["prompt"] == "a red apple"


def test_probing(run, unclip, model, files):
    data = files / "data"
    data.mkdir()
    for place, colour in enumerate(("red", "green", "blue", "white", "black")):
        Image.new("RGB", (20, 20), colour).save(data / f"{place}.png")
    fitted = unclip("probe", "fit", data, "--model", model, "--out", files / "pca.safetensors")
    assert fitted.code == 0
    assert "5 pictures" in fitted.err
    assert unclip("probe", "fit", data, "--model", model, "--out", files / "pca.safetensors").code == 1
    done = run("probe show", "cat.png", "--pca", "pca.safetensors")
    assert [texts(path)["dimensions"] for path in done.lines] == ["0", "1", "2", "4"]
    assert differ(done.lines[0], done.lines[3])
    some = run("probe show", "cat.png", "--pca", "pca.safetensors", "--dims", "3,0", "--grid")
    assert len(names(some)) == 3
    assert alike(some.lines[1], done.lines[0])
    told = texts(some.lines[2])
    assert [told[name] for name in ("image", "pca", "dimensions")] == ["cat.png", "pca.safetensors", "3,0"]
    with Image.open(some.lines[2]) as sheet:
        assert sheet.height > 32  # each has a label
    for dims in ("5", "x", "-1"):
        assert "--dims" in run("probe show", "cat.png", "--pca", "pca.safetensors", f"--dims={dims}").err
    run("invert", "cat.png")
    assert "needed" in run("probe show", "cat.png", "--pca", "out/cat.safetensors").err


@pytest.fixture
def data(files):
    folder = files / "data"
    folder.mkdir()
    for place, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (20, 20), colour).save(folder / f"{place}.png")
    return folder


def test_components_lie_with_their_model(run, unclip, model, data, tmp_path):
    folder = shutil.copytree(model, tmp_path / "own")
    assert "probe fit" in run("probe show", "cat.png", model=folder).err
    fitted = unclip("probe", "fit", data, "--model", folder)
    assert fitted.lines == [str(folder / "probe.safetensors")]
    assert len(names(run("probe show", "cat.png", "--dims", "0,1", model=folder))) == 2
    assert "--overwrite" in unclip("probe", "fit", data, "--model", folder).err
    assert "--out" in unclip("probe", "fit", data, "--model", "unclip-emoji").err


def test_components_of_another_image_encoder(run, unclip, model, data, tmp_path):
    pca = tmp_path / "pca.safetensors"
    unclip("probe", "fit", data, "--model", model, "--out", pca)
    other = shutil.copytree(model, tmp_path / "other")
    encoder = CLIPVisionModelWithProjection.from_pretrained(other / "image_encoder")
    with torch.no_grad():
        encoder.visual_projection.weight.neg_()
    encoder.save_pretrained(other / "image_encoder")
    done = run("probe show", "cat.png", "--pca", pca, "--dims", "1", model=other)
    assert done.code == 1
    assert "image encoder" in done.err
    PrincipalComponents.load(pca).save(tmp_path / "old.safetensors")
    assert names(run("probe show", "cat.png", "--pca", tmp_path / "old.safetensors", "--dims", "1", model=other))


@pytest.mark.parametrize("kind", ["pictures", "records"])
def test_a_fit_on_some_of_the_pictures(unclip, model, data, files, kind):
    if kind == "records":
        rows = [{"file_name": f"{place}.png", "text": "a square"} for place in range(4)]
        (data / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    fitted = unclip("probe", "fit", data, "--model", model, "--out", files / "pca.safetensors", "--num-pictures", 3)
    assert fitted.code == 0
    assert "3 pictures" in fitted.err
    assert PrincipalComponents.load(files / "pca.safetensors").num_components == 2


def test_drawn_at_random():
    some = sampled(iter(range(10_000)), 500)
    assert len(set(some)) == 500
    assert 4_600 < sum(some) / 500 < 5_400  # five deviations of the mean are 645
    assert sum(place < 500 for place in some) < 60  # and of those that came first, 25
    assert some == sampled(range(10_000), 500)
    assert sampled(range(3), 5) == [0, 1, 2]
    assert list(sampled(range(3), None)) == [0, 1, 2]


def test_a_broken_picture_is_left_out_of_a_fit(unclip, model, data, files):
    (data / "broken.png").write_bytes(b"nonsense")
    fitted = unclip("probe", "fit", data, "--model", model, "--out", files / "pca.safetensors")
    assert fitted.code == 3
    assert fitted.lines == [str(files / "pca.safetensors")]
    assert "broken.png" in fitted.err
    assert "4 pictures" in fitted.err
    assert PrincipalComponents.load_with_texts(files / "pca.safetensors")[1]["num_pictures"] == "4"


def test_a_fit_on_shards_is_that_of_their_pictures(unclip, model, data, tmp_path):
    rows = [{"file_name": f"{place}.png", "text": "a square"} for place in range(4)]
    rows += [{"file_name": "cat.png", "text": "held out", "held_out": True}, {"file_name": "../0.png", "text": "away"}]
    shutil.copy(data / "0.png", data / "cat.png")
    shutil.copy(data / "0.png", data.parent / "0.png")
    (data / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert unclip("data", "pack", data, "--out", tmp_path / "shards", "--max-skipped", "1").code in (0, 3)
    fitted = [
        unclip("probe", "fit", source, "--model", model, "--out", tmp_path / f"{place}.safetensors", "--batch-size", 3)
        for place, source in enumerate((data, tmp_path / "shards"))
    ]
    assert "../0.png" in fitted[0].err
    assert (fitted[0].code, fitted[1].code) == (3, 0)
    assert all("4 pictures" in one.err for one in fitted)
    one, other = (PrincipalComponents.load(tmp_path / f"{place}.safetensors") for place in range(2))
    assert torch.equal(one.mean, other.mean)
    assert torch.equal(one.components, other.components)


def test_nothing_to_fit_on(unclip, model, files):
    (files / "empty").mkdir()
    done = unclip("probe", "fit", files / "empty", "--model", model, "--out", files / "pca.safetensors")
    assert done.code == 1
    assert "no pictures" in done.err


COMMANDS = {
    "vary": ("vary", "cat.png", *KEEP),
    "invert": ("invert", "cat.png", "--check", "--super-res"),
    "interpolate": ("interpolate", "a cat", "dog.png", "--frames", 1),
    "edit": ("edit", "cat.png", "--from", "a cat", "--to", "a red apple"),
    "edit by texts": ("edit", "cat.png", "--from", "a cat", "--to", "a red apple", "--text-space"),
    "blend": ("blend", "a cat", "dog.png", "--seed", 1),
    "probe": ("probe show", "cat.png", "--dims", "2", "--pca", "pca.safetensors"),
}


@pytest.fixture(params=COMMANDS.values(), ids=COMMANDS)
def command(request, run, unclip, model, data, files):
    """A command that draws, as a function of more options; it tells the last picture that it wrote."""
    if "--pca" in request.param:
        assert unclip("probe", "fit", data, "--model", model, "--out", files / "pca.safetensors").code == 0

    def last(*options):
        done = run(*request.param, *options)
        assert done.code == 0, done.err
        made = Path(done.lines[-1]).rename(f"{len(options)}.png")
        for path in Path("out").glob("*.safetensors"):
            path.unlink()
        return made

    return last


def test_offloading_changes_no_picture(command):
    assert alike(command("--device", "cpu"), command("--device", "cpu", "--cpu-offload"))


def test_tiles_reach_super_resolution(command):
    tiled = command("--tile", 16)
    assert not alike(tiled, command())
    assert json.loads(texts(tiled)["settings"])["super_res_tile_px"] == 16
    assert "super_res_tile_px" not in json.loads(texts(command())["settings"])


@pytest.mark.parametrize("offload", [False, True])
def test_the_prior_is_offloaded_as_all_others(model, offload):
    common = Common(Output(), Compute(device="cpu", cpu_offload=offload), quiet=True)
    manipulator = ManipulationRun.open(str(model), common, {}, captions=True).manipulator
    assert manipulator.text is not None
    networks = manipulator.variation.networks | manipulator.text.networks
    assert "prior" in networks
    offloaded = {name for name, network in networks.items() if offload_hooks(network)}
    assert offloaded == (set(networks) if offload else set())


def test_models_that_lack_a_part(run, text_to_image, variation):
    for command in (["invert", "cat.png"], ["interpolate", "cat.png", "dog.png"]):
        assert "cannot encode pictures" in run(*command, model=text_to_image).err
    assert "no prior" in run("interpolate", "cat.png", "a cat", model=variation).err
    assert names(run("interpolate", "cat.png", "dog.png", "--frames", 1, model=variation))


def test_parts_of_a_command(files, monkeypatch):
    monkeypatch.chdir(files)
    Image.new("RGB", (4, 4)).save(files / "a:2.png")
    assert read_part("cat.png").kind == "picture"
    assert read_part("a cat").kind == "caption"
    weighted = read_part("cat.png:-0.5", weighted=True)
    assert (weighted.kind, weighted.weight, weighted.name) == ("picture", -0.5, "cat.png")
    assert read_part("time: 3 o'clock", weighted=True).text == "time: 3 o'clock"
    assert read_part("a clock: 3", weighted=True).weight == 3
    assert read_part("a:2.png", weighted=True).kind == "picture"
    assert read_part("x" * 5000).kind == "caption"
    for wrong in ("none.png", "none.safetensors", "none.jfif", "pics/cat.Image", "my pics\\cat.x2", "~/none.heic:2"):
        with pytest.raises(InputError, match="does not exist"):
            read_part(wrong, weighted=True)
    for slip in ("none.pgn", "none.jpgg", "none.jepg", "none.pn", "~", "~/cat", "./cat", "/cat", "c:\\cat"):
        with pytest.raises(InputError, match=r"does not exist.*--caption"):
            read_part(slip)
        assert read_part(slip, caption=True).kind == "caption"
    with pytest.raises(InputError, match=r"did you mean 'cat\.png'"):
        read_part("cat.pgn")
    for caption in (
        "a.k.a. a cat",
        "what is it.",
        "vol.2",
        "a cat.its tail",
        "he/she/they",
        "and/or",
        "a black/white cat.",
        "AC/DC, vol. 2",
        "no. 5",
        "1/2 e.g. of a pear",
        "",
        "16:9",
    ):
        assert read_part(caption).kind == "caption"
    (files / "data").mkdir()
    (files / "data" / "lion.png").touch()
    with pytest.raises(InputError, match=r"did you mean 'data/lion\.png'"):
        read_part("data/lino.png")
    with pytest.raises(InputError, match="does not exist"):
        read_part("data/lion")
    for folder in ("data", "data/", ".", "data:0.5"):
        with pytest.raises(InputError, match="is a folder"):
            read_part(folder, weighted=True)
    with pytest.raises(InputError, match="finite"):
        read_part("a cat:inf", weighted=True)


def test_one_picture_of_every_command_goes_into_a_file(unclip, model, files, monkeypatch):
    monkeypatch.chdir(files)
    common = ["--model", model, *FEW, "--out"]

    for command, name in (
        (["vary", "cat.png"], "one.png"),
        (["edit", "cat.png", "--from", "a cat", "--to", "a dog"], "one.png"),
        (["blend", "cat.png", "dog.png"], "one.png"),
        (["redraw", "cat.png"], "one.png"),
        (["invert", "cat.png"], "one.safetensors"),
    ):
        path = files / command[0] / name
        done = unclip(*command, *common, path)
        assert done.code == 0, done.err
        assert done.lines == [str(path)]
        assert [each.name for each in path.parent.iterdir()] == [name]
    for command in (
        ["vary", "cat.png", "dog.png"],
        ["interpolate", "cat.png", "dog.png"],
        ["blend", "cat.png", "-n", 2],
    ):
        assert "name a folder" in unclip(*command, *common, files / "several.png").err
