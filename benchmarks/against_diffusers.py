"""Time each stage and the whole call against diffusers' deprecated unCLIP classes, with the same weights.

    python benchmarks/against_diffusers.py                       # the built-in model: stages and the whole
    python benchmarks/against_diffusers.py --size karlo --dtype bfloat16 --repeats 2

A stage is prepared once and then timed for `--steps` steps; the result is seconds per step. The two implementations
alternate, and the median of the ratios of the pairs is reported, so that noise on the machine affects both equally.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
warnings.filterwarnings("ignore")

GUIDANCE = 4.0
TOKENS = {768: 77, 256: 32}  # the text encoders' contexts, by width


def timed(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def compare(ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> dict[str, float]:
    """Medians in seconds, and the median of the pairwise ratios theirs/ours."""
    if repeats > 1:
        ours(), theirs()  # the first calls are slower
    pairs = [(timed(ours), timed(theirs)) for _ in range(repeats)]
    return {
        "ours_s": statistics.median(a for a, _ in pairs),
        "theirs_s": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(b / a for a, b in pairs),
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


def networks(size: str, dtype: torch.dtype):
    """Functions that load each network by name, one at a time."""
    if size == "emoji":
        from unclip import UnCLIPPipeline

        parts = UnCLIPPipeline.from_pretrained("unclip-emoji", torch_dtype=dtype).networks
        return {name: (lambda net=net: net) for name, net in parts.items() if name != "text_encoder"}
    from karlo_size import karlo_networks

    def random(build):
        with torch.device("meta"):
            module = build()
        module.to_empty(device="cpu").to(dtype)
        for parameter in module.parameters():
            parameter.data.normal_(std=0.02)
        return module.eval()

    return {name: (lambda build=build: random(build)) for name, build in karlo_networks().items()}


def loop(prepare: Callable[[], Callable], x: torch.Tensor, path: range) -> Callable[[], None]:
    """The steps of our stage, after one preparation."""

    def run() -> None:
        from unclip.models.kernels import packed_weights

        denoiser = prepare()
        with packed_weights(len(path)):
            for t in path:
                denoiser(x, t)

    return run


def caption(width: int, tokens: int):
    """Random embeddings of an empty and a given caption."""
    from unclip.clip.encoders import TextEmbedding

    mask = torch.ones(2, tokens, dtype=torch.bool)
    return TextEmbedding(torch.randn(2, width), torch.randn(2, tokens, width), mask)


def prior_stage(build, process, dtype: torch.dtype, path: range, repeats: int) -> dict[str, float]:
    """The prior with guidance: two rows per picture."""
    from unclip.diffusion.guidance import guided
    from unclip.stages.prior import PriorStage
    from unclip.stages.stage import PriorCondition

    prior = build["prior"]()
    twin, width = twins("prior", prior), prior.config.embedding_dim
    text, x = caption(width, prior.config.num_embeddings), torch.randn(1, width)
    embeds, hidden_states = text.embeds.to(dtype), text.hidden_states.to(dtype)

    def theirs() -> None:
        for t in path:
            twin(torch.cat([x, x]).to(dtype), torch.tensor(t), embeds, hidden_states, text.mask)

    stage = PriorStage(prior, process)
    return compare(loop(lambda: guided(stage.prepare(PriorCondition(text)), GUIDANCE), x, path), theirs, repeats)


def decoder_stage(build, process, dtype: torch.dtype, path: range, repeats: int) -> dict[str, float]:
    """The decoder and its text projection with guidance: two rows per picture."""
    from unclip.diffusion.guidance import guided
    from unclip.stages.decoder import DecoderStage
    from unclip.stages.stage import DecoderCondition

    decoder, text_proj = build["decoder"](), build["text_proj"]()
    twin, twin_proj = twins("decoder", decoder), twins("text_proj", text_proj)
    side, width = decoder.config.sample_size, text_proj.config.clip_embeddings_dim
    extra = text_proj.config.clip_extra_context_tokens
    text, embedding = caption(width, TOKENS[width]), torch.randn(2, width)
    x = torch.randn(1, decoder.config.in_channels, side, side)

    def theirs() -> None:
        tokens, added = twin_proj(
            image_embeddings=embedding[1:].to(dtype),
            prompt_embeds=text.embeds.to(dtype),
            text_encoder_hidden_states=text.hidden_states.to(dtype),
            do_classifier_free_guidance=True,
        )
        mask = torch.nn.functional.pad(text.mask, (extra, 0), value=True)
        for t in path:
            twin(torch.cat([x, x]).to(dtype), torch.tensor(t), tokens, class_labels=added, attention_mask=mask)

    condition = DecoderCondition(text, embedding, torch.tensor([False, True]))
    stage = DecoderStage(decoder, text_proj, process)
    return compare(loop(lambda: guided(stage.prepare(condition), GUIDANCE), x, path), theirs, repeats)


def super_res_stage(build, process, dtype: torch.dtype, path: range, repeats: int) -> dict[str, float]:
    """Super-resolution, which has no guidance."""
    from unclip.stages.stage import SuperResCondition
    from unclip.stages.super_res import SuperResStage

    network = build["super_res_first"]()
    twin, size_px = twins("super_res_first", network), network.config.sample_size
    x, small = torch.randn(1, 3, size_px, size_px), torch.randn(1, 3, size_px // 4, size_px // 4)

    def theirs() -> None:
        large = torch.nn.functional.interpolate(small, size=(size_px,) * 2, mode="bicubic", antialias=True)
        for t in path:
            twin(torch.cat([x, large], dim=1).to(dtype), torch.tensor(t))

    stage = SuperResStage(network, network, process)
    return compare(loop(lambda: stage.prepare(SuperResCondition(small)), x, path), theirs, repeats)


STAGES = {"prior": prior_stage, "decoder": decoder_stage, "super-resolution": super_res_stage}


@torch.no_grad()
def stages(size: str, dtype: torch.dtype, steps: int, repeats: int, chosen: list[str]) -> dict[str, dict[str, float]]:
    """Seconds per step of each chosen stage, for one picture."""
    from unclip import UnCLIPScheduler

    build, process, path = networks(size, dtype), UnCLIPScheduler().process, range(steps * 10, 0, -10)
    results = {name: STAGES[name](build, process, dtype, path, repeats) for name in chosen}
    for row in results.values():
        row["ours_s"], row["theirs_s"] = row["ours_s"] / steps, row["theirs_s"] / steps
    return results


def whole(dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """The built-in model's whole call, at the reference's default steps and guidance.

    The reference needs a learned variance, which this model does not have. So its decoder's output is doubled, at no
    cost, and it predicts noise. Its pictures are meaningless, but the computation is the same.
    """
    import diffusers

    from unclip import UnCLIPPipeline

    ours = UnCLIPPipeline.from_pretrained("unclip-emoji", torch_dtype=dtype)
    ours.set_progress_bar_config(disable=True)
    parts = dict(ours.components)
    for name, network in ours.networks.items():
        if name != "text_encoder":
            parts[name] = twins(name, network)
    # The reference does not support v-prediction; noise prediction costs the same.
    for name in ("prior_scheduler", "decoder_scheduler", "super_res_scheduler"):
        kind = "sample" if name == "prior_scheduler" else "epsilon"
        parts[name] = diffusers.UnCLIPScheduler(prediction_type=kind)
    from diffusers.pipelines.deprecated.unclip import UnCLIPPipeline as Theirs

    class Reference(Theirs):
        """Add a second half of channels: the reference's guidance expects a learned variance there."""

    theirs = Reference(**parts)
    theirs.set_progress_bar_config(disable=True)
    decoder = parts["decoder"].forward

    def doubled(*args, **kwargs):
        out = decoder(*args, **kwargs)
        out.sample = torch.cat([out.sample, out.sample], dim=1)
        return out

    if parts["decoder"].config.out_channels == parts["decoder"].config.in_channels:
        parts["decoder"].forward = doubled
        parts["decoder_scheduler"].register_to_config(variance_type="learned_range")
        parts["decoder_scheduler"].variance_type = "learned_range"
    return compare(
        lambda: ours("a red apple", seed=0, output_type="np"),
        lambda: theirs("a red apple", generator=torch.Generator().manual_seed(0), output_type="np"),
        repeats,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["emoji", "karlo"], default="emoji")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--steps", type=int, help="steps of each stage (default: 8, Karlo's size: 2)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), help="stages to time (default: all)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    steps = arguments.steps or (8 if arguments.size == "emoji" else 2)
    rows = stages(arguments.size, dtype, steps, arguments.repeats, arguments.stages)
    if arguments.size == "emoji" and len(rows) == len(STAGES):
        rows["whole call (25/25/7 steps)"] = whole(dtype, arguments.repeats)
    import diffusers

    import unclip

    about = {
        "size": arguments.size, "dtype": arguments.dtype, "steps_timed": steps, "repeats": arguments.repeats,
        "unclip": unclip.__version__, "diffusers": diffusers.__version__, "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
    }  # fmt: skip
    if arguments.json:
        print(json.dumps({"about": about, "rows": rows}))
        return
    print(", ".join(f"{key} {value}" for key, value in about.items()), end="\n\n")
    print("| | unclip s | diffusers s | times faster |\n|---|---|---|---|")
    for name, row in rows.items():
        unit = "" if name.startswith("whole") else ", a step"
        print(f"| {name}{unit} | {row['ours_s']:.4f} | {row['theirs_s']:.4f} | {row['ratio']:.2f} |")


if __name__ == "__main__":
    main()
