"""Counters of set elements, to and from netlink.

A set that is made with a counter gives one to each of its elements (NFTA_SET_EXPR). An element may
also be added with a counter that does not begin at 0 (NFTA_SET_ELEM_EXPR). The kernel counts a
packet on an element whenever a look-up in a rule finds it (Linux 5.7).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from rules.language import Set
from rules.netlink.attributes import (
    NLA_HEADER,
    Malformed,
    attribute,
    fields,
    integer,
    nest,
    string,
)
from rules.netlink.elements import encode_elements
from rules.netlink.nftables import (
    NFTA_COUNTER_BYTES,
    NFTA_COUNTER_PACKETS,
    NFTA_DATA_VALUE,
    NFTA_EXPR_DATA,
    NFTA_EXPR_NAME,
    NFTA_LIST_ELEM,
    NFTA_SET_ELEM_EXPR,
    NFTA_SET_ELEM_KEY,
)
from rules.text import Element, Key


class Count(NamedTuple):
    """What a counter has seen. The bytes are those of the packets' IP headers and payload."""

    packets: int
    bytes: int


NO_PACKETS = Count(0, 0)
_NAME = string(NFTA_EXPR_NAME, "counter")
_UINT64 = struct.Struct("!Q")


def new_counter(kind: int, count: Count = NO_PACKETS) -> bytes:
    """A counter as an attribute of this type (NFTA_SET_EXPR, NFTA_SET_ELEM_EXPR)."""
    values = (
        attribute(NFTA_COUNTER_BYTES, _UINT64.pack(count.bytes)),
        attribute(NFTA_COUNTER_PACKETS, _UINT64.pack(count.packets)),
    )
    return nest(kind, _NAME, nest(NFTA_EXPR_DATA, *values))


def encode_counted(
    owner: Set, elements: Iterable[Element], counts: Mapping[Key, Count]
) -> list[bytes]:
    """`encode_elements`, where the counters of those in `counts` begin there."""
    elements = list(elements)
    if owner.interval:  # only a range's first element counts
        parts = [encode_elements(owner, [element]) for element in elements]
        firsts, rests = [p[0] for p in parts], [p[1:] for p in parts]
    else:
        firsts, rests = encode_elements(owner, elements), [[]] * len(elements)
    encoded: list[bytes] = []
    for (key, _), first, rest in zip(elements, firsts, rests, strict=True):
        count = counts.get(key, NO_PACKETS)
        encoded += [first if count == NO_PACKETS else _with_count(first, count), *rest]
    return encoded


def _with_count(element: bytes, count: Count) -> bytes:
    return nest(NFTA_LIST_ELEM, element[4:], new_counter(NFTA_SET_ELEM_EXPR, count))


def _dumped() -> bytes:
    """A counter as the kernel dumps it: what is nested has no flag."""
    values = attribute(NFTA_COUNTER_BYTES, bytes(8)) + attribute(NFTA_COUNTER_PACKETS, bytes(8))
    return attribute(NFTA_SET_ELEM_EXPR, _NAME + attribute(NFTA_EXPR_DATA, values))


_SIZE, _HEAD, _BETWEEN = len(_dumped()), _dumped()[:-20], _dumped()[-12:-8]
_NUMBERS = struct.Struct("!Q4xQ")  # two attributes of 12 bytes end an element


def decode_counts(owner: Set, payload: bytes) -> Iterator[tuple[Key, Count]]:
    """Keys and counts in the NFTA_SET_ELEM_LIST_ELEMENTS attribute of a dump, of the elements that
    have a counter. Raises Malformed."""
    length = owner.key_length
    key_head = attribute(NFTA_SET_ELEM_KEY, attribute(NFTA_DATA_VALUE, bytes(length)))[:8]
    position, end = 0, len(payload)
    while position + 4 <= end:
        size, _ = NLA_HEADER.unpack_from(payload, position)
        if size < 4 or position + size > end:
            raise Malformed(f"element of {size} bytes where {end - position} remain")
        stop = position + size
        # as the kernel writes it: the key first, the counter last, each of fixed length
        if (
            payload[position + 4 : position + 12] == key_head
            and payload[stop - _SIZE : stop - 20] == _HEAD
            and payload[stop - 12 : stop - 8] == _BETWEEN
            and size >= 12 + length + _SIZE
        ):
            seen, packets = _NUMBERS.unpack_from(payload, stop - 20)
            yield payload[position + 12 : position + 12 + length], Count(packets, seen)
        else:
            yield from _decode_count(owner, payload[position + 4 : stop])
        position += (size + 3) & ~3


def _decode_count(owner: Set, element: bytes) -> Iterator[tuple[Key, Count]]:
    found = fields(element)
    expression = fields(found.get(NFTA_SET_ELEM_EXPR, b""))
    if NFTA_SET_ELEM_KEY not in found:  # another process's element for all other keys
        return
    if NFTA_EXPR_DATA not in expression or expression.get(NFTA_EXPR_NAME) != b"counter\0":
        return
    key = fields(found[NFTA_SET_ELEM_KEY])[NFTA_DATA_VALUE]
    if len(key) != owner.key_length:
        raise Malformed(f"a key of {len(key)} bytes in {owner.name}")
    values = fields(expression[NFTA_EXPR_DATA])
    packets, count = values.get(NFTA_COUNTER_PACKETS, b""), values.get(NFTA_COUNTER_BYTES, b"")
    yield key, Count(integer(packets), integer(count))
