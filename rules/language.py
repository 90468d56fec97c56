"""The model of a ruleset: fields, statements, rules, chains, sets.

A rule is written once in this model and used in three places: `text` prints it in nft's language,
`netlink` encodes it for the kernel, `trace` follows a packet through it. The model has only what
sliceproxy's tables need; it is no general nftables library (for that see knftables, or nft itself).

Lengths are in bytes. Every field of a concatenation occupies whole 4-byte registers; addresses and
ports are in network byte order, values that the kernel computes (a slot, a mark) in host order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import msgspec

ADDRESS_LENGTH = {4: 4, 6: 16}
FAMILY_NAME = {4: "ip", 6: "ip6"}


class DataType(Enum):
    """nft's data types: number (its TYPE_* constants), length, and name."""

    INTEGER = (4, 4, "integer")
    DIRECTION = (27, 1, "ct_dir")
    IPV4 = (7, 4, "ipv4_addr")
    IPV6 = (8, 16, "ipv6_addr")
    PROTOCOL = (12, 1, "inet_proto")
    PORT = (13, 2, "inet_service")

    @property
    def number(self) -> int:
        """The type's number in nft's user data and the kernel's key types."""
        return self.value[0]

    @property
    def length(self) -> int:
        """Bytes without padding."""
        return self.value[1]

    @property
    def text(self) -> str:
        """The name in nft's language."""
        return self.value[2]


ADDRESS_TYPE = {4: DataType.IPV4, 6: DataType.IPV6}


class Source(Enum):
    """Where a field is read from."""

    SADDR = "saddr"
    DADDR = "daddr"
    DPORT = "th dport"
    PROTOCOL = "meta l4proto"
    ORIGINAL_DADDR = "original daddr"
    ORIGINAL_DPORT = "ct original proto-dst"
    RANDOM = "numgen random"
    CLIENT_HASH = "jhash"
    DIRECTION = "ct direction"


class Field(msgspec.Struct, frozen=True):
    """One value a rule reads: of a packet, of its connection, or a slot.

    `family` is 4 or 6. A RANDOM field draws from `offset` to `offset + modulus - 1`. A CLIENT_HASH
    field is the hash of the source address with `seed`, scaled to 0 to `modulus - 1`.
    """

    source: Source
    type: DataType
    family: int
    modulus: int = 0
    offset: int = 0
    seed: int = 0

    @property
    def length(self) -> int:
        """Bytes without padding."""
        return self.type.length

    @property
    def padded(self) -> int:
        """Bytes in a concatenation."""
        return -(-self.type.length // 4) * 4


class Fields(msgspec.Struct, frozen=True):
    """The fields of one family, ready to be concatenated."""

    family: int
    saddr: Field
    daddr: Field
    protocol: Field
    dport: Field
    original_daddr: Field
    original_dport: Field

    @classmethod
    def of(cls, family: int) -> Fields:
        """The fields of IPv4 (4) or IPv6 (6)."""
        address = ADDRESS_TYPE[family]
        return cls(
            family,
            Field(Source.SADDR, address, family),
            Field(Source.DADDR, address, family),
            Field(Source.PROTOCOL, DataType.PROTOCOL, family),
            Field(Source.DPORT, DataType.PORT, family),
            Field(Source.ORIGINAL_DADDR, address, family),
            Field(Source.ORIGINAL_DPORT, DataType.PORT, family),
        )

    def random(self, modulus: int, offset: int = 0) -> Field:
        """A slot drawn from `modulus` many, the first of them `offset`."""
        return Field(Source.RANDOM, DataType.INTEGER, self.family, modulus, offset)

    @property
    def direction(self) -> Field:
        """The packet's direction; "original" in every nat chain, so a set of it is a switch."""
        return Field(Source.DIRECTION, DataType.DIRECTION, self.family)

    def hashed(self, modulus: int, seed: int) -> Field:
        """A slot below `modulus`, the same for every packet of a client. Seed 0 would be random."""
        source = Source.CLIENT_HASH
        return Field(source, DataType.INTEGER, self.family, modulus, seed=seed)


Concat = tuple[Field, ...]

LARGE = 4096
"""From so many elements on a set is made with a size."""


@dataclass(frozen=True, eq=False, slots=True)
class Set:
    """A named set, map or verdict map. Compared by identity: each exists once per family.

    `key` and `data` say with example fields what a key and its data hold; `verdicts` makes the
    data a chain to go to. An `interval` set holds ranges. `dynamic` sets are filled by rules, up
    to `size` elements that time out. Elements of a `counted` set have a packet counter each, in
    tables with counters.
    """

    family: int
    name: str
    key: Concat
    data: Concat = ()
    verdicts: bool = False
    interval: bool = False
    dynamic: bool = False
    size: int = 0
    comment: str = ""
    counted: bool = False
    key_length: int = field(init=False)
    """Bytes of a key as elements hold it. A lone field is not padded."""
    data_length: int = field(init=False)
    """Bytes of an element's data; 0 for sets and verdict maps."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "key_length", _length(self.key))
        object.__setattr__(self, "data_length", _length(self.data))

    @property
    def is_map(self) -> bool:
        """Whether elements have data."""
        return bool(self.data) or self.verdicts

    def room(self, count: int) -> int:
        """The size to make the set with if it is to hold `count` elements at once; 0 for none.

        The kernel keeps a set with a size in a hash table that is large enough from the beginning.
        One without grows while it is filled, but only after the transaction has ended: 250,000
        elements take 0.5 s instead of 0.25, and a dump of them 2.2 s instead of 0.8. But a size is
        also a limit: a set that reaches it must be recreated (`agent.kernel.errors.Full`).
        """
        if self.dynamic:
            return self.size
        return count * 3 // 2 if count >= LARGE and not self.interval else 0

    @property
    def typeof(self) -> bool:
        """Whether the key has a field without a name for its type, so that nft needs `typeof`."""
        return any(f.type is DataType.INTEGER for f in self.key)


def _length(fields: Concat) -> int:
    return fields[0].length if len(fields) == 1 else sum(f.padded for f in fields)


# --- statements ---------------------------------------------------------------------------------
# A match that fails ends its rule, and the packet continues with the next one.


class Predicate(Enum):
    """Tests on the connection and the route that take no argument.

    KNOWN holds for every packet of a connection but its first one.
    """

    NEW = "ct state new"
    KNOWN = "ct status confirmed"
    TRANSLATED = "ct status dnat"
    UNTRANSLATED = "ct status ! dnat"
    FROM_HERE = "fib saddr type local"


class Is(msgspec.Struct, frozen=True):
    """Continues if the predicate holds."""

    predicate: Predicate


class IsProtocol(msgspec.Struct, frozen=True):
    """Continues if the packet's transport protocol is this one (an IP protocol number)."""

    number: int


class In(msgspec.Struct, frozen=True):
    """Continues if the concatenation is in the set, or is not."""

    fields: Concat
    set: Set
    negated: bool = False


class NotFromInterface(msgspec.Struct, frozen=True):
    """Continues if the packet did not arrive at interface `name`, or with `prefix` at none whose
    name begins so."""

    name: str
    prefix: bool = False


class FromInterface(msgspec.Struct, frozen=True):
    """Continues if the packet arrived at interface `name`, or with `prefix` at one whose name
    begins so."""

    name: str
    prefix: bool = False


class Marked(msgspec.Struct, frozen=True):
    """Continues if one of the bits is set in the packet's mark."""

    bits: int


class Mark(msgspec.Struct, frozen=True):
    """Sets the bits in the packet's mark."""

    bits: int


class Unmark(msgspec.Struct, frozen=True):
    """Clears the bits in the packet's mark."""

    bits: int


class GoBy(msgspec.Struct, frozen=True):
    """Goes to the chain that the verdict map has for the concatenation, if any."""

    fields: Concat
    map: Set


class Translate(msgspec.Struct, frozen=True):
    """DNAT to the target that the map has for the concatenation; a miss continues."""

    fields: Concat
    map: Set


class Remember(msgspec.Struct, frozen=True):
    """Puts key and data into a dynamic map, or renews them, for `seconds`; a set has no data.

    Counts the packet where the elements have counters. Ends the rule where the map is full and does
    not have the key yet.
    """

    map: Set
    key: Concat
    data: Concat
    seconds: int


class Jump(msgspec.Struct, frozen=True):
    """Runs a chain, then continues with the next rule."""

    chain: str


class Goto(msgspec.Struct, frozen=True):
    """Runs a chain and does not return to this one."""

    chain: str


class Final(Enum):
    """Statements that end the packet's path through the chain; ACCEPT ends the base chain's."""

    ACCEPT = "accept"
    DROP = "drop"
    RETURN = "return"
    MASQUERADE = "masquerade fully-random"
    RESET = "reject with tcp reset"
    REJECT = "reject"


Statement = (
    Is
    | IsProtocol
    | In
    | NotFromInterface
    | FromInterface
    | Marked
    | Mark
    | Unmark
    | GoBy
    | Translate
    | Remember
    | Jump
    | Goto
    | Final
)


class Rule(msgspec.Struct, frozen=True):
    """Statements from left to right; the comment explains them to a reader."""

    statements: tuple[Statement, ...]
    comment: str = ""


def rule(*statements: Statement, comment: str = "") -> Rule:
    """A rule of these statements."""
    return Rule(statements, comment)


class Hook(Enum):
    """netfilter's hooks: name and number (enum nf_inet_hooks)."""

    PREROUTING = ("prerouting", 0)
    INPUT = ("input", 1)
    FORWARD = ("forward", 2)
    OUTPUT = ("output", 3)
    POSTROUTING = ("postrouting", 4)


class Base(msgspec.Struct, frozen=True):
    """Where netfilter calls a chain. `type` is "nat" or "filter"."""

    type: str
    hook: Hook
    priority: int


class Chain(msgspec.Struct, frozen=True):
    """A named list of rules; with `base`, one that netfilter calls."""

    name: str
    rules: tuple[Rule, ...]
    base: Base | None = None


class Table(msgspec.Struct, frozen=True):
    """Everything of one family that does not depend on Services: sets, chains and their rules.

    With `counters`, elements of its counted sets count packets.
    """

    family: int
    name: str
    sets: tuple[Set, ...]
    chains: tuple[Chain, ...]
    counters: bool = False

    @property
    def rule_count(self) -> int:
        """How many rules the table has."""
        return sum(len(chain.rules) for chain in self.chains)
