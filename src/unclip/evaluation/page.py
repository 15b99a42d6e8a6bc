"""One HTML page of several reports: tables, charts, pictures, all in one file that runs nothing and loads nothing.

Knows reports as JSON objects and the pictures that they name; trusts neither. Called by `unclip evaluate report`.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from unclip.checkpoints.files import safe_join
from unclip.errors import DataError, ImageError, UnsafeFileError
from unclip.evaluation.curves import curves
from unclip.evaluation.tables import KINDS, Table, tables
from unclip.images import open_image

SIDE_LIMIT_PX = 1600
"""Larger pictures are made smaller for the page."""

STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1000px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.7em } h2 { margin-top: 2em; border-bottom: 1px solid #ddd }
h3 { font-size: 1em; margin: 1.4em 0 .3em }
table { border-collapse: collapse } td, th { padding: .2em .9em; text-align: right; border-bottom: 1px solid #eee }
td:first-child, th:first-child { text-align: left; padding-left: 0 } th { color: #555; font-weight: 600 }
p.about, details { color: #555; font-size: .9em } img, svg { max-width: 100%; height: auto; margin: .6em 0 }
figure { margin: 1em 0 } figcaption { color: #555; font-size: .9em }
"""
HEAD = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
"""
MEANING = {
    "retrieval": "Pictures were generated from captions, and a CLIP that had no part in the model ranked all captions "
    "for each. The rows of real pictures are what this judge can find at best.",
    "wordings": "Pictures were generated from free wordings. The judge's first caption, or one of its first five, is "
    "right when the list accepts it.",
    "variations": "Real pictures were varied. The judge ranked all captions for each variation.",
    "prior": "The prior's embedding for a caption beside the true one of the picture with this caption, and what it "
    "must beat: the caption's own embedding, another picture's, and the mean of all others.",
    "decoder": "Pictures drawn from the true embedding of a real one: what is lost here no prior can bring back.",
    "sweep": "The same captions from the same seeds, drawn with each combination of settings.",
}


def page(
    reports: Sequence[tuple[Path, Mapping[str, Any]]], *, title: str, pictures: Sequence[Path] = ()
) -> tuple[str, list[str]]:
    """The page, and a sentence for each picture that a report names and that was left out.

    Args:
        reports: each with the path that it was read from; pictures that it names are looked for in its folder.
        title: of the page.
        pictures: more of them, shown at the end.

    Raises: DataError for a JSON file that is no report of a measure; ImageError for one of `pictures`.
    """
    body, left_out = [f"<h1>{escape(title)}</h1>"], []
    for path, report in reports:
        names = [name for name in KINDS if isinstance(report.get(name), Mapping)]
        if not names:
            raise DataError(f"{path} is no report of unclip evaluate: it has none of {', '.join(KINDS)}")
        for name in names:
            try:
                body += _section(name, report, path)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                raise DataError(f"{path} is no whole report of {name} ({error!r}); make it again") from error
        named = report.get("pictures", [])
        for each in named if isinstance(named, list) else []:
            try:
                body.append(_figure(safe_join(path.parent, each), str(each)))
            except (UnsafeFileError, ImageError) as error:
                left_out.append(f"a picture of {path} is left out: {error}")
    body += [_figure(picture, picture.name) for picture in pictures]
    head = f"{HEAD}<title>{escape(title)}</title>\n<style>\n{STYLE}</style>\n</head>\n"
    return f"{head}<body>\n" + "\n".join(body) + "\n</body>\n</html>\n", left_out


def _section(name: str, report: Mapping[str, Any], path: Path) -> list[str]:
    found = report[name]
    about = {key: value for key, value in report.items() if key not in (name, "pictures", "settings")}
    settings = report.get("settings", {})
    known = {key: value for key, value in {**about, **settings}.items() if value is not None}
    told = [f"{key.replace('_', ' ')}: {_value(value)}" for key, value in known.items()]
    title = f"{name.capitalize()}: {report.get('model', path.name)}"
    title += f" on {report['data']}" if "data" in report else ""
    parts = [f"<h2>{escape(title)}</h2>"]
    parts.append(f"<p>{escape(MEANING[name])}</p>")
    parts.append(f'<p class="about">{escape(" · ".join(told))}</p>')
    for table in tables(name, found):
        parts.append(_table(table))
    if name == "sweep":
        parts += curves(found).values()
    whole = escape(json.dumps(found, indent=1, ensure_ascii=False))
    parts.append(f"<details><summary>{escape(path.name)}</summary><pre>{whole}</pre></details>")
    return parts


def _table(table: Table) -> str:
    def row(cells: Sequence[str], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in cells) + "</tr>"

    rows = "\n".join(row(cells, "td") for cells in table.rows)
    return f"<h3>{escape(table.title)}</h3>\n<table>\n{row(table.head, 'th')}\n{rows}\n</table>"


def _figure(path: Path, caption: str) -> str:
    """The picture decoded and encoded anew: whatever else the file holds does not come along."""
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
