"""Connections a second, and the throughput of one, through a Service and without.

A client in one network namespace opens TCP connections one after the other to a server in another,
which closes each. Three worlds in turn: to a pod on a node without rules; through a Service of a
node that the agent programs; through rules as kube-proxy makes them. What differs between the
worlds is only the node's tables.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack

from bench.like_kube_proxy import ruleset
from bench.measure import Setting
from bench.objects import PORT, Cluster, Size, cluster_ip, endpoint_slice, service
from bench.process import HOST
from bench.results import Results, metric, say, yardstick
from bench.server import Prepared
from lab.world import World

_PODS = 10
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
    """Adds `connections`: a second, and Gbit/s of an established one, by kind of rules."""
    before = yardstick()
    with ExitStack() as stack:
        ways = {"no rules": _plain(stack), "sliceproxy": _agent(stack, size)}
        if nft := shutil.which("nft"):
            ways["rules like kube-proxy's"] = _imitation(stack, size, nft)
        opened: dict[str, list[float]] = {name: [] for name in ways}
        sent: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds + 1):  # the first one finds neighbours
            for name, (world, where) in ways.items():
                rate = world.run("client", _open, where, seconds)
                flow = world.run("client", _send, where, seconds)
                if number:
                    opened[name].append(rate)
                    sent[name].append(flow)
    metrics = {f"opened: {name}": metric(values, "a second") for name, values in opened.items()}
    metrics |= {f"sent: {name}": metric(values, "Gbit/s") for name, values in sent.items()}
    results.add("connections", str(size), metrics, [before, yardstick()])


def _world(stack: ExitStack) -> World:
    world = stack.enter_context(World(pods=_PODS, remotes=0, prefix="sliceproxy-bench"))
    for number in range(1, _PODS + 1):
        server = world.popen(
            f"pod-{number}", [sys.executable, "-c", _SERVER], stdout=subprocess.PIPE
        )
        stack.callback(server.kill)
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
