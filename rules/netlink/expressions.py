"""Rules as nf_tables expressions.

Registers: a rule loads fields into consecutive 4-byte units, from unit 0 on.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import cache, lru_cache

from rules.language import (
    ADDRESS_LENGTH,
    Concat,
    Field,
    Final,
    FromInterface,
    GoBy,
    Goto,
    In,
    Is,
    IsProtocol,
    Jump,
    Mark,
    Marked,
    NotFromInterface,
    Predicate,
    Remember,
    Rule,
    Set,
    Source,
    Statement,
    Translate,
    Unmark,
)
from rules.netlink.attributes import attribute, nest, string, u32
from rules.netlink.nftables import (
    ICMP_PORT_UNREACH,
    ICMPV6_PORT_UNREACH,
    IPS_CONFIRMED,
    IPS_DST_NAT,
    NF_ACCEPT,
    NF_DROP,
    NF_NAT_RANGE_PROTO_RANDOM_FULLY,
    NFPROTO,
    NFT_CMP_EQ,
    NFT_CMP_NEQ,
    NFT_CT_DIRECTION,
    NFT_CT_DST_IP,
    NFT_CT_DST_IP6,
    NFT_CT_PROTO_DST,
    NFT_CT_STATE,
    NFT_CT_STATUS,
    NFT_DYNSET_OP_UPDATE,
    NFT_FIB_RESULT_ADDRTYPE,
    NFT_GOTO,
    NFT_HASH_JENKINS,
    NFT_JUMP,
    NFT_LOOKUP_F_INV,
    NFT_META_IIFNAME,
    NFT_META_L4PROTO,
    NFT_META_MARK,
    NFT_NAT_DNAT,
    NFT_NG_RANDOM,
    NFT_PAYLOAD_NETWORK_HEADER,
    NFT_PAYLOAD_TRANSPORT_HEADER,
    NFT_REG32_00,
    NFT_REG_1,
    NFT_REG_VERDICT,
    NFT_REJECT_ICMP_UNREACH,
    NFT_REJECT_TCP_RST,
    NFT_RETURN,
    NFTA_BITWISE_DREG,
    NFTA_BITWISE_LEN,
    NFTA_BITWISE_MASK,
    NFTA_BITWISE_SREG,
    NFTA_BITWISE_XOR,
    NFTA_CMP_DATA,
    NFTA_CMP_OP,
    NFTA_CMP_SREG,
    NFTA_CT_DIRECTION,
    NFTA_CT_DREG,
    NFTA_CT_KEY,
    NFTA_DATA_VALUE,
    NFTA_DATA_VERDICT,
    NFTA_DYNSET_OP,
    NFTA_DYNSET_SET_NAME,
    NFTA_DYNSET_SREG_DATA,
    NFTA_DYNSET_SREG_KEY,
    NFTA_DYNSET_TIMEOUT,
    NFTA_EXPR_DATA,
    NFTA_EXPR_NAME,
    NFTA_FIB_DREG,
    NFTA_FIB_F_SADDR,
    NFTA_FIB_FLAGS,
    NFTA_FIB_RESULT,
    NFTA_HASH_DREG,
    NFTA_HASH_LEN,
    NFTA_HASH_MODULUS,
    NFTA_HASH_SEED,
    NFTA_HASH_SREG,
    NFTA_HASH_TYPE,
    NFTA_IMMEDIATE_DATA,
    NFTA_IMMEDIATE_DREG,
    NFTA_LIST_ELEM,
    NFTA_LOOKUP_DREG,
    NFTA_LOOKUP_FLAGS,
    NFTA_LOOKUP_SET,
    NFTA_LOOKUP_SREG,
    NFTA_MASQ_FLAGS,
    NFTA_META_DREG,
    NFTA_META_KEY,
    NFTA_META_SREG,
    NFTA_NAT_FAMILY,
    NFTA_NAT_REG_ADDR_MIN,
    NFTA_NAT_REG_PROTO_MIN,
    NFTA_NAT_TYPE,
    NFTA_NG_DREG,
    NFTA_NG_MODULUS,
    NFTA_NG_OFFSET,
    NFTA_NG_TYPE,
    NFTA_PAYLOAD_BASE,
    NFTA_PAYLOAD_DREG,
    NFTA_PAYLOAD_LEN,
    NFTA_PAYLOAD_OFFSET,
    NFTA_REJECT_ICMP_CODE,
    NFTA_REJECT_TYPE,
    NFTA_RULE_CHAIN,
    NFTA_RULE_EXPRESSIONS,
    NFTA_RULE_TABLE,
    NFTA_RULE_USERDATA,
    NFTA_VERDICT_CHAIN,
    NFTA_VERDICT_CODE,
    RTN_LOCAL,
)

_STATE_NEW = 0x8  # NF_CT_STATE_BIT(IP_CT_NEW)
_PORT_UNREACHABLE = {4: ICMP_PORT_UNREACH, 6: ICMPV6_PORT_UNREACH}
_IFNAMSIZ = 16
_CT_DST_IP = {4: NFT_CT_DST_IP, 6: NFT_CT_DST_IP6}
_DPORT_OFFSET = 2
_OFFSET = {
    (4, Source.SADDR): 12,
    (4, Source.DADDR): 16,
    (6, Source.SADDR): 8,
    (6, Source.DADDR): 24,
}
"""Of an address in the network header."""
_ORIGINAL = b"\0"  # IP_CT_DIR_ORIGINAL
NFTNL_UDATA_RULE_COMMENT = 0


def offset_of(family: int, source: Source) -> int:
    """Where an address (SADDR or DADDR) is in the network header."""
    return _OFFSET[family, source]


def register(unit: int) -> int:
    """The number of the register at 4-byte unit `unit`, as the kernel itself reports it."""
    return NFT_REG32_00 + unit if unit % 4 else NFT_REG_1 + unit // 4


def rule_body(table: str, chain: str, described: Rule, family: int) -> bytes:
    """A rule: its table and chain, its expressions and its comment."""
    body = string(NFTA_RULE_TABLE, table) + string(NFTA_RULE_CHAIN, chain)
    body += _expressions(described.statements, family)
    if described.comment:
        body += attribute(NFTA_RULE_USERDATA, _comment(described.comment))
    return body


@lru_cache(maxsize=16)  # a chain jumps to its draw several times
def _expressions(statements: tuple[Statement, ...], family: int) -> bytes:
    return nest(NFTA_RULE_EXPRESSIONS, *(e for s in statements for e in _statement(s, family)))


def expression(name: str, *parts: bytes) -> bytes:
    """One expression: its name and the attributes of its data."""
    return nest(NFTA_LIST_ELEM, string(NFTA_EXPR_NAME, name), nest(NFTA_EXPR_DATA, *parts))


def _statement(described: Statement, family: int) -> Iterator[bytes]:  # noqa: PLR0912
    match described:
        case Is(Predicate.NEW):
            yield from _has_bit(NFT_CT_STATE, _STATE_NEW)
        case Is(Predicate.KNOWN):
            yield from _has_bit(NFT_CT_STATUS, IPS_CONFIRMED)
        case Is(Predicate.TRANSLATED):
            yield from _has_bit(NFT_CT_STATUS, IPS_DST_NAT)
        case Is(Predicate.UNTRANSLATED):
            yield from _has_bit(NFT_CT_STATUS, IPS_DST_NAT, NFT_CMP_EQ)
        case Is(Predicate.FROM_HERE):
            yield expression(
                "fib",
                u32(NFTA_FIB_DREG, NFT_REG_1),
                u32(NFTA_FIB_RESULT, NFT_FIB_RESULT_ADDRTYPE),
                u32(NFTA_FIB_FLAGS, NFTA_FIB_F_SADDR),
            )
            yield compare(NFT_CMP_EQ, struct.pack("=I", RTN_LOCAL))
        case IsProtocol(protocol):
            yield meta(NFT_META_L4PROTO)
            yield compare(NFT_CMP_EQ, bytes((protocol,)))
        case In(fields, named, negated):
            yield from _load(fields)
            yield _lookup(named, u32(NFTA_LOOKUP_FLAGS, NFT_LOOKUP_F_INV) if negated else b"")
        case FromInterface(name, prefix):
            yield from _interface(NFT_CMP_EQ, name, prefix)
        case NotFromInterface(name, prefix):
            yield from _interface(NFT_CMP_NEQ, name, prefix)
        case Marked(bits):
            yield meta(NFT_META_MARK)
            yield _bitwise(bits, 0)
            yield compare(NFT_CMP_NEQ, bytes(4))
        case Mark(bits):
            yield from _change_mark(bits ^ 0xFFFFFFFF, bits)
        case Unmark(bits):
            yield from _change_mark(bits ^ 0xFFFFFFFF, 0)
        case GoBy(fields, named):
            yield from _load(fields)
            yield _lookup(named, u32(NFTA_LOOKUP_DREG, NFT_REG_VERDICT))
        case Translate(fields, named):
            yield from _load(fields)
            yield _lookup(named, u32(NFTA_LOOKUP_DREG, NFT_REG_1))
            yield _dnat(named)
        case Remember():
            yield from _remember(described)
        case Jump(chain):
            yield _verdict(NFT_JUMP, chain)
        case Goto(chain):
            yield _verdict(NFT_GOTO, chain)
        case Final():
            yield _final(described, family)


def _final(described: Final, family: int) -> bytes:
    match described:
        case Final.ACCEPT:
            return _verdict(NF_ACCEPT)
        case Final.DROP:
            return _verdict(NF_DROP)
        case Final.RETURN:
            return _verdict(NFT_RETURN)
        case Final.MASQUERADE:
            return expression("masq", u32(NFTA_MASQ_FLAGS, NF_NAT_RANGE_PROTO_RANDOM_FULLY))
        case Final.RESET:
            return expression("reject", u32(NFTA_REJECT_TYPE, NFT_REJECT_TCP_RST))
        case Final.REJECT:
            code = attribute(NFTA_REJECT_ICMP_CODE, bytes((_PORT_UNREACHABLE[family],)))
            return expression("reject", u32(NFTA_REJECT_TYPE, NFT_REJECT_ICMP_UNREACH), code)


def _has_bit(key: int, bit: int, compared_to_none: int = NFT_CMP_NEQ) -> Iterator[bytes]:
    yield expression("ct", u32(NFTA_CT_DREG, NFT_REG_1), u32(NFTA_CT_KEY, key))
    yield _bitwise(bit, 0)
    yield compare(compared_to_none, bytes(4))


def _interface(operation: int, name: str, prefix: bool) -> Iterator[bytes]:
    yield meta(NFT_META_IIFNAME)
    encoded = name.encode()
    yield compare(operation, encoded if prefix else encoded.ljust(_IFNAMSIZ, b"\0"))


def _change_mark(mask: int, xor: int) -> Iterator[bytes]:
    yield meta(NFT_META_MARK)
    yield _bitwise(mask, xor)
    yield expression("meta", u32(NFTA_META_KEY, NFT_META_MARK), u32(NFTA_META_SREG, NFT_REG_1))


def meta(key: int) -> bytes:
    """Loads a property of the packet (NFT_META_*) into the first register."""
    return expression("meta", u32(NFTA_META_KEY, key), u32(NFTA_META_DREG, NFT_REG_1))


def compare(operation: int, data: bytes) -> bytes:
    """Ends the rule unless the first register compares so (NFT_CMP_*) with the data."""
    return expression(
        "cmp",
        u32(NFTA_CMP_SREG, NFT_REG_1),
        u32(NFTA_CMP_OP, operation),
        nest(NFTA_CMP_DATA, attribute(NFTA_DATA_VALUE, data)),
    )


def _bitwise(mask: int, xor: int) -> bytes:
    return bitwise(struct.pack("=I", mask), struct.pack("=I", xor))


def bitwise(mask: bytes, xor: bytes) -> bytes:
    """The first register & mask ^ xor, both as long as what it holds."""
    return expression(
        "bitwise",
        u32(NFTA_BITWISE_SREG, NFT_REG_1),
        u32(NFTA_BITWISE_DREG, NFT_REG_1),
        u32(NFTA_BITWISE_LEN, len(mask)),
        nest(NFTA_BITWISE_MASK, attribute(NFTA_DATA_VALUE, mask)),
        nest(NFTA_BITWISE_XOR, attribute(NFTA_DATA_VALUE, xor)),
    )


def _verdict(code: int, chain: str = "") -> bytes:
    return expression(
        "immediate",
        u32(NFTA_IMMEDIATE_DREG, NFT_REG_VERDICT),
        nest(NFTA_IMMEDIATE_DATA, verdict_data(code, chain)),
    )


def verdict_data(code: int, chain: str = "") -> bytes:
    """A verdict as data."""
    return nest(
        NFTA_DATA_VERDICT,
        u32(NFTA_VERDICT_CODE, code),
        string(NFTA_VERDICT_CHAIN, chain) if chain else b"",
    )


def _lookup(named: Set, *more: bytes) -> bytes:
    return expression(
        "lookup", string(NFTA_LOOKUP_SET, named.name), u32(NFTA_LOOKUP_SREG, NFT_REG_1), *more
    )


def _dnat(named: Set) -> bytes:
    port = register(named.data[0].padded // 4)
    return expression(
        "nat",
        u32(NFTA_NAT_TYPE, NFT_NAT_DNAT),
        u32(NFTA_NAT_FAMILY, NFPROTO[named.family]),
        u32(NFTA_NAT_REG_ADDR_MIN, NFT_REG_1),
        u32(NFTA_NAT_REG_PROTO_MIN, port),
    )


def _remember(described: Remember) -> Iterator[bytes]:
    yield from _load(described.key)
    behind = described.map.key_length // 4
    yield from _load(described.data, behind)
    data = (u32(NFTA_DYNSET_SREG_DATA, register(behind)),) if described.data else ()
    yield expression(
        "dynset",
        string(NFTA_DYNSET_SET_NAME, described.map.name),
        u32(NFTA_DYNSET_OP, NFT_DYNSET_OP_UPDATE),
        u32(NFTA_DYNSET_SREG_KEY, NFT_REG_1),
        *data,
        attribute(NFTA_DYNSET_TIMEOUT, struct.pack("!Q", described.seconds * 1000)),  # ms
    )


def _load(fields: Concat, unit: int = 0) -> Iterator[bytes]:
    for part in fields:
        yield _read(part, unit)
        unit += part.padded // 4


@cache
def _read(part: Field, unit: int) -> bytes:
    into = register(unit)
    match part.source:
        case Source.SADDR | Source.DADDR:
            offset = _OFFSET[part.family, part.source]
            return payload(into, NFT_PAYLOAD_NETWORK_HEADER, offset, part.length)
        case Source.DPORT:
            return payload(into, NFT_PAYLOAD_TRANSPORT_HEADER, _DPORT_OFFSET, part.length)
        case Source.PROTOCOL:
            return expression(
                "meta", u32(NFTA_META_KEY, NFT_META_L4PROTO), u32(NFTA_META_DREG, into)
            )
        case Source.ORIGINAL_DADDR:
            return _original(into, _CT_DST_IP[part.family])
        case Source.ORIGINAL_DPORT:
            return _original(into, NFT_CT_PROTO_DST)
        case Source.RANDOM:
            return expression(
                "numgen",
                u32(NFTA_NG_DREG, into),
                u32(NFTA_NG_MODULUS, part.modulus),
                u32(NFTA_NG_TYPE, NFT_NG_RANDOM),
                u32(NFTA_NG_OFFSET, part.offset),
            )
        case Source.DIRECTION:
            return expression("ct", u32(NFTA_CT_DREG, into), u32(NFTA_CT_KEY, NFT_CT_DIRECTION))
        case Source.CLIENT_HASH:
            return _client_hash(part, into)


_SCRATCH_UNIT = 8  # after every key: the address to be hashed


def _client_hash(part: Field, into: int) -> bytes:
    """Loads the source address aside, and its hash into the register."""
    scratch, length = register(_SCRATCH_UNIT), ADDRESS_LENGTH[part.family]
    offset = _OFFSET[part.family, Source.SADDR]
    return payload(scratch, NFT_PAYLOAD_NETWORK_HEADER, offset, length) + expression(
        "hash",
        u32(NFTA_HASH_SREG, scratch),
        u32(NFTA_HASH_DREG, into),
        u32(NFTA_HASH_LEN, length),
        u32(NFTA_HASH_MODULUS, part.modulus),
        u32(NFTA_HASH_SEED, part.seed),
        u32(NFTA_HASH_TYPE, NFT_HASH_JENKINS),
    )


def payload(into: int, base: int, offset: int, length: int) -> bytes:
    """Loads bytes of the packet, counted from a header (NFT_PAYLOAD_*), into a register."""
    return expression(
        "payload",
        u32(NFTA_PAYLOAD_DREG, into),
        u32(NFTA_PAYLOAD_BASE, base),
        u32(NFTA_PAYLOAD_OFFSET, offset),
        u32(NFTA_PAYLOAD_LEN, length),
    )


def _original(into: int, key: int) -> bytes:
    return expression(
        "ct",
        u32(NFTA_CT_DREG, into),
        u32(NFTA_CT_KEY, key),
        attribute(NFTA_CT_DIRECTION, _ORIGINAL),
    )


def _comment(words: str) -> bytes:
    """User data: type, length, text (libnftnl's udata.h)."""
    payload = words.encode() + b"\0"
    return bytes((NFTNL_UDATA_RULE_COMMENT, len(payload))) + payload
