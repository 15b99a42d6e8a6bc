"""Inpainting and image to image: a picture of which a part, or all, is drawn anew.

Knows the public call and its arguments; prior, decoder and super-resolution are run as for a caption. Called by users.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unclip.checkpoints.layout import FURTHER
from unclip.clip.encoders import ImageEncoder
from unclip.diffusion.guidance import check_scale
from unclip.diffusion.sampler import check_resampling
from unclip.errors import ConfigError, InputError
from unclip.images import Pictures
from unclip.numbers import real
from unclip.pipelines import cascade
from unclip.pipelines.arguments import (
    Callback,
    ImagePipelineOutput,
    as_prompts,
    check_count,
    check_embeddings,
    check_output_type,
    noise_source,
)
from unclip.pipelines.masks import Edited, read_edited
from unclip.pipelines.steps import Call, Known, StageRun
from unclip.pipelines.text_to_image import PriorRun, UnCLIPPipeline
from unclip.stages.stage import Size

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection
    from transformers.image_processing_utils import BaseImageProcessor

EMBEDDING_SOURCES = ("prompt", "image")


class UnCLIPInpaintPipeline(UnCLIPPipeline):
    """Draws a part of a picture anew, or all of it from a noised state of it.

    Components as those of `UnCLIPPipeline`, so that any of its folders will do; `image_encoder` and
    `feature_extractor` (transformers' CLIP), where the folder has them, let the picture itself say what is drawn.

    A masked region is drawn by the same loops as any picture, with the known pixels put back at every step and parts of
    the path walked several times (RePaint, Lugmayr et al. 2201.09865), in the decoder and in super-resolution. Pixels
    outside the mask come out as they went in, at the result's size, transparent ones too. `strength` below 1 departs
    from the picture noised that far instead of pure noise (SDEdit, Meng et al. 2108.01073).
    """

    OPTIONAL = ("image_encoder", "feature_extractor", *UnCLIPPipeline.OPTIONAL)
    image_encoder: "CLIPVisionModelWithProjection"
    feature_extractor: "BaseImageProcessor"

    @classmethod
    def component_names(cls) -> tuple[str, ...]:
        return (*cls.OPTIONAL[:2], *cls.COMPONENTS, *FURTHER)

    def check(self) -> None:
        super().check()
        if (self.image_encoder is None) != (self.feature_extractor is None):
            raise ConfigError("image_encoder and feature_extractor go together; give both, or neither")
        if self.image_encoder is not None:
            wanted = self.text_proj.config.clip_embeddings_dim
            width = self.image_encoder.config.projection_dim
            self._check_fits([("image_encoder.projection_dim", width, "text_proj.clip_embeddings_dim", wanted)])

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | Sequence[str] | None = None,
        image: Pictures | None = None,
        mask_image: Pictures | None = None,
        strength: float = 1.0,
        num_images_per_prompt: int = 1,
        prior_num_inference_steps: int = 25,
        decoder_num_inference_steps: int = 25,
        super_res_num_inference_steps: int | Sequence[int] = 7,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        prior_guidance_scale: float = 4.0,
        decoder_guidance_scale: float = 8.0,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        num_resamples: int = 4,
        jump_length: int = 1,
        embedding_from: str | None = None,
        image_embeddings: Tensor | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        seed: int | Sequence[int] | None = None,
        num_prior_candidates: int = 1,
        prior_temperature: float = 1.0,
        prior_top_p: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        callback_on_step_end: Callback | None = None,
        return_intermediates: bool = False,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Edit pictures.

        Args:
            prompt: what the result should show as a whole; one, or one a picture. Without it the picture's own
                embedding alone says what is drawn.
            image: a PIL image of any mode; a numpy array [height, width], [height, width, channels] or [batch, height,
                width, channels], uint8 in [0, 255], floating point in [0, 1] or bool, of 1 to 4 channels; or a list of
                these. One serves several prompts. Pictures of other sizes than the result's are resized to it.
            mask_image: what is drawn anew, given as a picture is, an array [batch, height, width] too; of the picture's
                size: where it is fully transparent, or where it is white
                if it has no transparency (an alpha channel that is opaque everywhere is none). Without a mask it is
                what in the picture itself is not opaque; a picture that has no transparency is drawn anew as a whole,
                which needs a strength below 1.
            strength: above 0 to 1, the share of the steps that are taken. 1 starts from pure noise; less keeps as much
                of the picture, under the mask too.
            num_images_per_prompt: results of each prompt or picture; they follow one another in the output.
            prior_num_inference_steps, decoder_num_inference_steps, super_res_num_inference_steps, generator,
                prior_guidance_scale, decoder_guidance_scale, return_dict: as in `UnCLIPPipeline`.
            output_type: "pil", "np" or "pt". A picture with transparency and a mask comes back in RGBA as "pil", with
                its own pixels outside the mask, if it has the result's size; else transparency stands on white.
            num_resamples: how often each part of the path is walked, so that new and old grow together; 1 to 100. It
                multiplies the time, and does nothing without a mask.
            jump_length: steps in each such part.
            embedding_from: "prompt", the prior's embedding of it; or "image", the picture's own, with the prompt as
                the decoder's caption alone. The prompt's when there is one.
            image_embeddings: [batch, embedding_dim] in place of both: an interpolation of the two, say.
            negative_prompt, seed, callback_on_step_end, return_intermediates: as in `UnCLIPPipeline`.
            num_prior_candidates, prior_temperature, prior_top_p: as in `UnCLIPPipeline`, for a prompt's embedding.
            height, width: of the result, both or neither. By default it has the picture's shape, in as many pixels as
                the model's own square, rounded to what its networks need.

        Raises:
            InputError: an argument is wrong (ImageError: a picture or mask is); no stage has run.
            ConfigError: a component that was exchanged does not fit the others.
            Cancelled: the callback stopped the run.
            NonFiniteError: the result is NaN or infinity, and no picture.
        """
        self.check()
        check_output_type(output_type)
        num_resamples, jump_length = check_resampling(num_resamples, jump_length)
        strength = real(strength, "strength", 0, 1, above=True)
        source = self._embedding_source(embedding_from, prompt, image_embeddings)
        edited = read_edited(image, mask_image, lambda size: self._result_size(size, height, width))
        if edited.drawn is None and strength == 1:
            raise InputError("nothing of the picture would stay: give mask_image, or a strength below 1")
        rows = self._rows(prompt, edited, image_embeddings)
        num_images_per_prompt = check_count(num_images_per_prompt, rows)
        call = Call(noise_source(generator, seed, num_images_per_prompt * rows), callback_on_step_end)
        sizes = self._sizes(*edited.x0.shape[2:])
        prior = PriorRun(
            prior_num_inference_steps,
            check_scale(prior_guidance_scale, "prior_guidance_scale"),
            num_candidates=num_prior_candidates,
            temperature=prior_temperature,
            top_p=prior_top_p,
        )
        embedder = self._embedder(prior)
        scale = check_scale(decoder_guidance_scale, "decoder_guidance_scale")
        decoder = StageRun(decoder_num_inference_steps, scale, size=sizes["decoder"])
        runs = {"decoder": decoder, **self._super_res_runs(super_res_num_inference_steps, None, sizes)}
        for name, run in runs.items():
            self._check_steps(name, run)
        captions, negative = self._captions(prompt, rows), self._captions(negative_prompt, rows)

        known = edited.repeat(rows, num_images_per_prompt, self.device)
        runs = _knowing(known, runs, strength, num_resamples, jump_length)
        text = self._repeated_text(captions, rows, num_images_per_prompt)
        null_text = None
        if decoder.guided or (prior.guided and source == "prompt"):
            null_text = self._repeated_text(negative, rows, num_images_per_prompt)
        if source == "prompt":
            embeddings = self._embed(embedder, text, null_text, prior, call)
        else:
            own = self._own_embeddings(edited) if image_embeddings is None else image_embeddings.to(self.device).float()
            embeddings = own.expand(rows, -1).repeat_interleave(num_images_per_prompt, dim=0)
        small = self._decode(text, null_text, embeddings, runs["decoder"], call)
        large = self._enlarge(small, runs, call)
        output = self._finish(large, small, embeddings, output_type, return_intermediates, return_dict=True)
        assert isinstance(output, ImagePipelineOutput)
        if isinstance(output.images, list):
            output.images = known.transparent_again(output.images)
        return output if return_dict else output.to_tuple()

    def _embedding_source(self, asked: str | None, prompt: Any, image_embeddings: Tensor | None) -> str:
        """Where image embeddings come from: "prompt", "image", or "given"."""
        if image_embeddings is not None:
            if asked is not None:
                raise InputError("give image_embeddings or embedding_from, not both")
            check_embeddings(image_embeddings, self.prior.config.embedding_dim)
            return "given"
        if asked is not None and asked not in EMBEDDING_SOURCES:
            raise InputError(
                f"embedding_from is {asked!r}; it must be one of {', '.join(map(repr, EMBEDDING_SOURCES))}"
            )
        source = asked or ("image" if prompt is None else "prompt")
        if source == "prompt" and prompt is None:
            raise InputError("embedding_from is 'prompt', and there is no prompt")
        if source == "image" and self.image_encoder is None:
            raise InputError(
                "this model has no image_encoder, so the picture cannot say what is drawn: give a prompt, or "
                "image_embeddings, or load the pipeline with image_encoder= and feature_extractor="
            )
        return source

    def _rows(self, prompt: Any, edited: Edited, image_embeddings: Tensor | None) -> int:
        """How many rows the call has: as many as prompts, pictures or embeddings, of which any may be one for all."""
        counts = {
            "prompts": 1 if prompt is None else len(as_prompts(prompt)),
            "pictures": len(edited.originals),
            "image_embeddings": 1 if image_embeddings is None else len(image_embeddings),
        }
        rows = max(counts.values())
        if any(count not in (1, rows) for count in counts.values()):
            told = ", ".join(f"{count} {name}" for name, count in counts.items())
            raise InputError(f"there are {told}; give as many of each, or one for all")
        return rows

    def _result_size(self, size: Size, height: int | None, width: int | None) -> Size:
        """The result's height and width for a picture of height and width `size`."""
        if (height is None) != (width is None):
            raise InputError("give height and width, or neither: then the result has the picture's shape")
        if height is None and size[0] != size[1]:
            own = list(self._sizes(None, None).values())[-1][0]
            height, width = cascade.fitted_size(own, cascade.side_multiple(self.decoder, self.cascade), size)
        return list(self._sizes(height, width).values())[-1]

    def _own_embeddings(self, edited: Edited) -> Tensor:
        return ImageEncoder(self.image_encoder, self.feature_extractor).encode(edited.originals, self.device).float()


def _knowing(
    edited: Edited, runs: Mapping[str, StageRun], strength: float, num_resamples: int, jump_length: int
) -> dict[str, StageRun]:
    """The runs of the stages that draw, with what each knows of its result."""
    share = None if strength == 1 else strength
    knowing = {}
    for name, run in runs.items():
        assert run.size is not None
        known = Known(*edited.at(run.size), share, num_resamples, jump_length)
        knowing[name] = replace(run, known=known)
    return knowing
