"""Translation of another CLIP's image embeddings into those of a model's CLIP, fitted to pairs of the same pictures."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.checkpoints.tensor_file import read_tensor_file, write_tensor_file
from unclip.data.embeddings import Embeddings
from unclip.errors import DataError, InputError, WeightsError
from unclip.numbers import whole
from unclip.pipelines.arguments import check_tensor
from unclip.pipelines.vector_prior import identification

KIND, VERSION = "translator", 1
LINEAR: tuple[str, ...] = ("source_mean", "source_std", "target_mean", "target_std", "weight")
HIDDEN: tuple[str, ...] = ("hidden_weight", "hidden_bias", "output_weight")
PENALTIES = tuple(10.0**power for power in range(-5, 2))
"""Ridge penalties that are tried, as shares of the number of rows."""
VALIDATED = 0.1
"""The share of the training rows on which the penalty and the number of steps are chosen."""
MIN_ROWS = 20
MAX_IDENTIFIED = 4096
"""Held-out rows among which each is identified, at most."""
BATCH, LEARNING_RATE, WEIGHT_DECAY, CHECK_EVERY = 256, 1e-3, 0.1, 50


@dataclass(frozen=True, eq=False)
class Translator:
    """A function from the image embeddings of one CLIP to those of another: linear, or with one hidden layer.

    Embeddings are whitened, multiplied by `weight`, and un-whitened. With a hidden layer, its output (GELU) is added
    before un-whitening.

    Attributes:
        source_mean, source_std: [source_dim], of the embeddings that are translated.
        target_mean, target_std: [target_dim], of those of the model's CLIP.
        weight: [target_dim, source_dim].
        hidden_weight, hidden_bias, output_weight: [hidden, source_dim], [hidden] and [target_dim, hidden]; or None.
        measured: the errors on held-out pairs; see `measure`.
    """

    source_mean: Tensor
    source_std: Tensor
    target_mean: Tensor
    target_std: Tensor
    weight: Tensor
    hidden_weight: Tensor | None = None
    hidden_bias: Tensor | None = None
    output_weight: Tensor | None = None
    measured: dict[str, float] = field(default_factory=dict)

    @property
    def source_dim(self) -> int:
        """The width of the embeddings that are translated."""
        return self.weight.shape[1]

    @property
    def target_dim(self) -> int:
        """The width of the result."""
        return self.weight.shape[0]

    @classmethod
    def fit(
        cls,
        source: Tensor,
        target: Tensor,
        *,
        held_out: int,
        hidden: int = 0,
        steps: int = 2000,
        seed: int = 0,
        progress: Callable[..., Any] | None = None,
    ) -> Self:
        """Fit a translator to pairs: ridge regression, and a hidden layer on its residual if `hidden` is above 0.

        The penalty, and the step after which the hidden layer is kept, are those with the smallest error on a tenth
        of the training rows, chosen at random.

        Args:
            source: floating point [rows, source_dim], of another CLIP.
            target: floating point [rows, target_dim], of the model's CLIP, for the same pictures.
            held_out: the number of last rows that are not trained on, on which the error is measured. 0: no
                measurement.
            hidden: the width of the hidden layer, 0 to 16384.
            steps: optimizer steps of the hidden layer, 50 to 1,000,000, of 256 rows each.
            seed: of the validation rows, the hidden layer's first weights and its batches.
            progress: shows the steps of the hidden layer.

        Raises: InputError for tensors of wrong shapes, fewer than 20 training rows, or wrong numbers.
        """
        for name, rows in (("source", source), ("target", target)):
            check_tensor(rows, name)
            if rows.ndim != 2:
                raise InputError(f"{name} has shape {tuple(rows.shape)}; it must be [rows, width]")
        if len(source) != len(target):
            raise InputError(f"there are {len(source)} source rows and {len(target)} target rows; they must be pairs")
        count = len(source) - whole(held_out, "held_out", 0)
        if count < MIN_ROWS:
            raise InputError(
                f"there are {len(source)} pairs and held_out is {held_out}; {MIN_ROWS} or more must be left"
            )
        hidden, steps = whole(hidden, "hidden", 0, 16_384), whole(steps, "steps", CHECK_EVERY, 1_000_000)
        generator = torch.Generator().manual_seed(whole(seed, "seed", 0, 2**64 - 1))
        x, y = source[:count].float().cpu(), target[:count].float().cpu()
        means, stds = (x.mean(dim=0), y.mean(dim=0)), (_std(x), _std(y))
        z, goal = (x - means[0]) / stds[0], (y - means[1]) / stds[1]
        order = torch.randperm(count, generator=generator)
        checked, trained = order.tensor_split([max(1, round(VALIDATED * count))])
        solve, solve_all = _ridge(z[trained], goal[trained]), _ridge(z, goal)
        errors = {share: _error(z[checked] @ solve(share).T, goal[checked]) for share in PENALTIES}
        penalty = min(errors, key=errors.__getitem__)
        made = cls(means[0], stds[0], means[1], stds[1], solve_all(penalty))
        if hidden:
            residual = goal - z @ solve(penalty).T
            layers = _hidden_layer(z, residual, trained, checked, hidden, steps, generator, progress)
            made = replace(made, **dict(zip(HIDDEN, layers, strict=True)))
        return replace(made, measured=made.measure(source[count:], target[count:])) if held_out else made

    @torch.no_grad()
    def __call__(self, embeddings: Tensor) -> Tensor:
        """Embeddings [batch, source_dim] as float32 [batch, target_dim], on the same device, for `pipe.decode`.

        Raises: InputError for embeddings of another width, or that are not finite.
        """
        check_tensor(embeddings, "embeddings")
        if embeddings.ndim != 2 or embeddings.shape[1] != self.source_dim:
            raise InputError(
                f"the embeddings have shape {tuple(embeddings.shape)}; this translator takes [batch, {self.source_dim}]"
            )
        mine = replace(self, **{name: tensor.to(embeddings.device) for name, tensor in self.tensors().items()})
        z = (embeddings.float() - mine.source_mean) / mine.source_std
        y = z @ mine.weight.T
        if mine.hidden_weight is not None and mine.output_weight is not None:
            y = y + F.gelu(F.linear(z, mine.hidden_weight, mine.hidden_bias)) @ mine.output_weight.T
        return y * mine.target_std + mine.target_mean

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by the names of the attributes, without those that are None."""
        return {name: each for name in (*LINEAR, *HIDDEN) if (each := getattr(self, name)) is not None}

    def measure(self, source: Tensor, target: Tensor) -> dict[str, float]:
        """The error on pairs that were not trained on.

        Args:
            source, target: [rows, source_dim] and [rows, target_dim].

        Returns: "explained": the explained share of the variance, 1 minus the squared error over the squared
            distance from the training mean; and those of `identification`, among at most 4,096 rows.
        """
        predicted, true = self(source).cpu(), target.float().cpu()
        around = (true - self.target_mean).square().sum()
        explained = 1 - (predicted - true).square().sum() / around.clamp_min(1e-12)
        return {"explained": float(explained), "rows": float(len(true))} | identification(
            predicted[:MAX_IDENTIFIED], true[:MAX_IDENTIFIED]
        )

    def write(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write a .safetensors file. Raises: OutputExistsError when it exists and `overwrite` is false."""
        about = {"measured": json.dumps(self.measured)}
        return write_tensor_file(path, self.tensors(), kind=KIND, version=VERSION, about=about, overwrite=overwrite)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a file of `write`. Raises: MissingFileError, CheckpointError or WeightsError."""
        names = dict.fromkeys(LINEAR, True) | dict.fromkeys(HIDDEN, False)
        found, about = read_tensor_file(path, kind=KIND, version=VERSION, names=names)
        shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
        target, source = shapes["weight"] if len(shapes["weight"]) == 2 else (0, 0)
        hidden = (*shapes.get("hidden_bias", ()), 0)[0]
        wanted: dict[str, Any] = {"source_mean": (source,), "source_std": (source,), "weight": (target, source)}
        wanted |= {"target_mean": (target,), "target_std": (target,)}
        if shapes.keys() & set(HIDDEN):
            wanted |= {"hidden_weight": (hidden, source), "hidden_bias": (hidden,), "output_weight": (target, hidden)}
        if shapes != wanted:
            raise WeightsError(f"{path} has tensors of shapes {shapes}; a translator has {wanted}")
        try:
            measured = {str(name): float(value) for name, value in json.loads(about.get("measured", "{}")).items()}
        except (ValueError, TypeError, AttributeError, RecursionError) as problem:
            raise WeightsError(f"{path} has measurements that cannot be read") from problem
        return cls(**found, measured=measured)


def check_pairs(source: Embeddings, target: Embeddings) -> None:
    """Raises: DataError for files of embeddings with different numbers of rows."""
    if len(source) != len(target):
        raise DataError(
            f"{source.path} has {len(source)} rows, but {target.path} has {len(target)}; they must be embeddings of "
            "the same pictures in the same order"
        )


def _std(rows: Tensor) -> Tensor:
    return rows.std(dim=0, correction=0).clamp_min(1e-6)


def _error(predicted: Tensor, goal: Tensor) -> float:
    return float((predicted - goal).square().mean())


def _ridge(z: Tensor, goal: Tensor) -> Callable[[float], Tensor]:
    """The ridge regression of rows as a function of the penalty, a share of their number: [target, source]."""
    products = torch.zeros(z.shape[1], z.shape[1], dtype=torch.float64)
    mixed = torch.zeros(z.shape[1], goal.shape[1], dtype=torch.float64)
    for some, of_goal in zip(z.split(65_536), goal.split(65_536), strict=True):
        products += some.double().T @ some.double()
        mixed += some.double().T @ of_goal.double()
    values, vectors = torch.linalg.eigh(products)
    turned = vectors.T @ mixed
    return lambda share: (vectors @ (turned / (values.clamp_min(0) + share * len(z))[:, None])).T.float()


def _hidden_layer(
    z: Tensor,
    residual: Tensor,
    trained: Tensor,
    checked: Tensor,
    hidden: int,
    steps: int,
    generator: torch.Generator,
    progress: Callable[..., Any] | None,
) -> list[Tensor]:
    """The weights of a hidden layer that predicts the residual; zeros of its output if no step improves on them."""
    first = torch.randn(hidden, z.shape[1], generator=generator) * z.shape[1] ** -0.5
    layers = [first, torch.zeros(hidden), torch.zeros(residual.shape[1], hidden)]
    for layer in layers:
        layer.requires_grad_(True)
    optimizer = torch.optim.AdamW(layers, LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def predict(rows: Tensor) -> Tensor:
        return F.gelu(F.linear(z[rows], layers[0], layers[1])) @ layers[2].T

    best, least = [layer.detach().clone() for layer in layers], float(residual[checked].square().mean())
    for step in (progress or iter)(range(1, steps + 1)):
        rows = trained[torch.randint(len(trained), (BATCH,), generator=generator)]
        optimizer.zero_grad()
        F.mse_loss(predict(rows), residual[rows]).backward()
        optimizer.step()
        schedule.step()
        if step % CHECK_EVERY == 0:
            with torch.no_grad():
                error = _error(predict(checked), residual[checked])
            if error < least:
                best, least = [layer.detach().clone() for layer in layers], error
    return best
