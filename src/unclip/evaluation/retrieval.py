"""Retrieval by a judge: does a CLIP that had no part in it find the caption again that a picture was made from?

Knows pipelines, pictures and the judge; knows no training. Called by `unclip evaluate retrieval`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from unclip.data.compose import kind_of
from unclip.evaluation.distances import FeatureSpace, distances
from unclip.evaluation.exam import Exam, Progress, batches, check_counts
from unclip.evaluation.judge import Candidates, Judge
from unclip.evaluation.sheets import draw_cards, sheet_path
from unclip.pipelines.text_to_image import UnCLIPPipeline


def retrieval(
    pipeline: UnCLIPPipeline,
    judge: Judge,
    data: Path,
    *,
    num_seen: int = 200,
    num_held_out: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    sheet: Path | None = None,
    features: FeatureSpace | None = None,
    progress: Progress = iter,
    **call: Any,
) -> dict[str, Any]:
    """Retrieval at 1 and at 5 among all concepts' bare captions, for generated and for real pictures.

    Seen concepts are drawn by the weight with which they were trained; held-out ones are all taken unless
    `num_held_out` says otherwise. In a data set of composed pictures every distinct caption ("a cat left of a star")
    counts as a concept.

    Args:
        pipeline: the model.
        judge: a CLIP that had no part in it.
        data: a data set of concepts, or of composed pictures.
        num_seen: how many trained concepts; fewer if there are fewer.
        num_held_out: how many held-out ones; None takes all.
        batch_size: pictures a call.
        seed: of the choice, and of the first picture of each group.
        sheet: where to draw the generated pictures beside the real ones, with captions (`-seen.png`, `-held-out.png`
            are appended).
        features: another space in which the distance of the generated from the real pictures is told.
        progress: wraps the starts of the batches, as tqdm does.
        call: arguments of the pipeline's call.

    Returns: for "seen" and "held_out": the number, how they were chosen, the first and last seed, at_1, at_5 and
        clip_score of generated and real pictures (none for a group of none), for composed captions the same by kind,
        and the distance between the two sets in the judge's space (and in `features`); how many held-out concepts
        there are in all, and how many of them were left out; and chance.

    Raises:
        InputError: a number is out of its limits.
        DataError: the data set cannot be used.
    """
    check_counts(batch_size=batch_size)
    exam = Exam.prepare(data, num_seen=num_seen, num_held_out=num_held_out, seed=seed)
    candidates = Candidates.read_by(judge, exam.captions)
    result: dict[str, Any] = {
        "captions": "composed" if exam.composed else "concepts",
        "num_captions": len(candidates.captions),
        **candidates.chance(),
        **exam.left_out(),
    }
    for name in exam.groups:
        result[name] = exam.about(name)
        asked = exam.asked(name)
        if not asked:
            continue
        result[name]["seeds"] = [seed, seed + len(asked) - 1]
        real = exam.pictures(name)
        made: list[Image.Image] = []
        for rows, seeds in batches(len(asked), batch_size, seed=seed, progress=progress):
            made += pipeline(asked[rows], seed=seeds, **call).images  # pyright: ignore
        looked = {"generated": judge.look(made), "real": judge.look(real)}
        result[name] |= {kind: candidates.rates(seen, asked) for kind, seen in looked.items()}
        if exam.composed:
            result[name]["kinds"] = by_kind(candidates, looked, asked)
        featured = (features.look(made), features.look(real)) if features is not None else None
        result[name] |= distances((looked["generated"], looked["real"]), features, featured)
        if sheet is not None:
            draw_cards(real, made, asked, sheet_path(sheet, name))
    return result


def by_kind(candidates: Candidates, looked: dict[str, Tensor], asked: Sequence[str]) -> dict[str, Any]:
    """The number and the rates of each kind of composed caption: "colour", "scene on background", …

    Args:
        candidates: what the judge chooses from.
        looked: its embeddings of pictures [num_images, width], by what they are ("generated", "real").
        asked: a caption for each picture.
    """
    kinds = [kind_of(caption) or "other" for caption in asked]
    found = {}
    for kind in sorted(set(kinds)):
        rows = [row for row, each in enumerate(kinds) if each == kind]
        captions = [asked[row] for row in rows]
        rates = {what: candidates.rates(features[rows], captions) for what, features in looked.items()}
        found[kind] = {"num": len(rows), **rates}
    return found
