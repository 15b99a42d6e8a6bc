"""Retrieval by a judge whose answers are known."""

import json
import types

import pytest
import torch
from PIL import Image

from unclip.data.emoji.evaluation_set import bare_caption, concepts_of
from unclip.data.folder import Record
from unclip.errors import ConfigError, DataError, InputError
from unclip.evaluation.retrieval import Candidates, Judge, Plan, by_kind, ranks, retrieval

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "black": (0, 0, 0), "cyan": (0, 255, 255)}


class FakeJudge:
    """Sees a picture's colour; a caption is the colour it names."""

    def read(self, captions):
        self.captions = list(captions)
        known = [next((rgb for name, rgb in COLOURS.items() if name in caption), (9, 9, 9)) for caption in captions]
        return unit(torch.tensor(known, dtype=torch.float))

    def look(self, images):
        return unit(torch.tensor([image.resize((1, 1)).getpixel((0, 0)) for image in images], dtype=torch.float))


def unit(values):
    return torch.nn.functional.normalize(values - 100, dim=-1)


class FakePipeline:
    """Draws the colour that the prompt names, or always one."""

    def __init__(self, always=None):
        self.always, self.calls = always, []

    def __call__(self, prompts, *, seed, **more):
        self.calls.append((list(prompts), seed, more))
        named = [next((rgb for name, rgb in COLOURS.items() if name in prompt), (9, 9, 9)) for prompt in prompts]

        return types.SimpleNamespace(images=[Image.new("RGB", (8, 8), self.always or rgb) for rgb in named])


@pytest.fixture
def data(tmp_path):
    """Four concepts in the plain style (one held out), two styles of one, and one, held out, in another alone."""
    rows = []
    for name in ("red", "green", "blue", "black"):
        rows.append({"concept": name, "style": "flat", "captions": [name, f"a {name}"], "held_out": name == "black"})
    rows.insert(0, {"concept": "red", "style": "noto", "captions": ["red, noto style"]})
    rows.append({"concept": "cyan", "style": "noto", "captions": ["cyan, noto style"], "held_out": True})
    for place, row in enumerate(rows):
        row["file_name"] = f"{place}.png"
        Image.new("RGB", (8, 8), COLOURS[row["concept"]]).save(tmp_path / row["file_name"])
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_a_perfect_model(data):
    judge, pipeline = FakeJudge(), FakePipeline()
    found = retrieval(pipeline, judge, Plan(data, num_seen=10, batch_size=2, seed=7), decoder_guidance_scale=2.0)
    assert sorted(judge.captions) == ["black", "blue", "cyan", "green", "red"]
    perfect = {"at_1": 1.0, "at_5": 1.0, "clip_score": 1.0}
    distance = found["seen"].pop("distance")
    assert distance["frechet"] == pytest.approx(0, abs=1e-4)
    assert found == {
        "captions": "concepts",
        "num_captions": 5,
        "chance_at_1": 0.2,
        "chance_at_5": 1.0,
        "seen": {
            "num": 3,
            "drawn": "by training weight, each concept once at most",
            "seeds": [7, 9],
            "generated": perfect,
            "real": perfect,
        },
        "held_out": {
            "num": 1,
            "drawn": "all that exist in the unmarked style",
            "num_in_all": 2,
            "num_without_plain_style": 1,
            "seeds": [7, 7],
            "generated": perfect,
            "real": perfect,
        },
    }
    asked = [prompt for prompts, _, _ in pipeline.calls for prompt in prompts]
    assert sorted(asked[:3]) == ["blue", "green", "red"]
    assert asked[3:] == ["black"]
    assert [seeds for _, seeds, _ in pipeline.calls] == [[7, 8], [9], [7]]
    assert all(more == {"decoder_guidance_scale": 2.0} for _, _, more in pipeline.calls)


def test_a_model_that_draws_one_thing(data):
    found = retrieval(FakePipeline(always=COLOURS["red"]), FakeJudge(), Plan(data, num_seen=3))
    assert found["seen"]["generated"]["at_1"] == pytest.approx(1 / 3, abs=1e-3)
    assert found["held_out"]["generated"]["at_1"] == 0
    assert found["seen"]["real"]["at_1"] == 1


def test_the_choice_hangs_on_the_seed_alone(data):
    def asked(seed, size):
        pipeline = FakePipeline()
        retrieval(pipeline, FakeJudge(), Plan(data, num_seen=2, seed=seed, batch_size=size))
        return [prompt for prompts, _, _ in pipeline.calls for prompt in prompts]

    assert asked(3, 1) == asked(3, 16)
    assert len({tuple(asked(seed, 16)) for seed in range(20)}) > 1


def test_sheets(data, tmp_path):
    retrieval(FakePipeline(), FakeJudge(), Plan(data, num_seen=3, sheet=tmp_path / "new" / "sheet"))
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["sheet-held-out.png", "sheet-seen.png"]
    with Image.open(tmp_path / "new" / "sheet-seen.png") as sheet:
        assert sheet.size == (3 * (8 + 2 + 8) + 2 * 12, 8 + 18)


def test_composed_captions(data, tmp_path):
    """Asked for as they stand, chosen from among all of the set, told by kind; a sheet that shows both pictures."""
    captions = ["a red cat", "a green cat", "a red cat above a blue hat", "a blue cat on a green background"]
    lines = [
        {"file_name": f"{place}.png", "captions": [caption, "a cat"], "style": "composed", "held_out": place == 3}
        for place, caption in enumerate(captions)
    ]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    judge, pipeline = FakeJudge(), FakePipeline()
    found = retrieval(pipeline, judge, Plan(data, sheet=tmp_path / "s"))
    assert sorted(judge.captions) == sorted(captions)
    assert sorted(prompt for prompts, *_ in pipeline.calls for prompt in prompts) == sorted(captions)
    assert found["captions"] == "composed"
    assert {kind: each["num"] for kind, each in found["seen"]["kinds"].items()} == {"colour": 2, "scene": 1}
    assert set(found["held_out"]["kinds"]) == {"colour on background"}
    assert found["seen"]["drawn"] == "at random, each caption once at most"
    with Image.open(tmp_path / "s-seen.png") as sheet:
        assert sheet.size == (3 * (8 + 2 + 8) + 2 * 12, 8 + 18)


def test_rates_by_kind():
    captions = ["a red cat", "a blue cat", "a cat above a dog", "something"]
    candidates = Candidates(captions, torch.eye(4))
    right = torch.eye(4)
    wrong = torch.eye(4).roll(1, 0)
    found = by_kind(candidates, {"generated": torch.cat([right[:1], wrong[1:]]), "real": right}, captions)
    assert list(found) == ["colour", "other", "scene"]
    assert found["colour"] == {
        "num": 2,
        "generated": {"at_1": 0.5, "at_5": 1.0, "clip_score": 0.5},
        "real": {"at_1": 1.0, "at_5": 1.0, "clip_score": 1.0},
    }
    assert found["scene"]["generated"]["at_1"] == 0
    assert found["other"]["num"] == 1


def test_broken_pictures_are_found_before_anything_is_drawn(data, tmp_path):
    (data / "4.png").write_bytes(b"no picture")  # held out: it comes last
    pipeline = FakePipeline()
    with pytest.raises(DataError, match=r"1 of 4 chosen pictures .* 4\.png"):
        retrieval(pipeline, FakeJudge(), Plan(data))
    assert pipeline.calls == []


def test_a_few_broken_pictures_are_told(tmp_path):
    rows = [{"file_name": f"{n}.png", "text": f"red {n}", "held_out": n % 2 == 0} for n in range(200)]
    for row in rows:
        Image.new("RGB", (8, 8), "red").save(tmp_path / row["file_name"])
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "0.png").unlink()
    (tmp_path / "1.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match="2 of 200 chosen pictures"):
        found = retrieval(FakePipeline(), FakeJudge(), Plan(tmp_path))
    assert found["num_skipped"] == 2
    assert set(found["skipped"]) == {"0.png", "1.png"}
    assert (found["seen"]["num"], found["held_out"]["num"], found["num_captions"]) == (99, 99, 200)


def test_without_held_out_concepts_and_styles(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "red"}')
    found = retrieval(FakePipeline(), FakeJudge(), Plan(tmp_path, progress=list))
    assert (found["held_out"]["num"], found["held_out"]["num_in_all"]) == (0, 0)
    assert "generated" not in found["held_out"]
    assert found["seen"]["num"] == 1


def test_bad_arguments(data, tmp_path):
    with pytest.raises(InputError, match="num_seen is 0"):
        retrieval(FakePipeline(), FakeJudge(), Plan(data, num_seen=0))
    with pytest.raises(InputError, match="batch_size is 0"):
        retrieval(FakePipeline(), FakeJudge(), Plan(data, batch_size=0))
    (data / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "red", "held_out": true}')
    with pytest.raises(DataError, match="no concepts for training"):
        retrieval(FakePipeline(), FakeJudge(), Plan(data))


# -- places --------------------------------------------------------------------------------------------------------


def test_ranks():
    captions = torch.eye(3)
    images = torch.tensor([[0.9, 0.3, 0.1], [0.5, 0.7, 0.2], [0.3, 0.4, 0.2]])
    assert ranks(images, [0, 0, 2], captions).tolist() == [0, 1, 2]


def test_a_judge_that_sees_no_difference_finds_nothing():
    assert ranks(torch.ones(2, 4), [0, 2], torch.ones(4, 4)).tolist() == [3, 3]


def test_embeddings_that_are_no_numbers_find_nothing():
    images = torch.tensor([[float("nan")] * 3, [1.0, 0.0, 0.0]])
    assert ranks(images, [0, 0], torch.eye(3)).tolist() == [2, 0]


def test_concepts():
    def record(concept, style, caption):
        return Record(f"{style}/{concept}", (caption,), concept=concept, style=style)

    rows = [
        record("x", "noto", "x, noto style"),
        record("x", "flat", "x"),
        record("x", "twemoji", "x, twemoji style"),
        record("y", "twemoji", "y, twemoji style"),
        record("y", "noto", "y, noto style"),
        record("", "", "loose"),
        record("", "", "looser"),
    ]
    found = concepts_of(rows)
    assert [each.file_name for each in found] == ["flat/x", "twemoji/y", "/", "/"]
    assert [bare_caption(each) for each in found] == ["x", "y", "loose", "looser"]


def test_a_real_judge(tmp_path, tiny_components):
    from unclip.pipelines.component import write_component

    parts = tiny_components()
    for name in ("text_encoder", "tokenizer", "image_encoder", "feature_extractor"):
        write_component(parts[name], tmp_path / name, variant=None)
    judge = Judge.load(tmp_path)
    embeds = judge.look([Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")])
    known = judge.read(["a cat", "a dog", "a cat"])
    assert embeds.shape[1] == known.shape[1]
    torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(known.norm(dim=-1), torch.ones(3))
    assert torch.equal(known[0], known[2])


def test_a_judge_in_the_layout_of_transformers(tmp_path, tiny_components):
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor

    from unclip.pipelines.component import write_component

    parts = tiny_components()
    for name in ("text_encoder", "tokenizer", "image_encoder", "feature_extractor"):
        write_component(parts[name], tmp_path / "parts" / name, variant=None)
    text, image = parts["text_encoder"], parts["image_encoder"]
    whole = CLIPModel(
        CLIPConfig(text_config=text.config.to_dict(), vision_config=image.config.to_dict(), projection_dim=16)
    )
    whole.load_state_dict(text.state_dict() | image.state_dict() | {"logit_scale": torch.tensor(3.0)})
    whole.save_pretrained(tmp_path / "whole")
    CLIPProcessor(parts["feature_extractor"], parts["tokenizer"]).save_pretrained(tmp_path / "whole")
    pictures = [Image.effect_mandelbrot((20, 16), (-2, -1.5, 1, 1.5), n).convert("RGB") for n in (20, 50)]
    one, other = (Judge.load(tmp_path / name) for name in ("parts", "whole"))
    torch.testing.assert_close(other.look(pictures), one.look(pictures))
    torch.testing.assert_close(other.read(["a cat", "a red apple"]), one.read(["a cat", "a red apple"]))


def test_a_judge_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match=r"contains no trained CLIP \(neither text_encoder/ nor .*CLIPModel"):
        Judge.load(tmp_path)
