"""What defines a set: flags, types, size, and user data by which `nft list` prints it.

The user data is byte for byte what nft 1.0.6 writes. Newer versions write more (types inside
concatenations), on which 1.0.6 crashes when it lists a dynamic map (SIGSEGV; kubernetes issue
136786 is of the same kind).
"""

from __future__ import annotations

import struct

from rules.language import Concat, Field, Set, Source
from rules.netlink.attributes import attribute, nest, string, u32
from rules.netlink.counters import new_counter
from rules.netlink.nftables import (
    NFT_DATA_VERDICT,
    NFT_META_L4PROTO,
    NFT_NG_RANDOM,
    NFT_SET_CONCAT,
    NFT_SET_EVAL,
    NFT_SET_INTERVAL,
    NFT_SET_MAP,
    NFT_SET_TIMEOUT,
    NFTA_LIST_ELEM,
    NFTA_SET_DATA_LEN,
    NFTA_SET_DATA_TYPE,
    NFTA_SET_DESC,
    NFTA_SET_DESC_CONCAT,
    NFTA_SET_DESC_SIZE,
    NFTA_SET_EXPR,
    NFTA_SET_FIELD_LEN,
    NFTA_SET_FLAGS,
    NFTA_SET_KEY_LEN,
    NFTA_SET_KEY_TYPE,
    NFTA_SET_NAME,
    NFTA_SET_TABLE,
    NFTA_SET_USERDATA,
)

_VERDICT_LENGTH = 16  # sizeof(struct nft_verdict) on 64-bit machines, as nft sends it


def set_flags(described: Set) -> int:
    """NFT_SET_* flags."""
    flags = 0
    if described.interval:
        flags |= NFT_SET_INTERVAL | (NFT_SET_CONCAT if len(described.key) > 1 else 0)
    if described.is_map:
        flags |= NFT_SET_MAP
    if described.dynamic:
        flags |= NFT_SET_TIMEOUT | NFT_SET_EVAL
    return flags


def set_body(table: str, described: Set, count: int = 0, *, counters: bool = False) -> bytes:
    """Everything that defines a set but its id; `count` elements will be in it at once. With
    `counters` each element of a counted set gets a counter (Linux 5.7)."""
    body = string(NFTA_SET_TABLE, table) + string(NFTA_SET_NAME, described.name)
    if set_flags(described):
        body += u32(NFTA_SET_FLAGS, set_flags(described))
    body += u32(NFTA_SET_KEY_TYPE, key_type(described.key))
    body += u32(NFTA_SET_KEY_LEN, described.key_length)
    if described.verdicts:
        body += u32(NFTA_SET_DATA_TYPE, NFT_DATA_VERDICT) + u32(NFTA_SET_DATA_LEN, _VERDICT_LENGTH)
    elif described.data:
        body += u32(NFTA_SET_DATA_TYPE, key_type(described.data))
        body += u32(NFTA_SET_DATA_LEN, described.data_length)
    if size := described.room(count):
        body += nest(NFTA_SET_DESC, u32(NFTA_SET_DESC_SIZE, size))
    elif described.interval and len(described.key) > 1:
        lengths = (nest(NFTA_LIST_ELEM, u32(NFTA_SET_FIELD_LEN, f.length)) for f in described.key)
        body += nest(NFTA_SET_DESC, nest(NFTA_SET_DESC_CONCAT, *lengths))
    body += attribute(NFTA_SET_USERDATA, user_data(described))
    return body + new_counter(NFTA_SET_EXPR) if counters and described.counted else body


def key_type(fields: Concat) -> int:
    """nft's number for a (concatenated) type: 6 bits a field."""
    value = 0
    for part in fields:
        value = value << 6 | part.type.number
    return value


# --- user data: one byte of type, one byte of length, payload (libnftnl's udata.h) ---------------

# enum nftnl_udata_set_types
NFTNL_UDATA_SET_KEYBYTEORDER, NFTNL_UDATA_SET_DATABYTEORDER = 0, 1
NFTNL_UDATA_SET_KEY_TYPEOF, NFTNL_UDATA_SET_DATA_TYPEOF = 3, 4
NFTNL_UDATA_SET_DATA_INTERVAL, NFTNL_UDATA_SET_COMMENT = 6, 7
# enum nftnl_udata_set_typeof_types, and the same two inside of a concatenation
NFTNL_UDATA_SET_TYPEOF_EXPR, NFTNL_UDATA_SET_TYPEOF_DATA = 0, 1

# enum byteorder, enum expr_types, enum proto_desc_id and header fields, all of nft 1.0.6
_BYTEORDER_INVALID, _BYTEORDER_BIG_ENDIAN = 0, 2
_EXPR_PAYLOAD, _EXPR_META, _EXPR_CONCAT, _EXPR_NUMGEN = 7, 9, 13, 23
_PAYLOAD_DESC, _PAYLOAD_TYPE, _META_KEY = 0, 1, 0
_NUMGEN_TYPE, _NUMGEN_MODULUS, _NUMGEN_OFFSET = 0, 1, 2
_PROTO_DESC_TH, _PROTO_DESC_IP = 11, {4: 12, 6: 13}
_THDR_DPORT, _IPHDR_DADDR = 2, {4: 12, 6: 9}


def _udata(kind: int, payload: bytes) -> bytes:
    return bytes((kind, len(payload))) + payload


def _udata_u32(kind: int, value: int) -> bytes:
    return _udata(kind, struct.pack("=I", value))


def user_data(described: Set) -> bytes:
    """What nft 1.0.6 would have noted about the set."""
    concatenated = len(described.key) > 1
    order = _BYTEORDER_INVALID if concatenated else _BYTEORDER_BIG_ENDIAN
    data = _udata_u32(NFTNL_UDATA_SET_KEYBYTEORDER, order)
    if described.is_map:
        data += _udata_u32(NFTNL_UDATA_SET_DATABYTEORDER, _BYTEORDER_INVALID)
    if concatenated:
        data += _udata(
            NFTNL_UDATA_SET_KEY_TYPEOF, _typeof(described.key if described.typeof else ())
        )
    if described.is_map:
        if described.data:
            data += _udata(
                NFTNL_UDATA_SET_DATA_TYPEOF, _typeof(described.data if described.typeof else ())
            )
        data += _udata_u32(NFTNL_UDATA_SET_DATA_INTERVAL, 0)
    if described.comment:
        data += _udata(NFTNL_UDATA_SET_COMMENT, described.comment.encode() + b"\0")
    return data


def _typeof(fields: Concat) -> bytes:
    parts = b"".join(_udata(index, _field_type(f)) for index, f in enumerate(fields))
    return _expression_type(_EXPR_CONCAT, parts)


def _expression_type(expression: int, data: bytes) -> bytes:
    return _udata_u32(NFTNL_UDATA_SET_TYPEOF_EXPR, expression) + _udata(
        NFTNL_UDATA_SET_TYPEOF_DATA, data
    )


def _field_type(described: Field) -> bytes:
    match described.source:
        case Source.DADDR:
            inner = _udata_u32(_PAYLOAD_DESC, _PROTO_DESC_IP[described.family])
            inner += _udata_u32(_PAYLOAD_TYPE, _IPHDR_DADDR[described.family])
            return _expression_type(_EXPR_PAYLOAD, inner)
        case Source.DPORT:
            inner = _udata_u32(_PAYLOAD_DESC, _PROTO_DESC_TH)
            inner += _udata_u32(_PAYLOAD_TYPE, _THDR_DPORT)
            return _expression_type(_EXPR_PAYLOAD, inner)
        case Source.PROTOCOL:
            return _expression_type(_EXPR_META, _udata_u32(_META_KEY, NFT_META_L4PROTO))
        case Source.RANDOM:
            inner = _udata_u32(_NUMGEN_TYPE, NFT_NG_RANDOM)
            inner += _udata_u32(_NUMGEN_MODULUS, described.modulus)
            inner += _udata_u32(_NUMGEN_OFFSET, described.offset)
            return _expression_type(_EXPR_NUMGEN, inner)
        case _:
            raise ValueError(f"no set is keyed by {described.source} with typeof")
