"""Tables, elements and changes as nf_tables netlink messages, and back.

A transaction is a batch: a begin message, any number of messages, an end message, in one buffer.
The kernel applies all of it or nothing. Constants and layouts are those of
include/uapi/linux/netfilter/nf_tables.h; numbers in attributes are in network order, message
headers in host order, and what a rule compares or draws itself (marks, slots, connection states)
in host order.

Two parts are written for speed because whole clusters pass through them: elements are packed from
templates, of which only key and data change, and read back by fixed strides. The rest is written
to be read.

Sets carry user data that tells `nft list` how to print them. It is byte for byte what nft 1.0.6
writes: newer versions write more (types inside concatenations), on which 1.0.6 crashes when it
lists a dynamic map (SIGSEGV; kubernetes issue 136786 is of the same kind).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache

from rules.language import (
    Chain,
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
    Remember,
    Rule,
    Set,
    Source,
    Statement,
    Status,
    Translate,
    Unmark,
)
from rules.text import Element, Key, Value

NESTED = 0x8000
TYPE_MASK = 0x3FFF

NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP, NLM_F_CREATE, NLM_F_APPEND = 1, 4, 0x300, 0x400, 0x800
SUBSYSTEM = 10  # NFNL_SUBSYS_NFTABLES
BATCH_BEGIN, BATCH_END = 0x10, 0x11
NLMSG_ERROR, NLMSG_DONE, NLMSG_OVERRUN = 2, 3, 4

NEWTABLE, GETTABLE, DELTABLE = 0, 1, 2
NEWCHAIN, GETCHAIN, DELCHAIN = 3, 4, 5
NEWRULE, GETRULE, DELRULE = 6, 7, 8
NEWSET, GETSET, DELSET = 9, 10, 11
NEWSETELEM, GETSETELEM, DELSETELEM = 12, 13, 14
NEWGEN, GETGEN = 15, 16

FAMILY_NUMBER = {4: 2, 6: 10}  # NFPROTO_IPV4, NFPROTO_IPV6
FAMILY_OF_NUMBER = {number: family for family, number in FAMILY_NUMBER.items()}

TABLE_OWNER, TABLE_PERSIST = 2, 4
SET_INTERVAL, SET_MAP, SET_TIMEOUT, SET_EVAL, SET_CONCAT = 4, 8, 0x10, 0x20, 0x80
INTERVAL_END = 1
VERDICT_TYPE = 0xFFFFFF00
JUMP, GOTO, RETURN, DROP = -3, -4, -5, 0

HEADER = struct.Struct("=IHHII")
ATTRIBUTE = struct.Struct("=HH")


# --- attributes ---------------------------------------------------------------------------------


def attribute(kind: int, payload: bytes) -> bytes:
    """One attribute, padded to 4 bytes."""
    return ATTRIBUTE.pack(len(payload) + 4, kind) + payload + bytes(-len(payload) % 4)


def nest(kind: int, *attributes: bytes) -> bytes:
    """An attribute that holds attributes."""
    return attribute(kind | NESTED, b"".join(attributes))


def number(kind: int, value: int) -> bytes:
    """A 32-bit number in network order."""
    return attribute(kind, struct.pack("!I", value & 0xFFFFFFFF))


def string(kind: int, text: str) -> bytes:
    """A string with its terminating zero."""
    return attribute(kind, text.encode() + b"\0")


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The attributes of a message body or a nest: type without flags, payload."""
    position, end = 0, len(data)
    while position + 4 <= end:
        length, kind = ATTRIBUTE.unpack_from(data, position)
        if length < 4:
            return
        yield kind & TYPE_MASK, data[position + 4 : position + length]
        position += (length + 3) & ~3


def text(payload: bytes) -> str:
    """A string attribute's text."""
    return payload.rstrip(b"\0").decode(errors="replace")


# --- messages -----------------------------------------------------------------------------------


def message(kind: int, family: int, body: bytes, flags: int = 0, sequence: int = 0) -> bytes:
    """One nf_tables message. `family` is 4, 6 or 0 for any."""
    length = 20 + len(body)
    head = HEADER.pack(length, SUBSYSTEM << 8 | kind, NLM_F_REQUEST | flags, sequence, 0)
    return head + struct.pack("=BBH", FAMILY_NUMBER.get(family, 0), 0, 0) + body


class Batch:
    """A transaction being put together.

    Every message has a sequence number by which the kernel names it in an error; `subject` tells
    what it was about.
    """

    def __init__(self) -> None:
        self._messages: list[bytes] = []
        self._subjects: list[str] = []

    def __len__(self) -> int:
        return len(self._messages)

    def add(self, kind: int, family: int, body: bytes, flags: int, subject: str) -> None:
        """Appends a message."""
        sequence = len(self._messages) + 1
        self._messages.append(message(kind, family, body, flags, sequence))
        self._subjects.append(subject)

    def subject(self, sequence: int) -> str:
        """What the message with this sequence number was about."""
        if 1 <= sequence <= len(self._subjects):
            return self._subjects[sequence - 1]
        return "the transaction"

    def encode(self, generation: int | None = None) -> bytes:
        """The whole batch. With a `generation` it fails if the ruleset has moved on since."""
        genid = number(1, generation) if generation is not None else b""
        last = len(self._messages) + 1
        begin = _batch_message(BATCH_BEGIN, 0, 0, genid)
        return b"".join((begin, *self._messages, _batch_message(BATCH_END, NLM_F_ACK, last)))

    @property
    def end_sequence(self) -> int:
        """The sequence number that the kernel acknowledges a transaction by."""
        return len(self._messages) + 1

    # tables, chains, sets

    def new_table(self, family: int, name: str, flags: int) -> None:
        """Creates a table, or takes over an orphaned one that has the same flags."""
        body = string(1, name) + number(2, flags)
        self.add(NEWTABLE, family, body, NLM_F_CREATE, f"table {name}")

    def delete_table(self, family: int, name: str) -> None:
        """Deletes a table with all it holds."""
        self.add(DELTABLE, family, string(1, name), 0, f"table {name}")

    def new_set(self, table: str, described: Set, count: int = 0) -> None:
        """Creates a set or map that is to hold `count` elements at once."""
        body = set_body(table, described, count) + number(10, len(self._messages) + 1)
        self.add(NEWSET, described.family, body, NLM_F_CREATE, f"set {described.name}")

    def delete_set(self, family: int, table: str, name: str) -> None:
        """Deletes a set that no rule uses any more."""
        self.add(DELSET, family, string(1, table) + string(2, name), 0, f"set {name}")

    def new_chain(self, family: int, table: str, chain: Chain) -> None:
        """Creates a chain, without its rules."""
        self.add(NEWCHAIN, family, chain_body(table, chain), NLM_F_CREATE, f"chain {chain.name}")

    def delete_chain(self, family: int, table: str, name: str) -> None:
        """Deletes a chain that nothing leads to any more."""
        self.add(DELCHAIN, family, string(1, table) + string(3, name), 0, f"chain {name}")

    def delete_rules(self, family: int, table: str, chain: str) -> None:
        """Empties a chain."""
        body = string(1, table) + string(2, chain)
        self.add(DELRULE, family, body, 0, f"rules of chain {chain}")

    def new_rules(self, family: int, table: str, chain: Chain) -> None:
        """Appends a chain's rules."""
        for index, described in enumerate(chain.rules):
            body = rule_body(table, chain.name, described, family)
            self.add(
                NEWRULE, family, body, NLM_F_CREATE | NLM_F_APPEND,
                f"rule {index + 1} of chain {chain.name}",
            )  # fmt: skip

    # elements

    def add_elements(self, table: str, owner: Set, elements: Iterable[Element]) -> None:
        """Adds elements. One that is there with the same data is no error."""
        self._elements(NEWSETELEM, NLM_F_CREATE, table, owner, encode_elements(owner, elements))

    def delete_elements(self, table: str, owner: Set, elements: Iterable[Element]) -> None:
        """Deletes elements by their keys. One that is not there fails the transaction."""
        self._elements(DELSETELEM, 0, table, owner, encode_keys(owner, elements))

    def _elements(
        self, kind: int, flags: int, table: str, owner: Set, encoded: list[bytes]
    ) -> None:
        head = string(1, table) + string(2, owner.name)
        step = max(1, _MAX_NEST // max(map(len, encoded), default=1))
        for start in range(0, len(encoded), step):
            body = head + nest(3, *encoded[start : start + step])
            self.add(kind, owner.family, body, flags, f"elements of {owner.name}")


_MAX_NEST = 60_000  # an attribute's length is a 16-bit number


def _batch_message(kind: int, flags: int, sequence: int, body: bytes = b"") -> bytes:
    head = HEADER.pack(20 + len(body), kind, NLM_F_REQUEST | flags, sequence, 0)
    return head + struct.pack("!BBH", 0, 0, SUBSYSTEM) + body


def chain_body(table: str, chain: Chain) -> bytes:
    """Everything that defines a chain but its rules. The policy of a base chain is accept."""
    body = string(1, table) + string(3, chain.name)
    if chain.base is None:
        return body
    hook = nest(4, number(1, chain.base.hook.value[1]), number(2, chain.base.priority))
    return body + hook + number(5, 1) + string(7, chain.base.type)


# --- sets ---------------------------------------------------------------------------------------


def set_flags(described: Set) -> int:
    """NFT_SET_* flags."""
    flags = 0
    if described.interval:
        flags |= SET_INTERVAL | (SET_CONCAT if len(described.key) > 1 else 0)
    if described.is_map:
        flags |= SET_MAP
    if described.dynamic:
        flags |= SET_TIMEOUT | SET_EVAL
    return flags


def set_body(table: str, described: Set, count: int = 0) -> bytes:
    """Everything that defines a set but its id; `count` elements will be in it at once."""
    body = string(1, table) + string(2, described.name)
    if set_flags(described):
        body += number(3, set_flags(described))
    body += number(4, key_type(described.key)) + number(5, described.key_length)
    if described.verdicts:
        body += number(6, VERDICT_TYPE) + number(7, 16)
    elif described.data:
        body += number(6, key_type(described.data)) + number(7, described.data_length)
    if size := described.room(count):
        body += nest(9, number(1, size))
    elif described.interval and len(described.key) > 1:
        body += nest(9, nest(2, *(nest(1, number(1, f.length)) for f in described.key)))
    return body + attribute(13, user_data(described))


def key_type(fields: Concat) -> int:
    """nft's number for a (concatenated) type: 6 bits a field."""
    value = 0
    for part in fields:
        value = value << 6 | part.type.number
    return value


def _tlv(kind: int, payload: bytes) -> bytes:
    return bytes((kind, len(payload))) + payload


def _host(kind: int, value: int) -> bytes:
    return _tlv(kind, struct.pack("=I", value))


# expression and description numbers of libnftables (enum expr_types, enum proto_desc_id)
_CONCAT, _PAYLOAD, _META, _NUMGEN = 13, 7, 9, 23
_DESCRIPTION = {4: 12, 6: 13}
_TRANSPORT = 11
_DADDR_TYPE = {4: 12, 6: 9}


def user_data(described: Set) -> bytes:
    """What nft 1.0.6 would have noted about the set (enum nftnl_udata_set_types)."""
    concatenated = len(described.key) > 1
    network_order = 2
    data = _host(0, 0 if concatenated else network_order)
    if described.is_map:
        data += _host(1, 0)
    if concatenated:
        data += _tlv(3, _typeof(described.key if described.typeof else ()))
    if described.is_map:
        if described.data:
            data += _tlv(4, _typeof(described.data if described.typeof else ()))
        data += _host(6, 0)
    if described.comment:
        data += _tlv(7, described.comment.encode() + b"\0")
    return data


def _typeof(fields: Concat) -> bytes:
    parts = b"".join(_tlv(index, _field_type(f)) for index, f in enumerate(fields))
    return _host(0, _CONCAT) + _tlv(1, parts)


def _field_type(described: Field) -> bytes:
    match described.source:
        case Source.DADDR:
            expression, family = _PAYLOAD, described.family
            inner = _host(0, _DESCRIPTION[family]) + _host(1, _DADDR_TYPE[family])
        case Source.DPORT:
            expression, inner = _PAYLOAD, _host(0, _TRANSPORT) + _host(1, 2)
        case Source.PROTOCOL:
            expression, inner = _META, _host(0, _META_KEY[Source.PROTOCOL])
        case Source.RANDOM:
            inner = _host(0, 1) + _host(1, described.modulus) + _host(2, described.offset)
            expression = _NUMGEN
        case _:
            raise ValueError(f"no set is keyed by {described.source} with typeof")
    return _host(0, expression) + _tlv(1, inner)


# --- rules --------------------------------------------------------------------------------------

_META_KEY = {Source.PROTOCOL: 16}
_META_MARK, _META_IIFNAME = 3, 6
_CT_STATE, _CT_STATUS, _CT_PROTO_DST = 0, 2, 12
_CT_DST_IP = {4: 20, 6: 22}
_NEW, _DNAT, _LOCAL = 0x8, 0x20, 2  # state bit, IPS_DST_NAT, RTN_LOCAL
_NETWORK, _TRANSPORT_HEADER = 1, 2
_OFFSET = {
    (4, Source.SADDR): 12,
    (4, Source.DADDR): 16,
    (6, Source.SADDR): 8,
    (6, Source.DADDR): 24,
}
_EQUAL, _UNEQUAL = 0, 1
_PORT_UNREACHABLE = {4: 3, 6: 4}


def register(unit: int) -> int:
    """The number of the register at 4-byte unit `unit`, as the kernel itself reports it."""
    return 8 + unit if unit % 4 else 1 + unit // 4


def rule_body(table: str, chain: str, described: Rule, family: int) -> bytes:
    """A rule: where it belongs, its expressions and its comment."""
    body = string(1, table) + string(2, chain) + _expressions(described.statements, family)
    if described.comment:
        body += attribute(7, _tlv(0, described.comment.encode() + b"\0"))
    return body


@lru_cache(maxsize=16)  # a chain jumps to its draw several times
def _expressions(statements: tuple[Statement, ...], family: int) -> bytes:
    return nest(4, *(e for s in statements for e in _statement(s, family)))


def _expression(name: str, *parts: bytes) -> bytes:
    return nest(1, string(1, name), nest(2, *parts))


def _statement(described: Statement, family: int) -> Iterator[bytes]:  # noqa: PLR0912
    match described:
        case Is(Status.NEW):
            yield from _has_bit(_CT_STATE, _NEW)
        case Is(Status.TRANSLATED):
            yield from _has_bit(_CT_STATUS, _DNAT)
        case Is(Status.UNTRANSLATED):
            yield from _has_bit(_CT_STATUS, _DNAT, _EQUAL)
        case Is(Status.FROM_HERE):
            yield _expression("fib", number(1, 1), number(2, 3), number(3, 1))
            yield _compare(_EQUAL, struct.pack("=I", _LOCAL))
        case IsProtocol(protocol):
            yield _meta(_META_KEY[Source.PROTOCOL], 1)
            yield _compare(_EQUAL, bytes((protocol,)))
        case In(fields, named, negated):
            yield from _load(fields)
            yield _lookup(named, number(5, 1) if negated else b"")
        case FromInterface(name, prefix):
            yield from _interface(_EQUAL, name, prefix)
        case NotFromInterface(name, prefix):
            yield from _interface(_UNEQUAL, name, prefix)
        case Marked(bits):
            yield _meta(_META_MARK, 1)
            yield _bitwise(bits, 0)
            yield _compare(_UNEQUAL, bytes(4))
        case Mark(bits):
            yield from _change_mark(bits ^ 0xFFFFFFFF, bits)
        case Unmark(bits):
            yield from _change_mark(bits ^ 0xFFFFFFFF, 0)
        case GoBy(fields, named):
            yield from _load(fields)
            yield _lookup(named, number(3, 0))
        case Translate(fields, named):
            yield from _load(fields)
            yield _lookup(named, number(3, 1))
            yield _dnat(named)
        case Remember():
            yield from _remember(described)
        case Jump(chain):
            yield _verdict(JUMP, chain)
        case Goto(chain):
            yield _verdict(GOTO, chain)
        case Final():
            yield _final(described, family)


def _final(described: Final, family: int) -> bytes:
    match described:
        case Final.DROP:
            return _verdict(DROP)
        case Final.RETURN:
            return _verdict(RETURN)
        case Final.MASQUERADE:
            return _expression("masq", number(1, 0x10))  # NF_NAT_RANGE_PROTO_RANDOM_FULLY
        case Final.RESET:
            return _expression("reject", number(1, 1))
        case Final.REJECT:
            code = attribute(2, bytes((_PORT_UNREACHABLE[family],)))
            return _expression("reject", number(1, 0), code)


def _has_bit(key: int, bit: int, compared_to_none: int = _UNEQUAL) -> Iterator[bytes]:
    yield _expression("ct", number(1, 1), number(2, key))
    yield _bitwise(bit, 0)
    yield _compare(compared_to_none, bytes(4))


def _interface(operation: int, name: str, prefix: bool) -> Iterator[bytes]:
    yield _meta(_META_IIFNAME, 1)
    encoded = name.encode()
    yield _compare(operation, encoded if prefix else encoded.ljust(16, b"\0"))


def _change_mark(mask: int, xor: int) -> Iterator[bytes]:
    yield _meta(_META_MARK, 1)
    yield _bitwise(mask, xor)
    yield _expression("meta", number(2, _META_MARK), number(3, 1))


def _meta(key: int, into: int) -> bytes:
    return _expression("meta", number(2, key), number(1, into))


def _compare(operation: int, data: bytes) -> bytes:
    return _expression("cmp", number(1, 1), number(2, operation), nest(3, attribute(1, data)))


def _bitwise(mask: int, xor: int) -> bytes:
    words = (attribute(1, struct.pack("=I", value)) for value in (mask, xor))
    return _expression(
        "bitwise", number(1, 1), number(2, 1), number(3, 4), *map(nest, (4, 5), words)
    )


def _verdict(code: int, chain: str = "") -> bytes:
    return _expression("immediate", number(1, 0), nest(2, verdict_data(code, chain)))


def verdict_data(code: int, chain: str = "") -> bytes:
    """A verdict as data."""
    return nest(2, number(1, code), string(2, chain) if chain else b"")


def _lookup(named: Set, *more: bytes) -> bytes:
    return _expression("lookup", string(1, named.name), number(2, 1), *more)


def _dnat(named: Set) -> bytes:
    address, family = named.data[0], FAMILY_NUMBER[named.family]
    port = register(address.padded // 4)
    return _expression("nat", number(1, 1), number(2, family), number(3, 1), number(5, port))


def _remember(described: Remember) -> Iterator[bytes]:
    yield from _load(described.key)
    behind = described.map.key_length // 4
    yield from _load(described.data, behind)
    milliseconds = attribute(6, struct.pack("!Q", described.seconds * 1000))
    update = number(3, 1)
    yield _expression(
        "dynset",
        string(1, described.map.name),
        update,
        number(4, 1),
        number(5, register(behind)),
        milliseconds,
    )


def _load(fields: Concat, unit: int = 0) -> Iterator[bytes]:
    for part in fields:
        yield _read(part, unit)
        unit += part.padded // 4


@cache
def _read(part: Field, unit: int) -> bytes:
    into = number(1, register(unit))
    match part.source:
        case Source.SADDR | Source.DADDR:
            offset = _OFFSET[part.family, part.source]
            return _payload(into, _NETWORK, offset, part.length)
        case Source.DPORT:
            return _payload(into, _TRANSPORT_HEADER, 2, 2)
        case Source.PROTOCOL:
            return _expression("meta", number(2, _META_KEY[part.source]), into)
        case Source.ORIGINAL_DADDR:
            return _original(into, _CT_DST_IP[part.family])
        case Source.ORIGINAL_DPORT:
            return _original(into, _CT_PROTO_DST)
        case Source.RANDOM:
            return _expression(
                "numgen", into, number(2, part.modulus), number(3, 1), number(4, part.offset)
            )


def _payload(into: bytes, base: int, offset: int, length: int) -> bytes:
    return _expression("payload", into, number(2, base), number(3, offset), number(4, length))


def _original(into: bytes, key: int) -> bytes:
    return _expression("ct", into, number(2, key), attribute(3, b"\0"))


# --- elements -----------------------------------------------------------------------------------


def encode_elements(owner: Set, elements: Iterable[Element]) -> list[bytes]:
    """Each element as a list attribute, ready to be joined."""
    if owner.interval:
        return [part for e in elements for part in _encode_range(owner, e)]
    length = owner.key_length
    if owner.verdicts:
        parts = _Verdicts(length)
        return [key.join(parts[value]) for key, value in elements if isinstance(value, str)]
    padding = bytes(-length % 4)
    if not owner.data:
        head = nest(1, nest(1, attribute(1, bytes(length))))[:12]
        return [head + key + padding for key, _ in elements]
    data = nest(2, attribute(1, bytes(owner.data_length)))
    empty = nest(1, nest(1, attribute(1, bytes(length))), data)
    head, middle = empty[:12], empty[12 + length : 20 + length]
    return [head + key + middle + value for key, value in elements if isinstance(value, bytes)]


class _Verdicts(dict[str, tuple[bytes, bytes]]):
    """By chain, what stands before and behind the key in an element that goes to the chain."""

    def __init__(self, key_length: int) -> None:
        super().__init__()
        self._length = key_length

    def __missing__(self, chain: str) -> tuple[bytes, bytes]:
        key = attribute(1, bytes(self._length))
        element = nest(1, nest(1, key), nest(2, verdict_data(GOTO, chain)))
        self[chain] = element[:12], element[12 + self._length :]
        return self[chain]


def encode_keys(owner: Set, elements: Iterable[Element]) -> list[bytes]:
    """The keys of elements, each as a list attribute: what a deletion needs."""
    if owner.interval:
        return [part for e in elements for part in _encode_range(owner, e)]
    head = nest(1, nest(1, attribute(1, bytes(owner.key_length))))[:12]
    padding = bytes(-owner.key_length % 4)
    return [head + key + padding for key, _ in elements]


def _encode_range(owner: Set, element: Element) -> Iterator[bytes]:
    """A range: with both ends where keys are concatenated, else as a start and an end element."""
    low, high = element
    assert isinstance(high, bytes)
    if len(owner.key) > 1:
        yield nest(1, nest(1, attribute(1, low)), nest(10, attribute(1, high)))
        return
    yield nest(1, nest(1, attribute(1, low)))
    behind = int.from_bytes(high, "big") + 1
    if behind < 1 << 8 * len(high):  # a range up to the last address has no end
        end = attribute(1, behind.to_bytes(len(high), "big"))
        yield nest(1, number(3, INTERVAL_END), nest(1, end))


def decode_elements(owner: Set, payload: bytes) -> Iterator[Element]:
    """The elements in the ELEMENTS attribute of a dump. Ranges of single keys come as pairs of
    start and end elements: `join_ranges` makes ranges of them."""
    if owner.data and not owner.dynamic:
        yield from _decode_fixed(owner, payload)
        return
    for _, content in attributes(payload):
        yield _decode_element(content)


def _decode_fixed(owner: Set, payload: bytes) -> Iterator[Element]:
    """Elements of one size by their stride, one by one where the kernel laid them out otherwise."""
    key, data = owner.key_length, owner.data_length
    stride = struct.Struct(f"=HH8x{key}s8x{data}s")
    if stride.size and len(payload) % stride.size == 0:
        unpacked = list(stride.iter_unpack(payload))
        if all(length == stride.size for length, _, _, _ in unpacked):
            for _, _, k, d in unpacked:
                yield k, d
            return
    for _, content in attributes(payload):
        yield _decode_element(content)


def _decode_element(content: bytes) -> Element:
    key, value = b"", None  # type: bytes, Value
    flags = 0
    for kind, payload in attributes(content):
        if kind == 1:
            key = _inner(payload)
        elif kind == 2:
            value = _data(payload)
        elif kind == 10:
            value = _inner(payload)
        elif kind == 3:
            flags = int.from_bytes(payload, "big")
    return key, (END if flags & INTERVAL_END else value)


END = "end of a range"
"""The value by which `decode_elements` marks the element behind a range."""


def _inner(payload: bytes) -> bytes:
    return next((content for kind, content in attributes(payload) if kind == 1), b"")


def _data(payload: bytes) -> Value:
    for kind, content in attributes(payload):
        if kind == 1:
            return content
        chain = next((c for k, c in attributes(content) if k == 2), None)
        return text(chain) if chain is not None else ""
    return None


def join_ranges(elements: Iterable[Element]) -> dict[Key, Value]:
    """Start and end elements, as the kernel keeps single-key ranges, as ranges."""
    ranges: dict[Key, Value] = {}
    start: bytes | None = None
    # at one address the end of a range comes before the start of the next
    for key, value in sorted(elements, key=lambda e: (e[0], e[1] != END)):
        if value != END:
            start = key
        elif start is not None:
            ranges[start] = (int.from_bytes(key, "big") - 1).to_bytes(len(key), "big")
            start = None
    if start is not None:
        ranges[start] = b"\xff" * len(start)
    return ranges


# --- comparing ----------------------------------------------------------------------------------


def says(theirs: bytes, ours: bytes) -> bool:
    """Whether the kernel's dump of something holds every attribute that we would send for it.

    The kernel adds what we left at its default, so equality is not to be had.
    """
    reported: dict[int, list[bytes]] = {}
    for kind, content in attributes(theirs):
        reported.setdefault(kind, []).append(content)
    position, seen = 0, dict.fromkeys(reported, 0)
    while position + 4 <= len(ours):
        length, flagged = ATTRIBUTE.unpack_from(ours, position)
        kind, content = flagged & TYPE_MASK, ours[position + 4 : position + length]
        position += (length + 3) & ~3
        index = seen.get(kind, 0)
        if index >= len(reported.get(kind, ())):
            return False
        seen[kind] = index + 1
        other = reported[kind][index]
        if not (says(other, content) if flagged & NESTED else other == content):
            return False
    # a list (of expressions, of elements) must not be longer than ours
    return seen.get(1, 0) == len(reported.get(1, ()))
