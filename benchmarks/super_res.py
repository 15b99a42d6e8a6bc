"""Measure how well super-resolution restores reduced pictures, compared with bicubic resizing: a Markdown table.

    python benchmarks/super_res.py --data data/emoji                     # a minute on two cores
    python benchmarks/super_res.py --data data/emoji --model DIR

The pictures show concepts that were held out of training, in every style. Each is reduced to the decoder's size by
averaging and enlarged with the model's recommended number of steps. PSNR and SSIM are means over pixels in [0, 1] at
the final size. In the rows called noisy, Gaussian noise with a standard deviation of 0.05 (of [-1, 1]) is added to the
small picture, to imitate small errors of the decoder.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from unclip import UnCLIPImageVariationPipeline
from unclip.data.folder import read_records
from unclip.diffusion.loop import NoiseSource, generators_from_seed
from unclip.evaluation.measures import pixel_measures
from unclip.images import open_image, to_pil, to_square
from unclip.pipelines.steps import Call, enlarge

NOISE = 0.05


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="unclip-emoji")
    parser.add_argument("--num-pictures", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    asked = parser.parse_args()

    pipe = UnCLIPImageVariationPipeline.from_pretrained(asked.model)
    pipe.set_progress_bar_config(disable=True)
    sizes = pipe.sizes()
    steps = pipe.recommended.get("super_res_num_inference_steps", 7)
    runs = pipe.super_res_runs(steps)  # type: ignore[arg-type]
    large_px = list(sizes.values())[-1][0]
    records = [record for record in read_records(asked.data) if record.held_out]
    count = min(asked.num_pictures, len(records))
    real = [open_image(asked.data / records[place * len(records) // count].file_name) for place in range(count)]
    clean = F.interpolate(torch.stack([to_square(image, large_px) for image in real]), sizes["decoder"], mode="area")
    noisy = clean + NOISE * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    print(f"`{asked.model}`, {count} pictures held out, {sizes['decoder'][0]} to {large_px} px\n")
    print("| small picture | enlarged by | PSNR, dB | SSIM |\n|---|---|---|---|")
    for name, small in (("clean", clean), ("noisy", noisy)):
        made = []
        for start in range(0, count, asked.batch_size):
            part = small[start : start + asked.batch_size]
            call = Call(pipe, NoiseSource(generators_from_seed(0, len(part)), len(part)))
            made += to_pil(enlarge(runs, part.to(pipe.device), call))
        resized = to_pil(F.interpolate(small, (large_px, large_px), mode="bicubic").clamp(-1, 1))
        for way, pictures in (("bicubic resizing", resized), ("super-resolution", made)):
            found = pixel_measures(real, pictures)
            print(f"| {name} | {way} | {found['psnr_db']:.2f} | {found['ssim']:.3f} |", flush=True)


if __name__ == "__main__":
    main()
