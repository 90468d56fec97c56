"""Node ports on 127.0.0.1 and ::1, TCP only, by forwarding in this process (KEP-6032).

The kernel does not route packets with a loopback source elsewhere (`route_localnet` would allow
that for IPv4, and was CVE-2020-8558), so nftables alone cannot serve them. A listener for each node
port of the served Services connects to the Service's cluster IP, and the kernel's rules choose the
endpoint, with its affinity. Two consequences:

- The endpoint sees an address of the node, never 127.0.0.1, and with `sessionAffinity: ClientIP`
  all connections through a port have one endpoint, as in kube-proxy.
- A cluster IP follows `internalTrafficPolicy`. Where that is Local, the listener connects to the
  node port at the node's own address instead, which follows `externalTrafficPolicy`; node ports
  must then be accepted there (`--nodeport-addresses primary,localhost`).

UDP and SCTP have no listener, so the kernel refuses them.

Bounds: CONNECTIONS connections at once; beyond them new ones wait in the kernel's backlog. Each
direction buffers at most BUFFER_BYTES. A listener that cannot be opened is reported once, and tried
again.
"""

from __future__ import annotations

import errno
import os
import queue
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import NamedTuple

import structlog

from agent.worker import Failed, Worker
from rules.events import Delete, Event, Upsert
from rules.frontends import FAMILY_OF_LENGTH
from rules.objects import TCP, Address, Name, Service, address_text
from rules.selection import service_is_ours

Log = structlog.typing.FilteringBoundLogger

CONNECTIONS = 1024
BUFFER_BYTES = 1 << 16
CONNECT_SECONDS = 10
RETRY_SECONDS = 5.0
_ACCEPTS_AT_ONCE = 16
_BACKLOG = 128
_MAX_LINES = 3  # about listeners that cannot be opened, each time they are tried
_LOOPBACK = {4: (socket.AF_INET, "127.0.0.1"), 6: (socket.AF_INET6, "::1")}
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with RST


class LocalPort(NamedTuple):
    """A TCP port at the loopback address of a family."""

    family: int
    port: int

    def __str__(self) -> str:
        host = _LOOPBACK[self.family][1]
        return f"[{host}]:{self.port}" if self.family == 6 else f"{host}:{self.port}"


class Upstream(NamedTuple):
    """Where the connections of a port are sent: the Service's cluster IP and port.

    With `by_node_port` it is the node port at the address from which the cluster IP is reached.
    """

    service: Name
    address: Address
    port: int
    by_node_port: bool


def upstreams(service: Service) -> dict[LocalPort, Upstream]:
    """The loopback ports of a Service."""
    return {
        LocalPort(FAMILY_OF_LENGTH[len(address)], port.node_port): Upstream(
            service.name, address, port.port, service.internal_local
        )
        for address in (service.cluster_ips if service.proxied else ())
        for port in service.ports
        if port.node_port and port.protocol == TCP
    }


class LocalhostPorts(Worker):
    """See the module. `update` and `programmed` may be called from any thread.

    Nothing is opened before `programmed` was called: until the kernel has rules, a cluster IP leads
    out of the node.
    """

    def __init__(
        self, log: Log, failed: Failed, proxy_name: str = "", *, connections: int = CONNECTIONS
    ) -> None:
        super().__init__("localhost ports", failed)
        self._log = log
        self._proxy_name = proxy_name
        self._limit = connections
        self._news: queue.SimpleQueue[Iterable[Event]] = queue.SimpleQueue()
        self._news_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._news_lock = threading.Lock()
        self._news_closed = False
        self._programmed = False
        self._selector = selectors.DefaultSelector()
        self._of_service: dict[Name, Mapping[LocalPort, Upstream]] = {}
        self._listeners: dict[LocalPort, _Listener] = {}
        self._unopened: dict[LocalPort, Upstream] = {}
        self._reported: set[LocalPort] = set()
        self._retry_at = 0.0
        self._accept_again_at: float | None = None
        self._pairs: set[_Pair] = set()

    def update(self, events: Iterable[Event]) -> None:
        """Takes in events of Services; others are ignored."""
        self._news.put(events)
        self._notify()

    def programmed(self) -> None:
        """The kernel has rules."""
        if not self._programmed:
            self._programmed = True
            self._notify()

    def _notify(self) -> None:
        with self._news_lock:
            if not self._news_closed:
                os.eventfd_write(self._news_fd, 1)

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._pairs)

    def work(self) -> None:
        """See Worker."""
        self._selector.register(self.wake_fd, selectors.EVENT_READ, lambda _: None)
        self._selector.register(self._news_fd, selectors.EVENT_READ, self._read_news)
        try:
            while not self.stopping:
                for key, mask in self._selector.select(self._timeout()):
                    key.data(mask)
                self._on_time()
        finally:
            for pair in list(self._pairs):
                pair.close()
            for listener in self._listeners.values():
                listener.sock.close()
            self._selector.close()
            with self._news_lock:
                self._news_closed = True
                os.close(self._news_fd)

    def _timeout(self) -> float | None:
        times = [self._retry_at] if self._unopened and self._programmed else []
        if self._accept_again_at is not None:
            times.append(self._accept_again_at)
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _on_time(self) -> None:
        now = time.monotonic()
        if self._accept_again_at is not None and now >= self._accept_again_at:
            self._accept_again_at = None
            self._accept(True)
        if self._unopened and self._programmed and now >= self._retry_at:
            self._open()

    # listeners

    def _read_news(self, _mask: int) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._news_fd)
        with suppress(queue.Empty):
            while True:
                self._take(self._news.get_nowait())
        if self._unopened and self._programmed:
            self._open()

    def _take(self, events: Iterable[Event]) -> None:
        for event in events:
            match event:
                case Upsert(Service() as service):
                    ours = service_is_ours(service, self._proxy_name)
                    self._set(service.name, upstreams(service) if ours else {})
                case Delete(kind, Name() as name) if kind is Service:
                    self._set(name, {})

    def _set(self, name: Name, wanted: Mapping[LocalPort, Upstream]) -> None:
        before = self._of_service.pop(name, {})
        if wanted:
            self._of_service[name] = wanted
        for port in before.keys() - wanted.keys():
            self._close_port(port, name)
        for port, upstream in wanted.items():
            if listener := self._listeners.get(port):
                listener.upstream = upstream
            else:
                self._unopened[port] = upstream

    def _close_port(self, port: LocalPort, name: Name) -> None:
        if port in self._unopened and self._unopened[port].service == name:
            del self._unopened[port]
            self._reported.discard(port)
        listener = self._listeners.get(port)
        if listener and listener.upstream.service == name:  # not if another Service has taken it
            del self._listeners[port]
            self._watch(listener.sock, 0, listener.accept)
            listener.sock.close()

    def _open(self) -> None:
        failures: list[tuple[LocalPort, Upstream, OSError]] = []
        for port, upstream in list(self._unopened.items()):
            try:
                listener = _Listener(self, port, upstream)
            except OSError as error:
                failures.append((port, upstream, error))
                continue
            del self._unopened[port]
            self._reported.discard(port)
            self._listeners[port] = listener
            if self._accepting:
                self._watch(listener.sock, selectors.EVENT_READ, listener.accept)
        self._retry_at = time.monotonic() + RETRY_SECONDS
        self._report([failure for failure in failures if failure[0] not in self._reported])

    def _report(self, failures: list[tuple[LocalPort, Upstream, OSError]]) -> None:
        for port, upstream, error in failures[:_MAX_LINES]:
            self._log.warning(
                "localhost_port_failed",
                service=str(upstream.service),
                address=str(port),
                error=error.strerror,
                retry_in_seconds=RETRY_SECONDS,
            )
        if more := len(failures[_MAX_LINES:]):
            self._log.warning("more_localhost_ports_failed", count=more)
        self._reported.update(port for port, _, _ in failures)

    # connections

    @property
    def _accepting(self) -> bool:
        return len(self._pairs) < self._limit and self._accept_again_at is None

    def _accept(self, on: bool) -> None:
        for listener in self._listeners.values():
            mask = selectors.EVENT_READ if on and self._accepting else 0
            self._watch(listener.sock, mask, listener.accept)

    def _accepted(self, client: socket.socket, listener: _Listener) -> None:
        try:
            pair = _Pair(self, client, listener)
        except OSError as error:
            _abort(client)
            self._pause_if_short_of_descriptors(error)
            return
        self._pairs.add(pair)
        if not self._accepting:
            self._accept(False)

    def _pause_if_short_of_descriptors(self, error: OSError) -> None:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
            self._accept_again_at = time.monotonic() + 1.0
            self._accept(False)

    def _ended(self, pair: _Pair) -> None:
        was_full = len(self._pairs) >= self._limit
        self._pairs.discard(pair)
        if was_full:
            self._accept(True)

    def _watch(self, sock: socket.socket, mask: int, call: Callable[[int], None]) -> None:
        """Calls `call` when the socket is ready for `mask`; 0 for not at all."""
        known = self._selector.get_map().get(sock.fileno())
        if known is None:
            if mask:
                self._selector.register(sock, mask, call)
        elif not mask:
            self._selector.unregister(sock)
        elif known.events != mask:
            self._selector.modify(sock, mask, call)


class _Listener:
    def __init__(self, owner: LocalhostPorts, port: LocalPort, upstream: Upstream) -> None:
        self._owner = owner
        self.port = port
        self.upstream = upstream
        family, host = _LOOPBACK[port.family]
        self.sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.sock.bind((host, port.port))
            self.sock.listen(_BACKLOG)
        except OSError:
            self.sock.close()
            raise

    def accept(self, _mask: int) -> None:
        for _ in range(_ACCEPTS_AT_ONCE):
            if not self._owner._accepting:
                return
            try:
                client, _ = self.sock.accept()
            except OSError as error:
                self._owner._pause_if_short_of_descriptors(error)
                return
            client.setblocking(False)
            self._owner._accepted(client, self)


class _End:
    """One of the two sockets of a pair, with what is to be sent to it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.pending = bytearray()
        self.ended = False  # it will send no more
        self.shut = False  # it knows that the other one will send no more


class _Pair:
    """A connection of a client and the one to the Service. A half-closed direction is half-closed
    on the other side, too; an error on one side resets the other."""

    def __init__(self, owner: LocalhostPorts, client: socket.socket, listener: _Listener) -> None:
        self._owner = owner
        upstream = socket.socket(client.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            for sock in (client, upstream):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # also how long a connect may take; taken back once it is connected
            limit = CONNECT_SECONDS * 1000
            upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, limit)
            with suppress(BlockingIOError):  # it continues in the background
                upstream.connect(_address(listener, client.family))
        except OSError:
            upstream.close()
            raise
        self._client, self._upstream = _End(client), _End(upstream)
        self._connecting = True
        owner._watch(upstream, selectors.EVENT_WRITE, self._connected)

    def _connected(self, _mask: int) -> None:
        sock = self._upstream.sock
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.close(abort=True)
            return
        self._connecting = False
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 0)
        self._owner._watch(sock, 0, self._connected)
        self._settle()

    def _move(self, end: _End, other: _End, mask: int) -> None:
        try:
            if mask & selectors.EVENT_WRITE and end.pending:
                del end.pending[: end.sock.send(end.pending)]
            if mask & selectors.EVENT_READ and not end.ended:
                if data := end.sock.recv(BUFFER_BYTES - len(other.pending)):
                    other.pending += data
                else:
                    end.ended = True
            if other.pending:
                del other.pending[: other.sock.send(other.pending)]
        except BlockingIOError:
            pass
        except OSError:
            self.close(abort=True)
            return
        self._settle()

    def _settle(self) -> None:
        client, upstream = self._client, self._upstream
        for end, other in ((client, upstream), (upstream, client)):
            if other.ended and not end.pending and not end.shut:
                end.shut = True
                with suppress(OSError):
                    end.sock.shutdown(socket.SHUT_WR)
        if client.shut and upstream.shut:
            self.close()
            return
        for end, other in ((client, upstream), (upstream, client)):
            mask = selectors.EVENT_WRITE if end.pending else 0
            if not end.ended and len(other.pending) < BUFFER_BYTES:
                mask |= selectors.EVENT_READ
            call = self._from_client if end is client else self._from_upstream
            self._owner._watch(end.sock, mask, call)

    def _from_client(self, mask: int) -> None:
        self._move(self._client, self._upstream, mask)

    def _from_upstream(self, mask: int) -> None:
        self._move(self._upstream, self._client, mask)

    def close(self, *, abort: bool = False) -> None:
        for end in (self._client, self._upstream):
            self._owner._watch(end.sock, 0, self._from_client)
            if abort:
                _abort(end.sock)
            else:
                end.sock.close()
        self._owner._ended(self)


def _address(listener: _Listener, family: int) -> tuple[str, int]:
    upstream = listener.upstream
    address = address_text(upstream.address)
    if not upstream.by_node_port:
        return address, upstream.port
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, upstream.port))  # sends nothing, and chooses the source address
        return probe.getsockname()[0], listener.port.port


def _abort(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    sock.close()
