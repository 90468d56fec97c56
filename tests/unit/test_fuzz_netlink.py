"""Decoders of netlink meet garbage: they raise Malformed or return, and nothing else."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent.kernel import watcher
from agent.kernel.conntrack import decode, parse
from rules.diff import Additions
from rules.netlink import elements as subject
from rules.netlink.attributes import (
    NLA_F_NESTED,
    Malformed,
    attribute,
    attributes,
    fields,
    includes,
    integer,
    nest,
    text,
)
from rules.netlink.elements import (
    decode_elements,
    encode_elements,
    encode_slots,
    join_ranges,
)
from rules.netlink.messages import (
    NLMSG_DONE,
    NLMSG_ERROR,
    NLMSG_HEADER,
    error_of,
    message,
    messages,
)
from rules.netlink.nftables import NFTA_LIST_ELEM
from rules.stale_flows import Flow
from rules.tables import SETS
from rules.text import CATCH_ALL
from tests.fuzzing import fuzzed
from tests.unit.test_conntrack import CLIENT, VIP, A, entry

SETS_OF_ALL_KINDS = [
    s for sets in SETS.values() for s in (*sets.always, *sets.sticky, *sets.by_endpoint)
]

# lengths that lie: too small, too large, off by a few
_headers = st.builds(
    struct.Struct("=HH").pack,
    st.sampled_from([0, 1, 3, 4, 5, 8, 12, 20, 0xFFFF]),
    st.integers(0, 0xFFFF),
)


def _nests(inner: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    kinds = st.integers(0, 30)
    return st.builds(
        lambda kind, parts: nest(kind, *parts), kinds, st.lists(inner, max_size=4)
    ) | st.builds(lambda kind, part: attribute(kind | NLA_F_NESTED, part), kinds, inner)


_leaves = st.builds(attribute, st.integers(0, 30), st.binary(max_size=24))
_trees = st.recursive(_leaves | _headers | st.binary(max_size=40), _nests, max_leaves=12)
garbage = st.binary(max_size=200) | st.lists(_trees, max_size=5).map(b"".join)


def _mutated(seed: bytes) -> st.SearchStrategy[bytes]:
    """Real bytes, with a few changed, and cut off somewhere."""
    places = st.dictionaries(st.integers(0, len(seed) - 1), st.integers(0, 255), max_size=6)

    def change(changes: dict[int, int], end: int) -> bytes:
        data = bytearray(seed)
        for place, value in changes.items():
            data[place] = value
        return bytes(data[:end])

    return st.builds(change, places, st.integers(0, len(seed)))


def survives(function: Callable[[], Any]) -> None:
    with suppress(Malformed):
        function()


@fuzzed(100)
@given(garbage)
@example(b"\x04\x00\x01\x00" * 3)
@example(b"\x00\x00\x00\x00")
def test_attributes(data: bytes) -> None:
    survives(lambda: list(attributes(data)))
    survives(lambda: fields(data)[1])
    survives(lambda: [text(payload) + str(integer(payload)) for _, payload in attributes(data)])


@fuzzed(100)
@given(garbage, garbage)
def test_comparing(theirs: bytes, ours: bytes) -> None:
    """Ours are well formed in practice; what the kernel says need not be."""
    survives(lambda: includes(theirs, ours, NFTA_LIST_ELEM))


_seed_messages = message(0x0A0C, 0, 7, b"\x02\0\0\0" + attribute(1, b"sliceproxy\0")) + message(
    2, 0x200, 8, struct.pack("=i", -2) + bytes(16) + attribute(1, b"no such set\0")
)


@pytest.mark.parametrize(("kind", "between"), [(NLMSG_ERROR, 16), (NLMSG_DONE, 0)])
def test_the_kernels_explanation_is_read_from_both_kinds_of_message(
    kind: int, between: int
) -> None:
    """Behind the header of the request, or where a dump ends without one."""
    explained = attribute(1, b"ipv4: FIB table does not exist\0")
    content = struct.pack("=i", -2) + bytes(between) + explained
    assert error_of(kind, content, 0x200) == (2, "ipv4: FIB table does not exist")


@fuzzed(100)
@given(st.binary(max_size=100) | _mutated(_seed_messages))
def test_messages(data: bytes) -> None:
    def read() -> None:
        count = 0
        for kind, flags, _sequence, start, end in messages(data):
            count += 1
            assert start + count <= len(data) + count
            survives(lambda k=kind, s=start, e=end, f=flags: error_of(k, data[s:e], f))  # type: ignore[misc]
        assert count * NLMSG_HEADER.size <= len(data)

    survives(read)


@fuzzed(100)
@given(kind=st.integers(0, 0xFFFF), content=garbage)
def test_what_the_watcher_reads(kind: int, content: bytes) -> None:
    survives(lambda: watcher._is_ours(kind, content))


def _value(owner: Any) -> Any:
    if owner.verdicts:
        return "balance-4"
    if owner.data:
        return bytes(owner.data_length)
    return b"\x7f" * owner.key_length if owner.interval else None


@pytest.mark.parametrize("owner", SETS_OF_ALL_KINDS, ids=lambda s: f"{s.name}-{s.family}")
@fuzzed(20)
@given(data=st.data())
def test_elements(owner: Any, data: st.DataObject) -> None:
    three = [(bytes([n]) * owner.key_length, _value(owner)) for n in (1, 2, 3)]
    seed = b"".join(encode_elements(owner, three))
    payload = data.draw(garbage | _mutated(seed))

    def read() -> None:
        found = list(decode_elements(owner, payload))
        assert all(key == CATCH_ALL or len(key) == owner.key_length for key, _ in found)
        join_ranges(found)

    survives(read)


@pytest.mark.parametrize("owner", SETS_OF_ALL_KINDS, ids=lambda s: f"{s.name}-{s.family}")
def test_elements_read_by_strides_are_those_read_one_by_one(owner: Any) -> None:
    three = [(bytes([n]) * owner.key_length, _value(owner)) for n in (1, 2, 3)]
    payload = b"".join(encode_elements(owner, three))
    one_by_one = list(subject._decode_each(owner, payload))
    assert list(decode_elements(owner, payload)) == one_by_one
    # the kernel does not flag elements of a list as nested
    dumped = b"".join(attribute(kind, content) for kind, content in attributes(payload))
    assert dumped != payload
    assert list(decode_elements(owner, dumped)) == one_by_one
    if not owner.interval:
        assert one_by_one == three


_entry = entry(Flow(CLIENT, VIP, A))


@fuzzed(100)
@given(st.sampled_from([2, 10, 0]), garbage | _mutated(_entry))
@example(2, b"")
def test_conntrack_entries(family: int, content: bytes) -> None:
    data = bytes(16) + struct.pack("=BBH", family, 0, 0) + content
    survives(lambda: parse(content))
    survives(lambda: decode(data, 16, len(data)))
    survives(lambda: decode(data, 16, min(len(data), 18)))


@pytest.mark.parametrize("family", [4, 6])
@given(lengths=st.lists(st.integers(1, 40), max_size=8), most=st.integers(80, 1000))
def test_lists_are_encoded_as_their_elements_one_by_one(family, lengths, most):
    """In portions that are no longer than the message may be, none with a part of an element."""
    owner = SETS[family].endpoints
    added = Additions()
    for number, length in enumerate(lengths):
        key = bytes([number]) * (owner.key_length - 4)
        added.lists.append((key, tuple(bytes([n]) * owner.data_length for n in range(length))))
    one_by_one = encode_elements(owner, added)
    portions = list(encode_slots(owner, added.lists, most))
    assert b"".join(portions) == b"".join(one_by_one)
    assert len(added) == len(one_by_one)
    size = len(one_by_one[0]) if one_by_one else 1
    assert all(0 < len(p) <= most and len(p) % size == 0 for p in portions)
