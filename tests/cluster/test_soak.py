"""A hundred thousand events through the real agent: every state is exact, and nothing leaks.

Connections break now and then.

$SLICEPROXY_SOAK_EVENTS says how many there are instead.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.world import World
from tests.cluster.apiserver import ApiServer, Document
from tests.cluster.cluster import FabricServer, Mirror, cidr_document, errors, node_document
from tests.kernel.agent import Agent
from tests.manifest import endpoint, service_document, slice_document

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make namespaces")

EVENTS = int(os.environ.get("SLICEPROXY_SOAK_EVENTS", "100000"))
SERVICES = 300
BATCHES = {1: 60, 10: 20, 100: 4, 1000: 1}
"""How many events happen at once, and how often."""
CHECKS = 10
MISSED = 20
MOST_GROWTH_MB = 10.0


class Crowd:
    """Services and slices that come, go and change at random, about SERVICES of them."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._slices: dict[str, set[int]] = {}
        self._made: set[str] = set()

    def event(self, server: ApiServer) -> None:
        """One object is put or deleted."""
        name = f"crowd-{self._rng.randrange(2 * SERVICES)}"
        slices = self._slices.setdefault(name, set())
        if self._rng.random() < 0.3:
            if name not in self._made:
                self._made.add(name)
                server.put(self._service(name))
            elif self._rng.random() < 0.5:
                self._made.remove(name)
                server.delete("Service", name)
            else:
                server.put(self._service(name))
            return
        number = self._rng.randrange(3)
        if number in slices and self._rng.random() < 0.4:
            slices.remove(number)
            server.delete("EndpointSlice", f"{name}-{number}")
        else:
            slices.add(number)
            server.put(self._slice(name, number))

    def _service(self, name: str) -> Document:
        rng, octets = self._rng, self._octets(name)
        ports: list[dict[str, Any]] = [{"name": "http", "port": 80}]
        if rng.random() < 0.3:
            ports.append({"name": "dns", "port": 53, "protocol": "UDP"})
        spec: dict[str, Any] = {}
        if rng.random() < 0.2:
            spec |= {"type": "NodePort"}
            ports[0]["nodePort"] = 30000 + int(name.partition("-")[2])
        if rng.random() < 0.1:
            spec["externalIPs"] = [f"203.0.113.{rng.randrange(1, 255)}"]  # two may want the same
        if rng.random() < 0.1:
            spec["sessionAffinity"] = "ClientIP"
        if rng.random() < 0.1:
            spec["internalTrafficPolicy"] = "Local"
        addresses = [f"10.96.{octets}"]
        if rng.random() < 0.5:
            addresses.append(f"fd00:10:96::{octets.replace('.', ':')}")
        return service_document(name, cluster_ips=addresses, ports=ports, **spec)

    def _slice(self, name: str, number: int) -> Document:
        rng, v6 = self._rng, number == 2
        prefix = "fd00:10:244:2::" if v6 else "10.244."
        found = {
            f"{prefix}{rng.randrange(1, 40):x}" if v6 else f"{prefix}{rng.randrange(1, 4)}.{n}"
            for n in rng.sample(range(1, 250), rng.randrange(7))
        }
        endpoints = [
            endpoint(
                address,
                node=f"node-{rng.randrange(1, 4)}",
                ready=rng.random() < 0.8,
                serving=rng.random() < 0.9,
                terminating=rng.random() < 0.2,
            )
            for address in sorted(found)
        ]
        ports = (
            {"name": "http", "port": 8080},
            {"name": "dns", "port": 5353, "protocol": "UDP"},
        )
        return slice_document(
            name,
            endpoints,
            name=f"{name}-{number}",
            ports=ports,
            family="IPv6" if v6 else "IPv4",
        )

    @staticmethod
    def _octets(name: str) -> str:
        number = int(name.partition("-")[2])
        return f"{1 + number // 250}.{1 + number % 250}"


def resident(pid: int) -> float:
    """A process's resident memory in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+)", status)
    assert found
    return int(found[1]) / 1024


@pytest.fixture
def server(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[tuple[World, FabricServer, Mirror]]:
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with (
        World(prefix="sliceproxy-soak") as world,
        FabricServer(world, bookmark_seconds=0.01) as started,
    ):
        mirror = Mirror(world, started)
        try:
            yield world, started, mirror
        finally:
            mirror.close()


def disturb(server: ApiServer, event: Callable[[ApiServer], None], part: int) -> None:
    """Connections break, each time differently; later events are cut or missed."""
    match part % 3:
        case 0:
            server.cut_next("services")
            server.cut_next("endpointslices")
        case 1:
            server.abort()
        case 2:
            server.down()
            for _ in range(MISSED):
                event(server)
            server.compact()  # so it must relist
            server.up()


def play(server: ApiServer, event: Callable[[ApiServer], None], events: int, seed: int) -> None:
    """Lets events happen in batches; each batch is sent before the next one happens."""
    rng = random.Random(seed)
    while events > 0:
        (size,) = rng.choices([*BATCHES], [*BATCHES.values()])
        for _ in range(min(size, events)):
            event(server)
        events -= size
        server.wait_for(lambda: server.watching("services", "endpointslices"))


def test_soak(
    server: tuple[World, FabricServer, Mirror], capsys: pytest.CaptureFixture[str]
) -> None:
    world, api, mirror = server
    api.put(node_document(), cidr_document("10.96.0.0/16", "fd00:10:96::/112"))
    crowd = Crowd(1)
    flags = ("--server", api.url, "--log-level", "info")
    with Agent(world, None, *flags) as agent:
        agent.wait("programmed")
        began, in_play = time.monotonic(), 0.0
        memory = []
        for part in range(CHECKS):
            started = time.monotonic()
            disturb(api, crowd.event, part)
            play(api, crowd.event, EVENTS // CHECKS, seed=part)
            in_play += time.monotonic() - started
            mirror.check()
            memory.append(resident(agent.process.pid))
        seconds = time.monotonic() - began
        assert agent.terminate() == 0
    logged = Counter(line["event"] for line in agent.lines)
    sizes = ", ".join(f"{m:.1f}" for m in memory)
    with capsys.disabled():
        print(
            f"\n{EVENTS} events in {seconds:.0f} s, {EVENTS / in_play:.0f}/s while they came;"
            f" {logged['programmed']} transactions; RSS in MB {sizes};"
            f" log {dict(logged)}"
        )
    assert not errors(agent)
    lists = [s for s in api.seen if s.resource == "services" and "sendInitialEvents" in s.query]
    assert len(lists) == 1 + CHECKS // 3
    assert max(memory[CHECKS // 2 :]) - memory[1] < MOST_GROWTH_MB
