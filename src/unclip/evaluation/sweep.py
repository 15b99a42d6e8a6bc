"""Sweeps: quality and seconds per picture for many combinations of settings, with the same captions and seeds."""

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from PIL import Image

from unclip.errors import InputError
from unclip.evaluation.charts import Point
from unclip.evaluation.inception import InceptionFeatures
from unclip.evaluation.measures import distances
from unclip.evaluation.retrieval import Candidates, Judge, Plan
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
    plan: Plan,
    places: Sequence[Settings],
    *,
    use_sampler: Callable[[str], None],
    finished: Sequence[Point] = (),
    on_point: Callable[[dict[str, Any]], None] = lambda found: None,
    features: InceptionFeatures | None = None,
    points_progress: Callable[[Sequence[Settings]], Iterable[Settings]] = iter,
) -> dict[str, Any]:
    """Generate and judge pictures of the same captions with the same seeds for every combination of settings.

    Args:
        pipeline: the model.
        judge: a CLIP that the model was not trained with.
        plan: the captions.
        places: combinations of settings, as `grid_of` returns them.
        use_sampler: switches the pipeline to the sampler with this name.
        finished: points of an earlier run with the same model and plan. They are not computed again.
        on_point: called after each new point with all results so far.
        features: another space in which to measure the distance from real pictures.
        points_progress: wraps the iterable of the unfinished combinations.

    Returns: `num_captions` and chance; `real`, the rates of the real pictures by group; and `points` in the order of
        `places`, then those of `finished` that are not in `places`. A point has "settings", "seconds_per_picture"
        (without loading, judging and a warm-up batch), and for each group "num", `at_1`, `at_5`, `clip_score` and the
        distances from the real pictures.

    Raises: as `Plan.choose`.
    """
    chosen = plan.choose()
    candidates = Candidates.read_by(judge, chosen.captions)
    captions = {name: chosen.captions_of(name) for name, records in chosen.groups.items() if records}
    real = {name: chosen.pictures(name) for name in captions}
    looked = {name: judge.look(real[name]) for name in captions}
    featured = {name: features.look(real[name]) for name in captions} if features is not None else {}
    rates = {
        name: {"num": len(prompts), **candidates.rates(looked[name], prompts)} for name, prompts in captions.items()
    }
    about: dict[str, Any] = {**candidates.about(), **chosen.left_out(), "real": rates}
    done, warm = list(finished), False

    def found() -> dict[str, Any]:
        requested = [point for place in places if (point := point_at(done, place)) is not None]
        return {**about, "points": requested + [point for point in done if point not in requested]}

    for settings in points_progress([place for place in places if point_at(done, place) is None]):
        call = {name: value for name, value in settings.items() if name != SAMPLER}
        if SAMPLER in settings:
            use_sampler(settings[SAMPLER])
        if not warm:
            pipeline(captions["seen"][: plan.batch_size], seed=plan.seed, **call)
            warm = True
        point: Point = {"settings": dict(settings)}
        seconds = 0.0
        for name, prompts in captions.items():
            made: list[Image.Image] = []
            for rows, seeds in plan.batches(len(prompts)):
                start = time.perf_counter()
                made += pipeline(prompts[rows], seed=seeds, **call).images  # pyright: ignore
                seconds += time.perf_counter() - start
            of_made = judge.look(made)
            pair = (features.look(made), featured[name]) if features is not None else None
            point[name] = {"num": len(made), **candidates.rates(of_made, prompts)}
            point[name] |= distances((of_made, looked[name]), features, pair)
        point["seconds_per_picture"] = round(seconds / sum(map(len, captions.values())), 5)
        done.append(point)
        on_point(found())
    return found()
