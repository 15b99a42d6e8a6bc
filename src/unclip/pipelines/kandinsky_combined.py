"""Kandinsky's prior and decoder together: captions → pictures."""

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from unclip.diffusion.loop import generators_from_seed
from unclip.errors import InputError
from unclip.images import Pictures
from unclip.pipelines.arguments import Callback, ImagePipelineOutput, as_prompts, check_count
from unclip.pipelines.cascade import check_fits
from unclip.pipelines.kandinsky import (
    KandinskyImg2ImgPipeline,
    KandinskyInpaintPipeline,
    KandinskyPipeline,
    KandinskyV22Img2ImgPipeline,
    KandinskyV22InpaintPipeline,
    KandinskyV22Pipeline,
)
from unclip.pipelines.kandinsky_prior import Generators, KandinskyPriorPipeline, KandinskyV22PriorPipeline
from unclip.pipelines.pipeline import Kind, Pipeline

_PRIOR = tuple(f"prior_{name}" for name in KandinskyPriorPipeline.COMPONENTS)


class _Combined(Pipeline):
    """The components of a prior, with the prefix `prior_`, and those of a decoder."""

    PRIOR: ClassVar[type[KandinskyPriorPipeline]] = KandinskyV22PriorPipeline
    DECODER: ClassVar[type[Pipeline]]

    @classmethod
    def from_pipes(cls, prior: KandinskyPriorPipeline, decoder: Pipeline) -> Self:
        """The two loaded pipelines as one, which `save_pretrained` writes into one folder.

        Raises: InputError when they lack a component; ConfigError when they do not fit each other.
        """
        parts = {f"prior_{name}": part for name, part in prior.components.items()} | decoder.components
        return cls(**{name: part for name, part in parts.items() if name in cls.component_names()})

    @classmethod
    def kind(cls, component: str) -> Kind:
        return cls.DECODER.kind(component) if component in cls.DECODER.COMPONENTS else super().kind(component)

    @property
    def prior_pipe(self) -> KandinskyPriorPipeline:
        """The prior as a pipeline; it shares the components."""
        return self._part(self.PRIOR, "prior_")

    @property
    def decoder_pipe(self) -> Any:
        """The decoder as a pipeline; it shares the components."""
        return self._part(self.DECODER, "")

    def _part(self, cls: type[Pipeline], prefix: str) -> Any:
        made = cls(**{name: getattr(self, prefix + name) for name in cls.COMPONENTS})
        made.set_progress_bar_config(**self._progress)
        return made

    def check(self) -> None:
        """Raises: ConfigError when the components do not fit one another, for example if they are of two CLIPs."""
        prior, unet = self.prior_pipe.prior.config, self.decoder_pipe.unet.config
        width = unet.image_embedding_dim
        check_fits([("prior_prior.embedding_dim", prior.embedding_dim, "the image embedding of unet", width)])

    def _generate(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None,
        *,
        num_images_per_prompt: int,
        prior_guidance_scale: float,
        prior_num_inference_steps: int,
        generator: Generators,
        latents: Tensor | None,
        seed: int | Sequence[int] | None,
        prior_callback_on_step_end: Callback | None = None,
        **of_decoder: Any,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """A call of any of the pipelines; `of_decoder` are the decoder's arguments."""
        self.check()
        prompts = as_prompts(prompt)
        count = check_count(num_images_per_prompt, len(prompts))
        of_prior = generator
        if seed is not None:
            if generator is not None:
                raise InputError("give seed or generator, not both: each of them determines the noise")
            generator = generators_from_seed(seed, count * len(prompts))
            of_prior = generator
            if negative_prompt is not None:  # its embeddings have the same noise
                of_prior = [*generator, *generators_from_seed(seed, count * len(prompts))]
        embeddings: Any = self.prior_pipe(
            prompts,
            negative_prompt,
            num_images_per_prompt=count,
            num_inference_steps=prior_num_inference_steps,
            generator=of_prior,
            latents=latents,
            guidance_scale=prior_guidance_scale,
            callback_on_step_end=prior_callback_on_step_end,
        )
        if self.PRIOR is KandinskyPriorPipeline:  # the decoder of Kandinsky 2.1 sees the prompt too
            of_decoder["prompt"] = [one for one in prompts for _ in range(count)]
        return self.decoder_pipe(
            image_embeds=embeddings.image_embeds,
            negative_image_embeds=embeddings.negative_image_embeds,
            generator=generator,
            **of_decoder,
        )


class KandinskyV22CombinedPipeline(_Combined):
    """Makes pictures from captions with Kandinsky 2.2's prior and decoder; as diffusers' pipeline.

    Load one folder that has both, or join two: `KandinskyV22CombinedPipeline.from_pipes(prior, decoder)`.
    """

    DECODER = KandinskyV22Pipeline
    COMPONENTS = (*_PRIOR, *DECODER.COMPONENTS)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 100,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        height: int = 512,
        width: int = 512,
        prior_guidance_scale: float = 4.0,
        prior_num_inference_steps: int = 25,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        *,
        return_dict: bool = True,
        prior_callback_on_step_end: Callback | None = None,
        callback_on_step_end: Callback | None = None,
        seed: int | Sequence[int] | None = None,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Make pictures; arguments and errors as in `KandinskyV22PriorPipeline` and `KandinskyV22Pipeline`.

        Args:
            latents: x_T of the prior.
            seed: picture i is made with seed + i (or the i-th of a list), independently of the others in its batch.
        """
        return self._generate(
            prompt,
            negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            prior_guidance_scale=prior_guidance_scale,
            prior_num_inference_steps=prior_num_inference_steps,
            generator=generator,
            latents=latents,
            seed=seed,
            prior_callback_on_step_end=prior_callback_on_step_end,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            output_type=output_type,
            return_dict=return_dict,
            callback_on_step_end=callback_on_step_end,
        )


class KandinskyV22Img2ImgCombinedPipeline(_Combined):
    """Changes pictures by captions with Kandinsky 2.2's prior and decoder; as diffusers' pipeline."""

    DECODER = KandinskyV22Img2ImgPipeline
    COMPONENTS = (*_PRIOR, *DECODER.COMPONENTS)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Pictures,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 100,
        guidance_scale: float = 4.0,
        strength: float = 0.3,
        num_images_per_prompt: int = 1,
        height: int = 512,
        width: int = 512,
        prior_guidance_scale: float = 4.0,
        prior_num_inference_steps: int = 25,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        *,
        return_dict: bool = True,
        prior_callback_on_step_end: Callback | None = None,
        callback_on_step_end: Callback | None = None,
        seed: int | Sequence[int] | None = None,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Make pictures; arguments and errors as in `KandinskyV22CombinedPipeline` and `KandinskyV22Img2ImgPipeline`.

        Args:
            image: one for all prompts, or one for each picture that is made.
        """
        return self._generate(
            prompt,
            negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            prior_guidance_scale=prior_guidance_scale,
            prior_num_inference_steps=prior_num_inference_steps,
            generator=generator,
            latents=latents,
            seed=seed,
            prior_callback_on_step_end=prior_callback_on_step_end,
            image=image,
            strength=strength,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            output_type=output_type,
            return_dict=return_dict,
            callback_on_step_end=callback_on_step_end,
        )


class KandinskyV22InpaintCombinedPipeline(_Combined):
    """Repaints a region of pictures by captions with Kandinsky 2.2's prior and decoder; as diffusers' pipeline."""

    DECODER = KandinskyV22InpaintPipeline
    COMPONENTS = (*_PRIOR, *DECODER.COMPONENTS)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Pictures,
        mask_image: Pictures,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 100,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        height: int = 512,
        width: int = 512,
        prior_guidance_scale: float = 4.0,
        prior_num_inference_steps: int = 25,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        *,
        return_dict: bool = True,
        prior_callback_on_step_end: Callback | None = None,
        callback_on_step_end: Callback | None = None,
        seed: int | Sequence[int] | None = None,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Repaint; arguments and errors as in `KandinskyV22CombinedPipeline` and `KandinskyV22InpaintPipeline`.

        Args:
            image, mask_image: one for all prompts, or one for each picture that is made.
        """
        return self._generate(
            prompt,
            negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            prior_guidance_scale=prior_guidance_scale,
            prior_num_inference_steps=prior_num_inference_steps,
            generator=generator,
            latents=latents,
            seed=seed,
            prior_callback_on_step_end=prior_callback_on_step_end,
            image=image,
            mask_image=mask_image,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            output_type=output_type,
            return_dict=return_dict,
            callback_on_step_end=callback_on_step_end,
        )


class KandinskyCombinedPipeline(_Combined):
    """Makes pictures from captions with Kandinsky 2.1's prior and decoder; as diffusers' pipeline.

    As there, the decoder sees the prompt, but not the negative prompt.
    """

    PRIOR = KandinskyPriorPipeline
    DECODER = KandinskyPipeline
    COMPONENTS = (*_PRIOR, *DECODER.COMPONENTS)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 100,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        height: int = 512,
        width: int = 512,
        prior_guidance_scale: float = 4.0,
        prior_num_inference_steps: int = 25,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        *,
        return_dict: bool = True,
        seed: int | Sequence[int] | None = None,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Make pictures; arguments and errors as in `KandinskyV22CombinedPipeline`."""
        return self._generate(
            prompt,
            negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            prior_guidance_scale=prior_guidance_scale,
            prior_num_inference_steps=prior_num_inference_steps,
            generator=generator,
            latents=latents,
            seed=seed,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            output_type=output_type,
            return_dict=return_dict,
        )


class KandinskyImg2ImgCombinedPipeline(_Combined):
    """Changes pictures by captions with Kandinsky 2.1's prior and decoder; as diffusers' pipeline."""

    PRIOR = KandinskyPriorPipeline
    DECODER = KandinskyImg2ImgPipeline
    COMPONENTS = (*_PRIOR, *DECODER.COMPONENTS)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Pictures,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 100,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        strength: float = 0.3,
        height: int = 512,
        width: int = 512,
        prior_guidance_scale: float = 4.0,
        prior_num_inference_steps: int = 25,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        *,
        return_dict: bool = True,
        seed: int | Sequence[int] | None = None,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Make pictures; arguments and errors as in `KandinskyV22Img2ImgCombinedPipeline`."""
        return self._generate(
            prompt,
            negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            prior_guidance_scale=prior_guidance_scale,
            prior_num_inference_steps=prior_num_inference_steps,
            generator=generator,
            latents=latents,
            seed=seed,
            image=image,
            strength=strength,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            output_type=output_type,
            return_dict=return_dict,
        )


class KandinskyInpaintCombinedPipeline(_Combined):
    """Repaints a region of pictures by captions with Kandinsky 2.1's prior and decoder; as diffusers' pipeline."""

    PRIOR = KandinskyPriorPipeline
    DECODER = KandinskyInpaintPipeline
    COMPONENTS = (*_PRIOR, *DECODER.COMPONENTS)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Pictures,
        mask_image: Pictures,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 100,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        height: int = 512,
        width: int = 512,
        prior_guidance_scale: float = 4.0,
        prior_num_inference_steps: int = 25,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        *,
        return_dict: bool = True,
        seed: int | Sequence[int] | None = None,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Repaint; arguments and errors as in `KandinskyV22InpaintCombinedPipeline`."""
        return self._generate(
            prompt,
            negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            prior_guidance_scale=prior_guidance_scale,
            prior_num_inference_steps=prior_num_inference_steps,
            generator=generator,
            latents=latents,
            seed=seed,
            image=image,
            mask_image=mask_image,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            output_type=output_type,
            return_dict=return_dict,
        )
