"""Bipartite latents of pictures (image embedding and x_T), and interpolation, edits and probes of them (paper §3)."""

import os
from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from unclip.checkpoints.layout import FURTHER_SUPER_RES
from unclip.checkpoints.tensor_file import read_tensor_file, write_tensor_file
from unclip.errors import ConfigError, InputError, NonFiniteError, WeightsError
from unclip.models.pca import PrincipalComponents
from unclip.numbers import reals, several, whole
from unclip.stages.arithmetic import equal_turns, slerp_path, turn

KIND = "unclip bipartite latent"
VERSION = 1
PARTS = (
    "image_embedding",
    "decoder_latents",
    "super_res_latents",
    *(f"{stage}_latents" for stage in FURTHER_SUPER_RES),
)
"""The tensors in a file, in order; the first two are required."""


@dataclass(frozen=True)
class BipartiteLatent:
    """Pictures as image embeddings and the noise that leads to them (paper §3's z_i and x_T); each row is a picture.

    Attributes:
        image_embedding: float32 [batch, embedding_dim], CLIP's, not normalised.
        decoder_latents: float32 [batch, channels, size, size]: x_T of the decoder.
        super_res_latents: x_T of super-resolution, or None.
        further_latents: x_T of further super-resolution stages, in order.

    Raises:
        ConfigError: the tensors have wrong shapes or different numbers of rows, or a stage's noise is missing before a
            later one.
    """

    image_embedding: Tensor
    decoder_latents: Tensor
    super_res_latents: Tensor | None = None
    further_latents: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        if self.further_latents and self.super_res_latents is None:
            raise ConfigError("a bipartite latent has further_latents, but no super_res_latents before them")
        shapes = [tuple(part.shape) for part in self._parts().values()]
        dims = (2, *[4] * (len(shapes) - 1))
        if any(len(shape) != dim or shape[0] != shapes[0][0] for shape, dim in zip(shapes, dims, strict=True)):
            raise ConfigError(f"a bipartite latent has parts of shapes {shapes}, which do not fit each other")

    def __len__(self) -> int:
        return len(self.image_embedding)

    @property
    def super_res_noise(self) -> tuple[Tensor, ...]:
        """x_T of the super-resolution stages, in order."""
        return () if self.super_res_latents is None else (self.super_res_latents, *self.further_latents)

    def select(self, rows: Sequence[int] | slice) -> Self:
        """The rows of these indices. Raises: InputError for an index out of range."""
        if not isinstance(rows, slice):
            rows = [whole(row, "a row", -len(self), len(self) - 1) for row in rows]
        return self._named({name: part[rows] for name, part in self._parts().items()})

    def join(self, *others: Self) -> Self:
        """These rows and the others', in order, with super-resolution's noise only if all have it.

        Raises: InputError for latents of different sizes.
        """
        every = (self, *others)
        kept = [name for name in self._parts() if all(name in each._parts() for each in every)]
        joined = {}
        for name in kept:
            parts = [each._parts()[name] for each in every]
            if len({part.shape[1:] for part in parts}) > 1:
                raise InputError(f"{name} have different sizes; the latents belong to different models")
            joined[name] = torch.cat(parts)
        return self._named(joined)

    def showing(self, image_embedding: Tensor) -> Self:
        """Other embeddings [count, embedding_dim], all with the noise of this one row.

        Raises: InputError unless this is one row.
        """
        rows = {
            name: part.expand(len(image_embedding), *part.shape[1:])
            for name, part in _one_row(self)._parts().items()
            if name != "image_embedding"
        }
        return self._named({"image_embedding": image_embedding, **rows})

    def save(
        self, path: str | os.PathLike[str], *, about: Mapping[str, str] | None = None, overwrite: bool = False
    ) -> Path:
        """Write a safetensors file with further texts `about`. Raises: as `write_tensor_file`."""
        return write_tensor_file(path, self._parts(), kind=KIND, version=VERSION, about=about, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> tuple[Self, dict[str, str]]:
        """Read a file of `save`: the latent and the texts.

        Raises: as `read_tensor_file`; WeightsError also for shapes that do not match.
        """
        names = {name: name in PARTS[:2] for name in PARTS}
        tensors, about = read_tensor_file(path, kind=KIND, version=VERSION, names=names)
        try:
            return cls._named(tensors), about
        except ConfigError as problem:
            raise WeightsError(f"{path}: {problem}") from problem

    @classmethod
    def of(cls, image_embedding: Tensor, decoder_latents: Tensor, *super_res_noise: Tensor) -> Self:
        """From the embedding, the decoder's noise, and that of any number of super-resolution stages."""
        first = super_res_noise[0] if super_res_noise else None
        return cls(image_embedding, decoder_latents, first, super_res_noise[1:])

    @classmethod
    def _named(cls, parts: Mapping[str, Tensor]) -> Self:
        """From tensors by their names in a file. Raises: ConfigError when one is missing before a later one."""
        names = PARTS[: len(parts)]
        if set(names) != set(parts):
            raise ConfigError(f"a bipartite latent has {', '.join(sorted(parts))}; it must have {', '.join(names)}")
        return cls.of(*(parts[name] for name in names))

    def _parts(self) -> dict[str, Tensor]:
        return dict(zip(PARTS, (self.image_embedding, self.decoder_latents, *self.super_res_noise), strict=False))


def interpolate(latent: BipartiteLatent, num_between: int, *, one_noise: bool = False) -> BipartiteLatent:
    """A path through the rows in equal steps of the angle, in the embedding and the noise (paper §3.2, figure 4).

    Args:
        latent: two rows or more.
        num_between: frames between neighbouring rows, 0 or more.
        one_noise: as in `path_at`.

    Returns: (rows - 1) * (num_between + 1) + 1 rows, with the given ones among them.

    Raises: InputError for one row, or a negative number.
    """
    return path_at(latent, equal_turns(len(latent), num_between), one_noise=one_noise)


def path_at(latent: BipartiteLatent, places: Sequence[float], *, one_noise: bool = False) -> BipartiteLatent:
    """Rows at any places on the path of `interpolate`.

    Args:
        latent: two rows or more.
        places: from 0, the first row, to the index of the last one; see `slerp_path`.
        one_noise: all frames have the first row's noise, so that only the embedding changes. Frames at the other rows
            are not reconstructions then.

    Raises: InputError for one row, or a place outside the path.
    """
    embeddings = slerp_path(latent.image_embedding, places)
    if one_noise:
        return latent.select([0]).showing(embeddings)
    noise = [slerp_path(each, places) for each in (latent.decoder_latents, *latent.super_res_noise)]
    return BipartiteLatent.of(embeddings, *noise)


def edit(latent: BipartiteLatent, direction: Tensor, strengths: float | Sequence[float] | Tensor) -> BipartiteLatent:
    """Turn one picture's embedding towards a direction by several strengths, with its noise (paper §3.3, figure 5).

    Args:
        latent: one row.
        direction: [embedding_dim], a `difference` of two captions' embeddings.
        strengths: theta of each resulting row, from 0 to 1; or one number.

    Raises: InputError unless there is one row, for a direction of another width, or a strength outside [0, 1].
    """
    shares = reals(strengths, "strengths", 0, 1)
    rows = _one_row(latent).image_embedding.expand(len(shares), -1)
    return latent.showing(turn(rows, direction.to(rows.device) if isinstance(direction, Tensor) else direction, shares))


def probe(latent: BipartiteLatent, components: PrincipalComponents, counts: int | Sequence[int]) -> BipartiteLatent:
    """One picture's embedding reduced to its first principal components, with its noise (paper §4, figure 7).

    Args:
        latent: one row.
        components: fitted on the same encoder's embeddings.
        counts: the number of components of each resulting row, from 0 (the mean of all pictures) to all; or one number.

    Raises: InputError unless there is one row, for another width, or counts that are empty or out of range.
    """
    kept = [counts] if (each := several(counts)) is None else each
    if not kept:
        raise InputError("counts are empty; give one or more numbers of components")
    embedding = _one_row(latent).image_embedding
    coordinates = [
        components.project(embedding, whole(count, "counts", 0, components.num_components)) for count in kept
    ]
    return latent.showing(torch.cat([components.reconstruct(each) for each in coordinates]))


def _one_row(latent: BipartiteLatent) -> BipartiteLatent:
    """The latent itself. Raises: InputError unless it is one row."""
    if len(latent) != 1:
        raise InputError(f"there are {len(latent)} rows; select one: latent.select([0])")
    return latent


NUM_DRAWINGS = 2
LEAST_LENGTH = 1e-3
"""The least length of a leg, by `jumps` of pictures in [0, 1]. Below it, 8-bit pictures do not change."""


def even_places(
    latent: BipartiteLatent,
    num_between: int,
    draw: Callable[[BipartiteLatent], Tensor],
    *,
    one_noise: bool = False,
    num_drawings: int = NUM_DRAWINGS,
    batch_size: int = 8,
) -> list[float]:
    """Places for `path_at` at which neighbouring pictures differ by about the same amount.

    In equal steps of the angle, a picture may not change for a while and then change within one step. So the path is
    decoded in equal steps, and frames are placed by the differences of these pictures (`equal_jumps`). The frames at
    these places are decoded too, and all frames are placed again by all known pictures, and so on.

    Args:
        latent: two rows or more, the points of the path.
        num_between: frames between neighbouring rows, 0 or more.
        draw: decodes latents without super-resolution's noise into pictures [batch, ...] in [0, 1], with the settings
            of the final frames: `Manipulator.decode_small`, or a `functools.partial` of it.
        one_noise: as in `path_at`.
        num_drawings: how many times the path is decoded; more are more even. 0 gives equal steps of the angle.
        batch_size: frames that are decoded at once.

    Returns: (rows - 1) * (num_between + 1) + 1 places, with every row among them.

    Raises: InputError for one row, a wrong number, or a `draw` that does not return a picture for each latent;
        NonFiniteError for pictures with NaN or infinity; any error of `draw`.
    """
    num_between, num_drawings = whole(num_between, "num_between", 0), whole(num_drawings, "num_drawings", 0)
    batch_size = whole(batch_size, "batch_size")
    points = BipartiteLatent(latent.image_embedding, latent.decoder_latents)

    def drawn(places: Sequence[float]) -> list[Tensor]:
        pictures: list[Tensor] = []
        for start in range(0, len(places), batch_size):
            batch = path_at(points, places[start : start + batch_size], one_noise=one_noise)
            made = draw(batch)
            if not isinstance(made, Tensor) or len(made) != len(batch):
                raise InputError(f"draw must return a tensor of {len(batch)} pictures, one for each latent")
            pictures += made
        return pictures

    found = equal_turns(len(latent), num_between)
    places: list[float] = []
    pictures: list[Tensor] = []
    for _ in range(num_drawings if num_between else 0):
        new = [place for place in found if place not in places]
        for place, picture in zip(new, drawn(new), strict=True):
            at = bisect(places, place)
            places.insert(at, place)
            pictures.insert(at, picture)
        found = equal_jumps(places, torch.stack(pictures), num_between)
    return found


def equal_jumps(places: Sequence[float], pictures: Tensor, num_between: int) -> list[float]:
    """Places of every point, and of `num_between` frames on each leg that divide it into equal lengths.

    The length of a leg is the sum of `jumps` between its known pictures, and is interpolated linearly between two of
    them; more known pictures give a better result. A leg without a change (`LEAST_LENGTH`) is divided by the angle.

    Args:
        places: of the known pictures, in rising order, with every point among them.
        pictures: [len(places), ...] in [0, 1].
        num_between: 0 or more.

    Raises: NonFiniteError for pictures with NaN or infinity.
    """
    known = list(places)
    ends = [known.index(point) for point in range(round(known[-1]) + 1)]
    way = np.concatenate([[0.0], np.cumsum(jumps(pictures).double().cpu().numpy())])
    if not np.isfinite(way[-1]):
        raise NonFiniteError("the pictures on the path have NaN or infinity")
    found = equal_turns(len(ends), num_between)
    for leg, (start, end) in enumerate(pairwise(ends)):
        if way[end] - way[start] > LEAST_LENGTH:
            marks = np.linspace(way[start], way[end], num_between + 2)[1:-1]
            first = leg * (num_between + 1) + 1
            found[first : first + num_between] = np.interp(marks, way[start : end + 1], known[start : end + 1]).tolist()
    return found


def jumps(pictures: Tensor) -> Tensor:
    """The root mean square differences of neighbouring pictures [count, ...]: [count - 1]."""
    return pictures.float().diff(dim=0).square().flatten(1).mean(dim=1).sqrt()
