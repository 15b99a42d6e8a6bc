"""Kandinsky's priors: captions → image embeddings, and negative ones for the decoder's guidance."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unclip.clip.encoders import ImageEncoder, TextEncoder
from unclip.diffusion.loop import NoiseSource, generators_from_seed
from unclip.diffusion.scheduler import Scheduler
from unclip.errors import InputError
from unclip.models.prior import PriorTransformer
from unclip.numbers import real
from unclip.pipelines.arguments import (
    Callback,
    PipelineOutput,
    as_captions,
    as_prompts,
    check_count,
    check_latents,
    noise_source,
)
from unclip.pipelines.cascade import check_fits
from unclip.pipelines.pipeline import Pipeline
from unclip.pipelines.steps import Call, PriorRun, embed, encode
from unclip.pipelines.text_to_image import prior_facts

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection
    from transformers.image_processing_utils import BaseImageProcessor

Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass
class KandinskyPriorPipelineOutput(PipelineOutput):
    """The embeddings of one call.

    Attributes:
        image_embeds: float32 [batch, embedding_dim].
        negative_image_embeds: of the same shape; the decoder's guidance moves away from them.
    """

    image_embeds: Tensor | np.ndarray
    negative_image_embeds: Tensor | np.ndarray


class KandinskyPriorPipeline(Pipeline):
    """Samples image embeddings for captions with Kandinsky 2.1's prior (Razzhigaev et al. 2310.03502).

    Names, arguments and results are those of diffusers' pipeline. Components: `text_encoder`, `tokenizer`,
    `image_encoder` and `image_processor` (a CLIP), `prior` and `scheduler`. A prior without time embedding (ECLIPSE)
    makes each embedding in one call, without guidance.
    """

    COMPONENTS = ("text_encoder", "tokenizer", "prior", "image_encoder", "image_processor", "scheduler")
    text_encoder: "CLIPTextModelWithProjection"
    tokenizer: "CLIPTokenizer"
    prior: PriorTransformer
    image_encoder: "CLIPVisionModelWithProjection"
    image_processor: "BaseImageProcessor"
    scheduler: Scheduler

    def check(self) -> None:
        """Raises: ConfigError when the components do not fit one another, for example if they are of two CLIPs."""
        prior, encoder = self.prior.config, self.image_encoder.config
        width = ("image_encoder.projection_dim", encoder.projection_dim, "prior.embedding_dim", prior.embedding_dim)
        check_fits([*prior_facts(self.text_encoder.config, prior), width])
        ImageEncoder(self.image_encoder, self.image_processor).check()

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 25,
        generator: Generators = None,
        latents: Tensor | None = None,
        guidance_scale: float = 4.0,
        output_type: str = "pt",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        seed: int | Sequence[int] | None = None,
    ) -> KandinskyPriorPipelineOutput | tuple[Any, ...]:
        """Sample image embeddings.

        Args:
            prompt: a caption, or several.
            negative_prompt: one, or one for each prompt. The prior is guided away from it, and its own embedding
                becomes the negative one. Without it, the negative embedding is that of a picture of the mean colour.
            num_images_per_prompt: embeddings of each caption, which are next to each other in the output.
            num_inference_steps: 1 to 1000.
            generator: the source of all noise; a list has one for each row: the prompts', then the negative prompts'.
            latents: x_T, [rows, embedding_dim].
            guidance_scale: 1 or less turns guidance off.
            output_type: "pt" or "np".
            return_dict: False returns a plain tuple.
            callback_on_step_end: as in `UnCLIPPipeline`.
            callback_on_step_end_tensor_inputs: only ("latents",), which the callback always gets.
            seed: embedding i is sampled with seed + i (or the i-th of a list), independently of the others; so is the
                negative embedding i.

        Raises:
            InputError: an argument is wrong; nothing was computed.
            ConfigError: a component that was replaced does not fit the others.
            Cancelled: the callback stopped the run.
            NonFiniteError: the result has NaN or infinity.
        """
        self.check()
        if output_type not in ("pt", "np"):
            raise InputError(f"output_type is {output_type!r}; it must be 'pt' or 'np'")
        check_tensor_inputs(callback_on_step_end_tensor_inputs)
        prompts = as_prompts(prompt)
        captions, nulls = [*prompts], [""]
        if negative_prompt is not None:
            negative = as_captions(negative_prompt, len(prompts))
            negative = negative * (len(prompts) // len(negative))
            captions, nulls = [*prompts, *negative], [*negative, *negative]
        count = check_count(num_images_per_prompt, len(captions))
        rows = count * len(captions)
        self.scheduler.spaced_timesteps(num_inference_steps)  # a wrong number is refused for ECLIPSE's priors too
        run = PriorRun.of(self.prior, self.scheduler, num_inference_steps, guidance_scale, latents)
        check_latents(latents, "latents", run.stage.sample_shape(rows))
        call = Call(self, self._noise(generator, seed, rows, count * len(prompts)), callback_on_step_end)

        encoder = TextEncoder(self.text_encoder, self.tokenizer)
        text = encode(encoder, captions, len(captions), count, self.device)
        null_text = encode(encoder, nulls, len(captions), count, self.device) if run.guided else None
        embeddings = embed(run, text, null_text, call)
        if negative_prompt is None:
            zero = self.get_zero_embed(rows)
        else:
            embeddings, zero = embeddings.chunk(2)
        call.close({"image embeddings": embeddings, "negative image embeddings": zero})
        given: list[Any] = [embeddings, zero]
        if output_type == "np":
            given = [each.cpu().numpy() for each in given]
        output = KandinskyPriorPipelineOutput(*given)
        return output if return_dict else output.to_tuple()

    @staticmethod
    def _noise(generator: Generators, seed: int | Sequence[int] | None, rows: int, num_positive: int) -> NoiseSource:
        if seed is None or rows == num_positive or generator is not None:
            return noise_source(generator, seed, rows)
        return NoiseSource([one for _ in range(2) for one in generators_from_seed(seed, num_positive)], rows)

    @torch.no_grad()
    def get_zero_embed(self, batch_size: int = 1, device: torch.device | None = None) -> Tensor:
        """The embedding of a picture of the mean colour, float32 [batch_size, embedding_dim]."""
        encoder = ImageEncoder(self.image_encoder, self.image_processor)
        return zero_embedding(encoder, device or self.device).repeat(batch_size, 1)

    @torch.no_grad()
    def interpolate(
        self,
        images_and_prompts: Sequence[str | Image.Image | Tensor],
        weights: Sequence[float],
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 25,
        generator: Generators = None,
        latents: Tensor | None = None,
        negative_prior_prompt: str | None = None,
        negative_prompt: str = "",
        guidance_scale: float = 4.0,
        device: torch.device | None = None,
        *,
        seed: int | Sequence[int] | None = None,
    ) -> KandinskyPriorPipelineOutput:
        """The weighted sum of embeddings of captions and pictures.

        The weights need not add to 1, and the sum is not normalised; `unclip.interpolate` turns embeddings along a
        circle instead.

        Args:
            images_and_prompts: captions, pictures, and tensors [1, 3, height, width] from the image processor.
            weights: a number for each.
            negative_prior_prompt: the `negative_prompt` of the captions' calls.
            negative_prompt: a caption whose embedding is the negative one. With "", it is that of `get_zero_embed`, or
                of `negative_prior_prompt` if that is given.
            device: only the pipeline's own device is supported.
            num_images_per_prompt, num_inference_steps, generator, latents, guidance_scale, seed: as in a call.

        Raises: as a call; InputError for another number of weights, or an element of another kind.
        """
        if len(images_and_prompts) != len(weights) or not weights:
            raise InputError(
                f"there are {len(images_and_prompts)} images_and_prompts and {len(weights)} weights; give one weight "
                "for each, and one or more of them"
            )
        if device is not None and torch.device(device).type != self.device.type:
            raise InputError(f"device is {device}; the pipeline is on {self.device}: leave it out, or use pipe.to()")
        factors = [real(weight, "a weight") for weight in weights]
        for each in images_and_prompts:
            if not isinstance(each, str | Image.Image | Tensor):
                raise InputError(
                    f"images_and_prompts has a {type(each).__name__}; it may contain captions, PIL images and tensors"
                )
        of_prior = {
            "num_images_per_prompt": num_images_per_prompt,
            "num_inference_steps": num_inference_steps,
            "generator": generator,
            "latents": latents,
            "negative_prompt": negative_prior_prompt,
            "guidance_scale": guidance_scale,
            "seed": seed,
        }
        encoder, total = ImageEncoder(self.image_encoder, self.image_processor), torch.zeros(())
        for each, factor in zip(images_and_prompts, factors, strict=True):
            if isinstance(each, str):
                embeddings: Any = self(each, **of_prior).image_embeds  # type: ignore[union-attr]
            else:
                embeddings = encoder.encode(each, self.device).float()
            total = total.to(embeddings.device) + factor * embeddings
        out: Any = self(negative_prompt, **of_prior)
        negative = out.negative_image_embeds if negative_prompt == "" else out.image_embeds
        return KandinskyPriorPipelineOutput(total.expand(len(negative), -1), negative)


class KandinskyV22PriorPipeline(KandinskyPriorPipeline):
    """Samples image embeddings for captions with Kandinsky 2.2's prior; as `KandinskyPriorPipeline`."""


def zero_embedding(encoder: ImageEncoder, device: torch.device) -> Tensor:
    """The embedding of a picture of the mean colour, float32 [1, embedding_dim]."""
    size: Any = encoder.image_encoder.config.image_size
    return encoder.encode(torch.zeros(1, 3, size, size), device).float()


def check_tensor_inputs(names: Sequence[str]) -> None:
    """Raises: InputError for tensors that callbacks of these pipelines do not get."""
    if others := [name for name in names if name != "latents"]:
        raise InputError(f"callback_on_step_end_tensor_inputs has {', '.join(others)}; only 'latents' is supported")
