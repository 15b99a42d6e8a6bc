"""The built-in model: its size, and that its pictures match their captions."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from unclip import UnCLIPImageVariationPipeline, UnCLIPPipeline
from unclip.checkpoints.layout import PROBE_FILE
from unclip.evaluation.retrieval import Candidates, Judge
from unclip.pipelines.manipulation import Manipulator

ASSETS = Path(str(files("unclip"))) / "assets"
CAPTIONS = [
    "red apple", "banana", "pizza", "hamburger", "birthday cake",
    "cat face", "dog face", "lion", "fish", "butterfly",
    "rose", "cactus", "evergreen tree", "rainbow", "fire",
    "red heart", "smiling face", "automobile", "rocket", "soccer ball",
]  # fmt: skip


def test_all_weights_together_are_small():
    weights = sum(path.stat().st_size for path in ASSETS.rglob("*.safetensors"))
    assert 40e6 < weights < 70e6


def test_it_has_the_components_of_its_own_image_encoder():
    tool = Manipulator.from_pretrained("unclip-emoji")
    components = tool.load_components(ASSETS / "emoji" / PROBE_FILE)
    assert components.num_components == components.dim == 256
    assert components.explained[31] > 0.99


@pytest.fixture(scope="module")
def judge():
    return Judge.load(ASSETS / "emoji-judge")


@pytest.fixture(scope="module")
def candidates(judge):
    return Candidates.read_by(judge, CAPTIONS)


@pytest.fixture(scope="module")
def drawn():
    pipe = UnCLIPPipeline.from_pretrained("unclip-emoji")
    pipe.set_progress_bar_config(disable=True)
    return pipe(CAPTIONS, seed=1, **pipe.recommended).images


@pytest.mark.slow
def test_pictures_match_their_captions(judge, candidates, drawn):
    """A CLIP that had no part in it finds the right caption of twenty; chance is one picture."""
    looks = judge.look(drawn)
    assert candidates.rates(looks, CAPTIONS)["at_1"] >= 0.8
    assert candidates.rates(looks.roll(1, 0), CAPTIONS)["at_1"] <= 0.2


@pytest.mark.slow
def test_variations_keep_what_a_picture_shows(judge, candidates, drawn):
    vary = UnCLIPImageVariationPipeline.from_pretrained("unclip-emoji")
    vary.set_progress_bar_config(disable=True)
    varied = vary(drawn, seed=7, **vary.recommended).images
    assert candidates.rates(judge.look(varied), CAPTIONS)["at_1"] >= 0.75
    same = torch.tensor([one.tobytes() == other.tobytes() for one, other in zip(varied, drawn, strict=True)])
    assert not same.any()


# ---- its card ----


def test_the_model_card_has_the_figures_of_the_reports():
    folder = ASSETS / "emoji"
    card = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    groups = json.loads((folder / "evaluation.json").read_text())["retrieval"]
    varied = json.loads((folder / "variations.json").read_text())["variations"]
    rows = {
        "seen concepts, generated": groups["seen"]["generated"],
        "seen concepts, real pictures (ceiling)": groups["seen"]["real"],
        "seen concepts, variations of the real pictures": varied["seen"]["variations"],
        "held-out concepts, generated": groups["held_out"]["generated"],
        "held-out concepts, real pictures (ceiling)": groups["held_out"]["real"],
        "held-out concepts, variations of the real pictures": varied["held_out"]["variations"],
    }
    for name, found in rows.items():
        first, five = (f"{100 * found[key]:.1f} %" for key in ("at_1", "at_5"))
        number = groups["held_out" if name.startswith("held-out") else "seen"]["num"]
        assert f"| {name} | {number} | {first} | {five} | {found['clip_score']:.3f} |" in card


def test_the_figures_of_free_wordings():
    report = json.loads((ASSETS / "emoji" / "wordings.json").read_text())["wordings"]
    first, five = report["at_1"], report["at_5"]
    card = (ASSETS / "emoji" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert f"| free wordings, generated | {report['num']} | {100 * first:.1f} % | {100 * five:.1f} % | |" in card
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    assert f"an accepted concept first for {100 * first:.0f} % and among five for {100 * five:.0f} %" in readme


def test_what_it_knows_and_does_not():
    pipe = UnCLIPPipeline.from_pretrained()
    listed = json.loads((ASSETS / "emoji-judge" / "wordings.json").read_text())
    reported = {}
    for what in (True, False):
        texts = [text for wordings in listed.values() for text, accepted in wordings.items() if bool(accepted) is what]
        with torch.no_grad():
            parts = [
                pipe.caption_encoder.encode(texts[start : start + 100]).embeds for start in range(0, len(texts), 100)
            ]
        reported[what] = len(pipe.concepts.reports(texts, torch.cat(parts))) / len(texts)
    assert reported[True] <= 0.02
    assert reported[False] >= 0.9


def test_the_readme_has_the_figures_of_the_report():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    seen = json.loads((ASSETS / "emoji" / "evaluation.json").read_text())["retrieval"]["seen"]
    (made, made_5), (real, real_5) = (
        [round(100 * seen[kind][key]) for key in ("at_1", "at_5")] for kind in ("generated", "real")
    )
    assert f"first for {made} % of 200 concepts and among five for {made_5} %" in readme
    assert f"(of the real pictures: {real} and {real_5} %)" in readme
