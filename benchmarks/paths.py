"""How smooth a path between two pictures, or two captions, is: a Markdown table.

    python benchmarks/paths.py --data data/emoji

A jump is the root mean square of what two neighbouring frames differ by, in pixels of [0, 1] at the decoder's size.
Told are the largest jump of a path over its median one, and how far the first and last frames are from what the ends
decode to by themselves, for frames in equal turns and after each round of placing them in equal jumps. The pictures are
the data set's plain ones, far from each other in it; each is inverted first.
"""

import argparse
import statistics
from pathlib import Path

import torch

from unclip.data.folder import read_records
from unclip.images import open_image
from unclip.pipelines.manipulation import Manipulator
from unclip.stages.manipulation import path_at
from unclip.stages.pacing import NUM_ROUNDS, even_places, jumps

CAPTIONS = [
    ("red apple", "banana"), ("cat face", "dog face"), ("red heart", "blue heart"), ("rocket", "automobile"),
    ("rose", "cactus"), ("smiling face", "lion"), ("pizza", "hamburger"), ("fish", "butterfly"),
]  # fmt: skip


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the emoji data set")
    parser.add_argument("--model", default="unclip-emoji")
    parser.add_argument("--num-pairs", type=int, default=20, help="of pictures")
    parser.add_argument("--num-between", type=int, default=7, help="frames between the ends")
    parser.add_argument("--rounds", type=int, nargs="+", default=list(range(NUM_ROUNDS + 1)), help="of placing frames")
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
    print("| ends | pairs | rounds | largest jump over the median, worst pair | mean | ends, from themselves at most |")
    print("|---|---|---|---|---|---|")
    for name, latents in (("pictures, inverted", pictures), ("captions, one noise", captions)):
        ends = [latents.select([start, start + 1]) for start in range(0, len(latents), 2)]
        alone = [tool.decode_small(each) for each in ends]
        for rounds in asked.rounds:
            ratios, off = [], []
            for each, own in zip(ends, alone, strict=True):
                places = even_places(each, asked.num_between, tool.decode_small, num_rounds=rounds)
                path = tool.decode_small(path_at(each, places))
                steps = jumps(path)
                ratios.append(float(steps.max() / steps.median()))
                off.append(float((path[[0, -1]] - own).abs().max()))
            worst, mean = max(ratios), statistics.mean(ratios)
            print(f"| {name} | {len(ends)} | {rounds} | {worst:.2f} | {mean:.2f} | {max(off):.1e} |", flush=True)


if __name__ == "__main__":
    main()
