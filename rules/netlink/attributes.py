"""Netlink attributes: type, length and payload, padded to 4 bytes, nested to any depth.

The format is that of include/uapi/linux/netlink.h. The header is in host byte order; what a payload
holds is said where the attribute is defined.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

NLA_HEADER = struct.Struct("=HH")
"""struct nlattr: length with this header, without padding; type."""

NLA_F_NESTED = 0x8000
NLA_TYPE_MASK = 0x3FFF


class Malformed(ValueError):
    """Bytes are not what netlink's format allows. Nothing else is raised for bad input."""


def attribute(kind: int, payload: bytes) -> bytes:
    """One attribute, padded to 4 bytes."""
    return NLA_HEADER.pack(len(payload) + 4, kind) + payload + bytes(-len(payload) % 4)


def nest(kind: int, *attributes: bytes) -> bytes:
    """An attribute that holds attributes."""
    return attribute(kind | NLA_F_NESTED, b"".join(attributes))


def u32(kind: int, value: int) -> bytes:
    """A 32-bit number in network order."""
    return attribute(kind, struct.pack("!I", value & 0xFFFFFFFF))


def string(kind: int, text: str) -> bytes:
    """A string with its terminating zero."""
    return attribute(kind, text.encode() + b"\0")


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The attributes of a message body or a nest: type without flags, payload without padding.

    Fewer than 4 bytes after the last attribute are ignored, as the kernel ignores them. Raises
    Malformed.
    """
    position, end = 0, len(data)
    while position + 4 <= end:
        length, kind = NLA_HEADER.unpack_from(data, position)
        if length < 4 or position + length > end:
            raise Malformed(f"attribute of {length} bytes where {end - position} remain")
        yield kind & NLA_TYPE_MASK, data[position + 4 : position + length]
        position += (length + 3) & ~3


class Fields(dict[int, bytes]):
    """Attributes by type. Looking up one that is absent raises Malformed; `get` does not."""

    def __missing__(self, kind: int) -> bytes:
        raise Malformed(f"attribute {kind} is missing")


def fields(data: bytes) -> Fields:
    """The attributes by type; of several with one type, the last. Raises Malformed."""
    return Fields(attributes(data))


def text(payload: bytes) -> str:
    """A string attribute's text."""
    return payload.rstrip(b"\0").decode(errors="replace")


def integer(payload: bytes) -> int:
    """A number in network order; 0 for an attribute that is absent (empty)."""
    return int.from_bytes(payload, "big")


def includes(theirs: bytes, ours: bytes, listed: int) -> bool:
    """Whether the kernel's dump of an object has every attribute that we would send for it.

    The kernel adds attributes that we left at their default, so they need not be equal. But of
    attributes of type `listed` (the elements of a list) both have the same number. Raises
    Malformed.
    """
    reported: dict[int, list[bytes]] = {}
    for kind, content in attributes(theirs):
        reported.setdefault(kind, []).append(content)
    position, seen = 0, dict.fromkeys(reported, 0)
    while position + 4 <= len(ours):
        length, flagged = NLA_HEADER.unpack_from(ours, position)
        kind, content = flagged & NLA_TYPE_MASK, ours[position + 4 : position + length]
        position += (length + 3) & ~3
        index = seen.get(kind, 0)
        if index >= len(reported.get(kind, ())):
            return False
        seen[kind] = index + 1
        other = reported[kind][index]
        nested = flagged & NLA_F_NESTED
        if not (includes(other, content, listed) if nested else other == content):
            return False
    return seen.get(listed, 0) == len(reported.get(listed, ()))
