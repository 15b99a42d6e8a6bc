"""Measure the visible seam of inpainting and of naive pasting, on eight pictures of the built-in model.

python benchmarks/inpainting_seams.py          # about five minutes on one core; prints one line for each method
"""

import argparse
import statistics
import time

import numpy as np
import torch
from PIL import Image, ImageDraw

from unclip import UnCLIPInpaintPipeline, UnCLIPPipeline
from unclip.evaluation.measures import seam
from unclip.images import to_tensor

THERE = ["red apple", "dog face", "cat face", "lion", "pizza", "birthday cake", "rose", "fish"]
ASKED = ["green apple", "cat face", "tiger face", "dog face", "hamburger", "cupcake", "sunflower", "whale"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="unclip-emoji")
    pipe = UnCLIPInpaintPipeline.from_pretrained(parser.parse_args().model)
    pipe.set_progress_bar_config(disable=True)
    text_to_image = UnCLIPPipeline.from_pipe(pipe)
    text_to_image.set_progress_bar_config(disable=True)
    mask = Image.new("L", (128, 128), 0)
    ImageDraw.Draw(mask).ellipse((52, 20, 120, 108), fill=255)
    drawn = torch.from_numpy(np.array(mask) > 0)

    def report(name: str, images: list[Image.Image], cpu_s: float) -> None:
        values = [seam(to_tensor(image), drawn) for image in images]
        mean, median = statistics.mean(values), statistics.median(values)
        print(f"{name:<28} mean {mean:6.2f}  median {median:6.2f}  {cpu_s / len(images):5.1f} s each", flush=True)

    originals = text_to_image(THERE, seed=1, **pipe.recommended).images
    report("original pictures", originals, 0)
    others = text_to_image(ASKED, seed=50, **pipe.recommended).images
    report("another picture, pasted", [Image.composite(*pair, mask) for pair in zip(others, originals, strict=True)], 0)
    for prompts, num_resamples in ((ASKED, 1), (ASKED, 2), (ASKED, 4), (None, 4)):
        started = time.process_time()
        results = pipe(prompts, originals, mask, seed=50, num_resamples=num_resamples, **pipe.recommended).images
        what = "another prompt" if prompts else "no prompt"
        report(f"{what}, {num_resamples} walks", results, time.process_time() - started)


if __name__ == "__main__":
    main()
