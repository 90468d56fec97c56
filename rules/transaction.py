"""A transaction: what changes in the tables themselves, and what changes in their elements.

The tables change at a start, when the agent is another version or has other options, and when the
first Service asks for session affinity or the last one stops. A chain whose rules differ is
emptied and filled again. A set or a base chain cannot be changed: then the whole table is
recreated, in the same transaction, so that packets see the old one or the new one.

The order inside a transaction is fixed by what refers to what: sets and chains come first, rules
are deleted before what they use, verdicts before the chains they name.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from copy import copy
from typing import NamedTuple

from rules import text as nft
from rules.diff import Additions, Change
from rules.language import FAMILY_NAME, Chain, Set, Table
from rules.netlink.batch import Batch
from rules.netlink.counters import Count
from rules.tables import TABLE
from rules.text import Key

_NO_COUNTS: Mapping[Set, Mapping[Key, Count]] = {}


class TableContents(NamedTuple):
    """What a table is known to hold: the description by name, or None for something else.

    `same_hook` has the names of chains that have the wanted hook, whatever their rules are.
    `other_counters` names the sets that are as described, but have counters and should not, or the
    other way round.
    """

    sets: Mapping[str, Set | None]
    chains: Mapping[str, Chain | None]
    same_hook: frozenset[str] = frozenset()
    other_counters: frozenset[str] = frozenset()

    @classmethod
    def of(cls, table: Table) -> TableContents:
        """A table that is just as described."""
        return cls({s.name: s for s in table.sets}, {c.name: c for c in table.chains})


class TableChange(NamedTuple):
    """What changes in one table besides its elements. With `counters`, its new sets have them.

    `replaced` sets are deleted and made again, without elements; all chains that refer to them are
    `rewritten`. So the table and what session affinity remembers stay.
    """

    family: int
    delete: bool = False
    create: bool = False
    counters: bool = False
    new_sets: tuple[Set, ...] = ()
    replaced: tuple[Set, ...] = ()
    new_chains: tuple[Chain, ...] = ()
    rewritten: tuple[Chain, ...] = ()
    old_chains: tuple[str, ...] = ()
    old_sets: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether nothing changes."""
        return self == TableChange(self.family, counters=self.counters)


def table_change(want: Table, have: TableContents | None) -> TableChange:
    """What leads from `have` (None: no table) to `want`."""
    if have is None:
        return _creation(want)
    # an old set that is not as wanted, or a chain with another hook, blocks it
    for wanted in want.sets:
        if wanted.name in have.sets and have.sets[wanted.name] is not wanted:
            return _creation(want)._replace(delete=True)
    for chain in want.chains:
        old = have.chains.get(chain.name, chain)
        differs = chain.name not in have.same_hook if old is None else old.base != chain.base
        if chain.base and differs:
            return _creation(want)._replace(delete=True)
    replaced = {s for s in want.sets if s.name in have.other_counters}
    set_names, chain_names = {s.name for s in want.sets}, {c.name for c in want.chains}
    return TableChange(
        want.family,
        counters=want.counters,
        new_sets=tuple(s for s in want.sets if s.name not in have.sets),
        new_chains=tuple(c for c in want.chains if c.name not in have.chains),
        replaced=tuple(s for s in want.sets if s in replaced),
        rewritten=tuple(
            c
            for c in want.chains
            if c.name in have.chains and (have.chains[c.name] != c or _reads(c, replaced))
        ),
        old_chains=tuple(name for name in have.chains if name not in chain_names),
        old_sets=tuple(name for name in have.sets if name not in set_names),
    )


def _reads(chain: Chain, sets: Container[Set]) -> bool:
    """Whether a rule of the chain refers to one of the sets."""
    return any(
        getattr(statement, "set", None) in sets or getattr(statement, "map", None) in sets
        for rule in chain.rules
        for statement in rule.statements
    )


def _creation(want: Table) -> TableChange:
    return TableChange(
        want.family,
        create=True,
        counters=want.counters,
        new_sets=want.sets,
        new_chains=want.chains,
    )


class Transaction(NamedTuple):
    """Everything that is applied at once, but for what `parts` puts ahead."""

    tables: tuple[TableChange, ...]
    change: Change

    def __bool__(self) -> bool:
        return bool(self.change) or any(not t.empty for t in self.tables)


def parts(transaction: Transaction) -> tuple[Transaction, Transaction]:
    """What nothing refers to yet, chains and sets that are added to a table, and the rest.

    Sent in one batch they would lose connections: a packet that began before the commit reads the
    rules of before it, but the elements of after it. The new verdict would lead it to a chain that
    has no rules before the commit. So chains are there before the verdicts that name them.
    """
    ahead: list[TableChange] = []
    rest: list[TableChange] = []
    for t in transaction.tables:
        if t.create or not t.new_chains:
            rest.append(t)
            continue
        ahead.append(
            TableChange(t.family, counters=t.counters, new_sets=t.new_sets, new_chains=t.new_chains)
        )
        rest.append(t._replace(new_sets=(), new_chains=()))
    if not ahead:
        return Transaction((), Change()), transaction
    new, change = {s for t in ahead for s in t.new_sets}, transaction.change
    first, last = Change(), copy(change)
    first.added = {s: e for s, e in change.added.items() if s in new}
    last.added = {s: e for s, e in change.added.items() if s not in new}
    return Transaction(tuple(ahead), first), Transaction(tuple(rest), last)


def encode(  # noqa: PLR0912
    transaction: Transaction,
    table_flags: int = 0,
    counts: Mapping[Set, Mapping[Key, Count]] = _NO_COUNTS,
) -> Batch:
    """The transaction for the kernel; new tables get `table_flags`. The counters of added elements
    begin at their `counts`."""
    batch = Batch()
    for t in transaction.tables:
        if t.delete:
            batch.delete_table(t.family, TABLE)
        if t.create:
            batch.new_table(t.family, TABLE, table_flags)
        for new in t.new_sets:
            count = len(transaction.change.added.get(new, ()))
            batch.new_set(TABLE, new, count, counters=t.counters)
        for chain in t.new_chains:
            batch.new_chain(t.family, TABLE, chain)
        for name in (*(c.name for c in t.rewritten), *t.old_chains):
            batch.delete_rules(t.family, TABLE, name)
        for replaced in t.replaced:
            count = len(transaction.change.added.get(replaced, ()))
            batch.delete_set(t.family, TABLE, replaced.name)
            batch.new_set(TABLE, replaced, count, counters=t.counters)
    for owner, elements in transaction.change.removed.items():
        batch.delete_elements(TABLE, owner, elements)
    for t in transaction.tables:
        for chain in (*t.new_chains, *t.rewritten):
            batch.new_rules(t.family, TABLE, chain)
    for owner, elements in transaction.change.added.items():
        if isinstance(elements, Additions) and not counts.get(owner):
            batch.add_slots(TABLE, owner, elements.lists)
            batch.add_elements(TABLE, owner, elements.single)
        else:
            batch.add_elements(TABLE, owner, elements, counts.get(owner))
    for t in transaction.tables:
        for name in t.old_chains:
            batch.delete_chain(t.family, TABLE, name)
        for name in t.old_sets:
            batch.delete_set(t.family, TABLE, name)
    return batch


def commands(transaction: Transaction) -> Iterator[str]:  # noqa: PLR0912
    """The transaction for people: nft's commands, in order. Rules of tables and chains that are
    new as a whole are left out; `sliceproxy render` has them."""
    for t in transaction.tables:
        name = f"{FAMILY_NAME[t.family]} {TABLE}"
        if t.delete:
            yield f"delete table {name}"
        if t.create:
            yield f"add table {name}"
            continue
        for old_set in t.replaced:
            yield f"delete {'map' if old_set.is_map else 'set'} {name} {old_set.name}"
        for new in (*t.replaced, *t.new_sets):
            kind = "map" if new.is_map else "set"
            counter = " counter;" if t.counters and new.counted else ""
            yield f"add {kind} {name} {new.name} {{ {nft.set_type(new)};{counter} }}"
        for chain in t.new_chains:
            yield f"add chain {name} {chain.name}"
    for verb, side in (
        ("delete", transaction.change.removed),
        ("add", transaction.change.added),
    ):
        for owner, elements in side.items():
            for element in elements:
                name = f"{FAMILY_NAME[owner.family]} {TABLE} {owner.name}"
                yield f"{verb} element {name} {{ {nft.element(owner, element)} }}"
    for t in transaction.tables:
        name = f"{FAMILY_NAME[t.family]} {TABLE}"
        for chain in t.rewritten:
            yield f"flush chain {name} {chain.name}"
            for rule in chain.rules:
                yield f"add rule {name} {chain.name} {nft.rule(rule)}"
        for old in t.old_chains:
            yield f"delete chain {name} {old}"
        for old in t.old_sets:
            yield f"delete set {name} {old}"
