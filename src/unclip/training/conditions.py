"""The frozen CLIP of prior and decoder: preprocessing, embeddings, and batches of embeddings with captions."""

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor

from unclip.clip.encoders import TextEmbedding, TextEncoder
from unclip.clip.pretrained import fingerprint_of, read_clip
from unclip.data.batches import Rows
from unclip.data.folder import CaptionedPictures
from unclip.data.source import FolderSource
from unclip.errors import ConfigError
from unclip.training.embedding_cache import Progress, cached_embeddings
from unclip.training.recipe import Recipe
from unclip.training.sections import refuse
from unclip.training.state import clip_of_run
from unclip.training.task import Batch, computing_device, in_folders, source_of
from unclip.training.teacher import TeacherPhrases


def normalized(pixels: Tensor, feature_extractor: BaseImageProcessor) -> Tensor:
    """Pictures [batch, 3, size, size] in [-1, 1], rescaled and normalised by the settings of `feature_extractor`."""
    settings: Any = feature_extractor
    white = 255 * (settings.rescale_factor if settings.do_rescale else 1)  # 1 in all published CLIPs
    if not settings.do_normalize:
        return (pixels + 1) * (white / 2)
    return scaled(pixels, settings.image_mean, settings.image_std, white)


def scaled(
    pixels: Tensor, mean: float | Sequence[float], spread: float | Sequence[float], white: float = 1.0
) -> Tensor:
    """Pictures in [-1, 1], normalised by the mean and standard deviation of colours in [0, `white`].

    `mean` and `spread` are numbers, or sequences with a number per channel.
    """
    middle, unit = (pixels.new_tensor(values).reshape(-1, 1, 1) / white for values in (mean, spread))
    return pixels * (0.5 / unit) + (0.5 - middle) / unit  # exactly the pixels where both are 0.5


LENGTH_STEP = 8
"""The captions of a batch are padded to a multiple of this number of tokens, which limits the number of shapes."""
AT_ONCE = 128
"""Batch size of the image encoder."""
OF_THE_FILE = ("dtype", "torch_dtype", "transformers_version", "_name_or_path", "architectures")
"""Keys of an encoder's configuration that describe how it was saved."""
SPREAD_ROWS = 4096
"""Number of rows of a stream from which the mean and spread of the embeddings are computed."""


class FrozenClip:
    """The CLIP in whose embedding space prior and decoder are trained.

    It warns when the model `start` was trained with another CLIP, if that CLIP is known: for the `model/` of a run, and
    for a complete model. Its device is `device`, or by default that of the run.
    """

    def __init__(
        self, folder: Path | str, *, start: Path | str | None = None, device: torch.device | str | None = None
    ):
        clip = read_clip(Path(folder))
        self.device = computing_device() if device is None else torch.device(device)
        for encoder in (clip.text_encoder, clip.image_encoder):
            encoder.to(self.device)  # pyright: ignore[reportArgumentType]
        text: Any = clip.text_encoder.config
        self.folder = folder
        self.image_encoder, self.feature_extractor = clip.image_encoder, clip.feature_extractor
        self.text = TextEncoder(clip.text_encoder, clip.tokenizer)
        self.width: int = text.projection_dim
        self.context: int = text.max_position_embeddings
        self.image_size = clip.image_size
        self.fingerprint = clip.fingerprint
        with torch.no_grad():
            self.empty = self.text.encode([""])
        found = None if start is None else _clip_of(Path(start))
        if found not in (None, self.fingerprint):
            warnings.warn(
                f"the model in {start} was trained with another CLIP ({found:.12}…) than the one in {folder} "
                f"({self.fingerprint:.12}…), or with the same CLIP in another form: the network must adapt to it",
                stacklevel=3,
            )

    def one_width(self) -> int:
        """The width of tokens and embeddings.

        Raises: ConfigError when the two widths differ.
        """
        width = self.text.text_encoder.config.hidden_size
        both = f"tokens of width {width} and embeddings of width {self.width}"
        refuse(width != self.width, f"the CLIP in {self.folder} has {both}; prior and decoder need equal widths")
        return self.width

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Image embeddings [num_pictures, width], on the CPU, of pictures in [-1, 1] at the size of the encoder."""
        parts = (normalized(part.to(self.device), self.feature_extractor) for part in images.split(AT_ONCE))
        return torch.cat([self.image_encoder(pixel_values=part).image_embeds.cpu() for part in parts])

    def embeddings_of(self, pictures: CaptionedPictures, progress: Progress | None = None) -> Tensor:
        """Image embeddings [num_pictures, width] of the pictures of a folder, with a cache on disk."""
        # The name in the cache depends on image encoder and preprocessing, but not on text encoder or saved type.
        digest = hashlib.sha256()
        for name, value in self.image_encoder.state_dict().items():
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.float().cpu().numpy().tobytes())
        config: Any = self.image_encoder.config
        settings = {key: value for key, value in config.to_dict().items() if key not in OF_THE_FILE}
        about = f"{json.dumps(settings, sort_keys=True)} {self.feature_extractor.to_json_string()}"
        return cached_embeddings(pictures, self.embed, f"{digest.hexdigest()} {about}", progress)


def _clip_of(model: Path) -> str | None:
    """The fingerprint of the CLIP of a run's `model/` or of a complete model; None if it is unknown."""
    found = clip_of_run(model.parent) if model.name == "model" else None
    is_complete = all((model / part).is_dir() for part in ("text_encoder", "image_encoder"))
    return fingerprint_of(model) if found is None and is_complete else found


class Captioned:
    """Batches of image embeddings and captions for prior and decoder, and of pictures of `sizes` in pixels.

    Captions are dropped with the probability `text_drop`.
    """

    def __init__(
        self,
        recipe: Recipe,
        clip: FrozenClip,
        text_drop: float,
        sizes: tuple[int, ...],
        progress: Progress | None = None,
    ):
        self.clip, self.text_drop = clip, text_drop
        self.source = source_of(recipe, tuple(dict.fromkeys((clip.image_size, *sizes))))
        self.phrases: TeacherPhrases | None = None
        if recipe.teacher is not None:
            source = in_folders(self.source, "[teacher]")
            self.phrases = TeacherPhrases(recipe.teacher, source, clip.device, progress)
        # The embeddings of a folder are computed once; those of shards for each batch, unless the shards contain them.
        self.table: Tensor | None = None
        if isinstance(self.source, FolderSource):
            self.table = clip.embeddings_of(self.source.of_size(clip.image_size), progress)

    def draw(
        self, step: int, batch_size: int, generator: torch.Generator, own: Tensor | None = None
    ) -> tuple[Rows, Tensor, TextEmbedding]:
        """Rows of the data set, their image embeddings on the CPU, and their text embeddings on CLIP's device.

        With `own`, only the captions of the rows with these indices are encoded.
        """
        rows = self.source.draw(step, batch_size, generator)
        if self.phrases is not None:
            rows = self.phrases.mixed(rows, generator)
        keep = torch.rand(batch_size, generator=generator) >= self.text_drop
        captions = [c if k else "" for c, k in zip(rows.captions, keep.tolist(), strict=True)]
        with torch.no_grad():
            text = self.clip.text.encode(captions if own is None else [captions[row] for row in own.tolist()])
        return rows, self.embeddings(rows), text

    def embeddings(self, rows: Rows) -> Tensor:
        """Image embeddings [batch, width].

        Raises: ConfigError when the embeddings in the data are of another CLIP.
        """
        if self.table is not None:
            return self.table[rows.index]
        if rows.embeddings is None:
            return self.clip.embed(rows.pictures(self.clip.image_size))
        width, clip = rows.embeddings.shape[1], self.clip
        what = f"the embeddings in the data have width {width}, those of the CLIP {clip.width}"
        refuse(width != clip.width, f"{what}: they are of another CLIP")
        if others := rows.clips - {clip.fingerprint}:
            raise ConfigError(
                f"the data were embedded with another CLIP ({min(others):.12}…) than the one in {clip.folder} "
                f"({clip.fingerprint:.12}…): embed them again (unclip data embed), or change the recipe's CLIP"
            )
        return rows.embeddings

    def weighted(self) -> tuple[Tensor, Tensor]:
        """Embeddings [count, width] and their probabilities [count]; for a stream, a sample of them."""
        if isinstance(self.source, FolderSource) and self.table is not None:
            return self.table, self.source.weights / self.source.weights.sum()
        embeddings = torch.cat([self.embeddings(part) for part in self.source.examples_in_parts(SPREAD_ROWS, AT_ONCE)])
        return embeddings, torch.full((len(embeddings),), 1 / len(embeddings))

    def spread(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [1, width] of the embeddings, weighted as they are sampled."""
        embeddings, weights = self.weighted()
        weights = weights[:, None]
        mean = (weights * embeddings).sum(0, keepdim=True)
        return mean, (weights * (embeddings - mean) ** 2).sum(0, keepdim=True).sqrt().clamp_min(1e-6)


def write_cosines(path: Path, drawn: Tensor, true: Tensor) -> None:
    """Write the mean cosine similarity of sampled and true embeddings, and of wrong pairs, to `path` as .txt."""
    right, wrong = (F.cosine_similarity(drawn, other, dim=-1).mean() for other in (true, true.roll(1, 0)))
    text = f"cosine to the true embedding {right:.3f}, to another's {wrong:.3f}\n"
    path.with_suffix(".txt").write_text(text, encoding="utf-8")


def text_batch(text: TextEmbedding) -> Batch:
    """Text embeddings as entries of a batch, without unnecessary padding."""
    longest = int(text.mask.any(dim=0).nonzero().max()) + 1
    longest = min(-longest // LENGTH_STEP * -LENGTH_STEP, text.mask.shape[1])
    return _entries(TextEmbedding(text.embeds, text.hidden_states[:, :longest], text.mask[:, :longest]))


def blank_text(clip: FrozenClip, rows: int) -> Batch:
    """As `text_batch` for `rows` captions of full length, on the meta device."""
    one = _entries(clip.empty)
    return {name: torch.empty(rows, *t.shape[1:], dtype=t.dtype, device="meta") for name, t in one.items()}


def _entries(text: TextEmbedding) -> Batch:
    return {"text_embeds": text.embeds, "text_hidden_states": text.hidden_states, "text_mask": text.mask}


def batch_text(batch: Batch) -> TextEmbedding:
    """The text embeddings in a batch: the inverse of `text_batch`."""
    return TextEmbedding(batch["text_embeds"], batch["text_hidden_states"], batch["text_mask"])
