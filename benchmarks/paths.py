"""Measure the smoothness of paths between two pictures or two captions: a Markdown table.

    python benchmarks/paths.py --data data/emoji                     # about ten minutes on two cores
    python benchmarks/paths.py --data data/emoji --one-noise --drawings 2

A jump is the root mean square difference of two neighbouring frames, in pixels of [0, 1] at the decoder's size. The
table has the largest jump of a path divided by its median jump, and the distance of the first and the last frame from
the decoded ends. The frames are in equal turns (0 drawings), or placed after the path was decoded that many times. The
pictures are plain ones that are far from each other in the data set. Each is inverted first. As in `unclip
interpolate`, the decoder uses guidance only between captions.
"""

import argparse
import functools
import statistics
from pathlib import Path

import torch

from unclip.data.folder import read_records
from unclip.images import open_image
from unclip.pipelines.manipulation import Manipulator
from unclip.stages.manipulation import NUM_DRAWINGS, even_places, jumps, path_at

CAPTIONS = [
    ("red apple", "banana"), ("cat face", "dog face"), ("red heart", "blue heart"), ("rocket", "automobile"),
    ("rose", "cactus"), ("smiling face", "lion"), ("pizza", "hamburger"), ("fish", "butterfly"),
]  # fmt: skip


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the emoji data set")
    parser.add_argument("--model", default="unclip-emoji")
    parser.add_argument("--num-pairs", type=int, default=20, help="pairs of pictures")
    parser.add_argument("--num-between", type=int, default=7, help="frames between the ends")
    parser.add_argument("--drawings", type=int, nargs="+", default=list(range(NUM_DRAWINGS + 1)))
    parser.add_argument("--one-noise", action="store_true", help="keep the first end's noise in all frames")
    asked = parser.parse_args()

    tool = Manipulator.from_pretrained(asked.model)
    for pipe in (tool.variation, tool.text):
        pipe.set_progress_bar_config(disable=True)
    records = [record for record in read_records(asked.data) if record.style in ("", "flat") and not record.held_out]
    half, count = len(records) // 2, asked.num_pairs
    pairs = [(records[place * half // count], records[half + place * half // count]) for place in range(count)]
    images = [open_image(asked.data / record.file_name) for pair in pairs for record in pair]
    pictures = tool.invert(images)
    captions = tool.fresh(tool.embed_captions([caption for pair in CAPTIONS for caption in pair]))
    scale = tool.variation.recommended.get("decoder_guidance_scale", 1.0)
    print("| ends | guidance | pairs | drawings | largest jump over the median, worst pair | mean | ends, at most |")
    print("|---|---|---|---|---|---|---|")
    for name, latents, guidance in (("pictures", pictures, 1.0), ("captions", captions, scale)):
        draw = functools.partial(tool.decode_small, decoder_guidance_scale=guidance)
        ends = [latents.select([start, start + 1]) for start in range(0, len(latents), 2)]
        alone = [draw(path_at(each, [0, 1], one_noise=asked.one_noise)) for each in ends]
        for drawings in asked.drawings:
            ratios, off = [], []
            for each, own in zip(ends, alone, strict=True):
                places = even_places(each, asked.num_between, draw, one_noise=asked.one_noise, num_drawings=drawings)
                path = draw(path_at(each, places, one_noise=asked.one_noise))
                steps = jumps(path)
                ratios.append(float(steps.max() / steps.median()))
                off.append(float((path[[0, -1]] - own).abs().max()))
            told = f"{max(ratios):.2f} | {statistics.mean(ratios):.2f} | {max(off):.1e}"
            print(f"| {name} | {guidance} | {len(ends)} | {drawings} | {told} |", flush=True)


if __name__ == "__main__":
    main()
