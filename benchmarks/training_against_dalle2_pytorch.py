"""Time training steps against DALLE2-pytorch's own trainer, alternating, on the same random data.

    python -m venv /tmp/dalle2
    /tmp/dalle2/bin/pip install torch accelerate einops ema-pytorch rotary-embedding-torch pytorch-warmup \\
        resize-right ftfy regex tqdm packaging
    /tmp/dalle2/bin/pip install --no-deps dalle2-pytorch
    python benchmarks/training_against_dalle2_pytorch.py --python /tmp/dalle2/bin/python --repeats 7

A step consists of sampling noise, forward, backward, gradient clipping, AdamW and the moving average. Priors and
decoders have the same number of parameters within 3 %, and the same batch, picture size and precision. The embeddings
of texts and pictures are precomputed. Captions have 6 to 24 tokens, uniformly, in CLIP's context of 77. DALLE2-pytorch
computes the padding with learned tokens; unclip omits tokens that no caption of the batch needs. The decoders have
three levels with one block each. Ours has the built-in model's widths and computes 2.6 GFLOP per picture; theirs has
its usual widths (1, 2 and 4 times the first) and computes 2.8 GFLOP. Ours updates the average at every step, theirs at
every tenth, which is its default. On a CPU that only emulates bfloat16, ours trains in float32 for "bf16", and theirs
takes minutes per step (use `--batch 8`).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

warnings.filterwarnings("ignore")

STAGES = {
    "prior": {"width": 384, "tokens": 77, "batch": 128, "depth": 6},
    "decoder": {"width": 256, "tokens": 77, "batch": 64, "size": 32},
}
SAME_PARAMETERS = 0.03
REST_S = 0.2
"""Between turns, so that no thread of one still waits for work when the other begins."""


class Theirs:
    """DALLE2-pytorch's trainer in a separate process."""

    def __init__(self, process: subprocess.Popen, settings: dict):
        self.process = process
        about = self._ask(settings)
        self.parameters, self.torch = about["parameters"], about["torch"]

    def _ask(self, question: dict) -> dict:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(question), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            sys.exit("DALLE2-pytorch's process ended; see its message above")
        return json.loads(line)

    def seconds(self, steps: int) -> float:
        return self._ask({"steps": steps})["seconds"] / steps


class Ours:
    """Our trainer on a task with random tensors as data."""

    def __init__(self, settings: dict, folder: Path):
        from unclip.training.recipe import read_recipe
        from unclip.training.trainer import Trainer

        stage = settings["stage"]
        recipe = folder / "recipe.toml"
        recipe.write_text(
            f'stage = "{stage}"\ndata = "none"\nprecision = "{settings["precision"]}"\n'
            f"batch_size = {settings['batch']}\n"
            f"[optimizer]\nlearning_rate = 3e-4\nweight_decay = 0.01\nmax_grad_norm = 1.0\n[{stage}]\n"
        )
        task = random_task(settings)
        self.parameters = sum(p.numel() for p in task.module.parameters())
        self.trainer = Trainer(task, read_recipe(recipe), folder / "run")

    def seconds(self, steps: int) -> float:
        begun = time.perf_counter()
        for _ in range(steps):
            self.trainer.take_step()
        return (time.perf_counter() - begun) / steps


def lengths(batch: int) -> list[int]:
    """The number of tokens of each caption."""
    return [6 + row * 19 // batch for row in range(batch)]


def random_task(settings: dict):
    """A training task with random pictures, texts and embeddings."""
    import torch

    from unclip.clip.encoders import TextEmbedding
    from unclip.training.conditions import text_batch
    from unclip.training.diffusion import noised

    batch, tokens, width = settings["batch"], settings["tokens"], settings["width"]
    mask = torch.arange(tokens) < torch.tensor(lengths(batch))[:, None]
    text = TextEmbedding(torch.randn(batch, width), torch.randn(batch, tokens, width), mask)
    image = torch.randn(batch, width)

    class RandomTask:
        is_local, fingerprint, skipped, counts = False, "", {}, {}

        def __init__(self) -> None:
            torch.manual_seed(0)
            self.source = self
            self.module = prior_module(settings) if settings["stage"] == "prior" else decoder_module(settings)

        def batch(self, step, batch_size, generator, own=None):
            if settings["stage"] == "prior":
                return text_batch(text) | noised(image, 1000, generator)
            given = torch.rand(batch_size, generator=generator) >= 0.1
            return text_batch(text) | noised(pictures, 1000, generator) | {"image_embedding": image, "given": given}

    pictures = torch.rand(batch, 3, settings.get("size", 1), settings.get("size", 1)) * 2 - 1
    return RandomTask()


def prior_module(settings: dict):
    """A prior of about as many parameters as theirs, whose blocks have a gate more."""
    from unclip import PriorTransformer
    from unclip.stages.prior import PriorStage
    from unclip.stages.stage import PriorCondition
    from unclip.training.conditions import batch_text
    from unclip.training.diffusion import StageModule
    from unclip.training.recipe import TASKS

    prior = PriorTransformer(
        num_attention_heads=settings["width"] // 64,
        attention_head_dim=64,
        num_layers=settings["depth"] + 1,
        embedding_dim=settings["width"],
        num_embeddings=settings["tokens"],
    )
    prior.initialize_for_training()
    stage = PriorStage(prior, TASKS["prior"].process)
    return StageModule(stage, lambda b: PriorCondition(batch_text(b)), "simple", prior=prior)


def decoder_module(settings: dict):
    """A decoder in the built-in model's shape: three levels of one block, as theirs; with a learned variance too."""

    from unclip import UnCLIPTextProjModel, UNet2DConditionModel
    from unclip.stages.decoder import DecoderStage
    from unclip.stages.stage import DecoderCondition
    from unclip.training.conditions import batch_text
    from unclip.training.diffusion import StageModule
    from unclip.training.recipe import TASKS

    decoder = UNet2DConditionModel(
        sample_size=settings["size"],
        in_channels=3,
        out_channels=6,
        block_out_channels=(32, 96, 256),
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
        cross_attention_dim=192,
        attention_head_dim=64,
        class_embed_type="identity",
        resnet_time_scale_shift="scale_shift",
        norm_num_groups=16,
    )
    decoder.initialize_for_training()
    text_proj = UnCLIPTextProjModel(
        clip_embeddings_dim=settings["width"], time_embed_dim=4 * 32, cross_attention_dim=192
    )
    text_proj.initialize_for_training()
    stage = DecoderStage(decoder, text_proj, TASKS["decoder"].process)
    return StageModule(
        stage,
        lambda b: DecoderCondition(batch_text(b), b["image_embedding"], b["given"]),
        "simple",
        decoder=decoder,
        text_proj=text_proj,
    )


@contextmanager
def peer(python: str) -> Iterator[subprocess.Popen]:
    """Start the worker process, and end it on exit."""
    worker = Path(__file__).parent / "dalle2_pytorch_worker.py"
    process = subprocess.Popen([python, str(worker)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


def compare(
    stage: str, precision: str, python: str, *, threads: int, steps: int, repeats: int, batch: int | None = None
) -> dict:
    """Seconds a step of both, medians over `repeats` turns of `steps` steps, and the ratio of the medians."""
    from accelerate.state import AcceleratorState

    settings = STAGES[stage] | {"stage": stage, "precision": precision, "threads": threads}
    settings["batch"] = batch or settings["batch"]
    settings["lengths"] = lengths(settings["batch"])
    with tempfile.TemporaryDirectory() as folder, peer(python) as process:
        theirs, ours = Theirs(process, settings), Ours(settings, Path(folder))
        if abs(ours.parameters / theirs.parameters - 1) > SAME_PARAMETERS:
            sys.exit(f"{ours.parameters} and {theirs.parameters} parameters are not the same to {SAME_PARAMETERS:.0%}")
        turns = []
        for _ in range(repeats + 1):  # the first is a warm-up
            turn = []
            for side in (ours, theirs):
                time.sleep(REST_S)
                turn.append(side.seconds(steps))
            turns.append(turn)
        AcceleratorState._reset_state(reset_partial_state=True)
    own, other = (statistics.median(turn[k] for turn in turns[1:]) for k in (0, 1))
    return {
        "stage": stage, "precision": "float32" if precision == "no" else f"{precision} autocast",
        "batch": settings["batch"], "parameters": ours.parameters, "their_parameters": theirs.parameters,
        "ours_s": own, "theirs_s": other, "ratio": other / own, "their_torch": theirs.torch,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="the Python of an environment with dalle2-pytorch")
    parser.add_argument("--stage", choices=list(STAGES), action="append", help="default: both")
    parser.add_argument("--precision", choices=["no", "bf16"], action="append", help="default: both")
    parser.add_argument("--steps", type=int, default=1, help="steps in a row")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, help="batch size (default: 128 for the prior, 64 for the decoder)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    arguments = parser.parse_args()
    import torch

    import unclip

    torch.set_num_threads(arguments.threads)
    rows = [
        compare(stage, precision, arguments.python, threads=arguments.threads, steps=arguments.steps,
                repeats=arguments.repeats, batch=arguments.batch)
        for stage in arguments.stage or STAGES
        for precision in arguments.precision or ("bf16", "no")
    ]  # fmt: skip
    about = {
        "unclip": unclip.__version__, "torch": torch.__version__, "their torch": rows[0]["their_torch"],
        "threads": arguments.threads, "steps a turn": arguments.steps, "repeats": arguments.repeats,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }  # fmt: skip
    if arguments.json:
        print(json.dumps({"about": about, "rows": rows}))
        return
    print(", ".join(f"{key} {value}" for key, value in about.items()), end="\n\n")
    print("| | precision | batch | parameters | theirs | unclip s a step | DALLE2-pytorch s a step | times faster |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['stage']} | {row['precision']} | {row['batch']} | {row['parameters'] / 1e6:.2f} M "
            f"| {row['their_parameters'] / 1e6:.2f} M | {row['ours_s']:.3f} | {row['theirs_s']:.3f} "
            f"| {row['ratio']:.2f} |"
        )


if __name__ == "__main__":
    main()
