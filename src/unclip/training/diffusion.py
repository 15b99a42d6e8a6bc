"""The diffusion tasks: prior, decoder and super-resolution. They train the stages that sampling uses."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.clip.encoders import TextEmbedding
from unclip.diffusion.loop import NoiseSource
from unclip.diffusion.sampler import DDIMSampler
from unclip.images import grid, to_pil
from unclip.models.component import Component
from unclip.models.prior import PriorTransformer
from unclip.models.text_proj import UnCLIPTextProjModel
from unclip.models.unet import UNet2DConditionModel, UNet2DModel
from unclip.pipelines.component import read_component, write_component
from unclip.stages.decoder import DecoderStage
from unclip.stages.prior import PriorStage
from unclip.stages.stage import DecoderCondition, PriorCondition, SuperResCondition, sample, size_px
from unclip.stages.super_res import SuperResStage, enlarge
from unclip.training.conditions import Captioned, FrozenClip, batch_text, blank_text, text_batch, write_cosines
from unclip.training.dry_run import check_parameters, try_step
from unclip.training.lora import adapt, merged, write_adapter
from unclip.training.losses import absolute_error, perceptual_loss
from unclip.training.recipe import DecoderSettings, PriorSettings, Recipe, SuperResSettings
from unclip.training.sections import refuse
from unclip.training.task import Batch, differences, of_rows, process_of, scheduler_of, source_of

SHEET_PICTURES = 48
SHEET_STEPS = 20


def write_network(network: nn.Module, folder: Path, name: str) -> None:
    """Write the component `name` with merged adapters, and its adapters, if any, in a separate folder."""
    write_component(merged(network), folder / name, variant=None)
    write_adapter(network, folder / f"{name}_lora")


class StageModule(nn.Module):
    """The networks of a stage and its loss.

    `of_x0`, if set, replaces the loss of the process; it takes the predicted and the true clean samples.
    """

    def __init__(self, stage: Any, condition: Callable[[Batch], Any], weighting: str, **networks: nn.Module):
        super().__init__()
        for name, network in networks.items():
            self.add_module(name, network)
        self.stage = stage
        self.condition, self.weighting = condition, weighting
        self.of_x0: Callable[[Tensor, Tensor], dict[str, Tensor]] | None = None

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`batch` has `x0` and `noise` of the stage's shape, `t` [batch], and the entries of the stage's condition."""
        process = self.stage.process
        x0, noise, t = batch["x0"], batch["noise"], batch["t"]
        x_t = process.add_noise(x0, noise, t)
        output = self.stage.prepare(self.condition(batch))(x_t, t)
        if self.of_x0 is not None:  # without clipping, which has no gradient outside the range
            return self.of_x0(dataclasses.replace(process, clip_range=None).predict(output, x_t, t).x0, x0)
        return {"loss": process.loss(output, x0, noise, x_t, t, weighting=self.weighting).mean()}


N = TypeVar("N", bound=Component)


def first_network(cls: type[N], name: str, settings: dict[str, Any], recipe: Recipe) -> N:
    """The network to train: the component `name` of `recipe.start_from`, or a new network with these settings.

    Raises: ConfigError when the recipe's settings differ from those of the component.
    """
    if recipe.start_from is None:
        with torch.device("meta"):
            check_parameters(cls(**settings), recipe, f"the network {name} of [{recipe.stage}.model]")
        network = cls(**settings)
        network.initialize_for_training(torch.Generator().manual_seed(recipe.seed))
        return network
    network = read_component(Path(recipe.start_from), name, cls.__name__, torch_dtype=torch.float32, variant=None)
    requested = network.config_class.from_dict(dict(network.config) | settings)
    other = differences(network.config, {key: requested[key] for key in settings})
    what = f"the recipe's {name} differs from the one in {recipe.start_from}: {other}"
    refuse(other, f"{what}. Remove these settings, or remove start_from")
    return network.train()


def noised(x0: Tensor, num_timesteps: int, generator: torch.Generator | None) -> Batch:
    """x0 with random noise and timesteps, on the device of x0, which must be that of the generator."""
    return {
        "x0": x0,
        "noise": torch.randn(x0.shape, generator=generator, device=x0.device),
        "t": torch.randint(num_timesteps, (len(x0),), generator=generator, device=x0.device),
    }


class PriorTask:
    """Trains the diffusion prior: caption → whitened image embedding, mean squared error of x0 (paper §2.2)."""

    def __init__(self, recipe: Recipe, progress: Callable[..., Any] | None = None, run: Path | None = None):
        assert recipe.prior is not None
        self.settings: PriorSettings = recipe.prior
        self.clip = FrozenClip(self.settings.clip, start=recipe.start_from)
        self.fingerprint = self.clip.fingerprint
        sizes = {"embedding_dim": self.clip.one_width(), "num_embeddings": self.clip.context}
        prior = first_network(PriorTransformer, "prior", sizes | self.settings.model, recipe)
        for parameter in (prior.clip_mean, prior.clip_std):
            parameter.requires_grad_(False)
        adapt(prior, recipe.lora, recipe.seed)
        self.stage = PriorStage(prior, process_of(self.settings.process))
        weighting = self.settings.process.weighting
        self.module = StageModule(self.stage, lambda b: PriorCondition(batch_text(b)), weighting, prior=prior)
        try_step(self.module, self._blank, recipe)
        self.data = Captioned(recipe, self.clip, self.settings.text_drop, (), progress)
        self.source = self.data.source
        if recipe.start_from is None:  # otherwise the network keeps its whitening
            mean, std = self.data.spread()
            prior.clip_mean.copy_(mean)
            prior.clip_std.copy_(std)

    def _blank(self, rows: int) -> Batch:
        x0 = torch.empty(rows, self.clip.width, device="meta")
        return blank_text(self.clip, rows) | noised(x0, self.stage.process.num_timesteps, None)

    def batch(self, step: int, batch_size: int, generator: torch.Generator, own: Tensor | None = None) -> Batch:
        _, embeddings, text = self.data.draw(step, batch_size, generator, own)
        whitened = self.stage.prior.whiten(embeddings.to(self.stage.prior.clip_mean.device)).cpu()
        return text_batch(text) | of_rows(noised(whitened, self.stage.process.num_timesteps, generator), own)

    def save(self, folder: Path) -> None:
        write_network(self.stage.prior, folder, "prior")
        write_component(scheduler_of(self.stage.process), folder / "prior_scheduler", variant=None)

    def sample_sheet(self, path: Path) -> None:
        """See `write_cosines`."""
        rows = self.source.examples(SHEET_PICTURES)
        text = self.clip.text.encode(rows.captions)
        drawn = draw_stage(self.module, self.stage, PriorCondition(text), PriorCondition(self.clip.empty), scale=2.0)
        write_cosines(path, drawn, self.data.embeddings(rows))


@torch.no_grad()
def forget_text(text_proj: UnCLIPTextProjModel, empty: TextEmbedding) -> None:
    """Make the output for every caption equal to that for the empty one, so that another text encoder can be learned.

    `empty` is the empty caption, encoded by the text encoder with which `text_proj` was trained.
    """
    tokens = empty.hidden_states[0][empty.mask[0]].to(text_proj.embedding_proj.weight.device)
    layers = (text_proj.embedding_proj, empty.embeds[0]), (text_proj.encoder_hidden_states_proj, tokens)
    for layer, read in layers:
        given = layer(read.to(layer.weight.device))
        layer.bias.copy_(given.reshape(-1, given.shape[-1]).mean(dim=0))
        layer.weight.zero_()


class DecoderTask:
    """Trains the decoder: image embedding and caption → small picture (paper §2.1)."""

    def __init__(self, recipe: Recipe, progress: Callable[..., Any] | None = None, run: Path | None = None):
        assert recipe.decoder is not None
        self.settings: DecoderSettings = recipe.decoder
        self.clip = FrozenClip(self.settings.clip, start=recipe.start_from)
        self.fingerprint = self.clip.fingerprint
        decoder = first_network(UNet2DConditionModel, "decoder", self.settings.model, recipe)
        self.size_px = size_px(decoder.config.sample_size)
        sizes = {
            "clip_embeddings_dim": self.clip.one_width(),
            "time_embed_dim": decoder.config.embedding_width,
            "cross_attention_dim": decoder.config.cross_attention_dim,
        }
        text_proj = first_network(UnCLIPTextProjModel, "text_proj", sizes | self.settings.text_proj, recipe)
        if self.settings.forget_text:
            assert recipe.start_from is not None
            forget_text(text_proj, FrozenClip(Path(recipe.start_from)).empty)
        process = process_of(self.settings.process)
        found, wanted = decoder.config.out_channels, decoder.config.in_channels * (2 if process.learns_variance else 1)
        needs = f"variance_type {process.variance_type!r} needs {wanted}"
        refuse(found != wanted, f"decoder.model.out_channels is {found}; {needs}")
        adapt(decoder, recipe.lora, recipe.seed)
        text_proj.requires_grad_(recipe.lora is None)
        self.stage = DecoderStage(decoder, text_proj, process)
        self.module = StageModule(
            self.stage,
            lambda b: DecoderCondition(batch_text(b), b["image_embedding"], b["given"]),
            self.settings.process.weighting,
            decoder=decoder,
            text_proj=text_proj,
        )
        try_step(self.module, self._blank, recipe)
        self.data = Captioned(recipe, self.clip, self.settings.text_drop, (self.size_px,), progress)
        self.source = self.data.source
        is_jittered = self.settings.embedding_noise > 0
        self.spread = self.data.spread()[1] if is_jittered else torch.zeros(1, self.clip.width)

    def _blank(self, rows: int) -> Batch:
        x0 = torch.empty(rows, 3, self.size_px, self.size_px, device="meta")
        image = {"image_embedding": torch.empty(rows, self.clip.width, device="meta")}
        given = {"given": torch.empty(rows, dtype=torch.bool, device="meta")}
        return blank_text(self.clip, rows) | noised(x0, self.stage.process.num_timesteps, None) | image | given

    def batch(self, step: int, batch_size: int, generator: torch.Generator, own: Tensor | None = None) -> Batch:
        rows, embedding, text = self.data.draw(step, batch_size, generator, own)
        jitter = self.settings.embedding_noise * self.spread * torch.randn(embedding.shape, generator=generator)
        given = torch.rand(batch_size, generator=generator) >= self.settings.image_drop
        picture = noised(rows.pictures(self.size_px), self.stage.process.num_timesteps, generator)
        return text_batch(text) | of_rows(picture | {"image_embedding": embedding + jitter, "given": given}, own)

    def save(self, folder: Path) -> None:
        write_network(self.stage.decoder, folder, "decoder")
        write_component(self.stage.text_proj, folder / "text_proj", variant=None)
        write_component(scheduler_of(self.stage.process), folder / "decoder_scheduler", variant=None)

    def sample_sheet(self, path: Path) -> None:
        """Write pictures decoded from true embeddings without captions, with the real pictures below."""
        rows = self.source.examples(SHEET_PICTURES)
        real = rows.pictures(self.size_px)
        empty = self.clip.empty.select([0] * len(real))
        condition = DecoderCondition.of(empty, self.data.embeddings(rows))
        drawn = draw_stage(self.module, self.stage, condition, DecoderCondition.null(self.clip.empty), scale=2.0)
        pairs = [part for k in range(0, len(real), 12) for part in (drawn[k : k + 12], real[k : k + 12])]
        grid(to_pil(F.interpolate(torch.cat(pairs), scale_factor=2)), columns=12).save(path)


class SuperResTask:
    """Trains super-resolution: degraded small picture → large picture, on crops (paper §2.1)."""

    def __init__(self, recipe: Recipe, progress: Callable[..., Any] | None = None, run: Path | None = None):
        assert recipe.super_res is not None
        self.settings: SuperResSettings = recipe.super_res
        self.fingerprint, start = "", "super_res_first"
        if self.settings.only_last_step and recipe.start_from and Path(recipe.start_from, "super_res_last").is_dir():
            start = "super_res_last"
        network = first_network(UNet2DModel, start, self.settings.model, recipe)
        self.network = network
        self.size_px = size_px(network.config.sample_size)
        crop = self.settings.crop_size
        refuse(crop > self.size_px, f"super_res.crop_size is {crop}; the network's pictures have {self.size_px} px")
        process = process_of(self.settings.process)
        self.stage = SuperResStage(network, network, process)
        weighting = self.settings.process.weighting
        self.module = StageModule(_EnlargedStage(self.stage), lambda b: b["enlarged"], weighting, network=network)
        try_step(self.module, lambda rows: self._blank(rows, crop), recipe, large=self._blank(1, self.size_px))
        self.module.of_x0 = _last_loss(self.settings)
        self.source = source_of(recipe, (self.size_px,), weight_power=0.5)

    def _blank(self, rows: int, side_px: int) -> Batch:
        x0 = torch.empty(rows, 3, side_px, side_px, device="meta")
        return noised(x0, self.stage.process.num_timesteps, None) | {"enlarged": x0}

    def batch(self, step: int, batch_size: int, generator: torch.Generator, own: Tensor | None = None) -> Batch:
        settings, size = self.settings, self.size_px
        large = self.source.draw(step, batch_size, generator).pictures(size)
        small = degrade(large, settings, generator)
        enlarged = enlarge(small, size)
        top, left = torch.randint(size - settings.crop_size + 1, (2,), generator=generator).tolist()
        window = (..., slice(top, top + settings.crop_size), slice(left, left + settings.crop_size))
        batch = noised(large[window], self.stage.process.num_timesteps, generator)
        if settings.only_last_step:
            batch["t"] = torch.zeros_like(batch["t"])
        return of_rows(batch | {"enlarged": enlarged[window]}, own)

    def save(self, folder: Path) -> None:
        name = "super_res_last" if self.settings.only_last_step else "super_res_first"
        write_component(self.network, folder / name, variant=None)
        write_component(scheduler_of(self.stage.process), folder / "super_res_scheduler", variant=None)

    def sample_sheet(self, path: Path) -> None:
        """Write pictures, held-out ones if possible: enlarged bicubically, enlarged by the network, and real."""
        held_out, trained = (self.source.examples(8, held_out=held) for held in (True, False))
        large = (held_out if held_out.captions else trained).pictures(self.size_px)
        small = degrade(large, self.settings, torch.Generator().manual_seed(0))
        drawn = draw_stage(self.module, self.stage, SuperResCondition(small), None, num_steps=7)
        enlarged = enlarge(small, self.size_px).clamp(-1, 1)
        grid(to_pil(torch.cat([enlarged, drawn, large])), columns=len(large)).save(path)


def _last_loss(settings: SuperResSettings) -> Callable[[Tensor, Tensor], dict[str, Tensor]] | None:
    if settings.features is not None:
        return perceptual_loss(Path(settings.features), settings.perceptual_weight)
    return absolute_error if settings.last_loss == "l1" else None


class _EnlargedStage:
    """Super-resolution on crops: the condition is a crop of the enlarged picture."""

    def __init__(self, stage: SuperResStage):
        self.process, self.network = stage.process, stage.first

    def prepare(self, enlarged: Tensor):
        return lambda x_t, t: self.network(torch.cat([x_t, enlarged], dim=1), t).sample.float()


def degrade(large: Tensor, settings: SuperResSettings, generator: torch.Generator) -> Tensor:
    """Small pictures as input of super-resolution: shrunk, sometimes blurred (3×3 Gaussian), with noise."""
    small = F.interpolate(large, size=(settings.low_res_size,) * 2, mode="area")
    edge = torch.exp(torch.tensor(-0.5 / settings.blur_sigma**2))
    line = torch.stack([edge, torch.ones(()), edge])
    line = line / line.sum()
    kernel = (line[:, None] * line[None, :]).expand(3, 1, 3, 3)
    blurred = F.conv2d(F.pad(small, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    chosen = torch.rand(len(large), 1, 1, 1, generator=generator) < settings.blur_share
    strength = torch.rand(len(large), 1, 1, 1, generator=generator) * settings.noise
    small = torch.where(chosen, blurred, small)
    return (small + strength * torch.randn(small.shape, generator=generator)).clamp(-1, 1)


@torch.no_grad()
def draw_stage(
    module: nn.Module, stage: Any, condition: Any, null: Any, *, scale: float = 1.0, num_steps: int = SHEET_STEPS
) -> Tensor:
    """Samples for a sample sheet with fixed noise, computed on the device of `module` and returned to the CPU."""
    device = next(module.parameters()).device
    return sample(
        stage,
        condition.to(device),
        sampler=DDIMSampler(stage.process),
        timesteps=stage.process.spaced_timesteps(min(num_steps, stage.process.num_timesteps)),
        noise=NoiseSource(torch.Generator().manual_seed(0), len(condition)),
        null=null.select([0] * len(condition)).to(device) if null is not None else None,
        guidance_scale=scale,
    ).cpu()
