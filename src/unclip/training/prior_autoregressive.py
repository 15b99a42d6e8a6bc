"""The task of the autoregressive prior: caption → codes of the image embedding, by teacher forcing (paper §2.2)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from unclip.diffusion.loop import NoiseSource
from unclip.models.pca import PrincipalComponents
from unclip.models.prior_autoregressive import AutoregressivePrior, dot_product
from unclip.stages.prior import AutoregressivePriorStage
from unclip.stages.stage import PriorCondition
from unclip.training.conditions import Captioned, FrozenClip, batch_text, blank_text, text_batch, write_cosines
from unclip.training.diffusion import SHEET_PICTURES, first_network, write_network
from unclip.training.dry_run import try_step
from unclip.training.lora import adapt
from unclip.training.recipe import AutoregressivePriorSettings, Recipe
from unclip.training.task import Batch

FITTED_ROWS = 16_384
"""Number of sampled embeddings to which the principal components are fitted."""
DOT_BATCHES, DOT_BATCH_SIZE = 32, 128
"""Batches, and captions per batch, from which the buckets of the dot product are computed."""


class CodeModule(nn.Module):
    """The prior and its loss: the mean of −log p per code, in nats."""

    def __init__(self, stage: AutoregressivePriorStage):
        super().__init__()
        self.prior = stage.prior
        self.stage = stage

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`batch` has `codes` [batch, num_components], `dot_codes` [batch], and the text embeddings."""
        found = self.stage.log_likelihood(PriorCondition(batch_text(batch)), batch["dot_codes"], batch["codes"])
        return {"loss": -found.mean()}


class AutoregressivePriorTask:
    """Trains the autoregressive prior: caption → codes of the image embedding's principal components (paper §2.2)."""

    def __init__(self, recipe: Recipe, progress: Callable[..., Any] | None = None, run: Path | None = None):
        assert recipe.prior_autoregressive is not None
        self.settings: AutoregressivePriorSettings = recipe.prior_autoregressive
        self.clip = FrozenClip(self.settings.clip, start=recipe.start_from)
        self.fingerprint = self.clip.fingerprint
        sizes = {
            "embedding_dim": self.clip.width,
            "text_dim": self.clip.text.text_encoder.config.hidden_size,
            "num_embeddings": self.clip.context,
        }
        prior = first_network(AutoregressivePrior, "prior", sizes | self.settings.model, recipe)
        tables = (prior.pca_mean, prior.pca_components, prior.code_low, prior.code_high, prior.dot_edges)
        for table in tables:
            table.requires_grad_(False)
        adapt(prior, recipe.lora, recipe.seed)
        self.stage = AutoregressivePriorStage(prior)
        self.module = CodeModule(self.stage)
        try_step(self.module, self._blank, recipe)
        # `batch` drops captions itself, together with their dot products.
        self.data = Captioned(recipe, self.clip, 0.0, (), progress)
        self.source = self.data.source
        self.jitter = torch.zeros(prior.pca_components.shape)
        if recipe.start_from is None or self.settings.code_noise:
            embeddings, weights = self.data.weighted()
            if recipe.start_from is None:  # otherwise the network keeps its codes
                self._fit_codes(prior, embeddings, weights, recipe.seed)
            coordinates = (embeddings - prior.pca_mean) @ prior.pca_components.T
            spread = (weights @ (coordinates - weights @ coordinates).square()).sqrt()
            self.jitter = self.settings.code_noise * spread[:, None] * prior.pca_components

    def _blank(self, rows: int) -> Batch:
        codes = torch.empty(rows, self.stage.prior.config.num_components, dtype=torch.long, device="meta")
        return blank_text(self.clip, rows) | {"codes": codes, "dot_codes": codes[:, 0]}

    def batch(self, step: int, batch_size: int, generator: torch.Generator, own: Tensor | None = None) -> Batch:
        _, embeddings, text = self.data.draw(step, batch_size, generator, own)
        every = torch.arange(batch_size) if own is None else own
        embeddings, draws = embeddings[every], torch.rand(2, batch_size, generator=generator)[:, every]
        has_text, has_dot = draws[0] >= self.settings.text_drop, draws[1] >= self.settings.dot_drop
        prior = self.stage.prior
        device = prior.pca_mean.device
        dot_codes = prior.dot_code(text.embeds.to(device), embeddings.to(device)).cpu()
        jitter = torch.randn(batch_size, len(self.jitter), generator=generator)[every] @ self.jitter
        codes = prior.encode((embeddings + jitter).to(device)).cpu()
        text = self.clip.empty.join(text).select(torch.where(has_text, torch.arange(1, len(every) + 1), 0))
        dot_codes = dot_codes.where(has_text & has_dot, prior.no_dot_code)
        return text_batch(text) | {"codes": codes, "dot_codes": dot_codes}

    def save(self, folder: Path) -> None:
        write_network(self.stage.prior, folder, "prior")

    def sample_sheet(self, path: Path) -> None:
        """See `write_cosines`."""
        rows = self.source.examples(SHEET_PICTURES)
        device = self.stage.prior.pca_mean.device
        text = self.clip.text.encode(rows.captions).to(device)
        drawn = self.stage.sample(
            PriorCondition(text),
            noise=NoiseSource(torch.Generator().manual_seed(0), len(text)),
            null=PriorCondition(self.clip.empty.select([0] * len(text)).to(device)),
            guidance_scale=2.0,
        )
        write_cosines(path, drawn.cpu(), self.data.embeddings(rows))

    @torch.no_grad()
    def _fit_codes(self, prior: AutoregressivePrior, embeddings: Tensor, weights: Tensor, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(weights, FITTED_ROWS, replacement=True, generator=generator)
        components = PrincipalComponents.fit(embeddings[part] for part in drawn.split(1024))
        dots = []
        for step in range(DOT_BATCHES):
            _, images, text = self.data.draw(step, DOT_BATCH_SIZE, generator)
            dots.append(dot_product(text.embeds.cpu(), images))
        # With shards, each process has other rows. All processes use the values of the first one.
        (found,) = broadcast_object_list([torch.cat(dots)])
        prior.fit_codes(components, embeddings[weights > 0], found)
