"""Read and check JSON and TOML, write files and folders atomically, and keep file names inside their folder."""

import contextlib
import ctypes
import json
import math
import os
import re
import secrets
import shutil
import stat
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from unclip.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    MissingFileError,
    OutputError,
    OutputExistsError,
    UnclipError,
    UnsafeFileError,
)
from unclip.numbers import shown

JSON_LIMIT_BYTES = 16 << 20
"""The default size limit of `read_json`. The shard index of a very large model is about 1 MB."""

TOML_LIMIT_BYTES, LINE_LIMIT = 2**16, 2**14
"""Limits of a TOML file in bytes and of a line in characters: parsing dotted names is quadratic."""
DEPTH_LIMIT = 16
TEXT_LIMIT = 4096
"""The longest text and the longest key with its sections in a TOML file, in characters."""

NAME_LIMIT = 255
"""Largest length of one part of a path, in bytes."""
PATH_LIMIT = 1024
"""Largest length of a path that was read from a file."""
OUTPUT_LIMIT = 4096
"""Largest length of an output path, in bytes."""
TEMPORARY_PREFIX = ".unclip-tmp-"


# -- JSON and TOML ---------------------------------------------------------------------------------------------------


def parse_json_object(
    data: bytes, what: str, error: type[CheckpointError] = CheckpointError, *, allow_infinity: bool = False
) -> dict[str, Any]:
    """The JSON object in `data`; `what` names it in messages.

    Raises `error` for text that is not UTF-8 or not JSON, for a value that is not an object, and for what Python's
    parser accepts: duplicate keys, NaN and infinities (also as 1e999). With `allow_infinity` the words Infinity and
    -Infinity are accepted, since diffusers' schedulers write them.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"it has the key {name[:80]!r} twice; remove one of them")
        return found

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value) and not (allow_infinity and text.endswith("Infinity")):
            raise ValueError(f"it contains {text[:40]}; only finite numbers are allowed")
        return value

    try:
        value = json.loads(data.decode(), object_pairs_hook=unique, parse_constant=number, parse_float=number)
    except (ValueError, RecursionError) as problem:
        raise error(f"{what} is not JSON: {problem}") from problem
    if not isinstance(value, dict):
        raise error(f"{what} must be a JSON object in braces, not a {type(value).__name__}")
    return value


def read_json(
    path: str | os.PathLike[str], *, limit_bytes: int = JSON_LIMIT_BYTES, allow_infinity: bool = False
) -> dict[str, Any]:
    """The JSON object in the file `path`; `allow_infinity` as in `parse_json_object`.

    Raises MissingFileError when the file does not exist, CheckpointError when it is not a regular file, is larger than
    `limit_bytes`, is not JSON, is not an object, or has duplicate keys or numbers that are not finite.
    """
    size_bytes = file_size(path)
    if size_bytes > limit_bytes:
        raise CheckpointError(f"{path} is {size_bytes} bytes; the limit for this JSON file is {limit_bytes}")
    return parse_json_object(Path(path).read_bytes(), str(path), allow_infinity=allow_infinity)


def file_size(path: str | os.PathLike[str]) -> int:
    """The size of the regular file `path` in bytes.

    Raises MissingFileError when it does not exist, CheckpointError when it is not a regular file.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError) as problem:
        raise MissingFileError(
            f"{_shown(path)} cannot be read ({getattr(problem, 'strerror', problem)}); is the folder complete?"
        ) from problem
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is not a regular file")
    return found.st_size


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises ConfigError for a file that is missing, too large or broken, or has a value that no setting takes.
    """
    if not path.exists():
        raise ConfigError(f"{path} does not exist")
    try:
        if (size_bytes := file_size(path)) > TOML_LIMIT_BYTES:
            raise ValueError(f"it has {size_bytes:,} bytes; at most {TOML_LIMIT_BYTES:,} are read")
        text = path.read_text(encoding="utf-8-sig")
        if max(map(len, text.split("\n"))) > LINE_LIMIT:
            raise ValueError(f"it has a line of more than {LINE_LIMIT:,} characters")
        table = tomllib.loads(text)
        _check_plain(table)
    except (OSError, ValueError, RecursionError) as problem:  # CheckpointError is a ValueError
        raise ConfigError(f"{path} cannot be read as TOML: {problem!s:.300}") from problem
    return table


def _check_plain(value: Any, where: str = "", depth: int = 0) -> None:
    """Raises ValueError for a value that no setting takes: infinite, too large, too long, too nested, or a date."""
    if depth > DEPTH_LIMIT or len(where) > TEXT_LIMIT:
        raise ValueError(f"{where:.80}… is nested too deeply, or its name is too long")
    if isinstance(value, dict):
        for key, part in value.items():
            _check_plain(part, f"{where}.{key}".removeprefix("."), depth + 1)
    elif isinstance(value, list):
        for part in value:
            _check_plain(part, where, depth + 1)
    elif isinstance(value, str):
        if len(value) > TEXT_LIMIT:
            raise ValueError(f"{where} is a text of {len(value):,} characters; the limit is {TEXT_LIMIT:,}")
    elif isinstance(value, int | float):
        if not abs(value) <= 2**64:
            raise ValueError(f"{where} is {shown(value):.40}; it must be finite, and at most 2^64")
    else:
        raise ValueError(f"{where} is a date or a time; no setting takes one")


def write_json(path: str | os.PathLike[str], obj: dict[str, Any]) -> None:
    """Write `obj` to `path` as indented JSON with sorted keys. The write is atomic and replaces an existing file.

    Raises what `json_bytes` and `atomic_file` raise.
    """
    data = json_bytes(obj, path)
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def json_bytes(obj: dict[str, Any], path: str | os.PathLike[str]) -> bytes:
    """`obj` as `write_json` writes it to `path`.

    Raises ConfigError for values that JSON cannot represent, including NaN and infinities.
    """
    try:
        text = json.dumps(obj, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
        return text.encode("utf-8")
    except (TypeError, ValueError) as problem:
        raise ConfigError(f"{path} cannot be written as JSON: {problem}") from problem


# -- atomic writes -------------------------------------------------------------------------------------------------


def output_path(path: str | os.PathLike[str]) -> Path:
    """The output path `path` with links resolved; nothing is created.

    Raises InputError for a path that is empty, contains a NUL, or is too long.
    """
    text = os.fspath(path)
    if not _is_possible(text, OUTPUT_LIMIT):
        raise InputError(f"{_shown(path)} is not a valid output path: it is empty or too long, or contains a NUL")
    return Path(os.path.realpath(text))


def output_folder(path: str | os.PathLike[str]) -> Path:
    """Create the folder `path` if it does not exist, and return it.

    Raises what `output_path` raises, OutputExistsError for a file, and OutputError when it cannot be created.
    """
    target = output_path(path)
    with writing(path):
        try:
            target.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as problem:
            raise OutputExistsError(f"{path}, or a folder above it, is a file; name a folder") from problem
    return Path(path)


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn write errors, such as a full disk or a missing permission, into OutputError with `path` and the reason."""
    from safetensors import SafetensorError

    try:
        yield
    except (UnclipError, BrokenPipeError):
        raise
    except (OSError, SafetensorError) as problem:
        raise OutputError(f"{path} cannot be written: {problem}") from problem


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], overwrite: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with its suffix; at the end it is synced and takes the name `path`.

    On an error the temporary file is removed and `path` is unchanged. Missing parent folders are created. Raises
    OutputExistsError when `path` is a folder, or exists and `overwrite` is False; OutputError when the disk is full or
    a folder cannot be written; InputError as `output_path`.
    """
    target = output_path(path)
    if target.is_dir():
        raise OutputExistsError(f"{path} is a folder; name a file")
    if not overwrite and target.exists():
        raise OutputExistsError(_exists(path))
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}{target.suffix[:16]}")
    with writing(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            sync(temporary)
            if not overwrite:
                _link_new(temporary, target, path)
            os.replace(temporary, target)
            sync(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; at the end its files are synced and it takes the name `path`.

    On an error the temporary folder is removed and `path` is unchanged; a killed process leaves at most a folder whose
    name starts with `.unclip-tmp-`. With `overwrite` an existing folder is replaced, not merged, and only after the new
    one is complete. Raises OutputExistsError when `path` is a file, a folder that is not empty (unless `overwrite`),
    or the home or current folder or one of their parents, which are never replaced; OutputError when the disk is
    full or a folder cannot be written; InputError as `output_path`.
    """
    target = output_path(path)
    _check_folder_target(target, path, overwrite)
    output_folder(target.parent)
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}")
    with writing(path):
        try:
            temporary.mkdir()
            yield temporary
            for root, _, names in os.walk(temporary):
                for name in names:
                    sync(Path(root, name))
                sync(Path(root))
            _check_folder_target(target, path, overwrite)  # another process may have created it since
            _put_folder(temporary, target)
            sync(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _check_folder_target(target: Path, path: str | os.PathLike[str], overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputExistsError(f"{path} is a file; name a folder")
    if any(target.iterdir()) and not overwrite:
        raise OutputExistsError(_exists(path))
    for kind, find in (("current", Path.cwd), ("home", Path.home)):  # even an empty one
        with contextlib.suppress(FileNotFoundError, RuntimeError):  # the folder does not exist
            if target in ((kept := find()), *kept.parents):
                verb = "is" if target == kept else "contains"
                raise OutputExistsError(f"{path} {verb} the {kind} folder, which is never replaced; name a new folder")


def _put_folder(temporary: Path, target: Path) -> None:
    """Rename `temporary` to `target`. An existing folder takes the name `temporary` or is removed."""
    if _exchange(temporary, target):
        return
    aside = temporary.with_name(temporary.name + "-old")
    if is_old := target.exists():
        os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except OSError:
        if is_old:
            os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths atomically (renameat2 of Linux). Returns: False if this is not possible."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # not Linux
        return False
    at_working_folder, exchange = -100, ctypes.c_uint(2)
    return call(at_working_folder, os.fsencode(one), at_working_folder, os.fsencode(other), exchange) == 0


def _link_new(temporary: Path, target: Path, path: str | os.PathLike[str]) -> None:
    """Fail if `target` exists. A hard link makes this atomic where the file system supports links."""
    try:
        os.link(temporary, target)
    except OSError as problem:
        if target.exists():
            raise OutputExistsError(_exists(path)) from problem


@contextlib.contextmanager
def locked(folder: Path, refusal: UnclipError) -> Iterator[None]:
    """A context in which no other process can lock the folder. The lock ends with the process.

    Windows and some file systems have no such locks; there it does nothing. Raises: `refusal`.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as problem:
            raise refusal from problem
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


def sync(path: Path) -> None:
    """Flush `path` to the disk. Errors for folders are ignored, since not every system can sync a folder."""
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not is_folder:
            raise
    finally:
        os.close(handle)


# -- names ---------------------------------------------------------------------------------------------------------


def safe_join(folder: str | os.PathLike[str], name: str) -> Path:
    """`folder`/`name` for a name that was read from a file; it does not have to exist.

    Raises UnsafeFileError for a name that is empty, absolute, very long, or has `..`, a backslash or a NUL, and for a
    symbolic link out of the folder. In a snapshot of the hub's cache, links to any place in the cache folder of that
    model are allowed, because snapshots consist of links to `blobs/`.
    """
    if not isinstance(name, str) or "\\" in name or not _is_possible(name, PATH_LIMIT):
        raise UnsafeFileError(f"the file name {_shown(name)} is empty or too long, or contains a NUL or a backslash")
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or ".." in PurePosixPath(name).parts:
        raise UnsafeFileError(f"the file name {_shown(name)} leads out of its folder {folder}")
    base = Path(os.path.realpath(folder))
    joined = Path(folder, name)
    resolved = Path(os.path.realpath(joined))
    if not resolved.is_relative_to(base) and not resolved.is_relative_to(hub_root(base) or base):
        raise UnsafeFileError(
            f"{joined} is a link that leaves its folder (to {resolved}); replace it by the file itself"
        )
    return joined


def hub_root(folder: Path) -> Path | None:
    """`…/models--owner--name` for a folder at or below `…/models--owner--name/snapshots/REVISION`."""
    for place in (folder, *folder.parents):
        if place.parent.name == "snapshots" and re.fullmatch(r"models--[^/]+", place.parent.parent.name):
            return place.parent.parent
    return None


def _is_possible(path: str, limit: int) -> bool:
    """Whether a path is not empty, has no NUL, and has at most `limit` bytes and `NAME_LIMIT` bytes in each part."""
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:  # an unpaired surrogate, which JSON can express
        return False
    is_short = len(encoded) <= limit and all(len(part) <= NAME_LIMIT for part in encoded.split(b"/"))
    return is_short and encoded != b"" and b"\0" not in encoded


def _shown(path: object) -> str:
    text = str(path)
    return repr(text if len(text) <= 120 else f"{text[:80]}…{text[-30:]}")


def _exists(path: str | os.PathLike[str]) -> str:
    return f"{path} already exists; allow overwriting, or choose another path"
