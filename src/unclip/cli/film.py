"""Frames to a film: GIF and WebP by Pillow, MP4 by PyAV where it is installed.

Knows files of moving pictures; knows no model. Called by the commands that make frames.
"""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unclip.errors import MissingDependencyError

if TYPE_CHECKING:
    from PIL.Image import Image


class FilmKind(StrEnum):
    """What a film may be."""

    gif = "gif"
    webp = "webp"
    mp4 = "mp4"


Film = Annotated[
    FilmKind | None,
    typer.Option("--film", metavar="KIND", help="Also write the frames as a film: gif, webp or mp4 (needs PyAV)."),
]
FPS = Annotated[float, typer.Option("--fps", min=0.5, max=50, metavar="N", help="Frames a second of the film.")]


def check_writer(kind: FilmKind | None) -> None:
    """Raises: MissingDependencyError when there is nothing that writes this kind, before anything is computed."""
    if kind is FilmKind.mp4:
        try:
            import av  # noqa: F401  # type: ignore[import-not-found]
        except ImportError as problem:
            raise MissingDependencyError(
                "an MP4 film needs PyAV: pip install av; or take --film gif or --film webp, which need nothing"
            ) from problem


def film_writer(kind: FilmKind, frames: "list[Image]", fps: float) -> Callable[[Path], None]:
    """Writes the frames, there and back again, as a loop that begins and ends at the first."""
    loop = [*frames, *frames[-2:0:-1]]
    return {FilmKind.gif: _gif, FilmKind.webp: _webp, FilmKind.mp4: _mp4}[kind](loop, fps)


def _gif(frames: "list[Image]", fps: float) -> Callable[[Path], None]:
    from PIL import Image

    # One palette for all frames: with one each, still parts would change their colours from frame to frame.
    strip = Image.new("RGB", (frames[0].width, frames[0].height * len(frames)))
    for place, frame in enumerate(frames):
        strip.paste(frame, (0, place * frame.height))
    palette = strip.quantize(255)
    drawn = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    return lambda path: drawn[0].save(
        path, format="GIF", save_all=True, append_images=drawn[1:], duration=round(1000 / fps), loop=0
    )


def _webp(frames: "list[Image]", fps: float) -> Callable[[Path], None]:
    return lambda path: frames[0].save(
        path, format="WEBP", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0, quality=90
    )


def _mp4(frames: "list[Image]", fps: float) -> Callable[[Path], None]:
    from fractions import Fraction

    def write(path: Path) -> None:
        import av  # type: ignore[import-not-found]

        with av.open(str(path), "w", format="mp4") as container:
            stream = container.add_stream("h264", rate=Fraction(fps).limit_denominator(1000))
            stream.width, stream.height = (side - side % 2 for side in frames[0].size)
            stream.pix_fmt = "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_image(frame)))
            container.mux(stream.encode())

    return write
