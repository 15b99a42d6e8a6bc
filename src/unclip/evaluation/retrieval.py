"""Retrieval of captions from pictures by a CLIP: the judge, and the measures of generated pictures and variations."""

from collections.abc import Sequence
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
from unclip.evaluation.measures import FeatureSpace, cosines, difference, distances
from unclip.evaluation.report import draw_cards, draw_pairs, sheet_path
from unclip.pipelines.image_variation import UnCLIPImageVariationPipeline
from unclip.pipelines.text_to_image import UnCLIPPipeline


@dataclass(frozen=True)
class Judge:
    """A CLIP that ranks captions for a picture: one that the model was not trained with, or the model's own."""

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
    """The distinct captions that a judge ranks, and their embeddings `known` [num_captions, width]."""

    captions: list[str]
    known: Tensor

    @classmethod
    def read_by(cls, judge: Judge, captions: Sequence[str]) -> "Candidates":
        """The captions with their embeddings by a judge."""
        once = list(dict.fromkeys(captions))
        return cls(once, judge.read(once))

    def places(self, features: Tensor, asked: Sequence[str]) -> Tensor:
        """The rank (0 is first) of each picture's own caption."""
        return ranks(features, self._rows(asked), self.known)

    def rates(self, features: Tensor, asked: Sequence[str]) -> dict[str, float]:
        """How often a picture's own caption is first or among the first five, and the mean cosine (CLIP score).

        Args:
            features: the judge's embeddings of pictures [num_images, width], normalised.
            asked: the caption of each picture, one of the candidates.
        """
        places = self.places(features, asked)
        found = {f"at_{k}": round((places < k).float().mean().item(), 4) for k in (1, 5)}
        score = (features * self.known[self._rows(asked)]).sum(dim=1).mean()
        return found | {"clip_score": round(score.item(), 4)}

    def chance(self) -> dict[str, float]:
        """The rates of a judge that guesses."""
        count = len(self.captions)
        return {"chance_at_1": 1 / count, "chance_at_5": min(1.0, 5 / count)}

    def _rows(self, asked: Sequence[str]) -> list[int]:
        rows = {caption: row for row, caption in enumerate(self.captions)}
        return [rows[caption] for caption in asked]


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
    pipeline: UnCLIPPipeline,
    judge: Judge,
    data: Path,
    *,
    num_seen: int = 200,
    num_held_out: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    sheet: Path | None = None,
    features: FeatureSpace | None = None,
    progress: Progress = iter,
    **call: Any,
) -> dict[str, Any]:
    """Retrieval at 1 and at 5 among the bare captions of all concepts, for generated and for real pictures.

    Seen concepts are sampled by their training weight. All held-out concepts are used unless `num_held_out` is given.
    In a data set of composed pictures, every distinct caption ("a cat left of a star") counts as a concept.

    Args:
        pipeline: the model.
        judge: a CLIP that the model was not trained with.
        data: a data set of concepts, or of composed pictures.
        num_seen: number of concepts seen in training; fewer if the data set has fewer.
        num_held_out: number of held-out concepts; None for all.
        batch_size: pictures per call.
        seed: seed of the choice of concepts, and of the first picture of each group.
        sheet: prefix of the sheets with generated pictures beside real ones (`-seen.png`, `-held-out.png` are
            appended).
        features: another space in which to measure the distance between generated and real pictures.
        progress: wraps the iterable of batches, as `tqdm` does.
        call: arguments of the pipeline's call.

    Returns: chance, and for "seen" and "held_out": the number of concepts, how they were chosen, the first and the last
        seed, `at_1`, `at_5` and `clip_score` of generated and real pictures (absent for an empty group), the same by
        kind for composed captions, and the distance between the two sets in the judge's space and in `features`.

    Raises:
        InputError: a number is outside its limits.
        DataError: the data set cannot be used.
    """
    check_counts(batch_size=batch_size)
    evaluation_set = EvaluationSet.prepare(data, num_seen=num_seen, num_held_out=num_held_out, seed=seed)
    candidates = Candidates.read_by(judge, evaluation_set.captions)
    result: dict[str, Any] = {
        "captions": "composed" if evaluation_set.composed else "concepts",
        "num_captions": len(candidates.captions),
        **candidates.chance(),
        **evaluation_set.left_out(),
    }
    for name in evaluation_set.groups:
        result[name] = evaluation_set.about(name)
        asked = evaluation_set.asked(name)
        if not asked:
            continue
        result[name]["seeds"] = [seed, seed + len(asked) - 1]
        real = evaluation_set.pictures(name)
        made: list[Image.Image] = []
        for rows, seeds in batches(len(asked), batch_size, seed=seed, progress=progress):
            made += pipeline(asked[rows], seed=seeds, **call).images  # pyright: ignore
        looked = {"generated": judge.look(made), "real": judge.look(real)}
        result[name] |= {kind: candidates.rates(seen, asked) for kind, seen in looked.items()}
        if evaluation_set.composed:
            result[name]["kinds"] = by_kind(candidates, looked, asked)
        featured = (features.look(made), features.look(real)) if features is not None else None
        result[name] |= distances((looked["generated"], looked["real"]), features, featured)
        if sheet is not None:
            draw_cards(real, made, asked, sheet_path(sheet, name))
    return result


def by_kind(candidates: Candidates, looked: dict[str, Tensor], asked: Sequence[str]) -> dict[str, Any]:
    """The number and the rates for each kind of composed caption: "colour", "scene on background", …

    Args:
        candidates: the captions that the judge ranks.
        looked: its embeddings of pictures [num_images, width], by "generated" and "real".
        asked: the caption of each picture.
    """
    kinds = [kind_of(caption) or "other" for caption in asked]
    found = {}
    for kind in sorted(set(kinds)):
        rows = [row for row, each in enumerate(kinds) if each == kind]
        captions = [asked[row] for row in rows]
        rates = {what: candidates.rates(features[rows], captions) for what, features in looked.items()}
        found[kind] = {"num": len(rows), **rates}
    return found


def variations(
    pipeline: UnCLIPImageVariationPipeline,
    judge: Judge,
    data: Path,
    *,
    num_seen: int = 200,
    num_held_out: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    sheet: Path | None = None,
    progress: Progress = iter,
    **call: Any,
) -> dict[str, Any]:
    """Vary a real picture of each concept: retrieval of its caption, and its distance from the picture.

    Args:
        pipeline: the model.
        judge: a CLIP that the model was not trained with.
        data: a data set; concepts are chosen as for `retrieval`.
        num_seen: number of concepts seen in training; fewer if the data set has fewer.
        num_held_out: number of held-out concepts; None for all.
        batch_size: pictures per call.
        seed: seed of the choice of concepts, and of the first picture of each group.
        sheet: prefix of the sheets with pictures above their variations (`-seen.png`, `-held-out.png` are appended).
        progress: wraps the iterable of batches, as `tqdm` does.
        call: arguments of the pipeline's call.

    Returns: for "seen" and "held_out": the number; `at_1`, `at_5` and `clip_score` of the variations and of the real
        pictures; `similarity`, the mean cosine of a variation and its picture in the judge's space;
        `similarity_of_others`, the same for all other pictures; `pixel_difference`, the mean absolute difference of
        pixels in [0, 1].

    Raises: InputError if a number is outside its limits; DataError if the data set cannot be used.
    """
    check_counts(batch_size=batch_size)
    evaluation_set = EvaluationSet.prepare(data, num_seen=num_seen, num_held_out=num_held_out, seed=seed)
    candidates = Candidates.read_by(judge, evaluation_set.captions)
    result: dict[str, Any] = {"num_captions": len(candidates.captions), **evaluation_set.left_out()}
    for name, group in evaluation_set.groups.items():
        result[name] = {"num": len(group)}
        if not group:
            continue
        real, asked = evaluation_set.pictures(name), evaluation_set.asked(name)
        made: list[Image.Image] = []
        for rows, seeds in batches(len(group), batch_size, seed=seed, progress=progress):
            made += pipeline(real[rows], seed=seeds, **call).images  # pyright: ignore
        of_real, of_made = judge.look(real), judge.look(made)
        own, others = cosines(of_made, of_real)
        result[name] |= {
            "variations": candidates.rates(of_made, asked),
            "real": candidates.rates(of_real, asked),
            "similarity": own,
            "similarity_of_others": others,
            "pixel_difference": round(float(np.mean([difference(a, b) for a, b in zip(real, made, strict=True)])), 4),
        }
        if sheet is not None:
            draw_pairs(real, made, sheet_path(sheet, name))
    return result
