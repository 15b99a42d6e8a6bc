"""A process that trains DALLE2-pytorch's prior or decoder with its own trainer, one step for each request.

Started by `training_against_dalle2_pytorch.py` with the Python of an environment that has `dalle2-pytorch`. It reads a
JSON object a line from stdin: first the settings, then {"steps": n}; and answers on stdout with {"parameters": n} and
{"seconds": s, "loss": l}.
"""

import importlib.machinery
import json
import sys
import time
import types
import warnings

warnings.filterwarnings("ignore")

NOT_NEEDED = (
    "torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.utils",
    "torchvision.models", "x_clip", "coca_pytorch", "kornia", "kornia.filters", "kornia.augmentation",
    "vector_quantize_pytorch", "clip", "open_clip",
)  # fmt: skip
"""Imports of the package that a prior or a first decoder never uses."""


class Absent(types.ModuleType):
    """A stand-in for a missing module. Every name in it is an empty class, so that `isinstance` is false."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def stand_in() -> None:
    """Replace unneeded modules by `Absent`, so that they need not be installed."""
    for name in NOT_NEEDED:
        module = sys.modules[name] = Absent(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []


def encodings(settings: dict):
    """Tokens of captions with the given lengths. Zeros are padding in this package."""
    import torch

    batch, tokens, width = (settings[name] for name in ("batch", "tokens", "width"))
    seen = torch.arange(tokens) < torch.tensor(settings["lengths"])[:, None]
    return torch.randn(batch, tokens, width) * seen[:, :, None]


def prior_step(settings: dict, accelerator):
    """The trainer, and a function that takes a step."""
    import torch
    from dalle2_pytorch import DiffusionPrior, DiffusionPriorNetwork, DiffusionPriorTrainer

    width, tokens, batch = settings["width"], settings["tokens"], settings["batch"]
    network = DiffusionPriorNetwork(
        dim=width, depth=settings["depth"], heads=width // 64, dim_head=64, num_timesteps=1000, max_text_len=tokens
    )
    prior = DiffusionPrior(network, image_embed_dim=width, cond_drop_prob=0.1)
    trainer = DiffusionPriorTrainer(prior, accelerator=accelerator, lr=3e-4, wd=0.01, max_grad_norm=1.0)
    text, image, hidden = torch.randn(batch, width), torch.randn(batch, width), encodings(settings)

    def step() -> float:
        # The trainer scales its embeddings in place, so it gets a copy.
        loss = trainer(text_embed=text, text_encodings=hidden, image_embed=image.clone())
        trainer.update()
        return loss

    return trainer.diffusion_prior, step


def decoder_step(settings: dict, accelerator):
    """The trainer, and a function that takes a step."""
    import torch
    from dalle2_pytorch import Decoder, DecoderTrainer, Unet

    width, tokens, batch, size = (settings[name] for name in ("width", "tokens", "batch", "size"))
    unet = Unet(
        dim=64, dim_mults=(1, 2, 4), num_resnet_blocks=1, channels=3, image_embed_dim=width, text_embed_dim=width,
        cond_dim=72, attn_heads=8, attn_dim_head=32, cond_on_text_encodings=True, cond_on_image_embeds=True,
        max_text_len=tokens,
    )  # fmt: skip
    decoder = Decoder(unet, image_size=size, timesteps=1000, learned_variance=True)
    trainer = DecoderTrainer(decoder, accelerator=accelerator, lr=3e-4, wd=0.01, max_grad_norm=1.0)
    pictures, image = torch.rand(batch, 3, size, size), torch.randn(batch, width)
    hidden = encodings(settings)

    def step() -> float:
        loss = trainer(pictures, image_embed=image, text_encodings=hidden, unet_number=1)
        trainer.update(1)
        return loss

    return trainer.decoder.unets, step


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # so that output of the package is not read as an answer
    settings = json.loads(sys.stdin.readline())
    stand_in()
    import torch
    from accelerate import Accelerator

    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision=settings["precision"], cpu=True)
    network, step = {"prior": prior_step, "decoder": decoder_step}[settings["stage"]](settings, accelerator)
    about = {"parameters": sum(p.numel() for p in network.parameters()), "torch": torch.__version__}
    print(json.dumps(about), file=answers, flush=True)
    for line in sys.stdin:
        begun = time.perf_counter()
        for _ in range(json.loads(line)["steps"]):
            loss = step()
        print(json.dumps({"seconds": time.perf_counter() - begun, "loss": loss}), file=answers, flush=True)


if __name__ == "__main__":
    main()
