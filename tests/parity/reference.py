"""What the comparisons with diffusers share."""

from typing import Any

import torch

from unclip.diffusion.process import DiffusionProcess


def in_float64(scheduler: Any, process: DiffusionProcess) -> Any:
    """Diffusers' scheduler with tables that lose nothing; it is changed and returned."""
    scheduler.betas = torch.tensor(process.tables.betas, dtype=torch.float64)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, dim=0)
    scheduler.one = scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    return scheduler
