"""Interpolation between captions or pictures, with the arguments of diffusers' community pipelines.

from unclip import UnCLIPTextInterpolationPipeline
pipe = UnCLIPTextInterpolationPipeline.from_pretrained("unclip-emoji")
pipe("a red apple", "a green apple", steps=5, seed=1).images
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from unclip.errors import InputError
from unclip.numbers import several, whole
from unclip.pipelines.arguments import MAX_PICTURES, Callback, ImagePipelineOutput, as_prompts
from unclip.pipelines.image_variation import UnCLIPImageVariationPipeline
from unclip.pipelines.text_to_image import UnCLIPPipeline
from unclip.stages.arithmetic import slerp, slerp_path

Seed = int | Sequence[int] | None


class UnCLIPTextInterpolationPipeline(UnCLIPPipeline):
    """Makes pictures that change from one caption to another. The components are those of `UnCLIPPipeline`.

    The text embeddings and the hidden state of each token are interpolated spherically, and the prior and the decoder
    run for each picture.
    """

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        start_prompt: str,
        end_prompt: str,
        steps: int = 5,
        prior_num_inference_steps: int = 25,
        decoder_num_inference_steps: int = 25,
        super_res_num_inference_steps: int | Sequence[int] = 7,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        prior_guidance_scale: float = 4.0,
        decoder_guidance_scale: float = 8.0,
        enable_sequential_cpu_offload: bool = False,
        gpu_id: int = 0,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        seed: Seed = None,
        num_prior_candidates: int = 1,
        prior_temperature: float = 1.0,
        prior_top_p: float = 1.0,
        callback_on_step_end: Callback | None = None,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Make `steps` pictures, the first of `start_prompt` and the last of `end_prompt`.

        Args:
            start_prompt, end_prompt: the two captions.
            steps: number of pictures, from 1 to 1000. A single picture is that of the first caption.
            generator: the source of all noise; a list has one for each picture.
            enable_sequential_cpu_offload: call the method of this name with `gpu_id` first. The community pipeline does
                so by default.
            seed: one gives all pictures the same noise, so that only their captions differ; a list has one for each.
            prior_num_inference_steps, decoder_num_inference_steps, super_res_num_inference_steps, prior_guidance_scale,
                decoder_guidance_scale, output_type, return_dict, num_prior_candidates, prior_temperature, prior_top_p,
                callback_on_step_end: as in `UnCLIPPipeline`.

        Raises: as `UnCLIPPipeline`.
        """
        self.check()
        places = _places(steps, 2)
        prompts = as_prompts([start_prompt, end_prompt])
        if enable_sequential_cpu_offload:
            self.enable_sequential_cpu_offload(gpu_id)
        text = self.caption_encoder.encode(prompts, self.device)
        kind = text.embeds.dtype
        self.report_unknown(prompts, text)
        first, last = text.hidden_states  # each row belongs to one token
        states = [slerp(first, last, place).to(kind) for place in places]
        # Between the ends, the tokens of both captions count; at the ends, exactly those of the caption.
        masks = [text.mask[round(place)] if place in (0, 1) else text.mask.any(dim=0) for place in places]
        return super().__call__(
            text_model_output=(slerp_path(text.embeds, places).to(kind), torch.stack(states)),
            text_attention_mask=torch.stack(masks),
            prior_num_inference_steps=prior_num_inference_steps,
            decoder_num_inference_steps=decoder_num_inference_steps,
            super_res_num_inference_steps=super_res_num_inference_steps,
            generator=generator,
            prior_guidance_scale=prior_guidance_scale,
            decoder_guidance_scale=decoder_guidance_scale,
            output_type=output_type,
            return_dict=return_dict,
            seed=_seeds(seed, len(places)),
            num_prior_candidates=num_prior_candidates,
            prior_temperature=prior_temperature,
            prior_top_p=prior_top_p,
            callback_on_step_end=callback_on_step_end,
        )


class UnCLIPImageInterpolationPipeline(UnCLIPImageVariationPipeline):
    """Makes variations that change from one picture to another.

    The components are those of `UnCLIPImageVariationPipeline`.

    The image embeddings are interpolated spherically. To start and end with the pictures themselves, invert them; see
    `Manipulator` and `interpolate`.
    """

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        image: Sequence[Image.Image] | Tensor | None = None,
        steps: int = 5,
        decoder_num_inference_steps: int = 25,
        super_res_num_inference_steps: int | Sequence[int] = 7,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        image_embeddings: Tensor | None = None,
        decoder_latents: Tensor | None = None,
        super_res_latents: Tensor | Sequence[Tensor | None] | None = None,
        decoder_guidance_scale: float = 8.0,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        seed: Seed = None,
        callback_on_step_end: Callback | None = None,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Make `steps` pictures, the first a variation of the first picture and the last of the last.

        Args:
            image: two pictures or more, as `UnCLIPImageVariationPipeline` takes them.
            steps: number of pictures, from 1 to 1000; between two pictures, in equal steps of the angle.
            generator: the source of all noise; a list has one for each picture.
            image_embeddings: [batch, embedding_dim] in place of `image`, two rows or more.
            decoder_latents, super_res_latents: x_T of the stages, [steps, 3, height, width].
            seed: one gives all pictures the same noise, so that only their embeddings differ; a list has one for each.
            decoder_num_inference_steps, super_res_num_inference_steps, decoder_guidance_scale, output_type,
                return_dict, callback_on_step_end: as in `UnCLIPImageVariationPipeline`.

        Raises: as `UnCLIPImageVariationPipeline`; InputError for only one picture.
        """
        self.check()
        embeddings = self.embed_images(image, image_embeddings)
        if len(embeddings) < 2:
            raise InputError("an interpolation needs two or more pictures, such as image=[first, last]")
        places = _places(steps, len(embeddings))
        return super().__call__(
            image_embeddings=slerp_path(embeddings, places),
            decoder_num_inference_steps=decoder_num_inference_steps,
            super_res_num_inference_steps=super_res_num_inference_steps,
            generator=generator,
            decoder_latents=decoder_latents,
            super_res_latents=super_res_latents,
            decoder_guidance_scale=decoder_guidance_scale,
            output_type=output_type,
            return_dict=return_dict,
            seed=_seeds(seed, len(places)),
            callback_on_step_end=callback_on_step_end,
        )


def _places(steps: object, num_points: int) -> list[float]:
    """`steps` equidistant places on a path through `num_points` points, from the first to the last."""
    count = whole(steps, "steps", 1, MAX_PICTURES)
    return [(num_points - 1) * step / max(1, count - 1) for step in range(count)]


def _seeds(seed: Seed, count: int) -> Seed:
    """One seed as a list with the same seed for each picture."""
    return seed if seed is None or several(seed) is not None else [seed] * count  # type: ignore[list-item]
