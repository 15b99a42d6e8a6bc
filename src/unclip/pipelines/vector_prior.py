"""A prior on vectors of any kind, such as brain recordings: vector → image embedding."""

from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.clip.encoders import TextEmbedding
from unclip.diffusion.scheduler import Scheduler, UnCLIPScheduler
from unclip.errors import ConfigError, InputError
from unclip.models.prior import PriorTransformer
from unclip.pipelines.arguments import check_tensor, noise_source
from unclip.pipelines.component import read_component
from unclip.stages.prior import PriorStage
from unclip.stages.stage import PriorCondition, sample


def vector_model(vector_dim: int, embedding_dim: int) -> dict[str, Any]:
    """The settings of a `PriorTransformer` for vectors: the vector takes the place of the text embedding."""
    return {
        "embedding_dim": embedding_dim,
        "embedding_proj_dim": vector_dim,
        "embedding_proj_norm_type": "layer",
        "num_embeddings": 1,
    }


def vector_condition(vectors: Tensor, embedding_dim: int) -> PriorCondition:
    """The condition of vectors [batch, vector_dim]; a vector of zeros is the null condition."""
    batch = len(vectors)
    tokens = vectors.new_zeros(batch, 1, embedding_dim)
    return PriorCondition(TextEmbedding(vectors, tokens, torch.ones(batch, 1, dtype=torch.bool, device=vectors.device)))


class VectorPrior(nn.Module):
    """A diffusion prior on vectors, for training in research code and for sampling.

    Args:
        prior: with the settings of `vector_model`. Set its `clip_mean` and `clip_std` to those of the embeddings.
        scheduler: its process is that of training, its sampler that of sampling.

    Raises: ConfigError for a prior of another kind, such as one for captions.
    """

    def __init__(self, prior: PriorTransformer, scheduler: Scheduler | None = None) -> None:
        super().__init__()
        wanted = vector_model(prior.config.summary_width, prior.config.embedding_dim)
        if any(prior.config[key] != value for key, value in wanted.items()):
            raise ConfigError(f"this prior is not one for vectors, which has the settings {wanted}")
        self.prior = prior
        self.scheduler = scheduler or UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read the `model/` of a run that trained a prior on vectors. Raises: CheckpointError, ConfigError."""
        parts = {"prior": "PriorTransformer", "prior_scheduler": "UnCLIPScheduler"}
        read = [
            read_component(Path(folder), name, kind, torch_dtype=torch.float32, variant=None)
            for name, kind in parts.items()
        ]
        return cls(*read)

    @property
    def stage(self) -> PriorStage:
        """The prior as a stage."""
        return PriorStage(self.prior, self.scheduler.process)

    def loss(
        self, vectors: Tensor, embeddings: Tensor, *, drop: float = 0.1, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """The training loss, and the predicted embeddings.

        Args:
            vectors: float [batch, vector_dim].
            embeddings: float [batch, embedding_dim], as CLIP's image encoder gives them.
            drop: the probability that a vector is dropped, for guidance.
            generator: on the CPU; the source of timesteps, noise and dropping.

        Returns: the mean squared error of the whitened embeddings, a scalar; and the predicted embeddings [batch,
            embedding_dim], not whitened. Both have gradients.
        """
        process, batch = self.scheduler.process, len(vectors)
        x0 = self.prior.whiten(embeddings)
        t = torch.randint(process.num_timesteps, (batch,), generator=generator).to(x0.device)
        noise = torch.randn(x0.shape, generator=generator).to(x0.device)
        keep = (torch.rand(batch, 1, generator=generator) >= drop).to(vectors.device)
        x_t = process.add_noise(x0, noise, t)
        output = self.stage.prepare(vector_condition(vectors * keep, x0.shape[1]))(x_t, t)  # pyright: ignore[reportArgumentType]
        loss = process.loss(output, x0, noise, x_t, t).mean()
        return loss, self.prior.post_process_latents(process.predict(output, x_t, t).x0)

    forward = loss

    @torch.no_grad()
    def sample(
        self,
        vectors: Tensor,
        *,
        num_inference_steps: int = 25,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seed: int | list[int] | None = None,
    ) -> Tensor:
        """An image embedding of each vector, float32 [batch, embedding_dim], for `pipe.decode`.

        Args:
            vectors: float [batch, vector_dim].
            num_inference_steps: 1 to 1000.
            guidance_scale: 1 or less turns guidance off.
            generator, seed: as in a call of `UnCLIPPipeline`; the same ones give the same embeddings.

        Raises: InputError for vectors of another width, or that are not finite.
        """
        check_tensor(vectors, "vectors")
        dim, width = self.prior.config.summary_width, self.prior.config.embedding_dim
        if vectors.ndim != 2 or vectors.shape[1] != dim:
            raise InputError(f"vectors have shape {tuple(vectors.shape)}; they must be [batch, {dim}]")
        vectors = vectors.to(self.prior.clip_mean.device).float()
        return sample(
            self.stage,
            vector_condition(vectors, width),
            sampler=self.scheduler.sampler(),
            timesteps=self.scheduler.spaced_timesteps(num_inference_steps),
            noise=noise_source(generator, seed, len(vectors)),
            null=vector_condition(torch.zeros_like(vectors), width),
            guidance_scale=guidance_scale,
        )


def identification(predicted: Tensor, true: Tensor) -> dict[str, float]:
    """How well predicted embeddings [rows, dim] identify the true ones, by cosine.

    Returns: "cosine": the mean cosine with the true embedding. "two_way": the share of pairs in which the true
        embedding is closer than another row's (chance: 0.5). "top_1": the share of rows whose true embedding is the
        closest of all (chance: 1 / rows).
    """
    cosines = F.normalize(predicted, dim=1) @ F.normalize(true, dim=1).T
    own, count = cosines.diagonal(), len(cosines)
    closer = (cosines < own[:, None]).sum(dim=1).float()
    return {
        "cosine": float(own.mean()),
        "two_way": float(closer.mean() / max(1, count - 1)),
        "top_1": float((closer == count - 1).float().mean()),
    }
