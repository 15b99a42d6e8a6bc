"""Sweeps: quality and seconds per picture for many combinations of settings, with the same captions and seeds."""

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from unclip.data.emoji.evaluation_set import EvaluationSet, Progress, batches, check_counts
from unclip.errors import InputError
from unclip.evaluation.charts import Point
from unclip.evaluation.measures import FeatureSpace, distances
from unclip.evaluation.retrieval import Candidates, Judge
from unclip.pipelines.text_to_image import UnCLIPPipeline

SAMPLER = "sampler"
"""The setting that selects the pipeline's schedulers. All others are arguments of its call."""
MAX_POINTS = 1000

Settings = Mapping[str, Any]
"""Arguments of a call by name, and the value of `SAMPLER`."""


def grid_of(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the axes' values. The last axis varies fastest, and repeated values count once.

    Raises: InputError for an axis without values, or more than 1,000 combinations.
    """
    for name, values in axes.items():
        if not values:
            raise InputError(f"{name} has no values; give at least one")
    once = {name: list(dict.fromkeys(values)) for name, values in axes.items()}
    found = [dict(zip(once, values, strict=True)) for values in itertools.product(*once.values())]
    if len(found) > MAX_POINTS:
        raise InputError(
            f"these lists have {len(found)} combinations; at most {MAX_POINTS} are allowed: give fewer values"
        )
    return found


def point_at(points: Iterable[Point], settings: Settings) -> Point | None:
    """The finished point with these settings, if there is one."""
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
    """Generate and judge pictures of the same captions with the same seeds for every combination of settings.

    Args:
        pipeline: the model.
        judge: a CLIP that the model was not trained with.
        data: a data set; captions are chosen as for `retrieval`.
        places: combinations of settings, as `grid_of` returns them.
        use_sampler: switches the pipeline to the sampler with this name.
        finished: points of an earlier run with the same model, data and numbers. They are not computed again.
        on_point: called after each new point with all results so far.
        num_seen, num_held_out: number of captions in each group; None for all held-out captions.
        batch_size: pictures per call.
        seed: seed of the choice of captions, and of the first picture of each group.
        features: another space in which to measure the distance from real pictures.
        progress, points_progress: wrap the iterables of a point's batches and of the unfinished combinations.

    Returns: `num_captions` and chance; `real`, the rates of the real pictures by group; and `points` in the order of
        `places`, then those of `finished` that are not in `places`. A point has "settings", "seconds_per_picture"
        (without loading, judging and a warm-up batch), and for each group "num", `at_1`, `at_5`, `clip_score` and the
        distances from the real pictures.

    Raises: InputError if a number is outside its limits; DataError if the data set cannot be used.
    """
    check_counts(batch_size=batch_size)
    evaluation_set = EvaluationSet.prepare(data, num_seen=num_seen, num_held_out=num_held_out, seed=seed)
    groups = [name for name, records in evaluation_set.groups.items() if records]
    candidates = Candidates.read_by(judge, evaluation_set.captions)
    real = {name: evaluation_set.pictures(name) for name in groups}
    looked = {name: judge.look(real[name]) for name in groups}
    featured = {name: features.look(real[name]) for name in groups} if features is not None else {}
    about: dict[str, Any] = {
        "num_captions": len(candidates.captions),
        **candidates.chance(),
        **evaluation_set.left_out(),
        "real": {
            name: {"num": len(real[name])} | candidates.rates(looked[name], evaluation_set.asked(name))
            for name in groups
        },
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
            pipeline(evaluation_set.asked(groups[0])[:batch_size], seed=seed, **call)
            warm = True
        point: Point = {"settings": dict(settings)}
        seconds = 0.0
        for name in groups:
            asked, made = evaluation_set.asked(name), []
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
    """The number, rates and distances of one group. `looked` and `featured` are features of its real pictures."""
    of_made = judge.look(made)
    pair = (features.look(made), featured) if features is not None and featured is not None else None
    rates = candidates.rates(of_made, asked)
    return {"num": len(made), **rates, **distances((of_made, looked), features, pair)}
