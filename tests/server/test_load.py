"""A server that gets many more requests than it can answer."""

import asyncio
import importlib.util
import statistics
import time

import psutil
import pytest

from unclip.server.models import Model

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]
PICTURE_S = 0.05


def test_ten_times_the_capacity(serve, pytestconfig, monkeypatch):
    spec = importlib.util.spec_from_file_location("load", pytestconfig.rootpath / "benchmarks" / "load.py")
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    make = Model.make

    def slow(self, work, rows, on_step):
        time.sleep(PICTURE_S * len(rows))
        return make(self, work, rows, on_step)

    monkeypatch.setattr(Model, "make", slow)
    process = psutil.Process()
    with serve(max_queue=8, max_batch=4) as live:
        asyncio.run(benchmark.load(live.url, 10, 2, {}))
        before = process.memory_info().rss
        found = asyncio.run(benchmark.load(live.url, 10 / PICTURE_S, 10, {}))
        grown = process.memory_info().rss - before
    assert found["statuses"].keys() <= {200, 202, 429}
    assert found["statuses"][200]
    assert found["statuses"][202]
    assert found["statuses"][429] > found["statuses"][200]
    assert [found[name] for name in ("mixed", "lost", "doubled", "surplus")] == [0, 0, 0, 0]
    assert max(found["latency"]) < 3 * 12 / found["pictures a second"] + 1
    assert statistics.median(found["health"]) < 0.1
    assert grown < 100e6
