"""What has changed on this node in the last while: a bounded ring of entries for `history`.

An entry says when, which Service, which endpoint, and why, in the API's terms: an endpoint is added
to an EndpointSlice, is not ready any more, terminates, is removed. The loop records the changes of
objects after the transaction that programmed them, so every entry has its cost: how many
elements that transaction wrote, and how long it was from the moment that the API server noted as
the cause (annotation endpoints.kubernetes.io/last-change-trigger-time) to the kernel's answer.

Recording compares the two versions of an object, so it is linear in one slice, not in the cluster.
An entry takes about half a kilobyte; the ring holds CAPACITY of them by default.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from typing import Any, NamedTuple

import msgspec

from rules.objects import (
    READY,
    SERVING,
    TERMINATING,
    Address,
    Endpoint,
    Endpoints,
    EndpointSlice,
    Name,
    Row,
    Service,
    address_text,
)

CAPACITY = 2000
MOST_IN_ONE_CHANGE = 50
"""So many endpoints of one slice get an entry of their own; the others are counted in one more."""


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One change. `sequence` grows by 1; `time` is seconds since the epoch.

    `kind` is one of KINDS. `elements` counts what its transaction wrote, `delay_seconds` is from
    the API's trigger time to the kernel, None where the API server noted no cause.
    """

    sequence: int
    time: float
    kind: str
    service: str = ""
    endpoint: str = ""
    pod: str = ""
    node: str = ""
    reason: str = ""
    elements: int = 0
    delay_seconds: float | None = None


KINDS = (
    "service_added",
    "service_changed",
    "service_removed",
    "endpoint_added",
    "endpoint_changed",
    "endpoint_removed",
    "repaired",
    "refused_by_kernel",
)


class ObjectChange(NamedTuple):
    """An object's version before and after; None for none. Both are of one kind and one name."""

    before: Service | EndpointSlice | None
    after: Service | EndpointSlice | None


class EndpointChange(NamedTuple):
    """An endpoint's version before and after; None for none. `triggered` is the API's time of the
    cause, `last` says that its EndpointSlice was deleted."""

    service: Name | None
    triggered: str
    last: bool
    old: Endpoint | None
    new: Endpoint | None


class _Recorded(NamedTuple):
    """An entry that is not written yet."""

    sequence: int
    time: float
    elements: int
    change: EndpointChange

    @property
    def service(self) -> str:
        """namespace/name."""
        return str(self.change.service)


class History:
    """See the module. One thread records; any thread may ask for `entries`.

    `seconds` reads the API's trigger time (RFC 3339) as seconds since the epoch, None if it cannot.
    """

    def __init__(self, seconds: Callable[[str], float | None], capacity: int = CAPACITY) -> None:
        self._seconds = seconds
        self._entries: deque[Entry | _Recorded] = deque(maxlen=max(1, capacity))
        self._sequence = 0

    def record(self, changes: Iterable[ObjectChange], now: float, elements: int) -> None:
        """Adds the changes that one transaction has programmed. What is said of an endpoint is
        written when it is read: where many change, most entries never are."""
        for change in changes:
            for one in _of_change(change):
                if isinstance(one, EndpointChange):
                    self._sequence += 1
                    self._entries.append(_Recorded(self._sequence, now, elements, one))
                else:
                    kind, fields = one
                    self._add(kind, now, elements=elements, **fields)

    def note(self, kind: str, now: float, reason: str, elements: int = 0) -> None:
        """Adds an entry about the node as a whole: a start, a repair, a refusal."""
        self._add(kind, now, reason=reason, elements=elements)

    def entries(
        self, *, service: str = "", since: float = 0.0, after: int = 0, limit: int = CAPACITY
    ) -> list[Entry]:
        """The newest entries, oldest first: of a Service (namespace/name), not older than `since`
        (seconds since the epoch), with a sequence number above `after`."""
        found = [
            entry
            for entry in self._entries.copy()
            if entry.sequence > after
            and entry.time >= since
            and (not service or entry.service == service)
        ]
        return [
            self._written(entry) if isinstance(entry, _Recorded) else entry
            for entry in found[-limit:]
        ]

    def _written(self, recorded: _Recorded) -> Entry:
        sequence, now, elements, change = recorded
        delay = self._delay(change.triggered, now)
        fields = _of_endpoint(change)
        return Entry(sequence, now, elements=elements, delay_seconds=delay, **fields)

    def _delay(self, triggered: str, now: float) -> float | None:
        """Seconds from the API's time of the cause until now."""
        cause = self._seconds(triggered) if triggered else None
        return None if cause is None else round(max(0.0, now - cause), 3)

    def _add(self, kind: str, now: float, *, triggered: str = "", **fields: Any) -> None:
        self._sequence += 1
        delay = self._delay(triggered, now)
        self._entries.append(Entry(self._sequence, now, kind, delay_seconds=delay, **fields))


_Described = tuple[str, dict[str, str]]


def _of_change(change: ObjectChange) -> Iterator[_Described | EndpointChange]:
    before, after = change
    if isinstance(before, EndpointSlice) or isinstance(after, EndpointSlice):
        assert not isinstance(before, Service)
        assert not isinstance(after, Service)
        yield from _of_slice(before, after)
    elif before is None and after is not None:
        yield "service_added", {"service": str(after.name)}
    elif after is None and before is not None:
        yield "service_removed", {"service": str(before.name)}
    elif before is not None and after is not None and (fields := _differing(before, after)):
        yield "service_changed", {"service": str(after.name), "reason": f"changed: {fields}"}


def _differing(before: Service, after: Service) -> str:
    """The names of the fields that differ, but for `problems`."""
    names = (field for field in Service.__struct_fields__ if field != "problems")
    return ", ".join(n for n in names if getattr(before, n) != getattr(after, n))


def _of_slice(
    before: EndpointSlice | None, after: EndpointSlice | None
) -> Iterator[_Described | EndpointChange]:
    if before and after and before.service != after.service:
        yield from _of_slice(before, None)
        yield from _of_slice(None, after)
        return
    piece = after or before
    if piece is None:
        return
    had, has = _differing_endpoints(before, after)
    triggered = after.triggered if after else ""
    changed = [
        EndpointChange(piece.service, triggered, after is None, old, new)
        for address in [*(a for a in had if a not in has), *has]
        if (old := had.get(address)) != (new := has.get(address))
    ]
    yield from changed[:MOST_IN_ONE_CHANGE]
    if (more := len(changed) - MOST_IN_ONE_CHANGE) > 0:
        reason = f"and {more} more endpoints of this slice"
        fields = {"service": str(piece.service), "reason": reason, "triggered": triggered}
        yield "endpoint_changed", fields
    if before and after and before.endpoints.weights != after.endpoints.weights:
        reason = f"weights of slice {piece.name.name} changed"
        fields = {"service": str(piece.service), "reason": reason, "triggered": triggered}
        yield "endpoint_changed", fields


def _differing_endpoints(
    before: EndpointSlice | None, after: EndpointSlice | None
) -> tuple[dict[Address, Endpoint], dict[Address, Endpoint]]:
    """The endpoints of both versions by address, without those that are equal at equal places:
    most of them, where one endpoint of many has changed."""
    old, new = (piece.endpoints if piece else Endpoints() for piece in (before, after))
    both = [pair for pair in zip_longest(old.rows(), new.rows()) if pair[0] != pair[1]]
    had, has = zip(*both, strict=True) if both else ((), ())
    return _by_address(had), _by_address(has)


def _by_address(rows: Iterable[Row | None]) -> dict[Address, Endpoint]:
    return {row[0][0]: Endpoint(row[0][0], *row[1], row[2]) for row in rows if row}


def _of_endpoint(change: EndpointChange) -> dict[str, Any]:
    """What an entry says of it."""
    old, new = change.old, change.new
    endpoint = new or old
    assert endpoint is not None
    fields = {
        "service": str(change.service),
        "endpoint": address_text(endpoint.address),
        "pod": endpoint.pod,
        "node": endpoint.node,
    }
    if old is None:
        reason = condition_text(endpoint.conditions)
        return {**fields, "kind": "endpoint_added", "reason": reason}
    if new is None:
        why = "its EndpointSlice was deleted" if change.last else "removed from its EndpointSlice"
        reason = f"{why}; it was {condition_text(old.conditions)}"
        return {**fields, "kind": "endpoint_removed", "reason": reason}
    reasons = []
    if old.conditions != new.conditions:
        reasons.append(
            f"{condition_text(old.conditions)} before, {condition_text(new.conditions)} now"
        )
    if (old.node_hints, old.zone_hints) != (new.node_hints, new.zone_hints):
        reasons.append("other topology hints")
    if (old.node, old.zone, old.pod) != (new.node, new.zone, new.pod):
        reasons.append("another pod or node has the address")
    return {**fields, "kind": "endpoint_changed", "reason": "; ".join(reasons)}


def condition_text(conditions: int) -> str:
    """An endpoint's conditions (READY, SERVING, TERMINATING bits) in a few words."""
    if conditions & TERMINATING:
        return "terminating, still serving" if conditions & SERVING else "terminating"
    return "ready" if conditions & READY else "not ready"
