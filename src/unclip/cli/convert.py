"""`unclip convert`: convert checkpoints of other formats to model folders."""

from pathlib import Path
from typing import Annotated

import typer

from unclip.cli import options
from unclip.pipelines.session import silence

KARLO_EXAMPLES = options.examples(
    "unclip convert karlo --prior prior-ckpt-step=01000000-of-01000000.ckpt \\",
    "  --decoder decoder-ckpt-step=01000000-of-01000000.ckpt \\",
    "  --super-res improved-sr-ckpt-step=1.2M.ckpt --stats ViT-L-14_stats.th \\",
    "  --clip openai/clip-vit-large-patch14 --dtype float16 --out models/karlo",
)
VARIATION_EXAMPLES = options.examples(
    "unclip convert variation models/karlo \\",
    "  --clip openai/clip-vit-large-patch14 --out models/karlo-variation",
    "unclip vary photo.jpg --model models/karlo-variation",
)
PICKLE_EXAMPLES = options.examples("unclip convert pickle models/old --out models/new")

Clip = Annotated[
    str, typer.Option(metavar="MODEL", help="Folder or hub id of the CLIP model, in transformers' layout.")
]

convert = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@convert.callback()
def convert_group() -> None:
    """Convert checkpoints of other formats to model folders."""


@convert.command("karlo", epilog=KARLO_EXAMPLES)
def karlo(
    prior: Annotated[Path, typer.Option(metavar="FILE", help="The prior's checkpoint.")],
    decoder: Annotated[Path, typer.Option(metavar="FILE", help="The decoder's checkpoint.")],
    super_res: Annotated[Path, typer.Option(metavar="FILE", help="The super-resolution checkpoint.")],
    stats: Annotated[Path, typer.Option(metavar="FILE", help="Mean and spread of the image embeddings.")],
    clip: Clip,
    out: options.NewFolder,
    dtype: options.KeptDtype = None,
    variant: Annotated[
        str | None, typer.Option(metavar="WORD", help="Put WORD into the weights' file names: fp16, say.")
    ] = None,
    prior_clip_range: Annotated[
        float,
        typer.Option(
            metavar="X", help="Clamp the prior's prediction to ±X; published folders in diffusers' layout: 5."
        ),
    ] = 10.0,
    overwrite: options.OverwriteFolder = False,
    quiet: options.Quiet = False,
) -> None:
    """Convert Karlo's original files into a text-to-image folder.

    The files may be .ckpt, .th or .safetensors; only tensors are read from pickles.
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


@convert.command("variation", epilog=VARIATION_EXAMPLES)
def variation(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id of a text-to-image model.")],
    clip: Clip,
    out: options.NewFolder,
    crop: Annotated[
        bool, typer.Option("--crop", help="Look at the centre of pictures, as CLIP does; or squash them, as Karlo.")
    ] = False,
    overwrite: options.OverwriteFolder = False,
    quiet: options.Quiet = False,
) -> None:
    """Make a folder for `unclip vary` from a text-to-image model.

    It has the model's components, and the image encoder of the CLIP model that the model was trained with.
    """
    from unclip.pipelines.convert import convert_text_to_image_to_variation

    silence(downloads=quiet)
    print(convert_text_to_image_to_variation(model, out, clip=clip, crop=crop, overwrite=overwrite), flush=True)


@convert.command("pickle", epilog=PICKLE_EXAMPLES)
def pickle(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A model's folder with .bin files.")],
    out: options.NewFolder,
    overwrite: options.OverwriteFolder = False,
    quiet: options.Quiet = False,
) -> None:
    """Copy a model's folder, with every pickle (.bin) converted to safetensors.

    A pickle can run code when it is read. This command reads only tensors and refuses a file with anything else; still,
    use it only on files from people whom you trust.
    """
    from unclip.pipelines.convert import convert_pickle

    silence(downloads=quiet)
    print(convert_pickle(folder, out, overwrite=overwrite), flush=True)
