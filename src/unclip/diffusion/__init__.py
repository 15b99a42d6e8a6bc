"""The mathematics of diffusion: schedules, processes, guidance, samplers, noise and the loop.

Knows no network and no file format; tensors and numbers only.
Training and the stages use `process`; pipelines use the rest.
"""
