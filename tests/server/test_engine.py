"""Batches, cancellation, memory and failures of the engine."""

import json
import shutil
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from unclip.errors import InputError, NonFiniteError
from unclip.pipelines.session import Compute, Session
from unclip.server.contract import ApiError, GenerationRequest
from unclip.server.engine import FIRST_GUESS_S, ClosedError, Engine, MemoryExhaustedError, Part, QueueFullError, halves
from unclip.server.models import KINDS, Model, Models, Row, Work
from unclip.server.work import Requests

from .conftest import wait_until


def work(folder, seed: int = 0, count: int = 1, prompt: str = "a cat", **more) -> Work:
    given = dict.fromkeys(("prior_num_inference_steps", "decoder_num_inference_steps", "super_res_num_inference_steps"))
    settings = Session(str(folder), Compute()).settings(KINDS["generate"], given)
    return Work("tiny", "generate", [Row(seed + i, prompt) for i in range(count)], settings, **more)


def pixels(made) -> list[np.ndarray]:
    return [np.asarray(each.image, dtype=int) for each in made]


def results(engine: Engine, *works: Work) -> list[list[np.ndarray]]:
    for each in works:
        engine.submit(each)
    if not any(thread.is_alive() for thread in engine._threads):
        engine.start()
    return [pixels(each.future.result(timeout=20)) for each in works]


def sizes_of(engine: Engine) -> list[int]:
    found: list[int] = []
    engine.on_batch = lambda size, seconds: found.append(size)
    return found


def test_compatible_requests_are_computed_together_and_do_not_change_each_other(engine, model_folder):
    sizes = sizes_of(engine)
    together = results(
        engine, work(model_folder, 1), work(model_folder, 2, prompt="a red apple"), work(model_folder, 3)
    )
    assert sizes == [3]
    alone = [
        results(engine, work(model_folder, seed, prompt=prompt))[0]
        for seed, prompt in ((1, "a cat"), (2, "a red apple"), (3, "a cat"))
    ]
    for one, other in zip(together, alone, strict=True):
        assert np.abs(one[0] - other[0]).max() <= 1  # rounding differs between batch sizes
    assert np.abs(together[0][0] - together[2][0]).max() > 1


def test_a_picture_is_that_of_the_pipeline(engine, model_folder):
    ((made,),) = results(engine, work(model_folder, 5))
    pipe = Session(str(model_folder), progress=False).pipeline(KINDS["generate"])
    wanted = pipe(["a cat"], seed=[5], **dict(work(model_folder).settings)).images[0]
    assert np.array_equal(made, np.asarray(wanted))


def test_other_settings_and_samplers_are_other_batches(engine, model_folder):
    sizes = sizes_of(engine)
    plain = work(model_folder, 1)
    by_ddim = work(model_folder, 1, sampler="ddim")
    again = work(model_folder, 1)
    one, other, third = results(engine, plain, by_ddim, again)
    assert sizes == [2, 1]
    assert not np.array_equal(one[0], other[0])
    assert np.array_equal(one[0], third[0])
    ((after,),) = results(engine, work(model_folder, 1))  # the model's own sampler is back
    assert np.abs(after - one[0]).max() <= 1


def test_a_large_request_is_split_and_keeps_its_order(engine, model_folder):
    sizes = sizes_of(engine)
    (many,) = results(engine, work(model_folder, 10, count=6))
    assert sizes == [4, 2]
    ((last,),) = results(engine, work(model_folder, 15))
    assert np.abs(many[5] - last).max() <= 1


def test_cancelling_one_request_leaves_the_others_bit_identical(engine, model_folder):
    def pair(cancel: bool) -> np.ndarray:
        first, second = work(model_folder, 1), work(model_folder, 2)
        if cancel:
            second.on_step = lambda step: engine.cancel(second) if step.stage == "decoder" else None
        engine.submit(first)
        engine.submit(second)
        if not any(thread.is_alive() for thread in engine._threads):
            engine.start()
        made = pixels(first.future.result(timeout=20))[0]
        assert second.future.cancelled() == cancel
        return made

    assert np.array_equal(pair(cancel=False), pair(cancel=True))


def test_a_batch_without_requests_stops_within_one_step(engine, model_folder):
    cancelled = work(model_folder, 1)
    seen = []

    def on_step(step):
        seen.append((step.stage, step.index))
        engine.cancel(cancelled)

    cancelled.on_step = on_step
    engine.submit(cancelled)
    engine.start()
    results(engine, work(model_folder, 2))
    assert seen == [("prior", 0)]


def test_a_batch_stops_within_one_step_when_its_last_request_is_cancelled(engine, model_folder):
    both = [work(model_folder, 1), work(model_folder, 2)]
    steps: list[list[str]] = [[], []]

    def watch(place: int, last: int):
        def on_step(step):
            steps[place].append(step.stage)
            if len(steps[place]) == last:
                engine.cancel(both[place])
                assert both[place].future.cancelled()  # its client is answered at once

        return on_step

    for place, last in enumerate((1, 4)):
        both[place].on_step = watch(place, last)
        engine.submit(both[place])
    sizes = sizes_of(engine)
    engine.start()
    wait_until(both[1].future.cancelled)
    results(engine, work(model_folder, 3))
    assert [len(each) for each in steps] == [1, 4]
    assert sizes == [1]  # the cancelled batch does not count as computed


def test_a_cancelled_request_in_the_queue_is_not_computed(engine, model_folder):
    sizes = sizes_of(engine)
    gone, kept = work(model_folder, 1), work(model_folder, 2)
    engine.submit(gone)
    assert engine.position(kept) == 0
    engine.submit(kept)
    assert engine.position(kept) == 1
    engine.cancel(gone)
    assert engine.position(kept) == 0
    engine.start()
    kept.future.result(timeout=20)
    assert sizes == [1]


def test_out_of_memory_halves_the_batch_once(engine, model_folder, monkeypatch):
    tried = []
    make = Model.make

    def limited(self, work, rows, on_step):
        tried.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(self, work, rows, on_step)

    monkeypatch.setattr(Model, "make", limited)
    made = results(engine, work(model_folder, 1, count=3), work(model_folder, 9))
    assert tried == [4, 2, 2]
    assert [len(each) for each in made] == [3, 1]


def test_memory_that_does_not_hold_half_a_batch_is_an_error(engine, model_folder, monkeypatch):
    def full(self, work, rows, on_step):
        tried.append(len(rows))
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    tried: list[int] = []
    monkeypatch.setattr(Model, "make", full)
    failing = engine.submit(work(model_folder, 1, count=4))
    engine.start()
    with pytest.raises(MemoryExhaustedError, match="fewer pictures"):
        failing.future.result(timeout=20)
    assert tried == [4, 2, 2]


def test_only_the_request_at_fault_fails(engine, model_folder, build_pipeline):
    settings = {"decoder_num_inference_steps": 2, "super_res_num_inference_steps": 2, "decoder_guidance_scale": 1.0}
    good = Work("tiny", "decode", [Row(1, embedding=torch.zeros(16))], settings)
    bad = Work("tiny", "decode", [Row(1, embedding=torch.full((16,), 3e38))], settings)
    engine.submit(good)
    engine.submit(bad)
    engine.start()
    assert len(good.future.result(timeout=20)) == 1
    with pytest.raises(NonFiniteError):
        bad.future.result(timeout=20)


def test_a_full_queue_tells_when_to_come_back(model_folder):
    engine = Engine({"tiny": str(model_folder)}, [Compute()], max_queue=2)
    engine.submit(work(model_folder, count=10))  # an idle engine takes any request
    with pytest.raises(QueueFullError) as caught:
        engine.submit(work(model_folder))
    assert caught.value.retry_after_s == round(9 * FIRST_GUESS_S)
    engine.close()
    with pytest.raises(ClosedError):
        engine.submit(work(model_folder))


def test_closing_finishes_what_is_queued_within_the_time(engine, model_folder):
    waiting = engine.submit(work(model_folder))
    engine.start()
    engine.close(timeout_s=20)
    assert len(waiting.future.result(timeout=0)) == 1


def test_edits_share_a_batch_only_with_pictures_of_their_size(engine):
    def edit(size: int, seed: int) -> Work:
        mask = Image.new("L", (size, size))
        mask.paste(255, (0, 0, size // 2, size))
        rows = [Row(seed, "a cat", image=Image.new("RGB", (size, size), "red"), mask=mask)]
        settings = {f"{stage}_num_inference_steps": 2 for stage in ("prior", "decoder", "super_res")}
        return Work("tiny", "inpaint", rows, {**settings, "num_resamples": 1})

    sizes = sizes_of(engine)
    results(engine, edit(16, 1), edit(32, 1), edit(16, 2))
    assert sizes == [2, 1]


def test_embeddings_of_another_width_are_another_batch(engine):
    settings = {"decoder_num_inference_steps": 2, "super_res_num_inference_steps": 2}
    right, wrong = (Work("tiny", "decode", [Row(1, embedding=torch.zeros(width))], settings) for width in (16, 3))
    engine.submit(wrong)
    engine.submit(right)
    engine.start()
    assert len(right.future.result(timeout=20)) == 1
    with pytest.raises(InputError, match="16"):
        wrong.future.result(timeout=20)


def test_a_preview_that_fails_does_not_fail_the_picture(engine, model_folder, caplog):
    def on_step(step):
        raise RuntimeError("the client is gone")

    results(engine, work(model_folder, on_step=on_step))
    assert "a preview failed" in caplog.text


def test_previews_are_the_pictures_of_the_request(engine, model_folder):
    seen: dict[int, list[Image.Image]] = {1: [], 2: []}

    def watch(seed: int):
        return lambda step: seen[seed].extend(step.previews()) if step.stage.startswith("super") else None

    one, two = work(model_folder, 1, on_step=watch(1)), work(model_folder, 2, on_step=watch(2))
    made = results(engine, one, two)
    for seed, (picture,) in zip((1, 2), made, strict=True):
        last = np.asarray(seen[seed][-1], dtype=int)  # x0 of the last step is the picture
        assert np.array_equal(last, picture)


def test_halves_split_requests_too():
    one, two = Work("m", "k", [Row(0)] * 3), Work("m", "k", [Row(0)])
    left, right = halves([Part(one, 0, 3), Part(two, 0, 1)])
    assert [(part.work, part.first, part.count) for part in left] == [(one, 0, 2)]
    assert [(part.work, part.first, part.count) for part in right] == [(one, 2, 1), (two, 0, 1)]
    assert halves([Part(two, 0, 1)]) == []


def test_models_beyond_the_memory_are_unloaded(model_folder):
    models = Models({"a": str(model_folder), "b": str(model_folder)}, Compute(), max_bytes=1)
    models.get("a").load()
    assert models.each["a"].num_bytes > 0
    models.get("b").load()
    models.make_room()
    assert models.each["a"].num_bytes == 0
    assert models.each["b"].num_bytes > 0


def test_workers_share_one_queue(model_folder):
    engine = Engine({"tiny": str(model_folder)}, [Compute(), Compute()])
    both = threading.Barrier(2, timeout=20)
    works = [Work("tiny", "wait", function=lambda model, on_step: both.wait()) for _ in range(2)]
    for each in works:
        engine.submit(each)
    engine.start()
    assert sorted(each.future.result(timeout=20) for each in works) == [0, 1]
    engine.close()


def test_there_is_room_in_the_queue_when_a_result_arrives(model_folder):
    engine = Engine({"tiny": str(model_folder)}, [Compute()], max_queue=1)
    engine.start()
    for seed in range(20):
        engine.submit(work(model_folder, seed)).future.result(timeout=20)
    engine.close()


def test_a_request_with_a_preset(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    fast = {"decoder_num_inference_steps": 3, "decoder_reuse": 2, "sampler": "ddim"}
    (folder / "generation_defaults.json").write_text(json.dumps({"presets": {"fast": fast}}))
    requests = Requests(Engine({"tiny": str(folder)}, [Compute()]))

    def asked(**more):
        found = requests.generation(GenerationRequest(prompt="a cat", **more))
        return found.settings["decoder_num_inference_steps"], found.settings.get("decoder_reuse"), found.sampler

    assert asked(preset="fast") == (3, 2, "ddim")
    assert asked(preset="fast", steps=5, sampler="dpm") == (5, 2, "dpm")
    assert asked() == asked(preset="exact") == asked(preset="default") == (25, None, None)
    with pytest.raises(ApiError, match="preset is 'slow'; this model has exact, fast") as caught:
        asked(preset="slow")
    assert (caught.value.status, caught.value.param) == (400, "preset")
