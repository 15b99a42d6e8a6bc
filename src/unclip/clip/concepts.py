"""The concepts that a model knows, with names and image embeddings, and their file concepts.safetensors."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.checkpoints.files import safe_join
from unclip.checkpoints.layout import CONCEPTS_FILE
from unclip.checkpoints.tensor_file import read_tensor_file, write_tensor_file
from unclip.errors import WeightsError

KIND, VERSION = "concepts", 1
NUM_NEAREST = 3
FALSE_ALARM_WEIGHT = 6
"""How many reports of nonsense one false report of a known caption outweighs."""


@dataclass(frozen=True, eq=False)
class Concepts:
    """The concepts that a model was trained on.

    Attributes:
        model: the model's name in messages.
        names: the names of each concept; the first is its label.
        embeddings: float32 [num_concepts, embedding_dim], image embeddings of the concepts, not normalised.
        threshold: from -2 to 2. A caption with a smaller closeness to the concepts is unknown.
    """

    model: str
    names: tuple[tuple[str, ...], ...]
    embeddings: Tensor
    threshold: float

    def __len__(self) -> int:
        return len(self.names)

    @property
    def labels(self) -> list[str]:
        """The label of each concept."""
        return [names[0] for names in self.names]

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The concepts of the model in `folder`; None without the file.

        Raises: CheckpointError when the file is damaged.
        """
        path = safe_join(folder, CONCEPTS_FILE)
        if not path.exists():
            return None
        tensors, about = read_tensor_file(path, kind=KIND, version=VERSION, names={"embeddings": True})
        embeddings = tensors["embeddings"]
        try:
            names = tuple(tuple(map(str, each)) for each in json.loads(about["names"]))
            threshold = float(about["threshold"])
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise WeightsError(f"{path} has no valid names or threshold: {error!r}") from error
        if embeddings.ndim != 2 or not 0 < len(names) == len(embeddings) or not all(names):
            raise WeightsError(f"{path} has embeddings {tuple(embeddings.shape)} for {len(names)} concepts")
        return cls(about.get("model", "this model")[:100], names, embeddings, threshold)

    def write(self, folder: Path, *, overwrite: bool = False) -> Path:
        """Write the file into the folder of a model.

        Raises: OutputExistsError when it exists and `overwrite` is false.
        """
        about = {"model": self.model, "names": json.dumps(self.names), "threshold": f"{self.threshold:.4f}"}
        tensors = {"embeddings": self.embeddings.half()}
        return write_tensor_file(
            folder / CONCEPTS_FILE, tensors, kind=KIND, version=VERSION, about=about, overwrite=overwrite
        )

    def search(self, text: str) -> list[int]:
        """The concepts with a name in which all words of `text` occur, in any form: "cat" finds "cats"."""
        words = re.findall(r"\w+", text.lower())
        found = []
        for place, names in enumerate(self.names):
            if any(all(re.search(rf"\b{re.escape(word)}", name.lower()) for word in words) for name in names):
                found.append(place)
        return found

    def nearest(self, text_embeds: Tensor, count: int = NUM_NEAREST) -> tuple[Tensor, Tensor]:
        """How close text embeddings are to the concepts, and which concepts are nearest.

        The closeness is the cosine with the nearest concept minus the mean cosine with all concepts. So a caption that
        is equally similar to all concepts has a closeness of about 0.

        Args:
            text_embeds: [batch, embedding_dim].
            count: number of nearest concepts; fewer if there are fewer.

        Returns: the closeness [batch], and the indices of the nearest concepts [batch, count].
        """
        texts = F.normalize(text_embeds.detach().float().cpu(), dim=-1)
        cosines = texts @ F.normalize(self.embeddings, dim=-1).T
        values, indices = cosines.topk(min(count, len(self)), dim=1)
        return values[:, 0] - cosines.mean(dim=1), indices

    def reports(self, captions: Sequence[str], text_embeds: Tensor) -> list[str]:
        """A message for each unknown caption, with the three nearest concepts.

        Empty captions are not reported, and nothing is reported if the embeddings have another width.

        Args:
            captions: [batch] texts.
            text_embeds: [batch, embedding_dim], their text embeddings.
        """
        if text_embeds.shape[-1] != self.embeddings.shape[1]:
            return []
        closeness, indices = self.nearest(text_embeds)
        unknown = (closeness < self.threshold).tolist()
        return [
            f"{caption[:60]!r} is not close to anything {self.model} knows; nearest: "
            + ", ".join(self.names[place][0] for place in places)
            for caption, places, is_unknown in zip(captions, indices.tolist(), unknown, strict=True)
            if is_unknown and caption.strip()
        ]


def best_threshold(known: Tensor, unknown: Tensor) -> float:
    """The threshold that separates the closeness [n] of known captions from that of unknown ones [m] best.

    It maximises the share of unknown captions below it, minus `FALSE_ALARM_WEIGHT` times the share of known captions
    below it. If several are equally good, it is their centre.
    """
    candidates = torch.cat([known, unknown]).sort().values
    edges = (candidates[1:] + candidates[:-1]) / 2
    known, unknown = known.sort().values, unknown.sort().values
    missed = torch.searchsorted(known, edges) / len(known)
    caught = torch.searchsorted(unknown, edges) / len(unknown)
    score = caught - FALSE_ALARM_WEIGHT * missed
    best = edges[score == score.max()]
    return float(best[len(best) // 2])
