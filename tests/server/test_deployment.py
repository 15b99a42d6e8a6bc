"""The files for deployment, and the guides about them."""

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from unclip.server.settings import ServerSettings

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy" / "unclip.service"
CONTAINER = ROOT / "deploy" / "Containerfile"
GUIDES = [ROOT / "docs" / "guides" / name for name in ("serving.md", "deployment.md")]


@pytest.mark.parametrize("path", [UNIT, CONTAINER, *GUIDES], ids=lambda path: path.name)
def test_every_variable_is_a_setting(path: Path):
    named = {name.lower() for name in re.findall(r"UNCLIP_SERVER_([A-Z_]+[A-Z])", path.read_text())}
    assert named
    assert not named - ServerSettings.model_fields.keys()


def test_the_guides_name_every_setting():
    text = "".join(path.read_text() for path in GUIDES)
    assert not [name for name in ServerSettings.model_fields if f"UNCLIP_SERVER_{name.upper()}`" not in text]


def test_the_unit_gives_requests_and_jobs_the_time_to_finish():
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(UNIT)
    service = unit["Service"]
    assert float(service["TimeoutStopSec"]) > 2 * ServerSettings.model_fields["drain_s"].default
    assert service["ExecStart"] == "/opt/unclip/bin/unclip serve"
    assert service["NoNewPrivileges"] == service["DynamicUser"] == "yes"


def test_the_container_is_not_run_by_root_and_stops_by_sigterm():
    lines = CONTAINER.read_text().replace("\\\n", " ").splitlines()
    instructions = [tuple(line.split(maxsplit=1)) for line in lines if line and not line.startswith("#")]
    assert {name for name, _ in instructions} <= {
        *("FROM", "ARG", "COPY", "RUN", "ENV", "USER", "VOLUME", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK"),
        *("CMD", "ENTRYPOINT"),
    }
    assert [value for name, value in instructions if name == "USER"] == ["10001"]
    assert ("STOPSIGNAL", "SIGTERM") in instructions
    copied = [value.split()[0] for name, value in instructions if name == "COPY"]
    assert copied == [".", "--from=build"]


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="needs hadolint")
def test_hadolint_finds_nothing():
    assert subprocess.run(["hadolint", str(CONTAINER)], timeout=60).returncode == 0
