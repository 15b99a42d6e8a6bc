"""Names of models become folders; whatever goes wrong on the way has a typed error with a remedy."""

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from unclip.checkpoints import hub
from unclip.checkpoints.hub import pick_files, resolve
from unclip.errors import CheckpointError, InputError, MissingFileError

REPOSITORY = {
    "model_index.json": b"{}",
    "README.md": b"# Karlo",
    "everything.safetensors": b"x",
    "everything.ckpt": b"x",
    "prior/config.json": b"{}",
    "prior/diffusion_pytorch_model.bin": b"x",
    "prior/diffusion_pytorch_model.safetensors": b"plain",
    "prior/diffusion_pytorch_model.fp16.safetensors": b"half",
    "decoder/diffusion_pytorch_model.safetensors.index.json": b"{}",
    "decoder/diffusion_pytorch_model-00001-of-00002.safetensors": b"x",
    "decoder/diffusion_pytorch_model-00002-of-00002.safetensors": b"x",
    "decoder/diffusion_pytorch_model.safetensors.index.fp16.json": b"{}",
    "decoder/diffusion_pytorch_model.fp16-00001-of-00002.safetensors": b"x",
    "decoder/diffusion_pytorch_model-00002-of-00002.fp16.safetensors": b"x",
    "text_encoder/model.safetensors": b"x",
    "tokenizer/merges.txt": b"x",
    "tokenizer/code.py": b"x",
}


def test_importing_it_is_cheap():
    code = (
        "import sys, unclip.checkpoints.hub;"
        "print([m for m in ('torch', 'huggingface_hub', 'safetensors') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_folder_is_itself(tmp_path, monkeypatch):
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve("owner/name") == Path("owner/name")


def test_built_in_names_need_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_download", lambda *_: pytest.fail("went to the hub"))
    monkeypatch.setattr(hub.importlib.resources, "files", lambda package: tmp_path / package)
    with pytest.raises(MissingFileError, match="unclip-emoji is not part of this installation"):
        resolve("unclip-emoji")
    asset = tmp_path / "unclip" / "assets" / "emoji"
    asset.mkdir(parents=True)
    with pytest.raises(MissingFileError):  # an empty folder is not a model
        resolve("unclip-emoji")
    (asset / "model_index.json").write_text("{}")
    assert resolve("unclip-emoji") == asset
    judge = asset.with_name("emoji-judge")
    with pytest.raises(MissingFileError, match="unclip-emoji-judge is not part"):
        resolve(hub.BUILT_IN_JUDGE)
    (judge / "text_encoder").mkdir(parents=True)  # a CLIP alone is not a pipeline; it lacks model_index.json
    assert resolve(hub.BUILT_IN_JUDGE) == judge


@pytest.mark.parametrize("name", ["unclip-emogi", "unclip_emoji", "Unclip-Emoji", "unclip-emojis", "./unclip-emoji"])
def test_a_near_miss_is_told_what_was_meant(name):
    with pytest.raises(MissingFileError, match="did you mean 'unclip-emoji'"):
        resolve(name)
    with pytest.raises(MissingFileError, match="built-in models are: unclip-emoji"):
        resolve("something-else")


BAD_NAMES = [
    "", "  ", "gpt2", "../x/y", "a/..", "owner/na..me", "/absent/model", "./absent", "a/b/c", "a\0b", "x" * 5000,
    "owner/na me", "C:\\model", "~/absent", "owner/" + "n" * 200, "-owner/name", "owner/name\n", "https://huggingface.co/o/n",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_can_be_nothing(name, monkeypatch):
    monkeypatch.setattr(hub, "_download", lambda *_: pytest.fail("went to the hub"))
    with pytest.raises(MissingFileError) as caught:
        resolve(name)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", [None, 3, b"owner/name", ["owner/name"]])
def test_a_name_is_a_text(name):
    with pytest.raises(InputError, match="not by"):
        resolve(name)


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "prior.ckpt").write_text("x")
    with pytest.raises(CheckpointError, match="unclip convert karlo"):
        resolve(tmp_path / "prior.ckpt")


@pytest.mark.parametrize("revision", ["../x", "", "a\0", "x" * 300, "-x", "a b"])
def test_a_revision_is_a_branch_or_commit(revision):
    with pytest.raises(CheckpointError, match="revision is"):
        resolve("owner/name", revision=revision)


# -- which files ---------------------------------------------------------------------------------------------------


def test_principal_components_come_along():
    names = ["model_index.json", "probe.safetensors", "prior-v1.safetensors", "prior/config.json"]
    assert sorted(pick_files(names)) == ["model_index.json", "prior/config.json", "probe.safetensors"]


def test_plain_files_without_pickles_and_other_variants():
    assert sorted(pick_files(list(REPOSITORY))) == [
        "decoder/diffusion_pytorch_model-00001-of-00002.safetensors",
        "decoder/diffusion_pytorch_model-00002-of-00002.safetensors",
        "decoder/diffusion_pytorch_model.safetensors.index.json",
        "model_index.json",
        "prior/config.json",
        "prior/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
    ]


def test_a_variant_where_there_is_one_and_plain_files_elsewhere():
    assert sorted(pick_files(list(REPOSITORY), "fp16")) == [
        "decoder/diffusion_pytorch_model-00002-of-00002.fp16.safetensors",
        "decoder/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "decoder/diffusion_pytorch_model.safetensors.index.fp16.json",
        "model_index.json",
        "prior/config.json",
        "prior/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
    ]
    with pytest.raises(MissingFileError, match="no bf16 weights; existing files: fp16"):
        pick_files(list(REPOSITORY), "bf16")


def test_patterns_narrow_and_a_single_model_keeps_its_weights():
    assert pick_files(list(REPOSITORY), allow_patterns=["prior/*"]) == [
        "prior/config.json",
        "prior/diffusion_pytorch_model.safetensors",
    ]
    clip = ["config.json", "model.safetensors", "pytorch_model.bin", "flax_model.msgpack", "vocab.json"]
    assert sorted(pick_files(clip)) == ["config.json", "model.safetensors", "vocab.json"]
    assert pick_files(["prior/strange.name.of.some.safetensors"]) == []


# -- the hub itself, on this machine -------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's interface as a download needs."""

    sha = "a" * 40

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/owner/name/tree/"):
            return self.answer(
                [
                    {"type": "file", "path": n, "size": len(c), "oid": f"{i:040x}"}
                    for i, (n, c) in enumerate(REPOSITORY.items())
                ]
            )
        if path in ("/api/models/owner/name", "/api/models/owner/name/revision/main"):
            return self.answer(
                {"id": "owner/name", "sha": self.sha, "siblings": [{"rfilename": n} for n in REPOSITORY]}
            )
        if path == "/api/models/owner/empty":
            return self.answer({"id": "owner/empty", "sha": self.sha, "siblings": [{"rfilename": "model.bin"}]})
        if path.startswith("/api/models/owner/gated"):
            return self.answer({}, 403, {"X-Error-Code": "GatedRepo"})
        if path.startswith("/api/models/owner/name/revision/"):
            return self.answer({}, 404, {"X-Error-Code": "RevisionNotFound"})
        if path.startswith("/api/models/owner/broken"):
            return self.answer({}, 500)
        name = path.removeprefix(f"/owner/name/resolve/{self.sha}/")
        if name in REPOSITORY:
            return self.answer(
                REPOSITORY[name], 200, {"ETag": f'"{name.replace("/", "-")}"', "X-Repo-Commit": self.sha}
            )
        return self.answer({}, 404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET  # noqa: N815

    def answer(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


ASK = """
import json, sys
from unclip.checkpoints.hub import resolve
for question in json.loads(sys.argv[1]):
    try:
        folder = resolve(**question)
        print(json.dumps(sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())))
    except Exception as problem:
        print(json.dumps([type(problem).__name__, str(problem)]))
"""


def ask(endpoint: str, *questions: dict[str, object]) -> list[list[str]]:
    """`resolve` in a process of its own, because the hub's client reads its address when it is imported."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(questions)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_download_and_what_can_go_wrong_with_it(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    cache = str(tmp_path)
    try:
        plain, half, gated, absent, revision, empty, variant, broken = ask(
            endpoint,
            {"name_or_path": "owner/name", "cache_dir": cache},
            {"name_or_path": "owner/name", "cache_dir": cache, "variant": "fp16", "allow_patterns": ["prior/*"]},
            {"name_or_path": "owner/gated", "cache_dir": cache},
            {"name_or_path": "owner/absent", "cache_dir": cache},
            {"name_or_path": "owner/name", "cache_dir": cache, "revision": "v9"},
            {"name_or_path": "owner/empty", "cache_dir": cache},
            {"name_or_path": "owner/name", "cache_dir": cache, "variant": "bf16"},
            {"name_or_path": "owner/broken", "cache_dir": cache},
        )
    finally:
        server.shutdown()
        server.server_close()
    assert plain == sorted(pick_files(list(REPOSITORY)))
    assert "prior/diffusion_pytorch_model.fp16.safetensors" in half
    assert not any(name.endswith((".bin", ".ckpt", ".py")) for name in half)
    assert gated[0] == "CheckpointError"
    assert "accept its terms" in gated[1]
    assert absent[0] == "MissingFileError"
    assert "hub has no public model of that name" in absent[1]
    assert revision[0] == "MissingFileError"
    assert "no revision 'v9'" in revision[1]
    assert empty[0] == "MissingFileError"
    assert "has no usable files (.json" in empty[1]
    assert variant[0] == "MissingFileError"
    assert "existing files: fp16" in variant[1]
    assert broken[0] == "MissingFileError"
    assert "cannot be reached" in broken[1]

    dead = "http://127.0.0.1:9"  # nobody listens there; what was downloaded is still good
    cached, local, unknown, unknown_local = ask(
        dead,
        {"name_or_path": "owner/name", "cache_dir": cache},
        {"name_or_path": "owner/name", "cache_dir": cache, "local_files_only": True},
        {"name_or_path": "owner/other", "cache_dir": cache},
        {"name_or_path": "owner/other", "cache_dir": cache, "local_files_only": True},
    )
    assert set(plain) <= set(cached)
    assert cached == local
    assert unknown[0] == "MissingFileError"
    assert "cannot be reached" in unknown[1]
    assert "download it while online" in unknown[1]
    assert unknown_local[0] == "MissingFileError"
    assert "only local files were requested" in unknown_local[1]


def test_other_failures_of_the_hub_are_checkpoint_errors(monkeypatch, tmp_path):
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename="config.json")])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(CheckpointError, match="could not be downloaded: no space left"):
        resolve("owner/name", cache_dir=tmp_path)

    def invalid(*_, **__):
        raise errors.HFValidationError("bad id")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", invalid)
    with pytest.raises(CheckpointError, match="bad id"):
        resolve("owner/name")
