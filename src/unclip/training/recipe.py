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
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from unclip.checkpoints.files import file_size
from unclip.checkpoints.hub import is_name, resolve
from unclip.data.batches import NUM_WORKERS
from unclip.data.folder import MAX_SKIPPED_SHARE
from unclip.data.shards import check_ranges
from unclip.errors import CheckpointError, ConfigError, DataError, MissingDependencyError
from unclip.models.component import MAX_CHANNELS, MAX_LAYERS

TRACKERS = ("tensorboard", "wandb", "trackio")
ADAPTABLE = ("prior", "prior_autoregressive", "decoder")
"""The stages that [lora] is for."""
TEACHABLE = ("clip", "prior", "decoder")
"""The stages that [teacher] is for."""


MAX_RECIPE_BYTES, MAX_LINE = 2**16, 2**14
"""Of a recipe's file, and of its lines, in characters: Python's parser takes time in the square of a dotted name."""
MAX_DEPTH = 16
MAX_SIDE_PX = 8192
LEAST_VOCABULARY = 514
"""Of a tokenizer: every byte, alone and at the end of a word, and the start and end tokens."""
MAX_TEXT = 4096
"""Of a text in a recipe, in characters: as long as a path may be."""


@dataclass(frozen=True)
class Limits:
    """The numbers that a setting may be, or how many entries a list may have."""

    low: float = 0
    high: float = math.inf
    above: bool = False
    below: bool = False

    def allow(self, value: float) -> bool:
        """Whether `value` is one of them; NaN never is."""
        is_high = value > self.low if self.above else value >= self.low
        return is_high and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        low, high = (f"{limit:,}" if isinstance(limit, int) else f"{limit:g}" for limit in (self.low, self.high))
        return f"{'above' if self.above else 'from'} {low} {'to below' if self.below else 'to'} {high}"


FREE = "free"
"""Marks a setting of a stage, or of its adapters, that may change when a run goes on: the others belong to what the
weights were trained as."""

Count = Annotated[int, Limits(1, 1_000_000_000)]
Width = Annotated[int, Limits(1, MAX_CHANNELS)]
Depth = Annotated[int, Limits(1, MAX_LAYERS)]
Share = Annotated[float, Limits(0, 1)]
FreeShare = Annotated[float, Limits(0, 1), FREE]
BelowOne = Annotated[float, Limits(0, 1, below=True)]
Positive = Annotated[float, Limits(0, 1_000_000, above=True)]
FreeWeight = Annotated[float, Limits(0, 1_000_000), FREE]


class Section:
    """A part of a recipe. Its annotations say the limits of its numbers."""

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


def settled_settings(recipe: "Recipe") -> dict[str, Any]:
    """The settings of the stage and of its adapters that a run keeps, by their full names ("clip.text_heads")."""
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
    """The optimizer, with a linear warm-up, a constant rate and a linear decay over the last part of the run.

    Attributes:
        name: "adamw"; or "muon", which takes AdamW's steps for what is no hidden matrix. The same rates do for both.
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
    """What a stage learns to undo: see `unclip.diffusion.DiffusionProcess`, which has the same names.

    None is what the recipe does not state; `unclip.training.task.settled` says what that comes to.
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
    """CLIP (contrastive) training: the encoders' sizes and the tokenizer's.

    `weight_power` flattens how often pictures are drawn (0: all alike). `include_held_out` is for a judge, which must
    know the concepts that the generating model was never shown. `text_config` and `image_config` are for what has no
    name of its own here, by the keys of transformers' `CLIPTextConfig` and `CLIPVisionConfig`. `image_from` names a
    CLIP whose image encoder is taken and stays as it is, so that the text encoder alone is trained (locked-image
    tuning, arXiv 2111.07991); what was trained in its space stays usable.
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
                "clip.reconstruction_weight trains the image encoder, which clip.image_from keeps as it is"
            )


@dataclass(frozen=True)
class PriorSettings(Section):
    """Diffusion prior: its CLIP (a folder or a name), its network, how often its text is dropped (paper §2.2)."""

    SECTION: ClassVar[str] = "prior"

    clip: Annotated[Path | str, FREE] = Path()
    model: dict[str, Any] = field(default_factory=dict)
    process: ProcessRecipe = ProcessRecipe()
    text_drop: FreeShare = 0.1


@dataclass(frozen=True)
class AutoregressivePriorSettings(Section):
    """Autoregressive prior (paper §2.2): where its CLIP lies, its network, and how often text and dot product go.

    A dropped text takes its dot product along; `dot_drop` is how often that goes alone, so that a caption which is
    nobody's (a negative one) can be read without it. `code_noise` jitters each component before it becomes a code, in
    units of its spread: a code says its bucket and no more, and neighbours are as good.
    """

    SECTION: ClassVar[str] = "prior_autoregressive"

    clip: Annotated[Path | str, FREE] = Path()
    model: dict[str, Any] = field(default_factory=dict)
    text_drop: FreeShare = 0.1
    dot_drop: FreeShare = 0.1
    code_noise: FreeWeight = 0.0


@dataclass(frozen=True)
class DecoderSettings(Section):
    """Decoder: its CLIP (a folder or a name), its networks, how often embedding and caption are dropped (paper §2.1).

    `embedding_noise` jitters the image embedding, in units of each dimension's spread, so that the decoder forgives a
    prior that is a little off. With `forget_text` a decoder that was trained with another text encoder (that of the
    model `start_from`) begins as if every caption were empty, and learns the new one's captions from there.
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
    """Super-resolution: its network, the input's size, and how the low-resolution input is degraded (paper §2.1).

    With `only_last_step` the network of timestep 0 alone is trained, by `last_loss`: the process's own ("mse"), the
    absolute error of the picture ("l1"), or that and `perceptual_weight` times the distance of the features that the
    frozen network `features` (a CLIP's folder or name, or another image model's) has of it ("perceptual").
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
class LoraSettings(Section):
    """Low-rank adapters instead of whole weights: their rank, their scale (alpha / rank), and which layers get one."""

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
    """A sentence encoder that says which pictures a phrase is close to, and phrases for it to read.

    Attributes:
        encoder: a folder that transformers' `AutoModel` and `AutoTokenizer` read.
        phrases: a text file of one phrase a line, or of JSON objects with `text`, and maybe `means` (texts that the
            teacher reads instead) and `concepts` (of the data set). Without it, the pictures' captions are the phrases.
        share: of the rows of a prior's or a decoder's batch, how many are phrases with pictures drawn by the teacher.
        temperature: by which similarities (cosines) are divided before they become a distribution over pictures.
        named_bonus: what is added to the similarity of a picture whose concept the phrase names.
        weight, similarity_weight: of CLIP's losses: the cross-entropy with the teacher's distribution over pictures,
            and one minus the cosine to the teacher's own embedding, which a small head reads out of the text's.
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
class Recipe(Section):
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
        teacher: for a CLIP (with clip.image_from), a prior or a decoder, trained on folders.
        ema_decay: of the weights that are kept; warmed up as (1 + step) / (10 + step).
    """

    stage: Literal["clip", "prior", "prior_autoregressive", "decoder", "super_res"]
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
        for stage in typing.get_args(Recipe.__annotations__["stage"]):
            if (getattr(self, stage) is not None) != (stage == self.stage):
                verb = "needs" if stage == self.stage else "must not have"
                raise ConfigError(f"a recipe for stage {self.stage!r} {verb} a section [{stage}]")
        if self.lora and (self.stage not in ADAPTABLE or not self.start_from):
            raise ConfigError("[lora] is for prior and decoder, and needs start_from: a model to adapt")
        if self.teacher and self.stage not in TEACHABLE:
            raise ConfigError(f"[teacher] is for the stages {', '.join(TEACHABLE)}, not {self.stage!r}")
        if self.teacher and self.clip and self.clip.image_from is None:
            raise ConfigError("[teacher] needs clip.image_from: a CLIP whose pictures' embeddings stay as they are")
        if self.decoder and self.decoder.forget_text and self.start_from is None:
            raise ConfigError("decoder.forget_text is for a decoder that was trained before: name it with start_from")
        if self.shard and self.optimizer.name == "muon":
            raise ConfigError("shard cuts the matrices that optimizer.name 'muon' needs whole; take 'adamw' with it")
        if self.shard and self.precision == "fp16":
            raise ConfigError("shard goes with precision 'bf16' or 'no'; fp16's loss scale is not shared among shards")
        for name in self.trackers:
            if name not in TRACKERS:
                raise ConfigError(f"trackers has {name!r}; it may have {', '.join(TRACKERS)}")
            if importlib.util.find_spec(name) is None:
                raise MissingDependencyError(f"the tracker {name!r} is not installed: pip install {name}")
        if self.batch_size % self.accumulation:
            raise ConfigError(f"batch_size {self.batch_size} is no multiple of accumulation {self.accumulation}")


def read_recipe(path: Path, **overrides: Any) -> Recipe:
    """Read a recipe; relative paths in it are taken from the file's own folder.

    Args:
        path: the TOML file.
        overrides: top-level settings that replace the file's (`steps=100`, say); None leaves the file's.

    Raises: ConfigError for a missing or broken file, an unknown key, and a value of a wrong type or outside its limits.
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
    except ValueError as error:  # tomllib's own, and Python's for a number of thousands of digits
        raise ConfigError(f"the recipe {path} is not valid TOML: {error!s:.200}") from error
    _check_plain(table)
    table |= {key: value for key, value in overrides.items() if value is not None}
    return _build(Recipe, table, path.parent, "")


def _check_plain(table: dict[str, Any]) -> None:
    """Raises: ConfigError for what no setting can be: infinite, above 64 bits, very long, nested deeply, or a date."""
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
            raise ConfigError(f"{where} is a date or a time; no setting is one")
        elif not math.isfinite(value) if isinstance(value, float) else abs(value) > 2**64:
            shown = f"{value}" if isinstance(value, float) else f"a number of {value.bit_length()} bits"
            raise ConfigError(f"{where} is {shown}; it must be finite, and of 64 bits at most")


def located(recipe: Recipe) -> Recipe:
    """The recipe with models that it names, on the hub or built in, as the folders they lie in.

    Raises: CheckpointError when a name's model cannot be had.
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
    """A section of class `kind`: its table laid over `default`, if there is one, else over the class's own defaults."""
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
    """A setting of type `hint`; a section says only what differs from `default`, if that is one."""
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
    """The recipe as plain JSON-able data, for the run folder."""
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
    """Nested tables as one, its keys with dots."""
    single: dict[str, Any] = {}
    for key, value in table.items():
        single |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return single
