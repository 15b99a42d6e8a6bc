"""Measure whether edits by text differences change the right attribute and nothing else, by an independent judge.

    python benchmarks/edits.py --data data/emoji --num-edits 100 --out benchmarks/results/edits.md

Each edit takes a real picture with two attributes, such as a red heart, and changes one of them by a text difference:
"red heart" to "blue heart". The picture is inverted with the model's recommended number of steps. Its embedding is
rotated by each strength and decoded from its own noise. Then an independent CLIP gives two answers:

- changed: whether it prefers the target caption to the source caption. The unedited reconstruction shows its bias.
- kept: whether the right caption is first among the target captions with every value of the other attribute ("blue
  heart", "blue circle", "blue square").

Two differences are compared: that of the prior's image embeddings for the two captions, and that of the text
embeddings, as in the paper (arXiv 2204.06125, section 3.3).
"""

import argparse
import random
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from unclip.checkpoints.hub import BUILT_IN_JUDGE, resolve
from unclip.data.folder import read_records
from unclip.evaluation.retrieval import Judge
from unclip.images import grid, open_image, to_pil
from unclip.pipelines.manipulation import Manipulator
from unclip.stages.manipulation import edit

WAYS = {"prior": True, "text": False}


@dataclass(frozen=True)
class Family:
    """Pictures with two attributes. `caption` joins a value of each, the edited one first."""

    name: str
    edited: tuple[str, ...]
    other: tuple[str, ...]
    caption: str = "{} {}"

    def captions(self, value: str) -> list[str]:
        """The captions of one edited value with every value of the other attribute."""
        return [self.caption.format(value, other).strip() for other in self.other]


FAMILIES = (
    Family("colour", ("red", "orange", "yellow", "green", "blue", "purple", "brown"), ("heart", "circle", "square")),
    Family("animal", ("cat", "dog", "cow", "horse", "pig", "rabbit", "tiger", "mouse", "monkey"), ("face", "")),
    Family("mood", ("grinning", "crying", "kissing", "weary"), ("face", "cat")),
)


@dataclass(frozen=True)
class Edit:
    """An edit of the picture `file` from `source` to `target`. `rivals` are the captions that are ranked for "kept"."""

    family: str
    file: Path
    source: str
    target: str
    rivals: tuple[str, ...]


def all_edits(data: Path) -> Iterator[Edit]:
    """Every edit from a picture of the data set to a caption that the data set also has in the same style."""
    files = {(r.style, r.label): data / r.file_name for r in read_records(data) if not r.held_out}
    for (style, source), file in files.items():
        for family in FAMILIES:
            for value in family.edited:
                captions = family.captions(value)
                if source not in captions:
                    continue
                place = captions.index(source)
                for other in family.edited:
                    rivals = family.captions(other)
                    if other != value and (style, rivals[place]) in files:
                        yield Edit(family.name, file, source, rivals[place], tuple(rivals))


def choose(data: Path, count: int, seed: int) -> list[Edit]:
    """`count` random edits, alternating between families; a picture is repeated only after all others were used."""
    found = list(all_edits(data))
    random.Random(seed).shuffle(found)
    times: Counter[Path] = Counter()
    ranked: dict[str, list[tuple[int, Edit]]] = {family.name: [] for family in FAMILIES}
    for each in found:
        ranked[each.family].append((times[each.file], each))
        times[each.file] += 1
    queues = [sorted(some, key=lambda pair: -pair[0]) for some in ranked.values()]  # edits are taken from the end
    chosen: list[Edit] = []
    while len(chosen) < count and any(queues):
        least = min(queue[-1][0] for queue in queues if queue)
        chosen += [queue.pop()[1] for queue in queues if queue and queue[-1][0] == least]
    return chosen[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="unclip-emoji")
    parser.add_argument("--judge", default=BUILT_IN_JUDGE)
    parser.add_argument("--num-edits", type=int, default=100)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    parser.add_argument("--ways", nargs="+", choices=sorted(WAYS), default=["prior", "text"])
    parser.add_argument("--candidates", type=int, default=1, help="prior candidates for both captions")
    parser.add_argument("--small", action="store_true", help="judge the decoder's pictures without super-resolution")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--sheet", type=Path, help="a PNG with one row for each of the first edits: unedited, then each strength"
    )
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()

    tool, judge = Manipulator.from_pretrained(asked.model), Judge.load(resolve(asked.judge))
    for pipe in (tool.variation, tool.text):
        pipe.set_progress_bar_config(disable=True)  # type: ignore[union-attr]
    edits = choose(asked.data, asked.num_edits, asked.seed)
    strengths = [0.0, *asked.strengths]
    changed = {(way, s): [] for way in asked.ways for s in strengths}
    kept = {(way, s): [] for way in asked.ways for s in strengths}
    rows = []
    for number, each in enumerate(edits):
        latent = tool.invert(open_image(each.file))
        captions = judge.read([each.source, *each.rivals])
        own = each.rivals.index(each.target)
        for way in asked.ways:
            direction = tool.caption_difference(
                each.target, each.source, through_prior=WAYS[way], num_prior_candidates=asked.candidates
            )
            frames = edit(latent, direction, strengths)
            images = to_pil(tool.decode_small(frames) * 2 - 1) if asked.small else tool.decode(frames).images
            scores = judge.look(images) @ captions.T  # type: ignore[arg-type]
            for strength, score in zip(strengths, scores, strict=True):
                changed[way, strength].append(bool(score[1 + own] > score[0]))
                kept[way, strength].append(int(score[1:].argmax()) == own)
            if number < 12:
                rows += images  # type: ignore[operator]
        if (number + 1) % 10 == 0 or number + 1 == len(edits):
            text = table(asked, edits[: number + 1], changed, kept, strengths)
            print(text, flush=True)
            if asked.out:
                asked.out.parent.mkdir(parents=True, exist_ok=True)
                asked.out.write_text(text)
    if asked.sheet:
        grid(rows, columns=len(strengths)).save(asked.sheet)


def table(asked, edits, changed, kept, strengths) -> str:
    """A Markdown table of the shares of the edits so far."""
    counts = ", ".join(f"{sum(e.family == f.name for e in edits)} of {f.name}" for f in FAMILIES)
    size = "the decoder's pictures" if asked.small else "finished pictures"
    lines = [
        f"`{asked.model}`, judged by `{asked.judge}`: {len(edits)} edits ({counts}) of {len({e.file for e in edits})} "
        f"pictures, {size}, candidates: {asked.candidates}",
        "",
        "| difference | strength | changed | kept | both |",
        "|---|---|---|---|---|",
    ]
    for way in asked.ways:
        for strength in strengths:
            now, still = changed[way, strength], kept[way, strength]
            both = [a and b for a, b in zip(now, still, strict=True)]
            shares = " | ".join(f"{statistics.mean(part):.0%}" for part in (now, still, both))
            lines.append(f"| {way} | {strength:g}{' (unedited)' if strength == 0 else ''} | {shares} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
