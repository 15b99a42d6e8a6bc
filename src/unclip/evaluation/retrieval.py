"""Retrieval of captions from pictures by a CLIP: the judge, and the measures of generated pictures and variations."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unclip.clip.encoders import ImageEncoder, TextEncoder
from unclip.clip.pretrained import read_parts
from unclip.data.emoji.compose import kind_of
from unclip.data.emoji.evaluation_set import EvaluationSet, Progress, batches, check_counts
from unclip.evaluation.inception import InceptionFeatures
from unclip.evaluation.measures import cosines, difference, distances
from unclip.evaluation.report import draw_cards, draw_pairs, sheet_path
from unclip.pipelines.image_variation import UnCLIPImageVariationPipeline
from unclip.pipelines.text_to_image import UnCLIPPipeline


@dataclass(frozen=True)
class Plan:
    """What is measured: captions of a data set, in batches, with seeds.

    Attributes:
        data: a data set of concepts; or of composed pictures, where every distinct caption ("a cat left of a star")
            counts as a concept.
        num_seen: number of concepts seen in training, sampled by their training weight; fewer if there are fewer.
        num_held_out: number of held-out concepts; None for all.
        batch_size: pictures per call.
        seed: seed of the choice of concepts, and of the first picture of each group.
        sheet: prefix of the sheets of pictures (`-seen.png`, `-held-out.png` are appended); None: no sheets.
        progress: wraps the iterable of batches, as `tqdm` does.
    """

    data: Path
    num_seen: int = 200
    num_held_out: int | None = None
    batch_size: int = 16
    seed: int = 0
    sheet: Path | None = None
    progress: Progress = iter

    def choose(self) -> EvaluationSet:
        """Raises: InputError if a number is outside its limits; DataError if the data set cannot be used."""
        check_counts(batch_size=self.batch_size)
        numbers = {"num_seen": self.num_seen, "num_held_out": self.num_held_out, "seed": self.seed}
        return EvaluationSet.prepare(self.data, **numbers)

    def groups(
        self, chosen: EvaluationSet, result: dict[str, Any]
    ) -> Iterator[tuple[dict[str, Any], list[str], list[Image.Image], Path | None]]:
        """The groups that are not empty: the entry in the result, captions, real pictures, and the sheet's file.

        The entries of all groups are added to `result`, with their descriptions.
        """
        for name in chosen.groups:
            result[name] = chosen.about(name)
            if prompts := chosen.captions_of(name):
                result[name]["seeds"] = [self.seed, self.seed + len(prompts) - 1]
                sheet = None if self.sheet is None else sheet_path(self.sheet, name)
                yield result[name], prompts, chosen.pictures(name), sheet

    def batches(self, count: int) -> Iterator[tuple[slice, list[int]]]:
        """The rows of each batch, with their seeds."""
        return batches(count, self.batch_size, seed=self.seed, progress=self.progress)


@dataclass(frozen=True)
class Judge:
    """A CLIP that ranks captions for a picture: a CLIP that the model was not trained with, or its own."""

    text: TextEncoder
    image: ImageEncoder

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> "Judge":
        """Load a CLIP from a folder with a pipeline's components (`text_encoder`, …) or with transformers' `CLIPModel`.

        Raises:
            ConfigError: the folder contains no CLIP.
            CheckpointError: a part is missing or damaged.
        """
        parts, _ = read_parts(folder)
        return cls(
            TextEncoder(parts["text_encoder"].to(device), parts["tokenizer"]),
            ImageEncoder(parts["image_encoder"].to(device), parts["feature_extractor"]),
        )

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Embeddings [num_images, width] as the image encoder computes them, on the CPU."""
        return torch.cat([self.image.encode(images[k : k + 64]).cpu() for k in range(0, len(images), 64)])

    def look(self, images: Sequence[Image.Image]) -> Tensor:
        """Normalised embeddings of pictures [num_images, width]."""
        return F.normalize(self.embed(images), dim=-1)

    @torch.no_grad()
    def read(self, captions: Sequence[str]) -> Tensor:
        """Normalised embeddings of captions [num_captions, width]."""
        parts = [self.text.encode(captions[k : k + 256]).embeds.cpu() for k in range(0, len(captions), 256)]
        return F.normalize(torch.cat(parts), dim=-1)


@dataclass(frozen=True)
class Candidates:
    """The distinct captions that a judge ranks, and their `embeddings` [num_captions, width]."""

    captions: list[str]
    embeddings: Tensor

    @classmethod
    def read_by(cls, judge: Judge, captions: Sequence[str]) -> "Candidates":
        """The distinct captions, embedded by a judge."""
        once = list(dict.fromkeys(captions))
        return cls(once, judge.read(once))

    def places(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """The rank (0 is first) of each picture's own caption."""
        return ranks(features, self._rows(prompts), self.embeddings)

    def rates(self, features: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """How often a picture's own caption is first or among the first five, and the mean cosine (CLIP score).

        Args:
            features: the judge's embeddings of pictures [num_images, width], normalised.
            prompts: the caption of each picture, one of the candidates.
        """
        places = self.places(features, prompts)
        found = {f"at_{k}": round((places < k).float().mean().item(), 4) for k in (1, 5)}
        score = (features * self.embeddings[self._rows(prompts)]).sum(dim=1).mean()
        return found | {"clip_score": round(score.item(), 4)}

    def about(self) -> dict[str, Any]:
        """The number of captions, and the rates of a judge that guesses."""
        count = len(self.captions)
        return {"num_captions": count, "chance_at_1": 1 / count, "chance_at_5": min(1.0, 5 / count)}

    def _rows(self, prompts: Sequence[str]) -> list[int]:
        rows = {caption: row for row, caption in enumerate(self.captions)}
        return [rows[caption] for caption in prompts]


def ranks(images: Tensor, own: Sequence[int], captions: Tensor) -> Tensor:
    """The rank (0 is first) of each picture's own caption among all captions, by the cosine of embeddings.

    Captions with an equal score rank before the own caption, and all captions do if scores are NaN. So a judge that
    sees no differences retrieves nothing.

    Args:
        images: [num_images, width], normalised.
        own: the row of each picture's caption.
        captions: [num_captions, width], normalised; every caption once.
    """
    scores = (images @ captions.T).nan_to_num(nan=-torch.inf)
    mine = scores.gather(1, torch.tensor(own, dtype=torch.long, device=scores.device)[:, None])
    return (scores >= mine).sum(dim=1) - 1


def retrieval(
    pipeline: UnCLIPPipeline, judge: Judge, plan: Plan, *, features: InceptionFeatures | None = None, **call: Any
) -> dict[str, Any]:
    """Retrieval at 1 and at 5 among the bare captions of all concepts, for generated and for real pictures.

    Args:
        pipeline: the model.
        judge: a CLIP that the model was not trained with.
        plan: the captions. Its sheets have generated pictures beside real ones.
        features: another space in which to measure the distance between generated and real pictures.
        call: arguments of the pipeline's call.

    Returns: chance, and for "seen" and "held_out": the number of concepts, how they were chosen, the first and the last
        seed, `at_1`, `at_5` and `clip_score` of generated and real pictures (absent for an empty group), the same by
        kind for composed captions, and the distance between the two sets in the judge's space and in `features`.

    Raises: as `Plan.choose`.
    """
    chosen = plan.choose()
    candidates = Candidates.read_by(judge, chosen.captions)
    result = {"captions": "composed" if chosen.composed else "concepts", **candidates.about(), **chosen.left_out()}
    for entry, prompts, real, sheet in plan.groups(chosen, result):
        made: list[Image.Image] = []
        for rows, seeds in plan.batches(len(prompts)):
            made += pipeline(prompts[rows], seed=seeds, **call).images  # pyright: ignore
        looked = {"generated": judge.look(made), "real": judge.look(real)}
        entry |= {kind: candidates.rates(seen, prompts) for kind, seen in looked.items()}
        if chosen.composed:
            entry["kinds"] = by_kind(candidates, looked, prompts)
        featured = (features.look(made), features.look(real)) if features is not None else None
        entry |= distances((looked["generated"], looked["real"]), features, featured)
        if sheet is not None:
            draw_cards(real, made, prompts, sheet)
    return result


def by_kind(candidates: Candidates, looked: dict[str, Tensor], prompts: Sequence[str]) -> dict[str, Any]:
    """The number and the rates for each kind of composed caption: "colour", "scene on background", …

    Args:
        candidates: the captions that the judge ranks.
        looked: its embeddings of pictures [num_images, width], by "generated" and "real".
        prompts: the caption of each picture.
    """
    kinds = [kind_of(caption) or "other" for caption in prompts]
    found = {}
    for kind in sorted(set(kinds)):
        rows = [row for row, each in enumerate(kinds) if each == kind]
        captions = [prompts[row] for row in rows]
        rates = {what: candidates.rates(features[rows], captions) for what, features in looked.items()}
        found[kind] = {"num": len(rows), **rates}
    return found


def variations(pipeline: UnCLIPImageVariationPipeline, judge: Judge, plan: Plan, **call: Any) -> dict[str, Any]:
    """Vary a real picture of each concept: retrieval of its caption, and its distance from the picture.

    Args:
        pipeline: the model.
        judge: a CLIP that the model was not trained with.
        plan: the pictures. Its sheets have pictures above their variations.
        call: arguments of the pipeline's call.

    Returns: for "seen" and "held_out", with the description of the group: `at_1`, `at_5` and `clip_score` of the
        variations and of the real pictures; `similarity`, the mean cosine of a variation and its picture in the judge's
        space; `similarity_of_others`, the same for all other pictures; `pixel_difference`, the mean absolute difference
        of pixels in [0, 1].

    Raises: as `Plan.choose`.
    """
    chosen = plan.choose()
    candidates = Candidates.read_by(judge, chosen.captions)
    result = {"num_captions": len(candidates.captions), **chosen.left_out()}
    for entry, prompts, real, sheet in plan.groups(chosen, result):
        made: list[Image.Image] = []
        for rows, seeds in plan.batches(len(prompts)):
            made += pipeline(real[rows], seed=seeds, **call).images  # pyright: ignore
        of_real, of_made = judge.look(real), judge.look(made)
        own, others = cosines(of_made, of_real)
        pixels = [difference(one, other) for one, other in zip(real, made, strict=True)]
        entry |= {
            "similarity": own,
            "similarity_of_others": others,
            "pixel_difference": round(np.mean(pixels).item(), 4),
        }
        entry |= {"variations": candidates.rates(of_made, prompts), "real": candidates.rates(of_real, prompts)}
        if sheet is not None:
            draw_pairs(real, made, sheet)
    return result
