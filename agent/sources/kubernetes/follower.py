"""Services, EndpointSlices, this Node and the ServiceCIDRs of a cluster, listed and watched.

`reflector` is the protocol, `formats` the encodings, `connection` the requests. Here are a worker
for each resource and the log lines for the operator.

Each list is passed on as a whole when it is complete, and `Synced` follows the last one that is
required; until then the loop programs nothing. Nothing is taken back because the API server is
away.
"""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Literal, NamedTuple

import urllib3
from structlog.typing import FilteringBoundLogger

from agent.sources.kubernetes.connection import ConnectError, Connection, reason_of
from agent.sources.kubernetes.pace import Pace
from agent.sources.kubernetes.reflector import (
    ApiRequest,
    Failure,
    Reflector,
    Resource,
    Timing,
    resources,
)
from agent.worker import Failed, Worker
from rules.events import ApiServers, Event, Synced

MAX_BATCH = 10_000
STOP_SECONDS = 0.5

_READ_BYTES = 1 << 18

State = Literal["listing", "watching", "backing off", "stopped"]


class WatchStatus(NamedTuple):
    """How following a resource goes. Times are those of `time.monotonic`.

    `last_message` is the time of the last byte from the server. `last_valid` is the time of the
    last answer that showed the resource's current state: a list, a message of a watch, a probe that
    found nothing missing. Both are None before the first one. A watch that works has one at least
    every three minutes; if `last_valid` is older, changes may be missing.
    """

    resource: str
    state: State
    since: float
    last_message: float | None
    last_valid: float | None
    resource_version: str
    objects: int
    complete: bool
    relists: int
    errors: int


# --- log lines ----------------------------------------------------------------------------------

_EVENTS = {
    "unreachable": "api_server_unreachable",
    "busy": "api_server_busy",
    "unauthorized": "api_server_unauthorized",
    "forbidden": "api_server_forbidden",
    "absent": "resource_absent",
    "refused": "unexpected_answer",
    "watch": "watch_failed",
}
_OF_ALL_RESOURCES = ("unreachable", "busy", "unauthorized")


class _FailureLog:
    """Logs each failure once when it begins and once when it is over."""

    def __init__(self, connection: Connection, log: FilteringBoundLogger) -> None:
        self._connection = connection
        self._log = log
        self._lock = threading.Lock()
        self._failing: dict[Resource, tuple[str, ...]] = {}
        self._since: dict[tuple[str, ...], float] = {}
        self.synced = False

    def report(self, resource: Resource, verb: str, failure: Failure | None) -> None:
        """The failure of a resource's requests now; None if they work."""
        with self._lock:
            new = _failure_key(resource, verb, failure) if failure else ()
            old = self._failing.pop(resource, ())
            if failure:
                self._failing[resource] = new
            if old and old not in self._failing.values():
                self._log.info(
                    "api_server_recovered",
                    was=_EVENTS[old[0]],
                    resources=old[1:] or "all",
                    after_seconds=round(time.monotonic() - self._since.pop(old), 1),
                )
            if failure and new not in self._since:
                self._since[new] = time.monotonic()
                self._begin(resource, verb, failure)

    def _begin(self, resource: Resource, verb: str, failure: Failure) -> None:
        server, name = self._connection.server, resource.full_name
        match failure.kind:
            case "unreachable":
                advice = "the node keeps its rules; check the API server and the network to it"
                if self._connection.at_service_address and not self.synced:
                    advice = (
                        "this is a Service's address, which works only where a proxy runs already;"
                        " set --server to the API server's own address"
                    )
                self._log.warning(
                    "api_server_unreachable",
                    server=server,
                    resource=name,
                    reason=failure.text,
                    advice=advice,
                )
            case "busy":
                self._log.warning("api_server_busy", server=server, resource=name)
            case "unauthorized":
                self._log.error(
                    "api_server_unauthorized",
                    server=server,
                    credentials=self._connection.origin,
                    answer=failure.text,
                    advice="check that the credentials are for this cluster and have not expired",
                )
            case "forbidden":
                log = self._log.error if resource.required else self._log.warning
                log(
                    "api_server_forbidden",
                    server=server,
                    resource=name,
                    verb=verb,
                    answer=failure.text,
                    advice=f"add this rule to the agent's ClusterRole: {resource.rule}",
                )
            case "absent" if not resource.required:
                self._log.warning(
                    "resource_absent",
                    server=server,
                    resource=name,
                    answer=failure.text,
                    advice="without ServiceCIDRs (Kubernetes before 1.33) packets to cluster IPs"
                    " of no Service are not dropped",
                )
            case "watch":
                self._log.warning(
                    "watch_failed",
                    server=server,
                    resource=name,
                    reason=failure.text,
                    advice="changes are found by listing, more and more rarely; check what is"
                    " between the node and the API server",
                )
            case _:
                self._log.warning(
                    "unexpected_answer", server=server, resource=name, reason=failure.text
                )


def _failure_key(resource: Resource, verb: str, failure: Failure) -> tuple[str, ...]:
    """Failures with the same key are one failure."""
    if failure.kind in _OF_ALL_RESOURCES:
        return (failure.kind,)
    if failure.kind == "forbidden":
        return (failure.kind, resource.full_name, verb)
    return (failure.kind, resource.full_name)


# --- following ----------------------------------------------------------------------------------


class ClusterFollower:
    """Passes the objects of a cluster to a loop, and from then on their changes.

    `put` is called in this follower's threads, one at a time: with a list of events for each
    complete list, and with what has arrived whenever a watch is read. `Synced` is put once, at the
    end of the list that completes Services, EndpointSlices and the Node (ServiceCIDRs too, unless
    the server has none or does not allow them). `failed` is called if a thread ends by an error.
    `requested` is called for each answer: method, status (<error> for none), server, and the
    seconds until the answer's head arrived (None for none).
    """

    def __init__(
        self,
        connection: Connection,
        node: str,
        proxy_name: str,
        put: Callable[[list[Event]], None],
        log: FilteringBoundLogger,
        *,
        failed: Failed,
        requested: Callable[[str, int | str, str, float | None], None] = lambda *_: None,
        timing: Timing | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._put = put
        self._connection = connection
        self._log = log
        self.requested = requested
        self._lock = threading.Lock()
        self._stopped = False
        self._endpoints: frozenset[tuple[bytes, int]] = frozenset()
        self._failures = _FailureLog(connection, log)
        self._workers = [
            _ResourceFollower(
                self,
                resource,
                connection,
                failures=self._failures,
                log=log,
                failed=failed,
                timing=timing,
                rng=rng,
            )
            for resource in resources(node, proxy_name)
        ]
        self._awaited = {worker.resource for worker in self._workers}

    def start(self) -> None:
        """Begins to follow."""
        if not self._connection.verifies:
            self._log.warning(
                "tls_not_verified",
                server=self._connection.server,
                advice="whoever is on the network path can change this node's rules; set"
                " certificate-authority instead of insecure-skip-tls-verify",
            )
        for worker in self._workers:
            worker.start()

    def stop(self) -> None:
        """Stops; nothing is put from then on. Takes STOP_SECONDS at most.

        A thread in the middle of connecting ends by itself later; no process waits for it.
        """
        with self._lock:
            self._stopped = True
        for worker in self._workers:
            worker.stop(0.0)
            worker.interrupt()
        deadline = time.monotonic() + STOP_SECONDS
        for worker in self._workers:
            worker.stop(max(0.0, deadline - time.monotonic()))

    def status(self) -> list[WatchStatus]:
        """The status of each resource."""
        return [worker.status() for worker in self._workers]

    def put(self, resource: Resource, events: list[Event], *, settled: bool) -> None:
        """Puts events of a resource; it is `settled` if they complete its first list.

        `Synced` follows them if all lists are complete now.
        """
        with self._lock:
            if settled and resource in self._awaited:
                self._awaited.remove(resource)
                if not self._awaited:
                    events = [*events, Synced()]
                    self._failures.synced = True
            if events and not self._stopped:
                self._put(events)

    def put_endpoints(self) -> None:
        """Puts the API server's addresses if they have changed. May block for a name server."""
        endpoints = self._connection.endpoints()
        with self._lock:
            if endpoints != self._endpoints and not self._stopped:
                self._endpoints = endpoints
                self._put([ApiServers(endpoints)])


class _ResourceFollower(Worker):
    """Follows one resource."""

    def __init__(
        self,
        follower: ClusterFollower,
        resource: Resource,
        connection: Connection,
        *,
        failures: _FailureLog,
        log: FilteringBoundLogger,
        failed: Failed,
        timing: Timing | None,
        rng: random.Random | None,
    ) -> None:
        super().__init__(f"follow {resource.plural}", failed)
        self.resource = resource
        self._follower = follower
        self._timing = timing or Timing()
        self._reflector = Reflector(resource, self._timing, rng)
        self._connection = connection
        self._failures = failures
        self._log = log.bind(resource=resource.plural)
        self._lock = threading.Lock()
        self._response: urllib3.BaseHTTPResponse | None = None
        self._state: State = "listing"
        self._since = time.monotonic()
        self._began = time.monotonic()
        self._last_message: float | None = None
        self._last_valid: float | None = None
        self._valid_answers = 0
        self._pace = Pace(*self._timing.pace)
        self._reported: Failure | None = None

    def status(self) -> WatchStatus:
        """See WatchStatus."""
        reflector = self._reflector
        return WatchStatus(
            self.resource.plural,
            self._state,
            self._since,
            self._last_message,
            self._last_valid,
            reflector.version,
            len(reflector.known),
            reflector.complete,
            reflector.relists,
            reflector.errors,
        )

    def interrupt(self) -> None:
        """Ends a read that is waiting for bytes."""
        with self._lock:
            if self._response is not None:
                with suppress(Exception):  # it may be over just now
                    self._response.shutdown()

    def work(self) -> None:
        """The thread's work; use `start`."""
        while not self.stopping:
            try:
                delay = self._turn()
            except Exception:
                if self.stopping:  # what ends a read also disturbs it
                    break
                self._log.exception("follow_failed")
                self._reflector.start_over()
                delay = self._timing.backoff[1]
            if delay > 0:
                self._enter("backing off")
                self.pause(delay)
        self._enter("stopped")

    def _enter(self, state: State) -> None:
        if state != self._state:
            self._state, self._since = state, time.monotonic()

    def _turn(self) -> float:
        """One request and all of its answer; returns the seconds to wait before the next one."""
        self._follower.put_endpoints()
        request, self._began = self._reflector.request(), time.monotonic()
        self._enter("listing" if self._reflector.listing else "watching")
        broken = ""
        try:
            self._exchange(request)
        except (urllib3.exceptions.HTTPError, OSError, ConnectError) as error:
            broken = reason_of(error)
        if self.stopping:
            return 0.0
        outcome = self._reflector.finished(broken, time.monotonic() - self._began)
        if broken:
            self._log.debug("request_broken", request=request.type.value, reason=broken)
        self._note(request)
        self._put(outcome.events)
        return outcome.delay

    def _exchange(self, request: ApiRequest) -> None:
        began = time.monotonic()
        try:
            response = self._connection.get(request, self._timing.connect)
        except (urllib3.exceptions.HTTPError, OSError, ConnectError):
            self._follower.requested("GET", "<error>", self._connection.server, None)
            raise
        with self._lock:
            self._response = response
        try:
            seconds = time.monotonic() - began
            self._follower.requested("GET", response.status, self._connection.server, seconds)
            headers = response.headers
            self._reflector.answered(
                response.status, headers.get("Retry-After", ""), headers.get("Content-Type", "")
            )
            self._read(response, request)
        finally:
            with self._lock:
                self._response = None
            if self._reflector.over or not response.closed:
                response.close()
            response.release_conn()

    def _read(self, response: urllib3.BaseHTTPResponse, request: ApiRequest) -> None:
        """Hands over all of an answer; what has arrived by then of a watch is put as one."""
        reflector, events, due, spoke = self._reflector, list[Event](), False, False
        try:
            for data in _pieces(response):
                self._last_message, spoke = time.monotonic(), True
                listing = reflector.listing
                events += reflector.received(data, self._last_message - self._began)
                if listing and not reflector.listing:
                    self._enter("watching")
                    due = True  # an empty list is news, too
                due = due or bool(events or reflector.invalid)
                self._note(request)
                if due and not (len(events) < MAX_BATCH and _has_more(response)):
                    self._put(events)
                    events, due = [], False
                    if rest := self._pace.rest():
                        self.pause(rest)
                if reflector.over or self.stopping:
                    break
        except urllib3.exceptions.ReadTimeoutError:
            if spoke:
                self._log.info("connection_silent", seconds=request.silence)
            raise
        finally:
            self._put(events)

    def _note(self, request: ApiRequest) -> None:
        """Takes down what the last piece of an answer has shown."""
        reflector = self._reflector
        if self._valid_answers != reflector.valid_answers:
            self._valid_answers, self._last_valid = reflector.valid_answers, time.monotonic()
        if reflector.failure is not self._reported:
            self._reported = reflector.failure
            self._failures.report(self.resource, request.verb, reflector.failure)

    def _put(self, events: list[Event]) -> None:
        for invalid in self._reflector.invalid:
            self._log.error(
                "object_unusable",
                object=invalid.subject,
                reason=invalid.reason,
                advice="its last valid version stays in use",
            )
        self._reflector.invalid.clear()
        self._follower.put(self.resource, events, settled=self._reflector.settled)


def _pieces(response: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
    """The body as it comes. A chunk at a time costs half of what `read1` takes for one."""
    if isinstance(response, urllib3.HTTPResponse) and response.chunked:
        # a list of more than 128 KB is gzip inside chunks
        yield from response.read_chunked(_READ_BYTES, decode_content=True)
    else:
        while data := response.read1(_READ_BYTES):
            yield data


def _has_more(response: urllib3.BaseHTTPResponse) -> bool:
    """Whether more of a chunked answer is here already, so that reading on does not wait.

    The server sends each event as a chunk of its own, and they are read one at a time.
    """
    stream = getattr(getattr(response, "_fp", None), "fp", None)
    connection = getattr(response, "connection", None)
    sock: socket.socket | None = getattr(connection, "sock", None)
    if stream is None or sock is None:
        return False
    timeout = sock.gettimeout()
    sock.settimeout(0)
    try:
        # shorter than a chunk's head and any event: perhaps not even the head is whole
        return len(stream.peek(1)) > 20
    except (OSError, ValueError):
        return False
    finally:
        sock.settimeout(timeout)
