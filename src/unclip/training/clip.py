"""The CLIP task: tokenizer, contrastive loss, optional losses from a teacher, and the encoders."""

import contextlib
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
)
from transformers.activations import ACT2FN
from transformers.image_processing_utils import BaseImageProcessor

from unclip.checkpoints.files import read_json
from unclip.clip.config import check_clip_settings
from unclip.clip.pretrained import PretrainedClip, read_clip
from unclip.data.source import Source
from unclip.errors import ConfigError, UnclipError
from unclip.pipelines.component import read_component, write_component
from unclip.training.conditions import FrozenClip, normalized
from unclip.training.dry_run import check_parameters, try_step
from unclip.training.recipe import ClipSettings, Recipe, TeacherSettings
from unclip.training.sections import refuse
from unclip.training.sharding import share_of
from unclip.training.task import Batch, computing_device, differences, in_folders, of_rows, source_of
from unclip.training.teacher import TeacherPhrases, read_phrases

START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(captions: Iterable[str], *, vocabulary_size: int, context_length: int) -> CLIPTokenizer:
    """Train a byte-pair `CLIPTokenizer` on `captions`.

    The vocabulary contains every byte, alone and at the end of a word, so it covers all texts.

    Args:
        captions: the training texts.
        vocabulary_size: the largest number of tokens, at least 514 (each byte, alone and at a word's end, and the start
            and end tokens). It is not reached if the texts have too few pairs to merge.
        context_length: the longest sequence in tokens, including the start and end tokens.
    """
    from tokenizers import pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_alone = [*alphabet, *(byte + "</w>" for byte in alphabet)]
    learner = CLIPTokenizer().backend_tokenizer
    # As special tokens, the bytes get the first numbers, in a fixed order. Numbers break ties between equally frequent
    # pairs; otherwise they depend on the order of a hash table, which differs between runs.
    how: dict[str, Any] = {"special_tokens": bytes_alone, "end_of_word_suffix": "</w>", "show_progress": False}
    learner.train_from_iterator(captions, trainers.BpeTrainer(vocab_size=vocabulary_size, **how))
    num_merges = vocabulary_size - len(bytes_alone) - 2
    merges: Any = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]][:num_merges]
    tokens = dict.fromkeys([*bytes_alone, *(a + b for a, b in merges), START, END])
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=context_length)


Encoders = tuple[CLIPTextModelWithProjection, CLIPVisionModelWithProjection]

RECONSTRUCTION_SIZE = 16
MAX_LOGIT_SCALE = math.log(100)
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

    def __init__(self, encoders: Encoders, reconstruction_weight: float, taught: "PhraseLosses | None" = None):
        super().__init__()
        self.text, self.image = encoders
        self.logit_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))  # 1-dimensional: scalars cannot be sharded
        self.reconstruction_weight = reconstruction_weight
        if reconstruction_weight:
            width = self.image.config.projection_dim
            layers = nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, 3 * RECONSTRUCTION_SIZE**2)
            self.thumbnail = nn.Sequential(*layers)
        self.taught = taught

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The losses and metrics of a batch.

        Args:
            batch: `pixels` [batch, 3, size, size], or `image_embeds` [batch, width] of a frozen image encoder;
                `input_ids` [batch, tokens]; `index` [batch], the number of each row's picture; and, with `taught`,
                `phrase_ids` and the inputs of `PhraseLosses`.
        """
        own_embeds = batch.get("image_embeds")
        if own_embeds is None:
            own_embeds = self.image(pixel_values=batch["pixels"]).image_embeds.float()
        embeds, count = of_all_processes(own_embeds), len(own_embeds)
        texts = self._read(torch.cat([batch["input_ids"], batch["phrase_ids"]]) if self.taught else batch["input_ids"])
        logits = self.scale() * (F.normalize(of_all_processes(texts[:count]), dim=-1) @ F.normalize(embeds, dim=-1).T)
        index = of_all_processes(batch["index"])
        same = (index[:, None] == index[None, :]).float()
        target = same / same.sum(dim=1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        hit = (same.gather(1, logits.argmax(dim=1, keepdim=True)) > 0).float().mean()
        metrics = {"loss": loss, "contrastive": loss.detach(), "in_batch_retrieval": hit}
        if self.reconstruction_weight:
            wanted = F.adaptive_avg_pool2d(batch["pixels"].float(), RECONSTRUCTION_SIZE).flatten(1)
            error = F.mse_loss(self.thumbnail(own_embeds).float(), wanted)
            metrics |= {"loss": loss + self.reconstruction_weight * error, "reconstruction": error.detach()}
        if self.taught is not None:
            found = self.taught(texts[count:], self.scale(), batch)
            metrics |= found | {"loss": metrics["loss"] + found["loss"]}
        return metrics

    def scale(self) -> Tensor:
        """The factor of the similarities."""
        return self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()

    def _read(self, input_ids: Tensor) -> Tensor:
        """Text embeddings [batch, width]. Texts of similar length are encoded together to reduce padding."""
        if len(input_ids) < LENGTH_GROUPS or input_ids.is_meta:
            return self.text(input_ids=input_ids).text_embeds.float()
        is_padding = (input_ids == input_ids[:, -1:]).flip(1).cumprod(dim=1)  # repetitions of one token at the end
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


class PhraseLosses(nn.Module):
    """The losses of phrases: the teacher's distribution over pictures, and its embedding, predicted by a head.

    `bank` [num_pictures, width] contains the embeddings of the pictures. The head is not saved.
    """

    def __init__(self, settings: TeacherSettings, bank: Tensor, teacher_width: int):
        super().__init__()
        self.settings = settings
        self.bank: Tensor
        self.register_buffer("bank", F.normalize(bank, dim=-1), persistent=False)
        self.head = nn.Linear(bank.shape[1], teacher_width)

    def forward(self, embeds: Tensor, scale: Tensor, batch: Batch) -> dict[str, Tensor]:
        """`embeds` are text embeddings [batch, width]; the rest of `batch` is from `TeacherPhrases`.

        Args:
            embeds: text embeddings of the phrases.
            scale: of the similarities.
            batch: `pictures` and `probabilities` [batch, k], and `teacher_embeds` [batch, teacher_width].
        """
        embeds = F.normalize(embeds, dim=-1)
        logits = scale * embeds @ self.bank.T
        pictures = batch["pictures"].long()
        cross_entropy = -(batch["probabilities"] * logits.log_softmax(dim=1).gather(1, pictures)).sum(dim=1).mean()
        cosine = F.cosine_similarity(self.head(embeds).float(), batch["teacher_embeds"].float(), dim=-1).mean()
        first = (logits.argmax(dim=1) == pictures[:, 0]).float().mean()
        loss = self.settings.weight * cross_entropy + self.settings.similarity_weight * (1 - cosine)
        metrics = {"taught": cross_entropy, "taught_cosine": cosine, "taught_first": first}
        return {"loss": loss} | {name: value.detach() for name, value in metrics.items()}


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


class ClipTask:
    """Trains a new CLIP with a new tokenizer, or the CLIP in `recipe.start_from` with its tokenizer.

    A resumed run uses the tokenizer in the folder `run`.
    """

    def __init__(self, recipe: Recipe, progress: Callable[..., Any] | None = None, run: Path | None = None):
        assert recipe.clip is not None
        settings = self.settings = recipe.clip
        start = None if recipe.start_from is None else _start(Path(recipe.start_from), settings)
        frozen = None if settings.image_from is None else FrozenClip(settings.image_from)
        images = frozen or start
        self.image_size = (images or settings).image_size
        self.context_length = (start or settings).context_length
        with torch.device("meta"):
            tried = new_encoders(settings, settings.vocabulary_size) if start is None else _encoders(start)
            pair = ContrastivePair(tried, settings.reconstruction_weight)
        if start is None:
            check_parameters(pair, recipe, "the encoders of [clip]")
        if frozen is None:
            try_step(pair, self._blank, recipe)
        how = {"weight_power": settings.weight_power, "include_held_out": settings.include_held_out}
        self.source = source_of(recipe, (self.image_size,), **how)
        self.tokenizer = _tokenizer(recipe, self.source, run) if start is None else start.tokenizer
        self.fingerprint = hashlib.sha256(json.dumps(self.tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()
        made = image_processor(settings.image_size)
        self.feature_extractor: BaseImageProcessor = made if images is None else images.feature_extractor
        torch.manual_seed(recipe.seed)
        text, image = new_encoders(settings, len(self.tokenizer)) if start is None else _encoders(start)
        self.table: Tensor | None = None
        self.phrases: TeacherPhrases | None = None
        taught = None
        if frozen is not None:
            image, width = frozen.image_encoder.requires_grad_(False), text.config.projection_dim
            wrong = f"clip.projection_dim is {width}, but the image encoder in {settings.image_from} has {frozen.width}"
            refuse(width != frozen.width, wrong)
            source = in_folders(self.source, "clip.image_from")
            self.table = frozen.embeddings_of(source.of_size(self.image_size), progress)
            if recipe.teacher is not None:
                self.phrases = TeacherPhrases(recipe.teacher, source, computing_device(), progress)
                taught = PhraseLosses(recipe.teacher, self.table, self.phrases.embeddings.shape[1])
                if start is None:
                    table: Any = text.get_input_embeddings().weight
                    words = words_of(self.tokenizer)
                    table.data[list(words)] = self.phrases.teacher.words(list(words.values()), table.shape[1])
        self.module = ContrastivePair((text, image), settings.reconstruction_weight, taught)
        if start is not None and start.logit_scale is not None:
            nn.init.constant_(self.module.logit_scale, start.logit_scale)

    def _blank(self, rows: int) -> Batch:
        pixels = torch.empty(rows, 3, self.image_size, self.image_size, device="meta")
        ids = torch.empty(rows, self.context_length, dtype=torch.long, device="meta")
        return {"pixels": pixels, "input_ids": ids, "index": ids[:, 0]}

    def batch(self, step: int, batch_size: int, generator: torch.Generator, own: Tensor | None = None) -> Batch:
        rows = self.source.draw(step, batch_size, generator)
        texts, batch = rows.captions, {"index": rows.index}
        if self.phrases is not None:
            phrases, own_rows = self.phrases.draw(batch_size, generator)
            texts = texts + phrases
            batch |= self.phrases.targets(own_rows)
        how: dict[str, Any] = {"truncation": True, "max_length": self.context_length, "return_tensors": "pt"}
        tokens = self.tokenizer(texts, padding="longest", **how)["input_ids"]
        batch |= dict(zip(("input_ids", "phrase_ids"), tokens.split(batch_size), strict=False))
        if self.table is not None:
            batch["image_embeds"] = self.table[rows.index]
        else:
            pixels = shift_and_zoom(rows.pictures(self.image_size), generator)
            batch["pixels"] = normalized(pixels, self.feature_extractor)
        return of_rows(batch, own)

    def save(self, folder: Path) -> None:
        write_component(self.module.text, folder / "text_encoder", variant=None)
        write_component(self.module.image, folder / "image_encoder", variant=None)
        write_component(self.tokenizer, folder / "tokenizer", variant=None)
        write_component(self.feature_extractor, folder / "feature_extractor", variant=None)

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


def new_encoders(settings: ClipSettings, vocabulary_size: int) -> Encoders:
    """Text and image encoders with random weights from torch's default generator.

    The start and end tokens are the last two of the vocabulary.

    Raises: ConfigError for settings that do not fit each other, or a wrong setting of transformers.
    """
    width, end, side = settings.projection_dim, vocabulary_size - 1, settings.image_size
    text = {
        "projection_dim": width, "vocab_size": vocabulary_size, "max_position_embeddings": settings.context_length,
        "num_hidden_layers": settings.text_layers, "num_attention_heads": settings.text_heads,
        "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end,
    }  # fmt: skip
    image = {
        "projection_dim": width, "image_size": side, "patch_size": settings.patch_size, "num_channels": 3,
        "hidden_size": settings.image_width,
        "num_hidden_layers": settings.image_layers, "num_attention_heads": settings.image_heads,
    }  # fmt: skip
    refuse(side % settings.patch_size, f"clip.image_size is {side}; it must be a multiple of clip.patch_size")
    try:
        text_config = _config(CLIPTextConfig, text, {"hidden_size": width} | settings.text_config, "text_config")
        image_config = _config(CLIPVisionConfig, image, settings.image_config, "image_config")
        return CLIPTextModelWithProjection(text_config), CLIPVisionModelWithProjection(image_config)
    except (StrictDataclassError, TypeError, RuntimeError, ValueError) as error:
        raise ConfigError(f"the encoders of [clip] cannot be built: {error!s:.300}") from error


def _config(kind: type, named: dict[str, Any], further: dict[str, Any], section: str) -> Any:
    """The configuration of class `kind`, of the settings `named` in [clip] and those of the encoder's own section."""
    free = sorted(kind.__annotations__.keys() - named.keys())
    if wrong := further.keys() - free:
        raise ConfigError(f"clip.{section}.{min(wrong)} cannot be set; {kind.__name__} may have {', '.join(free)}")
    settings = named | further
    check_clip_settings(settings, f"[clip.{section}]")
    act, known = settings.get("hidden_act", "gelu"), ", ".join(sorted(ACT2FN))
    refuse(act not in ACT2FN, f"hidden_act in [clip.{section}] is {act!r}; it must be one of {known}")
    return kind(**{"intermediate_size": 4 * settings["hidden_size"]} | settings)


def _tokenizer(recipe: Recipe, source: Source, run: Path | None) -> CLIPTokenizer:
    """The tokenizer of the resumed run if its settings are the same, or else a new one.

    It is trained on the captions, and on the teacher's phrases if there are any.
    """
    settings = recipe.clip
    assert settings is not None
    wanted = {"vocabulary_size": settings.vocabulary_size, "context_length": settings.context_length}
    if run is not None and (run / "state").is_dir():
        with contextlib.suppress(UnclipError, KeyError, AttributeError):
            before = read_json(run / "recipe.json", allow_infinity=True)["clip"]
            if before.items() >= wanted.items():
                return read_component(run / "model", "tokenizer", "CLIPTokenizer", torch_dtype=None, variant=None)
    texts = source.all_captions()
    if recipe.teacher is not None and recipe.teacher.phrases is not None:
        texts = itertools.chain(texts, (phrase.text for phrase in read_phrases(recipe.teacher.phrases) if phrase.means))
    return train_tokenizer(texts, **wanted)


def words_of(tokenizer: CLIPTokenizer) -> dict[int, str]:
    """The words, or parts of words, of the tokens with more than one byte, by the number of the token, in order."""
    texts = {row: token.removesuffix("</w>") for token, row in tokenizer.get_vocab().items()}
    return {row: text for row, text in sorted(texts.items()) if len(text) > 1 and text not in (START, END)}


def _start(folder: Path, settings: ClipSettings) -> PretrainedClip:
    """The CLIP to start from.

    Raises: ConfigError when the recipe sets another size.
    """
    clip = read_clip(folder)
    text, image = clip.text_encoder.config, clip.image_encoder.config
    found = {
        "projection_dim": text.projection_dim, "vocabulary_size": text.vocab_size,
        "context_length": clip.context_length, "text_layers": text.num_hidden_layers,
        "text_heads": text.num_attention_heads, "image_size": image.image_size, "patch_size": image.patch_size,
        "image_width": image.hidden_size, "image_layers": image.num_hidden_layers,
        "image_heads": image.num_attention_heads, "text_config": {}, "image_config": {},
    }  # fmt: skip
    default = vars(ClipSettings())
    requested = {name: value for name, value in vars(settings).items() if name in found and value != default[name]}
    other = differences(found, requested)
    refuse(other, f"the recipe's CLIP differs from the one in {folder}: {other}. Remove these settings")
    return clip


def _encoders(clip: PretrainedClip) -> Encoders:
    return clip.text_encoder.train(), clip.image_encoder.train()


def image_processor(size_px: int) -> CLIPImageProcessorPil:
    """The preprocessing of a CLIP trained here: resized to a square without cropping, pixels in [-1, 1]."""
    square, half = {"height": size_px, "width": size_px}, [0.5] * 3
    return CLIPImageProcessorPil(size=square, do_center_crop=False, crop_size=square, image_mean=half, image_std=half)


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
