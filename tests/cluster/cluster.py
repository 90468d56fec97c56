"""A cluster for the real agent: an API server on the fabric of a World, and a mirror that says
what the kernel should have for what that server stores."""

from __future__ import annotations

import random
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from agent.kernel import addresses
from agent.kernel.tables import Kernel
from lab.world import World
from rules.decode import decode
from rules.diff import Change, Elements, Lists, install, restored
from rules.events import Event, Upsert
from rules.options import Options
from rules.state import State
from rules.tables import FAMILIES, SETS
from rules.transaction import table_change
from tests.cluster.apiserver import KINDS, ApiServer, Document, Key
from tests.elements import difference
from tests.kernel.agent import PATIENCE, Agent, Connections
from tests.manifest import endpoint, service_document, slice_document

VIP, PORT = "10.96.0.10", 80
SERVERS = ("pod-1", "pod-2", "pod-3", "remote-1")
FAST = "tests.cluster.agent_main"
AWAY, BACK = "api_server_unreachable", "api_server_recovered"
UNUSABLE, SILENT = "object_unusable", "connection_silent"

ENDPOINT_MAPS = {
    sets.endpoint_map(node_port=node_port, inside=inside)
    for sets in SETS.values()
    for node_port in (False, True)
    for inside in (False, True)
}


# --- the API server, and what the kernel should have of it --------------------------------------


class FabricServer(ApiServer):
    """An API server on the fabric of a World, where the node reaches it over the wire."""

    def __init__(self, world: World, **options: Any) -> None:
        self._world = world
        super().__init__(sock=self._listening(), **options)

    def _listening(self) -> socket.socket:
        sock = self._world.socket("fabric", socket.AF_INET, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("0.0.0.0", 6443))
        return sock

    @property
    def url(self) -> str:
        return f"http://{self._world.hosts['fabric'].ipv4}:6443"

    def up(self) -> None:
        self._sock = self._listening()  # stopping has closed the one before
        super().up()


class Mirror:
    """Holds the kernel of a World's node against what an API server has."""

    def __init__(self, world: World, server: ApiServer) -> None:
        self.server = server
        self.instead: dict[tuple[str, Key], Document] = {}
        """What counts for objects that do not decode."""
        self._kernel = world.run("node", lambda: Kernel(own=False))
        self._own = world.run("node", self._addresses)

    @staticmethod
    def _addresses() -> Event:
        with addresses.route_socket() as route:
            return addresses.read(route)

    def close(self) -> None:
        self._kernel.remove()
        self._kernel.close()

    def state(self) -> State:
        """Computed only from what the API server and the node have now."""
        state = State(Options(node="node-1"))
        state.apply([self._own])
        for kind in KINDS:
            for key, document in self.server.objects(kind).items():
                counts = self.instead.get((kind, key), document)
                state.apply([Upsert(decode(kind, msgspec.json.encode(counts)))])
        state.step()
        return state

    def difference(self) -> str:
        """How the kernel differs, up to the order of slots; empty if it does not."""
        state = self.state()
        have: dict[Any, Any] = {}
        for table in state.tables():
            found = self._kernel.find(table.family)
            if found is None:
                return f"no table of family {table.family}"
            if not table_change(table, found.known(table)).empty:
                return f"other rules in the table of family {table.family}"
            have |= self._kernel.read(found)
        change = _without_order(have, _at_widths_of(have, state))
        return f"wrong: {change.removed}; lacking: {change.added}" if change else ""

    def check(self) -> None:
        """The kernel's tables are up to date, after a moment."""
        deadline = time.monotonic() + PATIENCE
        while found := self.difference():
            assert time.monotonic() < deadline, found
            time.sleep(0.05)


def _at_widths_of(have: Elements, state: State) -> Elements:
    """What a state wants, with the widths that the kernel has where they are right.

    Which of two right widths a list has depends on what it was before.
    """
    there = {c: lists for family in FAMILIES for c, lists in restored(family, have).items()}
    for claim, installed in state.installed.items():
        found = there.get(claim, Lists())
        widths = Lists(width=found.width, inside_width=found.inside_width)
        state.installed[claim] = install(installed.wanted, widths)
    return state.elements()


def _without_order(have: Elements, want: Elements) -> Change:
    """What is between two collections of elements if only sets of endpoints count, not slots."""
    return difference(_sets_of_endpoints(have), _sets_of_endpoints(want))


def _sets_of_endpoints(elements: Elements) -> dict[Any, dict[Any, Any]]:
    """Each list of slots becomes one element: the slots that are used, and the endpoints."""
    result: dict[Any, dict[Any, Any]] = {o: dict(items) for o, items in elements.items()}
    for owner in ENDPOINT_MAPS & set(elements):
        lists: dict[Any, tuple[list[int], list[Any]]] = {}
        for key, target in elements[owner].items():
            slots, targets = lists.setdefault(key[:-4], ([], []))
            slots.append(int.from_bytes(key[-4:], sys.byteorder))
            targets.append(target)
        result[owner] = {k: (sorted(s), sorted(t)) for k, (s, t) in lists.items()}
    return result


# --- the cluster --------------------------------------------------------------------------------


def node_document(**labels: str) -> Document:
    spec = {"podCIDRs": ["10.244.1.0/24"]}
    return {"kind": "Node", "metadata": {"name": "node-1", "labels": labels}, "spec": spec}


def cidr_document(*cidrs: str) -> Document:
    return {"kind": "ServiceCIDR", "metadata": {"name": "kubernetes"}, "spec": {"cidrs": [*cidrs]}}


def errors(agent: Agent, but: str = "") -> list[dict[str, Any]]:
    """Lines of an agent's log that tell of errors, or are no log lines, but for one event."""
    fine = ("debug", "info", "warning")
    return [x for x in agent.lines if x.get("level") not in fine and x["event"] != but]


class Cluster:
    """An API server with a few Services, of which `web` always has endpoints that answer."""

    def __init__(self, world: World, server: ApiServer, mirror: Mirror) -> None:
        self.world = world
        self.server = server
        self.check = mirror.check
        self.mirror = mirror
        self.agent: Agent | None = None
        self._turns = 0
        self.web("pod-1", "pod-2")
        for number in range(7):
            self.other(number)
        server.put(node_document(), cidr_document("10.96.0.0/16"))

    @property
    def lines(self) -> list[dict[str, Any]]:
        assert self.agent
        return self.agent.lines

    def wait(self, event: str, since: int, **fields: object) -> dict[str, Any]:
        """Waits for a line of the agent's log, from an index on."""
        assert self.agent
        return self.agent.wait(event, since, **fields)

    def web(self, *hosts: str) -> None:
        """The Service `web` has these endpoints now, and nothing else has changed."""
        found = [endpoint(self.world.hosts[host].ipv4) for host in hosts]
        if not self.server.objects("Service"):
            self.server.put(service_document(cluster_ips=[VIP]))
        self.server.put(slice_document("web", found))

    def other(self, number: int, **spec: Any) -> None:
        """Makes a Service without clients, with a slice."""
        name = f"other-{number}"
        self.server.put(
            service_document(name, cluster_ips=[f"10.96.1.{number + 1}"], **spec),
            slice_document(name, [endpoint(f"10.244.1.{100 + number}")]),
        )

    def remove(self, name: str) -> None:
        """Deletes one of those, with its slice."""
        self.server.delete("EndpointSlice", f"{name}-ipv4")
        self.server.delete("Service", name)

    @property
    def others(self) -> list[str]:
        return [name for _, name in self.server.objects("Service") if name != "web"]

    def churn(self) -> None:
        """A Service is added, one removed, one changed, and so are the endpoints of `web`."""
        self._turns += 1
        self.web(*random.Random(self._turns).sample(SERVERS, 1 + self._turns % len(SERVERS)))
        self.other(6 + self._turns)
        self.remove(self.others[0])
        self.other(self._turns + 1, externalIPs=[f"203.0.113.{self._turns}"])

    def answers(self, address: str = VIP) -> str:
        return self.world.ask("pod-3", address, PORT, timeout=0.2).outcome

    @contextmanager
    def followed(self, module: str = FAST) -> Iterator[Agent]:
        """The agent follows, and `web` is asked until the end: every connection is answered."""
        with Agent(self.world, None, "--server", self.server.url, module=module) as agent:
            self.agent = agent
            agent.wait("programmed")
            with Connections(self.world, "pod-3", VIP, PORT, pause=0.005) as connections:
                yield agent
            assert set(connections.outcomes) == {"answered"}, connections.outcomes
            assert not errors(agent, but=UNUSABLE)
