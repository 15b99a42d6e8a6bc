"""Measure whether pictures of free wordings, such as "a mug of hot coffee", show an accepted concept.

A list gives the accepted concepts of each wording. A judge ranks the captions of all concepts for each picture.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from unclip.checkpoints.files import read_json
from unclip.data.emoji.evaluation_set import Progress, bare_caption, batches, check_counts, concepts_of
from unclip.data.folder import read_records
from unclip.errors import DataError
from unclip.evaluation.report import draw_captioned
from unclip.evaluation.retrieval import Candidates, Judge
from unclip.pipelines.text_to_image import UnCLIPPipeline


@dataclass(frozen=True)
class Wording:
    """A caption in free words, its kind ("words", "scenes", …) and the labels of the accepted concepts.

    Nonsense has no accepted concepts: a model should report it as unknown.
    """

    text: str
    kind: str
    accepted: frozenset[str]


def read_wordings(path: Path) -> list[Wording]:
    """Read a list of wordings: a JSON object of kinds, each an object of wordings with a list of labels.

    The list is empty for nonsense.

    Raises:
        CheckpointError: the file is missing or not JSON.
        DataError: the file does not contain such an object, or it is empty.
    """
    found = []
    kinds: Any = read_json(path)
    try:
        for kind, wordings in kinds.items():
            for text, labels in wordings.items():
                if not isinstance(labels, list) or not text.strip():
                    raise DataError(f"{path}: {text!r} needs a list of accepted labels")
                found.append(Wording(text, kind, frozenset(label.lower() for label in labels)))
    except AttributeError as error:
        raise DataError(
            f"{path} must be an object of kinds, each an object of wordings with labels: {error}"
        ) from error
    if not any(wording.accepted for wording in found):
        raise DataError(f"{path} contains no wordings with accepted labels")
    return found


def wordings(
    pipeline: UnCLIPPipeline,
    judge: Judge,
    data: Path,
    listed: list[Wording],
    *,
    batch_size: int = 16,
    seed: int = 0,
    sheet: Path | None = None,
    progress: Progress = iter,
    **call: Any,
) -> dict[str, Any]:
    """How often the judge's first caption, or one of its first five, is accepted.

    For a model with a list of concepts, also how often wordings and nonsense are reported as unknown.

    Args:
        pipeline: the model.
        judge: a CLIP that the model was not trained with.
        data: a data set of concepts, whose bare captions the judge ranks.
        listed: the wordings; wording i uses seed + i.
        batch_size: pictures per call.
        seed: seed of the first picture.
        sheet: file for a sheet of the pictures, each with its wording and the judge's first caption.
        progress: wraps the iterable of batches, as `tqdm` does.
        call: arguments of the pipeline's call.

    Returns: the numbers of wordings and of captions, chance, `at_1` and `at_5` of all wordings and of each kind, and
        the judge's first five captions for each wording; with a list of concepts also `reported`, the share of the
        wordings, and of the nonsense, that is reported as unknown.

    Raises:
        InputError: a number is outside its limits.
        DataError: an accepted label is not in the data set.
    """
    check_counts(batch_size=batch_size)
    nonsense = [wording for wording in listed if not wording.accepted]
    listed = [wording for wording in listed if wording.accepted]
    candidates = Candidates.read_by(judge, [bare_caption(record) for record in concepts_of(read_records(data))])
    unknown = {label for wording in listed for label in wording.accepted} - set(candidates.captions)
    if unknown:
        raise DataError(f"{data} has no concept called {', '.join(sorted(unknown)[:5])}, which the wordings accept")
    made: list[Image.Image] = []
    for rows, seeds in batches(len(listed), batch_size, seed=seed, progress=progress):
        made += pipeline([wording.text for wording in listed[rows]], seed=seeds, **call).images  # pyright: ignore
    scores = judge.look(made) @ candidates.embeddings.T
    first = [
        [candidates.captions[i] for i in row] for row in scores.topk(min(5, scores.shape[1]), dim=1).indices.tolist()
    ]
    places = [
        next((place for place, caption in enumerate(found) if caption in wording.accepted), len(found))
        for wording, found in zip(listed, first, strict=True)
    ]
    if sheet is not None:
        labels = [
            f"{wording.text}: {found[0] if place else 'right'}"
            for wording, found, place in zip(listed, first, places, strict=True)
        ]
        draw_captioned(made, labels, sheet)
    kinds: dict[str, list[int]] = {}
    for wording, place in zip(listed, places, strict=True):
        kinds.setdefault(wording.kind, []).append(place)
    reported = {"wordings": _reported(pipeline, listed), "nonsense": _reported(pipeline, nonsense)}
    mean_accepted = sum(len(wording.accepted) for wording in listed) / len(listed)
    return {
        "num_captions": len(candidates.captions),
        "chance_at_1": mean_accepted / len(candidates.captions),
        "chance_at_5": min(1.0, 5 * mean_accepted / len(candidates.captions)),
        **_rates(places),
        "kinds": {kind: _rates(of_kind) for kind, of_kind in kinds.items()},
        **({"reported": reported} if pipeline.concepts is not None else {}),
        "first_captions": {wording.text: found for wording, found in zip(listed, first, strict=True)},
    }


def _reported(pipeline: UnCLIPPipeline, listed: list[Wording]) -> float | None:
    """The share of the wordings that the model reports as unknown; None without wordings or a list of concepts."""
    if pipeline.concepts is None or not listed:
        return None
    texts = [wording.text for wording in listed]
    embeds = pipeline.caption_encoder.encode(texts, pipeline.device).embeds
    return round(len(pipeline.concepts.reports(texts, embeds)) / len(texts), 4)


def _rates(places: list[int]) -> dict[str, float]:
    rates = {f"at_{k}": round(sum(place < k for place in places) / len(places), 4) for k in (1, 5)}
    return {"num": len(places), **rates}
