"""The CLIP task: tokenizer, contrastive loss, optional losses from a teacher, and the encoders."""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable
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
from unclip.data.batches import Source
from unclip.data.source import FolderSource
from unclip.errors import ConfigError, UnclipError
from unclip.models.component import MAX_CHANNELS
from unclip.pipelines.clip import PretrainedClip, read_clip
from unclip.pipelines.component import read_component, write_component
from unclip.training.conditions import FrozenClip, normalized
from unclip.training.dry_run import check_parameters, try_step
from unclip.training.recipe import ClipSettings, Recipe, TeacherSettings
from unclip.training.sections import Limits
from unclip.training.sharding import share_of
from unclip.training.task import Batch, Sourced, computing_device, of_rows, source_of
from unclip.training.teacher import Lessons, read_phrases

START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(captions: Iterable[str], *, vocabulary_size: int, context_length: int) -> CLIPTokenizer:
    """Train a byte-pair `CLIPTokenizer` on `captions`.

    The vocabulary contains every byte, alone and at the end of a word, so it covers all texts.

    Args:
        captions: the training texts.
        vocabulary_size: the largest number of tokens. It is not reached if the texts have too few pairs to merge.
        context_length: the longest sequence in tokens, including the start and end tokens.

    Raises: ConfigError when the vocabulary is too small for the bytes.
    """
    from tokenizers import pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_alone = [*alphabet, *(byte + "</w>" for byte in alphabet)]
    num_merges = vocabulary_size - len(bytes_alone) - 2
    if num_merges < 0:
        raise ConfigError(f"vocabulary_size is {vocabulary_size}; the bytes alone need {len(bytes_alone) + 2}")
    learner = CLIPTokenizer().backend_tokenizer
    learner.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=vocabulary_size,
            # As special tokens, the bytes get the first numbers, in a fixed order. Numbers break ties between equally
            # frequent pairs; otherwise they depend on the order of a hash table, which differs between runs.
            special_tokens=bytes_alone,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    merges: Any = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]][:num_merges]
    tokens = [*bytes_alone, *dict.fromkeys(a + b for a, b in merges), START, END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=context_length)


RECONSTRUCTION_SIZE = 16
MAX_LOGIT_SCALE = math.log(100)
WIDTHS = {
    "text_config": "clip.projection_dim (or clip.text_config.hidden_size) and clip.text_heads",
    "image_config": "clip.image_width and clip.image_heads",
}
"""The names of an encoder's width and heads in a recipe."""
FURTHER = {
    "hidden_size": Limits(1, MAX_CHANNELS),
    "intermediate_size": Limits(1, 4 * MAX_CHANNELS),
    "attention_dropout": Limits(0.0, 1.0, below=True),
    "layer_norm_eps": Limits(1e-12, 1.0),
    "initializer_range": Limits(0.0, 10.0),
    "initializer_factor": Limits(0.0, 10.0),
}
"""Limits of the settings in [clip.text_config] and [clip.image_config]."""
LENGTH_GROUPS = 4
"""The texts of a batch are encoded in this number of groups of similar length."""
SHOWN_ROWS = 1024
"""Number of pictures for the retrieval figures of a sample sheet."""


class ContrastivePair(nn.Module):
    """Text and image encoder with the contrastive loss of CLIP (Radford et al. 2021, arXiv 2103.00020).

    A batch may contain a picture several times; all its rows are positives of its captions. The negatives of a caption
    are the other pictures in the same piece of the batch, over all processes, so accumulation reduces their number.

    With `reconstruction_weight`, a small head predicts a 16×16 thumbnail from the image embedding, so that the
    embedding keeps colours and layout for the decoder. The head is not saved.

    With `taught`, there are two more losses for phrases that are not captions.
    """

    def __init__(
        self,
        text: CLIPTextModelWithProjection,
        image: CLIPVisionModelWithProjection,
        reconstruction_weight: float,
        taught: "Taught | None" = None,
    ):
        super().__init__()
        self.text, self.image = text, image
        self.logit_scale = nn.Parameter(
            torch.tensor([math.log(1 / 0.07)])
        )  # one dimension, because scalars cannot be sharded
        self.reconstruction_weight = reconstruction_weight
        width = image.config.projection_dim
        if reconstruction_weight:
            self.thumbnail = nn.Sequential(
                nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, 3 * RECONSTRUCTION_SIZE**2)
            )

        self.taught = taught

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The losses and metrics of a batch.

        Args:
            batch: `pixels` [batch, 3, size, size], or `image_embeds` [batch, width] of a frozen image encoder;
                `input_ids` [batch, tokens]; `index` [batch], the number of each row's picture; and the input of
                `Taught`, if it is used.
        """
        own_embeds = batch.get("image_embeds")
        if own_embeds is None:
            own_embeds = self.image(pixel_values=batch["pixels"]).image_embeds.float()
        embeds = of_all_processes(own_embeds)
        own_texts = batch["input_ids"]
        if self.taught is not None:
            own_texts = torch.cat([own_texts, batch["phrase_ids"]])
        own_texts = self._read(own_texts)
        text_embeds = of_all_processes(own_texts[: len(batch["index"])])
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
        if self.taught is not None:
            scale = self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
            found = self.taught(own_texts[len(batch["index"]) :], scale, batch)
            metrics |= found | {"loss": metrics["loss"] + found["loss"]}
        return metrics

    def _read(self, input_ids: Tensor) -> Tensor:
        """Text embeddings [batch, width]. Texts of similar length are encoded together to reduce padding."""
        if len(input_ids) < LENGTH_GROUPS or input_ids.is_meta:
            return self.text(input_ids=input_ids).text_embeds.float()
        is_padding = (input_ids == input_ids[:, -1:]).flip(1).cumprod(dim=1)  # at the end, one token again and again
        lengths = input_ids.shape[1] - is_padding.sum(dim=1) + 1
        order = lengths.argsort()
        groups = [
            self.text(input_ids=input_ids[rows, : int(lengths[rows[-1]])]).text_embeds.float()
            for rows in order.chunk(LENGTH_GROUPS)
        ]
        return torch.cat(groups)[order.argsort()]

    @torch.no_grad()
    def keep_limits(self) -> None:
        """Clamp the logit scale. Above its limit, it would have no gradient."""
        share_of(self.logit_scale).clamp_(max=MAX_LOGIT_SCALE)


class Taught(nn.Module):
    """The losses of phrases: the teacher's distribution over pictures, and its embedding, predicted by a head.

    `bank` [num_pictures, width] contains the embeddings of the pictures. The head is not saved.
    """

    def __init__(self, settings: TeacherSettings, bank: Tensor, teacher_width: int):
        super().__init__()
        self.settings = settings
        self.register_buffer("bank", F.normalize(bank, dim=-1), persistent=False)
        self.head = nn.Linear(bank.shape[1], teacher_width)

    def forward(self, embeds: Tensor, scale: Tensor, batch: Batch) -> dict[str, Tensor]:
        """`embeds` are text embeddings [batch, width]; `batch` has `pictures`, `shares` [batch, k] and `taught`."""
        embeds = F.normalize(embeds, dim=-1)
        logits = scale * embeds @ self.bank.T  # type: ignore[operator]
        pictures = batch["pictures"].long()
        cross_entropy = -(batch["shares"] * logits.log_softmax(dim=1).gather(1, pictures)).sum(dim=1).mean()
        cosine = F.cosine_similarity(self.head(embeds).float(), batch["taught"].float(), dim=-1).mean()
        loss = self.settings.weight * cross_entropy + self.settings.similarity_weight * (1 - cosine)
        first = (logits.argmax(dim=1) == pictures[:, 0]).float().mean()
        return {
            "loss": loss,
            "taught": cross_entropy.detach(),
            "taught_cosine": cosine.detach(),
            "taught_first": first.detach(),
        }


def of_all_processes(rows: Tensor) -> Tensor:
    """The rows of all processes, in the order of the processes. Gradients return to the process of the row."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return rows
    if rows.is_meta:  # in `try_step`, which must not communicate
        return torch.cat([rows] * torch.distributed.get_world_size())
    if not rows.requires_grad:
        parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, rows)
        return torch.cat(parts)
    return torch.cat(all_gather(rows))


class ClipTask(Sourced):
    """Trains a new CLIP with a new tokenizer, or the CLIP in `recipe.start_from` with its tokenizer.

    A resumed run uses the tokenizer in the folder `run`.
    """

    def __init__(self, recipe: Recipe, progress: Callable[..., Any] | None = None, run: Path | None = None):
        assert recipe.clip is not None
        settings = self.settings = recipe.clip
        start = None if recipe.start_from is None else _start(Path(recipe.start_from), settings)
        locked = None if settings.image_from is None else read_clip(Path(settings.image_from))
        images = locked or start
        self.image_size = settings.image_size if images is None else images.image_size
        self.context_length = settings.context_length if start is None else start.context_length
        with torch.device("meta"):
            text, image = blank_encoders(settings) if start is None else (start.text_encoder, start.image_encoder)
            pair = ContrastivePair(text, image, settings.reconstruction_weight)
        if start is None:
            check_parameters(pair, recipe, "the encoders of [clip]")
        if locked is None and recipe.teacher is None:
            try_step(pair, self._blank, recipe)
        self.source = source_of(
            recipe,
            (self.image_size,),
            weight_power=settings.weight_power,
            include_held_out=settings.include_held_out,
        )
        if start is None:
            known = None if run is None else _tokenizer_of(run, settings)
            self.tokenizer = known if known is not None else _learned_tokenizer(self.source, recipe)
        else:
            self.tokenizer = start.tokenizer
        self.feature_extractor: BaseImageProcessor = (
            image_processor(settings.image_size) if images is None else images.feature_extractor
        )
        torch.manual_seed(recipe.seed)
        text, image = fresh_encoders(settings, self.tokenizer) if start is None else _encoders(start)
        self.table: Tensor | None = None
        self.lessons: Lessons | None = None
        if locked is not None:
            image = locked.image_encoder.requires_grad_(False)
            if text.config.projection_dim != image.config.projection_dim:
                raise ConfigError(
                    f"clip.projection_dim is {text.config.projection_dim}, but the image encoder in "
                    f"{settings.image_from} has {image.config.projection_dim}"
                )
            if not isinstance(self.source, FolderSource):
                raise ConfigError("clip.image_from needs data in folders; it does not support shards")
            assert settings.image_from is not None
            clip = FrozenClip(settings.image_from)
            self.table = clip.embeddings_of(self.source.of_size(self.image_size), progress)
        taught = None
        if recipe.teacher is not None:
            assert self.table is not None
            assert isinstance(self.source, FolderSource)
            self.lessons = Lessons(recipe.teacher, self.source, device=computing_device(), progress=progress)
            taught = Taught(recipe.teacher, self.table, self.lessons.embeddings.shape[1])
            if start is None:
                words: Any = text.get_input_embeddings().weight
                rows = known_words(self.tokenizer)
                words.data[list(rows)] = self.lessons.teacher.words(list(rows.values()), words.shape[1])
        self.module = ContrastivePair(text, image, settings.reconstruction_weight, taught)
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
        texts, taught = rows.captions, {}
        if self.lessons is not None:
            phrases, lesson = self.lessons.draw(batch_size, generator)
            texts = texts + phrases
            taught = {
                "pictures": self.lessons.pictures[lesson],
                "shares": self.lessons.shares[lesson],
                "taught": self.lessons.embeddings[lesson],
            }
        tokens = self.tokenizer(
            texts, padding="longest", truncation=True, max_length=self.context_length, return_tensors="pt"
        )["input_ids"]
        batch = {"input_ids": tokens[:batch_size], "index": rows.index} | taught
        if taught:
            batch["phrase_ids"] = tokens[batch_size:]
        if self.table is not None:
            batch["image_embeds"] = self.table[rows.index]
        else:
            pixels = shift_and_zoom(rows.pictures(self.image_size), generator)
            batch["pixels"] = normalized(pixels, self.feature_extractor)
        return of_rows(batch, own)

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
        """Write retrieval figures for trained and held-out pictures to `path` with the suffix .txt."""
        lines = []
        for name in ("trained", "held out"):
            rows = self.source.examples(SHOWN_ROWS, held_out=name == "held out")
            if rows.captions:
                images = normalized(rows.pictures(self.image_size), self.feature_extractor)
                rank = retrieval_ranks(self.module, self.tokenizer, rows.captions, images)
                lines.append(f"{name}: top-1 {(rank < 1).float().mean():.3f}, top-5 {(rank < 5).float().mean():.3f}")
        path.with_suffix(".txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def retrieval_ranks(module: ContrastivePair, tokenizer, captions: list[str], images: Tensor) -> Tensor:
    """The rank of each picture's own caption among all captions, from 0.

    `images` must be preprocessed by `normalized`.
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
    """Text and image encoders with random weights from torch's default generator.

    Raises: ConfigError when a size is not a multiple of its part, or for a wrong setting of transformers.
    """
    vocabulary = tokenizer.get_vocab()
    return _fresh(settings, size=len(tokenizer), start=vocabulary[START], end=vocabulary[END])


def blank_encoders(settings: ClipSettings) -> tuple[CLIPTextModelWithProjection, CLIPVisionModelWithProjection]:
    """As `fresh_encoders`, with the largest possible vocabulary."""
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
    """The configuration of an encoder, of class `kind`: the settings `named` in [clip], and those of its own section.

    Raises: ConfigError for a key that is unknown or is set in [clip], or for an invalid value.
    """
    known = {name for name in kind().to_dict() if name not in PretrainedConfig().to_dict() and name != "model_type"}
    for key in further:
        if key in named or key not in known:
            free = ", ".join(sorted(known - named.keys()))
            raise ConfigError(
                f"clip.{section}.{key} cannot be set; it may have these settings of {kind.__name__}: {free}"
            )
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


def _learned_tokenizer(source: Source, recipe: Recipe) -> CLIPTokenizer:
    """A tokenizer trained on the captions, and on the teacher's phrases if there are any."""
    settings, texts = recipe.clip, source.all_captions()
    assert settings is not None
    if recipe.teacher is not None and recipe.teacher.phrases is not None:
        texts = itertools.chain(texts, (phrase.text for phrase in read_phrases(recipe.teacher.phrases)))
    return train_tokenizer(texts, vocabulary_size=settings.vocabulary_size, context_length=settings.context_length)


def known_words(tokenizer: CLIPTokenizer) -> dict[int, str]:
    """The words, or parts of words, of the tokens with more than one byte, by the number of the token."""
    texts = {row: token.removesuffix("</w>") for token, row in tokenizer.get_vocab().items()}
    return {row: text for row, text in texts.items() if len(text) > 1 and text not in (START, END)}


def _tokenizer_of(run: Path, settings: ClipSettings) -> CLIPTokenizer | None:
    """The tokenizer of a resumed run; None if there is none, or it has other settings."""
    try:
        before = read_json(run / "recipe.json", allow_infinity=True)["clip"]
        wanted = {key: getattr(settings, key) for key in ("vocabulary_size", "context_length")}
        if not (run / "state").is_dir() or {key: before[key] for key in wanted} != wanted:
            return None
        return read_component(run / "model", "tokenizer", "CLIPTokenizer", torch_dtype=None, variant=None)
    except (UnclipError, KeyError, TypeError):
        return None


def _start(folder: Path, settings: ClipSettings) -> PretrainedClip:
    """The CLIP to start from.

    Raises: ConfigError when the recipe sets another size.
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
        raise ConfigError(
            f"the recipe's CLIP differs from the one in {folder}: {'; '.join(other)}. Remove these settings"
        )
    return clip


def _encoders(clip: PretrainedClip) -> tuple[CLIPTextModelWithProjection, CLIPVisionModelWithProjection]:
    return clip.text_encoder.train(), clip.image_encoder.train()


def image_processor(size_px: int) -> CLIPImageProcessorPil:
    """The preprocessing of a CLIP trained here: resized to a square without cropping, pixels in [-1, 1]."""
    return CLIPImageProcessorPil(
        size={"height": size_px, "width": size_px},
        do_center_crop=False,
        crop_size={"height": size_px, "width": size_px},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def shift_and_zoom(images: Tensor, generator: torch.Generator, *, shift: float = 0.08, zoom: float = 0.12) -> Tensor:
    """Pictures shifted by up to `shift` of their side and scaled by up to ±`zoom`, on a white background."""
    batch = len(images)
    draws = torch.rand(3, batch, generator=generator) * 2 - 1
    scale = 1 + zoom * draws[0]
    matrix = torch.zeros(batch, 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = scale
    matrix[:, :, 2] = 2 * shift * draws[1:].T
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images - 1, grid, padding_mode="zeros", align_corners=False) + 1
