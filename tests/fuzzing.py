"""How many examples the fuzz tests try."""

from __future__ import annotations

import os

from hypothesis import settings

FUZZ = int(os.environ.get("FUZZ_EXAMPLES", "0"))
"""How many examples to try in each test, at random; by default a few that are always the same."""


def fuzzed(examples: int) -> settings:
    """This many examples, always the same; with FUZZ_EXAMPLES set that many, at random."""
    return settings(
        derandomize=not FUZZ, deadline=None, database=None, max_examples=FUZZ or examples
    )
