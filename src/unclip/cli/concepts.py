"""`unclip concepts`: list, search and draw the concepts that a model knows."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unclip.checkpoints.hub import resolve
from unclip.checkpoints.layout import CONCEPTS_FILE
from unclip.cli import options
from unclip.cli.inputs import plain
from unclip.cli.messages import bar, note
from unclip.cli.options import argument, flag, option
from unclip.cli.output import check_free
from unclip.errors import InputError
from unclip.pipelines.session import Session, model_name, silence_later

if TYPE_CHECKING:
    from unclip.clip.concepts import Concepts

SHEET_SEED = 0
NUM_BY_MEANING = 5


def concepts(
    *,
    words: Annotated[list[str] | None, argument("WORD")] = None,
    model: options.Model = "unclip-emoji",
    limit: Annotated[int | None, option("N", default="all", min=1)] = None,
    as_json: Annotated[bool, flag("--json")] = False,
    sheet: Annotated[Path | None, option("FILE", default="not written")] = None,
    source: Annotated[Path | None, option("DATA", "--from")] = None,
    phrases: Annotated[Path | None, option("FILE")] = None,
    overwrite: Annotated[bool, flag("--overwrite")] = False,
    batch_size: options.BatchSize = 16,
    precision: options.ExactPrecision,
    quiet: options.Quiet = False,
) -> None:
    """List what a model knows.

    A model's folder may have a list of the concepts that it was trained on. The commands that read captions use it to
    warn of a caption that is not close to any of them. The output has one concept on each line: its label, and other
    names after a colon. If no name has the word, the concepts that are nearest in meaning are shown.

    Args:
        words: Show the concepts that have one of these words in a name.
        limit: Show at most N concepts.
        as_json: Print a JSON object with the names on each line.
        sheet: Also write a PNG sheet with a picture of each shown concept.
        source: Write the list of the data set DATA into the model's folder.
        phrases: With --from: known captions for the threshold, such as those of unclip data language.
        overwrite: Replace an existing list or sheet.

    Examples:
        unclip concepts                   list everything
        unclip concepts cat               concepts that have this word in a name
        unclip concepts poodle            not in a name: the nearest in meaning
        unclip concepts fruit --sheet fruit.png
        unclip concepts --json > concepts.jsonl
        unclip concepts --from data/mine --model models/mine
    """
    if phrases is not None and source is None:
        raise typer.BadParameter("--phrases needs --from")
    silence_later(downloads=quiet)
    folder = resolve(model)
    if source is not None:
        found = _write(folder, model_name(model), source, phrases, overwrite=overwrite, quiet=quiet)
    else:
        found = _read(folder, model)
    session = Session(model, precision, progress=not quiet)
    places = _chosen(found, session, words, quiet=quiet)[:limit]
    for place in places if source is None else []:
        label, *others = found.names[place]
        if as_json:
            print(json.dumps({"label": label, "names": others}, ensure_ascii=False))
        else:
            print(f"{label}: {', '.join(others)}" if others else label)
    if sheet is not None:
        _draw(found, places, session, sheet, batch_size, overwrite=overwrite)


def _read(folder: Path, model: str) -> "Concepts":
    from unclip.clip.concepts import Concepts

    found = Concepts.read(folder)
    if found is None:
        raise InputError(
            f"{model} has no {CONCEPTS_FILE}; write one from its training data: unclip concepts --from DATA --model "
            f"{model}"
        )
    return found


def _write(folder: Path, name: str, data: Path, phrases: Path | None, *, overwrite: bool, quiet: bool) -> "Concepts":
    from unclip.training.concepts import concepts_of

    found = concepts_of(folder, data, name=name, phrases=phrases, progress=bar(quiet))
    path = found.write(folder, overwrite=overwrite)
    if not quiet:
        note(f"{len(found)} concepts; a caption is unknown below a closeness of {found.threshold:.3f}")
    print(path, flush=True)
    return found


def _chosen(found: "Concepts", session: Session, words: list[str] | None, *, quiet: bool) -> list[int]:
    """The concepts that the words name, without repetition; all without words."""
    if not words:
        return list(range(len(found)))
    places: dict[int, None] = {}
    for word in map(plain, words):
        named = found.search(word)
        if not named:
            named = _by_meaning(found, session, word)
            if not quiet:
                note(f"no name has {word!r}; the nearest in meaning:")
        places |= dict.fromkeys(named)
    return list(places)


def _by_meaning(found: "Concepts", session: Session, text: str) -> list[int]:
    from unclip.pipelines.image_variation import UnCLIPImageVariationPipeline

    pipe = session.pipeline(UnCLIPImageVariationPipeline)
    embeds = pipe.caption_encoder.encode([text], pipe.device).embeds
    return found.nearest(embeds, NUM_BY_MEANING)[1][0].tolist()


def _draw(
    found: "Concepts", places: list[int], session: Session, sheet: Path, batch_size: int, *, overwrite: bool
) -> None:
    """Decode the concepts' embeddings, all with the same noise, and draw them above their labels."""
    from unclip.evaluation.report import draw_captioned
    from unclip.pipelines.image_variation import UnCLIPImageVariationPipeline

    check_free(sheet, overwrite=overwrite)
    pipe = session.pipeline(UnCLIPImageVariationPipeline)
    made = []
    for start in range(0, len(places), batch_size):
        rows = places[start : start + batch_size]
        seeds = [SHEET_SEED] * len(rows)
        made += pipe(image_embeddings=found.embeddings[rows], seed=seeds, **pipe.recommended).images  # type: ignore[union-attr]
    draw_captioned(made, [found.labels[place] for place in places], sheet)
    print(sheet, flush=True)
