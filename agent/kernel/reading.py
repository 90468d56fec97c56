"""Reads nf_tables: the ruleset's generation, our tables, their elements and counters.

The kernel dumps in pieces, and commits between two pieces make a dump inconsistent. It marks a dump
that met a commit, of any table (NLM_F_DUMP_INTR). It does not mark one that lacks elements because
the set's hash table grew meanwhile.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from agent.kernel.errors import Refused, Stale, nf_tables_error, raised_as
from agent.kernel.socket import Closing, Interrupted, NetlinkSocket
from rules.language import Chain, Set, Table
from rules.netlink.attributes import (
    attributes,
    fields,
    includes,
    integer,
    nest,
    string,
    text,
)
from rules.netlink.batch import chain_body, content, elements_of, nft_type
from rules.netlink.counters import Count, decode_counts
from rules.netlink.elements import decode_elements, encode_keys, join_ranges
from rules.netlink.expressions import rule_body
from rules.netlink.messages import NFGENMSG, NLM_F_DUMP
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
    NFTA_SET_EXPR,
    NFTA_SET_EXPRESSIONS,
    NFTA_SET_NAME,
    NFTA_SET_TABLE,
    NFTA_TABLE_FLAGS,
    NFTA_TABLE_NAME,
    NFTA_TABLE_OWNER,
)
from rules.netlink.sets import set_body
from rules.tables import SETS, TABLE
from rules.text import Element, Key, Value
from rules.transaction import TableContents

OWNED = NFT_TABLE_F_OWNER | NFT_TABLE_F_PERSIST
"""The flags of a table that belongs to a socket and outlives it."""

_SUBJECT = "reading the tables"
_READ_TRIES, _ELEMENT_TRIES = 10, 3
_GROWING_TRIES, _GROWING_PAUSE = 5, 0.05
_SINGLE_COUNTS = 400  # up to so many are read one by one, 10 us each; a dump may be of 10,000s


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
    elements: Mapping[Set, dict[Key, Value]]


class TableReader(Closing):
    """A connection that reads nf_tables in this network namespace. Use it as a context manager.

    `connect` makes its socket. All errors are KernelErrors; without CAP_NET_ADMIN each request
    raises NotPermitted.
    """

    def __init__(self, connect: Callable[[], NetlinkSocket] = NetlinkSocket) -> None:
        with raised_as(Refused, "a netlink socket to netfilter"):
            self._socket = connect()

    def close(self) -> None:
        """Closes the connection."""
        self._socket.close()

    @property
    def port(self) -> int:
        """The netlink port by which the kernel identifies this connection."""
        return self._socket.port

    # tables

    def generation(self) -> int:
        """The number of the ruleset's generation in this namespace."""
        for _, body in self._ask(NFT_MSG_GETGEN, 0, b"", 0):
            return integer(fields(body).get(NFTA_GEN_ID, b""))
        return 0

    def read_back(self, family: int, *, watched: bool = False) -> ReadBack | None:
        """The table of a family with its elements, as of one moment; None if it does not exist.

        Another process may change one set before it is read and another one after that, so the
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
        with raised_as(Refused, _SUBJECT):
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
        with raised_as(Refused, _SUBJECT):
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
        with raised_as(Refused, _SUBJECT):
            return frozenset(text(fields(body)[NFTA_SET_NAME]) for body in bodies)

    # elements

    def element(self, owner: Set, key: Key) -> Element | None:
        """The element that has this key; None if there is none. Not for sets of ranges."""
        try:
            bodies = self._single(owner, *encode_keys(owner, [(key, None)]))
        except Stale as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        with raised_as(Refused, _SUBJECT):
            for payload in _lists(bodies):
                return next(decode_elements(owner, payload), None)
        return None

    def elements(self, owner: Set) -> dict[Key, Value]:
        """All elements of a set of our tables."""
        bodies = self._all(owner)
        ranges: list[Element] = []
        found: dict[Key, Value] = {}
        in_pairs = owner.interval and len(owner.key) == 1
        add = ranges.extend if in_pairs else found.update
        with raised_as(Refused, _SUBJECT):
            for payload in _lists(bodies):
                add(decode_elements(owner, payload))
        return join_ranges(ranges) if in_pairs else found

    def read(self, found: KernelTable) -> Mapping[Set, dict[Key, Value]]:
        """The elements of all known sets of a table that was found, but for dynamic ones."""
        sets = SETS[found.family]
        return {
            s: self._all_elements(s, found.sets[s.name])
            for s in (*sets.always, *sets.sticky, *sets.by_endpoint)
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

    # counters

    def counts(self, owner: Set) -> dict[Key, Count]:
        """The counters of a set's elements, by key; nothing where the set or its counters do not
        exist."""
        try:
            return _counts(owner, self._all(owner))
        except Stale:
            return {}

    def counts_of(self, owner: Set, keys: Sequence[Key]) -> dict[Key, Count]:
        """`counts` of some elements. Those that are absent or have no counter are left out."""
        if len(keys) > _SINGLE_COUNTS or owner.interval:
            found = self.counts(owner)
            return {key: found[key] for key in keys if key in found}
        bodies: list[bytes] = []
        for encoded in encode_keys(owner, [(key, None) for key in keys]):
            with suppress(Stale):
                bodies += self._single(owner, encoded)
        return _counts(owner, bodies)

    # requests

    def dump(self, kind: int, family: int, body: bytes = b"") -> list[bytes]:
        """The bodies of all answers to a dump (`kind` is NFT_MSG_GET*), of any tables.

        It is repeated if the ruleset changed while it ran. Raises Stale if it always does.
        """
        return [answer for _, answer in self._complete(kind, family, body)]

    def dump_all(self, kind: int) -> list[tuple[int, bytes]]:
        """As `dump`, of all families: the family (NFPROTO_*) and the body of each answer."""
        return self._complete(kind, 0, b"")

    def _complete(self, kind: int, family: int, body: bytes) -> list[tuple[int, bytes]]:
        for _ in range(_READ_TRIES):
            answers, complete = self._dump(kind, family, body)
            if complete:
                return answers
        raise _changing()

    def _all(self, owner: Set) -> list[bytes]:
        """The answers with all elements of a set.

        Any commit in the namespace interrupts the dump, but only one to our tables matters, and
        those are noticed otherwise (`read_back`). So commits to other tables, however many, do not
        prevent reading.
        """
        for _ in range(_ELEMENT_TRIES):
            answers, complete = self._dump(
                NFT_MSG_GETSETELEM, owner.family, elements_of(TABLE, owner.name)
            )
            if complete:
                break
        return [body for _, body in answers]

    def _single(self, owner: Set, encoded: bytes) -> list[bytes]:
        """The answer with one element, by its encoded key. Raises Stale (ENOENT) without it."""
        request = elements_of(TABLE, owner.name) + nest(NFTA_SET_ELEM_LIST_ELEMENTS, encoded)
        return [body for _, body in self._ask(NFT_MSG_GETSETELEM, owner.family, request, 0)]

    def _dump(self, kind: int, family: int, body: bytes) -> tuple[list[tuple[int, bytes]], bool]:
        """The answers to one dump, and whether no commit interrupted it."""
        answers: list[tuple[int, bytes]] = []
        try:
            answers.extend(self._ask(kind, family, body, NLM_F_DUMP))
        except Interrupted:
            return answers, False
        return answers, True

    def _ask(self, kind: int, family: int, body: bytes, flags: int) -> Iterator[tuple[int, bytes]]:
        """Family (NFPROTO_*) and body of each answer to a request."""
        try:
            for data, start, end in self._socket.ask(nft_type(kind), content(family, body), flags):
                yield data[start], data[start + NFGENMSG.size : end]
        except Interrupted:
            raise
        except OSError as error:
            detail = error.strerror or str(error)
            raise nf_tables_error(error.errno or errno.EIO, _SUBJECT, detail) from None


def _lists(bodies: list[bytes]) -> Iterator[bytes]:
    """The lists of elements in answers, which it removes: each is free when it has been read
    (20 MB at 250,000 elements). Raises Malformed."""
    bodies.reverse()
    while bodies:
        for kind, payload in attributes(bodies.pop()):
            if kind == NFTA_SET_ELEM_LIST_ELEMENTS:
                yield payload


def _counts(owner: Set, bodies: list[bytes]) -> dict[Key, Count]:
    found: dict[Key, Count] = {}
    with raised_as(Refused, _SUBJECT):
        for payload in _lists(bodies):
            found.update(decode_counts(owner, payload))
    return found


def _changing() -> Stale:
    return Stale(errno.EAGAIN, _SUBJECT, "they change faster than they can be read")
