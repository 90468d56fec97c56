"""From the last release to this tree and back, with connections and UDP flows running.

The last release is the one that CHANGELOG.md names below this version, and its tree is taken from
the repository's history, so it is the real one. A shallow clone does not have it: the test is
skipped and says what to fetch.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from agent import __version__
from agent.kernel.tables import Kernel
from lab.world import World
from tests.kernel.agent import PATIENCE, Connections, write
from tests.kernel.test_kube_proxy import connection
from tests.manifest import endpoint, service_document, slice_document

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make namespaces")

ROOT = Path(__file__).parents[2]
COMMITS = {"0.1.0": "5bf5d2665789619b8d5576176c2a3e09190621c6"}
"""Of releases, for clones that have the history and no tags."""


class Release(NamedTuple):
    """A version, its tree, and what its program `sliceproxy` runs."""

    version: str
    tree: Path
    program: str


def release(version: str, tree: Path) -> Release:
    scripts = tomllib.loads((tree / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["sliceproxy"].partition(":")
    return Release(version, tree, f"from {module} import {function}; {function}()")


THIS = release(__version__, ROOT)

VIP = {4: "10.96.0.10", 6: "fd00:10:96::10"}
STICKY = {4: "10.96.0.20", 6: "fd00:10:96::20"}
STAY = "10.96.0.30"
CROWD = {f"crowd-{number}": number for number in range(110, 118)}


def last_release() -> str:
    """The version of CHANGELOG.md below this one."""
    text = (ROOT / "CHANGELOG.md").read_text()
    this, last, *_ = re.findall(r"^## (\d+\.\d+\.\d+)", text, re.MULTILINE)
    assert this == __version__
    return str(last)


def git(*arguments: str) -> bytes | None:
    """What git prints, or None where it fails."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=False)
    return done.stdout if done.returncode == 0 else None


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """The last release."""
    version = last_release()
    for name in filter(None, (f"v{version}", COMMITS.get(version))):
        tree = git("archive", "--format=tar", name, "agent", "rules", "pyproject.toml")
        if tree is not None:
            break
    else:
        pytest.skip(
            f"no v{version} in this clone: git fetch --tags, and --unshallow if it is shallow"
        )
    place = tmp_path_factory.mktemp("released")
    subprocess.run(["tar", "-x", "-C", str(place)], input=tree, check=True)
    assert f'"{version}"' in (place / "agent/__init__.py").read_text()
    return release(version, place)


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

    def __init__(self, world: World, release: Release, place: Path) -> None:
        command = [sys.executable, "-c", release.program, "run", "--from", str(place)]
        command += ["--node", "node-1"]
        self._process = world.popen(
            "node", command, cwd=release.tree, stderr=subprocess.PIPE, text=True
        )
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


def test_upgrade_and_downgrade_lose_nothing(
    world: World, released: Release, tmp_path: Path
) -> None:
    """No connection fails, open ones go on, a UDP flow keeps its endpoint: from the last release to
    this tree, and back. Sticky clients keep their endpoints on the way up."""
    place = tmp_path / "cluster.json"
    write(place, *documents())
    with ExitStack() as traffic:
        with Running(world, released, place):
            stays = traffic.enter_context(connection(world, "pod-1", STAY, 9000))
            kept = sticky(world)
            assert len(set(kept.values())) > 1
            loops, flows = start_traffic(world, traffic)
            more(loops, flows)
        assert stays(), f"{released.version} has stopped"
        with Running(world, THIS, place) as agent:
            more(loops, flows)
            assert stays()
            assert sticky(world) == kept
            assert not [line for line in agent.lines if line.get("level") == "error"]
        assert stays(), f"{__version__} has stopped"
        with Running(world, released, place) as agent:
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
