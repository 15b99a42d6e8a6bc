"""`unclip embed`: write CLIP embeddings of pictures or captions."""

import os
from pathlib import Path
from typing import Annotated

import typer

from unclip.cli import options
from unclip.cli.bulk import Bulk, exit_if_failed, run_bulk
from unclip.cli.inputs import read_prompts
from unclip.cli.options import argument, flag, option
from unclip.errors import InputError, OutputExistsError


def embed(
    *,
    pictures: Annotated[list[Path] | None, argument("PICTURE")] = None,
    captions: Annotated[Path | None, option("FILE", allow_dash=True)] = None,
    bulk: Bulk,
    out: Annotated[Path, option("PATH", "--out", "-o")],
    half: Annotated[bool, flag("--half")] = False,
    overwrite: Annotated[bool, flag("--overwrite")] = False,
    model: options.Model = "unclip-emoji",
    batch_size: options.BatchSize = 32,
    compute: options.ExactPrecision,
    quiet: options.Quiet = False,
) -> None:
    """Write CLIP embeddings of pictures or captions.

    The output is an array with one row for each input (.npy, .npz, .safetensors), a table (.parquet), or a folder as
    clip-retrieval writes it. Embeddings are not normalised. A run that was stopped or killed continues when the same
    command is run again. Inputs that cannot be read are left out and reported.

    Args:
        pictures: Picture files, or folders of them.
        captions: Embed the lines of a text file; - is stdin.
        out: Output: PATH.npy, .npz, .safetensors or .parquet, or a folder.
        half: Write float16 instead of float32.
        overwrite: Replace an existing file or folder.

    Examples:
        unclip embed photos --out embeddings.npy
        unclip embed --captions captions.txt --out texts.safetensors
        unclip embed --from pictures.csv --out embeddings.parquet
    """
    from unclip.checkpoints.hub import resolve
    from unclip.clip.pretrained import fingerprint_of
    from unclip.data.tables import read_table
    from unclip.images import PICTURE_SUFFIXES
    from unclip.pipelines.bulk import PROMPTS
    from unclip.pipelines.embeddings import (
        SUFFIXES,
        EmbeddingWork,
        discard,
        embedding_rows,
        unfinished,
        write_embeddings,
    )
    from unclip.pipelines.session import Compute

    if sum(bool(each) for each in (pictures, captions, bulk.table)) != 1:
        raise typer.BadParameter("give either pictures, --captions FILE or --from FILE")
    if out.suffix.lower() not in SUFFIXES:
        raise InputError(f"--out {out} must end in {', '.join(SUFFIXES[:-1])}, or be the name of a folder")
    results = unfinished(out)
    if os.path.lexists(out) and not overwrite and not results.folder.exists():
        raise OutputExistsError(f"{out} already exists: use --overwrite, or another --out")
    base = Path()
    if bulk.table is not None:
        table, base = read_table(bulk.table), bulk.table.parent
    elif captions is not None:
        table = [{"caption": text} for text in read_prompts(captions)]
    else:
        table = []
        for path in pictures or []:
            inside = sorted(each for each in path.rglob("*") if each.suffix.lower() in PICTURE_SUFFIXES)
            table += [{"path": str(each)} for each in (inside if path.is_dir() else [path])]
    if not table:
        raise InputError("there is nothing to embed")
    as_captions = any(name in table[0] for name in PROMPTS) and "path" not in table[0]
    folder = resolve(model)
    rows = embedding_rows(table, [fingerprint_of(folder), compute.weights_type], captions=as_captions, base=base)
    work = EmbeddingWork(folder, Compute(compute.weights_type, compute.device), as_captions)
    with results.opened():
        unit = "caption" if as_captions else "picture"
        num_failed = run_bulk(bulk, rows, results, work, batch_size=batch_size, quiet=quiet, unit=unit)
        for path in write_embeddings(out, results, rows, captions=as_captions, half=half):
            print(path)
        if not num_failed:
            discard(results)
    exit_if_failed(num_failed, len(rows))
