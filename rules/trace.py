"""Follows a packet through the rules without a kernel.

This is the third reader of `rules.language`, beside `nft` (for people) and `netlink` (for the
kernel). It knows netfilter and the words rules are made of, and nothing about Services: what it
says about a packet is what the rules and the elements say. Tests send the same packets through a
kernel and demand the same end.

The packet is the first one of a connection. Its way, with the hooks' base chains by priority:

    from elsewhere   prerouting (nat) -> route +-> input (filter, nat)            to the node
                                               +-> forward (filter) -> postrouting (nat)
    from the node    output (nat, filter) -> postrouting (nat) +-> out
                                                               +-> input (filter)  to the node

Things of netfilter that matter here:

- A DNAT ends the packet's way through the nat chains of a hook; a map without the key ends the
  rule only, and the packet goes on with the next one.
- A connection is translated once per direction. What the node sends to itself comes in again over
  the loopback interface, but passes no nat chain a second time.
- A connection counts as translated (`ct status dnat`) only if its destination became another one.
- `goto` leaves no way back: behind the chain the packet goes on where the last `jump` was made.

A random draw has many ends. The packet's way parts there: everything before is in `Trace.steps`,
and each end is a `Branch` with the steps behind it. That a draw may miss and the next rule draws
again is one step of the chain, with all slots that can be hit. A slot that a hash of the client's
address names is one end, unless the packet represents clients of other addresses as well.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

from rules import text as nft
from rules.diff import Elements
from rules.jhash import jhash, scaled
from rules.language import (
    Base,
    Chain,
    Concat,
    Field,
    Final,
    FromInterface,
    GoBy,
    Goto,
    Hook,
    In,
    Is,
    IsProtocol,
    Jump,
    Mark,
    Marked,
    NotFromInterface,
    Predicate,
    Remember,
    Rule,
    Set,
    Source,
    Statement,
    Table,
    Translate,
    Unmark,
)
from rules.objects import Address
from rules.target import Target, address_of, port_of, target_text
from rules.text import Key


class UnknownChain(LookupError):
    """An element names a chain that the table does not have: they are not of one program."""


@dataclass(frozen=True, slots=True)
class Packet:
    """The first packet of a connection, addresses packed in network order.

    `from_node` packets are made on the node itself and come in at no interface. `own` holds all
    addresses of the node: they decide what is delivered to it, and what `fib saddr type local` is.
    `any_client`: the source represents others, so a hash of it may be any.
    """

    source: Address
    destination: Address
    protocol: int
    port: int
    interface: str = ""
    from_node: bool = False
    own: frozenset[Address] = frozenset()
    any_client: bool = False


class Effect(Enum):
    """What a step does with the packet."""

    GOES = "goes to chain"
    DRAWS = "draws one of"
    MISSES = "finds nothing and goes on"
    SENDS = "is sent to"
    MARKS = "is marked for masquerading"
    UNMARKS = "loses the mark"
    MASQUERADES = "is masqueraded"
    REMEMBERS = "is remembered for"
    COUNTS = "is counted for its endpoint"
    DROPS = "is dropped"
    REFUSES = "is refused"


class Match(NamedTuple):
    """A set or map that was looked into, and the element that matched in nft's language; ""
    where a rule asks that none does. An interface's match has the name "iifname"."""

    set: str
    element: str


@dataclass(frozen=True, slots=True)
class Step:
    """A rule that did something, in nft's language, and with its comment if it has one.

    `detail` is the effect's object: a chain, a target, a number of slots, seconds. Jumps that every
    packet makes and returns are no steps.
    """

    chain: str
    rule: str
    matched: tuple[Match, ...]
    effect: Effect
    detail: str = ""
    comment: str = ""


class End(Enum):
    """What becomes of a packet."""

    SENT = "sent"
    DROPPED = "dropped"
    REFUSED = "refused"
    PASSED = "passed on untouched"


class Masquerade(Enum):
    """Whether the packet leaves with an address of the node, and why."""

    NO = "no"
    MARK = "mark"
    HAIRPIN = "hairpin"


@dataclass(frozen=True, slots=True)
class Branch:
    """One end that the packet may come to, and the steps that only this end has.

    `target` is empty where nothing translated the packet; `slot` is None unless it was drawn or
    hashed. `slots` counts the slots that lead to this end: a weighted endpoint has several.
    `remembered` is in seconds, 0 if the client is not.
    """

    end: End
    target: Target
    slot: int | None
    masquerade: Masquerade
    remembered: int
    steps: tuple[Step, ...]
    slots: int = 0


@dataclass(frozen=True, slots=True)
class Trace:
    """The steps before the first branch, and all branches (at least one), by slot."""

    steps: tuple[Step, ...]
    branches: tuple[Branch, ...]

    @property
    def ends(self) -> frozenset[End]:
        """All ends that the packet may come to; one, if the elements are complete."""
        return frozenset(branch.end for branch in self.branches)

    @property
    def targets(self) -> frozenset[Target]:
        """Where the packet may be sent."""
        return frozenset(branch.target for branch in self.branches if branch.end is End.SENT)


def trace(table: Table, elements: Elements, packet: Packet) -> Trace:
    """What becomes of the packet.

    The table, the elements and the packet are of one family. Raises UnknownChain.
    """
    program = _Program.of(table, elements)
    first = _Passage(program, _Flight(packet, packet.destination, packet.port))
    first.through(Hook.OUTPUT if packet.from_node else Hook.PREROUTING, "nat")
    branches = tuple(_onward(program, flight) for flight in first.flights())
    return Trace(tuple(first.steps), branches)


class _Program(NamedTuple):
    """What a packet meets: the rules, the elements, and the chains by name."""

    table: Table
    elements: Elements
    chains: dict[str, Chain]
    bases: tuple[tuple[Base, Chain], ...]
    """The chains that netfilter calls, by priority."""

    @classmethod
    def of(cls, table: Table, elements: Elements) -> _Program:
        bases = [(chain.base, chain) for chain in table.chains if chain.base]
        return cls(
            table,
            elements,
            {chain.name: chain for chain in table.chains},
            tuple(sorted(bases, key=lambda item: item[0].priority)),
        )


def _onward(program: _Program, flight: _Flight) -> Branch:
    """The rest of the way, behind the first translation."""
    passage = _Passage(program, flight)
    for hook, kind in _hooks_behind(flight):
        if passage.flight.end is None:
            passage.through(hook, kind)
    done = passage.flight
    return Branch(
        done.end or (End.SENT if done.target else End.PASSED),
        done.target,
        done.slot,
        done.masquerade,
        done.remembered,
        tuple(passage.steps),
        done.slots,
    )


def _hooks_behind(flight: _Flight) -> Iterator[tuple[Hook, str]]:
    delivered = flight.destination in flight.packet.own
    if flight.packet.from_node:
        yield Hook.OUTPUT, "filter"
        yield Hook.POSTROUTING, "nat"
        if delivered:
            yield Hook.INPUT, "filter"
    elif delivered:
        yield Hook.INPUT, "filter"
        yield Hook.INPUT, "nat"
    else:
        yield Hook.FORWARD, "filter"
        yield Hook.POSTROUTING, "nat"


@dataclass(frozen=True, slots=True)
class _Flight:
    """A packet under way: what rules can change of it, and what became of it so far."""

    packet: Packet
    destination: Address
    port: int
    mark: int = 0
    target: Target = b""
    slot: int | None = None
    slots: int = 0
    masquerade: Masquerade = Masquerade.NO
    remembered: int = 0
    end: End | None = None

    def sent(self, target: Target, slot: int | None = None, slots: int = 0) -> _Flight:
        return replace(
            self,
            destination=address_of(target),
            port=port_of(target),
            target=target,
            slot=slot,
            slots=slots,
        )

    @property
    def _translated(self) -> bool:
        return (self.destination, self.port) != (self.packet.destination, self.packet.port)

    def holds(self, status: Predicate) -> bool:
        match status:
            case Predicate.NEW:
                return True
            case Predicate.KNOWN:
                return False
            case Predicate.TRANSLATED:
                return self._translated
            case Predicate.UNTRANSLATED:
                return not self._translated
            case Predicate.FROM_HERE:
                return self.packet.source in self.packet.own

    def read(self, field: Field) -> bytes:
        """The field's value, without padding."""
        match field.source:
            case Source.SADDR:
                return self.packet.source
            case Source.DADDR:
                return self.destination
            case Source.DPORT:
                return self.port.to_bytes(2, "big")
            case Source.PROTOCOL:
                return bytes((self.packet.protocol,))
            case Source.ORIGINAL_DADDR:
                return self.packet.destination
            case Source.ORIGINAL_DPORT:
                return self.packet.port.to_bytes(2, "big")
            case Source.DIRECTION:
                return b"\0"
            case Source.CLIENT_HASH:
                number = scaled(jhash(self.packet.source, field.seed), field.modulus)
                return (number + field.offset).to_bytes(4, sys.byteorder)
            case Source.RANDOM:
                raise ValueError("a slot that is drawn is not followed as one value")

    def key(self, fields: Concat) -> Key:
        """The key that elements have for the fields. A lone field is not padded."""
        return self.read(fields[0]) if len(fields) == 1 else self.concatenated(fields)

    def concatenated(self, fields: Concat) -> bytes:
        """The fields one after the other, each padded to whole registers."""
        return b"".join(self.read(f).ljust(f.padded, b"\0") for f in fields)


class _Verdict(Enum):
    """How a statement ends its rule, where it neither goes on nor names a chain."""

    NEXT_RULE = 0
    RETURN = 1
    STOP = 2


_Outcome = _Verdict | Jump | Goto | None  # None: the next statement


class _Passage:
    """A flight through base chains. Draws let copies of it depart; the flight itself goes on
    if all draws may miss."""

    def __init__(self, program: _Program, flight: _Flight) -> None:
        self._program = program
        self._elements = program.elements
        self.flight = flight
        self.steps: list[Step] = []
        self._departed: dict[Target, tuple[_Flight, set[int]]] = {}  # by which slots
        self._gone = False
        self._drawn_from: Set | None = None  # by the last step, if that is a draw
        self._chain_name = ""
        self._at_rule = Rule(())
        self._matched: list[Match] = []

    def flights(self) -> list[_Flight]:
        """The copies that departed, by slot, and the flight itself if it went on."""
        departed = sorted(
            (
                flight.sent(target, min(slots), len(slots))
                for target, (flight, slots) in self._departed.items()
            ),
            key=lambda flight: flight.slot or 0,
        )
        return departed if self._gone else [*departed, self.flight]

    def through(self, hook: Hook, kind: str) -> None:
        """Goes through the base chains of a hook. Drops end the way, a translation the hook."""
        for base, chain in self._program.bases:
            if (base.hook, base.type) == (hook, kind) and self._walk(chain):
                return

    def _walk(self, chain: Chain) -> bool:
        """Whether the packet's way through the hook ended in this chain."""
        for rule in chain.rules:
            match self._rule(chain, rule):
                case Jump(name):
                    if self._walk(self._chain(name)):
                        return True
                case Goto(name):
                    return self._walk(self._chain(name))
                case _Verdict.STOP:
                    return True
                case _Verdict.RETURN:
                    return False
        return False

    def _chain(self, name: str) -> Chain:
        try:
            return self._program.chains[name]
        except KeyError:
            raise UnknownChain(f"no chain {name} in table {self._program.table.name}") from None

    def _rule(self, chain: Chain, rule: Rule) -> _Outcome:
        self._chain_name, self._at_rule = chain.name, rule
        self._matched = []
        for statement in rule.statements:
            outcome = self._statement(statement)
            if outcome is not None:
                return outcome
        return None

    def _note(self, effect: Effect, detail: str = "") -> None:
        self._drawn_from = None
        rule = self._at_rule
        matched = tuple(self._matched)
        self.steps.append(
            Step(self._chain_name, nft.rule(rule), matched, effect, detail, rule.comment)
        )

    def _statement(self, statement: Statement) -> _Outcome:  # noqa: PLR0912
        match statement:
            case Is(status):
                return _go_on(self.flight.holds(status))
            case IsProtocol(number):
                return _go_on(self.flight.packet.protocol == number)
            case In(fields, named, negated):
                return self._in(fields, named, negated)
            case FromInterface(name, prefix):
                return self._interface(name, prefix, wanted=True)
            case NotFromInterface(name, prefix):
                return self._interface(name, prefix, wanted=False)
            case Marked(bits):
                return _go_on(bool(self.flight.mark & bits))
            case Mark(bits):
                self.flight = replace(self.flight, mark=self.flight.mark | bits)
                self._note(Effect.MARKS)
            case Unmark(bits):
                if self.flight.mark & bits:
                    self.flight = replace(self.flight, mark=self.flight.mark & ~bits)
                    self._note(Effect.UNMARKS)
            case GoBy(fields, named):
                return self._go_by(fields, named)
            case Translate(fields, named):
                return self._translate(fields, named)
            case Remember(map=named) if named.counted:
                self._note(Effect.COUNTS)
            case Remember(seconds=seconds):
                self.flight = replace(self.flight, remembered=seconds)
                self._note(Effect.REMEMBERS, f"{seconds} s")
            case Jump(name) | Goto(name):
                if self._matched:
                    self._note(Effect.GOES, name)
                return statement
            case Final():
                return self._final(statement)
        return None

    def _in(self, fields: Concat, named: Set, negated: bool) -> _Outcome:
        found = self._find(named, self.flight.key(fields))
        if (found is None) != negated:
            return _Verdict.NEXT_RULE
        self._matched.append(Match(named.name, found or ""))
        return None

    def _find(self, named: Set, key: Key) -> str | None:
        """The element of a set that holds the key, as text."""
        elements = self._elements.get(named, {})
        if not named.interval:
            return nft.element(named, (key, elements[key])) if key in elements else None
        for low, high in elements.items():
            if isinstance(high, bytes) and _within(named.key, key, low, high):
                return nft.element(named, (low, high))
        return None

    def _interface(self, name: str, prefix: bool, *, wanted: bool) -> _Outcome:
        came_in = self.flight.packet.interface
        matches = came_in.startswith(name) if prefix else came_in == name
        if matches != wanted:
            return _Verdict.NEXT_RULE
        self._matched.append(Match("iifname", came_in))
        return None

    def _go_by(self, fields: Concat, named: Set) -> _Outcome:
        key = self.flight.key(fields)
        chain = self._elements.get(named, {}).get(key)
        if not isinstance(chain, str):
            return _Verdict.NEXT_RULE
        self._matched.append(Match(named.name, nft.element(named, (key, chain))))
        self._note(Effect.GOES, chain)
        return Goto(chain)

    def _translate(self, fields: Concat, named: Set) -> _Outcome:
        last = fields[-1]
        hashed = last.source is Source.CLIENT_HASH
        if last.source is Source.RANDOM or (hashed and self.flight.packet.any_client):
            return self._draw(fields[:-1], last, named)
        key = self.flight.key(fields)
        target = self._elements.get(named, {}).get(key)
        if not isinstance(target, bytes):
            self._matched.append(Match(named.name, ""))
            self._note(Effect.MISSES)
            return _Verdict.NEXT_RULE
        self._matched.append(Match(named.name, nft.element(named, (key, target))))
        self._note(Effect.SENDS, target_text(target))
        slot = int.from_bytes(key[-4:], sys.byteorder) if hashed else None
        self.flight = self.flight.sent(target, slot, int(hashed))
        return _Verdict.STOP

    def _draw(self, fields: Concat, drawn: Field, named: Set) -> _Outcome:
        """Lets a copy depart for each slot that can be hit, and goes on if one is empty."""
        prefix, elements = self.flight.concatenated(fields), self._elements.get(named, {})
        hits: dict[Key, Target] = {}
        for slot in range(drawn.offset, drawn.offset + drawn.modulus):
            key = prefix + slot.to_bytes(4, sys.byteorder)
            target = elements.get(key)
            if isinstance(target, bytes):
                hits[key] = target
                self._departed.setdefault(target, (self.flight, set()))[1].add(slot)
        self._note_draw(named, hits)
        if len(hits) < drawn.modulus:
            return _Verdict.NEXT_RULE
        self._gone = True
        return _Verdict.STOP

    def _note_draw(self, named: Set, hits: Mapping[Key, Target]) -> None:
        """One step for all draws from a map: the first draws from all that the others can hit."""
        if self._drawn_from is named:
            return
        self._matched.extend(Match(named.name, nft.element(named, hit)) for hit in hits.items())
        if hits:
            self._note(Effect.DRAWS, str(len(hits)))
        else:
            self._note(Effect.MISSES)
        self._drawn_from = named

    def _final(self, statement: Final) -> _Outcome:
        match statement:
            case Final.RETURN:
                return _Verdict.RETURN
            case Final.ACCEPT:
                pass  # it ends the base chain, and a table has one for each hook and type
            case Final.MASQUERADE:
                # the other rule that masquerades asks for the mark alone, in the rules before it
                why = Masquerade.HAIRPIN if self._matched else Masquerade.MARK
                self._note(Effect.MASQUERADES)
                self.flight = replace(self.flight, masquerade=why)
            case Final.DROP:
                self._note(Effect.DROPS)
                self.flight = replace(self.flight, end=End.DROPPED)
            case Final.RESET | Final.REJECT:
                self._note(Effect.REFUSES)
                self.flight = replace(self.flight, end=End.REFUSED)
        return _Verdict.STOP


def _go_on(holds: bool) -> _Outcome:
    return None if holds else _Verdict.NEXT_RULE


def _within(fields: Concat, key: Key, low: Key, high: Key) -> bool:
    """Whether each field of the key is between those of the bounds, both included."""
    position = 0
    for field in fields:
        end = position + field.length
        if not low[position:end] <= key[position:end] <= high[position:end]:
            return False
        position += field.padded
    return True
