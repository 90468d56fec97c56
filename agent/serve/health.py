"""Who asks how this node is doing, and what it is told.

Three askers, three questions:

- A *load balancer* asks whether to send this node traffic for one Service: a Service of type
  LoadBalancer with `externalTrafficPolicy: Local` has a `healthCheckNodePort`. 200 if a ready
  endpoint of it is on this node and the proxy is healthy, else 503.
- A load balancer asks whether to send this node traffic at all (policy Cluster): `/healthz`. 503
  also while the Node is being deleted, or the cluster autoscaler has tainted it to go: the node
  still forwards then, and connections drain (KEP-3836).
- The *kubelet* asks whether to restart the agent: `/livez`, which is `/healthz` without that rule,
  for a restart does not save a Node.

The proxy is healthy unless a change has waited too long to be programmed. So a node whose API
server is away is healthy, it forwards what it knows; one whose kernel does not take what it is
given is not. Before the first complete list nothing waits. After it, a first transaction that does
not get through counts like any other (kube-proxy is healthy until its first one, however long).

Bodies and headers are kube-proxy 1.36's (pkg/proxy/healthcheck), with both families always alike,
as one transaction programs both. `lastUpdated` is the current time while all is well: that is what
old releases of kube-proxy said, and what is looked at.

One thread serves all ports. A node may have hundreds of Services with a health check port, so a
thread for each, or for each connection, would cost more than the rest of the agent. It is the
smallest HTTP/1.1 server that load balancers, kubelets and Prometheus get along with: one request
for each connection, whatever its method, no body read, ten seconds to ask and be answered. Other
threads never wait for it: they leave tasks in its queue. Ports are opened on all addresses of the
node, where kube-proxy opens them on those of `nodePortAddresses` that the node had at its start:
nothing has to follow as addresses come and go, and the answer tells no secret.
"""

from __future__ import annotations

import errno
import heapq
import ipaddress
import itertools
import os
import queue
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from http import HTTPStatus
from typing import NamedTuple

import msgspec
import structlog

from rules.health_check import HealthCheck
from rules.objects import Name

Log = structlog.typing.FilteringBoundLogger

# --- what the loop tells ------------------------------------------------------------------------

HEALTHZ_TIMEOUT = 120.0


class Health(NamedTuple):
    """The proxy's health at one moment. Times are seconds since the epoch.

    `programmed_at` is None before the first transaction. `eligible` says that the node is not
    about to go.
    """

    healthy: bool
    eligible: bool
    programmed_at: float | None
    now: float


class Heartbeat:
    """What the loop tells of its progress, and any thread may ask.

    `timeout` is how many seconds a change may wait. `clock` and `wall` are for tests.
    """

    def __init__(
        self,
        timeout: float = HEALTHZ_TIMEOUT,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._timeout, self._clock, self._wall = timeout, clock, wall
        self._lock = threading.Lock()
        self._waiting_since: float | None = None
        self._synced_at: float | None = None
        self._programmed_at: float | None = None
        self._eligible = True

    def queued(self) -> None:
        """A change has come that has to be programmed."""
        with self._lock:
            if self._waiting_since is None:
                self._waiting_since = self._clock()

    def synced(self) -> None:
        """All that was there has been told: from now on, changes can be programmed."""
        with self._lock:
            if self._synced_at is None:
                self._synced_at = self._clock()

    def programmed(self) -> None:
        """The kernel has everything that was told."""
        with self._lock:
            self._waiting_since = None
            self._programmed_at = self._wall()

    def eligible(self, eligible: bool) -> None:
        """Whether the Node stays: see `Node.leaving`."""
        self._eligible = eligible

    def health(self) -> Health:
        """How it is now."""
        with self._lock:
            late = (
                self._waiting_since is not None
                and self._synced_at is not None
                and self._clock() - max(self._waiting_since, self._synced_at) >= self._timeout
            )
            return Health(not late, self._eligible, self._programmed_at, self._wall())


# --- answers ------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """An HTTP answer; Content-Length, Date and Connection are the server's."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


class Request(NamedTuple):
    """The head of an HTTP request. The path is without its query; header names are lower case.
    `family` is that of the connection, 4 or 6."""

    method: str
    path: str
    headers: Mapping[str, str]
    family: int = 4


Respond = Callable[[Request], Answer]

_JSON = (("Content-Type", "application/json"), ("X-Content-Type-Options", "nosniff"))
_PLAIN = (("Content-Type", "text/plain; charset=utf-8"), ("X-Content-Type-Options", "nosniff"))
NOT_FOUND = Answer(404, _PLAIN, b"404 page not found\n")
_BAD_REQUEST = Answer(400, _PLAIN, b"400 Bad Request\n")
_TOO_LARGE = Answer(431, _PLAIN, b"431 Request Header Fields Too Large\n")
_BROKEN = Answer(500, _PLAIN, b"500 Internal Server Error\n")


def _time(seconds: float | None) -> str:
    """RFC 3339 in UTC; Go's zero time for None."""
    if seconds is None:
        return "0001-01-01T00:00:00Z"
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def proxy_answer(health: Health, *, node: bool) -> Answer:
    """The answer at /healthz (`node`) or /livez."""
    well = health.healthy and (health.eligible or not node)
    body: dict[str, object] = {
        "lastUpdated": _time(health.now if well else health.programmed_at),
        "currentTime": _time(health.now),
    }
    if node:
        body["nodeEligible"] = health.eligible
    body["healthy"] = health.healthy
    if health.programmed_at is not None:
        family = {"lastUpdated": _time(health.programmed_at), "healthy": health.healthy}
        body["status"] = {"IPv4": family, "IPv6": family}
    return Answer(200 if well else 503, _JSON, msgspec.json.encode(body))


def service_answer(name: Name, endpoints: int, *, healthy: bool) -> Answer:
    """The answer at a Service's health check port."""
    # the layout, too, is kube-proxy's: there are scripts that read it with grep
    body = (
        "{\n"
        '\t"service": {\n'
        f'\t\t"namespace": {_quoted(name.namespace)},\n'
        f'\t\t"name": {_quoted(name.name)}\n'
        "\t},\n"
        f'\t"localEndpoints": {endpoints},\n'
        f'\t"serviceProxyHealthy": {"true" if healthy else "false"}\n'
        "}"
    )
    weight = ("X-Load-Balancing-Endpoint-Weight", str(endpoints))
    return Answer(200 if endpoints and healthy else 503, (*_JSON, weight), body.encode())


def _quoted(text: str) -> str:
    return msgspec.json.encode(text).decode()


# --- the server ---------------------------------------------------------------------------------

MAX_REQUEST_BYTES = 16384
MAX_CONNECTIONS = 256
SECONDS_PER_CONNECTION = 10.0
RETRY_SECONDS = 5.0  # as kube-proxy's health server has it


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. 0.0.0.0, :: and "" stand for every address of both families, where
    the kernel has both. Raises OSError."""
    every = not host or ipaddress.ip_address(host).is_unspecified
    six = socket.has_dualstack_ipv6() if every else ":" in host
    made = socket.socket(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if six:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not every)
        made.bind((("::" if six else "0.0.0.0") if every else host, port))
        made.listen(128)
        made.setblocking(False)
    except BaseException:
        made.close()
        raise
    return made


class _Connection:
    def __init__(self, sock: socket.socket, respond: Respond, deadline: float) -> None:
        self.socket = sock
        self.respond = respond
        self.deadline = deadline
        self.received = b""
        self.unsent = b""
        self.answered = False


class Port:
    """A port that the server has been asked to serve; open as soon as it can be."""

    def __init__(self, host: str, number: int, purpose: str, respond: Respond) -> None:
        self.host = host
        self.number = number
        self.purpose = purpose
        self.respond = respond
        self.socket: socket.socket | None = None
        self.wanted = True
        self.warned = False


class Server:
    """A thread that serves any number of ports. Its methods may be called from any thread, and
    return before the thread has done what they ask."""

    def __init__(self, name: str, log: Log, *, retry_seconds: float = RETRY_SECONDS) -> None:
        self._log = log
        self._retry_seconds = retry_seconds
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._selector = selectors.DefaultSelector()
        self._connections: dict[int, _Connection] = {}
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._going = True
        self._selector.register(self._wake, selectors.EVENT_READ, self._woken)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Closes everything and waits for the thread."""
        self._later(self._end)
        if self._thread.ident is not None:
            self._thread.join()

    def serve(self, port: Port, opened: socket.socket | None = None) -> None:
        """Serves a port, from `opened` if it is open already. One that cannot be opened is warned
        about once and tried again."""
        self._later(lambda: self._open(port, opened))

    def close(self, port: Port) -> None:
        """Closes a port. Connections that were accepted are answered."""
        self._later(lambda: self._close(port))

    def settle(self, timeout: float = 10.0) -> bool:
        """Waits until all that was asked before has been tried. For tests."""
        done = threading.Event()
        self._later(done.set)
        return done.wait(timeout)

    # in the thread

    def _later(self, task: Callable[[], None]) -> None:
        self._tasks.put(task)
        os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        while self._going:
            timeout = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
            for key, events in self._selector.select(timeout):
                key.data(events)
            self._expire()
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
        self._selector.close()

    def _woken(self, _events: int) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        while not self._tasks.empty():
            self._tasks.get()()

    def _end(self) -> None:
        self._going = False

    def _at(self, seconds: float, task: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), task))

    def _expire(self) -> None:
        while self._timers and self._timers[0][0] <= time.monotonic():
            heapq.heappop(self._timers)[2]()

    def _open(self, port: Port, opened: socket.socket | None = None) -> None:
        if not port.wanted or port.socket is not None:
            return
        try:
            port.socket = opened or listen(port.host, port.number)
        except (OSError, OverflowError, ValueError) as error:
            if not port.warned:
                self._log.warning(
                    f"{port.purpose} is not served",
                    port=port.number,
                    error=str(error),
                    retry_in_seconds=self._retry_seconds,
                )
            port.warned = True
            self._at(self._retry_seconds, lambda: self._open(port))
            return
        if port.warned:
            self._log.info(f"{port.purpose} is served now", port=port.number)
        sock = port.socket
        self._selector.register(sock, selectors.EVENT_READ, lambda _: self._accept(sock, port))

    def _close(self, port: Port) -> None:
        port.wanted = False
        if port.socket is not None:
            self._selector.unregister(port.socket)
            port.socket.close()
            port.socket = None

    def _accept(self, listener: socket.socket, port: Port) -> None:
        try:
            sock, _ = listener.accept()
        except OSError as error:  # the client has gone again, or there are no descriptors left
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.1)  # the port stays readable: do not spin
            return
        if len(self._connections) >= MAX_CONNECTIONS:
            self._drop(min(self._connections.values(), key=lambda c: c.deadline))
        sock.setblocking(False)
        deadline = time.monotonic() + SECONDS_PER_CONNECTION
        connection = _Connection(sock, port.respond, deadline)
        self._connections[id(connection)] = connection
        self._selector.register(
            sock, selectors.EVENT_READ, lambda events: self._serve(connection, events)
        )
        self._at(SECONDS_PER_CONNECTION, lambda: self._drop(connection))

    def _drop(self, connection: _Connection) -> None:
        if self._connections.pop(id(connection), None) is not None:
            self._selector.unregister(connection.socket)
            connection.socket.close()

    def _serve(self, connection: _Connection, events: int) -> None:
        if id(connection) not in self._connections:  # dropped in this round
            return
        try:
            if events & selectors.EVENT_READ:
                self._receive(connection)
            if connection.unsent:
                sent = connection.socket.send(connection.unsent)
                connection.unsent = connection.unsent[sent:]
                if connection.unsent:
                    self._selector.modify(
                        connection.socket,
                        selectors.EVENT_WRITE,
                        self._selector.get_key(connection.socket).data,
                    )
                else:
                    self._finish(connection)
        except BlockingIOError:
            pass
        except OSError:
            self._drop(connection)

    def _receive(self, connection: _Connection) -> None:
        data = connection.socket.recv(4096)
        if not data:
            self._drop(connection)
        elif not connection.answered:
            connection.received += data
            if b"\r\n\r\n" in connection.received:
                connection.unsent = self._answer(connection)
            elif len(connection.received) > MAX_REQUEST_BYTES:
                connection.unsent = encoded(_TOO_LARGE)
            connection.answered = bool(connection.unsent)

    def _answer(self, connection: _Connection) -> bytes:
        request = parsed(connection.received)
        if request is None:
            return encoded(_BAD_REQUEST)
        try:
            request = request._replace(family=_family(connection.socket))
            answer = connection.respond(request)
        except Exception as error:
            self._log.error("request failed", path=request.path, error=repr(error))
            answer = _BROKEN
        return encoded(answer, body=request.method != "HEAD")

    def _finish(self, connection: _Connection) -> None:
        """Ends our direction and waits for the client to end its own: a close with something
        unread makes the kernel send RST, and the client loses the answer."""
        connection.socket.shutdown(socket.SHUT_WR)
        key = self._selector.get_key(connection.socket)
        self._selector.modify(connection.socket, selectors.EVENT_READ, key.data)


def _family(connection: socket.socket) -> int:
    """4 or 6; a client of a socket for both families has a mapped address where it uses IPv4."""
    address = connection.getsockname()[0]
    return 6 if ":" in address and not address.startswith("::ffff:") else 4


def parsed(head: bytes) -> Request | None:
    """The request that these bytes begin with; None if they are none."""
    first, *lines = head.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
    parts = first.split(" ")
    if len(parts) != 3 or not parts[2].startswith("HTTP/1.") or not parts[1].startswith("/"):
        return None
    headers = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon:
            return None
        headers[name.strip().lower()] = value.strip()
    return Request(parts[0], parts[1].partition("?")[0], headers)


def encoded(answer: Answer, *, body: bool = True) -> bytes:
    """An answer's bytes."""
    headers = (
        *answer.headers,
        ("Date", time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())),
        ("Content-Length", str(len(answer.body))),
        ("Connection", "close"),
    )
    lines = [f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers]
    head = "\r\n".join((*lines, "", "")).encode("latin-1")
    return head + answer.body if body else head


# --- the agent's health servers -----------------------------------------------------------------

Answered = Callable[[str, int], None]
"""Told of every answer at /healthz and /livez: the path and the status."""


class HealthServers:
    """/healthz and /livez at `place` (host and port; None for nowhere), and the health check
    ports of Services, which `update` is told of.

    With `hard_fail` a place that cannot be opened is an OSError of `start`, else it is warned
    about and tried again.
    """

    def __init__(
        self,
        heartbeat: Heartbeat,
        log: Log,
        place: tuple[str, int] | None,
        *,
        hard_fail: bool = False,
        answered: Answered = lambda _path, _status: None,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self._heartbeat = heartbeat
        self._place = place
        self._hard_fail = hard_fail
        self._answered = answered
        self._server = Server("health", log, retry_seconds=retry_seconds)
        self._checks: Mapping[Name, HealthCheck] = {}
        self._ports: dict[Name, Port] = {}

    def start(self) -> None:
        """Starts to answer. Raises OSError if `hard_fail`."""
        if self._place:
            port = Port(*self._place, "/healthz", self._respond)
            self._server.serve(port, listen(*self._place) if self._hard_fail else None)
        self._server.start()

    def stop(self) -> None:
        """Closes all ports."""
        self._server.stop()

    def update(self, checks: Mapping[Name, HealthCheck]) -> None:
        """Tells all Services that have a health check port. Costs what changed, and does not wait
        for any port to open or close."""
        checks = dict(checks)
        before, self._checks = self._checks, checks
        if before == checks:
            return
        # what closes goes first: a port may pass from one Service to another
        for name, port in list(self._ports.items()):
            if name not in checks or checks[name].port != port.number:
                self._server.close(self._ports.pop(name))
        for name, check in checks.items():
            if name not in self._ports:
                port = Port("", check.port, f"health check of {name}", self._respond_for(name))
                self._ports[name] = port
                self._server.serve(port)

    def settle(self) -> bool:
        """Waits until all ports that were told have been tried. For tests."""
        return self._server.settle()

    def _respond(self, request: Request) -> Answer:
        if request.path not in ("/healthz", "/livez"):
            return NOT_FOUND
        answer = proxy_answer(self._heartbeat.health(), node=request.path == "/healthz")
        self._answered(request.path, answer.status)
        return answer

    def _respond_for(self, name: Name) -> Respond:
        def respond(request: Request) -> Answer:
            check = self._checks.get(name)  # the whole mapping is replaced, so there is no lock
            endpoints = check.endpoints(request.family) if check else 0
            healthy = self._heartbeat.health().healthy
            return service_answer(name, endpoints, healthy=healthy)

        return respond
