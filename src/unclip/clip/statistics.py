"""The distribution of a model's image embeddings, and its file embedding_statistics.safetensors in the model's folder.

It is used to notice embeddings of another scale or of another CLIP, to rescale them, and to add noise to embeddings.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from unclip.checkpoints.files import safe_join
from unclip.checkpoints.layout import STATISTICS_FILE
from unclip.checkpoints.tensor_file import read_tensor_file, write_tensor_file
from unclip.diffusion.process import DiffusionProcess
from unclip.errors import InputError, WeightsError

if TYPE_CHECKING:
    import numpy as np

KIND, VERSION = "embedding_statistics", 1
RESCALINGS = ("norm", "dimensions", "unwhiten")
MIN_ROWS = 16
"""The smallest number of rows from which the statistics of each dimension are estimated."""

# Measured on the built-in model, see `docs/guides/any-embedding.md`.
_NORM_LIMIT = 2.0
_NORM_LIMIT_OF_ONE = 4.0
_LEAST_LIKELIHOOD = -0.03
_EQUAL_NORMS = 2e-3
_SHRUNK, _SHRUNK_SCALED = 0.5, 0.85
_WHITE_VARIANCE = 0.5, 1.6
_NOISE = DiffusionProcess()


@dataclass(frozen=True, eq=False)
class EmbeddingStatistics:
    """The distribution of image embeddings.

    Attributes:
        mean, std: float32 [embedding_dim], of each dimension.
        norm_mean, norm_std: of the norms of the embeddings.
    """

    mean: Tensor
    std: Tensor
    norm_mean: float
    norm_std: float

    @classmethod
    def of(cls, embeddings: Tensor) -> Self:
        """The statistics of embeddings [rows, embedding_dim]. Raises: InputError for fewer than 16 rows."""
        return cls.of_batches([embeddings])

    @classmethod
    def of_batches(cls, batches: "Iterable[Tensor | np.ndarray]") -> Self:
        """The statistics of all rows of the batches. Raises: InputError for fewer than 16 rows."""
        count, sums, squares, norms = 0, torch.zeros(()), torch.zeros(()), []
        for batch in batches:
            rows = torch.as_tensor(batch).double()
            count, sums, squares = count + len(rows), sums + rows.sum(dim=0), squares + rows.square().sum(dim=0)
            norms.append(rows.norm(dim=1))
        if count < MIN_ROWS:
            raise InputError(f"there are {count} embeddings; statistics need {MIN_ROWS} or more")
        mean, each = sums / count, torch.cat(norms)
        std = ((squares / count - mean**2).clamp_min(0) * (count / (count - 1))).sqrt().clamp_min(1e-6)
        return cls(mean.float(), std.float(), float(each.mean()), float(each.std().clamp_min(1e-6)))

    @classmethod
    def of_prior(cls, mean: Tensor, std: Tensor) -> Self | None:
        """Statistics from a prior's `clip_mean` and `clip_std`; None if these were never set (0, and 1 or 0).

        The spread of the norm is twice that of independent dimensions: it was 2.1 times that for the built-in model.
        """
        mean, std = mean.detach().float().cpu().flatten(), std.detach().float().cpu().flatten()
        if (std <= 0).any() or (not mean.any() and (std == 1).all()):
            return None
        norm = float((mean**2 + std**2).sum().sqrt())
        return cls(mean, std, norm, float((2 * std**4 + 4 * mean**2 * std**2).sum().sqrt()) / norm)

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The statistics in a model's folder; None without the file. Raises: CheckpointError for a damaged file."""
        path = safe_join(folder, STATISTICS_FILE)
        if not path.exists():
            return None
        names: dict[str, bool] = {"mean": True, "std": True, "norm": True}
        found, _ = read_tensor_file(path, kind=KIND, version=VERSION, names=names)
        mean, std, norm = (found[name] for name in names)
        is_valid = mean.ndim == 1 and std.shape == mean.shape and norm.shape == (2,)
        if not is_valid or not (std > 0).all() or not (norm > 0).all():
            raise WeightsError(f"{path} has no valid statistics: 'mean' and 'std' [width], 'norm' [2], positive")
        return cls(mean, std, *norm.tolist())

    def write(self, folder: Path, *, overwrite: bool = False) -> Path:
        """Write the file into a model's folder. Raises: OutputExistsError when it exists and `overwrite` is false."""
        tensors = {"mean": self.mean, "std": self.std, "norm": torch.tensor([self.norm_mean, self.norm_std])}
        return write_tensor_file(folder / STATISTICS_FILE, tensors, kind=KIND, version=VERSION, overwrite=overwrite)

    def log_likelihood_ratio(self, embeddings: Tensor) -> Tensor:
        """How much likelier embeddings are under these statistics than under random directions, per dimension.

        The rows are first scaled to the mean norm. Both distributions are Gaussians: one has `mean` and `std`, the
        other the mean 0 and one standard deviation for all dimensions, so that its norm is the mean norm.

        Args:
            embeddings: [rows, embedding_dim].

        Returns: [rows], in nats; positive for the model's own embeddings.
        """
        rows = embeddings * (self.norm_mean / embeddings.norm(dim=1, keepdim=True).clamp_min(1e-12))
        variance = self.norm_mean**2 / rows.shape[1]
        z = (rows - self.mean) / self.std
        return ((rows**2 / variance - z**2).mean(dim=1) + math.log(variance) - 2 * self.std.log().mean()) / 2

    def report(self, embeddings: Tensor) -> str | None:
        """What is wrong with the scale of embeddings [rows, embedding_dim]: the likely cause, and what fixes it.

        Returns: a message, or None when they are like the model's own.
        """
        rows = embeddings.float().cpu()
        norms, own = rows.norm(dim=1), self.norm_mean
        norm = float(norms.median())
        limit = self.norm_std * (_NORM_LIMIT + (_NORM_LIMIT_OF_ONE - _NORM_LIMIT) / math.sqrt(len(rows)))
        scaled = rows * (own / norms[:, None].clamp_min(1e-12))
        likelihood, distance = float(self.log_likelihood_ratio(rows).mean()), self._distance(rows)
        start = f"the embeddings have a norm of {norm:.3g} (median), those of the model {own:.3g}: they were probably "
        if likelihood < _LEAST_LIKELIHOOD:
            raw = self.rescaled(rows, "unwhiten")
            low, high = _WHITE_VARIANCE
            is_own = float(self.log_likelihood_ratio(raw).mean()) > -_LEAST_LIKELIHOOD
            if is_own and low < float(rows.square().mean()) < high:
                return start + "whitened, as a prior's latents are; use " + _option("unwhiten")
            return (
                "the embeddings are not distributed like those of the model (log-likelihood ratio "
                f"{likelihood:.2f} per dimension): they are probably of another CLIP, or of texts, or their dimensions "
                "are in another order. Use embeddings of the model's own image encoder, or a translator (unclip train "
                "translator); no rescaling helps"
            )
        is_far = abs(norm - own) > limit
        units = norms if len(rows) > 1 else torch.tensor([norm, 1.0])
        if is_far and float(units.std()) < _EQUAL_NORMS * norm:
            return start + "normalised; use " + _option("norm")
        if distance < _SHRUNK and self._distance(scaled) < _SHRUNK_SCALED:
            return start + "predicted by a regression, which stays close to the mean; use " + _option("dimensions")
        return start + "multiplied by a factor; use " + _option("norm") if is_far else None

    def _distance(self, rows: Tensor) -> float:
        """Mean squared distance from the mean in standard deviations; 1 for the model's own embeddings."""
        return float(((rows - self.mean) / self.std).square().mean())

    def rescaled(self, embeddings: Tensor, how: str, given: "EmbeddingStatistics | None" = None) -> Tensor:
        """Embeddings [rows, embedding_dim] on the model's scale.

        Args:
            embeddings: the rows.
            how: "norm": every row gets the mean norm. "dimensions": every dimension gets the mean and the standard
                deviation of the model. "unwhiten": every dimension is multiplied by `std`, and `mean` is added.
            given: with "dimensions", the statistics of all rows, of which these are a part; by default of these rows.

        Raises: InputError for an unknown `how`, a row of zeros with "norm", or too few rows with "dimensions".
        """
        rows = embeddings.float()
        mean, std = self.mean.to(rows.device), self.std.to(rows.device)
        if how == "unwhiten":
            return rows * std + mean
        if how == "dimensions":
            given = given or EmbeddingStatistics.of(rows)
            return (rows - given.mean.to(rows.device)) / given.std.to(rows.device) * std + mean
        if how != "norm":
            raise InputError(f"rescale is {how!r}; it must be one of {', '.join(map(repr, RESCALINGS))}")
        norms = rows.norm(dim=1, keepdim=True)
        if not norms.all():
            raise InputError(f"embedding {int(norms.flatten().argmin())} is zero and has no direction")
        return rows * (self.norm_mean / norms)

    def noised(self, embeddings: Tensor, level: int, noise: Tensor) -> Tensor:
        """Embeddings with the noise of a level from 0 to 999, as in Stable unCLIP.

        They are whitened, noised by the cosine schedule of 1000 steps, and un-whitened.

        Args:
            embeddings, noise: [rows, embedding_dim].
        """
        return noised(embeddings, level, noise, self.mean, self.std)


def noised(
    embeddings: Tensor, level: int, noise: Tensor, mean: Tensor, std: Tensor, process: DiffusionProcess = _NOISE
) -> Tensor:
    """Embeddings [rows, embedding_dim] that are whitened, noised to a level and un-whitened, float32.

    Level 0 has a little noise.

    Args:
        embeddings, noise: [rows, embedding_dim].
        level: a timestep of `process`.
        mean, std: [embedding_dim] or [1, embedding_dim].
        process: only its schedule counts.
    """
    mean, std = mean.to(embeddings.device).float(), std.to(embeddings.device).float()
    return process.add_noise((embeddings - mean) / std, noise, level) * std + mean


def _option(how: str) -> str:
    return f"--rescale {how} (in Python: rescale={how!r})"
