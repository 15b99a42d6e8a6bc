"""What the drawing commands import: no transformers, and nothing of PyTorch's compiler, which take seconds."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from unclip.pipelines import component, pipeline

from .conftest import FEW_DECODER_STEPS, FEW_STEPS

HEAVY = (
    "accelerate",
    "diffusers",
    "huggingface_hub",
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.tensor",
    "transformers",
)
PROBE = f"""
import sys
from unclip.cli.main import main
try:
    main()
except SystemExit as leaving:
    assert not leaving.code, leaving.code
print([name for name in {HEAVY} if name in sys.modules])
"""


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    return path


def imported(*arguments: object, steps: list[str], out) -> list[str]:
    """Which of `HEAVY` a command has imported by its end."""
    command = [sys.executable, "-c", PROBE, *map(str, arguments), *steps, "--seed", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    *paths, found = done.stdout.splitlines()
    assert len(paths) == 1
    with Image.open(paths[0]) as picture:
        assert picture.format == "PNG"
    return json.loads(found.replace("'", '"'))


def test_generate_with_the_built_in_model(tmp_path):
    assert imported("generate", "a strawberry", steps=FEW_STEPS, out=tmp_path) == []


def test_generate_with_a_folder(text_to_image, tmp_path):
    assert imported("generate", "a cat", "--model", text_to_image, steps=FEW_STEPS, out=tmp_path) == []


def test_vary(model, photo, tmp_path):
    assert imported("vary", photo, "--model", model, steps=FEW_DECODER_STEPS, out=tmp_path) == []


def test_redraw(model, photo, tmp_path):
    arguments = ("redraw", photo, "--prompt", "a cat", "--model", model)
    assert imported(*arguments, steps=FEW_STEPS, out=tmp_path) == []


def test_the_probe_sees_what_is_imported(text_to_image, tmp_path):
    """A configuration that only transformers implements brings it in; so the tests above can fail."""
    folder = shutil.copytree(text_to_image, tmp_path / "other")
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_act": "gelu_new"}))
    found = imported("generate", "a cat", "--model", folder, steps=FEW_STEPS, out=tmp_path)
    assert {"transformers", "torch._dynamo"} <= set(found)


def without_own_clip(*arguments, own_clip, **named):
    assert own_clip
    return component.read_component(*arguments, **named)


@pytest.mark.parametrize("command", ["generate", "vary", "redraw"])
def test_the_files_are_those_that_transformers_makes(unclip, model, photo, tmp_path, monkeypatch, command):
    """Names, pixels and texts of the picture files, to the byte."""
    arguments = {
        "generate": ["a red apple", "a cat", "--negative", "a", "--grid", *FEW_STEPS],
        "vary": [photo, "--prompt", "a cat", *FEW_DECODER_STEPS],
        "redraw": [photo, "--prompt", "a cat", *FEW_STEPS],
    }[command]
    files = {}
    for kind in ("own", "theirs"):
        if kind == "theirs":
            monkeypatch.setattr(pipeline, "read_component", without_own_clip)
        done = unclip(command, *arguments, "--model", model, "--seed", 3, "--out", tmp_path / kind)
        assert done.code == 0, done.err
        files[kind] = {path.name: path.read_bytes() for path in (tmp_path / kind).iterdir()}
    assert files["own"] == files["theirs"]
    assert files["own"]


def test_transformers_keeps_quiet_when_it_is_imported_later(tmp_path):
    """Its bars and advice, and the hub's bars, if asked."""
    code = """
from unclip.pipelines.session import silence_later
import sys
assert "transformers" not in sys.modules and "huggingface_hub" not in sys.modules
silence_later(downloads=True)
assert "transformers" not in sys.modules and "huggingface_hub" not in sys.modules
from transformers.utils import logging
from huggingface_hub.utils import are_progress_bars_disabled
assert logging.get_verbosity() == logging.ERROR
assert are_progress_bars_disabled() and not logging.is_progress_bar_enabled()
silence_later(downloads=True)
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TRANSFORMERS_", "HF_HUB_"))}
    subprocess.run([sys.executable, "-c", code], check=True, env=clean)
