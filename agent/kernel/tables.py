"""nf_tables: applies transactions, reads tables back, owns them.

Ownership. From Linux 6.9 on a table may belong to a netlink socket and outlive it (flags `owner`
and `persist`): no other process can change or flush it, `nft flush ruleset` leaves it untouched,
and when the owner exits the table stays: an orphan that anyone may change, until the next owner
takes it over by asking for the same flags. On older kernels tables are made without flags, and a
`Watcher` reports when another process changed them.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from types import TracebackType
from typing import NamedTuple

from agent.kernel.counters import KeptCounts
from agent.kernel.errors import Full, KernelError, NotPermitted, OwnedByOther, Refused, Stale
from agent.kernel.socket import Failure, Interrupted, NetlinkSocket
from rules.diff import Change, Elements
from rules.language import Chain, Set, Table
from rules.netlink.attributes import (
    Malformed,
    attributes,
    fields,
    includes,
    integer,
    nest,
    string,
    text,
)
from rules.netlink.batch import Batch, chain_body, content, nft_type
from rules.netlink.counters import Count, decode_counts
from rules.netlink.elements import decode_elements, encode_keys, join_ranges
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
    NFTA_SET_EXPR,
    NFTA_SET_EXPRESSIONS,
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

_READ_TRIES, _ELEMENT_TRIES = 10, 3
_GROWING_TRIES, _GROWING_PAUSE = 5, 0.05
_SINGLE_COUNTS = 32  # up to so many counters are read one by one, 10 us each
_SEND_BUFFER = 8 << 20
_UNKNOWN_MESSAGE = {errno.EINVAL, errno.EOPNOTSUPP}
_NO_FAMILY = {errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT, errno.ENOENT}
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
            frozenset(n for n in self.chains if n in chains and self._has_hook_of(chains[n])),
            frozenset(
                name
                for name, body in self.sets.items()
                if name in described
                and _has_counters(body) != (want.counters and described[name].counted)
            ),
        )

    def _has_hook_of(self, chain: Chain) -> bool:
        body = self.chains[chain.name]
        has_hook = NFTA_CHAIN_HOOK in fields(body)
        return has_hook == (chain.base is not None) and includes(
            body, chain_body(TABLE, chain), NFTA_LIST_ELEM
        )

    def _is(self, chain: Chain) -> bool:
        rules = self.rules.get(chain.name, [])
        return (
            self._has_hook_of(chain)
            and len(rules) == len(chain.rules)
            and all(
                includes(theirs, rule_body(TABLE, chain.name, ours, self.family), NFTA_LIST_ELEM)
                for theirs, ours in zip(rules, chain.rules, strict=True)
            )
        )


def _has_counters(body: bytes) -> bool:
    """Whether elements of a set that was read have counters, or other expressions."""
    found = fields(body)
    return NFTA_SET_EXPR in found or NFTA_SET_EXPRESSIONS in found


class ReadBack(NamedTuple):
    """One table as it was read back, and its elements, of one moment."""

    table: KernelTable
    elements: Elements


class Kernel:
    """A connection to nf_tables in this network namespace. Use it as a context manager.

    With `own`, tables are made to belong to this connection where the kernel can do that. With
    `kept`, counters go on where they stood when their elements are replaced. Raises
    NotPermitted without CAP_NET_ADMIN. All errors are KernelErrors.
    """

    def __init__(
        self,
        *,
        own: bool = True,
        connect: Callable[[], NetlinkSocket] = NetlinkSocket,
        kept: KeptCounts | None = None,
    ):
        try:
            self._socket = connect()
        except OSError as error:
            raise Refused(error.errno or errno.EIO, "a netlink socket to netfilter") from None
        self.kept = kept
        self._destroys = True  # until the kernel says that it does not know the message
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
        if self.families != FAMILIES:
            transaction = transaction_of(transaction, self.families)
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
        """Whether an ip6 table can be made. As in `_supported_flags` it is never visible."""
        batch = Batch()
        batch.new_table(6, f"{TABLE}-trial", 0)
        batch.delete_table(6, f"{TABLE}-trial")
        try:
            self.send(batch)
        except (Refused, Stale) as error:
            return error.errno not in _NO_FAMILY
        return True

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

    def read_back(self, family: int, *, watched: bool = False) -> ReadBack | None:
        """The table of a family with its elements, as of one moment; None if it does not exist.

        A writer beside us may change one set before and another behind our look at them, so the
        generation of the ruleset is compared before and after. Raises Stale if it changes each
        time, unless the table is ours, or `watched`: then what others write elsewhere is all that
        can have changed, or is reported by the Watcher.
        """
        for _ in range(_READ_TRIES):
            generation = self.generation()
            table = self.find(family)
            if table is None:
                return None
            elements = self.read(table)
            if self.generation() == generation or table.owner == self.port:
                return ReadBack(table, elements)
            if watched:
                # a start that takes over its tables changes the generation while they are read
                # ahead; to read them twice takes a second of CPU at 250,000 elements
                again = self.find(family)
                return ReadBack(again, elements) if again else None
        raise _changing()

    def find(self, family: int) -> KernelTable | None:
        """The table of a family, without its elements; None if it does not exist."""
        info = self.info(family)
        if info is None:
            return None
        with _well_formed():
            return self._find(family, *info)

    def _find(self, family: int, flags: int, owner: int | None) -> KernelTable:
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
        tables = self.dump(NFT_MSG_GETTABLE, family)
        with _well_formed():
            for table in map(fields, tables):
                if text(table[NFTA_TABLE_NAME]) == TABLE:
                    flags = integer(table.get(NFTA_TABLE_FLAGS, b""))
                    if not flags & OWNED:
                        return flags, None
                    # the owner flag ends with the owner: without one it is an orphan
                    return flags, integer(table.get(NFTA_TABLE_OWNER, b""))
        return None

    def count(self, owner: Set) -> int | None:
        """How many elements a set of our tables has; None if it does not exist."""
        for body in self.dump(NFT_MSG_GETSET, owner.family, string(NFTA_SET_TABLE, TABLE)):
            found = fields(body)
            if text(found[NFTA_SET_NAME]) == owner.name:
                count = found.get(NFTA_SET_COUNT)
                return len(self.elements(owner)) if count is None else integer(count)
        return None

    def set_names(self, family: int) -> frozenset[str]:
        """The names of the sets of our table; none if there is no table."""
        bodies = self.dump(NFT_MSG_GETSET, family, string(NFTA_SET_TABLE, TABLE))
        with _well_formed():
            return frozenset(text(fields(body)[NFTA_SET_NAME]) for body in bodies)

    def element(self, owner: Set, key: Key) -> Element | None:
        """The element that has this key; None if there is none. Not for sets of ranges."""
        request = string(NFTA_SET_ELEM_LIST_TABLE, TABLE)
        request += string(NFTA_SET_ELEM_LIST_SET, owner.name)
        request += nest(NFTA_SET_ELEM_LIST_ELEMENTS, *encode_keys(owner, [(key, None)]))
        try:
            bodies = list(self._ask(NFT_MSG_GETSETELEM, owner.family, request, 0))
        except Stale as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        with _well_formed():
            for body in bodies:
                for kind, payload in attributes(body):
                    if kind == NFTA_SET_ELEM_LIST_ELEMENTS:
                        return next(decode_elements(owner, payload), None)
        return None

    def elements(self, owner: Set) -> dict[Key, Value]:
        """All elements of a set of our tables."""
        request = string(NFTA_SET_ELEM_LIST_TABLE, TABLE)
        request += string(NFTA_SET_ELEM_LIST_SET, owner.name)
        # Any commit in the namespace interrupts a dump, but only one to our tables matters, and
        # those are noticed otherwise (`read_back`). Others must not keep us from reading for ever.
        for _ in range(_ELEMENT_TRIES):
            bodies, complete = self._dump(NFT_MSG_GETSETELEM, owner.family, request)
            if complete:
                break
        ranges: list[Element] = []
        found: dict[Key, Value] = {}
        in_pairs = owner.interval and len(owner.key) == 1
        add = ranges.extend if in_pairs else found.update
        bodies.reverse()
        with _well_formed():
            while bodies:  # each is free when it has been read: 20 MB at 250,000 elements
                for kind, payload in attributes(bodies.pop()):
                    if kind == NFTA_SET_ELEM_LIST_ELEMENTS:
                        add(decode_elements(owner, payload))
        return join_ranges(ranges) if in_pairs else found

    def counts(self, owner: Set) -> dict[Key, Count]:
        """The counters of a set's elements, by key; nothing where the set or its counters do not
        exist."""
        request = string(NFTA_SET_ELEM_LIST_TABLE, TABLE)
        request += string(NFTA_SET_ELEM_LIST_SET, owner.name)
        try:
            for _ in range(_ELEMENT_TRIES):
                bodies, complete = self._dump(NFT_MSG_GETSETELEM, owner.family, request)
                if complete:
                    break
        except Stale:
            return {}
        return _counts(owner, bodies)

    def counts_of(self, owner: Set, keys: Sequence[Key]) -> dict[Key, Count]:
        """`counts` of some elements. Those that are absent or have no counter are left out."""
        if len(keys) > _SINGLE_COUNTS or owner.interval:
            found = self.counts(owner)
            return {key: found[key] for key in keys if key in found}
        head = string(NFTA_SET_ELEM_LIST_TABLE, TABLE)
        head += string(NFTA_SET_ELEM_LIST_SET, owner.name)
        bodies: list[bytes] = []
        for encoded in encode_keys(owner, [(key, None) for key in keys]):
            request = head + nest(NFTA_SET_ELEM_LIST_ELEMENTS, encoded)
            with suppress(Stale):
                bodies.extend(self._ask(NFT_MSG_GETSETELEM, owner.family, request, 0))
        return _counts(owner, bodies)

    def read(self, found: KernelTable) -> Elements:
        """The elements of all known sets of a table that was found, but for dynamic ones."""
        sets = SETS[found.family]
        return {
            s: self._all_elements(s, found.sets[s.name])
            for s in (*sets.always, *sets.sticky)
            if s.name in found.sets and not s.dynamic
        }

    def complete(self, owner: Set) -> dict[Key, Value]:
        """`elements` of a set that may be growing or shrinking at the moment."""
        for body in self.dump(NFT_MSG_GETSET, owner.family, string(NFTA_SET_TABLE, TABLE)):
            if text(fields(body).get(NFTA_SET_NAME, b"")) == owner.name:
                return self._all_elements(owner, body)
        return {}

    def _all_elements(self, owner: Set, body: bytes) -> dict[Key, Value]:
        """The elements of a set, as many as the kernel says it has, where it says so.

        A dump that meets the set's hash table while it grows may miss some, unnoticed; the table
        grows for a moment after a load.
        """
        elements = self.elements(owner)
        count = integer(fields(body).get(NFTA_SET_COUNT, b""))
        for _ in range(_GROWING_TRIES):
            if owner.interval or len(elements) >= count:
                break
            time.sleep(_GROWING_PAUSE)
            elements = self.elements(owner)
        return elements

    def dump(self, kind: int, family: int, body: bytes = b"") -> list[bytes]:
        """The bodies of all answers to a dump (`kind` is NFT_MSG_GET*), of any tables.

        It is asked again if the ruleset changed while it ran. Raises Stale if it always does.
        """
        for _ in range(_READ_TRIES):
            answers, complete = self._dump(kind, family, body)
            if complete:
                return answers
        raise _changing()

    def _dump(self, kind: int, family: int, body: bytes) -> tuple[list[bytes], bool]:
        """The answers to one dump, and whether no commit interrupted it."""
        answers: list[bytes] = []
        try:
            answers.extend(self._ask(kind, family, body, NLM_F_DUMP))
        except Interrupted:
            return answers, False
        return answers, True

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


def _counts(owner: Set, bodies: Iterable[bytes]) -> dict[Key, Count]:
    found: dict[Key, Count] = {}
    with _well_formed():
        for body in bodies:
            for kind, payload in attributes(body):
                if kind == NFTA_SET_ELEM_LIST_ELEMENTS:
                    found.update(decode_counts(owner, payload))
    return found


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


def _changing() -> Stale:
    return Stale(errno.EAGAIN, "reading the tables", "they change faster than they can be read")


@contextmanager
def _well_formed() -> Iterator[None]:
    """Makes of bytes that cannot be decoded an error of the kernel's."""
    try:
        yield
    except Malformed as error:
        raise Refused(errno.EBADMSG, "reading the tables", str(error)) from None


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
