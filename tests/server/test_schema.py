"""Generated requests of the OpenAPI document: no failure, and no answer that it does not describe."""

import io

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from PIL import Image

schemathesis = pytest.importorskip("schemathesis")

from schemathesis import checks  # noqa: E402
from schemathesis.specs.openapi import checks as openapi_checks  # noqa: E402

from unclip.pipelines.session import Session  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]
CHECKS = [
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_headers_conformance,
    openapi_checks.response_schema_conformance,
]
stream = io.BytesIO()
Image.new("RGB", (16, 16), "red").save(stream, "PNG")
schemathesis.openapi.format("binary", st.just(stream.getvalue()) | st.binary(max_size=100))


@pytest.fixture(scope="module")
def described(serve):
    """The document of a server that takes one step for every picture."""
    own = Session.settings

    def short(self, *given):
        few = ("num_inference_steps", "num_prior_candidates")
        return {name: 1 if name.endswith(few) else value for name, value in own(self, *given).items()}

    with pytest.MonkeyPatch.context() as patch, serve() as live:
        patch.setattr(Session, "settings", short)
        yield schemathesis.openapi.from_url(f"{live.url}/openapi.json")


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_every_answer_is_described(described, mode):
    base = described.location.removesuffix("openapi.json")
    job = httpx2.post(f"{base}v1/jobs", json={"prompt": "a cat"}, timeout=30).json()["id"]
    for found in described.get_all_operations():
        operation = found.ok()

        @given(case=operation.as_strategy(generation_mode=mode), is_known=st.booleans())
        @settings(
            max_examples=8, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
        )
        def run(case, is_known):
            if is_known and "/jobs/" in case.path:
                case.path_parameters["name"] = job
            case.call_and_validate(checks=CHECKS)

        try:
            run()
        except Unsatisfiable:  # every request to this route is a right one
            assert mode is schemathesis.GenerationMode.NEGATIVE
