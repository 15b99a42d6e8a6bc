"""Compose pictures of single objects, with captions: other colours, backgrounds, scenes of two objects.

Training on them teaches that captions compose: "a purple apple", "a cat left of a star on a blue background".
"""

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unclip.checkpoints.files import atomic_folder, safe_join
from unclip.data.folder import Record, read_records
from unclip.errors import DataError
from unclip.images import open_image

HUES = {"red": 0, "orange": 28, "yellow": 52, "green": 125, "blue": 215, "purple": 275, "pink": 325}
"""Degrees on the colour circle."""
BACKGROUNDS = {
    "red": "#e23b3b", "orange": "#f5902e", "yellow": "#f9d84a", "green": "#4fb05a", "blue": "#4a8fe0",
    "purple": "#8d5bc7", "pink": "#f29ac0", "black": "#20222a", "grey": "#9aa0a6", "brown": "#8a5a3b",
}  # fmt: skip
COLOUR_WORDS = frozenset(HUES) | frozenset(BACKGROUNDS) | {"white", "gray", "light", "dark", "golden", "hollow"}
LEFT_ALONE = frozenset({"person", "man", "woman", "people", "boy", "girl", "prohibited", "o’clock"})
"""Words of labels that are not composed."""
PLACES = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}

HUE_REACH = 45.0
"""Pixels within this many degrees of an object's main hue are recoloured."""
MIN_SHARE = 0.45
"""The share of an object's pixels that must have its main hue before it can be recoloured."""
MIN_DIFFERENCE = 35.0
"""The least distance in degrees between an object's main hue and its new one."""
MAX_WORDS = 3
"""The length of a label. Longer labels describe whole scenes."""
HELD_OUT_SHARE = 0.05
HELD_OUT_SALT = "unclip-composed-1"

STYLE = "composed"
"""The style of every composed record."""
KINDS = {"colour": 0.3, "background": 0.3, "colour on background": 0.1, "scene": 0.2, "scene on background": 0.1}
"""The share of each kind."""


@dataclass(frozen=True)
class Thing:
    """A picture with transparency, and a noun for the object that it shows."""

    record: Record
    image: Image.Image
    noun: str
    hue: float | None
    """The object's main hue in degrees, if it has one."""


def compose(
    data: Path,
    out: Path,
    *,
    count: int,
    seed: int = 0,
    weight: float = 1.0,
    progress: Callable[..., Any] | None = None,
) -> dict[str, int]:
    """Write a data set of composed pictures. The folder is created atomically.

    Objects are sampled by their weights. A hash of the names decides which combinations are held out of training.

    Args:
        data: a folder of pictures with transparency and labels, such as that of `unclip data emoji`.
        out: the folder to create.
        count: number of pictures.
        seed: random seed.
        weight: weight of each picture in training.
        progress: wraps an iterable, as `tqdm` does.

    Returns: the number of pictures of each kind, and of held-out ones.

    Raises:
        DataError: the data set does not exist, or none of its pictures can be composed.
        OutputExistsError: `out` exists.
    """
    things = list(read_things(data))
    if len(things) < 2:
        raise DataError(f"{data} has {len(things)} pictures that can be composed; they need labels and transparency")
    draw = np.random.default_rng(seed)
    chances = np.array([thing.record.weight for thing in things])
    chances /= chances.sum()
    counts = dict.fromkeys([*KINDS, "held out"], 0)
    with atomic_folder(out) as draft, open(draft / "metadata.jsonl", "w", encoding="utf-8") as lines:
        numbers = range(count)
        for number in progress(numbers, desc="composing", unit="picture") if progress else numbers:
            kind, image, captions, held_out = _made(things, chances, draw)
            file_name = f"{number // 1000:03}/{number:06}.png"
            (draft / file_name).parent.mkdir(exist_ok=True)
            content = io.BytesIO()
            image.save(content, "PNG")
            (draft / file_name).write_bytes(content.getvalue())
            record = Record(file_name, captions, style=STYLE, weight=weight, held_out=held_out)
            lines.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")
            counts[kind] += 1
            counts["held out"] += held_out
    return counts


def read_things(data: Path) -> Iterator[Thing]:
    """The objects that can be composed: one picture of each trained concept with a short label."""
    seen: set[str] = set()
    for record in read_records(data):
        noun = noun_of(record.label)
        if record.held_out or not record.weight or noun is None or (record.concept or record.file_name) in seen:
            continue
        seen.add(record.concept or record.file_name)
        rgba = open_image(safe_join(Path(data), record.file_name), keep_alpha=True).convert("RGBA")
        if np.asarray(rgba)[..., 3].min() > 0:  # no transparency
            continue
        yield Thing(record, rgba, noun, own_hue(rgba))


def noun_of(label: str) -> str | None:
    """The noun of a label: "apple" of "Red apple", "cat" of "cat face"; None if it is too long or has other signs."""
    words = label.lower().split()
    while words and words[0] in COLOUR_WORDS:
        words = words[1:]
    if len(words) == 2 and words[1] == "face":
        words = words[:1]
    good = words and len(words) <= MAX_WORDS and all(re.fullmatch(r"[a-z][a-z’'-]*", word) for word in words)
    return " ".join(words) if good and not (COLOUR_WORDS | LEFT_ALONE) & set(words) else None


def own_hue(image: Image.Image) -> float | None:
    """The main hue of an object in degrees; None for a grey, dark or many-coloured object."""
    hue, vivid, opaque = _hues(image)
    if not vivid.any():
        return None
    bins = np.bincount((hue[vivid] // 10).astype(int) % 36, minlength=36)
    around = bins + np.roll(bins, 1) + np.roll(bins, -1)
    centre = float(around.argmax()) * 10 + 5
    near = vivid & (_distance(hue, centre) <= HUE_REACH)
    return centre if near.sum() >= MIN_SHARE * opaque.sum() else None


def recoloured(image: Image.Image, hue: float, colour: str) -> Image.Image:
    """The object with the pixels of its main `hue` changed to `colour`. Light, shade and other colours are kept."""
    found, vivid, _ = _hues(image)
    chosen = vivid & (_distance(found, hue) <= HUE_REACH)
    hsv = np.asarray(image.convert("RGB").convert("HSV")).copy()
    turned = (found + HUES[colour] - hue) % 360
    # Move closer to the target hue, so that shades of one object do not become two colours.
    turned = HUES[colour] + ((turned - HUES[colour] + 180) % 360 - 180) * 0.4
    hsv[..., 0] = np.where(chosen, (turned % 360) / 360 * 255, hsv[..., 0]).astype(np.uint8)
    if colour == "pink":
        hsv[..., 1] = np.where(chosen, hsv[..., 1] * 0.6, hsv[..., 1]).astype(np.uint8)
        hsv[..., 2] = np.where(chosen, 255 - (255 - hsv[..., 2]) * 0.4, hsv[..., 2]).astype(np.uint8)
    rgb = Image.fromarray(hsv, "HSV").convert("RGB")
    rgb.putalpha(image.getchannel("A"))
    return rgb


def on_background(image: Image.Image, colour: str | None) -> Image.Image:
    """The object on a plain colour, slightly smaller, or on white in its own size if `colour` is None. RGB."""
    if colour is None:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image)
        return canvas.convert("RGB")
    canvas = Image.new("RGBA", image.size, BACKGROUNDS[colour])
    side = round(image.width * 0.86)
    small = image.resize((side, side), Image.Resampling.LANCZOS)
    canvas.alpha_composite(small, ((image.width - side) // 2, (image.height - side) // 2))
    return canvas.convert("RGB")


def scene(first: Image.Image, second: Image.Image, place: str) -> Image.Image:
    """The first object `place` ("left of", "above", …) the second, each about half as large. RGBA."""
    size = first.width
    half = round(size * 0.52)
    canvas = Image.new("RGBA", first.size, (255, 255, 255, 0))
    right, down = PLACES[place]
    for image, sign in ((second, -1), (first, 1)):
        small = image.resize((half, half), Image.Resampling.LANCZOS)
        at = [(size - half) // 2 + sign * step * (size - half) // 2 for step in (right, down)]
        canvas.alpha_composite(small, (at[0], at[1]))
    return canvas


def is_held_out(*names: str) -> bool:
    """Whether a combination is held out of training. It depends only on the names, so it never changes."""
    digest = hashlib.sha256(":".join([HELD_OUT_SALT, *names]).encode()).hexdigest()
    return int(digest[:8], 16) / 2**32 < HELD_OUT_SHARE


def colours_for(thing: Thing) -> list[str]:
    """The colours that an object can be given: none if it has no main hue, and never its own colour."""
    if thing.hue is None:
        return []
    return [name for name, hue in HUES.items() if _distance(np.array(float(hue)), thing.hue) >= MIN_DIFFERENCE]


def kind_of(caption: str) -> str | None:
    """The kind (of `KINDS`) of a plain caption by its words; None if it names no combination."""
    background = re.fullmatch(rf"(.+) on an? (?:{'|'.join(BACKGROUNDS)}) background", caption)
    what = background[1] if background else caption
    if any(f" {place} " in what for place in PLACES):
        kind = "scene"
    else:
        kind = "colour" if what.removeprefix("a ").removeprefix("an ").split()[0] in HUES else ""
    if background:
        return f"{kind} on background" if kind else "background"
    return kind or None


def with_article(noun: str) -> str:
    """The noun with its article, as in "an apple"; a plural is unchanged."""
    if noun.endswith("s") and not noun.endswith("ss"):
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _made(
    things: Sequence[Thing], chances: np.ndarray, draw: np.random.Generator
) -> tuple[str, Image.Image, tuple[str, ...], bool]:
    """A composed picture: kind, picture, captions (the plain one first), and whether it is held out."""
    kind = str(draw.choice(list(KINDS), p=list(KINDS.values())))
    first = _thing(things, chances, draw, lambda thing: "colour" not in kind or bool(colours_for(thing)))
    background = str(draw.choice(list(BACKGROUNDS))) if "background" in kind else None
    image, phrases = first.image, [with_article(first.noun), first.noun]
    held_out = is_held_out(first.noun, "on", str(background))
    if "colour" in kind:
        colour = str(draw.choice(colours_for(first)))
        assert first.hue is not None
        image = recoloured(image, first.hue, colour)
        phrases = [with_article(f"{colour} {first.noun}"), f"{colour} {first.noun}"]
        held_out = is_held_out(first.noun, colour)
    elif "scene" in kind:
        second = _thing(things, chances, draw, lambda thing: thing.noun != first.noun)
        place = str(draw.choice(list(PLACES)))
        image = scene(image, second.image, place)
        one, other = with_article(first.noun), with_article(second.noun)
        phrases = [f"{one} {place} {other}", f"{one} and {other}"]
        held_out = is_held_out(*sorted((first.noun, second.noun)))  # "b right of a" is the same picture
    if background is not None:
        phrases = [f"{phrase} on {with_article(background)} background" for phrase in phrases]
    return kind, on_background(image, background), tuple(phrases), held_out


def _thing(
    things: Sequence[Thing], chances: np.ndarray, draw: np.random.Generator, fits: Callable[[Thing], bool]
) -> Thing:
    for _ in range(1000):
        thing = things[int(draw.choice(len(things), p=chances))]
        if fits(thing):
            return thing
    raise DataError("the data set has too few pictures, or too few whose main colour can be changed")


def _hues(image: Image.Image) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The hue in degrees, and masks of the vivid and of the opaque pixels."""
    hsv = np.asarray(image.convert("RGB").convert("HSV")).astype(np.float64)
    opaque = np.asarray(image)[..., 3] > 128
    vivid = opaque & (hsv[..., 1] > 70) & (hsv[..., 2] > 60)
    return hsv[..., 0] / 255 * 360, vivid, opaque


def _distance(hue: np.ndarray, other: float) -> np.ndarray:
    return np.abs((hue - other + 180) % 360 - 180)
