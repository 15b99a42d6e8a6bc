"""A prior on embeddings for research code: text, vectors or grids of tokens → an image embedding or a grid of them."""

from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.checkpoints.files import output_folder, read_json, safe_join
from unclip.diffusion.scheduler import Scheduler, UnCLIPScheduler
from unclip.errors import InputError
from unclip.models.prior_dalle2 import EmbeddingPriorNetwork
from unclip.numbers import whole
from unclip.pipelines.arguments import check_latents, check_tensor, noise_source
from unclip.pipelines.component import read_component, write_component
from unclip.pipelines.vector_prior import VectorPrior
from unclip.stages.prior_dalle2 import EmbeddingPriorStage

PARTS = {"prior": "EmbeddingPriorNetwork", "prior_scheduler": "UnCLIPScheduler"}


class EmbeddingPrior(nn.Module):
    """A diffusion prior with the network of DALLE2-pytorch and of MindEye, for training and sampling.

    `unclip convert dalle2-prior` writes folders that it reads.

    Args:
        prior: the network. Its configuration states the shapes of condition and target.
        scheduler: its process is that of training, its sampler that of sampling. By default 1000 levels of the cosine
            schedule, and prediction of x0.

    Raises: ConfigError for a network with fewer timesteps than the scheduler.
    """

    def __init__(self, prior: EmbeddingPriorNetwork, scheduler: Scheduler | None = None) -> None:
        super().__init__()
        self.prior = prior
        self.scheduler = scheduler or UnCLIPScheduler(prediction_type="sample", clip_sample=False)
        self.stage = EmbeddingPriorStage(prior, self.scheduler.process)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read a folder with `prior/` and `prior_scheduler/`. Raises: CheckpointError, ConfigError."""
        return cls(
            *(
                read_component(Path(folder), name, kind, torch_dtype=torch.float32, variant=None)
                for name, kind in PARTS.items()
            )
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write such a folder. Raises: OutputError, OutputExistsError."""
        for name, part in zip(PARTS, (self.prior, self.scheduler), strict=True):
            write_component(part, output_folder(folder) / name, variant=None)

    def loss(
        self,
        condition: Tensor,
        target: Tensor,
        *,
        encodings: Tensor | None = None,
        mask: Tensor | None = None,
        drop: float = 0.1,
        drop_sample: float | None = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The training loss, and the predicted embeddings. The arguments are not changed.

        Args:
            condition: float [batch, *prior.config.condition_shape].
            target: float [batch, *prior.config.embedding_shape].
            encodings, mask: the text's tokens [batch, tokens, embedding_dim] and which are not padding, for a network
                that takes them.
            drop: the probability that the condition is dropped, for guidance.
            drop_sample: the probability that the noised target is dropped; None: as `drop`.
            t: int64 [batch]; None: random.
            noise: of target's shape; None: random.
            generator: on the CPU; the source of timesteps, noise and dropping, in this order.

        Returns: the mean squared error on the network's scale (`prior.config.scale`), a scalar; and the predictions, of
            target's shape and scale. Both have gradients.

        Raises: InputError for a wrong shape.
        """
        process, config, batch, device = self.scheduler.process, self.prior.config, len(condition), self.prior.device
        read = self.stage.condition(condition, encodings, mask)
        if tuple(target.shape) != self.stage.sample_shape(batch):
            raise InputError(f"the target is {tuple(target.shape)}; it must be {self.stage.sample_shape(batch)}")
        x0 = (F.normalize(target, dim=-1) if config.normalized else target).to(device).float() * config.scale
        if t is None:
            t = torch.randint(process.num_timesteps, (batch,), generator=generator)
        if noise is None:
            noise = torch.randn(x0.shape, generator=generator)
        t, noise = t.to(device), noise.to(device)
        shares = torch.tensor([[drop], [drop if drop_sample is None else drop_sample]])
        keep = (torch.rand(2, batch, generator=generator) >= shares).to(device)
        x_t = process.add_noise(x0, noise, t)
        output = self.stage.prepare(read.dropped(keep[0]), keep[1])(x_t, t)  # pyright: ignore[reportArgumentType]
        loss = process.loss(output, x0, noise, x_t, t).mean()
        return loss, process.predict(output, x_t, t).x0 / config.scale

    forward = loss

    @torch.no_grad()
    def sample(
        self,
        condition: Tensor,
        *,
        encodings: Tensor | None = None,
        mask: Tensor | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seed: int | list[int] | None = None,
        latents: Tensor | None = None,
        compatible: bool = False,
    ) -> Tensor:
        """An embedding or a grid for each condition, float32 [batch, *prior.config.embedding_shape].

        Args:
            condition, encodings, mask: as for `loss`.
            num_inference_steps: 1 to the number of noise levels.
            guidance_scale: 1 or less turns guidance off.
            generator, seed: as in a call of `UnCLIPPipeline`; the same ones give the same embeddings.
            latents: the noise at the start, of the result's shape.
            compatible: sample as DALLE2-pytorch does, to repeat its results: by all levels, or by its DDIM with
                noise, and with guidance away from a null pass that does not see the noised embedding.

        Raises: InputError for a wrong shape, or values that are not finite.
        """
        check_tensor(condition, "condition")
        check_latents(latents, "latents", self.stage.sample_shape(len(condition)))
        if compatible:
            sampler, timesteps = self.stage.compatible(whole(num_inference_steps, "num_inference_steps"))
        else:
            sampler = self.scheduler.sampler()
            timesteps = self.scheduler.spaced_timesteps(num_inference_steps)
        return self.stage.sample(
            self.stage.condition(condition, encodings, mask),
            sampler=sampler,
            timesteps=timesteps,
            noise=noise_source(generator, seed, len(condition)),
            guidance_scale=guidance_scale,
            hides_sample=compatible,
            latents=latents,
        )


def read_prior(folder: str | Path) -> VectorPrior | EmbeddingPrior:
    """The prior on vectors or tokens in a folder. Raises: CheckpointError, ConfigError for another folder."""
    config = read_json(safe_join(Path(folder), "prior/config.json"))
    is_own = config.get("_class_name") == EmbeddingPriorNetwork.__name__
    return (EmbeddingPrior if is_own else VectorPrior).from_pretrained(folder)
