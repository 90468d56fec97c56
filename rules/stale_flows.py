"""UDP flows that lead nowhere: which they are, and only they.

The first packet of a flow passes the nat chains and is sent to an endpoint; conntrack remembers
the decision and repeats it for every later packet, whatever the maps say by then. TCP finds out
when its endpoint dies. UDP does not: a client that keeps its socket (resolvers do) keeps the flow
alive with every datagram that it sends into the void. So two kinds of entries must be deleted:

- those that lead to an endpoint that no longer *serves*;
- those that were never translated, because the address became a Service's only later (the Service
  is new, or the agent was not there yet). While a Service of ours has no endpoint no such entry is
  born: the packet is rejected or dropped before conntrack keeps it.

All others stay (kubernetes issue 122740), and "serves" is meant literally: an endpoint that is
terminating but serving, is hinted for another zone or has left the local list gets no *new* flows,
but keeps those that it has, as it keeps its TCP connections. kube-proxy 1.32 and later draw the
line there too. Two things are better here: when the *last* endpoint stops serving, its flows go,
so that the client is refused at once (kube-proxy waits for another endpoint); and an endpoint
that is published although it is not ready (`publishNotReadyAddresses`) serves.

When a Service or one of its addresses is removed, its flows to former endpoints are deleted. Flows
that another program's rules made of the same address are left untouched.

A flow is judged by the claim that a new packet to its destination would meet. That takes one or two
look-ups: no Service is walked, and the work is proportional to the flows that are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from rules.lookup import Destination, NodePortAddress, claims_at
from rules.objects import UDP, Address
from rules.program import Claim
from rules.target import Target, address_of, port_of


class Flow(NamedTuple):
    """A UDP flow in conntrack. Address and port are packed as in a Target.

    `destination` is what the client asked for, `target` who answers it; they are the same if
    nothing was translated. `zone` is 0 unless another program separates connections (VRFs, Open
    vSwitch).
    `entry` is opaque to all but `agent.kernel.conntrack`: the kernel's attributes.
    """

    source: Target
    destination: Target
    target: Target
    zone: int = 0
    entry: bytes = b""


class FlowFilter(NamedTuple):
    """What flows to one claim have in common; the address of a node port is empty: any."""

    family: int
    address: Address
    port: int


_REMEMBERED = 65_536
"""Verdicts kept by destination and target; a scan of ports must not fill the memory."""

Serving = frozenset[Target]
"""The targets to which flows of a claim may lead."""

Current = Callable[[Claim], Serving | None]
"""What serves a claim now; None if no Service has the claim."""


def is_udp(claim: Claim) -> bool:
    """Whether it is a claim on a UDP port."""
    return Destination.of(claim.key).protocol == UDP


def flow_filter(claim: Claim) -> FlowFilter:
    """Where flows to this claim are sent to."""
    where = Destination.of(claim.key)
    return FlowFilter(claim.verdicts.family, where.address, where.port)


def must_look(before: Serving, after: Serving) -> bool:
    """Whether a claim that was served by `before` and is now by `after` may have stale flows:
    one has stopped serving, or the first has appeared."""
    return bool(before - after) or (bool(after) and not before)


def is_stale(
    flow: Flow,
    current: Current,
    node_port_address: NodePortAddress,
    formerly: Mapping[Claim, Serving],
) -> bool:
    """Whether the flow must be deleted, so that its next packet meets the rules again.

    `formerly` holds what served the claims that were just removed. Of the flow only destination,
    target and zone matter.
    """
    translated = flow.target != flow.destination
    if flow.zone and not translated:
        return False  # another stage of the same packet's path: it may be translated in zone 0
    where = Destination(address_of(flow.destination), UDP, port_of(flow.destination))
    claims = claims_at(where, node_port_address)
    for claim in claims:
        serving = current(claim)
        if serving is not None:
            return flow.target not in serving and (translated or bool(serving))
    return any(flow.target in formerly.get(claim, ()) for claim in claims)


class Look(NamedTuple):
    """The claims to look at, with what served them before; with `everything` all UDP flows.

    Node ports answer at `node_port_addresses`.
    """

    formerly: Mapping[Claim, Serving]
    node_port_addresses: frozenset[Address]
    everything: bool = False


def merged(looks: list[Look]) -> Look:
    """One look that finds what all of them would find."""
    formerly: dict[Claim, Serving] = {}
    for look in looks:
        for claim, served in look.formerly.items():
            formerly[claim] = formerly.get(claim, frozenset()) | served
    return Look(formerly, looks[-1].node_port_addresses, any(look.everything for look in looks))


class Record:
    """What serves each UDP claim: what the flows of a look are judged by.

    A dump has many flows of one destination and target. Verdicts are kept by these until `expect`
    or the next look.
    """

    def __init__(self) -> None:
        self._serving: dict[Claim, Serving] = {}
        self._look = Look({}, frozenset())
        self._verdicts: dict[tuple[bytes, bytes, int], bool] = {}

    def expect(self, serving: Mapping[Claim, Serving | None], *, everything: bool = False) -> None:
        """These targets serve these claims from now on; None: no Service has the claim. With
        `everything` no other claim exists."""
        self._verdicts.clear()
        if everything:
            self._serving = {}
        for claim, targets in serving.items():
            if targets is None:
                self._serving.pop(claim, None)
            else:
                self._serving[claim] = targets

    def begin(self, look: Look) -> None:
        """The next flows are those of this look."""
        self._verdicts.clear()
        self._look = look

    def is_stale(self, flow: Flow) -> bool:
        """Whether the flow must be deleted, see `is_stale` of this module."""
        kind = flow[1:4]  # what a verdict depends on
        verdict = self._verdicts.get(kind)
        if verdict is None:
            if len(self._verdicts) >= _REMEMBERED:
                self._verdicts.clear()
            is_node_port_address = self._look.node_port_addresses.__contains__
            verdict = is_stale(flow, self._serving.get, is_node_port_address, self._look.formerly)
            self._verdicts[kind] = verdict
        return verdict
