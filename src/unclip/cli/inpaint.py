"""`unclip inpaint` and `unclip redraw`: regenerate a part of a picture, or all of it."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unclip.cli import options
from unclip.cli.inputs import check_has_prior, open_picture, plain
from unclip.cli.output import Job, PictureWriter, batched, chosen_seed, picture_seed, run_jobs, slug
from unclip.cli.provenance import metadata
from unclip.errors import InputError
from unclip.pipelines.session import PRIOR_SAMPLING, Session, sampler_name

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
    "unclip redraw photo.jpg --strength 0.4     its own content, regenerated",
)


class EmbeddingFrom(StrEnum):
    """The source of the image embedding."""

    prompt = "prompt"
    image = "image"


Picture = Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture file.")]
OWN_SIZE = "the picture's shape, in the model's size"


@dataclass(frozen=True)
class Edit:
    """Options of both commands: what the results show, and how many are made."""

    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="Caption of the whole result.", show_default="what the picture shows already"
        ),
    ] = None
    model: options.Model = "unclip-emoji"
    num_images: options.NumImages = 1
    seed: options.Seed = None
    embedding_from: Annotated[
        EmbeddingFrom | None,
        typer.Option(
            metavar="NAME",
            help="Source of the image embedding: prompt or image (the prompt then only conditions the decoder).",
            show_default="prompt, if there is one",
        ),
    ] = None
    negative: options.Negative = None
    sampler: options.Sampler = None


@dataclass(frozen=True)
class Size(options.Size):
    """Width and height of the results."""

    height: Annotated[int | None, options.side("--height", "Height of the result; goes with --width.", OWN_SIZE)] = None
    width: Annotated[int | None, options.side("--width", "Width of the result; goes with --height.", OWN_SIZE)] = None


@options.expanded
def inpaint(
    *,
    image: Picture,
    mask: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The part to regenerate: a picture of the same size, transparent there; or white there, black "
            "elsewhere.",
            show_default="the picture's own transparency",
        ),
    ] = None,
    strength: Annotated[
        float,
        typer.Option(
            metavar="X", help="Share of the denoising steps that are run; below 1 some of the masked content stays."
        ),
    ] = 1.0,
    resamples: Annotated[
        int,
        typer.Option(min=1, max=100, metavar="N", help="Repetitions of each jump: more fit better, slower."),
    ] = 4,
    jump: Annotated[int, typer.Option(min=1, metavar="N", help="Denoising steps in each jump.")] = 1,
    edit: Edit,
    size: Size,
    sampling: options.Sampling,
    output: options.Output,
    compute: options.Compute,
    quiet: options.Quiet = False,
) -> None:
    """Regenerate a part of a picture.

    A mask marks the part, or transparency in the picture does; all other pixels stay as they are. The result has the
    model's size in the picture's shape, and a picture of another size is resized to it first. Each result becomes a PNG
    file named after the given file and the seed. The paths are printed to stdout, one on each line.
    """
    from unclip.pipelines.masks import drawn_region

    if not 0 < strength <= 1:
        raise typer.BadParameter(f"--strength is {strength}; it must be above 0, up to 1")
    picture = open_picture(image, keep_alpha=True)
    mask_image = None if mask is None else open_picture(mask, keep_alpha=True)
    if drawn_region(picture, mask_image) is None:
        raise InputError(f"nothing marks the part to regenerate: give --mask, or make it transparent in {image}")
    inputs = {"image": picture, "mask_image": mask_image}
    settings = {"strength": strength, "num_resamples": resamples, "jump_length": jump, **size.sides}
    facts = {"image": plain(image.name), "mask": None if mask is None else plain(mask.name)}
    name = f"{slug(plain(image.stem))}-inpaint"
    _make(name, inputs, facts, edit, sampling.given() | settings, output, compute, quiet=quiet)


@options.expanded
def redraw(
    *,
    image: Picture,
    strength: Annotated[
        float,
        typer.Option(
            metavar="X", help="How much changes: near 0 the picture stays, near 1 almost nothing of it is left."
        ),
    ] = 0.7,
    edit: Edit,
    size: Size,
    sampling: options.Sampling,
    output: options.Output,
    compute: options.Compute,
    quiet: options.Quiet = False,
) -> None:
    """Regenerate a whole picture from a noisy version of it.

    This is image to image: the result keeps the layout and the colours as far as the strength allows, and shows what
    the prompt says. Transparent parts become white. Sizes, files and output are as for `unclip inpaint`.
    """
    if not 0 < strength < 1:
        raise typer.BadParameter(f"--strength is {strength}; it must be above 0 and below 1")
    settings = sampling.given() | {"strength": strength, **size.sides}
    name, facts = f"{slug(plain(image.stem))}-redraw", {"image": plain(image.name)}
    _make(name, {"image": open_picture(image)}, facts, edit, settings, output, compute, quiet=quiet)


def _make(
    name: str,
    inputs: dict[str, Any],
    facts: dict[str, Any],
    edit: Edit,
    given: dict[str, Any],
    output: options.Output,
    compute: options.Compute,
    *,
    quiet: bool,
) -> None:
    """Load the model, and make and save every result.

    Args:
        name: the first part of the file names.
        inputs: the picture and the mask, by the names of the call's arguments.
        facts: metadata about them.
        edit: what the results show.
        given: settings of the call, None where not given.
        output, compute, quiet: the command's options.
    """
    from unclip.pipelines.inpaint import UnCLIPInpaintPipeline

    session = Session(edit.model, compute, sampler=edit.sampler, progress=not quiet)
    check_has_prior(edit.model, session.index)
    prior_runs = edit.prompt is not None and edit.embedding_from is not EmbeddingFrom.image
    if not prior_runs:
        options.refuse_prior_choice(given, "the image embedding is that of the picture")
        given = {setting: value for setting, value in given.items() if setting not in PRIOR_SAMPLING}
    if "image_encoder" not in session.index and not prior_runs:
        raise InputError(f"{edit.model} has no image_encoder, so it cannot embed the picture: give only --prompt")
    if edit.embedding_from is not None:
        given["embedding_from"] = edit.embedding_from.value
    settings = session.settings(UnCLIPInpaintPipeline, given)
    writer = PictureWriter.of(output, edit.num_images)
    seed = chosen_seed(edit.seed, writer, quiet=quiet)
    pipe = session.pipeline(UnCLIPInpaintPipeline)
    prompt, negative = (None if text is None else plain(text) for text in (edit.prompt, edit.negative))

    def draw(batch: list[Job]) -> "list[Image]":
        call = inputs | settings | {"num_images_per_prompt": len(batch), "seed": [job.seed for job in batch]}
        return pipe(prompt, negative_prompt=negative, **call).images  # type: ignore[union-attr, return-value]

    words = {"prompt": prompt, "negative": negative}
    about = facts | words | metadata(session, pipe, {**settings, "sampler": sampler_name(pipe)})
    jobs = (Job(None, picture_seed(seed, copy), name, {}) for copy in range(edit.num_images))
    run_jobs(batched(jobs, output.batch_size), draw, writer, about)
    writer.save_sheet(f"{name}-{seed}", {**about, "seed": seed})
