"""Caption → image embedding by whichever kind of prior, and the choice among several candidates (paper §2.2).

Knows what both kinds of prior have in common; knows no network. Called by pipelines and evaluation.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from unclip.diffusion.loop import OnStep, Progress
from unclip.diffusion.noise import NoiseSource
from unclip.diffusion.sampler import Sampler
from unclip.models.prior_autoregressive import dot_product
from unclip.stages.condition import PriorCondition
from unclip.stages.prior import PriorStage
from unclip.stages.stage import sample


class EmbeddingSampler(Protocol):
    """A prior with all that says how it is sampled: what a pipeline asks for, whichever kind it has."""

    def sample_shape(self, condition: PriorCondition) -> tuple[int, ...]:
        """The shape of the noise from which a condition's embeddings are made."""
        ...

    def sample(
        self,
        condition: PriorCondition,
        *,
        noise: NoiseSource,
        null: PriorCondition | None = None,
        guidance_scale: float = 1.0,
        latents: Tensor | None = None,
        progress: Progress | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Image embeddings, float32 [batch, embedding_dim]; the arguments are those of `stages.stage.sample`."""
        ...


@dataclass(frozen=True)
class DiffusionEmbeddingSampler:
    """The diffusion prior, sampled by `sampler` along `timesteps`."""

    stage: PriorStage
    sampler: Sampler
    timesteps: tuple[int, ...]

    def sample_shape(self, condition: PriorCondition) -> tuple[int, ...]:
        return self.stage.sample_shape(condition)

    def sample(
        self,
        condition: PriorCondition,
        *,
        noise: NoiseSource,
        null: PriorCondition | None = None,
        guidance_scale: float = 1.0,
        latents: Tensor | None = None,
        progress: Progress | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        return sample(
            self.stage,
            condition,
            sampler=self.sampler,
            timesteps=self.timesteps,
            noise=noise,
            null=null,
            guidance_scale=guidance_scale,
            latents=latents,
            progress=progress,
            on_step=on_step,
        )


def sample_best(
    prior: EmbeddingSampler,
    condition: PriorCondition,
    *,
    num_candidates: int,
    captions_per_choice: int = 1,
    noise: NoiseSource,
    null: PriorCondition | None = None,
    guidance_scale: float = 1.0,
    latents: Tensor | None = None,
    progress: Progress | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Draw `num_candidates` image embeddings of each caption and keep the one closest to it (see `closest`).

    The first candidate is what is drawn without others, and leaves `noise` where it would be then; candidate k is the
    same however many there are. So more candidates never lower the dot product, and where the first one is kept,
    everything that follows is as it would be without the others.

    Args:
        num_candidates: 1 or more; the candidates are drawn one after another, so they need no more memory.
        captions_per_choice: see `closest`.
        latents: noise for the first candidate; the others draw theirs.

    The other arguments are those of `stages.stage.sample`. Returns: float32 [batch, embedding_dim].
    """
    starts = [(noise, latents), *((branch, None) for branch in noise.branches(num_candidates - 1))]
    candidates = [
        prior.sample(
            condition,
            noise=source,
            null=null,
            guidance_scale=guidance_scale,
            latents=start,
            progress=progress,
            on_step=on_step,
        )
        for source, start in starts
    ]
    return closest(condition.text.embeds, torch.stack(candidates), captions_per_choice)


def closest(text_embeddings: Tensor, candidates: Tensor, captions_per_choice: int = 1) -> Tensor:
    """Of several image embeddings for each caption the one whose dot product with it is the largest (paper §2.2).

    Both are normalised first: CLIP was trained to compare directions, and a long embedding is no better for being long.

    Args:
        text_embeddings: [batch, embedding_dim].
        candidates: [num_candidates, batch, embedding_dim]; of equals the first is kept.
        captions_per_choice: so many rows that follow one another keep candidates of the same number: that whose dot
            products with their captions add up to the most. It divides the batch.

    Returns: [batch, embedding_dim].
    """
    scores = torch.stack([dot_product(text_embeddings, candidate) for candidate in candidates])
    best = scores.unflatten(1, (-1, captions_per_choice)).sum(dim=2).argmax(dim=0)
    best = best.repeat_interleave(captions_per_choice)
    return candidates[best, torch.arange(len(best), device=best.device)]
