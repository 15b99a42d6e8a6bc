"""The task of a prior on vectors: pairs of a vector and an image embedding, from two files with the same rows."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unclip.data.embeddings import read_embeddings
from unclip.errors import ConfigError, DataError
from unclip.models.prior import PriorTransformer
from unclip.pipelines.component import write_component
from unclip.pipelines.vector_prior import VectorPrior, identification, vector_condition, vector_model
from unclip.stages.prior import PriorStage
from unclip.training.diffusion import StageModule, first_network, noised, write_network
from unclip.training.dry_run import try_step
from unclip.training.lora import adapt
from unclip.training.recipe import ConditionSettings, PriorSettings, Recipe
from unclip.training.task import Batch, computing_device, of_rows, process_of, scheduler_of

SHEET_ROWS = 256


class PairSource:
    """Pairs of a vector and an image embedding, in memory; the last rows are held out.

    Raises: DataError for files with different numbers of rows, or without rows for training.
    """

    is_local = False

    def __init__(self, data: Path | str, settings: ConditionSettings) -> None:
        vectors, embeddings = read_embeddings(settings.file, settings.key), read_embeddings(data)
        if len(vectors) != len(embeddings):
            raise DataError(f"{settings.file} has {len(vectors)} rows, but {data} has {len(embeddings)}")
        self.num_trained = len(vectors) - settings.held_out
        if self.num_trained < 1:
            raise DataError(f"condition.held_out is {settings.held_out}, but there are only {len(vectors)} pairs")
        self.vectors, self.embeddings = torch.from_numpy(vectors[:]), torch.from_numpy(embeddings[:])
        self.skipped: dict[str, str] = {}
        self.counts: dict[str, int] = {}

    def reading(self, should_stop: Callable[[], bool]) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class VectorPriorTask:
    """Trains a diffusion prior on vectors: vector → whitened image embedding, mean squared error of x0."""

    fingerprint = ""

    def __init__(self, recipe: Recipe, progress: Callable[..., Any] | None = None, run: Path | None = None):
        assert recipe.prior is not None
        assert recipe.condition is not None
        self.settings: PriorSettings = recipe.prior
        self.drop = recipe.condition.drop
        if isinstance(recipe.data, tuple):
            raise ConfigError("a recipe with [condition] needs one file or folder of embeddings as data")
        self.source: Any = PairSource(recipe.data, recipe.condition)
        embeddings = self.source.embeddings[: self.source.num_trained]
        sizes = vector_model(self.source.vectors.shape[1], embeddings.shape[1])
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
        shapes = self.source.vectors.shape[1], self.source.embeddings.shape[1]
        vectors, x0 = (torch.empty(rows, width, device="meta") for width in shapes)
        return {"vectors": vectors} | noised(x0, self.stage.process.num_timesteps, None)

    def batch(self, step: int, batch_size: int, generator: torch.Generator, own: Tensor | None = None) -> Batch:
        index = torch.randint(self.source.num_trained, (batch_size,), generator=generator)
        keep = torch.rand(batch_size, 1, generator=generator) >= self.drop
        device = self.stage.prior.clip_mean.device
        whitened = self.stage.prior.whiten(self.source.embeddings[index].to(device)).cpu()
        pairs = noised(whitened, self.stage.process.num_timesteps, generator)
        return of_rows(pairs | {"vectors": self.source.vectors[index] * keep}, own)

    def save(self, folder: Path) -> None:
        write_network(self.stage.prior, folder, "prior")
        write_component(scheduler_of(self.stage.process), folder / "prior_scheduler", variant=None)

    def sample_sheet(self, path: Path) -> None:
        """Write the identification accuracy of held-out rows, or else of the first rows, to `path` as .txt."""
        first = self.source.num_trained if self.source.num_trained < len(self.source.vectors) else 0
        rows = slice(first, first + SHEET_ROWS)
        prior = VectorPrior(self.stage.prior, scheduler_of(self.stage.process)).to(computing_device())
        found = identification(prior.sample(self.source.vectors[rows], seed=0).cpu(), self.source.embeddings[rows])
        path.with_suffix(".txt").write_text(f"{json.dumps(found)}\n", encoding="utf-8")
