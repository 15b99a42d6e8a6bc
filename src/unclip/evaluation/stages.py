"""Measures of single stages: the prior's image embeddings, and the decoder's reconstructions."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unclip.data.emoji.evaluation_set import EvaluationSet, Progress, batches, check_counts
from unclip.evaluation.measures import cosines, pixel_measures
from unclip.evaluation.report import draw_cards, sheet_path
from unclip.evaluation.retrieval import Judge, ranks
from unclip.pipelines.image_variation import UnCLIPImageVariationPipeline
from unclip.pipelines.text_to_image import UnCLIPPipeline


def prior(
    pipeline: UnCLIPPipeline,
    own: Judge,
    data: Path,
    *,
    num_seen: int = 200,
    num_held_out: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: Progress = iter,
    prior_num_inference_steps: int = 25,
    prior_guidance_scale: float = 4.0,
    num_prior_candidates: int = 1,
    prior_temperature: float = 1.0,
    prior_top_p: float = 1.0,
) -> dict[str, Any]:
    """Compare the prior's sample for a caption with the embedding of the picture with this caption.

    Args:
        pipeline: the model, of which the prior, its scheduler and the text encoder are used.
        own: the model's own CLIP, in whose space the prior works.
        data: a data set; captions are chosen as for `retrieval`.
        num_seen, num_held_out: number of captions in each group; fewer if there are fewer. None for all.
        batch_size: embeddings per call.
        seed: seed of the choice of captions, and of the first sample of each group.
        progress: wraps the iterable of batches, as `tqdm` does.
        prior_num_inference_steps, prior_guidance_scale, num_prior_candidates, prior_temperature, prior_top_p: as in the
            pipeline's call. Of several candidates, the one that is kept is measured.

    Returns: for "seen" and "held_out", with the description of the group:
        cosine: mean cosine to the true embedding of "prior" (the sample) and of the baselines "text" (the caption's
            own embedding), "other" (those of the group's other pictures) and "mean" (the mean of all other seen
            pictures).
        text_dot: mean cosine to the caption's embedding of the "prior"'s sample and of the "true" embedding. A sample
            far above the true one follows the caption too strongly.
        norm: mean lengths of both, not normalised.
        at_1, at_5: how often the true embedding is the nearest of the group's to the sample, or among the nearest five.

    Raises: InputError if a number is outside its limits; DataError if the data set cannot be used.
    """
    check_counts(batch_size=batch_size)
    evaluation_set = EvaluationSet.prepare(data, num_seen=num_seen, num_held_out=num_held_out, seed=seed)
    result: dict[str, Any] = evaluation_set.left_out()
    true_seen = own.embed(evaluation_set.pictures("seen")).float()
    for name in evaluation_set.groups:
        result[name] = evaluation_set.about(name)
        asked = evaluation_set.asked(name)
        if not asked:
            continue
        true = true_seen if name == "seen" else own.embed(evaluation_set.pictures(name)).float()
        drawn = []
        for rows, seeds in batches(len(asked), batch_size, seed=seed, progress=progress):
            embeddings = pipeline.embed_captions(
                asked[rows],
                num_inference_steps=prior_num_inference_steps,
                guidance_scale=prior_guidance_scale,
                seed=seeds,
                num_prior_candidates=num_prior_candidates,
                prior_temperature=prior_temperature,
                prior_top_p=prior_top_p,
            )
            drawn.append(embeddings.cpu())
        result[name]["seeds"] = [seed, seed + len(asked) - 1]
        result[name] |= compare(torch.cat(drawn), true, own.read(asked), mean_of_others(true, true_seen))
    return result


def mean_of_others(true: Tensor, seen: Tensor) -> Tensor:
    """The mean of all normalised rows of `seen` for each row of `true`, without the row itself if `true` is `seen`.

    For a single seen picture, it is that picture.
    """
    units = F.normalize(seen, dim=-1)
    total = units.sum(dim=0)
    if true is seen and len(seen) > 1:
        return (total - units) / (len(seen) - 1)
    return (total / len(seen)).expand(len(true), -1)


def compare(drawn: Tensor, true: Tensor, text: Tensor, mean: Tensor) -> dict[str, Any]:
    """The results of one group. All arguments are [number, width]; row i belongs to caption i."""

    def cosine(one: Tensor, other: Tensor) -> float:
        return round(F.cosine_similarity(one, other).mean().item(), 4)

    units = F.normalize(true, dim=-1)
    places = ranks(F.normalize(drawn, dim=-1), range(len(true)), units)
    return {
        "cosine": {
            "prior": cosine(drawn, true),
            "text": cosine(text, true),
            "other": cosines(units, units)[1],
            "mean": cosine(mean, true),
        },
        "text_dot": {"prior": cosine(drawn, text), "true": cosine(true, text)},
        "norm": {
            "prior": round(drawn.norm(dim=-1).mean().item(), 4),
            "true": round(true.norm(dim=-1).mean().item(), 4),
        },
        **{f"at_{k}": round((places < k).float().mean().item(), 4) for k in (1, 5)},
    }


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
    """Reconstruct real pictures from their true embeddings. This shows the decoder's losses without the prior's.

    Args:
        pipeline: the model.
        own: the model's own CLIP, in whose space the embeddings lie.
        judge: a CLIP that the model was not trained with.
        data: a data set; pictures are chosen as for `retrieval`.
        num_seen, num_held_out: number of pictures in each group; fewer if there are fewer. None for all.
        batch_size: pictures per call.
        seed: seed of the choice of pictures, and of the first picture of each group.
        captions: whether the decoder also gets the caption, as in text to image.
        sheet: prefix of the sheets with real and decoded pictures (`-seen.png`, `-held-out.png` are appended).
        progress: wraps the iterable of batches, as `tqdm` does.
        call: arguments of the pipeline's call.

    Returns: `captions`, and for "seen" and "held_out", with the description of the group:
        own, judge: mean cosine in each CLIP's space of a picture and its own reconstruction ("decoded") and those of
            other pictures ("other").
        small, large: `pixel_measures` of the decoder's pictures and of the enlarged ones.

    Raises: InputError if a number is outside its limits; DataError if the data set cannot be used.
    """
    check_counts(batch_size=batch_size)
    evaluation_set = EvaluationSet.prepare(data, num_seen=num_seen, num_held_out=num_held_out, seed=seed)
    result: dict[str, Any] = {"captions": captions, **evaluation_set.left_out()}
    for name in evaluation_set.groups:
        result[name] = evaluation_set.about(name)
        asked = evaluation_set.asked(name)
        if not asked:
            continue
        real = evaluation_set.pictures(name)
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
