"""Run the commands of the guides, each in a new process, and write their pictures to docs/images.

It prints a table of the seconds from start to exit.

python examples/guide_pictures.py --data data/emoji           # all guides, in about ten minutes
python examples/guide_pictures.py --guide manipulations       # one guide; without --data, `probe fit` is left out
python examples/guide_pictures.py --only generate edited      # only commands that contain one of these words
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image, ImageDraw

from unclip import UnCLIPInpaintPipeline, UnCLIPPipeline
from unclip.images import grid, labelled, open_image

DOCS = Path(__file__).resolve().parents[1] / "docs"
GUIDES = ("manipulations", "editing", "priors")
SHEET_WIDTH_PX = 900
NAMES = {"path": "pictures"}
"""The names of sheets whose folder has another name."""
CANDIDATES = ["lion-1", "rocket-2", "rose-3", "penguin-4", "sailboat-5"]
# Figures made from the pictures of several commands: rows of files and labels.
SHOWN = {
    "manipulations": {
        "inverted.png": [[("cat-face-1.png", "the picture"), ("latents/cat-face-1-reconstruction.png", "decoded")]],
    },
    "editing": {
        "inpaint.png": [
            [
                ("dog-face-1.png", "dog face"),
                ("mask.png", "the mask"),
                ("dog-face-1-inpaint-3.png", "cat face"),
                ("dog-face-1-inpaint-4.png", "no prompt"),
            ]
        ],
        "redraw.png": [
            [
                ("dog-face-1.png", "dog face"),
                ("dog-face-1-redraw-3.png", "lion, 0.4"),
                ("dog-face-1-redraw-4.png", "lion, 0.6"),
                ("dog-face-1-redraw-5.png", "lion, 0.75"),
                ("dog-face-1-redraw-6.png", "lion, 0.9"),
            ]
        ],
        "wide.png": [[("rainbow-2.png", "")]],
        "enlarged.png": [[("dog-face-1.png", "128 px"), ("large/dog-face-1.png", "512 px, by a further stage")]],
    },
    "priors": {
        "candidates.png": [
            [(f"{folder}/{name}.png", label) for name in CANDIDATES]
            for folder, label in (("one", "the first"), ("four", "the best of four"))
        ],
    },
}
# The picture, and the caption for its masked part; None: no caption.
EDITS = [
    ("red apple", "green apple"), ("dog face", "cat face"), ("cat face", "tiger face"), ("lion", "dog face"),
    ("pizza", "pizza"), ("birthday cake", "cupcake"), ("rose", "sunflower"), ("fish", "whale"),
    ("butterfly", "butterfly"), ("red heart", "blue heart"), ("banana", None), ("hamburger", None),
    ("cactus", None), ("evergreen tree", None), ("rainbow", None), ("fire", None),
    ("smiling face", None), ("automobile", None), ("rocket", None), ("soccer ball", None),
]  # fmt: skip


def commands(guide: str) -> list[list[str]]:
    """The arguments of the `unclip` commands in the guide, without training, downloads and lines with placeholders."""
    text = (DOCS / "guides" / f"{guide}.md").read_text(encoding="utf-8")
    lines = "\n".join(re.findall(r"```(?:sh|console)\n(.*?)```", text, re.DOTALL)).replace("\\\n", "").splitlines()
    bare = [line.removeprefix("$ ") for line in lines]
    found = [shlex.split(line)[1:] for line in bare if line.startswith("unclip ")]
    return [args for args in found if args[0] not in ("train", "data") and not {"RUN", "DIR", "…"} & set(args)]


def half_mask() -> Image.Image:
    """A mask that selects the right half."""
    mask = Image.new("L", (128, 128), "black")
    mask.paste("white", (64, 0, 128, 128))
    return mask


def ellipse_mask() -> Image.Image:
    """A mask that selects an ellipse right of the centre."""
    mask = Image.new("L", (128, 128), "black")
    ImageDraw.Draw(mask).ellipse((52, 20, 120, 108), fill="white")
    return mask


def save(sheet: Image.Image, path: Path) -> None:
    """Save a small file: 256 colours, at most 900 pixels wide."""
    height = round(sheet.height * min(1, SHEET_WIDTH_PX / sheet.width))
    small = sheet.convert("RGB").resize((min(sheet.width, SHEET_WIDTH_PX), height), Image.Resampling.LANCZOS)
    small.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def publish(name: str, made: Path, images: Path) -> None:
    """Save the sheet and the animation in the folder `made` as `name`."""
    with Image.open(next(made.glob("*-grid.png"))) as sheet:
        save(sheet, images / f"{name}.png")
    for film in made.glob("*.webp"):
        shutil.copy(film, images / f"{name}.webp")


def compose(rows: list[list[tuple[str, str]]]) -> Image.Image:
    """Labelled pictures side by side, all enlarged to the largest size without interpolation."""
    opened = [(open_image(file), text) for row in rows for file, text in row]
    size = max((image.size for image, _ in opened), key=lambda size: size[1])
    cards = [(image.resize(size, Image.Resampling.NEAREST), text) for image, text in opened]
    return grid([labelled(image, text) if text else image for image, text in cards], columns=len(rows[0]), gap=8)


def draw_guide(guide: str, data: Path | None, images: Path, only: list[str] | None) -> None:
    """Run the guide's commands in the current, temporary folder, and save their pictures."""
    if data is not None:
        Path("data").mkdir()
        Path("data/emoji").symlink_to(data)
    half_mask().save("mask.png")
    for arguments in commands(guide):
        if only and not set(only) & set(arguments):
            continue
        if data is None and {"data/emoji", "pca.safetensors"} & set(arguments):
            continue
        begun = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "unclip", *arguments], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"unclip {shlex.join(arguments)}\n{done.stderr}")
        print(f"| `unclip {shlex.join(arguments)}` | {time.perf_counter() - begun:.1f} |", flush=True)
        if "--grid" in arguments:
            made = Path(arguments[arguments.index("--out") + 1])
            publish(NAMES.get(made.name, made.name), made, images)
    for name, rows in SHOWN[guide].items():
        if all(Path(file).is_file() for row in rows for file, _ in row):
            save(compose(rows), images / name)


def draw_twenty(images: Path) -> None:
    """Draw twenty examples of inpainting: the picture, its known part, and the result."""
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
    save(grid(cards, columns=4, gap=10), images / "twenty.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="the emoji data set, which `unclip probe fit` needs")
    parser.add_argument("--guide", choices=GUIDES, help="only this guide")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only commands that contain one of these words")
    asked = parser.parse_args()
    data, before = asked.data and asked.data.resolve(), Path.cwd()
    print("| command | seconds |\n|---|---|")
    for guide in [asked.guide] if asked.guide else GUIDES:
        images = DOCS / "images" / guide
        images.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                draw_guide(guide, data, images, asked.only)
            finally:
                os.chdir(before)
        if guide == "editing" and not asked.only:
            draw_twenty(images)


if __name__ == "__main__":
    main()
