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
