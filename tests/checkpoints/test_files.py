"""Untrusted JSON, files and folders that are written atomically, and names that stay inside their folder."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from unclip.checkpoints import files
from unclip.checkpoints.files import atomic_file, atomic_folder, read_json, safe_join, write_json
from unclip.errors import (
    CheckpointError,
    ConfigError,
    MissingFileError,
    OutputError,
    OutputExistsError,
    UnsafeFileError,
    WeightsError,
)


def fail_halfway(context) -> None:
    """Write something inside `context`, and fail."""
    with context as draft:
        (draft / "new" if draft.is_dir() else draft).write_text("half")
        raise RuntimeError


def race(context, target: Path) -> None:
    """Write inside `context` while somebody else makes `target`."""
    with context as draft:
        (draft / "mine" if draft.is_dir() else draft).write_text("mine")
        if draft.is_dir():
            target.mkdir()
        (target / "theirs" if draft.is_dir() else target).write_text("theirs")


def leftovers(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.name.startswith(files.TEMPORARY_PREFIX)]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"a": 1, "a": 2}', "'a' twice"),
        ('{"x": {"a": 1, "a": 1}}', "'a' twice"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "Infinity"),
        ('{"a": 1e999}', "1e999"),
        ("[1]", "not a list"),
        ("null", "not a NoneType"),
        ("{", "not JSON"),
        ("", "not JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not JSON"),
        ("[" * 200_000, "not JSON"),
        ("\ufeff{}", "not JSON"),
    ],
)
def test_json_that_python_or_people_let_through_is_refused(tmp_path, text, match):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=match):
        read_json(path)


def test_a_key_twice_among_many_is_found_at_once(tmp_path):
    path = tmp_path / "config.json"
    keys = [*range(200_000), 199_999]
    path.write_text("{" + ", ".join(f'"{key}": 0' for key in keys) + "}")
    begin = time.process_time()
    with pytest.raises(CheckpointError, match="'199999' twice"):
        read_json(path)
    assert time.process_time() - begin < 2


def test_json_that_is_no_text_or_no_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(CheckpointError, match="not JSON"):
        read_json(path)
    with pytest.raises(MissingFileError, match=r"absent\.json"):
        read_json(tmp_path / "absent.json")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / ("x" * 5000))
    with pytest.raises(MissingFileError, match="null"):
        read_json(f"{tmp_path}/a\0b")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_json(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_json(tmp_path / "pipe")


def test_json_larger_than_the_limit_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a": "' + "x" * 100 + '"}')
    assert read_json(path, limit_bytes=200)["a"] == "x" * 100
    with pytest.raises(CheckpointError, match="the limit for this JSON file is 50"):
        read_json(path, limit_bytes=50)


def test_written_json_comes_back_and_a_bad_value_leaves_the_old_file(tmp_path):
    path = tmp_path / "deep" / "config.json"
    write_json(path, {"b": [1, 2.5, None], "a": "é"})
    assert read_json(path) == {"a": "é", "b": [1, 2.5, None]}
    assert path.read_text(encoding="utf-8").index('"a"') < path.read_text(encoding="utf-8").index('"b"')
    for bad in ({"a": float("nan")}, {"a": object()}, {"a": "\ud800"}):
        with pytest.raises(ConfigError, match=r"config\.json"):
            write_json(path, bad)
    assert read_json(path)["a"] == "é"
    assert leftovers(path.parent) == []


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError):
        fail_halfway(atomic_file(path))
    assert path.read_text() == "old"
    assert leftovers(tmp_path) == []
    with atomic_file(path) as draft:
        assert draft.parent == tmp_path
        assert draft.suffix == ".txt"
        draft.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert leftovers(tmp_path) == []


def test_a_file_is_not_overwritten_unasked(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    with atomic_file(path, overwrite=False) as draft:
        draft.write_text("one")
    with pytest.raises(OutputExistsError, match="already exists"), atomic_file(path, overwrite=False):
        pytest.fail("must not get so far")
    with pytest.raises(OutputExistsError, match="is a folder"), atomic_file(tmp_path):
        pytest.fail("must not get so far")
    late = tmp_path / "late.txt"
    with pytest.raises(OutputExistsError):
        race(atomic_file(late, overwrite=False), late)
    assert late.read_text() == "theirs"
    assert path.read_text() == "one"

    def no_links(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", no_links)
    with atomic_file(tmp_path / "b.txt", overwrite=False) as draft:
        draft.write_text("two")
    assert (tmp_path / "b.txt").read_text() == "two"
    with pytest.raises(OutputExistsError):
        race(atomic_file(tmp_path / "c.txt", overwrite=False), tmp_path / "c.txt")
    assert leftovers(tmp_path) == []


def test_a_file_is_written_through_a_link(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    with atomic_file(tmp_path / "link.txt") as draft:
        draft.write_text("new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


@pytest.fixture
def old(tmp_path):
    target = tmp_path / "model"
    (target / "sub").mkdir(parents=True)
    (target / "sub" / "old").write_text("old")
    return target


def test_a_failure_in_the_middle_leaves_the_old_folder(tmp_path, old):
    with pytest.raises(RuntimeError):
        fail_halfway(atomic_folder(old, overwrite=True))
    with pytest.raises(RuntimeError):
        fail_halfway(atomic_folder(tmp_path / "other"))
    assert sorted(os.listdir(tmp_path)) == ["model"]
    assert (old / "sub" / "old").read_text() == "old"


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_is_replaced_as_a_whole(tmp_path, old, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    with atomic_folder(old, overwrite=True) as draft:
        (draft / "new").mkdir()
        (draft / "new" / "file").write_text("new")
        assert (old / "sub" / "old").exists()
    assert os.listdir(old) == ["new"]
    assert os.listdir(tmp_path) == ["model"]


def test_when_the_last_rename_fails_the_old_folder_comes_back(tmp_path, old, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    rename = os.rename

    def broken(source, target):
        if Path(target) == old and not str(source).endswith("-old"):
            raise OSError("disk full")
        rename(source, target)

    monkeypatch.setattr(os, "rename", broken)
    with pytest.raises(OSError, match="disk full"), atomic_folder(old, overwrite=True) as draft:
        (draft / "new").write_text("new")
    assert os.listdir(tmp_path) == ["model"]
    assert (old / "sub" / "old").exists()


def test_no_exchange_where_the_system_has_none(tmp_path, monkeypatch):
    assert not files._exchange(tmp_path / "absent", tmp_path / "absent too")

    def no_library(*_, **__):
        raise OSError("static binary")

    monkeypatch.setattr(files.ctypes, "CDLL", no_library)
    assert not files._exchange(tmp_path, tmp_path)


def test_a_folder_is_not_overwritten_unasked(tmp_path, old):
    with pytest.raises(OutputExistsError, match="already exists"), atomic_folder(old):
        pytest.fail("must not get so far")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputExistsError, match="is a file"), atomic_folder(tmp_path / "file", overwrite=True):
        pytest.fail("must not get so far")
    late = tmp_path / "late"
    with pytest.raises(OutputExistsError):
        race(atomic_folder(late), late)
    assert os.listdir(late) == ["theirs"]
    assert leftovers(tmp_path) == []
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty") as draft:
        (draft / "new").write_text("")
    assert os.listdir(tmp_path / "empty") == ["new"]


def test_home_and_the_current_folder_are_never_replaced(tmp_path, old, monkeypatch):
    monkeypatch.chdir(old / "sub")
    for target in (old, ".", old / "sub"):
        with pytest.raises(OutputExistsError, match="never replaced"), atomic_folder(target, overwrite=True):
            pytest.fail("must not get so far")
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", str(old / "sub"))
    with pytest.raises(OutputExistsError, match="never replaced"), atomic_folder(old, overwrite=True):
        pytest.fail("must not get so far")
    assert (old / "sub" / "old").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_empty_current_or_home_folder_is_not_replaced_either(tmp_path, monkeypatch, overwrite):
    monkeypatch.chdir(tmp_path)
    inode = os.stat(".").st_ino
    for target in (".", tmp_path, tmp_path / "x" / ".."):
        with (
            pytest.raises(OutputExistsError, match="is the current folder"),
            atomic_folder(target, overwrite=overwrite),
        ):
            pytest.fail("must not get so far")
    assert os.stat(".").st_ino == os.stat(tmp_path).st_ino == inode
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(OutputExistsError, match="is the home folder"), atomic_folder(tmp_path, overwrite=overwrite):
        pytest.fail("must not get so far")
    assert leftovers(tmp_path.parent) == []


def test_a_full_disk_is_a_typed_error_and_leaves_what_was_there(tmp_path, old, little_room):
    before = sorted(old.rglob("*"))
    with (
        little_room(10),
        pytest.raises(OutputError, match=r"model cannot be written: .*File too large"),
        atomic_folder(old, overwrite=True) as draft,
    ):
        (draft / "new").write_text("x" * 100)
    with little_room(10), pytest.raises(OutputError, match=r"a\.json cannot be written"):
        write_json(tmp_path / "a.json", {"a": "x" * 100})
    assert sorted(old.rglob("*")) == before
    assert leftovers(tmp_path) == []
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OutputError),
        (PermissionError(errno.EACCES, "Permission denied"), OutputError),
        (SafetensorError("Error while serializing: No space left on device"), OutputError),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), BrokenPipeError),
        (WeightsError("the weights are broken"), WeightsError),
        (MissingFileError("no such file"), MissingFileError),
        (ValueError("something else"), ValueError),
    ],
)
def test_only_what_the_system_refuses_is_an_output_error(tmp_path, raised, expected):
    for context in (atomic_folder(tmp_path / "a"), atomic_file(tmp_path / "b")):
        with pytest.raises(type(raised) if expected is not OutputError else OutputError) as caught, context:
            raise raised
        assert type(caught.value) is expected
        assert str(raised) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["writing", "syncing"])
def test_a_killed_save_leaves_the_old_folder(tmp_path, old, moment):
    code = f"""
import sys, time
from unclip.checkpoints import files
def stop(*_):
    print("now", flush=True)
    time.sleep(60)
if {moment!r} == "syncing":
    files.sync = stop
with files.atomic_folder({str(old)!r}, overwrite=True) as draft:
    (draft / "new").write_text("half")
    if {moment!r} == "writing":
        stop()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert (old / "sub" / "old").read_text() == "old"
    assert os.listdir(old) == ["sub"]
    assert len(leftovers(tmp_path)) == 1
    with atomic_folder(old, overwrite=True) as draft:  # and a leftover is in nobody's way
        (draft / "new").write_text("whole")
    assert os.listdir(old) == ["new"]


BAD_NAMES = [
    "",
    "/etc/passwd",
    "../x",
    "a/../../x",
    "..",
    "a\0b",
    "a\\b",
    "C:x",
    "C:\\x",
    "x" * 300,
    "x/" * 600 + "x",
    "\ud800",
    None,
    3,
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    with pytest.raises(UnsafeFileError):
        safe_join(tmp_path, name)


def test_plain_names_and_links_that_stay_inside_are_joined(tmp_path):
    assert safe_join(tmp_path, "a/b.json") == tmp_path / "a" / "b.json"
    assert safe_join(tmp_path, "a..b") == tmp_path / "a..b"
    (tmp_path / "real").write_text("x")
    (tmp_path / "link").symlink_to("real")
    assert safe_join(tmp_path, "link").read_text() == "x"


def test_links_out_of_the_folder_are_refused(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_text("x")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "up").symlink_to("..")
    (folder / "dangling").symlink_to("../absent")
    for name in ("link", "up", "up/secret", "dangling"):
        with pytest.raises(UnsafeFileError, match="link that leaves"):
            safe_join(folder, name)
    loop = folder / "loop"
    loop.symlink_to("loop")
    assert not safe_join(folder, "loop").exists()


def test_the_hubs_own_links_are_followed_but_no_others(tmp_path):
    root = tmp_path / "models--owner--name"
    snapshot = root / "snapshots" / "abc"
    (snapshot / "prior").mkdir(parents=True)
    (root / "blobs").mkdir()
    (root / "blobs" / "123").write_text("{}")
    (tmp_path / "models--other--name" / "blobs").mkdir(parents=True)
    (tmp_path / "models--other--name" / "blobs" / "9").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/123")
    (snapshot / "prior" / "config.json").symlink_to("../../../blobs/123")
    (snapshot / "theirs.json").symlink_to("../../../models--other--name/blobs/9")
    assert safe_join(snapshot, "config.json").exists()
    assert safe_join(snapshot / "prior", "config.json").exists()
    (tmp_path / "mine").symlink_to(snapshot)  # a link to a snapshot is a snapshot
    assert safe_join(tmp_path / "mine" / "prior", "config.json").exists()
    with pytest.raises(UnsafeFileError):
        safe_join(snapshot, "theirs.json")
    copy = tmp_path / "models" / "snapshots" / "abc"  # only the hub's own names make a cache
    copy.mkdir(parents=True)
    (copy / "config.json").symlink_to("../../../models--owner--name/blobs/123")
    with pytest.raises(UnsafeFileError):
        safe_join(copy, "config.json")


def test_a_folder_that_cannot_be_synced_is_no_failure_but_a_file_is(tmp_path, monkeypatch):
    def broken(_):
        raise OSError("input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    files.sync(tmp_path)
    with pytest.raises(OSError, match="input/output"):
        write_json(tmp_path / "a.json", {})
    assert os.listdir(tmp_path) == []
