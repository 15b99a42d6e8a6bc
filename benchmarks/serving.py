"""Measure `unclip serve`: start, memory, seconds for a picture, overhead, batching, and health under load.

    python benchmarks/serving.py --json serving.json
    python benchmarks/serving.py --serve="--ray local --replicas 2"

The overhead is measured beside a bare uvicorn that makes the same call of the pipeline; the two servers answer in
turn. A markdown table is printed.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import torch

BARE = """
import asyncio, base64, io, json, sys
from concurrent.futures import ThreadPoolExecutor
import uvicorn
from unclip import UnCLIPPipeline

pipe = UnCLIPPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
settings = json.loads(sys.argv[3])
worker = ThreadPoolExecutor(1)  # several threads would each start PyTorch's own ones

def picture(body):
    given = json.loads(body)
    image = pipe([given["prompt"]], seed=[given["seed"]], **{**pipe.recommended, **settings}).images[0]
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return json.dumps({"data": [{"b64_json": base64.b64encode(stream.getvalue()).decode()}]}).encode()

async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    answer = await asyncio.get_running_loop().run_in_executor(worker, picture, body) if body else b"{}"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": answer})

uvicorn.run(app, port=int(sys.argv[2]), log_level="warning", lifespan="off")
"""
STEPS = {"steps": "decoder_num_inference_steps", "prior_steps": "prior_num_inference_steps"}


@contextmanager
def started(command: list[str], url: str, path: str, environment: dict[str, str]) -> Iterator[tuple[int, float]]:
    """A server, from the moment in which its path answers: its process and the seconds until then."""
    begun = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=environment, stderr=log)
        try:
            while True:
                with suppress(URLError, ConnectionError, TimeoutError), urlopen(url + path, timeout=10):
                    break
                if process.poll() is not None:
                    log.seek(0)
                    raise SystemExit(f"the server ended with status {process.returncode}:\n{log.read()}")
                time.sleep(0.05)
            yield process.pid, time.perf_counter() - begun
        finally:
            process.terminate()
            process.wait(60)


def memory_mb(pid: int) -> float:
    """Resident memory of a process and of those that it started, in 10^6 bytes; shared pages count once for each."""
    total, children = 0.0, f"/proc/{pid}/task/{pid}/children"
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            total = int(line.split()[1]) * 1024 / 1e6
    return total + sum(memory_mb(int(child)) for child in Path(children).read_text().split())


def picture(url: str, seed: int, steps: dict[str, int]) -> float:
    """Seconds for one picture."""
    fields = {"prompt": "a red apple", "seed": seed, "response_format": "b64_json", **steps}
    begun = time.perf_counter()
    request = Request(f"{url}/v1/images/generations", json.dumps(fields).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=600) as answer:
        assert json.load(answer)["data"]
    return time.perf_counter() - begun


def in_turn(urls: list[str], count: int, steps: dict[str, int]) -> list[list[float]]:
    """Seconds for each picture of each server, which answer in turn after one picture that does not count."""
    times: list[list[float]] = [[] for _ in urls]
    for seed in range(count + 1):
        for url, found in zip(urls, times, strict=True):
            found.append(picture(url, seed, steps))
    return [each[1:] for each in times]


def health(url: str, stop: threading.Event) -> list[float]:
    """Milliseconds of /healthz until the event."""
    times = []
    while not stop.wait(0.05):
        begun = time.perf_counter()
        with urlopen(f"{url}/healthz", timeout=60) as answer:
            answer.read()
        times.append((time.perf_counter() - begun) * 1000)
    return times


def measured(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """All figures."""
    steps = {name: value for name in STEPS if (value := getattr(args, name)) is not None}
    url, bare_url = (f"http://127.0.0.1:{port}" for port in (args.port, args.port + 1))
    keep = {name: value for name, value in os.environ.items() if not name.startswith("UNCLIP_SERVER_")}
    environment = {**keep, "UNCLIP_SERVER_FOLDER": folder, "UNCLIP_SERVER_MAX_QUEUE": str(args.concurrent)}
    command = [sys.executable, "-m", "unclip", "serve", "--model", args.model, "--port", str(args.port)]
    settings = json.dumps({STEPS[name]: value for name, value in steps.items()})
    with started([*command, *shlex.split(args.serve)], url, "/readyz", environment) as (pid, ready_s):
        idle_mb = memory_mb(pid)
        with started(
            [sys.executable, "-c", BARE, args.model, str(args.port + 1), settings], bare_url, "/", environment
        ):
            server, bare = in_turn([url, bare_url], args.pictures, steps)
        stop = threading.Event()
        with ThreadPoolExecutor(args.concurrent + 1) as pool:
            watch = pool.submit(health, url, stop)
            begun = time.perf_counter()
            list(pool.map(lambda seed: picture(url, seed, steps), range(args.concurrent)))
            together = time.perf_counter() - begun
            stop.set()
            pings = watch.result()
        busy_mb = memory_mb(pid)
    one, bare_one = statistics.median(server), statistics.median(bare)
    return {
        "start to ready, s": round(ready_s, 2),
        "memory idle, MB": round(idle_mb),
        "memory after load, MB": round(busy_mb),
        "one picture, s": round(one, 3),
        "one picture of a bare uvicorn, s": round(bare_one, 3),
        "overhead, %": round((one / bare_one - 1) * 100, 1),
        f"{args.concurrent} pictures at once, s": round(together, 2),
        "pictures a minute": round(60 * args.concurrent / together, 1),
        "throughput against one at a time": round(one * args.concurrent / together, 2),
        "/healthz under load, median ms": round(statistics.median(pings), 1),
        "/healthz under load, maximum ms": round(max(pings), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="unclip-emoji")
    parser.add_argument("--pictures", type=int, default=10, help="pictures of each server, one at a time")
    parser.add_argument("--concurrent", type=int, default=16, help="requests at once")
    parser.add_argument("--steps", type=int, help="denoising steps of the decoder")
    parser.add_argument("--prior-steps", type=int, help="denoising steps of the prior")
    parser.add_argument("--serve", default="", help="more options of unclip serve")
    parser.add_argument("--port", type=int, default=8791, help="this port and the next one are used")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    args = parser.parse_args()
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "torch": str(torch.__version__),
        "model": args.model,
        "options": args.serve,
    }
    with tempfile.TemporaryDirectory() as folder:
        figures = measured(args, folder)
    if args.json:
        args.json.write_text(json.dumps({**about, "figures": figures}, indent=2) + "\n")
    print(", ".join(f"{name}: {value}" for name, value in about.items() if value), end="\n\n")
    print("| | |\n|---|---|")
    for name, value in figures.items():
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    main()
