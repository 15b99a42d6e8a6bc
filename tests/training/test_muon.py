"""Muon's steps: orthogonal for matrices, AdamW's for the rest."""

import copy

import pytest
import torch
from torch import nn

from unclip.training.optimizer import MATCH_ADAM, Muon, orthogonal, split_parameters


@pytest.mark.parametrize("shape", [(4, 32, 32), (2, 16, 200), (3, 200, 16)])
def test_singular_values_come_close_to_one(shape):
    torch.manual_seed(0)
    found = torch.linalg.svdvals(orthogonal(torch.randn(shape)).float())
    assert found.shape == (shape[0], min(shape[1:]))
    assert found.min() > 0.3  # the smallest of a square random matrix come last
    assert found.max() < 1.3
    assert (found > 0.65).float().mean() > 0.9


def test_the_singular_vectors_stay():
    torch.manual_seed(0)
    matrix = torch.randn(1, 24, 48)
    u, _, vh = torch.linalg.svd(matrix[0], full_matrices=False)
    cosine = torch.cosine_similarity(orthogonal(matrix).float().flatten(), (u @ vh).flatten(), dim=0)
    assert cosine > 0.95


def test_what_is_no_matrix_takes_adamws_steps():
    torch.manual_seed(0)
    mine = nn.Linear(8, 4)
    theirs = copy.deepcopy(mine)
    settings = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    one, other = (
        Muon([{"params": list(mine.parameters())}], **settings),
        torch.optim.AdamW(theirs.parameters(), **settings),
    )
    for _ in range(20):
        x = torch.randn(16, 8)
        for model, optimizer in ((mine, one), (theirs, other)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(mine.weight, theirs.weight)
    torch.testing.assert_close(mine.bias, theirs.bias)


def test_a_kernels_step_has_the_size_of_adamws():
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.zeros(64, 32, 3, 3))
    optimizer = Muon([{"params": [kernel], "matrices": True}], lr=1e-2, weight_decay=0.0)
    kernel.grad = torch.randn_like(kernel) * 1e-6  # however small the gradient is
    optimizer.step()
    assert kernel.square().mean().sqrt().item() == pytest.approx(1e-2 * MATCH_ADAM, rel=0.2)
    assert (kernel * kernel.grad).sum() < 0


def test_weights_decay_by_group():
    kept, decayed = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(20, 20))
    groups = [{"params": [kept], "weight_decay": 0.0}, {"params": [decayed], "matrices": True, "weight_decay": 0.5}]
    optimizer = Muon(groups, lr=0.1)
    kept.grad, decayed.grad = torch.zeros(3), torch.zeros(20, 20)
    optimizer.step()
    assert torch.equal(kept, torch.ones(3))
    torch.testing.assert_close(decayed, torch.full((20, 20), 0.95))


def test_parameters_without_a_gradient_stay():
    idle = nn.Parameter(torch.ones(20, 20))
    Muon([{"params": [idle], "matrices": True}], lr=0.1).step()
    assert torch.equal(idle, torch.ones(20, 20))


def test_who_takes_which_steps():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv_in = nn.Conv2d(3, 32, 3)  # 27 columns: a matrix
            self.hidden = nn.Conv2d(32, 64, 3)
            self.norm = nn.GroupNorm(4, 64)
            self.token_embedding = nn.Embedding(100, 32)
            self.time_embedding = nn.Sequential(nn.Linear(32, 32))
            self.conv_out = nn.Conv2d(64, 3, 3)
            self.place = nn.Parameter(torch.zeros(1, 36, 32))
            self.frozen = nn.Parameter(torch.zeros(32, 32), requires_grad=False)

    net = Net()
    names = {p: name for name, p in net.named_parameters()}
    hidden, edges, vectors = ([names[p] for p in group["params"]] for group in split_parameters(net, 0.1))
    assert hidden == ["conv_in.weight", "hidden.weight", "time_embedding.0.weight"]
    assert edges == ["place", "token_embedding.weight", "conv_out.weight"]
    assert all(name.endswith(".bias") or name.startswith("norm") for name in vectors)
    assert [group["weight_decay"] for group in split_parameters(net, 0.1)] == [0.1, 0.1, 0.0]
