"""A CLIP that looks at pictures and reads captions, and how well it finds one by the other.

Knows encoders alone; knows neither pipelines nor data sets. Called by every measure.
"""

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
from unclip.data.emoji.compose import kind_of
from unclip.data.emoji.evaluation_set import Exam, Progress, batches, check_counts
from unclip.evaluation.measures import FeatureSpace, cosines, difference, distances
from unclip.evaluation.report import draw_cards, draw_pairs, sheet_path
from unclip.pipelines.clip import read_parts
from unclip.pipelines.image_variation import UnCLIPImageVariationPipeline
from unclip.pipelines.text_to_image import UnCLIPPipeline


@dataclass(frozen=True)
class Judge:
    """A CLIP that ranks captions for a picture: one that had no part in a model, or the model's own."""

    text: TextEncoder
    image: ImageEncoder

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> "Judge":
        """Read a CLIP from a folder, of a pipeline's components (`text_encoder`, …) or of transformers' `CLIPModel`.

        Raises:
            ConfigError: there is none.
            CheckpointError: a part is missing or broken.
        """
        parts, _ = read_parts(folder)
        return cls(
            TextEncoder(parts["text_encoder"].to(device), parts["tokenizer"]),
            ImageEncoder(parts["image_encoder"].to(device), parts["feature_extractor"]),
        )

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Embeddings [num_images, width] as the image encoder gives them, on the CPU."""
        return torch.cat([self.image.encode(images[k : k + 64]).cpu() for k in range(0, len(images), 64)])

    def look(self, images: Sequence[Image.Image]) -> Tensor:
        """Normalised embeddings [num_images, width]."""
        return F.normalize(self.embed(images), dim=-1)

    @torch.no_grad()
    def read(self, captions: Sequence[str]) -> Tensor:
        """Normalised embeddings [num_captions, width]."""
        parts = [self.text.encode(captions[k : k + 256]).embeds.cpu() for k in range(0, len(captions), 256)]
        return F.normalize(torch.cat(parts), dim=-1)


@dataclass(frozen=True)
class Candidates:
    """The captions that a judge chooses from, each once, with its embeddings of them [num_captions, width]."""

    captions: list[str]
    known: Tensor

    @classmethod
    def read_by(cls, judge: Judge, captions: Sequence[str]) -> "Candidates":
        """Have a judge read them."""
        once = list(dict.fromkeys(captions))
        return cls(once, judge.read(once))

    def places(self, features: Tensor, asked: Sequence[str]) -> Tensor:
        """For each picture the place (0 is first) of the caption that was asked for."""
        return ranks(features, self._rows(asked), self.known)

    def rates(self, features: Tensor, asked: Sequence[str]) -> dict[str, float]:
        """How often a picture's own caption comes first and among five, and its mean cosine (CLIP score).

        Args:
            features: the judge's embeddings of pictures [num_images, width], normalised.
            asked: a caption for each, one of the candidates.
        """
        places = self.places(features, asked)
        found = {f"at_{k}": round((places < k).float().mean().item(), 4) for k in (1, 5)}
        score = (features * self.known[self._rows(asked)]).sum(dim=1).mean()
        return found | {"clip_score": round(score.item(), 4)}

    def chance(self) -> dict[str, float]:
        """What a judge that guesses would find."""
        count = len(self.captions)
        return {"chance_at_1": 1 / count, "chance_at_5": min(1.0, 5 / count)}

    def _rows(self, asked: Sequence[str]) -> list[int]:
        rows = {caption: row for row, caption in enumerate(self.captions)}
        return [rows[caption] for caption in asked]


def ranks(images: Tensor, own: Sequence[int], captions: Tensor) -> Tensor:
    """For each picture the place (0 is first) of its own caption among all, by the cosine of embeddings.

    Another caption of the same score comes first, and so does every other one where a score is not a number: a judge
    that sees no difference finds nothing.

    Args:
        images: [num_images, width], normalised.
        own: for each picture the row of its caption.
        captions: [num_captions, width], normalised; each caption once.
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
    """Retrieval at 1 and at 5 among all concepts' bare captions, for generated and for real pictures.

    Seen concepts are drawn by the weight with which they were trained; held-out ones are all taken unless
    `num_held_out` says otherwise. In a data set of composed pictures every distinct caption ("a cat left of a star")
    counts as a concept.

    Args:
        pipeline: the model.
        judge: a CLIP that had no part in it.
        data: a data set of concepts, or of composed pictures.
        num_seen: how many trained concepts; fewer if there are fewer.
        num_held_out: how many held-out ones; None takes all.
        batch_size: pictures a call.
        seed: of the choice, and of the first picture of each group.
        sheet: where to draw the generated pictures beside the real ones, with captions (`-seen.png`, `-held-out.png`
            are appended).
        features: another space in which the distance of the generated from the real pictures is told.
        progress: wraps the starts of the batches, as tqdm does.
        call: arguments of the pipeline's call.

    Returns: for "seen" and "held_out": the number, how they were chosen, the first and last seed, at_1, at_5 and
        clip_score of generated and real pictures (none for a group of none), for composed captions the same by kind,
        and the distance between the two sets in the judge's space (and in `features`); how many held-out concepts
        there are in all, and how many of them were left out; and chance.

    Raises:
        InputError: a number is out of its limits.
        DataError: the data set cannot be used.
    """
    check_counts(batch_size=batch_size)
    exam = Exam.prepare(data, num_seen=num_seen, num_held_out=num_held_out, seed=seed)
    candidates = Candidates.read_by(judge, exam.captions)
    result: dict[str, Any] = {
        "captions": "composed" if exam.composed else "concepts",
        "num_captions": len(candidates.captions),
        **candidates.chance(),
        **exam.left_out(),
    }
    for name in exam.groups:
        result[name] = exam.about(name)
        asked = exam.asked(name)
        if not asked:
            continue
        result[name]["seeds"] = [seed, seed + len(asked) - 1]
        real = exam.pictures(name)
        made: list[Image.Image] = []
        for rows, seeds in batches(len(asked), batch_size, seed=seed, progress=progress):
            made += pipeline(asked[rows], seed=seeds, **call).images  # pyright: ignore
        looked = {"generated": judge.look(made), "real": judge.look(real)}
        result[name] |= {kind: candidates.rates(seen, asked) for kind, seen in looked.items()}
        if exam.composed:
            result[name]["kinds"] = by_kind(candidates, looked, asked)
        featured = (features.look(made), features.look(real)) if features is not None else None
        result[name] |= distances((looked["generated"], looked["real"]), features, featured)
        if sheet is not None:
            draw_cards(real, made, asked, sheet_path(sheet, name))
    return result


def by_kind(candidates: Candidates, looked: dict[str, Tensor], asked: Sequence[str]) -> dict[str, Any]:
    """The number and the rates of each kind of composed caption: "colour", "scene on background", …

    Args:
        candidates: what the judge chooses from.
        looked: its embeddings of pictures [num_images, width], by what they are ("generated", "real").
        asked: a caption for each picture.
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
    """One variation of a real picture of each concept: retrieval of its caption, and how far it is from the picture.

    Args:
        pipeline: the model.
        judge: a CLIP that had no part in it.
        data: a data set; concepts are chosen as for `retrieval`.
        num_seen: how many trained concepts; fewer if there are fewer.
        num_held_out: how many held-out ones; None takes all.
        batch_size: pictures a call.
        seed: of the choice, and of the first picture of each group.
        sheet: where to draw pictures above their variations (`-seen.png`, `-held-out.png` are appended).
        progress: wraps the starts of the batches, as tqdm does.
        call: arguments of the pipeline's call.

    Returns: for "seen" and "held_out": the number; at_1, at_5 and clip_score of the variations and of the real
        pictures; `similarity`, the mean cosine of a variation and its picture in the judge's space, and that to all
        other pictures; `pixel_difference`, the mean absolute difference of pixels in [0, 1].

    Raises: InputError when a number is out of its limits; DataError when the data set cannot be used.
    """
    check_counts(batch_size=batch_size)
    exam = Exam.prepare(data, num_seen=num_seen, num_held_out=num_held_out, seed=seed)
    candidates = Candidates.read_by(judge, exam.captions)
    result: dict[str, Any] = {"num_captions": len(candidates.captions), **exam.left_out()}
    for name, group in exam.groups.items():
        result[name] = {"num": len(group)}
        if not group:
            continue
        real, asked = exam.pictures(name), exam.asked(name)
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
