"""Retrieval by a judge: does a CLIP that had no part in it find the caption again that a picture was made from?

Knows pipelines, pictures and the judge; knows no training. Called by `unclip evaluate`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unclip.data.folder import Record, read_records
from unclip.pipelines.component import read_component
from unclip.pipelines.text_to_image import UnCLIPPipeline
from unclip.stages.encoders import ImageEncoder, TextEncoder
from unclip.stages.images import grid, open_image


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
    def ranks(self, images: Sequence[Image.Image], own: Sequence[int], captions: Tensor) -> Tensor:
        """For each picture the place (0 is first) of its own caption among all.

        Args:
            images: the pictures.
            own: for each the row of its caption.
            captions: [num_captions, width], normalised, from `read`.
        """
        embeds = torch.cat([self.image.encode(images[k : k + 64]) for k in range(0, len(images), 64)])
        scores = F.normalize(embeds, dim=-1) @ captions.T
        mine = scores.gather(1, torch.tensor(own)[:, None])
        return (scores > mine).sum(dim=1)

    @torch.no_grad()
    def read(self, captions: Sequence[str]) -> Tensor:
        """Normalised embeddings [num_captions, width]."""
        parts = [self.text.encode(captions[k : k + 256]).embeds for k in range(0, len(captions), 256)]
        return F.normalize(torch.cat(parts), dim=-1)


def concepts_of(folder: Path, style: str = "flat") -> list[Record]:
    """One record a concept: that of the unmarked style, whose plain caption is the bare label."""
    return [record for record in read_records(folder) if record.style == style]


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
    """Retrieval at 1 and at 5 among all concepts' captions, for generated and for real pictures.

    Seen concepts are drawn by the weight with which they were trained; held-out ones are all taken.

    Args:
        pipeline: the model.
        judge: a CLIP that had no part in it.
        data: the emoji data set.
        num_seen: how many trained concepts.
        batch_size: pictures a call.
        seed: of the choice, and of the first picture.
        sheet: where to draw the generated pictures (`-seen.png`, `-held-out.png` are appended).
        call: arguments of the pipeline's call.

    Returns: for "seen" and "held_out": the number, and at_1 and at_5 of generated and real pictures; and chance.
    """
    concepts = concepts_of(data)
    captions = judge.read([record.captions[0] for record in concepts])
    seen = [i for i, record in enumerate(concepts) if not record.held_out]
    weights = torch.tensor([concepts[i].weight for i in seen])
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(weights, min(num_seen, len(seen)), generator=generator).tolist()
    groups = {
        "seen": [seen[i] for i in drawn],
        "held_out": [i for i, record in enumerate(concepts) if record.held_out],
    }
    result: dict[str, Any] = {"num_captions": len(concepts), "chance_at_1": 1 / len(concepts), "chance_at_5": 5 / len(concepts)}
    for name, rows in groups.items():
        made: list[Image.Image] = []
        for start in progress(range(0, len(rows), batch_size)):
            part = [concepts[i].captions[0] for i in rows[start : start + batch_size]]
            made += pipeline(part, seed=seed + start, **call).images  # type: ignore[union-attr, arg-type]
        real = [open_image(data / concepts[i].file_name) for i in rows]
        result[name] = {"num": len(rows)}
        for kind, pictures in (("generated", made), ("real", real)):
            ranks = judge.ranks(pictures, rows, captions)
            result[name][kind] = {f"at_{k}": round((ranks < k).float().mean().item(), 4) for k in (1, 5)}
        if sheet is not None:
            grid(made, columns=16).save(sheet.with_name(f"{sheet.name}-{name.replace('_', '-')}.png"))
    return result
