"""What is embedded once is not embedded again, and nothing that lies in the cache can do harm."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unclip.data.folder import CaptionedPictures, Record
from unclip.training import embedding_cache as module
from unclip.training.conditions import FrozenClip
from unclip.training.embedding_cache import MIN_PICTURES, cache_folder, cached_embeddings

WIDTH = 4


class Encoder:
    def __init__(self):
        self.seen = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return images.flatten(1)[:, :WIDTH] * 2


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "unclip" / "embeddings"


def some(count: int = MIN_PICTURES, seed: int = 0) -> CaptionedPictures:
    pixels = torch.randint(256, (count, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return CaptionedPictures([Record(f"{i}.png", ("a dot",)) for i in range(count)], pixels)


def test_a_second_run_reads_what_the_first_computed(empty_cache):
    encoder, pictures = Encoder(), some()
    first = cached_embeddings(pictures, encoder, "a")
    assert encoder.seen == len(pictures)
    assert [path.suffix for path in empty_cache.iterdir()] == [".safetensors"]
    assert torch.equal(cached_embeddings(pictures, encoder, "a"), first)
    assert encoder.seen == len(pictures)


def test_other_pictures_and_another_encoder_are_embedded(empty_cache):
    encoder = Encoder()
    first = cached_embeddings(some(), encoder, "a")
    assert not torch.equal(cached_embeddings(some(seed=1), encoder, "a"), first)
    cached_embeddings(some(), encoder, "b")
    assert encoder.seen == 3 * MIN_PICTURES


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"junk",
        {"embeddings": torch.zeros(3, WIDTH)},
        {"embeddings": torch.full((MIN_PICTURES, WIDTH), torch.nan)},
        {"other": torch.zeros(1)},
    ],
)
def test_a_damaged_file_is_made_anew(empty_cache, content):
    encoder = Encoder()
    first = cached_embeddings(some(), encoder, "a")
    (path,) = empty_cache.iterdir()
    path.write_bytes(content) if isinstance(content, bytes) else module.save_file(content, path)
    assert torch.equal(cached_embeddings(some(), encoder, "a"), first)
    assert encoder.seen == 2 * MIN_PICTURES
    cached_embeddings(some(), encoder, "a")
    assert encoder.seen == 2 * MIN_PICTURES


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    encoder = Encoder()
    for times in (1, 2):
        assert cached_embeddings(some(), encoder, "a").shape == (MIN_PICTURES, WIDTH)
        assert encoder.seen == times * MIN_PICTURES


def test_few_pictures_leave_nothing(empty_cache):
    cached_embeddings(some(MIN_PICTURES - 1), Encoder(), "a")
    assert not empty_cache.exists()


def test_the_cache_lies_in_the_home_folder_by_default(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(cache_folder()) == "/home/somebody/.cache/unclip/embeddings"


def test_progress_is_told(empty_cache):
    told = []

    def progress(parts, **about):
        told.append(about["desc"])
        return parts

    cached_embeddings(some(), Encoder(), "a", progress=progress)
    assert told == ["embedding the pictures"]


def test_another_text_encoder_has_the_same_embeddings(empty_cache, clip_model, tmp_path, monkeypatch):
    size = FrozenClip(clip_model).image_size
    pictures = CaptionedPictures(
        [Record(f"{i}.png", ("a dot",)) for i in range(MIN_PICTURES)], torch.zeros(MIN_PICTURES, 3, size, size).byte()
    )
    other = shutil.copytree(clip_model, tmp_path / "other")
    changed = shutil.copytree(clip_model, tmp_path / "changed")
    for folder, part in ((other, "text_encoder"), (changed, "image_encoder")):
        path = folder / part / "model.safetensors"
        save_file({name: value + 1 for name, value in load_file(path).items()}, path, {"format": "pt"})
    embedded = []
    embed = FrozenClip.embed
    monkeypatch.setattr(FrozenClip, "embed", lambda clip, images: embedded.append(clip) or embed(clip, images))
    first, second, third = (FrozenClip(folder) for folder in (clip_model, other, changed))
    assert first.fingerprint != second.fingerprint
    assert torch.equal(first.embeddings_of(pictures), second.embeddings_of(pictures))
    third.embeddings_of(pictures)
    assert set(embedded) == {first, third}
