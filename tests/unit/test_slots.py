"""Slots are dense and stable, and widths change only when they must."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rules.slots import DRAWS, LADDER, MAX_ENDPOINTS, assign, fewest, fitting
from rules.tables import Layout, balancer, build
from tests.fuzzing import fuzzed


def target(number: int) -> bytes:
    return number.to_bytes(4, "big") + b"\x1f\x90\0\0"


targets = st.lists(st.integers(0, 20).map(target), unique=True)


@st.composite
def slots(draw: st.DrawFn) -> tuple[bytes, ...]:
    return tuple(draw(targets))


def moved(before: tuple[bytes, ...], after: tuple[bytes, ...]) -> set[bytes]:
    """What is in both, in different slots."""
    return {t for t in set(before) & set(after) if before.index(t) != after.index(t)}


# --- assign --------------------------------------------------------------------------------------


@fuzzed(100)
@given(slots(), targets)
def test_every_wanted_endpoint_has_one_slot_and_nothing_else_has(before, wanted):
    after = assign(before, wanted)
    assert len(after) == len(wanted)
    assert set(after) == set(wanted)


@fuzzed(100)
@given(slots(), targets)
def test_an_endpoint_moves_only_if_its_slot_is_beyond_the_new_length(before, wanted):
    after = assign(before, wanted)
    staying = set(before) & set(wanted)
    assert moved(before, after) == {t for t in staying if before.index(t) >= len(after)}


@fuzzed(100)
@given(slots(), targets)
def test_no_more_slots_change_than_endpoints_come_or_move(before, wanted):
    after = assign(before, wanted)
    coming = set(wanted) - set(before)
    changed = {i for i, t in enumerate(after) if i >= len(before) or before[i] != t}
    assert len(changed) == len(coming) + len(moved(before, after))


repeated = st.lists(st.integers(0, 6).map(target), max_size=30)


@fuzzed(200)
@given(repeated.map(tuple), repeated)
def test_a_repeated_endpoint_has_as_many_slots_as_it_is_wanted(before, wanted):
    after = assign(before, wanted)
    assert Counter(after) == Counter(wanted)


@fuzzed(200)
@given(repeated.map(tuple), repeated)
def test_repeated_endpoints_change_no_more_slots_than_are_added_or_removed(before, wanted):
    after = assign(before, wanted)
    gone, new = Counter(before) - Counter(wanted), Counter(wanted) - Counter(before)
    common = list(zip(before, after, strict=False))
    changed = sum(b != a for b, a in common)
    assert changed <= gone.total()
    assert changed + max(0, len(after) - len(before)) <= max(gone.total(), new.total())
    if not gone and not new:
        assert not before or after is before


@fuzzed(100)
@given(slots(), st.randoms(use_true_random=False))
def test_the_same_endpoints_in_another_order_are_the_same_slots(before, random):
    wanted = list(before)
    random.shuffle(wanted)
    assert assign(before, wanted) is before


@fuzzed(100)
@given(slots(), targets)
def test_assigning_again_changes_nothing(before, wanted):
    after = assign(before, wanted)
    assert assign(after, wanted) is after


@fuzzed(100)
@given(targets)
def test_a_new_list_keeps_its_order(wanted):
    assert assign((), wanted) == tuple(wanted)


A, B, C, D, E, X, Y = map(target, range(7))


@pytest.mark.parametrize(
    ("before", "wanted", "after"),
    [
        ((A, B, C), (A, B, C, X), (A, B, C, X)),
        ((A, B, C, D), (A, C, D), (A, D, C)),
        ((A, B, C, D), (A, B, C), (A, B, C)),
        ((A, B, C, D), (B, C, D, X), (X, B, C, D)),
        ((A, B, C, D, E), (C, D, E), (E, D, C)),
        ((A, B, C, D, E), (D, E, X), (X, E, D)),
        ((A, B, C), (X, Y), (X, Y)),
        ((A, B, C), (), ()),
        ((), (), ()),
    ],
)
def test_the_last_endpoint_moves_into_a_hole_that_nothing_new_fills(before, wanted, after):
    assert assign(before, wanted) == after


def test_more_endpoints_than_slots_are_cut_off():
    wanted = [target(n) for n in range(MAX_ENDPOINTS + 3)]
    assert len(assign((), wanted)) == MAX_ENDPOINTS
    assert len(assign((X,), wanted)) == MAX_ENDPOINTS


# --- widths --------------------------------------------------------------------------------------


def test_the_ladder_rises_and_at_most_doubles():
    assert LADDER[0] == 1
    assert all(low < high <= 2 * low for low, high in itertools.pairwise(LADDER))


@fuzzed(100)
@given(st.integers(0, MAX_ENDPOINTS))
def test_a_new_list_gets_the_first_width_that_holds_it(count):
    assert fitting(count) == min(width for width in LADDER if width >= count)


@fuzzed(100)
@given(st.integers(1, MAX_ENDPOINTS), st.sampled_from(LADDER))
def test_a_width_is_kept_while_the_list_fits_it_and_fills_fewest_of_it(count, width):
    if fewest(width) <= count <= width:
        assert fitting(count, width) == width
    else:
        assert fitting(count, width) == fitting(count)


@pytest.mark.parametrize("width", LADDER)
def test_an_empty_list_keeps_its_width(width):
    assert fitting(0, width) == width


@pytest.mark.parametrize("width", LADDER)
def test_a_width_just_grown_into_is_filled_enough_to_be_kept(width):
    """Else a Service could hold a width that `fitting` gives it and takes away again."""
    smallest = min(n for n in range(1, width + 1) if fitting(n) == width)
    assert 1 <= fewest(width) <= smallest <= width


@fuzzed(100)
@given(st.lists(st.integers(0, 200), min_size=1))
def test_whatever_the_history_the_fixed_draw_hits(counts):
    """The last draw is over the first `fewest` slots: all of them must be filled."""
    width = 0
    for count in counts:
        width = fitting(count, width)
        assert not count or fewest(width) <= count <= width


def quarter(size: int) -> tuple[int, int]:
    """The least and the most endpoints in a rolling update with Kubernetes' defaults: 25 % more,
    rounded up, and 25 % less, rounded down."""
    return size - size // 4, size + -(-size // 4)


def test_a_swing_by_a_quarter_in_both_directions_crosses_no_rung():
    crossing = []
    for size in range(1, MAX_ENDPOINTS * 4 // 5 + 1):
        least, most = quarter(size)
        width = fitting(most, fitting(size))
        if any(fitting(count, width) != width for count in (least, size, most)):
            crossing.append(size)
    assert not crossing, f"{len(crossing)} sizes from {crossing[0]} to {crossing[-1]}"


# --- how even the choice is ----------------------------------------------------------------------


def shares(count: int, width: int) -> tuple[float, float]:
    """The chance of a slot below `fewest`, and of one beyond it, to get a connection."""
    missing = (1 - count / width) ** (DRAWS if fewest(width) < width else 0)
    even = (1 - missing) / count
    return even + missing / fewest(width), even


@pytest.mark.parametrize("width", [w for w in LADDER if w > 1])
def test_a_slot_gets_no_less_than_the_documented_share(width):
    """3.1 % less than an even share at most in a width just grown into, 0.1 % three quarters full,
    nothing in a full one."""
    smallest = min(n for n in range(1, width + 1) if fitting(n) == width)
    for count, shortfall in ((smallest, 0.0313), (-(-3 * width // 4), 0.001), (width, 0.0)):
        high, low = shares(count, width)
        assert low * count >= 1 - shortfall - 1e-9
        first, rest = fewest(width), count - fewest(width)
        assert low * rest + high * first == pytest.approx(1)


@pytest.mark.parametrize("width", [w for w in LADDER if w <= 1024])
def test_the_worst_share_is_the_documented_one(width):
    """13.2 % less than an even share, in a width that is about to be left."""
    for count in range(fewest(width), width + 1):
        # with as many as `fewest` there is no slot beyond it, so all are alike
        if count > fewest(width):
            assert shares(count, width)[1] * count >= 1 - (2 / 3) ** DRAWS


@fuzzed(20)
@given(st.sampled_from(LADDER), st.booleans(), st.booleans())
def test_the_rules_draw_as_often_as_documented(width, node_port, inside):
    chains = {chain.name: chain for chain in build(Layout(4)).chains}
    name = balancer(width, node_port=node_port, inside=inside, sticky=False)
    moduli = [
        field.modulus
        for rule in chains[name].rules
        if hasattr(rule.statements[-1], "chain")  # else it marks
        for statement in chains[rule.statements[-1].chain].rules[0].statements
        for field in getattr(statement, "fields", ())
        if field.modulus
    ]
    draws = DRAWS if fewest(width) < width else 0
    assert moduli == [width] * draws + [fewest(width)]
