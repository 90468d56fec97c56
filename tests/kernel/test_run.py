"""The agent as a process: restarts, ownership, repair, two agents, node addresses."""

from __future__ import annotations

import errno
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agent.kernel.tables import Kernel
from lab.world import World
from rules.netlink.attributes import attribute, nest, u32
from rules.netlink.batch import Batch
from rules.netlink.expressions import verdict_data
from rules.netlink.messages import NLM_F_CREATE
from rules.netlink.nftables import (
    NF_DROP,
    NFNLGRP_NFTABLES,
    NFT_MSG_DELSETELEM,
    NFT_MSG_NEWSETELEM,
    NFT_SET_ELEM_CATCHALL,
    NFTA_DATA_VALUE,
    NFTA_LIST_ELEM,
    NFTA_SET_ELEM_DATA,
    NFTA_SET_ELEM_FLAGS,
)
from rules.tables import SETS, TABLE
from rules.target import target_of
from tests.kernel.agent import PATIENCE, Agent, Connections, write
from tests.kernel.namespaces import notifications
from tests.manifest import endpoint, service_document, slice_document

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make namespaces")
needs_nft = pytest.mark.skipif(not shutil.which("nft"), reason="needs the nft program")

VIP, PORT = "10.96.0.10", 80


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as built:
        for host in ("pod-1", "pod-2", "pod-3", "remote-1"):
            built.serve(host, 8080)
        yield built


@pytest.fixture(autouse=True)
def _clean(world: World) -> Iterator[None]:
    yield
    with world.run("node", lambda: Kernel(own=False)) as kernel:
        kernel.remove()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.json"
    write(path, *documents(1, 2))
    return path


def documents(*pods: int, **spec: Any) -> list[dict[str, Any]]:
    """A Service `web` with these pods as endpoints."""
    return [
        service_document(cluster_ips=[VIP], **spec),
        slice_document("web", [endpoint(f"10.244.1.{10 + pod}") for pod in pods]),
    ]


def nft(world: World, *command: str) -> subprocess.CompletedProcess[str]:
    return world.run(
        "node",
        lambda: subprocess.run(["nft", *command], capture_output=True, text=True, check=False),
    )


def answers(world: World) -> bool:
    return world.ask("pod-3", VIP, PORT, timeout=0.1).outcome == "answered"


def until(condition: Callable[[], bool]) -> float:
    """Waits until the condition holds; returns how long that took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < PATIENCE
    return time.monotonic() - started


def skip_unless_owned(agent: Agent) -> None:
    if not agent.wait("started")["owns_tables"]:
        pytest.skip("this kernel has no owned tables (Linux 6.9)")


class Notifications:
    """The kernel's notifications about elements of sets in the node's namespace."""

    def __init__(self, world: World) -> None:
        self._socket = world.run("node", notifications, NFNLGRP_NFTABLES)

    def element_messages(self) -> int:
        count = 0
        while True:
            try:
                data = self._socket.recv(1 << 20)
            except BlockingIOError:
                return count
            position = 0
            while position < len(data):
                length, kind = struct.unpack_from("=IH", data, position)
                count += kind & 0xFF in (NFT_MSG_NEWSETELEM, NFT_MSG_DELSETELEM)
                position += (length + 3) & ~3


@pytest.mark.parametrize("flags", [(), ("--no-own",)], ids=["owned", "not owned"])
def test_killed_and_started_again_it_writes_nothing(
    world: World, place: Path, flags: tuple[str, ...]
) -> None:
    with Agent(world, place, *flags) as agent:
        agent.wait("programmed")
        with Connections(world, "pod-3", VIP, PORT) as connections:
            seen = Notifications(world)
            agent.kill()
            first = agent.restart()
            line = agent.wait("verified", since=first)
            assert seen.element_messages() == 0
        assert (line["added"], line["removed"]) == (0, 0)
        assert agent.wait("read_ahead", since=first)["used"]
        assert set(connections.outcomes) == {"answered"}


def test_what_changed_while_it_was_dead_is_all_that_is_written(world: World, place: Path) -> None:
    with Agent(world, place) as agent:
        agent.wait("programmed")
        with Connections(world, "pod-3", VIP, PORT) as connections:
            agent.kill()
            write(place, *documents(1, 2, 3))
            first = agent.restart()
            line = agent.wait("programmed", since=first)
        # a slot for the third endpoint, its hairpin, and the wider chain instead of the old one
        assert line["elements"] == "endpoints +1, hairpins +1, service-ips +1 -1"
        assert set(connections.outcomes) == {"answered"}


def test_sigterm_leaves_the_tables_and_cleanup_removes_them(world: World, place: Path) -> None:
    with Agent(world, place) as agent:
        agent.wait("programmed")
        assert agent.terminate() == 0
        assert answers(world)
    command = [sys.executable, "-m", "agent", "cleanup"]
    cleanup = world.popen("node", command, stdout=subprocess.PIPE, text=True)
    assert cleanup.communicate(timeout=PATIENCE)[0] == "tables removed\n"
    assert not answers(world)


@needs_nft
def test_an_owned_table_outlives_flushes_and_refuses_changes(world: World, place: Path) -> None:
    with Agent(world, place) as agent:
        skip_unless_owned(agent)
        agent.wait("programmed")
        with Connections(world, "pod-3", VIP, PORT) as connections:
            assert nft(world, "flush", "ruleset").returncode == 0
            for attempt in (
                ("delete", "table", "ip", "sliceproxy"),
                ("flush", "chain", "ip", "sliceproxy", "nat-prerouting"),
                ("flush", "map", "ip", "sliceproxy", "endpoints"),
            ):
                refused = nft(world, *attempt)
                assert refused.returncode != 0
                assert os.strerror(errno.EPERM) in refused.stderr
        assert set(connections.outcomes) == {"answered"}


@needs_nft
@pytest.mark.parametrize(
    "damage",
    [
        "flush ruleset",
        "delete table ip sliceproxy",
        "flush chain ip sliceproxy lb-2",
        "flush map ip sliceproxy endpoints",
        "flush chain ip sliceproxy nat-prerouting",
    ],
)
def test_a_table_without_owner_is_repaired(world: World, place: Path, damage: str) -> None:
    with Agent(world, place, "--no-own") as agent:
        agent.wait("programmed")
        assert answers(world)
        first = len(agent.lines)
        assert nft(world, *damage.split()).returncode == 0
        seconds = until(lambda: answers(world))
        agent.wait("programmed", since=first)
        assert seconds < 1.0  # the promise of the docs, not a measurement


@needs_nft
def test_elements_and_sets_of_others_in_our_table_are_removed(world: World, place: Path) -> None:
    with Agent(world, place, "--no-own") as agent:
        agent.wait("programmed")
        before = listing(world)
        for command in (
            "add element ip sliceproxy cluster-ips { 10.9.9.9 }",
            "add set ip sliceproxy stranger { type ipv4_addr; }",
            "add chain ip sliceproxy stranger",
            "add rule ip sliceproxy inside drop",
        ):
            first = len(agent.lines)
            assert nft(world, command).returncode == 0
            agent.wait("programmed", since=first)
            until(lambda: listing(world) == before)


def listing(world: World) -> list[str]:
    return sorted(nft(world, "list", "ruleset").stdout.splitlines())


@needs_nft
def test_changes_of_other_tables_do_not_disturb(world: World, place: Path) -> None:
    with Agent(world, place, "--no-own") as agent:
        agent.wait("programmed")
        first = len(agent.lines)
        nft(world, "add table ip other")
        nft(world, "add set ip other s { type ipv4_addr; elements = { 10.0.0.1 }; }")
        nft(world, "delete table ip other")
        write(place, *documents(1))
        agent.wait("programmed", since=first)
        assert not any(line["event"] == "verified" for line in agent.lines[first:])


@contextmanager
def owner_and_waiting(world: World, place: Path) -> Iterator[tuple[Agent, Agent]]:
    """An agent that has programmed and owns the tables, and a second one that waits for them."""
    with Agent(world, place) as one:
        skip_unless_owned(one)
        one.wait("programmed")
        with Agent(world, place) as two:
            two.wait("waiting_for_owner")
            yield one, two


def test_a_second_agent_waits_and_takes_over_without_a_gap(world: World, place: Path) -> None:
    with owner_and_waiting(world, place) as (one, two):
        with Connections(world, "pod-3", VIP, PORT) as connections:
            one.kill()
            line = two.wait("verified")
        assert (line["added"], line["removed"]) == (0, 0)
        assert two.wait("read_ahead")["used"]
        assert set(connections.outcomes) == {"answered"}
        first = len(two.lines)
        write(place, *documents(1))
        two.wait("programmed", since=first)


def test_what_the_owner_does_while_a_second_agent_waits_is_seen(world: World, place: Path) -> None:
    with owner_and_waiting(world, place) as (one, two):
        first = len(one.lines)
        write(place, *documents(1, 2, 3))
        one.wait("programmed", since=first)
        assert [line["event"] for line in two.lines if "added" in line] == []
        one.kill()
        line = two.wait("verified")
        assert (line["added"], line["removed"]) == (0, 0)
        assert not two.wait("read_ahead")["used"]


@needs_nft
@pytest.mark.parametrize("flags", [(), ("--no-own",)], ids=["owned", "not owned"])
def test_damage_between_a_start_and_the_first_lists_is_repaired(
    world: World, place: Path, flags: tuple[str, ...]
) -> None:
    """It reads ahead meanwhile, and changes nothing before it knows everything."""
    with Agent(world, place, *flags) as agent:
        agent.wait("programmed")
        agent.kill()
        before = listing(world)
        place.write_text("{ not json")
        first = agent.restart()
        agent.wait("manifests_incomplete", since=first)
        assert listing(world) == before
        assert nft(world, "flush map ip sliceproxy endpoints").returncode == 0
        assert not answers(world)
        write(place, *documents(1, 2))
        line = agent.wait("programmed", since=first)
        assert line["elements"] == "endpoints +2"
        assert not agent.wait("read_ahead", since=first)["used"]
        assert answers(world)


def add_to_every_set(kernel: Kernel) -> int:
    """Adds the element for all other keys to all our sets; returns to how many. nft 1.0.6 aborts
    on some of them."""
    batch, count = Batch(), 0
    flags = u32(NFTA_SET_ELEM_FLAGS, NFT_SET_ELEM_CATCHALL)
    for family, sets in SETS.items():
        names = kernel.set_names(family)
        for owner in (
            o for o in (*sets.always, *sets.sticky, *sets.by_endpoint) if o.name in names
        ):
            data = b""
            if owner.verdicts:
                data = nest(NFTA_SET_ELEM_DATA, verdict_data(NF_DROP))
            elif owner.data:
                value = attribute(NFTA_DATA_VALUE, bytes(owner.data_length))
                data = nest(NFTA_SET_ELEM_DATA, value)
            encoded = [nest(NFTA_LIST_ELEM, flags, data)]
            batch._elements(NFT_MSG_NEWSETELEM, NLM_F_CREATE, TABLE, owner, encoded)
            count += 1
    kernel.send(batch)
    return count


@pytest.mark.parametrize("while_it_runs", [True, False])
def test_elements_for_all_other_keys_that_another_process_added_are_removed(
    world: World, place: Path, while_it_runs: bool
) -> None:
    """In every set and map of both families; noticed as it happens, and after a start."""
    asked = {"sliceproxy.io/endpoint-counters": "true"}
    write(place, *documents(1, 2, sessionAffinity="ClientIP", annotations=asked))
    with Agent(world, place, "--no-own") as agent:
        agent.wait("programmed")
        first = len(agent.lines)
        if not while_it_runs:
            agent.kill()
        with world.run("node", lambda: Kernel(own=False)) as other:
            added = add_to_every_set(other)
        if not while_it_runs:
            assert nft(world, "list", "ruleset").stdout.count("*") == added > 40
        if not while_it_runs:
            first = agent.restart()
        until(lambda: "*" not in nft(world, "list", "ruleset").stdout)
        if while_it_runs:
            agent.wait("tables_repaired", since=first)
        until(lambda: answers(world))
        assert not any(line["event"] == "programming_failed" for line in agent.lines)


def test_switching_ownership_keeps_services_up(world: World, place: Path) -> None:
    """The table must be recreated for that, in one transaction."""
    with Agent(world, place) as agent:
        agent.wait("programmed")
        skip_unless_owned(agent)
    with Connections(world, "pod-3", VIP, PORT) as connections:
        for flags in (("--no-own",), ()):
            with Agent(world, place, *flags) as agent:
                assert agent.wait("programmed")["tables_changed"] == 2
    assert set(connections.outcomes) == {"answered"}


def test_node_ports_follow_the_addresses_of_the_node(world: World, place: Path) -> None:
    ports = [{"name": "http", "port": PORT, "nodePort": 30080}]
    write(place, *documents(1, 2, type="NodePort", ports=ports))
    flags = ("--nodeport-addresses", "192.0.2.0/24,172.31.0.0/24")
    with Agent(world, place, *flags) as agent:
        agent.wait("programmed")
        assert world.ask("client", "172.31.0.2", 30080).outcome == "answered"
        first = len(agent.lines)
        world.add_address("node", "192.0.2.77")
        line = agent.wait("programmed", since=first)
        assert line["elements"] == "nodeport-ips +1"
        assert world.ask("client", "192.0.2.77", 30080).outcome == "answered"
        first = len(agent.lines)
        world.remove_address("node", "192.0.2.77")
        assert agent.wait("programmed", since=first)["elements"] == "nodeport-ips -1"


def test_sticky_clients_of_an_endpoint_removed_meanwhile_are_forgotten(
    world: World, place: Path
) -> None:
    write(place, *documents(1, sessionAffinity="ClientIP"))
    with Agent(world, place) as agent:
        agent.wait("programmed")
        assert world.ask("pod-3", VIP, PORT).server == "pod-1"
        agent.kill()
        write(place, *documents(2, sessionAffinity="ClientIP"))
        first = agent.restart()
        agent.wait("sticky_clients_forgotten", since=first, clients=1)
        assert world.ask("pod-3", VIP, PORT).server == "pod-2"
    with world.run("node", lambda: Kernel(own=False)) as kernel:
        values = set(kernel.elements(SETS[4].affinity).values())
    assert values == {target_of(bytes((10, 244, 1, 12)), 8080)}


def test_a_broken_manifest_changes_nothing_on_the_node(world: World, place: Path) -> None:
    with Agent(world, place) as agent:
        agent.wait("programmed")
        first = len(agent.lines)
        place.write_text("{ not json")
        agent.wait("manifest_invalid", since=first)
        assert answers(world)
        agent.kill()
        first = agent.restart()
        agent.wait("manifests_incomplete", since=first)
        assert answers(world)
        write(place, *documents(1, 2))
        agent.wait("verified", since=first)


def many(name: str, cluster_ip: str, octet: int) -> list[dict[str, Any]]:
    """A Service with 5,000 endpoints: their map is LARGE."""
    addresses = [f"10.{octet}.{n >> 8}.{n & 255}" for n in range(5000)]
    slices = [addresses[start : start + 1000] for start in range(0, 5000, 1000)]
    return [
        service_document(name, cluster_ips=[cluster_ip]),
        *(
            slice_document(
                name, [endpoint(a, node="node-2") for a in some], name=f"{name}-{number}"
            )
            for number, some in enumerate(slices)
        ),
    ]


@needs_nft
def test_a_full_map_is_recreated_with_more_room(world: World, place: Path) -> None:
    """A map with 5,002 elements has room for half as many again, and 5,000 come."""

    def room() -> int:
        described = nft(world, "-t", "list", "map", "ip", "sliceproxy", "endpoints").stdout
        return int(described.split("size ")[1].split()[0])

    one, two = many("one", "10.96.1.1", 200), many("two", "10.96.1.2", 201)
    write(place, *documents(1, 2), *one)
    with Agent(world, place) as agent:
        agent.wait("programmed")
        assert room() == 7503
        with Connections(world, "pod-3", VIP, PORT) as connections:
            first = len(agent.lines)
            write(place, *documents(1, 2), *one, *two)
            line = agent.wait("programmed", since=first)
        assert agent.wait("map_full")["map"].endswith("endpoints")
        assert line["tables_changed"] == 2
        assert room() == 15_003
        assert set(connections.outcomes) == {"answered"}
        agent.kill()
        first = agent.restart()
        line = agent.wait("verified", since=first)
        assert (line["added"], line["removed"]) == (0, 0)
