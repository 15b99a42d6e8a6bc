"""`unclip convert`: convert checkpoints of other formats to model folders."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from unclip.cli import options
from unclip.cli.options import argument, command, flag, option
from unclip.pipelines.session import silence

Clip = Annotated[str, option("MODEL", help="Folder or hub id of the CLIP model, in transformers' layout.")]


class PriorProject(StrEnum):
    """The projects whose priors on grids of tokens are read."""

    mindeye1 = "mindeye1"
    mindeye2 = "mindeye2"


class TrainerWeights(StrEnum):
    """The weights in a trainer's file."""

    ema = "ema"
    online = "online"


convert = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@convert.callback()
def convert_group() -> None:
    """Convert checkpoints of other formats to model folders."""


@command(convert, "karlo")
def karlo(
    prior: Annotated[Path, option("FILE")],
    decoder: Annotated[Path, option("FILE")],
    super_res: Annotated[Path, option("FILE")],
    stats: Annotated[Path, option("FILE")],
    clip: Clip,
    out: options.NewFolder,
    dtype: options.KeptDtype = None,
    variant: Annotated[str | None, option("WORD")] = None,
    prior_clip_range: Annotated[float, option("X")] = 10.0,
    overwrite: options.OverwriteFolder = False,
    quiet: options.Quiet = False,
) -> None:
    r"""Convert Karlo's original files into a text-to-image folder.

    The files may be .ckpt, .th or .safetensors; only tensors are read from pickles.

    Args:
        prior: The prior's checkpoint.
        decoder: The decoder's checkpoint.
        super_res: The super-resolution checkpoint.
        stats: File with mean and standard deviation of the image embeddings.
        variant: Put WORD into the weights' file names: for example fp16.
        prior_clip_range: Clamp the prior's prediction to ±X. Published folders in diffusers' layout have 5.

    Examples:
        unclip convert karlo --prior prior-ckpt-step=01000000-of-01000000.ckpt \
          --decoder decoder-ckpt-step=01000000-of-01000000.ckpt \
          --super-res improved-sr-ckpt-step=1.2M.ckpt --stats ViT-L-14_stats.th \
          --clip openai/clip-vit-large-patch14 --dtype float16 --out models/karlo
    """
    import torch

    from unclip.pipelines.convert import convert_karlo

    silence(downloads=quiet)
    made = convert_karlo(
        prior=prior,
        decoder=decoder,
        super_res=super_res,
        stats=stats,
        clip=clip,
        out=out,
        variant=variant,
        dtype=None if dtype is None else getattr(torch, dtype),
        overwrite=overwrite,
        prior_clip_range=prior_clip_range,
    )
    print(made, flush=True)


@command(convert, "variation")
def variation(
    model: Annotated[str, argument("MODEL")],
    clip: Clip,
    out: options.NewFolder,
    crop: Annotated[bool, flag("--crop")] = False,
    overwrite: options.OverwriteFolder = False,
    quiet: options.Quiet = False,
) -> None:
    r"""Make a folder for `unclip vary` from a text-to-image model.

    It contains the components of the model, and the image encoder of its CLIP model.

    Args:
        model: Folder or hub id of a text-to-image model.
        crop: Crop pictures to a square, as CLIP does, instead of squashing them, as Karlo does.

    Examples:
        unclip convert variation models/karlo \
          --clip openai/clip-vit-large-patch14 --out models/karlo-variation
        unclip vary photo.jpg --model models/karlo-variation
    """
    from unclip.pipelines.convert import convert_text_to_image_to_variation

    silence(downloads=quiet)
    print(convert_text_to_image_to_variation(model, out, clip=clip, crop=crop, overwrite=overwrite), flush=True)


@command(convert, "kandinsky")
def kandinsky(
    prior: Annotated[str, option("MODEL")],
    decoder: Annotated[str, option("MODEL")],
    out: options.NewFolder,
    overwrite: options.OverwriteFolder = False,
    quiet: options.Quiet = False,
) -> None:
    r"""Join the prior and the decoder of Kandinsky 2.1 or 2.2 in one folder.

    The other commands take such a folder as --model. Weights are hard-linked where the file system supports it.

    Args:
        prior: Folder or hub id of the prior.
        decoder: Folder or hub id of the decoder.

    Examples:
        unclip convert kandinsky --prior kandinsky-community/kandinsky-2-2-prior \
          --decoder kandinsky-community/kandinsky-2-2-decoder \
          --out models/kandinsky
        unclip generate "a red fox" --model models/kandinsky
    """
    from unclip.pipelines.convert import convert_kandinsky

    silence(downloads=quiet)
    print(convert_kandinsky(prior, decoder, out, overwrite=overwrite), flush=True)


@command(convert, "pickle")
def pickle(
    folder: Annotated[Path, argument("FOLDER")],
    out: options.NewFolder,
    overwrite: options.OverwriteFolder = False,
    quiet: options.Quiet = False,
) -> None:
    """Copy a model's folder, with every pickle (.bin) converted to safetensors.

    A pickle can run code when it is read. This command reads only tensors and refuses a file with anything else; still,
    use it only for files from people whom you trust.

    Args:
        folder: A model's folder with .bin files.

    Examples:
        unclip convert pickle models/old --out models/new
    """
    from unclip.pipelines.convert import convert_pickle

    silence(downloads=quiet)
    print(convert_pickle(folder, out, overwrite=overwrite), flush=True)


@command(convert, "dalle2-prior")
def dalle2_prior(
    file: Annotated[Path, argument("FILE")],
    out: options.NewFolder,
    package_version: Annotated[str | None, option("X.Y.Z")] = None,
    project: Annotated[PriorProject | None, option(None)] = None,
    config: Annotated[Path | None, option("JSON")] = None,
    weights: Annotated[TrainerWeights, option(None)] = TrainerWeights.ema,
    overwrite: options.OverwriteFolder = False,
    quiet: options.Quiet = False,
) -> None:
    r"""Convert a prior of DALLE2-pytorch or of MindEye.

    FILE is a trainer's file or a state dict: .pth, .pt or .safetensors. Only tensors are read from pickles, and files
    with objects that could run code are refused. Versions of the package differ in what the same weights compute. If
    the file does not tell the version, the command asks for it.

    Args:
        file: The file with the weights.
        package_version: Version of DALLE2-pytorch that trained it.
        project: Whose code trained it; needed for grids of tokens.
        config: The package's prior_config.json.
        weights: Which weights of a trainer's file.

    Examples:
        unclip convert dalle2-prior latest.pth --config prior_config.json \
          --out models/laion-prior
        unclip convert dalle2-prior last.pth --project mindeye2 --out models/mindeye
    """
    from unclip.pipelines.convert_dalle2 import convert_dalle2_prior

    silence(downloads=quiet)
    made = convert_dalle2_prior(
        file,
        out,
        package_version=package_version,
        project=None if project is None else project.value,
        config=config,
        weights=weights.value,
        overwrite=overwrite,
    )
    print(made, flush=True)
