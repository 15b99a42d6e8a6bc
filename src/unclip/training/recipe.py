"""A training run as one typed TOML file.

Knows every setting and its limits; knows nothing of how a step is taken. Called by the trainer, the tasks and
`unclip train`.
"""

import dataclasses
import importlib.util
import math
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from unclip.checkpoints.hub import is_name, resolve
from unclip.data.folder import MAX_SKIPPED_SHARE
from unclip.data.stream import NUM_WORKERS
from unclip.errors import ConfigError, MissingDependencyError

TRACKERS = ("tensorboard", "wandb", "trackio")
ADAPTABLE = ("prior", "prior_autoregressive", "decoder")
"""The stages that [lora] is for."""


def _check(
    section: str,
    settings: Any,
    *,
    above_zero: tuple[str, ...] = (),
    not_negative: tuple[str, ...] = (),
    below_one: tuple[str, ...] = (),
    shares: tuple[str, ...] = (),
) -> None:
    """Raises: ConfigError for a number outside its limits, or one that is none."""
    for names, limits, fits in (
        (above_zero, "above 0", lambda value: value > 0),
        (not_negative, "0 or more", lambda value: value >= 0),
        (below_one, "from 0 to below 1", lambda value: 0 <= value < 1),
        (shares, "from 0 to 1", lambda value: 0 <= value <= 1),
    ):
        for name in names:
            value = getattr(settings, name)
            if not (math.isfinite(value) and fits(value)):
                shown = f"{section}.{name}" if section else name
                raise ConfigError(f"{shown} is {value}; it must be {limits}")


@dataclass(frozen=True)
class OptimizerRecipe:
    """The optimizer, with a linear warm-up, a constant rate and a linear decay over the last part of the run.

    Attributes:
        name: "adamw"; or "muon", which takes AdamW's steps for what is no hidden matrix. The same rates do for both.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup_steps: int = 100
    decay_share: float = 0.2
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        _check("optimizer", self, above_zero=("learning_rate", "eps", "max_grad_norm"), shares=("decay_share",))
        _check("optimizer", self, not_negative=("weight_decay", "warmup_steps"), below_one=("beta1", "beta2"))


@dataclass(frozen=True)
class ProcessRecipe:
    """What a stage learns to undo: see `unclip.diffusion.DiffusionProcess`, which has the same names.

    None is what the recipe does not state; `unclip.training.process.settled` says what that comes to.
    """

    num_timesteps: int | None = None
    beta_schedule: str | None = None
    beta_start: float | None = None
    beta_end: float | None = None
    prediction_type: str | None = None
    variance_type: str | None = None
    clip_range: float | None = None
    weighting: Literal["simple", "min_snr"] = "simple"


@dataclass(frozen=True)
class ClipSettings:
    """CLIP (contrastive) training: the encoders' sizes and the tokenizer's.

    `weight_power` flattens how often pictures are drawn (0: all alike). `include_held_out` is for a judge, which must
    know the concepts that the generating model was never shown. `text_config` and `image_config` are for what has no
    name of its own here, by the keys of transformers' `CLIPTextConfig` and `CLIPVisionConfig`.
    """

    projection_dim: int = 256
    vocabulary_size: int = 4096
    context_length: int = 32
    text_layers: int = 4
    text_heads: int = 4
    image_size: int = 64
    patch_size: int = 8
    image_width: int = 256
    image_layers: int = 6
    image_heads: int = 4
    reconstruction_weight: float = 0.0
    weight_power: float = 0.5
    include_held_out: bool = False
    text_config: dict[str, Any] = field(default_factory=dict)
    image_config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = ("projection_dim", "vocabulary_size", "image_size", "patch_size", "image_width")
        depths = ("text_layers", "text_heads", "image_layers", "image_heads")
        _check("clip", self, above_zero=sizes + depths, not_negative=("reconstruction_weight", "weight_power"))
        if self.context_length < 3:
            raise ConfigError(f"clip.context_length is {self.context_length}; start, end and a word need at least 3")


@dataclass(frozen=True)
class PriorSettings:
    """Diffusion prior: its CLIP (a folder or a name), its network, how often its text is dropped (paper §2.2)."""

    clip: Path | str = Path()
    model: dict[str, Any] = field(default_factory=dict)
    process: ProcessRecipe = ProcessRecipe()
    text_drop: float = 0.1

    def __post_init__(self) -> None:
        _check("prior", self, shares=("text_drop",))


@dataclass(frozen=True)
class AutoregressivePriorSettings:
    """Autoregressive prior (paper §2.2): where its CLIP lies, its network, and how often text and dot product go.

    A dropped text takes its dot product along; `dot_drop` is how often that goes alone, so that a caption which is
    nobody's (a negative one) can be read without it. `code_noise` jitters each component before it becomes a code, in
    units of its spread: a code says its bucket and no more, and neighbours are as good.
    """

    clip: Path | str = Path()
    model: dict[str, Any] = field(default_factory=dict)
    text_drop: float = 0.1
    dot_drop: float = 0.1
    code_noise: float = 0.0

    def __post_init__(self) -> None:
        _check("prior_autoregressive", self, shares=("text_drop", "dot_drop"), not_negative=("code_noise",))


@dataclass(frozen=True)
class DecoderSettings:
    """Decoder: its CLIP (a folder or a name), its networks, how often embedding and caption are dropped (paper §2.1).

    `embedding_noise` jitters the image embedding, in units of each dimension's spread, so that the decoder forgives a
    prior that is a little off.
    """

    clip: Path | str = Path()
    model: dict[str, Any] = field(default_factory=dict)
    text_proj: dict[str, Any] = field(default_factory=dict)
    process: ProcessRecipe = ProcessRecipe()
    text_drop: float = 0.5
    image_drop: float = 0.1
    embedding_noise: float = 0.0

    def __post_init__(self) -> None:
        _check("decoder", self, shares=("text_drop", "image_drop"), not_negative=("embedding_noise",))


@dataclass(frozen=True)
class SuperResSettings:
    """Super-resolution: its network, the input's size, and how the low-resolution input is degraded (paper §2.1).

    With `only_last_step` the network of timestep 0 alone is trained, by `last_loss`: the process's own ("mse"), the
    absolute error of the picture ("l1"), or that and `perceptual_weight` times the distance of the features that the
    frozen network `features` (a CLIP's folder or name, or another image model's) has of it ("perceptual").
    """

    model: dict[str, Any] = field(default_factory=dict)
    process: ProcessRecipe = ProcessRecipe()
    low_res_size: int = 64
    crop_size: int = 64
    blur_sigma: float = 0.6
    blur_share: float = 0.5
    noise: float = 0.0
    only_last_step: bool = False
    last_loss: Literal["mse", "l1", "perceptual"] = "mse"
    features: Path | str | None = None
    perceptual_weight: float = 1.0

    def __post_init__(self) -> None:
        _check("super_res", self, above_zero=("low_res_size", "crop_size", "blur_sigma"), shares=("blur_share",))
        _check("super_res", self, not_negative=("noise", "perceptual_weight"))
        if self.last_loss != "mse" and not self.only_last_step:
            raise ConfigError(
                f"super_res.last_loss is {self.last_loss!r}, which is for the last step's network: set only_last_step, "
                "or leave it out"
            )
        if self.last_loss != "mse" and self.process.weighting != "simple":
            raise ConfigError(
                f"super_res.process.weighting is {self.process.weighting!r}, which weighs the process's own loss; "
                f"super_res.last_loss {self.last_loss!r} has no use for it: leave one of them out"
            )
        if (self.last_loss == "perceptual") != (self.features is not None):
            raise ConfigError(
                "super_res.last_loss 'perceptual' and super_res.features (the folder of a CLIP, or of another image "
                "model) go together"
            )


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters instead of whole weights: their rank, their scale (alpha / rank), and which layers get one."""

    rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")

    def __post_init__(self) -> None:
        _check("lora", self, above_zero=("rank", "alpha"), below_one=("dropout",))


@dataclass(frozen=True)
class Recipe:
    """One training run.

    Attributes:
        stage: which network is trained; the section of that name must be there, the others must not.
        data: a folder of captioned pictures, or a list of such; or tar shards: a folder, a glob, URLs with {000..041}.
        start_from: a model's folder, or its name on the hub; training goes on from its networks of this stage instead
            of fresh ones, under the diffusion process that they learned. A CLIP keeps its sizes and its tokenizer.
        steps: optimizer steps in all; batch_size: pictures a step, over all processes and accumulations.
        precision: "no" is float32.
        compile: compile the networks first (torch.compile): minutes at the start, then faster steps where it helps.
        shard: cut weights, gradients, optimizer state and average over the processes (FSDP), if there are several.
        image_key: under which the data's metadata name a picture; the usual ones are known.
        caption_key: under which they, or the .json of a shard's samples, give the caption; the usual ones are known.
        max_skipped_share: of the pictures or samples that may be broken.
        reader_workers: threads of a process that decode the samples of shards, ahead of the step that needs them.
        trackers: what metrics go to beside metrics.jsonl: "tensorboard", "wandb", "trackio".
        lora: train adapters in the network of `start_from` (a prior or decoder) and leave its own weights.
        ema_decay: of the weights that are kept; warmed up as (1 + step) / (10 + step).
    """

    stage: Literal["clip", "prior", "prior_autoregressive", "decoder", "super_res"]
    data: Path | str | tuple[Path | str, ...]
    start_from: Path | str | None = None
    steps: int = 10_000
    batch_size: int = 64
    accumulation: int = 1
    seed: int = 0
    precision: Literal["no", "bf16", "fp16"] = "bf16"
    compile: bool = False
    shard: bool = False
    image_key: str | None = None
    caption_key: str | None = None
    max_skipped_share: float = MAX_SKIPPED_SHARE
    reader_workers: int = NUM_WORKERS
    trackers: tuple[str, ...] = ()
    ema_decay: float = 0.999
    log_every_steps: int = 50
    save_every_s: float = 600.0
    sample_every_steps: int = 1000
    optimizer: OptimizerRecipe = OptimizerRecipe()
    lora: LoraSettings | None = None
    clip: ClipSettings | None = None
    prior: PriorSettings | None = None
    prior_autoregressive: AutoregressivePriorSettings | None = None
    decoder: DecoderSettings | None = None
    super_res: SuperResSettings | None = None

    def __post_init__(self) -> None:
        for stage in typing.get_args(Recipe.__annotations__["stage"]):
            if (getattr(self, stage) is not None) != (stage == self.stage):
                verb = "needs" if stage == self.stage else "must not have"
                raise ConfigError(f"a recipe for stage {self.stage!r} {verb} a section [{stage}]")
        if self.lora and (self.stage not in ADAPTABLE or not self.start_from):
            raise ConfigError("[lora] is for prior and decoder, and needs start_from: a model to adapt")
        if self.shard and self.optimizer.name == "muon":
            raise ConfigError("shard cuts the matrices that optimizer.name 'muon' needs whole; take 'adamw' with it")
        if self.shard and self.precision == "fp16":
            raise ConfigError("shard goes with precision 'bf16' or 'no'; fp16's loss scale is not shared among shards")
        for name in self.trackers:
            if name not in TRACKERS:
                raise ConfigError(f"trackers has {name!r}; it may have {', '.join(TRACKERS)}")
            if importlib.util.find_spec(name) is None:
                raise MissingDependencyError(f"the tracker {name!r} is not installed: pip install {name}")
        counts = ("steps", "batch_size", "accumulation", "log_every_steps", "sample_every_steps", "reader_workers")
        _check("", self, above_zero=counts, not_negative=("seed", "save_every_s"), below_one=("ema_decay",))
        _check("", self, shares=("max_skipped_share",))
        if self.seed >= 2**64:
            raise ConfigError(f"seed is {self.seed}; it must be below 2**64")
        if self.batch_size % self.accumulation:
            raise ConfigError(f"batch_size {self.batch_size} is no multiple of accumulation {self.accumulation}")


def read_recipe(path: Path, **overrides: Any) -> Recipe:
    """Read a recipe; relative paths in it are taken from the file's own folder.

    Args:
        path: the TOML file.
        overrides: top-level settings that replace the file's (`steps=100`, say); None leaves the file's.

    Raises: ConfigError for a missing file, a broken one, an unknown key or a value of a wrong type.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the recipe {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the recipe {path} is no UTF-8 text (at byte {error.start})") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the recipe {path} is not valid TOML: {error}") from error
    table |= {key: value for key, value in overrides.items() if value is not None}
    return _build(Recipe, table, Path(path).parent, "")


def located(recipe: Recipe) -> Recipe:
    """The recipe with models that it names, on the hub or built in, as the folders they lie in.

    Raises: CheckpointError when a name's model cannot be had.
    """
    changes: dict[str, Any] = {}
    if isinstance(recipe.start_from, str):
        changes["start_from"] = resolve(recipe.start_from)
    settings = getattr(recipe, recipe.stage)
    named = {key: getattr(settings, key, None) for key in ("clip", "features")}
    found = {key: resolve(name) for key, name in named.items() if isinstance(name, str)}
    if found:
        changes[recipe.stage] = dataclasses.replace(settings, **found)
    return dataclasses.replace(recipe, **changes)


def _build(kind: type, table: dict[str, Any], base: Path, where: str, default: Any = None) -> Any:
    """A section of class `kind`: its table laid over `default`, if there is one, else over the class's own defaults."""
    fields = {f.name for f in dataclasses.fields(kind)}
    for key in table:
        if key not in fields:
            raise ConfigError(f"unknown key {where}{key} in the recipe; known here: {', '.join(sorted(fields))}")
    hints = typing.get_type_hints(kind)
    defaults = {f.name: getattr(default, f.name, f.default) for f in dataclasses.fields(kind)}
    values = {key: _value(hints[key], value, base, f"{where}{key}", defaults[key]) for key, value in table.items()}
    if default is not None:
        return dataclasses.replace(default, **values)
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in values
    ]
    if missing:
        raise ConfigError(f"the recipe lacks {', '.join(where + name for name in missing)}")
    return kind(**values)


def _value(hint: Any, value: Any, base: Path, where: str, default: Any = None) -> Any:
    """A setting of type `hint`; a section says only what differs from `default`, if that is one."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        choices = [choice for choice in typing.get_args(hint) if choice is not type(None)]
        return _value(choices[0], value, base, where, default)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"{where} is {value!r}; it must be a section [{where}]")
        below = default if dataclasses.is_dataclass(default) else None
        return _build(typing.cast(type, hint), value, base, f"{where}.", below)
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise ConfigError(f"{where} is {value!r}; it must be one of {', '.join(map(repr, typing.get_args(hint)))}")
        return value
    if hint == tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
            raise ConfigError(f"{where} is {value!r}; it must be a list of texts in quotes")
        return tuple(value)
    if hint is Path:
        if isinstance(value, list) and value and where == "data":
            return tuple(_value(Path, part, base, where) for part in value)
        if not isinstance(value, str) or "\0" in value:
            raise ConfigError(f"{where} is {value!r}; it must be a path in quotes")
        path = base / Path(value).expanduser()
        is_model = where.rpartition(".")[2] in ("clip", "start_from", "features")
        return value if "://" in value or (is_model and is_name(value) and not path.exists()) else path
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = typing.get_origin(hint) or hint
    if plain is dict and not isinstance(value, dict):
        raise ConfigError(f"{where} is {value!r}; it must be a section [{where}]")
    if not isinstance(value, plain) or (plain is int and isinstance(value, bool)):
        raise ConfigError(f"{where} is {value!r}; it must be {plain.__name__}")
    return value


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON-able data, for the run folder."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if v is not None}
        if isinstance(value, tuple):
            return [plain(part) for part in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(recipe))
