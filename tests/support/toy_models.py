"""The toys that fixtures open: what they were trained on, are told, and how they look up."""

from typing import Any

TRAINED = 60
"""Positions that the short one was trained on."""

PARROT_TEXT = [12, 13, 14, 10, 11, 7, 170, 34, 12, 13, 14]
"""Something that the one that repeats itself goes on with."""
PARROT_OPTIONS: dict[str, Any] = {
    **{"engine.widths": [1, 16], "engine.smallest_bucket": 96, "capacity": 96, "cull.target": 80},
    **{"lookup": "ngram", "lookup.width": 3, "lookup.window": 8},
}
