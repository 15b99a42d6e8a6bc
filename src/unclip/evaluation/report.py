"""Reports of the measures as tables, as an HTML page, and as sheets of pictures."""

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from unclip.checkpoints.files import atomic_file, safe_join
from unclip.errors import DataError, ImageError, UnsafeFileError
from unclip.evaluation import GROUPS
from unclip.evaluation.charts import can_draw, curves
from unclip.images import grid, labelled, open_image
from unclip.settings import SETTINGS


@dataclass(frozen=True)
class Table:
    """Cells as text. The first cell of a row is its label, the others are values."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        """The table in columns for a terminal, without the title."""
        lines = [self.head, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.head))]
        widths[0] = max(widths[0], 18)
        return "\n".join(
            "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
            for line in lines
        )


def tables(name: str, found: Mapping[str, Any]) -> list[Table]:
    """The tables of the results of the measure `name`; none for an unknown measure."""
    return KINDS[name](found) if name in KINDS else []


def _rates(found: Mapping[str, Any]) -> list[Table]:
    rows, kinds, similar, distant = [], [], [], []
    for name, group in _groups(found):
        for kind in ("generated", "variations", "real"):
            if kind in group:
                rows.append([f"{name}, {kind}", str(group["num"]), *_shares(group[kind])])
        for kind, rates in group.get("kinds", {}).items():
            whats = [what for what in ("generated", "real") if what in rates]
            kinds += [[f"{name}, {kind}, {what}", str(rates["num"]), *_shares(rates[what])] for what in whats]
        if "similarity" in group:
            similar.append([name, *_each(group, ".3f", "similarity", "similarity_of_others", "pixel_difference")])
        for of in (group[key] for key in ("distance", "feature_distance") if key in group):
            which = "FID" if "fid" in of else "Fréchet"
            distant.append([f"{name}, in {of['space']}", which, _distance(of), *_each(of, ".6f", "kernel")])
    if "chance_at_1" in found:
        rows.append(["chance", str(found["num_captions"]), *_each(found, ".1%", "chance_at_1", "chance_at_5"), ""])
    head = ("", "number", "first", "in five", "score")
    more = [
        Table("By kind of caption", head, kinds),
        Table("Cosine to the picture", ("", "its own", "another's", "pixels apart"), similar),
        Table("Distance from the real pictures", ("", "which", "distance", "kernel"), distant),
    ]
    return [Table("Retrieval by the judge", head, rows), *(table for table in more if table.rows)]


def _prior(found: Mapping[str, Any]) -> list[Table]:
    rows, dots = [], []
    for name, group in _groups(found):
        if "cosine" in group:
            cosines = _each(group["cosine"], ".3f", "prior", "text", "other", "mean")
            rows.append([name, str(group["num"]), *cosines, *_each(group, ".1%", "at_1", "at_5")])
            figures = [_each(group[what], ".3f", "prior", "true") for what in ("text_dot", "norm")]
            dots.append([name, *figures[0], *figures[1]])
    head = ("", "number", "prior", "text itself", "another's", "mean", "first", "in five")
    return [
        Table("Cosine to the true image embedding", head, rows),
        Table("Dot product with the caption, and length", ("", "prior", "true", "prior's length", "true length"), dots),
    ]


def _decoder(found: Mapping[str, Any]) -> list[Table]:
    near, pixels = [], []
    for name, group in _groups(found):
        if "own" in group:
            figures = [_each(group[space], ".3f", "decoded", "other") for space in ("own", "judge")]
            near.append([name, str(group["num"]), *figures[0], *figures[1]])
            for of in (group["small"], group["large"]):
                errors = [*_each(of, ".4f", "mae"), *_each(of, ".2f", "psnr_db"), *_each(of, ".3f", "ssim")]
                pixels.append([f"{name}, {of['size_px']} px", *errors])
    head = ("", "number", "own CLIP", "another's", "judge", "another's")
    return [
        Table("Cosine of a picture and its decode", head, near),
        Table("Pixels", ("", "mean difference", "PSNR (dB)", "SSIM"), pixels),
    ]


def _sweep(found: Mapping[str, Any]) -> list[Table]:
    made = []
    for group, real in found["real"].items():
        keys = _distances(found, group)
        rows = [
            [_settings(point["settings"]), f"{point['seconds_per_picture']:.3f}", *_shares(point[group])]
            + [_distance(point[group].get(key, {})) for key in keys]
            for point in found["points"]
        ]
        rows.append(["real pictures", "", *_shares(real), *("" for _ in keys)])
        head = ["guidance / steps / sampler", "s/picture", "first", "in five", "score", *keys.values()]
        made.append(Table(f"Sweep, {group.replace('_', ' ')}", head, rows))
    return made


def _wordings(found: Mapping[str, Any]) -> list[Table]:
    groups = {"all": found, **found["kinds"], "chance": {f"at_{k}": found[f"chance_at_{k}"] for k in (1, 5)}}
    rows = [[name, str(of.get("num", "")), *_each(of, ".1%", "at_1", "at_5")] for name, of in groups.items()]
    return [Table("Free wordings", ("", "number", "first", "in five"), rows)]


ALSO_SHOWN = ("noise_level", "decoder_guidance_low", "decoder_guidance_high", "decoder_reuse", "super_res_reuse")
"""Settings that a sweep's table names where they are not the defaults."""


def _settings(settings: Mapping[str, Any]) -> str:
    scales = "-".join(f"{settings[f'{stage}_guidance_scale']:g}" for stage in ("prior", "decoder"))
    steps = "-".join(str(settings[f"{stage}_num_inference_steps"]) for stage in ("prior", "decoder", "super_res"))
    more = [
        f" / {row.label} {settings[name]:g}"
        for name, row in SETTINGS.items()
        if name in ALSO_SHOWN and settings.get(name, row.default) != row.default
    ]
    return f"{scales} / {steps} / {settings['sampler']}{''.join(more)}"


def _distances(found: Mapping[str, Any], group: str) -> dict[str, str]:
    """The keys of the points' distances, with their column heads."""
    words = {"distance": "Fréchet", "feature_distance": "features'"}
    if any("fid" in point[group].get("feature_distance", {}) for point in found["points"]):
        words["feature_distance"] = "FID"
    return {key: word for key, word in words.items() if any(key in point[group] for point in found["points"])}


def _distance(of: Mapping[str, float]) -> str:
    return f"{value:.4f}" if (value := of.get("fid", of.get("frechet"))) is not None else ""


def _shares(rates: Mapping[str, float]) -> list[str]:
    return [*_each(rates, ".1%", "at_1", "at_5"), *_each(rates, ".3f", "clip_score")]


def _each(of: Mapping[str, float], form: str, *keys: str) -> list[str]:
    return [format(of[key], form) for key in keys]


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

SIDE_LIMIT_PX = 1600
"""Larger pictures are reduced for the page."""

MEANING = {
    "retrieval": "Pictures were generated from captions. A CLIP that the model was not trained with ranked all "
    "captions for each picture. The rows of real pictures are the best that this judge can reach.",
    "wordings": "Pictures were generated from free wordings. The judge's first caption, or one of its first five, is "
    "right if the list accepts it.",
    "variations": "Real pictures were varied. The judge ranked all captions for each variation.",
    "prior": "The prior's embedding for a caption is compared with the true embedding of the picture with this "
    "caption. The baselines are the caption's own embedding, another picture's, and the mean of all others.",
    "decoder": "Real pictures were reconstructed from their true embeddings. No prior can restore what is lost here.",
    "sweep": "Pictures of the same captions were generated with the same seeds for each combination of settings.",
}

NO_CHARTS = '<p class="about">The charts are left out because matplotlib is not installed.</p>'


def page(
    reports: Sequence[tuple[Path, Mapping[str, Any]]], *, title: str, pictures: Sequence[Path] = ()
) -> tuple[str, list[str]]:
    """The page, and a message for each picture in a report that was left out.

    Args:
        reports: reports with their paths. The pictures of a report are searched for in its folder.
        title: title of the page.
        pictures: more pictures, shown at the end.

    Raises: DataError for a JSON file that is not a report of a measure; ImageError for one of `pictures`.
    """
    body, left_out = [f"<h1>{escape(title)}</h1>"], []
    for path, report in reports:
        names = [name for name in KINDS if isinstance(report.get(name), Mapping)]
        if not names:
            raise DataError(f"{path} is not a report of unclip evaluate: it needs one of the keys {', '.join(KINDS)}")
        for name in names:
            try:
                body += _section(name, report, path)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                raise DataError(f"{path} is not a complete {name} report ({error!r}); create it again") from error
        named = report.get("pictures", [])
        for each in named if isinstance(named, list) else []:
            try:
                body.append(_figure(safe_join(path.parent, each), str(each)))
            except (UnsafeFileError, ImageError) as error:
                left_out.append(f"a picture of {path} is left out: {error}")
    body += [_figure(picture, picture.name) for picture in pictures]
    template = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), body="\n".join(body)), left_out


def _section(name: str, report: Mapping[str, Any], path: Path) -> list[str]:
    found = report[name]
    about = {key: value for key, value in report.items() if key not in (name, "pictures", "settings")}
    settings = report.get("settings", {})
    known = {key: value for key, value in {**about, **settings}.items() if value is not None}
    facts = [f"{key.replace('_', ' ')}: {_value(value)}" for key, value in known.items()]
    title = f"{name.capitalize()}: {report.get('model', path.name)}"
    title += f" on {report['data']}" if "data" in report else ""
    parts = [f"<h2>{escape(title)}</h2>", f"<p>{escape(MEANING[name])}</p>"]
    parts += [f'<p class="about">{escape(" · ".join(facts))}</p>', *map(_table, tables(name, found))]
    if name == "sweep":
        parts += curves(found).values() if can_draw() else [NO_CHARTS]
    whole = escape(json.dumps(found, indent=1, ensure_ascii=False))
    parts.append(f"<details><summary>{escape(path.name)}</summary><pre>{whole}</pre></details>")
    return parts


def _table(table: Table) -> str:
    def row(cells: Sequence[str], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in cells) + "</tr>"

    rows = "\n".join(row(cells, "td") for cells in table.rows)
    return f"<h3>{escape(table.title)}</h3>\n<table>\n{row(table.head, 'th')}\n{rows}\n</table>"


def _figure(path: Path, caption: str) -> str:
    """The picture, decoded and encoded again, so that no other content of its file is copied."""
    image = open_image(path)
    image.thumbnail((SIDE_LIMIT_PX, SIDE_LIMIT_PX))
    content = io.BytesIO()
    image.save(content, "PNG")
    data = base64.b64encode(content.getvalue()).decode("ascii")
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _value(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:
        return f"{value[:12]}…"  # a checksum
    return f"{value:g}" if isinstance(value, float) else str(value)


MAX_CARDS = 200
"""Pictures on a sheet with captions."""


def sheet_path(prefix: Path, group: str) -> Path:
    """The file of a group's sheet: `PREFIX-seen.png` or `PREFIX-held-out.png`."""
    return prefix.with_name(f"{prefix.name}-{group.replace('_', '-')}.png")


def draw_pairs(real: Sequence[Image.Image], made: Sequence[Image.Image], path: Path, *, columns: int = 12) -> None:
    """Draw a sheet with rows of real pictures, each above the picture made from it."""
    size = made[0].size
    blank = Image.new("RGB", size, "white")
    cells = []
    for start in range(0, len(made), columns):
        for row in ([image.resize(size) for image in real[start : start + columns]], made[start : start + columns]):
            cells += [*row, *([blank] * (min(columns, len(made)) - len(row)))]
    _save(grid(cells, columns=min(columns, len(made))), path)


def draw_cards(
    real: Sequence[Image.Image], made: Sequence[Image.Image], captions: Sequence[str], path: Path, *, columns: int = 4
) -> None:
    """Draw a sheet with pairs of a real and a generated picture, each above its caption; at most `MAX_CARDS` pairs."""
    size = made[0].size
    cards = [
        labelled(grid([one.resize(size, Image.Resampling.LANCZOS), other], columns=2, gap=2), caption)
        for one, other, caption in list(zip(real, made, captions, strict=True))[:MAX_CARDS]
    ]
    _save(grid(cards, columns=columns, gap=12), path)


def draw_captioned(made: Sequence[Image.Image], captions: Sequence[str], path: Path, *, columns: int = 8) -> None:
    """Draw a sheet of pictures, each above its caption."""
    cards = [labelled(image, caption) for image, caption in zip(made, captions, strict=True)]
    _save(grid(cards, columns=columns, gap=8), path)


def _save(sheet: Image.Image, path: Path) -> None:
    with atomic_file(path) as draft:
        sheet.save(draft, "PNG")
