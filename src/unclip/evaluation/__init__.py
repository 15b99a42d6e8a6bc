"""Measures of a model's quality, by networks that were not trained with it."""

GROUPS = ("seen", "held_out")
"""Captions that were seen in training, and captions that were held out. Every measure reports both."""
