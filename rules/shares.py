"""From weights to slots: how many each endpoint gets, and which.

`weighted`: an endpoint is in as many slots as its weight, divided by what all weights have in
common. The endpoints are dealt out evenly, so that each beginning of the list is weighted as
the whole: the last draw of `rules.slots` is over the first slots alone.

`source-hash`: a table in which each slot is the answer for one value of a hash. It is filled by
Maglev's method (Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI
2016): each endpoint prefers the slots in an order of its own, and endpoints take turns to take the
free slot that they like best. The table depends on the endpoints and weights alone, not on history
or on the node, and few slots change with one endpoint (docs/design/0011-algorithms.md has figures).
"""

from __future__ import annotations

from binascii import crc32
from collections.abc import Sequence
from functools import lru_cache
from math import gcd

from rules.objects import Algorithm
from rules.slots import HASH_WIDTHS, MAX_ENDPOINTS, Slots
from rules.target import Target

WEIGHTED_SLOTS = 1024
SLOTS_PER_ENDPOINT = 8
"""A weighted list has at most WEIGHTED_SLOTS, or so many for each endpoint where that is more."""

ENTRIES_PER_ENDPOINT = 8
"""A hash table has at least so many slots for each endpoint, up to the widest one: so an endpoint
gets at most 1/8 more clients than another of the same weight."""


# bounded: a list may have 65,536 slots. The frontends of a port have the same list, as one object
@lru_cache(maxsize=8)
def slots_for(
    algorithm: Algorithm, targets: tuple[Target, ...], weights: tuple[int, ...]
) -> tuple[Target, ...]:
    """The endpoints in the slots, with repetitions, given their weights (at least 1).

    Under SOURCE_HASH the position of each is meant, and the length is a width of HASH_WIDTHS.
    """
    if not targets or algorithm is Algorithm.RANDOM:
        return targets
    if algorithm is Algorithm.WEIGHTED:
        return tuple(_dealt(targets, counts(weights)))
    return hash_table(targets[:MAX_ENDPOINTS], weights[:MAX_ENDPOINTS])


def most_slots(endpoints: int) -> int:
    """How many slots a weighted list of so many endpoints may have."""
    return min(MAX_ENDPOINTS, max(WEIGHTED_SLOTS, SLOTS_PER_ENDPOINT * endpoints))


def needed(weights: Sequence[int]) -> int:
    """How many slots represent the weights exactly."""
    return sum(weights) // gcd(*weights)


def counts(weights: Sequence[int]) -> list[int]:
    """How many slots each endpoint of a weighted list gets."""
    most = most_slots(len(weights))
    if needed(weights) > most:
        return apportioned(weights, most)
    divisor = gcd(*weights)
    return [weight // divisor for weight in weights]


def apportioned(weights: Sequence[int], total: int) -> list[int]:
    """`total` slots in proportion to the weights, each at least one, by the largest remainders.

    Those beyond `total` get none.
    """
    weights = weights[:total]
    shares = [0] * len(weights)
    open_ = list(range(len(weights)))
    while True:  # an endpoint whose part is less than one slot gets one, the others share the rest
        whole = sum(weights[i] for i in open_)
        small = [i for i in open_ if weights[i] * total < whole]
        for i in small:
            shares[i] = 1
        total -= len(small)
        open_ = [i for i in open_ if not shares[i]]
        if not small:
            break
    for i in open_:
        shares[i] = weights[i] * total // whole
    by_remainder = sorted(open_, key=lambda i: (-(weights[i] * total % whole), i))
    for i in by_remainder[: total - sum(shares[i] for i in open_)]:
        shares[i] += 1
    return shares


def _dealt(targets: Sequence[Target], shares: Sequence[int]) -> list[Target]:
    """Each target as often as its share, spread evenly."""
    turns = [
        ((2 * turn + 1) / share, index)
        for index, share in enumerate(shares)
        for turn in range(share)
    ]
    turns.sort()
    return [targets[index] for _, index in turns]


def hash_width(endpoints: int) -> int:
    """The width of the table for so many endpoints (at least one)."""
    if endpoints == 1:
        return 1
    least = ENTRIES_PER_ENDPOINT * endpoints
    return next((w for w in HASH_WIDTHS if w > 1 and w >= least), HASH_WIDTHS[-1])


def hash_table(targets: Sequence[Target], weights: Sequence[int]) -> Slots:
    """The target for each value of the hash. The order of `targets` does not matter."""
    width = hash_width(len(targets))
    ranked = sorted(
        (_hash(target), target, weight) for target, weight in zip(targets, weights, strict=True)
    )
    # a number without a common divisor with the width, which is a power of two, reaches all slots
    steps = {target: (number >> 32) | 1 for number, target, _ in ranked}
    at = {target: number % width for number, target, _ in ranked}
    shares = apportioned([weight for _, _, weight in ranked], width)
    table: list[Target] = [b""] * width
    for target in _dealt([target for _, target, _ in ranked], shares):
        slot, step = at[target], steps[target]
        while table[slot]:
            slot = (slot + step) % width
        table[slot] = target
        at[target] = (slot + step) % width
    return tuple(table)


def _hash(target: Target) -> int:
    """64 bits, the same on every node: a CRC, mixed as in splitmix64 (hashlib loads OpenSSL)."""
    number = (crc32(target) + 0x9E3779B97F4A7C15) & _MASK
    number = ((number ^ number >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    number = ((number ^ number >> 27) * 0x94D049BB133111EB) & _MASK
    return number ^ number >> 31


_MASK = (1 << 64) - 1
