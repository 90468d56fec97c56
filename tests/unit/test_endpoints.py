"""The table of a Service's endpoints: rows, uses, reasons, duplicates, errors."""

from __future__ import annotations

import io
from typing import Any

import msgspec
import pytest
from rich.console import Console

from agent.cli.endpoints import show
from agent.config.settings import Settings
from rules.endpoint_counts import is_counted, with_connections
from rules.endpoint_report import (
    EndpointTable,
    PortTable,
    QuestionError,
    Row,
    Use,
    endpoints,
)
from rules.events import Upsert
from rules.frontends import destination_key
from rules.netlink.counters import Count
from rules.objects import TCP, Object, parse_address
from rules.state import State
from rules.tables import SETS
from rules.target import target_of
from tests.manifest import balancing, endpoint, endpoint_slice, node, service

HTTP = {"name": "http", "port": 80}
DNS = {"name": "dns", "port": 53, "protocol": "UDP"}


def stepped(*objects: Object) -> State:
    state = State(Settings(node="node-1").options())
    state.apply([Upsert(o) for o in (node(zone="a"), *objects)])
    state.step()
    return state


def table(*objects: Object, question: str = "default/web") -> EndpointTable:
    return endpoints(stepped(*objects), question)


def only_port(found: EndpointTable) -> PortTable:
    (port,) = found.ports
    return port


def text(found: EndpointTable) -> str:
    console = Console(file=io.StringIO(), width=200)
    show(found, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def web(**spec: Any) -> Object:
    return service(cluster_ips=["10.96.0.10"], **spec)


def test_a_row_says_all_there_is() -> None:
    found = table(
        web(),
        endpoint_slice(
            "web",
            [endpoint("10.0.0.1", node="node-2", zone="b", for_zones=["a"], for_nodes=["node-1"])],
        ),
    )
    assert (found.service, found.node, found.zone, found.notes) == (
        "default/web",
        "node-1",
        "a",
        (),
    )
    port = only_port(found)
    assert (port.name, port.protocol, port.port, port.family) == ("http", "tcp", 80, 4)
    assert port.rows == (
        Row(
            address="10.0.0.1",
            port=8080,
            ready=True,
            serving=True,
            terminating=False,
            node="node-2",
            zone="b",
            node_hints=("node-1",),
            zone_hints=("a",),
            pod="",
            slice="web-ipv4",
            counts=True,
            cluster=Use(True, "ready and hinted for this node"),
            local=None,
        ),
    )


@pytest.mark.parametrize(
    ("spec", "cluster", "local"),
    [
        ({}, True, False),
        ({"internalTrafficPolicy": "Local"}, False, True),
        # a cluster IP only: nothing is external
        ({"externalTrafficPolicy": "Local"}, True, False),
        ({"externalTrafficPolicy": "Local", "externalIPs": ["203.0.113.1"]}, True, True),
        (
            {
                "externalTrafficPolicy": "Local",
                "internalTrafficPolicy": "Local",
                "externalIPs": ["203.0.113.1"],
            },
            True,
            True,
        ),
        ({"internalTrafficPolicy": "Local", "externalIPs": ["203.0.113.1"]}, True, True),
    ],
)
def test_the_policies_that_the_service_uses(
    spec: dict[str, object], cluster: bool, local: bool
) -> None:
    found = table(web(**spec), endpoint_slice("web", [endpoint("10.0.0.1")]))
    (row,) = only_port(found).rows
    assert (row.cluster is not None, row.local is not None) == (cluster, local)


def test_weights_are_shown_where_they_count_and_a_drained_endpoint_says_so() -> None:
    weights = balancing("weighted", weights="10.0.0.2=0", zone_weights="b=3")
    piece = endpoint_slice(
        "web", [endpoint("10.0.0.1", zone="b"), endpoint("10.0.0.2"), endpoint("10.0.0.3")]
    )
    found = table(web(annotations=weights), piece)
    rows = only_port(found).rows
    assert found.algorithm == "weighted"
    assert [(r.address, r.weight) for r in rows] == [
        *(("10.0.0.1", 3), ("10.0.0.3", 1), ("10.0.0.2", 0))
    ]
    assert [r.cluster for r in rows] == [
        *(Use(True, "ready"), Use(True, "ready"), Use(False, "drained: its weight is 0"))
    ]
    ordinary = table(web(), piece)
    assert ordinary.algorithm == "random"
    assert {r.weight for r in only_port(ordinary).rows} == {None}


COUNTED = {"sliceproxy.io/endpoint-counters": "true"}
NODE_PORT = {"name": "http", "port": 80, "nodePort": 30080}


def test_connections_are_those_at_all_frontends_of_the_service_alone() -> None:
    """An address of another Service has the node port's number: those are the other's."""
    state = stepped(
        *(web(annotations=COUNTED, type="NodePort", ports=[NODE_PORT]),),
        endpoint_slice("web", [endpoint("10.0.0.1"), endpoint("10.0.0.2")]),
        service(
            "other",
            cluster_ips=["10.96.0.11"],
            ports=[{"name": "http", "port": 30080}],
            annotations=COUNTED,
        ),
    )
    counts = {
        SETS[4].endpoint_counters: {
            destination_key(parse_address(asked), TCP, port)
            + target_of(parse_address("10.0.0.1"), 8080): Count(packets, 60 * packets)
            for asked, port, packets in (
                *(("10.96.0.10", 80, 1), ("172.31.0.2", 30080, 2), ("172.31.0.3", 30080, 4)),
                *(("10.96.0.11", 30080, 8), ("10.96.0.12", 80, 16)),
            )
        }
    }
    table = endpoints(state, "default/web")
    assert is_counted(state, table)
    found = with_connections(state, table, counts)
    assert [(r.address, r.connections) for r in only_port(found).rows] == [
        *(("10.0.0.1", 7), ("10.0.0.2", 0))
    ]
    assert "connections" in text(found)
    assert "connections" not in text(table)


@pytest.mark.parametrize("asks", ["true", "false", "True", "1", ""])
def test_the_annotation_for_counters_is_true_or_false(asks: str) -> None:
    annotations = {"sliceproxy.io/endpoint-counters": asks}
    found = stepped(web(annotations=annotations), endpoint_slice("web", [endpoint("10.0.0.1")]))
    assert is_counted(found, endpoints(found, "default/web")) == (asks == "true")
    problems = [p.code for p in found.problems.open()]
    assert problems == ([] if asks in ("true", "false") else ["unusable_value"])


def test_used_ones_come_first_with_the_reasons_of_both_policies() -> None:
    found = table(
        web(externalTrafficPolicy="Local", externalIPs=["203.0.113.1"]),
        endpoint_slice(
            "web",
            [
                endpoint("10.0.0.3", ready=False),
                endpoint("10.0.0.2", node="node-2"),
                endpoint("10.0.0.1"),
            ],
        ),
    )
    rows = only_port(found).rows
    assert [r.address for r in rows] == ["10.0.0.2", "10.0.0.1", "10.0.0.3"]
    assert [r.cluster for r in rows] == [
        Use(True, "ready"),
        Use(True, "ready"),
        Use(False, "not ready"),
    ]
    assert [r.local for r in rows] == [
        Use(False, "on node-2, and the policy is Local"),
        Use(True, "ready and on this node"),
        Use(False, "not ready"),
    ]


def test_a_copy_in_another_slice_is_shown_beside_the_one_that_counts() -> None:
    found = table(
        web(),
        endpoint_slice("web", [endpoint("10.0.0.1", ready=False)], name="web-a"),
        endpoint_slice("web", [endpoint("10.0.0.9"), endpoint("10.0.0.1")], name="web-b"),
    )
    rows = only_port(found).rows
    assert [(r.address, r.slice, r.counts) for r in rows] == [
        ("10.0.0.1", "web-b", True),
        ("10.0.0.1", "web-a", False),
        ("10.0.0.9", "web-b", True),
    ]
    assert rows[1].cluster == Use(False, "the copy in another slice counts")
    assert "2 endpoints, 2 used" in text(found)


def test_families_and_ports_have_tables_of_their_own() -> None:
    ports = [{"name": "http", "port": 8080}, {"name": "dns", "port": 5353, "protocol": "UDP"}]
    state = stepped(
        service(ports=[HTTP, DNS]),
        endpoint_slice("web", [endpoint("10.0.0.1")], ports=ports),
        endpoint_slice("web", [endpoint("fd00::1")], ports=ports[:1]),
    )
    found = endpoints(state, "default/web")
    assert [(p.name, p.family, len(p.rows)) for p in found.ports] == [
        ("http", 4, 1),
        ("http", 6, 1),
        ("dns", 4, 1),
        ("dns", 6, 0),
    ]
    assert found.ports[3].notes == (
        "slice web-ipv6 has no port named 'dns' (udp), so it does not count",
    )
    assert endpoints(state, "default/web:dns").ports == found.ports[2:]
    assert endpoints(state, "default/web:80").ports == found.ports[:2]
    assert "[fd00::1]:8080" in text(found)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("web", "NAMESPACE/NAME, did you mean default/web"),
        ("nothing", "NAMESPACE/NAME, for instance default/web"),
        ("default/", "write NAMESPACE/NAME"),
        ("default/wbe", "no Service default/wbe; did you mean default/web"),
        ("far/away", "no Service far/away$"),
        ("default/web:https", r"no port https; its ports are: 80/tcp \(http\), 53/udp \(dns\)"),
    ],
)
def test_a_question_that_cannot_be_answered(question: str, message: str) -> None:
    with pytest.raises(QuestionError, match=message) as caught:
        table(service(ports=[HTTP, DNS]), question=question)
    assert "\n" not in str(caught.value)


def test_notes_say_why_there_is_nothing() -> None:
    (note,) = table(web()).notes
    assert note == "no EndpointSlice has the label kubernetes.io/service-name=web"
    headless = service(cluster_ips=["None"])
    assert (
        "no cluster IP" in table(headless, endpoint_slice("web", [endpoint("10.0.0.1")])).notes[0]
    )


def test_the_json_is_the_table() -> None:
    found = table(web(), endpoint_slice("web", [endpoint("10.0.0.1")]))
    assert msgspec.json.decode(msgspec.json.encode(found), type=EndpointTable) == found


def test_conditions_in_words() -> None:
    found = table(
        web(),
        endpoint_slice(
            "web",
            [
                endpoint("10.0.0.1", ready=False, serving=True, terminating=True),
                endpoint("10.0.0.2", ready=False, serving=False, terminating=True),
                endpoint("10.0.0.3", ready=False),
            ],
        ),
    )
    shown = text(found)
    for words in ("terminating, serving", "used: serving while terminating, as none is ready"):
        assert words in shown
    assert "no: terminating, not serving" in shown
    assert "no: not ready" in shown
