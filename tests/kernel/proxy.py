"""The data plane without threads: objects in, one transaction into the kernel of a namespace."""

from __future__ import annotations

import time

from agent.kernel.counters import KeptCounts
from agent.kernel.tables import Kernel
from agent.loop import reader
from lab.world import World
from rules.diff import Elements
from rules.events import Delete, Event, Upsert
from rules.objects import Object
from rules.options import Options
from rules.state import State
from rules.tables import FAMILIES, SETS
from rules.transaction import Transaction, table_change
from tests.elements import difference


class Proxy:
    """sliceproxy on a host of a World. Use as a context manager."""

    def __init__(
        self, world: World, host: str = "node", *, own: bool = False, options: Options | None = None
    ) -> None:
        self.world = world
        self.state = State(options or Options(node="node-1"))
        self.kernel: Kernel = world.run(host, lambda: Kernel(own=own, kept=KeptCounts()))
        self.seconds = 0.0
        self.followed: Transaction | None = None
        """What was sent after the last transaction, for clients that had been remembered."""

    def __enter__(self) -> Proxy:
        self.resync()
        return self

    def __exit__(self, *_: object) -> None:
        self.kernel.close()

    def put(self, *objects: Object) -> Transaction:
        """Objects that are there, new or changed; returns the transaction that was sent."""
        return self.apply(*(Upsert(o) for o in objects))

    def delete(self, *objects: Object) -> Transaction:
        return self.apply(*(Delete(type(o), o.name) for o in objects))

    def apply(self, *events: Event) -> Transaction:
        self.state.apply(events)
        return self._send(self.state.step())

    def resync(self) -> Transaction:
        self.kernel.take_over()
        return self._send(self.state.resync(reader(self.kernel)))

    def _send(self, transaction: Transaction) -> Transaction:
        started = time.perf_counter()
        if transaction:
            self.kernel.apply(transaction)
        self.seconds = time.perf_counter() - started
        self.followed = None
        self.forget_clients(*transaction.change.stale_affinity)
        return transaction

    def forget_clients(self, *families: int) -> None:
        """Deletes the clients of endpoints that were removed, and what those needed."""
        for family in families:
            if self.affinity_set(family):
                affinity = SETS[family].affinity
                clients = self.kernel.elements(affinity).items()
                stale = [c for c in clients if not self.state.is_current(*c)]
                self.kernel.destroy(affinity, stale)
        if self.state.clients_judged():
            self.followed = self.state.step()
            self.kernel.apply(self.followed)

    def affinity_set(self, family: int) -> bool:
        return any(SETS[family].affinity in t.sets for t in self.state.tables())

    def in_kernel(self) -> Elements:
        """All elements of both tables, read back."""
        result = {}
        for family in FAMILIES:
            found = self.kernel.find(family)
            assert found is not None
            result.update(self.kernel.read(found))
        return result

    def check(self) -> None:
        """The kernel has the tables and the elements that the state says, and nothing else."""
        for table in self.state.tables():
            found = self.kernel.find(table.family)
            assert found is not None
            assert table_change(table, found.known(table)).empty
        found = difference(self.in_kernel(), self.state.elements())
        assert not found, (found.removed, found.added)
