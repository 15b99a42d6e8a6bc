"""Bipartite latents: rows, files, paths, edits and probes."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from unclip import CheckpointError, ConfigError, InputError, OutputExistsError, WeightsError
from unclip.models.pca import PrincipalComponents
from unclip.stages.arithmetic import slerp, turn
from unclip.stages.manipulation import KIND, BipartiteLatent, edit, interpolate, path_at, probe


def latent(rows=2, seed=0, super_res=True):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(rows, 3, 16, 16, generator=generator) if super_res else None
    return BipartiteLatent(
        torch.randn(rows, 16, generator=generator) * 3, torch.randn(rows, 3, 8, 8, generator=generator), wide
    )


def test_rows():
    two, three = latent(2), latent(3, seed=1)
    both = two.join(three)
    assert len(both) == 5
    assert torch.equal(both.select([2]).decoder_latents, three.decoder_latents[:1])
    assert two.join(latent(1, super_res=False)).super_res_latents is None
    assert torch.equal(both.select([-1]).image_embedding, both.select([4]).image_embedding)
    for row in (5, -6):
        with pytest.raises(InputError, match=f"a row is {row}; it must be a whole number from -5 to 4"):
            both.select([0, row])
    with pytest.raises(InputError, match="different models"):
        two.join(BipartiteLatent(torch.ones(1, 12), torch.ones(1, 3, 8, 8)))


@pytest.mark.parametrize(
    "parts",
    [(torch.ones(2, 4), torch.ones(1, 3, 8, 8)), (torch.ones(4), torch.ones(1, 3, 8, 8)), (torch.ones(1, 4),) * 2],
)
def test_parts_that_do_not_fit(parts):
    with pytest.raises(ConfigError, match="do not fit each other"):
        BipartiteLatent(*parts)


def test_noise_of_further_stages_is_kept(tmp_path):
    two = latent(2)
    further = (torch.ones(2, 3, 32, 32), torch.ones(2, 3, 64, 64))
    more = BipartiteLatent(two.image_embedding, two.decoder_latents, two.super_res_latents, further)
    assert [len(one.super_res_noise) for one in (more.select([0]), more.join(more), more.join(two))] == [3, 3, 1]
    assert [noise.shape[-1] for noise in interpolate(more, 1).super_res_noise] == [16, 32, 64]
    assert len(interpolate(more, 1, one_noise=True).super_res_noise) == 3
    read, _ = BipartiteLatent.load(more.save(tmp_path / "x.safetensors"))
    assert len(read.super_res_noise) == 3
    with pytest.raises(ConfigError, match="no super_res_latents"):
        BipartiteLatent(torch.ones(1, 4), torch.ones(1, 3, 8, 8), None, (torch.ones(1, 3, 8, 8),))


@pytest.mark.parametrize("super_res", [False, True])
def test_through_a_file(tmp_path, super_res):
    one = latent(super_res=super_res)
    path = one.save(tmp_path / "cat.safetensors", about={"image": "cat 🐈.png"})
    read, about = BipartiteLatent.load(path)
    assert about == {"image": "cat 🐈.png"}
    assert torch.equal(read.image_embedding, one.image_embedding)
    assert torch.equal(read.decoder_latents, one.decoder_latents)
    assert (read.super_res_latents is not None) == super_res
    with pytest.raises(OutputExistsError):
        one.save(path)


@pytest.mark.parametrize(
    ("tensors", "metadata", "error", "words"),
    [
        ({"decoder_latents": torch.ones(1, 3, 8, 8)}, {}, WeightsError, "lacks image_embedding"),
        ({"decoder_latents": torch.full((1, 3, 8, 8), torch.nan)}, None, WeightsError, "NaN"),
        ({"decoder_latents": torch.ones(2, 3, 8, 8)}, None, WeightsError, "do not fit each other"),
        ({"noise": torch.ones(1)}, None, WeightsError, "has unknown tensors: noise"),
        ({"super_res_2_latents": torch.ones(1, 3, 8, 8)}, None, WeightsError, "must have .*super_res_latents"),
        ({}, {"kind": "unclip principal components"}, CheckpointError, "'unclip principal components'"),
        ({}, {"version": "7"}, CheckpointError, "version '7'"),
    ],
)
def test_invalid_files(tmp_path, tensors, metadata, error, words):
    whole = {"image_embedding": torch.ones(1, 16), "decoder_latents": torch.ones(1, 3, 8, 8)}
    kept = tensors if metadata == {} else whole | tensors
    path = tmp_path / "x.safetensors"
    save_file(kept, path, metadata={"kind": KIND, "version": "1", **(metadata or {})})
    with pytest.raises(error, match=words):
        BipartiteLatent.load(path)


def test_interpolation_passes_through_all_rows():
    three = latent(3)
    path = interpolate(three, 4)
    assert len(path) == 11
    for name in ("image_embedding", "decoder_latents", "super_res_latents"):
        assert torch.equal(getattr(path, name)[[0, 5, 10]], getattr(three, name))
        between = slerp(getattr(three, name)[:1], getattr(three, name)[1:2], 0.4)
        torch.testing.assert_close(getattr(path, name)[2:3], between)


def test_a_path_at_places():
    three = latent(3)
    path = path_at(three, [2, 1.25, 0])
    assert torch.equal(path.decoder_latents[[0, 2]], three.decoder_latents[[2, 0]])
    for name in ("image_embedding", "decoder_latents", "super_res_latents"):
        given = getattr(three, name)
        torch.testing.assert_close(getattr(path, name)[1:2], slerp(given[1:2], given[2:], 0.25))
    with pytest.raises(InputError, match="from 0 to 2"):
        path_at(three, [2.5], one_noise=True)


def test_interpolation_with_one_noise():
    two = latent(2)
    path = interpolate(two, 4, one_noise=True)
    assert torch.equal(path.decoder_latents, two.decoder_latents[:1].expand(6, -1, -1, -1))
    assert torch.equal(path.image_embedding[-1], two.image_embedding[1])
    with pytest.raises(InputError, match="two or more"):
        interpolate(latent(1), 3)


def test_an_edit_turns_the_embedding_and_keeps_the_noise():
    one, direction = latent(1), torch.nn.functional.normalize(torch.arange(16.0), dim=0)
    rows = edit(one, direction, [0.0, 0.2, 0.4])
    assert torch.equal(rows.image_embedding[:1], one.image_embedding)
    torch.testing.assert_close(rows.image_embedding[1:2], turn(one.image_embedding, direction, 0.2))
    torch.testing.assert_close(rows.image_embedding.norm(dim=1), one.image_embedding.norm().expand(3))
    nearness = torch.cosine_similarity(rows.image_embedding, direction[None], dim=1)
    assert nearness[0] < nearness[1] < nearness[2]
    assert torch.equal(rows.decoder_latents, one.decoder_latents.expand(3, -1, -1, -1))
    for strength in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="strength"):
            edit(one, direction, [strength])
    for strengths in ([0.1, 0.2], [0.1, 0.2, 0.3]):
        with pytest.raises(InputError, match="select one"):
            edit(latent(2).select([0, 1]), direction, strengths)
    for strengths in (0.4, (0.4,), torch.tensor(0.4), [torch.tensor(0.4)], np.array([0.4])):
        alone = edit(one, direction, strengths).image_embedding
        torch.testing.assert_close(alone, rows.image_embedding[2:], rtol=0, atol=1e-5)
    for strengths in ([], None, "0.4", ["0.4"], [[0.1, 0.2]]):
        with pytest.raises(InputError, match="strengths"):
            edit(one, direction, strengths)
    for other in (torch.ones(12), None):
        with pytest.raises(InputError, match="direction"):
            edit(one, other, [0.1, 0.2])


def test_probing_is_closer_with_every_component():
    embeddings = torch.randn(100, 16, generator=torch.Generator().manual_seed(5))
    components = PrincipalComponents.fit([embeddings])
    one = BipartiteLatent(embeddings[:1], torch.ones(1, 3, 8, 8))
    rows = probe(one, components, [0, 4, 16])
    torch.testing.assert_close(rows.image_embedding[0], components.mean)
    torch.testing.assert_close(rows.image_embedding[2:], one.image_embedding, rtol=0, atol=1e-5)
    gap = (rows.image_embedding - one.image_embedding).norm(dim=1)
    assert gap[0] > gap[1] > gap[2]
    assert torch.equal(probe(one, components, 4).image_embedding, rows.image_embedding[1:2])
    with pytest.raises(InputError, match="0 to 16"):
        probe(one, components, [17])
    for counts in ([], None, 2.5):
        with pytest.raises(InputError, match=r"counts (are|is)"):
            probe(one, components, counts)
    with pytest.raises(InputError, match="select one"):
        probe(latent(2), components, [4])
