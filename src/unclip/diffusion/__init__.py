"""The mathematics of diffusion: schedules, processes, guidance, samplers, noise and the sampling loop."""
