"""The options that several commands share: names, limits, help texts, environment variables."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from unclip.cli.messages import say_more
from unclip.pipelines.session import Dtype, SamplerName

MAX_SEED = 2**64 - 1
MAX_STEPS = 1000
MAX_BATCH = 1000


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


def names_of(stage_option: str) -> list[str]:
    """The names of a stage's option; the decoder's has the short one that people try first, as in `--steps`."""
    return [f"--{stage_option}"] + [f"--{stage_option.removeprefix('decoder-')}"] * stage_option.startswith("decoder-")


def steps(name: str, what: str) -> typer.models.OptionInfo:
    """The option for the number of steps of one stage."""
    return shared(
        *names_of(f"{name}-steps"),
        min=1,
        max=MAX_STEPS,
        metavar="N",
        help=f"Denoising steps {what}.",
        show_default="the model's own",
    )


def guidance(name: str, what: str) -> typer.models.OptionInfo:
    """The option for the guidance scale of one stage."""
    return shared(
        *names_of(f"{name}-guidance"),
        metavar="SCALE",
        help=f"How strongly the {what}; 1 or less turns guidance off.",
        show_default="the model's own",
    )


def side(name: str, what: str, default: str) -> typer.models.OptionInfo:
    """The option for a side of the pictures, in pixels."""
    return shared(name, min=1, metavar="PX", help=what, show_default=default)


def candidates(what: str, *, default: str = "the model's own, or 1") -> typer.models.OptionInfo:
    """The option for the candidates of the prior."""
    return shared("--candidates", min=1, max=1000, metavar="N", help=what, show_default=default)


def steps_of_stages(text: str) -> int | list[int]:
    """ "7" as a number, "7,15" as one for each super-resolution stage.

    Raises: BadParameter for anything else, or a number outside 1 to 1000.
    """
    counts = [int(part) if part.isascii() and part.isdigit() else 0 for part in text.replace(" ", "").split(",")]
    if not all(1 <= count <= MAX_STEPS for count in counts):
        raise typer.BadParameter(
            f"{text!r} is not a number from 1 to {MAX_STEPS}, nor such numbers with commas between"
        )
    return counts[0] if len(counts) == 1 else counts


def size_of(text: str) -> tuple[int, int]:
    """ "256" as (256, 256), "640x480" as width and height. Raises: BadParameter for anything else."""
    found = re.fullmatch(r"([1-9][0-9]{0,5})(?:[x×]([1-9][0-9]{0,5}))?", text.strip().lower())
    if not found:
        raise typer.BadParameter(f"{text!r} is not a number of pixels, nor WIDTHxHEIGHT, such as 256 or 640x480")
    return int(found[1]), int(found[2] or found[1])


def sides(size: Any, height: int | None, width: int | None) -> dict[str, int]:
    """The sides that were given, by the names of a call's arguments. Raises: BadParameter for a side given twice."""
    if size is not None and (height is not None or width is not None):
        raise typer.BadParameter("give --size, or --height and --width")
    if size is not None:
        width, height = size
    return {name: side for name, side in (("height", height), ("width", width)) if side is not None}


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
        help="Seed of the first picture; the next one has N+1, and so on.",
        show_default="a fresh one, which is told",
    ),
]
DecoderSteps = Annotated[int | None, steps("decoder", "of the decoder, which draws the small picture")]
SuperResSteps = Annotated[
    str | None,
    shared(
        "--super-res-steps",
        parser=steps_of_stages,
        metavar="N[,N]",
        help="Denoising steps of super-resolution, which makes it large; with commas, of each of its stages.",
        show_default="the model's own",
    ),
]
DecoderGuidance = Annotated[float | None, guidance("decoder", "small picture is pushed towards its conditions")]
Candidates = Annotated[
    int | None, candidates("Ideas that the prior draws for each picture; the one closest to the caption is kept.")
]
PriorTemperature = Annotated[
    float | None,
    shared(
        "--prior-temperature",
        metavar="T",
        help="Of an autoregressive prior: below 1 its ideas are more typical, at 0 always the likeliest.",
        show_default="the model's own, or 1",
    ),
]
PriorTopP = Annotated[
    float | None,
    shared(
        "--prior-top-p",
        metavar="P",
        help="Of an autoregressive prior: draw from the likeliest codes alone, whose chances make up P.",
        show_default="the model's own, or 1",
    ),
]
KeptGuidance = Annotated[
    float | None,
    shared(
        *names_of("decoder-guidance"),
        metavar="SCALE",
        help="Guidance of inverting and decoding; 1 or less: none, which brings pictures back best.",
        show_default="1",
    ),
]
Negative = Annotated[
    str | None,
    shared("--negative", "--negative-prompt", metavar="TEXT", help="What guidance pushes away from: what not to show."),
]
Caption = Annotated[
    bool,
    typer.Option(
        "--caption", help="Take each argument that is not a file for a caption, even if it looks like a file's name."
    ),
]
Sampler = Annotated[
    SamplerName | None,
    shared(
        "--sampler",
        metavar="NAME",
        help="How steps are taken: ancestral, ddim or dpm (good with few steps).",
        show_default="the model's own",
    ),
]
DtypeOption = Annotated[
    Dtype, shared("--dtype", metavar="TYPE", help="The weights' type: float32, bfloat16 or float16.")
]
KeptDtype = Annotated[
    Dtype | None,
    typer.Option("--dtype", metavar="TYPE", help="Write float32, bfloat16 or float16.", show_default="as they are"),
]
Device = Annotated[
    str,
    shared(
        "--device", metavar="NAME", help="Where to compute: cpu, cuda, cuda:1, mps or xpu; auto: the best there is."
    ),
]
Height = Annotated[int | None, side("--height", "Height of the pictures.", "the model's own")]
Width = Annotated[int | None, side("--width", "Width of the pictures.", "the model's own")]
Size = Annotated[
    str | None,
    shared(
        "--size",
        parser=size_of,
        metavar="PX[xPX]",
        help="Width and height of the pictures, as 256 or 640x480.",
        show_default="the model's own",
    ),
]
Tile = Annotated[
    int | None,
    shared(
        "--tile",
        min=1,
        metavar="PX",
        help="Super-resolution sees larger pictures in tiles of this side: less memory, slower.",
        show_default="as a whole",
    ),
]
CpuOffload = Annotated[
    bool, shared("--cpu-offload", help="Keep only the network at work on the accelerator: less memory, slower.")
]
BatchSize = Annotated[
    int,
    shared(
        "--batch-size", min=1, max=MAX_BATCH, metavar="N", help="Pictures computed at once; fewer need less memory."
    ),
]
OutFolder = Annotated[
    Path,
    shared("--out", "-o", metavar="PATH", help="Folder for the pictures, or a .png file for a single one."),
]
Grid = Annotated[bool, shared("--grid", help="Also write a sheet of all pictures.")]
OverwritePictures = Annotated[
    bool, shared("--overwrite", help="Replace files of the same name; otherwise a number is added to the name.")
]
Json = Annotated[bool, shared("--json", help="Print JSON on stdout instead, one object a line.")]
Quiet = Annotated[
    bool,
    shared(
        "--quiet/--verbose",
        "-q/-v",
        callback=_quiet,
        show_default=False,
        help="No progress bars and no notes, only warnings and errors; or also details: files, device, times.",
    ),
]
NewFolder = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder to write.")]
OverwriteFolder = Annotated[bool, typer.Option("--overwrite", help="Replace DIR as a whole if it is there.")]
