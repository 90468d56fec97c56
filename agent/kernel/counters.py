"""Counters of Service addresses: kept when elements are replaced, and read for reports.

The kernel counts in the elements of maps and sets (`rules.tables`), so counts stay when the agent
exits. An element whose data changes is deleted and added, for instance a verdict when a Service
outgrows its width; and a table is recreated when its sets differ. The counts are then read before
the transaction and the new elements begin with them. What the kernel counts between that reading
and the commit is lost: the packets of some 0.1 ms, or of the time that loading a whole table takes.

A set that refuses or drops has an element only while a Service has no endpoints. The last count is
kept here until the element is back, and shown meanwhile. It ends with the agent.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from rules.counts import PacketCounts
from rules.language import Set
from rules.netlink.counters import Count
from rules.tables import FAMILIES, SETS
from rules.text import Key
from rules.transaction import Transaction


class ReadsCounts(Protocol):
    """Reads counters of our tables."""

    def counts(self, owner: Set) -> dict[Key, Count]:
        """All of a set, by key."""

    def counts_of(self, owner: Set, keys: Sequence[Key]) -> dict[Key, Count]:
        """Those of some keys, as far as they exist."""


READ_SECONDS = 0.5
"""A reading is answered again for so long: making one takes milliseconds of the interpreter."""


class KeptCounts:
    """Counts of elements that are being replaced, or are absent for now.

    `before` and `after` are called by the loop's thread, `absent` by any.
    """

    def __init__(self) -> None:
        self._kept: dict[Set, dict[Key, Count]] = {}

    def before(self, transaction: Transaction, kernel: ReadsCounts) -> PacketCounts:
        """Reads what the transaction will delete. Returns where added elements begin."""
        change = transaction.change
        for table in transaction.tables:
            if table.delete:
                for owner in SETS[table.family].counted:
                    self._keep(owner, kernel.counts(owner))
        for owner, elements in change.removed.items():
            if owner.counted:
                self._keep(owner, kernel.counts_of(owner, [key for key, _ in elements]))
        begin: dict[Set, Mapping[Key, Count]] = {}
        for owner, elements in change.added.items():
            kept = self._kept.get(owner)
            if kept:
                begin[owner] = {key: kept[key] for key, _ in elements if key in kept}
        return begin

    def after(self, transaction: Transaction) -> None:
        """The kernel has applied it: forgets what its elements count again, and what belonged to
        addresses that have ended."""
        change = transaction.change
        for owner, elements in change.added.items():
            if kept := self._kept.get(owner):
                for key, _ in elements:
                    kept.pop(key, None)
        for owner, elements in change.removed.items():
            sets = SETS[owner.family]
            if owner in (sets.service_ips, sets.service_nodeports):
                ended = sets.counted
            elif owner in (sets.cluster_ips, sets.service_cidrs):
                ended = (owner,)
            else:
                continue
            added = {key for key, _ in change.added.get(owner, ())}
            for key in {key for key, _ in elements} - added:
                for counted in ended:
                    self._kept.get(counted, {}).pop(key, None)

    def absent(self) -> PacketCounts:
        """The counts of elements that the kernel does not have at the moment."""
        return {owner: kept.copy() for owner, kept in self._kept.copy().items()}

    def _keep(self, owner: Set, counts: Mapping[Key, Count]) -> None:
        self._kept.setdefault(owner, {}).update(counts)


class CountersReader:
    """Reads all counters, in the thread that asks, with a socket of its own."""

    def __init__(
        self,
        kept: KeptCounts,
        connect: Callable[[], ReadsCounts],
        seconds: float = READ_SECONDS,
    ) -> None:
        self._kept = kept
        self._connect = connect
        self._seconds = seconds
        self._lock = threading.Lock()
        self._kernel: ReadsCounts | None = None
        self._last: PacketCounts = {}
        self._read_at = float("-inf")

    def read(self) -> PacketCounts:
        """The counts now, or of a moment ago. Raises KernelError."""
        with self._lock:
            if time.monotonic() - self._read_at >= self._seconds:
                self._kernel = self._kernel or self._connect()
                self._last = self._all(self._kernel)
                self._read_at = time.monotonic()
            return self._last

    def read_of(self, keys: Mapping[Set, Sequence[Key]]) -> PacketCounts:
        """The counts of some elements, now. Raises KernelError."""
        with self._lock:
            self._kernel = kernel = self._kernel or self._connect()
            absent = self._kept.absent()
            return {
                owner: {**absent.get(owner, {}), **kernel.counts_of(owner, keys[owner])}
                for owner in _in_order(keys)
            }

    def read_by_endpoint(self) -> PacketCounts:
        """The counts of connections by endpoint, now. Raises KernelError."""
        with self._lock:
            self._kernel = kernel = self._kernel or self._connect()
            owners = [SETS[family].endpoint_counters for family in FAMILIES]
            return {owner: kernel.counts(owner) for owner in owners}

    def _all(self, kernel: ReadsCounts) -> PacketCounts:
        absent = self._kept.absent()
        found: dict[Set, Mapping[Key, Count]] = {}
        for family in FAMILIES:
            sets = SETS[family]
            for owner in _in_order(sets.counted):
                found[owner] = {**absent.get(owner, {}), **kernel.counts(owner)}
        return found


def _in_order(owners: Iterable[Set]) -> list[Set]:
    """First what is taken off the connections later: it must not be ahead of them."""
    return sorted(owners, key=lambda owner: owner.verdicts)
