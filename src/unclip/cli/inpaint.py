"""`unclip inpaint` and `unclip redraw`: a picture of which a part, or all, is drawn anew.

Knows picture files and options; the batches, the files and the model are other modules' affair.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unclip.checkpoints.recommended import Recommended
from unclip.cli import options
from unclip.cli.inputs import open_picture, plain
from unclip.cli.output import Album, Wish, chosen_seed, cut, finish, make_all, picture_seed, slug
from unclip.cli.provenance import MADE_WITH, made_with
from unclip.errors import CheckpointError, InputError
from unclip.pipelines.session import (
    Machine,
    call_settings,
    drawing_settings,
    find_model,
    load,
    model_name,
    refuse_drawing,
    sampler_name,
    stage_settings,
)

if TYPE_CHECKING:
    from PIL.Image import Image

INPAINT_EXAMPLES = options.examples(
    'unclip inpaint photo.png --mask mask.png --prompt "a dog with a hat"',
    "unclip inpaint holed.png          fills what is transparent, to fit the rest",
    'unclip inpaint dog.png --mask mask.png --prompt "a cat" -n 4 --seed 1 --grid',
)
REDRAW_EXAMPLES = options.examples(
    'unclip redraw sketch.png --prompt "a red apple"',
    'unclip redraw dog.png --prompt "a lion" --strength 0.8 -n 4 --grid',
    "unclip redraw photo.jpg --strength 0.4     its own content, drawn anew",
)


class EmbeddingFrom(StrEnum):
    """Where the image embedding comes from that decides what is drawn."""

    prompt = "prompt"
    image = "image"


@dataclass(frozen=True)
class Edit:
    """What one command asks of the pipeline.

    Attributes:
        verb: the command, which also names the files.
        path: of the picture.
        given: the picture and, of an inpainting, its mask.
        facts: what every file says beside the settings.
        num_images: how many results.
        seed: of the first; None: a fresh one.
    """

    verb: str
    path: Path
    given: dict[str, Any]
    facts: dict[str, Any]
    num_images: int
    seed: int | None


Picture = Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture file.")]
NumImages = Annotated[int, typer.Option("--num-images", "-n", min=1, max=100_000, metavar="N", help="Results to make.")]
Prompt = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT", help="What the result should show, as a whole.", show_default="what the picture shows already"
    ),
]
From = Annotated[
    EmbeddingFrom | None,
    typer.Option(
        metavar="NAME",
        help="What decides: the prompt's idea of a picture, or the given image's (the prompt then is a caption alone).",
        show_default="the prompt, if there is one",
    ),
]
PriorSteps = Annotated[int | None, options.steps("prior", "of the prior, which turns words into an idea")]
PriorGuidance = Annotated[float | None, options.guidance("prior", "idea is pushed towards the caption")]

OWN_SIZE = "the picture's shape, in the model's size"
Height = Annotated[int | None, options.side("--height", "Height of the result; goes with --width.", OWN_SIZE)]
Width = Annotated[int | None, options.side("--width", "Width of the result; goes with --height.", OWN_SIZE)]


def inpaint(
    image: Picture,
    mask: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What is drawn anew: a picture of the same size, transparent there; or white there, black elsewhere.",
            show_default="the picture's own transparency",
        ),
    ] = None,
    prompt: Prompt = None,
    model: options.Model = "unclip-emoji",
    num_images: NumImages = 1,
    seed: options.Seed = None,
    strength: Annotated[
        float, typer.Option(metavar="X", help="Below 1 keeps some of what is under the mask: the share of steps taken.")
    ] = 1.0,
    resamples: Annotated[
        int, typer.Option(min=1, max=100, metavar="N", help="Walks of each part of the path; more fit better, slower.")
    ] = 4,
    jump: Annotated[int, typer.Option(min=1, metavar="N", help="Steps in each such part.")] = 1,
    embedding_from: From = None,
    negative: options.Negative = None,
    prior_steps: PriorSteps = None,
    decoder_steps: options.DecoderSteps = None,
    super_res_steps: options.SuperResSteps = None,
    prior_guidance: PriorGuidance = None,
    decoder_guidance: options.DecoderGuidance = None,
    candidates: options.Candidates = None,
    prior_temperature: options.PriorTemperature = None,
    prior_top_p: options.PriorTopP = None,
    sampler: options.Sampler = None,
    size: options.Size = None,
    height: Height = None,
    width: Width = None,
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
    """Draw a part of a picture anew.

    The part is what a mask marks, or what is transparent in the picture; all other pixels stay as they are. The result
    has the model's size in the picture's shape, and a picture of another size is resized to it first. Each result
    becomes a PNG file named after the given one and its seed. The paths are printed on stdout, one a line.
    """
    from unclip.pipelines.masks import drawn_region

    if not 0 < strength <= 1:
        raise typer.BadParameter(f"--strength is {strength}; it must be above 0, up to 1")
    picture = open_picture(image, keep_alpha=True)
    mask_image = None if mask is None else open_picture(mask, keep_alpha=True)
    if drawn_region(picture, mask_image) is None:
        raise InputError(f"nothing says what to draw anew: give --mask, or make it transparent in {image}")
    edit = Edit(
        "inpaint",
        image,
        {"image": picture, "mask_image": mask_image},
        {"mask": None if mask is None else plain(mask.name), **_words(prompt, negative)},
        num_images,
        seed,
    )
    settings = {
        **stage_settings(prior_steps, decoder_steps, super_res_steps, prior_guidance, decoder_guidance),
        **{"strength": strength, "num_resamples": resamples, "jump_length": jump},
        **{"embedding_from": embedding_from and embedding_from.value, **options.sides(size, height, width)},
    }
    drawing = drawing_settings(candidates, prior_temperature, prior_top_p)
    album = partial(Album, out, overwrite=overwrite, as_json=as_json, keep=grid, num_files=num_images + grid)
    _make(edit, model, settings, drawing, Machine(dtype, device, cpu_offload, quiet, tile), sampler, album, batch_size)


def redraw(
    image: Picture,
    prompt: Prompt = None,
    model: options.Model = "unclip-emoji",
    num_images: NumImages = 1,
    seed: options.Seed = None,
    strength: Annotated[
        float,
        typer.Option(metavar="X", help="How far from the picture: near 0 it stays, near 1 hardly a trace is left."),
    ] = 0.7,
    embedding_from: From = None,
    negative: options.Negative = None,
    prior_steps: PriorSteps = None,
    decoder_steps: options.DecoderSteps = None,
    super_res_steps: options.SuperResSteps = None,
    prior_guidance: PriorGuidance = None,
    decoder_guidance: options.DecoderGuidance = None,
    candidates: options.Candidates = None,
    prior_temperature: options.PriorTemperature = None,
    prior_top_p: options.PriorTopP = None,
    sampler: options.Sampler = None,
    size: options.Size = None,
    height: Height = None,
    width: Width = None,
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
    """Draw a whole picture anew from a rough state of it.

    This is image to image: the result keeps the picture's layout and colours as far as the strength lets it, and shows
    what the prompt says. Transparency stands on white. Sizes, files and stdout are as for `unclip inpaint`.
    """

    if not 0 < strength < 1:
        raise typer.BadParameter(f"--strength is {strength}; it must be above 0 and below 1")
    picture = open_picture(image)
    edit = Edit("redraw", image, {"image": picture}, _words(prompt, negative), num_images, seed)
    settings = {
        **stage_settings(prior_steps, decoder_steps, super_res_steps, prior_guidance, decoder_guidance),
        **{"strength": strength},
        **{"embedding_from": embedding_from and embedding_from.value, **options.sides(size, height, width)},
    }
    drawing = drawing_settings(candidates, prior_temperature, prior_top_p)
    album = partial(Album, out, overwrite=overwrite, as_json=as_json, keep=grid, num_files=num_images + grid)
    _make(edit, model, settings, drawing, Machine(dtype, device, cpu_offload, quiet, tile), sampler, album, batch_size)


def _make(
    edit: Edit,
    model: str,
    given: dict[str, Any],
    drawing: dict[str, Recommended | None],
    machine: Machine,
    sampler: options.SamplerName | None,
    open_album: Callable[[], Album],
    batch_size: int,
) -> None:
    """Load the model, draw every result, save it, and tell of it."""
    folder, index = find_model(model, quiet=machine.quiet)
    if "prior" not in index:
        raise CheckpointError(f"{model} has no prior, so it only makes variations: unclip vary IMAGE --model {model}")
    prior_runs = edit.facts["prompt"] is not None and given["embedding_from"] != "image"
    if not prior_runs:
        refuse_drawing(drawing)
        drawing = {}  # nor are the model's own told of
    if "image_encoder" not in index and not prior_runs:
        raise InputError(f"{model} has no image_encoder, so the picture cannot say what is drawn: give --prompt alone")

    from unclip.pipelines.inpaint import UnCLIPInpaintPipeline

    found = call_settings(UnCLIPInpaintPipeline, folder, given, drawing)
    settings: dict[str, Recommended | str] = {name: value for name, value in found.items() if value is not None}
    album = open_album()
    seed = chosen_seed(edit.seed, album, quiet=machine.quiet)
    pipe = load(UnCLIPInpaintPipeline, folder, machine, sampler)
    prompt, negative = edit.facts["prompt"], edit.facts["negative"]

    def draw(batch: list[Wish]) -> "list[Image]":
        call = edit.given | settings | {"num_images_per_prompt": len(batch), "seed": [wish.seed for wish in batch]}
        return pipe(prompt, negative_prompt=negative, **call).images  # type: ignore[arg-type, union-attr, return-value]

    about = {
        **edit.facts,
        "model": model_name(model),
        "settings": {**settings, "sampler": sampler_name(pipe), **machine.facts},
        MADE_WITH: made_with(pipe),
    }
    name = f"{slug(plain(edit.path.stem))}-{edit.verb}"
    facts = {"image": plain(edit.path.name)}
    wishes = (Wish(None, picture_seed(seed, copy), name, facts) for copy in range(edit.num_images))
    make_all(cut(wishes, batch_size), draw, album, about)
    album.save_sheet(f"{name}-{seed}", {**facts, **about, "seed": seed})
    finish(album, 0)


def _words(prompt: str | None, negative: str | None) -> dict[str, str | None]:
    return {
        "prompt": None if prompt is None else plain(prompt),
        "negative": None if negative is None else plain(negative),
    }
