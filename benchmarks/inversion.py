"""Measure the reconstruction after inversion and decoding for several numbers of steps: a Markdown table.

    python benchmarks/inversion.py --data data/emoji --steps 20 50 250 --out benchmarks/results/inversion.md

The pictures are evenly spaced among the data set's plain ones. Each is inverted through the decoder with an empty
caption and its own embedding, without guidance, and decoded by DDIM with eta 0 under the same conditions. PSNR is
computed from pixels in [0, 1] at the decoder's size. Two methods are compared: DDIM steps in the upward direction, and
fixed-point iteration of every step with two evaluations of the network.
"""

import argparse
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from unclip.data.folder import read_records
from unclip.diffusion.loop import NoiseSource, run
from unclip.diffusion.sampler import DDIMSampler, Sampler
from unclip.images import open_image, to_square
from unclip.pipelines.manipulation import Manipulator
from unclip.stages.decoder import DecoderStage
from unclip.stages.stage import DecoderCondition, invert, sample


class UpwardDDIM(Sampler):
    """DDIM's deterministic step towards more noise (Song et al. 2010.02502, section 4.3), exact to first order."""

    def steps(self, timesteps):
        return tuple(pairwise(timesteps))

    def step(self, prediction, x_t, t, t_next, memory=None, noise=None):
        return self.process.add_noise(prediction.x0, prediction.noise, t_next), None


def psnr(one: Tensor, other: Tensor) -> Tensor:
    """The PSNR in dB of each picture [batch, 3, height, width] in [-1, 1]."""
    return -10 * ((one - other) / 2).square().flatten(1).mean(dim=1).log10()


def pictures(data: Path, count: int) -> list:
    """Pictures of the plain style, evenly spaced in the data set."""
    plain = [record for record in read_records(data) if record.style in ("", "flat") and not record.held_out]
    return [open_image(data / plain[place * len(plain) // count].file_name) for place in range(count)]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="unclip-emoji")
    parser.add_argument("--num-pictures", type=int, default=50)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50, 100, 250])
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()

    tool = Manipulator.from_pretrained(asked.model)
    pipe = tool.ddim_pipeline()
    images = pictures(asked.data, asked.num_pictures)
    stage = DecoderStage(pipe.decoder, pipe.text_proj, pipe.decoder_scheduler.process)
    text = pipe.caption_encoder.encode([""] * len(images), pipe.device)
    condition = DecoderCondition.of(text, tool.embed_images(images))
    size = stage.sample_shape(1)[-1]
    wanted = torch.stack([to_square(image, size) for image in images]).to(pipe.device)
    denoiser, nothing = stage.prepare(condition), NoiseSource(None, len(images))
    lines = [
        f"`{asked.model}`, {len(images)} pictures at {size} px, guidance off, PSNR in dB after inversion and decoding:",
        "",
        "| steps | way | mean | least | spread of x_T | seconds a picture |",
        "|---|---|---|---|---|---|",
    ]
    for steps in asked.steps:
        timesteps = pipe.decoder_scheduler.spaced_timesteps(steps)
        ways = {
            "DDIM upwards": lambda t: run(denoiser, UpwardDDIM(stage.process), t[::-1], wanted, noise=nothing),
            "fixed point, 2 rounds": lambda t: invert(stage, condition, wanted, timesteps=t),
        }
        for way, inverted in ways.items():
            begun = time.perf_counter()
            x_T = inverted(timesteps)
            spent = time.perf_counter() - begun
            back = sample(
                stage, condition, sampler=DDIMSampler(stage.process), timesteps=timesteps, noise=nothing, latents=x_T
            )
            found = psnr(back, wanted)
            lines.append(
                f"| {steps} | {way} | {found.mean():.1f} | {found.min():.1f} | {x_T.std():.3f} | "
                f"{spent / len(images):.2f} |"
            )
            print(lines[-1], flush=True)
            if asked.out is not None:
                asked.out.parent.mkdir(parents=True, exist_ok=True)
                asked.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
