"""Text to image: caption → image embedding → small picture → large picture.

Knows the public call and its arguments; what both pipelines share is in `generation.py`. Called by users.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unclip.diffusion.guidance import check_scale
from unclip.diffusion.scheduler import Scheduler
from unclip.errors import InputError
from unclip.models.prior import PriorTransformer
from unclip.pipelines.arguments import (
    Callback,
    as_prompts,
    check_count,
    check_embeddings,
    given_text,
    noise_source,
)
from unclip.pipelines.generation import Call, GenerationPipeline, StageRun
from unclip.pipelines.output import ImagePipelineOutput, check_output_type
from unclip.stages.condition import PriorCondition, TextEmbedding
from unclip.stages.prior import PriorStage


class UnCLIPPipeline(GenerationPipeline):
    """Makes pictures of captions (arXiv 2204.06125, figure 2).

    Components, by name: `text_encoder` and `tokenizer` (transformers' CLIP), `prior` and `prior_scheduler`,
    `text_proj`, `decoder` and `decoder_scheduler`, `super_res_first` (every step of super-resolution but the last),
    `super_res_last` and `super_res_scheduler`. Any scheduler of the library fits each stage.
    """

    COMPONENTS = (
        "text_encoder",
        "tokenizer",
        "prior",
        "text_proj",
        "decoder",
        "super_res_first",
        "super_res_last",
        "prior_scheduler",
        "decoder_scheduler",
        "super_res_scheduler",
    )
    prior: PriorTransformer
    prior_scheduler: Scheduler

    def check(self) -> None:
        super().check()
        width = self.text_encoder.config.projection_dim
        context = self.text_encoder.config.max_position_embeddings
        self._check_fits(
            [
                ("prior.embedding_dim", self.prior.config.embedding_dim, "text_encoder.projection_dim", width),
                ("prior.num_embeddings", self.prior.config.num_embeddings, "text_encoder's context", context),
            ]
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        prior_num_inference_steps: int = 25,
        decoder_num_inference_steps: int = 25,
        super_res_num_inference_steps: int | Sequence[int] = 7,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        prior_latents: Tensor | None = None,
        decoder_latents: Tensor | None = None,
        super_res_latents: Tensor | Sequence[Tensor | None] | None = None,
        text_model_output: Any = None,
        text_attention_mask: Tensor | None = None,
        prior_guidance_scale: float = 4.0,
        decoder_guidance_scale: float = 8.0,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        seed: int | Sequence[int] | None = None,
        image_embeddings: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        callback_on_step_end: Callback | None = None,
        return_intermediates: bool = False,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Make pictures.

        Args:
            prompt: a caption, or several. May be None only with `text_model_output` or `image_embeddings`.
            num_images_per_prompt: pictures of each caption; they follow one another in the output.
            prior_num_inference_steps, decoder_num_inference_steps, super_res_num_inference_steps: 1 to 1000 each; a
                model with several super-resolution stages takes one number for all of them, or one for each.
            generator: the source of all noise; a list has one a picture.
            prior_latents: x_T of the prior, [batch, embedding_dim].
            decoder_latents: x_T of the decoder, [batch, 3, height, width] at its size.
            super_res_latents: x_T of super-resolution, [batch, 3, height, width]; or one or None for each stage.
            text_model_output: CLIPTextModelOutput or (text_embeds, last_hidden_state) instead of a prompt.
            text_attention_mask: [batch, tokens], goes with it.
            prior_guidance_scale, decoder_guidance_scale: guidance of a stage is on above 1, each for itself.
            output_type: "pil", "np" or "pt".
            return_dict: False gives a plain tuple.
            negative_prompt: what guidance pushes away from in place of the empty caption; one, or one a prompt.
            seed: picture i is made with seed + i (or the i-th of a list), whatever else is in its batch.
            image_embeddings: [batch, embedding_dim] in place of the prior's.
            height, width: of the pictures in pixels, the model's own square by default. Networks draw best near the
                size that they were trained on.
            callback_on_step_end: called as (pipeline, step, timestep, {"stage", "num_steps", "latents", "x0"}); it may
                return {"latents": tensor} to go on from, or {"stop": True}.
            return_intermediates: the output also has `image_embeddings` and `small_images`.

        Raises:
            InputError: an argument is wrong; no stage has run.
            ConfigError: a component that was exchanged does not fit the others.
            Cancelled: the callback stopped the run.
        """
        self.check()
        check_output_type(output_type)
        check_scale(prior_guidance_scale, "prior_guidance_scale")
        check_scale(decoder_guidance_scale, "decoder_guidance_scale")
        prior = StageRun(prior_num_inference_steps, prior_guidance_scale, prior_latents)
        sizes = self._sizes(height, width)
        decoder = StageRun(decoder_num_inference_steps, decoder_guidance_scale, decoder_latents, sizes["decoder"])
        super_res = self._super_res_runs(super_res_num_inference_steps, super_res_latents, sizes)
        runs = {"prior": prior, "decoder": decoder, **super_res}
        for name, run in runs.items():
            self._check_steps(name, run)
        if image_embeddings is not None:
            check_embeddings(image_embeddings, self.prior.config.embedding_dim)
            if prior_latents is not None:
                raise InputError("prior_latents start the prior, which image_embeddings replace: give one of them")

        text = self._encode(prompt, text_model_output, text_attention_mask, image_embeddings)
        batch_size = check_count(num_images_per_prompt, len(text))
        self._check_latents(batch_size, **runs)
        call = Call(noise_source(generator, seed, batch_size), callback_on_step_end)
        negative = self._captions(negative_prompt, len(text))
        null_text = None
        if (prior.guided and image_embeddings is None) or decoder.guided:
            null_text = self._repeated_text(negative, len(text), num_images_per_prompt)
        text = text.repeat(num_images_per_prompt)
        if image_embeddings is None:
            embeddings = self._embed(text, null_text, prior, call)
        else:
            embeddings = image_embeddings.to(self.device).float().repeat_interleave(num_images_per_prompt, dim=0)
        small = self._decode(text, null_text, embeddings, decoder, call)
        large = self._enlarge(small, super_res, call)
        return self._finish(large, small, embeddings, output_type, return_intermediates, return_dict)

    def _sample_shape(self, name: str) -> tuple[int, ...]:
        return (self.prior.config.embedding_dim,) if name == "prior" else super()._sample_shape(name)

    def _encode(self, prompt: Any, output: Any, mask: Tensor | None, image_embeddings: Tensor | None) -> TextEmbedding:
        """The captions' embeddings, one row a prompt."""
        if output is not None:
            if prompt is not None:
                raise InputError("give prompt or text_model_output, not both")
            config = self.text_encoder.config
            text = given_text(
                output,
                mask,
                width=config.projection_dim,
                tokens=config.max_position_embeddings,
                text_width=config.hidden_size,
            ).to(self.device)
        elif mask is not None:
            raise InputError("text_attention_mask goes with text_model_output, which is missing")
        elif prompt is not None:
            text = self._text().encode(as_prompts(prompt), self.device)
        elif image_embeddings is not None:
            text = self._text().encode([""], self.device).select([0] * len(image_embeddings))
        else:
            raise InputError("give a prompt, or text_model_output with text_attention_mask, or image_embeddings")
        if image_embeddings is not None and len(image_embeddings) != len(text):
            raise InputError(
                f"there are {len(image_embeddings)} image_embeddings for {len(text)} prompts; give one for each"
            )
        return text

    def _embed(self, text: TextEmbedding, null_text: TextEmbedding | None, run: StageRun, call: Call) -> Tensor:
        """Captions → image embeddings [batch, embedding_dim]."""
        stage = PriorStage(self.prior, self.prior_scheduler.process)
        null = PriorCondition(null_text) if null_text is not None and run.guided else None
        return self._run("prior", stage, PriorCondition(text), null, run, call)
