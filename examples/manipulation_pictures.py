"""Run every command of docs/guides/manipulations.md, and put its pictures into docs/images/manipulations.

python examples/manipulation_pictures.py --data data/emoji
python examples/manipulation_pictures.py --data data/emoji --only edited blended    # those that go into these folders
"""

import argparse
import os
import re
import shlex
import shutil
import tempfile
import time
from pathlib import Path

from PIL import Image

from unclip.cli.main import app

DOCS = Path(__file__).resolve().parents[1] / "docs"
SOURCES = {"cat.png": "cat face", "dog.png": "dog face", "heart.png": "red heart"}
SHEET_WIDTH_PX = 900


def commands(guide: Path) -> list[list[str]]:
    """The arguments of every `unclip` line in the guide's shell blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("unclip ")]


def publish(name: str, made: Path, images: Path) -> None:
    """The sheet (and the film) of the command whose folder is `made`, as `name`."""
    with Image.open(next(made.glob("*-grid.png"))) as sheet:
        height = round(sheet.height * min(1, SHEET_WIDTH_PX / sheet.width))
        small = sheet.convert("RGB").resize((min(sheet.width, SHEET_WIDTH_PX), height), Image.Resampling.LANCZOS)
        small.quantize(128, dither=Image.Dither.NONE).save(images / f"{name}.png", optimize=True)
    for film in made.glob("*.webp"):
        shutil.copy(film, images / f"{name}.webp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the emoji data set")
    parser.add_argument("--only", nargs="+", metavar="OUT", help="run only the commands with these names after --out")
    asked = parser.parse_args()
    from unclip.data.folder import read_records

    images = DOCS / "images" / "manipulations"
    images.mkdir(parents=True, exist_ok=True)
    data = asked.data.resolve()
    files = {record.label: record.file_name for record in read_records(data) if record.style == "flat"}
    names = {"path": "pictures"}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name, label in SOURCES.items():
            shutil.copy(data / files[label], name)
        Path("data").mkdir()
        Path("data/emoji").symlink_to(data)
        for arguments in commands(DOCS / "guides" / "manipulations.md"):
            out = Path(arguments[arguments.index("--out") + 1]) if "--out" in arguments else None
            if asked.only and (out is None or out.name not in asked.only):
                continue
            begun = time.perf_counter()
            app([*arguments, "--quiet"], standalone_mode=False)
            print(f"{time.perf_counter() - begun:6.1f} s  unclip {shlex.join(arguments)}", flush=True)
            if out is not None and "--grid" in arguments:
                publish(names.get(out.name, out.name), out, images)


if __name__ == "__main__":
    main()
