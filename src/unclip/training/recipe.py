"""The recipe of a training run: a TOML file with typed settings, their limits and defaults; and the table of tasks."""

import dataclasses
import importlib.util
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from unclip.checkpoints.files import file_size
from unclip.checkpoints.hub import is_name, resolve
from unclip.data.batches import NUM_WORKERS
from unclip.data.folder import MAX_SKIPPED_SHARE
from unclip.data.shards import check_ranges
from unclip.diffusion.process import DiffusionProcess
from unclip.errors import CheckpointError, ConfigError, DataError, MissingDependencyError
from unclip.models.component import MAX_CHANNELS, MAX_LAYERS

TRACKERS = ("tensorboard", "wandb", "trackio")
MAX_RECIPE_BYTES, MAX_LINE = 2**16, 2**14
"""Limits of a recipe's file in bytes and of a line in characters: parsing dotted names is quadratic."""
MAX_DEPTH = 16
MAX_SIDE_PX = 8192
LEAST_VOCABULARY = 514
"""The smallest vocabulary of a tokenizer: each byte, alone and at a word's end, and the start and end tokens."""
MAX_TEXT = 4096
"""The longest text in a recipe, in characters."""


@dataclass(frozen=True)
class Limits:
    """The range of a number, or of the length of a list."""

    low: float = 0
    high: float = math.inf
    above: bool = False
    below: bool = False

    def allow(self, value: float) -> bool:
        """Whether `value` is in the range. NaN is not."""
        is_high = value > self.low if self.above else value >= self.low
        return is_high and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        low, high = (f"{limit:,}" if isinstance(limit, int) else f"{limit:g}" for limit in (self.low, self.high))
        return f"{'above' if self.above else 'from'} {low} {'to below' if self.below else 'to'} {high}"


FREE = "free"
"""Marks a setting of a stage or of [lora] that may change when a run is resumed. The other settings are fixed."""

Count = Annotated[int, Limits(1, 1_000_000_000)]
Width = Annotated[int, Limits(1, MAX_CHANNELS)]
Depth = Annotated[int, Limits(1, MAX_LAYERS)]
Share = Annotated[float, Limits(0, 1)]
FreeShare = Annotated[float, Limits(0, 1), FREE]
BelowOne = Annotated[float, Limits(0, 1, below=True)]
Positive = Annotated[float, Limits(0, 1_000_000, above=True)]
FreeWeight = Annotated[float, Limits(0, 1_000_000), FREE]


class Section:
    """A part of a recipe. The annotations of its fields contain their limits."""

    SECTION: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Raises: ConfigError for a value outside its limits."""
        for name, hint in typing.get_type_hints(type(self), include_extras=True).items():
            for limits in getattr(hint, "__metadata__", ()):
                value = getattr(self, name, None)
                if not isinstance(limits, Limits) or value is None:
                    continue
                where = f"{self.SECTION}.{name}" if self.SECTION else name
                if isinstance(value, tuple) and not limits.allow(len(value)):
                    raise ConfigError(f"{where} has {len(value)} entries; there must be {limits}")
                if not isinstance(value, tuple) and not limits.allow(value):
                    raise ConfigError(f"{where} is {value}; it must be {limits}")


def fixed_settings(recipe: "Recipe") -> dict[str, Any]:
    """The settings of the stage and of [lora] that a run must keep, by their full names ("clip.text_heads")."""
    kept: dict[str, Any] = {}
    for name in (recipe.stage, "lora"):
        section = getattr(recipe, name)
        if section is not None:
            hints = typing.get_type_hints(type(section), include_extras=True)
            free = {key for key, hint in hints.items() if FREE in getattr(hint, "__metadata__", ())}
            kept |= flat({name: {key: value for key, value in _plain(section).items() if key not in free}})
    return kept


@dataclass(frozen=True)
class OptimizerRecipe(Section):
    """The optimizer. Its learning rate warms up linearly, is constant, and decays linearly.

    Attributes:
        name: "adamw" or "muon". Muon updates hidden matrices; the other parameters are updated as by AdamW. The same
            learning rates suit both.
        decay_share: the share of the steps in which the learning rate decays.
    """

    SECTION: ClassVar[str] = "optimizer"

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: Annotated[float, Limits(0, 1000, above=True)] = 3e-4
    beta1: BelowOne = 0.9
    beta2: BelowOne = 0.99
    eps: Annotated[float, Limits(1e-20, 1)] = 1e-8
    weight_decay: Annotated[float, Limits(0, 1000)] = 0.01
    warmup_steps: Annotated[int, Limits(0, 1_000_000_000)] = 100
    decay_share: Share = 0.2
    max_grad_norm: Positive = 1.0


@dataclass(frozen=True)
class ProcessRecipe(Section):
    """The diffusion process of a stage, with the names of `unclip.diffusion.DiffusionProcess`.

    None means that the recipe does not set a value; `unclip.training.task.settled` replaces it by the default.
    """

    SECTION: ClassVar[str] = "process"

    num_timesteps: int | None = None
    beta_schedule: str | None = None
    beta_start: float | None = None
    beta_end: float | None = None
    prediction_type: str | None = None
    variance_type: str | None = None
    clip_range: Annotated[float | None, Limits(0, 1_000_000, above=True)] = None
    weighting: Literal["simple", "min_snr"] = "simple"


@dataclass(frozen=True)
class ClipSettings(Section):
    """CLIP (contrastive) training: the sizes of the encoders and of the tokenizer.

    Attributes:
        weight_power: exponent of the pictures' sampling weights; with 0, all pictures are equally likely.
        include_held_out: also train on held-out concepts, for a CLIP that evaluates generated pictures.
        image_from: a CLIP (a folder or a name) whose image encoder is used unchanged, so that only the text encoder is
            trained (locked-image tuning, arXiv 2111.07991). Models trained in its embedding space stay usable.
        text_config, image_config: further settings, by the keys of transformers' `CLIPTextConfig` and
            `CLIPVisionConfig`.
    """

    SECTION: ClassVar[str] = "clip"

    projection_dim: Width = 256
    vocabulary_size: Annotated[int, Limits(LEAST_VOCABULARY, 1_000_000)] = 4096
    context_length: Annotated[int, Limits(3, MAX_CHANNELS)] = 32
    text_layers: Depth = 4
    text_heads: Width = 4
    image_size: Annotated[int, Limits(1, MAX_SIDE_PX)] = 64
    patch_size: Annotated[int, Limits(1, MAX_SIDE_PX)] = 8
    image_width: Width = 256
    image_layers: Depth = 6
    image_heads: Width = 4
    reconstruction_weight: FreeWeight = 0.0
    weight_power: Annotated[float, Limits(0, 10), FREE] = 0.5
    include_held_out: bool = False
    image_from: Path | str | None = None
    text_config: dict[str, Any] = field(default_factory=dict)
    image_config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_from is not None and self.reconstruction_weight:
            raise ConfigError(
                "clip.reconstruction_weight trains the image encoder, but clip.image_from freezes it: remove one"
            )


@dataclass(frozen=True)
class PriorSettings(Section):
    """Diffusion prior (paper §2.2).

    Attributes:
        clip: the frozen CLIP, a folder or a name.
        model: settings of the network.
        text_drop: the probability that the caption is dropped.
    """

    SECTION: ClassVar[str] = "prior"

    clip: Annotated[Path | str, FREE] = Path()
    model: dict[str, Any] = field(default_factory=dict)
    process: ProcessRecipe = ProcessRecipe()
    text_drop: FreeShare = 0.1


@dataclass(frozen=True)
class AutoregressivePriorSettings(Section):
    """Autoregressive prior (paper §2.2).

    Attributes:
        clip: the frozen CLIP, a folder or a name.
        model: settings of the network.
        text_drop: the probability that the caption and the dot product are dropped.
        dot_drop: the probability that the dot product alone is dropped. It is needed for negative prompts, which have
            no dot product.
        code_noise: noise added to each component before quantization, in standard deviations of the component.
    """

    SECTION: ClassVar[str] = "prior_autoregressive"

    clip: Annotated[Path | str, FREE] = Path()
    model: dict[str, Any] = field(default_factory=dict)
    text_drop: FreeShare = 0.1
    dot_drop: FreeShare = 0.1
    code_noise: FreeWeight = 0.0


@dataclass(frozen=True)
class DecoderSettings(Section):
    """Decoder (paper §2.1).

    Attributes:
        clip: the frozen CLIP, a folder or a name.
        model, text_proj: settings of the networks.
        text_drop, image_drop: the probabilities that the caption and the image embedding are dropped.
        embedding_noise: noise added to the image embedding, in standard deviations of each dimension. It makes the
            decoder robust against errors of the prior.
        forget_text: the decoder of `start_from` was trained with another text encoder: start as if every caption were
            empty, and learn captions from there.
    """

    SECTION: ClassVar[str] = "decoder"

    clip: Annotated[Path | str, FREE] = Path()
    model: dict[str, Any] = field(default_factory=dict)
    text_proj: dict[str, Any] = field(default_factory=dict)
    process: ProcessRecipe = ProcessRecipe()
    text_drop: FreeShare = 0.5
    image_drop: FreeShare = 0.1
    embedding_noise: FreeWeight = 0.0
    forget_text: Annotated[bool, FREE] = False


@dataclass(frozen=True)
class SuperResSettings(Section):
    """Super-resolution (paper §2.1).

    Attributes:
        model: settings of the network.
        low_res_size, crop_size: side of the input, and of the training crops of the output, in pixels.
        blur_sigma, blur_share, noise: degradation of the input: the blur's standard deviation in pixels, the share of
            blurred pictures, and the largest standard deviation of the added noise.
        only_last_step: train only the network of timestep 0.
        last_loss: its loss: that of the process ("mse"), the absolute error of the picture ("l1"), or "perceptual": the
            absolute error plus `perceptual_weight` times the distance between features of a frozen network.
        features: the frozen network: a CLIP (a folder or a name), or the folder of another image model.
    """

    SECTION: ClassVar[str] = "super_res"

    model: dict[str, Any] = field(default_factory=dict)
    process: ProcessRecipe = ProcessRecipe()
    low_res_size: Annotated[int, Limits(1, MAX_SIDE_PX)] = 64
    crop_size: Annotated[int, Limits(1, MAX_SIDE_PX), FREE] = 64
    blur_sigma: Annotated[float, Limits(0.01, 100), FREE] = 0.6
    blur_share: FreeShare = 0.5
    noise: FreeWeight = 0.0
    only_last_step: bool = False
    last_loss: Annotated[Literal["mse", "l1", "perceptual"], FREE] = "mse"
    features: Annotated[Path | str | None, FREE] = None
    perceptual_weight: FreeWeight = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.last_loss != "mse" and not self.only_last_step:
            raise ConfigError(
                f"super_res.last_loss {self.last_loss!r} is for the network of the last step: set only_last_step, or "
                "remove last_loss"
            )
        if self.last_loss != "mse" and self.process.weighting != "simple":
            raise ConfigError(
                f"super_res.process.weighting is {self.process.weighting!r}, but super_res.last_loss "
                f"{self.last_loss!r} has no weighting: remove one of them"
            )
        if (self.last_loss == "perceptual") != (self.features is not None):
            raise ConfigError(
                "super_res.last_loss 'perceptual' and super_res.features (the folder of a CLIP, or of another image "
                "model) need each other: set both, or neither"
            )


@dataclass(frozen=True)
class LoraSettings(Section):
    """Low-rank adapters (LoRA), trained in place of the full weights.

    Attributes:
        alpha: the adapters are scaled by alpha / rank.
        targets: names of the layers that get an adapter.
    """

    SECTION: ClassVar[str] = "lora"

    rank: Width = 8
    alpha: Positive = 8.0
    dropout: Annotated[float, Limits(0, 1, below=True), FREE] = 0.0
    targets: Annotated[tuple[str, ...], Limits(1, 1000)] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_k_proj",
        "add_v_proj",
    )


@dataclass(frozen=True)
class TeacherSettings(Section):
    """A sentence encoder as a teacher: it selects pictures for phrases that are not captions.

    Attributes:
        encoder: a folder that transformers' `AutoModel` and `AutoTokenizer` load.
        phrases: a text file with one phrase per line, or one JSON object per line with `text` and optionally `means`
            (texts that the teacher reads instead) and `concepts` (of the data set). Default: the captions.
        share: the share of phrases in a batch of a prior or a decoder; the other rows are captions.
        temperature: the cosine similarities are divided by it before the softmax over pictures.
        named_bonus: added to the similarity of a picture if the phrase names its concept.
        weight, similarity_weight: weights of two losses of CLIP: the cross-entropy with the teacher's distribution over
            pictures, and one minus the cosine similarity to the teacher's embedding, which a small head predicts.
    """

    SECTION: ClassVar[str] = "teacher"

    encoder: Path = Path()
    phrases: Path | None = None
    share: Share = 0.5
    temperature: Positive = 0.04
    named_bonus: Annotated[float, Limits(0, 1000)] = 0.15
    weight: Annotated[float, Limits(0, 1_000_000)] = 1.0
    similarity_weight: Annotated[float, Limits(0, 1_000_000)] = 1.0


@dataclass(frozen=True)
class TaskRow:
    """What a recipe can train: a row of `TASKS`.

    Attributes:
        settings: the class of the stage's section in a recipe. Its `SECTION` is the name of the stage.
        task: the task's class as "module:class"; `unclip.training.task.make_task` imports it.
        process: the default diffusion process; None if the stage has none.
        sections: the optional sections that a recipe for this stage may have.
        uses_clip: whether the networks are trained in the embedding space of a frozen CLIP.
    """

    settings: type[Section]
    task: str
    process: DiffusionProcess | None = None
    sections: tuple[str, ...] = ()
    uses_clip: bool = False


TASKS = {
    row.settings.SECTION: row
    for row in (
        TaskRow(ClipSettings, "unclip.training.clip:ClipTask", sections=("teacher",)),
        TaskRow(
            PriorSettings,
            "unclip.training.diffusion:PriorTask",
            DiffusionProcess(prediction_type="sample", clip_range=5.0),
            sections=("lora", "teacher"),
            uses_clip=True,
        ),
        TaskRow(
            AutoregressivePriorSettings,
            "unclip.training.prior_autoregressive:AutoregressivePriorTask",
            sections=("lora",),
            uses_clip=True,
        ),
        TaskRow(
            DecoderSettings,
            "unclip.training.diffusion:DecoderTask",
            DiffusionProcess(variance_type="learned_range"),
            sections=("lora", "teacher"),
            uses_clip=True,
        ),
        TaskRow(SuperResSettings, "unclip.training.diffusion:SuperResTask", DiffusionProcess()),
    )
}
"""The training tasks by the name of their stage."""


@dataclass(frozen=True)
class Recipe(Section):
    """One training run.

    Attributes:
        stage: which network is trained: a name in `TASKS`. The recipe must have the section of that name, and no
            section of another stage.
        data: a folder of captioned pictures, or a list of folders; or tar shards: a folder, a glob, or a URL with
            {000..041}.
        start_from: a model's folder, or its name on the hub. Training starts from its networks of this stage, with
            their diffusion process. A CLIP keeps its sizes and its tokenizer.
        steps: total number of optimizer steps.
        batch_size: pictures per step, over all processes and accumulations.
        precision: "no" is float32.
        compile: compile the networks with torch.compile; this takes minutes at the start.
        shard: shard weights, gradients, optimizer state and average over the processes (FSDP), if there are several.
        image_key: the key of a picture's file name in the metadata; common keys are recognised.
        caption_key: the key of the caption in the metadata, or in a sample's .json; common keys are recognised.
        max_skipped_share: the share of pictures or samples that may be unreadable.
        reader_workers: threads per process that decode the samples of shards.
        trackers: where metrics are sent, in addition to metrics.jsonl: "tensorboard", "wandb", "trackio".
        ema_decay: decay of the moving average of the weights, at most (1 + step) / (10 + step).
        lora: train adapters in the network of `start_from`, and keep its weights.
        teacher: only for data in folders; a CLIP also needs clip.image_from.
    """

    stage: str
    data: Path | str | tuple[Path | str, ...]
    start_from: Path | str | None = None
    steps: Count = 10_000
    batch_size: Count = 64
    accumulation: Count = 1
    seed: Annotated[int, Limits(0, 2**64 - 1)] = 0
    precision: Literal["no", "bf16", "fp16"] = "bf16"
    compile: bool = False
    shard: bool = False
    image_key: str | None = None
    caption_key: str | None = None
    max_skipped_share: Share = MAX_SKIPPED_SHARE
    reader_workers: Annotated[int, Limits(1, 1024)] = NUM_WORKERS
    trackers: tuple[str, ...] = ()
    ema_decay: BelowOne = 0.999
    log_every_steps: Count = 50
    save_every_s: Annotated[float, Limits(0, 1_000_000_000)] = 600.0
    sample_every_steps: Count = 1000
    optimizer: OptimizerRecipe = OptimizerRecipe()
    lora: LoraSettings | None = None
    teacher: TeacherSettings | None = None
    clip: ClipSettings | None = None
    prior: PriorSettings | None = None
    prior_autoregressive: AutoregressivePriorSettings | None = None
    decoder: DecoderSettings | None = None
    super_res: SuperResSettings | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage not in TASKS:
            raise ConfigError(f"stage is {self.stage!r:.80}; it must be one of {', '.join(map(repr, TASKS))}")
        for stage in TASKS:
            if (getattr(self, stage) is not None) != (stage == self.stage):
                verb = "needs" if stage == self.stage else "must not have"
                raise ConfigError(f"a recipe for stage {self.stage!r} {verb} a section [{stage}]")
        for section in ("lora", "teacher"):
            allowed = [stage for stage, task in TASKS.items() if section in task.sections]
            if getattr(self, section) and self.stage not in allowed:
                raise ConfigError(f"[{section}] is for the stages {', '.join(allowed)}, not {self.stage!r}")
        if self.lora and not self.start_from:
            raise ConfigError("[lora] needs start_from: a model to adapt")
        if self.teacher and self.clip and self.clip.image_from is None:
            raise ConfigError("[teacher] needs clip.image_from: a CLIP whose image encoder is frozen")
        if self.decoder and self.decoder.forget_text and self.start_from is None:
            raise ConfigError("decoder.forget_text needs start_from: a decoder that was trained before")
        if self.shard and self.optimizer.name == "muon":
            raise ConfigError("shard does not work with optimizer.name 'muon', which needs whole matrices; use 'adamw'")
        if self.shard and self.precision == "fp16":
            raise ConfigError("shard does not work with precision 'fp16'; use 'bf16' or 'no'")
        for name in self.trackers:
            if name not in TRACKERS:
                raise ConfigError(f"trackers has {name!r}; it may have {', '.join(TRACKERS)}")
            if importlib.util.find_spec(name) is None:
                raise MissingDependencyError(f"the tracker {name!r} is not installed: pip install {name}")
        if self.batch_size % self.accumulation:
            raise ConfigError(f"batch_size {self.batch_size} is not a multiple of accumulation {self.accumulation}")


def read_recipe(path: Path, **overrides: Any) -> Recipe:
    """Read a recipe. Relative paths in it are relative to the folder of the file.

    Args:
        path: the TOML file.
        overrides: top-level settings that replace those of the file (for example, `steps=100`), unless None.

    Raises: ConfigError for a missing or broken file, an unknown key, or a value of a wrong type or outside its limits.
    """
    path = Path(path)
    try:
        if (size_bytes := file_size(path)) > MAX_RECIPE_BYTES:
            raise ConfigError(f"the recipe {path} has {size_bytes:,} bytes; at most {MAX_RECIPE_BYTES:,} are read")
        text = path.read_text(encoding="utf-8-sig")
        if max(map(len, text.split("\n"))) > MAX_LINE:
            raise ConfigError(f"the recipe {path} has a line of more than {MAX_LINE:,} characters")
        table = tomllib.loads(text)
    except (OSError, CheckpointError) as error:
        raise ConfigError(f"the recipe {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the recipe {path} is not UTF-8 text (at byte {error.start})") from error
    except RecursionError as error:
        raise ConfigError(f"the recipe {path} is nested too deeply") from error
    except ValueError as error:  # of tomllib, or of Python for a number with thousands of digits
        raise ConfigError(f"the recipe {path} is not valid TOML: {error!s:.200}") from error
    _check_plain(table)
    table |= {key: value for key, value in overrides.items() if value is not None}
    return _build(Recipe, table, path.parent, "")


def _check_plain(table: dict[str, Any]) -> None:
    """Raises: ConfigError for a value that no setting takes: infinite, too large, too long, too nested, or a date."""
    found: list[tuple[str, Any, int]] = [(key, value, 1) for key, value in table.items()]
    while found:
        where, value, depth = found.pop()
        if len(where) > MAX_TEXT or depth > MAX_DEPTH:
            raise ConfigError(f"{where:.80}… is nested too deeply in the recipe, or its name is too long")
        if isinstance(value, dict):
            found += [(f"{where}.{key}", part, depth + 1) for key, part in value.items()]
        elif isinstance(value, list):
            found += [(where, part, depth + 1) for part in value]
        elif isinstance(value, str):
            if len(value) > MAX_TEXT:
                raise ConfigError(f"{where} is a text of {len(value):,} characters; at most {MAX_TEXT:,} are allowed")
        elif not isinstance(value, int | float):
            raise ConfigError(f"{where} is a date or a time; no setting takes one")
        elif not math.isfinite(value) if isinstance(value, float) else abs(value) > 2**64:
            shown = f"{value}" if isinstance(value, float) else f"a number of {value.bit_length()} bits"
            raise ConfigError(f"{where} is {shown}; it must be finite and have at most 64 bits")


def located(recipe: Recipe) -> Recipe:
    """The recipe with the folders of models in place of their names; they are downloaded if necessary.

    Raises: CheckpointError when a model is not available.
    """
    changes: dict[str, Any] = {}
    if isinstance(recipe.start_from, str):
        changes["start_from"] = resolve(recipe.start_from)
    settings = getattr(recipe, recipe.stage)
    named = {key: getattr(settings, key, None) for key in ("clip", "features", "image_from")}
    found = {key: resolve(name) for key, name in named.items() if isinstance(name, str)}
    if found:
        changes[recipe.stage] = dataclasses.replace(settings, **found)
    return dataclasses.replace(recipe, **changes)


def _build(kind: type, table: dict[str, Any], base: Path, where: str, default: Any = None) -> Any:
    """A section of class `kind`. What its table does not set comes from `default`, or else from the class."""
    fields = {f.name for f in dataclasses.fields(kind)}
    for key in table:
        if key not in fields:
            raise ConfigError(f"unknown key {where}{key:.80} in the recipe; known here: {', '.join(sorted(fields))}")
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
    """A setting of type `hint`. For a section, `default` supplies what its table does not set."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        choices = [choice for choice in typing.get_args(hint) if choice is not type(None)]
        return _value(choices[0], value, base, where, default)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"{where} is {value!r:.80}; it must be a section [{where}]")
        below = default if dataclasses.is_dataclass(default) else None
        return _build(typing.cast(type, hint), value, base, f"{where}.", below)
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise ConfigError(f"{where} is {value!r:.80}; it must be one of {', '.join(map(repr, choices))}")
        return value
    if hint == tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
            raise ConfigError(f"{where} is {value!r:.80}; it must be a list of texts in quotes")
        return tuple(value)
    if hint is Path:
        if isinstance(value, list) and value and where == "data":
            return tuple(_value(Path, part, base, where) for part in value)
        if not isinstance(value, str) or "\0" in value:
            raise ConfigError(f"{where} is {value!r:.80}; it must be a path in quotes")
        try:
            path = base / Path(value).expanduser()
            if where == "data":
                check_ranges(value)
        except RuntimeError as error:
            raise ConfigError(f"{where} is {value!r:.80}; that home folder does not exist") from error
        except DataError as error:
            raise ConfigError(f"{where}: {error}") from error
        is_model = where.rpartition(".")[2] in ("clip", "start_from", "features", "image_from")
        return value if "://" in value or (is_model and is_name(value) and not path.exists()) else path
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = typing.get_origin(hint) or hint
    if plain is dict and not isinstance(value, dict):
        raise ConfigError(f"{where} is {value!r:.80}; it must be a section [{where}]")
    if not isinstance(value, plain) or (plain is int and isinstance(value, bool)):
        raise ConfigError(f"{where} is {value!r:.80}; it must be {plain.__name__}")
    return value


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON data, for the run's folder."""
    return _plain(recipe)


def _plain(section: Section) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if v is not None}
        if isinstance(value, tuple | list):
            return [plain(part) for part in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(section))  # pyright: ignore[reportArgumentType]


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one table with dotted keys."""
    single: dict[str, Any] = {}
    for key, value in table.items():
        single |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return single
