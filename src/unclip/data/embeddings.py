"""Files of embeddings: .npy, .npz, .safetensors, parquet, and folders of .npy files as clip-retrieval writes them."""

import fnmatch
import pickle
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from unclip.data.tables import pyarrow_parquet
from unclip.errors import (
    DataError,
    InputError,
    MissingFileError,
    UnclipError,
    UnsafeFileError,
)

SUFFIXES = (".npy", ".npz", ".safetensors", ".parquet")
NAMES = ("image_embeds", "embedding", "image_embedding", "embeddings", "image_embeddings")
"""The names of arrays and columns that are looked for, in this order."""
AT_ONCE = 4096
MAX_NAMED = 10
"""Rows that are named in an error."""


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Embeddings [rows, width] of a file or of the files of a folder. Rows of .npy files are read when they are needed.

    Where grids are allowed, rows may also be grids of tokens [rows, tokens, width].

    Attributes:
        path: the file or the folder.
        parts: floating-point arrays, in order.
        tables: the further columns of each part: a parquet file, or arrays by name.
        first: number of the first row in the file, for messages.
    """

    path: Path
    parts: Sequence[np.ndarray]
    tables: Sequence[Any] = ()
    first: int = 0

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def width(self) -> int:
        """The width of each embedding."""
        return self.parts[0].shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """[rows, width], or [rows, tokens, width]."""
        return (len(self), *self.parts[0].shape[1:])

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Consecutive rows, float32 [rows, width] or [rows, tokens, width].

        Raises: DataError that names the rows with NaN or infinity.
        """
        start, stop, _ = rows.indices(len(self))
        found, place = [], 0
        for part in self.parts:
            found.append(part[max(0, start - place) : max(0, stop - place)])
            place += len(part)
        with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite
            array = np.concatenate(found, dtype=np.float32)
        if bad := np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1)).tolist():
            named = ", ".join(str(self.first + start + row) for row in bad[:MAX_NAMED])
            more = f" and {len(bad) - MAX_NAMED} others" if len(bad) > MAX_NAMED else ""
            raise DataError(f"{self.path} has NaN or infinity in row {named}{more} (rows count from 0)")
        return array

    def batches(self, size: int = AT_ONCE) -> Iterator[np.ndarray]:
        """All rows in parts of at most `size`, as in `__getitem__`."""
        return (self[start : start + size] for start in range(0, len(self), size))

    def select(self, first: int, last: int | None) -> "Embeddings":
        """The rows from `first` to before `last`; None: to the end. Columns are those of all rows.

        Raises: InputError when there is no such row.
        """
        start, stop, _ = slice(first, last).indices(len(self))
        if first >= len(self) or stop <= start:
            raise InputError(f"{self.path} has {len(self)} rows, and none of them from {first} to before {last}")
        parts, place = [], 0
        for part in self.parts:
            if len(kept := part[max(0, start - place) : max(0, stop - place)]):
                parts.append(kept)
            place += len(part)
        return replace(self, parts=parts, first=self.first + start)

    def column(self, name: str) -> list[str]:
        """The texts of a column beside the embeddings, one for each row.

        Raises: DataError for a column that does not exist, or has another number of rows.
        """
        found: list[str] = []
        for table in self.tables:
            values = table if isinstance(table, dict) else _read_columns(table, [name])
            if name not in values:
                raise DataError(f"{self.path} has no column {name!r}; it has {_listed(values)}")
            found += ["" if value is None else str(value) for value in values[name]]
        if len(found) < self.first + len(self):
            what = f"the column {name!r} has {len(found)} rows" if self.tables else "it has no further columns"
            raise DataError(f"{self.path}: {what}; labels need parquet, .npz, or a folder with metadata")
        return found[self.first : self.first + len(self)]


def read_embeddings(path: str | Path, key: str | None = None, *, grids: bool = False) -> Embeddings:
    """Open a file or a folder of embeddings.

    Args:
        path: a .npy file [rows, width]; .npz or .safetensors with such an array; a parquet file with a column of lists,
            or with one column for each dimension; or a folder of .npy files or of parquet files, such as that of
            clip-retrieval: `img_emb/img_emb_0.npy` with `metadata/metadata_0.parquet`.
        key: the array or the column; by default one of `NAMES`, else the only one. With `*` it names several columns
            of numbers, one for each dimension, in the order of their numbers.
        grids: whether grids of tokens [rows, tokens, width] are allowed too, which parquet cannot hold.

    Raises:
        MissingFileError: the path does not exist.
        UnsafeFileError: an array of Python objects, which would need a pickle.
        DataError: the file is damaged or empty, or the array is not [rows, width] of floating-point numbers.
        MissingDependencyError: parquet without pyarrow.
    """
    path = Path(path)
    if not path.exists():
        raise MissingFileError(f"{path} does not exist")
    files = _files(path) if path.is_dir() else [path]
    opened = [_open(file, key, grids) for file in files]
    parts, tables = [array for array, _ in opened], [table for _, table in opened if table is not None]
    widths = {part.shape[1] if part.ndim == 2 else part.shape[1:] for part in parts}
    if len(widths) > 1:
        raise DataError(f"{path} has embeddings of different widths: {', '.join(sorted(map(str, widths)))}")
    if path.is_dir() and not tables:
        metadata = (path.parent if path.name == "img_emb" else path) / "metadata"
        tables = sorted(metadata.glob("*.parquet"), key=_numbers)
    return Embeddings(path, parts, tables)


def _files(folder: Path) -> list[Path]:
    """The files of a folder of embeddings, in the order of the numbers in their names."""
    for place in (folder / "img_emb", folder):
        for suffix in (".npy", ".parquet"):
            if files := sorted(place.glob(f"*{suffix}"), key=_numbers):
                return files
    raise DataError(f"{folder} has no .npy or .parquet file, and no folder img_emb with such files")


def _numbers(path: Path) -> list[Any]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]


def _open(path: Path, key: str | None, grids: bool) -> tuple[np.ndarray, Any]:
    """The array of a file, and its further columns."""
    readers = {".npy": _open_npy, ".npz": _open_npz, ".safetensors": _open_safetensors, ".parquet": _open_parquet}
    if path.suffix.lower() not in readers:
        raise DataError(f"{path} is not a file of embeddings: its name must end in {', '.join(SUFFIXES)}")
    try:
        array, table = readers[path.suffix.lower()](path, key)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, pickle.UnpicklingError) as problem:
        if isinstance(problem, UnclipError):
            raise
        if "pickle" in str(problem) or "Python objects" in str(problem):
            raise UnsafeFileError(
                f"{path} has Python objects, which are stored as a pickle and could run code: save a plain array of "
                "numbers instead"
            ) from problem
        raise DataError(f"{path} cannot be read: {problem}") from problem
    return _checked(array, path, grids), table


def _checked(array: np.ndarray, path: Path, grids: bool) -> np.ndarray:
    if array.dtype.kind != "f":
        raise DataError(f"{path} has numbers of type {array.dtype}; embeddings are floating-point numbers")
    if array.ndim != 2 and not (grids and array.ndim == 3):
        grid = ": a grid of tokens has several vectors for each picture" if array.ndim == 3 else ""
        raise DataError(f"{path} has an array of shape {array.shape}; it must be [rows, width]{grid}")
    if not array.size:
        raise DataError(f"{path} is empty: its array has shape {array.shape}")
    return array


def _chosen(path: Path, key: str | None, names: Sequence[str], what: str) -> str:
    """The name of the array or the column. Raises: DataError when it does not exist, or is not clear."""
    if key in names:
        return str(key)
    known = [name for name in NAMES if name in names] or list(names)
    if key is not None or not known or (len(known) > 1 and known[0] not in NAMES):
        wanted = f"no {what} {key!r}" if key is not None else f"no {what} {NAMES[0]!r}"
        raise DataError(f"{path} has {wanted}; it has {_listed(names)}: name one with --key (in Python: key=…)")
    return known[0]


def _listed(names: Any) -> str:
    return ", ".join(map(repr, list(names)[:20])) or "nothing"


def _open_npy(path: Path, key: str | None) -> tuple[np.ndarray, None]:
    return np.load(path, mmap_mode="r", allow_pickle=False), None


def _open_npz(path: Path, key: str | None) -> tuple[np.ndarray, Any]:
    with path.open("rb") as file, zipfile.ZipFile(file):  # NumPy leaves a damaged file open
        file.seek(0)
        arrays = np.load(file, allow_pickle=False)
        name = _chosen(path, key, arrays.files, "array")
        others = {other: arrays[other] for other in arrays.files if other != name}
        array = arrays[name]
    return array, {other: column for other, column in others.items() if column.ndim == 1 and len(column) == len(array)}


def _open_safetensors(path: Path, key: str | None) -> tuple[np.ndarray, None]:
    from safetensors import SafetensorError, safe_open

    from unclip.checkpoints.weights import read_header

    header = read_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensor = file.get_tensor(_chosen(path, key, list(header), "tensor"))
    except SafetensorError as problem:
        raise DataError(f"{path} cannot be read: {problem}") from problem
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy(), None  # NumPy has no bfloat16


def _open_parquet(path: Path, key: str | None) -> tuple[np.ndarray, Path]:
    parquet = pyarrow_parquet()
    types = {field.name: field.type for field in parquet.read_schema(path)}
    if key is not None and "*" in key:
        names = sorted(fnmatch.filter(types, key), key=lambda name: _numbers(Path(name)))
        if not names:
            raise DataError(f"{path} has no column {key!r}; it has {_listed(types)}")
        table = parquet.read_table(path, columns=names)
        return np.stack([column.to_numpy() for column in table.columns], axis=1), path
    lists = [name for name, kind in types.items() if "list" in str(kind)]
    name = _chosen(path, key, list(types) if key is not None else lists, "column")
    column = parquet.read_table(path, columns=[name])[name].combine_chunks()
    if name not in lists or column.null_count:
        raise DataError(f"{path}: the column {name!r} is not a list of numbers in each row")
    values = column.flatten().to_numpy(zero_copy_only=False)
    width = len(values) // max(1, len(column))
    sizes = np.asarray(column.value_lengths())
    if (sizes != width).any():
        raise DataError(f"{path}: the lists in column {name!r} have from {sizes.min()} to {sizes.max()} numbers")
    return values.reshape(-1, width), path


def _read_columns(path: Path, names: list[str]) -> dict[str, list[Any]]:
    parquet = pyarrow_parquet()
    known = parquet.read_schema(path).names
    if not set(names) <= set(known):
        return {name: [] for name in known}
    return parquet.read_table(path, columns=names).to_pydict()
