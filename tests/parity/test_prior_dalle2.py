"""Priors of DALLE2-pytorch and MindEye: the numbers of the committed fixtures, see tests/fixtures/dalle2."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from unclip import ConfigError
from unclip.checkpoints.dalle2 import ARITHMETICS
from unclip.models.prior_dalle2 import ARITHMETIC
from unclip.pipelines.convert_dalle2 import convert_dalle2_prior
from unclip.pipelines.embedding_prior import EmbeddingPrior

FIXTURES = Path(__file__).parents[1] / "fixtures" / "dalle2"
PACKAGES = sorted(path.stem for path in FIXTURES.glob("[01]*.safetensors"))
GRIDS = ("mindeye_1", "mindeye_2")
WITH_DDIM = [name for name in PACKAGES if name.split("_")[0] in ("1.4.3", "1.9.0", "1.15.6")]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Case:
    """A converted fixture: the prior, the inputs and the package's results."""

    def __init__(self, name: str, folder: Path) -> None:
        with safe_open(FIXTURES / f"{name}.safetensors", framework="pt") as file:
            self.about = json.loads(file.metadata()["about"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.weights = {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")}
        self.found = {key: value for key, value in tensors.items() if not key.startswith("weights/")}
        torch.save(self.weights, folder / "prior.pth")
        net = self.about["network"]
        if "version" in self.about:
            config = {"prior": {"net": {"rotary_emb": net.get("rotary_emb", True)}}}
            (folder / "config.json").write_text(json.dumps(config))
            answers = {"package_version": self.about["version"], "config": folder / "config.json"}
        else:
            answers = {"project": f"mindeye{self.about['mindeye']}"}
        convert_dalle2_prior(folder / "prior.pth", folder / "out", **answers)
        self.prior = EmbeddingPrior.from_pretrained(folder / "out")

    def inputs(self) -> dict[str, Tensor]:
        if "condition" in self.found:
            return {"condition": self.found["condition"]}
        texts = {"encodings": self.found["text_encodings"], "mask": self.found["mask"]}
        return {"condition": self.found["text_embed"], **texts}

    def output(self, **read: Tensor | None) -> Tensor:
        stage = self.prior.stage
        condition = stage.condition(read["condition"], read["encodings"], read["mask"])
        return stage.prepare(condition)(self.found["x"], self.found["t"])


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    made: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in made:
            made[name] = Case(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


def test_the_tables_of_versions_agree():
    assert tuple(ARITHMETIC) == ARITHMETICS


@pytest.mark.parametrize("name", [*PACKAGES, *GRIDS])
@torch.no_grad()
def test_the_network(case, name):
    one = case(name)
    read = {"encodings": None, "mask": None} | one.inputs()
    torch.testing.assert_close(one.output(**read), one.found["output"], **CLOSE)


@pytest.mark.parametrize("name", [*PACKAGES, *GRIDS])
@torch.no_grad()
def test_guidance_away_from_the_package_s_null_pass(case, name):
    one = case(name)
    stage, read = one.prior.stage, {"encodings": None, "mask": None} | one.inputs()
    condition = stage.condition(read["condition"], read["encodings"], read["mask"])
    guided = stage._denoiser(condition, 3.0, True)
    for row, t in enumerate(one.found["t"]):  # one timestep for all rows, as in sampling
        found = guided(one.found["x"], int(t))[row]
        # null + 3 (given - null): five times the error of one network
        torch.testing.assert_close(found, one.found["guided"][row], rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("name", PACKAGES)
@torch.no_grad()
def test_without_encodings(case, name):
    """The text's embedding alone: all padding is learned, or missing."""
    one = case(name)
    network = one.prior.prior
    prefix = network.prepare(one.found["text_embed"])
    found = network(one.found["x"], one.found["t"], prefix)
    torch.testing.assert_close(found, one.found["without_text"], **CLOSE)


@pytest.mark.parametrize(
    ("name", "how"),
    [*((name, "ddpm") for name in (*PACKAGES, *GRIDS)), *((name, "ddim") for name in (*WITH_DDIM, *GRIDS))],
)
def test_samples(agree, case, name, how):
    """The last norm divides by the largest number of a token, which may be near 0, so that rounding errors grow."""
    one = case(name)
    steps = one.about["timesteps"] if how == "ddpm" else 6
    # The versions with masks have no working guidance: it hides the text from all steps but the first.
    is_guided = one.prior.prior.config.rules.learned_padding and "version" in one.about
    settings = {"num_inference_steps": steps, "guidance_scale": 2.0 if is_guided else 1.0, "compatible": True}

    def run():
        return one.prior.sample(**one.inputs(), generator=torch.Generator().manual_seed(1), **settings)

    agree("samples of DALLE2-pytorch", one.found[how], run, [one.prior.prior])


@pytest.mark.parametrize("name", [name for name in PACKAGES if name not in WITH_DDIM])
def test_versions_without_a_working_ddim(case, name):
    with pytest.raises(ConfigError, match="no working DDIM"):
        case(name).prior.sample(**case(name).inputs(), num_inference_steps=6, compatible=True)


@pytest.mark.parametrize("name", GRIDS)
def test_mindeye_s_loss_and_prediction(case, name):
    one = case(name)
    found, scale = one.found, one.prior.prior.config.scale
    assert scale == pytest.approx(8**0.5 if name == "mindeye_1" else 1.0)
    loss, prediction = one.prior.loss(
        found["condition"], found["x"], t=found["t"], noise=found["noise"], drop=0.0, drop_sample=0.0
    )
    torch.testing.assert_close(loss, found["loss"], **CLOSE)
    torch.testing.assert_close(prediction * scale, found["prediction"], **CLOSE)
