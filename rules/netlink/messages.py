"""Netlink messages: a header, then a protocol's own content. One parser for all of them.

Constants are those of include/uapi/linux/netlink.h and nfnetlink.h; headers are in host byte order.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from rules.netlink.attributes import Malformed, fields, text

NLMSG_HEADER = struct.Struct("=IHHII")
"""struct nlmsghdr: length with this header, type, flags, sequence number, port."""

NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR = 1, 4, 0x10
NLM_F_DUMP, NLM_F_CREATE, NLM_F_APPEND = 0x300, 0x400, 0x800
NLM_F_ACK_TLVS = 0x200
NLMSGERR_ATTR_MSG = 1

NFGENMSG = struct.Struct("!BBH")
"""struct nfgenmsg, with which every netfilter message begins: family, version, resource id."""

SEQUENCES = 1 << 32
"""How many sequence numbers there are; after the last one they start over."""

Message = tuple[int, int, int, int, int]
"""Type, flags, sequence number, and where the content begins and ends."""


def messages(data: bytes) -> Iterator[Message]:
    """The messages in a datagram. Raises Malformed."""
    position, size = 0, len(data)
    while position < size:
        if position + 16 > size:
            raise Malformed(f"{size - position} bytes where a message should begin")
        length, kind, flags, sequence, _ = NLMSG_HEADER.unpack_from(data, position)
        if length < 16 or position + length > size:
            raise Malformed(f"message of {length} bytes where {size - position} remain")
        yield kind, flags, sequence, position + 16, position + length
        position += (length + 3) & ~3


def message(kind: int, flags: int, sequence: int, content: bytes) -> bytes:
    """One message."""
    return message_header(kind, flags, sequence, len(content)) + content


def message_header(kind: int, flags: int, sequence: int, length: int) -> bytes:
    """The header of a message whose content has this length, a multiple of 4."""
    return NLMSG_HEADER.pack(16 + length, kind, flags, sequence, 0)


def error_of(kind: int, content: bytes, flags: int) -> tuple[int, str]:
    """What an NLMSG_ERROR or NLMSG_DONE message reports: the errno, 0 for success, and the
    kernel's explanation, if it has one. Raises Malformed.

    In an NLMSG_ERROR message the header of the request is between them; it is skipped without its
    content (NETLINK_CAP_ACK).
    """
    if len(content) < 4:
        return 0, ""
    code = -int(struct.unpack_from("=i", content)[0])
    attributes = 4 if kind == NLMSG_DONE else 4 + NLMSG_HEADER.size
    if not flags & NLM_F_ACK_TLVS or len(content) < attributes:
        return code, ""
    return code, text(fields(content[attributes:]).get(NLMSGERR_ATTR_MSG, b""))
