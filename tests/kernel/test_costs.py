"""What a change costs, counted exactly: element operations in the transaction, rules in the kernel.

An operation is one element deleted or added. Changing the data under a key takes two, since a map
element is changed by deleting and adding it. Verdict elements are counted apart: touching one makes
the kernel walk its whole map, touching a data element does not.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import pytest

from agent.config.settings import Settings
from lab.world import World
from rules.netlink.attributes import string
from rules.netlink.nftables import NFT_MSG_GETRULE, NFTA_RULE_TABLE
from rules.objects import EndpointSlice, Object, Service
from rules.slots import fitting
from rules.tables import FAMILIES, SETS
from rules.transaction import Transaction
from tests import manifest
from tests.kernel.proxy import Proxy

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make namespaces")

RULES = 1157
"""The rules of one family's table while no Service asks for session affinity and pods of this node
cannot be identified. All of them but 25 choose endpoints, over the 32 widths."""

MOST_RULES = 2619
"""The rules with both, one timeout being asked for; every other timeout adds four."""

HASH_RULES = 108
"""So many more while a Service asks for source-hash: 24 for each of 4 widths, 12 for one entry."""

BY_ENDPOINT_RULES = 9
"""So many more while connections of a Service are counted by endpoint."""

PER_SLICE, MOST_SLICES = 1000, 4
ADDRESSES = 6  # cluster IP, external IP and node port, in both families
PREFIX = {4: "10.{}.{}.{}", 6: "fd00:10:{:x}::{:x}:{:x}"}
VERDICTS = {"service-ips", "service-nodeports", "inside-ips", "inside-nodeports"}
DATA = {"endpoints", "nodeport-endpoints", "inside-endpoints", "inside-nodeport-endpoints"}


@pytest.fixture(scope="module")
def bare_world() -> Iterator[World]:
    with World(pods=0, remotes=0, prefix="sliceproxy-costs") as built:
        yield built


@pytest.fixture
def proxy(bare_world: World) -> Iterator[Proxy]:
    with Proxy(bare_world) as started:
        started.put(manifest.node(), manifest.service_cidr("10.96.0.0/16", "fd00:10:96::/112"))
        yield started
        started.check()
        started.kernel.remove()


def web(**fields: object) -> Object:
    """A Service with six addresses."""
    return manifest.service(
        type="NodePort",
        ports=[{"name": "http", "port": 80, "nodePort": 30080}],
        externalIPs=["198.51.100.1", "2001:db8::1"],
        **fields,
    )


def address(family: int, number: int) -> str:
    return PREFIX[family].format(number >> 16, number >> 8 & 255, number & 255)


def slices(numbers: list[int], *, node: str = "node-2", **conditions: bool) -> list[EndpointSlice]:
    """Endpoints with these numbers in both families, in slices of 1,000, the last ones empty."""
    pieces = [numbers[i : i + PER_SLICE] for i in range(0, MOST_SLICES * PER_SLICE, PER_SLICE)]
    return [
        manifest.endpoint_slice(
            "web",
            [manifest.endpoint(address(family, n), node=node, **conditions) for n in piece],
            name=f"web-{family}-{index}",
            family=f"IPv{family}",
        )
        for family in FAMILIES
        for index, piece in enumerate(pieces)
    ]


def operations(transaction: Transaction) -> Counter[str]:
    """Operations by set, both families together."""
    counts: Counter[str] = Counter()
    for side in (transaction.change.removed, transaction.change.added):
        for owner, items in side.items():
            counts[owner.name] += len(items)
    return counts


def data_operations(transaction: Transaction) -> int:
    counts = operations(transaction)
    assert not set(counts) - DATA, f"not only endpoints: {dict(counts)}"
    return counts.total()


def verdict_operations(transaction: Transaction) -> int:
    counts = operations(transaction)
    return sum(counts[name] for name in VERDICTS)


sizes = pytest.mark.parametrize("size", [4, 3000])
"""Sizes at which one more or one less stays in the width: 4 becomes 3, and 3,000 is below 4,096."""


@pytest.mark.parametrize("size", [3, 3000])
def test_an_added_endpoint_takes_one_operation_per_address(proxy, size):
    proxy.put(web(), *slices(list(range(size))))
    transaction = proxy.put(*slices(list(range(size + 1))))
    counts = operations(transaction)
    assert sum(counts[name] for name in DATA) == ADDRESSES
    # three fill their width, so the fourth changes the verdict: out with the old, in with the new
    outgrown = fitting(size) != fitting(size + 1)
    assert outgrown == (size == 3)
    assert counts.total() - ADDRESSES == verdict_operations(transaction)
    assert verdict_operations(transaction) == (2 * ADDRESSES if outgrown else 0)


@pytest.mark.parametrize("size", [3, 3000])
@pytest.mark.parametrize(
    ("place", "each"), [("first", 3), ("middle", 3), ("last", 1)], ids=["first", "middle", "last"]
)
def test_a_removed_endpoint_takes_three_operations_per_address_and_one_if_it_was_last(
    proxy, size, place, each
):
    numbers = list(range(size))
    proxy.put(web(), *slices(numbers))
    gone = {"first": 0, "middle": size // 2, "last": size - 1}[place]
    transaction = proxy.put(*slices([n for n in numbers if n != gone]))
    assert data_operations(transaction) == each * ADDRESSES


@sizes
def test_replacing_one_address_costs_two_per_address(proxy, size):
    numbers = list(range(size))
    proxy.put(web(), *slices(numbers))
    transaction = proxy.put(*slices([n if n != size // 2 else 40_000 for n in numbers]))
    assert data_operations(transaction) == 2 * ADDRESSES


def test_an_endpoint_on_this_node_costs_one_more_per_family(proxy):
    numbers = list(range(5))
    proxy.put(web(), *slices(numbers, node="node-1"))
    counts = operations(proxy.put(*slices([*numbers, 5], node="node-1")))
    assert counts.pop("hairpins") == len(FAMILIES)
    assert counts == {"endpoints": 4, "nodeport-endpoints": 2}


@sizes
def test_a_condition_that_flips_costs_what_coming_and_going_cost(proxy, size):
    numbers, tail = list(range(size - 1)), size - 1

    def with_tail(**conditions: bool | None) -> list[EndpointSlice]:
        return [
            *slices(numbers),
            *(
                manifest.endpoint_slice(
                    "web",
                    [manifest.endpoint(address(f, tail), node="node-2", **conditions)],
                    name=f"aaa-{f}",  # is first, so the endpoint is in the first slot
                )
                for f in FAMILIES
            ),
        ]

    def flip(**conditions: bool | None) -> int:
        return data_operations(proxy.put(*with_tail(**conditions)))

    proxy.put(web(), *with_tail())
    assert flip(ready=True, serving=True, terminating=False) == 0
    assert flip(ready=False) == 3 * ADDRESSES
    assert flip(ready=False, serving=True) == 0
    assert flip(ready=False, serving=True, terminating=True) == 0
    assert flip(ready=False, serving=False, terminating=True) == 0
    assert flip(ready=True) == ADDRESSES
    assert flip(ready=None) == 0
    assert flip(ready=False, serving=True, terminating=True) == ADDRESSES  # it was the last one


def test_under_policy_local_an_endpoint_elsewhere_costs_one_list_and_one_here_both(proxy):
    here, there = list(range(5)), list(range(100, 105))

    def both(here: list[int], there: list[int]) -> list[EndpointSlice]:
        away = slices(there)
        renamed = [s.__class__(**{**_fields(s), "name": _away(s)}) for s in away]
        return [*slices(here, node="node-1"), *renamed]

    proxy.put(web(externalTrafficPolicy="Local"), *both(here, there))
    # the cluster IP's list, and the lists of both external addresses for clients inside
    transaction = proxy.put(*both(here, [*there, 105]))
    assert data_operations(transaction) == ADDRESSES
    # each external address has the endpoint in both lists
    counts = operations(proxy.put(*both([*here, 5], [*there, 105])))
    assert counts.pop("hairpins") == len(FAMILIES)
    assert sum(counts[name] for name in DATA) == ADDRESSES + 4


def _fields(piece: EndpointSlice) -> dict[str, object]:
    return {name: getattr(piece, name) for name in piece.__struct_fields__}


def _away(piece: EndpointSlice) -> object:
    return piece.name._replace(name=f"away-{piece.name.name}")


@pytest.mark.parametrize("size", [3, 12, 100, 3000])
def test_a_rolling_update_by_a_quarter_changes_no_verdict_after_the_first_growth(proxy, size):
    """As Kubernetes rounds: a quarter more is rounded up, a quarter less rounded down."""
    most, least = size + -(-size // 4), size - size // 4
    proxy.put(web(), *slices(list(range(size))))
    proxy.put(*slices(list(range(most))))
    fresh = most
    for count in (least, size, most, size, least, most):
        transaction = proxy.put(*slices(list(range(fresh, fresh + count))))
        assert verdict_operations(transaction) == 0, count
        fresh += count


@pytest.mark.parametrize("size", [1, 5, 3000])
def test_scaling_to_nothing_and_back_touches_no_verdict(proxy, size):
    proxy.put(web(), *slices(list(range(size))))
    counts = operations(proxy.put(*slices([])))
    rejected = {"reject-ips": 4, "reject-nodeports": 2}
    assert counts == {"endpoints": 4 * size, "nodeport-endpoints": 2 * size, **rejected}
    counts = operations(proxy.put(*slices(list(range(size)))))
    assert counts == {"endpoints": 4 * size, "nodeport-endpoints": 2 * size, **rejected}


def test_verdicts_come_and_go_with_the_service(proxy):
    proxy.put(*slices(list(range(5))))
    came = proxy.put(web())
    assert verdict_operations(came) == ADDRESSES
    assert operations(came)["endpoints"] + operations(came)["nodeport-endpoints"] == 5 * ADDRESSES
    went = proxy.delete(web())
    assert operations(went) == operations(came)


def test_the_rules_are_as_many_for_ten_thousand_services_as_for_three(proxy):
    proxy.put(*_services(0, 3))
    for family in FAMILIES:
        assert _rules_in_kernel(proxy, family) == RULES
    proxy.put(*_services(3, 10_000))
    for family in FAMILIES:
        assert _rules_in_kernel(proxy, family) == RULES
    assert len(proxy.state.programs) == 10_000
    # nor does one endpoint more cost more among so many
    proxy.put(web(cluster_ips=["10.98.0.1", "fd00:10:98::1"]), *slices(list(range(4, 9))))
    assert data_operations(proxy.put(*slices(list(range(4, 10))))) == ADDRESSES


def test_the_rules_with_session_affinity_do_not_depend_on_services_either(bare_world):
    flags = Settings(
        node="node-1", detect_local_mode="ClusterCIDR", cluster_cidr="10.0.0.0/8,fd00::/16"
    ).options()
    with Proxy(bare_world, options=flags) as proxy:
        for behind in (3, 1000):
            proxy.put(*_services(0, behind, sessionAffinity="ClientIP"))
            for family in FAMILIES:
                assert _rules_in_kernel(proxy, family) == MOST_RULES
        config = {"clientIP": {"timeoutSeconds": 600}}
        proxy.put(web(sessionAffinity="ClientIP", sessionAffinityConfig=config))
        for family in FAMILIES:
            assert _rules_in_kernel(proxy, family) == MOST_RULES + 4
        proxy.check()
        proxy.kernel.remove()


def test_algorithms_cost_rules_only_where_source_hash_is_asked_for(proxy):
    """As many for a thousand Services as for one; none for weights, and none when they are gone."""
    weighted = manifest.balancing("weighted", weights="10.5.0.1=3", zone_weights="a=2")
    hashed = manifest.balancing("source-hash")
    proxy.put(*_services(0, 3, annotations=weighted))
    for family in FAMILIES:
        assert _rules_in_kernel(proxy, family) == RULES
    for behind in (4, 1000):
        proxy.put(*_services(3, behind, annotations=hashed))
        for family in FAMILIES:
            assert _rules_in_kernel(proxy, family) == RULES + HASH_RULES
    proxy.delete(*(o for o in _services(3, 1000) if isinstance(o, Service)))
    for family in FAMILIES:
        assert _rules_in_kernel(proxy, family) == RULES


def test_counters_by_endpoint_cost_rules_only_where_a_service_asks(proxy):
    """As many for a thousand Services as for one, none and no set when they are gone; and one
    element for each frontend of a Service that asks."""
    before = proxy.state.tables()
    asked = {"sliceproxy.io/endpoint-counters": "true"}
    ordinary = operations(proxy.put(web(), *slices([1, 2])))
    proxy.delete(web(), *slices([1, 2]))
    counted = operations(proxy.put(web(annotations=asked), *slices([1, 2])))
    assert counted - ordinary == {"counted-frontends": 4, "counted-nodeports": 2}
    for behind in (4, 1000):
        proxy.put(*_services(3, behind, annotations=asked))
        for family in FAMILIES:
            assert _rules_in_kernel(proxy, family) == RULES + BY_ENDPOINT_RULES
    proxy.check()
    proxy.delete(web(), *(o for o in _services(3, 1000) if isinstance(o, Service)))
    assert proxy.state.tables() == before
    for family in FAMILIES:
        assert _rules_in_kernel(proxy, family) == RULES
        assert not {s.name for s in SETS[family].by_endpoint} & proxy.kernel.set_names(family)


def test_a_weight_costs_as_many_elements_as_it_changes_by(proxy):
    endpoints = [manifest.endpoint(f"10.5.0.{n}", node="node-2") for n in range(1, 5)]
    ports = [{"port": 80}]

    def weigh(*weights: int) -> Object:
        text = ",".join(f"10.5.0.{n}={w}" for n, w in enumerate(weights, start=1))
        annotations = manifest.balancing("weighted", weights=text)
        return manifest.service(cluster_ips=["10.96.0.10"], ports=ports, annotations=annotations)

    sliced = manifest.endpoint_slice(endpoints=endpoints, ports=ports)
    assert operations(proxy.put(weigh(4, 3, 2, 1), sliced))["endpoints"] == 10
    assert data_operations(proxy.put(weigh(5, 3, 2, 1))) == 1
    assert data_operations(proxy.put(weigh(5, 3, 2, 2))) == 1
    # a hole takes two operations, and the last slot, which fills it, one more
    assert data_operations(proxy.put(weigh(3, 3, 2, 2))) <= 2 * 3
    assert data_operations(proxy.put(weigh(0, 3, 2, 2))) <= 3 * 3
    assert not proxy.put(weigh(0, 6, 4, 4)).change.operations, "the same proportion"


def _services(first: int, behind: int, **fields: object) -> Iterator[Object]:
    for n in range(first, behind):
        suffix = f"{n >> 8}.{n & 255}"
        ips = [f"10.97.{suffix}", f"fd00:10:97::{n + 1:x}"]
        yield manifest.service(f"web-{n}", cluster_ips=ips, **fields)
        yield manifest.endpoint_slice(f"web-{n}", [manifest.endpoint(f"10.5.{suffix}")])


def _rules_in_kernel(proxy: Proxy, family: int) -> int:
    """Answers to a GETRULE dump of our table."""
    found = proxy.kernel.find(family)
    assert found is not None
    request = string(NFTA_RULE_TABLE, "sliceproxy")
    answers = proxy.kernel.dump(NFT_MSG_GETRULE, family, request)
    assert len(answers) == sum(map(len, found.rules.values()))
    return len(answers)
