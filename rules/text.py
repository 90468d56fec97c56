"""Tables, elements and changes in nft's language, for people and for `nft -f`.

nft 1.0.6 and later load this text. `nft list` shows the same for it as for the netlink form (tests
load both into the kernel and compare).
"""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Iterator, Mapping

from rules.language import (
    FAMILY_NAME,
    Chain,
    Concat,
    DataType,
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
    Table,
    Translate,
    Unmark,
)
from rules.objects import PROTOCOL_NAMES

Key = bytes
CATCH_ALL: Key = b""
"""The key of an element for all keys that have none, written `*`. We have no such elements, but
another process may add one (Linux 5.13)."""
Value = bytes | str | None
"""An element's data: a target's bytes, the chain of a verdict's goto, the inclusive upper end of a
range, or nothing."""

Element = tuple[Key, Value]


def table(described: Table, elements: Mapping[Set, Mapping[Key, Value]]) -> str:
    """The whole table, its elements sorted."""
    lines = [f"table {FAMILY_NAME[described.family]} {described.name} {{"]
    for item in described.sets:
        lines += _set(item, elements.get(item, {}), counters=described.counters)
        lines.append("")
    for chain in described.chains:
        lines += _chain(chain)
        lines.append("")
    lines[-1] = "}"
    return "\n".join(lines) + "\n"


def _set(described: Set, elements: Mapping[Key, Value], *, counters: bool) -> Iterator[str]:
    yield f"\t{'map' if described.is_map else 'set'} {described.name} {{"
    yield f"\t\t{set_type(described)}"
    if size := described.room(len(elements)):
        yield f"\t\tsize {size}"
    if described.dynamic:
        yield "\t\tflags dynamic,timeout"
    elif described.interval:
        yield "\t\tflags interval"
    if counters and described.counted:
        yield "\t\tcounter"
    if described.comment:
        yield f'\t\tcomment "{described.comment}"'
    if elements:
        texts = [element(described, e) for e in sorted(elements.items(), key=lambda e: e[0])]
        yield "\t\telements = { " + ",\n\t\t\t     ".join(texts) + " }"
    yield "\t}"


def set_type(described: Set) -> str:
    """What keys and data hold: `type ...` or `typeof ...`."""
    if described.typeof:
        text = f"typeof {concat(described.key)}"
        return f"{text} : {concat(described.data)}" if described.data else text
    text = "type " + " . ".join(f.type.text for f in described.key)
    if described.verdicts:
        return f"{text} : verdict"
    if described.data:
        return f"{text} : " + " . ".join(f.type.text for f in described.data)
    return text


def _chain(described: Chain) -> Iterator[str]:
    yield f"\tchain {described.name} {{"
    if described.base:
        base = described.base
        yield (
            f"\t\ttype {base.type} hook {base.hook.value[0]} priority {base.priority};"
            " policy accept;"
        )
    for item in described.rules:
        yield f"\t\t{rule(item)}"
    yield "\t}"


# --- rules --------------------------------------------------------------------------------------


def rule(described: Rule) -> str:
    """One rule, in one line."""
    text = " ".join(statement(s) for s in described.statements)
    return f'{text} comment "{described.comment}"' if described.comment else text


def statement(described: Statement) -> str:  # noqa: PLR0912
    """One statement."""
    match described:
        case Is(status) | (Final() as status):
            return str(status.value)
        case IsProtocol(number):
            return f"meta l4proto {PROTOCOL_NAMES[number]}"
        case In(fields, named, negated):
            return f"{concat(fields)} {'!= ' if negated else ''}@{named.name}"
        case FromInterface(name, prefix):
            return f'iifname "{name}{"*" if prefix else ""}"'
        case NotFromInterface(name, prefix):
            return f'iifname != "{name}{"*" if prefix else ""}"'
        case Marked(bits):
            return f"meta mark & {bits:#010x} != 0"
        case Mark(bits):
            return f"meta mark set meta mark | {bits:#010x}"
        case Unmark(bits):
            return f"meta mark set meta mark & {bits ^ 0xFFFFFFFF:#010x}"
        case GoBy(fields, named):
            return f"{concat(fields)} vmap @{named.name}"
        case Translate(fields, named):
            return f"dnat to {concat(fields)} map @{named.name}"
        case Remember(named, key, data, seconds):
            value = f" : {concat(data)}" if data else ""
            return f"update @{named.name} {{ {concat(key)} timeout {seconds}s{value} }}"
        case Jump(chain):
            return f"jump {chain}"
        case Goto(chain):
            return f"goto {chain}"


def concat(fields: Concat) -> str:
    """Fields joined by dots."""
    return " . ".join(map(field, fields))


def field(described: Field) -> str:
    """How a rule names a field."""
    family = FAMILY_NAME[described.family]
    match described.source:
        case Source.SADDR | Source.DADDR:
            return f"{family} {described.source.value}"
        case Source.ORIGINAL_DADDR:
            return f"ct original {family} daddr"
        case Source.RANDOM:
            offset = f" offset {described.offset}" if described.offset else ""
            return f"numgen random mod {described.modulus}{offset}"
        case Source.CLIENT_HASH:
            return f"jhash {family} saddr mod {described.modulus} seed {described.seed:#x}"
        case _:
            return str(described.source.value)


# --- elements -----------------------------------------------------------------------------------


def element(owner: Set, item: Element) -> str:
    """One element, as it is written between braces."""
    key, value = item
    if key == CATCH_ALL:
        return "*"
    if owner.interval:
        assert isinstance(value, bytes)
        return " . ".join(_ranges(owner.key, key, value))
    text = " . ".join(_values(owner.key, key))
    if isinstance(value, str):
        return f"{text} : goto {value}"
    if value is not None:
        return f"{text} : " + " . ".join(_values(owner.data, value))
    return text


def _values(fields: Concat, data: bytes) -> Iterator[str]:
    for part, content in _split(fields, data):
        yield _value(part.type, content)


def _split(fields: Concat, data: bytes) -> Iterator[tuple[Field, bytes]]:
    position = 0
    for part in fields:
        yield part, data[position : position + part.length]
        position += part.padded


def _value(kind: DataType, content: bytes) -> str:
    match kind:
        case DataType.IPV4 | DataType.IPV6:
            return str(ipaddress.ip_address(content))
        case DataType.PROTOCOL:
            return PROTOCOL_NAMES.get(content[0], str(content[0]))
        case DataType.PORT:
            return str(int.from_bytes(content, "big"))
        case DataType.INTEGER:
            return str(int.from_bytes(content, sys.byteorder))
        case DataType.DIRECTION:
            return "reply" if content[0] else "original"


def _ranges(fields: Concat, low: bytes, high: bytes) -> Iterator[str]:
    for (part, first), (_, last) in zip(_split(fields, low), _split(fields, high), strict=True):
        if first == last:
            yield _value(part.type, first)
            continue
        start, end = ipaddress.ip_address(first), ipaddress.ip_address(last)
        networks = list(ipaddress.summarize_address_range(start, end))
        yield str(networks[0]) if len(networks) == 1 else f"{start}-{end}"
