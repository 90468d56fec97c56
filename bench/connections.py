"""Connections a second, and the throughput of one, through a Service and without.

A client in one network namespace opens TCP connections one after the other to a server in another,
which closes each. Three worlds: to a pod on a node without rules; through a Service of a node that
the agent programs; through rules as kube-proxy makes them. What differs between the worlds is only
the node's tables.

A machine that has other work, or a host that takes the processor away, changes all of them by more
than what is asked. So the rounds are many and short, in random order, client and servers share one
processor (to wake another one takes longer than all the rest), and what is compared is the ratio
within each round: its median, with the interval that has it with 95 % (by order statistics, which
assumes no distribution).
"""

from __future__ import annotations

import math
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from bench.like_kube_proxy import ruleset
from bench.measure import Setting
from bench.objects import PORT, Cluster, Size, cluster_ip, endpoint_slice, service
from bench.process import HOST
from bench.results import Results, metric, say, yardstick
from bench.server import Prepared
from lab.world import World

NO_RULES, OTHERS = "no rules", "rules like kube-proxy's"
_PODS = 10
_PROCESSOR = {min(os.sched_getaffinity(0))}
_MOST_IMITATED = 5000
_PIECE = bytes(1 << 16)
# reads one byte, and all the rest if it is an s; then it closes
_SERVER = f"""
import socket
listener = socket.create_server(("0.0.0.0", {PORT}), backlog=1024)
buffer = bytearray(1 << 20)
print("ready", flush=True)
while True:
    connection, _ = listener.accept()
    if connection.recv(1) == b"s":
        while connection.recv_into(buffer):
            pass
    connection.close()
"""

Where = tuple[World, tuple[str, int]]


def measure(size: Size, results: Results, *, rounds: int, seconds: float) -> None:
    """Adds `connections`: a second, and Gbit/s of an established one, by kind of rules; and the
    ratios of those in the same round."""
    before = yardstick()
    with ExitStack() as stack:
        ways = {NO_RULES: _plain(stack), "sliceproxy": _agent(stack, size)}
        if nft := shutil.which("nft"):
            ways[OTHERS] = _imitation(stack, size, nft)
        kinds = {"opened": _open, "sent": _send}
        found: dict[str, dict[str, list[float]]] = {
            kind: {name: [] for name in ways} for kind in kinds
        }
        order = random.Random(1)
        for number in range(rounds + 1):  # the first one finds neighbours
            for kind, function in kinds.items():
                for name in order.sample([*ways], len(ways)):
                    world, where = ways[name]
                    value = world.run("client", _pinned, function, where, seconds)
                    if number:
                        found[kind][name].append(value)
    metrics = {}
    for kind, unit in (("opened", "a second"), ("sent", "Gbit/s")):
        for name, values in found[kind].items():
            metrics[f"{kind}: {name}"] = metric(values, unit)
            for other, others in found[kind].items():
                if name in (NO_RULES, other) or (other, name) == ("sliceproxy", OTHERS):
                    continue
                ratios = [v / o for v, o in zip(values, others, strict=True)]
                metrics[f"{kind}: {name} / {other}"] = metric(ratios, "times") | {
                    "interval": interval(ratios)
                }
    results.add("connections", str(size), metrics, [before, yardstick()], seconds=seconds)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Between which of the values the median of what they are drawn from is with 95 %."""
    ordered, count = sorted(values), len(values)
    low = max(0, int(count / 2 - 0.98 * math.sqrt(count)))
    return ordered[low], ordered[count - 1 - low]


def _pinned(
    function: Callable[[tuple[str, int], float], float], where: tuple[str, int], seconds: float
) -> float:
    """The function's value, in a thread that stays on the one processor."""
    os.sched_setaffinity(0, _PROCESSOR)
    return function(where, seconds)


def _world(stack: ExitStack) -> World:
    world = stack.enter_context(World(pods=_PODS, remotes=0, prefix="sliceproxy-bench"))
    for number in range(1, _PODS + 1):
        server = world.popen(
            f"pod-{number}", [sys.executable, "-c", _SERVER], stdout=subprocess.PIPE
        )
        stack.callback(server.kill)
        os.sched_setaffinity(server.pid, _PROCESSOR)
        assert server.stdout
        server.stdout.readline()
    return world


def _plain(stack: ExitStack) -> Where:
    world = _world(stack)
    return world, (world.hosts["pod-1"].ipv4, PORT)


def _agent(stack: ExitStack, size: Size) -> Where:
    world, address = _world(stack), cluster_ip(size.services)
    pods = [world.hosts[f"pod-{n}"].ipv4 for n in range(1, _PODS + 1)]
    extra = {
        "services": [service("asked", address)],
        "endpointslices": [endpoint_slice("asked-0", "asked", pods)],
    }
    cluster = Cluster(size, extra)
    made = Setting(world, cluster, Prepared(cluster))
    stack.enter_context(made.server)
    stack.enter_context(made.start()).wait("programmed", seconds=600)
    return world, (address, 80)


def _imitation(stack: ExitStack, size: Size, nft: str) -> Where:
    world, address = _world(stack), cluster_ip(size.services)
    targets = [f"{world.hosts[f'pod-{n}'].ipv4}:{PORT}" for n in range(1, _PODS + 1)]
    services = min(size.services, _MOST_IMITATED)
    text = ruleset(address, 80, targets, services, protocol="tcp")
    say(f"  connections: rules like kube-proxy's for {services} Services")
    world.run(HOST, lambda: subprocess.run([nft, "-f", "-"], input=text, text=True, check=True))
    return world, (address, 80)


def _open(where: tuple[str, int], seconds: float) -> float:
    """Connections a second, each opened, and closed by the server after one byte."""
    count, started = 0, time.perf_counter()
    end = started + seconds
    while (now := time.perf_counter()) < end:
        with socket.create_connection(where, 5) as connection:
            connection.send(b"c")
            connection.recv(1)
        count += 1
    return count / (now - started)


def _send(where: tuple[str, int], seconds: float) -> float:
    """Gbit/s over one connection."""
    with socket.create_connection(where, 5) as connection:
        connection.send(b"s")
        count, started = 0, time.perf_counter()
        end = started + seconds
        while (now := time.perf_counter()) < end:
            connection.sendall(_PIECE)
            count += len(_PIECE)
    return count * 8 / (now - started) / 1e9
