"""Questions and answers between hosts of a World: servers name themselves and their client."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import selectors
import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Self

from lab.hosts import Answer, Outcome, Protocol, WorldError

# Python 3.11 does not name these.
_IP_PKTINFO = 8
_IP_RECVERR = 11
_IPV6_RECVERR = 25
_IN_PKTINFO = struct.Struct("=i4s4s")
_IN6_PKTINFO = struct.Struct("=16si")
_BACKLOG = 1024
_OUTCOME_OF_ERROR: Mapping[int, Outcome] = {
    errno.ECONNREFUSED: "refused",
    errno.ECONNRESET: "refused",
    errno.EHOSTUNREACH: "unreachable",
    errno.ENETUNREACH: "unreachable",
    # ICMPv6 "administratively prohibited", and routes of type prohibit.
    errno.EACCES: "unreachable",
}


class Server:
    """Listening sockets of one `World.serve` call.  Closing them makes the port refuse."""

    def __init__(self, loop: ServerLoop, sockets: Sequence[socket.socket]) -> None:
        self._loop = loop
        self._sockets = sockets

    def close(self) -> None:
        """Stop listening.  May be called twice."""
        self._loop.remove(self._sockets)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class ServerLoop:
    """All servers of a world, in one thread."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._stop = os.eventfd(0)
        self._selector.register(self._stop, selectors.EVENT_READ)
        # Held while sockets are answered, so that none is closed under the answering thread.
        self._answering = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="world-servers", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops the thread and closes all sockets."""
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        self.remove([k.fileobj for k in self._keys() if isinstance(k.fileobj, socket.socket)])
        self._selector.close()
        os.close(self._stop)

    def add(self, host: str, protocol: Protocol, sockets: Sequence[socket.socket]) -> None:
        """Answers on these sockets from now on."""
        reply = _answer_connections if protocol == "tcp" else _answer_datagrams
        for sock in sockets:
            self._selector.register(sock, selectors.EVENT_READ, partial(reply, sock, host))

    def remove(self, sockets: Sequence[socket.socket]) -> None:
        """Closes these sockets; those that are closed already are left out."""
        with self._answering:
            for sock in sockets:
                if sock.fileno() != -1:
                    self._selector.unregister(sock)
                    sock.close()

    def _keys(self) -> list[selectors.SelectorKey]:
        return list(self._selector.get_map().values())

    def _run(self) -> None:
        while True:
            ready = self._selector.select()
            with self._answering:
                for key, _ in ready:
                    if key.fileobj == self._stop:
                        return
                    key.data()


def _answer_connections(listener: socket.socket, host: str) -> None:
    # An error here is a client that left early, or a listener that was closed since it was ready.
    with contextlib.suppress(OSError):
        while True:
            connection, peer = listener.accept()
            with connection:
                connection.send(_answer_text(host, peer))


def _answer_datagrams(sock: socket.socket, host: str) -> None:
    with contextlib.suppress(OSError):
        while True:
            _, control, _, peer = sock.recvmsg(2048, 128)
            sock.sendmsg([_answer_text(host, peer)], _reply_source(control), 0, peer)


def _reply_source(control: Sequence[tuple[int, int, bytes]]) -> list[tuple[int, int, bytes]]:
    """The control message that sends a reply from the address the datagram came to.

    A host with several addresses would otherwise answer from another one than it was asked at.
    """
    for level, kind, data in control:
        if (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO):
            _, _, arrived_at = _IN_PKTINFO.unpack(data)
            return [(level, kind, _IN_PKTINFO.pack(0, arrived_at, b""))]
        if (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
            arrived_at, _ = _IN6_PKTINFO.unpack(data)
            return [(level, kind, _IN6_PKTINFO.pack(arrived_at, 0))]
    return []


def _answer_text(host: str, peer: tuple[Any, ...]) -> bytes:
    return f"{host} {peer[0]} {peer[1]}\n".encode()


def _parse_answer(text: bytes, address: str, port: int) -> tuple[str, str, int]:
    try:
        server, client, client_port = text.decode().split()
        return server, client, int(client_port)
    except ValueError:
        raise WorldError(
            f"{address} port {port} was answered with {text!r}, which is not from a server of"
            " this world: ask only what World.serve serves"
        ) from None


def listen(
    port: int, protocol: Protocol, address: str | None, families: Sequence[int]
) -> list[socket.socket]:
    """Listening sockets in the calling thread's namespace; an empty address means all addresses."""
    with contextlib.ExitStack() as on_error:
        sockets = []
        for family in families:
            sock = on_error.enter_context(socket.socket(family, socket_kind(protocol)))
            sock.setblocking(False)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if protocol == "tcp":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            elif family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            else:
                sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
            sock.bind((address or "", port))
            if protocol == "tcp":
                sock.listen(_BACKLOG)
            sockets.append(sock)
        on_error.pop_all()
    return sockets


def ask(sock: socket.socket, address: str, port: int, timeout: float) -> Answer:
    """Asks an address and port who answers there and which client address it sees."""
    started = time.monotonic()
    outcome, text = _question(sock, (address, port), started + timeout)
    seconds = time.monotonic() - started
    if outcome != "answered":
        return Answer(outcome, None, None, None, seconds)
    return Answer(outcome, *_parse_answer(text, address, port), seconds)


def _question(
    sock: socket.socket, address: tuple[str, int], deadline: float
) -> tuple[Outcome, bytes]:
    how = _question_tcp if sock.type == socket.SOCK_STREAM else _question_udp
    try:
        return "answered", how(sock, address, deadline)
    except TimeoutError:
        return "silent", b""
    except OSError as error:
        outcome = _OUTCOME_OF_ERROR.get(error.errno or 0)
        if outcome is None:
            raise
        return outcome, b""


def _question_tcp(sock: socket.socket, address: tuple[str, int], deadline: float) -> bytes:
    # Close with a reset: thousands of connections leave no TIME_WAIT, and a source port can be
    # used again at once.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    _connect(sock, address, deadline)
    text = b""
    while not text.endswith(b"\n"):
        _wait_until(sock, deadline)
        if not (part := sock.recv(512)):
            break
        text += part
    return text


def _connect(sock: socket.socket, address: tuple[str, int], deadline: float) -> None:
    """Connect, and take every ICMP error for the end of it.

    Between namespaces the error arrives while the kernel still holds the socket for sending the
    SYN.  IPv6 then only notes it in SO_ERROR, and a caller of connect() learns of it a second
    later, when the SYN is repeated.
    """
    sock.setblocking(False)
    code = sock.connect_ex(address)
    if code == errno.EINPROGRESS:
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code == 0:
            connected = select.poll()
            connected.register(sock, select.POLLOUT)
            in_time = connected.poll(max(0.0, deadline - time.monotonic()) * 1000)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code == 0 and not in_time:
                code = errno.ETIMEDOUT
    if code != 0:
        raise OSError(code, os.strerror(code))


def _question_udp(sock: socket.socket, address: tuple[str, int], deadline: float) -> bytes:
    # Without this, only "port unreachable" of all ICMP errors ends the wait on an IPv4 socket.
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
    _wait_until(sock, deadline)
    sock.connect(address)
    # A datagram that a rule of this very host rejects or drops gives EPERM in both cases; only
    # a reject is followed by an ICMP error.
    try:
        sock.send(b"who\n")
    except OSError as error:
        if error.errno != errno.EPERM:
            raise
    return sock.recv(512)


def _wait_until(sock: socket.socket, deadline: float) -> None:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    sock.settimeout(left)


def socket_kind(protocol: Protocol) -> socket.SocketKind:
    """The socket type of a protocol."""
    return socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
