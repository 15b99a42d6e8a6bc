"""Read tables of Parquet, CSV, JSON lines and plain text, and write Parquet."""

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unclip.checkpoints.files import atomic_file
from unclip.errors import DataError, InputError, MissingDependencyError, UnclipError


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a file: .parquet, .csv, .tsv, .jsonl (objects, or texts), or .txt (one caption on each line).

    Empty cells, null and NaN are left out. In JSON lines and texts, blank lines are skipped.

    Raises: InputError for a file that cannot be read, or has another suffix; DataError for a line that is not valid, or
        a table without rows; MissingDependencyError for a Parquet file without pyarrow.
    """
    read = {".csv": _csv, ".tsv": _csv, ".jsonl": _json_lines, ".ndjson": _json_lines, ".txt": _texts}
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            rows = pyarrow_parquet().read_table(path).to_pylist()
        elif suffix in read:
            with path.open(encoding="utf-8-sig", newline="") as file:
                rows = list(read[suffix](file, path))
        else:
            raise InputError(f"{path} must end in .parquet, {', '.join(read)}")
    except UnicodeDecodeError as problem:
        raise InputError(f"{path} is not UTF-8 text") from problem
    except (OSError, csv.Error) as problem:
        raise InputError(f"{path} cannot be read: {getattr(problem, 'strerror', None) or problem}") from problem
    except ValueError as problem:  # pyarrow's ArrowInvalid
        if isinstance(problem, UnclipError):
            raise
        raise InputError(f"{path} cannot be read: {problem}") from problem
    if not rows:
        raise DataError(f"{path} has no rows")
    return [{name: value for name, value in row.items() if not _is_empty(value)} for row in rows]


def _is_empty(value: object) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _csv(file: Iterable[str], path: Path) -> Iterator[dict[str, Any]]:
    for row in (reader := csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)):
        if None in row:
            raise DataError(f"{path}, line {reader.line_num}: there are more cells than columns")
        yield row


def _json_lines(file: Iterable[str], path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as problem:
                raise DataError(f"{path}, line {number}: it is not JSON") from problem
            if not isinstance(row, dict | str):
                raise DataError(f"{path}, line {number}: it must be an object with columns, or a text")
            yield row if isinstance(row, dict) else {"prompt": row}


def _texts(file: Iterable[str], path: Path) -> Iterator[dict[str, Any]]:
    return ({"prompt": text} for line in file if (text := line.rstrip("\r\n")).strip())


def pyarrow_parquet() -> Any:
    """The module `pyarrow.parquet`. Raises: MissingDependencyError without it."""
    try:
        import pyarrow.parquet
    except ImportError as problem:
        raise MissingDependencyError("a Parquet file needs pyarrow: pip install 'unclip[tables]'") from problem
    return pyarrow.parquet


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table with all columns of the rows, atomically. A column of values of several types becomes JSON.

    Raises: MissingDependencyError without pyarrow; OutputError when it cannot be written.
    """
    writer, names = pyarrow_parquet(), dict.fromkeys(name for row in rows for name in row)
    import pyarrow

    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pyarrow.array(values)
        except (ValueError, TypeError, OverflowError):  # pyarrow's errors are of these kinds
            columns[name] = pyarrow.array([None if value is None else json.dumps(value) for value in values])
    with atomic_file(path) as draft:
        writer.write_table(pyarrow.table(columns), draft)
