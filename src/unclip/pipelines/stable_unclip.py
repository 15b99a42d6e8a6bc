"""Stable unCLIP: pictures from captions, and variations, by a decoder in the latent space of Stable Diffusion.

The names and arguments are those of diffusers' pipelines.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from unclip.clip.encoders import ImageEncoder, TextEncoder
from unclip.diffusion.scheduler import Scheduler
from unclip.errors import InputError
from unclip.images import Pictures, as_pictures
from unclip.models.prior import PriorConfig, PriorTransformer
from unclip.models.prior_autoregressive import AutoregressivePrior
from unclip.pipelines.arguments import (
    Callback,
    ImagePipelineOutput,
    as_prompts,
    check_embeddings,
)
from unclip.pipelines.cascade import Fact
from unclip.pipelines.stable_unclip_decoder import (
    LATENT,
    Generators,
    ReferenceCallback,
    Seed,
    StableUnCLIPBase,
    check_output,
    either_callback,
)
from unclip.pipelines.steps import Call, PriorRun, embed, encode
from unclip.pipelines.text_to_image import UnCLIPPipeline, prior_facts

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection
    from transformers.image_processing_utils import BaseImageProcessor


class StableUnCLIPPipeline(StableUnCLIPBase):
    """Makes pictures from captions: a prior of CLIP ViT-L/14 (Karlo's) and Stable unCLIP's decoder.

    Components, by name: `prior_tokenizer`, `prior_text_encoder`, `prior` and `prior_scheduler`; `image_normalizer` and
    `image_noising_scheduler`; `tokenizer`, `text_encoder`, `unet`, `scheduler` and `vae`. The prior may be any that
    `UnCLIPPipeline` takes; its noise schedule is kept by every scheduler of unclip.
    """

    COMPONENTS = (
        "prior_tokenizer",
        "prior_text_encoder",
        "prior",
        "prior_scheduler",
        "image_normalizer",
        "image_noising_scheduler",
        "tokenizer",
        "text_encoder",
        "unet",
        "scheduler",
        "vae",
    )
    OPTIONAL = ("prior_scheduler",)
    prior_tokenizer: "CLIPTokenizer"
    prior_text_encoder: "CLIPTextModelWithProjection"
    prior: PriorTransformer | AutoregressivePrior
    prior_scheduler: Scheduler | None

    def facts(self) -> list[Fact]:
        prior = self.prior.config
        if self.prior_scheduler is None and isinstance(prior, PriorConfig) and prior.takes_timestep:
            raise InputError(
                "StableUnCLIPPipeline needs the component 'prior_scheduler': its prior is a diffusion prior"
            )
        own, dim = self.embedding_dim, prior.embedding_dim
        facts = [
            (name, value, other.replace("text_encoder", "prior_text_encoder"), wanted)
            for name, value, other, wanted in prior_facts(self.prior_text_encoder.config, prior)
        ]
        return [*facts, ("image_normalizer.embedding_dim", own, "prior.embedding_dim", dim)]

    prior_run = UnCLIPPipeline.prior_run

    def _prompts(self, prompt: Any, image_embeds: Tensor | None, prior_latents: Tensor | None) -> list[str]:
        """The captions, one for each of `image_embeds` if these are given. Raises: InputError."""
        if image_embeds is None:
            if prompt is None:
                raise InputError("give a prompt, or image embeddings")
            return as_prompts(prompt)
        check_embeddings(image_embeds, self.embedding_dim)
        prompts = [""] * len(image_embeds) if prompt is None else as_prompts(prompt)
        if len(image_embeds) != len(prompts) or prior_latents is not None:
            raise InputError(
                f"there are {len(image_embeds)} image embeddings for {len(prompts)} prompts: give one for each, and no "
                "prior_latents, as the prior does not run"
            )
        return prompts

    def _embeddings(
        self, prompts: list[str], image_embeds: Tensor | None, prior: PriorRun
    ) -> Callable[[Call, int], Tensor]:
        """What makes the image embeddings of a call."""
        encoder, rows = TextEncoder(self.prior_text_encoder, self.prior_tokenizer), len(prompts)

        def embeddings(call: Call, count: int) -> Tensor:
            if image_embeds is not None:
                return image_embeds.to(self.device).float().repeat_interleave(count, dim=0)
            text = encode(encoder, prompts, rows, count, self.device)
            null = encode(encoder, [""], rows, count, self.device) if prior.guided else None
            return embed(prior, text, null, call)

        return embeddings

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 10.0,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: ReferenceCallback | None = None,
        callback_steps: int = 1,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        noise_level: int = 0,
        prior_num_inference_steps: int = 25,
        prior_guidance_scale: float = 4.0,
        prior_latents: Tensor | None = None,
        clip_skip: int | None = None,
        *,
        seed: Seed = None,
        num_prior_candidates: int = 1,
        image_embeds: Tensor | None = None,
        callback_on_step_end: Callback | None = None,
        return_intermediates: bool = False,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Make pictures from captions.

        Args:
            prompt: a caption, or several. May be None only with `image_embeds`.
            height, width: of the pictures in pixels; multiples of 8. By default those that the U-Net was trained on.
            num_inference_steps, guidance_scale: of the decoder. A scale of 1 or less turns guidance off.
            negative_prompt: the caption that the decoder's guidance moves away from; one, or one for each prompt.
            num_images_per_prompt: pictures of each caption, which are next to each other in the output.
            eta: of a `DDIMScheduler`, from 0 to 1; other schedulers ignore it.
            generator: the source of all noise; a list has one for each picture.
            latents: x_T of the decoder, [batch, 4, height / 8, width / 8].
            prompt_embeds, negative_prompt_embeds: hidden states [prompts, tokens, hidden_size] for the decoder, in
                place of those of `text_encoder`. The prior always needs the prompt.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False returns a plain tuple.
            callback, callback_steps: called as (step, timestep, latents) after every so many steps of each stage.
            cross_attention_kwargs: must be None.
            noise_level: noise that is added to the image embedding, 0 to 999; level 0 adds a little. The U-Net sees
                the level.
            prior_num_inference_steps, prior_guidance_scale, prior_latents: of the prior.
            clip_skip: the number of the text encoder's last layers that are left out.
            seed: picture i is made with seed + i (or the i-th of a list), independently of the others in its batch.
            num_prior_candidates: as in `UnCLIPPipeline`.
            image_embeds: [prompts, embedding_dim]; the prior does not run then.
            callback_on_step_end, return_intermediates: as in `UnCLIPPipeline`.

        Raises: as `UnCLIPPipeline`.
        """
        self.check()
        check_output(output_type, cross_attention_kwargs)
        run = self.decoder_run(
            num_inference_steps,
            guidance_scale,
            latents,
            self.size(height, width),
            eta=eta,
            decodes=output_type != LATENT,
        )
        prior = self.prior_run(
            prior_num_inference_steps, prior_guidance_scale, prior_latents, num_candidates=num_prior_candidates
        )
        prompts = self._prompts(prompt, image_embeds, prior_latents)
        return self._sample(
            self._embeddings(prompts, image_embeds, prior),
            len(prompts),
            run,
            prompt=prompts,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            seed=seed,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            output_type=output_type,
            return_dict=return_dict,
            noise_level=noise_level,
            clip_skip=clip_skip,
            callback_on_step_end=either_callback(callback, callback_steps, callback_on_step_end),
            return_intermediates=return_intermediates,
            prior=prior if image_embeds is None else None,
        )


class StableUnCLIPImg2ImgPipeline(StableUnCLIPBase):
    """Makes variations of pictures, and pictures of image embeddings, by Stable unCLIP's decoder.

    Components, by name: `feature_extractor` and `image_encoder` (CLIP ViT-L/14 for the small model, ViT-H/14 for the
    large one); the others are those of `StableUnCLIPPipeline` without the prior's.
    """

    COMPONENTS = (
        "feature_extractor",
        "image_encoder",
        "image_normalizer",
        "image_noising_scheduler",
        "tokenizer",
        "text_encoder",
        "unet",
        "scheduler",
        "vae",
    )
    feature_extractor: "BaseImageProcessor"
    image_encoder: "CLIPVisionModelWithProjection"

    def facts(self) -> list[Fact]:
        ImageEncoder(self.image_encoder, self.feature_extractor).check()
        own, width = self.embedding_dim, self.image_encoder.config.projection_dim
        return [("image_normalizer.embedding_dim", own, "image_encoder.projection_dim", width)]

    @torch.no_grad()
    def __call__(
        self,
        image: Pictures | Tensor | None = None,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 10.0,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: ReferenceCallback | None = None,
        callback_steps: int = 1,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        noise_level: int = 0,
        image_embeds: Tensor | None = None,
        clip_skip: int | None = None,
        *,
        seed: Seed = None,
        callback_on_step_end: Callback | None = None,
        return_intermediates: bool = False,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Make variations.

        Args:
            image: as in `UnCLIPImageVariationPipeline`. May be None only with `image_embeds`.
            prompt: a caption for the decoder in addition to the embedding; one, or one for each picture. Several
                captions may be given for one picture. Empty by default.
            noise_level: noise that is added to the image embedding, 0 to 999: how far variations may differ. Every
                picture has its own noise; in diffusers, the pictures of one prompt share it.
            image_embeds: [batch, embedding_dim] in place of `image`, for example an interpolation, or embeddings of a
                prior of the same CLIP.
            height, width, num_inference_steps, guidance_scale, negative_prompt, num_images_per_prompt, eta, generator,
                latents, prompt_embeds, negative_prompt_embeds, output_type, return_dict, callback, callback_steps,
                cross_attention_kwargs, clip_skip, seed, callback_on_step_end, return_intermediates: as in
                `StableUnCLIPPipeline`.

        Raises: as `UnCLIPImageVariationPipeline`.
        """
        self.check()
        check_output(output_type, cross_attention_kwargs)
        run = self.decoder_run(
            num_inference_steps,
            guidance_scale,
            latents,
            self.size(height, width),
            eta=eta,
            decodes=output_type != LATENT,
        )
        if prompt is not None and prompt_embeds is not None:
            raise InputError("give prompt or prompt_embeds, not both")
        found = self.embed_images(image, image_embeds)
        rows = len(found)
        if rows == 1:  # one picture for several captions
            given = prompt if prompt_embeds is None else prompt_embeds
            rows = 1 if given is None else len([given] if isinstance(given, str) else given)
            found = found.expand(rows, -1)
        return self._sample(
            lambda call, count: found.repeat_interleave(count, dim=0),
            rows,
            run,
            prompt=prompt,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            seed=seed,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            output_type=output_type,
            return_dict=return_dict,
            noise_level=noise_level,
            clip_skip=clip_skip,
            callback_on_step_end=either_callback(callback, callback_steps, callback_on_step_end),
            return_intermediates=return_intermediates,
        )

    def embed_images(self, image: Pictures | Tensor | None, image_embeds: Tensor | None = None) -> Tensor:
        """The embeddings of pictures, or the given ones: float32 [batch, embedding_dim].

        Args: as in a call.

        Raises: InputError unless exactly one of the two is given (ImageError: a picture is wrong).
        """
        if (image is None) == (image_embeds is None):
            raise InputError("give image or image_embeds, and only one of them")
        if image_embeds is not None:
            check_embeddings(image_embeds, self.embedding_dim)
            return image_embeds.to(self.device).float()
        given = image if isinstance(image, Tensor) else as_pictures(cast(Pictures, image))
        return ImageEncoder(self.image_encoder, self.feature_extractor).encode(given, self.device).float()
