"""What readers of the API cost the agent: the loop's pause, answers, changes while it is polled.

`part` is timed in this process on the state of the same objects: the longest that the loop does at
a time for a reader. Answers are timed at the unix socket; those behind a change read that change.
"""

from __future__ import annotations

import gc
import http.client
import random
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from bench.measure import SETTLE_SECONDS, Setting, setting
from bench.objects import KINDS, PER_SLICE, Cluster, Size, cluster_ip, generation
from bench.process import Listener, clear
from bench.results import Results, metric, yardstick
from bench.server import chunk
from rules.decode import decode
from rules.events import Synced, Upsert
from rules.feed import Feed
from rules.mirror import read
from rules.options import Options
from rules.state import State

POLL_SECONDS = 2.0
PAUSE_SECONDS = 0.02
ROWS = 50
"""So many Services does the page have on the screen."""
_CHANGED = 21  # first octet of the addresses of changes


def measure(sizes: list[Size], results: Results, *, quick: bool) -> None:
    """All of it, for each size."""
    for size in sizes:
        before = yardstick()
        parts = _parts(size, 1 if quick else 5)
        with tempfile.TemporaryDirectory() as directory, setting(size) as made:
            path = str(Path(directory) / "api.sock")
            clear(made.world)
            with made.start(f"--api-socket={path}") as process:
                process.wait("programmed", "verified", seconds=600)
                made.server.wait_for_watch("endpointslices")
                time.sleep(SETTLE_SECONDS)
                changes = _Changes(made, random.Random(1))
                metrics = {"part": metric(parts, "ms")}
                repeats = 5 if quick else 20
                with Listener(made.world) as listener:
                    for name, target in _answers(size).items():
                        times, length = [], 0
                        for _ in range(repeats):
                            changes.make(listener)
                            taken, length = _ask(path, target)
                            times.append(taken)
                        metrics[name] = metric(times, "ms")
                        metrics[f"{name} size"] = metric([length], "bytes")
                    for name, (target, headers) in _repeated(path, size).items():
                        asked = [_ask(path, target, headers) for _ in range(repeats)]
                        metrics[name] = metric([taken for taken, _ in asked], "ms")
                        metrics[f"{name} size"] = metric([asked[-1][1]], "bytes")
                    count = 50 if quick else 600
                    alone = [changes.make(listener) for _ in range(count)]
                    with _polled(path, [*_answers(size).values()]):
                        polled = [changes.make(listener) for _ in range(count)]
            metrics["change alone"] = metric(alone, "ms")
            metrics["change while polled"] = metric(polled, "ms")
        results.add("api", str(size), metrics, [before, yardstick()], poll_seconds=POLL_SECONDS)


def _answers(size: Size) -> dict[str, str]:
    index = size.services // 2
    return {
        "status": "/v1/status",
        "services": "/v1/services",
        "endpoints": f"/v1/services/default/service-{index}",
        "explain": f"/v1/explain?target={cluster_ip(index)}:80",
    }


def _parts(size: Size, repeats: int) -> list[float]:
    """Milliseconds of each part of a first reading of the loaded state, with the heap as the agent
    has it."""
    cluster, state = Cluster(size, encoding="json"), State(Options(node="node-1"))
    for plural, kind in KINDS.items():
        state.apply(Upsert(decode(kind, item)) for item in cluster.objects(plural))
    state.apply([Synced()])
    state.step()
    gc.collect()
    gc.freeze()
    times = []
    try:
        for _ in range(repeats):
            feed, last = Feed(), False
            while not last:
                started = time.perf_counter()
                last = read(state, feed).last
                times.append((time.perf_counter() - started) * 1e3)
    finally:
        gc.unfreeze()
    return times


class _Changes:
    """One endpoint's address replaced, and back again."""

    def __init__(self, made: Setting, rng: random.Random) -> None:
        self._made = made
        self._random = rng
        self._number = 0

    def make(self, listener: Listener) -> float:
        """Milliseconds from the event's bytes in the socket to the kernel's notification."""
        made, cluster = self._made, self._made.cluster
        index = self._random.randrange(cluster.size.services)
        addresses = cluster.addresses(index)
        position = self._random.randrange(len(addresses))
        addresses[position] = generation(_CHANGED, self._number)
        self._number += 1
        data = chunk(cluster.change(index, addresses)[position // PER_SLICE])
        time.sleep(PAUSE_SECONDS)
        listener.drain()
        started = time.perf_counter()
        made.server.push("endpointslices", data)
        at = listener.wait_for(socket.inet_aton(addresses[position]))
        back = cluster.change(index, cluster.addresses(index))[position // PER_SLICE]
        made.server.push("endpointslices", chunk(back))
        listener.wait_for(socket.inet_aton(cluster.addresses(index)[position]))
        return (at - started) * 1e3


class _Connection(http.client.HTTPConnection):
    """HTTP over the agent's unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(self._path)


def _repeated(path: str, size: Size) -> dict[str, tuple[str, dict[str, str]]]:
    """What the page asks while nothing changes: path and headers."""
    connection = _Connection(path)
    connection.request("GET", "/v1/services")
    tag = connection.getresponse().headers["ETag"]
    connection.close()
    rows = ",".join(f"default/service-{index}" for index in range(min(ROWS, size.services)))
    return {
        "services again": ("/v1/services", {}),
        "services compressed": ("/v1/services", {"Accept-Encoding": "gzip"}),
        "services unchanged": ("/v1/services", {"If-None-Match": tag}),
        "rows with counters": (f"/v1/services?counters=true&services={rows}", {}),
        "all with counters": ("/v1/services?counters=true", {}),
    }


def _ask(path: str, target: str, headers: Mapping[str, str] | None = None) -> tuple[float, int]:
    """Milliseconds until an answer is complete, and the bytes of its body."""
    connection = _Connection(path)
    started = time.perf_counter()
    connection.request("GET", target, headers=headers or {})
    answer = connection.getresponse()
    body = answer.read()
    taken = (time.perf_counter() - started) * 1e3
    connection.close()
    if answer.status not in (http.HTTPStatus.OK, http.HTTPStatus.NOT_MODIFIED):
        raise RuntimeError(f"{target}: {answer.status} {body[:200]!r}")
    return taken, len(body)


@contextmanager
def _polled(path: str, targets: list[str]) -> Iterator[None]:
    """A client that asks for everything every POLL_SECONDS."""
    done = threading.Event()

    def poll() -> None:
        while not done.is_set():
            for target in targets:
                _ask(path, target)
            done.wait(POLL_SECONDS)

    client = threading.Thread(target=poll, daemon=True)
    client.start()
    try:
        yield
    finally:
        done.set()
        client.join()
