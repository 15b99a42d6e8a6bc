"""The optimizer that a recipe asks for, and its rate at each step.

Knows recipes and parameters; knows no task and no run. Called by the trainer.
"""

from typing import Any

import torch
from torch import nn

from unclip.training.muon import Muon, split_parameters
from unclip.training.recipe import OptimizerRecipe, Recipe

FUSED = ("cpu", "cuda")
"""Where AdamW's step passes over the weights once, not once an operation."""


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, constant, then linear to zero over the last `decay_share` of the steps."""
    optimizer = recipe.optimizer
    warm = min(1.0, (step + 1) / max(1, optimizer.warmup_steps))
    left = (recipe.steps - step) / max(1.0, optimizer.decay_share * recipe.steps)
    return optimizer.learning_rate * warm * min(1.0, left)


def make_optimizer(module: nn.Module, recipe: OptimizerRecipe) -> torch.optim.Optimizer:
    """What the recipe asks for. Matrices and kernels decay; biases, norms' scales and single vectors do not."""
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
