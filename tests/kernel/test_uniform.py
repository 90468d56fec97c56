"""How even the choice of an endpoint is: exactly, from the rules, and as packets show it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import pytest

from rules.language import Goto, Jump, Source, Translate
from rules.slots import DRAWS, LADDER, fewest, fitting
from rules.tables import SETS, Layout, balancer, build
from tests.kernel.conftest import CLUSTER_CIDR, Net
from tests.kernel.proxy import Proxy

Start = Callable[..., Proxy]

# --- exactly -------------------------------------------------------------------------------------

LAYOUT = Layout(4)
VARIANTS = [(node_port, inside) for node_port in (False, True) for inside in (False, True)]
widths = pytest.mark.parametrize("width", LADDER)


class Share(NamedTuple):
    """The slots from `first` to `end - 1` are drawn with this probability each."""

    first: int
    end: int
    probability: Fraction


def draws(layout: Layout, width: int, *, node_port: bool, inside: bool) -> list[Translate]:
    """The draws that a packet makes in the chain of this width, in order, while they miss."""
    chains = {chain.name: chain for chain in build(layout).chains}
    name = balancer(width, node_port=node_port, inside=inside, sticky=False)
    found = []
    for rule in chains[name].rules:
        last = rule.statements[-1]
        if isinstance(last, Jump | Goto):
            (drawing,) = chains[last.chain].rules
            (statement,) = drawing.statements
            assert isinstance(statement, Translate)
            assert statement.fields[-1].source is Source.RANDOM
            found.append(statement)
    return found


def moduli_of(drawn: list[Translate]) -> list[int]:
    """How many slots each draws from."""
    return [statement.fields[-1].modulus for statement in drawn]


def shares(moduli: list[int], count: int) -> list[Share]:
    """The probability of every slot if the first `count` are filled, and of them alone.

    A draw from `modulus` slots takes each with 1 / modulus; where it misses, the next rule draws.
    Slots that are within the same draws are alike, so they are counted together.
    """
    bounds = sorted({0, count, *(m for m in moduli if m < count)})
    result = []
    for first, end in pairwise(bounds):
        probability, missed = Fraction(0), Fraction(1)
        for modulus in moduli:
            if first < modulus:
                probability += missed / modulus
            missed *= 1 - Fraction(min(count, modulus), modulus)
        result.append(Share(first, end, probability))
    return result


def fillings(width: int) -> Iterator[int]:
    """Every number of endpoints with which a Service may have this width: all up to 2,048 of
    them, else those at both ends and many between."""
    allowed = range(fewest(width), width + 1)
    step = max(1, len(allowed) // 2048)
    yield from sorted({*allowed[:64], *allowed[::step], *allowed[-64:]})


@widths
def test_a_chain_draws_from_its_width_and_at_last_from_slots_that_are_filled(width: int) -> None:
    """All chains of a width alike, in both families: what is computed for one holds for all."""
    expected = [width] * (DRAWS if fewest(width) < width else 0) + [fewest(width)]
    for family in (4, 6):
        sets = SETS[family]
        for node_port, inside in VARIANTS:
            drawn = draws(Layout(family), width, node_port=node_port, inside=inside)
            assert moduli_of(drawn) == expected
            assert {statement.map for statement in drawn} == {
                sets.endpoint_map(node_port=node_port, inside=inside)
            }


@widths
def test_no_connection_misses_and_each_slot_gets_what_is_stated(width: int) -> None:
    """With f = N / width, a slot beyond FEWEST gets (1 - f)^DRAWS less than 1 / N, and those
    within share what that leaves."""
    moduli = moduli_of(draws(LAYOUT, width, **_PLAIN))
    for count in fillings(width):
        found = shares(moduli, count)
        assert sum((s.end - s.first) * s.probability for s in found) == 1
        missed = (1 - Fraction(count, width)) ** DRAWS
        for share in found:
            relative = share.probability * count - 1
            if share.first >= fewest(width):
                assert relative == -missed
            else:
                assert relative == missed * (Fraction(count, fewest(width)) - 1)


_PLAIN = {"node_port": False, "inside": False}


def unevenness(width: int, count: int) -> Fraction:
    """How far the probability of any slot is from even, relative to that."""
    moduli = moduli_of(draws(LAYOUT, width, **_PLAIN))
    return max(abs(share.probability * count - 1) for share in shares(moduli, count))


@widths
def test_a_full_width_and_the_fewest_endpoints_are_exactly_even(width: int) -> None:
    assert unevenness(width, width) == 0
    assert unevenness(width, fewest(width)) == 0


@pytest.mark.parametrize("below", LADDER[:-1])
def test_a_width_just_grown_into_is_even_to_one_in_thirty_two(below: int) -> None:
    """3.1 % where the ladder doubles, as filling is just over a half."""
    width = fitting(below + 1)
    for count in {below + 1, (below + 1 + width) // 2, width}:
        assert unevenness(width, count) < Fraction(1, 2**DRAWS)


@widths
def test_three_quarters_full_is_even_to_a_five_hundredth(width: int) -> None:
    count = -(-3 * width // 4)
    assert unevenness(width, count) <= Fraction(1, 512)


@widths
def test_a_width_shrunk_in_is_even_to_an_eighth_at_worst(width: int) -> None:
    """Just above FEWEST the last draw matters most: (2/3)^DRAWS is 13.2 %."""
    assert max(unevenness(width, count) for count in fillings(width)) < Fraction(2, 3) ** DRAWS


# --- as packets show it --------------------------------------------------------------------------

PODS = tuple(f"pod-{number}" for number in range(1, 7))
REMOTES = tuple(f"remote-{number}" for number in range(1, 4))
CONNECTIONS = 900
LEAST_P_VALUE = 1e-6


def p_value(observed: Counter[str], expected: dict[str, float]) -> float:
    """Pearson's chi-square test: how likely counts at least as uneven are. The degrees of freedom
    must be even, for which the distribution has a closed form."""
    freedom = len(expected) - 1
    assert freedom % 2 == 0
    assert observed.keys() <= expected.keys()
    total = observed.total()
    statistic = sum((observed[k] - total * p) ** 2 / (total * p) for k, p in expected.items())
    half = statistic / 2
    return math.exp(-half) * sum(half**i / math.factorial(i) for i in range(freedom // 2))


def test_the_p_value_is_that_of_tables() -> None:
    even = dict.fromkeys("abc", 1 / 3)
    assert p_value(Counter(a=10, b=10, c=10), even) == 1
    # chi-square 5.991 with 2 degrees of freedom is the 5 % point, 15.507 with 8 likewise
    assert math.exp(-5.991 / 2) == pytest.approx(0.05, abs=1e-4)
    assert p_value(Counter(a=400, b=300, c=300), even) == pytest.approx(math.exp(-10), rel=1e-6)
    assert p_value(Counter(a=600, b=500, c=400), even) < LEAST_P_VALUE


SIZES = {
    "3 of 3": (PODS[:3], 3),
    "5 of 6": (PODS[:5], 6),
    "9 of 12": (PODS + REMOTES, 12),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("frontend", ["cluster-ip", "node-port"])
def test_connections_are_spread_evenly(proxy: Start, net: Net, frontend: str, size: str) -> None:
    hosts, width = SIZES[size]
    assert fitting(len(hosts)) == width
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    p.put(net.service(), net.slice(*hosts))
    counts = Counter(net.server("client", net.at(frontend)) for _ in range(CONNECTIONS))
    assert p_value(counts, dict.fromkeys(hosts, 1 / len(hosts))) > LEAST_P_VALUE, counts


def test_connections_inside_are_spread_evenly_under_policy_local(proxy: Start, net: Net) -> None:
    """The second list, in slots of its own."""
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    hosts = PODS + REMOTES
    p.put(net.service(externalTrafficPolicy="Local"), net.slice(*hosts))
    counts = Counter(net.server("node", net.at("external-ip")) for _ in range(CONNECTIONS))
    assert p_value(counts, dict.fromkeys(hosts, 1 / len(hosts))) > LEAST_P_VALUE, counts


def test_a_shrunk_width_spreads_as_computed(proxy: Start, net: Net) -> None:
    """5 of 12: each of the first FEWEST slots holds an endpoint, and no other does."""
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    p.put(net.service(), net.slice(*PODS, *REMOTES))
    hosts = PODS[:3] + REMOTES[:2]
    p.put(net.slice(*hosts))
    assert fitting(len(hosts), 12) == 12
    counts = Counter(net.server("client", net.at("cluster-ip")) for _ in range(CONNECTIONS))
    assert p_value(counts, dict.fromkeys(hosts, 1 / len(hosts))) > LEAST_P_VALUE, counts
