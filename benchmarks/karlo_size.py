"""Load a pipeline of Karlo's full size (random weights, bfloat16) from disk and make one picture with it.

Prints one JSON object: parameters, seconds to load and to draw, and the process's peak memory.

    python benchmarks/karlo_size.py            # about 7 GB of disk in a temporary folder, 9 GB of memory
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def write_folder(folder: Path) -> None:
    """A complete folder of Karlo's configuration with random bfloat16 weights, one component in memory at a time."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    from unclip.checkpoints.files import write_json
    from unclip.checkpoints.layout import TEXT_TO_IMAGE, model_index
    from unclip.training.clip import train_tokenizer

    torch.manual_seed(0)
    for name, network in karlo_networks().items():
        with torch.device("meta"):
            module = network()
        module.to_empty(device="cpu").to(torch.bfloat16)
        for parameter in module.parameters():
            parameter.data.normal_(std=0.02)
        module.save_pretrained(folder / name)
        del module
    for name, scheduler in karlo_schedulers().items():
        scheduler.save_pretrained(folder / name)
    tokenizer = train_tokenizer(["a photo of a cat"], vocabulary_size=520, context_length=77)
    tokenizer.save_pretrained(folder / "tokenizer")
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, projection_dim=768, num_attention_heads=12,
        bos_token_id=len(tokenizer) - 2, eos_token_id=len(tokenizer) - 1, pad_token_id=0,
    )  # fmt: skip
    CLIPTextModelWithProjection(text).to(torch.bfloat16).save_pretrained(folder / "text_encoder")
    write_json(folder / "model_index.json", model_index("UnCLIPPipeline", TEXT_TO_IMAGE))


def karlo_networks():
    """Functions that build each component with Karlo's published configuration, by name."""
    from unclip import PriorTransformer, UnCLIPTextProjModel, UNet2DConditionModel, UNet2DModel

    widths, resnets = (320, 640, 960, 1280), "ResnetDownsampleBlock2D"
    attention = ("SimpleCrossAttnDownBlock2D",) * 3
    upward = ("SimpleCrossAttnUpBlock2D",) * 3

    def super_res():
        return UNet2DModel(
            sample_size=256, in_channels=6, out_channels=3, layers_per_block=3, block_out_channels=widths,
            down_block_types=(resnets,) * 4, up_block_types=("ResnetUpsampleBlock2D",) * 4, add_attention=False,
            resnet_time_scale_shift="scale_shift",
        )  # fmt: skip

    return {
        "prior": lambda: PriorTransformer(),
        "decoder": lambda: UNet2DConditionModel(
            sample_size=64, in_channels=3, out_channels=6, layers_per_block=3, block_out_channels=widths,
            down_block_types=(resnets, *attention), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=(*upward, "ResnetUpsampleBlock2D"), cross_attention_dim=1536, class_embed_type="identity",
            attention_head_dim=64, resnet_time_scale_shift="scale_shift",
        ),
        "text_proj": lambda: UnCLIPTextProjModel(time_embed_dim=1280, cross_attention_dim=1536),
        "super_res_first": super_res,
        "super_res_last": super_res,
    }  # fmt: skip


def karlo_schedulers():
    """Schedulers with Karlo's settings by name."""
    from unclip import UnCLIPScheduler

    return {
        "prior_scheduler": UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0),
        "decoder_scheduler": UnCLIPScheduler(variance_type="learned_range"),
        "super_res_scheduler": UnCLIPScheduler(),
    }


def draw(folder: Path, steps: int) -> dict[str, object]:
    """Load the folder and make one picture in this process."""
    import torch

    from unclip import UnCLIPPipeline

    begun = time.perf_counter()
    pipe = UnCLIPPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    loaded = time.perf_counter()
    image = pipe(
        "a photo of a cat", seed=0, output_type="pt", prior_num_inference_steps=steps,
        decoder_num_inference_steps=steps, super_res_num_inference_steps=steps,
    ).images  # fmt: skip
    drawn = time.perf_counter()
    return {
        "parameters": sum(p.numel() for net in pipe.networks.values() for p in net.parameters()),
        "steps_a_stage": steps,
        "picture": list(image.shape),
        "finite": bool(image.isfinite().all()),
        "load_s": round(loaded - begun, 1),
        "draw_s": round(drawn - loaded, 1),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2, help="steps of each stage (default 2)")
    parser.add_argument("--folder", type=Path, help="an existing folder of Karlo's size to use, instead of writing one")
    arguments = parser.parse_args()
    if arguments.folder:
        print(json.dumps(draw(arguments.folder, arguments.steps)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        write_folder(Path(scratch))
        # In a new process, so that writing does not count towards the peak.
        again = [sys.executable, __file__, "--steps", str(arguments.steps), "--folder", scratch]
        subprocess.run(again, check=True)


if __name__ == "__main__":
    main()
