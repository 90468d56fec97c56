"""Have and want: the change, in the order that one transaction needs.

Two functions lead to a change, and tests hold them against each other:

- `advance` goes from what one frontend was given last to what it wants now. Every ordinary change
  takes this path. It is linear in the endpoints of a Service port, once for all its frontends
  (`Shared`), and in the elements that change.
- `between` compares all elements of a table with all that should be there. Used at startup, for
  repairs and after errors: it assumes nothing about earlier writes.

A transaction deletes first and adds afterwards, because an element with other data under the same
key is deleted and added. Slots make that rare: see `rules.slots`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec

from rules.language import Set
from rules.program import Claim, SetElement, Wanted
from rules.slots import HASH_WIDTHS, LADDER, Slots, assign, fitting, packed_slot
from rules.stale_flows import Serving, is_udp, must_look
from rules.tables import PLAIN, SETS, balancer, width_of
from rules.target import Target
from rules.text import CATCH_ALL, Element, Key, Value


class Additions:
    """Elements to add to a map of endpoints: single ones, and whole new lists under their keys.

    A start adds little else. The elements of a list are first made when they are encoded: 120
    bytes each that are never held.
    """

    def __init__(self, single: Iterable[Element] = ()) -> None:
        self.single = list(single)
        self.lists: list[tuple[Key, Slots]] = []

    def __len__(self) -> int:
        return len(self.single) + sum(len(slots) for _, slots in self.lists)

    def __iter__(self) -> Iterator[Element]:
        yield from self.single
        for key, slots in self.lists:
            for index, target in enumerate(slots):
                yield key + packed_slot(index), target

    def append(self, element: Element) -> None:
        """Adds a single element."""
        self.single.append(element)


ElementList = list[Element] | Additions


class Change:
    """Elements to delete and elements to add, per set.

    `stale_affinity` holds the families in which sticky clients may be remembered for endpoints
    that went, so that the affinity map must be gone through. `stale_udp` holds the claims that may
    have stale flows, each with what served it before: those in conntrack must be gone through.
    `udp_serving` has the UDP claims that other targets serve now, None for a claim that has ended.
    """

    def __init__(self) -> None:
        self.removed: dict[Set, ElementList] = {}
        self.added: dict[Set, ElementList] = {}
        self.stale_affinity: set[int] = set()
        self.stale_udp: dict[Claim, Serving] = {}
        self.udp_serving: dict[Claim, Serving | None] = {}

    def __bool__(self) -> bool:
        return bool(self.removed or self.added)

    def remove(self, owner: Set, key: Key, value: Value = None) -> None:
        """Notes an element to delete; its value is for people."""
        self.removed.setdefault(owner, []).append((key, value))

    def add(self, owner: Set, key: Key, value: Value = None) -> None:
        """Notes an element to add."""
        self.added.setdefault(owner, []).append((key, value))

    def add_slots(self, owner: Set, key: Key, slots: Slots) -> None:
        """Notes all slots of a new list: most of a start's elements."""
        added = self.added.get(owner)
        if not isinstance(added, Additions):
            added = self.added[owner] = Additions(added or ())
        added.lists.append((key, slots))

    @property
    def operations(self) -> int:
        """How many elements it deletes and adds."""
        return sum(map(len, self.removed.values())) + sum(map(len, self.added.values()))


class Installed(msgspec.Struct, frozen=True, gc=False):
    """What one frontend was given: two lists with their slots and widths, and other elements."""

    wanted: Wanted
    slots: Slots
    width: int
    inside: Slots
    inside_width: int

    def slots_for(self, *, inside: bool) -> Slots:
        """The list that serves a client, which is inside this node or is not."""
        return self.inside if inside and self.wanted.inside is not None else self.slots


class Lists(NamedTuple):
    """The slots and widths that a frontend has, as far as known: where new ones start from."""

    slots: Slots = ()
    width: int = 0
    inside: Slots = ()
    inside_width: int = 0


_EMPTY = Lists()


class Move(NamedTuple):
    """A slot whose endpoint changes; None where the slot is not there before or after."""

    slot: int
    before: Target | None
    after: Target | None


class Shared:
    """What frontends with the same lists need only once in one step.

    The frontends of a Service port have one list of endpoints, and as long as they have the same
    slots too, these are one object. So results are found by the identity of their arguments.
    """

    def __init__(self) -> None:
        # the arguments are kept with the result, so that no other object gets their identity
        self._slots: dict[tuple[int, int], tuple[Slots, Sequence[Target], Slots]] = {}
        self._moves: dict[tuple[int, int], tuple[Slots, Slots, tuple[Move, ...]]] = {}

    def assign(self, before: Slots, wanted: Sequence[Target]) -> Slots:
        """`slots.assign`."""
        if not before:  # the wanted endpoints themselves, one object already
            return assign(before, wanted)
        key = id(before), id(wanted)
        known = self._slots.get(key)
        if known is None:
            known = self._slots[key] = before, wanted, assign(before, wanted)
        return known[2]

    def moves(self, old: Slots, new: Slots) -> tuple[Move, ...]:
        """The slots that change between two lists that are not empty, in their order."""
        if old is new:
            return ()
        key = id(old), id(new)
        known = self._moves.get(key)
        if known is None:
            known = self._moves[key] = old, new, tuple(_moves(old, new))
        return known[2]


def _moves(old: Slots, new: Slots) -> Iterator[Move]:
    common = min(len(old), len(new))
    for index in range(common):
        if old[index] != new[index]:
            yield Move(index, old[index], new[index])
    for index in range(common, len(old)):
        yield Move(index, old[index], None)
    for index in range(common, len(new)):
        yield Move(index, None, new[index])


def install(wanted: Wanted, before: Lists = _EMPTY, shared: Shared | None = None) -> Installed:
    """Gives every endpoint a slot and each list its width, keeping what it can of `before`."""
    if wanted.hashed:
        return _install_tables(wanted, before)
    shared = shared or Shared()
    slots = shared.assign(before.slots, wanted.endpoints)
    inside = shared.assign(before.inside, wanted.inside) if wanted.inside is not None else ()
    return Installed(
        wanted,
        slots,
        fitting(len(slots), before.width),
        inside,
        fitting(len(inside), before.inside_width) if wanted.inside is not None else 0,
    )


def _install_tables(wanted: Wanted, before: Lists) -> Installed:
    slots, width = _table(wanted.endpoints, before.slots, before.width)
    if wanted.inside is None:
        return Installed(wanted, slots, width, (), 0)
    inside, inside_width = _table(wanted.inside, before.inside, before.inside_width)
    return Installed(wanted, slots, width, inside, inside_width)


def _table(table: Slots, before: Slots, width: int) -> tuple[Slots, int]:
    """A table in its slots, and its width; an empty one keeps the width."""
    slots = before if before == table else table
    return slots, len(slots) or (width if width in HASH_WIDTHS else HASH_WIDTHS[0])


def lists_of(installed: Installed | None) -> Lists:
    """The slots and widths of what is installed."""
    if installed is None:
        return _EMPTY
    return Lists(installed.slots, installed.width, installed.inside, installed.inside_width)


def elements(claim: Claim, installed: Installed) -> Iterator[SetElement]:
    """Every element that a frontend has in the kernel."""
    yield from _verdicts(claim, installed)
    for slots, inside in ((installed.slots, False), (installed.inside, True)):
        owner = _endpoint_map(claim, inside=inside)
        for index, target in enumerate(slots):
            yield owner, claim.key + packed_slot(index), target
    yield from installed.wanted.elements


def advance(
    claim: Claim,
    before: Installed | None,
    after: Installed | None,
    change: Change,
    shared: Shared | None = None,
) -> None:
    """Adds to `change` what leads one frontend from `before` to `after`."""
    shared = shared or Shared()
    _advance_verdicts(claim, before, after, change)
    old, new = lists_of(before), lists_of(after)
    sticky, lost = before is not None and before.wanted.sticky, False
    for inside, had_slots, has_slots in (
        (False, old.slots, new.slots),
        (True, old.inside, new.inside),
    ):
        owner = _endpoint_map(claim, inside=inside)
        if had_slots and has_slots:
            moves = shared.moves(had_slots, has_slots)
            _move(owner, claim.key, moves, change)
            lost = lost or (sticky and _loses(moves, has_slots))
        else:
            lost = lost or bool(had_slots)
            for index, target in enumerate(had_slots):
                change.remove(owner, claim.key + packed_slot(index), target)
            if has_slots:
                change.add_slots(owner, claim.key, has_slots)
    had = before.wanted.elements if before else frozenset()
    wants = after.wanted.elements if after else frozenset()
    for element in had - wants:
        change.remove(*element)
    for element in wants - had:
        change.add(*element)
    # sticky clients must not be sent where a list no longer leads
    if sticky and (lost or not after or not after.wanted.sticky):
        change.stale_affinity.add(claim.verdicts.family)
    note_served(claim, before, after, change)


def note_served(
    claim: Claim, before: Installed | None, after: Installed | None, change: Change
) -> None:
    """Adds to `change` what serves a UDP claim, and that it may have stale flows, if it may."""
    served = before.wanted.serving if before else frozenset()
    serves = after.wanted.serving if after else frozenset()
    if must_look(served, serves):
        change.stale_udp[claim] = served
    if is_udp(claim) and (served != serves or (before is None) != (after is None)):
        change.udp_serving[claim] = serves if after else None


def _verdicts(claim: Claim, installed: Installed) -> Iterator[SetElement]:
    wanted = installed.wanted
    node_port = not wanted.frontend.address
    yield (
        claim.verdicts,
        claim.key,
        balancer(
            installed.width,
            style=wanted.style,
            node_port=node_port,
            inside=False,
            sticky=wanted.sticky,
            hashed=wanted.hashed,
        ),
    )
    if wanted.inside is not None:
        sets = SETS[claim.verdicts.family]
        yield (
            sets.inside_nodeports if node_port else sets.inside_ips,
            claim.key,
            balancer(
                installed.inside_width,
                style=PLAIN,
                node_port=node_port,
                inside=True,
                sticky=wanted.sticky,
                hashed=wanted.hashed,
            ),
        )


def _balancing(installed: Installed) -> tuple[object, ...]:
    """What the verdicts of a claim depend on."""
    wanted = installed.wanted
    inside = wanted.inside is not None
    widths = installed.width, installed.inside_width
    return *widths, inside, wanted.style, wanted.sticky, wanted.hashed


def _advance_verdicts(
    claim: Claim, before: Installed | None, after: Installed | None, change: Change
) -> None:
    if before and after and _balancing(before) == _balancing(after):
        return
    had = set(_verdicts(claim, before)) if before else set()
    wants = set(_verdicts(claim, after)) if after else set()
    for element in had - wants:
        change.remove(*element)
    for element in wants - had:
        change.add(*element)


def _endpoint_map(claim: Claim, *, inside: bool) -> Set:
    sets = SETS[claim.verdicts.family]
    return sets.endpoint_map(node_port=claim.verdicts is sets.service_nodeports, inside=inside)


def _move(owner: Set, key: Key, moves: tuple[Move, ...], change: Change) -> None:
    for index, old, new in moves:
        slot = key + packed_slot(index)
        if old is not None:
            change.remove(owner, slot, old)
        if new is not None:
            change.add(owner, slot, new)


def _loses(moves: tuple[Move, ...], slots: Slots) -> bool:
    """Whether an endpoint is in no slot any more."""
    left = {m.before for m in moves} - {m.after for m in moves} - {None}
    return bool(left) and not left.issubset(slots)


# --- everything against everything --------------------------------------------------------------

Elements = Mapping[Set, Mapping[Key, Value]]
_ABSENT: Value = "of no element"


def between(
    have: Mapping[Set, dict[Key, Value]], wanted: Iterable[SetElement]
) -> tuple[Change, dict[Set, int]]:
    """The change that leaves the wanted elements, and how many of each set are wanted.

    What is wanted is taken out of `have`, so there is no second copy of all elements: a million
    of them take 200 MB.
    """
    change, counts = Change(), {owner: len(elements) for owner, elements in have.items()}
    none: dict[Key, Value] = {}
    for owner, key, value in wanted:
        there = have.get(owner, none).pop(key, _ABSENT)
        if there == value:
            continue
        if there is _ABSENT:
            counts[owner] = counts.get(owner, 0) + 1
        else:
            change.remove(owner, key, there)
        change.add(owner, key, value)
    for owner, elements in have.items():
        counts[owner] -= len(elements)
        for key, value in elements.items():
            change.remove(owner, key, value)
    return change, {owner: count for owner, count in counts.items() if count}


def collected(owned: Iterable[SetElement]) -> dict[Set, dict[Key, Value]]:
    """Elements by set and key."""
    result: dict[Set, dict[Key, Value]] = {}
    for owner, key, value in owned:
        result.setdefault(owner, {})[key] = value
    return result


def restored(family: int, have: Elements) -> dict[Claim, Lists]:
    """The slots and widths that the elements in the kernel show, for `install` to start from.

    A list with a hole is cut there: the targets behind it get new slots.
    """
    sets = SETS[family]
    result: dict[Claim, Lists] = {}
    for verdicts, inside_verdicts, node_port in (
        (sets.service_ips, sets.inside_ips, False),
        (sets.service_nodeports, sets.inside_nodeports, True),
    ):
        slots, inside = (
            _slots_by_key(have.get(sets.endpoint_map(node_port=node_port, inside=inside), {}))
            for inside in (False, True)
        )
        inside_verdict = have.get(inside_verdicts, {})
        for key, chain in have.get(verdicts, {}).items():
            if key == CATCH_ALL:  # not ours
                continue
            result[Claim(verdicts, key)] = Lists(
                _dense(slots.get(key)),
                _width(chain),
                _dense(inside.get(key)),
                _width(inside_verdict.get(key)),
            )
    return result


def _slots_by_key(have: Mapping[Key, Value]) -> dict[Key, dict[int, Value]]:
    result: dict[Key, dict[int, Value]] = {}
    for key, target in have.items():
        result.setdefault(key[:-4], {})[int.from_bytes(key[-4:], sys.byteorder)] = target
    return result


def _dense(slots: Mapping[int, Value] | None) -> Slots:
    found: list[Target] = []
    while slots and isinstance(target := slots.get(len(found)), bytes):
        found.append(target)
    return tuple(found)


def _width(chain: Value) -> int:
    try:
        width = width_of(chain) if isinstance(chain, str) else 0
    except ValueError:
        return 0
    return width if width in LADDER else 0
