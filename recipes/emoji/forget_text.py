"""Make a copy of a model whose decoder takes every caption for the empty one, as a decoder for another text encoder.

python recipes/emoji/forget_text.py runs/emoji/v4 runs/emoji/v4-without-text
"""

import sys
from pathlib import Path

import torch

from unclip import UnCLIPImageVariationPipeline
from unclip.training.conditions import FrozenClip
from unclip.training.diffusion import forget_text


def main(model: Path, out: Path) -> None:
    pipe = UnCLIPImageVariationPipeline.from_pretrained(model)
    with torch.no_grad():
        forget_text(pipe.text_proj, FrozenClip(model).empty)
    pipe.to(torch.float16).save_pretrained(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
