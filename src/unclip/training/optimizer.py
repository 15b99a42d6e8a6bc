"""The optimizers AdamW and Muon, and the learning rate of a step."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from unclip.models.kernels import is_emulated
from unclip.training.recipe import OptimizerRecipe, Recipe

# The quintic of the Newton-Schulz iteration, chosen to lift small singular values fast (Jordan et al. 2024).
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
MATCH_ADAM = 0.2
"""The root mean square of AdamW's updates, so that both take the same learning rates (arXiv 2502.16982, §2.2)."""

MUON = {"momentum": 0.95, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01, "matrices": False}
"""The default settings."""


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) with the scaling of Liu et al. 2025 (arXiv 2502.16982); AdamW for the other parameters.

    A kernel [out, in, h, w] is treated as the matrix [out, in · h · w].

    Args:
        groups: parameter groups. Muon updates the groups with `matrices=True`, whose tensors have two or more
            dimensions; AdamW updates the others.
        settings: `lr`, the learning rate of both, and those of `MUON`: `momentum` (Nesterov) of Muon, `betas` and `eps`
            of AdamW, and the decoupled `weight_decay` of both. A group may set its own.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], **settings: Any) -> None:
        super().__init__(groups, MUON | settings)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the parameters that have gradients."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in parameters:
                p.mul_(1 - group["lr"] * group["weight_decay"])
            if group["matrices"]:
                self._step_matrices(parameters, group)
            else:
                self._step_others(parameters, group)

    def _step_matrices(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        alike: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
        for p in parameters:
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            momentum = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
            assert p.grad is not None
            matrix = p.grad.lerp(momentum, group["momentum"]).flatten(1)  # Nesterov momentum
            alike[matrix.shape[0], matrix.shape[1]].append((p, matrix))
        for (rows, columns), members in alike.items():  # matrices of one shape are stacked: fewer products
            updates = orthogonal(torch.stack([matrix for _, matrix in members]))
            rate = group["lr"] * MATCH_ADAM * max(rows, columns) ** 0.5
            for (p, _), update in zip(members, updates, strict=True):
                p.sub_(update.to(p.dtype).view(p.shape), alpha=rate)

    def _step_others(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        for p in parameters:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            state["step"] += 1
            step = float(state["step"])
            mean = state["exp_avg"].lerp_(p.grad, 1 - beta1)
            square = state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            spread = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
            p.addcdiv_(mean, spread, value=-group["lr"] / (1 - beta1**step))


def orthogonal(matrices: Tensor) -> Tensor:
    """Approximately the nearest matrices with orthonormal rows or columns, [number, rows, columns].

    Five steps of the Newton-Schulz iteration; the singular values end between about 0.7 and 1.2. It computes in
    bfloat16, or in float32 on a CPU that only emulates bfloat16.
    """
    a, b, c = QUINTIC
    x = matrices.to(torch.float32 if is_emulated(torch.bfloat16, matrices.device) else torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).to(x.dtype)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def split_parameters(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for `Muon`: hidden matrices and kernels; embeddings and thin matrices; vectors.

    AdamW updates embeddings, matrices with a side below 16 (such as the output layer), and vectors. Vectors have no
    weight decay.
    """
    hidden, edges, vectors = [], [], []
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        if p.ndim < 2:
            vectors.append(p)
        elif min(p.shape[0], p[0].numel()) < 16 or "embedding" in name.rpartition(".")[0].rpartition(".")[2]:
            edges.append(p)
        else:
            hidden.append(p)
    groups = [
        {"params": hidden, "weight_decay": weight_decay, "matrices": True},
        {"params": edges, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


FUSED = ("cpu", "cuda")
"""Devices with a fused AdamW step."""


def learning_rate(recipe: Recipe, step: int) -> float:
    """The learning rate of a step: linear warm-up, constant, then linear decay to zero in the last `decay_share`."""
    optimizer = recipe.optimizer
    warm = min(1.0, (step + 1) / max(1, optimizer.warmup_steps))
    left = (recipe.steps - step) / max(1.0, optimizer.decay_share * recipe.steps)
    return optimizer.learning_rate * warm * min(1.0, left)


def make_optimizer(module: nn.Module, recipe: OptimizerRecipe) -> torch.optim.Optimizer:
    """The optimizer of a recipe. Only parameters with two or more dimensions have weight decay."""
    settings: dict[str, Any] = {"lr": recipe.learning_rate, "betas": (recipe.beta1, recipe.beta2), "eps": recipe.eps}
    if recipe.name == "muon":
        return Muon(split_parameters(module, recipe.weight_decay), **settings)
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in FUSED for p in trained)
    return torch.optim.AdamW(groups, **settings, fused=fused)
