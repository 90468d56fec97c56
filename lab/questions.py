"""What the demo announces: who asks where, and what the answer must be.

It follows from the semantics of Services (docs/semantics.md), not from the code under test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lab.hosts import Outcome, Protocol

PODS = {
    **{"pod-1": "web-1", "pod-2": "web-2", "remote-1": "web-3", "remote-2": "web-4"},
    **{"remote-6": "web-5"},
    **{"remote-8": "web-6", "remote-7": "empty-1"},  # added in the course of the demo
    **{"pod-3": "dns-1", "remote-3": "dns-2"},
    **{"pod-4": "shop-1", "remote-4": "shop-2"},
    **{"pod-5": "sessions-1", "remote-5": "sessions-2"},
}
"""The pods of the examples, by the World's names of those who play them."""

ASKERS = {"pod": "pod-6", "node": "node", "client": "client", "stranger": "stranger"}
"""The clients, by the World's names."""

TIMES: dict[Outcome, int] = {"answered": 100, "refused": 20, "silent": 3}
SILENCE = 0.2
"""Seconds without any answer that are called silence; an answer takes less than a millisecond."""


@dataclass(frozen=True)
class Question:
    """A client, an address, and the answer that it must get."""

    asker: str
    address: str
    port: int
    protocol: Protocol = "tcp"
    pods: tuple[str, ...] = ()
    """The pods that must answer: all of them, and no others."""
    sees: Literal["asker", "node"] = "asker"
    """Whose address the pods must see."""
    sticky: bool = False
    """Only one of the pods must answer, always the same one."""
    outcome: Outcome = "answered"
    because: str = ""

    @property
    def where(self) -> str:
        """Address, port and protocol."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}{'' if self.protocol == 'tcp' else '/' + self.protocol}"


WEB_4, WEB_6, NODE_4, NODE_6 = "10.96.0.80", "fd00:10:96::80", "172.31.0.2", "fd00:172:31::2"
SHOP_4, SHOP_6 = "203.0.113.44", "2001:db8::44"
DNS_4, DNS_6, EMPTY_4, EMPTY_6 = "10.96.0.10", "fd00:10:96::10", "10.96.0.90", "fd00:10:96::90"
SESSIONS_4, UNKNOWN = "10.96.0.70", "10.96.0.99"
WEB = ("web-1", "web-2", "web-3", "web-4", "web-5")
DNS = ("dns-1", "dns-2")
SHOP = ("shop-1", "shop-2")
SESSIONS = ("sessions-1", "sessions-2")

SERVICES: Sequence[tuple[str, Sequence[Question]]] = (
    (
        "web: ClusterIP for pods, NodePort 30080 for clients outside. 2 of 5 pods are on node-1.",
        (
            Question("pod", WEB_4, 80, pods=WEB),
            Question("pod", WEB_6, 80, pods=WEB),
            Question("node", WEB_4, 80, pods=WEB, sees="node"),
            Question("client", NODE_4, 30080, pods=WEB, sees="node"),
            Question("client", NODE_6, 30080, pods=WEB, sees="node"),
            Question("pod", WEB_4, 81, outcome="refused", because="web has no port 81"),
        ),
    ),
    (
        "dns: one port under UDP and under TCP.",
        (
            Question("pod", DNS_4, 53, "udp", pods=DNS),
            Question("pod", DNS_6, 53, "udp", pods=DNS),
            Question("pod", DNS_4, 53, "tcp", pods=DNS),
        ),
    ),
    (
        "shop: LoadBalancer with externalTrafficPolicy Local: clients outside get pods of"
        " this node only, and the pods see the client's address. The stranger is not in its"
        " loadBalancerSourceRanges.",
        (
            Question("client", SHOP_4, 80, pods=SHOP[:1]),
            Question("client", SHOP_6, 80, pods=SHOP[:1]),
            Question("pod", SHOP_4, 80, pods=SHOP),
            Question("stranger", SHOP_4, 80, outcome="silent", because="not in its ranges"),
            Question("stranger", SHOP_6, 80, outcome="silent", because="not in its ranges"),
        ),
    ),
    (
        "sessions: sessionAffinity ClientIP: a client gets the same pod again.",
        (
            Question("pod", SESSIONS_4, 80, pods=SESSIONS, sticky=True),
            Question("client", SESSIONS_4, 80, pods=SESSIONS, sees="node", sticky=True),
        ),
    ),
    (
        "empty: no endpoints, so clients are refused at once. 10.96.0.99 belongs to no Service.",
        (
            Question("pod", EMPTY_4, 80, outcome="refused", because="no endpoints"),
            Question("pod", EMPTY_6, 80, outcome="refused", because="no endpoints"),
            Question("pod", UNKNOWN, 80, outcome="silent", because="no such Service"),
        ),
    ),
)
