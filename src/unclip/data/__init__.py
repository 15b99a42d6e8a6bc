"""Data sets of captioned pictures: how they are built, read and drawn from.

Knows files, pictures and captions; knows no network and no training.
Called by `unclip.training`, `unclip.evaluation` and the command line.
"""
