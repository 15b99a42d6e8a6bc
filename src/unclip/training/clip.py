"""The CLIP task: a text and an image encoder learn one space from captioned pictures.

Knows transformers' CLIP classes and the contrastive loss; knows no diffusion. Called by the trainer.
"""

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PretrainedConfig,
)
from transformers.activations import ACT2FN
from transformers.image_processing_utils import BaseImageProcessor

from unclip.checkpoints.files import read_json
from unclip.data.rows import Source
from unclip.errors import ConfigError, UnclipError
from unclip.models.config import MAX_CHANNELS
from unclip.pipelines.clip import PretrainedClip, read_clip
from unclip.pipelines.component import read_component, write_component
from unclip.training.pretrained import normalized
from unclip.training.recipe import ClipSettings, Limits, Recipe
from unclip.training.sharding import share_of
from unclip.training.task import Batch, Sourced, of_rows, source_of
from unclip.training.tokenizer import END, START, train_tokenizer
from unclip.training.trial import check_parameters, try_step

RECONSTRUCTION_SIZE = 16
MAX_LOGIT_SCALE = math.log(100)
WIDTHS = {
    "text_config": "clip.projection_dim (or clip.text_config.hidden_size) and clip.text_heads",
    "image_config": "clip.image_width and clip.image_heads",
}
"""What an encoder's width and heads are called in a recipe."""
FURTHER = {
    "hidden_size": Limits(1, MAX_CHANNELS),
    "intermediate_size": Limits(1, 4 * MAX_CHANNELS),
    "attention_dropout": Limits(0.0, 1.0, below=True),
    "layer_norm_eps": Limits(1e-12, 1.0),
    "initializer_range": Limits(0.0, 10.0),
    "initializer_factor": Limits(0.0, 10.0),
}
"""Limits of the settings of an encoder that have no name of their own in a recipe."""
SHOWN_ROWS = 1024
"""How many pictures retrieval is tried on for a sheet."""


class ContrastivePair(nn.Module):
    """Text and image encoder with the contrastive loss of CLIP (Radford et al. 2021, arXiv 2103.00020).

    Pictures of one index in a batch are all positives of its captions. `reconstruction_weight` adds a small head,
    thrown away after training, that reads a 16×16 thumbnail out of the image embedding: it makes the embedding keep
    colours and layout, which is what a decoder draws from.

    A caption's negatives are the pictures of its own piece of the batch, of all processes: with accumulation there are
    fewer of them.
    """

    def __init__(
        self, text: CLIPTextModelWithProjection, image: CLIPVisionModelWithProjection, reconstruction_weight: float
    ):
        super().__init__()
        self.text, self.image = text, image
        self.logit_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))  # no scalar: those cannot be sharded
        self.reconstruction_weight = reconstruction_weight
        width = image.config.projection_dim
        if reconstruction_weight:
            self.thumbnail = nn.Sequential(
                nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, 3 * RECONSTRUCTION_SIZE**2)
            )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`pixels` [batch, 3, size, size], `input_ids` [batch, tokens], `index` [batch]: which picture a row shows."""
        own_embeds = self.image(pixel_values=batch["pixels"]).image_embeds.float()
        embeds = of_all_processes(own_embeds)
        text_embeds = of_all_processes(self.text(input_ids=batch["input_ids"]).text_embeds.float())
        logits = self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp() * (
            F.normalize(text_embeds, dim=-1) @ F.normalize(embeds, dim=-1).T
        )
        index = of_all_processes(batch["index"])
        same = (index[:, None] == index[None, :]).float()
        target = same / same.sum(dim=1, keepdim=True)
        contrastive = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        hit = (same.gather(1, logits.argmax(dim=1, keepdim=True)) > 0).float().mean()
        metrics = {"loss": contrastive, "contrastive": contrastive.detach(), "in_batch_retrieval": hit}
        if self.reconstruction_weight:
            wanted = F.adaptive_avg_pool2d(batch["pixels"].float(), RECONSTRUCTION_SIZE).flatten(1)
            error = F.mse_loss(self.thumbnail(own_embeds).float(), wanted)
            metrics["loss"] = contrastive + self.reconstruction_weight * error
            metrics["reconstruction"] = error.detach()
        return metrics

    @torch.no_grad()
    def keep_limits(self) -> None:
        """Above its limit, where it makes no difference, the temperature would have no gradient that leads back."""
        share_of(self.logit_scale).clamp_(max=MAX_LOGIT_SCALE)


def of_all_processes(rows: Tensor) -> Tensor:
    """The rows of all processes, in their order; gradients find their way back to the process that a row is of."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return rows
    if not rows.requires_grad:
        parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, rows)
        return torch.cat(parts)
    return torch.cat(all_gather(rows))


class ClipTask(Sourced):
    """Trains a CLIP: from scratch, its tokenizer first, or the one in `recipe.start_from`, which keeps its own.

    In the folder of a `run` that goes on lies the tokenizer that it began with, which is taken again.
    """

    def __init__(self, recipe: Recipe, run: Path | None = None):
        assert recipe.clip is not None
        settings = self.settings = recipe.clip
        start = None if recipe.start_from is None else _start(Path(recipe.start_from), settings)
        self.image_size = settings.image_size if start is None else start.image_size
        self.context_length = settings.context_length if start is None else start.context_length
        with torch.device("meta"):
            text, image = blank_encoders(settings) if start is None else (start.text_encoder, start.image_encoder)
            pair = ContrastivePair(text, image, settings.reconstruction_weight)
        if start is None:
            check_parameters(pair, recipe, "the encoders of [clip]")
        try_step(pair, self._blank, recipe)
        self.source = source_of(
            recipe,
            (self.image_size,),
            weight_power=settings.weight_power,
            include_held_out=settings.include_held_out,
        )
        if start is None:
            known = None if run is None else _tokenizer_of(run, settings)
            self.tokenizer = known if known is not None else _learned_tokenizer(self.source, settings)
            self.feature_extractor: BaseImageProcessor = image_processor(settings.image_size)
        else:
            self.tokenizer, self.feature_extractor = start.tokenizer, start.feature_extractor
        torch.manual_seed(recipe.seed)
        text, image = fresh_encoders(settings, self.tokenizer) if start is None else _encoders(start)
        self.module = ContrastivePair(text, image, settings.reconstruction_weight)
        if start is not None and start.logit_scale is not None:
            nn.init.constant_(self.module.logit_scale, start.logit_scale)

    def _blank(self, rows: int) -> Batch:
        pixels = torch.empty(rows, 3, self.image_size, self.image_size, device="meta")
        ids = torch.empty(rows, self.context_length, dtype=torch.long, device="meta")
        return {"pixels": pixels, "input_ids": ids, "index": ids[:, 0]}

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()

    def batch(self, step: int, batch_size: int, generator: torch.Generator, own: Tensor | None = None) -> Batch:
        rows = self.source.draw(step, batch_size, generator)
        tokens = self.tokenizer(
            rows.captions,
            padding="longest",
            truncation=True,
            max_length=self.context_length,
            return_tensors="pt",
        )
        pixels = shift_and_zoom(rows.pictures(self.image_size), generator)
        pixels = normalized(pixels, self.feature_extractor)
        return of_rows({"pixels": pixels, "input_ids": tokens["input_ids"], "index": rows.index}, own)

    def save(self, folder: Path) -> None:
        parts = {
            "text_encoder": self.module.text,
            "image_encoder": self.module.image,
            "tokenizer": self.tokenizer,
            "feature_extractor": self.feature_extractor,
        }
        for name, part in parts.items():
            write_component(part, folder / name, variant=None)

    @torch.no_grad()
    def sample_sheet(self, path: Path) -> None:
        """Writes `path` with the suffix .txt: retrieval among some pictures, trained and held out."""
        lines = []
        for name in ("trained", "held out"):
            rows = self.source.examples(SHOWN_ROWS, held_out=name == "held out")
            if rows.captions:
                images = normalized(rows.pictures(self.image_size), self.feature_extractor)
                rank = retrieval_ranks(self.module, self.tokenizer, rows.captions, images)
                lines.append(f"{name}: top-1 {(rank < 1).float().mean():.3f}, top-5 {(rank < 5).float().mean():.3f}")
        path.with_suffix(".txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def retrieval_ranks(module: ContrastivePair, tokenizer, captions: list[str], images: Tensor) -> Tensor:
    """For each picture, at which place (0 is first) its own caption comes among all of them.

    `images` are as the image encoder wants them: see `normalized`.
    """
    embeds, texts, device = [], [], module.logit_scale.device
    for start in range(0, len(captions), 256):
        tokens = tokenizer(captions[start : start + 256], padding=True, truncation=True, return_tensors="pt")
        embeds.append(module.image(pixel_values=images[start : start + 256].to(device)).image_embeds)
        texts.append(module.text(input_ids=tokens["input_ids"].to(device)).text_embeds)
    scores = F.normalize(torch.cat(embeds), dim=-1) @ F.normalize(torch.cat(texts), dim=-1).T
    return (scores > scores.diagonal()[:, None]).sum(dim=1)


def fresh_encoders(
    settings: ClipSettings, tokenizer: CLIPTokenizer
) -> tuple[CLIPTextModelWithProjection, CLIPVisionModelWithProjection]:
    """Text and image encoder with weights drawn from torch's own generator.

    Raises: ConfigError when a width is no multiple of what it is cut into, or for a further setting that is none.
    """
    vocabulary = tokenizer.get_vocab()
    return _fresh(settings, size=len(tokenizer), start=vocabulary[START], end=vocabulary[END])


def blank_encoders(settings: ClipSettings) -> tuple[CLIPTextModelWithProjection, CLIPVisionModelWithProjection]:
    """As `fresh_encoders` with the largest vocabulary that the tokenizer may come to."""
    size = settings.vocabulary_size
    return _fresh(settings, size=size, start=size - 2, end=size - 1)


def _fresh(
    settings: ClipSettings, *, size: int, start: int, end: int
) -> tuple[CLIPTextModelWithProjection, CLIPVisionModelWithProjection]:
    width = settings.projection_dim
    named = {
        "vocab_size": size,
        "projection_dim": width,
        "num_hidden_layers": settings.text_layers,
        "num_attention_heads": settings.text_heads,
        "max_position_embeddings": settings.context_length,
        "bos_token_id": start,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    text = _config(CLIPTextConfig, named, settings.text_config, "text_config", width)
    named = {
        "hidden_size": settings.image_width,
        "projection_dim": width,
        "num_hidden_layers": settings.image_layers,
        "num_attention_heads": settings.image_heads,
        "image_size": settings.image_size,
        "patch_size": settings.patch_size,
        "num_channels": 3,
    }
    if settings.image_size % settings.patch_size:
        raise ConfigError(
            f"clip.image_size and clip.patch_size are {settings.image_size} and {settings.patch_size}; the first must "
            "be a multiple of the second"
        )
    image = _config(CLIPVisionConfig, named, settings.image_config, "image_config", settings.image_width)
    return CLIPTextModelWithProjection(text), CLIPVisionModelWithProjection(image)


def _config(kind: type, named: dict[str, Any], further: dict[str, Any], section: str, width: int) -> Any:
    """The configuration of an encoder of class `kind`: what has a name in the recipe, and what its `section` says.

    Raises: ConfigError for a key that is unknown or has a name of its own in [clip], and for a value that is none.
    """
    known = {name for name in kind().to_dict() if name not in PretrainedConfig().to_dict() and name != "model_type"}
    for key in further:
        if key in named or key not in known:
            free = ", ".join(sorted(known - named.keys()))
            raise ConfigError(f"clip.{section}.{key} cannot be set; of {kind.__name__} these can: {free}")
    settings = {"hidden_size": width, "intermediate_size": 4 * width} | named | further
    for name, limits in FURTHER.items():
        value = settings.get(name, limits.low)
        kinds = int if isinstance(limits.high, int) else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not limits.allow(value):
            raise ConfigError(f"clip.{section}.{name} is {value!r}; it must be a number {limits}")
    width, heads = settings["hidden_size"], settings["num_attention_heads"]
    if width % heads:
        raise ConfigError(f"{WIDTHS[section]} are {width} and {heads}; the first must be a multiple of the second")
    activation = settings.get("hidden_act")
    if activation is not None and not (isinstance(activation, str) and activation in ACT2FN):
        raise ConfigError(f"clip.{section}.hidden_act is {activation!r}; it must be one of {', '.join(sorted(ACT2FN))}")
    try:
        return kind(**settings)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ConfigError(
            f"[clip.{section}] cannot be used: {further!r:.200}. Check the types of its values"
        ) from error


def _learned_tokenizer(source: Source, settings: ClipSettings) -> CLIPTokenizer:
    return train_tokenizer(
        source.all_captions(), vocabulary_size=settings.vocabulary_size, context_length=settings.context_length
    )


def _tokenizer_of(run: Path, settings: ClipSettings) -> CLIPTokenizer | None:
    """The tokenizer of a run that is gone on from; None when there is none, or none of these settings."""
    try:
        before = read_json(run / "recipe.json", allow_infinity=True)["clip"]
        wanted = {key: getattr(settings, key) for key in ("vocabulary_size", "context_length")}
        if not (run / "state").is_dir() or {key: before[key] for key in wanted} != wanted:
            return None
        return read_component(run / "model", "tokenizer", "CLIPTokenizer", torch_dtype=None, variant=None)
    except (UnclipError, KeyError, TypeError):
        return None


def _start(folder: Path, settings: ClipSettings) -> PretrainedClip:
    """The CLIP to go on from.

    Raises: ConfigError when the recipe says a size that it has not.
    """
    clip = read_clip(folder)
    text, image = clip.text_encoder.config, clip.image_encoder.config
    found = {
        "projection_dim": text.projection_dim,
        "vocabulary_size": text.vocab_size,
        "context_length": clip.context_length,
        "text_layers": text.num_hidden_layers,
        "text_heads": text.num_attention_heads,
        "image_size": image.image_size,
        "patch_size": image.patch_size,
        "image_width": image.hidden_size,
        "image_layers": image.num_hidden_layers,
        "image_heads": image.num_attention_heads,
    }
    other = [
        f"{field.name} is {found[field.name]} there and {getattr(settings, field.name)} here"
        for field in dataclasses.fields(settings)
        if field.name in found and getattr(settings, field.name) not in (field.default, found[field.name])
    ]
    other += [f"[clip.{name}] is stated" for name in ("text_config", "image_config") if getattr(settings, name)]
    if other:
        raise ConfigError(f"the recipe's CLIP is not the one in {folder}: {'; '.join(other)}. Leave these settings out")
    return clip


def _encoders(clip: PretrainedClip) -> tuple[CLIPTextModelWithProjection, CLIPVisionModelWithProjection]:
    return clip.text_encoder.train(), clip.image_encoder.train()


def image_processor(size_px: int) -> CLIPImageProcessorPil:
    """The preprocessing of a CLIP trained here: resized, squashed where not square, pixels to [-1, 1]."""
    return CLIPImageProcessorPil(
        size={"height": size_px, "width": size_px},
        do_center_crop=False,
        crop_size={"height": size_px, "width": size_px},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def shift_and_zoom(images: Tensor, generator: torch.Generator, *, shift: float = 0.08, zoom: float = 0.12) -> Tensor:
    """Each picture moved by up to `shift` of its side and scaled by up to ±`zoom`, white where it left its place."""
    batch = len(images)
    draws = torch.rand(3, batch, generator=generator) * 2 - 1
    scale = 1 + zoom * draws[0]
    matrix = torch.zeros(batch, 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = scale
    matrix[:, :, 2] = 2 * shift * draws[1:].T
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images - 1, grid, padding_mode="zeros", align_corners=False) + 1
