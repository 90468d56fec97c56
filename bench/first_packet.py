"""What a connection's first packet takes longer through a cluster IP than straight to a pod.

Every part of the way (client, node, pod) is a network namespace, and a packet crosses all of them
inside the client's own `sendto`: veth hands it on in the same call, through the node's hooks, to
the pod's socket. So the duration of that one system call is the whole way there, with no other
process to wake, and its median shows differences of a tenth of a microsecond.

The ways are measured in turn, each time from a socket, and so a flow, that was not used before:

- *plain*: to a pod in a world whose node has conntrack and nothing else;
- *NAT hooks alone*: to a pod in a world whose node has NAT chains without rules: what any proxy
  costs that translates with NAT;
- *direct*: to a pod past our tables, which look in vain;
- through cluster IPs of Services with 1 and 10 endpoints;
- the same in an agent that does not count, and in one of another commit (`--earlier`);
- in another cluster, where some Services have session affinity: through one that has none, and
  through those with 10 and 1,000 endpoints;
- through rules as kube-proxy makes them (`bench.like_kube_proxy`), if there is an `nft`.
"""

from __future__ import annotations

import random
import shutil
import socket
import statistics
import subprocess
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from agent.kernel.tables import Kernel
from bench.like_kube_proxy import ruleset
from bench.measure import Setting
from bench.objects import (
    PER_SLICE,
    Cluster,
    Size,
    cluster_ip,
    endpoint_slice,
    service,
)
from bench.process import HOST, ROOT
from bench.results import Results, metric, say, yardstick
from bench.server import Prepared
from lab.world import World
from rules.language import Base, Chain, Final, Hook, Is, Predicate, rule
from rules.netlink.batch import Batch

_PODS = 10
_FIRST_PORT = 20000
_RCVBUFFORCE = 33
_PLAIN = {"1 endpoint": (1, False), "10 endpoints": (10, False)}
"""Endpoints and session affinity of the Services that are asked, by name."""
_UNCOUNTED = {"10 endpoints, without counters": (10, False)}
_EARLIER = {"10 endpoints, earlier commit": (10, False)}
_BESIDE_STICKY = {
    "10 endpoints, others sticky": (10, False),
    "sticky, 10 endpoints": (10, True),
    "sticky, 1000 endpoints": (1000, True),
}
_MOST_IMITATED = 5000  # Services in the imitation; its nft takes seconds for more
_BATCH = 250
"""Sockets that are open at once."""


def measure(
    sizes: list[Size], results: Results, *, quick: bool, earlier: Path | None = None
) -> None:
    """`earlier` is a checkout of another commit, whose agent programs one more world."""
    for size in sizes:
        _measure(size, results, 8 if quick else 80, earlier)


def _extra(
    size: Size, world: World, asked: dict[str, tuple[int, bool]]
) -> tuple[dict[str, list[bytes]], dict[str, str]]:
    """The Services to be asked, beside those of the size; and their addresses."""
    pods = [world.hosts[f"pod-{n}"].ipv4 for n in range(1, _PODS + 1)]
    services, slices, addresses = [], [], {}
    for number, (name, (count, sticky)) in enumerate(asked.items()):
        plain = f"asked-{number}"
        addresses[name] = cluster_ip(size.services + number)
        services.append(service(plain, addresses[name], protocol="UDP", sticky=sticky))
        for part in range(-(-count // _PODS)):
            some = pods[: min(_PODS, count)]
            slices.append(
                endpoint_slice(
                    f"{plain}-{part}", plain, some, port=_FIRST_PORT + part, protocol="UDP"
                )
            )
    return {"services": services, "endpointslices": slices}, addresses


class _Ways:
    """Worlds with their sinks, and where to send in each."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.to: dict[str, tuple[World, tuple[str, int]]] = {}
        self.sinks: list[list[socket.socket]] = []

    def world(self, pods: int, ports: int = 1) -> World:
        """A world whose pods listen."""
        world = self._stack.enter_context(World(pods=pods, remotes=0, prefix="sliceproxy-bench"))
        for n in range(1, pods + 1):
            self.sinks.append(_sinks(world, f"pod-{n}", ports))
            self._stack.callback(_close, self.sinks[-1])
        return world

    def to_pod(self, name: str, world: World) -> None:
        """A way past all Services."""
        self.to[name] = world, (world.hosts["pod-1"].ipv4, _FIRST_PORT)

    def through_agent(
        self, size: Size, asked: dict[str, tuple[int, bool]], *flags: str, tree: Path = ROOT
    ) -> World:
        """Ways through Services of a cluster of this size, and these, which the tree's agent
        programs."""
        world = self.world(_PODS, PER_SLICE)
        extra, addresses = _extra(size, world, asked)
        made = Setting(world, Cluster(size, extra), Prepared(Cluster(size, extra)))
        self._stack.enter_context(made.server)
        self._stack.enter_context(made.start(*flags, tree=tree)).wait("programmed", seconds=600)
        self.to.update({name: (world, (address, 80)) for name, address in addresses.items()})
        return world

    def through_imitation(self, name: str, services: int) -> None:
        """A way through rules as kube-proxy makes them."""
        nft = shutil.which("nft")
        if nft is None:
            say("  first packet: no nft, so nothing is compared with rules as kube-proxy's")
            return
        world, address = self.world(_PODS), cluster_ip(services)
        targets = [f"{world.hosts[f'pod-{n}'].ipv4}:{_FIRST_PORT}" for n in range(1, _PODS + 1)]
        text = ruleset(address, 80, targets, min(services, _MOST_IMITATED))
        world.run(HOST, lambda: subprocess.run([nft, "-f", "-"], input=text, text=True, check=True))
        self.to[name] = world, (address, 80)


def _measure(size: Size, results: Results, batches: int, earlier: Path | None) -> None:
    before = yardstick()
    with ExitStack() as stack:
        ways = _Ways(stack)
        for name, nat in (("plain", False), ("NAT hooks alone", True)):
            world = ways.world(1)
            world.run(HOST, partial(_track_connections, nat=nat))
            ways.to_pod(name, world)
        ways.to_pod("direct", ways.through_agent(size, _PLAIN))
        ways.through_agent(size, _UNCOUNTED, "--no-counters")
        ways.through_agent(size, _BESIDE_STICKY)
        if earlier:
            ways.through_agent(size, _EARLIER, tree=earlier)
        ways.through_imitation("rules like kube-proxy's, 10 endpoints", size.services)
        for world, where in ways.to.values():  # neighbours are found, code is warm
            world.run("client", _send, where, 50)
        for group in ways.sinks:
            _empty(group)
        samples, lost = _interleave(ways.to, batches, ways.sinks)
    base = statistics.median(samples["plain"])
    metrics = {"plain conntrack": metric(samples["plain"], "us")}
    for name, values in samples.items():
        if name != "plain":
            metrics[f"added: {name}"] = _added(values, samples["plain"])
    results.add(
        "first-packet",
        str(size),
        metrics,
        [before, yardstick()],
        samples=len(samples["plain"]),
        lost=lost,
        plain_us=round(base, 3),
    )


def _added(values: list[float], plain: list[float]) -> dict[str, Any]:
    """The difference of medians, batch by batch: its spread is the noise of the measurement."""
    differences = [
        statistics.median(values[i : i + _BATCH]) - statistics.median(plain[i : i + _BATCH])
        for i in range(0, len(values), _BATCH)
    ]
    return metric(differences, "us")


def _interleave(
    ways: dict[str, tuple[World, tuple[str, int]]], batches: int, sinks: list[list[socket.socket]]
) -> tuple[dict[str, list[float]], int]:
    samples: dict[str, list[float]] = {name: [] for name in ways}
    rng, sent, got = random.Random(1), 0, 0
    for number in range(batches):
        sockets = {name: world.run("client", _open, _BATCH) for name, (world, _) in ways.items()}
        turns = [(name, n) for n in range(_BATCH) for name in rng.sample(list(ways), len(ways))]
        for name, n in turns:
            sender, where = sockets[name][n], ways[name][1]
            started = time.perf_counter_ns()
            sender.sendto(b"x", where)
            samples[name].append((time.perf_counter_ns() - started) / 1e3)
        sent += len(turns)
        for group in sockets.values():
            for sender in group:
                sender.close()
        got += sum(map(_empty, sinks))
        if number % 20 == 19:
            say(f"  first packet: {number + 1} of {batches} batches")
    return samples, sent - got


def _open(count: int) -> list[socket.socket]:
    """Sockets that are bound already, so that only the packet is timed."""
    opened = []
    for _ in range(count):
        one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        one.bind(("0.0.0.0", 0))
        opened.append(one)
    return opened


def _send(where: tuple[str, int], count: int) -> None:
    for one in _open(count):
        one.sendto(b"x", where)
        one.close()
    time.sleep(0.05)


def _sinks(world: World, host: str, ports: int) -> list[socket.socket]:
    """Sockets that accept everything and answer nothing."""

    def make() -> list[socket.socket]:
        made = []
        for port in range(_FIRST_PORT, _FIRST_PORT + ports):
            one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            one.bind(("0.0.0.0", port))
            one.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, 1 << 22)
            one.setblocking(False)
            made.append(one)
        return made

    return world.run(host, make)


def _empty(sinks: list[socket.socket]) -> int:
    """How many datagrams had come."""
    count = 0
    for sink in sinks:
        try:
            while sink.recv(16):
                count += 1
        except BlockingIOError:
            continue
    return count


def _close(sinks: list[socket.socket]) -> None:
    for sink in sinks:
        sink.close()


def _track_connections(*, nat: bool) -> None:
    """A table that makes the kernel track connections, with or without NAT, and does no more."""
    track = (rule(Is(Predicate.NEW), Final.RETURN),)
    chains = [Chain("track", track, Base("filter", Hook.FORWARD, 0))]
    if nat:
        hooks = (Hook.PREROUTING, -100), (Hook.OUTPUT, -100), (Hook.POSTROUTING, 100)
        chains += [Chain(hook.value[0], (), Base("nat", hook, at)) for hook, at in hooks]
    batch = Batch()
    batch.new_table(4, "plain", 0)
    for chain in chains:
        batch.new_chain(4, "plain", chain)
        batch.new_rules(4, "plain", chain)
    with Kernel(own=False) as kernel:
        kernel.send(batch)
