"""The agent's read-only API: JSON over HTTP on a unix socket and, if asked for, a loopback address.

Every answer is computed from a mirror of the loop's state (`rules.mirror`), in the
thread of this server; nothing here walks the live state. An explanation and a difference also read
the kernel, over a socket of their own. docs/api.md documents the paths. They are
versioned: within v1 fields may be added, and none is removed or changes its meaning.

On TCP the Host header must name a loopback address or the bound one, so that no web page can read
the answers by a DNS name of its own; there is no CORS. The unix socket has mode 0600.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any, NamedTuple, Protocol
from urllib.parse import parse_qsl, unquote

import msgspec
import structlog

from agent.kernel.errors import ConntrackError, KernelError
from agent.serve.flows import RecentFlows
from agent.serve.health import Heartbeat
from agent.serve.http import (
    HttpAnswer,
    HttpRequest,
    HttpServer,
    Limits,
    Listener,
    TcpAddress,
    UnixAddress,
)
from agent.worker import Failed
from rules.counts import (
    FrontendCounter,
    FrontendCounts,
    PacketCounts,
    counted_keys,
    service_counts,
    service_keys,
)
from rules.diff import Elements
from rules.doctor import Check
from rules.endpoint_counts import is_counted, with_connections
from rules.endpoint_report import EndpointTable, QuestionError, endpoints
from rules.explain import Explanation, explain
from rules.flow_report import Flow, StateDirectory
from rules.history import Entry, History
from rules.language import Set
from rules.objects import Address, Name
from rules.problems import Problem
from rules.service_report import ServiceLine, service_lines, services
from rules.state import State
from rules.text import Key

Log = structlog.typing.FilteringBoundLogger

STATE_SECONDS = 5.0
"""How long an answer waits for the loop, which may be busy with a large change."""
LIMITS = Limits(connections=32, listener_connections=16)
METHODS = ("GET", "HEAD")
CHOSEN = 200
"""So many Services may be named in one question."""
_AT_ONCE = 200
"""So many items of a list are encoded in one call, which other threads have to wait for."""
COMPRESSED_BYTES = 1400
"""Answers that fit one packet are not compressed."""

_JSON = (
    ("Content-Type", "application/json"),
    ("X-Content-Type-Options", "nosniff"),
    ("Cache-Control", "no-store"),
    ("Vary", "Accept-Encoding"),
)
_PAGE = (
    ("Content-Type", "text/html; charset=utf-8"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    (
        "Content-Security-Policy",
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
        "connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'; "
        "form-action 'none'",
    ),
)


class ApiError(Exception):
    """A request that cannot be answered; `status` is HTTP's, the text says what to do."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


# --- records ------------------------------------------------------------------------------------


class WatchStatus(msgspec.Struct, frozen=True):
    """How following one resource goes. Ages are seconds; None: not yet."""

    resource: str
    state: str
    age_seconds: float | None
    last_valid_seconds: float | None
    objects: int
    relists: int
    errors: int


class Counts(msgspec.Struct, frozen=True):
    """How many there are: Services, endpoints in their slices, frontends, elements in the maps."""

    services: int
    endpoints: int
    frontends: int
    elements: int


class ProblemRecord(msgspec.Struct, frozen=True):
    """An open problem. `since` is seconds since the epoch."""

    code: str
    object: str
    text: str
    since: float
    count: int


class Status(msgspec.Struct, frozen=True):
    """The answer at /v1/status.

    `programmed` says whether this run has programmed everything it knows; `reason` why not.
    `generation` changes with every snapshot, so that a reader can tell whether anything changed.
    """

    version: str
    node: str
    zone: str
    started: str
    programmed: bool
    reason: str
    ready: bool
    owns_tables: bool
    generation: int
    watches: tuple[WatchStatus, ...]
    counts: Counts
    conntrack: tuple[int, int] | None
    problems: tuple[ProblemRecord, ...]
    options: dict[str, str]


class Difference(msgspec.Struct, frozen=True):
    """The answer at /v1/diff: the nft commands that make the kernel what the agent wants."""

    commands: tuple[str, ...]


class Flows(msgspec.Struct, frozen=True):
    """The answer at /v1/flows: new connections since the answer that had `sequence` as its own.

    `lost` counts connections that were made since then and are not listed, because there were more
    than the kernel or the agent keeps.
    """

    sequence: int
    lost: int
    flows: tuple[Flow, ...]


class Sources(NamedTuple):
    """Where the answers come from.

    `state` is the loop's, None while it does not answer; it stays as it is until the next call.
    `watches` are the source's, `options` what the operator chose, `examine` the doctor's checks of
    this node with a state. `elements` are the kernel's, None if it has no tables. `difference` has
    the commands that would bring the kernel to a state, `counts` what the kernel has counted, and
    `counts_of` the same of some elements, `counts_by_endpoint` those of Services that ask for it;
    all are None without counters. `flows` listens to new
    connections while someone asks; None where that is not possible. `interface` has the
    node's interface towards an address.
    """

    state: Callable[[], State | None]
    heartbeat: Heartbeat
    history: History
    watches: Callable[[], Iterable[Any]]
    options: Mapping[str, str]
    examine: Callable[[State], list[Check]]
    conntrack: Callable[[], tuple[int, int] | None]
    elements: Callable[[], AbstractContextManager[Elements | None]]
    difference: Callable[[State], Iterable[str]]
    version: str
    owns_tables: bool
    started: float
    counts: Callable[[], PacketCounts] | None = None
    counts_of: Callable[[Mapping[Set, Sequence[Key]]], PacketCounts] | None = None
    counts_by_endpoint: Callable[[], PacketCounts] | None = None
    flows: RecentFlows | None = None
    interface: Callable[[Address], str] | None = None


ANSWERS: dict[str, Any] = {
    "/v1/status": Status,
    "/v1/services": list[ServiceLine],
    "/v1/services/{namespace}/{name}": EndpointTable,
    "/v1/explain": Explanation,
    "/v1/diff": Difference,
    "/v1/counters": list[FrontendCounts],
    "/v1/flows": Flows,
    "/v1/history": list[Entry],
    "/v1/problems": list[ProblemRecord],
    "/v1/doctor": list[Check],
}
"""The records of each path's answer: tools/api-schema makes docs/api/v1.json of them."""


# --- answers ------------------------------------------------------------------------------------


class Api:
    """The paths and their answers. `answer` may be called from one thread."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._last: State | None = None
        self._frontends = FrontendCounter()
        self._generation = 0
        self._services: dict[str, bytes] = {}
        """The answers at /v1/services of this generation, by namespace."""

    def answer(self, request: HttpRequest) -> HttpAnswer:
        """The answer to a request, an error as JSON with a status of its own; compressed if the
        client takes that."""
        return _compressed(self._plain(request), request.headers.get("accept-encoding", ""))

    def stop(self) -> None:
        """Ends what runs for readers."""
        if self._sources.flows:
            self._sources.flows.stop()

    def _plain(self, request: HttpRequest) -> HttpAnswer:
        try:
            if request.path == "/":
                return HttpAnswer(200, _PAGE, _page())
            query = dict(parse_qsl(request.query))
            if not _follows_from_state(request.path, query):
                return _json(200, self._body(request.path, query))
            if known := request.headers.get("if-none-match"):
                self._snapshot()
                if known == self._tag():
                    return HttpAnswer(304, (*_JSON[1:], ("ETag", known)), b"")
            found = _json(200, self._body(request.path, query))
            return found._replace(headers=(*found.headers, ("ETag", self._tag())))
        except ApiError as error:
            return _json(error.status, {"error": str(error)})
        except QuestionError as error:
            return _json(400, {"error": str(error)})
        except ConntrackError as error:
            return _json(503, {"error": f"connections cannot be listened to: {error}"})
        except KernelError as error:
            return _json(503, {"error": f"the kernel's tables cannot be read: {error}"})

    def _tag(self) -> str:
        """What identifies answers from the last snapshot of this run (an ETag)."""
        return f'"{int(self._sources.started * 1000):x}-{self._generation}"'

    def _body(self, path: str, query: dict[str, str]) -> object:
        parts = [unquote(part) for part in path.strip("/").split("/")]
        match parts:
            case ["v1", "status"]:
                return self.status(**_only(query))
            case ["v1", "services"]:
                query = _only(query, "namespace", "services", "counters")
                counted = self._sources.counts and query.get("counters") == "true"
                if "services" in query:
                    return self._lines_of(_names(query["services"]), counted=bool(counted))
                return self._lines(query.get("namespace", ""), counted=bool(counted))
            case ["v1", "counters"]:
                return self._counters(_only(query, "namespace", "name"))
            case ["v1", "services", namespace, name]:
                query = _only(query, "port", "counters")
                port = f":{query['port']}" if "port" in query else ""
                counted = query.get("counters") == "true"
                return self._endpoints(f"{namespace}/{name}{port}", counted=counted)
            case ["v1", "explain"]:
                query = _only(query, "target", "from")
                if "target" not in query:
                    raise ApiError(400, "give ?target=ADDRESS:PORT[/udp|/sctp]")
                state = self._stepped()
                with self._sources.elements() as elements:
                    interface = self._sources.interface
                    return explain(state, query["target"], query.get("from"), elements, interface)
            case ["v1", "diff"]:
                _only(query)
                return Difference(tuple(self._sources.difference(self._stepped())))
            case ["v1", "history"]:
                query = _only(query, "service", "since", "after", "limit")
                return self._history(query)
            case ["v1", "flows"]:
                return self._flows(_only(query, "after", "service"))
            case ["v1", "problems"]:
                _only(query)
                return _problems(self._snapshot().problems.open())
            case ["v1", "doctor"]:
                _only(query)
                return self._sources.examine(self._snapshot())
        raise ApiError(404, f"no such path: {path}; docs/api.md has them all")

    def status(self) -> Status:
        """See Status."""
        sources, state = self._sources, self._snapshot()
        health, now = sources.heartbeat.health(), time.monotonic()
        around = state.surroundings().place
        not_ready = health.not_ready
        return Status(
            version=sources.version,
            node=around.node,
            zone=around.zone,
            started=_time(sources.started),
            programmed=health.programmed_at is not None and health.healthy,
            reason="; ".join(not_ready),
            ready=not not_ready,
            owns_tables=sources.owns_tables,
            generation=self._generation,
            watches=tuple(
                WatchStatus(
                    watch.resource,
                    watch.state,
                    round(now - watch.since, 1),
                    None if watch.last_valid is None else round(now - watch.last_valid, 1),
                    watch.objects,
                    watch.relists,
                    watch.errors,
                )
                for watch in sources.watches()
            ),
            counts=Counts(
                len(state.services),
                sum(len(s.endpoints) for pieces in state.slices.values() for s in pieces),
                len(state.installed),
                sum(state.element_counts.values()),
            ),
            conntrack=sources.conntrack(),
            problems=tuple(_problems(state.problems.open())),
            options=dict(sources.options),
        )

    def _endpoints(self, question: str, *, counted: bool) -> object:
        state, read = self._stepped(), self._sources.counts_by_endpoint
        try:
            table = endpoints(state, question)
        except QuestionError as error:
            raise ApiError(404, str(error)) from None
        if counted and read and is_counted(state, table):
            return with_connections(state, table, read())
        return table

    def _lines(self, namespace: str, *, counted: bool) -> bytes:
        """The Services' lines as JSON. Readers poll them, and they are the same until the state
        changes, unless they have counts."""
        state = self._stepped()
        if counted:
            return _encoded(services(state, namespace, self._counts()))
        if namespace not in self._services:
            self._services[namespace] = _encoded(services(state, namespace))
        return self._services[namespace]

    def _lines_of(self, names: Sequence[Name], *, counted: bool) -> bytes:
        """The lines of some Services. No counters are read but theirs."""
        state, read = self._stepped(), self._sources.counts_of
        known = [name for name in names if name in state.services]
        counts = read(counted_keys(state, known)) if counted and read else None
        return _encoded([line for name in known for line in service_lines(state, name, counts)])

    def _counters(self, query: dict[str, str]) -> bytes:
        if self._sources.counts is None:
            raise ApiError(404, "this agent does not count; start it with --counters")
        namespace, name = query.get("namespace"), query.get("name")
        if namespace and name and (read := self._sources.counts_of):
            state, service = self._stepped(), Name(namespace, name)
            found = read(service_keys(state, service))
            return _encoded(list(service_counts(state, service, found)))
        return _encoded(
            [
                one
                for one in self._frontends.read(self._stepped(), self._counts())
                if namespace in (None, "", one.namespace) and name in (None, "", one.service)
            ]
        )

    def _counts(self) -> PacketCounts:
        assert self._sources.counts is not None
        return self._sources.counts()

    def _history(self, query: dict[str, str]) -> object:
        try:
            return self._sources.history.entries(
                service=query.get("service", ""),
                since=float(query.get("since", "0")),
                after=int(query.get("after", "0")),
                limit=max(1, int(query.get("limit", "2000"))),
            )
        except ValueError as error:
            raise ApiError(400, f"since, after and limit are numbers: {error}") from None

    def _flows(self, query: dict[str, str]) -> Flows:
        if self._sources.flows is None:
            raise ApiError(404, "this agent does not listen to connections")
        state, service = self._stepped(), query.get("service", "")
        recent = self._sources.flows.since(_number(query, "after"))
        directory = StateDirectory(state)
        found = (directory.flow(seen.connection, seen.time) for seen in recent.seen)
        wanted = (f for f in found if f and service in ("", f.service))
        return Flows(recent.sequence, recent.lost, tuple(wanted))

    def _stepped(self) -> State:
        """A snapshot that has programs. Raises ApiError until there are some."""
        state = self._snapshot()
        if not state.stepped:
            raise ApiError(503, "the agent has not read everything yet; see `sliceproxy status`")
        return state

    def _snapshot(self) -> State:
        """The state as it is now. Raises ApiError if the loop has no time for it."""
        state = self._sources.state()
        if state is None:
            raise ApiError(503, "the agent is busy and did not answer in time; try again")
        if state is not self._last:
            self._last = state
            self._generation += 1
            self._services.clear()
        return state


def _names(text: str) -> list[Name]:
    """Names of Services from `namespace/name,namespace/name`. Raises ApiError."""
    names = [Name(*part.partition("/")[::2]) for part in dict.fromkeys(text.split(","))]
    if len(names) > CHOSEN or not all(name.namespace and name.name for name in names):
        raise ApiError(400, f"services is NAMESPACE/NAME,NAMESPACE/NAME, at most {CHOSEN}")
    return names


def _number(query: Mapping[str, str], name: str) -> int:
    """A parameter that is a whole number, 0 by default. Raises ApiError."""
    try:
        return int(query.get(name, "0"))
    except ValueError as error:
        raise ApiError(400, f"{name} is a number: {error}") from None


def _only(query: dict[str, str], *known: str) -> dict[str, str]:
    """The query, if it has no other parameters than these. Raises ApiError."""
    for name in query:
        if name not in known:
            allowed = f"known are {', '.join(known)}" if known else "this path takes none"
            raise ApiError(400, f"unknown parameter {name!r}; {allowed}")
    return query


def _problems(found: Iterable[Problem]) -> list[ProblemRecord]:
    return [ProblemRecord(p.code, str(p.subject), p.text, p.since, p.count) for p in found]


def _follows_from_state(path: str, query: Mapping[str, str]) -> bool:
    """Whether an answer is the same until the state changes: it has no ages, counts or readings."""
    services = path == "/v1/services" or path.startswith("/v1/services/")
    return services and query.get("counters") != "true"


def _json(status: int, body: object) -> HttpAnswer:
    """An answer; a body of bytes is JSON already."""
    encoded = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return HttpAnswer(status, _JSON, encoded)


def _compressed(answer: HttpAnswer, accepted: str) -> HttpAnswer:
    """The answer, with gzip if it is worth it and among the encodings that are accepted.

    1.8 MB of Services become 0.1 MB in 2 ms at the lowest level, without the interpreter's lock.
    """
    codings = [coding.replace(" ", "").partition(";") for coding in accepted.split(",")]
    takes = any(name == "gzip" and quality.rstrip("0.") != "q=" for name, _, quality in codings)
    if not takes or len(answer.body) < COMPRESSED_BYTES:
        return answer
    gzip = zlib.compressobj(level=1, wbits=16 + zlib.MAX_WBITS)
    body = gzip.compress(answer.body) + gzip.flush()
    return HttpAnswer(answer.status, (*answer.headers, ("Content-Encoding", "gzip")), body)


def _encoded(items: Sequence[object]) -> bytes:
    """A list as JSON, encoded a part at a time: msgspec does not let other threads run."""
    parts = [
        msgspec.json.encode(items[first : first + _AT_ONCE])[1:-1]
        for first in range(0, len(items), _AT_ONCE)
    ]
    return b"[" + b",".join(parts) + b"]"


def _page() -> bytes:
    return (files("agent.serve") / "page.html").read_bytes()


def _time(seconds: float) -> str:
    """RFC 3339 in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


# --- the server ---------------------------------------------------------------------------------


class Answers(Protocol):
    """What answers the API's requests."""

    def answer(self, request: HttpRequest) -> HttpAnswer:
        """The answer to a request; called in the server's thread."""

    def stop(self) -> None:
        """Ends what runs for readers."""


class ApiServer:
    """The API at a unix socket and a TCP address, each None for nowhere, in a thread of its own:
    a large answer keeps no probe waiting."""

    def __init__(
        self,
        api: Answers,
        log: Log,
        failed: Failed,
        socket: UnixAddress | None,
        tcp: TcpAddress | None,
    ) -> None:
        self._server = HttpServer("api", log, failed, limits=LIMITS)
        self._api = api
        self._listeners = []
        if socket:
            self._listeners.append(Listener(socket, "API", api.answer, methods=METHODS))
        if tcp:
            hosts = ("localhost", "127.0.0.1", "::1", tcp.host.lower())
            self._listeners.append(Listener(tcp, "API", api.answer, methods=METHODS, hosts=hosts))

    def start(self) -> None:
        """Starts to answer."""
        for listener in self._listeners:
            self._server.serve(listener)
        self._server.start()

    def stop(self) -> None:
        """Closes the API."""
        self._server.stop()
        self._api.stop()

    def settle(self) -> bool:
        """Waits until the listeners have been tried. For tests."""
        return self._server.settle()
