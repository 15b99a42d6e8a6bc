"""Find the folder of a model by name: a local folder, a built-in model, or `owner/name` on the hub.

Pickles are never downloaded.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import glob
import importlib.resources
import os
import re
from collections.abc import Sequence
from pathlib import Path

from unclip.checkpoints.layout import CONCEPTS_FILE, PROBE_FILE
from unclip.errors import CheckpointError, InputError, MissingFileError

BUILT_IN_JUDGE = "unclip-emoji-judge"
BUILT_IN = {"unclip-emoji": "emoji", BUILT_IN_JUDGE: "emoji-judge"}
"""Reserved model names, and their folders under `unclip/assets`. They need no download."""

SUFFIXES = (".json", ".txt", ".safetensors")

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,254}")
_WEIGHTS = re.compile(
    r"(?P<stem>[^.]+?)(?:\.(?P<variant>[^.]+?))?(?:-\d{5}-of-\d{5})?(?:\.(?P<late>[^.]+))?\.safetensors"
)
_INDEX = re.compile(r"(?P<stem>[^.]+)\.safetensors\.index(?:\.(?P<variant>[^.]+))?\.json")


def resolve(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    variant: str | None = None,
    allow_patterns: Sequence[str] | None = None,
) -> Path:
    """The folder of a model: an existing folder, the folder of a built-in model, or a download from the hub.

    Only .json, .txt and .safetensors files are downloaded (if `allow_patterns` is given, only those that match it).
    `variant` selects the weights of that variant where they exist, otherwise the plain weights. Raises InputError when
    the name is not a string, MissingFileError when no model has that name, CheckpointError when the download fails.
    """
    if not isinstance(name_or_path, str | os.PathLike) or not isinstance(name := os.fspath(name_or_path), str):
        raise InputError(f"a model is named by a string or a path, not by {type(name_or_path).__name__}")
    if os.path.isdir(name):
        return Path(name)
    if name in BUILT_IN:
        return _built_in(name)
    if os.path.exists(name):
        raise CheckpointError(f"{name} is a file; name the model's folder. Original .ckpt files: unclip convert karlo")
    if not is_name(name):
        raise MissingFileError(f"{_shown(name)} is not a folder, and not an owner/name on the hub{_suggestion(name)}")
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise CheckpointError(f"revision is {revision[:80]!r}; it must be a branch, a tag or a commit")
    return _download(name, revision, cache_dir, local_files_only, token, variant, allow_patterns)


def is_name(text: str) -> bool:
    """Whether `text` is the name of a built-in model or has the form `owner/name`."""
    return text in BUILT_IN or (_HUB_ID.fullmatch(text) is not None and ".." not in text)


def pick_files(
    names: Sequence[str], variant: str | None = None, allow_patterns: Sequence[str] | None = None
) -> list[str]:
    """The files of a repository that a model needs: no pickles, and one set of weights per folder.

    Weights beside a model_index.json do not belong to a component. They are skipped, except for principal components.
    Raises MissingFileError when `variant` is given and no folder has it.
    """
    patterns = ["*"] if allow_patterns is None else allow_patterns
    wanted = [n for n in names if n.endswith(SUFFIXES) and any(fnmatch.fnmatch(n, pattern) for pattern in patterns)]
    kinds = {name: kind for name in wanted if (kind := _weights_kind(name))}
    variants = {variant for _, _, variant in kinds.values() if variant}
    if variant is not None and variant not in variants:
        some = ", ".join(sorted(variants)) or "plain ones"
        raise MissingFileError(f"there are no {variant} weights; existing files: {some}")
    has_variant = {(folder, stem) for folder, stem, its in kinds.values() if its == variant}
    kept = [name for name in wanted if name not in kinds and not name.endswith(".safetensors")]
    for name, (folder, stem, its) in kinds.items():
        is_component = folder or "model_index.json" not in names or f"{stem}.safetensors" in (PROBE_FILE, CONCEPTS_FILE)
        if is_component and its == (variant if (folder, stem) in has_variant else None):
            kept.append(name)
    return kept


def _weights_kind(name: str) -> tuple[str, str, str | None] | None:
    """The folder, the stem and the variant of a file of weights or an index; None for another file."""
    folder, _, base = name.rpartition("/")
    found = _INDEX.fullmatch(base) or _WEIGHTS.fullmatch(base)
    return (folder, found["stem"], found["variant"] or found.groupdict().get("late")) if found else None


def _built_in(name: str) -> Path:
    folder = Path(str(importlib.resources.files("unclip").joinpath("assets", BUILT_IN[name])))
    if not any((folder / mark).exists() for mark in ("model_index.json", "text_encoder")):  # a pipeline, or a CLIP
        raise MissingFileError(f"the built-in model {name} is not part of this installation ({folder}); reinstall it")
    return folder


def _suggestion(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), BUILT_IN, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; the built-in models are: {', '.join(BUILT_IN)}"


def _shown(name: str) -> str:
    return repr(name if len(name) <= 120 else name[:100] + "…")


def _download(
    name: str,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
    token: str | bool | None,
    variant: str | None,
    allow_patterns: Sequence[str] | None,
) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    place = None if cache_dir is None else os.fspath(cache_dir)
    download = functools.partial(huggingface_hub.snapshot_download, name, revision=revision, cache_dir=place)
    why = "only local files were requested"
    try:
        if not local_files_only:
            try:
                info = huggingface_hub.HfApi(token=token).model_info(name, revision=revision)
            except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError):
                raise
            except Exception as problem:  # the transport's own errors differ between versions of the hub's client
                why = f"the hub cannot be reached ({problem})"
            else:
                files = pick_files([file.rfilename for file in info.siblings or ()], variant, allow_patterns)
                if not files:
                    raise MissingFileError(f"{name} on the hub has no usable files ({', '.join(SUFFIXES)})")
                return Path(download(token=token, allow_patterns=[glob.escape(file) for file in files]))
        # The cached files. The loader reports missing ones.
        return Path(download(local_files_only=True, allow_patterns=["model_index.json"]))
    except CheckpointError:
        raise
    except errors.GatedRepoError as problem:
        raise CheckpointError(
            f"{name} is gated: accept its terms on https://huggingface.co/{name}, then `hf auth login` or pass token="
        ) from problem
    except errors.RevisionNotFoundError as problem:
        raise MissingFileError(f"{name} has no revision {revision!r}; omit it for the latest") from problem
    except errors.RepositoryNotFoundError as problem:
        raise MissingFileError(
            f"{name} is not a folder, and the hub has no public model of that name{_suggestion(name)}. "
            "A private model needs token= or `hf auth login`"
        ) from problem
    except errors.LocalEntryNotFoundError as problem:
        raise MissingFileError(
            f"{name} is not in the cache, and {why}; download it while online, or name a folder{_suggestion(name)}"
        ) from problem
    except Exception as problem:
        raise CheckpointError(f"{name} could not be downloaded: {problem}. Try again, or name a folder") from problem
