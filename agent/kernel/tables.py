"""Writes nf_tables: applies transactions, owns the tables, deletes them.

Ownership. From Linux 6.9 on a table may belong to a netlink socket and outlive it (flags `owner`
and `persist`): no other process can change or flush it, `nft flush ruleset` leaves it untouched,
and when the owner exits the table stays: an orphan that anyone may change, until the next owner
takes it over by asking for the same flags. On older kernels tables are made without flags, and a
`Watcher` reports when another process changed them.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Container, Sequence
from functools import cached_property

from agent.kernel.counters import KeptCounts
from agent.kernel.errors import (
    NotPermitted,
    OwnedByOther,
    Refused,
    Stale,
    nf_tables_error,
    raised_as,
)
from agent.kernel.reading import OWNED, KernelTable, TableReader
from agent.kernel.socket import NetlinkSocket
from rules.diff import Change
from rules.language import Set
from rules.netlink.batch import Batch
from rules.tables import FAMILIES, TABLE
from rules.text import Element
from rules.transaction import Transaction, encode, parts

_UNKNOWN_MESSAGE = {errno.EINVAL, errno.EOPNOTSUPP}
_NO_FAMILY = {errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT, errno.ENOENT}


class Kernel(TableReader):
    """A connection to nf_tables in this network namespace that also writes.

    With `own`, tables are made to belong to this connection where the kernel can do that. With
    `kept`, counters continue at their values when their elements are replaced. Raises
    NotPermitted without CAP_NET_ADMIN. When it is closed, owned tables stay, orphaned.
    """

    def __init__(
        self,
        *,
        own: bool = True,
        connect: Callable[[], NetlinkSocket] = NetlinkSocket,
        kept: KeptCounts | None = None,
    ):
        super().__init__(connect)
        self.kept = kept
        self._destroys = True  # until the kernel says that it does not know the message
        self.table_flags = self._supported_flags() if own else 0

    def _supported_flags(self) -> int:
        """`owner,persist` if a table with them can be made."""
        try:
            self._try_table(4, OWNED)
        except OwnedByOther as error:  # a new table has no owner: the namespace is not ours
            raise NotPermitted(error.errno, "nf_tables") from None
        except (Refused, Stale):
            return 0
        return OWNED

    def _try_table(self, family: int, flags: int) -> None:
        """Makes a table, and deletes it in the same transaction: it is never visible."""
        batch = Batch()
        batch.new_table(family, f"{TABLE}-trial", flags)
        batch.delete_table(family, f"{TABLE}-trial")
        self.send(batch)

    # writing

    def apply(self, transaction: Transaction) -> int:
        """Applies everything or nothing, but for new chains that nothing refers to (`parts`).
        Returns the bytes sent.

        Raises OwnedByOther, Stale, or Refused.
        """
        if self.families != FAMILIES:
            transaction = transaction_of(transaction, self.families)
        ahead, rest = parts(transaction)
        size = self.send(encode(ahead, self.table_flags)) if ahead else 0
        return size + self._apply(rest)

    def _apply(self, transaction: Transaction) -> int:
        if self.kept is None:
            return self.send(encode(transaction, self.table_flags))
        counts = self.kept.before(transaction, self)
        size = self.send(encode(transaction, self.table_flags, counts))
        self.kept.after(transaction)
        return size

    @cached_property
    def families(self) -> tuple[int, ...]:
        """The address families that this kernel has: (4, 6), or (4,) with ipv6.disable=1 or
        without the modules for it. What a transaction has for another family is left out."""
        return FAMILIES if _has_ipv6_sockets() and self._has_ipv6_tables() else (4,)

    def _has_ipv6_tables(self) -> bool:
        try:
            self._try_table(6, 0)
        except (Refused, Stale) as error:
            return error.errno not in _NO_FAMILY
        return True

    def send(self, batch: Batch, generation: int | None = None) -> int:
        """Sends a batch; returns how many bytes. With a `generation` it is Stale if the ruleset
        has another one by now."""
        first = self._socket.number(batch.sequences)
        data = batch.encode(first, generation)
        with raised_as(Stale, "sending a transaction"):  # unknown whether the kernel applied it
            failures = self._socket.transact(data, first, batch.sequences)
        if failures:
            position, code, detail = failures[0]
            raise nf_tables_error(code, batch.subject(position), detail)
        return len(data)

    # owning

    def take_over(self) -> None:
        """Takes over tables that an agent left when it exited. They must have no other owner.

        Raises OwnedByOther.
        """
        for family in self.families:
            info = self.info(family)
            if info is None or info[1] in (None, self.port):
                continue
            if info[1]:
                raise OwnedByOther(errno.EPERM, f"table {TABLE}")
            batch = Batch()
            batch.new_table(family, TABLE, OWNED)
            self.send(batch)

    def remove(self) -> bool:
        """Deletes the tables. Returns whether any existed. Raises OwnedByOther."""
        self.take_over()
        families = [family for family in FAMILIES if self.info(family)]
        batch = Batch()
        for family in families:
            batch.delete_table(family, TABLE)
        if families:
            self.send(batch)
        return bool(families)

    def fits(self, found: KernelTable) -> bool:
        """Whether a table has the ownership that this connection gives its tables."""
        return bool(found.flags & OWNED) == bool(self.table_flags)

    def owns(self, family: int) -> bool:
        """Whether the kernel has this connection as the owner of the family's table."""
        info = self.info(family)
        return info is not None and info[1] == self.port

    # session affinity

    def destroy(self, owner: Set, elements: Sequence[Element]) -> None:
        """Deletes elements that may expire meanwhile. Raises KernelError.

        Linux 6.3 can delete elements as far as they are present. On older kernels one that is
        absent fails the whole transaction, so halves are tried until it is found.
        """
        if not elements:
            return
        batch = Batch()
        if self._destroys:
            batch.destroy_elements(TABLE, owner, elements)
        else:
            batch.delete_elements(TABLE, owner, elements)
        try:
            self.send(batch)
        except Stale as error:
            if self._destroys or error.errno != errno.ENOENT:
                raise
            if len(elements) > 1:
                middle = len(elements) // 2
                self.destroy(owner, elements[:middle])
                self.destroy(owner, elements[middle:])
        except Refused as error:
            if not self._destroys or error.errno not in _UNKNOWN_MESSAGE:
                raise
            self._destroys = False
            self.destroy(owner, elements)


def _has_ipv6_sockets() -> bool:
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).close()
    except OSError as error:
        return error.errno != errno.EAFNOSUPPORT
    return True


def transaction_of(transaction: Transaction, families: Container[int]) -> Transaction:
    """The part of a transaction that is about these families."""
    change = Change()
    for mine, all_of in (
        (change.added, transaction.change.added),
        (change.removed, transaction.change.removed),
    ):
        mine.update((owner, e) for owner, e in all_of.items() if owner.family in families)
    return Transaction(tuple(t for t in transaction.tables if t.family in families), change)
