"""The list-and-watch protocol without I/O, fed with what a real API server said."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.sources.kubernetes.formats import MAX_EVENT_BYTES, Lines
from agent.sources.kubernetes.reflector import (
    ApiRequest,
    Outcome,
    Reflector,
    RequestType,
    Resource,
    Timing,
    resources,
)
from rules.decode import decode_any
from rules.events import Delete, Event, Upsert
from rules.objects import (
    EndpointSlice,
    Name,
    Object,
    Service,
)
from tests.fuzzing import fuzzed

RECORDINGS = Path(__file__).parents[1] / "recordings"
SERVICES, SLICES, NODE, CIDRS = resources("node-1")
INITIAL = "k8s.io/initial-events-end"


def recording(name: str) -> bytes:
    return (RECORDINGS / name).read_bytes()


def objects(name: str) -> dict[Name | str, Object]:
    found = [o for o in decode_any(recording(name)) if not isinstance(o, Exception)]
    return {o.name: o for o in found}


class Table(dict[Name | str, Object]):
    """The objects that a reader of the events knows."""

    def apply(self, events: Iterable[Event]) -> None:
        for event in events:
            match event:
                case Upsert(new):
                    self[new.name] = new
                case Delete(_, name):
                    del self[name]


class Client:
    """Answers a Reflector's requests by hand and applies what it says.

    Without `streams` it refuses streaming lists, as a server does that has none.
    """

    def __init__(self, resource: Resource = SERVICES, *, streams: bool = False) -> None:
        self.reflector = Reflector(resource, Timing(), random.Random(1))
        self.table = Table()
        self.received: list[Event] = []
        self.streams = streams

    def ask(self, wanted: RequestType) -> ApiRequest:
        request = self.reflector.request()
        if request.type is RequestType.STREAM and not self.streams:
            assert self.answer(422, b"") == Outcome([])
            request = self.reflector.request()
        assert request.type is wanted, request
        return request

    def answer(self, code: int, *pieces: bytes, broken: str = "", retry_after: str = "") -> Outcome:
        self.reflector.answered(code, retry_after)
        for piece in pieces:
            if not self.reflector.over:
                self.deliver(self.reflector.received(piece))
        return self.end(broken)

    def end(self, broken: str = "") -> Outcome:
        step = self.reflector.finished(broken)
        self.deliver(step.events)
        return step

    def deliver(self, events: list[Event]) -> None:
        self.received += events
        self.table.apply(events)

    def news(self) -> list[Event]:
        received, self.received = self.received, []
        return received


def service(name: str, version: int, **metadata: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "namespace": "ns", "resourceVersion": str(version), **metadata},
        "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": version % 60000 + 1}]},
    }


def listed(version: int, *items: dict[str, Any], token: str = "") -> bytes:
    metadata = {"resourceVersion": str(version), **({"continue": token} if token else {})}
    return msgspec.json.encode({"kind": "ServiceList", "metadata": metadata, "items": items})


def line(kind: str, item: dict[str, Any]) -> bytes:
    return msgspec.json.encode({"type": kind, "object": item}) + b"\n"


def bookmark(version: int, *, end: bool = False) -> bytes:
    annotations = {"annotations": {INITIAL: "true"}} if end else {}
    return line("BOOKMARK", {"metadata": {"resourceVersion": str(version), **annotations}})


def error(code: int, message: str = "why") -> bytes:
    return line("ERROR", {"kind": "Status", "code": code, "message": message})


def names(events: Sequence[Event]) -> list[str]:
    found = []
    for event in events:
        match event:
            case Upsert(new):
                found.append(f"+{new.name}")
            case Delete(_, name):
                found.append(f"-{name}")
    return sorted(found)


# --- recordings ---------------------------------------------------------------------------------


def split(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    bounds = [0, *sorted({c % len(data) for c in cuts}), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(bounds)]


def watched(table: dict[Name | str, Object]) -> dict[Name | str, Object]:
    """Those without the two labels of our selector."""
    return {
        name: item
        for name, item in table.items()
        if isinstance(item, Service | EndpointSlice)
        and (item.proxy_name, item.headless) == (None, False)
    }


cuts = st.lists(st.integers(0, 2**20), max_size=60)


@pytest.mark.parametrize(
    ("resource", "plural"), [(SERVICES, "services"), (SLICES, "endpointslices")]
)
@fuzzed(25)
@given(first=cuts, second=cuts)
def test_lists_and_watches_give_the_final_lists(
    resource: Resource, plural: str, first: list[int], second: list[int]
) -> None:
    client = Client(resource)
    client.ask(RequestType.LIST)
    step = client.answer(200, *split(recording(f"list-{plural}.json"), first))
    assert step.delay == 0
    request = client.ask(RequestType.WATCH)
    assert request.query["resourceVersion"] == "849"
    client.answer(200, *split(recording(f"watch-{plural}.jsonl"), second))
    # the lists were recorded without a selector, the watches with one: these two are not watched
    final = objects(f"final-list-{plural}.json")
    assert watched(client.table) == watched(final)
    assert set(client.reflector.known) == set(client.table) == set(final)
    assert not client.reflector.invalid


@fuzzed(25)
@given(pieces=cuts)
def test_streams_say_the_same_however_they_are_split(pieces: list[int]) -> None:
    data = recording("watchlist-endpointslices.jsonl")
    whole, split_up = Client(SLICES, streams=True), Client(SLICES, streams=True)
    for client, parts in ((whole, [data]), (split_up, split(data, pieces))):
        client.ask(RequestType.STREAM)
        client.answer(200, *parts)
    assert split_up.received == whole.received
    last = msgspec.json.decode(data.splitlines()[-1])["object"]["metadata"]["resourceVersion"]
    assert split_up.reflector.version == whole.reflector.version == last


def test_a_stream_begins_with_all_of_its_list_at_once() -> None:
    client = Client(SLICES, streams=True)
    request = client.ask(RequestType.STREAM)
    assert request.query["sendInitialEvents"] == "true"
    assert "resourceVersion" not in request.query
    head, tail = recording("watchlist-endpointslices.jsonl").split(INITIAL.encode())
    client.reflector.answered(200)
    client.deliver(client.reflector.received(head))
    assert client.received == []
    assert not client.reflector.complete
    end = tail.index(b"\n") + 1
    client.deliver(client.reflector.received(INITIAL.encode() + tail[:end]))
    pages = objects("list-endpointslices-page1.json") | objects("list-endpointslices-page2.json")
    assert client.reflector.complete
    assert set(pages) < set(client.table)
    assert client.reflector.version == "849"


def test_recorded_pages() -> None:
    client = Client(SLICES)
    assert client.ask(RequestType.LIST).query["limit"] == "500"
    client.answer(200, recording("list-endpointslices-page1.json"))
    assert client.received == []
    token = msgspec.json.decode(recording("list-endpointslices-page1.json"))["metadata"]["continue"]
    request = client.ask(RequestType.LIST)
    assert request.query["continue"] == token
    assert request.query["labelSelector"] == SLICES.label_selector
    client.answer(200, recording("list-endpointslices-page2.json"))
    assert client.ask(RequestType.LIST).query["continue"] != token


def test_recorded_410_while_paging_begins_again_in_one_piece() -> None:
    client = Client(SLICES)
    client.ask(RequestType.LIST)
    client.answer(200, recording("list-endpointslices-page1.json"))
    client.ask(RequestType.LIST)
    step = client.answer(410, recording("status-410-continue.json"))
    assert (step.delay, step.failure) == (0, None)
    query = client.ask(RequestType.LIST).query
    assert "limit" not in query
    assert "continue" not in query
    client.answer(200, recording("list-endpointslices.json"))
    assert client.table == objects("list-endpointslices.json")
    assert client.reflector.relists == 0


def following() -> Client:
    client = Client()
    client.ask(RequestType.LIST)
    client.answer(200, listed(100, service("a", 10), service("b", 20)))
    assert names(client.news()) == ["+ns/a", "+ns/b"]
    return client


@pytest.mark.parametrize("as_status", [True, False])
def test_recorded_410_of_a_watch(as_status: bool) -> None:
    client = following()
    client.ask(RequestType.WATCH)
    if as_status:
        client.answer(410, recording("status-410.json"))
    else:
        client.answer(200, recording("watch-410.jsonl"))
    assert client.reflector.listing
    client.ask(RequestType.LIST)
    step = client.answer(200, listed(200, service("b", 20), service("c", 150)))
    assert names(client.news()) == ["+ns/c", "-ns/a"]
    assert client.reflector.relists == 1
    assert step.delay <= 0.8


@pytest.mark.parametrize(("code", "kind"), [(401, "unauthorized"), (403, "forbidden")])
def test_recorded_refusals(code: int, kind: str) -> None:
    client = Client()
    for _ in range(2):
        client.ask(RequestType.LIST)
        step = client.answer(code, recording(f"status-{code}.json"))
    assert step.failure
    assert step.failure.kind == kind
    assert 0 < step.delay <= 30
    assert not client.reflector.settled


# --- watches ------------------------------------------------------------------------------------


def test_a_cut_line_is_dropped_and_the_watch_continues_after_the_last_whole_one() -> None:
    client = following()
    client.ask(RequestType.WATCH)
    whole, cut = line("ADDED", service("c", 101)), line("ADDED", service("d", 102))
    step = client.answer(200, whole + cut[:-1], broken="connection reset")
    assert names(client.news()) == ["+ns/c"]
    assert step.failure is None
    assert client.ask(RequestType.PROBE).query["limit"] == "1"
    client.answer(200, listed(102, service("a", 10)))
    assert client.ask(RequestType.WATCH).query["resourceVersion"] == "101"


def test_an_orderly_end_is_followed_by_the_next_watch_at_once() -> None:
    client = following()
    client.ask(RequestType.WATCH)
    step = client.answer(200, bookmark(140))
    assert step == Outcome([])
    assert client.ask(RequestType.WATCH).query["resourceVersion"] == "140"


def test_an_end_without_a_word_is_not_trusted() -> None:
    client = following()
    client.ask(RequestType.WATCH)
    assert client.answer(200).failure is None
    client.ask(RequestType.PROBE)


def test_a_server_that_went_back_in_time() -> None:
    client = following()
    client.ask(RequestType.WATCH)
    client.answer(200, line("MODIFIED", service("b", 110)), broken="silent")
    client.ask(RequestType.PROBE)
    client.answer(200, listed(105))
    client.ask(RequestType.LIST)
    # the same versions may mean other contents: all of them are reported
    client.answer(200, listed(106, service("b", 110), service("c", 104)))
    assert names(client.news()) == ["+ns/b", "+ns/b", "+ns/c", "-ns/a"]
    assert client.ask(RequestType.WATCH).query["resourceVersion"] == "106"


def test_a_list_that_went_back_in_time_is_asked_for_again() -> None:
    client = following()
    client.ask(RequestType.WATCH)
    client.answer(410, b"")
    client.ask(RequestType.LIST)
    client.answer(200, listed(50, service("a", 10)))
    assert client.news() == []
    client.ask(RequestType.LIST)
    client.answer(200, listed(51, service("a", 10)))
    assert names(client.news()) == ["+ns/a", "-ns/b"]


def test_a_watch_that_goes_back_in_time() -> None:
    client = following()
    client.ask(RequestType.WATCH)
    step = client.answer(200, line("ADDED", service("c", 60)))
    assert (client.news(), step.failure) == ([], None)
    client.ask(RequestType.LIST)


def test_bookmarks_and_deletions() -> None:
    client = following()
    client.ask(RequestType.WATCH)
    data = bookmark(120) + line("DELETED", service("a", 121)) + line("MODIFIED", service("b", 122))
    client.answer(200, data)
    assert client.received == [
        Delete(Service, Name("ns", "a")),
        *(e for e in client.received if isinstance(e, Upsert)),
    ]
    assert client.reflector.version == "122"
    assert set(client.reflector.known) == {Name("ns", "b")}


def test_an_object_that_does_not_decode() -> None:
    client = following()
    client.ask(RequestType.WATCH)
    broken = service("a", 130)
    broken["spec"] = {"ports": "none"}
    client.answer(200, line("MODIFIED", broken) + line("MODIFIED", service("b", 131)))
    (invalid,) = client.reflector.invalid
    assert invalid.subject == "Service ns/a"
    assert names(client.news()) == ["+ns/b"]
    assert client.reflector.version == "131"
    # it is known, so a relist neither complains again nor deletes it
    client.reflector.invalid.clear()
    client.ask(RequestType.WATCH)
    client.answer(410, b"")
    client.ask(RequestType.LIST)
    client.answer(200, listed(140, broken, service("b", 131)))
    assert client.news() == []
    assert not client.reflector.invalid


def test_an_object_without_a_name_keeps_those_that_it_could_be() -> None:
    client = following()
    client.ask(RequestType.WATCH)
    client.answer(410, b"")
    client.ask(RequestType.LIST)
    client.answer(200, listed(140, {"metadata": {"name": 5}}, service("b", 20)))
    assert client.news() == []
    assert len(client.reflector.invalid) == 1
    client.ask(RequestType.WATCH)
    client.answer(200, line("ADDED", {"metadata": {}}) + line("ADDED", service("c", 150)))
    assert names(client.news()) == ["+ns/c"]


def test_a_body_that_is_no_watch() -> None:
    client = following()
    client.ask(RequestType.WATCH)
    client.answer(200, b"<html>\n" + line("ADDED", service("c", 150)))
    assert client.news() == []
    client.ask(RequestType.PROBE)
    step = client.answer(200, b"<html>")
    assert step.failure
    assert step.failure.kind == "refused"


# --- doubt --------------------------------------------------------------------------------------


def test_a_second_watch_without_a_message_leads_to_a_list_if_the_server_is_ahead() -> None:
    client = following()
    for _ in range(2):
        client.ask(RequestType.WATCH)
        outcome = client.answer(200)
        client.ask(RequestType.PROBE)
        client.answer(200, listed(130, service("a", 10)))
    assert outcome.failure
    assert outcome.failure.kind == "watch"
    client.ask(RequestType.LIST)
    client.answer(200, listed(130, service("a", 10), service("c", 120)))
    assert names(client.news()) == ["+ns/c", "-ns/b"]


def test_bookmarks_of_watches_that_end_at_once_are_not_trusted() -> None:
    """The bookmark is ahead of an event that was never sent."""
    client = following()
    client.ask(RequestType.WATCH)
    assert client.answer(200, bookmark(130)) == Outcome([])
    client.ask(RequestType.WATCH)
    assert client.answer(200, bookmark(130)).failure
    client.ask(RequestType.PROBE)
    client.answer(200, listed(130))
    client.ask(RequestType.LIST)
    client.answer(200, listed(130, service("a", 10), service("b", 20), service("c", 120)))
    assert names(client.news()) == ["+ns/c"]


@pytest.mark.parametrize("body", [b"", b"<html>\n", bookmark(100)])
def test_delays_between_fruitless_watches_grow(body: bytes) -> None:
    client = following()
    client.reflector._random = Highest()
    delays = []
    for _ in range(8):
        client.ask(RequestType.WATCH)
        delays.append(client.answer(200, body).delay)
        if client.reflector._doubt:
            client.ask(RequestType.PROBE)
            client.answer(200, listed(100))
    assert delays[1:] == [1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0]
    assert client.reflector.failure
    client.ask(RequestType.WATCH)
    assert client.answer(200, line("ADDED", service("c", 150))) == Outcome([])
    assert client.reflector.failure is None


def test_a_silent_watch_leads_to_a_list_if_the_server_is_ahead() -> None:
    client = following()
    client.ask(RequestType.WATCH)
    client.reflector.answered(200)
    client.reflector.finished("no answer in time", 150.0)
    valid = client.reflector.valid_answers
    client.ask(RequestType.PROBE)
    client.answer(200, listed(101))
    assert client.reflector.valid_answers == valid
    client.ask(RequestType.LIST)


def test_a_watch_that_lasts_shows_that_watches_work() -> None:
    client = following()
    for _ in range(2):
        client.ask(RequestType.WATCH)
        client.answer(200, bookmark(100))
    client.ask(RequestType.PROBE)
    client.answer(200, listed(100))
    assert client.reflector.failure
    client.ask(RequestType.WATCH)
    client.reflector.answered(200)
    client.reflector.received(bookmark(100), 1.0)
    assert client.reflector.failure
    client.reflector.received(bookmark(100), 61.0)
    assert client.reflector.failure is None


def test_a_line_that_is_too_large_leads_to_pages_behind_it() -> None:
    client = following()
    client.streams = True
    client.ask(RequestType.WATCH)
    outcome = client.answer(200, b"x" * (MAX_EVENT_BYTES + 1))
    assert client.reflector.failure
    assert outcome.delay <= 0.8
    client.ask(RequestType.LIST)
    client.answer(200, listed(140, service("a", 10), service("b", 20)))
    assert client.ask(RequestType.WATCH).query["resourceVersion"] == "140"


def test_lists_that_fail_lead_back_to_streams() -> None:
    client = Client(streams=True)
    for _ in range(3):
        client.ask(RequestType.STREAM)
        client.answer(200, line("ADDED", service("a", 10)), broken="connection reset")
        client.ask(RequestType.LIST)
        client.answer(200, b"\x1f\x8b")


def test_deep_nesting_costs_nothing() -> None:
    deep = b'{"f:a":' * 1500 + b"1" + b"}" * 1500
    item = msgspec.json.encode(service("c", 150)).replace(b'"name"', b'"x":' + deep + b',"name"')
    event = b'{"type":"ADDED","object":' + item + b"}\n"
    client = following()
    client.ask(RequestType.WATCH)
    client.answer(200, event + line("MODIFIED", service("b", 151)))
    assert names(client.news()) == ["+ns/b", "+ns/c"]
    client.ask(RequestType.WATCH)
    client.answer(410, b"")
    client.ask(RequestType.LIST)
    page = listed(160, service("b", 151))
    client.answer(200, page.replace(b'"items":[', b'"items":[' + item + b","))
    assert names(client.news()) == ["-ns/a"]
    assert not client.reflector.invalid


# --- streams ------------------------------------------------------------------------------------


def test_changes_before_the_end_of_a_stream() -> None:
    client = Client(streams=True)
    client.ask(RequestType.STREAM)
    client.answer(
        200,
        line("ADDED", service("a", 10)),
        line("ADDED", service("b", 20)),
        line("MODIFIED", service("b", 21)),
        line("DELETED", service("a", 22)),
        bookmark(22, end=True),
        bookmark(23),
    )
    assert names(client.received) == ["+ns/b"]
    assert client.ask(RequestType.WATCH).query["resourceVersion"] == "23"


@pytest.mark.parametrize("broken", ["", "connection reset"])
def test_a_stream_that_does_not_end_its_list_is_followed_by_pages(broken: str) -> None:
    client = Client(streams=True)
    client.ask(RequestType.STREAM)
    client.answer(200, line("ADDED", service("a", 10)), bookmark(10), broken=broken)
    assert client.received == []
    client.ask(RequestType.LIST)
    client.answer(200, listed(11))
    client.ask(RequestType.WATCH)
    client.answer(410, b"")
    client.ask(RequestType.STREAM)  # which may work by now


def test_errors_in_a_stream() -> None:
    client = Client(streams=True)
    client.ask(RequestType.STREAM)
    client.answer(200, line("ADDED", service("a", 10)), error(410))
    client.ask(RequestType.STREAM)
    client.answer(200, error(500))
    client.ask(RequestType.LIST)


# --- delays -------------------------------------------------------------------------------------


class Highest(random.Random):
    """Always the upper bound."""

    def uniform(self, a: float, b: float) -> float:
        return b


def test_backoff_doubles_and_begins_again_after_success() -> None:
    client = Client()
    client.reflector._random = Highest()
    delays = []
    for _ in range(8):
        client.ask(RequestType.LIST)
        step = client.end("connection refused")
        assert step.failure
        assert step.failure.kind == "unreachable"
        delays.append(step.delay)
    assert delays == [0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0]
    client.ask(RequestType.LIST)
    client.answer(200, listed(1))
    client.ask(RequestType.WATCH)
    assert client.answer(500, b"").delay == 0.8


def test_quiet_watches_that_are_cut_again_and_again_are_opened_soon() -> None:
    client = following()
    client.reflector._random = Highest()
    for _ in range(10):
        client.ask(RequestType.WATCH)
        client.reflector.answered(200)
        assert client.reflector.finished("no answer in time", 150.0) == Outcome([], 0.8)
        client.ask(RequestType.PROBE)
        assert client.answer(200, listed(100)) == Outcome([])


@pytest.mark.parametrize(("code", "kind"), [(429, "busy"), (503, "unreachable")])
def test_retry_after(code: int, kind: str) -> None:
    client = Client()
    client.ask(RequestType.LIST)
    step = client.answer(code, b"", retry_after="7")
    assert step.failure
    assert step.failure.kind == kind
    assert 7 <= step.delay <= 7.8
    client.ask(RequestType.LIST)
    assert client.answer(code, b"", retry_after="in a moment").delay <= 1.6


def test_lists_that_are_too_old_at_once_do_not_spin() -> None:
    client = Client()
    client.reflector._random = Highest()
    delays = []
    for version in range(5):
        client.ask(RequestType.LIST)
        client.answer(200, listed(version + 1))
        client.ask(RequestType.WATCH)
        delays.append(client.answer(200, error(410)).delay)
    assert delays == [0.8, 1.6, 3.2, 6.4, 12.8]


def test_a_page_is_asked_for_again() -> None:
    client = Client()
    client.ask(RequestType.LIST)
    client.answer(200, listed(9, service("a", 1), token="next"))
    for _ in range(2):
        assert client.ask(RequestType.LIST).query["continue"] == "next"
        client.answer(200, b'{"metadata', broken="connection reset")
    client.ask(RequestType.LIST)
    client.answer(200, listed(9, service("b", 2)))
    assert names(client.received) == ["+ns/a", "+ns/b"]


def test_an_optional_resource_delays_nothing() -> None:
    for code in (403, 404):
        reflector = Reflector(CIDRS)
        reflector.request()
        reflector.answered(code)
        step = reflector.finished()
        assert reflector.settled
        assert not reflector.complete
        assert step.delay == Timing().optional_retry


def test_one_401_is_a_token_that_ran_out() -> None:
    client = following()
    for _ in range(2):
        client.ask(RequestType.WATCH)
        assert client.answer(401, b"") == Outcome([])
        client.ask(RequestType.WATCH)
        client.answer(200, bookmark(100))


def test_a_list_without_a_version_does_not_spin() -> None:
    client = Client()
    client.ask(RequestType.LIST)
    step = client.answer(200, b'{"items": []}')
    assert step.failure
    assert not client.reflector.complete


# --- resources and lines ------------------------------------------------------------------------


def test_resources() -> None:
    assert SERVICES.label_selector == "!service.kubernetes.io/service-proxy-name"
    assert SERVICES.field_selector == "spec.clusterIP!=None"
    assert (SLICES.label_selector, SLICES.field_selector) == ("!service.kubernetes.io/headless", "")
    assert NODE.field_selector == "metadata.name=node-1"
    assert [r.path for r in resources("x")] == [
        "/api/v1/services",
        "/apis/discovery.k8s.io/v1/endpointslices",
        "/api/v1/nodes",
        "/apis/networking.k8s.io/v1/servicecidrs",
    ]
    services, slices, *_ = resources("x", "mine")
    assert services.label_selector == "service.kubernetes.io/service-proxy-name=mine"
    assert slices == SLICES
    assert SLICES.rule == (
        '- {apiGroups: ["discovery.k8s.io"], resources: ["endpointslices"], '
        'verbs: ["list", "watch"]}'
    )


@fuzzed(100)
@given(st.lists(st.binary(max_size=20), max_size=30))
def test_lines(pieces: list[bytes]) -> None:
    lines = Lines()
    found = [item for piece in pieces for item in lines.feed(piece)]
    *whole, _rest = b"".join(pieces).split(b"\n")
    assert found == [item for item in whole if item]


def test_a_line_without_end() -> None:
    lines = Lines()
    assert lines.feed(b"x" * MAX_EVENT_BYTES) == []
    with pytest.raises(ValueError, match="16 MiB"):
        lines.feed(b"x")
