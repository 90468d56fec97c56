"""SIGKILL at any moment, again and again, while Services change and clients connect: no connection
fails, and at the end the kernel is right.

SLICEPROXY_KILLS=200 for the full count; a few by default.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.kernel.tables import Kernel
from lab.world import World
from tests.kernel.agent import PATIENCE, Agent, Connections, write
from tests.kernel.test_run import until
from tests.manifest import endpoint, service_document, slice_document

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make namespaces")

KILLS = int(os.environ.get("SLICEPROXY_KILLS", "8"))
VIP, STICKY, PORT = "10.96.0.10", "10.96.0.11", 80


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World(prefix="sliceproxy-kills") as built:
        for host in ("pod-1", "pod-2", "pod-3", "remote-1"):
            built.serve(host, 8080)
        yield built
        with built.run("node", lambda: Kernel(own=False)) as kernel:
            kernel.remove()


def documents(draw: random.Random) -> list[dict[str, Any]]:
    """`web` and `sticky` with pods that all answer, and a number of other Services. The client of
    `sticky` is a pod that may be an endpoint of it, and remembered as a client of itself."""
    pods = [f"10.244.1.{10 + pod}" for pod in draw.sample((1, 2, 3), draw.randint(1, 3))]
    found = [
        service_document(cluster_ips=[VIP]),
        slice_document("web", [endpoint(a) for a in pods]),
        service_document("sticky", cluster_ips=[STICKY], sessionAffinity="ClientIP"),
        slice_document("sticky", [endpoint(a) for a in pods]),
    ]
    for number in range(draw.randint(0, 30)):
        name = f"other-{number}"
        found += [
            service_document(name, cluster_ips=[f"10.96.1.{number + 1}"]),
            slice_document(name, [endpoint("10.244.1.11")]),
        ]
    return found


@pytest.mark.parametrize("flags", [(), ("--no-own",)], ids=["owned", "not owned"])
def test_no_connection_fails_while_the_agent_is_killed_again_and_again(
    world: World, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    draw = random.Random(7)
    place = tmp_path / "cluster.json"
    write(place, *documents(draw))
    kills = KILLS // 2
    with Agent(world, place, *flags) as agent:
        agent.wait("programmed")
        with (
            Connections(world, "pod-3", VIP, PORT) as web,
            Connections(world, "pod-2", STICKY, PORT) as sticky,
        ):
            for _ in range(kills):
                # before, while and after it has programmed the change: a start takes 0.4 s
                write(place, *documents(draw))
                time.sleep(draw.uniform(0.0, 0.8))
                write(place, *documents(draw))
                agent.kill()
                agent.restart()
            connections = web.outcomes.total() + sticky.outcomes.total()
        assert web.outcomes.keys() == sticky.outcomes.keys() == {"answered"}, (
            web.failed,
            sticky.failed,
        )
        until(lambda: difference(world, place, flags) == "")
        assert agent.terminate() == 0
    print(f"{kills} kills, {connections} connections, none failed")
    assert connections > kills


def difference(world: World, place: Path, flags: tuple[str, ...]) -> str:
    """What `sliceproxy diff` would still change."""
    command = [sys.executable, "-m", "agent", "diff", "--from", str(place), "--node", "node-1"]
    done = world.popen(
        "node", [*command, *flags], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    out = done.communicate(timeout=PATIENCE)[0].strip()
    assert done.returncode == bool(out)
    return str(out)
