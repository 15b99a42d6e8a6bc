"""How good a model is: measures that a person can check, by networks that had no part in the drawing.

Knows pipelines and metrics; trains nothing. Called by `unclip evaluate`.
"""

GROUPS = ("seen", "held_out")
"""What training knew, and what it never met: every measure tells of both."""
