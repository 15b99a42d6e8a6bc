"""Draw the pictures of the editing guide with the built-in model, by the guide's own commands.

python examples/editing_pictures.py          # writes docs/images/editing/*.png, in about ten minutes on one core
"""

import argparse
import os
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw

from unclip import UnCLIPInpaintPipeline, UnCLIPPipeline
from unclip.cli.main import app
from unclip.images import grid, labelled

COMMANDS = [
    ["generate", "dog face", "--seed", "1"],
    ["inpaint", "dog-face-1.png", "--mask", "mask.png", "--prompt", "cat face", "--seed", "3"],
    ["inpaint", "dog-face-1.png", "--mask", "mask.png", "--seed", "4"],
    *(
        ["redraw", "dog-face-1.png", "--prompt", "lion", "--strength", strength, "--seed", seed]
        for strength, seed in (("0.4", "3"), ("0.6", "4"), ("0.75", "5"), ("0.9", "6"))
    ),
    ["generate", "rainbow", "--width", "224", "--height", "128", "--seed", "2"],
]
SHOWN = {
    "inpaint.png": [
        ("dog-face-1.png", "dog face"),
        ("mask.png", "the mask"),
        ("dog-face-1-inpaint-3.png", "cat face"),
        ("dog-face-1-inpaint-4.png", "no prompt"),
    ],
    "redraw.png": [
        ("dog-face-1.png", "dog face"),
        ("dog-face-1-redraw-3.png", "lion, 0.4"),
        ("dog-face-1-redraw-4.png", "lion, 0.6"),
        ("dog-face-1-redraw-5.png", "lion, 0.75"),
        ("dog-face-1-redraw-6.png", "lion, 0.9"),
    ],
    "wide.png": [("rainbow-2.png", "")],
}
# What is there, and what is asked for in the masked part; None: what is there already.
EDITS = [
    ("red apple", "green apple"), ("dog face", "cat face"), ("cat face", "tiger face"), ("lion", "dog face"),
    ("pizza", "pizza"), ("birthday cake", "cupcake"), ("rose", "sunflower"), ("fish", "whale"),
    ("butterfly", "butterfly"), ("red heart", "blue heart"), ("banana", None), ("hamburger", None),
    ("cactus", None), ("evergreen tree", None), ("rainbow", None), ("fire", None),
    ("smiling face", None), ("automobile", None), ("rocket", None), ("soccer ball", None),
]  # fmt: skip


def half_mask() -> Image.Image:
    """White, to be drawn anew, in the right half."""
    mask = Image.new("L", (128, 128), "black")
    mask.paste("white", (64, 0, 128, 128))
    return mask


def ellipse_mask() -> Image.Image:
    """White in an ellipse right of the middle."""
    mask = Image.new("L", (128, 128), "black")
    ImageDraw.Draw(mask).ellipse((52, 20, 120, 108), fill="white")
    return mask


def save(sheet: Image.Image, path: Path) -> None:
    """Small enough for a repository: 256 colours."""
    sheet.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def draw_guide(folder: Path) -> None:
    """The pictures that the guide's commands make, in a folder that is thrown away."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        try:
            half_mask().save("mask.png")
            for command in COMMANDS:
                app([*command, "--quiet"], standalone_mode=False)
            for name, pictures in SHOWN.items():
                opened = [(Image.open(file).convert("RGB"), text) for file, text in pictures]
                cards = [labelled(image, text) if text else image for image, text in opened]
                save(grid(cards, columns=len(cards), gap=8), folder / name)
        finally:
            os.chdir(before)


def draw_sheet(folder: Path) -> None:
    """Twenty inpaintings: the picture, what is known of it, and the result."""
    pipe = UnCLIPInpaintPipeline.from_pretrained("unclip-emoji")
    pipe.set_progress_bar_config(leave=False)
    mask = ellipse_mask()
    originals = UnCLIPPipeline.from_pipe(pipe)([there for there, _ in EDITS], seed=1, **pipe.recommended).images
    cards = []
    for place, (original, (there, asked)) in enumerate(zip(originals, EDITS, strict=True)):
        known = original.copy()
        known.paste("#8090a0", (0, 0), mask)
        result = pipe(asked, original, mask, seed=100 + place, **pipe.recommended).images[0]
        triple = grid([original, known, result], columns=3, gap=2).resize((198, 66), Image.Resampling.LANCZOS)
        cards.append(labelled(triple, f"{there}: {asked}" if asked else f"{there}, no prompt"))
    save(grid(cards, columns=4, gap=10), folder / "twenty.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "images" / "editing")
    folder: Path = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    draw_guide(folder)
    draw_sheet(folder)


if __name__ == "__main__":
    main()
