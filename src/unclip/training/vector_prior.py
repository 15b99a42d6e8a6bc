"""The tasks of priors on vectors and tokens: pairs of a condition and an image embedding, from two files."""

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unclip.data.embeddings import Embeddings, read_embeddings
from unclip.errors import ConfigError, DataError
from unclip.models.prior import PriorTransformer
from unclip.models.prior_dalle2 import EmbeddingPriorNetwork
from unclip.pipelines.component import write_component
from unclip.pipelines.embedding_prior import EmbeddingPrior
from unclip.pipelines.vector_prior import VectorPrior, identification, vector_condition, vector_model
from unclip.stages.prior import PriorStage
from unclip.stages.prior_dalle2 import EmbeddingCondition, EmbeddingPriorStage
from unclip.training.diffusion import StageModule, first_network, noised, write_network
from unclip.training.dry_run import try_step
from unclip.training.lora import adapt
from unclip.training.recipe import ConditionSettings, PriorSettings, Recipe
from unclip.training.sections import refuse
from unclip.training.task import Batch, computing_device, of_rows, process_of, scheduler_of

SHEET_ROWS, SHEET_NUMBERS = 256, 2**22
"""Rows that are measured, at most, and numbers in them."""
LOADED_BYTES = 2 << 30
"""Larger data stay in their files, from which the rows of each batch are read."""
SCALE_ROWS = 256
"""Rows from which the scale of grids is measured."""


class Rows:
    """The rows of files, as float32 tensors; several files are joined along the width."""

    def __init__(self, tables: list[Embeddings]) -> None:
        self.tables, self.widths = tables, [table.width for table in tables]
        self.shape = (*tables[0].shape[:-1], sum(self.widths))
        is_small = 4 * np.prod(self.shape) <= LOADED_BYTES
        self.loaded = self._read(slice(None)) if is_small else None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        if self.loaded is not None:
            return self.loaded[rows]
        if isinstance(rows, slice):
            return self._read(rows)
        return torch.cat([self._read(slice(row, row + 1)) for row in rows.tolist()])

    def _read(self, rows: slice) -> Tensor:
        return torch.cat([torch.from_numpy(table[rows]) for table in self.tables], dim=-1)


class PairSource:
    """Pairs of a condition and an image embedding, or a grid of tokens; the last rows are held out.

    Raises: DataError for files with different numbers of rows, or without rows for training; ConfigError for
        conditions of another kind than the recipe says.
    """

    is_local = False

    def __init__(self, data: Any, settings: ConditionSettings) -> None:
        files: list[Any] = [*settings.file] if isinstance(settings.file, tuple) else [settings.file]
        tables = [read_embeddings(file, settings.key, grids=settings.kind == "tokens") for file in files]
        target = read_embeddings(data, grids=True)
        for table in tables:
            if len(table) != len(target):
                raise DataError(f"{table.path} has {len(table)} rows, but {data} has {len(target)}")
        if settings.kind == "tokens" and (len(tables) > 1 or len(tables[0].shape) != 3):
            raise ConfigError("condition.kind 'tokens' needs one file with an array [rows, tokens, width]")
        self.num_trained = len(target) - settings.held_out
        if self.num_trained < 1:
            raise DataError(f"condition.held_out is {settings.held_out}, but there are only {len(target)} pairs")
        self.conditions, self.embeddings = Rows(tables), Rows([target])
        self.skipped: dict[str, str] = {}
        self.counts: dict[str, int] = {}

    def reading(self, should_stop: Callable[[], bool]) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def measured(self) -> slice:
        """The held-out rows that are measured, or else the first rows."""
        first = self.num_trained if self.num_trained < len(self.embeddings) else 0
        count = min(SHEET_ROWS, max(2, SHEET_NUMBERS // int(np.prod(self.embeddings.shape[1:]))))
        return slice(first, first + count)


def condition_task(
    recipe: Recipe, progress: Callable[..., Any] | None = None, run: Path | None = None
) -> "VectorPriorTask | TokenPriorTask":
    """The task of a recipe with [condition]: on vectors for vectors, and on tokens where either is a grid."""
    assert recipe.condition is not None
    if isinstance(recipe.data, tuple):
        raise ConfigError("a recipe with [condition] needs one file or folder of embeddings as data")
    source = PairSource(recipe.data, recipe.condition)
    is_plain = len(source.conditions.shape) == len(source.embeddings.shape) == 2
    return VectorPriorTask(recipe, source) if is_plain else TokenPriorTask(recipe, source)


class VectorPriorTask:
    """Trains a diffusion prior on vectors: vector → whitened image embedding, mean squared error of x0."""

    fingerprint = ""

    def __init__(self, recipe: Recipe, source: PairSource) -> None:
        assert recipe.prior is not None
        assert recipe.condition is not None
        self.settings: PriorSettings = recipe.prior
        self.drop = recipe.condition.drop
        self.source: Any = source
        embeddings = source.embeddings[: source.num_trained]
        sizes = vector_model(source.conditions.shape[1], embeddings.shape[1])
        prior = first_network(PriorTransformer, "prior", sizes | self.settings.model, recipe)
        if recipe.start_from is None:
            std, mean = torch.std_mean(embeddings, dim=0, keepdim=True, correction=0)
            prior.clip_mean.data.copy_(mean)
            prior.clip_std.data.copy_(std.clamp_min(1e-6))
        for parameter in (prior.clip_mean, prior.clip_std):
            parameter.requires_grad_(False)
        adapt(prior, recipe.lora, recipe.seed)
        self.stage = PriorStage(prior, process_of(self.settings.process))
        width = embeddings.shape[1]
        weighting = self.settings.process.weighting
        self.module = StageModule(self.stage, lambda b: vector_condition(b["vectors"], width), weighting, prior=prior)
        try_step(self.module, self._blank, recipe)

    def _blank(self, rows: int) -> Batch:
        shapes = self.source.conditions.shape[1], self.source.embeddings.shape[1]
        vectors, x0 = (torch.empty(rows, width, device="meta") for width in shapes)
        return {"vectors": vectors} | noised(x0, self.stage.process.num_timesteps, None)

    def batch(self, step: int, batch_size: int, generator: torch.Generator, own: Tensor | None = None) -> Batch:
        index = torch.randint(self.source.num_trained, (batch_size,), generator=generator)
        widths = torch.tensor(self.source.conditions.widths)
        keep = torch.rand(batch_size, len(widths), generator=generator) >= self.drop
        vectors = self.source.conditions[index] * keep.repeat_interleave(widths, dim=1)
        device = self.stage.prior.clip_mean.device
        whitened = self.stage.prior.whiten(self.source.embeddings[index].to(device)).cpu()
        return of_rows(noised(whitened, self.stage.process.num_timesteps, generator) | {"vectors": vectors}, own)

    def save(self, folder: Path) -> None:
        write_network(self.stage.prior, folder, "prior")
        write_component(scheduler_of(self.stage.process), folder / "prior_scheduler", variant=None)

    def sample_sheet(self, path: Path) -> None:
        """Write the identification accuracy of held-out rows, or else of the first rows, to `path` as .txt."""
        prior = VectorPrior(self.stage.prior, scheduler_of(self.stage.process)).to(computing_device())
        write_identification(prior.sample, self.source, path)


class TokenPriorTask:
    """Trains a diffusion prior from or to grids of tokens: mean squared error of x0, which has the variance 1.

    A vector counts as a grid of one token. Predictions are not clipped, since tokens of CLIP have outliers.
    """

    fingerprint = ""

    def __init__(self, recipe: Recipe, source: PairSource) -> None:
        assert recipe.prior is not None
        assert recipe.condition is not None
        refuse(len(source.conditions.widths) > 1, "several conditions at once need vectors, also in the data")
        self.source: Any = source
        self.drop = recipe.condition.drop
        (tokens, width), (count, dim) = (as_grid(rows.shape[1:]) for rows in (source.conditions, source.embeddings))
        sizes: dict[str, Any] = {
            "embedding_dim": dim,
            "num_tokens": count,
            "condition_tokens": tokens,
            "condition_dim": width,
        }
        if recipe.start_from is None:
            std = source.embeddings[: min(SCALE_ROWS, source.num_trained)].std()
            sizes["image_embed_scale"] = 1 / float(std.clamp_min(1e-5))
        settings = {"causal": False, "num_layers": 6} if recipe.start_from is None else {}
        prior = first_network(EmbeddingPriorNetwork, "prior", settings | sizes | recipe.prior.model, recipe)
        adapt(prior, recipe.lora, recipe.seed)
        process = dataclasses.replace(process_of(recipe.prior.process), clip_range=None)
        self.stage = EmbeddingPriorStage(prior, process)
        weighting = recipe.prior.process.weighting
        self.module = StageModule(self.stage, _condition_of, weighting, prior=prior)
        try_step(self.module, self._blank, recipe)

    def _blank(self, rows: int) -> Batch:
        config = self.stage.prior.config
        x0, condition = (torch.empty(rows, *s, device="meta") for s in (config.embedding_shape, config.condition_shape))
        given = torch.empty(rows, dtype=torch.bool, device="meta")
        return {"condition": condition, "given": given} | noised(x0, self.stage.process.num_timesteps, None)

    def batch(self, step: int, batch_size: int, generator: torch.Generator, own: Tensor | None = None) -> Batch:
        config = self.stage.prior.config
        index = torch.randint(self.source.num_trained, (batch_size,), generator=generator)
        given = torch.rand(batch_size, generator=generator) >= self.drop
        x0 = self.source.embeddings[index].view(-1, *config.embedding_shape) * config.scale
        condition = self.source.conditions[index].view(-1, *config.condition_shape)
        batch = noised(x0, self.stage.process.num_timesteps, generator) | {"condition": condition, "given": given}
        return of_rows(batch, own)

    def save(self, folder: Path) -> None:
        write_network(self.stage.prior, folder, "prior")
        write_component(scheduler_of(self.stage.process), folder / "prior_scheduler", variant=None)

    def sample_sheet(self, path: Path) -> None:
        """Write the identification accuracy of held-out rows, or else of the first rows, to `path` as .txt."""
        prior = EmbeddingPrior(self.stage.prior, scheduler_of(self.stage.process)).to(computing_device())
        shape = self.stage.prior.config.condition_shape
        write_identification(lambda rows, **how: prior.sample(rows.view(-1, *shape), **how), self.source, path)


def as_grid(shape: tuple[int, ...]) -> tuple[int, int]:
    """(tokens, width) of one row; a vector is one token."""
    return (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])


def _condition_of(batch: Batch) -> EmbeddingCondition:
    condition, given = batch["condition"], batch["given"]
    nothing = condition.new_zeros(len(condition), 0, condition.shape[-1])
    return EmbeddingCondition(condition, nothing, nothing[..., 0].bool(), given)


def write_identification(sample: Callable[..., Tensor], source: PairSource, path: Path) -> None:
    """Write how well samples of the measured rows identify the true embeddings, to `path` as .txt."""
    rows = source.measured()
    drawn = sample(source.conditions[rows], seed=0).cpu()
    found = identification(drawn.flatten(1), source.embeddings[rows].flatten(1))
    path.with_suffix(".txt").write_text(f"{json.dumps(found)}\n", encoding="utf-8")
