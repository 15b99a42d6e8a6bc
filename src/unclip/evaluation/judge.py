"""A CLIP that looks at pictures and reads captions, and how well it finds one by the other.

Knows encoders alone; knows neither pipelines nor data sets. Called by every measure.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unclip.pipelines.clip import read_parts
from unclip.stages.encoders import ImageEncoder, TextEncoder


@dataclass(frozen=True)
class Judge:
    """A CLIP that ranks captions for a picture: one that had no part in a model, or the model's own."""

    text: TextEncoder
    image: ImageEncoder

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> "Judge":
        """Read a CLIP from a folder, of a pipeline's components (`text_encoder`, …) or of transformers' `CLIPModel`.

        Raises:
            ConfigError: there is none.
            CheckpointError: a part is missing or broken.
        """
        parts, _ = read_parts(folder)
        return cls(
            TextEncoder(parts["text_encoder"].to(device), parts["tokenizer"]),
            ImageEncoder(parts["image_encoder"].to(device), parts["feature_extractor"]),
        )

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Embeddings [num_images, width] as the image encoder gives them, on the CPU."""
        return torch.cat([self.image.encode(images[k : k + 64]).cpu() for k in range(0, len(images), 64)])

    def look(self, images: Sequence[Image.Image]) -> Tensor:
        """Normalised embeddings [num_images, width]."""
        return F.normalize(self.embed(images), dim=-1)

    @torch.no_grad()
    def read(self, captions: Sequence[str]) -> Tensor:
        """Normalised embeddings [num_captions, width]."""
        parts = [self.text.encode(captions[k : k + 256]).embeds.cpu() for k in range(0, len(captions), 256)]
        return F.normalize(torch.cat(parts), dim=-1)


@dataclass(frozen=True)
class Candidates:
    """The captions that a judge chooses from, each once, with its embeddings of them [num_captions, width]."""

    captions: list[str]
    known: Tensor

    @classmethod
    def read_by(cls, judge: Judge, captions: Sequence[str]) -> "Candidates":
        """Have a judge read them."""
        once = list(dict.fromkeys(captions))
        return cls(once, judge.read(once))

    def places(self, features: Tensor, asked: Sequence[str]) -> Tensor:
        """For each picture the place (0 is first) of the caption that was asked for."""
        return ranks(features, self._rows(asked), self.known)

    def rates(self, features: Tensor, asked: Sequence[str]) -> dict[str, float]:
        """How often a picture's own caption comes first and among five, and its mean cosine (CLIP score).

        Args:
            features: the judge's embeddings of pictures [num_images, width], normalised.
            asked: a caption for each, one of the candidates.
        """
        places = self.places(features, asked)
        found = {f"at_{k}": round((places < k).float().mean().item(), 4) for k in (1, 5)}
        score = (features * self.known[self._rows(asked)]).sum(dim=1).mean()
        return found | {"clip_score": round(score.item(), 4)}

    def chance(self) -> dict[str, float]:
        """What a judge that guesses would find."""
        count = len(self.captions)
        return {"chance_at_1": 1 / count, "chance_at_5": min(1.0, 5 / count)}

    def _rows(self, asked: Sequence[str]) -> list[int]:
        rows = {caption: row for row, caption in enumerate(self.captions)}
        return [rows[caption] for caption in asked]


def ranks(images: Tensor, own: Sequence[int], captions: Tensor) -> Tensor:
    """For each picture the place (0 is first) of its own caption among all, by the cosine of embeddings.

    Another caption of the same score comes first, and so does every other one where a score is not a number: a judge
    that sees no difference finds nothing.

    Args:
        images: [num_images, width], normalised.
        own: for each picture the row of its caption.
        captions: [num_captions, width], normalised; each caption once.
    """
    scores = (images @ captions.T).nan_to_num(nan=-torch.inf)
    mine = scores.gather(1, torch.tensor(own, dtype=torch.long, device=scores.device)[:, None])
    return (scores >= mine).sum(dim=1) - 1
