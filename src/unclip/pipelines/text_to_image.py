"""Text to image: caption → image embedding → small picture → large picture.

Knows the public call and its arguments; what both pipelines share is in `generation.py`. Called by users.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unclip.checkpoints.layout import FURTHER
from unclip.clip.encoders import TextEmbedding
from unclip.diffusion.guidance import check_scale
from unclip.diffusion.scheduler import Scheduler
from unclip.errors import InputError
from unclip.models.prior import PriorConfig, PriorTransformer
from unclip.models.prior_autoregressive import AutoregressivePrior, AutoregressivePriorConfig
from unclip.numbers import whole
from unclip.pipelines.arguments import (
    Callback,
    ImagePipelineOutput,
    as_prompts,
    check_candidates,
    check_count,
    check_embeddings,
    check_latents,
    check_output_type,
    given_text,
    noise_source,
    on_step,
)
from unclip.pipelines.cascade import Fact
from unclip.pipelines.steps import Call, GenerationPipeline, StageRun
from unclip.stages.prior import (
    AutoregressivePriorStage,
    DiffusionEmbeddingSampler,
    EmbeddingSampler,
    PriorStage,
    check_drawing,
    sample_best,
)
from unclip.stages.stage import PriorCondition


@dataclass(frozen=True)
class PriorRun(StageRun):
    """How the prior runs in one call: candidates of each embedding, who chooses together, and how codes are drawn."""

    num_candidates: int = 1
    captions_per_choice: int = 1
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        temperature, top_p = check_drawing(self.temperature, self.top_p)
        checked = {"num_candidates": check_candidates(self.num_candidates), "temperature": temperature, "top_p": top_p}
        for name, value in checked.items():
            object.__setattr__(self, name, value)


class UnCLIPPipeline(GenerationPipeline):
    """Makes pictures of captions (arXiv 2204.06125, figure 2).

    Components, by name: `text_encoder` and `tokenizer` (transformers' CLIP), `prior` and `prior_scheduler`,
    `text_proj`, `decoder` and `decoder_scheduler`, `super_res_first` (every step of super-resolution but the last),
    `super_res_last` and `super_res_scheduler`. Any scheduler of the library fits each stage. The prior is a
    `PriorTransformer` (the diffusion prior) or an `AutoregressivePrior`, which needs no scheduler: `prior_scheduler`
    may be left out then.
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
    OPTIONAL = ("prior_scheduler", *FURTHER)
    prior: PriorTransformer | AutoregressivePrior
    prior_scheduler: Scheduler | None

    def check(self) -> None:
        super().check()
        if self.prior_scheduler is None and isinstance(self.prior.config, PriorConfig):
            raise InputError("UnCLIPPipeline needs the component 'prior_scheduler': its prior is a diffusion prior")
        text, prior = self.text_encoder.config, self.prior.config
        fits: list[Fact] = [
            ("prior.embedding_dim", prior.embedding_dim, "text_encoder.projection_dim", text.projection_dim),
            ("prior.num_embeddings", prior.num_embeddings, "text_encoder's context", text.max_position_embeddings),
            ("prior.text_dim", prior.text_width, "text_encoder.hidden_size", text.hidden_size),
        ]
        if isinstance(prior, PriorConfig):
            summary, output = prior.summary_width, prior.output_width
            fits += [
                ("prior.embedding_proj_dim", summary, "text_encoder.projection_dim", text.projection_dim),
                ("prior.clip_embed_dim", output, "prior.embedding_dim", prior.embedding_dim),
                ("prior.added_emb_type", prior.added_emb_type, "the query that a pipeline reads", "prd"),
                ("prior.additional_embeddings", prior.additional_embeddings, "the count of tokens after the text's", 4),
            ]
        self._check_fits(fits)

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
        num_prior_candidates: int = 1,
        prior_temperature: float = 1.0,
        prior_top_p: float = 1.0,
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
                model with several super-resolution stages takes one number for all of them, or one for each. An
                autoregressive prior takes one step for each of its codes, whatever the first says.
            generator: the source of all noise; a list has one a picture.
            prior_latents: x_T of the prior, [batch, embedding_dim]; the noise of an autoregressive one's codes,
                [batch, 1 + num_components].
            decoder_latents: x_T of the decoder, [batch, 3, height, width] at its size.
            super_res_latents: x_T of super-resolution, [batch, 3, height, width]; or one or None for each stage.
            text_model_output: CLIPTextModelOutput or (text_embeds, last_hidden_state) instead of a prompt.
            text_attention_mask: [batch, tokens], goes with it.
            prior_guidance_scale, decoder_guidance_scale: guidance of a stage is on above 1, each for itself.
            output_type: "pil", "np" or "pt".
            return_dict: False gives a plain tuple.
            negative_prompt: what guidance pushes away from in place of the empty caption; one, or one a prompt.
            seed: picture i is made with seed + i (or the i-th of a list), whatever else is in its batch.
            num_prior_candidates: image embeddings drawn of each caption, 1 to 1000 (paper §2.2: 2), of which the one
                with the largest dot product with the text embedding, both normalised, is kept. The first candidate is
                what is drawn without others, and `prior_latents` are its.
            prior_temperature, prior_top_p: how an autoregressive prior draws its codes, from 0 to 100 and above 0 to 1:
                see `AutoregressivePriorStage`. A diffusion prior draws none, and takes no other than 1.
            image_embeddings: [batch, embedding_dim] in place of the prior's, which does not run then.
            height, width: of the pictures in pixels, the model's own square by default. Networks draw best near the
                size that they were trained on.
            callback_on_step_end: called as (pipeline, step, timestep, {"stage", "num_steps", "latents", "x0"}); it may
                return {"latents": tensor} to go on from, or {"stop": True}.
            return_intermediates: the output also has `image_embeddings` and `small_images`.

        Raises:
            InputError: an argument is wrong; no stage has run.
            ConfigError: a component that was exchanged does not fit the others.
            Cancelled: the callback stopped the run.
            NonFiniteError: the result is NaN or infinity, and no picture.
        """
        self.check()
        check_output_type(output_type)
        prior = PriorRun(
            prior_num_inference_steps,
            check_scale(prior_guidance_scale, "prior_guidance_scale"),
            prior_latents,
            num_candidates=num_prior_candidates,
            temperature=prior_temperature,
            top_p=prior_top_p,
        )
        embedder = self._embedder(prior)
        sizes = self._sizes(height, width)
        scale = check_scale(decoder_guidance_scale, "decoder_guidance_scale")
        decoder = StageRun(decoder_num_inference_steps, scale, decoder_latents, sizes["decoder"])
        super_res = self._super_res_runs(super_res_num_inference_steps, super_res_latents, sizes)
        runs = {"decoder": decoder, **super_res}
        for name, run in runs.items():
            self._check_steps(name, run)
        if image_embeddings is not None:
            check_embeddings(image_embeddings, self.prior.config.embedding_dim)
            if prior_latents is not None:
                raise InputError("prior_latents start the prior, which image_embeddings replace: give one of them")

        text = self._encode(prompt, text_model_output, text_attention_mask, image_embeddings)
        num_images_per_prompt = check_count(num_images_per_prompt, len(text))
        batch_size = num_images_per_prompt * len(text)
        check_latents(prior.latents, "prior_latents", (batch_size, *embedder.sample_shape(PriorCondition(text))[1:]))
        self._check_latents(batch_size, **runs)
        call = Call(noise_source(generator, seed, batch_size), callback_on_step_end)
        negative = self._captions(negative_prompt, len(text))
        null_text = None
        if (prior.guided and image_embeddings is None) or decoder.guided:
            null_text = self._repeated_text(negative, len(text), num_images_per_prompt)
        text = text.repeat(num_images_per_prompt)
        if image_embeddings is None:
            embeddings = self._embed(embedder, text, null_text, prior, call)
        else:
            embeddings = image_embeddings.to(self.device).float().repeat_interleave(num_images_per_prompt, dim=0)
        small = self._decode(text, null_text, embeddings, decoder, call)
        large = self._enlarge(small, super_res, call)
        return self._finish(large, small, embeddings, output_type, return_intermediates, return_dict)

    @torch.no_grad()
    def embed_captions(
        self,
        prompt: str | Sequence[str],
        *,
        num_inference_steps: int = 25,
        guidance_scale: float = 4.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | Sequence[int] | None = None,
        num_prior_candidates: int = 1,
        prior_temperature: float = 1.0,
        prior_top_p: float = 1.0,
        captions_per_choice: int = 1,
    ) -> Tensor:
        """The image embeddings that the prior draws for captions, float32 [batch, embedding_dim].

        Args:
            prompt: a caption, or several.
            num_inference_steps, guidance_scale: of the prior.
            generator, seed: as of a call; `seed=[7] * n` gives every caption the same noise, so that they differ by
                what they say alone.
            num_prior_candidates, prior_temperature, prior_top_p: as of a call, so that a caption has the embedding here
                that a call draws its picture from.
            captions_per_choice: so many captions that follow one another keep candidates of the same number, that whose
                dot products with all of them add up to the most; at 1, captions of one seed may keep candidates of
                different noise. It divides the number of captions.

        Raises: InputError for a wrong argument, NonFiniteError for a result that is NaN or infinity.
        """
        self.check()
        run = PriorRun(
            num_inference_steps,
            check_scale(guidance_scale, "guidance_scale"),
            num_candidates=num_prior_candidates,
            captions_per_choice=captions_per_choice,
            temperature=prior_temperature,
            top_p=prior_top_p,
        )
        embedder = self._embedder(run)
        prompts = as_prompts(prompt)
        captions_per_choice = whole(captions_per_choice, "captions_per_choice")
        if len(prompts) % captions_per_choice:
            raise InputError(
                f"captions_per_choice is {captions_per_choice}; it must divide the number of captions, {len(prompts)}"
            )
        text = self._text().encode(prompts, self.device)
        null_text = self._repeated_text([""], len(text), 1) if run.guided else None
        embeddings = self._embed(embedder, text, null_text, run, Call(noise_source(generator, seed, len(text)), None))
        self.maybe_free_model_hooks()
        self._check_finite({"image embeddings": embeddings})
        return embeddings

    def _embedder(self, run: PriorRun) -> EmbeddingSampler:
        """The prior, ready to be sampled.

        Raises: InputError for steps that its scheduler cannot take, or a way to draw codes that it cannot follow.
        """
        prior: Any = self.prior  # possibly compiled, then its class says nothing
        if isinstance(prior.config, AutoregressivePriorConfig):
            return AutoregressivePriorStage(prior, run.temperature, run.top_p)
        if (run.temperature, run.top_p) != (1, 1):
            raise InputError(
                f"prior_temperature is {run.temperature} and prior_top_p {run.top_p}, but a diffusion prior draws no "
                "codes: leave them out, or load an AutoregressivePrior"
            )
        scheduler = self.prior_scheduler
        assert scheduler is not None  # check() has seen to it
        stage = PriorStage(prior, scheduler.process)
        return DiffusionEmbeddingSampler(stage, scheduler.sampler(), scheduler.spaced_timesteps(run.num_steps))

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

    def _embed(
        self, prior: EmbeddingSampler, text: TextEmbedding, null_text: TextEmbedding | None, run: PriorRun, call: Call
    ) -> Tensor:
        """Captions → image embeddings [batch, embedding_dim]."""
        with self._freed_when_stopped():
            return sample_best(
                prior,
                PriorCondition(text),
                num_candidates=run.num_candidates,
                captions_per_choice=run.captions_per_choice,
                noise=call.noise,
                null=PriorCondition(null_text) if null_text is not None and run.guided else None,
                guidance_scale=run.guidance_scale,
                latents=run.latents,
                progress=self.progress("prior"),
                on_step=on_step(self, "prior", call.callback),
            )
