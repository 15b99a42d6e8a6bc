"""`unclip blend`: one picture of several pictures and captions.

Knows parts, weights and options; the arithmetic is another module's affair.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unclip.cli import options
from unclip.cli.batches import Wish, chosen_seed, cut, make_all, picture_seed
from unclip.cli.loading import Machine, decoder_settings, drawing_settings
from unclip.cli.pictures import Album, slug
from unclip.cli.workbench import Workbench, read_part

if TYPE_CHECKING:
    from PIL.Image import Image

EXAMPLES = options.examples(
    "unclip blend cat.png dog.png",
    'unclip blend cat.png:0.6 "a red heart:0.4" -n 4 --grid',
    'unclip blend lion.png "an orange:-0.5" "a blue sky:0.5"',
)


def blend(
    parts: Annotated[
        list[str],
        typer.Argument(
            metavar="PART[:WEIGHT] …",
            help="Files of pictures or latents, or captions, each with its weight (1 by default) after a colon; a "
            "weight below 0 takes away.",
        ),
    ],
    model: options.Model = "unclip-emoji",
    num_images: Annotated[
        int, typer.Option("--num-images", "-n", min=1, max=100_000, metavar="N", help="Pictures.")
    ] = 1,
    seed: options.Seed = None,
    decoder_steps: options.DecoderSteps = None,
    super_res_steps: options.SuperResSteps = None,
    decoder_guidance: options.DecoderGuidance = None,
    candidates: options.Candidates = None,
    prior_temperature: options.PriorTemperature = None,
    prior_top_p: options.PriorTopP = None,
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
    """Mix what several pictures and captions show, with weights.

    Pictures count by their embeddings, captions by those that `generate` draws for them with the same seed; each by its
    direction, so only the weights say how much of it there is. A caption that ends in a colon and a number needs a
    weight after it. The paths are printed on stdout, one a line.
    """
    read = [read_part(text, weighted=True) for text in parts]
    album = Album(out, overwrite=overwrite, as_json=as_json, keep=grid)
    seed = chosen_seed(seed, quiet=quiet)
    given = decoder_settings(decoder_steps, super_res_steps, decoder_guidance)
    drawing = drawing_settings(candidates, prior_temperature, prior_top_p)
    captions = any(part.kind == "caption" for part in read)  # a latent's steps are of no use here: nothing comes back
    machine = Machine(dtype, device, cpu_offload, quiet, tile)
    bench = Workbench.open(model, machine, given, drawing=drawing, captions=captions, guidance=None)

    import torch

    from unclip.stages.arithmetic import blend as mixed

    weights = [part.weight for part in read]
    seen = {part: bench.embedding(part, seed=seed) for part in read if part.kind != "caption"}

    def draw(batch: list[Wish]) -> "list[Image]":
        seeds = [wish.seed for wish in batch]
        each = [seen[part].expand(len(seeds), -1) if part in seen else bench.caption(part, seeds) for part in read]
        rows = torch.stack([mixed(embeddings, weights) for embeddings in torch.stack(each, dim=1)])
        output = bench.tool.variation(image_embeddings=rows, seed=seeds, **bench.settings)  # type: ignore[arg-type]
        return output.images  # type: ignore[union-attr, return-value]

    about: dict[str, Any] = {"blend": "; ".join(f"{part.name}:{part.weight:g}" for part in read), **bench.about}
    stem = slug("-and-".join(part.stem for part in read))
    wishes = (Wish(None, picture_seed(seed, copy), stem, {}) for copy in range(num_images))
    make_all(cut(wishes, batch_size), draw, album, about)
    if grid:
        album.save_sheet(f"{stem}-{seed}", {**about, "seed": seed})
