"""The measurements of the agent as a process: load, restart, memory, idle, change, burst."""

from __future__ import annotations

import random
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bench.objects import PER_SLICE, PORT, Cluster, Size, generation
from bench.process import (
    HOST,
    ROOT,
    Listener,
    MeasureError,
    Process,
    agent_command,
    clear,
    cpu_seconds,
    data_pattern,
    memory_mib,
)
from bench.results import Results, metric, say, yardstick
from bench.server import Prepared, Server, chunk
from lab.world import World

SETTLE_SECONDS = 1.0
PAUSE_SECONDS = 0.004
_CHANGED, _BURST, _CHURN = 20, 32, 64
"""First octets of addresses that come by single changes and, from there on, by bursts and churn."""
_MOST_CHURN = 50_000
"""Endpoints that are replaced one by one; of larger sizes this takes too long to prepare."""

MEASURES = ("load", "restart", "memory", "idle", "change", "churn", "burst")


class Repeats(NamedTuple):
    """How often, and how long, things are measured."""

    loads: int = 5
    restarts: int = 3
    changes: int = 300
    bursts: int = 3
    idle_seconds: float = 30.0
    churn_seconds: float = 60.0

    @classmethod
    def few(cls) -> Repeats:
        return cls(1, 1, 50, 1, 3.0, 5.0)


class Setting:
    """A world with a server of one size in it; agents come and go."""

    def __init__(self, world: World, cluster: Cluster, prepared: Prepared) -> None:
        self.world = world
        self.cluster = cluster
        self.server = Server(prepared, lambda: _tcp(world))

    def start(self, *flags: str, tree: Path = ROOT) -> Process:
        self.server.forget()
        return Process(self.world, agent_command(self.server.url, *flags), tree)


def _tcp(world: World) -> socket.socket:
    return world.socket(HOST, socket.AF_INET, socket.SOCK_STREAM)


@contextmanager
def setting(size: Size, *, streams: bool = True, encoding: str = "protobuf") -> Iterator[Setting]:
    """Builds the world and prepares the answers."""
    cluster = Cluster(size, encoding=encoding)
    prepared = Prepared(cluster, streams=streams)
    say(f"{size}: {sum(prepared.sizes.values()) / 1e6:.1f} MB of objects prepared")
    with World(pods=0, remotes=0, prefix="sliceproxy-bench") as world:
        made = Setting(world, cluster, prepared)
        with made.server:
            yield made


def measure(names: set[str], size: Size, repeats: Repeats, results: Results, **how: Any) -> None:
    """The chosen measurements for one size, in an order in which none disturbs the next."""
    before = yardstick()
    with setting(size, **how) as made:
        if "load" in names:
            load(made, repeats, results, before)
        process = _loaded(made)
        if "restart" in names:
            process = restart(made, process, repeats, results, before)
        with process:
            if "memory" in names:
                memory(made, process, results, before)
            if "idle" in names:
                idle(made, process, repeats, results, before)
            if "change" in names:
                change(made, process, repeats, results, before)
            if "churn" in names and size.total <= _MOST_CHURN:
                churn(made, process, repeats, results, before)
            if "burst" in names:
                burst(made, process, repeats, results, before)


def _loaded(made: Setting) -> Process:
    clear(made.world)
    process = made.start()
    process.wait("programmed", "verified", seconds=600)
    made.server.wait_for_watch("endpointslices")
    time.sleep(SETTLE_SECONDS)
    return process


def load(made: Setting, repeats: Repeats, results: Results, before: dict[str, float]) -> None:
    """Process start to all programmed, over and over, the kernel being empty."""
    rows = []
    for _ in range(repeats.loads):
        clear(made.world)
        with made.start() as process:
            at, line = process.wait("programmed", seconds=600)
            row = {
                "time": at - process.started,
                "cpu": cpu_seconds(process.pid),
                "kernel": line["kernel_ms"] / 1e3,
                "programming": line["ms"] / 1e3,
                "peak": memory_mib(process.pid)["VmHWM"],
                "received": made.server.sent / 1e6,
            }
            if line["added"] < made.cluster.size.total:
                raise MeasureError(f"only {line['added']} elements were added")
            rows.append(row)
    units = {"peak": "MiB", "received": "MB"}
    results.add(
        "load",
        str(made.cluster.size),
        {name: metric([row[name] for row in rows], units.get(name, "s")) for name in rows[0]},
        [before, yardstick()],
        object_bytes=sum(made.server.prepared.sizes.values()),
        elements=line["added"],
        netlink_bytes=line["bytes"],
        lists="streamed" if made.server.prepared.streams else "pages",
        content_type=made.cluster.encoding.content_type,
    )


def restart(
    made: Setting, process: Process, repeats: Repeats, results: Results, before: dict[str, float]
) -> Process:
    """Killed and started again with nothing changed; returns the last one, running."""
    times, cpu, written = [], [], 0
    for _ in range(repeats.restarts):
        process.kill()
        process = made.start()
        at, line = process.wait("verified", "programmed", seconds=600)
        times.append(at - process.started)
        cpu.append(cpu_seconds(process.pid))
        written = max(written, line["added"] + line["removed"])
    made.server.wait_for_watch("endpointslices")
    time.sleep(SETTLE_SECONDS)
    results.add(
        "restart",
        str(made.cluster.size),
        {
            "time": metric(times, "s"),
            "cpu": metric(cpu, "s"),
            "written": metric([written], "elements"),
        },
        [before, yardstick()],
    )
    return process


def memory(made: Setting, process: Process, results: Results, before: dict[str, float]) -> None:
    """What the agent holds when it has nothing to do."""
    found = memory_mib(process.pid)
    results.add(
        "memory",
        str(made.cluster.size),
        {"resident": metric([found["VmRSS"]], "MiB"), "peak": metric([found["VmHWM"]], "MiB")},
        [before],
        after_a_restart=True,
    )


def idle(
    made: Setting, process: Process, repeats: Repeats, results: Results, before: dict[str, float]
) -> None:
    """CPU while nothing happens."""
    started, used = time.perf_counter(), cpu_seconds(process.pid)
    time.sleep(repeats.idle_seconds)
    share = (cpu_seconds(process.pid) - used) / (time.perf_counter() - started)
    results.add(
        "idle",
        str(made.cluster.size),
        {"cpu": metric([share * 100], "% of a core")},
        [before],
        seconds=repeats.idle_seconds,
    )


def change(
    made: Setting, process: Process, repeats: Repeats, results: Results, before: dict[str, float]
) -> None:
    """One endpoint's address replaced: the event's bytes in the socket to the notification."""
    cluster, rng = made.cluster, random.Random(1)
    times, used = [], cpu_seconds(process.pid)
    with Listener(made.world) as listener:
        for number in range(repeats.changes + 5):
            if number == 5:
                used = cpu_seconds(process.pid)
            index = rng.randrange(cluster.size.services)
            addresses = cluster.addresses(index)
            position = rng.randrange(len(addresses))
            addresses[position] = generation(_CHANGED, number)
            first = position // PER_SLICE
            data = chunk(cluster.change(index, addresses)[first])
            time.sleep(PAUSE_SECONDS)
            listener.drain()
            started = time.perf_counter()
            made.server.push("endpointslices", data)
            at = listener.wait_for(socket.inet_aton(addresses[position]))
            if number >= 5:
                times.append((at - started) * 1e3)
            # back again, so that the next change of this Service replaces one address, too
            back = cluster.change(index, cluster.addresses(index))[first]
            made.server.push("endpointslices", chunk(back))
            listener.wait_for(socket.inet_aton(cluster.addresses(index)[position]))
        time.sleep(0.1)
        each = (cpu_seconds(process.pid) - used) / (2 * len(times))
    results.add(
        "change",
        str(cluster.size),
        {
            "latency": metric(times, "ms"),
            "cpu": metric([each * 1e3], "ms of CPU"),
            "received": metric([len(data)], "bytes"),
        },
        [before, yardstick()],
        changes=2 * len(times),
        event_bytes=len(data),
    )


def burst(
    made: Setting, process: Process, repeats: Repeats, results: Results, before: dict[str, float]
) -> None:
    """All endpoints of all Services replaced at once, until the last notification."""
    cluster = made.cluster
    times, cpu, transactions = [], [], []
    for number in range(repeats.bursts):
        octet = _BURST + number
        data = b"".join(
            chunk(line)
            for index in range(cluster.size.services)
            for line in cluster.change(index, cluster.addresses(index, octet))
        )
        lines, used = len(process.lines), cpu_seconds(process.pid)
        with Listener(made.world) as listener:
            started = time.perf_counter()
            made.server.push_later("endpointslices", data)
            pattern = data_pattern(octet, PORT)
            at = listener.wait_for_count(pattern, cluster.size.total, 300)
        time.sleep(0.2)
        times.append(at - started)
        cpu.append(cpu_seconds(process.pid) - used)
        transactions.append(sum(x["event"] == "programmed" for _, x in process.lines[lines:]))
    results.add(
        "burst",
        str(cluster.size),
        {"time": metric(times, "s"), "cpu": metric(cpu, "s")},
        [before, yardstick()],
        transactions=statistics.median(transactions),
        event_bytes=len(data),
    )


def churn(
    made: Setting, process: Process, repeats: Repeats, results: Results, before: dict[str, float]
) -> None:
    """Every pod replaced by another, one event each, evenly over `churn_seconds`."""
    cluster, events, addresses = made.cluster, list[bytes](), dict[int, list[str]]()
    for position in range(cluster.size.endpoints):
        for index in range(cluster.size.services):
            now = addresses.setdefault(index, cluster.addresses(index))
            now[position] = generation(_CHURN, len(events))
            events.append(chunk(cluster.change(index, now)[position // PER_SLICE]))
    sent, heard = [0.0] * len(events), [0.0] * len(events)
    used = cpu_seconds(process.pid)

    def send() -> None:
        for number, data in enumerate(events):
            due = started + number * repeats.churn_seconds / len(events)
            time.sleep(max(0.0, due - time.perf_counter()))
            sent[number] = time.perf_counter()
            made.server.push("endpointslices", data)

    with Listener(made.world) as listener:
        started = time.perf_counter()
        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        listener.wait_for_all(data_pattern(_CHURN, PORT), heard, repeats.churn_seconds * 2 + 60)
        took = time.perf_counter() - started
        sender.join()
    share = (cpu_seconds(process.pid) - used) / took
    times = [(at - begin) * 1e3 for at, begin in zip(heard, sent, strict=True)]
    results.add(
        "churn",
        str(cluster.size),
        {
            "latency": metric(times, "ms"),
            "cpu": metric([share * 100], "% of a core"),
            "received": metric([sum(map(len, events)) / 1e6], "MB"),
        },
        [before, yardstick()],
        seconds=took,
        changes=len(events),
    )
