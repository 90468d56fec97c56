"""The bytes of a real API server, replayed over a real socket to the agent's connection."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import structlog

from agent.sources.kubernetes.connection import connect
from agent.sources.kubernetes.follower import ClusterFollower
from agent.sources.kubernetes.reflector import Timing
from rules.events import Delete, Event, Synced, Upsert
from rules.objects import EndpointSlice, Node, Object, Service, ServiceCIDR

RAW = Path(__file__).parents[1] / "recordings" / "raw"
TIMING = Timing(connect=2.0, answer=2.0, silence=2.0, backoff=(0.05, 0.1))
NO_STREAM = b"HTTP/1.1 422 Unprocessable Entity\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Replay:
    """Answers each request with the bytes that `choose` returns for its path; None: no answer."""

    def __init__(self, choose: Callable[[str], bytes | None], piece: int) -> None:
        self._choose = choose
        self._piece = piece
        self._sock = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._sock.getsockname()[1]}"

    def __enter__(self) -> Replay:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        for connection in self._open:
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._sock.accept()
            except OSError:
                return
            self._open.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += connection.recv(65536)
        path = head.split(b" ")[1].decode()
        self.requests.append(path)
        answer = self._choose(path)
        if answer is None:
            return
        try:
            for start in range(0, len(answer), self._piece):
                connection.sendall(answer[start : start + self._piece])
            connection.shutdown(socket.SHUT_WR)
        except OSError:  # the agent has stopped
            pass


def raw(name: str) -> bytes:
    return (RAW / name).read_bytes()


def answers(encoding: str, *, streaming: bool) -> Callable[[str], bytes | None]:
    """A server that has the recorded lists, and whose watches say nothing."""

    def choose(path: str) -> bytes | None:
        plural = path.partition("?")[0].rpartition("/")[2]
        if "sendInitialEvents" in path:
            stream = streaming and plural == "endpointslices"
            return raw("watchlist-endpointslices.protobuf.http") if stream else NO_STREAM
        if "watch=1" in path:
            return None
        if plural in ("nodes", "servicecidrs"):
            return raw(f"list-{plural}.protobuf.http")
        return raw(f"list-{plural}.{encoding}.http")

    return choose


@contextmanager
def followed(replay: Replay) -> Iterator[dict[tuple[type[Object], object], Object]]:
    """What the agent has after the lists and, if there is one, the stream."""
    table: dict[tuple[type[Object], object], Object] = {}
    synced = threading.Event()

    def put(events: list[Event]) -> None:
        for event in events:
            match event:
                case Upsert(new):
                    table[type(new), new.name] = new
                case Delete(kind, name):
                    del table[kind, name]
                case Synced():
                    synced.set()

    follower = ClusterFollower(
        connect(server=replay.url),
        "node-1",
        "",
        put,
        structlog.get_logger(),
        failed=lambda *_: None,
        timing=TIMING,
    )
    follower.start()
    try:
        assert synced.wait(20)
        yield table
    finally:
        follower.stop()


@pytest.mark.parametrize("piece", [1000, 1 << 20])
@pytest.mark.parametrize("encoding", ["json.gzip", "protobuf"])
def test_recorded_lists(encoding: str, piece: int) -> None:
    """The large JSON list is gzip inside chunks: on old code nothing was ever programmed."""
    with Replay(answers(encoding, streaming=False), piece) as replay, followed(replay) as table:
        count = {kind: sum(k is kind for k, _ in table) for kind, _ in table}
    assert count == {Service: 25, EndpointSlice: 36, Node: 1, ServiceCIDR: 1}
    assert not [o for o in table.values() if o.problems]


def test_both_encodings_of_a_list_are_the_same_records() -> None:
    tables = []
    for encoding in ("json.gzip", "protobuf"):
        with Replay(answers(encoding, streaming=False), 5000) as replay, followed(replay) as table:
            tables.append(table)
    assert tables[0] == tables[1]


def test_a_recorded_stream() -> None:
    """Its frames do not end where its chunks do, nor these where the pieces of the socket do. The
    bookmark that ends the list is in the middle, so more slices follow it."""
    deadline = time.monotonic() + 20
    with Replay(answers("protobuf", streaming=True), 700) as replay, followed(replay) as table:
        while True:
            slices = [o for o in list(table.values()) if isinstance(o, EndpointSlice)]
            if len(slices) == 24 or time.monotonic() > deadline:
                break
            time.sleep(0.01)
    assert len(slices) == 24
    assert {str(s.service) for s in slices} >= {"default/kubernetes", "infra/big", "infra/dns"}
    assert not [s for s in slices if s.problems]


@pytest.mark.parametrize(
    ("name", "event"),
    [("status-401.protobuf.http", "api_server_unauthorized")],
)
def test_recorded_errors(name: str, event: str) -> None:
    capture = structlog.testing.LogCapture()
    log = structlog.wrap_logger(None, processors=[capture])
    with Replay(lambda _: raw(name), 1000) as replay:
        follower = ClusterFollower(
            connect(server=replay.url),
            "node-1",
            "",
            lambda _: None,
            log,
            failed=lambda *_: None,
            timing=TIMING,
        )
        follower.start()
        wait = threading.Event()
        for _ in range(400):
            if any(e["event"] == event for e in capture.entries):
                break
            wait.wait(0.05)
        follower.stop()
    (entry,) = [e for e in capture.entries if e["event"] == event]
    assert entry["answer"] == "Unauthorized"
