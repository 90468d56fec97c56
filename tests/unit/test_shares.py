"""How many slots an endpoint gets, and how few clients move when a hash table changes."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rules.jhash import jhash, scaled
from rules.objects import Algorithm
from rules.shares import (
    WEIGHTED_SLOTS,
    apportioned,
    counts,
    hash_table,
    hash_width,
    most_slots,
    needed,
    slots_for,
)
from rules.slots import HASH_WIDTHS, LADDER, MAX_ENDPOINTS, Slots
from rules.target import Target
from tests.fuzzing import fuzzed

weights = st.lists(st.integers(1, 65535), min_size=1, max_size=40)
small_weights = st.lists(st.integers(1, 20), min_size=1, max_size=40)


def targets(count: int, network: int = 0) -> tuple[Target, ...]:
    """Endpoints of one port, as a cluster numbers them."""
    return tuple(
        bytes((10, network, number >> 8, number & 255)) + b"\x1f\x90\0\0"
        for number in range(1, count + 1)
    )


# --- numbers of slots ----------------------------------------------------------------------------


@fuzzed(100)
@given(small_weights)
def test_small_weights_are_exact(chosen):
    shares = counts(chosen)
    divisor = math.gcd(*chosen)
    assert shares == [weight // divisor for weight in chosen]
    assert sum(shares) == needed(chosen)


@fuzzed(200)
@given(weights, st.integers(40, 2000))
def test_slots_are_apportioned_in_proportion(chosen, total):
    """All are given, each endpoint gets one, and more weight is never fewer slots. Those that are
    owed more than one are off by less than one slot of what the small ones leave."""
    shares = apportioned(chosen, total)
    assert sum(shares) == total
    assert min(shares) >= 1
    by_weight = sorted(zip(chosen, shares, strict=True))
    assert all(a[1] <= b[1] for a, b in pairwise(by_weight) if a[0] < b[0])
    large = [(w, s) for w, s in by_weight if s > 1]
    left, whole = sum(s for _, s in large), sum(w for w, _ in large)
    assert all(abs(s - w * left / whole) < 2 for w, s in large)


@pytest.mark.parametrize(
    ("chosen", "shares"),
    [
        ([1], [1]),
        ([65535], [1]),
        ([65535, 65535], [1, 1]),
        ([100, 50], [2, 1]),
        ([1024, 1], [1023, 1]),
        ([65535, 1], [1023, 1]),
        ([65535, 1, 1], [1022, 1, 1]),
        ([700, 300, 24], [175, 75, 6]),
    ],
)
def test_weights_beyond_the_most_slots_are_rounded(chosen, shares):
    assert counts(chosen) == shares


def test_the_most_slots_grow_with_the_endpoints():
    assert [most_slots(n) for n in (1, 128, 129, 1000, 10_000)] == [
        *(WEIGHTED_SLOTS, WEIGHTED_SLOTS, 1032, 8000, MAX_ENDPOINTS)
    ]


@fuzzed(100)
@given(small_weights)
def test_each_beginning_of_a_weighted_list_is_weighted_as_the_whole(chosen):
    """Within two slots for each endpoint: the last draw is over the first slots alone."""
    found = slots_for(Algorithm.WEIGHTED, targets(len(chosen)), tuple(chosen))
    shares = Counter(found)
    for length in range(1, len(found) + 1):
        seen = Counter(found[:length])
        assert all(abs(seen[t] - n * length / len(found)) < 2 for t, n in shares.items())


def test_equal_weights_are_the_list_itself():
    chosen = targets(5)
    assert slots_for(Algorithm.WEIGHTED, chosen, (7,) * 5) == chosen


def test_the_same_list_is_one_object_for_all_frontends():
    """`rules.diff.Shared` finds lists by their identity."""
    for algorithm in Algorithm:
        assert (
            slots_for(algorithm, targets(5), (1, 2, 3, 4, 5))
            is slots_for(algorithm, targets(5), (1, 2, 3, 4, 5))
            or algorithm is Algorithm.RANDOM
        )


# --- hash tables ---------------------------------------------------------------------------------


def moved(old: Slots, new: Slots) -> float:
    """The share of clients that move; tables of two widths are compared by hash values."""
    width = max(len(old), len(new))
    values = range(width)
    return sum(old[v * len(old) // width] != new[v * len(new) // width] for v in values) / width


def table(chosen: tuple[Target, ...]) -> Slots:
    return hash_table(chosen, [1] * len(chosen))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100, 128, 129, 512, 2048, 2049])
def test_endpoints_have_equal_numbers_of_entries_but_for_one(count):
    shares = Counter(table(targets(count)))
    assert len(shares) == count
    assert max(shares.values()) - min(shares.values()) <= 1
    if count > 1:
        assert min(shares.values()) >= 8


@fuzzed(30)
@given(small_weights, st.randoms(use_true_random=False))
def test_a_table_is_weighted_and_does_not_depend_on_the_order(chosen, random):
    weighted = list(zip(targets(len(chosen)), chosen, strict=True))
    found = hash_table(*zip(*weighted, strict=True))
    random.shuffle(weighted)
    assert hash_table(*zip(*weighted, strict=True)) == found
    shares, whole = Counter(found), sum(chosen)
    assert all(abs(shares[t] - len(found) * w / whole) < 2 for t, w in weighted)


FIGURES = {2: (0.34, 0.67), 3: (0.26, 0.51), 5: (0.19, 0.35), 10: (0.12, 0.21), 20: (0.09, 0.14)}
FIGURES |= {50: (0.08, 0.10), 100: (0.05, 0.07), 200: (0.03, 0.04), 500: (0.015, 0.02)}
"""The share of clients that move when an endpoint is added and when one is replaced, at most, in
the mean over NETWORKS sets of addresses."""
NETWORKS = 20


@pytest.mark.parametrize(("count", "shares"), FIGURES.items())
def test_few_clients_move(count, shares):
    """docs/design/0011-algorithms.md has these figures. Removing is adding, seen from the end."""
    added, replaced = 0.0, 0.0
    for network in range(NETWORKS):
        every = targets(count + 1, network)
        before = table(every[:-1])
        added += moved(before, table(every)) / NETWORKS
        replaced += moved(before, table(every[1:])) / NETWORKS
    assert 1 / (count + 1) <= added <= shares[0]
    assert 1 / count <= replaced <= shares[1]


def test_widths_are_rungs_and_change_at_few_sizes():
    assert set(HASH_WIDTHS) <= set(LADDER)
    widths = [hash_width(count) for count in range(1, 3000)]
    changes = [n for n, (a, b) in enumerate(pairwise(widths), start=1) if a != b]
    assert changes == [1, 128, 512, 2048]
    assert hash_width(MAX_ENDPOINTS) == MAX_ENDPOINTS


def test_a_table_of_more_endpoints_than_entries_has_each_once():
    """Those beyond are cut, as of any list."""
    many = tuple(n.to_bytes(4, "big") + b"\x1f\x90\0\0" for n in range(MAX_ENDPOINTS + 3))
    found = slots_for(Algorithm.SOURCE_HASH, many, (1,) * len(many))
    assert sorted(found) == list(many[:MAX_ENDPOINTS])


# --- the kernel's hash ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "seed", "value"),
    [(b"", 0, 0xDEADBEEF), (b"", 0xDEADBEEF, 0xBD5B7DDE)],  # as lookup3.c's own driver has them
)
def test_jhash_of_nothing_is_the_initial_value(key, seed, value):
    assert jhash(key, seed) == value


@fuzzed(100)
@given(st.binary(min_size=4, max_size=16), st.integers(0, 2**32 - 1))
def test_a_hash_is_32_bits_and_scaled_below_the_modulus(key, seed):
    """tests/kernel/test_algorithms.py holds its values against the kernel's."""
    number = jhash(key[: len(key) // 4 * 4], seed)
    assert 0 <= number < 1 << 32
    assert 0 <= scaled(number, 1024) < 1024
