"""Image variation: picture → image embedding → similar pictures.

Knows the public call and its arguments; what both pipelines share is in `generation.py`. Called by users.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unclip.clip.encoders import ImageEncoder
from unclip.diffusion.guidance import check_scale
from unclip.errors import InputError
from unclip.images import Pictures
from unclip.pipelines.arguments import (
    Callback,
    ImagePipelineOutput,
    check_count,
    check_embeddings,
    check_output_type,
    noise_source,
)
from unclip.pipelines.steps import Call, GenerationPipeline, StageRun

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection
    from transformers.image_processing_utils import BaseImageProcessor


class UnCLIPImageVariationPipeline(GenerationPipeline):
    """Makes pictures that share a given picture's CLIP embedding (arXiv 2204.06125, §3.1).

    Components as those of `UnCLIPPipeline` without prior, and `feature_extractor` and `image_encoder` (transformers'
    CLIP).
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
        wanted = self.text_proj.config.clip_embeddings_dim
        width = self.image_encoder.config.projection_dim
        self._check_fits([("image_encoder.projection_dim", width, "text_proj.clip_embeddings_dim", wanted)])
        ImageEncoder(self.image_encoder, self.feature_extractor).check()

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
        callback_on_step_end: Callback | None = None,
        return_intermediates: bool = False,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Make variations.

        Args:
            image: a PIL image of any mode; a numpy array [height, width], [height, width, channels] or [batch, height,
                width, channels], uint8 in [0, 255], floating point in [0, 1] or bool, of 1 to 4 channels; a list of
                these; or a tensor [batch, 3, height, width] that the feature extractor has already processed. May be
                None only with `image_embeddings`.
            num_images_per_prompt: variations of each picture; they follow one another in the output.
            decoder_num_inference_steps, super_res_num_inference_steps: 1 to 1000 each, as in `UnCLIPPipeline`.
            generator: the source of all noise; a list has one a picture.
            decoder_latents, super_res_latents: x_T of the stages, [batch, 3, height, width].
            image_embeddings: [batch, embedding_dim] in place of the image's: an interpolation, say.
            decoder_guidance_scale: guidance is on above 1.
            output_type: "pil", "np" or "pt".
            return_dict: False gives a plain tuple.
            prompt: a caption that the decoder sees beside the embedding; one, or one a picture. Empty by default.
            negative_prompt, seed, height, width, callback_on_step_end, return_intermediates: as in `UnCLIPPipeline`.

        Raises:
            InputError: an argument is wrong (ImageError: a picture is); no stage has run.
            ConfigError: a component that was exchanged does not fit the others.
            Cancelled: the callback stopped the run.
            NonFiniteError: the result is NaN or infinity, and no picture.
        """
        self.check()
        check_output_type(output_type)
        sizes = self._sizes(height, width)
        scale = check_scale(decoder_guidance_scale, "decoder_guidance_scale")
        decoder = StageRun(decoder_num_inference_steps, scale, decoder_latents, sizes["decoder"])
        super_res = self._super_res_runs(super_res_num_inference_steps, super_res_latents, sizes)
        runs = {"decoder": decoder, **super_res}
        for name, run in runs.items():
            self._check_steps(name, run)

        embeddings = self._embed(image, image_embeddings)
        count = len(embeddings)
        num_images_per_prompt = check_count(num_images_per_prompt, count)
        batch_size = num_images_per_prompt * count
        self._check_latents(batch_size, **runs)
        call = Call(noise_source(generator, seed, batch_size), callback_on_step_end)
        captions, negative = self._captions(prompt, count), self._captions(negative_prompt, count)
        text = self._repeated_text(captions, count, num_images_per_prompt)
        null_text = self._repeated_text(negative, count, num_images_per_prompt) if decoder.guided else None
        embeddings = embeddings.repeat_interleave(num_images_per_prompt, dim=0)
        small = self._decode(text, null_text, embeddings, decoder, call)
        large = self._enlarge(small, super_res, call)
        return self._finish(large, small, embeddings, output_type, return_intermediates, return_dict)

    def _embed(self, image: Any, image_embeddings: Tensor | None) -> Tensor:
        """The pictures' embeddings [batch, embedding_dim], one row a picture."""
        if image_embeddings is not None:
            if image is not None:
                raise InputError("give image or image_embeddings, not both")
            check_embeddings(image_embeddings, self.text_proj.config.clip_embeddings_dim)
            return image_embeddings.to(self.device).float()
        if image is None:
            raise InputError("give an image, or image_embeddings")
        return ImageEncoder(self.image_encoder, self.feature_extractor).encode(image, self.device).float()
