"""The real agent while its ports are flooded: memory stays bounded, probes are still answered.

Everything happens over the loopback of a node of a World, with a fixed number of requests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.kernel.tables import Kernel
from lab.world import World
from tests.kernel.agent import PATIENCE, Agent, write
from tests.manifest import endpoint, service_document, slice_document

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make namespaces")

HEALTH, METRICS, CHECK = 10256, 10249, 31234
GROWTH_MB = 20  # the old server grew by 40 MB with the first of these floods

ASK = r"""
import json, resource, select, socket, sys, threading, time

def ask(port, path):
    with socket.create_connection(("127.0.0.1", port), timeout=1.0) as sock:
        sock.sendall(b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path)
        data = b""
        while piece := sock.recv(65536):
            data += piece
        return data[9:12].decode()

"""

PROBE = (
    ASK
    + r"""
# as a kubelet: a process of its own, a second for each answer; until its standard input ends
probes = []
while not select.select([sys.stdin], [], [], 0.05)[0]:
    try:
        probes.append(ask(int(sys.argv[1]), b"/livez"))
    except OSError as error:
        probes.append(repr(error))
print(json.dumps(probes))
"""
)

FLOOD = (
    ASK
    + r"""
kind, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

def quick():
    for _ in range(count // 8):
        try:
            ask(port, b"/metrics" if port == 10249 else b"/healthz")
        except OSError:
            pass

def held(first):
    kept = []
    for _ in range(count):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.settimeout(1.0)
        try:
            sock.connect(("127.0.0.1", port))
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
    held(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
"""
)


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, Agent]]:
    place = tmp_path_factory.mktemp("flood") / "cluster.json"
    write(
        place,
        service_document(
            cluster_ips=["10.96.0.10"],
            type="LoadBalancer",
            externalTrafficPolicy="Local",
            healthCheckNodePort=CHECK,
        ),
        slice_document("web", [endpoint("10.244.1.11")]),
    )
    with World(prefix="sliceproxy-flood") as world, Agent(world, place) as made:
        made.wait("programmed")
        yield world, made
        made.kill()
        with world.run("node", lambda: Kernel(own=False)) as kernel:
            kernel.remove()


def resident_mb(agent: Agent) -> float:
    status = Path(f"/proc/{agent.process.pid}/status").read_text()
    return int(next(x for x in status.splitlines() if x.startswith("VmRSS")).split()[1]) / 1024


@pytest.mark.parametrize(
    ("kind", "port", "count"),
    [
        ("quick", HEALTH, 20_000),
        ("quick", CHECK, 4_000),
        ("quick", METRICS, 4_000),
        ("silent", HEALTH, 3_000),
        ("slow", METRICS, 1_000),
    ],
)
def test_a_flood_does_not_grow_the_agent_nor_keep_out_probes(
    agent: tuple[World, Agent], kind: str, port: int, count: int
) -> None:
    """Quick requests, clients that send one byte, and clients that take no answer."""
    world, running = agent
    before = resident_mb(running)
    probe = world.popen(
        "node",
        [sys.executable, "-c", PROBE, str(HEALTH)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    flood = world.popen("node", [sys.executable, "-c", FLOOD, kind, str(port), str(count)])
    assert flood.wait(20 * PATIENCE) == 0
    probes = json.loads(probe.communicate(timeout=PATIENCE)[0])
    assert len(probes) > 10
    assert set(probes) == {"200"}
    assert resident_mb(running) - before < GROWTH_MB
    files = len(os.listdir(f"/proc/{running.process.pid}/fd"))
    assert files < 600
