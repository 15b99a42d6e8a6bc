"""Charts: numbers in their places, texts that cannot break out."""

import xml.etree.ElementTree as ElementTree

import pytest

from unclip.evaluation.charts import MAX_SERIES, Panel, Series, chart, ticks

SVG = "{http://www.w3.org/2000/svg}"


def draw(*panels, **more):
    return ElementTree.fromstring(chart(panels, title="a chart", **more))


def circles(root):
    return [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{SVG}circle")]


def texts(root):
    return [element.text for element in root.iter(f"{SVG}text")]


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.13, 0.57, [0.2, 0.3, 0.4, 0.5]),
        (-3, 12, [0, 5, 10]),
        (0, 1e-4, [0, 2e-5, 4e-5, 6e-5, 8e-5, 1e-4]),
        (5, 5, [5]),
    ],
)
def test_ticks(low, high, wanted):
    assert ticks(low, high) == pytest.approx(wanted)


def test_points_stand_where_their_numbers_say():
    root = draw(Panel("p", "x", [Series("s", [(0, 0), (1, 0.5), (2, 1)])]))
    (x0, y0), (x1, y1), (x2, y2) = circles(root)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.05)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.05)
    assert x0 < x2
    assert y0 > y2  # up is more
    (line,) = (line.get("points").split() for line in root.iter(f"{SVG}polyline"))
    assert [tuple(map(float, point.split(","))) for point in line] == circles(root)


def test_a_logarithmic_axis_where_numbers_span_far():
    wide = [Series("s", [(0.1, 0), (1, 0), (10, 0)])]
    (x0, _), (x1, _), (x2, _) = circles(draw(Panel("p", "x", wide, log_x=True)))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.05)
    (x0, _), (x1, _), (x2, _) = circles(draw(Panel("p", "x", wide)))
    assert x2 - x1 > 5 * (x1 - x0)
    near = [Series("s", [(1, 0), (2, 0), (3, 0)])]
    (x0, _), (x1, _), (x2, _) = circles(draw(Panel("p", "x", near, log_x=True)))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.05)


def test_everything_lies_inside():
    values = [(0.5, -3.0), (0.5, 8.0)]
    root = draw(*[Panel("p", "x", [Series("s", values)], reference=("level", 20.0))] * 3)
    assert all(0 < x < 440 and 0 < y < 290 for x, y in circles(root))
    assert (root.get("width"), texts(root).count("level")) == ("880", 3)


def test_one_point_and_none():
    assert len(circles(draw(Panel("p", "x", [Series("s", [(3, 0.5)])], percent=True)))) == 1
    assert "nothing to show" in texts(draw(Panel("p", "x", [])))


def test_a_legend_for_several_series_alone():
    def labels(count):
        series = [Series(f"label {i}", [(i, i)]) for i in range(count)]
        return [text for text in texts(draw(Panel("p", "x", series))) if text and text.startswith("label")]

    assert labels(1) == []
    assert labels(3) == ["label 0", "label 1", "label 2"]
    assert len(labels(MAX_SERIES + 5)) == MAX_SERIES
    many = [Series(f"label {i}", [(i, i)]) for i in range(MAX_SERIES + 5)]
    root = draw(Panel("p", "x", many))
    assert "and 5 more, not drawn" in texts(root)
    assert len(circles(root)) == MAX_SERIES


def test_texts_cannot_break_out():
    bad = "</text><script>alert('x')</script>&"
    root = draw(Panel(bad, bad, [Series(bad, [(0, 0)]), Series("b", [(1, 1)])], reference=(bad, 0.5)))
    assert not list(root.iter(f"{SVG}script"))
    assert texts(root).count(bad) == 4
