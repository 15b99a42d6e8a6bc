"""CLIP embeddings of many pictures or captions: rows of a bulk run, the work of a batch, and the files of results."""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unclip.checkpoints.files import atomic_file, atomic_folder
from unclip.data.tables import write_parquet
from unclip.errors import InputError, NonFiniteError
from unclip.pipelines.bulk import OWN, PROMPTS, Results, content_id
from unclip.pipelines.session import Compute, pick_device
from unclip.pipelines.workers import Made, Make, Row

PICTURES = ("path", "image", "file_name")
"""Columns of a picture's file; the first one that a row has is used."""
SUFFIXES = (".npy", ".npz", ".safetensors", ".parquet", "")
PER_PART = 1024
"""Embeddings in a file of an unfinished run."""


def embedding_rows(
    table: Iterable[Mapping[str, Any]], of_model: Sequence[Any], *, captions: bool, base: Path = Path()
) -> list[Row]:
    """The embeddings that a table asks for, in its order.

    A caption is identified by its text; a picture by its path, size and time of change. Equal rows are distinguished by
    their number.

    Args:
        table: rows with `prompt`, `caption` or `text`; or with `path`, `image` or `file_name`.
        of_model: what else identifies the embeddings.
        captions: whether captions are embedded.
        base: the folder of relative paths.
    """
    from unclip.clip.encoders import check_prompt

    columns, seen, rows = PROMPTS if captions else PICTURES, Counter[str](), []
    for cells in table:
        about = {f"input_{name}" if name in OWN else name: value for name, value in cells.items()}
        given, error, content = next((cells[name] for name in columns if name in cells), None), "", dict(cells)
        try:
            if captions:
                check_prompt(given)
                about, content = {**about, "caption": given}, {"caption": given}
            else:
                file = base / str(given)
                found = file.stat()
                given = str(file.resolve())
                about, content = {**about, "input_path": str(file)}, {given: [found.st_size, found.st_mtime_ns]}
        except (InputError, OSError, ValueError) as problem:
            error = f"{given}: {problem.strerror}" if isinstance(problem, OSError) else str(problem)
        key = content_id(content, *of_model)
        seen[key] += 1
        rows.append(Row(content_id(key, seen[key]), about, given, captions, error))
    return rows


@dataclass(frozen=True)
class EmbeddingWork:
    """Encodes pictures or captions with the CLIP of a model's folder, or a CLIP's folder; float32, not normalised."""

    folder: Path
    compute: Compute
    captions: bool

    def load(self, worker: int) -> Make:
        import torch

        from unclip.clip.encoders import ImageEncoder, TextEncoder
        from unclip.clip.pretrained import COMPONENTS, is_whole_clip, read_part, read_parts
        from unclip.images import open_image
        from unclip.pipelines.session import silence_later

        silence_later(downloads=True)
        device, dtype = pick_device(self.compute.device), getattr(torch, self.compute.weights_type)
        names = ("text_encoder", "tokenizer") if self.captions else ("image_encoder", "feature_extractor")
        if is_whole_clip(self.folder):
            parts = read_parts(self.folder)[0]
        else:
            parts = {name: read_part(self.folder, name, COMPONENTS[name], own_clip=True) for name in names}
        network, preparation = parts[names[0]].to(device, dtype).eval(), parts[names[1]]

        @torch.no_grad()
        def make(batch: Sequence[Row]) -> list[Made]:
            if self.captions:
                found = TextEncoder(network, preparation).encode([row.given for row in batch], device).embeds
            else:
                encoder = ImageEncoder(network, preparation)
                found = encoder.encode([open_image(row.given) for row in batch], device)
            found = found.float().cpu()
            if not found.isfinite().all():
                raise NonFiniteError("the embedding is not finite")
            return [embedding.numpy().tobytes() for embedding in found]

        return make


def unfinished(out: Path, per_part: int = PER_PART) -> Results:
    """The results of a run until its output is written, in a folder beside it."""
    return Results(out.with_name(f"{out.name}.unfinished"), ".npz", _write_part, per_part)


def _write_part(made: Sequence[tuple[Row, bytes]], path: Path) -> None:
    rows = np.stack([np.frombuffer(content, np.float32) for _, content in made])
    np.savez(path, ids=np.array([row.id for row, _ in made]), rows=rows)


def write_embeddings(
    out: Path, results: Results, rows: Sequence[Row], *, captions: bool, half: bool = False
) -> list[Path]:
    """Write the embeddings of the rows that have one, in the order of the table.

    Args:
        out: `.npy`: an array [rows, width]; `.npz` or `.safetensors`: the same, named `image_embeds` or `text_embeds`;
            `.parquet`: the index with a column `embedding`; a name without a suffix: a folder as clip-retrieval
            writes it. Beside the first three, a file `.jsonl` has the index: a line for each row, with the number of
            its embedding or its error.
        results: with embeddings of these rows.
        rows: all rows.
        captions: whether they are captions.
        half: float16 instead of float32.

    Returns: the files.

    Raises: InputError when no row has an embedding; OutputError as `atomic_file`.
    """
    vectors: dict[str, np.ndarray] = {}
    for path in results.folder.glob("*.npz"):
        with np.load(path) as part:
            vectors |= zip(part["ids"].tolist(), part["rows"], strict=True)
    good = [row for row in rows if row.id in vectors]
    if not good:
        raise InputError("no row has an embedding")
    array = np.stack([vectors[row.id] for row in good]).astype(np.float16 if half else np.float32)
    name = "text_embeds" if captions else "image_embeds"
    index, number = [], 0
    for row in rows:
        entry = {"id": row.id} | {("path" if key == "input_path" else key): value for key, value in row.about.items()}
        if row.id in vectors:
            entry["row"], number = number, number + 1
        else:
            entry["error"] = results.lines[row.id]["error"]
        index.append(entry)
    if out.suffix == ".parquet":
        kept = [entry for entry in index if "row" in entry]
        write_parquet(out, [{**entry, "embedding": array[entry["row"]]} for entry in kept])
        return [out]
    if not out.suffix:
        short = "text" if captions else "img"
        with atomic_folder(out, overwrite=True) as draft:
            (draft / f"{short}_emb").mkdir()
            (draft / "metadata").mkdir()
            np.save(draft / f"{short}_emb" / f"{short}_emb_0.npy", array)
            kept = [
                {("image_path" if key == "path" else key): value for key, value in entry.items()}
                for entry in index
                if "row" in entry
            ]
            write_parquet(draft / "metadata" / "metadata_0.parquet", kept)
        return [out]
    with atomic_file(out) as draft:
        if out.suffix == ".safetensors":
            from safetensors.numpy import save_file

            save_file({name: array}, draft)
        elif out.suffix == ".npz":
            np.savez(draft, **{name: array})  # type: ignore[arg-type]
        else:
            np.save(draft, array)
    lines = out.with_suffix(".jsonl")
    with atomic_file(lines) as draft:
        draft.write_text("".join(json.dumps(entry, default=str) + "\n" for entry in index), encoding="utf-8")
    return [out, lines]


def discard(results: Results) -> None:
    """Remove the folder of an unfinished run."""
    shutil.rmtree(results.folder)
