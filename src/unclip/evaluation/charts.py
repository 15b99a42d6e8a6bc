"""Charts of a sweep as SVG documents, drawn by matplotlib: quality against seconds, and against guidance."""

import importlib.util
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from unclip.errors import MissingDependencyError
from unclip.settings import SETTINGS

LABELS = {name: setting.label for name, setting in SETTINGS.items()} | {"sampler": "sampler"}
GUIDANCE = ("prior_guidance_scale", "decoder_guidance_scale")
NAMES = ("seconds", *(LABELS[name].replace(" ", "-") for name in GUIDANCE))
"""The charts that `curves` may return, by x axis."""
STEPS = tuple(name for name in LABELS if name.endswith("_steps"))
SPACES = {"distance": "judge's space", "feature_distance": "other space"}
"""The distances of a point by key, with the names of their feature spaces in charts."""
LOG_FROM = 8
"""The x axis is logarithmic if the largest number of seconds is at least this many times the smallest."""
MAX_LINES = 24
DASHES = ("-", "--", ":")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "unclip",
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 9,
    "axes.titlesize": 9,
}
"""Keeps text as text, and gives the same file for the same numbers."""

Point = dict[str, Any]
"""The result of one combination: "settings", "seconds_per_picture", and rates and distances by group."""
Line = tuple[str, list[tuple[float, Point]]]
"""A label, and points with their x, in ascending order."""
Measure = tuple[str, Callable[[dict[str, Any]], float], float | None]
"""A title, the value in a point's rates, and the value of real pictures."""


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def varied(points: Sequence[Point]) -> dict[str, list[Any]]:
    """The settings that have several values, with these values in order."""
    names = dict.fromkeys(name for point in points for name in point["settings"])
    values = {name: dict.fromkeys(point["settings"].get(name) for point in points) for name in names}
    return {name: list(found) for name, found in values.items() if len(found) > 1}


def curves(found: Mapping[str, Any]) -> dict[str, str]:
    """SVG documents by x axis: "seconds" always, "prior-guidance" and "decoder-guidance" if they vary.

    Args:
        found: the result of `sweep`.

    Raises: MissingDependencyError without matplotlib.
    """
    points, several = found["points"], varied(found["points"])
    if not points:
        return {}
    fixed = [name for name in several if name not in STEPS]
    lines = _lines(points, fixed, lambda point: point["seconds_per_picture"])
    charts = {"seconds": _chart(found, lines, "seconds a picture", "Quality against seconds", log_x=True)}
    for name in GUIDANCE:
        if name in several:
            others = [other for other in several if other != name]
            lines = _lines(points, others, lambda point, name=name: point["settings"][name])
            label = LABELS[name]
            charts[label.replace(" ", "-")] = _chart(found, lines, label, f"Quality against {label}")
    return charts


def _lines(points: Sequence[Point], fixed: Sequence[str], x: Callable[[Point], float]) -> list[Line]:
    """One line for each combination of the `fixed` settings."""
    lines: dict[str, list[tuple[float, Point]]] = {}
    for point in points:
        label = ", ".join(_setting(name, point["settings"].get(name)) for name in fixed)
        lines.setdefault(label or "all", []).append((x(point), point))
    return [(label, sorted(line, key=lambda pair: pair[0])) for label, line in lines.items()]


def _setting(name: str, value: Any) -> str:
    if value is None:  # a setting that an older point does not have
        value = SETTINGS[name].default
    return str(value) if name == "sampler" else f"{LABELS.get(name, name)} {value:g}"


def _measures(point: Point, group: str, real: Mapping[str, float]) -> list[Measure]:
    """The panels of one group."""
    measures: list[Measure] = [
        ("found first", lambda rates: rates["at_1"], real["at_1"]),
        ("found among five", lambda rates: rates["at_5"], real["at_5"]),
        ("CLIP score", lambda rates: rates["clip_score"], real["clip_score"]),
    ]
    for key, space in SPACES.items():
        if key in point[group]:
            kind = "fid" if "fid" in point[group][key] else "frechet"
            name = "FID" if kind == "fid" else f"Fréchet distance, {space}"
            measures.append((f"{name} (lower is better)", lambda rates, k=key, d=kind: rates[k][d], None))
    return measures


def _chart(found: Mapping[str, Any], lines: Sequence[Line], x_label: str, title: str, *, log_x: bool = False) -> str:
    """One panel for each group and measure, and one legend for all of them."""
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError as error:
        raise MissingDependencyError("charts need matplotlib: pip install 'unclip[evaluation]'") from error

    first = found["points"][0]
    panels = [(group, each) for group, real in found["real"].items() for each in _measures(first, group, real)]
    xs = [x for _, line in lines for x, _ in line]
    shown, document = lines[:MAX_LINES], io.StringIO()
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 0.8 + 2.9 * -(-len(panels) // 2)), layout="constrained")
        FigureCanvasSVG(figure)
        grid = figure.subplots(-(-len(panels) // 2), 2, squeeze=False).flatten()
        for axes, (group, (name, value, real)) in zip(grid, panels, strict=False):
            for place, (label, line) in enumerate(shown):
                ys = [value(point[group]) for _, point in line]
                style = {"color": f"C{place % 10}", "linestyle": DASHES[place // 10]}
                axes.plot([x for x, _ in line], ys, marker="o", markersize=3, label=_escaped(label), **style)
            if real is not None:
                axes.axhline(real, color="0.5", linewidth=1, linestyle="--", label="real pictures")
            if log_x and 0 < min(xs) * LOG_FROM <= max(xs):
                axes.set_xscale("log")
                axes.xaxis.set_major_formatter("{x:g}")
            if name.startswith("found"):
                axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.set(title=_escaped(f"{group.replace('_', ' ')}: {name}"), xlabel=x_label)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        more = f" (and {len(lines) - MAX_LINES} more lines, not shown)" if len(lines) > MAX_LINES else ""
        figure.suptitle(_escaped(title + more), fontweight="bold")
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        figure.savefig(document, format="svg", metadata={"Date": None, "Creator": None, "Title": title})
    text = document.getvalue()
    return text[text.index("<svg") :]  # without the XML declaration, so that a page can contain it


def _escaped(text: str) -> str:
    """Escape dollar signs: matplotlib reads text between two of them as a formula."""
    return text.replace("$", r"\$")
