"""Measure how much faster settings change pictures, and what they cost: a Markdown table.

    python benchmarks/faster.py dtype=bfloat16 dtype=float16             # some minutes on one core
    python benchmarks/faster.py preset=balanced preset=fast
    python benchmarks/faster.py sampler=ddim,decoder_num_inference_steps=10,decoder_reuse=2

Each argument is a row: settings of the call by name, the type of the weights, a sampler, or a preset. Its pictures of
known captions are compared with those of the recommended settings in float32 with the same seeds: the mean absolute
difference of pixels in [0, 1], PSNR, and the cosine of the pictures' embeddings in the judge's space. The score is the
judge's cosine of picture and caption. The row "another seed" is what independent pictures of a caption differ by; with
another sampler, or another number of steps of the ancestral one, pictures differ in the same way. A type that the CPU
does not compute is emulated: its results are rounded in the same places, but it is slow. Seconds are CPU time.
"""

import argparse
import math
import time
from typing import Any

import numpy as np
import torch

from unclip import UnCLIPPipeline
from unclip.checkpoints.hub import BUILT_IN_JUDGE, resolve
from unclip.evaluation.retrieval import Judge
from unclip.pipelines.samplers import sampler_switch

CAPTIONS = ("red apple", "dog face", "house", "automobile", "grinning face", "deciduous tree", "fish", "star")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="NAME=VALUE[,NAME=VALUE]")
    parser.add_argument("--model", default="unclip-emoji")
    parser.add_argument("--num-pictures", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    captions = [CAPTIONS[place % len(CAPTIONS)] for place in range(asked.num_pictures)]
    judge = Judge.load(resolve(BUILT_IN_JUDGE))
    read = judge.read(captions)

    def pictures(settings: dict[str, Any], seed: int = 0) -> tuple[list, float]:
        dtype = settings.pop("dtype", "float32")
        pipe = UnCLIPPipeline.from_pretrained(asked.model, torch_dtype=dtype, own_clip=True).to(asked.device)
        pipe.set_progress_bar_config(disable=True)
        if (sampler := settings.pop("sampler", None)) is not None:
            sampler_switch(pipe)(sampler)
        call = {"preset": "exact", **settings}
        start = time.process_time()
        return pipe(captions, seed=seed, **call).images, time.process_time() - start  # type: ignore[union-attr, return-value]

    base, exact_s = pictures({})
    print("| settings | seconds a picture | mean difference | PSNR, dB | cosine | score |\n|---|---|---|---|---|---|")
    print(f"| exact | {exact_s / len(base):.2f} | | | | {(judge.look(base) * read).sum(1).mean():.4f} |", flush=True)
    for row in [*asked.rows, "another seed"]:
        pairs = [] if row == "another seed" else [pair.split("=") for pair in row.split(",")]
        settings = {name: _number(value) for name, value in pairs}
        made, seconds = pictures(settings, 0 if pairs else 10_000)
        difference = np.abs(np.stack(base).astype(float) - np.stack(made).astype(float)) / 255
        psnr = -10 * math.log10(max(float((difference**2).mean()), 1e-12))
        looked = judge.look(made)
        cosine, score = (torch.linalg.vecdot(looked, other).mean().item() for other in (judge.look(base), read))
        figures = f"{seconds / len(made):.2f} | {difference.mean():.4f} | {psnr:.1f} | {cosine:.4f} | {score:.4f}"
        print(f"| {row.replace(',', ', ')} | {figures} |", flush=True)


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


if __name__ == "__main__":
    main()
