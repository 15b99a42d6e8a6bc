"""Twelve small pictures with captions, and the tiny recipes pointed at them."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image, ImageDraw

from unclip.training.clip import ClipTask
from unclip.training.recipe import Recipe, read_recipe

RECIPES = Path(__file__).parents[2] / "recipes" / "tiny"
COLOURS = ("red", "green", "blue", "orange")
SHAPES = ("circle", "square", "bar")


def write_pictures(folder: Path) -> Path:
    """Twelve pictures of 32×32, two of them held out, with `metadata.jsonl`."""
    folder.mkdir(parents=True)
    rows = []
    for colour in COLOURS:
        for shape in SHAPES:
            image = Image.new("RGB", (32, 32), "white")
            box = {"circle": (6, 6, 26, 26), "square": (8, 8, 24, 24), "bar": (2, 12, 30, 20)}[shape]
            pen = ImageDraw.Draw(image)
            (pen.ellipse if shape == "circle" else pen.rectangle)(box, fill=colour)
            name = f"{colour}-{shape}.png"
            image.save(folder / name)
            label = f"{colour} {shape}"
            rows.append(
                {
                    "file_name": name,
                    "concept": label,
                    "style": "flat",
                    "captions": [label, f"a {label}", f"a picture of a {label}"],
                    "weight": 2.0 if shape == "circle" else 1.0,
                    "held_out": label in ("orange bar", "green bar"),
                }
            )
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="session")
def clip_model(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """A CLIP of random weights in a run's layout."""
    recipe = dataclasses.replace(read_recipe(RECIPES / "clip.toml"), data=pictures)
    folder = tmp_path_factory.mktemp("clip") / "model"
    with torch.random.fork_rng():
        ClipTask(recipe).save(folder)
    return folder


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    """Accelerate keeps the precision of a process's first trainer."""
    with torch.random.fork_rng():
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def tiny(pictures: Path, clip_model: Path) -> Callable[..., Recipe]:
    """A tiny recipe: `tiny("prior", steps=3, section={"text_drop": 0.0})`."""

    def recipe(stage: str, *, section: dict[str, Any] | None = None, **changes: Any) -> Recipe:
        read = read_recipe(RECIPES / f"{stage}.toml")
        places = {"clip": clip_model} if stage in ("prior", "prior_autoregressive", "decoder") else {}
        settings = dataclasses.replace(getattr(read, stage), **places | (section or {}))
        return dataclasses.replace(read, **{"data": pictures, stage: settings, **changes})

    return recipe
