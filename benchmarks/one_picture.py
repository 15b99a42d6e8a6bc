"""Time one picture of the built-in model: the call of a loaded pipeline, and the whole command.

    python benchmarks/one_picture.py

Each is repeated `--repeats` times. Minimum, median and maximum are printed in seconds.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import torch


def loaded(repeats: int) -> list[float]:
    """Seconds per call with the model's recommended settings, without the first call."""
    from unclip import UnCLIPPipeline

    pipe = UnCLIPPipeline.from_pretrained("unclip-emoji")
    pipe.set_progress_bar_config(disable=True)
    times = []
    for seed in range(repeats + 1):
        begun = time.perf_counter()
        pipe("a red apple", seed=seed, **pipe.recommended)
        times.append(time.perf_counter() - begun)
    return times[1:]


def commands(repeats: int) -> list[float]:
    """Seconds from the start to the end of `unclip generate`, including writing the file."""
    times = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(repeats):
            command = [sys.executable, "-m", "unclip", "generate", "a red apple", "--seed", str(seed), "--out", folder]
            begun = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            times.append(time.perf_counter() - begun)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    about = f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {about}, {repeats} repeats\n")
    print("| | minimum s | median s | maximum s |\n|---|---|---|---|")
    for name, times in (
        ("a loaded pipeline's call", loaded(repeats)),
        ("`unclip generate`, start to file", commands(repeats)),
    ):
        print(f"| {name} | {min(times):.2f} | {statistics.median(times):.2f} | {max(times):.2f} |")


if __name__ == "__main__":
    main()
