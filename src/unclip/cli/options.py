"""The options that several commands share, as dataclasses that `expanded` turns into parameters of a command."""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_origin, get_type_hints

import typer

from unclip.checkpoints.recommended import Recommended
from unclip.cli.messages import say_more
from unclip.errors import InputError
from unclip.pipelines import session
from unclip.settings import SAMPLERS, SETTINGS

MAX_SEED = 2**64 - 1
MAX_BATCH = 1000


class Dtype(StrEnum):
    """The type of the weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """A command with one parameter for each field of its dataclass parameters.

    The fields are annotated with typer's options; a field that is not keeps its default. `command` is called with
    instances of the dataclasses.
    """
    parameters: list[inspect.Parameter] = []
    blocks: dict[str, tuple[Any, list[str]]] = {}

    def add(name: str, annotation: Any, default: Any) -> None:
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
        )

    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        block = hints[name]
        if not is_dataclass(block):
            add(name, block, parameter.default)
            continue
        annotations = get_type_hints(block, include_extras=True)
        shown = [field for field in fields(block) if get_origin(annotations[field.name]) is Annotated]
        for field in shown:
            add(
                field.name,
                annotations[field.name],
                inspect.Parameter.empty if field.default is MISSING else field.default,
            )
        blocks[name] = block, [field.name for field in shown]

    @functools.wraps(command)
    def call(**given: Any) -> None:
        built = {name: block(**{field: given.pop(field) for field in names}) for name, (block, names) in blocks.items()}
        command(**built, **given)

    del call.__wrapped__  # typer would read its signature
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def examples(*lines: str) -> str:
    """An epilogue of examples that the help leaves as they are."""
    return kept("\n".join(["Examples:", *(f"  {line}" for line in lines)]))


def kept(text: str) -> str:
    """A text whose lines the help leaves as they are."""
    return "\n\n".join(f"\b\n{paragraph}" for paragraph in text.split("\n\n"))


def shared(*names: str, **words: Any) -> typer.models.OptionInfo:
    """An option whose default may come from an environment variable: UNCLIP_BATCH_SIZE for --batch-size."""
    long = [name.partition("/")[0] for name in names if name.startswith("--")]
    variables = [f"UNCLIP_{name[2:].replace('-', '_').upper()}" for name in long]
    return typer.Option(*names, envvar=variables, show_envvar=False, **words)


def setting(name: str, **words: Any) -> typer.models.OptionInfo:
    """The option of a row of `unclip.settings.SETTINGS`."""
    row = SETTINGS[name]
    if row.kind is int and not row.per_stage:
        words = {"min": row.low, "max": row.high, "metavar": "N", **words}
    words = {"help": row.help, "show_default": f"the model's own, else {row.default:g}", **words}
    return shared(*names_of(row.option), **words)


def names_of(option: str) -> list[str]:
    """The names of a setting's option; the decoder's settings have short ones too, such as --steps."""
    return [option] + [option.replace("decoder-", "")] * ("decoder-" in option)


def side(name: str, what: str, default: str) -> typer.models.OptionInfo:
    """The option for a side of the pictures, in pixels."""
    return shared(name, min=1, metavar="PX", help=what, show_default=default)


def steps_of_stages(text: str) -> int | list[int]:
    """ "7" as a number, "7,15" as one for each super-resolution stage.

    Raises: BadParameter for anything else, or a number outside the limits.
    """
    row = SETTINGS["super_res_num_inference_steps"]
    try:
        counts = [int(row.parse(part)) for part in text.replace(" ", "").split(",")]
    except InputError:
        raise typer.BadParameter(
            f"{text!r} is not a number from {row.low} to {row.high}, nor a list of such numbers, as in 7,15"
        ) from None
    return counts[0] if len(counts) == 1 else counts


def sampler_of(text: str) -> str:
    """The name of a sampler. Raises: BadParameter for an unknown one."""
    if text not in SAMPLERS:
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(map(repr, SAMPLERS))}")
    return text


def size_of(text: str) -> tuple[int, int]:
    """ "256" as (256, 256), "640x480" as width and height. Raises: BadParameter for anything else."""
    found = re.fullmatch(r"([1-9][0-9]{0,5})(?:[x×]([1-9][0-9]{0,5}))?", text.strip().lower())
    if not found:
        raise typer.BadParameter(f"{text!r} is not a number of pixels, nor WIDTHxHEIGHT, such as 256 or 640x480")
    return int(found[1]), int(found[2] or found[1])


def _quiet(ctx: typer.Context, value: bool) -> bool:
    source = ctx.get_parameter_source("quiet")
    if not value and source is not None and source.name == "COMMANDLINE":
        say_more()
    return value


Model = Annotated[
    str,
    shared("--model", "-m", metavar="MODEL", help="A model's folder, a hub id (owner/name), or a built-in name."),
]
Seed = Annotated[
    int | None,
    shared(
        "--seed",
        min=0,
        max=MAX_SEED,
        metavar="N",
        help="Seed of the first picture. The next one has N+1, and so on.",
        show_default="a random one, which is printed",
    ),
]
NumImages = Annotated[
    int, typer.Option("--num-images", "-n", min=1, max=100_000, metavar="N", help="Number of pictures.")
]
NumImagesOfEach = Annotated[
    int, typer.Option("--num-images", "-n", min=1, max=100_000, metavar="N", help="Pictures for each input.")
]
Negative = Annotated[
    str | None,
    shared("--negative", "--negative-prompt", metavar="TEXT", help="What the pictures should not show."),
]
Caption = Annotated[
    bool,
    typer.Option(
        "--caption", help="Treat each argument that is not a file as a caption, even if it looks like a file name."
    ),
]
DecoderSteps = Annotated[int | None, setting("decoder_num_inference_steps")]
SuperResSteps = Annotated[str | None, setting("super_res_num_inference_steps", parser=steps_of_stages, metavar="N[,N]")]
DecoderGuidance = Annotated[float | None, setting("decoder_guidance_scale", metavar="SCALE")]
InversionGuidance = Annotated[
    float | None,
    setting(
        "decoder_guidance_scale",
        metavar="SCALE",
        help="Guidance scale of inversion and of the decoder. 1 or less turns guidance off, which reconstructs best.",
        show_default="1",
    ),
]
PriorSteps = Annotated[int | None, setting("prior_num_inference_steps")]
PriorGuidance = Annotated[float | None, setting("prior_guidance_scale", metavar="SCALE")]
Candidates = Annotated[int | None, setting("num_prior_candidates")]
PriorTemperature = Annotated[float | None, setting("prior_temperature", metavar="T")]
PriorTopP = Annotated[float | None, setting("prior_top_p", metavar="P")]
Sampler = Annotated[
    str | None,
    shared(
        "--sampler",
        parser=sampler_of,
        metavar="NAME",
        help=f"Sampler of all stages: {', '.join(f'{row.name} ({row.help})' for row in SAMPLERS.values())}.",
        show_default="the model's own",
    ),
]
DtypeOption = Annotated[
    Dtype, shared("--dtype", metavar="TYPE", help="Type of the weights: float32, bfloat16 or float16.")
]
KeptDtype = Annotated[
    Dtype | None,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help="Type of the weights to write: float32, bfloat16 or float16.",
        show_default="the type that they have",
    ),
]
Device = Annotated[
    str,
    shared("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps or xpu; auto is the accelerator if there is one."),
]
BatchSize = Annotated[
    int,
    shared(
        "--batch-size", min=1, max=MAX_BATCH, metavar="N", help="Pictures computed at once. Fewer need less memory."
    ),
]
OutFolder = Annotated[
    Path,
    shared("--out", "-o", metavar="PATH", help="Folder for the pictures, or a .png file for a single one."),
]
Json = Annotated[bool, shared("--json", help="Print one JSON object for each file instead of its path.")]
Quiet = Annotated[
    bool,
    shared(
        "--quiet/--verbose",
        "-q/-v",
        callback=_quiet,
        show_default=False,
        help="Print only warnings and errors; or print more: files, device, times.",
    ),
]
NewFolder = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder to write.")]
OverwriteFolder = Annotated[bool, typer.Option("--overwrite", help="Replace an existing DIR.")]


class _Settings:
    """Options that are rows of `unclip.settings.SETTINGS`."""

    def given(self) -> dict[str, Recommended | None]:
        """The values by the names of a call's arguments; None where the option is not given."""
        options = {row.name: row.option.removeprefix("--").replace("-", "_") for row in SETTINGS.values()}
        return {name: getattr(self, option) for name, option in options.items() if hasattr(self, option)}


def refuse_prior_choice(given: Mapping[str, object], why: str) -> None:
    """For a command whose prior does not run. Raises: InputError for a given setting of `PriorChoice`."""
    for name in session.PRIOR_SAMPLING:
        if given.get(name) is not None:
            raise InputError(f"{why}, so the prior does not run: leave out {SETTINGS[name].option}")


@dataclass(frozen=True)
class Decoding(_Settings):
    """Settings of the decoder and of super-resolution."""

    decoder_steps: DecoderSteps = None
    super_res_steps: SuperResSteps = None
    decoder_guidance: DecoderGuidance = None


@dataclass(frozen=True)
class InversionDecoding(Decoding):
    """The same for a picture that is inverted and decoded again."""

    decoder_guidance: InversionGuidance = None


@dataclass(frozen=True)
class PriorChoice(_Settings):
    """Which of its samples the prior takes."""

    candidates: Candidates = None
    prior_temperature: PriorTemperature = None
    prior_top_p: PriorTopP = None


@dataclass(frozen=True)
class PriorSampling(_Settings):
    """All settings of the prior."""

    prior_steps: PriorSteps = None
    prior_guidance: PriorGuidance = None
    candidates: Candidates = None
    prior_temperature: PriorTemperature = None
    prior_top_p: PriorTopP = None


@dataclass(frozen=True)
class Sampling(Decoding, PriorSampling):
    """All settings of sampling."""


@dataclass(frozen=True)
class Size:
    """Width and height of the pictures."""

    size: Annotated[
        str | None,
        shared(
            "--size",
            parser=size_of,
            metavar="PX[xPX]",
            help="Width and height of the pictures, such as 256 or 640x480.",
            show_default="the model's own",
        ),
    ] = None
    height: Annotated[int | None, side("--height", "Height of the pictures.", "the model's own")] = None
    width: Annotated[int | None, side("--width", "Width of the pictures.", "the model's own")] = None

    @property
    def sides(self) -> dict[str, int]:
        """The given sides by the names of a call's arguments. Raises: BadParameter for a side that is given twice."""
        height, width, size = self.height, self.width, self.size
        if size is not None and (height is not None or width is not None):
            raise typer.BadParameter("give --size, or --height and --width")
        if isinstance(size, tuple):  # the parser's result
            width, height = size
        return {name: side for name, side in (("height", height), ("width", width)) if side is not None}


@dataclass(frozen=True)
class Output:
    """Where pictures go, and how many are made at once."""

    out: OutFolder = Path(".")
    grid: Annotated[bool, shared("--grid", help="Also write a sheet of all pictures.")] = False
    overwrite: Annotated[
        bool, shared("--overwrite", help="Replace existing files. Otherwise a number is added to the name.")
    ] = False
    as_json: Json = False
    batch_size: BatchSize = 8


@dataclass(frozen=True)
class Precision(session.Compute):
    """The device and the precision, for commands that need no more."""

    dtype: DtypeOption = Dtype.float32
    device: Device = "auto"


@dataclass(frozen=True)
class Compute(Precision):
    """Where a model computes, and in which precision."""

    cpu_offload: Annotated[
        bool, shared("--cpu-offload", help="Keep only the active network on the accelerator: less memory, slower.")
    ] = False
    tile: Annotated[
        int | None,
        shared(
            "--tile",
            min=1,
            metavar="PX",
            help="Super-resolution works on tiles of this side: less memory for large pictures, slower.",
            show_default="no tiles",
        ),
    ] = None
