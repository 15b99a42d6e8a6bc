"""How smooth a path between two pictures, or two captions, is: a Markdown table.

    python benchmarks/paths.py --data data/emoji

A jump is the root mean square of what two neighbouring frames differ by, in pixels of [0, 1] at the decoder's size.
Told are the largest jump of a path over its median one, and how far the first and last frames are from what the ends
decode to by themselves. The pictures are the data set's plain ones, far from each other in it; each is inverted first.
"""

import argparse
import statistics
from pathlib import Path

import torch
from torch import Tensor

from unclip.data.folder import read_records
from unclip.images import open_image
from unclip.pipelines.manipulation import Manipulator
from unclip.stages.manipulation import BipartiteLatent, interpolate

CAPTIONS = [
    ("red apple", "banana"), ("cat face", "dog face"), ("red heart", "blue heart"), ("rocket", "automobile"),
    ("rose", "cactus"), ("smiling face", "lion"), ("pizza", "hamburger"), ("fish", "butterfly"),
]  # fmt: skip


def frames(tool: Manipulator, latent: BipartiteLatent) -> Tensor:
    """The decoder's pictures [frames, 3, height, width] in [0, 1]."""
    made = tool.decode(latent, output_type="pt", return_intermediates=True, super_res_num_inference_steps=1)
    assert isinstance(made.small_images, Tensor)
    return made.small_images


def jumps(pictures: Tensor) -> Tensor:
    """Root mean square differences of neighbours [frames - 1]."""
    return pictures.diff(dim=0).square().flatten(1).mean(dim=1).sqrt()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the emoji data set")
    parser.add_argument("--model", default="unclip-emoji")
    parser.add_argument("--num-pairs", type=int, default=20, help="of pictures")
    parser.add_argument("--num-between", type=int, default=7, help="frames between the ends")
    asked = parser.parse_args()

    tool = Manipulator.from_pretrained(asked.model)
    tool.variation.set_progress_bar_config(disable=True)
    records = [record for record in read_records(asked.data) if record.style in ("", "flat") and not record.held_out]
    half, count = len(records) // 2, asked.num_pairs
    pairs = [(records[place * half // count], records[half + place * half // count]) for place in range(count)]
    images = [open_image(asked.data / record.file_name) for pair in pairs for record in pair]
    pictures = tool.invert(images)
    captions = tool.fresh(tool.embed_captions([caption for pair in CAPTIONS for caption in pair]))
    print("| ends | pairs | largest jump over the median, worst pair | mean | ends, from themselves alone at most |")
    print("|---|---|---|---|---|")
    for name, latents in (("pictures, inverted", pictures), ("captions, one noise", captions)):
        ratios, off = [], []
        for start in range(0, len(latents.image_embedding), 2):
            ends = latents.select([start, start + 1])
            path = frames(tool, interpolate(ends, asked.num_between))
            steps = jumps(path)
            ratios.append(float(steps.max() / steps.median()))
            off.append(float((path[[0, -1]] - frames(tool, ends)).abs().max()))
        print(
            f"| {name} | {len(ratios)} | {max(ratios):.2f} | {statistics.mean(ratios):.2f} | {max(off):.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
