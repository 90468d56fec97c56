"""nf_tables: applies transactions, reads tables back, owns them.

Ownership. From Linux 6.9 on a table may belong to a netlink socket and outlive it (flags `owner`
and `persist`): no other process can change or flush it, `nft flush ruleset` leaves it untouched,
and when the owner exits the table stays: an orphan that anyone may change, until the next owner
takes it over by asking for the same flags. On older kernels tables are made without flags, and a
`Watcher` reports when another process changed them.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NamedTuple

from agent.kernel.errors import Full, KernelError, NotPermitted, OwnedByOther, Refused, Stale
from agent.kernel.socket import Failure, Interrupted, NetlinkSocket
from rules.diff import Elements
from rules.language import Chain, Set, Table
from rules.netlink.attributes import attributes, fields, includes, integer, string, text
from rules.netlink.batch import Batch, chain_body, content, nft_type
from rules.netlink.elements import decode_elements, join_ranges
from rules.netlink.expressions import rule_body
from rules.netlink.messages import NLM_F_DUMP
from rules.netlink.nftables import (
    NFT_MSG_GETCHAIN,
    NFT_MSG_GETGEN,
    NFT_MSG_GETRULE,
    NFT_MSG_GETSET,
    NFT_MSG_GETSETELEM,
    NFT_MSG_GETTABLE,
    NFT_TABLE_F_OWNER,
    NFT_TABLE_F_PERSIST,
    NFTA_CHAIN_HOOK,
    NFTA_CHAIN_NAME,
    NFTA_CHAIN_TABLE,
    NFTA_GEN_ID,
    NFTA_LIST_ELEM,
    NFTA_RULE_CHAIN,
    NFTA_RULE_TABLE,
    NFTA_SET_COUNT,
    NFTA_SET_ELEM_LIST_ELEMENTS,
    NFTA_SET_ELEM_LIST_SET,
    NFTA_SET_ELEM_LIST_TABLE,
    NFTA_SET_NAME,
    NFTA_SET_TABLE,
    NFTA_TABLE_FLAGS,
    NFTA_TABLE_NAME,
    NFTA_TABLE_OWNER,
)
from rules.netlink.sets import set_body
from rules.tables import FAMILIES, SETS, TABLE
from rules.text import Element, Key, Value
from rules.transaction import TableContents, Transaction, encode

OWNED = NFT_TABLE_F_OWNER | NFT_TABLE_F_PERSIST

_DUMP_TRIES, _DUMP_PAUSE = 5, 0.05
_SEND_BUFFER = 8 << 20
_STALE = {errno.ENOENT, errno.EEXIST, errno.EBUSY, errno.ERESTART, errno.ENOTEMPTY}


class KernelTable(NamedTuple):
    """One table as the kernel has it, without elements: message bodies of its sets, chains and
    rules, by name or chain.

    `owner` is the netlink port of the owning socket, 0 for an orphan, None without ownership.
    """

    family: int
    flags: int
    owner: int | None
    sets: dict[str, bytes]
    chains: dict[str, bytes]
    rules: dict[str, list[bytes]]

    def known(self, want: Table) -> TableContents:
        """Which of its sets and chains equal those of `want`."""
        described = {s.name: s for s in want.sets}
        chains = {c.name: c for c in want.chains}
        return TableContents(
            {
                name: described[name]
                if name in described
                and includes(body, set_body(TABLE, described[name]), NFTA_LIST_ELEM)
                else None
                for name, body in self.sets.items()
            },
            {
                name: chains[name] if name in chains and self._is(chains[name]) else None
                for name in self.chains
            },
        )

    def _is(self, chain: Chain) -> bool:
        body, rules = self.chains[chain.name], self.rules.get(chain.name, [])
        has_hook = NFTA_CHAIN_HOOK in fields(body)
        return (
            has_hook == (chain.base is not None)
            and includes(body, chain_body(TABLE, chain), NFTA_LIST_ELEM)
            and len(rules) == len(chain.rules)
            and all(
                includes(theirs, rule_body(TABLE, chain.name, ours, self.family), NFTA_LIST_ELEM)
                for theirs, ours in zip(rules, chain.rules, strict=True)
            )
        )


class Kernel:
    """A connection to nf_tables in this network namespace. Use it as a context manager.

    With `own`, tables are made to belong to this connection where the kernel can do that. Raises
    NotPermitted without CAP_NET_ADMIN. All errors are KernelErrors.
    """

    def __init__(self, *, own: bool = True, socket: Callable[[], NetlinkSocket] = NetlinkSocket):
        try:
            self._socket = socket()
        except OSError as error:
            raise Refused(error.errno or errno.EIO, "a netlink socket to netfilter") from None
        self.table_flags = self._supported_flags() if own else 0

    def __enter__(self) -> Kernel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection. Owned tables stay, orphaned."""
        self._socket.close()

    @property
    def port(self) -> int:
        """The netlink port by which the kernel knows this connection."""
        return self._socket.port

    def _supported_flags(self) -> int:
        """`owner,persist` if a table with them can be made. The trial is taken back in the same
        transaction, so it is never visible."""
        batch = Batch()
        batch.new_table(4, f"{TABLE}-trial", OWNED)
        batch.delete_table(4, f"{TABLE}-trial")
        try:
            self.send(batch)
        except OwnedByOther as error:  # a new table has no owner: the namespace is not ours
            raise NotPermitted(error.errno, "nf_tables") from None
        except (Refused, Stale):
            return 0
        return OWNED

    # writing

    def apply(self, transaction: Transaction) -> int:
        """Applies everything or nothing. Returns the bytes sent.

        Raises OwnedByOther, Stale, or Refused.
        """
        return self.send(encode(transaction, self.table_flags))

    def send(self, batch: Batch, generation: int | None = None) -> int:
        """Sends a batch; returns how many bytes. With a `generation` it is Stale if the ruleset
        has another one by now."""
        first = self._socket.number(batch.sequences)
        data = batch.encode(first, generation)
        try:
            failures = self._socket.transact(data, first, batch.sequences)
        except OSError as error:
            # it is unknown whether the kernel applied it
            raise Stale(error.errno or errno.EIO, "sending a transaction", str(error)) from None
        if failures:
            raise _refusal(failures[0], batch.subject(failures[0].position))
        return len(data)

    # reading

    def generation(self) -> int:
        """The number of the ruleset's generation in this namespace."""
        for body in self._ask(NFT_MSG_GETGEN, 0, b"", 0):
            return integer(fields(body).get(NFTA_GEN_ID, b""))
        return 0

    def find(self, family: int) -> KernelTable | None:
        """The table of a family, without its elements; None if it does not exist."""
        info = self.info(family)
        if info is None:
            return None
        flags, owner = info
        sets = {
            text(fields(body)[NFTA_SET_NAME]): body
            for body in self.dump(NFT_MSG_GETSET, family, string(NFTA_SET_TABLE, TABLE))
        }
        chains: dict[str, bytes] = {}
        for body in self.dump(NFT_MSG_GETCHAIN, family):
            chain = fields(body)
            if text(chain[NFTA_CHAIN_TABLE]) == TABLE:
                chains[text(chain[NFTA_CHAIN_NAME])] = body
        rules: dict[str, list[bytes]] = {}
        for body in self.dump(NFT_MSG_GETRULE, family, string(NFTA_RULE_TABLE, TABLE)):
            rules.setdefault(text(fields(body)[NFTA_RULE_CHAIN]), []).append(body)
        return KernelTable(family, flags, owner, sets, chains, rules)

    def info(self, family: int) -> tuple[int, int | None] | None:
        """Flags and owner of the table, None if it does not exist."""
        for body in self.dump(NFT_MSG_GETTABLE, family):
            table = fields(body)
            if text(table[NFTA_TABLE_NAME]) == TABLE:
                flags = integer(table.get(NFTA_TABLE_FLAGS, b""))
                if not flags & OWNED:
                    return flags, None
                # the owner flag ends with the owner: a table that persists without one is an orphan
                return flags, integer(table.get(NFTA_TABLE_OWNER, b""))
        return None

    def count(self, owner: Set) -> int | None:
        """How many elements a set of our tables has; None if it does not exist."""
        for body in self.dump(NFT_MSG_GETSET, owner.family, string(NFTA_SET_TABLE, TABLE)):
            found = fields(body)
            if text(found[NFTA_SET_NAME]) == owner.name:
                told = found.get(NFTA_SET_COUNT)
                return len(self.elements(owner)) if told is None else integer(told)
        return None

    def elements(self, owner: Set) -> dict[Key, Value]:
        """All elements of a set of our tables."""
        request = string(NFTA_SET_ELEM_LIST_TABLE, TABLE)
        request += string(NFTA_SET_ELEM_LIST_SET, owner.name)
        found: list[Element] = []
        for body in self.dump(NFT_MSG_GETSETELEM, owner.family, request):
            for kind, payload in attributes(body):
                if kind == NFTA_SET_ELEM_LIST_ELEMENTS:
                    found.extend(decode_elements(owner, payload))
        if owner.interval and len(owner.key) == 1:
            return join_ranges(found)
        return dict(found)

    def read(self, found: KernelTable) -> Elements:
        """The elements of all known sets of a table that was found, but for dynamic ones."""
        sets = SETS[found.family]
        return {
            s: self._all_elements(s, found.sets[s.name])
            for s in (*sets.always, *sets.sticky)
            if s.name in found.sets and not s.dynamic
        }

    def _all_elements(self, owner: Set, body: bytes) -> dict[Key, Value]:
        """The elements of a set, as many as the kernel says it has, where it says so.

        A dump that meets the set's hash table while it grows may miss some, unnoticed; the table
        grows for a moment after a load.
        """
        elements = self.elements(owner)
        count = integer(fields(body).get(NFTA_SET_COUNT, b""))
        for _ in range(_DUMP_TRIES):
            if owner.interval or len(elements) >= count:
                break
            time.sleep(_DUMP_PAUSE)
            elements = self.elements(owner)
        return elements

    def dump(self, kind: int, family: int, body: bytes = b"") -> list[bytes]:
        """The bodies of all answers to a dump (`kind` is NFT_MSG_GET*), of any tables.

        It is asked again if the ruleset changed while it ran.
        """
        while True:
            try:
                return list(self._ask(kind, family, body, NLM_F_DUMP))
            except Interrupted:
                continue

    def _ask(self, kind: int, family: int, body: bytes, flags: int) -> Iterator[bytes]:
        try:
            for data, start, end in self._socket.ask(nft_type(kind), content(family, body), flags):
                yield data[start + 4 : end]
        except Interrupted:
            raise
        except OSError as error:
            failure = Failure(0, error.errno or errno.EIO, error.strerror or str(error))
            raise _refusal(failure, "reading the tables") from None

    # owning

    def take_over(self) -> None:
        """Takes over tables that an agent left when it exited. They must have no other owner.

        Raises OwnedByOther.
        """
        for family in FAMILIES:
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

    # session affinity

    def forget(self, family: int, current: Callable[[Key, Value], bool]) -> int:
        """Deletes what the affinity map holds beyond what is `current`; returns how many.

        Costs what the map holds.
        """
        affinity = SETS[family].affinity
        stale = [e for e in self.elements(affinity).items() if not current(*e)]
        if stale:
            self._delete_if_there(affinity, stale)
        return len(stale)

    def _delete_if_there(self, owner: Set, elements: list[Element]) -> None:
        """Deletes elements that may expire meanwhile: all at once, else one by one."""
        try:
            batch = Batch()
            batch.delete_elements(TABLE, owner, elements)
            self.send(batch)
        except Stale:
            if len(elements) > 1:
                for element in elements:
                    self._delete_if_there(owner, [element])


def _refusal(failure: Failure, subject: str) -> KernelError:
    code = failure.errno
    if code == errno.EPERM:
        kind: type[KernelError] = NotPermitted if not _may_administer() else OwnedByOther
    elif code == errno.ENFILE:
        kind = Full
    elif code in _STALE:
        kind = Stale
    else:
        kind = Refused
    return kind(code, subject, failure.detail)


def _may_administer() -> bool:
    """Whether this process has CAP_NET_ADMIN."""
    with open("/proc/self/status", encoding="ascii") as status:
        line = next(line for line in status if line.startswith("CapEff"))
    return bool(int(line.split()[1], 16) >> 12 & 1)
