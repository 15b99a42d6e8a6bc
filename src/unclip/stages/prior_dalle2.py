"""The prior of DALLE2-pytorch and of MindEye as a stage: its condition, its guidance, and its sampling."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.clip.encoders import Batched
from unclip.diffusion.guidance import away, guided
from unclip.diffusion.loop import Denoiser, NoiseSource, OnStep, Progress, run
from unclip.diffusion.process import DiffusionProcess
from unclip.diffusion.sampler import AncestralSampler, Sampler, ShiftedDDIMSampler
from unclip.errors import ConfigError, InputError
from unclip.models.kernels import packed_weights
from unclip.models.layers import timestep_rows
from unclip.models.prior_dalle2 import EmbeddingPriorNetwork
from unclip.stages.stage import PriorCondition


@dataclass(frozen=True)
class EmbeddingCondition(Batched):
    """The condition of an `EmbeddingPriorNetwork`.

    Attributes:
        embedding: [batch, *config.condition_shape], on the scale that the network takes.
        encodings: the text's tokens [batch, tokens, embedding_dim]; 0 tokens without text.
        mask: bool [batch, tokens], true for tokens that are not padding.
        given: bool [batch]; false for the null condition of guidance.
    """

    embedding: Tensor
    encodings: Tensor
    mask: Tensor
    given: Tensor

    def dropped(self, keep: Tensor) -> "EmbeddingCondition":
        """The condition that is null where `keep` [batch] is false."""
        return replace(self, given=self.given & keep)


@dataclass(frozen=True)
class EmbeddingPriorStage:
    """Diffuses embeddings [batch, embedding_dim] or grids [batch, num_tokens, embedding_dim], times `config.scale`."""

    prior: EmbeddingPriorNetwork
    process: DiffusionProcess

    def __post_init__(self) -> None:
        rows, steps = self.prior.config.num_timesteps, self.process.num_timesteps
        if rows is not None and rows < steps:
            raise ConfigError(f"the prior has embeddings of {rows} timesteps, but its process has {steps}")

    def condition(self, embedding: Tensor, encodings: Tensor | None, mask: Tensor | None) -> EmbeddingCondition:
        """The condition of an embedding or grid, and of the text's tokens, if the network takes these.

        Raises: InputError for encodings that are missing or not wanted, or for a wrong shape.
        """
        config, device = self.prior.config, self.prior.device
        wanted = ("batch", *config.condition_shape)
        if embedding.shape[1:] != config.condition_shape:
            raise InputError(f"the condition is {tuple(embedding.shape)}; it must be [{', '.join(map(str, wanted))}]")
        if (encodings is not None) != config.use_text_encodings:
            takes = "encodings of the text: give" if config.use_text_encodings else "no encodings of text: leave out"
            raise InputError(f"this prior takes {takes} encodings and mask")
        batch = len(embedding)
        if encodings is None:
            encodings = embedding.new_zeros(batch, 0, config.embedding_dim)
        if mask is None:
            mask = (encodings != 0).any(dim=-1)
        embedding = F.normalize(embedding, dim=-1) if config.normalized else embedding
        given = torch.ones(batch, dtype=torch.bool)
        return EmbeddingCondition(embedding.float(), encodings.float(), mask.bool(), given).to(device)

    def prepare(self, condition: EmbeddingCondition, x_given: Tensor | None = None) -> Denoiser:
        """Compute the condition's tokens once. Where `x_given` [batch] is false, the network does not see x_t."""
        dtype = self.prior.dtype
        prefix = self.prior.prepare(
            condition.embedding.to(dtype), condition.encodings.to(dtype), condition.mask, condition.given
        )

        def denoise(x_t: Tensor, t: int | Tensor) -> Tensor:
            return self.prior(x_t.to(dtype), timestep_rows(t, x_t), prefix, x_given).float()

        return denoise

    def sample_shape(self, batch_size: int) -> tuple[int, ...]:
        return (batch_size, *self.prior.config.embedding_shape)

    def finish(self, x0: Tensor) -> Tensor:
        """The embedding on its own scale."""
        config = self.prior.config
        if config.sampling_final_clamp_l2norm and self.process.prediction_type == "sample":
            x0 = F.normalize(x0, dim=-1) * config.scale
        return x0 / config.scale

    def sample(
        self,
        condition: EmbeddingCondition,
        *,
        sampler: Sampler,
        timesteps: tuple[int, ...],
        noise: NoiseSource,
        guidance_scale: float = 1.0,
        hides_sample: bool = False,
        latents: Tensor | None = None,
        progress: Progress | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """One embedding or grid for each row of `condition`, float32; see `unclip.stages.stage.sample`.

        Args:
            hides_sample: the null pass of guidance does not see x_t either, as in the package.
            condition, sampler, timesteps, noise, guidance_scale, latents, progress, on_step: as there.
        """
        config = self.prior.config
        x = noise.draw(self.sample_shape(len(condition)), condition.device) if latents is None else latents
        x = x.to(condition.device).float()
        if config.init_image_embed_l2norm:
            x = F.normalize(x, dim=-1) * config.scale
        denoiser = self._denoiser(condition, guidance_scale, hides_sample)
        if config.sampling_clamp_l2norm and self.process.prediction_type == "sample":
            unclamped = denoiser
            denoiser = lambda x_t, t: F.normalize(unclamped(x_t, t), dim=-1) * config.scale  # noqa: E731
        with packed_weights(len(timesteps)):
            x = run(denoiser, sampler, timesteps, x, noise=noise, progress=progress, on_step=on_step)
        return self.finish(x)

    def _denoiser(self, condition: EmbeddingCondition, scale: float, hides_sample: bool) -> Denoiser:
        nulls = self.prior.config.rules.nulls
        if scale <= 1 or nulls == "none":
            return self.prepare(condition)
        nothing = torch.zeros_like(condition.given)
        null = condition.dropped(nothing)
        if not hides_sample or nulls == "mask":
            return guided(self.prepare(null.join(condition)), scale)
        if nulls == "all":  # the null pass is equal in all rows
            null, nothing = null.select(slice(1)), nothing[:1]
        given, hidden = self.prepare(condition), self.prepare(null, nothing)
        return lambda x_t, t: away(hidden(x_t[: len(nothing)], t), given(x_t, t), scale)

    def compatible(self, num_steps: int) -> tuple[Sampler, tuple[int, ...]]:
        """The sampler and the timesteps of the package: DDPM for as many steps as levels, else its DDIM with eta 1.

        From 1.10.3 on, the package's DDIM calls the network once less than the number of steps.

        Raises:
            InputError: more steps than levels, or fewer than the package needs.
            ConfigError: a network of a version whose DDIM is missing or wrong.
        """
        count, arithmetic = self.process.num_timesteps, self.prior.config.arithmetic
        if num_steps == count:
            return AncestralSampler(self.process), self.process.spaced_timesteps(count)
        if not 2 <= num_steps < count:
            raise InputError(f"the number of steps is {num_steps}; compatible sampling takes 2 to {count}")
        if arithmetic in ("0.15", "0.16.2", "0.23.1", "0.23.3"):
            raise ConfigError(
                f"DALLE2-pytorch before 1.4.3 has no working DDIM: take {count} steps, or sample without compatible"
            )
        if arithmetic == "1.10.5":
            places = torch.linspace(-1.0, count, num_steps + 1)[1:-1]
        else:
            places = torch.linspace(0.0, count, num_steps + 2)[1:-1]
        return ShiftedDDIMSampler(self.process), tuple(reversed(places.int().tolist()))


@dataclass(frozen=True)
class TextPriorStage:
    """Samples image embeddings of captions by an `EmbeddingPriorNetwork`, for a decoder.

    Attributes:
        norm: that of the results, since the network predicts directions.
    """

    stage: EmbeddingPriorStage
    sampler: Sampler
    timesteps: tuple[int, ...]
    norm: float

    def sample_shape(self, batch_size: int) -> tuple[int, ...]:
        return self.stage.sample_shape(batch_size)

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
        """One image embedding for each caption, float32 [batch, embedding_dim].

        Args:
            null: ignored; the null condition is learned.
            condition, noise, guidance_scale, latents, progress, on_step: see `unclip.stages.stage.sample`.
        """
        text = condition.text
        takes_text = self.stage.prior.config.use_text_encodings
        texts = (text.hidden_states, text.mask) if takes_text else (None, None)
        drawn = self.stage.sample(
            self.stage.condition(text.embeds, *texts),
            sampler=self.sampler,
            timesteps=self.timesteps,
            noise=noise,
            guidance_scale=guidance_scale,
            latents=latents,
            progress=progress,
            on_step=on_step,
        )
        return F.normalize(drawn, dim=-1) * self.norm
