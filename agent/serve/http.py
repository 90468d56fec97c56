"""HTTP/1.1 for health checks, metrics and read-only APIs: h11 on top of one selectors loop.

One `HttpServer` is one thread, whatever the number of listeners and connections. Listeners, on TCP
or on a unix socket, are opened and closed while it runs. h11 parses requests and writes answers;
this module moves bytes and holds the limits:

- a connection carries one request, is closed after the answer, and never has a body read;
- it has `head_seconds` to send the request's head, of at most `head_bytes`, and `answer_seconds`
  to take the answer;
- a listener has at most `listener_connections`, the server `connections` and `answer_bytes` of
  answers that clients have not taken yet.

At a limit the server closes old connections in favour of new ones: a client that is slow or
silent does not keep others out, and the client address with the most connections loses first. So
one address that floods a port does not push out a probe from another. Nothing is kept of a
connection once it is closed.

Descriptors: the server opens listeners only while `SPARE_DESCRIPTORS` and all its connections
still fit below the process's limit (RLIMIT_NOFILE); those beyond are reported and tried again. If
the process has no descriptors left all the same, the server has one in reserve, so that it can
always answer one connection at a time.

The choice of h11 and of this loop is explained in docs/design/0006-http-server.md.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import queue
import resource
import selectors
import socket
import stat
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from typing import NamedTuple

import h11
import structlog

from agent.worker import Failed, Worker

Log = structlog.typing.FilteringBoundLogger

RETRY_SECONDS = 5.0  # as kube-proxy's health server has it
SPARE_DESCRIPTORS = 128
"""For the rest of the agent: the API server, netlink, files."""

_BACKLOG = 1024
_ACCEPTS_AT_ONCE = 16  # per listener, so that all listeners get their turn
_RECEIVE_BYTES = 4096
_MAX_LINES = 3  # about listeners that cannot be opened, each time they are tried
_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)


# --- requests and answers -----------------------------------------------------------------------


class HttpRequest(NamedTuple):
    """The head of a request. `path` and `query` are as sent, still percent-encoded; header names
    are lower case. `family` is the IP version of the connection, 0 on a unix socket."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    family: int


class HttpAnswer(NamedTuple):
    """An answer. Content-Length, Date and Connection are added by the server."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


Respond = Callable[[HttpRequest], HttpAnswer]
"""Called in the server's thread, so it must be quick. An exception is answered with 500."""

PLAIN_TEXT = (
    ("Content-Type", "text/plain; charset=utf-8"),
    ("X-Content-Type-Options", "nosniff"),
)
NOT_FOUND = HttpAnswer(404, PLAIN_TEXT, b"404 page not found\n")


def plain(status: int) -> HttpAnswer:
    """An answer that says no more than its status."""
    return HttpAnswer(status, PLAIN_TEXT, f"{status} {HTTPStatus(status).phrase}\n".encode())


# --- addresses ----------------------------------------------------------------------------------


class TcpAddress(NamedTuple):
    """`host` is an IP address. 0.0.0.0, :: and "" all stand for every address of both families,
    where the kernel has both."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class UnixAddress(NamedTuple):
    """The path of a unix socket, which gets `mode`. A socket that is there is replaced."""

    path: str
    mode: int = 0o600

    def __str__(self) -> str:
        return self.path


Address = TcpAddress | UnixAddress


def listen(address: Address) -> socket.socket:
    """A socket that listens, not blocking. Raises OSError."""
    if isinstance(address, UnixAddress):
        return _listen_unix(address)
    try:
        every = not address.host or ipaddress.ip_address(address.host).is_unspecified
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error)) from None
    if not 0 <= address.port <= 0xFFFF:
        raise OSError(errno.EINVAL, f"{address.port} is not a port")
    six = socket.has_dualstack_ipv6() if every else ":" in address.host
    made = socket.socket(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if six:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not every)
        made.bind((("::" if six else "0.0.0.0") if every else address.host, address.port))
        made.listen(_BACKLOG)
        made.setblocking(False)
    except BaseException:
        made.close()
        raise
    return made


def _listen_unix(address: UnixAddress) -> socket.socket:
    with suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.lstat(address.path).st_mode):
            os.unlink(address.path)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.bind(address.path)
        os.chmod(address.path, address.mode)  # no client can connect before `listen`
        made.listen(_BACKLOG)
        made.setblocking(False)
    except BaseException:
        made.close()
        raise
    return made


def raise_descriptor_limit() -> int:
    """Raises the soft limit of open files to the hard one. Returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return soft


# --- the server ---------------------------------------------------------------------------------


class Limits(NamedTuple):
    """See the module."""

    connections: int = 256
    listener_connections: int = 128
    head_bytes: int = 16384
    head_seconds: float = 5.0
    answer_seconds: float = 10.0
    answer_bytes: int = 64 << 20


LIMITS = Limits()


class Listener:
    """An address to serve, and what answers there.

    `purpose` and `service` (namespace/name, for a Service's health check port) identify it in log
    lines. Only `methods` are answered, others with 405; none stand for any. With `hosts`, requests
    whose Host header names another host are answered with 421: it keeps web pages from reading a
    loopback address by a DNS name of their own (DNS rebinding).
    """

    def __init__(
        self,
        address: Address,
        purpose: str,
        respond: Respond,
        *,
        service: str = "",
        methods: tuple[str, ...] = (),
        hosts: tuple[str, ...] = (),
    ) -> None:
        self.address = address
        self.purpose = purpose
        self.respond = respond
        self.service = service
        self.methods = methods
        self.hosts = hosts

    def answer(self, request: HttpRequest) -> HttpAnswer:
        """The answer, after the checks of method and host."""
        if self.methods and request.method not in self.methods:
            answer = plain(405)
            return answer._replace(headers=(*answer.headers, ("Allow", ", ".join(self.methods))))
        if self.hosts and _host(request.headers.get("host", "")) not in self.hosts:
            return plain(421)
        return self.respond(request)

    def fields(self) -> dict[str, str]:
        """What identifies it in a log line."""
        found = {"purpose": self.purpose, "address": str(self.address)}
        return found | ({"service": self.service} if self.service else {})


class HttpServer(Worker):
    """See the module. `serve`, `close` and `stop` may be called from any thread; the first two
    return before the thread has done what they ask.

    `each_tick` is called in the thread every few seconds, with `failed` as of any `Worker`.
    """

    def __init__(
        self,
        name: str,
        log: Log,
        failed: Failed,
        *,
        limits: Limits = LIMITS,
        tick_seconds: float = RETRY_SECONDS,
        each_tick: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(name, failed)
        self._log = log
        self._limits = limits
        self._tick_seconds = tick_seconds
        self._each_tick = each_tick
        self._requests: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self.wake_fd, selectors.EVENT_READ)
        self._listeners: dict[Listener, _Listening] = {}
        self._waiting: dict[Listener, bool] = {}  # not open yet; whether it was reported
        self._reading: dict[_Connection, None] = {}  # both in the order of their deadlines
        self._answering: dict[_Connection, None] = {}
        self._unsent = 0
        self._reserve: int | None = None
        self._settled: list[threading.Event] = []
        self._broken: set[Listener] = set()

    def serve(self, *listeners: Listener) -> None:
        """Opens listeners. Those that cannot be opened are logged, in a few lines for one call,
        and tried again."""
        self._ask(lambda: self._waiting.update(dict.fromkeys(listeners, False)))

    def adopt(self, listener: Listener, opened: socket.socket) -> None:
        """Serves a listener from a socket that listens already."""
        self._ask(lambda: self._add(listener, opened))

    def close(self, listener: Listener) -> None:
        """Closes a listener. Connections that were accepted are still answered."""
        self._ask(lambda: self._remove(listener))

    def settle(self, seconds: float = 10.0) -> bool:
        """Waits until all that was asked before has been tried. For tests."""
        done = threading.Event()
        self._ask(lambda: self._settled.append(done))
        return done.wait(seconds)

    # --- everything below runs in the thread ---

    def _ask(self, task: Callable[[], None]) -> None:
        self._requests.put(task)
        self._wake()

    def work(self) -> None:
        """Serves until `stop`."""
        self._take_reserve()
        tick_at = time.monotonic() + self._tick_seconds
        try:
            while not self.stopping:
                for key, events in self._selector.select(self._seconds_until(tick_at)):
                    if key.data is None:
                        self._do_requests()
                    else:
                        key.data(events)
                now = time.monotonic()
                self._expire(now)
                if now >= tick_at:
                    tick_at = now + self._tick_seconds
                    self._open_waiting()
                    self._each_tick()
        finally:
            self._close_all()

    def _seconds_until(self, tick_at: float) -> float:
        first = [next(iter(d)).deadline for d in (self._reading, self._answering) if d]
        return max(0.0, min([tick_at, *first]) - time.monotonic())

    def _do_requests(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self.wake_fd)
        while not self._requests.empty():
            self._requests.get()()
        self._open_waiting()
        while self._settled:
            self._settled.pop().set()

    def _close_all(self) -> None:
        for connection in [*self._reading, *self._answering]:
            self._drop(connection)
        for listener in list(self._listeners):
            self._remove(listener)
        if self._reserve is not None:
            os.close(self._reserve)
        self._selector.close()

    # listeners

    def _open_waiting(self) -> None:
        failures: list[tuple[Listener, OSError]] = []
        for listener, reported in list(self._waiting.items()):
            try:
                opened = self._opened(listener.address)
            except OSError as error:
                if not reported:
                    failures.append((listener, error))
                self._waiting[listener] = True
                continue
            del self._waiting[listener]
            self._add(listener, opened)
            if reported:
                self._log.info("listener_opened", **listener.fields())
        self._report(failures)

    def _opened(self, address: Address) -> socket.socket:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        spare = limit - self._limits.connections - SPARE_DESCRIPTORS
        if len(self._listeners) >= max(spare, limit // 4):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return listen(address)

    def _report(self, failures: list[tuple[Listener, OSError]]) -> None:
        retry = {"retry_in_seconds": self._tick_seconds}
        for listener, error in failures[:_MAX_LINES]:
            reason = error.strerror or str(error)
            self._log.warning("listener_failed", **listener.fields(), error=reason, **retry)
        if len(failures) > _MAX_LINES:
            more, advice = len(failures) - _MAX_LINES, {}
            if any(error.errno in _NO_DESCRIPTORS for _, error in failures):
                limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
                advice = {"advice": f"raise the hard limit of open files, which is {limit}"}
            self._log.warning("more_listeners_failed", count=more, **retry, **advice)

    def _add(self, listener: Listener, opened: socket.socket) -> None:
        listening = self._listeners[listener] = _Listening(listener, opened)
        self._selector.register(
            opened, selectors.EVENT_READ, lambda _events: self._accept(listening)
        )

    def _remove(self, listener: Listener) -> None:
        self._waiting.pop(listener, None)
        self._broken.discard(listener)
        listening = self._listeners.pop(listener, None)
        if listening is not None:
            self._selector.unregister(listening.socket)
            listening.socket.close()
            if isinstance(listener.address, UnixAddress):
                with suppress(OSError):
                    os.unlink(listener.address.path)

    # connections

    def _accept(self, listening: _Listening) -> None:
        for _ in range(_ACCEPTS_AT_ONCE):
            try:
                sock, address = listening.socket.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _NO_DESCRIPTORS and self._give_up_descriptor():
                    # the kernel says so even if no client waits, so only this once
                    with suppress(OSError):
                        self._welcome(listening, *listening.socket.accept())
                return  # else the client is gone, or the kernel has no memory for it
            self._welcome(listening, sock, address)

    def _welcome(self, listening: _Listening, sock: socket.socket, address: object) -> None:
        sock.setblocking(False)
        if len(listening) >= self._limits.listener_connections:
            self._drop(listening.victim())
        elif len(self._reading) + len(self._answering) >= self._limits.connections:
            self._drop(max(self._listenings(), key=len).victim())
        protocol = h11.Connection(h11.SERVER, max_incomplete_event_size=self._limits.head_bytes)
        deadline = time.monotonic() + self._limits.head_seconds
        peer = _Peer.of(sock.family, address)
        connection = _Connection(sock, listening, peer, deadline, protocol)
        listening.add(connection)
        self._reading[connection] = None
        self._selector.register(sock, selectors.EVENT_READ, connection.bound(self._ready))

    def _listenings(self) -> set[_Listening]:
        return {c.listening for d in (self._reading, self._answering) for c in d}

    def _take_reserve(self) -> None:
        with suppress(OSError):
            self._reserve = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)

    def _give_up_descriptor(self) -> bool:
        """Frees a descriptor for the next connection. Returns whether there was one."""
        if self._reserve is not None:
            os.close(self._reserve)
            self._reserve = None
            return True
        oldest = next(iter(self._answering or self._reading), None)
        if oldest is None:
            return False
        self._end(oldest)  # the connection to accept gets its descriptor, not the reserve
        return True

    def _drop(self, connection: _Connection) -> None:
        if not connection.dropped:
            self._end(connection)
            if self._reserve is None:
                self._take_reserve()

    def _end(self, connection: _Connection) -> None:
        connection.dropped = True
        self._selector.unregister(connection.socket)
        connection.socket.close()
        self._unsent -= connection.unsent
        connection.output.clear()
        connection.listening.discard(connection)
        self._reading.pop(connection, None)
        self._answering.pop(connection, None)

    def _expire(self, now: float) -> None:
        for waiting in (self._reading, self._answering):
            while waiting and (first := next(iter(waiting))).deadline <= now:
                self._drop(first)

    def _ready(self, connection: _Connection, events: int) -> None:
        if connection.dropped:  # earlier in this round
            return
        try:
            if events & selectors.EVENT_READ:
                self._receive(connection)
            if connection.output:
                self._send(connection)
        except BlockingIOError:
            pass
        except OSError:
            self._drop(connection)

    def _receive(self, connection: _Connection) -> None:
        data = connection.socket.recv(_RECEIVE_BYTES)
        if connection.answered:  # a body, or an end
            connection.discarded += len(data)
            if not data or connection.discarded > self._limits.head_bytes:
                self._drop(connection)
            return
        try:
            connection.protocol.receive_data(data)
            event = connection.protocol.next_event()
        except h11.RemoteProtocolError as error:
            self._answer(connection, plain(error.error_status_hint), body=True)
            return
        if isinstance(event, h11.Request):
            with suppress(h11.RemoteProtocolError):
                connection.complete = isinstance(connection.protocol.next_event(), h11.EndOfMessage)
            request = _request(event, connection.peer.family)
            answer = self._respond(connection.listening.listener, request)
            self._answer(connection, answer, body=request.method != "HEAD")
        elif event is not h11.NEED_DATA:
            self._drop(connection)

    def _respond(self, listener: Listener, request: HttpRequest) -> HttpAnswer:
        if not request.path.startswith("/"):
            return plain(400)
        try:
            answer = listener.answer(request)
        except Exception as error:
            if listener not in self._broken:  # a line for each request would be a flood
                self._broken.add(listener)
                self._log.error("request_failed", path=request.path[:200], error=repr(error)[:200])
            return plain(500)
        self._broken.discard(listener)
        return answer

    def _answer(self, connection: _Connection, answer: HttpAnswer, *, body: bool) -> None:
        connection.encode(answer, body=body)
        self._unsent += connection.unsent
        del self._reading[connection]
        while self._unsent > self._limits.answer_bytes and self._answering:
            self._drop(next(iter(self._answering)))
        connection.deadline = time.monotonic() + self._limits.answer_seconds
        self._answering[connection] = None

    def _send(self, connection: _Connection) -> None:
        while connection.output:
            first = connection.output[0]
            try:
                sent = connection.socket.send(first)
            except BlockingIOError:
                self._selector.modify(
                    connection.socket, selectors.EVENT_WRITE, connection.bound(self._ready)
                )
                raise
            self._unsent -= sent
            connection.unsent -= sent
            connection.output[0] = first[sent:]
            if not connection.output[0]:
                del connection.output[0]
        if connection.complete:
            self._drop(connection)
            return
        # a close with something unread makes the kernel send RST, and the client loses the answer
        connection.socket.shutdown(socket.SHUT_WR)
        self._selector.modify(
            connection.socket, selectors.EVENT_READ, connection.bound(self._ready)
        )


class _Listening:
    """An open listener with its connections, by client and in the order of their arrival."""

    def __init__(self, listener: Listener, opened: socket.socket) -> None:
        self.listener = listener
        self.socket = opened
        self._by_client: dict[bytes, dict[_Connection, None]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, connection: _Connection) -> None:
        self._by_client.setdefault(connection.peer.client, {})[connection] = None
        self._count += 1

    def discard(self, connection: _Connection) -> None:
        siblings = self._by_client[connection.peer.client]
        del siblings[connection]
        if not siblings:
            del self._by_client[connection.peer.client]
        self._count -= 1

    def victim(self) -> _Connection:
        """The oldest connection of the client that has the most."""
        most = max(self._by_client, key=lambda client: len(self._by_client[client]))
        return next(iter(self._by_client[most]))


class _Peer(NamedTuple):
    """The IP version of a connection (0 on a unix socket) and what identifies its client: an IPv4
    address, an IPv6 prefix of 64 bits, or nothing on a unix socket."""

    family: int
    client: bytes

    @classmethod
    def of(cls, family: int, address: object) -> _Peer:
        """From the family of the socket and the address that `accept` gave."""
        if family not in (socket.AF_INET, socket.AF_INET6) or not isinstance(address, tuple):
            return cls(0, b"")
        ip = ipaddress.ip_address(str(address[0]).partition("%")[0])
        if isinstance(ip, ipaddress.IPv6Address):
            if ip.ipv4_mapped is None:
                return cls(6, ip.packed[:8])
            ip = ip.ipv4_mapped
        return cls(4, ip.packed)


class _Connection:
    def __init__(
        self,
        sock: socket.socket,
        listening: _Listening,
        peer: _Peer,
        deadline: float,
        protocol: h11.Connection,
    ) -> None:
        self.socket = sock
        self.listening = listening
        self.peer = peer
        self.deadline = deadline
        self.protocol = protocol
        self.output: list[memoryview] = []
        self.unsent = 0
        self.answered = False
        self.complete = False  # no body follows the head
        self.discarded = 0
        self.dropped = False

    def bound(self, ready: Callable[[_Connection, int], None]) -> Callable[[int], None]:
        """What the selector calls."""
        return lambda events: ready(self, events)

    def encode(self, answer: HttpAnswer, *, body: bool) -> None:
        """Makes the answer's bytes the output."""
        headers = [
            *answer.headers,
            ("Date", time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())),
            ("Connection", "close"),
        ]
        if answer.status != HTTPStatus.NOT_MODIFIED:  # there it would be the length of the 200
            headers.append(("Content-Length", str(len(answer.body))))
        head = h11.Response(
            status_code=answer.status,
            headers=headers,
            reason=HTTPStatus(answer.status).phrase.encode(),
        )
        pieces = [self.protocol.send(head) or b""]
        if body and answer.body:
            pieces += self.protocol.send_with_data_passthrough(h11.Data(data=answer.body)) or ()
        self.protocol.send(h11.EndOfMessage())
        self.output = [memoryview(piece) for piece in pieces if piece]
        self.unsent = sum(map(len, self.output))
        self.answered = True


def _request(event: h11.Request, family: int) -> HttpRequest:
    path, _, query = event.target.decode("latin-1").partition("?")
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in event.headers}
    return HttpRequest(event.method.decode("latin-1"), path, query, headers, family)


def _host(header: str) -> str:
    """The host of a Host header, without its port, in lower case."""
    host = header.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host
