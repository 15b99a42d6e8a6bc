"""Measures of single stages: the prior's image embeddings, and the decoder's reconstructions."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unclip.data.embeddings import read_embeddings
from unclip.errors import DataError
from unclip.evaluation.measures import cosines, pixel_measures
from unclip.evaluation.report import draw_cards
from unclip.evaluation.retrieval import Judge, Plan, ranks
from unclip.pipelines.embedding_prior import EmbeddingPrior, read_prior
from unclip.pipelines.image_variation import UnCLIPImageVariationPipeline
from unclip.pipelines.text_to_image import UnCLIPPipeline
from unclip.pipelines.vector_prior import identification


def prior(
    pipeline: UnCLIPPipeline,
    own: Judge,
    plan: Plan,
    *,
    prior_num_inference_steps: int = 25,
    prior_guidance_scale: float = 4.0,
    **sampling: Any,
) -> dict[str, Any]:
    """Compare the prior's sample for a caption with the embedding of the picture with this caption.

    Args:
        pipeline: the model, of which the prior, its scheduler and the text encoder are used.
        own: the model's own CLIP, in whose space the prior works.
        plan: the captions.
        prior_num_inference_steps, prior_guidance_scale: as in the pipeline's call.
        sampling: further arguments of `embed_captions`. Of several candidates, the one that is kept is measured.

    Returns: for "seen" and "held_out", with the description of the group:
        cosine: mean cosine to the true embedding of "prior" (the sample) and of the baselines "text" (the caption's
            own embedding), "other" (those of the group's other pictures) and "mean" (the mean of all other seen
            pictures).
        text_dot: mean cosine to the caption's embedding of the "prior"'s sample and of the "true" embedding. A sample
            far above the true one follows the caption too strongly.
        norm: mean lengths of both, not normalised.
        at_1, at_5: how often the true embedding is the nearest of the group's to the sample, or among the nearest five.

    Raises: as `Plan.choose`.
    """
    chosen = plan.choose()
    result: dict[str, Any] = chosen.left_out()
    sampling |= {"num_inference_steps": prior_num_inference_steps, "guidance_scale": prior_guidance_scale}
    seen: Tensor | None = None
    for entry, prompts, real, _ in plan.groups(chosen, result):
        true = own.embed(real).float()
        seen = true if seen is None else seen  # the first group, which is never empty
        drawn = [
            pipeline.embed_captions(prompts[rows], seed=seeds, **sampling).cpu()
            for rows, seeds in plan.batches(len(prompts))
        ]
        entry |= compare(torch.cat(drawn), true, own.read(prompts), mean_of_others(true, seen))
    return result


def conditioned_prior(
    folder: Path,
    conditions: Sequence[Path],
    embeddings: Path,
    *,
    num_rows: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: Callable[..., Any] | None = None,
    device: torch.device | str = "cpu",
    **sampling: Any,
) -> dict[str, Any]:
    """How well samples of a prior on vectors or tokens identify the true embeddings, which may be grids.

    Args:
        folder: the `model/` of a run that trained the prior, or a converted prior.
        conditions: the files of the conditions, in the order of the recipe.
        embeddings: the file of the true embeddings, with the same rows.
        num_rows: only this many rows at the end, such as those that the recipe held out; None: all.
        seed: row i is sampled with seed + i.
        batch_size: of sampling.
        progress: wraps the batches, as tqdm does.
        device: where the prior runs.
        sampling: `num_inference_steps` and `guidance_scale`.

    Returns: `rows`, the number of them; `cosine`, `two_way` and `top_1` (see `identification`); and the values of
        `two_way` and `top_1` by `chance`.

    Raises: DataError for files with different numbers of rows; CheckpointError and ConfigError for the folder.
    """
    prior = read_prior(folder).to(device)
    tables, target = [read_embeddings(path, grids=True) for path in conditions], read_embeddings(embeddings, grids=True)
    for table in tables:
        if len(table) != len(target):
            raise DataError(f"{table.path} has {len(table)} rows, but {embeddings} has {len(target)}")
    first = max(0, len(target) - (num_rows or len(target)))
    batches = [slice(at, min(at + batch_size, len(target))) for at in range(first, len(target), batch_size)]
    drawn = []
    for rows in batches if progress is None else progress(batches):
        given = torch.cat([torch.from_numpy(table[rows]) for table in tables], dim=-1)
        if isinstance(prior, EmbeddingPrior):
            given = given.view(len(given), *prior.prior.config.condition_shape)
        drawn.append(prior.sample(given, seed=seed + rows.start, **sampling).flatten(1).cpu())
    found = identification(torch.cat(drawn), torch.from_numpy(target[first : len(target)]).flatten(1))
    count = len(target) - first
    chance = {"two_way": 0.5, "top_1": round(1 / count, 6)}
    return {"rows": count, **{key: round(value, 4) for key, value in found.items()}, "chance": chance}


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
    plan: Plan,
    *,
    captions: bool = False,
    **call: Any,
) -> dict[str, Any]:
    """Reconstruct real pictures from their true embeddings. This shows the decoder's losses without the prior's.

    Args:
        pipeline: the model.
        own: the model's own CLIP, in whose space the embeddings lie.
        judge: a CLIP that the model was not trained with.
        plan: the pictures. Its sheets have real and decoded pictures.
        captions: whether the decoder also gets the caption, as in text to image.
        call: arguments of the pipeline's call.

    Returns: `captions`, and for "seen" and "held_out", with the description of the group:
        own, judge: mean cosine in each CLIP's space of a picture and its own reconstruction ("decoded") and those of
            other pictures ("other").
        small, large: `pixel_measures` of the decoder's pictures and of the enlarged ones.

    Raises: as `Plan.choose`.
    """
    chosen = plan.choose()
    result: dict[str, Any] = {"captions": captions, **chosen.left_out()}
    for entry, prompts, real, sheet in plan.groups(chosen, result):
        small: list[Image.Image] = []
        large: list[Image.Image] = []
        for rows, seeds in plan.batches(len(real)):
            prompt = prompts[rows] if captions else None
            output = pipeline(real[rows], prompt=prompt, seed=seeds, return_intermediates=True, **call)
            large += output.images  # pyright: ignore
            small += output.small_images  # pyright: ignore
        for name, clip in (("own", own), ("judge", judge)):
            entry[name] = dict(zip(("decoded", "other"), cosines(clip.look(large), clip.look(real)), strict=True))
        entry |= {"small": pixel_measures(real, small), "large": pixel_measures(real, large)}
        if sheet is not None:
            draw_cards(real, large, prompts, sheet)
    return result
