"""From the last release to this tree and back, with connections and UDP flows running.

The last release is taken from the repository's history, so it is the real one; where a clone has no
history the test is skipped and says so.
"""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from agent import __version__
from agent.kernel.tables import Kernel
from lab.world import World
from tests.kernel.agent import PATIENCE, Connections, write
from tests.kernel.test_kube_proxy import connection
from tests.manifest import endpoint, service_document, slice_document

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make namespaces")

ROOT = Path(__file__).parents[2]
# The one place that names the last release. Its tag is v0.1.0; a clone may have no tags.
RELEASED = (
    "0.1.0",
    "5bf5d2665789619b8d5576176c2a3e09190621c6",
    "from agent.cli import main; main()",
)
"""Version, commit, and the program that its entry point `sliceproxy` is."""
THIS = "from agent.cli.main import main; main()"

VIP = {4: "10.96.0.10", 6: "fd00:10:96::10"}
STICKY = {4: "10.96.0.20", 6: "fd00:10:96::20"}
STAY = "10.96.0.30"
CROWD = {f"crowd-{number}": number for number in range(110, 118)}


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree of the last release."""
    version, commit, _ = RELEASED
    assert version != __version__, "name the release before this one"
    done = subprocess.run(
        ["git", "archive", "--format=tar", commit, "agent", "rules"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"no history here, so no {version}: {done.stderr.decode()[:200]}")
    place = tmp_path_factory.mktemp("released")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        tar.extractall(place, filter="data")
    assert f'"{version}"' in (place / "agent/__init__.py").read_text()
    return place


@pytest.fixture
def world() -> Iterator[World]:
    with World(pods=4, remotes=0, outside=CROWD, prefix="sliceproxy-upgrade") as built:
        for pod in ("pod-1", "pod-2", "pod-4"):
            built.serve(pod, 8080)
            built.serve(pod, 8080, "udp")
        yield built
        with built.run("node", lambda: Kernel(own=False)) as kernel:
            kernel.remove()


def documents() -> list[dict[str, Any]]:
    ports = [{"name": "http", "port": 80}, {"name": "dns", "port": 53, "protocol": "UDP"}]
    targets = [{"name": "http", "port": 8080}, {"name": "dns", "port": 8080, "protocol": "UDP"}]
    numbers = (11, 12, 14)
    both = [
        [endpoint(f"10.244.1.{n}") for n in numbers],
        [endpoint(f"fd00:10:244:1::{n}") for n in numbers],
    ]
    return [
        service_document(cluster_ips=list(VIP.values()), ports=ports),
        *(slice_document("web", endpoints, ports=targets) for endpoints in both),
        service_document("sticky", cluster_ips=list(STICKY.values()), sessionAffinity="ClientIP"),
        *(slice_document("sticky", endpoints) for endpoints in both),
        service_document("stay", cluster_ips=[STAY]),
        slice_document("stay", both[0][:1], ports=[{"name": "http", "port": 9000}]),
    ]


class Running:
    """One version of the agent. Leaving the context ends it as a DaemonSet's update does."""

    def __init__(self, world: World, tree: Path, program: str, place: Path) -> None:
        command = [sys.executable, "-c", program, "run", "--from", str(place), "--node", "node-1"]
        self._process = world.popen("node", command, cwd=tree, stderr=subprocess.PIPE, text=True)
        self.lines: list[dict[str, Any]] = []
        self._ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stderr:
            try:
                self.lines.append(json.loads(line))
            except ValueError:
                self.lines.append({"event": "not JSON", "text": line})
            if self.lines[-1]["event"] in ("programmed", "verified"):
                self._ready.set()

    def __enter__(self) -> Running:
        assert self._ready.wait(PATIENCE), self.lines
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        assert self._process.wait(PATIENCE) == 0, self.lines


class Flow(threading.Thread):
    """One UDP socket that asks all the while: conntrack has one flow for it."""

    def __init__(self, world: World, host: str, address: str) -> None:
        super().__init__(daemon=True)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = world.socket(host, family, socket.SOCK_DGRAM)
        self._socket.settimeout(2)
        self._socket.connect((address, 53))
        self._done = threading.Event()
        self.answers: Counter[str] = Counter()
        self.failed: list[str] = []

    def run(self) -> None:
        while not self._done.wait(0.002):
            try:
                self._socket.send(b"who\n")
                self.answers[self._socket.recv(200).decode().split()[0]] += 1
            except OSError as error:
                self.failed.append(str(error))

    def __enter__(self) -> Flow:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()
        self._socket.close()


def sticky(world: World) -> dict[tuple[str, int], str | None]:
    """Which endpoint each client of the Service with session affinity gets."""
    return {
        (host, family): world.ask(host, address, 80, timeout=5).server
        for host in CROWD
        for family, address in STICKY.items()
    }


def test_upgrade_and_downgrade_lose_nothing(world: World, released: Path, tmp_path: Path) -> None:
    """No connection fails, open ones go on, a UDP flow keeps its endpoint: from the last release to
    this tree, and back. Sticky clients keep their endpoints on the way up."""
    place = tmp_path / "cluster.json"
    write(place, *documents())
    version, _, program = RELEASED
    with ExitStack() as traffic:
        with Running(world, released, program, place):
            stays = traffic.enter_context(connection(world, "pod-1", STAY, 9000))
            kept = sticky(world)
            assert len(set(kept.values())) > 1
            loops, flows = start_traffic(world, traffic)
            more(loops, flows)
        assert stays(), f"{version} has stopped"
        with Running(world, ROOT, THIS, place) as agent:
            more(loops, flows)
            assert stays()
            assert sticky(world) == kept
            assert not [line for line in agent.lines if line.get("level") == "error"]
        assert stays(), f"{__version__} has stopped"
        with Running(world, released, program, place) as agent:
            more(loops, flows)
            assert stays()
            # 0.1.0 makes a table again whose base chains have other rules, and forgets its clients
            assert None not in sticky(world).values()
            assert not [line for line in agent.lines if line.get("level") == "error"]
    for loop in loops:
        assert not loop.failed
    for flow in flows:
        assert not flow.failed
        assert len(flow.answers) == 1, "one flow, one endpoint"


def start_traffic(world: World, traffic: ExitStack) -> tuple[list[Connections], list[Flow]]:
    """New connections and UDP flows, from a pod and from outside, in both families."""
    paths = [(host, address) for host in ("pod-3", "client") for address in VIP.values()]
    loops = [Connections(world, host, address, 80, pause=0.01) for host, address in paths]
    flows = [Flow(world, host, address) for host, address in paths]
    for one in (*loops, *flows):
        traffic.enter_context(one)
    return loops, flows


def more(loops: list[Connections], flows: list[Flow]) -> None:
    """Waits for ten more outcomes of each."""
    counters = [*(loop.outcomes for loop in loops), *(flow.answers for flow in flows)]
    least = [counter.total() + 10 for counter in counters]
    deadline = time.monotonic() + PATIENCE
    while any(c.total() < n for c, n in zip(counters, least, strict=True)):
        assert time.monotonic() < deadline, counters
        time.sleep(0.01)
