"""Measure how much pictures change with the type of the weights: a Markdown table.

    python benchmarks/precision.py                                       # a few minutes on one core
    python benchmarks/precision.py --model DIR --types bfloat16 --num-pictures 8

The pictures are those of known captions with the recommended settings and the same seeds, compared with float32: the
mean and the 99th percentile of the absolute difference of pixels in [0, 1], PSNR, and the cosine of the pictures'
embeddings in the judge's space. The row "another seed" is what independent pictures of the same captions differ by.
A type that the CPU does not compute is emulated: its results are rounded in the same places, but it is slow.
"""

import argparse
import math

import numpy as np
import torch

from unclip import UnCLIPPipeline
from unclip.checkpoints.hub import BUILT_IN_JUDGE, resolve
from unclip.evaluation.retrieval import Judge

CAPTIONS = ("a red apple", "a dog", "a house", "a blue car", "a smiling face", "a tree", "a fish", "a yellow star")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="unclip-emoji")
    parser.add_argument("--types", nargs="+", default=["bfloat16", "float16"])
    parser.add_argument("--num-pictures", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    captions = [CAPTIONS[place % len(CAPTIONS)] for place in range(asked.num_pictures)]
    judge = Judge.load(resolve(BUILT_IN_JUDGE))

    def pictures(dtype: str, seed: int) -> list:
        pipe = UnCLIPPipeline.from_pretrained(asked.model, torch_dtype=dtype, own_clip=True).to(asked.device)
        pipe.set_progress_bar_config(disable=True)
        return pipe(captions, seed=seed, **pipe.recommended).images  # type: ignore[arg-type, union-attr]

    base = pictures("float32", 0)
    print("| compared with float32 | mean difference | 99th percentile | PSNR, dB | cosine |\n|---|---|---|---|---|")
    for name, dtype, seed in [(each, each, 0) for each in asked.types] + [("another seed", "float32", 10_000)]:
        made = pictures(dtype, seed)
        difference = np.abs(np.stack(base).astype(float) - np.stack(made).astype(float)) / 255
        psnr = -10 * math.log10(max(float((difference**2).mean()), 1e-12))
        cosine = torch.linalg.vecdot(judge.look(base), judge.look(made)).mean().item()
        figures = f"{difference.mean():.4f} | {np.quantile(difference, 0.99):.3f} | {psnr:.1f} | {cosine:.4f}"
        print(f"| {name} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
