"""Conditions: join, repeat, select and move."""

import dataclasses

import pytest
import torch

from unclip.clip.encoders import TextEmbedding
from unclip.stages.stage import DecoderCondition, PriorCondition, SuperResCondition


def text(*rows: int) -> TextEmbedding:
    """A caption's embedding in which every number is that of the row."""
    numbers = torch.tensor(rows, dtype=torch.float32)
    mask = (numbers.long() % 2).bool()
    return TextEmbedding(
        numbers[:, None].expand(-1, 4), numbers[:, None, None].expand(-1, 3, 4), mask[:, None].expand(-1, 3)
    )


def decoder(*rows: int) -> DecoderCondition:
    return DecoderCondition.of(text(*rows), text(*rows).embeds * 10)


MAKERS = {
    "text": text,
    "prior": lambda *rows: PriorCondition(text(*rows)),
    "decoder": decoder,
    "super-resolution": lambda *rows: SuperResCondition(text(*rows).embeds[:, :3, None, None]),
}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


def same(one, other) -> bool:
    for field in dataclasses.fields(one):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        equal = torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else same(mine, theirs)
        if not equal:
            return False
    return type(one) is type(other)


def test_length_and_device(make):
    assert len(make(1, 2, 3)) == 3
    assert make(1).device == torch.device("cpu")


def test_join(make):
    assert same(make(1).join(make(2, 3)), make(1, 2, 3))
    assert same(make(1).join(make(2), make(3)), make(1, 2, 3))
    assert same(make(1).join(), make(1))


def test_repeat_keeps_the_pictures_of_a_prompt_together(make):
    assert same(make(1, 2).repeat(3), make(1, 1, 1, 2, 2, 2))


@pytest.mark.parametrize("rows", [[2, 0, 0], torch.tensor([2, 0, 0])])
def test_select(make, rows):
    assert same(make(1, 2, 3).select(rows), make(3, 1, 1))
    assert same(make(1, 2, 3).select(slice(1, None)), make(2, 3))


def test_to(make):
    moved = make(1, 2).to("meta")
    assert moved.device == torch.device("meta")
    assert len(moved) == 2


def test_frozen(make):
    value = make(1)
    name = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, None)


def test_given_and_null_decoder_conditions():
    given, null = decoder(1, 2), DecoderCondition.null(text(5, 6))
    assert given.given.tolist() == [True, True]
    assert null.given.tolist() == [False, False]
    assert same(null.text, text(5, 6))
    assert null.image_embedding.shape == given.image_embedding.shape
    both = null.join(given)
    assert both.given.tolist() == [False, False, True, True]
