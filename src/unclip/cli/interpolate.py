"""`unclip interpolate`: the way from one picture or caption to another.

Knows parts and options; the path itself is another module's affair.
"""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from unclip.cli import options
from unclip.cli.batches import within_memory
from unclip.cli.film import FPS, Film, check_writer
from unclip.cli.loading import Machine, decoder_settings, drawing_settings
from unclip.cli.messages import note
from unclip.cli.pictures import Album, slug
from unclip.cli.workbench import NO_GUIDANCE, Part, Workbench, read_part

EXAMPLES = options.examples(
    "unclip interpolate cat.png dog.png --grid",
    'unclip interpolate "a red apple" "a pear" "a lemon" --frames 12 --film gif',
    "unclip interpolate cat.png dog.png --one-noise --film webp --out film",
    "unclip interpolate cat.png dog.png --frames 3 --spacing turns --grid",
)


class Spacing(StrEnum):
    """Where the frames of a path stand."""

    jumps = "jumps"
    turns = "turns"


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
    spacing: Annotated[
        Spacing,
        typer.Option(
            metavar="HOW",
            help="jumps: neighbouring pictures differ equally; the decoder draws the path twice to find out where. "
            "turns: equal steps of the angle.",
        ),
    ] = Spacing.jumps,
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
    turn from the one's to the other's. Captions have the embeddings that `generate` draws for them with the same seed,
    and share the decoder's noise. A film goes there and back. The paths are printed on stdout, one a line.
    """
    read = [read_part(text) for text in parts]
    if len(read) < 2 and read[0].kind != "latent":
        raise typer.BadParameter("name two or more pictures or captions")
    check_writer(film)
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
        ways={"one_noise": one_noise, "super_res": super_res, "spacing": spacing.value},
    )

    from unclip.stages.manipulation import path_at
    from unclip.stages.pacing import NUM_DRAWINGS, even_places

    first, *others = latents = [bench.latent(part, seed=seed, super_res=super_res) for part in read]
    points = first.join(*others)
    if spacing is Spacing.jumps and frames > 1 and not quiet:
        note("the decoder draws the path twice in small, to place its frames")
    with within_memory(batch_size):
        places = even_places(
            points,
            frames - 1,
            bench.decode_small,
            one_noise=one_noise,
            num_drawings=NUM_DRAWINGS if spacing is Spacing.jumps else 0,
            batch_size=batch_size,
        )
    latent = path_at(points, places, one_noise=one_noise)
    read = [part for part, rows in zip(read, latents, strict=True) for _ in range(len(rows))]
    whole = _whole(read)
    bench.draw(
        latent,
        _facts(read, places),
        album,
        stem,
        seed=seed,
        batch_size=batch_size,
        film=film,
        fps=fps,
        sheet=grid,
        whole=whole,
    )


def _facts(read: list[Part], places: Sequence[float]) -> list[dict[str, object]]:
    """Between which two every frame stands, and at which share of the angle from the one to the other."""
    legs = [min(int(place), len(read) - 2) for place in places]
    return [
        {"from": read[leg].name, "to": read[leg + 1].name, "share": round(place - leg, 4)}
        for leg, place in zip(legs, places, strict=True)
    ]


def _whole(read: list[Part]) -> dict[str, str]:
    """What sheet and film say of the way."""
    first, *between, last = [part.name for part in read]
    return {"from": first, **({"through": "; ".join(between)} if between else {}), "to": last}
