"""Make the pictures of the README with the built-in model.

python examples/readme_pictures.py                                         # writes docs/images/*.png
python examples/readme_pictures.py --wordings wordings.json                # forty free wordings and what the judge saw
python examples/readme_pictures.py --evaluated sheet-held-out.png held-out # the first rows of an evaluation sheet
"""

import argparse
import json
import random
from pathlib import Path

from guide_pictures import save
from PIL import Image

from unclip import UnCLIPImageVariationPipeline, UnCLIPPipeline
from unclip.checkpoints.hub import BUILT_IN_JUDGE, resolve
from unclip.evaluation.wordings import read_wordings
from unclip.images import grid, labelled

CAPTIONS = [
    "red apple", "banana", "pizza", "hamburger", "birthday cake",
    "cat face", "dog face", "lion", "fish", "butterfly",
    "rose", "cactus", "evergreen tree", "rainbow", "fire",
    "red heart", "smiling face", "automobile", "rocket", "soccer ball",
]  # fmt: skip
EVALUATED_ROWS_PX = 8 * (128 + 18 + 12) - 12
"""The height of eight rows of a sheet of `unclip evaluate`."""
VARIED = ["red apple", "dog face", "rocket"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="unclip-emoji")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "images", metavar="DIR")
    parser.add_argument("--evaluated", nargs=2, metavar=("SHEET", "NAME"), help="only save the first rows of a sheet")
    parser.add_argument("--wordings", type=Path, metavar="REPORT", help="only the sheet of forty wordings of a report")
    args = parser.parse_args()
    folder: Path = args.out
    folder.mkdir(parents=True, exist_ok=True)
    if args.evaluated is not None:
        path, name = args.evaluated
        with Image.open(path) as whole:
            save(whole.crop((0, 0, whole.width, min(whole.height, EVALUATED_ROWS_PX))), folder / f"{name}.png")
        return
    pipe = UnCLIPPipeline.from_pretrained(args.model)
    if args.wordings is not None:
        draw_wordings(pipe, args.wordings, folder / "wordings.png")
        return
    vary = UnCLIPImageVariationPipeline.from_pretrained(args.model)
    images = pipe(CAPTIONS, seed=1, **pipe.recommended).images
    sheet = [labelled(image, text) for image, text in zip(images, CAPTIONS, strict=True)]
    grid(sheet, columns=5, gap=8).save(folder / "sheet.png", optimize=True)

    originals = [images[CAPTIONS.index(text)] for text in VARIED]
    variations = vary(originals, num_images_per_prompt=5, seed=100, **vary.recommended).images
    rows = []
    for place, original in enumerate(originals):
        rows += [original, *variations[5 * place : 5 * place + 5]]
    grid(rows, columns=6, gap=8).save(folder / "variations.png", optimize=True)


def draw_wordings(pipe: UnCLIPPipeline, report: Path, path: Path) -> None:
    """Forty random wordings with the seeds of `unclip evaluate wordings`; under each, the judge's caption if wrong."""
    listed = [wording for wording in read_wordings(resolve(BUILT_IN_JUDGE) / "wordings.json") if wording.accepted]
    first = json.loads(report.read_text(encoding="utf-8"))["wordings"]["first_captions"]
    chosen = sorted(random.Random(0).sample(range(len(listed)), 40))
    images = pipe([listed[row].text for row in chosen], seed=chosen, **pipe.recommended).images
    cards = []
    for row, image in zip(chosen, images, strict=True):
        seen = first[listed[row].text][0]
        cards.append(labelled(labelled(image, listed[row].text), "" if seen in listed[row].accepted else f"({seen})"))
    save(grid(cards, columns=8, gap=8), path)


if __name__ == "__main__":
    main()
