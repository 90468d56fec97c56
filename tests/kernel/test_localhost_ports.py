"""Node ports on 127.0.0.1 and ::1 of a node, through the agent and the kernel's rules."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.kernel.tables import Kernel
from lab.world import World
from tests.kernel.agent import Agent, write
from tests.kernel.test_run import until
from tests.manifest import endpoint, service_document, slice_document

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make namespaces")

NODE_PORT = 30080


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as built:
        for host in ("pod-1", "pod-2", "remote-1"):
            built.serve(host, 8080)
        yield built
        with built.run("node", lambda: Kernel(own=False)) as kernel:
            kernel.remove()


def documents(*addresses: str, **spec: Any) -> list[dict[str, Any]]:
    """A dual-stack Service with a TCP and a UDP node port."""
    ports = [
        {"name": "http", "port": 80, "nodePort": NODE_PORT},
        {"name": "dns", "port": 53, "nodePort": NODE_PORT + 1, "protocol": "UDP"},
    ]
    return [
        service_document(ports=ports, type="NodePort", **spec),
        *(slice_document("web", [endpoint(address)]) for address in addresses),
    ]


def outcome(world: World, address: str, port: int = NODE_PORT, **how: Any) -> str:
    return world.ask("node", address, port, **how).outcome


@pytest.fixture
def running(world: World, tmp_path: Path) -> Iterator[Callable[..., tuple[Agent, Path]]]:
    agents: list[Agent] = []

    def start(*flags: str, **spec: Any) -> tuple[Agent, Path]:
        place = tmp_path / "cluster.json"
        write(place, *documents("10.244.1.11", "fd00:10:244:1::11", **spec))
        agents.append(Agent(world, place, *flags))
        agents[-1].wait("started")
        until(lambda: any(line["event"] in ("programmed", "verified") for line in agents[-1].lines))
        return agents[-1], place

    yield start
    for agent in agents:
        assert agent.terminate() == 0


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("chosen", ["localhost", "primary,localhost"])
def test_a_tcp_node_port_answers_on_loopback(
    world: World, running: Callable[..., tuple[Agent, Path]], address: str, chosen: str
) -> None:
    running(f"--nodeport-addresses={chosen}")
    until(lambda: outcome(world, address) == "answered")
    answer = world.ask("node", address, NODE_PORT)
    assert answer.server == "pod-1"
    assert answer.client not in ("127.0.0.1", "::1")


@pytest.mark.parametrize("policy", ["internalTrafficPolicy", "externalTrafficPolicy"])
def test_endpoints_of_other_nodes_serve_under_policy_local(
    world: World, running: Callable[..., tuple[Agent, Path]], policy: str
) -> None:
    """The node itself gets the cluster list of a node port, whatever the cluster IP's policy."""
    _, place = running("--nodeport-addresses=primary,localhost", **{policy: "Local"})
    until(lambda: outcome(world, "127.0.0.1") == "answered")
    remote = world.hosts["remote-1"].ipv4
    write(place, *documents(remote, **{policy: "Local"}))
    until(lambda: world.ask("node", "127.0.0.1", NODE_PORT).server == "remote-1")


def test_without_the_option_and_for_udp_it_is_refused(
    world: World, running: Callable[..., tuple[Agent, Path]]
) -> None:
    agent, _ = running("--nodeport-addresses=all")
    assert outcome(world, "127.0.0.1") == "refused"
    agent.terminate()
    running("--nodeport-addresses=localhost")
    until(lambda: outcome(world, "127.0.0.1") == "answered")
    assert outcome(world, "127.0.0.1", NODE_PORT + 1, protocol="udp") == "refused"


def test_the_port_closes_with_the_service(
    world: World, running: Callable[..., tuple[Agent, Path]]
) -> None:
    _, place = running("--nodeport-addresses=localhost")
    until(lambda: outcome(world, "127.0.0.1") == "answered")
    write(place)
    until(lambda: outcome(world, "127.0.0.1") == "refused")
