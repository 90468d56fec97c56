"""Trace messages of nf_tables, and the rule that asks for them.

For a packet with the trace bit (`meta nftrace set 1`) the kernel sends a message for each rule that
matches it and for each policy that decides about it, in all tables, to the group NFNLGRP_NFTRACE.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from rules.language import Source
from rules.netlink.attributes import attribute, fields, integer, nest, string, text, u32
from rules.netlink.expressions import bitwise, compare, expression, meta, offset_of, payload
from rules.netlink.messages import NFGENMSG
from rules.netlink.nftables import (
    NF_ACCEPT,
    NF_DROP,
    NFNL_SUBSYS_NFTABLES,
    NFPROTO,
    NFPROTO_NAMES,
    NFT_CMP_EQ,
    NFT_META_L4PROTO,
    NFT_META_NFTRACE,
    NFT_MSG_TRACE,
    NFT_PAYLOAD_NETWORK_HEADER,
    NFT_PAYLOAD_TRANSPORT_HEADER,
    NFT_REG_1,
    NFTA_DATA_VALUE,
    NFTA_IMMEDIATE_DATA,
    NFTA_IMMEDIATE_DREG,
    NFTA_LIMIT_BURST,
    NFTA_LIMIT_RATE,
    NFTA_LIMIT_UNIT,
    NFTA_META_KEY,
    NFTA_META_SREG,
    NFTA_RULE_CHAIN,
    NFTA_RULE_EXPRESSIONS,
    NFTA_RULE_TABLE,
    NFTA_TRACE_CHAIN,
    NFTA_TRACE_ID,
    NFTA_TRACE_IIF,
    NFTA_TRACE_NETWORK_HEADER,
    NFTA_TRACE_NFPROTO,
    NFTA_TRACE_OIF,
    NFTA_TRACE_POLICY,
    NFTA_TRACE_RULE_HANDLE,
    NFTA_TRACE_TABLE,
    NFTA_TRACE_TRANSPORT_HEADER,
    NFTA_TRACE_TYPE,
    NFTA_TRACE_VERDICT,
)
from rules.netlink.rule_text import verdict_text
from rules.objects import TCP, Address

RULE, RETURN, POLICY = "rule", "return", "policy"
_TYPES = {1: POLICY, 2: RETURN, 3: RULE}  # enum nft_trace_types
_POLICIES = {NF_DROP: "drop", NF_ACCEPT: "accept"}
PACKETS_A_SECOND = 100
"""So many packets are traced at most; a UDP client may send very many."""


class TraceMessage(NamedTuple):
    """One step of a packet.

    `packet` is the same for all messages of one packet. `type` is RULE, RETURN (of a chain) or
    POLICY. `family` is that of the table, as nft names it. `verdict` is in nft's words. The headers
    are empty but in the first message of each base chain. `iif` and `oif` are indexes, 0 for none.
    """

    packet: int
    type: str
    family: str
    table: str
    chain: str
    handle: int
    verdict: str
    ip_version: int
    network_header: bytes
    transport_header: bytes
    iif: int
    oif: int


def decode_trace(kind: int, content: bytes) -> TraceMessage | None:
    """A message from the group NFNLGRP_NFTRACE; None if it is of another type. Raises Malformed."""
    if kind != NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_TRACE or len(content) < NFGENMSG.size:
        return None
    found = fields(content[NFGENMSG.size :])
    type_ = _TYPES.get(integer(found[NFTA_TRACE_TYPE]), RULE)
    handle = integer(found.get(NFTA_TRACE_RULE_HANDLE, b""))
    if type_ == RULE and not handle:  # so Linux 6.18 reports the end of a chain
        type_ = RETURN
    if type_ == POLICY:
        verdict = _POLICIES.get(integer(found.get(NFTA_TRACE_POLICY, b"")), "")
    else:
        verdict = verdict_text(found.get(NFTA_TRACE_VERDICT, b""))
    return TraceMessage(
        integer(found[NFTA_TRACE_ID]),
        type_,
        NFPROTO_NAMES.get(content[0], str(content[0])),
        text(found.get(NFTA_TRACE_TABLE, b"")),
        text(found.get(NFTA_TRACE_CHAIN, b"")),
        handle,
        verdict,
        6 if integer(found.get(NFTA_TRACE_NFPROTO, b"")) == NFPROTO[6] else 4,
        found.get(NFTA_TRACE_NETWORK_HEADER, b""),
        found.get(NFTA_TRACE_TRANSPORT_HEADER, b""),
        integer(found.get(NFTA_TRACE_IIF, b"")),
        integer(found.get(NFTA_TRACE_OIF, b"")),
    )


class TraceFilter(NamedTuple):
    """Which packets are traced: those to an address, protocol and port, from a source if it is
    given. Of TCP only those that open a connection."""

    family: int
    destination: Address
    protocol: int
    port: int
    source: Address | None = None


_SYN_ACK, _SYN = b"\x12", b"\x02"
_FLAGS_OFFSET = 13  # of the flags in a TCP header


def trace_rule(table: str, chain: str, wanted: TraceFilter) -> bytes:
    """The body of a rule that sets the trace bit of these packets, of PACKETS_A_SECOND at most."""
    tests = [meta(NFT_META_L4PROTO), compare(NFT_CMP_EQ, bytes((wanted.protocol,)))]
    for source, address in ((Source.DADDR, wanted.destination), (Source.SADDR, wanted.source)):
        if address is not None:
            offset = offset_of(wanted.family, source)
            tests += [
                payload(NFT_REG_1, NFT_PAYLOAD_NETWORK_HEADER, offset, len(address)),
                compare(NFT_CMP_EQ, address),
            ]
    tests += [
        payload(NFT_REG_1, NFT_PAYLOAD_TRANSPORT_HEADER, 2, 2),
        compare(NFT_CMP_EQ, wanted.port.to_bytes(2, "big")),
    ]
    if wanted.protocol == TCP:
        tests += [
            payload(NFT_REG_1, NFT_PAYLOAD_TRANSPORT_HEADER, _FLAGS_OFFSET, 1),
            bitwise(_SYN_ACK, bytes(1)),
            compare(NFT_CMP_EQ, _SYN),
        ]
    limit = expression(
        "limit",
        attribute(NFTA_LIMIT_RATE, struct.pack("!Q", PACKETS_A_SECOND)),
        attribute(NFTA_LIMIT_UNIT, struct.pack("!Q", 1)),
        u32(NFTA_LIMIT_BURST, PACKETS_A_SECOND),
    )
    on = nest(NFTA_IMMEDIATE_DATA, attribute(NFTA_DATA_VALUE, b"\x01"))
    bit = (
        expression("immediate", u32(NFTA_IMMEDIATE_DREG, NFT_REG_1), on),
        expression("meta", u32(NFTA_META_KEY, NFT_META_NFTRACE), u32(NFTA_META_SREG, NFT_REG_1)),
    )
    head = string(NFTA_RULE_TABLE, table) + string(NFTA_RULE_CHAIN, chain)
    return head + nest(NFTA_RULE_EXPRESSIONS, *tests, limit, *bit)
