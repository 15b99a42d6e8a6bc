"""Principal components of embeddings, fitted batch by batch and ordered by variance (paper §2.2, §4)."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from unclip.checkpoints.tensor_file import read_tensor_file, write_tensor_file
from unclip.errors import ConfigError, DataError, InputError, WeightsError
from unclip.numbers import whole

KIND = "unclip principal components"
VERSION = 1
ORTHONORMAL_TOLERANCE = 1e-3


@dataclass(frozen=True)
class PrincipalComponents:
    """Principal components of embeddings: their mean and an orthonormal basis, in order of decreasing variance.

    Attributes:
        mean: float32 [dim].
        components: float32 [num_components, dim], orthonormal rows. The entry of largest absolute value in a row is
            positive, so that two fits agree in sign.
        variances: float32 [num_components], the variance along each row (eigenvalues of the covariance), descending.
        total_variance: the variance of the embeddings in all dimensions, including omitted components.

    Raises:
        ConfigError: shapes do not match, or the rows are not orthonormal or not in order.
    """

    mean: Tensor
    components: Tensor
    variances: Tensor
    total_variance: float

    def __post_init__(self) -> None:
        count, dim = self.components.shape if self.components.ndim == 2 else (0, 0)
        shapes = tuple(tuple(tensor.shape) for tensor in (self.mean, self.components, self.variances))
        if not 1 <= count <= dim or self.mean.shape != (dim,) or self.variances.shape != (count,):
            raise ConfigError(f"mean, components and variances have shapes {shapes}, which do not fit each other")
        components = self.components.cpu().double()
        product = components @ components.T
        off = float((product - torch.eye(count, dtype=torch.float64, device=product.device)).abs().max())
        if not off <= ORTHONORMAL_TOLERANCE:
            raise ConfigError(
                f"the components deviate from orthonormality by {off:.3g}; at most {ORTHONORMAL_TOLERANCE} is allowed"
            )
        if not bool((self.variances >= 0).all()) or bool((self.variances.diff() > 0).any()):
            raise ConfigError("the variances must descend, and none may be below 0")

    @property
    def dim(self) -> int:
        """Dimension of the embeddings."""
        return self.mean.shape[0]

    @property
    def num_components(self) -> int:
        """Number of components."""
        return self.components.shape[0]

    @property
    def explained(self) -> Tensor:
        """float32 [num_components]: the share of the total variance in the first 1, 2, … components."""
        if self.total_variance <= 0:
            return torch.ones_like(self.variances)
        shares = self.variances.cpu().double().cumsum(0) / self.total_variance
        return shares.clamp(max=1).float().to(self.variances.device)

    @classmethod
    def fit(cls, batches: Iterable[Tensor], num_components: int | None = None) -> Self:
        """Fit components to embeddings, one batch at a time; only one batch is in memory.

        Mean and covariance are float64. Batches are merged without subtracting large sums (Chan, Golub & LeVeque 1979),
        so the order and the size of batches do not matter, except for rounding.

        Args:
            batches: floating-point [batch, dim] each; empty ones are skipped.
            num_components: number of components to keep; all by default. At most the number of embeddings minus one
                are kept, because the embeddings span no further direction.

        Raises:
            DataError: there are fewer than two embeddings, they are all equal, one is not finite, or a batch has
                another width or shape.
            InputError: `num_components` is not a whole number from 1 to dim.
        """
        count, mean, scatter = 0, torch.zeros(0, dtype=torch.float64), torch.zeros(0, 0, dtype=torch.float64)
        for batch in batches:
            if batch.ndim != 2 or not batch.is_floating_point() or (count and batch.shape[1] != len(mean)):
                wanted = f"[batch, {len(mean)}]" if count else "[batch, dim]"
                raise DataError(f"a batch is {batch.dtype} of shape {tuple(batch.shape)}; it must be float {wanted}")
            if not batch.isfinite().all():
                raise DataError(f"an embedding after the first {count} has NaN or infinity; leave its picture out")
            if len(batch) == 0:
                continue
            count, mean, scatter = _merged(count, mean, scatter, batch.detach().double().cpu())
        if count < 2:
            raise DataError(f"there are {count} embeddings; principal components need 2 or more")
        dim = len(mean)
        wanted = dim if num_components is None else whole(num_components, "num_components", 1, dim)
        covariance = scatter / (count - 1)
        values, vectors = torch.linalg.eigh(covariance)
        values, rows = values.flip(0).clamp(min=0), vectors.flip(1).T
        if values[0] <= 0:
            raise DataError(f"the {count} embeddings are all equal; they have no variance")
        kept = min(wanted, count - 1)
        rows = rows[:kept]
        largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
        rows = rows * largest.sign()
        return cls(mean.float(), rows.float().contiguous(), values[:kept].float(), float(covariance.diagonal().sum()))

    def project(self, embeddings: Tensor, num_components: int | None = None) -> Tensor:
        """Coordinates along the first components.

        Args:
            embeddings: [..., dim].
            num_components: number of coordinates; all by default.

        Returns: float32 [..., num_components], on the embeddings' device.

        Raises: InputError for another width, or a count that is out of range.
        """
        if embeddings.shape[-1:] != (self.dim,):
            raise InputError(f"embeddings have shape {tuple(embeddings.shape)}; they must be of width {self.dim}")
        rows = self.components[: self._count(num_components)].to(embeddings.device)
        return (embeddings.float() - self.mean.to(embeddings.device)) @ rows.T

    def reconstruct(self, coordinates: Tensor) -> Tensor:
        """The embeddings with these coordinates; further coordinates are those of the mean.

        Args:
            coordinates: [..., count] along the first components, count from 0 to num_components.

        Returns: float32 [..., dim], on the coordinates' device.

        Raises: InputError for more coordinates than components.
        """
        count = coordinates.shape[-1] if coordinates.ndim else -1
        if not 0 <= count <= self.num_components:
            raise InputError(
                f"coordinates are {tuple(coordinates.shape)}; there are only {self.num_components} components"
            )
        device = coordinates.device
        return coordinates.float() @ self.components[:count].to(device) + self.mean.to(device)

    def save(
        self, path: str | os.PathLike[str], *, about: Mapping[str, str] | None = None, overwrite: bool = False
    ) -> Path:
        """Write one safetensors file; `about` is stored in it as metadata.

        Raises: as `write_tensor_file`.
        """
        tensors = {
            "mean": self.mean,
            "components": self.components,
            "variances": self.variances,
            "total_variance": torch.tensor([self.total_variance], dtype=torch.float64),
        }
        return write_tensor_file(path, tensors, kind=KIND, version=VERSION, about=about, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises: as `read_tensor_file`; WeightsError also if shapes do not match, or the rows are not orthonormal and in
        order.
        """
        return cls.load_with_texts(path)[0]

    @classmethod
    def load_with_texts(cls, path: str | os.PathLike[str]) -> tuple[Self, dict[str, str]]:
        """The components as by `load`, and the metadata of the file."""
        names: dict[str, bool] = dict.fromkeys(("mean", "components", "variances", "total_variance"), True)
        tensors, about = read_tensor_file(path, kind=KIND, version=VERSION, names=names)
        total = tensors.pop("total_variance")
        if total.numel() != 1 or float(total) < 0:
            raise WeightsError(f"total_variance in {path} has shape {tuple(total.shape)}; it must be one number from 0")
        try:
            return cls(**tensors, total_variance=float(total)), about
        except ConfigError as problem:
            raise WeightsError(f"{path}: {problem}") from problem

    def _count(self, num_components: int | None) -> int:
        if num_components is None:
            return self.num_components
        return whole(num_components, "num_components", 0, self.num_components)


def _merged(count: int, mean: Tensor, scatter: Tensor, batch: Tensor) -> tuple[int, Tensor, Tensor]:
    """Count, mean and scatter matrix of the previous embeddings and `batch` together."""
    own_mean = batch.mean(dim=0)
    centred = batch - own_mean
    own_scatter = centred.T @ centred
    if count == 0:
        return len(batch), own_mean, own_scatter
    total = count + len(batch)
    gap = own_mean - mean
    weight = count * len(batch) / total
    return total, mean + gap * (len(batch) / total), scatter + own_scatter + weight * torch.outer(gap, gap)
