"""What the comparisons with diffusers share."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def in_float64(scheduler: Any, betas: Sequence[float] | Tensor) -> Any:
    """Diffusers' scheduler with tables that lose nothing, of these betas; it is changed and returned."""
    scheduler.betas = torch.as_tensor(betas, dtype=torch.float64)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, dim=0)
    scheduler.one = scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    return scheduler
