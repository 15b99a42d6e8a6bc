"""The paper's manipulations (§3): pictures to bipartite latents and back, captions to directions.

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

from unclip.checkpoints.loading_arguments import accepted_arguments
from unclip.diffusion.loop import NoiseSource, following_seed, generators_from_seed
from unclip.diffusion.scheduler import DDIMScheduler
from unclip.errors import CheckpointError
from unclip.images import Pictures, as_pictures, to_unit
from unclip.models.pca import PrincipalComponents
from unclip.numbers import several
from unclip.pipelines.arguments import (
    Callback,
    ImagePipelineOutput,
    as_prompts,
    check_count,
    check_embeddings,
)
from unclip.pipelines.image_variation import UnCLIPImageVariationPipeline
from unclip.pipelines.model_files import ModelFiles
from unclip.pipelines.stable_unclip import StableUnCLIPImg2ImgPipeline, StableUnCLIPPipeline
from unclip.pipelines.steps import Call, StageRun, invert_super_res
from unclip.pipelines.text_to_image import UnCLIPPipeline
from unclip.pipelines.unified import StableTextToImage, StableVariation
from unclip.settings import SETTINGS
from unclip.stages.arithmetic import difference
from unclip.stages.manipulation import BipartiteLatent
from unclip.stages.stage import DecoderCondition

NUM_ROUNDS = 2


class Manipulator(ModelFiles):
    """Inverts pictures, decodes latents, and computes embeddings and directions of captions.

    It uses loaded pipelines and does not change them. Steps and guidance are those that the model recommends, unless
    they are given. Only for pictures that are inverted and decoded again, guidance is off (1) by default.

    Args:
        variation: the pipeline that embeds and decodes pictures. A decoder in latent space (Stable unCLIP) is inverted
            in latents.
        text: the pipeline whose prior samples embeddings of captions; None for a model without a prior. It may share
            components with `variation`.
    """

    def __init__(
        self,
        variation: UnCLIPImageVariationPipeline | StableUnCLIPImg2ImgPipeline,
        text: UnCLIPPipeline | StableUnCLIPPipeline | None = None,
    ) -> None:
        if isinstance(variation, StableUnCLIPImg2ImgPipeline):
            variation = StableVariation.from_pipe(variation)
        if isinstance(text, StableUnCLIPPipeline):
            text = StableTextToImage.from_pipe(text)
        super().__init__(variation)
        self.text = text

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path = "unclip-emoji", **options: Any) -> Self:
        """Load a folder with an image encoder and a prior.

        Arguments and errors as in a pipeline; components of either pipeline may be given.
        """
        of_text, of_variation = UnCLIPPipeline.component_names(), UnCLIPImageVariationPipeline.component_names()
        own = [*inspect.signature(UnCLIPPipeline.from_pretrained).parameters][1:-1]
        options = accepted_arguments(options, cls.from_pretrained, [*own, *of_text, *of_variation])
        for_text = {name: each for name, each in options.items() if name in of_text or name not in of_variation}
        text = UnCLIPPipeline.from_pretrained(name_or_folder, **for_text)
        if type(text) is not UnCLIPPipeline:  # of another family
            return cls(UnCLIPImageVariationPipeline.from_pipe(text), text)
        shared = {name: part for name, part in text.components.items() if name in of_variation}
        others = {name: each for name, each in options.items() if name in of_variation or name not in of_text}
        variation = UnCLIPImageVariationPipeline.from_pretrained(name_or_folder, **{**others, **shared})
        return cls(variation, text)

    # ---- pictures ----

    @torch.no_grad()
    def embed_images(self, images: Pictures) -> Tensor:
        """CLIP's image embeddings, float32 [batch, embedding_dim]. Raises: as `ImageEncoder.encode`."""
        embeddings = self.variation.embed_images(images)
        self.variation.maybe_free_model_hooks()
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
        """Find the latents that `decode` turns into these pictures, with the same steps, guidance and prompt.

        Args:
            images: pictures of any mode, or arrays, as in `UnCLIPImageVariationPipeline`; those that are not square are
                squashed, as for the image encoder.
            decoder_num_inference_steps, super_res_num_inference_steps: 2 to 1000; more steps are more exact (paper:
                250). A list has one number for each super-resolution stage.
            decoder_guidance_scale: 1 or less is the most exact; above 1, both conditions are inverted together.
            prompt: a caption for the decoder, or one for each picture; empty by default.
            super_res: also find the x_T of every super-resolution stage, to keep the picture's fine detail. Each starts
                from the smaller picture that `decode` will make.
            num_rounds: network evaluations for each step; more are more exact.
            callback_on_step_end: as in a pipeline's call.

        Returns: one row for each picture, on the CPU.

        Raises:
            InputError: an argument is wrong (ImageError: a picture is).
            ConfigError: the components do not fit each other, or `num_rounds` is outside its limits.
            Cancelled: the callback stopped the run.
        """
        self.variation.check()
        pictures = as_pictures(images, "images")
        rows = len(pictures)
        pipe = self.ddim_pipeline()
        decoder = self._decoder_run(pipe, decoder_num_inference_steps, decoder_guidance_scale)
        super_res_runs = []
        if super_res:
            steps = self._setting("super_res_num_inference_steps", super_res_num_inference_steps)
            super_res_runs = pipe.super_res_runs(steps)
        call = Call(pipe, NoiseSource(None, rows), callback_on_step_end)
        embeddings = self.embed_images(pictures)
        condition, null = pipe.conditions(decoder, prompt, embeddings)
        x_T = decoder.invert(condition, null, pictures, call, num_rounds=num_rounds)
        if not super_res:
            return BipartiteLatent(embeddings.cpu(), x_T.cpu())
        small = replace(decoder, latents=x_T).sample(condition, null, replace(call, callback=None))
        noise = invert_super_res(super_res_runs, small, pictures, call, num_rounds=num_rounds)
        return BipartiteLatent.of(embeddings.cpu(), x_T.cpu(), *noise)

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
        """Decode latents into pictures, by DDIM (paper §3.1).

        Args:
            latent: one row for each picture.
            eta: from 0 (deterministic; reconstructs an inverted picture) to 1 (most new noise in each step).
            seed: of all other noise: that of the steps, and of super-resolution where the latent has none. One seed
                gives all rows the same noise, so that only their latents differ and a film does not flicker. A list has
                one for each row; None draws from torch's global generator.
            decoder_num_inference_steps, super_res_num_inference_steps, decoder_guidance_scale, prompt: those of the
                inversion reconstruct its picture.
            output_type, return_intermediates, callback_on_step_end: as in a pipeline's call.

        Raises:
            InputError: an argument is wrong, or the latent has the sizes of another model.
            ConfigError: `eta` is not a number from 0 to 1, or the components do not fit each other.
            Cancelled: the callback stopped the run.
        """
        self.check_latent(latent)
        check_count(1, len(latent))
        pipe, stages, noise = self.ddim_pipeline(eta), list(self.variation.cascade), latent.super_res_noise
        for name in stages[len(noise) :]:
            # Without noise of its own, the stage samples as the model does, with the seed's noise.
            setattr(pipe, f"{name}_scheduler", getattr(self.variation, f"{name}_scheduler"))
        output = pipe(
            image_embeddings=latent.image_embedding,
            decoder_latents=latent.decoder_latents,
            super_res_latents=[*noise, *[None] * (len(stages) - len(noise))],
            decoder_num_inference_steps=self._setting("decoder_num_inference_steps", decoder_num_inference_steps),
            super_res_num_inference_steps=self._setting("super_res_num_inference_steps", super_res_num_inference_steps),
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
        """Decode latents with the decoder alone, by DDIM without noise: `decode`'s pictures before super-resolution.

        Args:
            latent: one row for each picture; super-resolution's noise is not needed.
            decoder_num_inference_steps, decoder_guidance_scale, prompt, callback_on_step_end: as in `decode`.

        Returns: float32 [batch, 3, size, size] in [0, 1], on the CPU.

        Raises: as `decode`; NonFiniteError when the pictures have NaN or infinity.
        """
        self.check_latent(latent)
        check_count(1, len(latent))
        pipe = self.ddim_pipeline()
        pipe.check()
        run = self._decoder_run(pipe, decoder_num_inference_steps, decoder_guidance_scale)
        call = Call(pipe, NoiseSource(None, len(latent)), callback_on_step_end)
        condition, null = pipe.conditions(run, prompt, latent.image_embedding.to(pipe.device).float())
        small = replace(run, latents=latent.decoder_latents).sample(condition, null, call)
        call.close({"decoder's pictures": small})
        return to_unit(small).cpu()

    def fresh(self, image_embedding: Tensor, seed: int = 0) -> BipartiteLatent:
        """Latents of embeddings [batch, embedding_dim] without a picture, all with the noise of `seed`.

        Raises: InputError for embeddings of another width, or a seed outside its limits.
        """
        check_embeddings(image_embedding, self.variation.embedding_dim)
        source = NoiseSource(generators_from_seed(seed, 1), 1)
        noise = source.draw(self.variation.decoder_stage().sample_shape(1), "cpu")
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
        """The image embeddings that the prior samples for captions, float32 [batch, embedding_dim], on the CPU.

        Args:
            captions: one or several.
            seed: one gives all captions the same noise; a list has one for each caption.
            num_samples: samples of each caption, with consecutive seeds from `seed`, that are averaged. A mean has less
                random variation.
            prior_num_inference_steps, prior_guidance_scale, num_prior_candidates, prior_temperature, prior_top_p: as in
                a call of `UnCLIPPipeline`; by default as the model recommends. One sample of a caption is the embedding
                of such a call with the same seed.
            one_choice: False: each caption keeps its closest candidate, so captions may keep candidates of different
                noise. True: in each sample, all captions keep the candidate of the same number, whose dot products with
                all of them have the largest sum; with one seed, only their meaning differs then.

        Raises: CheckpointError for a model without a prior; InputError for a wrong argument.
        """
        if self.text is None:
            raise CheckpointError(
                "this model has no prior, which captions need: give pictures, or use a model with a prior"
            )
        captions = as_prompts(captions)
        num_samples = check_count(num_samples, len(captions), "num_samples")
        first = several(seed) or [seed] * len(captions)
        drawn = self.text.embed_captions(
            [*captions] * num_samples,
            num_inference_steps=self._setting("prior_num_inference_steps", prior_num_inference_steps),
            guidance_scale=self._setting("prior_guidance_scale", prior_guidance_scale),
            seed=[following_seed(one, copy_) for copy_ in range(num_samples) for one in first],
            num_prior_candidates=self._setting("num_prior_candidates", num_prior_candidates),
            prior_temperature=self._setting("prior_temperature", prior_temperature),
            prior_top_p=self._setting("prior_top_p", prior_top_p),
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
            target, source: for example "a photo of a lion" and "a photo of a cat".
            through_prior: True: the difference of the image embeddings that the prior samples for the two captions with
                the same noise. Texts and images are apart in CLIP's space, more so in a small CLIP, and the prior
                bridges this gap. False, as in the paper: the difference of the two text embeddings.
            seed, num_samples, num_prior_candidates, prior_temperature, prior_top_p: of the prior, as in
                `embed_captions`. Both captions keep the candidate of the same number (`one_choice`), so that their
                noise does not differ. One candidate is enough, since the samples are averaged.

        Raises: InputError for captions with the same embedding; CheckpointError for a model without a prior.
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
            pipe = self.variation if self.text is None else self.text
            if isinstance(pipe, StableVariation):
                raise CheckpointError(
                    "this model has no text encoder in the space of its image embeddings: use a model with a prior"
                )
            both = pipe.caption_encoder.encode([target, source], pipe.device).embeds.float().cpu()
            pipe.maybe_free_model_hooks()
        return difference(both[0], both[1])

    # ---- parts ----

    def ddim_pipeline(self, eta: float = 0.0) -> UnCLIPImageVariationPipeline:
        """A pipeline of the same components that samples by DDIM; `variation` does not change.

        Its last step leads to the clean sample, from which an inversion starts.
        """
        pipe: Any = copy.copy(self.variation)
        path = {"set_alpha_to_one": True, "steps_offset": 0}
        for name in (f"{stage}_scheduler" for stage in ("decoder", *pipe.cascade)):
            setattr(pipe, name, DDIMScheduler.from_config(getattr(pipe, name).config, **path, eta=eta))
        return pipe

    def _setting(self, name: str, given: Any) -> Any:
        """An argument of a pipeline's call: the given value, else the recommended one, else the default."""
        if given is not None:
            return given
        pipe = self.text if SETTINGS[name].of_prior and self.text is not None else self.variation
        return pipe.recommended.get(name, SETTINGS[name].default)

    def _decoder_run(
        self, pipe: UnCLIPImageVariationPipeline, num_steps: int | None, guidance_scale: float
    ) -> StageRun[DecoderCondition]:
        return pipe.decoder_run(self._setting("decoder_num_inference_steps", num_steps), guidance_scale)
