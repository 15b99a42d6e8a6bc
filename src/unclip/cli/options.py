"""The options that several commands share, each described once.

Knows names, limits and help texts; knows not what an option does. Called by the commands' signatures.
"""

from pathlib import Path
from typing import Annotated

import typer

from unclip.pipelines.session import Dtype, SamplerName

MAX_SEED = 2**64 - 1
MAX_STEPS = 1000


def examples(*lines: str) -> str:
    """An epilogue of examples that the help leaves as they are."""
    return "\b\n" + "\n".join(["Examples:", *(f"  {line}" for line in lines)])


def steps(name: str, what: str) -> typer.models.OptionInfo:
    """The option for the number of steps of one stage."""
    return typer.Option(
        f"--{name}-steps",
        min=1,
        max=MAX_STEPS,
        metavar="N",
        help=f"Denoising steps {what}.",
        show_default="the model's own",
    )


def guidance(name: str, what: str) -> typer.models.OptionInfo:
    """The option for the guidance scale of one stage."""
    return typer.Option(
        f"--{name}-guidance",
        metavar="SCALE",
        help=f"How strongly the {what}; 1 or less turns guidance off.",
        show_default="the model's own",
    )


def side(what: str, default: str) -> typer.models.OptionInfo:
    """The option for a side of the pictures, in pixels."""
    return typer.Option(min=1, metavar="PX", help=what, show_default=default)


def candidates(what: str, *, default: str = "the model's own, or 1") -> typer.models.OptionInfo:
    """The option for the candidates of the prior."""
    return typer.Option("--candidates", min=1, max=1000, metavar="N", help=what, show_default=default)


def steps_of_stages(text: str) -> int | list[int]:
    """ "7" as a number, "7,15" as one for each super-resolution stage.

    Raises: BadParameter for anything else, or a number outside 1 to 1000.
    """
    counts = [int(part) if part.isascii() and part.isdigit() else 0 for part in text.replace(" ", "").split(",")]
    if not all(1 <= count <= MAX_STEPS for count in counts):
        raise typer.BadParameter(
            f"{text!r} is no number from 1 to {MAX_STEPS}, and no such numbers with commas between"
        )
    return counts[0] if len(counts) == 1 else counts


Model = Annotated[
    str,
    typer.Option("--model", "-m", metavar="MODEL", help="A model's folder, a hub id (owner/name), or a built-in name."),
]
Seed = Annotated[
    int | None,
    typer.Option(
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
    typer.Option(
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
    typer.Option(
        metavar="T",
        help="Of an autoregressive prior: below 1 its ideas are more typical, at 0 always the likeliest.",
        show_default="the model's own, or 1",
    ),
]
PriorTopP = Annotated[
    float | None,
    typer.Option(
        metavar="P",
        help="Of an autoregressive prior: draw from the likeliest codes alone, whose chances make up P.",
        show_default="the model's own, or 1",
    ),
]
KeptGuidance = Annotated[
    float | None,
    typer.Option(
        "--decoder-guidance",
        metavar="SCALE",
        help="Guidance of inverting and decoding; 1 or less: none, which brings pictures back best.",
        show_default="1",
    ),
]
Negative = Annotated[
    str | None, typer.Option("--negative", metavar="TEXT", help="What guidance pushes away from: what not to show.")
]
Sampler = Annotated[
    SamplerName | None,
    typer.Option(
        "--sampler",
        metavar="NAME",
        help="How steps are taken: ancestral, ddim or dpm (good with few steps).",
        show_default="the model's own",
    ),
]
DtypeOption = Annotated[
    Dtype, typer.Option("--dtype", metavar="TYPE", help="The weights' type: float32, bfloat16 or float16.")
]
KeptDtype = Annotated[
    Dtype | None,
    typer.Option("--dtype", metavar="TYPE", help="Write float32, bfloat16 or float16.", show_default="as they are"),
]
Device = Annotated[
    str, typer.Option(metavar="NAME", help="Where to compute: cpu, cuda, cuda:1, mps or xpu; auto: the best there is.")
]
Height = Annotated[int | None, side("Height of the pictures.", "the model's own")]
Width = Annotated[int | None, side("Width of the pictures.", "the model's own")]
Tile = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="PX",
        help="Super-resolution sees larger pictures in tiles of this side: less memory, slower.",
        show_default="as a whole",
    ),
]
CpuOffload = Annotated[
    bool, typer.Option("--cpu-offload", help="Keep only the network at work on the accelerator: less memory, slower.")
]
BatchSize = Annotated[
    int, typer.Option(min=1, max=1000, metavar="N", help="Pictures computed at once; fewer need less memory.")
]
OutFolder = Annotated[
    Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for the pictures; made if it is not there.")
]
Grid = Annotated[bool, typer.Option("--grid", help="Also write all pictures on one sheet.")]
OverwritePictures = Annotated[
    bool, typer.Option("--overwrite", help="Replace files of the same name; otherwise a number is added to the name.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead, one object a line.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and no notes; warnings and errors stay.")]
NewFolder = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder to write.")]
OverwriteFolder = Annotated[bool, typer.Option("--overwrite", help="Replace DIR as a whole if it is there.")]
