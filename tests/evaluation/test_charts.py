"""Charts: one line for each combination, points where their numbers are, text that stays text."""

import sys
import xml.etree.ElementTree as ElementTree

import pytest

from unclip.errors import MissingDependencyError
from unclip.evaluation.charts import MAX_LINES, can_draw, curves, varied
from unclip.evaluation.report import tables

SVG = "{http://www.w3.org/2000/svg}"


def point(seconds, at_1, **settings):
    rates = {"at_1": at_1, "at_5": at_1 + 0.1, "clip_score": 0.3, "distance": {"frechet": 5.0}}
    return {"settings": settings, "seconds_per_picture": seconds, "seen": rates}


def found(*points):
    return {"points": list(points), "real": {"seen": {"at_1": 0.9, "at_5": 0.95, "clip_score": 0.35}}}


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_the_settings_that_vary():
    points = [point(1, 0.1, sampler="dpm", decoder_num_inference_steps=5), point(1, 0.1, sampler="ddim")]
    assert varied(points) == {"sampler": ["dpm", "ddim"], "decoder_num_inference_steps": [5, None]}


def test_a_chart_for_seconds_and_one_for_each_guidance_that_varies():
    points = [point(scale, 0.1 * scale, prior_guidance_scale=scale, decoder_guidance_scale=8.0) for scale in (1, 2, 4)]
    charts = curves(found(*points))
    assert list(charts) == ["seconds", "prior-guidance"]
    shown = texts(charts["prior-guidance"])
    assert "Quality against prior guidance" in shown
    assert "seen: Fréchet distance, judge's space (lower is better)" in shown
    assert "real pictures" in shown
    assert "prior guidance 2" in texts(charts["seconds"])
    assert curves(found()) == {}


def test_points_are_where_their_numbers_are():
    points = [point(s, a, decoder_num_inference_steps=n) for s, a, n in ((1, 0.2, 5), (2, 0.4, 10), (3, 0.6, 20))]
    root = ElementTree.fromstring(curves(found(*points))["seconds"])
    (line,) = [element for element in root.iter(f"{SVG}g") if element.get("id") == "line2d_1"] or [None]
    uses = [(float(u.get("x")), float(u.get("y"))) for u in root.iter(f"{SVG}use") if float(u.get("x")) > 0]
    markers = [at for at in uses if at[1] != 0]
    assert len(markers) >= 12, line  # three points in each of four panels, besides the ticks


def test_the_same_numbers_give_the_same_file():
    one = found(point(1, 0.2, sampler="dpm"), point(2, 0.3, sampler="ddim"))
    assert curves(one) == curves(one)


def test_no_more_lines_than_can_be_told_apart():
    points = [point(1, 0.2, sampler=f"s{number}") for number in range(MAX_LINES + 5)]
    shown = texts(curves(found(*points))["seconds"])
    assert "Quality against seconds (and 5 more lines, not shown)" in shown


def test_text_stays_text():
    bad = "</text><script>alert('x')</script>&$x$"
    charts = curves(found(point(1, 0.2, sampler=bad), point(2, 0.3, sampler="b")))
    root = ElementTree.fromstring(charts["seconds"])
    assert not list(root.iter(f"{SVG}script"))
    assert bad in texts(charts["seconds"])


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"unclip\[evaluation\]"):
        curves(found(point(1, 0.2, sampler="dpm")))


def test_a_table_names_the_settings_that_are_not_the_defaults():
    settings = {
        "prior_guidance_scale": 2.0, "decoder_guidance_scale": 2.0, "prior_num_inference_steps": 12,
        "decoder_num_inference_steps": 20, "super_res_num_inference_steps": 7, "sampler": "ddim", "decoder_reuse": 2,
        "super_res_reuse": 1, "decoder_guidance_low": 0.3,
    }  # fmt: skip
    rates = {"at_1": 0.5, "at_5": 0.5, "clip_score": 0.5}
    points = [{"settings": settings, "seconds_per_picture": 1.0, "seen": rates}]
    rows = tables("sweep", {"real": {"seen": rates}, "points": points})[0].rows
    assert rows[0][0] == "2-2 / 12-20-7 / ddim / lowest guided noise 0.3 / decoder reuse 2"


@pytest.mark.skipif(not can_draw(), reason="needs matplotlib")
def test_a_chart_of_points_that_lack_a_setting():
    rates = {"num": 4, "at_1": 0.5, "at_5": 0.5, "clip_score": 0.5}
    points = [
        {"settings": {"sampler": "ddim", **more}, "seconds_per_picture": 1.0, "seen": rates}
        for more in ({}, {"decoder_reuse": 2})
    ]
    drawn = curves({"real": {"seen": rates}, "points": points})["seconds"]
    assert {"decoder reuse 1", "decoder reuse 2"} <= set(texts(drawn))
