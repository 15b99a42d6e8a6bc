"""A sweep's charts: quality against seconds, and against guidance.

Knows a sweep's points; knows neither models nor files. Called by the sweep's command and by the report.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from unclip.evaluation.charts import Panel, Series, chart
from unclip.evaluation.sweep import Point, varied

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
