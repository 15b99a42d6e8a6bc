"""Retrieval by a judge: does a CLIP that had no part in it find the caption again that a picture was made from?

Knows pipelines, pictures and the judge; knows no training. Called by `unclip evaluate`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unclip.data.folder import Record, read_records
from unclip.errors import DataError, InputError
from unclip.evaluation.distances import frechet_distance, kernel_distance
from unclip.images import grid, open_image
from unclip.pipelines.component import read_component
from unclip.pipelines.text_to_image import UnCLIPPipeline
from unclip.stages.encoders import ImageEncoder, TextEncoder

PLAIN_STYLE = "flat"
"""The unmarked style of the emoji set: its plain captions are bare labels."""
DRAWN = {
    "seen": "by training weight, each concept once at most",
    "held_out": "all that exist in the unmarked style",
}
"""How the concepts of a group are chosen, as the report says it."""


@dataclass(frozen=True)
class Judge:
    """A CLIP that ranks captions for a picture."""

    text: TextEncoder
    image: ImageEncoder

    @classmethod
    def load(cls, folder: Path) -> "Judge":
        """Read `text_encoder`, `tokenizer`, `image_encoder` and `feature_extractor` from a folder."""

        def part(name: str, class_name: str) -> Any:
            return read_component(folder, name, class_name, torch_dtype=None, variant=None)

        text = TextEncoder(part("text_encoder", "CLIPTextModelWithProjection"), part("tokenizer", "CLIPTokenizer"))
        image = ImageEncoder(
            part("image_encoder", "CLIPVisionModelWithProjection"), part("feature_extractor", "CLIPImageProcessor")
        )
        return cls(text, image)

    @torch.no_grad()
    def look(self, images: Sequence[Image.Image]) -> Tensor:
        """Normalised embeddings [num_images, width]."""
        parts = [self.image.encode(images[k : k + 64]) for k in range(0, len(images), 64)]
        return F.normalize(torch.cat(parts), dim=-1)

    @torch.no_grad()
    def read(self, captions: Sequence[str]) -> Tensor:
        """Normalised embeddings [num_captions, width]."""
        parts = [self.text.encode(captions[k : k + 256]).embeds for k in range(0, len(captions), 256)]
        return F.normalize(torch.cat(parts), dim=-1)


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


def concepts_of(records: Sequence[Record], plain_style: str = PLAIN_STYLE) -> list[Record]:
    """One record a concept, and its bare caption alone: that of the plain style, or the first without the style's name.

    A record without a concept is one of its own.
    """
    found: dict[str, Record] = {}
    for place, record in enumerate(records):
        key = record.concept or f"#{place}"
        if key not in found or (record.style == plain_style != found[key].style):
            found[key] = record
    return list(found.values())


def bare_caption(record: Record, plain_style: str = PLAIN_STYLE) -> str:
    """The plain caption, without the name of a style that is not the plain one."""
    caption = record.captions[0]
    return caption if record.style == plain_style else caption.removesuffix(f", {record.style} style")


@dataclass(frozen=True)
class Exam:
    """What the judge is asked: which concepts, and among which captions it chooses.

    Attributes:
        concepts: all of the data set.
        groups: those asked for, "seen" and "held_out".
        captions: the bare captions of all concepts, each once; `known` are the judge's embeddings of them.
    """

    concepts: list[Record]
    groups: dict[str, list[Record]]
    captions: list[str]
    known: Tensor

    @classmethod
    def prepare(cls, judge: Judge, data: Path, *, num_seen: int, batch_size: int, seed: int) -> "Exam":
        """Raises: InputError when a number is below 1; DataError when the data set cannot be used."""
        for name, count in (("num_seen", num_seen), ("batch_size", batch_size)):
            if count < 1:
                raise InputError(f"{name} is {count}; it must be at least 1")
        concepts = concepts_of(read_records(data))
        captions = list(dict.fromkeys(bare_caption(record) for record in concepts))
        return cls(concepts, _groups(concepts, num_seen, seed), captions, judge.read(captions))

    def rates(self, features: Tensor, group: Sequence[Record]) -> dict[str, float]:
        """How often a picture's own caption comes first and among five, and its mean cosine (CLIP score)."""
        rows = {caption: row for row, caption in enumerate(self.captions)}
        own = [rows[bare_caption(record)] for record in group]
        places = ranks(features, own, self.known)
        found = {f"at_{k}": round((places < k).float().mean().item(), 4) for k in (1, 5)}
        score = (features * self.known[own]).sum(dim=1).mean()
        return found | {"clip_score": round(score.item(), 4)}


def retrieval(
    pipeline: UnCLIPPipeline,
    judge: Judge,
    data: Path,
    *,
    num_seen: int = 200,
    batch_size: int = 16,
    seed: int = 0,
    sheet: Path | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    **call: Any,
) -> dict[str, Any]:
    """Retrieval at 1 and at 5 among all concepts' bare captions, for generated and for real pictures.

    Asked for are concepts that exist in the plain style (all of them, in a data set without it): the others were never
    drawn without naming a style. But their captions stand among those that the judge chooses from. Seen concepts are
    drawn by the weight with which they were trained; held-out ones are all taken.

    Args:
        pipeline: the model.
        judge: a CLIP that had no part in it.
        data: the emoji data set.
        num_seen: how many trained concepts; fewer if there are fewer.
        batch_size: pictures a call.
        seed: of the choice, and of the first picture of each group.
        sheet: where to draw the generated pictures (`-seen.png`, `-held-out.png` are appended).
        progress: wraps the starts of the batches, as tqdm does.
        call: arguments of the pipeline's call.

    Returns: for "seen" and "held_out": the number, how they were chosen, the first and last seed, at_1, at_5 and
        clip_score of generated and real pictures (none for a group of none), and the distance between the two sets in
        the judge's space; how many held-out concepts there are in all, and how many of them were left out; and chance.

    Raises:
        InputError: `num_seen` or `batch_size` is below 1.
        DataError: the data set cannot be used.
    """
    exam = Exam.prepare(judge, data, num_seen=num_seen, batch_size=batch_size, seed=seed)
    num_captions = len(exam.captions)
    result: dict[str, Any] = {
        "num_captions": num_captions,
        "chance_at_1": 1 / num_captions,
        "chance_at_5": min(1.0, 5 / num_captions),
    }
    for name, group in exam.groups.items():
        result[name] = {"num": len(group), "drawn": DRAWN[name]}
        if name == "held_out":
            in_all = sum(record.held_out for record in exam.concepts)
            result[name] |= {"num_in_all": in_all, "num_without_plain_style": in_all - len(group)}
        if not group:
            continue
        result[name]["seeds"] = [seed, seed + len(group) - 1]
        asked = [bare_caption(record) for record in group]
        made: list[Image.Image] = []
        for start in progress(range(0, len(group), batch_size)):
            part = asked[start : start + batch_size]
            made += pipeline(part, seed=[seed + start + i for i in range(len(part))], **call).images  # pyright: ignore
        real = [open_image(data / record.file_name) for record in group]
        looked = {"generated": judge.look(made), "real": judge.look(real)}
        result[name] |= {kind: exam.rates(features, group) for kind, features in looked.items()}
        if len(group) > 1:
            result[name]["distance"] = {
                "space": "the judge's image embeddings",
                "frechet": round(frechet_distance(*looked.values()), 4),
                "kernel": round(kernel_distance(*looked.values()), 6),
            }
        if sheet is not None:
            sheet.parent.mkdir(parents=True, exist_ok=True)
            columns = min(16, math.ceil(math.sqrt(len(made))))
            grid(made, columns=columns).save(sheet.with_name(f"{sheet.name}-{name.replace('_', '-')}.png"))
    return result


def _groups(concepts: Sequence[Record], num_seen: int, seed: int) -> dict[str, list[Record]]:
    """Which concepts are asked for: "seen" drawn by weight, "held_out" all; both of the plain style if there is one."""
    plain = [record for record in concepts if record.style == PLAIN_STYLE] or list(concepts)
    seen = [record for record in plain if not record.held_out and record.weight > 0]
    if not seen:
        raise DataError("the data set has no concept that a model could have been trained on")
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor([record.weight for record in seen], dtype=torch.float64)
    drawn = torch.multinomial(weights, min(num_seen, len(seen)), generator=generator).tolist()
    return {"seen": [seen[i] for i in drawn], "held_out": [record for record in plain if record.held_out]}
