"""Text to image: captions → image embeddings → small pictures → large pictures."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from unclip.checkpoints.layout import FURTHER
from unclip.clip.encoders import TextEmbedding
from unclip.diffusion.scheduler import Scheduler
from unclip.errors import InputError
from unclip.models.prior import PriorConfig, PriorTransformer
from unclip.models.prior_autoregressive import AutoregressivePrior, AutoregressivePriorConfig
from unclip.models.prior_dalle2 import EmbeddingPriorConfig, EmbeddingPriorNetwork
from unclip.numbers import whole
from unclip.pipelines.arguments import (
    Callback,
    ImagePipelineOutput,
    as_captions,
    as_prompts,
    check_count,
    check_embeddings,
    check_output_type,
    given_text,
    noise_source,
    takes_preset,
)
from unclip.pipelines.cascade import Fact, check_fits
from unclip.pipelines.generation import GenerationPipeline
from unclip.pipelines.steps import Call, PriorRun, decode, embed, encode, enlarge, finish, noised
from unclip.settings import SETTINGS
from unclip.stages.prior import AutoregressivePriorStage
from unclip.stages.prior_dalle2 import EmbeddingPriorStage, TextPriorStage


class UnCLIPPipeline(GenerationPipeline):
    """Makes pictures from captions (arXiv 2204.06125, figure 2).

    Components, by name: `text_encoder` and `tokenizer` (transformers' CLIP), `prior` and `prior_scheduler`,
    `text_proj`, `decoder` and `decoder_scheduler`, `super_res_first` (for every step of super-resolution but the last),
    `super_res_last` and `super_res_scheduler`. Each stage takes any scheduler of unclip. The prior is a
    `PriorTransformer` (the diffusion prior) or an `AutoregressivePrior`, which needs no `prior_scheduler`. A
    `PriorTransformer` without time embedding (ECLIPSE) needs none either: one call makes an embedding. An
    `EmbeddingPriorNetwork` (DALLE2-pytorch) predicts embeddings of norm 1, which get the mean norm of `statistics`; its
    null condition is learned, so that negative prompts reach only the decoder.
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
    prior: PriorTransformer | AutoregressivePrior | EmbeddingPriorNetwork
    prior_scheduler: Scheduler | None

    def check(self) -> None:
        super().check()
        prior = self.prior.config
        needs_none = isinstance(prior, AutoregressivePriorConfig) or not getattr(prior, "takes_timestep", True)
        if self.prior_scheduler is None and not needs_none:
            raise InputError("UnCLIPPipeline needs the component 'prior_scheduler': its prior is a diffusion prior")
        check_fits(prior_facts(self.text_encoder.config, prior))

    @takes_preset
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
        noise_level: int = 0,
        decoder_guidance_low: float = 0.0,
        decoder_guidance_high: float = 1.0,
        decoder_reuse: int = 1,
        super_res_reuse: int = 1,
        preset: str | None = None,
        callback_on_step_end: Callback | None = None,
        return_intermediates: bool = False,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Make pictures from captions.

        Args:
            prompt: a caption, or several. May be None only with `text_model_output` or `image_embeddings`.
            num_images_per_prompt: pictures of each caption, which are next to each other in the output.
            prior_num_inference_steps, decoder_num_inference_steps, super_res_num_inference_steps: 1 to 1000 each. For
                several super-resolution stages, one number for all of them or one for each. An autoregressive prior
                always takes one step for each code, and a prior of ECLIPSE one step.
            generator: the source of all noise; a list has one for each picture.
            prior_latents: x_T of the prior, [batch, embedding_dim]; for an autoregressive prior the noise of its codes,
                [batch, 1 + num_components].
            decoder_latents: x_T of the decoder, [batch, 3, height, width] at its size.
            super_res_latents: x_T of super-resolution, [batch, 3, height, width]; or one or None for each stage.
            text_model_output: CLIPTextModelOutput or (text_embeds, last_hidden_state) instead of a prompt.
            text_attention_mask: [batch, tokens], with `text_model_output`.
            prior_guidance_scale, decoder_guidance_scale: the guidance of each stage; 1 or less turns it off. A prior of
                ECLIPSE has none.
            output_type: "pil", "np" or "pt".
            return_dict: False returns a plain tuple.
            negative_prompt: the caption that guidance moves away from, instead of the empty one; one, or one for each
                prompt.
            seed: picture i is made with seed + i (or the i-th of a list), independently of the others in its batch.
            num_prior_candidates: image embeddings sampled for each caption, 1 to 1000 (paper §2.2: 2). The one with the
                largest dot product with the text embedding, both normalised, is kept. The first candidate is the same
                as without others, and uses `prior_latents`.
            prior_temperature, prior_top_p: the sampling of an autoregressive prior's codes, from 0 to 100 and above 0
                to 1; see `AutoregressivePriorStage`. A diffusion prior takes only 1.
            image_embeddings: [batch, embedding_dim]; the prior does not run then.
            height, width: of the pictures in pixels; the model's own square by default. Networks work best near the
                size that they were trained on.
            noise_level: noise that is added to the image embeddings, from 0 (none) to 999; see
                `UnCLIPImageVariationPipeline`.
            decoder_guidance_low, decoder_guidance_high: the decoder is guided only in steps whose noise is between
                these two, from 0 (none) to 1 (pure noise): a timestep's share of the last one. The other steps take
                half of the time (Kynkäänniemi et al. 2404.07724).
            decoder_reuse, super_res_reuse: the deep levels of the network are computed in every n-th step only, and
                reused in between (DeepCache, Ma et al. 2312.00858); 1 is exact. With tiles, super-resolution is always
                exact.
            preset: the name of a preset of the model (`presets`), which sets what is not given here, and the sampler.
                "exact" is the recommended settings. Without a preset, the defaults are those of this call.
            callback_on_step_end: called as (pipeline, step, timestep, {"stage", "num_steps", "latents", "x0"}). It may
                return {"latents": tensor} to replace the latents, or {"stop": True}.
            return_intermediates: the output also has `image_embeddings` and `small_images`.

        Raises:
            InputError: an argument is wrong; no stage has run.
            ConfigError: a component that was replaced does not fit the others.
            Cancelled: the callback stopped the run.
            NonFiniteError: the result has NaN or infinity.
        """
        self.check()
        check_output_type(output_type)
        prior = self.prior_run(
            prior_num_inference_steps,
            prior_guidance_scale,
            prior_latents,
            num_candidates=num_prior_candidates,
            temperature=prior_temperature,
            top_p=prior_top_p,
        )
        sizes = self.sizes(height, width)
        decoder = self.decoder_run(
            decoder_num_inference_steps,
            decoder_guidance_scale,
            decoder_latents,
            sizes["decoder"],
            guidance_interval=(decoder_guidance_low, decoder_guidance_high),
            reuse=decoder_reuse,
        )
        super_res = self.super_res_runs(super_res_num_inference_steps, super_res_latents, sizes, reuse=super_res_reuse)
        statistics = self.noise_statistics(noise_level)
        if image_embeddings is not None:
            check_embeddings(image_embeddings, self.embedding_dim)
            if prior_latents is not None:
                raise InputError(
                    "give either prior_latents or image_embeddings: with image_embeddings, the prior does not run"
                )
        text = self._text_of(prompt, text_model_output, text_attention_mask, image_embeddings)
        rows = len(text)
        negative = as_captions(negative_prompt, rows)
        count = check_count(num_images_per_prompt, rows)
        for run in (prior, decoder, *super_res):
            run.check_latents(count * rows)
        call = Call(self, noise_source(generator, seed, count * rows), callback_on_step_end)

        text, null_text = text.repeat(count), None
        if decoder.guided or (prior.guided and image_embeddings is None):
            null_text = encode(self.caption_encoder, negative, rows, count, self.device)
        if image_embeddings is None:
            embeddings = embed(prior, text, null_text, call)
        else:
            embeddings = image_embeddings.to(self.device).float().repeat_interleave(count, dim=0)
        embeddings = noised(embeddings, statistics, noise_level, call)
        small = decode(decoder, text, null_text, embeddings, call)
        large = enlarge(super_res, small, call)
        output = finish(
            large, small, embeddings, call, output_type=output_type, return_intermediates=return_intermediates
        )
        return output if return_dict else output.to_tuple()

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
        """The image embeddings that the prior samples for captions, float32 [batch, embedding_dim].

        Args:
            prompt: a caption, or several.
            num_inference_steps, guidance_scale: of the prior.
            generator, seed: as in a call; `seed=[7] * n` gives all captions the same noise, so that only their meaning
                differs.
            num_prior_candidates, prior_temperature, prior_top_p: as in a call, which samples the same embedding.
            captions_per_choice: this many consecutive captions keep the candidate of the same number, whose dot
                products with all of them have the largest sum. With 1, captions of one seed may keep candidates of
                different noise. It must divide the number of captions.

        Raises: InputError for a wrong argument, NonFiniteError for a result with NaN or infinity.
        """
        self.check()
        prompts = as_prompts(prompt)
        captions_per_choice = whole(captions_per_choice, "captions_per_choice")
        if len(prompts) % captions_per_choice:
            raise InputError(f"captions_per_choice is {captions_per_choice}; it must divide {len(prompts)} captions")
        run = self.prior_run(
            num_inference_steps,
            guidance_scale,
            num_candidates=num_prior_candidates,
            captions_per_choice=captions_per_choice,
            temperature=prior_temperature,
            top_p=prior_top_p,
        )
        rows, encoder = len(prompts), self.caption_encoder
        call = Call(self, noise_source(generator, seed, rows))
        text = encoder.encode(prompts, self.device)
        self.report_unknown(prompts, text)
        null_text = encode(encoder, [""], rows, 1, self.device) if run.guided else None
        embeddings = embed(run, text, null_text, call)
        call.close({"image embeddings": embeddings})
        return embeddings

    def prior_run(
        self,
        num_steps: int,
        guidance_scale: float,
        latents: Tensor | None = None,
        *,
        num_candidates: int = 1,
        captions_per_choice: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> PriorRun:
        """The prior with its scheduler's sampler and a call's settings.

        Raises: InputError for a wrong setting, or a temperature or top_p for a diffusion prior.
        """
        temperature = SETTINGS["prior_temperature"].check(temperature)
        top_p = SETTINGS["prior_top_p"].check(top_p)
        choice = {
            "num_candidates": int(SETTINGS["num_prior_candidates"].check(num_candidates)),
            "captions_per_choice": captions_per_choice,
        }
        scale = float(SETTINGS["prior_guidance_scale"].check(guidance_scale))
        # By its configuration, since a compiled prior is of another class.
        if isinstance(self.prior.config, AutoregressivePriorConfig):
            codes = AutoregressivePriorStage(cast("AutoregressivePrior", self.prior), temperature, top_p)
            return PriorRun(codes, codes.sample, scale, latents, **choice)
        if (temperature, top_p) != (1, 1):
            raise InputError(
                f"prior_temperature is {temperature} and prior_top_p {top_p}, but a diffusion prior samples no "
                "codes: leave them out, or load an AutoregressivePrior"
            )
        if isinstance(self.prior.config, PriorConfig):
            network = cast("PriorTransformer", self.prior)
            return PriorRun.of(network, self.prior_scheduler, num_steps, scale, latents, **choice)
        scheduler = self.prior_scheduler
        assert scheduler is not None  # see check
        stage = EmbeddingPriorStage(cast("EmbeddingPriorNetwork", self.prior), scheduler.process)
        norm = self.statistics_for("a prior of DALLE2-pytorch, whose embeddings have the norm 1,").norm_mean
        steps = scheduler.spaced_timesteps(num_steps)
        text_stage = TextPriorStage(stage, scheduler.sampler(), steps, norm)
        return PriorRun(text_stage, text_stage.sample, scale, latents, **choice)

    def _text_of(self, prompt: Any, output: Any, mask: Tensor | None, image_embeddings: Tensor | None) -> TextEmbedding:
        """The captions' embeddings, one row for each prompt."""
        encoder = self.caption_encoder
        if output is not None:
            if prompt is not None:
                raise InputError("give prompt or text_model_output, not both")
            text = given_text(output, mask, self.text_encoder.config).to(self.device)
        elif mask is not None:
            raise InputError("text_attention_mask needs text_model_output, which is missing")
        elif prompt is not None:
            prompts = as_prompts(prompt)
            text = encoder.encode(prompts, self.device)
            self.report_unknown(prompts, text)
        elif image_embeddings is not None:
            text = encode(encoder, [""], len(image_embeddings), 1, self.device)
        else:
            raise InputError("give a prompt, or text_model_output with text_attention_mask, or image_embeddings")
        if image_embeddings is not None and len(image_embeddings) != len(text):
            raise InputError(f"there are {len(image_embeddings)} image_embeddings for {len(text)} prompts")
        return text


def prior_facts(text: Any, prior: Any) -> list[Fact]:
    """The settings of a text encoder and a prior that must agree."""
    facts: list[Fact] = [
        ("prior.embedding_dim", prior.embedding_dim, "text_encoder.projection_dim", text.projection_dim),
    ]
    if isinstance(prior, EmbeddingPriorConfig):
        if prior.use_text_encodings:
            facts.append(("prior.embedding_dim", prior.embedding_dim, "text_encoder.hidden_size", text.hidden_size))
        return [*facts, ("prior.num_tokens", prior.num_tokens, "the target that a decoder takes, one vector", None)]
    facts += [
        ("prior.num_embeddings", prior.num_embeddings, "text_encoder's context", text.max_position_embeddings),
        ("prior.text_dim", prior.text_width, "text_encoder.hidden_size", text.hidden_size),
    ]
    if isinstance(prior, PriorConfig):
        summary, output, count = prior.summary_width, prior.output_width, 3 + prior.takes_timestep
        facts += [
            ("prior.embedding_proj_dim", summary, "text_encoder.projection_dim", text.projection_dim),
            ("prior.clip_embed_dim", output, "prior.embedding_dim", prior.embedding_dim),
            ("prior.added_emb_type", prior.added_emb_type, "the query that a pipeline reads", "prd"),
            (
                "prior.additional_embeddings",
                prior.additional_embeddings,
                "the count of tokens after the text's",
                count,
            ),
        ]
    return facts
