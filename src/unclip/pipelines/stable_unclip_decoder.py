"""Stable unCLIP's decoder: its components, its run, and what the calls of both pipelines share.

The U-Net and the autoencoder are classes of diffusers (extra `family`); the schedulers, samplers and the loop are
unclip's own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from unclip.checkpoints.weights import state_of
from unclip.clip.encoders import TextEncoder
from unclip.clip.networks import CLIPTextEncoderOutput
from unclip.clip.statistics import EmbeddingStatistics
from unclip.diffusion.scheduler import DDIMScheduler, Scheduler
from unclip.errors import CheckpointError, ConfigError, InputError
from unclip.models.image_normalizer import StableUnCLIPImageNormalizer
from unclip.numbers import real, whole
from unclip.pipelines.arguments import (
    FORMS,
    Callback,
    ImagePipelineOutput,
    as_captions,
    check_count,
    check_output_type,
    check_tensor,
    noise_source,
)
from unclip.pipelines.cascade import MAX_SIDE_PX, Fact, check_fits
from unclip.pipelines.pipeline import Kind, Pipeline
from unclip.pipelines.steps import Call, PriorRun, StageRun, encode
from unclip.settings import SETTINGS
from unclip.stages.latent import LatentStage
from unclip.stages.stable_diffusion import KLAutoencoder, StableCondition, noised_with_level, stable_denoiser
from unclip.stages.stage import Size

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

LATENT = "latent"
"""The output type of the decoder's latents."""
ReferenceCallback = Callable[[int, int, Tensor], None]
Seed = int | Sequence[int] | None
Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True)
class _StateEncoder:
    """CLIPTextModel, which has no projection, with the interface that `TextEncoder` calls.

    Attributes:
        skipped: the number of last layers that are left out.
    """

    network: Any
    skipped: int

    @property
    def config(self) -> Any:
        return self.network.config

    @property
    def device(self) -> torch.device:
        return self.network.device

    def __call__(self, input_ids: Tensor) -> CLIPTextEncoderOutput:
        found = self.network(input_ids, output_hidden_states=True)
        states = found.last_hidden_state
        if self.skipped:
            norm = getattr(self.network, "text_model", self.network).final_layer_norm
            states = norm(found.hidden_states[-(self.skipped + 1)])
        return CLIPTextEncoderOutput(found.pooler_output, states)


class StableUnCLIPBase(Pipeline):
    """What both pipelines share: the normalizer, the decoder with its text encoder, and the autoencoder."""

    KINDS: ClassVar[Mapping[str, Kind]] = {
        "text_encoder": Kind((nn.Module,), ("config.vocab_size", "config.hidden_size"), "transformers' CLIPTextModel"),
        "unet": Kind(
            (nn.Module,),
            ("config.projection_class_embeddings_input_dim", "config.cross_attention_dim"),
            "diffusers' UNet2DConditionModel with class_embed_type 'projection'",
        ),
        "vae": Kind((nn.Module,), ("config.scaling_factor", "encode", "decode"), "diffusers' AutoencoderKL"),
        "image_normalizer": Kind(
            (StableUnCLIPImageNormalizer,), (), "unclip's StableUnCLIPImageNormalizer, which reads diffusers' files"
        ),
    }
    image_normalizer: StableUnCLIPImageNormalizer
    image_noising_scheduler: Scheduler
    tokenizer: "CLIPTokenizer"
    text_encoder: "CLIPTextModel"
    unet: "UNet2DConditionModel"
    scheduler: Scheduler
    vae: "AutoencoderKL"

    @classmethod
    def kind(cls, component: str) -> Kind:
        return cls.KINDS[component] if component in cls.KINDS else super().kind(component)

    @property
    def embedding_dim(self) -> int:
        """Width of the image embeddings."""
        return self.image_normalizer.config.embedding_dim

    @property
    def autoencoder(self) -> KLAutoencoder:
        """The autoencoder of the latents."""
        return KLAutoencoder(self.vae)

    @property
    def statistics(self) -> EmbeddingStatistics | None:
        """The distribution of the model's image embeddings; None if it is not known.

        It is read from the file embedding_statistics.safetensors of the model's folder. Without it, those of the
        normalizer are used.
        """
        return self._statistics or EmbeddingStatistics.of_prior(*self._mean_and_std())

    @statistics.setter
    def statistics(self, value: EmbeddingStatistics | None) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._statistics = value

    def _check_width(self, embeddings: Tensor, path: Any) -> None:
        if embeddings.shape[-1] != self.embedding_dim:
            raise CheckpointError(
                f"{path} has embeddings of width {embeddings.shape[-1]}, but the model has width {self.embedding_dim}: "
                "remove the file, or write it again"
            )

    def check(self) -> None:
        """Raises: ConfigError when the components do not fit one another."""
        unet: Any = self.unet.config
        text, dim = self.text_encoder.config, self.embedding_dim
        self.autoencoder.check()
        if (largest := max(self.tokenizer.get_vocab().values())) >= text.vocab_size:
            raise ConfigError(
                f"the components do not fit: tokenizer's largest token id is {largest}, but text_encoder has "
                f"{text.vocab_size} tokens"
            )
        own = self.scheduler.process.learns_variance
        width, channels = unet.projection_class_embeddings_input_dim, self.autoencoder.channels
        check_fits(
            [
                ("unet.class_embed_type", unet.class_embed_type, "that of Stable unCLIP", "projection"),
                ("unet.projection_class_embeddings_input_dim", width, "twice image_normalizer.embedding_dim", 2 * dim),
                ("unet.cross_attention_dim", unet.cross_attention_dim, "text_encoder.hidden_size", text.hidden_size),
                ("unet.in_channels", unet.in_channels, "vae.latent_channels", channels),
                ("unet.out_channels", unet.out_channels, "what the scheduler needs", channels * (2 if own else 1)),
                *self.facts(),
            ]
        )

    def facts(self) -> list[Fact]:
        """The settings of the further components that must agree."""
        return []

    def size(self, height: int | None = None, width: int | None = None) -> Size:
        """Height and width of the latents in cells, for pictures of this size in pixels.

        None: those that the U-Net was trained on. Raises: InputError for a side that is not a multiple of a cell's.
        """
        factor, own = self.autoencoder.factor, self.unet.config.sample_size  # type: ignore[attr-defined]
        sides = []
        for name, given in (("height", height), ("width", width)):
            side = own * factor if given is None else whole(given, name, 1, MAX_SIDE_PX, unit="whole number of pixels")
            if side % factor:
                near = max(1, round(side / factor)) * factor
                raise InputError(f"{name} is {side}; it must be a multiple of {factor}, such as {near}")
            sides.append(side // factor)
        return sides[0], sides[1]

    def decoder_run(
        self,
        num_steps: int,
        guidance_scale: float = 1.0,
        latents: Tensor | None = None,
        size: Size | None = None,
        *,
        eta: float = 0.0,
        decodes: bool = True,
    ) -> StageRun[StableCondition]:
        """The decoder with its scheduler's sampler and a call's settings.

        Args:
            num_steps, guidance_scale, latents: of a call.
            size: as `size` returns it; None: the decoder's own.
            eta: of a `DDIMScheduler`, from 0 to 1; other schedulers ignore it.
            decodes: whether the result is pictures; otherwise it is latents.

        Raises: InputError for a wrong setting.
        """
        scheduler = self.scheduler
        if isinstance(scheduler, DDIMScheduler) and real(eta, "eta", 0, 1):
            scheduler = DDIMScheduler.from_config(scheduler.config, eta=eta)
        stage = LatentStage(
            partial(stable_denoiser, self.unet), self.autoencoder, scheduler.process, size or self.size(), decodes
        )
        return StageRun(
            "decoder",
            stage,
            scheduler.sampler(),
            scheduler.spaced_timesteps(num_steps),
            float(SETTINGS["decoder_guidance_scale"].check(guidance_scale, "guidance_scale")),
            latents,
        )

    def _labels(self, embeddings: Tensor, level: int, noise: Tensor) -> Tensor:
        process = self.image_noising_scheduler.process
        return noised_with_level(embeddings, level, noise, *self._mean_and_std(), process)

    def _mean_and_std(self) -> tuple[Tensor, Tensor]:
        """The normalizer's tensors, also where it is offloaded."""
        found = state_of(self.image_normalizer)
        return found["mean"].detach(), found["std"].detach()

    def _level(self, noise_level: int) -> int:
        return whole(noise_level, "noise_level", 0, self.image_noising_scheduler.process.num_timesteps - 1)

    def decoder_text_encoder(self, clip_skip: int | None = None) -> TextEncoder:
        """The decoder's text encoder with its tokenizer, without its last `clip_skip` layers."""
        return TextEncoder(cast(Any, _StateEncoder(self.text_encoder, clip_skip or 0)), self.tokenizer)

    def _states(
        self, captions: Sequence[str], given: Tensor | None, rows: int, count: int, clip_skip: int | None
    ) -> Tensor:
        """The text's hidden states [rows · count, tokens, hidden_size] of captions, or those given [rows, …]."""
        if given is not None:
            return given.to(self.device).repeat_interleave(count, dim=0)
        return encode(self.decoder_text_encoder(clip_skip), captions, rows, count, self.device).hidden_states

    def _check_states(self, given: Tensor | None, name: str, rows: int) -> None:
        if given is None:
            return
        check_tensor(given, name)
        width = self.text_encoder.config.hidden_size
        if given.ndim != 3 or given.shape[::2] != (rows, width):
            raise InputError(f"{name} has shape {tuple(given.shape)}; it must be [{rows}, tokens, {width}]")

    def _sample(
        self,
        embeddings: Callable[[Call, int], Tensor],
        rows: int,
        run: StageRun[StableCondition],
        *,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None,
        num_images_per_prompt: int,
        generator: Generators,
        seed: Seed,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        output_type: str,
        return_dict: bool,
        noise_level: int,
        clip_skip: int | None,
        callback_on_step_end: Callback | None,
        return_intermediates: bool,
        prior: PriorRun | None = None,
        noisy_at_0: bool = True,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Check a call's arguments, then make its pictures.

        Args:
            embeddings: makes the image embeddings [rows · count, embedding_dim], from the call and the count of
                pictures of each row.
            rows: the number of prompts or pictures.
            run: the decoder.
            prior: the prior, if it makes the embeddings.
            noisy_at_0: whether level 0 adds its little noise, as in diffusers.

        The others are as in the pipelines' calls.
        """
        level = self._level(noise_level)
        if clip_skip is not None:
            clip_skip = whole(clip_skip, "clip_skip", 0, self.text_encoder.config.num_hidden_layers - 1)
        for name, text, states in (("", prompt, prompt_embeds), ("negative_", negative_prompt, negative_prompt_embeds)):
            self._check_states(states, f"{name}prompt_embeds", rows)
            if name and text is not None and states is not None:
                raise InputError(f"give {name}prompt or {name}prompt_embeds, not both")
        if prompt_embeds is not None and negative_prompt_embeds is not None:
            both = (tuple(prompt_embeds.shape), tuple(negative_prompt_embeds.shape))
            if both[0] != both[1]:
                raise InputError(f"prompt_embeds and negative_prompt_embeds have shapes {both}; they must be equal")
        captions, negative = as_captions(prompt, rows), as_captions(negative_prompt, rows)
        count = check_count(num_images_per_prompt, rows)
        for each in (run, prior):
            if each is not None:
                each.check_latents(count * rows)
        call = Call(self, noise_source(generator, seed, count * rows), callback_on_step_end)

        found = embeddings(call, count)
        states = self._states(captions, prompt_embeds, rows, count, clip_skip)
        null = None
        if run.guided:
            null_states = self._states(negative, negative_prompt_embeds, rows, count, clip_skip)
            null = StableCondition.null(null_states, self.embedding_dim)
        noise = call.noise.draw(found.shape, found.device) if level or noisy_at_0 else torch.zeros_like(found)
        made = run.sample(StableCondition(states, self._labels(found, level, noise)), null, call)
        call.close({"image embeddings": found, "latents" if output_type == LATENT else "pictures": made})
        output = ImagePipelineOutput(made if output_type == LATENT else FORMS[output_type](made))
        if return_intermediates:
            output.image_embeddings = found.float().cpu()
        return output if return_dict else output.to_tuple()


def check_output(output_type: str, cross_attention_kwargs: Mapping[str, Any] | None) -> None:
    """Raises: InputError for an unknown output type, or arguments that unclip does not have."""
    if output_type != LATENT:
        check_output_type(output_type)
    if cross_attention_kwargs is not None:
        raise InputError("cross_attention_kwargs must be None: attention processors of diffusers are not supported")


def either_callback(
    callback: ReferenceCallback | None, callback_steps: int, callback_on_step_end: Callback | None
) -> Callback | None:
    """The one callback of a call. Raises: InputError for two callbacks, or a wrong `callback_steps`."""
    every = whole(callback_steps, "callback_steps", 1)
    if callback is None:
        return callback_on_step_end
    if callback_on_step_end is not None:
        raise InputError("give callback or callback_on_step_end, not both")
    if not callable(callback):
        raise InputError(f"callback must be a function, not {type(callback).__name__}")

    def call(pipe: Any, step: int, t: int, state: Mapping[str, Any]) -> None:
        if step % every == 0:
            callback(step, t, state["latents"])

    return call
