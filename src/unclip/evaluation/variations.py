"""Variations: do they keep what a picture shows, and are they other pictures?

Knows pipelines, pictures and the judge; knows no training. Called by `unclip evaluate variations`.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unclip.evaluation.retrieval import Exam, Judge
from unclip.images import grid, open_image
from unclip.pipelines.image_variation import UnCLIPImageVariationPipeline


def variations(
    pipeline: UnCLIPImageVariationPipeline,
    judge: Judge,
    data: Path,
    *,
    num_seen: int = 200,
    batch_size: int = 16,
    seed: int = 0,
    sheet: Path | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    **call: Any,
) -> dict[str, Any]:
    """One variation of a real picture of each concept: retrieval of its caption, and how far it is from the picture.

    Args:
        pipeline: the model.
        judge: a CLIP that had no part in it.
        data: the emoji data set; concepts are chosen as for `retrieval`.
        num_seen: how many trained concepts; fewer if there are fewer.
        batch_size: pictures a call.
        seed: of the choice, and of the first picture of each group.
        sheet: where to draw pictures above their variations (`-seen.png`, `-held-out.png` are appended).
        progress: wraps the starts of the batches, as tqdm does.
        call: arguments of the pipeline's call.

    Returns: for "seen" and "held_out": the number; at_1, at_5 and clip_score of the variations and of the real
        pictures; `similarity`, the mean cosine of a variation and its picture in the judge's space, and that of two
        different pictures; `pixel_difference`, the mean absolute difference of pixels in [0, 1].

    Raises: InputError when `num_seen` or `batch_size` is below 1; DataError when the data set cannot be used.
    """
    exam = Exam.prepare(judge, data, num_seen=num_seen, batch_size=batch_size, seed=seed)
    result: dict[str, Any] = {"num_captions": len(exam.captions)}
    for name, group in exam.groups.items():
        result[name] = {"num": len(group)}
        if not group:
            continue
        real = [open_image(data / record.file_name) for record in group]
        made: list[Image.Image] = []
        for start in progress(range(0, len(group), batch_size)):
            part = real[start : start + batch_size]
            made += pipeline(part, seed=[seed + start + i for i in range(len(part))], **call).images  # pyright: ignore
        of_real, of_made = judge.look(real), judge.look(made)
        result[name] |= {
            "variations": exam.rates(of_made, group),
            "real": exam.rates(of_real, group),
            "similarity": round((of_real * of_made).sum(dim=1).mean().item(), 4),
            "similarity_of_others": round((of_real * of_made.roll(1, 0)).sum(dim=1).mean().item(), 4),
            "pixel_difference": round(float(np.mean([difference(a, b) for a, b in zip(real, made, strict=True)])), 4),
        }
        if sheet is not None:
            draw_pairs(real, made, sheet.with_name(f"{sheet.name}-{name.replace('_', '-')}.png"))
    return result


def difference(one: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference of pixels in [0, 1], at the size of the second."""
    resized = one.convert("RGB").resize(other.size, Image.Resampling.LANCZOS)
    pair = [np.asarray(image.convert("RGB"), dtype=np.float64) for image in (resized, other)]
    return float(np.abs(pair[0] - pair[1]).mean() / 255)


def draw_pairs(real: list[Image.Image], made: list[Image.Image], path: Path, *, columns: int = 12) -> None:
    """A sheet: rows of real pictures, each above its variation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = made[0].size
    blank = Image.new("RGB", size, "white")
    cells = []
    for start in range(0, len(made), columns):
        for row in ([image.resize(size) for image in real[start : start + columns]], made[start : start + columns]):
            cells += row + [blank] * (min(columns, len(made)) - len(row))
    grid(cells, columns=min(columns, len(made))).save(path)
