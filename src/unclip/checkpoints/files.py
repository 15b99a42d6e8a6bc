"""Read JSON with suspicion, write files and folders whole or not at all, and keep names inside their folder.

Does not know what any file means.
Everything that saves or loads a model calls it.
"""

import contextlib
import ctypes
import json
import math
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NoReturn

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

JSON_LIMIT_BYTES = 16 << 20
"""Most that `read_json` reads unless told otherwise: a shard index of a very large model is about 1 MB."""

NAME_LIMIT = 255
PATH_LIMIT = 1024
"""Of a name that comes out of a file."""
OUTPUT_LIMIT = 4096
"""Of a name that a person gives."""
TEMPORARY_PREFIX = ".unclip-tmp-"

_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_AT_FDCWD = -100


# -- JSON ----------------------------------------------------------------------------------------------------------


def parse_json_object(
    data: bytes, what: str, error: type[CheckpointError] = CheckpointError, *, allow_infinity: bool = False
) -> dict[str, Any]:
    """The JSON object in `data`; `what` names it in messages.

    Raises `error` for text that is not UTF-8 or not JSON, for anything but an object, and for what Python's parser lets
    through: a key given twice, NaN and infinities (also as 1e999). With `allow_infinity` the words Infinity and
    -Infinity are numbers, as the ecosystem's schedulers write them.
    """

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise error(f"{what} has the key {name[:80]!r} twice; which one holds cannot be known, so remove one")
            found[name] = value
        return found

    def constant(text: str) -> float:
        return float(text) if allow_infinity and text != "NaN" else no_constant(text)

    def no_constant(text: str) -> NoReturn:
        raise error(f"{what} holds {text}, which is not a JSON number; only finite numbers are allowed")

    def finite(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else no_constant(text[:40])

    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=no_duplicates, parse_constant=constant, parse_float=finite)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as problem:
        raise error(f"{what} is not JSON: {problem}. Download or save it again") from problem
    if not isinstance(value, dict):
        raise error(f"{what} must hold a JSON object in braces, not a {type(value).__name__}")
    return value


def read_json(
    path: str | os.PathLike[str], *, limit_bytes: int = JSON_LIMIT_BYTES, allow_infinity: bool = False
) -> dict[str, Any]:
    """The JSON object in the file `path`; `allow_infinity` as in `parse_json_object`.

    Raises MissingFileError when there is no such file, CheckpointError when it is no regular file, larger than
    `limit_bytes`, not JSON, not an object, or has duplicate keys or numbers that are not finite.
    """
    size_bytes = file_size(path)
    if size_bytes > limit_bytes:
        raise CheckpointError(f"{path} is {size_bytes} bytes; a JSON file here may have at most {limit_bytes}")
    return parse_json_object(Path(path).read_bytes(), str(path), allow_infinity=allow_infinity)


def file_size(path: str | os.PathLike[str]) -> int:
    """Bytes of the regular file `path`; MissingFileError if there is none, CheckpointError if it is something else."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as problem:
        raise MissingFileError(
            f"{_shown(path)} cannot be read ({_reason(problem)}); is the folder complete?"
        ) from problem
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is not a regular file")
    return found.st_size


def write_json(path: str | os.PathLike[str], obj: dict[str, Any]) -> None:
    """Write `obj` to `path` as indented JSON, keys sorted, whole or not at all; an older file is replaced.

    Raises ConfigError as `json_bytes`, and what `atomic_file` raises.
    """
    data = json_bytes(obj, path)
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def json_bytes(obj: dict[str, Any], path: str | os.PathLike[str]) -> bytes:
    """`obj` as `write_json` writes it to `path`.

    Raises ConfigError for values that JSON cannot hold, NaN and infinities among them.
    """
    try:
        text = json.dumps(obj, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
        return text.encode("utf-8")
    except (TypeError, ValueError) as problem:
        raise ConfigError(f"{path} cannot be written as JSON: {problem}") from problem


# -- whole or not at all -------------------------------------------------------------------------------------------


def output_path(path: str | os.PathLike[str]) -> Path:
    """`path` as the place to write to, links followed; nothing is made yet.

    Raises InputError for a name that no file can have: empty, with a NUL, or longer than 255 bytes a part.
    """
    text = os.fspath(path)
    if not text or "\0" in text:
        raise InputError(f"{_shown(path)} is no name to write to: it is empty, or has a NUL in it")
    if len(os.fsencode(text)) > OUTPUT_LIMIT or any(len(os.fsencode(part)) > NAME_LIMIT for part in Path(text).parts):
        raise InputError(f"{_shown(path)} is longer than {NAME_LIMIT} bytes a part or {OUTPUT_LIMIT} in all")
    return Path(os.path.realpath(text))


def output_folder(path: str | os.PathLike[str]) -> Path:
    """`path` as a folder to write into, made if need be. Raises as `output_path`, OutputExistsError for a file, and
    OutputError when it cannot be made."""
    target = output_path(path)
    for place in (target, *target.parents):
        if place.exists():
            if not place.is_dir():
                raise OutputExistsError(f"{place} is a file; name a folder")
            break
    with writing(path):
        target.mkdir(parents=True, exist_ok=True)
    return Path(path)


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Within it, a full disk or a missing permission raises OutputError, which names `path` and the reason."""
    try:
        yield
    except (UnclipError, BrokenPipeError):
        raise
    except Exception as problem:
        from safetensors import SafetensorError

        if isinstance(problem, OSError | SafetensorError):
            raise OutputError(f"{path} cannot be written: {problem}") from problem
        raise


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], overwrite: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with its suffix; at the end it is synced and takes the name `path`.

    On an error the temporary file is removed and `path` is as it was. Missing parent folders are made. Raises
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
            if overwrite:
                os.replace(temporary, target)
            else:
                _rename_new(temporary, target, path)
            sync(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; at the end all in it is synced and it takes the name `path`.

    On an error the temporary folder is removed and `path` is as it was; a killed process leaves at most a folder whose
    name starts with `.unclip-tmp-`. With `overwrite` an existing folder is replaced as a whole, never merged, and only
    once the new one is complete. Raises OutputExistsError when `path` is a file, a folder with something in it (unless
    `overwrite`), or the home or current folder or one above it, which is never replaced; OutputError when the disk is
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
            _check_folder_target(target, path, overwrite)  # it may have come into being meanwhile
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
    for kind, find in (("current", Path.cwd), ("home", Path.home)):  # also when it is empty
        with contextlib.suppress(FileNotFoundError, RuntimeError):  # there is none
            kept = find()
            if target == kept or target in kept.parents:
                raise OutputExistsError(
                    f"{path} {'is' if target == kept else 'contains'} the {kind} folder, and would be replaced as a "
                    "whole; name a new folder"
                )


def _put_folder(temporary: Path, target: Path) -> None:
    """Give `temporary` the name `target`; what stood there ends up under the name `temporary`, or is gone."""
    if not target.exists():
        os.rename(temporary, target)
    elif not any(target.iterdir()):
        target.rmdir()
        os.rename(temporary, target)
    elif not _exchange(temporary, target):
        aside = temporary.with_name(temporary.name + "-old")
        os.rename(target, aside)
        try:
            os.rename(temporary, target)
        except OSError:
            os.rename(aside, target)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step of the kernel; False where that is not to be had."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_EXCHANGE)) == 0


def _rename_new(temporary: Path, target: Path, path: str | os.PathLike[str]) -> None:
    """Rename, but fail if `target` exists; a link decides that in one step where the file system has links."""
    try:
        os.link(temporary, target)
    except FileExistsError as problem:
        raise OutputExistsError(_exists(path)) from problem
    except OSError:
        if target.exists():
            raise OutputExistsError(_exists(path)) from None
        os.rename(temporary, target)


def sync(path: Path) -> None:
    """Have the system write `path` to the disk; folders cannot be synced everywhere, so that may fail in silence."""
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError:
        if not is_folder:
            raise
    finally:
        os.close(handle)


# -- names ---------------------------------------------------------------------------------------------------------


def safe_join(folder: str | os.PathLike[str], name: str) -> Path:
    """`folder`/`name` for a name that comes out of a file; it need not exist.

    Raises UnsafeFileError for an empty, absolute or very long name, one with `..`, a backslash or NUL, and for a
    symbolic link that leaves the folder. In a snapshot of the hub's cache, links may lead anywhere into that model's
    own cache folder, because its snapshots are made of links to `blobs/`.
    """
    if not isinstance(name, str) or not name:
        raise UnsafeFileError(f"a file name must be a text that is not empty, not {name!r}")
    shown = _shown(name)
    if "\0" in name or "\\" in name:
        raise UnsafeFileError(f"the file name {shown} has a NUL or a backslash in it")
    parts = PurePosixPath(name).parts
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or ".." in parts:
        raise UnsafeFileError(f"the file name {shown} leads out of its folder {folder}")
    if len(name) > PATH_LIMIT or any(len(os.fsencode(part)) > NAME_LIMIT for part in parts):
        raise UnsafeFileError(f"the file name {shown} is longer than {NAME_LIMIT} bytes a part or {PATH_LIMIT} in all")
    base = Path(os.path.realpath(folder))
    joined = Path(folder, name)
    resolved = Path(os.path.realpath(joined))
    allowed = hub_root(base) or base
    if resolved != base and base not in resolved.parents and allowed not in resolved.parents:
        raise UnsafeFileError(f"{joined} is a link that leaves its folder (to {resolved}); put the file itself there")
    return joined


def hub_root(folder: Path) -> Path | None:
    """`…/models--owner--name` for a folder at or below `…/models--owner--name/snapshots/REVISION`."""
    for place in (folder, *folder.parents):
        if place.parent.name == "snapshots" and re.fullmatch(r"models--[^/]+", place.parent.parent.name):
            return place.parent.parent
    return None


def _shown(path: str | os.PathLike[str]) -> str:
    text = os.fspath(path)
    return repr(text if len(text) <= 120 else f"{text[:80]}…{text[-30:]}")


def _reason(problem: OSError | ValueError) -> str:
    return (problem.strerror or str(problem)) if isinstance(problem, OSError) else str(problem)


def _exists(path: str | os.PathLike[str]) -> str:
    return f"{path} exists already; ask for overwriting, or name another place"
