"""Time unclip against diffusers' deprecated unCLIP classes: the same weights, in one process, in alternation.

    python benchmarks/against_diffusers.py                                    # the built-in model
    python benchmarks/against_diffusers.py --size karlo --dtype bfloat16
    python benchmarks/against_diffusers.py --size karlo --stages prior --json prior.json
    python benchmarks/against_diffusers.py --growth batch                     # batches of 1 to 16

Both sides take a step in turn, and every other turn begins with the other side. Turns are repeated until the median
of the turns' ratios is known within `--within`, or until `--seconds` are over. The first step, which also prepares
and packs weights, is reported apart. The time of a stage is that of its first step and of the other default steps.

The machine's peak is measured in the same run, with float matrix products and convolutions. The share of a stage is
the arithmetic of its step (counted by PyTorch) over its time and the peak of convolutions.
"""

import argparse
import contextlib
import datetime
import itertools
import json
import os
import platform
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))
warnings.filterwarnings("ignore")

GUIDANCE = 4.0
TOKENS = {768: 77, 256: 32}
"""The text encoders' contexts, by width."""
STEPS = {"prior": 25, "decoder": 25, "super-resolution": 7}
"""The reference's default numbers of steps."""
LEAST_TURNS = 3
GROWTH = {"batch": (1, 2, 4, 8, 16), "resolution": (1, 2)}

Step = Callable[[int], object]
Side = Callable[[], contextlib.AbstractContextManager[Step]]
"""Prepares one side; the result takes one denoising step at a timestep."""


@dataclass(frozen=True)
class Limits:
    """When the turns of a measurement end: the wanted relative error of the ratio, and the most seconds."""

    within: float
    seconds: float


@dataclass(frozen=True)
class Case:
    """What is computed: type, pictures at once, and the side of the pictures relative to the model's own."""

    dtype: torch.dtype
    batch: int = 1
    scale: int = 1


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the clock and of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def uncertainty(ratios: list[float]) -> float:
    """Half the width of the 95 % interval of the median, relative to it, by resampling (Efron 1979)."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(400))
    return (medians[389] - medians[10]) / 2 / statistics.median(ratios)


def alternate(ours: Callable[[], object], theirs: Callable[[], object], limits: Limits) -> dict[str, float]:
    """Medians, minima and spread of both sides in seconds, and the median ratio ours/theirs of the turns."""
    turns: list[tuple[tuple[float, float], tuple[float, float]]] = []
    begun = time.perf_counter()
    for number in itertools.count():
        first, second = (ours, theirs) if number % 2 == 0 else (theirs, ours)
        one, two = timed(first), timed(second)
        turns.append((one, two) if number % 2 == 0 else (two, one))
        ratios = [a[0] / b[0] for a, b in turns]
        if len(turns) >= LEAST_TURNS and (
            time.perf_counter() - begun > limits.seconds
            or (len(turns) >= 2 * LEAST_TURNS and uncertainty(ratios) < limits.within)
        ):
            break
    found: dict[str, float] = {
        "ratio": statistics.median(ratios),
        "ratio_cpu": statistics.median(a[1] / max(b[1], 1e-9) for a, b in turns),
        "within": uncertainty(ratios),
        "turns": len(turns),
    }
    for name, side in (("ours", [a for a, _ in turns]), ("theirs", [b for _, b in turns])):
        walls = [wall for wall, _ in side]
        found |= {
            f"{name}_s": statistics.median(walls),
            f"{name}_min_s": min(walls),
            f"{name}_max_s": max(walls),
            f"{name}_cpu_s": statistics.median(cpu for _, cpu in side),
        }
    return found


def compare(ours: Side, theirs: Side, steps: int, limits: Limits) -> dict[str, float]:
    """A stage: its steps in alternation, its first steps apart, and the ratio of all default steps."""
    path = itertools.cycle(range(990, 0, -40))
    with ours() as our_step, theirs() as their_step:
        their_step(999)  # pages of the weights are in memory
        firsts = [timed(lambda: our_step(999))[0], timed(lambda: their_step(999))[0]]
        found = alternate(lambda: our_step(next(path)), lambda: their_step(next(path)), limits)
        with FlopCounterMode(display=False) as counter:
            their_step(999)
    whole = [first + (steps - 1) * found[name] for first, name in zip(firsts, ("ours_s", "theirs_s"), strict=True)]
    return found | {
        "ours_first_s": firsts[0],
        "theirs_first_s": firsts[1],
        "steps": steps,
        "ours_all_s": whole[0],
        "theirs_all_s": whole[1],
        "ratio_all": whole[0] / whole[1],
        "gflop": counter.get_total_flops() / 1e9,
    }


def twins(name: str, network: torch.nn.Module) -> torch.nn.Module:
    """The reference's class with the same weights, in the memory layout in which it loads them."""
    import diffusers

    if name == "text_proj":
        from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel as Theirs
    else:
        Theirs = getattr(diffusers, type(network).__name__)
    settings = {key: value for key, value in network.config.items() if not key.startswith("_")}
    with torch.device("meta"):
        twin = Theirs(**settings)
    twin.load_state_dict({key: value.contiguous() for key, value in network.state_dict().items()}, assign=True)
    if name == "prior":  # a buffer that is not in the state dict
        size = twin.positional_embedding.shape[1]
        mask = torch.full((size, size), -10000.0).triu_(1)[None]
        twin.register_buffer("causal_attention_mask", mask.to(network.dtype), persistent=False)
    return twin.eval()


def networks(size: str, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Functions that load each network by name, one at a time."""
    if size == "emoji":
        from unclip import UnCLIPPipeline

        parts = UnCLIPPipeline.from_pretrained("unclip-emoji", torch_dtype=dtype).networks
        return {name: (lambda net=net: net) for name, net in parts.items() if name != "text_encoder"}
    from karlo_size import karlo_networks

    def random_weights(build: Callable[[], Any]) -> Any:
        with torch.device("meta"):
            module = build()
        module.to_empty(device="cpu").to(dtype)
        for parameter in module.parameters():
            parameter.data.normal_(std=0.02)
        return module.eval()

    return {name: (lambda build=build: random_weights(build)) for name, build in karlo_networks().items()}


def our_side(prepare: Callable[[], Callable], x: torch.Tensor, steps: int) -> Side:
    """A stage of ours as sampling runs it: its weights are packed for all steps."""

    @contextlib.contextmanager
    def start() -> Iterator[Step]:
        from unclip.models.kernels import packed_weights

        with packed_weights(steps):
            denoiser = prepare()
            yield lambda t: denoiser(x, t)

    return start


def their_side(prepare: Callable[[], Step]) -> Side:
    """The reference's stage."""

    @contextlib.contextmanager
    def start() -> Iterator[Step]:
        yield prepare()

    return start


def caption(width: int, rows: int, tokens: int) -> Any:
    """Random embeddings of empty and given captions."""
    from unclip.clip.encoders import TextEmbedding

    mask = torch.ones(2 * rows, tokens, dtype=torch.bool)
    return TextEmbedding(torch.randn(2 * rows, width), torch.randn(2 * rows, tokens, width), mask)


def prior_stage(build: Any, process: Any, case: Case, limits: Limits) -> dict[str, float]:
    """The prior with guidance: two rows per picture."""
    from unclip.diffusion.guidance import guided
    from unclip.stages.prior import PriorStage
    from unclip.stages.stage import PriorCondition

    prior = build["prior"]()
    twin, width = twins("prior", prior), prior.config.embedding_dim
    text, x = caption(width, case.batch, prior.config.num_embeddings), torch.randn(case.batch, width)
    embeds, hidden_states = text.embeds.to(case.dtype), text.hidden_states.to(case.dtype)

    def theirs() -> Step:
        return lambda t: twin(torch.cat([x, x]).to(case.dtype), torch.tensor(t), embeds, hidden_states, text.mask)

    stage, steps = PriorStage(prior, process), STEPS["prior"]
    ours = our_side(lambda: guided(stage.prepare(PriorCondition(text)), GUIDANCE), x, steps)
    return compare(ours, their_side(theirs), steps, limits)


def decoder_stage(build: Any, process: Any, case: Case, limits: Limits) -> dict[str, float]:
    """The decoder and its text projection with guidance: two rows per picture."""
    from unclip.diffusion.guidance import guided
    from unclip.stages.decoder import DecoderStage
    from unclip.stages.stage import DecoderCondition

    decoder, text_proj = build["decoder"](), build["text_proj"]()
    twin, twin_proj = twins("decoder", decoder), twins("text_proj", text_proj)
    side, width = decoder.config.sample_size * case.scale, text_proj.config.clip_embeddings_dim
    extra = text_proj.config.clip_extra_context_tokens
    text, embedding = caption(width, case.batch, TOKENS[width]), torch.randn(2 * case.batch, width)
    x = torch.randn(case.batch, decoder.config.in_channels, side, side)

    def theirs() -> Step:
        tokens, added = twin_proj(
            image_embeddings=embedding[case.batch :].to(case.dtype),
            prompt_embeds=text.embeds.to(case.dtype),
            text_encoder_hidden_states=text.hidden_states.to(case.dtype),
            do_classifier_free_guidance=True,
        )
        mask = torch.nn.functional.pad(text.mask, (extra, 0), value=True)
        return lambda t: twin(
            torch.cat([x, x]).to(case.dtype), torch.tensor(t), tokens, class_labels=added, attention_mask=mask
        )

    given = torch.arange(2 * case.batch) >= case.batch
    stage, steps = DecoderStage(decoder, text_proj, process), STEPS["decoder"]
    ours = our_side(lambda: guided(stage.prepare(DecoderCondition(text, embedding, given)), GUIDANCE), x, steps)
    return compare(ours, their_side(theirs), steps, limits)


def super_res_stage(build: Any, process: Any, case: Case, limits: Limits) -> dict[str, float]:
    """Super-resolution, which has no guidance."""
    from unclip.stages.stage import SuperResCondition
    from unclip.stages.super_res import SuperResStage

    network = build["super_res_first"]()
    twin, side = twins("super_res_first", network), network.config.sample_size * case.scale
    x, small = torch.randn(case.batch, 3, side, side), torch.randn(case.batch, 3, side // 4, side // 4)

    def theirs() -> Step:  # in float32, since the resizing has no kernel of other types
        large = torch.nn.functional.interpolate(small, size=(side, side), mode="bicubic", antialias=True)
        return lambda t: twin(torch.cat([x, large], dim=1).to(case.dtype), torch.tensor(t))

    stage, steps = SuperResStage(network, network, process), STEPS["super-resolution"]
    ours = our_side(lambda: stage.prepare(SuperResCondition(small)), x, steps)
    return compare(ours, their_side(theirs), steps, limits)


STAGES = {"prior": prior_stage, "decoder": decoder_stage, "super-resolution": super_res_stage}


@torch.no_grad()
def peak(dtype: torch.dtype, seconds: float = 3.0) -> dict[str, float]:
    """GFLOP/s of a matrix product of 2048, and of a 3×3 convolution with 320 channels on two rows of 64×64 pixels."""
    square = torch.randn(2048, 2048, dtype=dtype)
    pixels = torch.randn(2, 320, 64, 64, dtype=dtype).to(memory_format=torch.channels_last)
    layer = torch.nn.Conv2d(320, 320, 3, padding=1, dtype=dtype).to(memory_format=torch.channels_last)
    found = {}
    for name, call, flop in (
        ("matmul", lambda: square @ square, 2 * 2048**3),
        ("convolution", lambda: layer(pixels), 2 * 2 * 64 * 64 * 9 * 320**2),
    ):
        call()
        end, times = time.perf_counter() + seconds, []
        while time.perf_counter() < end or not times:
            times.append(timed(call)[0])
        found[name] = flop / min(times) / 1e9
    return found


@contextlib.contextmanager
def peak_memory() -> Iterator[dict[str, float]]:
    """The process's largest resident memory within the block, in GiB (Linux; else nothing is measured)."""
    found: dict[str, float] = {}
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    with contextlib.suppress(OSError):
        reset.write_text("5")  # resets VmHWM, see proc_pid_clear_refs(5)
    yield found
    with contextlib.suppress(OSError, StopIteration):
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        found["gib"] = int(line.split()[1]) / 2**20


def pipelines(size: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Our pipeline and the reference's, with the same weights.

    The reference needs a learned variance, which the built-in model does not have. So its decoder's output is doubled
    there, at no cost, and it predicts noise. Its pictures are meaningless, but the computation is the same.
    """
    import diffusers
    from diffusers.pipelines.deprecated.unclip import UnCLIPPipeline as Theirs

    from unclip import UnCLIPPipeline

    ours = UnCLIPPipeline.from_pretrained("unclip-emoji", torch_dtype=dtype)
    if size == "karlo":
        from karlo_size import karlo_networks, karlo_schedulers
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection

        text = CLIPTextConfig(
            vocab_size=49408, hidden_size=768, intermediate_size=3072, projection_dim=768, num_attention_heads=12
        )
        built = {name: make() for name, make in networks("karlo", dtype).items() if name in karlo_networks()}
        encoder = CLIPTextModelWithProjection(text).to(dtype).eval()
        tokenizer = ours.components["tokenizer"]
        tokenizer.model_max_length = 77
        ours = UnCLIPPipeline(**built, **karlo_schedulers(), text_encoder=encoder, tokenizer=tokenizer)
    ours.set_progress_bar_config(disable=True)
    parts = dict(ours.components)
    for name, network in ours.networks.items():
        if name != "text_encoder":
            parts[name] = twins(name, network)
    for name in ("prior_scheduler", "decoder_scheduler", "super_res_scheduler"):
        kind = "sample" if name == "prior_scheduler" else "epsilon"
        parts[name] = diffusers.UnCLIPScheduler(prediction_type=kind)
    decoder = parts["decoder"].forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        out = decoder(*args, **kwargs)
        out.sample = torch.cat([out.sample, out.sample], dim=1)
        return out

    if parts["decoder"].config.out_channels == parts["decoder"].config.in_channels:
        parts["decoder"].forward = doubled
    parts["decoder_scheduler"].register_to_config(variance_type="learned_range")
    parts["decoder_scheduler"].variance_type = "learned_range"

    theirs = Theirs(**parts)
    theirs.set_progress_bar_config(disable=True)
    return ours, theirs


@contextlib.contextmanager
def resizing_in_float32() -> Iterator[None]:
    """`interpolate` computes in float32, since the reference's bicubic resizing has no kernel of bfloat16."""
    plain = torch.nn.functional.interpolate

    def resize(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return plain(x.float(), *args, **kwargs).to(x.dtype)

    torch.nn.functional.interpolate = resize
    try:
        yield
    finally:
        torch.nn.functional.interpolate = plain


def whole(size: str, dtype: torch.dtype, limits: Limits) -> dict[str, float]:
    """A whole call for one picture, at the reference's default steps and guidance."""
    ours, theirs = pipelines(size, dtype)
    call = {"prompt": "a red apple", "output_type": "np"}

    def their_call() -> object:
        with resizing_in_float32():
            return theirs(**call, generator=torch.Generator().manual_seed(0))

    found: dict[str, float] = {}
    for name, warm_up in (("ours", lambda: ours(**call, seed=0)), ("theirs", their_call)):
        with peak_memory() as memory:
            warm_up()
        found |= {f"{name}_peak_gib": memory["gib"]} if memory else {}
    return found | alternate(lambda: ours(**call, seed=0), their_call, limits)


def about(arguments: argparse.Namespace) -> dict[str, Any]:
    """The date, the machine and the versions."""
    import diffusers

    import unclip

    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "date": datetime.date.today().isoformat(),
        "size": arguments.size,
        "dtype": arguments.dtype,
        "processor": names[0].partition(": ")[2] if names else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "unclip": unclip.__version__,
        "diffusers": diffusers.__version__,
        "torch": torch.__version__,
    }


@torch.no_grad()
def measured(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """All rows, by their names."""
    from unclip import UnCLIPScheduler

    dtype, process = getattr(torch, arguments.dtype), UnCLIPScheduler().process
    limits = Limits(arguments.within, arguments.seconds)
    tops = peak(dtype)
    rows = {"peak": tops}
    values = GROWTH.get(arguments.growth, (1,))
    for name, value in itertools.product(arguments.stages, values):
        batch, scale = (value, 1) if arguments.growth == "batch" else (1, value)
        case = Case(dtype, batch, scale)
        if name == "prior" and case.scale > 1:
            continue
        row = STAGES[name](networks(arguments.size, dtype), process, case, limits)
        row["share_of_peak"] = row["gflop"] / row["ours_s"] / tops["convolution"]
        rows[f"{name}, {arguments.growth} {value}" if arguments.growth else name] = row
        print(f"{name}: {row['ratio']:.2f} (± {row['within']:.0%})", file=sys.stderr)
    if arguments.whole:
        rows["whole call (25/25/7 steps)"] = whole(arguments.size, dtype, limits)
    return rows


def table(rows: dict[str, dict[str, float]]) -> str:
    """The rows as a table in Markdown."""
    lines = [
        f"Peak: matrix product {rows['peak']['matmul']:.0f} GFLOP/s, "
        f"convolution {rows['peak']['convolution']:.0f} GFLOP/s.\n",
        "| | unclip s (min–max) | diffusers s (min–max) | ours/theirs | processor time | all steps | of the peak "
        "| turns |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if name == "peak":
            continue
        sides = [
            f"{row[f'{side}_s']:.3g} ({row[f'{side}_min_s']:.3g}–{row[f'{side}_max_s']:.3g})"
            for side in ("ours", "theirs")
        ]
        share = f"{row['share_of_peak']:.0%}" if "share_of_peak" in row else ""
        all_steps = f"{row['ratio_all']:.2f}" if "ratio_all" in row else ""
        ratio = f"{row['ratio']:.2f} ± {row['within'] * row['ratio']:.2f}"
        cells = [name, *sides, ratio, f"{row['ratio_cpu']:.2f}", all_steps, share, str(row["turns"])]
        lines.append(f"| {' | '.join(cells)} |")
        if "ours_peak_gib" in row:
            lines.append(f"\nPeak memory: {row['ours_peak_gib']:.2f} and {row['theirs_peak_gib']:.2f} GiB.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["emoji", "karlo"], default="emoji")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=list(STAGES), help="default: all")
    parser.add_argument("--whole", action=argparse.BooleanOptionalAction, default=True, help="measure whole calls too")
    parser.add_argument("--growth", choices=GROWTH, help="measure the stages at several sizes of this")
    parser.add_argument(
        "--within", type=float, default=0.02, help="the wanted relative error of a ratio (default 0.02)"
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="the most seconds of a measurement (default 120)")
    parser.add_argument("--json", type=Path, help="a file for all figures")
    arguments = parser.parse_args()
    head = about(arguments)
    rows = measured(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps({"about": head, "rows": rows}, indent=2) + "\n")
    print(", ".join(f"{key} {value}" for key, value in head.items()), end="\n\n")
    print(table(rows))


if __name__ == "__main__":
    main()
