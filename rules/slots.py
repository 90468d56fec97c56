"""Stable dense slots, and how wide a draw over them is.

The N endpoints of an address stand in slots 0 to N-1 of a map, and a rule draws a slot at random.
A verdict names the chain that draws, and a changed verdict makes the kernel validate the whole
table (walking every verdict of every map), so the chain must not change with every endpoint. It
draws from a *width* instead, the first of a fixed ladder that is wide enough:

- a new endpoint takes a free slot or the next one; when one is removed, the last slot's endpoint
  moves into the hole. The others stay, and so do connections' chances of being spread evenly;
- a Service changes its width only when it outgrows it, or when it has shrunk below FEWEST of it.
  A rolling update that swings by a quarter in both directions crosses one rung at most, once:
  where its surge has just outgrown the rung below, 2/3 of this width, three quarters of the
  Service are 3/4 / (5/4) * 2/3 = 0.4 of it, and that is more than FEWEST;
- a draw that hits an empty slot misses, and the next rule draws again; after DRAWS misses one last
  draw is made over the first FEWEST slots, which are always filled. FEWEST is a width of the ladder
  itself, 3/8 or 1/3, so that its chain draws them.

How even that is: with filling f = N / width, a share (1 - f)^DRAWS of all connections comes from
the last draw, so a slot beyond FEWEST gets that share less than 1/N: at most 0.4 % less in a width
just grown into (f > 2/3), 3.1 % at f = 1/2, nothing where N equals the width or FEWEST; at the
worst, in a width that the Service has shrunk in and is about to leave, up to 13.2 %.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence

from rules.target import Target

LADDER = (1, *(width for n in range(15) for width in (2 << n, 3 << n)), 65536)
"""The widths: 1, 2, 3, 4, 6, 8, 12, 16, 24 ... 49152, 65536, each at most 1.5 times the one before
(but for 1 and 2)."""

DRAWS = 5

HASH_DRAWS = 3
"""Draws by the client's address, for sticky clients that cannot be remembered. They read the
endpoint maps once each, and each reader of a map makes its elements slower to add, so they are
fewer than DRAWS; at f > 2/3 at most 3.7 % of the clients come to the last one."""
MAX_ENDPOINTS = LADDER[-1]

HASH_WIDTHS = (1, 1024, 4096, 16384, 65536)
"""The widths of the tables for source-hash (`rules.shares`), rungs of the ladder too."""


_FEWEST = {
    width: max((lower for lower in LADDER if 8 * lower <= 3 * width), default=1) for width in LADDER
}


def fewest(width: int) -> int:
    """The smallest number of endpoints for which a Service keeps this width: the widest rung of
    the ladder within 3/8 of it, so 3/8 or 1/3 from 6 on."""
    return _FEWEST[width]


def fitting(count: int, current: int = 0) -> int:
    """The width for `count` endpoints, `current` if that is still right.

    A Service without endpoints keeps what it has: all its draws miss, and the rules for empty
    Services answer.
    """
    if current and (not count or fewest(current) <= count <= current):
        return current
    return next(width for width in LADDER if width >= count)


Slots = tuple[Target, ...]
"""The endpoint in each slot, from slot 0, without holes. A weighted one is in several."""


def packed_slot(slot: int) -> bytes:
    """A slot as it ends a key of the endpoint maps."""
    return slot.to_bytes(4, sys.byteorder)


def assign(before: Slots, wanted: Sequence[Target]) -> Slots:
    """The slots for `wanted`, each endpoint where it was if that is possible.

    Those beyond MAX_ENDPOINTS get no slot. Returns `before` itself if nothing changes, so that
    callers can compare by identity. At most one slot per item that was added or removed changes,
    and one more per item that must move into a hole.
    """
    wanted = wanted[:MAX_ENDPOINTS]
    if not before:
        return tuple(wanted)
    if before is wanted:
        return before
    standing = set(before)
    staying = standing.intersection(wanted)
    if len(standing) < len(before) or len(set(wanted)) < len(wanted):
        return _assign_repeated(before, wanted)
    coming = [target for target in wanted if target not in standing]
    if not coming and len(staying) == len(before):
        return before
    coming.reverse()
    slots: list[Target | None] = [
        target if target in staying else coming.pop() if coming else None for target in before
    ]
    slots.extend(reversed(coming))
    return _dense(slots)


def _assign_repeated(before: Slots, wanted: Sequence[Target]) -> Slots:
    """`assign` where targets are repeated: each stays in as many of its slots as it may."""
    missing = Counter(wanted)
    slots: list[Target | None] = []
    for target in before:
        stays = missing[target] > 0
        missing[target] -= stays
        slots.append(target if stays else None)
    coming: list[Target] = []  # the last ones of each, the very last first
    for target in reversed(wanted):
        if missing[target] > 0:
            missing[target] -= 1
            coming.append(target)
    if not coming and None not in slots:
        return before
    slots = [coming.pop() if target is None and coming else target for target in slots]
    slots.extend(reversed(coming))
    return _dense(slots)


def _dense(slots: list[Target | None]) -> Slots:
    """Fills each hole with the last endpoint behind it."""
    if None not in slots:
        return tuple(slots)  # type: ignore[arg-type]
    filled = slots
    for hole in range(len(filled)):
        if hole >= len(filled):
            break
        if filled[hole] is None:
            while filled and filled[-1] is None:
                filled.pop()
            if hole < len(filled):
                filled[hole] = filled.pop()
    return tuple(target for target in filled if target is not None)
