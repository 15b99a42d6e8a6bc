"""A sweep by a model and a judge whose answers are known."""

import time
import types
import xml.etree.ElementTree as ElementTree

import pytest
from PIL import Image

from unclip.errors import InputError
from unclip.evaluation.charts import curves, varied
from unclip.evaluation.retrieval import Plan
from unclip.evaluation.sweep import grid_of, point_at, sweep

from .test_retrieval import COLOURS, FakeJudge
from .test_variations import data  # noqa: F401  (a fixture)

STEPS = ("prior_num_inference_steps", "decoder_num_inference_steps", "super_res_num_inference_steps")


class Draws:
    """Draws the colour that is named if the decoder's guidance is at least 2, else always red."""

    def __init__(self, stop_after=None):
        self.calls, self.stop_after, self.sampler = [], stop_after, "own"

    def __call__(self, prompts, *, seed, decoder_guidance_scale, **more):
        if self.stop_after is not None and len(self.calls) >= self.stop_after:
            raise KeyboardInterrupt
        self.calls.append((list(prompts), seed, decoder_guidance_scale, more, self.sampler))
        time.sleep(0.001)  # a measurable time
        right = decoder_guidance_scale >= 2
        images = [Image.new("RGB", (8, 8), COLOURS[name if right else "red"]) for name in prompts]
        return types.SimpleNamespace(images=images)

    def use(self, name):
        self.sampler = name


def places(**axes):
    base = {"prior_guidance_scale": [1.0], "decoder_guidance_scale": [1.0, 2.0], **{name: [5] for name in STEPS}}
    return grid_of({**base, "sampler": ["ddim"], **axes})


def run(pipeline, data, asked, *, num_held_out=0, num_seen=100, seed=0, **more):  # noqa: F811
    plan = Plan(data, num_seen=num_seen, num_held_out=num_held_out, seed=seed, batch_size=2)
    return sweep(pipeline, FakeJudge(), plan, asked, use_sampler=pipeline.use, **more)


def test_grid():
    assert grid_of({"a": [1, 2, 1], "b": ["x", "y"]}) == [
        {"a": 1, "b": "x"},
        {"a": 1, "b": "y"},
        {"a": 2, "b": "x"},
        {"a": 2, "b": "y"},
    ]
    with pytest.raises(InputError, match="b has no values"):
        grid_of({"a": [1], "b": []})
    with pytest.raises(InputError, match="1024 combinations; at most 1000"):
        grid_of({"a": list(range(32)), "b": list(range(32))})


def test_every_point_draws_the_same_captions_from_the_same_seeds(data):  # noqa: F811
    pipeline = Draws()
    found = run(pipeline, data, places(sampler=["ddim", "dpm"]), seed=7, num_held_out=None)
    assert len(found["points"]) == 4
    warm, *calls = pipeline.calls
    assert warm[0] == calls[0][0]  # drawn once, and not counted
    by_point = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len({str([(prompts, seeds) for prompts, seeds, *_ in point]) for point in by_point}) == 1
    assert [seeds for _, seeds, *_ in by_point[0]] == [[7, 8], [9], [7]]
    assert [(point[0][2], point[0][4]) for point in by_point] == [
        (1.0, "ddim"), (1.0, "dpm"), (2.0, "ddim"), (2.0, "dpm"),
    ]  # fmt: skip
    assert "sampler" not in calls[0][3]
    assert calls[0][3]["decoder_num_inference_steps"] == 5


def test_what_is_found(data):  # noqa: F811
    found = run(Draws(), data, places())
    poor, good = found["points"]
    assert (found["num_captions"], found["chance_at_1"]) == (4, 0.25)
    assert found["real"] == {"seen": {"num": 3, "at_1": 1.0, "at_5": 1.0, "clip_score": 1.0}}
    assert good["seen"]["at_1"] == 1
    assert poor["seen"]["at_1"] == pytest.approx(1 / 3, abs=1e-3)
    assert good["seen"]["distance"]["frechet"] == pytest.approx(0, abs=1e-4)
    assert poor["seen"]["distance"]["frechet"] > 0.01
    assert good["seconds_per_picture"] > 0
    assert "held_out" not in good


def test_finished_points_are_kept_after_a_kill(data):  # noqa: F811
    saved = []
    with pytest.raises(KeyboardInterrupt):  # in the middle of the second point of three: warm, 2 calls, 1 call
        run(Draws(stop_after=4), data, places(decoder_guidance_scale=[1.0, 2.0, 3.0]), on_point=saved.append)
    assert [point["settings"]["decoder_guidance_scale"] for point in saved[-1]["points"]] == [1.0]

    kept = saved[-1]["points"][0] | {"seconds_per_picture": 123.0}
    pipeline = Draws()
    found = run(pipeline, data, places(decoder_guidance_scale=[2.0, 1.0]), finished=[kept])
    assert {scale for _, _, scale, *_ in pipeline.calls} == {2.0}
    assert [point["settings"]["decoder_guidance_scale"] for point in found["points"]] == [2.0, 1.0]
    assert found["points"][1] is kept

    pipeline = Draws()
    again = run(pipeline, data, places(decoder_guidance_scale=[2.0]), finished=found["points"])
    assert pipeline.calls == []
    assert [point["settings"]["decoder_guidance_scale"] for point in again["points"]] == [2.0, 1.0]


def test_points_are_found_by_all_their_settings():
    points = [{"settings": {"a": 1, "b": 2}}]
    assert point_at(points, {"b": 2, "a": 1.0}) is points[0]
    assert point_at(points, {"a": 1}) is None
    assert point_at(points, {"a": 1, "b": 3}) is None


def test_numbers(data):  # noqa: F811
    with pytest.raises(InputError, match="num_seen is 0"):
        run(Draws(), data, places(), num_seen=0)


def test_another_feature_space(data):  # noqa: F811
    class Space:
        name, is_fid = "a space", True

        def look(self, images):
            return FakeJudge().look(images)

    found = run(Draws(), data, places(), features=Space())
    distance = found["points"][0]["seen"]["feature_distance"]
    assert (distance["space"], distance["num"]) == ("a space", [3, 3])
    assert distance["fid"] == found["points"][0]["seen"]["distance"]["frechet"]
    assert "FID (lower is better)" in curves(found)["seconds"]


# -- charts --------------------------------------------------------------------------------------------------------


def texts(svg):
    root = ElementTree.fromstring(svg)
    return [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]


def test_curves(data):  # noqa: F811
    several = places(sampler=["ddim", "dpm"], decoder_num_inference_steps=[4, 8])
    found = run(Draws(), data, several, num_held_out=None)
    assert list(varied(found["points"])) == ["decoder_guidance_scale", "decoder_num_inference_steps", "sampler"]
    made = curves(found)
    assert set(made) == {"seconds", "decoder-guidance"}
    seconds = texts(made["seconds"])
    assert seconds.count("seconds a picture") == 7  # four measures of the one group; a single picture has no distance
    assert "decoder guidance 2, dpm" in seconds
    assert not any(text and "decoder steps" in text for text in seconds)
    assert "decoder steps 8, ddim" in texts(made["decoder-guidance"])


def test_no_curve_without_points():
    assert curves({"points": [], "real": {}}) == {}
