"""`unclip inpaint` and `unclip redraw`: regenerate a part of a picture, or all of it."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unclip.cli import options
from unclip.cli.inputs import check_has_prior, open_picture, plain
from unclip.cli.options import argument, option
from unclip.cli.output import Job, PictureWriter, slug
from unclip.cli.provenance import metadata
from unclip.errors import InputError
from unclip.pipelines.samplers import sampler_name
from unclip.pipelines.session import PRIOR_SAMPLING, Session

if TYPE_CHECKING:
    from PIL.Image import Image


class EmbeddingFrom(StrEnum):
    """The source of the image embedding."""

    prompt = "prompt"
    image = "image"


Picture = Annotated[Path, argument("IMAGE", help="A picture file.")]
OWN_SIZE = "the picture's shape, in the model's size"


@dataclass(frozen=True)
class Size(options.Size):
    """Width and height of the results.

    Attributes:
        height: Height of the result; needs --width.
        width: Width of the result; needs --height.
    """

    height: Annotated[int | None, options.side("--height", OWN_SIZE)] = None
    width: Annotated[int | None, options.side("--width", OWN_SIZE)] = None


@dataclass(frozen=True, kw_only=True)
class Edit:
    """Options of both commands.

    Attributes:
        prompt: Caption of the whole result.
        embedding_from: Source of the image embedding: prompt or image (the prompt then only conditions the decoder).
    """

    prompt: Annotated[str | None, option("TEXT", default="none: the picture's own embedding is used")] = None
    model: options.Model = "unclip-emoji"
    num_images: options.NumImages = 1
    seed: options.Seed = None
    embedding_from: Annotated[EmbeddingFrom | None, option("NAME", default="prompt, if there is one")] = None
    negative: options.Negative = None
    sampler: options.Sampler = None
    size: Size
    sampling: options.Sampling
    common: options.Common


def inpaint(
    *,
    image: Picture,
    mask: Annotated[Path | None, option("FILE", default="the picture's own transparency")] = None,
    strength: Annotated[float, option("X")] = 1.0,
    resamples: Annotated[int, option("N", min=1, max=100)] = 4,
    jump: Annotated[int, option("N", min=1)] = 1,
    edit: Edit,
) -> None:
    """Regenerate a part of a picture.

    A mask, or transparency in the picture, marks the part; all other pixels do not change. The result has the shape of
    the picture and the size of the model, and a picture of another size is resized first. Each result becomes a PNG
    file named after the given file and the seed. The paths are printed to stdout, one on each line.

    Args:
        mask: A picture of the same size. The part to regenerate is transparent in it, or white on black.
        strength: Share of the denoising steps that are run; below 1 some of the masked content stays.
        resamples: Repetitions of each jump. More of them fit the surroundings better, but take longer.
        jump: Denoising steps in each jump.

    Examples:
        unclip inpaint photo.png --mask mask.png --prompt "a dog with a hat"
        unclip inpaint holed.png          regenerate the transparent part
        unclip inpaint dog.png --mask mask.png --prompt "a cat" -n 4 --seed 1 --grid
    """
    from unclip.pipelines.masks import drawn_region

    if not 0 < strength <= 1:
        raise typer.BadParameter(f"--strength is {strength}; it must be above 0, up to 1")
    picture = open_picture(image, keep_alpha=True)
    mask_image = None if mask is None else open_picture(mask, keep_alpha=True)
    if drawn_region(picture, mask_image) is None:
        raise InputError(f"the part to regenerate is not marked: give --mask, or make it transparent in {image}")
    inputs = {"image": picture, "mask_image": mask_image}
    settings = {"strength": strength, "num_resamples": resamples, "jump_length": jump}
    _make("inpaint", image, inputs, {"mask": None if mask is None else plain(mask.name)}, edit, settings)


def redraw(
    *,
    image: Picture,
    strength: Annotated[float, option("X")] = 0.7,
    edit: Edit,
) -> None:
    """Regenerate a whole picture from a noisy version of it.

    This is image to image: a low strength keeps layout and colours, and a high one follows the prompt. Transparent
    parts become white. Sizes, files and output are as for `unclip inpaint`.

    Args:
        strength: Size of the change: near 0 the picture is kept, near 1 it is replaced.

    Examples:
        unclip redraw sketch.png --prompt "a red apple"
        unclip redraw dog.png --prompt "a lion" --strength 0.8 -n 4 --grid
        unclip redraw photo.jpg --strength 0.4     without a prompt
    """
    if not 0 < strength < 1:
        raise typer.BadParameter(f"--strength is {strength}; it must be above 0 and below 1")
    _make("redraw", image, {"image": open_picture(image)}, {}, edit, {"strength": strength})


def _make(
    command: str, image: Path, inputs: dict[str, Any], facts: dict[str, Any], edit: Edit, settings: dict[str, Any]
) -> None:
    """Load the model, and make and save every result.

    Args:
        command: the second part of the file names.
        image: the picture's file.
        inputs: the picture and the mask, by the names of the call's arguments.
        facts: metadata about the mask.
        edit: the options of both commands.
        settings: of the command alone.
    """
    from unclip.pipelines.inpaint import UnCLIPInpaintPipeline

    given = edit.sampling.given() | settings | edit.size.sides
    common, preset = edit.common, edit.sampling.preset
    session = Session(edit.model, common.compute, sampler=edit.sampler, preset=preset, progress=not common.quiet)
    check_has_prior(edit.model, session.parts)
    prior_runs = edit.prompt is not None and edit.embedding_from is not EmbeddingFrom.image
    if not prior_runs:
        options.refuse_prior_choice(given, "the image embedding is that of the picture")
        given = {setting: value for setting, value in given.items() if setting not in PRIOR_SAMPLING}
    if "image_encoder" not in session.parts and not prior_runs:
        raise InputError(f"{edit.model} has no image_encoder, so it cannot embed the picture: give only --prompt")
    if edit.embedding_from is not None:
        given["embedding_from"] = edit.embedding_from.value
    settings = session.settings(UnCLIPInpaintPipeline, given)
    writer = PictureWriter(edit.common, edit.num_images, seed=edit.seed)
    pipe = session.pipeline(UnCLIPInpaintPipeline)
    words = {name: text and plain(text) for name, text in (("prompt", edit.prompt), ("negative", edit.negative))}

    def draw(batch: list[Job]) -> "list[Image]":
        call = inputs | settings | {"num_images_per_prompt": len(batch), "seed": [job.seed for job in batch]}
        return pipe(words["prompt"], negative_prompt=words["negative"], **call).images  # type: ignore[union-attr, return-value]

    about = {"image": plain(image.name), **facts, **words}
    about |= metadata(session, pipe, {**settings, "sampler": sampler_name(pipe)})
    name = f"{slug(plain(image.stem))}-{command}"
    writer.make((Job(None, writer.seed_of(copy), name, {}) for copy in range(edit.num_images)), draw, about)
    writer.save_sheet(name, about)
