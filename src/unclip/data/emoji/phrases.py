"""Everyday names for emoji, by their English labels in the standard. They become captions."""

import importlib.resources
import tomllib

_TEXT = importlib.resources.files("unclip").joinpath("data", "emoji", "phrases.toml").read_text(encoding="utf-8")
PHRASES: dict[str, tuple[str, ...]] = {label: tuple(texts) for label, texts in tomllib.loads(_TEXT).items()}
"""Phrases by label; each is a complete caption."""
