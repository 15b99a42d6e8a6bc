"""A sweep: the same captions drawn with many settings; quality beside the seconds that a picture takes.

Knows pipelines and the measures of pictures; knows not where results are kept. Called by `unclip evaluate sweep`.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from unclip.data.emoji.evaluation_set import Exam, Progress, batches, check_counts
from unclip.errors import InputError
from unclip.evaluation.charts import Point
from unclip.evaluation.measures import FeatureSpace, distances
from unclip.evaluation.retrieval import Candidates, Judge
from unclip.pipelines.text_to_image import UnCLIPPipeline

SAMPLER = "sampler"
"""The setting that is no argument of a call: it exchanges the pipeline's schedulers."""
MAX_POINTS = 1000

Settings = Mapping[str, Any]
"""A value for each argument of a call that is swept, and for `SAMPLER`."""


def grid_of(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the values of each axis, the last axis fastest; a value given twice counts once.

    Raises: InputError for an axis without values, or more than 1,000 combinations.
    """
    for name, values in axes.items():
        if not values:
            raise InputError(f"{name} has no values to sweep over; give at least one")
    once = {name: list(dict.fromkeys(values)) for name, values in axes.items()}
    found = [dict(zip(once, values, strict=True)) for values in itertools.product(*once.values())]
    if len(found) > MAX_POINTS:
        raise InputError(
            f"these lists make {len(found)} combinations; at most {MAX_POINTS} are swept: give fewer values"
        )
    return found


def point_at(points: Iterable[Point], settings: Settings) -> Point | None:
    """The finished point of these settings, if there is one."""
    return next((point for point in points if point["settings"] == dict(settings)), None)


def sweep(
    pipeline: UnCLIPPipeline,
    judge: Judge,
    data: Path,
    places: Sequence[Settings],
    *,
    use_sampler: Callable[[str], None],
    finished: Sequence[Point] = (),
    on_point: Callable[[dict[str, Any]], None] = lambda found: None,
    num_seen: int = 100,
    num_held_out: int | None = 0,
    batch_size: int = 16,
    seed: int = 0,
    features: FeatureSpace | None = None,
    progress: Progress = iter,
    points_progress: Callable[[Sequence[Settings]], Iterable[Settings]] = iter,
) -> dict[str, Any]:
    """Draw the same captions from the same seeds at every place, and judge them.

    Args:
        pipeline: the model.
        judge: a CLIP that had no part in it.
        data: a data set; captions are chosen as for `retrieval`.
        places: settings, as `grid_of` gives them.
        use_sampler: brings the pipeline to the sampler of that name.
        finished: points of an earlier run with the same model, data and numbers; they are not computed again.
        on_point: told all that was found so far after each new point.
        num_seen, num_held_out: how many captions of each group; None takes all held-out ones.
        batch_size: pictures a call.
        seed: of the choice, and of the first picture of each group.
        features: another space in which the distance from the real pictures is told.
        progress, points_progress: wrap the batches of a point, and the places to go to.

    Returns: `num_captions` and chance; `real`, the rates of the real pictures by group; and `points` in the order of
        `places` (those of `finished` that are not asked for come last): each with "settings", "seconds_per_picture"
        (of drawing alone: loading and judging are not counted, nor is the first, warming batch), and by group "num",
        at_1, at_5, clip_score and the distances from the real pictures.

    Raises: InputError when a number is out of its limits; DataError when the data set cannot be used.
    """
    check_counts(batch_size=batch_size)
    exam = Exam.prepare(data, num_seen=num_seen, num_held_out=num_held_out, seed=seed)
    groups = [name for name, records in exam.groups.items() if records]
    candidates = Candidates.read_by(judge, exam.captions)
    real = {name: exam.pictures(name) for name in groups}
    looked = {name: judge.look(real[name]) for name in groups}
    featured = {name: features.look(real[name]) for name in groups} if features is not None else {}
    about: dict[str, Any] = {
        "num_captions": len(candidates.captions),
        **candidates.chance(),
        **exam.left_out(),
        "real": {name: {"num": len(real[name])} | candidates.rates(looked[name], exam.asked(name)) for name in groups},
    }
    done = list(finished)

    def found() -> dict[str, Any]:
        asked = [point for place in places if (point := point_at(done, place)) is not None]
        return {**about, "points": asked + [point for point in done if point not in asked]}

    warm = False
    for settings in points_progress([place for place in places if point_at(done, place) is None]):
        call = {name: value for name, value in settings.items() if name != SAMPLER}
        if SAMPLER in settings:
            use_sampler(settings[SAMPLER])
        if not warm:
            pipeline(exam.asked(groups[0])[:batch_size], seed=seed, **call)
            warm = True
        point: Point = {"settings": dict(settings)}
        seconds = 0.0
        for name in groups:
            asked, made = exam.asked(name), []
            for rows, seeds in batches(len(asked), batch_size, seed=seed, progress=progress):
                start = time.perf_counter()
                made += pipeline(asked[rows], seed=seeds, **call).images  # pyright: ignore
                seconds += time.perf_counter() - start
            point[name] = judged(judge, candidates, made, asked, looked[name], features, featured.get(name))
        point["seconds_per_picture"] = round(seconds / sum(len(real[name]) for name in groups), 5)
        done.append(point)
        on_point(found())
    return found()


def judged(
    judge: Judge,
    candidates: Candidates,
    made: Sequence[Image.Image],
    asked: Sequence[str],
    looked: Tensor,
    features: FeatureSpace | None,
    featured: Tensor | None,
) -> dict[str, Any]:
    """The number, the rates and the distances of one group of pictures; `looked` and `featured` are of real ones."""
    of_made = judge.look(made)
    pair = (features.look(made), featured) if features is not None and featured is not None else None
    rates = candidates.rates(of_made, asked)
    return {"num": len(made), **rates, **distances((of_made, looked), features, pair)}
