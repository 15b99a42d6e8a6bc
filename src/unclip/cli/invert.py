"""`unclip invert`: pictures to the noise that leads to them.

Knows picture files and options; how it is found is another module's affair.
"""

import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unclip.checkpoints.files import safe_join
from unclip.checkpoints.tensor_file import SUFFIX
from unclip.cli import options
from unclip.cli.batches import finish
from unclip.cli.generate import plain
from unclip.cli.loading import Machine, decoder_settings
from unclip.cli.messages import note
from unclip.cli.pictures import Album, slug
from unclip.cli.workbench import NO_GUIDANCE, Workbench
from unclip.errors import OutputExistsError

if TYPE_CHECKING:
    from PIL.Image import Image

EXAMPLES = options.examples(
    "unclip invert cat.png",
    "unclip invert cat.png dog.png --super-res --out latents",
    "unclip vary latents/cat.safetensors --keep-structure -n 4",
)


def invert(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="A picture file; one or several.")],
    model: options.Model = "unclip-emoji",
    super_res: Annotated[
        bool, typer.Option("--super-res", help="Also invert super-resolution, to bring fine detail back.")
    ] = False,
    decoder_steps: options.DecoderSteps = None,
    super_res_steps: options.SuperResSteps = None,
    decoder_guidance: options.KeptGuidance = None,
    check: Annotated[
        bool, typer.Option("--check", help="Also decode again: write the picture that comes back, and tell its PSNR.")
    ] = False,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for the latents.")] = Path("."),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of the same name.")] = False,
    as_json: options.Json = False,
    dtype: options.DtypeOption = options.Dtype.float32,
    device: options.Device = "auto",
    cpu_offload: options.CpuOffload = False,
    tile: options.Tile = None,
    quiet: options.Quiet = False,
) -> None:
    """Find the noise that leads to a picture.

    Each picture becomes a small file of two latents: what the picture shows (its embedding), and the noise from which
    the decoder draws it so and not otherwise. `vary --keep-structure`, `interpolate`, `edit`, `blend` and `probe show`
    take such a file in place of a picture. Of pictures with one name the later ones' files have a number. The paths are
    printed on stdout, one a line.
    """
    from unclip.cli.vary import opened

    failed: list[Path] = []
    album = Album(out, overwrite=overwrite, as_json=as_json, keep=False)
    pictures = list(opened(images, failed))
    if pictures:
        files = _files(out, [one.path for one in pictures])
        there = [str(file) for file in files if file.exists()]
        if there and not overwrite:
            raise OutputExistsError(_exists(there))
        given = decoder_settings(decoder_steps, super_res_steps, decoder_guidance)
        machine = Machine(dtype, device, cpu_offload, quiet, tile)
        bench = Workbench.open(model, machine, given, guidance=NO_GUIDANCE, ways={"super_res": super_res})
        kept = {**bench.settings, **machine.tile_fact}
        for path, image, file in ((one.path, one.given, file) for one, file in zip(pictures, files, strict=True)):
            latent = bench.tool.invert(image, super_res=super_res, **bench.settings)  # type: ignore[arg-type]
            told = {"model": bench.about["model"], "image": plain(path.name)}
            try:
                bench.tool.save(latent, file, settings=kept, about=told, overwrite=overwrite)
            except OutputExistsError as problem:
                raise OutputExistsError(_exists([str(file)])) from problem
            album.num_saved += 1
            facts = {"image": plain(path.name), **bench.about}
            if check:
                output = bench.tool.decode(latent, return_intermediates=True, **bench.settings)  # type: ignore[arg-type]
                assert isinstance(output.images, list)
                assert isinstance(output.small_images, list)
                facts["psnr_db"] = round(psnr_db(image, output.small_images[0]), 2)
                if not quiet:
                    note(f"{facts['image']}: {facts['psnr_db']:.1f} dB")
                back = album.save(output.images[0], f"{file.stem}-reconstruction", facts)
                album.tell(file, facts)
                album.tell(back, facts)
            else:
                album.tell(file, facts)
    finish(album, len(failed))


def _files(out: Path, images: list[Path]) -> list[Path]:
    """A latent's file for each picture, named after it; of pictures with one name the later ones have a number."""
    stems: list[str] = []
    for image in images:
        name = slug(plain(image.stem))
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        stems.append(next(name for name in names if name not in stems))
    return [safe_join(out, f"{stem}{SUFFIX}") for stem in stems]


def _exists(files: list[str]) -> str:
    verb = "exists" if len(files) == 1 else "exist"
    return f"{', '.join(files)} {verb} already: use --overwrite, or another --out"


def psnr_db(image: "Image", other: "Image") -> float:
    """The peak signal-to-noise ratio of `other`, against `image` in its size; 99 for pictures that are equal."""
    from unclip.images import to_square, to_tensor

    error = float(((to_square(image, other.width) - to_tensor(other)) / 2).square().mean())
    return min(99.0, -10 * math.log10(max(error, 1e-12)))
