"""`unclip interpolate`: the way from one picture or caption to another.

Knows parts and options; the path itself is another module's affair.
"""

import itertools
from pathlib import Path
from typing import Annotated

import typer

from unclip.cli import options
from unclip.cli.film import FPS, Film, check_writer
from unclip.cli.loading import Machine, decoder_settings, drawing_settings
from unclip.cli.pictures import Album, slug
from unclip.cli.workbench import NO_GUIDANCE, Part, Workbench, read_part

EXAMPLES = options.examples(
    "unclip interpolate cat.png dog.png --grid",
    'unclip interpolate "a red apple" "a pear" "a lemon" --frames 12 --film gif',
    "unclip interpolate cat.png dog.png --one-noise --film webp --out film",
)


def interpolate(
    parts: Annotated[
        list[str], typer.Argument(metavar="A B …", help="Two or more: files of pictures or latents, or captions.")
    ],
    model: options.Model = "unclip-emoji",
    frames: Annotated[
        int, typer.Option(min=1, max=1000, metavar="N", help="Frames from each to the next, without the next itself.")
    ] = 8,
    one_noise: Annotated[
        bool, typer.Option("--one-noise", help="Keep the first one's noise throughout: only what is shown changes.")
    ] = False,
    super_res: Annotated[
        bool, typer.Option("--super-res", help="Also invert super-resolution, so that the ends come back in detail.")
    ] = False,
    seed: Annotated[
        int, typer.Option(min=0, max=options.MAX_SEED, metavar="N", help="Of the noise that all frames share.")
    ] = 0,
    decoder_steps: options.DecoderSteps = None,
    super_res_steps: options.SuperResSteps = None,
    decoder_guidance: Annotated[
        float | None,
        typer.Option(
            metavar="SCALE", help="Guidance of the decoder; 1 or less: none.", show_default="1; of captions the model's"
        ),
    ] = None,
    candidates: options.Candidates = None,
    prior_temperature: options.PriorTemperature = None,
    prior_top_p: options.PriorTopP = None,
    film: Film = None,
    fps: FPS = 10,
    out: options.OutFolder = Path("."),
    grid: options.Grid = False,
    overwrite: options.OverwritePictures = False,
    as_json: options.Json = False,
    batch_size: options.BatchSize = 8,
    dtype: options.DtypeOption = options.Dtype.float32,
    device: options.Device = "auto",
    cpu_offload: options.CpuOffload = False,
    tile: options.Tile = None,
    quiet: options.Quiet = False,
) -> None:
    """Go from one picture or caption to another, step by step.

    Pictures are inverted, so the first and the last frame are the given ones again; what is shown and the noise both
    turn evenly on the way. Captions have the embeddings that `generate` draws for them with the same seed, and share
    the decoder's noise. A film goes there and back. The paths are printed on stdout, one a line.
    """
    if len(parts) < 2:
        raise typer.BadParameter("name two or more pictures or captions")
    check_writer(film)
    read = [read_part(text) for text in parts]
    stem = slug("-to-".join(part.stem for part in read))
    album = Album(out, overwrite=overwrite, as_json=as_json, keep=grid or film is not None)
    kinds = {part.kind for part in read}
    given = decoder_settings(decoder_steps, super_res_steps, decoder_guidance)
    drawing = drawing_settings(candidates, prior_temperature, prior_top_p)
    bench = Workbench.open(
        model,
        Machine(dtype, device, cpu_offload, quiet, tile),
        given,
        drawing=drawing,
        parts=read,
        guidance=None if kinds == {"caption"} else NO_GUIDANCE,
        ways={"one_noise": one_noise, "super_res": super_res},
    )

    from unclip.stages.manipulation import interpolate as path_through

    first, *others = latents = [bench.latent(part, seed=seed, super_res=super_res) for part in read]
    latent = path_through(first.join(*others), frames - 1, one_noise=one_noise)
    read = [part for part, rows in zip(read, latents, strict=True) for _ in range(len(rows))]
    facts = [{"from": a.name, "to": b.name, "share": share} for a, b, share in _places(read, frames)]
    whole = _whole(read)
    bench.draw(
        latent, facts, album, stem, seed=seed, batch_size=batch_size, film=film, fps=fps, sheet=grid, whole=whole
    )


def _places(read: list[Part], frames: int) -> list[tuple[Part, Part, float]]:
    """(from, to, share) of every frame."""
    ways = list(itertools.pairwise(read))
    found = [(a, b, round(step / frames, 4)) for a, b in ways for step in range(frames)]
    return [*found, (*ways[-1], 1.0)]


def _whole(read: list[Part]) -> dict[str, str]:
    """What sheet and film say of the way."""
    first, *between, last = [part.name for part in read]
    return {"from": first, **({"through": "; ".join(between)} if between else {}), "to": last}
