"""A transaction as one buffer: a begin message, any number of messages, an end message.

The kernel applies all of it or nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import islice
from typing import NamedTuple

from rules.language import Chain, Set
from rules.netlink.attributes import nest, string, u32
from rules.netlink.counters import Count, encode_counted
from rules.netlink.elements import encode_elements, encode_keys, encode_slots
from rules.netlink.expressions import rule_body
from rules.netlink.messages import (
    NFGENMSG,
    NLM_F_ACK,
    NLM_F_APPEND,
    NLM_F_CREATE,
    NLM_F_REQUEST,
    SEQUENCES,
    message,
    message_header,
)
from rules.netlink.nftables import (
    NF_ACCEPT,
    NFNL_BATCH_GENID,
    NFNL_MSG_BATCH_BEGIN,
    NFNL_MSG_BATCH_END,
    NFNL_SUBSYS_NFTABLES,
    NFPROTO,
    NFT_MSG_DELCHAIN,
    NFT_MSG_DELRULE,
    NFT_MSG_DELSET,
    NFT_MSG_DELSETELEM,
    NFT_MSG_DELTABLE,
    NFT_MSG_DESTROYSETELEM,
    NFT_MSG_NEWCHAIN,
    NFT_MSG_NEWRULE,
    NFT_MSG_NEWSET,
    NFT_MSG_NEWSETELEM,
    NFT_MSG_NEWTABLE,
    NFTA_CHAIN_HOOK,
    NFTA_CHAIN_NAME,
    NFTA_CHAIN_POLICY,
    NFTA_CHAIN_TABLE,
    NFTA_CHAIN_TYPE,
    NFTA_HOOK_HOOKNUM,
    NFTA_HOOK_PRIORITY,
    NFTA_RULE_CHAIN,
    NFTA_RULE_TABLE,
    NFTA_SET_ELEM_LIST_ELEMENTS,
    NFTA_SET_ELEM_LIST_SET,
    NFTA_SET_ELEM_LIST_TABLE,
    NFTA_SET_ID,
    NFTA_SET_NAME,
    NFTA_SET_TABLE,
    NFTA_TABLE_FLAGS,
    NFTA_TABLE_NAME,
)
from rules.netlink.sets import set_body
from rules.text import Element, Key

_MAX_NEST = 60_000  # an attribute's length is a 16-bit number
_PORTION = 1000  # so many elements are encoded at a time: a start has 44,000 verdicts


def nft_type(kind: int) -> int:
    """The netlink message type of an NFT_MSG_* number."""
    return NFNL_SUBSYS_NFTABLES << 8 | kind


def content(family: int, body: bytes) -> bytes:
    """The content of an nf_tables message; `family` is 4, 6, or 0 for any."""
    return NFGENMSG.pack(NFPROTO.get(family, 0), 0, 0) + body


class _Part(NamedTuple):
    """A message of a batch before it has a sequence number."""

    type: int
    flags: int
    content: bytes


class Batch:
    """A transaction being put together.

    It has no sequence numbers of its own: `encode` numbers its messages on from the sender's last
    one, so that no answer can be taken for an answer to another batch.
    """

    def __init__(self) -> None:
        self._parts: deque[_Part] = deque()
        self._subjects: list[str] = []

    def __len__(self) -> int:
        return len(self._subjects)

    @property
    def sequences(self) -> int:
        """How many sequence numbers `encode` uses: one for each message, and begin and end."""
        return len(self) + 2

    def add(self, kind: int, family: int, body: bytes, flags: int, subject: str) -> None:
        """Appends a message of type NFT_MSG_*; `subject` is what an error message calls it."""
        self._parts.append(_Part(nft_type(kind), flags, content(family, body)))
        self._subjects.append(subject)

    def subject(self, index: int) -> str:
        """What message number `index` is about; the begin message is number 0."""
        if 1 <= index <= len(self):
            return self._subjects[index - 1]
        return "the transaction"

    def encode(self, first: int = 1, generation: int | None = None) -> bytearray:
        """The whole batch, numbered from `first` on. With a `generation` the kernel refuses it
        (ERESTART) if the ruleset has changed since.

        The kernel acknowledges the end message, number `first + sequences - 1`. To be called once:
        the messages are handed over, so that a large batch is in memory once.
        """
        genid = b"" if generation is None else u32(NFNL_BATCH_GENID, generation)
        data = bytearray(message(NFNL_MSG_BATCH_BEGIN, NLM_F_REQUEST, first, _BATCH + genid))
        sequence = first
        while self._parts:
            kind, flags, body = self._parts.popleft()
            sequence = (sequence + 1) % SEQUENCES
            data += message_header(kind, NLM_F_REQUEST | flags, sequence, len(body))
            data += body
        sequence = (sequence + 1) % SEQUENCES
        data += message(NFNL_MSG_BATCH_END, NLM_F_REQUEST | NLM_F_ACK, sequence, _BATCH)
        return data

    # tables, chains, sets

    def new_table(self, family: int, name: str, flags: int) -> None:
        """Creates a table, or takes over an orphaned one that has the same flags."""
        body = string(NFTA_TABLE_NAME, name) + u32(NFTA_TABLE_FLAGS, flags)
        self.add(NFT_MSG_NEWTABLE, family, body, NLM_F_CREATE, f"table {name}")

    def delete_table(self, family: int, name: str) -> None:
        """Deletes a table with all it holds."""
        self.add(NFT_MSG_DELTABLE, family, string(NFTA_TABLE_NAME, name), 0, f"table {name}")

    def new_set(
        self, table: str, described: Set, count: int = 0, *, counters: bool = False
    ) -> None:
        """Creates a set or map that is to hold `count` elements at once; see `set_body`."""
        body = set_body(table, described, count, counters=counters)
        body += u32(NFTA_SET_ID, len(self) + 1)
        self.add(NFT_MSG_NEWSET, described.family, body, NLM_F_CREATE, f"set {described.name}")

    def delete_set(self, family: int, table: str, name: str) -> None:
        """Deletes a set that no rule uses any more."""
        body = string(NFTA_SET_TABLE, table) + string(NFTA_SET_NAME, name)
        self.add(NFT_MSG_DELSET, family, body, 0, f"set {name}")

    def new_chain(self, family: int, table: str, chain: Chain) -> None:
        """Creates a chain, without its rules."""
        body = chain_body(table, chain)
        self.add(NFT_MSG_NEWCHAIN, family, body, NLM_F_CREATE, f"chain {chain.name}")

    def delete_chain(self, family: int, table: str, name: str) -> None:
        """Deletes a chain that no rule and no element refers to any more."""
        body = string(NFTA_CHAIN_TABLE, table) + string(NFTA_CHAIN_NAME, name)
        self.add(NFT_MSG_DELCHAIN, family, body, 0, f"chain {name}")

    def delete_rules(self, family: int, table: str, chain: str) -> None:
        """Empties a chain."""
        body = string(NFTA_RULE_TABLE, table) + string(NFTA_RULE_CHAIN, chain)
        self.add(NFT_MSG_DELRULE, family, body, 0, f"rules of chain {chain}")

    def new_rules(self, family: int, table: str, chain: Chain) -> None:
        """Appends a chain's rules."""
        for index, described in enumerate(chain.rules):
            body = rule_body(table, chain.name, described, family)
            self.add(
                NFT_MSG_NEWRULE, family, body, NLM_F_CREATE | NLM_F_APPEND,
                f"rule {index + 1} of chain {chain.name}",
            )  # fmt: skip

    # elements

    def add_elements(
        self,
        table: str,
        owner: Set,
        elements: Iterable[Element],
        counts: Mapping[Key, Count] | None = None,
    ) -> None:
        """Adds elements. One that is present with the same data is no error. The counters of those
        in `counts` begin there."""
        waiting = iter(elements)
        while portion := list(islice(waiting, _PORTION)):
            if counts:
                encoded = encode_counted(owner, portion, counts)
            else:
                encoded = encode_elements(owner, portion)
            self._elements(NFT_MSG_NEWSETELEM, NLM_F_CREATE, table, owner, encoded)

    def add_slots(
        self, table: str, owner: Set, lists: Iterable[tuple[Key, Sequence[bytes]]]
    ) -> None:
        """Adds the elements of whole lists; see `encode_slots`."""
        head = elements_of(table, owner.name)
        for elements in encode_slots(owner, lists, _MAX_NEST):
            body = head + nest(NFTA_SET_ELEM_LIST_ELEMENTS, elements)
            subject = f"elements of {owner.name}"
            self.add(NFT_MSG_NEWSETELEM, owner.family, body, NLM_F_CREATE, subject)

    def delete_elements(self, table: str, owner: Set, elements: Iterable[Element]) -> None:
        """Deletes elements by their keys. One that is absent fails the transaction."""
        self._elements(NFT_MSG_DELSETELEM, 0, table, owner, encode_keys(owner, elements))

    def destroy_elements(self, table: str, owner: Set, elements: Iterable[Element]) -> None:
        """Deletes elements by their keys, as far as they are present (Linux 6.3)."""
        self._elements(NFT_MSG_DESTROYSETELEM, 0, table, owner, encode_keys(owner, elements))

    def _elements(
        self, kind: int, flags: int, table: str, owner: Set, encoded: list[bytes]
    ) -> None:
        head = elements_of(table, owner.name)
        step = max(1, _MAX_NEST // max(map(len, encoded), default=1))
        for start in range(0, len(encoded), step):
            body = head + nest(NFTA_SET_ELEM_LIST_ELEMENTS, *encoded[start : start + step])
            self.add(kind, owner.family, body, flags, f"elements of {owner.name}")


_BATCH = NFGENMSG.pack(0, 0, NFNL_SUBSYS_NFTABLES)


@cache
def elements_of(table: str, name: str) -> bytes:
    """The attributes that name the set in a message about its elements."""
    return string(NFTA_SET_ELEM_LIST_TABLE, table) + string(NFTA_SET_ELEM_LIST_SET, name)


def chain_body(table: str, chain: Chain) -> bytes:
    """Everything that defines a chain but its rules. The policy of a base chain is accept."""
    body = string(NFTA_CHAIN_TABLE, table) + string(NFTA_CHAIN_NAME, chain.name)
    if chain.base is None:
        return body
    hook = nest(
        NFTA_CHAIN_HOOK,
        u32(NFTA_HOOK_HOOKNUM, chain.base.hook.value[1]),
        u32(NFTA_HOOK_PRIORITY, chain.base.priority),
    )
    policy = u32(NFTA_CHAIN_POLICY, NF_ACCEPT)
    return body + hook + policy + string(NFTA_CHAIN_TYPE, chain.base.type)
