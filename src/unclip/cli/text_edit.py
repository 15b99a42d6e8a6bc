"""`unclip edit`: change a picture as two captions differ.

Knows a picture's file, captions and options; what a difference is, another module knows.
"""

from pathlib import Path
from typing import Annotated

import typer

from unclip.cli import options
from unclip.cli.film import FPS, Film, check_writer
from unclip.cli.generate import plain
from unclip.cli.loading import Machine, decoder_settings, drawing_settings
from unclip.cli.pictures import Album, slug
from unclip.cli.workbench import NO_GUIDANCE, Workbench, one_row, read_part
from unclip.errors import InputError

EXAMPLES = options.examples(
    'unclip edit cat.png --from "a cat" --to "a lion" --strength 0.5',
    'unclip edit cat.png --from "a cat" --to "a dog" --sweep 7 --grid',
    'unclip edit face.png --from "happy face" --to "sad face" --text-space',
)


def edit(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="A picture file, or a latent of: unclip invert.")],
    source: Annotated[str, typer.Option("--from", metavar="TEXT", help="What the picture shows.")],
    target: Annotated[str, typer.Option("--to", metavar="TEXT", help="What it should show instead.")],
    model: options.Model = "unclip-emoji",
    strength: Annotated[
        float, typer.Option(min=0, max=1, metavar="SHARE", help="How far to turn, from 0 (not) to 1 (all the way).")
    ] = 0.5,
    sweep: Annotated[
        int, typer.Option(min=1, max=100, metavar="N", help="Make N pictures, from no change to the strength.")
    ] = 1,
    text_space: Annotated[
        bool,
        typer.Option(
            "--text-space", help="The captions' own embeddings differ, as in the paper, not those the prior draws."
        ),
    ] = False,
    seed: Annotated[
        int, typer.Option(min=0, max=options.MAX_SEED, metavar="N", help="Of super-resolution and the prior.")
    ] = 0,
    decoder_steps: options.DecoderSteps = None,
    super_res_steps: options.SuperResSteps = None,
    decoder_guidance: options.KeptGuidance = None,
    candidates: Annotated[
        int | None,
        options.candidates("Ideas that the prior draws for each caption; both keep the same one.", default="1"),
    ] = None,
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
    """Change a picture as one caption differs from another.

    The picture is inverted, and its embedding turned towards the difference of the two captions, while the noise stays:
    so what is changed changes and the rest stays where it was. The prior draws both captions' embeddings from the same
    noise, and of several candidates takes the same for both: what differs is what they say. The paths are printed on
    stdout, one a line.
    """
    check_writer(film)
    source, target = plain(source), plain(target)
    if source.split() == target.split():
        raise InputError(f"--from and --to are both {source!r:.100}; there is no difference to go by")
    part = read_part(image)
    if part.kind == "caption":
        raise InputError(f"there is no file {image!r:.200}; an edit starts from a picture")
    album = Album(out, overwrite=overwrite, as_json=as_json, keep=grid or film is not None)
    given = decoder_settings(decoder_steps, super_res_steps, decoder_guidance)
    machine = Machine(dtype, device, cpu_offload, quiet, tile)
    if candidates is None and not text_space:
        candidates = 1  # and not as many as the model recommends: see `caption_difference`
    drawing = drawing_settings(candidates, prior_temperature, prior_top_p)
    bench = Workbench.open(
        model,
        machine,
        given,
        drawing=drawing,
        parts=[part],
        captions=not text_space,
        guidance=NO_GUIDANCE,
        ways={"text_space": text_space},
    )

    from unclip.stages.manipulation import edit as turn_to

    through_prior = not text_space
    direction = bench.tool.caption_difference(target, source, through_prior=through_prior, seed=seed, **bench.drawing)
    strengths = [strength] if sweep == 1 else [strength * place / (sweep - 1) for place in range(sweep)]
    latent = turn_to(one_row(bench.latent(part, seed=seed), part), direction, strengths)
    about = {"image": part.name, "from": source, "to": target}
    bench.draw(
        latent,
        [{**about, "strength": round(each, 4)} for each in strengths],
        album,
        f"{part.stem}-to-{slug(target)}",
        seed=seed,
        batch_size=batch_size,
        film=film,
        fps=fps,
        sheet=grid,
        whole={**about, "strength": strength, "sweep": sweep},
        labels=[f"{each:.3g}" for each in strengths],
    )
