"""The options that several commands share, as dataclasses that `expanded` turns into parameters of a command."""

import copy
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import StrEnum
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo, OptionInfo

from unclip.checkpoints.recommended import Recommended
from unclip.cli.messages import say_more
from unclip.errors import InputError
from unclip.pipelines import session
from unclip.settings import SAMPLERS, SETTINGS, Setting

MAX_SEED = 2**64 - 1
MAX_BATCH = 1000


class Dtype(StrEnum):
    """The type of the weights in memory."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class StoredDtype(StrEnum):
    """The type of the weights in a file."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def command(app: typer.Typer, name: str, **more: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that registers a command as `expanded` does; a section "Examples:" ends the docstring and the help.

    Args:
        app: the group of the command.
        name: what is typed.
        more: arguments of `app.command`.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        text, _, lines = (inspect.getdoc(function) or "").partition("\n\nExamples:\n")
        text, epilog = text.partition("\n\nArgs:\n")[0], examples(*textwrap.dedent(lines).splitlines())
        return app.command(name, help=text, epilog=epilog, **more)(expanded(function))

    return register


def expanded(function: Callable[..., None]) -> Callable[..., None]:
    """The function of a command with one parameter for each field of its dataclass parameters.

    The fields are annotated with typer's options, or are such dataclasses; others keep their defaults. `function` is
    called with instances of the dataclasses. Options without a help text have that of the docstring (`described`).
    """
    parameters: list[Parameter] = []

    def add(name: str, kind: Any, default: Any, help: str | None) -> Callable[[dict[str, Any]], Any]:
        """Add the parameters of a kind. Returns: what makes its value from theirs."""
        if not (isinstance(kind, type) and is_dataclass(kind)):
            if get_origin(kind) is Annotated and (info := copy.copy(kind.__metadata__[0])).help is None:
                info.help, kind = help, Annotated[kind.__origin__, info]
            parameters.append(Parameter(name, Parameter.KEYWORD_ONLY, annotation=kind, default=default))
            return lambda given: given[name]
        kinds, parts = get_type_hints(kind, include_extras=True), {}
        texts = {
            name: text for each in reversed(inspect.getmro(kind)) for name, text in described(each.__doc__).items()
        }
        for each in fields(kind):
            if get_origin(kinds[each.name]) is Annotated or is_dataclass(kinds[each.name]):
                default = Parameter.empty if each.default is MISSING else each.default
                parts[each.name] = add(each.name, kinds[each.name], default, texts.get(each.name))
        return lambda given: kind(**{name: make(given) for name, make in parts.items()})

    texts = described(function.__doc__)
    kinds = get_type_hints(function, include_extras=True)
    made = {
        name: add(name, kinds[name], each.default, texts.get(name))
        for name, each in inspect.signature(function).parameters.items()
    }

    @functools.wraps(function)
    def call(**given: Any) -> None:
        function(**{name: make(given) for name, make in made.items()})

    del call.__wrapped__  # typer would read its signature
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def described(docstring: str | None) -> dict[str, str]:
    """The texts of the section "Args:" or "Attributes:" of a docstring, by name."""
    _, _, section = re.sub(r"\n    Attributes:\n", "\n    Args:\n", docstring or "").partition("\n    Args:\n")
    entries = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def examples(*lines: str) -> str:
    """An epilogue of examples, which the help does not wrap."""
    return kept("\n".join(["Examples:", *(f"  {line}" for line in lines)]))


def kept(text: str) -> str:
    """A text whose lines the help does not wrap."""
    return "\n\n".join(f"\b\n{paragraph}" for paragraph in text.split("\n\n"))


def argument(metavar: str, help: str | None = None) -> ArgumentInfo:
    """A positional argument. Without `help` it has the text that the docstring gives."""
    return typer.Argument(metavar=metavar, help=help)


def flag(name: str, help: str | None = None) -> OptionInfo:
    """An option without a value. Without `help` it has the text that the docstring gives."""
    return typer.Option(name, help=help)


def option(
    metavar: str | None, *names: str, help: str | None = None, default: str | None = None, **more: Any
) -> OptionInfo:
    """An option. Without `help` it has the text that the docstring gives.

    The parameter names it unless `names` do; `default` describes a default of None.
    """
    return typer.Option(*names, metavar=metavar, help=help, show_default=default or True, **more)


def shared(metavar: str | None, *names: str, **more: Any) -> OptionInfo:
    """An option whose default may come from an environment variable: UNCLIP_BATCH_SIZE for --batch-size."""
    long = [name.partition("/")[0] for name in names if name.startswith("--")]
    variables = [f"UNCLIP_{name[2:].replace('-', '_').upper()}" for name in long]
    return option(metavar, *names, envvar=variables, show_envvar=False, **more)


def setting(name: str, metavar: str = "N", *, help: str = "", default: str = "", **more: Any) -> OptionInfo:
    """The option of a row of `unclip.settings.SETTINGS`; `help` and `default` replace those of the row."""
    row = SETTINGS[name]
    if row.kind is int and not row.per_stage:
        more |= {"min": row.low, "max": row.high}
    default = default or f"the model's own, else {row.default:g}"
    return shared(metavar, *names_of(row), help=help or row.help, default=default, **more)


def names_of(row: Setting) -> list[str]:
    """The names of a setting's option; the decoder's settings have short ones too, such as --steps."""
    return list(dict.fromkeys([row.option, row.option.replace("decoder-", "")]))


def side(name: str, default: str = "the model's own") -> OptionInfo:
    """The option for a side of the pictures, in pixels."""
    return shared("PX", name, default=default, min=1)


def steps_of_stages(text: str) -> int | list[int]:
    """ "7" as a number, "7,15" as one for each super-resolution stage.

    Raises: BadParameter for anything else, or a number outside the limits.
    """
    row = SETTINGS["super_res_num_inference_steps"]
    try:
        counts = [int(row.parse(part)) for part in text.replace(" ", "").split(",")]
    except InputError:
        raise typer.BadParameter(
            f"{text!r} must be a number from {row.low} to {row.high}, or a list of such numbers, such as 7,15"
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
        raise typer.BadParameter(f"{text!r} must be a number of pixels or WIDTHxHEIGHT, such as 256 or 640x480")
    return int(found[1]), int(found[2] or found[1])


def _quiet(ctx: typer.Context, value: bool) -> bool:
    source = ctx.get_parameter_source("quiet")
    if not value and source is not None and source.name == "COMMANDLINE":
        say_more()
    return value


Model = Annotated[
    str, shared("MODEL", "--model", "-m", help="A model's folder, a hub id (owner/name), or a built-in name.")
]
Seed = Annotated[
    int | None,
    shared(
        "N",
        "--seed",
        help="Seed of the first picture. The next one has N+1, and so on.",
        default="a random one, which is printed",
        min=0,
        max=MAX_SEED,
    ),
]
NumImages = Annotated[int, option("N", "--num-images", "-n", help="Number of pictures.", min=1, max=100_000)]
NumImagesOfEach = Annotated[int, option("N", "--num-images", "-n", help="Pictures for each input.", min=1, max=100_000)]
Negative = Annotated[
    str | None, shared("TEXT", "--negative", "--negative-prompt", help="What the pictures should not show.")
]
Caption = Annotated[
    bool,
    flag("--caption", help="Treat each argument that is not a file as a caption, even if it looks like a file name."),
]
Sampler = Annotated[
    str | None,
    shared(
        "NAME",
        "--sampler",
        help=f"Sampler of all stages: {', '.join(f'{row.name} ({row.help})' for row in SAMPLERS.values())}.",
        default="the model's own",
        parser=sampler_of,
    ),
]
DTYPE = (
    "Type of the weights: float32, bfloat16, float16, or auto: bfloat16 on a CPU that computes it, float16 on other "
    "devices, else float32."
)
DtypeOption = Annotated[Dtype, shared("TYPE", "--dtype", help=DTYPE)]
KeptDtype = Annotated[
    StoredDtype | None,
    option(
        "TYPE",
        "--dtype",
        help="Type of the weights to write: float32, bfloat16 or float16.",
        default="unchanged",
    ),
]
Device = Annotated[
    str, shared("NAME", "--device", help="cpu, cuda, cuda:1, mps or xpu; auto is the accelerator if there is one.")
]
BatchSize = Annotated[
    int, shared("N", "--batch-size", help="Pictures computed at once. Fewer need less memory.", min=1, max=MAX_BATCH)
]
OutFolder = Annotated[
    Path, shared("PATH", "--out", "-o", help="Folder for the pictures, or a .png file for a single one.")
]
Json = Annotated[bool, shared(None, "--json", help="Print one JSON object for each file instead of its path.")]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet/--verbose",
        "-q/-v",
        callback=_quiet,
        envvar="UNCLIP_QUIET",
        show_envvar=False,
        show_default=False,
        help="Print only warnings and errors; or print more: files, device, times.",
    ),
]
NewFolder = Annotated[Path, option("DIR", "--out", "-o", help="The folder to write.")]
OverwriteFolder = Annotated[bool, flag("--overwrite", help="Replace an existing DIR.")]


class _Settings:
    """Options that are rows of `unclip.settings.SETTINGS`."""

    def given(self) -> dict[str, Recommended | None]:
        """The values by the names of a call's arguments; None where the option is not given."""
        options = {row.name: row.option.removeprefix("--").replace("-", "_") for row in SETTINGS.values()}
        return {name: getattr(self, option) for name, option in options.items() if hasattr(self, option)}


def refuse_prior_choice(given: Mapping[str, object], why: str) -> None:
    """Refuse the settings of `PriorChoice` for a command that does not run the prior. Raises: InputError."""
    for name in session.PRIOR_SAMPLING:
        if given.get(name) is not None:
            raise InputError(f"{why}, so the prior is not used: leave out {SETTINGS[name].option}")


@dataclass(frozen=True)
class Decoding(_Settings):
    """Settings of the decoder and of super-resolution."""

    decoder_steps: Annotated[int | None, setting("decoder_num_inference_steps")] = None
    super_res_steps: Annotated[
        str | None, setting("super_res_num_inference_steps", "N[,N]", parser=steps_of_stages)
    ] = None
    decoder_guidance: Annotated[float | None, setting("decoder_guidance_scale", "SCALE")] = None


@dataclass(frozen=True)
class Faster(_Settings):
    """Settings that leave out a part of the computation, and presets.

    Attributes:
        preset: A named set of values that the model's folder has, for all settings that are not given: exact (the
            model's own), or a faster one, such as balanced or fast.
    """

    preset: Annotated[str | None, shared("NAME", "--preset", default="the model's own values")] = None
    decoder_guidance_low: Annotated[float | None, setting("decoder_guidance_low", "LEVEL")] = None
    decoder_guidance_high: Annotated[float | None, setting("decoder_guidance_high", "LEVEL")] = None
    decoder_reuse: Annotated[int | None, setting("decoder_reuse")] = None
    super_res_reuse: Annotated[int | None, setting("super_res_reuse")] = None


@dataclass(frozen=True)
class NoisyDecoding(Faster, Decoding):
    """As `Decoding`, for image embeddings to which noise may be added."""

    noise_level: Annotated[int | None, setting("noise_level")] = None


INVERSION = "Guidance scale of inversion and of the decoder. 1 or less turns guidance off, which reconstructs best."


@dataclass(frozen=True)
class InversionDecoding(Decoding):
    """As `Decoding`, for a picture that is inverted and decoded again."""

    decoder_guidance: Annotated[
        float | None, setting("decoder_guidance_scale", "SCALE", help=INVERSION, default="1")
    ] = None


@dataclass(frozen=True)
class PriorChoice(_Settings):
    """How the prior chooses among its samples."""

    candidates: Annotated[int | None, setting("num_prior_candidates")] = None
    prior_temperature: Annotated[float | None, setting("prior_temperature", "T")] = None
    prior_top_p: Annotated[float | None, setting("prior_top_p", "P")] = None


@dataclass(frozen=True)
class PriorScale(_Settings):
    """How the prior samples."""

    prior_steps: Annotated[int | None, setting("prior_num_inference_steps")] = None
    prior_guidance: Annotated[float | None, setting("prior_guidance_scale", "SCALE")] = None


@dataclass(frozen=True)
class PriorSampling(PriorChoice, PriorScale):
    """All settings of the prior."""


@dataclass(frozen=True)
class Sampling(Faster, Decoding, PriorSampling):
    """All settings of sampling."""


@dataclass(frozen=True)
class Size:
    """Width and height of the pictures.

    Attributes:
        size: Width and height of the pictures, such as 256 or 640x480.
        height: Height of the pictures.
        width: Width of the pictures.
    """

    size: Annotated[str | None, shared("PX[xPX]", "--size", default="the model's own", parser=size_of)] = None
    height: Annotated[int | None, side("--height")] = None
    width: Annotated[int | None, side("--width")] = None

    @property
    def sides(self) -> dict[str, int]:
        """The given sides by the names of a call's arguments. Raises: BadParameter for a side that is given twice."""
        height, width, size = self.height, self.width, self.size
        if size is not None and (height is not None or width is not None):
            raise typer.BadParameter("give either --size, or --height and --width")
        if isinstance(size, tuple):  # the parser's result
            width, height = size
        return {name: side for name, side in (("height", height), ("width", width)) if side is not None}


@dataclass(frozen=True)
class Output:
    """Output files, and the batch size.

    Attributes:
        grid: Also write a sheet of all pictures.
        overwrite: Replace existing files. Otherwise a number is added to the name.
    """

    out: OutFolder = Path(".")
    grid: Annotated[bool, shared(None, "--grid")] = False
    overwrite: Annotated[bool, shared(None, "--overwrite")] = False
    as_json: Json = False
    batch_size: BatchSize = 8


@dataclass(frozen=True)
class Precision(session.Compute):
    """The device and the precision, for commands that need only these."""

    dtype: DtypeOption = Dtype.auto
    device: Device = "auto"


@dataclass(frozen=True)
class ExactPrecision(Precision):
    """As `Precision`, for commands that compute embeddings."""

    dtype: DtypeOption = Dtype.float32


@dataclass(frozen=True)
class Compute(Precision):
    """The device and the precision of the computation.

    Attributes:
        cpu_offload: Keep only the active network on the accelerator: less memory, slower.
        tile: Super-resolution works on tiles of this side: less memory for large pictures, slower.
    """

    cpu_offload: Annotated[bool, shared(None, "--cpu-offload")] = False
    tile: Annotated[int | None, shared("PX", "--tile", default="no tiles", min=1)] = None


@dataclass(frozen=True)
class Common:
    """Options of every command that makes pictures."""

    output: Output
    compute: Compute
    quiet: Quiet = False
