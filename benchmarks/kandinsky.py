"""Make one picture with a pipeline of Kandinsky 2.2's size (random weights), with unclip and with diffusers.

Prints one JSON object: for each of the two the seconds to load and to draw and the process's peak memory, the ratio of
the drawing times (ours / theirs), and the largest difference of the pictures.

    python benchmarks/kandinsky.py                     # 10 GB of disk in a temporary folder, 11 GiB of memory
    python benchmarks/kandinsky.py --steps 10 --side 512 --repeats 2
    python benchmarks/kandinsky.py --size tiny         # seconds, to test this script

Both load the same folder, each in a process of its own. The CLIP encoders, which diffusers and unclip share, have two
layers unless --full-clip is given.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

WIDTHS = {"full": 1280, "tiny": 64}


def networks(size: str):
    """Functions that build each network, by name."""
    from unclip import PriorTransformer, UNet2DConditionModel, VQModel

    full, width = size == "full", WIDTHS[size]
    channels = (384, 768, 1152, 1536) if full else (32, 64, 64, 64)
    latent_channels = (128, 256, 256, 512) if full else (32, 32, 32, 64)
    unet = {
        "sample_size": 64, "in_channels": 4, "out_channels": 8, "layers_per_block": 3 if full else 1,
        "block_out_channels": channels, "cross_attention_dim": 768 if full else 32,
        "down_block_types": ("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": (*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
        "attention_head_dim": 64 if full else 8, "resnet_time_scale_shift": "scale_shift",
        "addition_embed_type": "image", "encoder_hid_dim_type": "image_proj", "encoder_hid_dim": width,
    }  # fmt: skip
    movq = {
        "block_out_channels": latent_channels, "layers_per_block": 2 if full else 1, "latent_channels": 4,
        "down_block_types": (*("DownEncoderBlock2D",) * 3, "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", *("UpDecoderBlock2D",) * 3),
        "num_vq_embeddings": 16384 if full else 16, "vq_embed_dim": 4, "norm_type": "spatial",
    }  # fmt: skip
    prior = {"embedding_dim": width} if full else {"embedding_dim": width, "num_layers": 2, "num_attention_heads": 2}
    return {
        "unet": lambda: UNet2DConditionModel.from_config(unet),
        "movq": lambda: VQModel(**movq),
        "prior_prior": lambda: PriorTransformer(**prior),
    }


def write_folder(folder: Path, size: str, full_clip: bool) -> None:
    """A folder of the combined pipeline, with one network in memory at a time."""
    import torch
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    from unclip import DDPMScheduler, UnCLIPScheduler
    from unclip.checkpoints.files import write_json
    from unclip.checkpoints.layout import API_VERSION
    from unclip.training.clip import image_processor, train_tokenizer

    torch.manual_seed(0)
    for name, network in networks(size).items():
        with torch.device("meta"):
            module = network()
        module.to_empty(device="cpu")
        for key, parameter in module.named_parameters():
            is_scale = key.endswith("clip_std") or (parameter.dim() == 1 and key.endswith("weight"))
            parameter.data.normal_(std=0.02).add_(float(is_scale))
        module.save_pretrained(folder / name)
        del module
    tokenizer = train_tokenizer(["a photo of a cat"], vocabulary_size=520, context_length=77)
    tokenizer.save_pretrained(folder / "prior_tokenizer")
    width, end = WIDTHS[size], len(tokenizer) - 1
    layers = (32, 48) if full_clip else (2, 2)
    ends = {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    text = CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, projection_dim=width, num_hidden_layers=layers[0],
        num_attention_heads=width // 64, **ends,
    )  # fmt: skip
    CLIPTextModelWithProjection(text).save_pretrained(folder / "prior_text_encoder")
    wide = 1664 if full_clip else width
    vision = CLIPVisionConfig(
        hidden_size=wide, intermediate_size=8192 if full_clip else 4 * wide, projection_dim=width, patch_size=14,
        num_hidden_layers=layers[1], num_attention_heads=16 if full_clip else width // 64, image_size=224,
    )  # fmt: skip
    CLIPVisionModelWithProjection(vision).save_pretrained(folder / "prior_image_encoder")
    image_processor(224).save_pretrained(folder / "prior_image_processor")
    UnCLIPScheduler(prediction_type="sample", clip_sample_range=10.0).save_pretrained(folder / "prior_scheduler")
    DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, variance_type="learned_range", clip_sample_range=2.0
    ).save_pretrained(folder / "scheduler")
    classes = {
        "unet": "UNet2DConditionModel", "movq": "VQModel", "scheduler": "DDPMScheduler",
        "prior_prior": "PriorTransformer", "prior_scheduler": "UnCLIPScheduler",
        "prior_tokenizer": "CLIPTokenizer", "prior_text_encoder": "CLIPTextModelWithProjection",
        "prior_image_encoder": "CLIPVisionModelWithProjection", "prior_image_processor": "CLIPImageProcessor",
    }  # fmt: skip
    libraries = {name: "transformers" if kind.startswith("CLIP") else "diffusers" for name, kind in classes.items()}
    parts = {name: [libraries[name], kind] for name, kind in classes.items()}
    head = {"_class_name": "KandinskyV22CombinedPipeline", "_diffusers_version": API_VERSION}
    write_json(folder / "model_index.json", {**head, **parts})


def draw(arguments: argparse.Namespace) -> dict[str, object]:
    """Load the folder and make pictures in this process."""
    import numpy as np
    import torch

    warnings.filterwarnings("ignore")
    if arguments.who == "unclip":
        from unclip import KandinskyV22CombinedPipeline
        from unclip.pipelines.session import keep_freed_memory

        keep_freed_memory()
    else:
        from diffusers import KandinskyV22CombinedPipeline
    dtype = getattr(torch, arguments.dtype)
    begun = time.perf_counter()
    pipe = KandinskyV22CombinedPipeline.from_pretrained(arguments.folder, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    loaded = time.perf_counter()
    seconds = []
    for _ in range(arguments.repeats):
        start = time.perf_counter()
        images = pipe(
            "a photo of a cat", num_inference_steps=arguments.steps, prior_num_inference_steps=arguments.prior_steps,
            height=arguments.side, width=arguments.side, output_type="np",
            generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip
        seconds.append(round(time.perf_counter() - start, 2))
    np.save(arguments.folder / f"{arguments.who}.npy", np.asarray(images, np.float32))
    return {
        "load_s": round(loaded - begun, 2),
        "draw_s": seconds,
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "picture": list(images.shape),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["full", "tiny"], default="full", help="of the networks (default full)")
    parser.add_argument("--steps", type=int, default=3, help="steps of the decoder (default 3)")
    parser.add_argument("--prior-steps", type=int, default=3, help="steps of the prior (default 3)")
    parser.add_argument("--side", type=int, default=512, help="side of the picture in pixels (default 512)")
    parser.add_argument("--repeats", type=int, default=1, help="pictures; the fastest one counts (default 1)")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16 (default float32)")
    parser.add_argument("--full-clip", action="store_true", help="CLIP encoders of ViT-bigG/14's size (10 GB more)")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--who", choices=["unclip", "diffusers"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.who:
        print(json.dumps(draw(arguments)))
        return
    import numpy as np

    with tempfile.TemporaryDirectory() as scratch:
        write_folder(Path(scratch), arguments.size, arguments.full_clip)
        found = {}
        for who in ("unclip", "diffusers"):  # each in a new process, whose peak is only its own
            again = [sys.executable, __file__, *sys.argv[1:], "--folder", scratch, "--who", who]
            done = subprocess.run(again, check=True, stdout=subprocess.PIPE)
            found[who] = json.loads(done.stdout.splitlines()[-1])
        pictures = [np.load(Path(scratch) / f"{who}.npy") for who in found]
    ratio = min(found["unclip"]["draw_s"]) / min(found["diffusers"]["draw_s"])
    difference = float(np.abs(pictures[0] - pictures[1]).max())
    settings = {name: getattr(arguments, name) for name in ("size", "steps", "prior_steps", "side", "dtype")}
    print(json.dumps({**settings, **found, "ratio": round(ratio, 3), "largest_difference": difference}))


if __name__ == "__main__":
    main()
