"""Variations: do they keep what a picture shows, and are they other pictures?

Knows pipelines, pictures and the judge; knows no training. Called by `unclip evaluate variations`.
"""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unclip.evaluation.exam import Exam, Progress, batches, check_counts
from unclip.evaluation.judge import Candidates, Judge
from unclip.evaluation.likeness import cosines, difference
from unclip.evaluation.sheets import draw_pairs, sheet_path
from unclip.pipelines.image_variation import UnCLIPImageVariationPipeline


def variations(
    pipeline: UnCLIPImageVariationPipeline,
    judge: Judge,
    data: Path,
    *,
    num_seen: int = 200,
    num_held_out: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    sheet: Path | None = None,
    progress: Progress = iter,
    **call: Any,
) -> dict[str, Any]:
    """One variation of a real picture of each concept: retrieval of its caption, and how far it is from the picture.

    Args:
        pipeline: the model.
        judge: a CLIP that had no part in it.
        data: a data set; concepts are chosen as for `retrieval`.
        num_seen: how many trained concepts; fewer if there are fewer.
        num_held_out: how many held-out ones; None takes all.
        batch_size: pictures a call.
        seed: of the choice, and of the first picture of each group.
        sheet: where to draw pictures above their variations (`-seen.png`, `-held-out.png` are appended).
        progress: wraps the starts of the batches, as tqdm does.
        call: arguments of the pipeline's call.

    Returns: for "seen" and "held_out": the number; at_1, at_5 and clip_score of the variations and of the real
        pictures; `similarity`, the mean cosine of a variation and its picture in the judge's space, and that to all
        other pictures; `pixel_difference`, the mean absolute difference of pixels in [0, 1].

    Raises: InputError when a number is out of its limits; DataError when the data set cannot be used.
    """
    check_counts(batch_size=batch_size)
    exam = Exam.prepare(data, num_seen=num_seen, num_held_out=num_held_out, seed=seed)
    candidates = Candidates.read_by(judge, exam.captions)
    result: dict[str, Any] = {"num_captions": len(candidates.captions), **exam.left_out()}
    for name, group in exam.groups.items():
        result[name] = {"num": len(group)}
        if not group:
            continue
        real, asked = exam.pictures(name), exam.asked(name)
        made: list[Image.Image] = []
        for rows, seeds in batches(len(group), batch_size, seed=seed, progress=progress):
            made += pipeline(real[rows], seed=seeds, **call).images  # pyright: ignore
        of_real, of_made = judge.look(real), judge.look(made)
        own, others = cosines(of_made, of_real)
        result[name] |= {
            "variations": candidates.rates(of_made, asked),
            "real": candidates.rates(of_real, asked),
            "similarity": own,
            "similarity_of_others": others,
            "pixel_difference": round(float(np.mean([difference(a, b) for a, b in zip(real, made, strict=True)])), 4),
        }
        if sheet is not None:
            draw_pairs(real, made, sheet_path(sheet, name))
    return result
