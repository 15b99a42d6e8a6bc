"""The command `unclip serve`."""

import base64
import json
import os
import signal
import subprocess
import sys
import threading

import httpx2
import pytest
from PIL import Image

from .conftest import wait_until


def run(unclip_arguments: list[str], **more) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "unclip", *unclip_arguments], stderr=subprocess.PIPE, text=True, **more
    )


def test_the_command_line_loads_no_server():
    code = (
        "import sys, unclip.cli.main; sys.exit(bool({'fastapi', 'uvicorn', 'pydantic', 'torch'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_without_the_extra_the_error_names_it(monkeypatch):
    from typer.testing import CliRunner

    from unclip.cli.main import app

    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "unclip.server.app", raising=False)
    result = CliRunner().invoke(app, ["serve"], prog_name="unclip")
    assert result.exit_code == 1
    assert result.stderr == "error: the server needs fastapi: pip install 'unclip[server]'\n"


def test_without_ray_the_error_names_the_extra(monkeypatch, model_folder, tmp_path):
    from typer.testing import CliRunner

    from unclip.cli.main import app

    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "unclip.server.cluster", raising=False)
    command = ["serve", "--ray", "local", "--model", str(model_folder), "--folder", str(tmp_path)]
    result = CliRunner().invoke(app, command, prog_name="unclip")
    assert result.exit_code == 1
    assert result.stderr == "error: --ray needs ray: pip install 'unclip[server,ray]'\n"


@pytest.mark.parametrize("replicas", ["0", "4:2", "two"])
def test_wrong_numbers_of_replicas_are_refused(replicas):
    from typer.testing import CliRunner

    from unclip.cli.main import app

    result = CliRunner().invoke(app, ["serve", "--replicas", replicas], prog_name="unclip")
    assert (result.exit_code, "replicas is" in result.stderr) == (1, True)


def test_a_public_address_without_keys_is_refused(monkeypatch):
    from typer.testing import CliRunner

    from unclip.cli.main import app

    result = CliRunner().invoke(app, ["serve", "--host", "0.0.0.0"], prog_name="unclip")
    assert (result.exit_code, "keys are missing" in result.stderr) == (1, True)


def test_a_served_picture_is_made_again_by_rerun(live, model_folder, tmp_path):
    from typer.testing import CliRunner

    from unclip.cli.main import app

    body = {"prompt": "a cat", "negative_prompt": "a dog", "seed": 7, "n": 2, "response_format": "b64_json"}
    item = live.post("/v1/images/generations", json=body).json()["data"][1]
    (tmp_path / "served.png").write_bytes(base64.b64decode(item["b64_json"]))
    arguments = [
        "rerun",
        str(tmp_path / "served.png"),
        "--model",
        str(model_folder),
        "--out",
        str(tmp_path / "again.png"),
    ]
    result = CliRunner().invoke(app, arguments, prog_name="unclip")
    assert result.exit_code == 0, result.stderr
    with Image.open(tmp_path / "served.png") as served, Image.open(tmp_path / "again.png") as again:
        assert served.tobytes() == again.tobytes()
        assert again.text["negative"] == "a dog"


@pytest.mark.slow
def test_sigterm_finishes_the_running_request(model_folder, tmp_path):
    environment = {**os.environ, "UNCLIP_SERVER_FOLDER": str(tmp_path)}
    process = run(["serve", "--model", f"tiny={model_folder}", "--port", "0"], env=environment)
    lines: list[dict] = []
    threading.Thread(target=lambda: lines.extend(map(json.loads, process.stderr)), daemon=True).start()  # type: ignore[arg-type]
    wait_until(lambda: any(line["message"] == "listening" for line in lines), 60)
    url = next(line["url"] for line in lines if line["message"] == "listening")
    wait_until(lambda: httpx2.get(f"{url}/readyz").is_success, 60)
    found = []
    body = {"prompt": "a cat", "steps": 200}
    thread = threading.Thread(
        target=lambda: found.append(httpx2.post(f"{url}/v1/images/generations", json=body, timeout=180))
    )
    thread.start()
    wait_until(lambda: "unclip_queue_pictures 1.0" in httpx2.get(f"{url}/metrics").text)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=180) == 0
    thread.join(timeout=5)
    assert found[0].status_code == 200
    process.stderr.close()  # type: ignore[union-attr]
