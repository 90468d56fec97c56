"""The real agent while its ports are flooded: memory stays bounded, probes are still answered.

Everything happens over the loopback of a node of a World, with a fixed number of requests.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from agent.kernel.tables import Kernel
from lab.world import World
from tests.kernel.agent import PATIENCE, Agent, write
from tests.manifest import endpoint, service_document, slice_document

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make namespaces")

HEALTH, METRICS, CHECK, API = "10256", "10249", "31234", "10390"
SOCKET = "the API's socket"
GROWTH_MB = 20  # the old server grew by 40 MB with the first of these floods

ASK = r"""
import json, resource, select, socket, sys, threading, time

def connect(where, sock):  # a port of the loopback, or a unix socket
    sock.connect(where if where.startswith("/") else ("127.0.0.1", int(where)))

def opened(where):
    return socket.socket(socket.AF_UNIX if where.startswith("/") else socket.AF_INET)

def ask(where, path, seconds=1.0):
    with opened(where) as sock:
        sock.settimeout(seconds)
        connect(where, sock)
        sock.sendall(b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path.encode())
        data = b""
        while piece := sock.recv(65536):
            data += piece
        return data[9:12].decode()

"""

PROBE = (
    ASK
    + r"""
# as a kubelet: a process of its own, seconds for each answer; until its standard input ends
where, path, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
probes = []
while not select.select([sys.stdin], [], [], 0.05)[0]:
    try:
        probes.append(ask(where, path, seconds))
    except OSError as error:
        probes.append(repr(error))
print(json.dumps(probes))
"""
)

FLOOD = (
    ASK
    + r"""
where, kind, path, count = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

def quick():
    for _ in range(count // 8):
        try:
            ask(where, path)
        except OSError:
            pass

def held(first):
    kept = []
    for _ in range(count):
        sock = opened(where)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.settimeout(1.0)
        try:
            connect(where, sock)
            sock.sendall(first)
        except OSError:
            pass
        kept.append(sock)
    time.sleep(1.0)

if kind == "quick":
    threads = [threading.Thread(target=quick) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
elif kind == "silent":
    held(b"G")
else:
    held(b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path.encode())
"""
)


class Flooded(NamedTuple):
    """The agent, its manifests, and where its API listens."""

    world: World
    agent: Agent
    place: Path
    socket: str

    def start(self, script: str, where: str, *arguments: str) -> subprocess.Popen[str]:
        """A program on the node that asks there, in Python."""
        there = self.socket if where == SOCKET else where
        return self.world.popen(
            "node",
            [sys.executable, "-c", script, there, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )


def documents(changes: int = 0) -> list[dict[str, Any]]:
    """Services whose lines are 200 KB of JSON; with each change one has another endpoint."""
    found = [
        service_document(
            cluster_ips=["10.96.0.10"],
            type="LoadBalancer",
            externalTrafficPolicy="Local",
            healthCheckNodePort=int(CHECK),
        ),
        slice_document("web", [endpoint(f"10.244.1.{11 + changes}")]),
    ]
    for number in range(300):
        name = f"other-{number}"
        found += [
            service_document(name, cluster_ips=[f"10.96.{1 + number // 200}.{number % 200}"]),
            slice_document(name, [endpoint("10.244.1.11")]),
        ]
    return found


_numbers = itertools.cycle((1, 2))


@pytest.fixture(scope="module")
def flooded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flooded]:
    directory = tmp_path_factory.mktemp("flood")
    place, socket = directory / "cluster.json", str(directory / "api.sock")
    write(place, *documents())
    flags = (f"--api-socket={socket}", f"--api-bind-address=127.0.0.1:{API}")
    with World(prefix="sliceproxy-flood") as world, Agent(world, place, *flags) as agent:
        agent.wait("programmed")
        yield Flooded(world, agent, place, socket)
        agent.kill()
        with world.run("node", lambda: Kernel(own=False)) as kernel:
            kernel.remove()


def resident_mb(agent: Agent) -> float:
    status = Path(f"/proc/{agent.process.pid}/status").read_text()
    return int(next(x for x in status.splitlines() if x.startswith("VmRSS")).split()[1]) / 1024


def flood(
    flooded: Flooded, where: str, what: tuple[str, str, int], changes: int = 0
) -> dict[str, list[str]]:
    """Floods with a kind, a path and a number; returns what probes got meanwhile, by where they
    asked. Memory and descriptors stay bounded, and changes are programmed as they are made."""
    before = resident_mb(flooded.agent)
    probes = {
        "kubelet": flooded.start(PROBE, HEALTH, "/livez", "1"),
        SOCKET: flooded.start(PROBE, SOCKET, "/v1/status", "5"),
        API: flooded.start(PROBE, API, "/v1/status", "5"),
    }
    flooding = flooded.start(FLOOD, where, *map(str, what))
    for _ in range(changes):
        seen = len(flooded.agent.lines)
        write(flooded.place, *documents(next(_numbers)))
        flooded.agent.wait("programmed", since=seen)
        assert flooding.poll() is None, "the flood ended before the changes"
    assert flooding.wait(20 * PATIENCE) == 0
    answers = {
        who: json.loads(probe.communicate(timeout=PATIENCE)[0]) for who, probe in probes.items()
    }
    assert resident_mb(flooded.agent) - before < GROWTH_MB
    assert len(os.listdir(f"/proc/{flooded.agent.process.pid}/fd")) < 600
    return answers


@pytest.mark.parametrize(
    ("kind", "port", "path", "count"),
    [
        ("quick", HEALTH, "/healthz", 20_000),
        ("quick", CHECK, "/", 4_000),
        ("quick", METRICS, "/metrics", 4_000),
        ("silent", HEALTH, "", 3_000),
        ("slow", METRICS, "/metrics", 1_000),
    ],
)
def test_a_flood_does_not_grow_the_agent_nor_keep_out_probes(
    flooded: Flooded, kind: str, port: str, path: str, count: int
) -> None:
    """Quick requests, clients that send one byte, and clients that take no answer."""
    answers = flood(flooded, port, (kind, path, count))["kubelet"]
    assert len(answers) > 10
    assert set(answers) == {"200"}


@pytest.mark.parametrize("where", [SOCKET, API])
@pytest.mark.parametrize(
    ("kind", "path", "count"),
    [
        ("quick", "/v1/services", 2_000),
        ("quick", "/", 2_000),
        ("silent", "", 2_000),
        ("slow", "/v1/services", 1_000),
    ],
)
def test_a_flood_of_the_api_keeps_out_nobody_else(
    flooded: Flooded, kind: str, where: str, path: str, count: int
) -> None:
    """Probes and the API's other address are always answered, and an honest client at the address
    that is flooded is answered, too; changes are programmed."""
    answers = flood(flooded, where, (kind, path, count), changes=3)
    other = API if where == SOCKET else SOCKET
    print({who: Counter(found) for who, found in answers.items()})
    assert set(answers["kubelet"]) == {"200"}
    assert set(answers[other]) == {"200"}
    assert "200" in answers[where]
