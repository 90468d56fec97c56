"""What an operator should act on, as data: open problems, each with its object and the remedy.

A problem is identified by its code and its object, so one object has at most one problem of each
code, whatever number of values or addresses is wrong with it; the text names the first of them. It
is opened, counted and closed when it no longer applies. `collect` returns what has opened and
closed since the last call: the loop logs each of these once. Everything that can grow with what a
tenant writes is bounded: the text of a problem, the problems kept with their text, and the lines
of one `collect`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec

from rules.objects import EndpointSlice, Name, Object, Service

# the codes: stable, as log events and metrics carry them
UNUSABLE_VALUE = "unusable_value"
ADDRESS_CONFLICT = "address_conflict"
API_SERVER_ADDRESS = "api_server_address"
TOO_MANY_ELEMENTS = "too_many_elements"
TOO_MANY_ENDPOINTS = "too_many_endpoints"
ALL_DRAINED = "all_drained"
WEIGHTS_ROUNDED = "weights_rounded"
NODE_UNKNOWN = "node_unknown"
POD_CIDRS_MISSING = "pod_cidrs_missing"
ENDPOINTS_OUTSIDE_POD_CIDRS = "endpoints_outside_pod_cidrs"

CODES = (
    UNUSABLE_VALUE,
    ADDRESS_CONFLICT,
    API_SERVER_ADDRESS,
    TOO_MANY_ELEMENTS,
    TOO_MANY_ENDPOINTS,
    ALL_DRAINED,
    WEIGHTS_ROUNDED,
    NODE_UNKNOWN,
    POD_CIDRS_MISSING,
    ENDPOINTS_OUTSIDE_POD_CIDRS,
)

MAX_KEPT = 1000
"""So many open problems are kept with their texts; the others are only counted."""
MAX_REPORTED = 20
"""So many opened and so many closed problems are returned by one `collect`."""
MAX_TEXT = 400
"""Characters of a problem's text."""
_NAMED = 3


class Subject(NamedTuple):
    """The object that has the problem.

    `kind` is the API's kind, `name` is namespace/name or the name of an object without namespace.
    `service` is the Service that is concerned, "" for none.
    """

    kind: str
    name: str
    service: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


def subject_of(item: Object) -> Subject:
    """The subject that an object is."""
    if isinstance(item, Service):
        return service_subject(item.name)
    service = str(item.service) if isinstance(item, EndpointSlice) and item.service else ""
    return Subject(type(item).__name__, str(item.name), service)


def service_subject(name: Name) -> Subject:
    """The subject that a Service is."""
    return Subject("Service", str(name), str(name))


class Problem(msgspec.Struct, frozen=True):
    """An open problem.

    `since` is the clock's value at the first `collect` after it opened. `count` is how often it
    was found, each time with another text.
    """

    code: str
    subject: Subject
    text: str
    since: float = 0.0
    count: int = 1

    @property
    def fields(self) -> dict[str, str]:
        """The fields of a log line that name the object."""
        kind, name, service = self.subject
        fields = {"service": service} if service else {}
        return fields if kind == "Service" else {**fields, kind.lower(): name}


class Collected(NamedTuple):
    """What changed since the last `collect`; `omitted` counts changes beyond MAX_REPORTED."""

    opened: tuple[Problem, ...] = ()
    closed: tuple[Problem, ...] = ()
    omitted: int = 0


_Key = tuple[str, Subject]
_NOTHING = Collected()


class Problems:
    """The open problems of one State."""

    def __init__(self) -> None:
        self._kept: dict[_Key, Problem] = {}
        self._unkept: set[_Key] = set()
        self._counts: Counter[str] = Counter()
        self._new: set[_Key] = set()
        self._closed: dict[_Key, Problem] = {}

    def found(self, code: str, subject: Subject, text: str) -> None:
        """Opens the problem; if it is open, it has this text from now on."""
        key, text = (code, subject), bounded(text)
        known = self._kept.get(key)
        if known:
            if known.text != text:
                count = known.count + 1
                self._kept[key] = msgspec.structs.replace(known, text=text, count=count)
            return
        if key not in self._unkept:
            self._counts[code] += 1
        if len(self._kept) >= MAX_KEPT:
            self._unkept.add(key)
            return
        self._unkept.discard(key)
        before = self._closed.pop(key, None)  # closed and found again between two collects
        if before:
            self._kept[key] = msgspec.structs.replace(before, text=text, count=before.count + 1)
        else:
            self._kept[key] = Problem(code, subject, text)
            self._new.add(key)

    def gone(self, code: str, subject: Subject) -> None:
        """Closes the problem if it is open."""
        key = (code, subject)
        known = self._kept.pop(key, None)
        if known is None and key not in self._unkept:
            return
        self._unkept.discard(key)
        self._counts[code] -= 1
        if known and key in self._new:
            self._new.discard(key)
        elif known:
            self._closed[key] = known

    @property
    def empty(self) -> bool:
        """Whether no problem is open."""
        return not self._kept and not self._unkept

    def set(self, code: str, subject: Subject, text: str) -> None:
        """Opens the problem with this text, or closes it where the text is empty."""
        if text:
            self.found(code, subject, text)
        else:
            self.gone(code, subject)

    def collect(self, now: float) -> Collected:
        """What has opened and closed since the last call. `now` becomes the time of the former."""
        if not self._new and not self._closed:
            return _NOTHING
        opened = []
        for key in sorted(self._new):
            self._kept[key] = problem = msgspec.structs.replace(self._kept[key], since=now)
            opened.append(problem)
        closed = [self._closed[key] for key in sorted(self._closed)]
        self._new.clear()
        self._closed.clear()
        return Collected(
            tuple(opened[:MAX_REPORTED]),
            tuple(closed[:MAX_REPORTED]),
            len(opened[MAX_REPORTED:]) + len(closed[MAX_REPORTED:]),
        )

    def snapshot(self) -> Problems:
        """These problems as they are now."""
        twin = Problems()
        twin._kept, twin._unkept = self._kept.copy(), self._unkept.copy()
        twin._counts = self._counts.copy()
        return twin

    def open(self) -> tuple[Problem, ...]:
        """The open problems, at most MAX_KEPT, by code and object."""
        return tuple(self._kept[key] for key in sorted(self._kept))

    def counts(self) -> Mapping[str, int]:
        """How many problems are open, by code; also those beyond MAX_KEPT."""
        return {code: self._counts[code] for code in CODES}


def bounded(text: str) -> str:
    """The text, cut to MAX_TEXT characters."""
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 3] + "..."


def listed(items: Iterable[str]) -> str:
    """The first few items, and how many more there are."""
    texts = list(items)
    rest = len(texts) - _NAMED
    return "; ".join(texts[:_NAMED]) + (f"; and {rest} more" if rest > 0 else "")
