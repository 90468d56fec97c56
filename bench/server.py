"""An API server that has its answers ready: it costs next to nothing while others are measured.

Lists are streamed as a server of Kubernetes 1.34 streams them, each object a chunk of its own, or
they are pages of 500, compressed as the server does it (gzip, level 1); both in protobuf or JSON.
Then the watches are silent until `push`.
"""

from __future__ import annotations

import gzip
import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from urllib.parse import parse_qs, urlsplit

from bench.objects import FIRST_VERSION, GROUPS, KINDS, Cluster, Encoding

PAGE = 500
_PATHS = {(f"/apis/{GROUPS[p]}/v1/{p}" if p in GROUPS else f"/api/v1/{p}"): p for p in KINDS}
_HEAD = "HTTP/1.1 200 OK\r\nContent-Type: {}\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class Prepared:
    """The answers for a cluster. `streams`: lists as watches, else pages."""

    def __init__(self, cluster: Cluster, *, streams: bool = True) -> None:
        self.streams = streams
        self.head = _HEAD.format(cluster.encoding.content_type).encode()
        self.bodies: dict[str, bytes] = {}
        self.pages: dict[str, list[bytes]] = {}
        self.sizes: dict[str, int] = {}
        for plural in KINDS:
            if streams:
                events = list(cluster.stream(plural))
                self.sizes[plural] = sum(map(len, events))
                self.bodies[plural] = b"".join(map(chunk, events))
            else:
                objects = list(cluster.objects(plural))
                self.sizes[plural] = sum(map(len, objects))
                self.pages[plural] = list(_pages(plural, objects, cluster.encoding))


def _pages(plural: str, objects: list[bytes], encoding: Encoding) -> Iterable[bytes]:
    starts = range(0, max(1, len(objects)), PAGE)
    for number, start in enumerate(starts):
        token = b',"continue":"%d"' % (number + 1) if number + 1 < len(starts) else b""
        body = b'{"kind":"%sList","apiVersion":"v1","metadata":{"resourceVersion":"%d"%s}' % (
            KINDS[plural].encode(),
            FIRST_VERSION,
            token,
        )
        body += b',"items":[%s]}' % b",".join(objects[start : start + PAGE])
        packed = gzip.compress(encoding.page(KINDS[plural], body), 1)
        yield (
            b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Encoding: gzip\r\n"
            b"Content-Length: %d\r\n\r\n%s"
            % (encoding.content_type.partition(";")[0].encode(), len(packed), packed)
        )


class Server:
    """Listens where `make_socket` makes its socket. A context manager."""

    def __init__(self, prepared: Prepared, make_socket: Callable[[], socket.socket]) -> None:
        self.prepared = prepared
        self._listener = make_socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(64)
        self._watches: dict[str, socket.socket] = {}
        self._connections: list[socket.socket] = []
        self.asked: list[str] = []
        self.sent = 0
        self._news = threading.Condition()

    @property
    def url(self) -> str:
        host, port = self._listener.getsockname()[:2]
        return f"http://{host}:{port}"

    def __enter__(self) -> Server:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for connection in (self._listener, *self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def forget(self) -> None:
        """The client has gone; the next one begins."""
        with self._news:
            self.sent = 0
            self._watches.clear()
            for connection in self._connections:
                connection.close()
            self._connections.clear()

    def wait_for_watch(self, plural: str, seconds: float = 30.0) -> None:
        with self._news:
            if not self._news.wait_for(lambda: plural in self._watches, seconds):
                raise TimeoutError(f"no client watches {plural}")

    def push(self, plural: str, data: bytes) -> None:
        """Sends chunks to whoever watches."""
        self.sent += len(data)
        self._watches[plural].sendall(data)

    def push_later(self, plural: str, data: bytes) -> None:
        """Begins to send chunks; does not wait until they have been taken."""
        threading.Thread(target=self.push, args=(plural, data), daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connections.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError):
            received = b""
            while True:
                while b"\r\n\r\n" not in received:
                    data = connection.recv(65536)
                    if not data:
                        return
                    received += data
                head, _, received = received.partition(b"\r\n\r\n")
                self._answer(connection, head.split(b"\r\n")[0].decode())

    def _answer(self, connection: socket.socket, line: str) -> None:
        method, target, _ = line.split(" ")
        self.asked.append(f"{method} {target}")
        parts = urlsplit(target)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        plural = _PATHS.get(parts.path)
        if plural is None or method != "GET":
            self._say(connection, 404, b'{"kind":"Status","code":404,"status":"Failure"}')
        elif query.get("watch") in ("1", "true"):
            if "sendInitialEvents" in query and not self.prepared.streams:
                self._say(connection, 422, b'{"kind":"Status","code":422,"status":"Failure"}')
                return
            self._send(connection, self.prepared.head)
            if "sendInitialEvents" in query:
                self._send(connection, self.prepared.bodies[plural])
            with self._news:
                self._watches[plural] = connection
                self._news.notify_all()
        elif self.prepared.pages:
            self._send(connection, self.prepared.pages[plural][int(query.get("continue", "0"))])
        else:
            body = b'{"metadata":{"resourceVersion":"%d"},"items":[]}' % FIRST_VERSION
            self._say(connection, 200, body)

    def _say(self, connection: socket.socket, code: int, body: bytes) -> None:
        head = "HTTP/1.1 %d Answer\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        self._send(connection, (head % (code, len(body))).encode() + body)

    def _send(self, connection: socket.socket, data: bytes) -> None:
        with self._news:
            self.sent += len(data)
        connection.sendall(data)
