"""Training of every stage: one trainer, one recipe file a run.

Knows runs, recipes, stages and data; knows no pipeline. Called by `unclip train` and by nobody below it.
"""
