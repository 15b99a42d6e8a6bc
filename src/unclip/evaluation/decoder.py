"""The decoder alone: how like a picture is what it draws of the picture's true embedding.

Knows the variation pipeline, the model's own CLIP and a judge. Called by `unclip evaluate decoder`.
"""

from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from unclip.evaluation.exam import Exam, Progress, batches, check_counts
from unclip.evaluation.judge import Judge
from unclip.evaluation.likeness import cosines, pixel_measures
from unclip.evaluation.sheets import draw_cards, sheet_path
from unclip.pipelines.image_variation import UnCLIPImageVariationPipeline


def decoder(
    pipeline: UnCLIPImageVariationPipeline,
    own: Judge,
    judge: Judge,
    data: Path,
    *,
    num_seen: int = 200,
    num_held_out: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    captions: bool = False,
    sheet: Path | None = None,
    progress: Progress = iter,
    **call: Any,
) -> dict[str, Any]:
    """Reconstruct real pictures from their true embeddings, which shows what the decoder loses, whatever the prior.

    Args:
        pipeline: the model.
        own: the model's own CLIP, in whose space the embeddings lie.
        judge: a CLIP that had no part in the model.
        data: a data set; pictures are chosen as for `retrieval`.
        num_seen, num_held_out: how many pictures of each group; fewer if there are fewer. None takes all.
        batch_size: pictures a call.
        seed: of the choice, and of the first picture of each group.
        captions: whether the decoder is told the caption too, as it is in text to image.
        sheet: where to draw real pictures beside their decodes (`-seen.png`, `-held-out.png` are appended).
        progress: wraps the starts of the batches, as tqdm does.
        call: arguments of the pipeline's call.

    Returns: `captions`, and for "seen" and "held_out", beside what tells of the group:
        own, judge: cosine of a picture and its decode in each CLIP's space, "decoded", and of a picture and another's
            decode, "other", over all pairs.
        small, large: pixel measures of the decoder's pictures and of the enlarged ones: see `pixel_measures`.

    Raises: InputError when a number is out of its limits; DataError when the data set cannot be used.
    """
    check_counts(batch_size=batch_size)
    exam = Exam.prepare(data, num_seen=num_seen, num_held_out=num_held_out, seed=seed)
    result: dict[str, Any] = {"captions": captions, **exam.left_out()}
    for name in exam.groups:
        result[name] = exam.about(name)
        asked = exam.asked(name)
        if not asked:
            continue
        real = exam.pictures(name)
        small: list[Image.Image] = []
        large: list[Image.Image] = []
        for rows, seeds in batches(len(real), batch_size, seed=seed, progress=progress):
            prompt = asked[rows] if captions else None
            output = pipeline(real[rows], prompt=prompt, seed=seeds, return_intermediates=True, **call)
            large += output.images  # pyright: ignore
            small += output.small_images  # pyright: ignore
        result[name] |= {
            "seeds": [seed, seed + len(real) - 1],
            "own": _likeness(own.look(real), own.look(large)),
            "judge": _likeness(judge.look(real), judge.look(large)),
            "small": pixel_measures(real, small),
            "large": pixel_measures(real, large),
        }
        if sheet is not None:
            draw_cards(real, large, asked, sheet_path(sheet, name))
    return result


def _likeness(real: Tensor, made: Tensor) -> dict[str, float]:
    decoded, other = cosines(made, real)
    return {"decoded": decoded, "other": other}
