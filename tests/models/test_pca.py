"""Principal components: against the singular value decomposition, in streams, through files, and what is refused."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from unclip.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    InputError,
    MissingFileError,
    OutputExistsError,
    WeightsError,
)
from unclip.models.pca import KIND, PrincipalComponents

DIM = 12


def data(rows=300, seed=0):
    """Embeddings far from zero whose variances fall from dimension to dimension of a turned basis."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(3, 0.1, DIM)
    turn = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator))[0]
    return torch.randn(rows, DIM, generator=generator) * spread @ turn + 20


@pytest.fixture
def fitted():
    return PrincipalComponents.fit([data()])


def test_against_the_singular_value_decomposition(fitted):
    x = data().double()
    centred = x - x.mean(dim=0)
    _, singular, rows = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(fitted.mean, x.mean(dim=0).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(fitted.variances, (singular**2 / (len(x) - 1)).float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close((fitted.components.double() @ rows.T).abs(), torch.eye(DIM).double(), rtol=0, atol=1e-4)
    assert fitted.total_variance == pytest.approx(float(centred.var(dim=0).sum()))
    assert fitted.explained[-1] == pytest.approx(1, abs=1e-5)


@settings(deadline=None, max_examples=25)
@given(cuts=st.lists(st.integers(0, 300), max_size=6), offset=st.sampled_from([0.0, 1e4]))
def test_the_cut_into_batches_makes_no_difference(cuts, offset):
    x = data().double() + offset
    places = [0, *sorted(cuts), len(x)]
    streamed = PrincipalComponents.fit(x[a:b] for a, b in itertools.pairwise(places))
    whole = PrincipalComponents.fit([x])
    torch.testing.assert_close(streamed.variances, whole.variances, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(streamed.components, whole.components, rtol=0, atol=1e-3)


def test_variance_along_the_components_is_theirs(fitted):
    coordinates = fitted.project(data())
    torch.testing.assert_close(coordinates.var(dim=0), fitted.variances, rtol=1e-3, atol=1e-5)
    assert bool((fitted.variances.diff() <= 0).all())


def test_more_components_come_nearer(fitted):
    x = data(seed=3)
    errors = [float((fitted.reconstruct(fitted.project(x, k)) - x).square().mean()) for k in range(DIM + 1)]
    assert all(after < before for before, after in itertools.pairwise(errors))
    assert errors[-1] < 1e-8
    torch.testing.assert_close(fitted.reconstruct(fitted.project(x, 0)), fitted.mean.expand_as(x))


def test_few_components_are_the_first_of_all(fitted):
    few = PrincipalComponents.fit([data()], 3)
    torch.testing.assert_close(few.components, fitted.components[:3])
    assert few.total_variance == pytest.approx(fitted.total_variance)
    assert few.explained[-1] < 1
    assert few.project(data()[0]).shape == (3,)
    assert few.reconstruct(torch.zeros(2, 5, 3)).shape == (2, 5, DIM)


def test_no_more_than_the_embeddings_span():
    assert PrincipalComponents.fit([data(rows=5)]).num_components == 4


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "0 embeddings"),
        ([torch.zeros(1, 3)], "1 embeddings"),
        ([torch.ones(4, 3)], "all equal"),
        ([torch.rand(4, 3), torch.rand(4, 2)], r"float \[batch, 3\]"),
        ([torch.rand(3)], r"float \[batch, dim\]"),
        ([torch.zeros(4, 3, dtype=torch.long)], "int64"),
        ([torch.rand(4, 3), torch.full((1, 3), torch.nan)], "after the first 4"),
    ],
)
def test_what_cannot_be_fitted(batches, words):
    with pytest.raises(DataError, match=words):
        PrincipalComponents.fit(batches)


@pytest.mark.parametrize("count", [0, DIM + 1, True, 2.0])
def test_a_count_that_there_is_none_of(fitted, count):
    with pytest.raises(InputError, match="num_components"):
        PrincipalComponents.fit([data()], count)
    if count != 0:
        with pytest.raises(InputError, match="num_components"):
            fitted.project(data(), count)


def test_wrong_widths(fitted):
    with pytest.raises(InputError, match="width 12"):
        fitted.project(torch.zeros(2, 5))
    with pytest.raises(InputError, match="only 12 components"):
        fitted.reconstruct(torch.zeros(2, DIM + 1))


def test_through_a_file(fitted, tmp_path):
    path = fitted.save(tmp_path / "new" / "pca.safetensors", about={"data": "random"})
    read = PrincipalComponents.load(path)
    for name in ("mean", "components", "variances"):
        assert torch.equal(getattr(read, name), getattr(fitted, name))
    assert read.total_variance == pytest.approx(fitted.total_variance)
    with pytest.raises(OutputExistsError):
        fitted.save(path)
    assert fitted.save(path, overwrite=True) == path
    with pytest.raises(CheckpointError, match="must end in"):
        fitted.save(tmp_path / "pca.bin")


def rewritten(fitted, path, *, drop=(), metadata=None, **changes):
    """The fitted components as a file with something changed."""
    fitted.save(path)
    tensors = {name: tensor for name, tensor in load_file(path).items() if name not in drop}
    about = {"kind": KIND, "version": "1"} if metadata is None else metadata
    save_file(tensors | changes, path, metadata=about)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"drop": ["mean"]}, WeightsError, "lacks mean"),
        ({"more": torch.zeros(1)}, WeightsError, "has unknown tensors: more"),
        ({"mean": torch.zeros(DIM - 1)}, WeightsError, "shapes"),
        ({"mean": torch.full((DIM,), torch.nan)}, WeightsError, "NaN"),
        ({"mean": torch.zeros(DIM, dtype=torch.long)}, WeightsError, "floating"),
        ({"components": torch.ones(DIM, DIM)}, WeightsError, "orthonormal"),
        ({"variances": torch.arange(DIM).float()}, WeightsError, "descend"),
        ({"total_variance": torch.zeros(2)}, WeightsError, "one number"),
        ({"metadata": {"kind": "another", "version": "1"}}, CheckpointError, "'another'"),
        ({"metadata": {}}, CheckpointError, "kind 'none'"),
        ({"metadata": {"kind": KIND, "version": "2"}}, CheckpointError, "version '2'"),
        ({"metadata": {"kind": KIND, "version": "x"}}, CheckpointError, "version 'x'"),
    ],
)
def test_files_that_are_refused(fitted, tmp_path, change, error, words):
    path = tmp_path / "pca.safetensors"
    rewritten(fitted, path, **change)
    with pytest.raises(error, match=words):
        PrincipalComponents.load(path)


def test_no_file_and_no_safetensors(fitted, tmp_path):
    with pytest.raises(MissingFileError):
        PrincipalComponents.load(tmp_path / "none.safetensors")
    path = fitted.save(tmp_path / "pca.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(WeightsError, match="damaged"):
        PrincipalComponents.load(path)


def test_values_that_are_no_basis():
    with pytest.raises(ConfigError, match="do not fit each other"):
        PrincipalComponents(torch.zeros(2), torch.zeros(3, 2), torch.zeros(3), 1.0)
