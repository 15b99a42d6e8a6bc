"""Pictures as a CLIP's image encoder wants them.

Knows preprocessors' settings; knows neither recipe nor task. Called by the tasks.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor

from unclip.clip.encoders import TextEmbedding, TextEncoder
from unclip.data.batches import Rows
from unclip.data.folder import CaptionedPictures
from unclip.data.source import FolderSource
from unclip.errors import ConfigError
from unclip.pipelines.clip import fingerprint_of, read_clip
from unclip.training.embedding_cache import known_embeddings
from unclip.training.recipe import Recipe
from unclip.training.state import clip_of_run
from unclip.training.task import Batch, computing_device, source_of
from unclip.training.teacher import taught


def normalized(pixels: Tensor, feature_extractor: BaseImageProcessor) -> Tensor:
    """Pictures [batch, 3, size, size] in [-1, 1] in the range, and with the mean and spread, that an encoder wants."""
    settings: Any = feature_extractor
    white = 255 * (settings.rescale_factor if settings.do_rescale else 1)  # 1, in every CLIP that was published
    if not settings.do_normalize:
        return (pixels + 1) * (white / 2)
    return scaled(pixels, settings.image_mean, settings.image_std, white)


def scaled(
    pixels: Tensor, mean: float | Sequence[float], spread: float | Sequence[float], white: float = 1.0
) -> Tensor:
    """Pictures in [-1, 1] less a mean and divided by a spread, which are those of colours in [0, `white`].

    Each of the two is one number, or one a channel.
    """
    middle, unit = (pixels.new_tensor(values).reshape(-1, 1, 1) / white for values in (mean, spread))
    return pixels * (0.5 / unit) + (0.5 - middle) / unit  # exactly the pixels where both are 0.5


LENGTH_STEP = 8
"""A batch's captions are padded to a multiple of so many tokens: few shapes to compile for, and even ones."""
AT_ONCE = 128
"""Pictures that are embedded together."""
SPREAD_ROWS = 4096
"""Of a stream, how many rows its embeddings' mean and spread are taken from."""


class FrozenClip:
    """The CLIP that prior and decoder live in: captions are encoded on demand, pictures once at the start.

    It lies on `device`, or where the run computes.
    """

    def __init__(self, folder: Path | str, device: torch.device | str | None = None):
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
        self._pixels_as = f"{clip.image_encoder.config.to_json_string()}{clip.feature_extractor.to_json_string()}"
        with torch.no_grad():
            self.empty = self.text.encode([""])

    def one_width(self) -> int:
        """Numbers of a token and of an embedding alike.

        Raises: ConfigError when they differ.
        """
        tokens = self.text.text_encoder.config.hidden_size
        if tokens != self.width:
            raise ConfigError(
                f"the CLIP in {self.folder} has tokens of {tokens} numbers and embeddings of {self.width}; the "
                "diffusion prior and the decoder take a CLIP where both are alike"
            )
        return self.width

    def warn_of_start(self, start: Path | str | None) -> None:
        """Warn where the networks that training begins with are of another CLIP's space, as far as that is known.

        A run's state says it of its `model/`, and a whole model's folder has its CLIP.
        """
        if start is None:
            return
        model = Path(start)
        known = clip_of_run(model.parent) if model.name == "model" else None
        if known is None and all((model / part).is_dir() for part in ("text_encoder", "image_encoder")):
            known = fingerprint_of(model)
        if known is not None and known != self.fingerprint:
            warnings.warn(
                f"the model in {start} was trained under another CLIP ({known[:12]}…) than the one in {self.folder} "
                f"({self.fingerprint[:12]}…), or under the same one saved otherwise: it must learn the new space first",
                stacklevel=3,
            )

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Image embeddings [num_pictures, width], on the CPU, of pictures at the encoder's own size, in [-1, 1]."""
        parts = (normalized(part.to(self.device), self.feature_extractor) for part in images.split(AT_ONCE))
        return torch.cat([self.image_encoder(pixel_values=part).image_embeds.cpu() for part in parts])

    def embeddings_of(self, pictures: CaptionedPictures, progress: Callable[..., Any] | None = None) -> Tensor:
        """Image embeddings [num_pictures, width] of a whole folder; computed once and remembered for later runs."""
        encoder = f"{self.fingerprint} {self._pixels_as}"
        return known_embeddings(pictures, self.embed, self.width, encoder, progress=progress)


class Captioned:
    """Draws batches of (embedding, caption) with the caption dropped now and then. Shared by prior and decoder."""

    def __init__(
        self,
        recipe: Recipe,
        clip: FrozenClip,
        text_drop: float,
        sizes_px: tuple[int, ...] = (),
        progress: Callable[..., Any] | None = None,
    ):
        self.clip, self.text_drop = clip, text_drop
        self.source = source_of(recipe, tuple(dict.fromkeys((clip.image_size, *sizes_px))))
        if recipe.teacher is not None:
            self.source = taught(recipe.teacher, self.source, device=clip.device, progress=progress)
        # A folder's embeddings are computed once, those of shards when they are drawn, unless they lie there.
        self.table: Tensor | None = None
        if isinstance(self.source, FolderSource):
            self.table = clip.embeddings_of(self.source.of_size(clip.image_size), progress)

    def draw(
        self, step: int, batch_size: int, generator: torch.Generator, own: Tensor | None = None
    ) -> tuple[Rows, Tensor, TextEmbedding]:
        """Rows of the data set, their image embeddings on the CPU, and those of their captions where CLIP computes.

        With `own` captions of the rows of these numbers alone are encoded.
        """
        rows = self.source.draw(step, batch_size, generator)
        keep = torch.rand(batch_size, generator=generator) >= self.text_drop
        captions = [c if k else "" for c, k in zip(rows.captions, keep.tolist(), strict=True)]
        with torch.no_grad():
            text = self.clip.text.encode(captions if own is None else [captions[row] for row in own.tolist()])
        return rows, self.embeddings(rows), text

    def embeddings(self, rows: Rows) -> Tensor:
        """Image embeddings [batch, width].

        Raises: ConfigError when those that lie in the data are not of this CLIP's width, or are said to be of another.
        """
        if self.table is not None:
            return self.table[rows.index]
        if rows.embeddings is None:
            return self.clip.embed(rows.pictures(self.clip.image_size))
        if rows.embeddings.shape[1] != self.clip.width:
            raise ConfigError(
                f"the embeddings in the data have {rows.embeddings.shape[1]} numbers, the CLIP's have "
                f"{self.clip.width}: they are of another CLIP"
            )
        if others := rows.clips - {self.clip.fingerprint}:
            raise ConfigError(
                f"the data were embedded with another CLIP ({min(others)[:12]}…) than the one in {self.clip.folder} "
                f"({self.clip.fingerprint[:12]}…): embed them again with this one (unclip data embed), or name the one "
                "that they were embedded with"
            )
        return rows.embeddings

    def known(self) -> tuple[Tensor, Tensor]:
        """Embeddings [count, width], and how often each is drawn [count], 1 in all: of a stream some of them."""
        if isinstance(self.source, FolderSource) and self.table is not None:
            return self.table, self.source.weights / self.source.weights.sum()
        embeddings = torch.cat([self.embeddings(part) for part in self.source.examples_in_parts(SPREAD_ROWS, AT_ONCE)])
        return embeddings, torch.full((len(embeddings),), 1 / len(embeddings))

    def spread(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [1, width] of the embeddings that are drawn."""
        embeddings, weights = self.known()
        weights = weights[:, None]
        mean = (weights * embeddings).sum(0, keepdim=True)
        return mean, (weights * (embeddings - mean) ** 2).sum(0, keepdim=True).sqrt().clamp_min(1e-6)


def tell_cosines(path: Path, drawn: Tensor, true: Tensor) -> None:
    """A prior's sample sheet, `path` with the suffix .txt: cosine of drawn and true embeddings, and of wrong pairs."""
    right, wrong = (F.cosine_similarity(drawn, other, dim=-1).mean() for other in (true, true.roll(1, 0)))
    told = f"cosine to the true embedding {right:.3f}, to another's {wrong:.3f}\n"
    path.with_suffix(".txt").write_text(told, encoding="utf-8")


def text_batch(text: TextEmbedding) -> Batch:
    """A caption's embedding as a trainer's batch carries it: without the padding that no caption of the batch needs."""
    longest = int(text.mask.any(dim=0).nonzero().max()) + 1
    longest = min(-longest // LENGTH_STEP * -LENGTH_STEP, text.mask.shape[1])
    return {
        "text_embeds": text.embeds,
        "text_hidden_states": text.hidden_states[:, :longest],
        "text_mask": text.mask[:, :longest],
    }


def blank_text(clip: FrozenClip, rows: int) -> Batch:
    """What `text_batch` makes of `rows` captions of full length, on the meta device."""
    one = {
        "text_embeds": clip.empty.embeds,
        "text_hidden_states": clip.empty.hidden_states,
        "text_mask": clip.empty.mask,
    }
    return {name: torch.empty(rows, *t.shape[1:], dtype=t.dtype, device="meta") for name, t in one.items()}


def batch_text(batch: Batch) -> TextEmbedding:
    """What `text_batch` was made of, less the padding."""
    return TextEmbedding(batch["text_embeds"], batch["text_hidden_states"], batch["text_mask"])
