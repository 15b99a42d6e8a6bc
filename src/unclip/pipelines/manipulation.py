"""Pictures to bipartite latents and back, and captions to directions: the paper's manipulations on loaded parts (§3).

Knows the two pipelines' components and the stages; knows neither how a step is taken nor a file format. Called by
users and by the commands.

    from unclip import Manipulator, edit
    tool = Manipulator.from_pretrained("unclip-emoji")
    latent = tool.invert(cat)
    lion = tool.caption_difference("a lion", "a cat")
    tool.decode(edit(latent, lion, [0, 0.2, 0.4])).images
"""

import copy
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from unclip.checkpoints.asked import settled
from unclip.clip.encoders import ImageEncoder, TextEmbedding
from unclip.diffusion.guidance import check_scale
from unclip.diffusion.loop import NoiseSource, following_seed, generators_from_seed
from unclip.diffusion.scheduler import DDIMScheduler
from unclip.errors import CheckpointError
from unclip.images import Pictures, as_pictures, to_unit
from unclip.models.pca import PrincipalComponents
from unclip.numbers import several
from unclip.pipelines.arguments import Callback, ImagePipelineOutput, as_prompts, check_count, check_embeddings
from unclip.pipelines.image_variation import UnCLIPImageVariationPipeline
from unclip.pipelines.model_files import ModelFiles
from unclip.pipelines.steps import Call, StageRun, inverted, inverted_super_res
from unclip.pipelines.text_to_image import UnCLIPPipeline
from unclip.stages.arithmetic import difference
from unclip.stages.decoder import DecoderStage
from unclip.stages.manipulation import BipartiteLatent
from unclip.stages.stage import DecoderCondition

NUM_ROUNDS = 2


class Manipulator(ModelFiles):
    """Inverts pictures, decodes latents, reads captions as embeddings and directions, and keeps them as files.

    It holds loaded pipelines and changes nothing in them. Steps and guidance are those that the model recommends
    unless a call says otherwise, but guidance is off (1) where a picture is inverted and decoded again.

    Args:
        variation: sees and decodes pictures.
        text: draws embeddings of captions with its prior; None where the model has no prior. Its components may be
            shared with `variation`.
    """

    def __init__(self, variation: UnCLIPImageVariationPipeline, text: UnCLIPPipeline | None = None) -> None:
        super().__init__(variation)
        self.text = text

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path = "unclip-emoji", **options: Any) -> Self:
        """Load a folder that holds an image encoder and a prior.

        Arguments and errors as of a pipeline; a component may be given that either of the two pipelines has.
        """
        of_text, of_variation = UnCLIPPipeline.component_names(), UnCLIPImageVariationPipeline.component_names()
        own = [*inspect.signature(UnCLIPPipeline.from_pretrained).parameters][1:-1]
        options = settled(options, cls.from_pretrained, [*own, *of_text, *of_variation])
        for_text = {name: each for name, each in options.items() if name in of_text or name not in of_variation}
        text = UnCLIPPipeline.from_pretrained(name_or_folder, **for_text)
        shared = {name: part for name, part in text.components.items() if name in of_variation}
        others = {name: each for name, each in options.items() if name in of_variation or name not in of_text}
        variation = UnCLIPImageVariationPipeline.from_pretrained(name_or_folder, **{**others, **shared})
        return cls(variation, text)

    # ---- pictures ----

    @torch.no_grad()
    def embed_images(self, images: Pictures) -> Tensor:
        """CLIP's image embeddings, float32 [batch, embedding_dim]. Raises: as `ImageEncoder.encode`."""
        pipe = self.variation
        embeddings = ImageEncoder(pipe.image_encoder, pipe.feature_extractor).encode(images, pipe.device).float()
        pipe.maybe_free_model_hooks()
        return embeddings

    def fit_components(self, batches: Iterable[Pictures], num_components: int | None = None) -> PrincipalComponents:
        """Principal components of pictures' embeddings, a batch at a time. Raises: as `PrincipalComponents.fit`."""
        return PrincipalComponents.fit((self.embed_images(batch) for batch in batches), num_components)

    @torch.no_grad()
    def invert(
        self,
        images: Pictures,
        *,
        decoder_num_inference_steps: int | None = None,
        super_res_num_inference_steps: int | Sequence[int] | None = None,
        decoder_guidance_scale: float = 1.0,
        prompt: str | Sequence[str] | None = None,
        super_res: bool = False,
        num_rounds: int = NUM_ROUNDS,
        callback_on_step_end: Callback | None = None,
    ) -> BipartiteLatent:
        """Find the latents that `decode` brings back to these pictures, given the same steps, guidance and prompt.

        Args:
            images: pictures of any mode, or arrays, as of `UnCLIPImageVariationPipeline`; those that are not square are
                squashed, as the image encoder sees them.
            decoder_num_inference_steps, super_res_num_inference_steps: 2 to 1000; more are nearer (paper: 250). A list
                has one for each super-resolution stage.
            decoder_guidance_scale: not above 1 is the nearest; above, both conditions are inverted together.
            prompt: a caption that the decoder sees too, or one a picture; empty by default.
            super_res: also find the x_T of every super-resolution stage, for the picture's own fine detail. Each starts
                from the smaller picture as `decode` will make it.
            num_rounds: forwards of the network a step; more are nearer.
            callback_on_step_end: as of a pipeline's call.

        Returns: as many rows as pictures, on the CPU.

        Raises:
            InputError: an argument is wrong (ImageError: a picture is).
            ConfigError: the components do not fit one another, or `num_rounds` is out of limits.
            Cancelled: the callback stopped it.
        """
        pipe = self.variation
        pipe.check()
        pictures = as_pictures(images, "images")
        ddim = self._deterministic(0.0)
        decoder = self._decoder_run(ddim, decoder_num_inference_steps, decoder_guidance_scale)
        runs = {}
        if super_res:
            steps = self._setting("super_res_num_inference_steps", super_res_num_inference_steps, 7)
            runs = ddim._super_res_runs(steps, None, ddim._sizes(None, None))
        for name, run in runs.items():
            ddim._check_steps(name, run)
        embeddings = self.embed_images(pictures)
        text, null_text = self._texts(prompt, len(pictures), decoder)
        null = None if null_text is None else DecoderCondition.null(null_text)
        condition = DecoderCondition.of(text, embeddings)
        told = {"num_rounds": num_rounds, "callback": callback_on_step_end}
        stage = DecoderStage(pipe.decoder, pipe.text_proj, ddim.decoder_scheduler.process)
        x_T = inverted(ddim, "decoder", stage, condition, null, pictures, decoder, **told)
        if not super_res:
            return BipartiteLatent(embeddings.cpu(), x_T.cpu())
        call = Call(NoiseSource(None, len(pictures)), None)
        small = ddim._decode(text, null_text, embeddings, replace(decoder, latents=x_T), call)
        wide = inverted_super_res(ddim, pictures, small, runs, **told)
        return BipartiteLatent.of(embeddings.cpu(), x_T.cpu(), *wide)

    def decode(
        self,
        latent: BipartiteLatent,
        *,
        eta: float = 0.0,
        seed: int | Sequence[int] | None = 0,
        decoder_num_inference_steps: int | None = None,
        super_res_num_inference_steps: int | Sequence[int] | None = None,
        decoder_guidance_scale: float = 1.0,
        prompt: str | Sequence[str] | None = None,
        output_type: str = "pil",
        return_intermediates: bool = False,
        callback_on_step_end: Callback | None = None,
    ) -> ImagePipelineOutput:
        """Pictures of latents, by DDIM (paper §3.1).

        Args:
            latent: one row a picture.
            eta: 0 is deterministic, so an inverted picture comes back; towards 1 ever more noise varies it.
            seed: of all other noise: that of the steps, and super-resolution's where the latent has none. One seed
                gives every row the same noise, so that rows differ by their latents alone and a film does not flicker.
                A list gives each row its own; None draws it from torch's global generator, for each row another.
            decoder_num_inference_steps, super_res_num_inference_steps, decoder_guidance_scale, prompt: those of the
                inversion bring its picture back.
            output_type, return_intermediates, callback_on_step_end: as of a pipeline's call.

        Raises:
            InputError: an argument is wrong, or the latent is of another model's sizes.
            ConfigError: `eta` is no number from 0 to 1, or the components do not fit one another.
            Cancelled: the callback stopped it.
        """
        self.check_latent(latent)
        check_count(1, len(latent))
        pipe, stages, noise = self._deterministic(eta), list(self.variation.cascade), latent.super_res_noise
        for name in stages[len(noise) :]:
            # Nothing to come back to: the stage samples as the model does, with the seed's noise.
            setattr(pipe, f"{name}_scheduler", getattr(self.variation, f"{name}_scheduler"))
        output = pipe(
            image_embeddings=latent.image_embedding,
            decoder_latents=latent.decoder_latents,
            super_res_latents=[*noise, *[None] * (len(stages) - len(noise))],
            decoder_num_inference_steps=self._setting("decoder_num_inference_steps", decoder_num_inference_steps, 25),
            super_res_num_inference_steps=self._setting(
                "super_res_num_inference_steps", super_res_num_inference_steps, 7
            ),
            decoder_guidance_scale=decoder_guidance_scale,
            prompt=prompt,
            seed=None if seed is None else several(seed) or [seed] * len(latent),  # type: ignore[list-item]
            output_type=output_type,
            return_intermediates=return_intermediates,
            callback_on_step_end=callback_on_step_end,
        )
        assert isinstance(output, ImagePipelineOutput)
        return output

    @torch.no_grad()
    def decode_small(
        self,
        latent: BipartiteLatent,
        *,
        decoder_num_inference_steps: int | None = None,
        decoder_guidance_scale: float = 1.0,
        prompt: str | Sequence[str] | None = None,
        callback_on_step_end: Callback | None = None,
    ) -> Tensor:
        """What the decoder alone makes of latents by DDIM without noise: `decode`'s pictures before super-resolution.

        Args:
            latent: one row a picture; super-resolution's noise is not needed.
            decoder_num_inference_steps, decoder_guidance_scale, prompt, callback_on_step_end: as of `decode`.

        Returns: float32 [batch, 3, size, size] in [0, 1], on the CPU.

        Raises: as `decode`; NonFiniteError when the pictures are NaN or infinity.
        """
        self.check_latent(latent)
        check_count(1, len(latent))
        pipe = self._deterministic(0.0)
        pipe.check()
        run = self._decoder_run(pipe, decoder_num_inference_steps, decoder_guidance_scale)
        text, null_text = self._texts(prompt, len(latent), run)
        call = Call(NoiseSource(None, len(latent)), callback_on_step_end)
        embeddings = latent.image_embedding.to(pipe.device).float()
        small = pipe._decode(text, null_text, embeddings, replace(run, latents=latent.decoder_latents), call)
        pipe.maybe_free_model_hooks()
        pipe._check_finite({"decoder's pictures": small})
        return to_unit(small).cpu()

    def fresh(self, image_embedding: Tensor, seed: int = 0) -> BipartiteLatent:
        """Latents of embeddings [batch, embedding_dim] that were never a picture: one noise, drawn by `seed`, for all.

        Raises: InputError for embeddings of another width, or a seed out of limits.
        """
        check_embeddings(image_embedding, self.variation.text_proj.config.clip_embeddings_dim)
        source = NoiseSource(generators_from_seed(seed, 1), 1)
        noise = source.draw((1, *self.variation._sample_shape("decoder")), "cpu")
        one = BipartiteLatent(image_embedding[:1].float().cpu(), noise)
        return one.showing(image_embedding.float().cpu())

    # ---- captions ----

    def embed_captions(
        self,
        captions: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        num_samples: int = 1,
        prior_num_inference_steps: int | None = None,
        prior_guidance_scale: float | None = None,
        num_prior_candidates: int | None = None,
        prior_temperature: float | None = None,
        prior_top_p: float | None = None,
        one_choice: bool = False,
    ) -> Tensor:
        """The image embeddings that the prior draws for captions, float32 [batch, embedding_dim], on the CPU.

        Args:
            captions: one or several.
            seed: one gives every caption the same noise; a list has one a caption.
            num_samples: how many are drawn for each caption and averaged, with seeds from `seed` on: a mean has less of
                what chance adds.
            prior_num_inference_steps, prior_guidance_scale, num_prior_candidates, prior_temperature, prior_top_p: as of
                a call of `UnCLIPPipeline`, and as the model recommends, unless given. One sample of a caption is then
                the embedding that such a call with its seed makes its picture of.
            one_choice: of several candidates each caption keeps the one closest to itself, and that may be another,
                with another noise, than its neighbour's. True: of each sample all captions keep candidates of the
                same number, that whose dot products with all of them add up to the most; with one seed they then differ
                by what they say alone.

        Raises: CheckpointError for a model without a prior; InputError for a wrong argument.
        """
        if self.text is None:
            raise CheckpointError(
                "this model has no prior, so a caption cannot become an image embedding: give pictures instead, or a "
                "model that makes pictures of captions"
            )
        captions = as_prompts(captions)
        num_samples = check_count(num_samples, len(captions), "num_samples")
        first = several(seed) or [seed] * len(captions)
        drawn = self.text.embed_captions(
            [*captions] * num_samples,
            num_inference_steps=self._setting("prior_num_inference_steps", prior_num_inference_steps, 25),
            guidance_scale=self._setting("prior_guidance_scale", prior_guidance_scale, 4.0),
            seed=[following_seed(one, copy_) for copy_ in range(num_samples) for one in first],
            num_prior_candidates=self._setting("num_prior_candidates", num_prior_candidates, 1),
            prior_temperature=self._setting("prior_temperature", prior_temperature, 1.0),
            prior_top_p=self._setting("prior_top_p", prior_top_p, 1.0),
            captions_per_choice=len(captions) if one_choice else 1,
        )
        return drawn.view(num_samples, len(captions), -1).mean(dim=0).cpu()

    @torch.no_grad()
    def caption_difference(
        self,
        target: str,
        source: str,
        *,
        through_prior: bool = True,
        seed: int = 0,
        num_samples: int = 4,
        num_prior_candidates: int = 1,
        prior_temperature: float | None = None,
        prior_top_p: float | None = None,
    ) -> Tensor:
        """The direction from one caption to another, float32 [embedding_dim], of unit norm (paper §3.3's z_d).

        Args:
            target, source: "a photo of a lion" and "a photo of a cat", say.
            through_prior: take the difference of the image embeddings that the prior draws for the two captions, with
                the same noise. Texts and images lie apart in CLIP's space, the more the smaller the CLIP; the prior
                crosses that gap. False is the paper's: the difference of the two text embeddings.
            seed, num_samples, num_prior_candidates, prior_temperature, prior_top_p: of the prior, as of
                `embed_captions`. Of several candidates both captions keep the same one (`one_choice`): a difference of
                embeddings that were drawn from different noises would be one of the noises too. One is enough, whatever
                the model recommends for pictures: the mean of the samples is taken.

        Raises: InputError for captions that mean the same; CheckpointError for a prior that is not there.
        """
        if through_prior:
            both = self.embed_captions(
                [target, source],
                seed=seed,
                num_samples=num_samples,
                num_prior_candidates=num_prior_candidates,
                prior_temperature=prior_temperature,
                prior_top_p=prior_top_p,
                one_choice=True,
            )
        else:
            both = self.variation._text().encode([target, source], self.variation.device).embeds.float().cpu()
            self.variation.maybe_free_model_hooks()
        return difference(both[0], both[1])

    # ---- inside ----

    def _setting(self, name: str, given: Any, default: Any) -> Any:
        """An argument of a pipeline's call as given, or as the model recommends, or the ecosystem's default."""
        if given is not None:
            return given
        pipe = self.text if "prior" in name and self.text is not None else self.variation
        return pipe.recommended.get(name, default)

    def _decoder_run(
        self, pipe: UnCLIPImageVariationPipeline, num_steps: int | None, guidance_scale: float
    ) -> StageRun:
        """How the decoder runs. Raises: InputError for a number of steps or a scale that cannot be."""
        scale = check_scale(guidance_scale, "decoder_guidance_scale")
        run = StageRun(self._setting("decoder_num_inference_steps", num_steps, 25), scale)
        pipe._check_steps("decoder", run)
        return run

    def _texts(
        self, prompt: str | Sequence[str] | None, rows: int, run: StageRun
    ) -> tuple[TextEmbedding, TextEmbedding | None]:
        """What the decoder reads beside the embedding, and the empty caption where it is guided."""
        pipe = self.variation
        text = pipe._repeated_text(pipe._captions(prompt, rows), rows, 1)
        return text, pipe._repeated_text([""], rows, 1) if run.guided else None

    def _deterministic(self, eta: float) -> UnCLIPImageVariationPipeline:
        """The same components (hooks and bars too) that sample by DDIM; the pipeline itself is left alone."""
        pipe = copy.copy(self.variation)
        for name in (f"{stage}_scheduler" for stage in ("decoder", *pipe.cascade)):
            setattr(pipe, name, DDIMScheduler.from_config(getattr(pipe, name).config, eta=eta))
        return pipe
