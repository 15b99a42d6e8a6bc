"""The recipe of a training run: a TOML file with typed settings, their limits and defaults; and the table of tasks."""

import dataclasses
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from unclip.checkpoints.files import read_toml
from unclip.checkpoints.hub import resolve
from unclip.data.batches import NUM_WORKERS
from unclip.data.folder import MAX_SKIPPED_SHARE
from unclip.diffusion.process import DiffusionProcess
from unclip.errors import MissingDependencyError
from unclip.limits import Range
from unclip.models.component import MAX_CHANNELS, MAX_LAYERS
from unclip.training.sections import DATA, FREE, MODEL, Section, flat, refuse

MAX_SIDE_PX = 8192
LEAST_VOCABULARY = 514
"""The smallest vocabulary of a tokenizer: each byte, alone and at a word's end, and the start and end tokens."""

Count = Annotated[int, Range(1, 1_000_000_000)]
Width = Annotated[int, Range(1, MAX_CHANNELS)]
Depth = Annotated[int, Range(1, MAX_LAYERS)]
Side = Annotated[int, Range(1, MAX_SIDE_PX)]
Share = Annotated[float, Range(0, 1)]
FreeShare = Annotated[float, Range(0, 1), FREE]
BelowOne = Annotated[float, Range(0, 1, below=True)]
Positive = Annotated[float, Range(1e-9, 1_000_000)]
Weight = Annotated[float, Range(0, 1_000_000)]
FreeWeight = Annotated[float, Range(0, 1_000_000), FREE]
Clip = Annotated[Path | str, MODEL, FREE]


@dataclass(frozen=True)
class OptimizerRecipe(Section, name="optimizer"):
    """The optimizer. Its learning rate warms up linearly, is constant, and decays linearly.

    Attributes:
        name: "adamw" or "muon". Muon updates hidden matrices; the other parameters are updated as by AdamW. The same
            learning rates suit both.
        decay_share: the share of the steps in which the learning rate decays.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: Annotated[float, Range(1e-12, 1000)] = 3e-4
    beta1: BelowOne = 0.9
    beta2: BelowOne = 0.99
    eps: Annotated[float, Range(1e-20, 1)] = 1e-8
    weight_decay: Annotated[float, Range(0, 1000)] = 0.01
    warmup_steps: Annotated[int, Range(0, 1_000_000_000)] = 100
    decay_share: Share = 0.2
    max_grad_norm: Positive = 1.0


@dataclass(frozen=True)
class ProcessRecipe(Section, name="process"):
    """The diffusion process of a stage, with the names of `unclip.diffusion.DiffusionProcess`.

    None means that the recipe does not set a value; `unclip.training.task.settled` replaces it by the default.
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
class ClipSettings(Section, name="clip"):
    """CLIP (contrastive) training: the sizes of the encoders and of the tokenizer.

    Attributes:
        weight_power: exponent of the pictures' sampling weights; with 0, all pictures are equally likely.
        include_held_out: also train on held-out concepts, for a CLIP that evaluates generated pictures.
        image_from: a CLIP (a folder or a name) whose image encoder is used unchanged, so that only the text encoder is
            trained (locked-image tuning, arXiv 2111.07991). Models trained in its embedding space stay usable.
        text_config, image_config: further settings, by the keys of transformers' `CLIPTextConfig` and
            `CLIPVisionConfig`.
    """

    projection_dim: Width = 256
    vocabulary_size: Annotated[int, Range(LEAST_VOCABULARY, 1_000_000)] = 4096
    context_length: Annotated[int, Range(3, MAX_CHANNELS)] = 32
    text_layers: Depth = 4
    text_heads: Width = 4
    image_size: Side = 64
    patch_size: Side = 8
    image_width: Width = 256
    image_layers: Depth = 6
    image_heads: Width = 4
    reconstruction_weight: FreeWeight = 0.0
    weight_power: Annotated[float, Range(0, 10), FREE] = 0.5
    include_held_out: bool = False
    image_from: Annotated[Path | str | None, MODEL] = None
    text_config: dict[str, Any] = field(default_factory=dict)
    image_config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        learns = self.image_from is not None and self.reconstruction_weight
        refuse(learns, "clip.reconstruction_weight trains the image encoder, which clip.image_from freezes: remove one")


@dataclass(frozen=True)
class PriorSettings(Section, name="prior"):
    """Diffusion prior (paper §2.2).

    Attributes:
        clip: the frozen CLIP, a folder or a name.
        model: settings of the network.
        text_drop: the probability that the caption is dropped.
    """

    clip: Clip = Path()
    model: dict[str, Any] = field(default_factory=dict)
    process: ProcessRecipe = ProcessRecipe()
    text_drop: FreeShare = 0.1


@dataclass(frozen=True)
class ConditionSettings(Section, name="condition"):
    """What a prior is conditioned on instead of captions. `data` of the recipe is then a file of image embeddings.

    Attributes:
        kind: "vector": one vector for each image embedding. "tokens": several vectors [rows, tokens, width].
        file: the conditions, in the order of the embeddings; a file or folder as `unclip.read_embeddings` reads it. A
            list of files is several conditions at once: their vectors are joined in this order.
        key: the array or the column of each file.
        drop: the probability that a condition is dropped, for guidance; of several ones, each by itself.
        held_out: this many rows at the end are not used for training.
    """

    file: Annotated[Path | str | tuple[Path | str, ...], DATA]
    kind: Literal["vector", "tokens"] = "vector"
    key: str | None = None
    drop: FreeShare = 0.1
    held_out: Annotated[int, Range(0, 1_000_000_000)] = 0


@dataclass(frozen=True)
class AutoregressivePriorSettings(Section, name="prior_autoregressive"):
    """Autoregressive prior (paper §2.2).

    Attributes:
        clip: the frozen CLIP, a folder or a name.
        model: settings of the network.
        text_drop: the probability that the caption and the dot product are dropped.
        dot_drop: the probability that the dot product alone is dropped. It is needed for negative prompts, which have
            no dot product.
        code_noise: noise added to each component before quantization, in standard deviations of the component.
    """

    clip: Clip = Path()
    model: dict[str, Any] = field(default_factory=dict)
    text_drop: FreeShare = 0.1
    dot_drop: FreeShare = 0.1
    code_noise: FreeWeight = 0.0


@dataclass(frozen=True)
class DecoderSettings(Section, name="decoder"):
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

    clip: Clip = Path()
    model: dict[str, Any] = field(default_factory=dict)
    text_proj: dict[str, Any] = field(default_factory=dict)
    process: ProcessRecipe = ProcessRecipe()
    text_drop: FreeShare = 0.5
    image_drop: FreeShare = 0.1
    embedding_noise: FreeWeight = 0.0
    forget_text: Annotated[bool, FREE] = False


@dataclass(frozen=True)
class SuperResSettings(Section, name="super_res"):
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

    model: dict[str, Any] = field(default_factory=dict)
    process: ProcessRecipe = ProcessRecipe()
    low_res_size: Side = 64
    crop_size: Annotated[int, Range(1, MAX_SIDE_PX), FREE] = 64
    blur_sigma: Annotated[float, Range(0.01, 100), FREE] = 0.6
    blur_share: FreeShare = 0.5
    noise: FreeWeight = 0.0
    only_last_step: bool = False
    last_loss: Annotated[Literal["mse", "l1", "perceptual"], FREE] = "mse"
    features: Annotated[Path | str | None, MODEL, FREE] = None
    perceptual_weight: FreeWeight = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.last_loss != "mse":
            what = f"super_res.last_loss {self.last_loss!r}"
            refuse(not self.only_last_step, f"{what} needs only_last_step: set it, or remove last_loss")
            weighting = self.process.weighting
            refuse(weighting != "simple", f"super_res.process.weighting is {weighting!r}, but {what} has no weighting")
        is_perceptual, has_features = self.last_loss == "perceptual", self.features is not None
        refuse(is_perceptual != has_features, "super_res.last_loss 'perceptual' and super_res.features need each other")


LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")


@dataclass(frozen=True)
class LoraSettings(Section, name="lora"):
    """Low-rank adapters (LoRA), trained in place of the full weights.

    Attributes:
        alpha: the adapters are scaled by alpha / rank.
        targets: names of the layers that get an adapter.
    """

    rank: Width = 8
    alpha: Positive = 8.0
    dropout: Annotated[float, Range(0, 1, below=True), FREE] = 0.0
    targets: Annotated[tuple[str, ...], Range(1, 1000)] = LORA_TARGETS


@dataclass(frozen=True)
class TeacherSettings(Section, name="teacher"):
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

    encoder: Path = Path()
    phrases: Path | None = None
    share: Share = 0.5
    temperature: Positive = 0.04
    named_bonus: Annotated[float, Range(0, 1000)] = 0.15
    weight: Weight = 1.0
    similarity_weight: Weight = 1.0


@dataclass(frozen=True)
class TaskRow:
    """What a recipe can train: a row of `TASKS`.

    Attributes:
        settings: the class of the stage's section in a recipe. Its `SECTION` is the name of the stage. If it has the
            setting `clip`, the networks are trained in the embedding space of this frozen CLIP.
        task: the task's class as "module:class" in `unclip.training`; `unclip.training.task.make_task` imports it.
        process: the default diffusion process; None if the stage has none.
        sections: the optional sections that a recipe for this stage may have.
    """

    settings: type[Section]
    task: str
    process: DiffusionProcess | None = None
    sections: tuple[str, ...] = ()


PRIOR_PROCESS = DiffusionProcess(prediction_type="sample", clip_range=5.0)
DECODER_PROCESS = DiffusionProcess(variance_type="learned_range")
ROWS = (
    TaskRow(ClipSettings, "clip:ClipTask", sections=("teacher",)),
    TaskRow(PriorSettings, "diffusion:PriorTask", PRIOR_PROCESS, ("lora", "teacher", "condition")),
    TaskRow(AutoregressivePriorSettings, "prior_autoregressive:AutoregressivePriorTask", sections=("lora",)),
    TaskRow(DecoderSettings, "diffusion:DecoderTask", DECODER_PROCESS, ("lora", "teacher")),
    TaskRow(SuperResSettings, "diffusion:SuperResTask", DiffusionProcess()),
)
TASKS = {row.settings.SECTION: row for row in ROWS}
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
        condition: a prior on vectors or tokens instead of captions; [prior] then has no `clip` and no `text_drop`.
        teacher: only for data in folders; a CLIP also needs clip.image_from.
    """

    stage: str
    data: Annotated[Path | str | tuple[Path | str, ...], DATA]
    start_from: Annotated[Path | str | None, MODEL] = None
    steps: Count = 10_000
    batch_size: Count = 64
    accumulation: Count = 1
    seed: Annotated[int, Range(0, 2**64 - 1)] = 0
    precision: Literal["no", "bf16", "fp16"] = "bf16"
    compile: bool = False
    shard: bool = False
    image_key: str | None = None
    caption_key: str | None = None
    max_skipped_share: Share = MAX_SKIPPED_SHARE
    reader_workers: Annotated[int, Range(1, 1024)] = NUM_WORKERS
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    ema_decay: BelowOne = 0.999
    log_every_steps: Count = 50
    save_every_s: Annotated[float, Range(0, 1_000_000_000)] = 600.0
    sample_every_steps: Count = 1000
    optimizer: OptimizerRecipe = OptimizerRecipe()
    lora: LoraSettings | None = None
    teacher: TeacherSettings | None = None
    condition: ConditionSettings | None = None
    clip: ClipSettings | None = None
    prior: PriorSettings | None = None
    prior_autoregressive: AutoregressivePriorSettings | None = None
    decoder: DecoderSettings | None = None
    super_res: SuperResSettings | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        stage, clip, decoder = self.stage, self.clip, self.decoder
        refuse(stage not in TASKS, f"stage is {stage!r:.80}; it must be one of {', '.join(map(repr, TASKS))}")
        for name in TASKS:
            is_given, verb = getattr(self, name) is not None, "needs" if name == stage else "must not have"
            refuse(is_given != (name == stage), f"a recipe for stage {stage!r} {verb} a section [{name}]")
        for name in ("lora", "teacher", "condition"):
            allowed = [stage for stage, task in TASKS.items() if name in task.sections]
            is_wrong = getattr(self, name) and stage not in allowed
            refuse(is_wrong, f"[{name}] is for the stages {', '.join(allowed)}, not {stage!r}")
        if self.start_from is None:
            refuse(self.lora, "[lora] needs start_from: a model to adapt")
            refuse(decoder and decoder.forget_text, "decoder.forget_text needs start_from: a trained decoder")
        is_learned = clip is not None and clip.image_from is None
        refuse(self.teacher and is_learned, "[teacher] needs clip.image_from: a CLIP with a frozen image encoder")
        refuse(self.condition and self.teacher, "[condition] replaces the captions, which [teacher] needs: remove one")
        if self.shard:
            refuse(self.optimizer.name == "muon", "shard does not work with optimizer.name 'muon'; use 'adamw'")
            refuse(self.precision == "fp16", "shard does not work with precision 'fp16'; use 'bf16' or 'no'")
        is_uneven = self.batch_size % self.accumulation
        refuse(is_uneven, f"batch_size {self.batch_size} is not a multiple of accumulation {self.accumulation}")
        for name in self.trackers:
            if importlib.util.find_spec(name) is None:
                raise MissingDependencyError(f"the tracker {name!r} is not installed: pip install {name}")


def read_recipe(path: Path, **overrides: Any) -> Recipe:
    """Read a recipe. Relative paths in it are relative to the folder of the file.

    Args:
        path: the TOML file.
        overrides: top-level settings that replace those of the file (for example, `steps=100`), unless None.

    Raises: ConfigError for a missing or broken file, an unknown key, or a value of a wrong type or outside its limits.
    """
    path = Path(path)
    table = read_toml(path) | {key: value for key, value in overrides.items() if value is not None}
    return Recipe.read(table, path.parent)


def located(recipe: Recipe) -> Recipe:
    """The recipe with the folders of models in place of their names; they are downloaded if necessary.

    Raises: CheckpointError when a model is not available.
    """

    def found(section: Any) -> Any:
        models = {key: getattr(section, key) for key in section.marked(MODEL)}
        folders = {key: resolve(model) for key, model in models.items() if isinstance(model, str)}
        return dataclasses.replace(section, **folders)

    return dataclasses.replace(found(recipe), **{recipe.stage: found(getattr(recipe, recipe.stage))})


def fixed_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings of the stage and of [lora] that a run must keep, by their full names ("clip.text_heads")."""
    kept: dict[str, Any] = {}
    for name in (recipe.stage, "lora"):
        if (section := getattr(recipe, name)) is not None:
            free = section.marked(FREE)
            kept |= flat({name: {key: value for key, value in section.as_dict().items() if key not in free}})
    return kept
