"""Send a server ten times the requests that it can answer, and print how it copes.

It starts `unclip serve` with the built-in model and measures its throughput. Then requests and jobs for one picture
each are sent at a fixed rate, whether or not earlier ones are answered.

    python benchmarks/load.py
    python benchmarks/load.py --seconds 20 --times 5

Printed: the statuses, the latency of answered requests and of /healthz, lost and doubled work, and the server's memory.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import httpx2
import psutil

EXPECTED = (200, 202, 429, 503, 504)
MAX_QUEUE = 16


async def load(url: str, rate: float, seconds: float, fields: dict[str, Any]) -> dict[str, Any]:
    """Send `rate` requests a second, every fourth one as a job, and wait for all answers and jobs.

    Returns: statuses, latencies in seconds, and counts of wrong answers: "mixed" (a picture of another seed), "lost"
        and "doubled" jobs, and "surplus" (computed pictures that nobody asked for).
    """
    limits = httpx2.Limits(max_connections=None)
    health: list[float] = []
    latency: list[float] = []
    statuses: Counter[int] = Counter()
    accepted: list[str] = []
    mixed = lost = 0

    async with httpx2.AsyncClient(base_url=url, timeout=300, limits=limits) as http:

        async def pictures() -> float:
            text = (await http.get("/metrics")).text
            return float(text.partition("\nunclip_pictures_total ")[2].split()[0])

        async def send(number: int) -> None:
            nonlocal mixed
            start, kind = time.perf_counter(), "images/generations" if number % 4 else "jobs"
            answer = await http.post(f"/v1/{kind}", json={"prompt": "a red apple", "seed": number, **fields})
            statuses[answer.status_code] += 1
            if answer.status_code == 200:
                latency.append(time.perf_counter() - start)
                mixed += [each["seed"] for each in answer.json()["data"]] != [number]
            elif answer.status_code == 202:
                accepted.append(answer.json()["id"])

        async def poll() -> None:
            while True:
                start = time.perf_counter()
                await http.get("/healthz")
                health.append(time.perf_counter() - start)
                await asyncio.sleep(0.1)

        before, polling = await pictures(), asyncio.create_task(poll())
        start, tasks = time.perf_counter(), []
        for number in range(round(rate * seconds)):
            await asyncio.sleep(max(0.0, start + number / rate - time.perf_counter()))
            tasks.append(asyncio.create_task(send(number)))
        await asyncio.gather(*tasks)
        for name in accepted:
            while (job := (await http.get(f"/v1/jobs/{name}")).json()).get("status") in ("queued", "running"):
                await asyncio.sleep(0.05)
            lost += job.get("status") != "completed"
        polling.cancel()
        made = await pictures() - before
    return {
        "statuses": dict(statuses),
        "unexpected": sum(number for status, number in statuses.items() if status not in EXPECTED),
        "pictures a second": made / (time.perf_counter() - start),
        "latency": latency,
        "health": health,
        "mixed": mixed,
        "lost": lost,
        "doubled": len(accepted) - len(set(accepted)),
        "surplus": made - len(latency) - len(accepted),
    }  # fmt: skip


def shares(values: Sequence[float]) -> str:
    """Median, 95th percentile and maximum."""
    ordered = sorted(values) or [float("nan")]
    return ", ".join(f"{ordered[min(len(ordered) - 1, int(share * len(ordered)))]:.3f} s" for share in (0.5, 0.95, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--times", type=float, default=10, help="requests, as a multiple of the measured throughput")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps of the decoder")
    given = parser.parse_args()
    fields = {"steps": given.steps, "prior_steps": 4, "super_res_steps": 2, "candidates": 1}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "unclip", "serve", "--port", "0", "--folder", folder]
        command += ["--max-queue", str(MAX_QUEUE)]
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            assert server.stderr is not None
            url = next(found["url"] for line in server.stderr if (found := json.loads(line))["message"] == "listening")
            with open(f"{folder}/log", "w") as log:  # an unread pipe would block the server
                subprocess.Popen(["cat"], stdin=server.stderr, stdout=log)
            while not httpx2.get(f"{url}/readyz").is_success:
                time.sleep(0.1)
            asyncio.run(load(url, 2, 4, fields))  # so that everything is loaded
            start = time.perf_counter()
            httpx2.post(f"{url}/v1/images/generations", json={"prompt": "a cat", "n": 8, **fields}, timeout=300)
            capacity = 8 / (time.perf_counter() - start)
            process = psutil.Process(server.pid)
            before = process.memory_info().rss
            found = asyncio.run(load(url, given.times * capacity, given.seconds, fields))
            after = process.memory_info().rss
        finally:
            server.terminate()
            server.wait(60)
    print(f"throughput: {capacity:.2f} pictures a second; sent: {given.times * capacity:.1f} requests a second")
    for name, value in found.items():
        print(f"{name}: {shares(value) + ' (median, 95 %, maximum)' if isinstance(value, list) else value}")
    print(f"a full queue at this throughput: {MAX_QUEUE / found['pictures a second']:.1f} s")
    print(f"memory: {before / 1e6:.0f} MB before, {after / 1e6:.0f} MB after")


if __name__ == "__main__":
    main()
