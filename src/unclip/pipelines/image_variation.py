"""Image variation: pictures → image embeddings → similar pictures."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unclip.clip.encoders import ImageEncoder
from unclip.errors import InputError
from unclip.images import Pictures
from unclip.pipelines.arguments import (
    Callback,
    ImagePipelineOutput,
    check_embeddings,
    takes_preset,
)
from unclip.pipelines.generation import GenerationPipeline

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection
    from transformers.image_processing_utils import BaseImageProcessor


class UnCLIPImageVariationPipeline(GenerationPipeline):
    """Makes variations of pictures: new pictures with the same CLIP embedding (arXiv 2204.06125, §3.1).

    The components are those of `UnCLIPPipeline` without the prior, and `feature_extractor` and `image_encoder`
    (transformers' CLIP).
    """

    COMPONENTS = (
        "text_encoder",
        "tokenizer",
        "image_encoder",
        "feature_extractor",
        "text_proj",
        "decoder",
        "super_res_first",
        "super_res_last",
        "decoder_scheduler",
        "super_res_scheduler",
    )
    image_encoder: "CLIPVisionModelWithProjection"
    feature_extractor: "BaseImageProcessor"

    def check(self) -> None:
        super().check()
        ImageEncoder(self.image_encoder, self.feature_extractor).check()

    @takes_preset
    @torch.no_grad()
    def __call__(
        self,
        image: Pictures | Tensor | None = None,
        num_images_per_prompt: int = 1,
        decoder_num_inference_steps: int = 25,
        super_res_num_inference_steps: int | Sequence[int] = 7,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        decoder_latents: Tensor | None = None,
        super_res_latents: Tensor | Sequence[Tensor | None] | None = None,
        image_embeddings: Tensor | None = None,
        decoder_guidance_scale: float = 8.0,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        seed: int | Sequence[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        noise_level: int = 0,
        decoder_guidance_low: float = 0.0,
        decoder_guidance_high: float = 1.0,
        decoder_reuse: int = 1,
        super_res_reuse: int = 1,
        preset: str | None = None,
        callback_on_step_end: Callback | None = None,
        return_intermediates: bool = False,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Make variations.

        Args:
            image: a PIL image of any mode; a numpy array [height, width], [height, width, channels] or [batch, height,
                width, channels], uint8 in [0, 255], floating point in [0, 1] or bool, of 1 to 4 channels; a list of
                these; or a tensor [batch, 3, height, width] from the feature extractor. May be None only with
                `image_embeddings`.
            num_images_per_prompt: variations of each picture, which are next to each other in the output.
            decoder_num_inference_steps, super_res_num_inference_steps: 1 to 1000 each, as in `UnCLIPPipeline`.
            generator: the source of all noise; a list has one for each picture.
            decoder_latents, super_res_latents: x_T of the stages, [batch, 3, height, width].
            image_embeddings: [batch, embedding_dim] in place of `image`, for example an interpolation.
            decoder_guidance_scale: 1 or less turns guidance off.
            output_type: "pil", "np" or "pt".
            return_dict: False returns a plain tuple.
            prompt: a caption for the decoder in addition to the embedding; one, or one for each picture. Empty by
                default.
            noise_level: noise that is added to the image embeddings, from 0 (none) to 999: how far variations may
                differ. As in Stable unCLIP, embeddings are whitened by the model's `statistics`, noised by the cosine
                schedule of 1000 steps and un-whitened; only level 0, which there adds a little noise, adds none here.
                The noise is drawn first, from the noise of each picture.
            negative_prompt, seed, height, width, decoder_guidance_low, decoder_guidance_high, decoder_reuse,
                super_res_reuse, preset, callback_on_step_end, return_intermediates: as in `UnCLIPPipeline`.

        Raises:
            InputError: an argument is wrong (ImageError: a picture is); no stage has run.
            ConfigError: a component that was replaced does not fit the others.
            Cancelled: the callback stopped the run.
            NonFiniteError: the result has NaN or infinity.
        """
        return self._decode(
            partial(self.embed_images, image, image_embeddings),
            num_images_per_prompt,
            decoder_num_inference_steps,
            super_res_num_inference_steps,
            generator,
            decoder_latents,
            super_res_latents,
            decoder_guidance_scale,
            output_type,
            return_dict,
            prompt,
            negative_prompt,
            seed,
            height,
            width,
            noise_level,
            callback_on_step_end,
            return_intermediates,
            decoder_guidance_low,
            decoder_guidance_high,
            decoder_reuse,
            super_res_reuse,
        )

    def embed_images(self, image: Pictures | Tensor | None, image_embeddings: Tensor | None = None) -> Tensor:
        """The embeddings of pictures, or the given ones: float32 [batch, embedding_dim].

        Args: as in a call.

        Raises: InputError unless exactly one of the two is given (ImageError: a picture is wrong).
        """
        if image_embeddings is not None:
            if image is not None:
                raise InputError("give image or image_embeddings, not both")
            check_embeddings(image_embeddings, self.embedding_dim)
            return image_embeddings.to(self.device).float()
        if image is None:
            raise InputError("give an image, or image_embeddings")
        return ImageEncoder(self.image_encoder, self.feature_extractor).encode(image, self.device).float()
