"""What happened to a real packet, from the messages of nf_tables' trace.

The live twin of `rules.explain`: that one computes the path of a packet from the rules, this one
reports the path that a packet took, through all tables of the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from rules.netlink.trace import POLICY, RETURN, TraceMessage
from rules.objects import PROTOCOL_NAMES, Address
from rules.tables import TABLE
from rules.target import Target, target_of, target_text

TRACE_TABLE = "sliceproxy-trace"
SENT, REFUSED, DROPPED, UNTOUCHED = "sent", "refused", "dropped", "not touched"


class RuleKey(NamedTuple):
    """A rule: its table's family and name as nft writes them, and its handle."""

    family: str
    table: str
    handle: int


class TracedStep(msgspec.Struct, frozen=True):
    """A rule that matched, or the policy of a base chain (`rule` is then "policy"), and where the
    packet went from there: continue, goto CHAIN, accept, drop ..."""

    family: str
    table: str
    chain: str
    rule: str
    verdict: str

    @property
    def place(self) -> str:
        """The chain as nft names it."""
        return f"{self.family} {self.table} {self.chain}"


class Passage(msgspec.Struct, frozen=True):
    """Base chains that a packet passed with the same addresses and interfaces. The interfaces are
    "" where the packet has none."""

    source: str
    destination: str
    from_interface: str
    to_interface: str
    steps: tuple[TracedStep, ...]


class TracedPacket(msgspec.Struct, frozen=True):
    """A packet, its path, and its end.

    `outcome` is sent (to another address), refused, dropped, or not touched; `detail` says where
    to, or by which rule of which table.
    """

    protocol: str
    source: str
    destination: str
    outcome: str
    detail: str
    passages: tuple[Passage, ...]


class _Headers(NamedTuple):
    protocol: int
    source: Target
    destination: Target


def traced_packet(
    messages: Sequence[TraceMessage],
    rules: Mapping[RuleKey, str],
    interface: Callable[[int], str],
) -> TracedPacket | None:
    """The packet that these messages are about; None if none of them has its headers.

    `rules` are the texts of the rules, `interface` is the name of an interface by its index.
    """
    passages = tuple(_passages(messages, rules, interface))
    first = next((h for m in messages if (h := _headers(m))), None)
    if first is None or not passages:
        return None
    outcome, detail = _end(passages)
    return TracedPacket(
        PROTOCOL_NAMES.get(first.protocol, str(first.protocol)),
        passages[0].source,
        passages[0].destination,
        outcome,
        detail,
        passages,
    )


def _passages(
    messages: Iterable[TraceMessage],
    rules: Mapping[RuleKey, str],
    interface: Callable[[int], str],
) -> Iterable[Passage]:
    head: tuple[str, str, str, str] | None = None
    steps: list[TracedStep] = []
    for message in messages:
        headers = _headers(message)
        if headers:  # the first message of a base chain
            new = (
                target_text(headers.source),
                target_text(headers.destination),
                interface(message.iif),
                interface(message.oif),
            )
            if head is not None and new != head:
                yield Passage(*head, tuple(steps))
                steps = []
            head = new
        if message.table != TRACE_TABLE and message.type != RETURN:
            steps.append(_step(message, rules))
    if head is not None:
        yield Passage(*head, tuple(steps))


def _step(message: TraceMessage, rules: Mapping[RuleKey, str]) -> TracedStep:
    if message.type == POLICY:
        text = "policy"
    else:
        key = RuleKey(message.family, message.table, message.handle)
        text = rules.get(key, f"rule {message.handle}, deleted since")
    return TracedStep(message.family, message.table, message.chain, text, message.verdict)


def _headers(message: TraceMessage) -> _Headers | None:
    """Protocol, source and destination of the packet; None where the message has no headers."""
    network, transport = message.network_header, message.transport_header
    length = 4 if message.ip_version == 4 else 16
    start, protocol = (12, 9) if message.ip_version == 4 else (8, 6)
    if len(network) < start + 2 * length or len(transport) < 4:
        return None
    source: Address = network[start : start + length]
    destination: Address = network[start + length : start + 2 * length]
    ports = [int.from_bytes(transport[at : at + 2], "big") for at in (0, 2)]
    return _Headers(
        network[protocol], target_of(source, ports[0]), target_of(destination, ports[1])
    )


def _end(passages: Sequence[Passage]) -> tuple[str, str]:
    """Outcome and detail."""
    steps = [step for passage in passages for step in passage.steps]
    ours = [step for step in steps if step.table == TABLE]
    first, last = passages[0], passages[-1]
    if steps and (steps[-1].verdict == "drop" or "reject" in steps[-1].rule):
        end = steps[-1]
        outcome = REFUSED if "reject" in end.rule else DROPPED
        return outcome, f"by {end.place}: {end.rule}"
    if last.destination != first.destination:
        detail = f"to {last.destination}"
        if last.to_interface:
            detail += f" through {last.to_interface}"
        if any("masquerade" in step.rule for step in ours):
            detail += ", masqueraded"
        if not any(step.chain in ("nat-prerouting", "nat-output") for step in ours):
            detail += "; conntrack knows the flow and sends it where its first packet was sent"
        return SENT, detail
    return UNTOUCHED, f"it goes on to {last.destination} as it was sent"
