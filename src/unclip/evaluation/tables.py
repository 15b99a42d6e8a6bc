"""Reports as tables: the rows of each measure, for the terminal and for the page alike.

Knows what the measures return; knows neither terminals nor HTML. Called by the commands and by the report's page.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unclip.evaluation import GROUPS


@dataclass(frozen=True)
class Table:
    """Cells as text: the first of each row says what it is, the others are figures."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        """In columns for a terminal, without the title."""
        lines = [self.head, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.head))]
        widths[0] = max(widths[0], 18)
        return "\n".join(
            "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
            for line in lines
        )


def tables(name: str, found: Mapping[str, Any]) -> list[Table]:
    """The tables of what the measure `name` returned; none for a measure that is not known."""
    return KINDS[name](found) if name in KINDS else []


def _rates(found: Mapping[str, Any]) -> list[Table]:
    rows = []
    for name, group in _groups(found):
        for kind in ("generated", "variations", "real"):
            if kind in group:
                rows.append([f"{name}, {kind}", str(group["num"]), *_shares(group[kind])])
    if "chance_at_1" in found:
        chance = [f"{found[f'chance_at_{k}']:.1%}" for k in (1, 5)]
        rows.append(["chance", str(found["num_captions"]), *chance, ""])
    made = [Table("Retrieval by the judge", ("", "number", "first", "in five", "score"), rows)]
    by_kind = [
        [f"{name}, {kind}, {what}", str(rates["num"]), *_shares(rates[what])]
        for name, group in _groups(found)
        for kind, rates in group.get("kinds", {}).items()
        for what in ("generated", "real")
        if what in rates
    ]
    if by_kind:
        made.append(Table("By kind of caption", ("", "number", "first", "in five", "score"), by_kind))
    similar = [
        [
            name,
            *(f"{group[key]:.3f}" for key in ("similarity", "similarity_of_others", "pixel_difference")),
        ]
        for name, group in _groups(found)
        if "similarity" in group
    ]
    if similar:
        made.append(Table("Cosine to the picture", ("", "its own", "another's", "pixels apart"), similar))
    distant = [
        [
            f"{name}, in {group[key]['space']}",
            "FID" if "fid" in group[key] else "Fréchet",
            f"{group[key].get('fid', group[key].get('frechet')):.4f}",
            f"{group[key]['kernel']:.6f}",
        ]
        for name, group in _groups(found)
        for key in ("distance", "feature_distance")
        if key in group
    ]
    if distant:
        made.append(Table("Distance from the real pictures", ("", "which", "distance", "kernel"), distant))
    return made


def _prior(found: Mapping[str, Any]) -> list[Table]:
    rows, dots = [], []
    for name, group in _groups(found):
        if "cosine" not in group:
            continue
        cosine, text = group["cosine"], group["text_dot"]
        rows.append(
            [
                name,
                str(group["num"]),
                *(f"{cosine[key]:.3f}" for key in ("prior", "text", "other", "mean")),
                *(f"{group[f'at_{k}']:.1%}" for k in (1, 5)),
            ]
        )
        norms = [f"{group['norm'][key]:.3f}" for key in ("prior", "true")]
        dots.append([name, *(f"{text[key]:.3f}" for key in ("prior", "true")), *norms])
    head = ("", "number", "prior", "text itself", "another's", "mean", "first", "in five")
    return [
        Table("Cosine to the true image embedding", head, rows),
        Table("Dot product with the caption, and length", ("", "prior", "true", "prior's length", "true length"), dots),
    ]


def _decoder(found: Mapping[str, Any]) -> list[Table]:
    near, pixels = [], []
    for name, group in _groups(found):
        if "own" not in group:
            continue
        figures = [f"{group[space][key]:.3f}" for space in ("own", "judge") for key in ("decoded", "other")]
        near.append([name, str(group["num"]), *figures])
        for size in ("small", "large"):
            of = group[size]
            figures = [f"{of['mae']:.4f}", f"{of['psnr_db']:.2f}", f"{of['ssim']:.3f}"]
            pixels.append([f"{name}, {of['size_px']} px", *figures])
    head = ("", "number", "own CLIP", "another's", "judge", "another's")
    return [
        Table("Cosine of a picture and its decode", head, near),
        Table("Pixels", ("", "mean difference", "PSNR (dB)", "SSIM"), pixels),
    ]


def _sweep(found: Mapping[str, Any]) -> list[Table]:
    made = []
    for group, real in found["real"].items():
        rows = [
            [
                _settings(point["settings"]),
                f"{point['seconds_per_picture']:.3f}",
                *_shares(point[group]),
                *(_distance(point[group], key) for key in _distances(found, group)),
            ]
            for point in found["points"]
        ]
        keys = _distances(found, group)
        rows.append(["real pictures", "", *_shares(real), *("" for _ in keys)])
        head = ["guidance / steps / sampler", "s/picture", "first", "in five", "score", *keys.values()]
        made.append(Table(f"Sweep, {group.replace('_', ' ')}", head, rows))
    return made


def _wordings(found: Mapping[str, Any]) -> list[Table]:
    groups = {"all": found, **found["kinds"], "chance": {f"at_{k}": found[f"chance_at_{k}"] for k in (1, 5)}}
    rows = [
        [name, str(rates.get("num", "")), *(f"{rates[f'at_{k}']:.1%}" for k in (1, 5))]
        for name, rates in groups.items()
    ]
    return [Table("Free wordings", ("", "number", "first", "in five"), rows)]


def _settings(settings: Mapping[str, Any]) -> str:
    scales = "-".join(f"{settings[f'{stage}_guidance_scale']:g}" for stage in ("prior", "decoder"))
    steps = "-".join(str(settings[f"{stage}_num_inference_steps"]) for stage in ("prior", "decoder", "super_res"))
    return f"{scales} / {steps} / {settings['sampler']}"


def _distances(found: Mapping[str, Any], group: str) -> dict[str, str]:
    """The distances that the points have, with their heads."""
    words = {"distance": "Fréchet", "feature_distance": "features'"}
    if any("fid" in point[group].get("feature_distance", {}) for point in found["points"]):
        words["feature_distance"] = "FID"
    return {key: word for key, word in words.items() if any(key in point[group] for point in found["points"])}


def _distance(rates: Mapping[str, Any], key: str) -> str:
    of = rates.get(key, {})
    return f"{value:.4f}" if (value := of.get("fid", of.get("frechet"))) is not None else ""


def _shares(rates: Mapping[str, float]) -> list[str]:
    return [f"{rates['at_1']:.1%}", f"{rates['at_5']:.1%}", f"{rates['clip_score']:.3f}"]


def _groups(found: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(group.replace("_", " "), found[group]) for group in GROUPS if group in found]


KINDS: dict[str, Callable[[Mapping[str, Any]], list[Table]]] = {
    "retrieval": _rates,
    "wordings": _wordings,
    "variations": _rates,
    "prior": _prior,
    "decoder": _decoder,
    "sweep": _sweep,
}
"""The measures that have tables, by the key of their report."""
