"""Line charts as SVG texts: small panels of series, axes with round numbers, a legend.

Knows numbers and labels; knows not what was measured. Called by the sweep's command and by the report.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

Point = dict[str, Any]
"""What was found at one place: "settings", "seconds_per_picture", and rates and distances by group."""


def varied(points: Sequence[Point]) -> dict[str, list[Any]]:
    """The settings of which several values occur, with these values in order."""
    names = dict.fromkeys(name for point in points for name in point["settings"])
    values = {name: dict.fromkeys(point["settings"].get(name) for point in points) for name in names}
    return {name: list(found) for name, found in values.items() if len(found) > 1}


PANEL_WIDTH, PANEL_HEIGHT = 440, 290
LEFT, RIGHT, TOP, BOTTOM = 64, 18, 38, 50
"""Margins of a panel, in pixels, for titles and numbers."""
LEGEND_ROW, LEGEND_SWATCH = 20, 30
LOG_FROM = 8
"""Where the largest x is so many times the smallest, x is drawn on a logarithmic scale if that is allowed."""
COLOURS = ("#0b6fb8", "#d9541e", "#2f8f3e", "#8b4bb0", "#b8860b", "#008b8b", "#c2366e", "#5f6670")
DASHES = ("", "6 3", "2 3")
MAX_SERIES = len(COLOURS) * len(DASHES)
FONT = "font-family='DejaVu Sans, Verdana, Helvetica, sans-serif'"


@dataclass(frozen=True)
class Series:
    """A line: its label and its points, drawn in this order."""

    label: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: above it.
        x_label: below it.
        series: at most 24 are drawn, told apart by colour and dash, the same in every panel.
        percent: whether y is a share, shown in per cent.
        log_x: whether x may be drawn logarithmically.
        reference: a level to compare with, as (label, y): drawn as a thin line.
    """

    title: str
    x_label: str
    series: Sequence[Series]
    percent: bool = False
    log_x: bool = False
    reference: tuple[str, float] | None = None


def chart(panels: Sequence[Panel], *, title: str, columns: int = 2) -> str:
    """An SVG document: panels in rows, one legend for all below. The labels of the first panel's series are shown."""
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    labels = [series.label for series in panels[0].series] if panels else []
    shown = labels[:MAX_SERIES] if len(labels) > 1 else []
    legend, legend_height = _legend(shown, len(labels) - len(shown) if shown else 0, columns * PANEL_WIDTH)
    width, height = columns * PANEL_WIDTH, 40 + rows * PANEL_HEIGHT + legend_height
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' height='{height}' "
        f"role='img' {FONT} font-size='12' fill='#222'>",
        f"<title>{escape(title)}</title>",
        f"<rect width='{width}' height='{height}' fill='#fff'/>",
        f"<text x='{width / 2:g}' y='26' text-anchor='middle' font-size='16' font-weight='bold'>{escape(title)}</text>",
    ]
    for place, panel in enumerate(panels):
        x, y = place % columns * PANEL_WIDTH, 40 + place // columns * PANEL_HEIGHT
        parts.append(f"<g transform='translate({x} {y})'>{_panel(panel)}</g>")
    parts.append(f"<g transform='translate(0 {40 + rows * PANEL_HEIGHT})'>{legend}</g></svg>")
    return "\n".join(parts) + "\n"


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, at most `most`: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first
    return [round((first + i) * step, 12) for i in range(count + 1)]


@dataclass(frozen=True)
class _Scale:
    """From values to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 2)

    def marks(self) -> list[float]:
        """Where numbers stand."""
        if not self.log:
            return ticks(self.low, self.high)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        return [v for p in powers for f in (1, 2, 5) if self.low <= (v := f * 10.0**p) <= self.high]


def _panel(panel: Panel) -> str:
    points = [point for series in panel.series for point in series.points]
    right, bottom = PANEL_WIDTH - RIGHT, PANEL_HEIGHT - BOTTOM
    parts = [f"<text x='{LEFT}' y='24' font-weight='bold'>{escape(panel.title)}</text>"]
    if not points:
        return "".join([*parts, f"<text x='{LEFT}' y='60' fill='#666'>nothing to show</text>"])
    x = _x_scale([x for x, _ in points], panel.log_x, LEFT, right)
    levels = [y for _, y in points] + ([panel.reference[1]] if panel.reference else [])
    y = _Scale(*_padded(min(levels), max(levels), floor_zero=min(levels) >= 0), bottom, TOP)
    for value in y.marks():
        at = y(value)
        shown = f"{value:.0%}" if panel.percent and y.high - y.low > 0.05 else _number(value, panel.percent)
        parts.append(f"<path d='M{LEFT} {at}H{right}' stroke='#e4e6e8'/>")
        parts.append(f"<text x='{LEFT - 8}' y='{at + 4}' text-anchor='end' fill='#555'>{shown}</text>")
    for value in x.marks():
        parts.append(f"<path d='M{x(value)} {bottom}v5' stroke='#888'/>")
        parts.append(f"<text x='{x(value)}' y='{bottom + 19}' text-anchor='middle' fill='#555'>{_number(value)}</text>")
    parts.append(f"<path d='M{LEFT} {TOP}V{bottom}H{right}' stroke='#888' fill='none'/>")
    middle = (LEFT + right) / 2
    parts.append(f"<text x='{middle:g}' y='{bottom + 40}' text-anchor='middle'>{escape(panel.x_label)}</text>")
    if panel.reference:
        label, level = panel.reference
        parts.append(f"<path d='M{LEFT} {y(level)}H{right}' stroke='#444' stroke-dasharray='1 4'/>")
        parts.append(f"<text x='{right}' y='{y(level) - 5}' text-anchor='end' fill='#444'>{escape(label)}</text>")
    for place, series in enumerate(panel.series[:MAX_SERIES]):
        line = " ".join(f"{x(a)},{y(b)}" for a, b in series.points)
        parts.append(f"<polyline points='{line}' fill='none' {_stroke(place)}/>")
        colour = COLOURS[place % len(COLOURS)]
        parts += [
            f"<circle cx='{x(a)}' cy='{y(b)}' r='3.5' fill='{colour}'>"
            f"<title>{escape(series.label)}: {_number(a)}, {_number(b, panel.percent)}</title></circle>"
            for a, b in series.points
        ]
    return "".join(parts)


def _x_scale(values: list[float], log_allowed: bool, start: float, end: float) -> _Scale:
    low, high = min(values), max(values)
    if log_allowed and low > 0 and high >= LOG_FROM * low:
        return _Scale(low / 1.15, high * 1.15, start, end, log=True)
    return _Scale(*_padded(low, high, floor_zero=low >= 0), start, end)


def _padded(low: float, high: float, *, floor_zero: bool) -> tuple[float, float]:
    """A little more than the values take, but not below 0 for values that are never negative."""
    space = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return (max(0.0, low - space) if floor_zero else low - space), high + space


def _stroke(place: int) -> str:
    dash = DASHES[place // len(COLOURS) % len(DASHES)]
    dashed = f" stroke-dasharray='{dash}'" if dash else ""
    return f"stroke='{COLOURS[place % len(COLOURS)]}' stroke-width='2'{dashed}"


def _number(value: float, percent: bool = False) -> str:
    return f"{value:.1%}" if percent else f"{value:.4g}"


def _legend(labels: list[str], left_out: int, width: int) -> tuple[str, int]:
    if not labels:
        return "", 10
    longest = max(len(label) for label in labels)
    column = min(width - LEFT, LEGEND_SWATCH + 22 + 8 * longest)
    columns = max(1, (width - LEFT) // column)
    parts = []
    for place, label in enumerate(labels):
        x, y = LEFT + place % columns * column, 10 + place // columns * LEGEND_ROW
        parts.append(f"<path d='M{x} {y}h{LEGEND_SWATCH - 6}' {_stroke(place)}/>")
        parts.append(f"<text x='{x + LEGEND_SWATCH}' y='{y + 4}'>{escape(label)}</text>")
    rows = math.ceil(len(labels) / columns)
    if left_out:
        parts.append(f"<text x='{LEFT}' y='{14 + rows * LEGEND_ROW}' fill='#666'>and {left_out} more, not drawn</text>")
    return "".join(parts), (rows + bool(left_out)) * LEGEND_ROW + 14


WORDS = {
    "prior_guidance_scale": "prior guidance",
    "decoder_guidance_scale": "decoder guidance",
    "prior_num_inference_steps": "prior steps",
    "decoder_num_inference_steps": "decoder steps",
    "super_res_num_inference_steps": "super-resolution steps",
    "num_prior_candidates": "candidates",
    "prior_temperature": "temperature",
    "prior_top_p": "top-p",
    "sampler": "sampler",
}
GUIDANCE = ("prior_guidance_scale", "decoder_guidance_scale")
SPACES = {"distance": "judge's space", "feature_distance": "other space"}
"""The distances of a point, by key, and how a chart calls their spaces."""
STEPS = tuple(name for name in WORDS if name.endswith("_steps"))


def curves(found: Mapping[str, Any]) -> dict[str, str]:
    """SVG documents by what x is: "seconds", and "prior-guidance" and "decoder-guidance" where they vary.

    Args:
        found: what `sweep` returned.
    """
    points, several = found["points"], varied(found["points"])
    if not points:
        return {}
    fixed = [name for name in several if name not in STEPS]
    lines = _lines(points, fixed, several, lambda point: point["seconds_per_picture"])
    titles = {"seconds": ("Quality against seconds", "seconds a picture", lines)}
    for name in GUIDANCE:
        if name in several:
            others = [other for other in several if other != name]
            lines = _lines(points, others, several, lambda point, name=name: point["settings"][name])
            titles[WORDS[name].replace(" ", "-")] = (f"Quality against {WORDS[name]}", WORDS[name], lines)
    return {
        key: chart(_panels(found, lines, x_label, log_x=key == "seconds"), title=title)
        for key, (title, x_label, lines) in titles.items()
    }


_Line = tuple[str, list[tuple[float, Point]]]


def _lines(
    points: Sequence[Point], fixed: Sequence[str], several: Mapping[str, Any], x: Callable[[Point], float]
) -> list[_Line]:
    """Points of equal `fixed` settings as one line, from left to right."""
    lines: dict[str, list[tuple[float, Point]]] = {}
    for point in points:
        label = ", ".join(_shown(name, point["settings"].get(name)) for name in fixed)
        lines.setdefault(label or "all", []).append((x(point), point))
    return [(label, sorted(line, key=lambda pair: pair[0])) for label, line in lines.items()]


def _shown(name: str, value: Any) -> str:
    return str(value) if name == "sampler" else f"{WORDS.get(name, name)} {value:g}"


def _panels(found: Mapping[str, Any], lines: Sequence[_Line], x_label: str, *, log_x: bool) -> list[Panel]:
    panels = []
    for group, real in found["real"].items():
        first = found["points"][0][group]
        measures: list[tuple[str, Callable[[dict[str, Any]], float], bool, float | None]] = [
            ("found first", lambda rates: rates["at_1"], True, real["at_1"]),
            ("found among five", lambda rates: rates["at_5"], True, real["at_5"]),
            ("CLIP score", lambda rates: rates["clip_score"], False, real["clip_score"]),
        ]
        for key in SPACES:
            if key in first:
                kind = "fid" if "fid" in first[key] else "frechet"
                what = "FID" if kind == "fid" else f"Fréchet distance, {SPACES[key]}"
                measures.append((f"{what} (less is better)", lambda r, k=key, d=kind: r[k][d], False, None))
        for title, value, percent, level in measures:
            series = [Series(label, [(x, value(point[group])) for x, point in line]) for label, line in lines]
            name = f"{group.replace('_', ' ')}: {title}"
            reference = None if level is None else ("real pictures", level)
            panels.append(Panel(name, x_label, series, percent, log_x, reference))
    return panels
