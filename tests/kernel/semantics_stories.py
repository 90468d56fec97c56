"""Statements of docs/semantics.md that last longer than one question: what begins before a change
of all Services and ends after it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import Counter
from contextlib import ExitStack
from typing import Any, ClassVar

import pytest

from agent.cli.client import Client
from rules.explain import Explanation
from tests.kernel.conftest import Net
from tests.kernel.semantics_rows import (
    ASKERS,
    LEAVING,
    ONLY_CLIENT,
    Documents,
    Place,
    Slice,
    on_port,
    pod,
)
from tests.kernel.test_run import until
from tests.manifest import service_document


class Tally:
    """What must have been counted, by the name that a frontend has in counters."""

    def __init__(self) -> None:
        self.expected: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def add(self, frontend: str, kind: str, packets: int = 1) -> None:
        """`kind` is connections, refused or dropped."""
        with self._lock:
            self.expected[frontend, kind] += packets


def written(address: str, port: int) -> str:
    """Address and port as people write them."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def reached(explanation: Explanation, net: Net) -> set[tuple[str, bool]]:
    """The hosts that the one client of an explanation may reach, and whether they see the node's
    address."""
    (asked,) = explanation.asked
    hosts = {net.address(host): host for host in net.world.hosts}
    return {
        (hosts[one.endpoint.rpartition(":")[0].strip("[]")], one.sees_node != "no")
        for one in asked.endpoints
    }


class Story:
    """Something that begins before the change of all Services and ends after it."""

    says: ClassVar[str]

    def __init__(self, net: Net, place: Place, client: Client, tally: Tally) -> None:
        self.net = net
        self.place = place
        self.client = client
        self.stack = ExitStack()
        """Closes its sockets."""
        self._tally = tally

    def service(self, *pieces: Slice, place: Place | None = None, **fields: Any) -> Documents:
        """A Service of this family alone, at the addresses of a place."""
        place, family = place or self.place, self.net.family
        name = f"story{place.number}-v{family}"
        made = service_document(
            name,
            **{
                "cluster_ips": [place.cluster_ip(family)],
                "ports": [{**port, "nodePort": None} for port in place.ports],
                "type": "LoadBalancer",
                "externalIPs": [place.external_ip(family)],
                "ingress": [{"ip": place.balancer_ip(family)}],
                **fields,
            },
        )
        found = [made]
        for number, piece in enumerate(pieces):
            one = Slice(piece.pods, piece.ports, families=(family,))
            found += one.documents(name, number, lambda host, _: self.net.address(host))
        return found

    def documents(self, *, after: bool) -> Documents:
        """Its Services and slices before the change, or after it."""
        raise NotImplementedError

    def begin(self) -> None:
        """Before the change."""

    def end(self) -> None:
        """After the change."""

    def at(self, kind: str) -> tuple[str, int]:
        address: str = getattr(self.place, kind)(self.net.family)
        return address, 80

    def count(self, where: tuple[str, int], protocol: str, kind: str, packets: int = 1) -> None:
        self._tally.add(f"{written(*where)}/{protocol}", kind, packets)

    def socket(self, host: str, kind: int) -> socket.socket:
        family = socket.AF_INET6 if self.net.family == 6 else socket.AF_INET
        made = self.stack.enter_context(self.net.world.socket(host, family, kind))
        made.settimeout(5)
        return made


class Narrower(Story):
    """A one-way UDP flow from outside the ranges stops; an answered connection continues."""

    says = "The check is repeated for every packet"
    port = 9100

    def documents(self, *, after: bool) -> Documents:
        ranges = ONLY_CLIENT if after else {"loadBalancerSourceRanges": ["0.0.0.0/0", "::/0"]}
        return self.service(Slice(("pod-1",), ports=on_port(self.port)), **ranges)

    def begin(self) -> None:
        where = self.at("balancer_ip")
        self.heard = self.socket("pod-1", socket.SOCK_DGRAM)
        self.heard.bind((self.net.address("pod-1"), self.port))
        self.flow = self.socket("stranger", socket.SOCK_DGRAM)
        self.flow.sendto(b"before", where)
        assert self.heard.recv(64) == b"before"
        self.count(where, "udp", "connections")
        listener = self.socket("pod-1", socket.SOCK_STREAM)
        listener.bind((self.net.address("pod-1"), self.port))
        listener.listen()
        self.near = self.socket("stranger", socket.SOCK_STREAM)
        self.near.connect(where)
        self.far, _ = listener.accept()
        self.stack.enter_context(self.far)
        self.count(where, "tcp", "connections")

    def end(self) -> None:
        for _ in range(3):
            self.flow.sendto(b"after", self.at("balancer_ip"))
        self.count(self.at("balancer_ip"), "udp", "dropped", 3)
        self.heard.settimeout(0.3)
        with pytest.raises(TimeoutError):
            self.heard.recv(64)
        self.near.sendall(b"still here")
        assert self.far.recv(64) == b"still here"


class Tcp(Story):
    """A connection continues while its endpoint leaves, and while its Service is deleted."""

    says = "TCP connections to an endpoint that leaves continue"
    port = 9101

    def documents(self, *, after: bool) -> Documents:
        if after:
            return self.service(Slice(("pod-2",)))
        return self.service(Slice(("pod-1",), ports=on_port(self.port)))

    def begin(self) -> None:
        listener = self.socket("pod-1", socket.SOCK_STREAM)
        listener.bind((self.net.address("pod-1"), self.port))
        listener.listen()
        self.pairs = []
        for client, kind in (("client", "external_ip"), ("pod-3", "cluster_ip")):
            near = self.socket(client, socket.SOCK_STREAM)
            near.connect(self.at(kind))
            far, _ = listener.accept()
            self.pairs.append((near, self.stack.enter_context(far)))
            self.count(self.at(kind), "tcp", "connections")

    def end(self) -> None:
        for near, far in self.pairs:
            near.sendall(b"question")
            far.sendall(far.recv(64))
            assert near.recv(64) == b"question"


class Udp(Story):
    """A flow to an endpoint that no longer serves moves; one to an endpoint that terminates and
    serves stays; one whose last endpoint leaves is refused; one that is older than the address
    begins to be answered."""

    says = "UDP flows that lead to an endpoint that no longer serves"
    flows: ClassVar[dict[str, tuple[Slice | None, Slice, str, str]]] = {
        # the endpoints before (None: no Service) and after, who answers before and after
        "moves": (Slice(("pod-1",)), Slice(("pod-2",)), "pod-1", "pod-2"),
        "stays": (Slice(("pod-1",)), Slice((pod("pod-1", **LEAVING), "pod-2")), "pod-1", "pod-1"),
        "ends": (Slice(("pod-1",)), Slice(()), "pod-1", "refused"),
        "begins": (None, Slice(("pod-1",)), "silent", "pod-1"),
    }

    def __init__(self, net: Net, place: Place, client: Client, tally: Tally) -> None:
        super().__init__(net, place, client, tally)
        self.places = {name: Place(place.number + 10 * n) for n, name in enumerate(self.flows)}
        self.clients: dict[str, socket.socket] = {}

    def documents(self, *, after: bool) -> Documents:
        found = []
        for name, (before, later, *_) in self.flows.items():
            if piece := later if after else before:
                found += self.service(piece, place=self.places[name])
        return found

    def begin(self) -> None:
        for name, (*_, first, _second) in self.flows.items():
            self.clients[name] = self.socket("client", socket.SOCK_DGRAM)
            assert self._ask(name) == first, name
            if first != "silent":
                self.count(self._where(name), "udp", "connections")

    def end(self) -> None:
        for name, (*_, second) in self.flows.items():
            # the flow is deleted just after the Service is programmed, by a thread of its own
            until(lambda name=name, second=second: self._ask(name) == second)
            if second == "refused":
                self.count(self._where(name), "udp", "refused")
            elif name != "stays":
                self.count(self._where(name), "udp", "connections")

    def _where(self, name: str) -> tuple[str, int]:
        return self.places[name].external_ip(self.net.family), 80

    def _ask(self, name: str) -> str:
        flow = self.clients[name]
        flow.settimeout(0.3)
        with contextlib.suppress(ConnectionRefusedError):
            flow.connect(self._where(name))
        try:
            flow.send(b"who")
            return flow.recv(64).decode().split()[0]
        except TimeoutError:
            return "silent"
        except ConnectionRefusedError:
            return "refused"


class Sticky(Story):
    """A client keeps its endpoint, at each address and protocol by itself, and moves when that is
    removed; `explain` then knows the one endpoint."""

    says = "`sessionAffinity: ClientIP` with `timeoutSeconds`"
    askers = ("client", "stranger", "pod-3", "node")

    def documents(self, *, after: bool) -> Documents:
        pods = ("pod-1", "pod-2", "remote-1")
        if after:
            pods = tuple(p for p in pods if p != self.first["client"])
        return self.service(Slice(pods), sessionAffinity="ClientIP")

    def begin(self) -> None:
        self.first = {asker: self._server(asker) for asker in self.askers}
        for asker in self.askers:
            for _ in range(4):
                assert self._server(asker) == self.first[asker]
            assert self._explained(asker, "tcp") == {self.first[asker]}
            assert len(self._explained(asker, "udp")) == 3

    def end(self) -> None:
        removed = self.first["client"]
        until(lambda: len(self._explained("client", "tcp")) > 1)
        for asker in self.askers:
            server = self._server(asker)
            assert server != removed
            if self.first[asker] != removed:
                assert server == self.first[asker]
            assert self._server(asker) == server

    def _server(self, asker: str) -> str:
        self.count(self.at("cluster_ip"), "tcp", "connections")
        return self.net.server(asker, self.at("cluster_ip"))

    def _explained(self, asker: str, protocol: str) -> set[str]:
        query = {
            "target": f"{written(*self.at('cluster_ip'))}/{protocol}",
            "from": self.net.address(asker),
        }
        explanation = self.client.get("/v1/explain", Explanation, query)
        return {host for host, _ in reached(explanation, self.net)}


class Forgotten(Story):
    """A client that returns after the timeout is placed at random again."""

    says = "`sessionAffinity: ClientIP` with `timeoutSeconds`"
    askers = (*Sticky.askers, "pod-1", "pod-2")

    def documents(self, *, after: bool) -> Documents:
        return self.service(
            Slice(("pod-1", "pod-2", "remote-1")),
            sessionAffinity="ClientIP",
            sessionAffinityConfig={"clientIP": {"timeoutSeconds": 1}},
        )

    def begin(self) -> None:
        self.first = [self._server(asker) for asker in self.askers]
        self.asked = time.monotonic()

    def end(self) -> None:
        time.sleep(max(0.0, self.asked + 1.5 - time.monotonic()))
        assert [self._server(asker) for asker in self.askers] != self.first

    def _server(self, asker: str) -> str:
        self.count(self.at("cluster_ip"), "tcp", "connections")
        return self.net.server(asker, self.at("cluster_ip"))


class Weighted(Story):
    """An endpoint of weight 3 is in three times as many slots as one of weight 1, and gets three
    connections of four."""

    says = "| `weighted` |"
    tries = 300

    def documents(self, *, after: bool) -> Documents:
        found = self.service(Slice((pod("pod-1", pod="a"), pod("pod-2", pod="b"))))
        found[0]["metadata"]["annotations"] = {
            "sliceproxy.io/algorithm": "weighted",
            "sliceproxy.io/weights": "a=3,b=1",
        }
        return found

    def begin(self) -> None:
        where = self.at("cluster_ip")
        (asked,) = self.client.get(
            "/v1/explain",
            Explanation,
            {"target": f"{written(*where)}/tcp", "from": self.net.address("client")},
        ).asked
        slots = {one.endpoint.rpartition(":")[0].strip("[]"): one.slots for one in asked.endpoints}
        assert slots[self.net.address("pod-1")] == 3 * slots[self.net.address("pod-2")]
        servers = Counter(self.net.server("client", where) for _ in range(self.tries))
        self.count(where, "tcp", "connections", self.tries)
        # five standard deviations around three quarters
        assert 0.625 < servers["pod-1"] / self.tries < 0.875


class Refusal(Story):
    """A program that just connects is refused at its first SYN, over IPv6 too."""

    says = "*Refuse* is a TCP RST"

    def documents(self, *, after: bool) -> Documents:
        return self.service()

    def begin(self) -> None:
        for client in ASKERS:
            asking = self.socket(client, socket.SOCK_STREAM)
            asking.settimeout(0.9)
            with pytest.raises(ConnectionRefusedError):
                asking.connect(self.at("cluster_ip"))
            self.count(self.at("cluster_ip"), "tcp", "refused")


STORIES: tuple[type[Story], ...] = (Narrower, Tcp, Udp, Sticky, Forgotten, Weighted, Refusal)
