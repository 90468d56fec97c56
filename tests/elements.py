"""Elements of two moments, compared."""

from __future__ import annotations

from rules.diff import Change, Elements, between


def difference(have: Elements, want: Elements) -> Change:
    """What leads from all elements of `have` to those of `want`."""
    copied = {owner: dict(elements) for owner, elements in have.items()}
    return between(copied, ((o, k, v) for o, of in want.items() for k, v in of.items()))[0]
