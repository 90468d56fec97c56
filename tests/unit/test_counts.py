"""What a start and a change cost, counted so that the machine does not matter.

A fixed trace: a cluster is listed and programmed, then single endpoints are replaced. Element
operations and bytes are exact; calls of Python functions are compared between two sizes, because a
change must not cost more in a larger cluster.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import msgspec
import pytest

from agent.config.settings import Settings
from agent.loop import Loop, Reports
from agent.serve.metrics import Metrics
from agent.serve.series import FrontendSeries
from agent.sources.kubernetes.formats import INITIAL_EVENTS_END, JSON_TYPE, PROTOBUF_TYPE
from agent.sources.kubernetes.reflector import Reflector, resources
from rules.counts import FrontendCounter
from rules.events import Event, NodeAddresses, Synced, Upsert
from rules.history import History
from rules.netlink.attributes import NLA_F_NESTED, NLA_HEADER, NLA_TYPE_MASK, attribute, attributes
from rules.netlink.counters import Count, decode_counts, encode_counted
from rules.netlink.elements import decode_elements, encode_elements
from rules.state import State
from rules.tables import SETS
from rules.transaction import Transaction, encode
from tests import manifest
from tests.cluster import protobuf
from tests.unit.fakes.kernel import FakeNetfilter

EACH, CHANGES = 10, 50
SIZES = (300, 3000)


def pod(number: int) -> str:
    return f"10.{128 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"


def _json(kind: str, document: dict[str, Any]) -> bytes:
    return msgspec.json.encode({"type": kind, "object": document}) + b"\n"


ENCODINGS: dict[str, Callable[[str, dict[str, Any]], bytes]] = {
    JSON_TYPE: _json,
    PROTOBUF_TYPE: protobuf.watch_event,
}


class Trace:
    """What the API server sends for a cluster of this size, and the agent without its sockets."""

    def __init__(self, services: int, encoding: str = PROTOBUF_TYPE) -> None:
        self.services = services
        self.encode = ENCODINGS[encoding]
        self.state = State(Settings(node="node-1").options())
        self.reflectors = {r.plural: Reflector(r) for r in resources("node-1")}
        self.version = 1
        for reflector in self.reflectors.values():
            reflector.request()
            reflector.answered(200, content_type=encoding)

    def message(self, kind: str, document: dict[str, Any], version: int) -> bytes:
        document["metadata"]["resourceVersion"] = str(version)
        return self.encode(kind, {"apiVersion": "v1", **document})

    def addresses(self, index: int) -> list[str]:
        return [pod(index * EACH + n) for n in range(EACH)]

    def slice(self, index: int, addresses: list[str]) -> dict[str, Any]:
        endpoints = [manifest.endpoint(a, node="node-2") for a in addresses]
        return manifest.slice_document(f"web-{index}", endpoints)

    def events(self) -> list[Event]:
        """What a start brings."""
        return [
            event
            for plural, data in self.lists()
            for event in self.reflectors[plural].received(data)
        ]

    def start(self) -> Transaction:
        for plural, data in self.lists():
            self.tell(plural, data)
        self.state.apply([NodeAddresses(frozenset(), ()), Upsert(manifest.node())])
        return self.state.resync(lambda _: None)

    def lists(self) -> Iterator[tuple[str, bytes]]:
        """What is streamed at a start, by resource."""
        for index in range(self.services):
            address = f"10.{96 + (index >> 16)}.{index >> 8 & 255}.{index & 255}"
            service = manifest.service_document(f"web-{index}", cluster_ips=(address,))
            yield "services", self.message("ADDED", service, 1)
            found = self.slice(index, self.addresses(index))
            yield "endpointslices", self.message("ADDED", found, 1)
        for plural, first in (("services", service), ("endpointslices", found)):
            end = {"annotations": {INITIAL_EVENTS_END: "true"}}
            document = {"kind": first["kind"], "metadata": end}
            yield plural, self.message("BOOKMARK", document, 1)

    def change(self, number: int) -> bytes:
        """The event by which one endpoint of one Service is replaced."""
        index, self.version = number * 5 % 300, self.version + 1
        addresses = self.addresses(index)
        addresses[number % EACH] = f"10.200.0.{number + 1}"
        return self.message("MODIFIED", self.slice(index, addresses), self.version)

    def tell(self, plural: str, data: bytes) -> None:
        self.state.apply(self.reflectors[plural].received(data))

    def follow(self, data: bytes) -> tuple[Transaction, bytes]:
        """From an event's bytes to those for the kernel."""
        self.tell("endpointslices", data)
        transaction = self.state.step()
        return transaction, encode(transaction).encode()


def calls(function: Any, *arguments: Any) -> int:
    """How many Python and C functions are called."""
    counts: Counter[str] = Counter()

    def count(_frame: FrameType, event: str, _argument: object) -> None:
        counts[event] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        function(*arguments)
    finally:
        sys.setprofile(before)
    return counts["call"] + counts["c_call"]


@pytest.fixture(scope="module", params=SIZES)
def started(request):
    trace = Trace(request.param)
    return trace, trace.start()


def test_a_start_adds_each_element_once(started):
    trace, transaction = started
    counts = {owner.name: len(items) for owner, items in transaction.change.added.items()}
    assert counts["service-ips"] == counts["cluster-ips"] == trace.services
    assert counts["endpoints"] == trace.services * EACH
    assert transaction.change.removed == {}
    # the rest is the node's: its addresses, not the cluster's size
    assert transaction.change.operations - trace.services * (EACH + 2) <= 4


def test_the_bytes_of_a_start(started):
    trace, transaction = started
    rules = len(encode(transaction._replace(change=type(transaction.change)())).encode())
    size = len(encode(transaction).encode()) - rules
    # 44 for an endpoint, 60 to 64 for a verdict, 16 for a cluster IP, heads of messages beside
    assert size / trace.services == pytest.approx(EACH * 44 + 76, rel=0.05)
    assert rules < 700_000


def test_a_replaced_endpoint_is_two_operations_and_few_bytes(started):
    trace, _ = started
    for number in range(CHANGES):
        transaction, data = trace.follow(trace.change(number))
        assert transaction.change.operations == 2
        assert {owner.name for owner in transaction.change.added} == {"endpoints"}
        assert len(data) < 300
        index = number * 5 % 300
        back = trace.slice(index, trace.addresses(index))
        data = trace.message("MODIFIED", back, trace.version)
        assert trace.follow(data)[0].change.operations == 2


@pytest.mark.parametrize(("encoding", "expected"), [(JSON_TYPE, 478), (PROTOBUF_TYPE, 412)])
def test_a_change_costs_the_same_in_a_larger_cluster(encoding, expected):
    found: list[list[int]] = []
    for size in SIZES:
        trace = Trace(size, encoding)
        trace.start()
        trace.follow(trace.change(0))  # what is made once has been made
        found.append([])
        for number in range(1, CHANGES):
            data = trace.change(number)
            found[-1].append(calls(trace.follow, data))
    small, large = map(sum, found)
    assert abs(large - small) <= 0.05 * small
    assert small / (CHANGES - 1) <= expected * 1.05


class Lines:
    """Keeps the events of log lines, with no call but its own."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def info(self, event: str, **_: object) -> None:
        self.events.append(event)

    def bind(self, **_: object) -> Lines:
        return self


def test_the_calls_of_a_turn():
    """What the loop does for one change, with metrics, history and without the log line: it
    computes, encodes, and reports."""
    trace, netfilter = Trace(SIZES[0]), FakeNetfilter()
    kernel, log, events = netfilter.connect(), Lines(), trace.events()
    reports = Reports(Metrics("0"), history=History(lambda _: None))
    loop = Loop(trace.state, kernel, log, reports=reports)
    loop.put([*events, NodeAddresses(frozenset(), ()), Synced()])
    loop._turn()
    # applying would compare tables, which the kernel does
    kernel.apply = lambda transaction: len(encode(transaction).encode())  # type: ignore[method-assign]
    found = []
    for number in range(CHANGES):
        loop.put(trace.reflectors["endpointslices"].received(trace.change(number)))
        found.append(calls(loop._turn))
    assert log.events == ["programmed"] * (CHANGES + 1)
    assert sum(found[1:]) / (CHANGES - 1) <= 490 * 1.05


@pytest.mark.parametrize(("encoding", "expected"), [(JSON_TYPE, 1035), (PROTOBUF_TYPE, 918)])
def test_the_calls_of_a_start(encoding, expected):
    """For a Service with its endpoints: decode, compute and encode."""
    trace = Trace(SIZES[0], encoding)
    lists = list(trace.lists())
    trace.lists = lambda: iter(lists)  # type: ignore[method-assign]

    def start() -> None:
        encode(trace.start()).encode()

    assert calls(start) / SIZES[0] <= expected * 1.05


def test_the_bytes_of_a_streamed_list():
    """For a Service with its endpoints; without managed fields, which a server sends, too."""
    sizes = {
        encoding: sum(len(data) for _, data in Trace(SIZES[0], encoding).lists())
        for encoding in ENCODINGS
    }
    assert sizes[JSON_TYPE] / SIZES[0] == pytest.approx(2010, rel=0.02)
    assert sizes[PROTOBUF_TYPE] / SIZES[0] == pytest.approx(578, rel=0.02)


def test_elements_are_read_back_by_strides():
    """As the kernel dumps them: elements of a list are not flagged as nested."""
    owner = SETS[4].endpoints
    elements = [(bytes(owner.key_length - 2) + number.to_bytes(2), bytes(owner.data_length))
                for number in range(1000)]  # fmt: skip
    sent = b"".join(encode_elements(owner, elements))
    dumped = b"".join(attribute(kind, content) for kind, content in attributes(sent))
    assert list(decode_elements(owner, dumped)) == elements
    assert calls(lambda: list(decode_elements(owner, dumped))) < 4 * len(elements)


def test_the_calls_of_a_scrape():
    """For each frontend at which nothing has happened since the last one: find it again."""
    trace = Trace(SIZES[0])
    trace.start()
    counts = {SETS[4].service_ips: {claim.key: Count(7, 700) for claim in trace.state.installed}}
    counter, series = FrontendCounter(), FrontendSeries(10)
    first = list(counter.read(trace.state, counts))
    text = series.text(first)
    assert text.count('sliceproxy_service_connections_total{frontend="10.') == 10
    assert f'frontend="others",namespace="",port="",service=""}} {7 * 290}.0' in text

    def scrape() -> str:
        return series.text(counter.read(trace.state, counts))

    assert all(a is b for a, b in zip(first, counter.read(trace.state, counts), strict=True))
    assert scrape() == text
    assert calls(scrape) / len(trace.state.installed) < 17


def test_counters_are_read_by_strides():
    """As the kernel dumps them: what is nested has no flag."""
    owner = SETS[4].service_ips
    counted = {number.to_bytes(owner.key_length): Count(number, 2 * number) for number in range(99)}
    elements = [(key, "lb-1" if key[-1] % 2 else "masq-lb-16") for key in counted]
    sent = b"".join(encode_counted(owner, elements, counted))
    dumped = b"".join(attribute(kind, unflagged(content)) for kind, content in attributes(sent))
    found: dict[bytes, Count] = {}
    number = calls(lambda: found.update(decode_counts(owner, dumped)))
    assert found == {key: count for key, count in counted.items() if count.packets}
    assert number < 6 * len(elements)
    assert dict(decode_counts(owner, sent)) == found


def unflagged(content: bytes) -> bytes:
    """Attributes without NLA_F_NESTED, at any depth."""
    parts, position = [], 0
    while position + 4 <= len(content):
        length, kind = NLA_HEADER.unpack_from(content, position)
        inner = content[position + 4 : position + length]
        parts.append(
            attribute(kind & NLA_TYPE_MASK, unflagged(inner) if kind & NLA_F_NESTED else inner)
        )
        position += (length + 3) & ~3
    return b"".join(parts)


def test_the_memory_of_an_endpoint():
    """A slice keeps its endpoints as columns. An object for each would take 190 bytes."""
    endpoints = [manifest.endpoint(pod(n), node=f"node-{n % 7}") for n in range(100)]
    for number, endpoint in enumerate(endpoints):
        endpoint["targetRef"] = {"kind": "Pod", "name": f"web-7c9f8d6b5-{number:05}"}
    found = manifest.endpoint_slice("web", endpoints).endpoints
    size = sum(map(sys.getsizeof, (found, found.addresses, found.places, found.pods)))
    assert len({id(place) for place in found.places}) == 7
    assert size / len(found) <= 40
