"""Pictures to be edited: what is drawn anew and what stays, at one size.

Knows pictures, masks and sizes; knows no component. Called by the inpainting pipeline.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unclip.errors import ImageError, InputError
from unclip.images import alpha, as_pictures, rgb, rgba, to_tensor
from unclip.stages.stage import Size

LANCZOS_REACH = 3
"""Pixels to either side, of the smaller picture, that count for a resized one."""
LEAST_WEIGHT = 0.5
"""Of the pixels around, below which a mean of those that count is no longer to be trusted."""


@dataclass(frozen=True)
class Edited:
    """Pictures of one size, and what of them is drawn anew.

    Attributes:
        originals: as they were given, upright and in RGB.
        x0: float32 [batch, 3, height, width] in [-1, 1], at the result's size.
        drawn: bool [batch, 1, height, width], true where the picture is drawn anew; None: everywhere.
        seen_through: as given, upright and in RGBA, those that have transparency beside a mask, and the result's size;
            None for the others.
    """

    originals: list[Image.Image]
    x0: Tensor
    drawn: Tensor | None
    seen_through: list[Image.Image | None]

    def repeat(self, rows: int, count: int, device: torch.device) -> "Edited":
        """On a device, for `rows` prompts with `count` pictures each; one picture serves all prompts."""

        def spread(tensor: Tensor) -> Tensor:
            return tensor.to(device).expand(rows, -1, -1, -1).repeat_interleave(count, dim=0)

        drawn = None if self.drawn is None else spread(self.drawn)
        return Edited(self.originals, spread(self.x0), drawn, self.seen_through)

    def transparent_again(self, images: list[Image.Image]) -> list[Image.Image]:
        """Results, as many as rows, of which each has its picture's own pixels outside what was drawn, in RGBA.

        What was drawn is opaque. Of pictures without transparency, or of another size, the results are as they were.
        """
        if self.drawn is None:
            return images
        each = len(images) // len(self.seen_through)
        given = [picture for picture in self.seen_through for _ in range(each)]
        return [
            image if own is None else _pasted(image, own, region[0])
            for image, own, region in zip(images, given, self.drawn.cpu(), strict=True)
        ]

    def at(self, size: Size) -> tuple[Tensor, Tensor | None]:
        """The picture at a stage's size, and what is kept there: pixels of which no part is drawn anew."""
        if size == tuple(self.x0.shape[2:]):
            return self.x0, None if self.drawn is None else ~self.drawn
        x0 = F.interpolate(self.x0, size=size, mode="area")
        return x0, None if self.drawn is None else ~_touched(self.drawn, size)


def read_edited(image: Any, mask_image: Any, fit: Callable[[Size], Size]) -> Edited:
    """Check and resize the pictures of a call.

    Args:
        image: as `as_pictures` takes it.
        mask_image: the same for masks, of their pictures' sizes; or one for all; or None.
        fit: the result's height and width for a picture of a height and width.

    Raises: ImageError for a picture or a mask that cannot be used, InputError for pictures that would get different
        sizes.
    """
    pictures = as_pictures(image)
    masks = [None] * len(pictures) if mask_image is None else as_pictures(mask_image, "mask_image", are_masks=True)
    if len(masks) not in (1, len(pictures)):
        raise InputError(f"there are {len(masks)} masks for {len(pictures)} pictures; give one, or one for each")
    originals = [rgb(picture) for picture in pictures]
    sizes = {fit((original.height, original.width)) for original in originals}
    if len(sizes) > 1:
        some = ", ".join(f"{width}×{height}" for height, width in sorted(sizes))
        raise InputError(
            f"these pictures have different shapes (they would become {some}); give height and width, or one at a time"
        )
    size = sizes.pop()
    masks = masks * len(pictures) if len(masks) == 1 else masks
    drawn = [drawn_region(*pair) for pair in zip(pictures, masks, strict=True)]
    if any(region is None for region in drawn) and not all(region is None for region in drawn):
        raise InputError("some of these pictures have transparency and others have not; give mask_image for all")
    regions = [_touched(region[None, None], size) for region in drawn if region is not None]
    given = zip(originals, drawn, masks, strict=True)
    shown = [_from_kept(one, region, size) if mask is None else resized(one, size) for one, region, mask in given]
    x0 = torch.stack([to_tensor(picture) for picture in shown])
    pairs = zip(pictures, masks, strict=True)
    seen_through = [None if mask is None else _seen_through(picture, size) for picture, mask in pairs]
    return Edited(originals, x0, torch.cat(regions) if regions else None, seen_through)


def drawn_region(picture: Image.Image, mask: Image.Image | None) -> Tensor | None:
    """What a mask marks: bool [height, width], true where the picture is to be drawn anew; None without any mask.

    In a mask with transparency, that is where it is fully transparent (as in the DALL·E 2 edits API); in one without,
    where it is white rather than black. Without a mask it is where the picture itself is not opaque: what is half
    transparent, as at the border of a soft eraser, has half lost its colour. An alpha channel that is opaque
    everywhere, as many editors write it, is no transparency.

    Raises: ImageError for a mask that marks nothing, or of another size than its picture.
    """
    transparency = alpha(picture if mask is None else mask)
    if transparency is not None and not _is_opaque(transparency):
        region = np.asarray(transparency) < (255 if mask is None else 1)
        how = "is transparent nowhere: make what should be drawn anew fully transparent"
    elif mask is None:
        return None
    else:
        region = np.asarray(rgb(mask).convert("L")) >= 128
        how = "is white nowhere: paint what should be drawn anew white, or make it transparent"
    if mask is not None and region.shape != (upright := rgb(picture)).size[::-1]:
        raise ImageError(
            f"the mask is {region.shape[1]}×{region.shape[0]} pixels, its picture {upright.width}×{upright.height}; "
            "they must be of one size"
        )
    if not region.any():
        raise ImageError(f"the {'picture' if mask is None else 'mask'} {how}")
    return torch.from_numpy(region)


def resized(picture: Image.Image, size: Size) -> Image.Image:
    """A picture at height and width `size`: the very same pixels where it has that size already."""
    height, width = size
    return picture if picture.size == (width, height) else picture.resize((width, height), Image.Resampling.LANCZOS)


def _from_kept(picture: Image.Image, region: Tensor | None, size: Size) -> Image.Image:
    """As `resized`, but what lies under `region` (bool [height, width]) is mixed into no pixel beside it.

    Pixels under the region weigh nothing, and the others' weights are brought to a sum of 1 (as when colours are
    multiplied by alpha first). Where too much of Lanczos' weights, of which some are below 0, is lost, bilinear ones
    take their place.
    """
    plain = resized(picture, size)
    if region is None or plain is picture:
        return plain
    height, width = size
    kept = (~region).numpy().astype(np.float32)

    def spread(values: np.ndarray, how: Image.Resampling) -> np.ndarray:
        return np.asarray(Image.fromarray(values).resize((width, height), how))

    lanczos, bilinear = Image.Resampling.LANCZOS, Image.Resampling.BILINEAR
    weights = {how: spread(kept, how) for how in (lanczos, bilinear)}
    channels = []
    for channel in plain.getbands():
        values = np.asarray(picture.getchannel(channel), dtype=np.float32) * kept
        means = {how: spread(values, how) / np.maximum(weight, 1e-6) for how, weight in weights.items()}
        channels.append(np.where(weights[lanczos] >= LEAST_WEIGHT, means[lanczos], means[bilinear]))
    mixed = np.stack(channels, axis=-1).clip(0, 255).round().astype(np.uint8)
    drawn = _touched(region[None, None], size)
    reach = [LANCZOS_REACH * max(1, -(-new // old)) + 1 for new, old in zip(size, region.shape, strict=True)]
    near = F.max_pool2d(drawn.float(), [2 * each + 1 for each in reach], stride=1, padding=reach) > 0
    return Image.fromarray(np.where((near & ~drawn)[0, 0, :, :, None], mixed, np.asarray(plain)))


def _is_opaque(transparency: Image.Image) -> bool:
    return transparency.getextrema() == (255, 255)


def _seen_through(picture: Image.Image, size: Size) -> Image.Image | None:
    """A picture in RGBA, upright, if it has transparency and that size."""
    found = rgba(picture)
    fits = found is not None and found.size == size[::-1] and not _is_opaque(found.getchannel("A"))
    return found if fits else None


def _pasted(image: Image.Image, own: Image.Image, region: Tensor) -> Image.Image:
    """`own`, in RGBA, with `image` under the region (bool [height, width])."""
    drawn = region[..., None].numpy()
    return Image.fromarray(np.where(drawn, np.asarray(image.convert("RGBA")), np.asarray(own)))


def _touched(region: Tensor, size: Size) -> Tensor:
    """A region [batch, 1, h, w] at another size: true where any part of a pixel is in it."""
    return F.adaptive_max_pool2d(region.float(), size) > 0
