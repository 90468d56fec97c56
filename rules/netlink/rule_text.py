"""Rules of any table as text, from the expressions that the kernel lists.

Our own rules look as `rules.text` writes them. Other programs' rules are written in nft's language
as far as their expressions are known; an unknown expression is its name in brackets. The text is
for recognizing a rule, not for loading it.

This is not the inverse of `rules.netlink.expressions`, and no table could serve both. That module
writes our statements, each into a fixed series of expressions. This one meets any series, follows
what each register holds, and knows keys that we never write. What they have in common are the
kernel's constants.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Mapping
from ipaddress import ip_address
from typing import NamedTuple

from rules.netlink.attributes import Fields, attributes, fields, integer, text
from rules.netlink.expressions import NFTNL_UDATA_RULE_COMMENT
from rules.netlink.nftables import (
    ICMP_PORT_UNREACH,
    ICMPV6_PORT_UNREACH,
    NF_ACCEPT,
    NF_DROP,
    NF_NAT_RANGE_PROTO_RANDOM_FULLY,
    NF_QUEUE,
    NFT_BREAK,
    NFT_CMP_EQ,
    NFT_CONTINUE,
    NFT_CT_DIRECTION,
    NFT_CT_DST_IP,
    NFT_CT_DST_IP6,
    NFT_CT_MARK,
    NFT_CT_PROTO_DST,
    NFT_CT_STATE,
    NFT_CT_STATUS,
    NFT_GOTO,
    NFT_JUMP,
    NFT_LOOKUP_F_INV,
    NFT_META_IIF,
    NFT_META_IIFNAME,
    NFT_META_L4PROTO,
    NFT_META_MARK,
    NFT_META_NFPROTO,
    NFT_META_OIF,
    NFT_META_OIFNAME,
    NFT_NAT_DNAT,
    NFT_PAYLOAD_NETWORK_HEADER,
    NFT_PAYLOAD_TRANSPORT_HEADER,
    NFT_REG32_00,
    NFT_REG_1,
    NFT_REG_VERDICT,
    NFT_REJECT_TCP_RST,
    NFT_RETURN,
    NFTA_BITWISE_DREG,
    NFTA_BITWISE_MASK,
    NFTA_BITWISE_SREG,
    NFTA_BITWISE_XOR,
    NFTA_CMP_DATA,
    NFTA_CMP_OP,
    NFTA_CMP_SREG,
    NFTA_CT_DREG,
    NFTA_CT_KEY,
    NFTA_DATA_VALUE,
    NFTA_DATA_VERDICT,
    NFTA_DYNSET_SET_NAME,
    NFTA_DYNSET_SREG_DATA,
    NFTA_DYNSET_SREG_KEY,
    NFTA_DYNSET_TIMEOUT,
    NFTA_EXPR_DATA,
    NFTA_EXPR_NAME,
    NFTA_FIB_DREG,
    NFTA_HASH_DREG,
    NFTA_HASH_MODULUS,
    NFTA_HASH_SEED,
    NFTA_HASH_SREG,
    NFTA_IMMEDIATE_DATA,
    NFTA_IMMEDIATE_DREG,
    NFTA_LIST_ELEM,
    NFTA_LOOKUP_DREG,
    NFTA_LOOKUP_FLAGS,
    NFTA_LOOKUP_SET,
    NFTA_LOOKUP_SREG,
    NFTA_MASQ_FLAGS,
    NFTA_MATCH_NAME,
    NFTA_META_DREG,
    NFTA_META_KEY,
    NFTA_META_SREG,
    NFTA_NAT_REG_ADDR_MIN,
    NFTA_NAT_TYPE,
    NFTA_NG_DREG,
    NFTA_NG_MODULUS,
    NFTA_NG_OFFSET,
    NFTA_PAYLOAD_BASE,
    NFTA_PAYLOAD_DREG,
    NFTA_PAYLOAD_LEN,
    NFTA_PAYLOAD_OFFSET,
    NFTA_REJECT_ICMP_CODE,
    NFTA_REJECT_TYPE,
    NFTA_RULE_EXPRESSIONS,
    NFTA_RULE_USERDATA,
    NFTA_TARGET_NAME,
    NFTA_VERDICT_CHAIN,
    NFTA_VERDICT_CODE,
    RTN_LOCAL,
)
from rules.objects import PROTOCOL_NAMES

_PORT_UNREACHABLE = (ICMP_PORT_UNREACH, ICMPV6_PORT_UNREACH)
_META = {
    NFT_META_MARK: "meta mark",
    NFT_META_IIF: "iif",
    NFT_META_OIF: "oif",
    NFT_META_IIFNAME: "iifname",
    NFT_META_OIFNAME: "oifname",
    NFT_META_NFPROTO: "meta nfproto",
    NFT_META_L4PROTO: "meta l4proto",
}
_CT = {
    NFT_CT_STATE: "ct state",
    NFT_CT_DIRECTION: "ct direction",
    NFT_CT_STATUS: "ct status",
    NFT_CT_MARK: "ct mark",
    NFT_CT_PROTO_DST: "ct original proto-dst",
    NFT_CT_DST_IP: "ct original ip daddr",
    NFT_CT_DST_IP6: "ct original ip6 daddr",
}
_BITS = {
    "ct state": {1: "invalid", 2: "established", 4: "related", 8: "new", 64: "untracked"},
    "ct status": {0x4: "assured", 0x8: "confirmed", 0x10: "snat", 0x20: "dnat"},
}
_PAYLOAD = {
    (NFT_PAYLOAD_NETWORK_HEADER, 9, 1): "ip protocol",
    (NFT_PAYLOAD_NETWORK_HEADER, 12, 4): "ip saddr",
    (NFT_PAYLOAD_NETWORK_HEADER, 16, 4): "ip daddr",
    (NFT_PAYLOAD_NETWORK_HEADER, 8, 16): "ip6 saddr",
    (NFT_PAYLOAD_NETWORK_HEADER, 24, 16): "ip6 daddr",
    (NFT_PAYLOAD_TRANSPORT_HEADER, 0, 2): "th sport",
    (NFT_PAYLOAD_TRANSPORT_HEADER, 2, 2): "th dport",
}
_VERDICTS = {NF_DROP: "drop", NF_ACCEPT: "accept", NFT_RETURN: "return"}
_RTN_LOCAL = struct.pack("=I", RTN_LOCAL)


def verdict_text(data: bytes) -> str:
    """A verdict (the content of NFTA_DATA_VERDICT): drop, goto CHAIN, continue ..."""
    found = fields(data)
    (code,) = struct.unpack("!i", found[NFTA_VERDICT_CODE][:4].rjust(4, b"\0"))
    if code in (NFT_JUMP, NFT_GOTO):
        verb = "jump" if code == NFT_JUMP else "goto"
        return f"{verb} {text(found.get(NFTA_VERDICT_CHAIN, b''))}"
    if code in (NFT_CONTINUE, NFT_BREAK):
        return "continue"
    if code & 0xFF == NF_QUEUE:
        return "queue"
    return _VERDICTS.get(code, f"verdict {code}")


def rule_text(rule: Fields) -> str:
    """A rule in one line, from the attributes of an NFT_MSG_NEWRULE message. Raises Malformed."""
    reader = _Reader()
    for kind, payload in attributes(rule.get(NFTA_RULE_EXPRESSIONS, b"")):
        if kind == NFTA_LIST_ELEM:
            expression = fields(payload)
            name = text(expression[NFTA_EXPR_NAME])
            reader.read(name, fields(expression.get(NFTA_EXPR_DATA, b"")))
    comment = _comment(rule.get(NFTA_RULE_USERDATA, b""))
    return " ".join([*reader.words, *([f'comment "{comment}"'] if comment else [])])


def _comment(userdata: bytes) -> str:
    """The comment in a rule's user data: entries of type, length, value (libnftnl's udata.h)."""
    while len(userdata) >= 2:
        kind, length = userdata[0], userdata[1]
        if kind == NFTNL_UDATA_RULE_COMMENT:
            return text(userdata[2 : 2 + length])
        userdata = userdata[2 + length :]
    return ""


class _Value(NamedTuple):
    """What a register holds, and what has been done to it."""

    text: str
    mask: int | None = None
    xor: int = 0


class _Reader:
    """Reads expressions in order; `words` are the statements so far.

    Registers are known by their 4-byte unit.
    """

    def __init__(self) -> None:
        self.words: list[str] = []
        self._registers: dict[int, _Value] = {}
        self._known: Mapping[str, Callable[[Fields], None]] = {
            "payload": self._payload,
            "meta": self._meta,
            "ct": self._ct,
            "fib": self._fib,
            "numgen": self._numgen,
            "hash": self._hash,
            "bitwise": self._bitwise,
            "cmp": self._cmp,
            "lookup": self._lookup,
            "immediate": self._immediate,
            "nat": self._nat,
            "masq": self._masq,
            "reject": self._reject,
            "dynset": self._dynset,
            "match": lambda data: self._say(f'xt match "{text(data.get(NFTA_MATCH_NAME, b""))}"'),
            "target": lambda data: self._say(
                f'xt target "{text(data.get(NFTA_TARGET_NAME, b""))}"'
            ),
            "counter": lambda _: self._add("counter"),
        }

    def read(self, name: str, data: Fields) -> None:
        """Reads the next expression."""
        known = self._known.get(name)
        if known:
            known(data)
        else:
            self._add(f"[{name}]")

    # registers

    def _put(self, register: bytes, value: _Value) -> None:
        self._registers[_unit(register)] = value

    def _concat(self, register: bytes, end: bytes = b"") -> str:
        """What the registers from one on hold, up to `end` if it is given."""
        first, last = _unit(register), _unit(end) if end else 1 << 16
        return " . ".join(
            value.text for unit, value in sorted(self._registers.items()) if first <= unit < last
        )

    def _say(self, words: str) -> None:
        """A statement that is complete."""
        self.words.append(words)
        self._registers.clear()

    def _add(self, words: str) -> None:
        """A statement that uses no register."""
        self.words.append(words)

    # expressions that load

    def _payload(self, data: Fields) -> None:
        where = tuple(
            integer(data.get(kind, b""))
            for kind in (NFTA_PAYLOAD_BASE, NFTA_PAYLOAD_OFFSET, NFTA_PAYLOAD_LEN)
        )
        if NFTA_PAYLOAD_DREG not in data:
            self._say("[payload]")
            return
        name = _PAYLOAD.get((where[0], where[1], where[2]), "@{},{},{}".format(*where))
        self._put(data[NFTA_PAYLOAD_DREG], _Value(name))

    def _meta(self, data: Fields) -> None:
        key = integer(data[NFTA_META_KEY])
        name = _META.get(key, f"meta {key}")
        if NFTA_META_DREG in data:
            self._put(data[NFTA_META_DREG], _Value(name))
            return
        value = self._registers.get(_unit(data[NFTA_META_SREG]), _Value("?"))
        if value.mask is None:
            self._say(f"{name} set {value.text}")
        elif value.xor:
            self._say(f"{name} set {value.text} | {value.xor:#010x}")
        else:
            self._say(f"{name} set {value.text} & {value.mask:#010x}")

    def _ct(self, data: Fields) -> None:
        key = integer(data[NFTA_CT_KEY])
        name = _CT.get(key, f"ct {key}")
        if NFTA_CT_DREG in data:
            self._put(data[NFTA_CT_DREG], _Value(name))
        else:
            self._say(f"{name} set")

    def _fib(self, data: Fields) -> None:
        self._put(data[NFTA_FIB_DREG], _Value("fib saddr type"))

    def _numgen(self, data: Fields) -> None:
        offset = integer(data.get(NFTA_NG_OFFSET, b""))
        words = f"numgen random mod {integer(data[NFTA_NG_MODULUS])}"
        self._put(data[NFTA_NG_DREG], _Value(words + (f" offset {offset}" if offset else "")))

    def _hash(self, data: Fields) -> None:
        source = self._registers.pop(_unit(data[NFTA_HASH_SREG]), _Value("?"))
        words = f"jhash {source.text} mod {integer(data[NFTA_HASH_MODULUS])}"
        seed = integer(data.get(NFTA_HASH_SEED, b""))
        self._put(data[NFTA_HASH_DREG], _Value(f"{words} seed {seed:#x}"))

    def _bitwise(self, data: Fields) -> None:
        source = self._registers.get(_unit(data[NFTA_BITWISE_SREG]), _Value("?"))
        mask, xor = (
            int.from_bytes(_value(data.get(kind, b"")), sys.byteorder)
            for kind in (NFTA_BITWISE_MASK, NFTA_BITWISE_XOR)
        )
        self._put(data[NFTA_BITWISE_DREG], _Value(source.text, mask, xor))

    # expressions that decide or do something

    def _cmp(self, data: Fields) -> None:
        left = self._registers.get(_unit(data[NFTA_CMP_SREG]), _Value("?"))
        equal = integer(data[NFTA_CMP_OP]) == NFT_CMP_EQ
        right = _value(data[NFTA_CMP_DATA])
        if left.mask is None:
            self._say(f"{left.text} {'' if equal else '!= '}{_constant(left.text, right)}")
            return
        names = _BITS.get(left.text, {})
        bits = ",".join(name for bit, name in names.items() if left.mask & bit)
        if bits and not any(right):
            self._say(f"{left.text} {'! ' if equal else ''}{bits}")
        else:
            number = int.from_bytes(right, sys.byteorder)
            self._say(f"{left.text} & {left.mask:#010x} {'==' if equal else '!='} {number}")

    def _lookup(self, data: Fields) -> None:
        name = text(data[NFTA_LOOKUP_SET])
        key = self._concat(data[NFTA_LOOKUP_SREG])
        if NFTA_LOOKUP_DREG not in data:
            inverted = integer(data.get(NFTA_LOOKUP_FLAGS, b"")) & NFT_LOOKUP_F_INV
            self._say(f"{key} {'!= ' if inverted else ''}@{name}")
        elif integer(data[NFTA_LOOKUP_DREG]) == NFT_REG_VERDICT:
            self._say(f"{key} vmap @{name}")
        else:
            self._registers.clear()
            self._put(data[NFTA_LOOKUP_DREG], _Value(f"{key} map @{name}"))

    def _immediate(self, data: Fields) -> None:
        value = fields(data[NFTA_IMMEDIATE_DATA])
        if NFTA_DATA_VERDICT in value:
            self._say(verdict_text(value[NFTA_DATA_VERDICT]))
        else:
            content = value.get(NFTA_DATA_VALUE, b"")
            words = str(ip_address(content)) if len(content) in (4, 16) else f"0x{content.hex()}"
            self._put(data[NFTA_IMMEDIATE_DREG], _Value(words))

    def _nat(self, data: Fields) -> None:
        kind = "dnat" if integer(data[NFTA_NAT_TYPE]) == NFT_NAT_DNAT else "snat"
        to = self._concat(data[NFTA_NAT_REG_ADDR_MIN]) if NFTA_NAT_REG_ADDR_MIN in data else ""
        self._say(f"{kind} to {to}".rstrip())

    def _masq(self, data: Fields) -> None:
        random = integer(data.get(NFTA_MASQ_FLAGS, b"")) & NF_NAT_RANGE_PROTO_RANDOM_FULLY
        self._say("masquerade fully-random" if random else "masquerade")

    def _reject(self, data: Fields) -> None:
        if integer(data[NFTA_REJECT_TYPE]) == NFT_REJECT_TCP_RST:
            self._say("reject with tcp reset")
            return
        code = integer(data.get(NFTA_REJECT_ICMP_CODE, b""))
        self._say("reject" if code in _PORT_UNREACHABLE else f"reject with icmp {code}")

    def _dynset(self, data: Fields) -> None:
        with_data = data.get(NFTA_DYNSET_SREG_DATA, b"")
        key = self._concat(data[NFTA_DYNSET_SREG_KEY], with_data)
        value = f" : {self._concat(with_data)}" if with_data else ""
        seconds = integer(data.get(NFTA_DYNSET_TIMEOUT, b"")) // 1000
        timeout = f" timeout {seconds}s" if seconds else ""
        self._say(f"update @{text(data[NFTA_DYNSET_SET_NAME])} {{ {key}{timeout}{value} }}")


def _unit(register: bytes) -> int:
    number = integer(register)
    return number - NFT_REG32_00 if number >= NFT_REG32_00 else (number - NFT_REG_1) * 4


def _value(nested: bytes) -> bytes:
    return fields(nested).get(NFTA_DATA_VALUE, b"")


def _constant(name: str, content: bytes) -> str:
    """A constant as it is written beside what it is compared with."""
    if name.endswith("addr") and len(content) in (4, 16):
        return str(ip_address(content))
    if name in ("meta l4proto", "ip protocol") and content:
        return PROTOCOL_NAMES.get(content[0], str(content[0]))
    if name in ("iifname", "oifname"):
        plain = content.rstrip(b"\0").decode(errors="replace")
        return f'"{plain}{"" if content.endswith(bytes(1)) else "*"}"'
    if name == "fib saddr type" and content == _RTN_LOCAL:
        return "local"
    if name.startswith("th "):
        return str(integer(content))
    return f"0x{content.hex()}"
