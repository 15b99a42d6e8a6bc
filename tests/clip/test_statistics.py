"""The statistics of image embeddings: the report on the scale, rescaling, noise, and the file."""

import re

import pytest
import torch

from unclip import CheckpointError, EmbeddingStatistics, InputError, OutputExistsError, UnCLIPPipeline, WeightsError
from unclip.checkpoints.hub import resolve
from unclip.clip.concepts import Concepts

DIM = 64


@pytest.fixture(scope="module")
def own():
    """Embeddings [2000, 64] with different means and standard deviations of the dimensions."""
    draw = torch.Generator().manual_seed(0)
    mean = torch.randn(DIM, generator=draw)
    std = torch.rand(DIM, generator=draw) * 1.5 + 0.2
    return torch.randn(2000, DIM, generator=draw) * std + mean


@pytest.fixture(scope="module")
def statistics(own):
    return EmbeddingStatistics.of(own)


def rotated(rows, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return rows @ torch.linalg.qr(torch.randn(rows.shape[1], rows.shape[1], generator=draw))[0]


def test_the_statistics_of_batches_are_those_of_all_rows(own, statistics):
    torch.testing.assert_close(statistics.mean, own.mean(dim=0))
    torch.testing.assert_close(statistics.std, own.std(dim=0))
    assert statistics.norm_mean == pytest.approx(float(own.norm(dim=1).mean()), rel=1e-5)
    parts = EmbeddingStatistics.of_batches([own[:700].numpy(), own[700:].half().float()])
    torch.testing.assert_close(parts.std, statistics.std, rtol=1e-3, atol=1e-3)


CAUSES = {
    "whitened": (lambda s, rows: (rows - s.mean) / s.std, "whitened.*--rescale unwhiten"),
    "unit": (lambda s, rows: rows / rows.norm(dim=1, keepdim=True), "normalised.*--rescale norm"),
    "factor": (lambda s, rows: rows * 3, "multiplied by a factor.*--rescale norm"),
    "shrunk": (lambda s, rows: s.mean + 0.4 * (rows - s.mean), "regression.*--rescale dimensions"),
    "rotated": (lambda s, rows: rotated(rows), "another CLIP"),
    "gaussian": (lambda s, rows: rotated(torch.randn(200, DIM) * s.norm_mean / 8), "another CLIP"),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_the_report_names_the_likely_cause(own, statistics, cause):
    change, message = CAUSES[cause]
    torch.manual_seed(0)
    report = statistics.report(change(statistics, own[:200]))
    assert report is not None
    assert re.search(message, report), report


@pytest.mark.parametrize(("cause", "how"), [("unit", "norm"), ("factor", "norm"), ("shrunk", "dimensions")])
def test_the_option_that_the_report_names_fixes_it(own, statistics, cause, how):
    assert statistics.report(statistics.rescaled(CAUSES[cause][0](statistics, own[:200]), how)) is None


def test_unwhitening_restores_the_embeddings(own, statistics):
    white = CAUSES["whitened"][0](statistics, own)
    torch.testing.assert_close(statistics.rescaled(white, "unwhiten"), own, rtol=1e-4, atol=1e-4)


def test_rescaling_by_the_statistics_of_a_whole_file(own, statistics):
    shrunk = CAUSES["shrunk"][0](statistics, own)
    given = EmbeddingStatistics.of(shrunk)
    torch.testing.assert_close(statistics.rescaled(shrunk[:3], "dimensions", given), own[:3], rtol=1e-3, atol=1e-3)


def test_rescaling_that_is_not_possible(own, statistics):
    with pytest.raises(InputError, match="16 or more"):
        statistics.rescaled(own[:5], "dimensions")
    with pytest.raises(InputError, match="embedding 1 is zero"):
        statistics.rescaled(torch.stack([own[0], torch.zeros(DIM)]), "norm")
    with pytest.raises(InputError, match=r"'mean'.*must be one of 'norm'"):
        statistics.rescaled(own, "mean")


@pytest.mark.parametrize("count", [1, 10, 500])
@pytest.mark.parametrize("from_prior", [False, True])
def test_the_built_in_models_own_embeddings_are_not_reported(count, from_prior):
    """Its concepts are means of the embeddings of its pictures."""
    folder = resolve("unclip-emoji")
    found, concepts = EmbeddingStatistics.read(folder), Concepts.read(folder)
    assert found is not None
    assert concepts is not None
    if from_prior:
        prior = UnCLIPPipeline.from_pretrained(folder, own_clip=True).prior
        found = EmbeddingStatistics.of_prior(prior.clip_mean, prior.clip_std)
    rows = concepts.embeddings[torch.randperm(len(concepts), generator=torch.Generator().manual_seed(0))]
    groups = rows.split(count)[:300]
    reported = sum(found.report(group) is not None for group in groups)
    assert reported <= len(groups) // 100
    for wrong in (rotated(rows), rows / rows.norm(dim=1, keepdim=True)):
        missed = sum(found.report(group) is None for group in wrong.split(count)[:300])
        assert missed <= len(groups) // 100


def test_noise_is_that_of_stable_unclip(own, statistics):
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    normalizer = StableUnCLIPImageNormalizer(DIM)
    normalizer.mean.data, normalizer.std.data = statistics.mean[None], statistics.std[None]
    schedule = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    noise = torch.randn(4, DIM, generator=torch.Generator().manual_seed(3))
    for level in (0, 1, 300, 999):
        theirs = schedule.add_noise(normalizer.scale(own[:4]), noise, torch.tensor([level] * 4))
        ours = statistics.noised(own[:4], level, noise)
        torch.testing.assert_close(ours, normalizer.unscale(theirs), rtol=0, atol=1e-5)


def test_a_prior_without_statistics_has_none():
    assert EmbeddingStatistics.of_prior(torch.zeros(1, 4), torch.ones(1, 4)) is None


def test_the_file(own, statistics, tmp_path):
    assert EmbeddingStatistics.read(tmp_path) is None
    path = statistics.write(tmp_path)
    assert path.name == "embedding_statistics.safetensors"
    found = EmbeddingStatistics.read(tmp_path)
    torch.testing.assert_close(found.mean, statistics.mean)
    assert found.norm_std == pytest.approx(statistics.norm_std)
    with pytest.raises(OutputExistsError):
        statistics.write(tmp_path)
    EmbeddingStatistics(statistics.mean, statistics.std[:5], 1.0, 1.0).write(tmp_path, overwrite=True)
    with pytest.raises(WeightsError, match="no valid statistics"):
        EmbeddingStatistics.read(tmp_path)


def test_statistics_of_another_width_are_refused(own_pipeline, statistics, tmp_path):
    own_pipeline.save_pretrained(tmp_path / "model")
    statistics.write(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"embedding_statistics.safetensors has embeddings of width 64.*width 16"):
        UnCLIPPipeline.from_pretrained(tmp_path / "model")
