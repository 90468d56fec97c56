"""The history says which endpoint changed, why, and how long it took; and stays bounded."""

from __future__ import annotations

from datetime import datetime

import msgspec

from rules.history import MOST_IN_ONE_CHANGE, Entry, History, ObjectChange
from tests.manifest import balancing, endpoint, endpoint_slice, service

NOW = 1_800_000_000.0


def seconds(text: str) -> float | None:
    return datetime.fromisoformat(text).timestamp() if text else None


def recorded(*changes: ObjectChange, elements: int = 0) -> list[Entry]:
    history = History(seconds)
    history.record(changes, NOW, elements)
    return history.entries()


def kinds(entries: list[Entry]) -> list[tuple[str, str, str]]:
    return [(e.kind, e.endpoint, e.reason) for e in entries]


def test_an_endpoint_that_goes_not_ready_is_one_entry_with_both_conditions() -> None:
    before = endpoint_slice("web", [endpoint("10.0.0.1"), endpoint("10.0.0.2")])
    after = endpoint_slice("web", [endpoint("10.0.0.1"), endpoint("10.0.0.2", ready=False)])
    (entry,) = recorded(ObjectChange(before, after), elements=3)
    assert kinds([entry]) == [
        ("endpoint_changed", "10.0.0.2", "ready before, not ready now"),
    ]
    assert (entry.service, entry.node, entry.elements) == ("default/web", "node-1", 3)


def test_added_and_removed_endpoints_are_distinguished_with_the_reason() -> None:
    before = endpoint_slice("web", [endpoint("10.0.0.1", ready=False, terminating=True)])
    after = endpoint_slice("web", [endpoint("10.0.0.2")])
    removed, added = recorded(ObjectChange(before, after))
    assert removed.kind == "endpoint_removed"
    assert removed.reason.startswith("removed from its EndpointSlice; it was terminating")
    assert kinds([added]) == [("endpoint_added", "10.0.0.2", "ready")]


def test_changed_weights_are_an_entry() -> None:
    annotations = ({"sliceproxy.io/weights": f"10.0.0.1={weight}"} for weight in (1, 0))
    pieces = [endpoint_slice("web", [endpoint("10.0.0.1")], annotations=a) for a in annotations]
    (entry,) = recorded(ObjectChange(*pieces))
    assert (entry.kind, entry.service) == ("endpoint_changed", "default/web")
    assert entry.reason == "weights of slice web-ipv4 changed"
    balanced = service("web", annotations=balancing("weighted", weights="10.0.0.1=0"))
    (entry,) = recorded(ObjectChange(service("web"), balanced))
    assert entry.reason == "changed: balancing"


def test_a_deleted_slice_removes_its_endpoints() -> None:
    (entry,) = recorded(ObjectChange(endpoint_slice("web", [endpoint("10.0.0.1")]), None))
    assert entry.reason == "its EndpointSlice was deleted; it was ready"


def test_a_slice_that_passes_to_another_service_changes_both() -> None:
    before = endpoint_slice("web", [endpoint("10.0.0.1")], name="one")
    after = endpoint_slice("shop", [endpoint("10.0.0.1")], name="one")
    removed, added = recorded(ObjectChange(before, after))
    assert (removed.service, removed.kind) == ("default/web", "endpoint_removed")
    assert (added.service, added.kind) == ("default/shop", "endpoint_added")


def test_the_delay_is_from_the_apis_trigger_time_to_now() -> None:
    after = endpoint_slice("web", [endpoint("10.0.0.1")])
    after = msgspec.structs.replace(after, triggered="2027-01-15T07:59:59.5Z")
    (entry,) = recorded(ObjectChange(None, after))
    assert entry.delay_seconds == 0.5


def test_services_come_change_by_named_fields_and_go() -> None:
    old, new = service("web"), service("web", externalIPs=["203.0.113.1"])
    found = recorded(ObjectChange(None, old), ObjectChange(old, new), ObjectChange(new, None))
    assert kinds(found) == [
        ("service_added", "", ""),
        ("service_changed", "", "changed: external_ips"),
        ("service_removed", "", ""),
    ]


def test_a_large_change_is_counted_beyond_a_bound() -> None:
    many = [endpoint(f"10.0.0.{n}") for n in range(1, MOST_IN_ONE_CHANGE + 11)]
    found = recorded(ObjectChange(None, endpoint_slice("web", many)))
    assert len(found) == MOST_IN_ONE_CHANGE + 1
    assert found[-1].reason == "and 10 more endpoints of this slice"


def test_the_ring_forgets_the_oldest_and_filters() -> None:
    history = History(seconds, 3)
    for second in range(5):
        history.note("repaired", NOW + second, "because")
    history.record([ObjectChange(None, service("web"))], NOW + 9, 1)
    assert [e.sequence for e in history.entries()] == [4, 5, 6]
    assert [e.sequence for e in history.entries(service="default/web")] == [6]
    assert [e.sequence for e in history.entries(since=NOW + 4)] == [5, 6]
    assert [e.sequence for e in history.entries(after=5)] == [6]
    assert [e.sequence for e in history.entries(limit=1)] == [6]
