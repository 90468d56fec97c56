"""A kernel for tests without root: nf_tables as `agent.kernel.tables.Kernel` shows it, in memory.

A `FakeNetfilter` is what a network namespace has: tables with sets, chains, rules and elements, and
the connections that own them. A `FakeKernel` is one connection to it, with Kernel's methods. It
applies a transaction as a whole or not at all, and refuses it for the kernel's reasons; tests can
make it refuse for others (`refuse`), be owned by another connection, or be changed by another
process. `contract.py` holds it against the real kernel.

What it does not know: expressions of rules (chains are compared by their descriptions), timeouts,
and that nothing else may use a set or a chain that is deleted, but for verdicts.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from agent.kernel.errors import Full, KernelError, OwnedByOther, Stale
from agent.kernel.reading import OWNED, KernelTable
from agent.kernel.tables import Kernel
from rules.diff import Elements
from rules.language import Chain, Set, Table
from rules.netlink.nftables import NFT_TABLE_F_PERSIST
from rules.tables import FAMILIES, SETS, TABLE
from rules.text import Element, Key, Value
from rules.transaction import TableChange, TableContents, Transaction, encode


@dataclass
class _FakeSet:
    described: Set
    size: int = 0
    elements: dict[Key, Value] = field(default_factory=dict)


@dataclass
class _FakeTable:
    flags: int
    owner: int | None
    sets: dict[str, _FakeSet] = field(default_factory=dict)
    chains: dict[str, Chain] = field(default_factory=dict)

    def copy(self) -> _FakeTable:
        sets = {n: _FakeSet(s.described, s.size, dict(s.elements)) for n, s in self.sets.items()}
        return _FakeTable(self.flags, self.owner, sets, dict(self.chains))


class _Found(KernelTable):
    """What `find` returns: only `known` says what is in it."""

    content: _FakeTable

    def known(self, want: Table) -> TableContents:
        sets = {s.name: s for s in want.sets}
        chains = {c.name: c for c in want.chains}
        return TableContents(
            {
                name: sets[name] if sets.get(name) is have.described else None
                for name, have in self.content.sets.items()
            },
            {
                name: chains[name] if chains.get(name) == have else None
                for name, have in self.content.chains.items()
            },
        )


class FakeNetfilter:
    """The tables of one network namespace, by family. `ownership` is whether the kernel has it."""

    def __init__(self, *, ownership: bool = True) -> None:
        self.ownership = ownership
        self.tables: dict[int, _FakeTable] = {}
        self.transactions: list[Transaction] = []
        """All that were applied."""
        self._ports = 0

    def connect(self, *, own: bool = True) -> FakeKernel:
        """A new connection."""
        self._ports += 1
        return FakeKernel(self, self._ports, OWNED if own and self.ownership else 0)

    def elements(self) -> dict[Set, dict[Key, Value]]:
        """All elements, but for those of empty sets."""
        return {
            s.described: dict(s.elements)
            for table in self.tables.values()
            for s in table.sets.values()
            if s.elements
        }

    # what another process does

    def flush(self, family: int) -> None:
        """Deletes a table, unless it is owned: `nft flush ruleset`."""
        if not self.tables[family].owner:
            del self.tables[family]

    def change(self, owner: Set, key: Key, value: Value = None, *, delete: bool = False) -> None:
        """Adds or deletes an element; PermissionError in an owned table."""
        table = self.tables[owner.family]
        if table.owner:
            raise PermissionError(errno.EPERM, TABLE)
        elements = table.sets[owner.name].elements
        if delete:
            del elements[key]
        else:
            elements[key] = value


class FakeKernel(Kernel):
    """One connection; see the module."""

    def __init__(self, netfilter: FakeNetfilter, port: int, table_flags: int) -> None:
        self.netfilter = netfilter
        self.table_flags = table_flags
        self._port = port
        self.families = FAMILIES
        self._refusals: list[KernelError] = []
        self._unreadable: list[KernelError] = []

    def refuse(self, *errors: KernelError, reading: bool = False) -> None:
        """The next transactions (or, with `reading`, reads of a table) are refused with these."""
        (self._unreadable if reading else self._refusals).extend(errors)

    def close(self) -> None:
        """Its tables become orphans."""
        for table in self.netfilter.tables.values():
            if table.owner == self._port:
                table.owner, table.flags = 0, NFT_TABLE_F_PERSIST

    @property
    def port(self) -> int:
        return self._port

    # writing

    def apply(self, transaction: Transaction) -> int:
        if self._refusals:
            raise self._refusals.pop(0)
        tables = {family: table.copy() for family, table in self.netfilter.tables.items()}
        for t in transaction.tables:
            self._begin_table(tables, t, transaction)
        for owner, elements in transaction.change.removed.items():
            have = self._set(tables, owner)
            for key, _ in elements:
                if key not in have.elements:
                    raise Stale(errno.ENOENT, f"elements of {owner.name}")
                del have.elements[key]
        for owner, elements in transaction.change.added.items():
            have = self._set(tables, owner)
            for key, value in elements:
                self._add(have, key, value)
        for t in transaction.tables:
            self._end_table(tables, t)
        self.netfilter.tables = tables
        self.netfilter.transactions.append(transaction)
        return len(encode(transaction, self.table_flags).encode(1))

    def _begin_table(
        self, tables: dict[int, _FakeTable], t: TableChange, transaction: Transaction
    ) -> None:
        if t.delete:
            self._table(tables, t.family)
            del tables[t.family]
        if t.create:
            have = tables.get(t.family)
            if have is None:
                owner = self._port if self.table_flags else None
                tables[t.family] = _FakeTable(self.table_flags, owner)
            else:
                self._table(tables, t.family)
        if t.empty:
            return
        table = self._table(tables, t.family)
        for new in t.new_sets:
            size = new.room(len(transaction.change.added.get(new, ())))
            table.sets.setdefault(new.name, _FakeSet(new, size))
        for chain in (*t.new_chains, *t.rewritten):
            table.chains[chain.name] = chain

    def _end_table(self, tables: dict[int, _FakeTable], t: TableChange) -> None:
        if t.empty:
            return
        table = self._table(tables, t.family)
        for name in t.old_chains:
            if any(name == v for s in table.sets.values() for v in s.elements.values()):
                raise Stale(errno.EBUSY, f"chain {name}")
            if table.chains.pop(name, None) is None:
                raise Stale(errno.ENOENT, f"chain {name}")
        for name in t.old_sets:
            if table.sets.pop(name, None) is None:
                raise Stale(errno.ENOENT, f"set {name}")

    def _add(self, have: _FakeSet, key: Key, value: Value) -> None:
        subject = f"elements of {have.described.name}"
        if key in have.elements:
            if have.elements[key] != value:
                raise Stale(errno.EEXIST, subject)
            return
        if have.size and len(have.elements) >= have.size:
            raise Full(errno.ENFILE, subject)
        have.elements[key] = value

    def _table(self, tables: Mapping[int, _FakeTable], family: int) -> _FakeTable:
        table = tables.get(family)
        if table is None:
            raise Stale(errno.ENOENT, f"table {TABLE}")
        if table.owner not in (None, 0, self._port):
            raise OwnedByOther(errno.EPERM, f"table {TABLE}")
        return table

    def _set(self, tables: Mapping[int, _FakeTable], owner: Set) -> _FakeSet:
        have = self._table(tables, owner.family).sets.get(owner.name)
        if have is None:
            raise Stale(errno.ENOENT, f"elements of {owner.name}")
        return have

    # reading

    def generation(self) -> int:
        return len(self.netfilter.transactions)

    def find(self, family: int) -> KernelTable | None:
        if self._unreadable:
            raise self._unreadable.pop(0)
        table = self.netfilter.tables.get(family)
        if table is None:
            return None
        nothing = dict.fromkeys(table.sets, b"")
        found = _Found(
            family, table.flags, table.owner, nothing, dict.fromkeys(table.chains, b""), {}
        )
        found.content = table.copy()
        return found

    def info(self, family: int) -> tuple[int, int | None] | None:
        table = self.netfilter.tables.get(family)
        return (table.flags, table.owner) if table else None

    def read(self, found: KernelTable) -> Elements:
        assert isinstance(found, _Found)
        sets = SETS[found.family]
        return {
            s: dict(found.content.sets[s.name].elements)
            for s in (*sets.always, *sets.sticky, *sets.by_endpoint)
            if s.name in found.sets and not s.dynamic
        }

    def elements(self, owner: Set) -> dict[Key, Value]:
        table = self.netfilter.tables.get(owner.family)  # any connection may read
        if table is None or owner.name not in table.sets:
            raise Stale(errno.ENOENT, f"elements of {owner.name}")
        return dict(table.sets[owner.name].elements)

    def complete(self, owner: Set) -> dict[Key, Value]:
        return self.elements(owner)

    # owning

    def take_over(self) -> None:
        for family in FAMILIES:
            table = self.netfilter.tables.get(family)
            if table is None or table.owner in (None, self._port):
                continue
            if table.owner:
                raise OwnedByOther(errno.EPERM, f"table {TABLE}")
            table.owner, table.flags = self._port, OWNED

    def remove(self) -> bool:
        self.take_over()
        had = bool(self.netfilter.tables)
        self.netfilter.tables.clear()
        return had

    # session affinity

    def destroy(self, owner: Set, elements: Sequence[Element]) -> None:
        have = self._set(self.netfilter.tables, owner).elements
        for key, _ in elements:
            have.pop(key, None)
