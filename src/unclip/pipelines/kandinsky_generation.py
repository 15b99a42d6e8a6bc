"""Kandinsky under the calls of unCLIP's pipelines, so that commands and manipulations work with its folders."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from unclip.checkpoints.files import read_json, safe_join
from unclip.checkpoints.recommended import Recommended
from unclip.clip.encoders import ImageEncoder, TextEmbedding, TextEncoder
from unclip.diffusion.loop import Denoiser
from unclip.diffusion.scheduler import Scheduler
from unclip.errors import InputError
from unclip.models.kandinsky import KandinskyUNet
from unclip.models.movq import VQModel
from unclip.models.prior import PriorTransformer
from unclip.numbers import whole
from unclip.pipelines.cascade import MAX_SIDE_PX, check_fits
from unclip.pipelines.generation import GenerationPipeline
from unclip.pipelines.image_variation import UnCLIPImageVariationPipeline
from unclip.pipelines.kandinsky import KandinskyPipeline, check_decoder
from unclip.pipelines.kandinsky_combined import KandinskyCombinedPipeline, KandinskyV22CombinedPipeline
from unclip.pipelines.kandinsky_prior import zero_embedding
from unclip.pipelines.pipeline import Kind, Pipeline, Source
from unclip.pipelines.text_to_image import UnCLIPPipeline, prior_facts
from unclip.stages.kandinsky import KandinskyCondition, kandinsky_denoiser
from unclip.stages.latent import LatentStage
from unclip.stages.stage import DecoderCondition, Size, Stage

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection
    from transformers.image_processing_utils import BaseImageProcessor

NAMES = {
    "text_encoder": "prior_text_encoder",
    "tokenizer": "prior_tokenizer",
    "prior": "prior_prior",
    "image_encoder": "prior_image_encoder",
    "feature_extractor": "prior_image_processor",
    "decoder": "unet",
    "movq": "movq",
    "prior_scheduler": "prior_scheduler",
    "decoder_scheduler": "scheduler",
    "decoder_text_encoder": "text_encoder",
    "decoder_tokenizer": "tokenizer",
}
"""The components of these pipelines, and their names in folders of the combined pipelines."""
OF_TEXT = ("decoder_text_encoder", "decoder_tokenizer")


@dataclass(frozen=True)
class TwoTexts(TextEmbedding):
    """Captions encoded for the prior, and for the decoder of Kandinsky 2.1."""

    of_decoder: TextEmbedding


@dataclass(frozen=True)
class TwoEncoders(TextEncoder):
    """The text encoder of the prior, and that of the decoder of Kandinsky 2.1."""

    of_decoder: Any

    def encode(self, prompts: Sequence[str], device: torch.device | str | None = None) -> TextEmbedding:
        """See `TextEncoder.encode`."""
        text = super().encode(prompts, device)
        other = self.of_decoder.encode(prompts, text.embeds.device)
        return TwoTexts(text.embeds, text.hidden_states, text.mask, other)


class _KandinskyGeneration(GenerationPipeline):
    """A prior and a decoder of Kandinsky; the decoder's pictures are the results.

    The null condition of the decoder's guidance is the embedding of a picture of the mean colour. So a negative prompt
    guides the prior, and the decoder of Kandinsky 2.1 only.
    """

    COMPONENTS = tuple(name for name in NAMES if name not in OF_TEXT)
    OPTIONAL = OF_TEXT
    DEFAULTS: ClassVar[Mapping[str, Recommended]] = {
        "prior_num_inference_steps": 25,
        "prior_guidance_scale": 4.0,
        "decoder_num_inference_steps": 100,
        "decoder_guidance_scale": 4.0,
    }
    prior: PriorTransformer
    decoder: KandinskyUNet  # pyright: ignore[reportIncompatibleVariableOverride]
    movq: VQModel
    image_encoder: "CLIPVisionModelWithProjection"
    feature_extractor: "BaseImageProcessor"
    prior_scheduler: Scheduler
    decoder_text_encoder: Any
    decoder_tokenizer: Any

    @classmethod
    def kind(cls, component: str) -> Kind:
        if component in OF_TEXT:
            return KandinskyPipeline.kind(component.removeprefix("decoder_"))
        return super().kind(component)

    @classmethod
    def _read(
        cls, source: Source, names: Iterable[str], types: Mapping[str, torch.dtype | str | None]
    ) -> dict[str, Any]:
        index = read_json(safe_join(source.folder, "model_index.json"))
        combined = COMBINED[str(index.get("_class_name"))]
        theirs = {NAMES[name]: name for name in names if NAMES[name] in combined.COMPONENTS}
        of_theirs = {NAMES.get(name, name): kind for name, kind in types.items()}
        return {theirs[name]: part for name, part in combined._read(source, theirs, of_theirs).items()}

    @property
    def folder_class(self) -> str:
        return ("KandinskyV22" if self.decoder_tokenizer is None else "Kandinsky") + "CombinedPipeline"

    def save_pretrained(self, folder: str | Path, *arguments: Any, **named: Any) -> None:
        """Write the folder of the combined pipeline; arguments and errors as in `UnCLIPPipeline`."""
        made = COMBINED[self.folder_class](**{NAMES[name]: part for name, part in self.components.items()})
        made._presets, made._probe = dict(self._presets), self._probe
        made.concepts, made._statistics = self.concepts, self._statistics
        made.save_pretrained(folder, *arguments, **named)

    def check(self) -> None:
        """Raises: ConfigError when the components do not fit one another."""
        prior, encoder = self.prior.config, self.image_encoder.config
        has_text = self.decoder_text_encoder is not None
        check_decoder(self.decoder.config, self.movq, self.decoder_scheduler, has_text=has_text, inpaints=False)
        width = prior.embedding_dim
        check_fits(
            [
                *prior_facts(self.text_encoder.config, prior),
                ("image_encoder.projection_dim", encoder.projection_dim, "prior.embedding_dim", width),
                ("the image embedding of decoder", self.decoder.config.image_embedding_dim, "the prior's", width),
            ]
        )
        ImageEncoder(self.image_encoder, self.feature_extractor).check()

    @property
    def embedding_dim(self) -> int:
        return self.decoder.config.image_embedding_dim

    @property
    def side_multiple(self) -> int:
        return self.movq.factor**2

    @property
    def decoder_networks(self) -> list[nn.Module]:
        return [self.decoder, self.movq]

    @property
    def caption_encoder(self) -> TextEncoder:
        if self.decoder_text_encoder is None:
            return super().caption_encoder
        from unclip.clip.multilingual import MultilingualTextEncoder  # imports transformers

        other = MultilingualTextEncoder(self.decoder_text_encoder, self.decoder_tokenizer)
        return TwoEncoders(self.text_encoder, self.tokenizer, other)

    def sizes(self, height: int | None = None, width: int | None = None) -> dict[str, Size]:
        own, multiple = self.decoder.config.sample_size, self.side_multiple
        default = (own if isinstance(own, int) else 64) * self.movq.factor
        sides = []
        for name, given in (("height", height), ("width", width)):
            side = default if given is None else whole(given, name, 1, MAX_SIDE_PX, unit="whole number of pixels")
            if side % multiple:
                near = max(1, round(side / multiple)) * multiple
                raise InputError(
                    f"{name} is {side}; for this model it must be a multiple of {multiple}, such as {near}"
                )
            sides.append(side)
        return {"decoder": (sides[0], sides[1])}

    def decoder_stage(self, size: Size | None = None, reuse: int = 1) -> Stage[DecoderCondition]:
        if reuse != 1:
            raise InputError(f"decoder_reuse is {reuse}; Kandinsky's decoder has only 1, which is exact")
        height, width = size or self.sizes()["decoder"]
        cells = (height // self.movq.factor, width // self.movq.factor)
        return LatentStage(self._denoiser, self.movq, self.decoder_scheduler.process, cells)

    def _denoiser(self, condition: DecoderCondition) -> Denoiser:
        embedding = torch.where(condition.given[:, None], condition.image_embedding, self._zero_embedding(condition))
        text = condition.text.of_decoder if isinstance(condition.text, TwoTexts) else None
        return kandinsky_denoiser(self.decoder, self.decoder_scheduler.process)(KandinskyCondition(embedding, text))

    def _zero_embedding(self, condition: DecoderCondition) -> Tensor:
        """The embedding of a picture of the mean colour, [1, embedding_dim]; not computed where it is not used."""
        if bool(condition.given.all()):
            return condition.image_embedding[:1]
        return zero_embedding(ImageEncoder(self.image_encoder, self.feature_extractor), self.device)


class KandinskyTextToImage(_KandinskyGeneration, UnCLIPPipeline):  # pyright: ignore[reportIncompatibleVariableOverride]
    """`UnCLIPPipeline` of a Kandinsky folder, which `UnCLIPPipeline.from_pretrained` returns."""

    def _text_of(self, prompt: Any, output: Any, mask: Tensor | None, image_embeddings: Tensor | None) -> TextEmbedding:
        if output is not None and self.decoder_text_encoder is not None:
            raise InputError("the decoder of Kandinsky 2.1 encodes captions itself: give prompt, not text_model_output")
        return super()._text_of(prompt, output, mask, image_embeddings)


class KandinskyImageVariation(  # pyright: ignore[reportIncompatibleVariableOverride]
    _KandinskyGeneration, UnCLIPImageVariationPipeline
):
    """`UnCLIPImageVariationPipeline` of a Kandinsky folder, which its `from_pretrained` returns."""


COMBINED: dict[str, type[Pipeline]] = {
    "KandinskyV22CombinedPipeline": KandinskyV22CombinedPipeline,
    "KandinskyV22Img2ImgCombinedPipeline": KandinskyV22CombinedPipeline,
    "KandinskyCombinedPipeline": KandinskyCombinedPipeline,
    "KandinskyImg2ImgCombinedPipeline": KandinskyCombinedPipeline,
}
"""The pipelines whose folders contain a prior and a decoder, and the class that reads them."""
