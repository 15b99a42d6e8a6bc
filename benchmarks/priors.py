"""Compare both kinds of prior on the emoji set: likelihood, cosine to the true embedding, time and candidates.

It prints Markdown tables; `--out` also writes the numbers as JSON. Everything is measured on concepts that were seen in
training, sampled by their weight, and on concepts that were held out.

    python benchmarks/priors.py --data runs/emoji/data --autoregressive runs/emoji/prior_autoregressive/model
    python benchmarks/priors.py --data runs/emoji/data --autoregressive … --pictures 0      # without the judge
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unclip import AutoregressivePrior, DPMSolverMultistepScheduler, UnCLIPPipeline
from unclip.data.batches import Rows
from unclip.data.emoji.evaluation_set import EvaluationSet
from unclip.data.source import FolderSource
from unclip.diffusion.loop import NoiseSource, generators_from_seed
from unclip.evaluation.retrieval import Candidates, Judge
from unclip.images import grid, labelled
from unclip.models.prior_autoregressive import dot_product
from unclip.stages.prior import (
    AutoregressivePriorStage,
    PriorStage,
    sample_best,
)
from unclip.stages.stage import PriorCondition, sample
from unclip.training.conditions import FrozenClip

ASSETS = Path(__file__).parents[1] / "src" / "unclip" / "assets"
CANDIDATES = (1, 2, 4)
SHOWN = ["lion", "rocket", "rose", "penguin", "sailboat", "red apple", "pizza", "butterfly"]
"""Captions of the sheet."""
SMOOTHING = 1.0
"""Added to each count of the unigram model, so that unseen codes have a probability above 0."""


def unigram(codes: Tensor, weights: Tensor, num_buckets: int) -> Tensor:
    """The unigram log p(code) of each component, [num_components, num_buckets], from codes sampled by `weights`."""
    share = weights / weights.sum() * len(codes)
    counts = torch.stack([torch.bincount(column, share, num_buckets) for column in codes.T]) + SMOOTHING
    return (counts / counts.sum(dim=1, keepdim=True)).log()


def likelihoods(
    prior: AutoregressivePrior, clip: FrozenClip, rows: Rows, embeddings: Tensor, alone: Tensor
) -> dict[str, float]:
    """Mean −log p in nats per component, of the unigram model and of the prior with different conditions."""
    stage, codes = AutoregressivePriorStage(prior), prior.encode(embeddings)
    text = clip.text.encode(rows.captions)
    untold = torch.full((len(codes),), prior.no_dot_code)
    told = prior.dot_code(text.embeds, embeddings)
    empty = PriorCondition(clip.empty.select([0] * len(codes)))
    conditions = {
        "without a caption": (empty, untold),
        "with the caption": (PriorCondition(text), untold),
        "with caption and dot product": (PriorCondition(text), told),
    }
    found = {"unigram": -alone.gather(1, codes.T).mean().item()}
    for name, (condition, dots) in conditions.items():
        parts = [
            stage.log_likelihood(condition.select(part), dots[part], codes[part])
            for part in torch.arange(len(codes)).split(64)
        ]
        found[name] = -torch.cat(parts).mean().item()
    return found


def closeness(draw: Callable[[Any], Tensor], clip: FrozenClip, rows: Rows, embeddings: Tensor) -> dict[str, float]:
    """Mean cosines of a prior's samples with the picture's, another picture's and the caption's embedding; and how
    often the right picture is the nearest of the group."""
    text = clip.text.encode(rows.captions)
    drawn = draw(text)
    scores = F.normalize(drawn, dim=-1) @ F.normalize(embeddings, dim=-1).T
    return {
        "to the true embedding": dot_product(drawn, embeddings).mean().item(),
        "to another's": dot_product(drawn, embeddings.roll(1, 0)).mean().item(),
        "to the caption": dot_product(drawn, text.embeds).mean().item(),
        "its picture first": (scores.argmax(dim=1) == torch.arange(len(scores))).float().mean().item(),
    }


def drawer(sampler: Callable[..., Tensor], clip: FrozenClip, scale: float, num_candidates: int = 1) -> Callable:
    """A function from text embeddings to image embeddings, in batches of 64; row i has seed i."""

    def draw(text) -> Tensor:
        parts = []
        for places in torch.arange(len(text)).split(64):
            seeds = generators_from_seed(places.tolist(), len(places))
            chosen, noise = text.select(places), NoiseSource(seeds, len(places))
            null = PriorCondition(clip.empty.select([0] * len(places)))
            once = partial(sampler, PriorCondition(chosen), null=null, guidance_scale=scale)
            drawn = sample_best(
                lambda noise, latents, once=once: once(noise=noise, latents=latents),
                chosen.embeds,
                num_candidates=num_candidates,
                noise=noise,
            )
            parts.append(drawn)
        return torch.cat(parts)

    return draw


def seconds(draw: Callable[[Any], Tensor], clip: FrozenClip, batch_size: int, repeats: int = 3) -> dict[str, float]:
    """Seconds per embedding: the minimum of several repeats, in wall time and in processor time."""
    text = clip.text.encode(["a red apple"]).select([0] * batch_size)
    walls, cpus = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        draw(text)
        walls.append((time.perf_counter() - wall) / batch_size)
        cpus.append((time.process_time() - cpu) / batch_size)
    return {"wall_s": min(walls), "cpu_s": min(cpus)}


def judged(
    pipe: UnCLIPPipeline,
    draws: dict[int, Callable],
    clip: FrozenClip,
    judge: Judge,
    args: argparse.Namespace,
    call: dict,
) -> dict[str, dict[str, Any]]:
    """The judge's retrieval of seen and of held-out concepts, by number of candidates.

    Picture i has the same noise whichever embedding it is made of, so one embedding makes one picture.
    """
    evaluation_set = EvaluationSet.prepare(args.data, num_seen=args.pictures, num_held_out=args.pictures, seed=0)
    candidates = Candidates.read_by(judge, evaluation_set.captions)
    found: dict[str, dict[str, Any]] = {}
    for group in evaluation_set.groups:
        captions = evaluation_set.captions_of(group)
        found[group] = {"num": len(captions)}
        made: dict[tuple[int, tuple[float, ...]], Image.Image] = {}
        for count, draw in draws.items():
            embeddings = draw(clip.text.encode(captions))
            keys = [(i, tuple(row)) for i, row in enumerate(embeddings.tolist())]
            missing = [i for i, key in enumerate(keys) if key not in made]
            for start in range(0, len(missing), 16):
                part = missing[start : start + 16]
                images = pipe([captions[i] for i in part], image_embeddings=embeddings[part], seed=part, **call).images
                made |= {keys[i]: image for i, image in zip(part, images, strict=True)}  # type: ignore[arg-type]
            found[group][str(count)] = candidates.rates(judge.look([made[key] for key in keys]), captions)
    return found


def draw_sheet(
    pipe: UnCLIPPipeline, samplers: dict[str, Callable[..., Tensor]], clip: FrozenClip, scale: float, path: Path
):
    """A sheet with a row of pictures for each prior, with the same noise and the best of four candidates."""
    cards = []
    for kind, sampler in samplers.items():
        embeddings = drawer(sampler, clip, scale, max(CANDIDATES))(clip.text.encode(SHOWN))
        call = {name: value for name, value in pipe.recommended.items() if not name.startswith(("prior", "num_prior"))}
        images = pipe(SHOWN, image_embeddings=embeddings, seed=list(range(len(SHOWN))), **call).images
        assert isinstance(images, list)
        cards += [labelled(image, f"{text}, {kind}") for image, text in zip(images, SHOWN, strict=True)]
    grid(cards, columns=len(SHOWN), gap=8).quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    pipe = UnCLIPPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    clip = FrozenClip(Path(args.model))
    prior = AutoregressivePrior.from_pretrained(args.autoregressive / "prior")
    recommended = pipe.recommended
    diffusion, scheduler = pipe.prior, pipe.prior_scheduler
    assert scheduler is not None
    scale = float(recommended.get("prior_guidance_scale", 4.0))
    steps = int(recommended.get("prior_num_inference_steps", 25))
    timesteps = scheduler.spaced_timesteps(steps)
    stage = PriorStage(diffusion, scheduler.process)  # type: ignore[arg-type]
    samplers = {
        "diffusion": partial(sample, stage, sampler=scheduler.sampler(), timesteps=timesteps),
        "autoregressive": AutoregressivePriorStage(prior, args.temperature, args.top_p).sample,
    }
    if args.sheet:
        draw_sheet(pipe, samplers, clip, scale, args.sheet)
    source = FolderSource([args.data], (clip.image_size,))
    pictures = source.of_size(clip.image_size)
    table = clip.embeddings_of(pictures)
    alone = unigram(prior.encode(table), source.weights, prior.config.num_buckets)
    held_out = source.examples(args.num, held_out=True)
    groups = {"seen": source.examples(args.num), "held out": held_out}
    truths = {"seen": table[groups["seen"].index], "held out": clip.embed(held_out.images[clip.image_size])}
    rebuilt = prior.decode(prior.encode(truths["held out"]))
    result: dict[str, Any] = {
        "prior": {
            "parameters": sum(p.numel() for p in prior.parameters()),
            "diffusion_parameters": sum(p.numel() for p in diffusion.parameters()),
            "num_components": prior.config.num_components,
            "num_buckets": prior.config.num_buckets,
            "temperature": args.temperature,
            "top_p": args.top_p,
            "guidance_scale": scale,
            "diffusion_steps": steps,
            "cosine_of_codes": F.cosine_similarity(rebuilt, truths["held out"]).mean().item(),
            "unigram_entropy": -(alone.exp() * alone).sum(dim=1).mean().item(),
            "uniform": math.log(prior.config.num_buckets),
        },
        "groups": {},
        "seconds": {},
        "pictures": {},
    }
    for name, rows in groups.items():
        row: dict[str, Any] = {"num": len(rows.captions)}
        row["nats"] = likelihoods(prior, clip, rows, truths[name], alone)
        for kind, sampler in samplers.items():
            row[kind] = {
                str(count): closeness(drawer(sampler, clip, scale, count), clip, rows, truths[name])
                for count in CANDIDATES
            }
        result["groups"][name] = row
    for kind, sampler in samplers.items():
        draw = drawer(sampler, clip, scale)
        result["seconds"][kind] = {str(size): seconds(draw, clip, size) for size in (1, 16)}
    if args.pictures:
        if args.fast:
            pipe.decoder_scheduler = DPMSolverMultistepScheduler.from_config(pipe.decoder_scheduler.config)
            pipe.super_res_scheduler = DPMSolverMultistepScheduler.from_config(pipe.super_res_scheduler.config)
            recommended |= {"decoder_num_inference_steps": 8, "super_res_num_inference_steps": 2}
        judge = Judge.load(args.judge)
        for kind, sampler in samplers.items():
            draws = {count: drawer(sampler, clip, scale, count) for count in CANDIDATES}
            result["pictures"][kind] = judged(pipe, draws, clip, judge, args, recommended)
    return result


def markdown(result: dict[str, Any]) -> str:
    about = result["prior"]
    lines = [
        f"{about['num_components']} components (cosine of decoded and true embedding {about['cosine_of_codes']:.4f}), "
        f"{about['num_buckets']} buckets, {about['parameters'] / 1e6:.1f} M parameters (diffusion prior: "
        f"{about['diffusion_parameters'] / 1e6:.1f} M), temperature {about['temperature']}, top_p {about['top_p']}, "
        f"guidance {about['guidance_scale']}, {about['diffusion_steps']} diffusion steps.",
        "",
        "| nats a component | " + " | ".join(result["groups"]) + " |",
        "|---|" + "---|" * len(result["groups"]),
    ]
    for name in next(iter(result["groups"].values()))["nats"]:
        lines.append(f"| {name} | " + " | ".join(f"{g['nats'][name]:.3f}" for g in result["groups"].values()) + " |")
    lines += [
        "",
        "| prior | candidates | pictures | cosine to the true | to another's | to the caption | its picture first |",
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for group, row in result["groups"].items():
        for kind in ("diffusion", "autoregressive"):
            for count, found in row[kind].items():
                numbers = " | ".join(f"{value:.4f}" for value in found.values())
                lines.append(f"| {kind} | {count} | {group} ({row['num']}) | {numbers} |")
    lines += ["", "| prior | seconds an embedding, one alone | in a batch of 16 |", "|---|---|---|"]
    for kind, times in result["seconds"].items():
        lines.append(f"| {kind} | " + " | ".join(f"{found['cpu_s']:.3f}" for found in times.values()) + " |")
    if result["pictures"]:
        lines += ["", "| prior | candidates | pictures | first | among five | judge's CLIP score |"]
        lines += ["|---|---|---|---|---|---|"]
        for kind, groups in result["pictures"].items():
            for group, row in groups.items():
                for count in CANDIDATES:
                    rates = row[str(count)]
                    lines.append(
                        f"| {kind} | {count} | {group.replace('_', ' ')} ({row['num']}) | {rates['at_1']:.1%} | "
                        f"{rates['at_5']:.1%} | {rates['clip_score']:.4f} |"
                    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, default=ASSETS / "emoji", help="a pipeline's folder with a diffusion prior"
    )
    parser.add_argument("--autoregressive", type=Path, required=True, help="the model/ folder of a training run")
    parser.add_argument("--judge", type=Path, default=ASSETS / "emoji-judge")
    parser.add_argument("--data", type=Path, required=True, help="the emoji data set")
    parser.add_argument(
        "--num", type=int, default=512, help="number of pictures in each group for likelihood and cosines"
    )
    parser.add_argument(
        "--pictures", type=int, default=64, help="number of pictures in each group for the judge; 0 for none"
    )
    parser.add_argument("--fast", action="store_true", help="make pictures with DPM-Solver in 8 and 2 steps")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--sheet", type=Path, help="a PNG with a row of pictures for each prior")
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    args = parser.parse_args()
    with torch.no_grad():
        result = measure(args)
    print(markdown(result), flush=True)
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
