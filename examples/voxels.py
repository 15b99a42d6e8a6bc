"""Decode a synthetic recording into pictures: noisy mixtures of emoji embeddings stand for the voxels of a brain scan.

    python examples/voxels.py data runs/voxels
    unclip train runs/voxels/recipe.toml --out runs/voxels/prior
    python examples/voxels.py sample runs/voxels
    unclip decode runs/voxels/samples.npy --rows 0:16 --one-noise --grid --out runs/voxels/pictures

`data` also prints the figures of a ridge regression, and `sample` those of the trained prior, on 160 concepts that
neither has seen.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from unclip import UnCLIPPipeline, VectorPrior
from unclip.pipelines.vector_prior import identification

NUM_VOXELS, HELD_OUT, SIGNAL_TO_NOISE = 500, 160, 0.25
RECIPE = """stage = "prior"
data = "embeddings.npy"
steps = 1500
batch_size = 128
precision = "no"
ema_decay = 0.99

[optimizer]
learning_rate = 1e-3
weight_decay = 0.1

[condition]
kind = "vector"
file = "voxels.npy"
held_out = 160

[prior]

[prior.model]
num_attention_heads = 4
attention_head_dim = 32
num_layers = 3
dropout = 0.1
"""


def data(out: Path) -> None:
    pipe = UnCLIPPipeline.from_pretrained("unclip-emoji", own_clip=True)
    concepts, statistics = pipe.concepts, pipe.statistics
    assert concepts is not None
    assert statistics is not None
    draw = np.random.default_rng(0)
    embeddings = concepts.embeddings.numpy()[draw.permutation(len(concepts))]
    white = (embeddings - statistics.mean.numpy()) / statistics.std.numpy()
    signal = white @ draw.normal(size=(white.shape[1], NUM_VOXELS)) / np.sqrt(white.shape[1])
    voxels = signal + draw.normal(size=signal.shape) / np.sqrt(SIGNAL_TO_NOISE)
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "embeddings.npy", embeddings.astype(np.float32))
    np.save(out / "voxels.npy", voxels.astype(np.float32))
    (out / "recipe.toml").write_text(RECIPE)

    x, y = voxels[:-HELD_OUT], embeddings[:-HELD_OUT]
    weights = np.linalg.solve(x.T @ x + 1000 * np.eye(NUM_VOXELS), x.T @ (y - y.mean(0)))
    report("ridge regression", voxels[-HELD_OUT:] @ weights + y.mean(0), embeddings[-HELD_OUT:])


def sample(out: Path) -> None:
    voxels, embeddings = (np.load(out / f"{name}.npy")[-HELD_OUT:] for name in ("voxels", "embeddings"))
    prior = VectorPrior.from_pretrained(out / "prior" / "model")
    samples = prior.sample(torch.from_numpy(voxels), num_inference_steps=25, guidance_scale=2.0, seed=0).numpy()
    np.save(out / "samples.npy", samples)
    np.save(out / "true.npy", embeddings)
    report("prior", samples, embeddings)


def report(name: str, predicted: np.ndarray, true: np.ndarray) -> None:
    found = identification(torch.from_numpy(predicted).float(), torch.from_numpy(true).float())
    print(f"{name}:", json.dumps({key: round(value, 3) for key, value in found.items()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["data", "sample"])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    {"data": data, "sample": sample}[args.step](args.folder)


if __name__ == "__main__":
    main()
