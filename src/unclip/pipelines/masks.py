"""Pictures and masks for inpainting, at the size of the result."""

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
"""Radius of the Lanczos kernel, in pixels of the smaller picture."""
LEAST_WEIGHT = 0.5
"""The sum of the kept pixels' Lanczos weights below which bilinear weights are used instead."""


@dataclass(frozen=True)
class MaskedPictures:
    """Pictures of one size, and the region of them to replace.

    Attributes:
        originals: the given pictures, upright and in RGB.
        x0: float32 [batch, 3, height, width] in [-1, 1], at the result's size.
        region: bool [batch, 1, height, width], true where the picture is replaced; None: everywhere.
        transparent: the given pictures, upright and in RGBA, that have transparency, a mask and the result's size; None
            for the others.
    """

    originals: list[Image.Image]
    x0: Tensor
    region: Tensor | None
    transparent: list[Image.Image | None]

    def repeat(self, rows: int, count: int, device: torch.device) -> "MaskedPictures":
        """On a device, for `rows` prompts with `count` pictures each; one picture serves all prompts."""

        def spread(tensor: Tensor) -> Tensor:
            return tensor.to(device).expand(rows, -1, -1, -1).repeat_interleave(count, dim=0)

        region = None if self.region is None else spread(self.region)
        return MaskedPictures(self.originals, spread(self.x0), region, self.transparent)

    def with_transparency(self, images: list[Image.Image]) -> list[Image.Image]:
        """Results, one for each row, with the given picture's pixels outside the region, in RGBA.

        The region is opaque. Results for pictures without transparency, or of another size, do not change.
        """
        if self.region is None:
            return images
        each = len(images) // len(self.transparent)
        given = [picture for picture in self.transparent for _ in range(each)]
        return [
            image if own is None else _pasted(image, own, region[0])
            for image, own, region in zip(images, given, self.region.cpu(), strict=True)
        ]

    def at(self, size: Size) -> tuple[Tensor, Tensor | None]:
        """The pictures at a stage's size, and a mask that is true for pixels entirely outside the region."""
        if size == tuple(self.x0.shape[2:]):
            return self.x0, None if self.region is None else ~self.region
        x0 = F.interpolate(self.x0, size=size, mode="area")
        return x0, None if self.region is None else ~_touched(self.region, size)


def read_pictures(image: Any, mask_image: Any, fit: Callable[[Size], Size]) -> MaskedPictures:
    """Check and resize the pictures and masks of a call.

    Args:
        image: as `as_pictures` takes it.
        mask_image: the masks, of their pictures' sizes; or one for all; or None.
        fit: the result's height and width for a picture's height and width.

    Raises: ImageError for a picture or a mask that cannot be used; InputError for pictures whose results would have
        different sizes.
    """
    pictures = as_pictures(image)
    masks = [None] * len(pictures) if mask_image is None else as_pictures(mask_image, "mask_image", are_masks=True)
    if len(masks) not in (1, len(pictures)):
        raise InputError(f"there are {len(masks)} masks for {len(pictures)} pictures; give one, or one for each")
    masks = masks * len(pictures) if len(masks) == 1 else masks
    originals = [rgb(picture) for picture in pictures]
    sizes = {fit((original.height, original.width)) for original in originals}
    if len(sizes) > 1:
        some = ", ".join(f"{width}×{height}" for height, width in sorted(sizes))
        raise InputError(
            f"these pictures have different shapes (their results would be {some}); give height and "
            "width, or one picture at a time"
        )
    size = sizes.pop()
    regions = [drawn_region(*pair) for pair in zip(pictures, masks, strict=True)]
    found = [_touched(region[None, None], size) for region in regions if region is not None]
    if 0 < len(found) < len(regions):
        raise InputError("some of these pictures have transparency and others do not; give mask_image for all")
    given = list(zip(pictures, originals, masks, regions, strict=True))
    shown = [_from_kept(one, region, size) if mask is None else resized(one, size) for _, one, mask, region in given]
    transparent = [None if mask is None else _transparent(picture, size) for picture, _, mask, _ in given]
    x0 = torch.stack([to_tensor(picture) for picture in shown])
    return MaskedPictures(originals, x0, torch.cat(found) if found else None, transparent)


def drawn_region(picture: Image.Image, mask: Image.Image | None) -> Tensor | None:
    """The region that a mask marks: bool [height, width], true where the picture is replaced; None without a mask.

    A mask with transparency marks its fully transparent pixels (as in the DALL·E 2 edits API); one without marks its
    white pixels. Without a mask, the region is where the picture itself is not opaque: half-transparent pixels, as at
    the border of a soft eraser, have lost half their colour. An alpha channel that is opaque everywhere counts as no
    transparency.

    Raises: ImageError for a mask that marks nothing, or of another size than its picture.
    """
    transparency = alpha(picture if mask is None else mask)
    if transparency is not None and not _is_opaque(transparency):
        region = np.asarray(transparency) < (255 if mask is None else 1)
        remedy = "has no fully transparent pixels: make the part to replace fully transparent"
    elif mask is None:
        return None
    else:
        region = np.asarray(rgb(mask).convert("L")) >= 128
        remedy = "has no white pixels: paint the part to replace white, or make it transparent"
    if mask is not None and region.shape != (upright := rgb(picture)).size[::-1]:
        raise ImageError(
            f"the mask is {region.shape[1]}×{region.shape[0]} pixels, its picture {upright.width}×{upright.height}; "
            "they must have the same size"
        )
    if not region.any():
        raise ImageError(f"the {'picture' if mask is None else 'mask'} {remedy}")
    return torch.from_numpy(region)


def resized(picture: Image.Image, size: Size) -> Image.Image:
    """A picture at height and width `size`; one that already has this size does not change."""
    height, width = size
    return picture if picture.size == (width, height) else picture.resize((width, height), Image.Resampling.LANCZOS)


def _from_kept(picture: Image.Image, region: Tensor | None, size: Size) -> Image.Image:
    """As `resized`, but pixels under `region` (bool [height, width]) do not change the pixels beside it.

    Pixels under the region have weight 0, and the other weights are normalised to a sum of 1 (as with premultiplied
    alpha). Where too little of the Lanczos weights is left, some of which are negative, bilinear weights are used.
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


def _transparent(picture: Image.Image, size: Size) -> Image.Image | None:
    """The picture in RGBA, upright, if it has transparency and this size."""
    found = rgba(picture)
    fits = found is not None and found.size == size[::-1] and not _is_opaque(found.getchannel("A"))
    return found if fits else None


def _pasted(image: Image.Image, own: Image.Image, region: Tensor) -> Image.Image:
    """`own`, in RGBA, with `image` under the region (bool [height, width])."""
    drawn = region[..., None].numpy()
    return Image.fromarray(np.where(drawn, np.asarray(image.convert("RGBA")), np.asarray(own)))


def _touched(region: Tensor, size: Size) -> Tensor:
    """A region [batch, 1, h, w] at another size: true for pixels of which any part is inside."""
    return F.adaptive_max_pool2d(region.float(), size) > 0
