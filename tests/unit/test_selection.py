"""Which endpoints are used, clause by clause of the specification, and the reason given."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rules.objects import (
    READY,
    SERVING,
    TCP,
    TERMINATING,
    UDP,
    Endpoint,
    Endpoints,
    EndpointSlice,
    Name,
    ServicePort,
    SlicePort,
)
from rules.selection import (
    Basis,
    NodeLocation,
    Selection,
    candidates,
    cluster_list,
    local_list,
    reason,
)
from rules.target import target_of
from tests import manifest, oracle
from tests.fuzzing import fuzzed

HERE = NodeLocation("node-1", "z1")
READY_SERVING = READY | SERVING
LEAVING = SERVING | TERMINATING


def endpoint(
    number: int,
    conditions: int = READY_SERVING,
    node: str = "node-2",
    *,
    nodes: tuple[str, ...] = (),
    zones: tuple[str, ...] = (),
) -> Endpoint:
    return Endpoint(bytes((10, 0, 0, number)), conditions, node, "", nodes, zones)


def target(number: int, port: int = 8080) -> bytes:
    return target_of(bytes((10, 0, 0, number)), port)


def piece(
    *endpoints: Endpoint,
    name: str = "a",
    ports: tuple[SlicePort, ...] = (SlicePort("http", TCP, 8080),),
    family: int = 4,
    created: str = "",
) -> EndpointSlice:
    return EndpointSlice(
        Name("default", name),
        Name("default", "web"),
        None,
        False,
        family,
        ports,
        Endpoints.of(endpoints),
        created=created,
    )


def found(*endpoints: Endpoint) -> dict[bytes, Endpoint]:
    return candidates([piece(*endpoints)], 4, "http", TCP)


def numbers(selection: Selection) -> list[int]:
    """The last byte of each used address."""
    return [t[3] for t in selection.targets]


def used(selection: Selection) -> tuple[Basis, list[int]]:
    return selection.basis, numbers(selection)


# --- candidates ----------------------------------------------------------------------------------


def test_a_port_matches_by_name():
    two = piece(endpoint(1), ports=(SlicePort("http", TCP, 8080), SlicePort("metrics", TCP, 9090)))
    assert list(candidates([two], 4, "metrics", TCP)) == [target(1, 9090)]
    assert list(candidates([two], 4, "", TCP)) == []
    assert list(candidates([two], 4, "http", UDP)) == []


def test_the_target_port_may_differ_between_slices():
    slices = [
        piece(endpoint(1), name="a", ports=(SlicePort("http", TCP, 8080),)),
        piece(endpoint(2), name="b", ports=(SlicePort("http", TCP, 8081),)),
    ]
    assert list(candidates(slices, 4, "http", TCP)) == [target(1, 8080), target(2, 8081)]


def test_slices_without_ports_or_of_another_family_give_none():
    slices = [piece(endpoint(1), ports=()), piece(endpoint(2), family=6), piece(endpoint(3))]
    assert list(candidates(slices, 4, "http", TCP)) == [target(3)]


def test_a_nil_port_number_gives_no_endpoints():
    ports = [{"name": "http", "port": None}]
    nil = manifest.endpoint_slice("web", [manifest.endpoint("10.0.0.1")], ports=ports)
    assert nil.ports == ()
    assert nil.problems == ()
    assert candidates([nil], 4, "http", TCP) == {}


OLD, YOUNG = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize(
    ("old", "young", "counts"),
    [
        (LEAVING, 0, 0),
        (0, LEAVING, LEAVING),
        (LEAVING, SERVING, SERVING),
        (READY_SERVING, 0, READY_SERVING),
        (0, READY_SERVING, READY_SERVING),
    ],
)
def test_of_two_copies_that_are_not_ready_the_one_in_the_younger_slice_counts(
    old, young, counts, order
):
    """The controller wrote the younger slice last; a ready copy counts in any case."""
    copies = [
        piece(endpoint(1, old), name="z", created=OLD),
        piece(endpoint(1, young), name="a", created=YOUNG),
    ]
    result = candidates([copies[i] for i in order], 4, "http", TCP)
    assert [e.conditions for e in result.values()] == [counts]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (READY_SERVING, 0),
        (READY_SERVING, LEAVING),
        (READY, SERVING),
        (LEAVING, 0),
        (LEAVING, SERVING),
        (LEAVING, TERMINATING),
    ],
)
def test_of_two_copies_the_better_counts_once_in_any_order(better, worse, order):
    copies = [piece(endpoint(1, better), name="a"), piece(endpoint(1, worse), name="b")]
    result = candidates([copies[i] for i in order], 4, "http", TCP)
    assert [e.conditions for e in result.values()] == [better]


def test_of_two_equal_copies_the_first_counts():
    slices = [piece(endpoint(1, node="x"), name="a"), piece(endpoint(1, node="y"), name="b")]
    assert [e.node for e in candidates(slices, 4, "http", TCP).values()] == ["x"]


# --- conditions ----------------------------------------------------------------------------------

FLAGS = (True, False, None)


@pytest.mark.parametrize(
    ("ready", "serving", "terminating"), list(itertools.product(FLAGS, repeat=3))
)
def test_absent_conditions_mean_what_the_api_says(ready, serving, terminating):
    document = manifest.endpoint("10.0.0.1")
    document["conditions"] = {
        name: value
        for name, value in (("ready", ready), ("serving", serving), ("terminating", terminating))
        if value is not None
    }
    (decoded,) = manifest.endpoint_slice("web", [document]).endpoints
    is_ready = ready is not False
    is_serving = is_ready or serving is not False
    wanted = READY * is_ready | SERVING * is_serving | TERMINATING * bool(terminating)
    assert decoded.conditions == wanted
    explicit_nulls = manifest.endpoint(
        "10.0.0.1", ready=ready, serving=serving, terminating=terminating
    )
    assert list(manifest.endpoint_slice("web", [explicit_nulls]).endpoints) == [decoded]


@pytest.mark.parametrize("conditions", ["absent", None, {}])
def test_no_conditions_at_all_mean_ready(conditions):
    document = manifest.endpoint("10.0.0.1")
    document["conditions"] = conditions
    if conditions == "absent":
        del document["conditions"]
    (decoded,) = manifest.endpoint_slice("web", [document]).endpoints
    assert decoded.conditions == READY | SERVING


def test_only_the_first_address_of_an_endpoint_counts():
    document = manifest.endpoint("10.0.0.1")
    document["addresses"] = ["10.0.0.1", "10.0.0.2"]
    (decoded,) = manifest.endpoint_slice("web", [document]).endpoints
    assert decoded.address == bytes((10, 0, 0, 1))


# --- the cluster list ----------------------------------------------------------------------------


def test_all_ready_endpoints_are_used_wherever_they_are():
    selection = cluster_list(found(endpoint(1, node="node-1"), endpoint(2), endpoint(3, 0)), HERE)
    assert used(selection) == (Basis.READY, [1, 2])


def test_ready_is_enough_whatever_else_holds():
    """publishNotReadyAddresses: the controller calls a terminating endpoint ready."""
    everything = endpoint(2, READY | SERVING | TERMINATING)
    selection = cluster_list(found(endpoint(1, READY), everything), HERE)
    assert used(selection) == (Basis.READY, [1, 2])


def test_terminating_ones_that_serve_are_used_only_if_none_is_ready():
    leaving = (endpoint(1, LEAVING), endpoint(2, TERMINATING), endpoint(3, SERVING), endpoint(4, 0))
    assert used(cluster_list(found(*leaving), HERE)) == (Basis.TERMINATING, [1])
    selection = cluster_list(found(*leaving, endpoint(5)), HERE)
    assert used(selection) == (Basis.READY, [5])


def test_nothing_usable_is_none():
    selection = cluster_list(found(endpoint(1, 0), endpoint(2, SERVING)), HERE)
    assert used(selection) == (Basis.NONE, [])
    assert used(cluster_list({}, HERE)) == (Basis.NONE, [])


def test_node_hints_narrow_if_every_ready_one_has_them_and_one_names_this_node():
    mine, other = endpoint(1, nodes=("node-1", "x")), endpoint(2, nodes=("x",))
    assert used(cluster_list(found(mine, other), HERE)) == (Basis.NODE_HINTS, [1])
    assert used(cluster_list(found(other), HERE)) == (Basis.READY, [2])
    assert used(cluster_list(found(mine, other, endpoint(3)), HERE)) == (Basis.READY, [1, 2, 3])


def test_zone_hints_narrow_likewise():
    mine, other = endpoint(1, zones=("z1", "z3")), endpoint(2, zones=("z2",))
    assert used(cluster_list(found(mine, other), HERE)) == (Basis.ZONE_HINTS, [1])
    assert used(cluster_list(found(other), HERE)) == (Basis.READY, [2])
    assert used(cluster_list(found(mine, other, endpoint(3)), HERE)) == (Basis.READY, [1, 2, 3])


def test_node_hints_come_before_zone_hints():
    mine = endpoint(1, nodes=("node-1",), zones=("z2",))
    zone = endpoint(2, nodes=("node-2",), zones=("z1",))
    assert used(cluster_list(found(mine, zone), HERE)) == (Basis.NODE_HINTS, [1])
    # node hints name only others: the zone decides
    elsewhere = endpoint(1, nodes=("node-3",), zones=("z2",))
    assert used(cluster_list(found(elsewhere, zone), HERE)) == (Basis.ZONE_HINTS, [2])


def test_hints_of_endpoints_that_are_not_ready_do_not_matter():
    mine = endpoint(1, zones=("z1",))
    unready = endpoint(2, 0), endpoint(3, LEAVING), endpoint(4, LEAVING, zones=("z1",))
    assert used(cluster_list(found(mine, *unready), HERE)) == (Basis.ZONE_HINTS, [1])
    away = endpoint(1, zones=("z2",))
    assert used(cluster_list(found(away, *unready), HERE)) == (Basis.READY, [1])


def test_hints_do_not_narrow_terminating_endpoints():
    leaving = endpoint(1, LEAVING, zones=("z1",)), endpoint(2, LEAVING, zones=("z2",))
    assert used(cluster_list(found(*leaving), HERE)) == (Basis.TERMINATING, [1, 2])


@pytest.mark.parametrize("zones", [("z1",), ("",), ("", "z1")])
def test_a_node_without_a_zone_is_named_by_no_hint(zones):
    selection = cluster_list(
        found(endpoint(1, zones=zones), endpoint(2, zones=("z2",))), NodeLocation("node-1", "")
    )
    assert used(selection) == (Basis.READY, [1, 2])


# --- the local list ------------------------------------------------------------------------------


def test_the_local_list_holds_what_is_on_this_node():
    local = endpoint(1, node="node-1"), endpoint(3, 0, node="node-1")
    selection = local_list(found(*local, endpoint(2), endpoint(4, node="")), HERE)
    assert used(selection) == (Basis.LOCAL_READY, [1])


def test_local_terminating_ones_are_used_even_if_others_elsewhere_are_ready():
    local = endpoint(1, LEAVING, node="node-1"), endpoint(3, TERMINATING, node="node-1")
    selection = local_list(found(*local, endpoint(2)), HERE)
    assert used(selection) == (Basis.LOCAL_TERMINATING, [1])


def test_hints_do_not_narrow_the_local_list():
    local = (
        endpoint(1, node="node-1", zones=("z2",), nodes=("node-2",)),
        endpoint(2, node="node-1", zones=("z1",), nodes=("node-1",)),
    )
    assert used(local_list(found(*local), HERE)) == (Basis.LOCAL_READY, [1, 2])


def test_nothing_here_is_none():
    assert used(local_list(found(endpoint(1)), HERE)) == (Basis.NONE, [])


# --- against the oracle --------------------------------------------------------------------------

some_endpoints = st.lists(
    st.builds(
        endpoint,
        st.integers(1, 6),
        st.integers(0, 7),
        st.sampled_from(("node-1", "node-2", "")),
        nodes=st.sampled_from(((), ("node-1",), ("node-2",))),
        zones=st.sampled_from(((), ("z1",), ("z2",), ("z1", "z2"))),
    ),
    max_size=6,
)


@fuzzed(100)
@given(st.lists(some_endpoints, max_size=3), st.sampled_from(("z1", "z2", "z3", "")))
def test_both_lists_are_what_a_second_reading_of_the_specification_says(content, zone):
    slices = [piece(*endpoints, name=f"s{n}") for n, endpoints in enumerate(content)]
    mine = candidates(slices, 4, "http", TCP)
    theirs = oracle.endpoints_of(slices, 4, ServicePort("http", TCP, 80, 0))
    assert {oracle.target_of(t): e for t, e in mine.items()} == theirs
    place = NodeLocation("node-1", zone)
    for selection, wanted in (
        (cluster_list(mine, place), oracle.cluster_list(theirs, "node-1", zone)),
        (local_list(mine, place), oracle.local_list(theirs, "node-1")),
    ):
        assert frozenset(map(oracle.target_of, selection.targets)) == wanted
        assert len(selection.targets) == len(wanted)
        assert (selection.basis is Basis.NONE) == (not wanted)


@fuzzed(100)
@given(some_endpoints, st.booleans())
def test_whether_a_reason_speaks_of_use_agrees_with_the_selection(content, local):
    mine = found(*content)
    selection = (local_list if local else cluster_list)(mine, HERE)
    for its_target, its_endpoint in mine.items():
        text = reason(its_endpoint, its_target, selection, HERE)
        assert text
        assert (text == selection.basis.value) == (its_target in selection.targets)


# --- reasons -------------------------------------------------------------------------------------


def why(subject: Endpoint, *others: Endpoint, local: bool = False) -> str:
    everything = found(subject, *others)
    selection = (local_list if local else cluster_list)(everything, HERE)
    return reason(subject, subject.address + target(0)[4:], selection, HERE)


def test_reasons_for_use():
    assert why(endpoint(1)) == "ready"
    assert why(endpoint(1, nodes=("node-1",))) == "ready and hinted for this node"
    assert why(endpoint(1, zones=("z1",))) == "ready and hinted for this zone"
    assert why(endpoint(1, LEAVING)) == "serving while terminating, as none is ready"
    assert why(endpoint(1, node="node-1"), local=True) == "ready and on this node"
    assert (
        why(endpoint(1, LEAVING, "node-1"), endpoint(2), local=True)
        == "serving while terminating on this node, as none here is ready"
    )


def test_reasons_against_use_under_policy_cluster():
    other = endpoint(9)
    assert why(endpoint(1, 0), other) == "not ready"
    assert why(endpoint(1, SERVING), other) == "not ready"
    assert why(endpoint(1, TERMINATING), other) == "terminating, not serving"
    assert why(endpoint(1, LEAVING), other) == "terminating, and others are ready"
    assert why(endpoint(1, 0)) == "not ready"
    assert why(endpoint(1, TERMINATING), endpoint(2, LEAVING)) == "terminating, not serving"


def test_reasons_against_use_because_of_hints():
    for_node = endpoint(9, nodes=("node-1",))
    assert why(endpoint(1, nodes=("a", "b")), for_node) == "hinted for a, b"
    for_zone = endpoint(9, zones=("z1",))
    assert why(endpoint(1, zones=("z2", "z3")), for_zone) == "hinted for z2, z3"
    assert why(endpoint(1, 0, zones=("z2",)), for_zone) == "not ready"
    assert why(endpoint(1, LEAVING), for_zone) == "terminating, and others are ready"


def test_reasons_against_use_under_policy_local():
    here = endpoint(9, node="node-1")
    away = "on node-2, and the policy is Local"
    assert why(endpoint(1), here, local=True) == away
    assert why(endpoint(1), local=True) == away
    assert why(endpoint(1, LEAVING), local=True) == away
    assert why(endpoint(1), endpoint(9, LEAVING, "node-1"), local=True) == away
    nowhere = "on an unknown node, and the policy is Local"
    assert why(endpoint(1, node=""), here, local=True) == nowhere
    assert why(endpoint(1, node=""), local=True) == nowhere
    assert why(endpoint(1, 0, "node-1"), here, local=True) == "not ready"
    assert why(endpoint(1, 0, "node-1"), local=True) == "not ready"
    assert why(endpoint(1, TERMINATING, "node-1"), local=True) == "terminating, not serving"
    assert why(endpoint(1, LEAVING, "node-1"), here, local=True) == (
        "terminating, and others are ready"
    )
