"""`unclip rerun`: the same file again, byte for byte; what differs is named; options override."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from unclip.clip.encoders import TextEncoder
from unclip.models import kernels
from unclip.pipelines.text_to_image import UnCLIPPipeline

from .conftest import FEW_DECODER_STEPS, FEW_STEPS


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """Two pictures, one with a hole, a mask, in the current folder."""
    chance = np.random.default_rng(0)
    for name in ("cat.png", "dog.png"):
        Image.fromarray(chance.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / name)
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    mask.save(tmp_path / "mask.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def again(unclip, model):
    """Makes pictures by a command, makes one of them again, and compares the files."""

    def run(place: int, *arguments, extra=()):
        done = unclip(*arguments, "--model", model, "--out", "made", "--quiet")
        assert done.code == 0, done.err
        first = Path(done.lines[place])
        second = unclip("rerun", first, "--model", model, "--out", "again", *extra)
        assert second.code == 0, second.err
        assert "warning" not in second.err
        assert len(second.lines) == 1
        assert Path(second.lines[0]).read_bytes() == first.read_bytes()
        return first

    return run


@pytest.mark.parametrize(
    ("place", "arguments"),
    [
        (0, ["generate", "a cat", "--seed", 3, "--negative", "a", "--sampler", "ddim", *FEW_STEPS]),
        (0, ["generate", "a cat", "--reuse", 2, "--guidance-low", 0.2, "--guidance-high", 0.9, *FEW_STEPS]),
        (0, ["vary", "cat.png", "--super-res-reuse", 2, "--steps", 2, "--super-res-steps", 4]),
        (4, ["generate", "--prompts-file", "prompts.txt", "-n", 3, "--seed", 2**64 - 2, *FEW_STEPS]),
        (2, ["vary", "cat.png", "-n", 3, "--prompt", "a cat", "--size", "32x32", *FEW_DECODER_STEPS]),
        (1, ["vary", "cat.png", "-n", 2, "--keep-structure", "--eta", 0.3, *FEW_DECODER_STEPS]),
        (2, ["interpolate", "cat.png", "a dog", "--frames", 2, "--one-noise", *FEW_DECODER_STEPS]),
        (1, ["edit", "cat.png", "--from", "a cat", "--to", "-a red", "--sweep", 3, "--text-space", *FEW_DECODER_STEPS]),
        (1, ["blend", "cat.png:0.6", "a red apple:0.4", "-n", 2, *FEW_DECODER_STEPS]),
        (1, ["inpaint", "cat.png", "--mask", "mask.png", "-n", 2, "--prompt", "a", "--resamples", 2, *FEW_STEPS]),
        (0, ["redraw", "cat.png", "--strength", 0.6, "--embedding-from", "image", *FEW_STEPS]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else str(value),
)
def test_the_same_file(again, files, place, arguments):
    Path("prompts.txt").write_text("a cat\n-a red apple\n")
    again(place, *arguments)


def test_a_batch_of_several_prompts(again, files, monkeypatch):
    """Equal prompts are encoded once, and the last digits depend on the size of that batch."""
    sizes, whole = [], TextEncoder.encode

    def encode(self, prompts, device=None):
        sizes.append([list(dict.fromkeys(prompts)).index(prompt) for prompt in prompts])
        return whole(self, prompts, device)

    monkeypatch.setattr(TextEncoder, "encode", encode)
    again(3, "generate", "a cat", "a dog", "-n", 2, "--seed", 3, *FEW_STEPS)
    first, second = (sizes[half : half + len(sizes) // 2] for half in (0, len(sizes) // 2))
    assert [len(set(rows)) for rows in first] == [len(set(rows)) for rows in second]
    assert [0, 0, 1, 1] in first


def test_a_frame_of_a_probe(again, unclip, model, files):
    pca = ["probe", "fit", ".", "--model", model, "--out", "pca.safetensors", "--quiet"]
    assert unclip(*pca).code == 0
    again(1, "probe", "show", "cat.png", "--pca", "pca.safetensors", "--dims", "0,1", *FEW_DECODER_STEPS)


def test_a_row_of_a_latent(again, unclip, model, files):
    assert unclip("invert", "cat.png", "--model", model, *FEW_DECODER_STEPS).code == 0
    again(1, "vary", "cat.safetensors", "-n", 2, "--keep-structure")


def test_the_type_is_that_of_the_picture(again, unclip, model, files, monkeypatch):
    monkeypatch.delenv("UNCLIP_DTYPE")
    monkeypatch.setattr(kernels, "_cpu_computes", lambda dtype: True)
    picture = again(0, "generate", "a cat", "--seed", 3, *FEW_STEPS)
    assert '"dtype": "bfloat16"' in Image.open(picture).text["settings"]
    monkeypatch.setattr(kernels, "_cpu_computes", lambda dtype: False)
    done = unclip("rerun", picture, "--model", model, "--out", "elsewhere", "--json")
    assert json.loads(done.out)["settings"]["dtype"] == "bfloat16"


def test_options_override(unclip, model, files):
    first = unclip("generate", "a cat", "--seed", 3, "--model", model, *FEW_STEPS).lines[0]
    done = unclip("rerun", first, "--model", model, "--seed", 5, "--steps", 3, "--json", "-o", "other.png")
    assert done.code == 0, done.err
    made = json.loads(done.out)
    assert (made["path"], made["seed"]) == ("other.png", 5)
    assert made["settings"]["decoder_num_inference_steps"] == 3
    assert made["settings"]["prior_num_inference_steps"] == 2
    several = unclip("rerun", first, "--model", model, "-n", 2, "--out", "several")
    assert [Path(line).name for line in several.lines] == ["a-cat-3.png", "a-cat-4.png"]


def test_a_persons_defaults_do_not_change_the_picture(unclip, model, files, monkeypatch):
    first = unclip("generate", "a cat", "--seed", 3, "--model", model, *FEW_STEPS).lines[0]
    config = files / "config.toml"
    config.write_text('negative = "a"\ngrid = true\nout = "mine"\n')
    monkeypatch.setenv("UNCLIP_CONFIG", str(config))
    monkeypatch.setenv("UNCLIP_SAMPLER", "ddim")
    monkeypatch.setenv("UNCLIP_SIZE", "64")
    done = unclip("rerun", first, "--model", model)
    assert done.lines == ["mine/a-cat-3.png"]
    assert Path(done.lines[0]).read_bytes() == Path(first).read_bytes()


def retold(path: str | Path, **texts: str | None) -> Path:
    """The same picture with other texts."""
    with Image.open(path) as image:
        found = {**image.text, **texts}
        info = PngInfo()
        for name, text in found.items():
            if text is not None:
                info.add_text(name, text)
        image.save("retold.png", pnginfo=info)
    return Path("retold.png")


def test_what_differs_is_named(unclip, model, files):
    first = unclip("generate", "a cat", "--seed", 3, "--model", model, *FEW_STEPS).lines[0]
    with Image.open(first) as image:
        made = json.loads(image.text["made_with"])
    assert made["command"] == "generate"
    assert made["model_fingerprint"]
    other = json.dumps({**made, "unclip": "0.0.9", "torch": "1.0", "device": "cuda (X)", "model_fingerprint": "0" * 16})
    done = unclip("rerun", retold(first, made_with=other), "--model", model, "--out", "again")
    assert done.code == 0, done.err
    for what in (
        "version of unclip was 0.0.9",
        "version of PyTorch was 1.0",
        "device was cuda (X)",
        "weights of the model",
    ):
        assert f"warning: the {what}" in done.err


def test_weights_that_changed_are_noticed(unclip, model, files):
    first = unclip("generate", "a cat", "--seed", 3, "--model", model, *FEW_STEPS).lines[0]
    pipe = UnCLIPPipeline.from_pretrained(model)
    pipe.prior.proj_in.weight.data.neg_()
    pipe.save_pretrained("other")
    done = unclip("rerun", first, "--model", "other", "--out", "again")
    assert done.code == 0, done.err
    assert "weights of the model" in done.err


def test_pictures_from_before(unclip, model, files):
    """Without the text `made_with`, as far as the other texts say enough."""
    common = ["--seed", 3, "--model", model]
    for command in (
        ["generate", "a cat", "--negative", "a", *FEW_STEPS],
        ["vary", "cat.png", "--prompt", "a cat", *FEW_DECODER_STEPS],
        ["inpaint", "cat.png", "--mask", "mask.png", "--prompt", "a cat", *FEW_STEPS],
        ["redraw", "cat.png", "--strength", 0.6, *FEW_STEPS],
        ["edit", "cat.png", "--from", "a cat", "--to", "a red apple", *FEW_DECODER_STEPS],
    ):
        done = unclip(*command, *common, "--out", command[0])
        assert done.code == 0, done.err
        old = retold(done.lines[0], made_with=None)
        new = unclip("rerun", old, "--model", model, "--out", "again")
        assert new.code == 0, new.err
        with Image.open(new.lines[0]) as one, Image.open(done.lines[0]) as other:
            assert one.tobytes() == other.tobytes()


def test_inputs_that_are_gone(unclip, model, files):
    first = unclip("vary", "cat.png", "--seed", 3, "--model", model, *FEW_DECODER_STEPS, "--out", "made").lines[0]
    mixed = unclip("blend", "cat.png:0.5", "a", "--seed", 3, "--model", model, *FEW_DECODER_STEPS).lines[0]
    (files / "photos").mkdir()
    shutil.move("cat.png", "photos")
    for picture in (first, mixed):
        done = unclip("rerun", picture, "--model", model, "--out", "again")
        assert done.code == 1
        assert "'cat.png" in done.err
        assert "--inputs" in done.err
        done = unclip("rerun", picture, "--model", model, "--inputs", "photos", "--out", "again")
        assert done.code == 0, done.err


def test_the_model_is_found_by_its_name(unclip, model, files):
    first = unclip("generate", "a cat", "--seed", 3, "--model", model, *FEW_STEPS).lines[0]
    done = unclip("rerun", first)
    assert done.code == 1
    assert "tiny" in done.err
    shutil.copytree(model, files / "tiny")
    assert unclip("rerun", first).code == 0


@pytest.mark.parametrize(
    "made",
    [
        "[]",
        "{}",
        "no JSON",
        '{"command": "convert pickle", "options": {}, "index": 0, "batch": [0, 1]}',
        '{"command": "generate", "options": {"out": "/tmp"}, "index": 0, "batch": [0, 1]}',
        '{"command": "generate", "options": {"nonsense": 1}, "index": 0, "batch": [0, 1]}',
        '{"command": "generate", "options": {}, "index": 7, "batch": [0, 1]}',
        '{"command": "generate", "options": {}, "index": 0, "batch": [0, 1000000]}',
        '{"command": "generate", "options": 3, "index": 0, "batch": [0, 1]}',
        '{"command": "generate", "options": {}, "index": 0, "batch": [0, 2], "prompts": [0]}',
        '{"command": "generate", "options": {}, "index": 0, "batch": [0, 2], "prompts": [0, 9]}',
        '{"command": "generate", "options": {}, "index": 0, "batch": [0, 2], "prompts": 7}',
    ],
)
def test_damaged_texts(unclip, model, files, made):
    picture = retold("cat.png", seed="1", model="tiny", prompt=None, made_with=made)
    done = unclip("rerun", picture, "--model", model, *FEW_STEPS)
    assert done.code in (1, 2)
    assert "error: " in done.err
    assert "Traceback" not in done.err


def test_pictures_of_others(unclip, files):
    for name, why in (("cat.png", "does not record how it was made"), ("car.png", "did you mean 'cat.png'")):
        done = unclip("rerun", name)
        assert (done.code, done.out) == (1, "")
        assert why in done.err


def test_sheets_are_refused(unclip, model, files):
    sheet = unclip("generate", "a cat", "-n", 2, "--grid", "--seed", 3, "--model", model, *FEW_STEPS).lines[-1]
    assert "sheet" in unclip("rerun", sheet, "--model", model).err
