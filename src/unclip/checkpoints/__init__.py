"""Models on disk: folders, safetensors files, the hub, and the original Karlo names.

Knows files, state dicts, shapes and JSON as plain data; knows no network and no pipeline.
Networks, schedulers, pipelines, the trainer and the command line call it.
"""
