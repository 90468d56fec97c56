"""Finds and removes the rules that kube-proxy leaves in the kernel when it stops.

kube-proxy leaves its rules in place on purpose: they must outlive a restart. A node that migrates
to sliceproxy keeps them until an operator removes them. Rules that no process maintains become
wrong with time: they reject Services that have endpoints by now, and guard addresses that belong
to another Service. What is left depends on kube-proxy's mode:

    nftables         the tables `ip kube-proxy` and `ip6 kube-proxy`, which are wholly its own
    iptables, nft    chains KUBE-* in the tables nat, filter and mangle that iptables-nft keeps
                     in nf_tables, among the chains of other programs, and rules that jump there
    iptables, legacy the same in the kernel's older x_tables
    ipvs             virtual servers, the interface kube-ipvs0, and some of those chains

The first two are removed here, over netlink, in one transaction: everything or nothing. It is
retried if another process changes the ruleset meanwhile. In shared tables only these are touched:

- Chains by the names that kube-proxy's own cleanup knows (`cleanupLeftovers` in kubernetes'
  pkg/proxy/iptables/proxier.go and pkg/proxy/ipvs/proxier.go). The kubelet's KUBE-FIREWALL,
  KUBE-KUBELET-CANARY and KUBE-IPTABLES-HINT stay: from the last one CNI plugins learn which
  iptables this host uses.
- Rules of base chains (PREROUTING and so on) that jump to those.
- A chain stays, with the chains it jumps to, if a chain of another program jumps to it; it is
  reported. Port mappers have used KUBE-MARK-MASQ like this.

The other two are only reported, with the command that removes them. x_tables has no
transactions: its only write replaces a whole table, with the rules of all programs in it, under a
lock that is a file of the iptables program (/run/xtables.lock). From a container that would need a
mount of that file, and could lose what other programs write meanwhile; the host has the program for
it. IPVS has a protocol of its own, which is not worth implementing for a single use.

Remove nothing before the new proxy runs. conntrack keeps the connections that kube-proxy has
translated, but it translates their packets only while the network namespace has a NAT chain of any
program: without one, established connections break (docs/migrate.md).
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from agent.kernel.errors import Stale
from agent.kernel.reading import TableReader
from agent.kernel.tables import Kernel
from rules.netlink.attributes import attribute, attributes, fields, string, text
from rules.netlink.batch import Batch
from rules.netlink.nftables import (
    NFT_MSG_DELRULE,
    NFT_MSG_GETCHAIN,
    NFT_MSG_GETRULE,
    NFT_MSG_GETTABLE,
    NFTA_CHAIN_HOOK,
    NFTA_CHAIN_NAME,
    NFTA_CHAIN_TABLE,
    NFTA_DATA_VERDICT,
    NFTA_EXPR_DATA,
    NFTA_EXPR_NAME,
    NFTA_IMMEDIATE_DATA,
    NFTA_RULE_CHAIN,
    NFTA_RULE_EXPRESSIONS,
    NFTA_RULE_HANDLE,
    NFTA_RULE_TABLE,
    NFTA_TABLE_NAME,
    NFTA_VERDICT_CHAIN,
)
from rules.tables import FAMILIES

TABLE = "kube-proxy"
IPTABLES = ("nat", "filter", "mangle")
IPVS_INTERFACE = "kube-ipvs0"

_PATTERN = (
    # both iptables modes; by the canary kube-proxy notices that its tables were flushed
    "KUBE-(SERVICES|EXTERNAL-SERVICES|NODEPORTS|POSTROUTING|MARK-MASQ|FORWARD"
    "|PROXY-FIREWALL|PROXY-CANARY"
    # a chain for each service port or endpoint (XLB until 1.23)
    "|(SVC|SVL|SEP|FW|EXT|XLB)-[A-Z2-7]+"
    # ipvs mode
    "|NODE-PORT|LOAD-BALANCER|SOURCE-RANGES-FIREWALL|IPVS-FILTER|IPVS-OUT-FILTER)"
)
_NAME = re.compile(_PATTERN)
_ATTEMPTS = 5

_SO_GET_INFO, _SO_GET_ENTRIES = 64, 65  # IPT_SO_* and IP6T_SO_*
# not ours to read, no such table (any more), changed between the two calls, no x_tables at all
_UNREADABLE = {errno.EPERM, errno.ENOENT, errno.EAGAIN, errno.ENOPROTOOPT}
_libc = ctypes.CDLL(None, use_errno=True)


def is_kube_proxys(chain: str) -> bool:
    """Whether a chain of this name in an iptables table is kube-proxy's."""
    return _NAME.fullmatch(chain) is not None


Place = tuple[int, str]
"""A table: the family, 4 or 6, and its name."""


class Leftovers(NamedTuple):
    """What was found of kube-proxy. Chains by the table they are in."""

    tables: tuple[int, ...] = ()
    chains: Mapping[Place, tuple[str, ...]] = {}
    legacy: Mapping[Place, tuple[str, ...]] = {}
    ipvs: bool = False

    def lines(self) -> list[str]:
        """A line for people about each thing there is."""
        lines = [f"nftables: table {_word(family)} {TABLE}" for family in self.tables]
        lines += [f"iptables-nft: {_chains(*item)}" for item in self.chains.items()]
        return lines + self.beyond_reach()

    def beyond_reach(self) -> list[str]:
        """The lines about what `remove` cannot remove, with the command that can."""
        lines = [f"iptables-legacy: {_chains(*item)}" for item in self.legacy.items()]
        for family in sorted({family for family, _ in self.legacy}):
            lines.append(f"iptables-legacy: remove them on the host with: {legacy_command(family)}")
        if self.ipvs:
            lines.append(
                f"ipvs: interface {IPVS_INTERFACE}; remove it and the virtual servers on the host"
                f" with: ipvsadm --clear; ip link delete {IPVS_INTERFACE}"
            )
        return lines


class Removal(NamedTuple):
    """What `remove` did: a line for people about each thing that went, and each that is left."""

    removed: list[str]
    left: list[str]


def _word(family: int) -> str:
    return "ip" if family == 4 else "ip6"


def _chains(place: Place, chains: tuple[str, ...]) -> str:
    family, table = place
    shown = ", ".join(chains[:3]) + (", ..." if len(chains) > 3 else "")
    return f"{len(chains)} chains in table {_word(family)} {table} ({shown})"


def legacy_command(family: int) -> str:
    """The shell command that removes kube-proxy's chains from x_tables, and nothing else.

    Every rule that mentions one of them goes, so the result has no dangling jumps.
    """
    program = "iptables-legacy" if family == 4 else "ip6tables-legacy"
    return f"{program}-save -c | grep -vE '[ :]{_PATTERN}( |$)' | {program}-restore -c"


# --- finding ------------------------------------------------------------------------------------


def find(kernel: TableReader) -> list[str]:
    """What kube-proxy has left here, a line each; empty if nothing. Reads names only, no rules."""
    return look(kernel).lines()


def look(kernel: TableReader) -> Leftovers:
    """What kube-proxy has left in this network namespace."""
    return Leftovers(
        tuple(family for family in FAMILIES if _has_table(kernel, family)),
        {
            (family, table): tuple(sorted(chains))
            for family in FAMILIES
            for table, names in _chain_names(kernel, family).items()
            if (chains := [name for name in names if is_kube_proxys(name)])
        },
        dict(_legacy()),
        _has_interface(IPVS_INTERFACE),
    )


def _has_table(kernel: TableReader, family: int) -> bool:
    return any(
        text(fields(body)[NFTA_TABLE_NAME]) == TABLE
        for body in kernel.dump(NFT_MSG_GETTABLE, family)
    )


def _chain_names(kernel: TableReader, family: int) -> dict[str, dict[str, bool]]:
    """The chains of iptables' tables, and whether each is a base chain."""
    names: dict[str, dict[str, bool]] = {table: {} for table in IPTABLES}
    for body in kernel.dump(NFT_MSG_GETCHAIN, family):
        chain = fields(body)
        table = text(chain[NFTA_CHAIN_TABLE])
        if table in names:
            names[table][text(chain[NFTA_CHAIN_NAME])] = NFTA_CHAIN_HOOK in chain
    return names


def _has_interface(name: str) -> bool:
    try:
        socket.if_nametoindex(name)
    except OSError:
        return False
    return True


# --- removing -----------------------------------------------------------------------------------


class _Rule(NamedTuple):
    """A rule of an iptables table: its chain, its handle, and the chains that it leads to."""

    chain: str
    handle: bytes
    targets: frozenset[str]


def remove(kernel: Kernel) -> Removal:
    """Removes kube-proxy's tables and its chains in iptables-nft's tables.

    Raises KernelError if the kernel refuses, or if others keep changing the ruleset.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        generation = kernel.generation()
        batch = Batch()
        removal = _plan(kernel, batch)
        if not len(batch):
            return removal
        try:
            kernel.send(batch, generation)
        except Stale:
            if attempt == _ATTEMPTS:
                raise
        else:
            return removal
    raise AssertionError


def _plan(kernel: Kernel, batch: Batch) -> Removal:
    leftovers = look(kernel)
    removal = Removal([], leftovers.beyond_reach())
    for family in leftovers.tables:
        batch.delete_table(family, TABLE)
        removal.removed.append(f"nftables: table {_word(family)} {TABLE}")
    for place in leftovers.chains:
        _plan_chains(kernel, place, batch, removal)
    return removal


def _plan_chains(kernel: Kernel, place: Place, batch: Batch, removal: Removal) -> None:
    """Takes kube-proxy's chains out of one table that others use, too."""
    family, table = place
    chains = _chain_names(kernel, family)[table]
    rules = list(_rules(kernel, place))
    strangers = (r for r in rules if not chains[r.chain] and not is_kube_proxys(r.chain))
    kept = _reachable({target for rule in strangers for target in rule.targets}, rules)
    goes = {name for name in chains if is_kube_proxys(name)} - kept
    for rule in rules:
        if chains[rule.chain] and rule.targets & goes:
            body = string(NFTA_RULE_TABLE, table) + string(NFTA_RULE_CHAIN, rule.chain)
            body += attribute(NFTA_RULE_HANDLE, rule.handle)
            batch.add(NFT_MSG_DELRULE, family, body, 0, f"a rule of chain {rule.chain}")
    for name in sorted(goes):
        batch.delete_rules(family, table, name)
    for name in sorted(goes):
        batch.delete_chain(family, table, name)
    if goes:
        removal.removed.append(f"iptables-nft: {_chains(place, tuple(sorted(goes)))}")
    left = tuple(sorted(filter(is_kube_proxys, kept)))
    if left:
        removal.left.append(f"iptables-nft: {_chains(place, left)}: other chains lead to them")


def _reachable(start: Iterable[str], rules: list[_Rule]) -> set[str]:
    """The chains that packets can get to from `start`."""
    leads: dict[str, set[str]] = {}
    for rule in rules:
        leads.setdefault(rule.chain, set()).update(rule.targets)
    found: set[str] = set()
    ahead = list(start)
    while ahead:
        name = ahead.pop()
        if name not in found:
            found.add(name)
            ahead.extend(leads.get(name, ()))
    return found


def _rules(kernel: TableReader, place: Place) -> Iterator[_Rule]:
    family, table = place
    for body in kernel.dump(NFT_MSG_GETRULE, family, string(NFTA_RULE_TABLE, table)):
        rule = fields(body)
        targets = frozenset(_targets(rule.get(NFTA_RULE_EXPRESSIONS, b"")))
        yield _Rule(text(rule[NFTA_RULE_CHAIN]), rule[NFTA_RULE_HANDLE], targets)


def _targets(expressions: bytes) -> Iterator[str]:
    """The chains in a rule's verdicts: iptables-nft writes a jump as `immediate`."""
    for _, element in attributes(expressions):
        expression = fields(element)
        if text(expression[NFTA_EXPR_NAME]) != "immediate" or NFTA_EXPR_DATA not in expression:
            continue
        data = fields(fields(expression[NFTA_EXPR_DATA])[NFTA_IMMEDIATE_DATA])
        if NFTA_DATA_VERDICT in data:
            verdict = fields(data[NFTA_DATA_VERDICT])
            if NFTA_VERDICT_CHAIN in verdict:
                yield text(verdict[NFTA_VERDICT_CHAIN])


# --- x_tables, only to be looked at -------------------------------------------------------------


def _legacy() -> Iterator[tuple[Place, tuple[str, ...]]]:
    for family in FAMILIES:
        for table in _legacy_tables(family):
            chains = sorted(filter(is_kube_proxys, _legacy_chains(family, table)))
            if chains:
                yield (family, table), tuple(chains)


def _legacy_tables(family: int) -> list[str]:
    """The tables that exist. To ask for one that does not would make it, with all its hooks."""
    try:
        with open(f"/proc/thread-self/net/{_word(family)}_tables_names", encoding="ascii") as names:
            return [name for name in names.read().split() if name in IPTABLES]
    except OSError:
        return []


def _legacy_chains(family: int, table: str) -> Iterator[str]:
    """The user-defined chains of a table of x_tables.

    Layouts of linux/netfilter_ipv4/ip_tables.h and its IPv6 twin: a chain starts with an entry
    whose target is called ERROR and carries the chain's name.
    """
    offsets = 88 if family == 4 else 140  # of target_offset and next_offset in an entry
    blob = _legacy_blob(family, table)
    position = 0
    while position + offsets + 4 <= len(blob):
        target, length = struct.unpack_from("=HH", blob, position + offsets)
        if not length:
            return
        at = position + target
        if blob[at + 2 : at + 31].rstrip(b"\0") == b"ERROR":
            name = blob[at + 32 : at + 62].split(b"\0")[0].decode(errors="replace")
            if name != "ERROR":  # the table's last entry
                yield name
        position += length


def _legacy_blob(family: int, table: str) -> bytes:
    """All entries of a table, empty if they cannot be read."""
    domain = socket.AF_INET if family == 4 else socket.AF_INET6
    level = socket.IPPROTO_IP if family == 4 else socket.IPPROTO_IPV6
    try:
        asked = socket.socket(domain, socket.SOCK_DGRAM)
    except OSError as error:
        if error.errno == errno.EAFNOSUPPORT:  # ipv6.disable=1
            return b""
        raise
    with asked:
        info = _getsockopt(asked, level, _SO_GET_INFO, table.encode().ljust(84, b"\0"))
        if not info:
            return b""
        size = struct.unpack_from("=I", info, 80)[0]
        request = table.encode().ljust(32, b"\0") + struct.pack("=I4x", size) + bytes(size)
        return _getsockopt(asked, level, _SO_GET_ENTRIES, request)[40:]


def _getsockopt(asked: socket.socket, level: int, option: int, request: bytes) -> bytes:
    """As socket.getsockopt, which takes no request and at most 1,024 bytes of answer."""
    buffer = ctypes.create_string_buffer(request, len(request))
    length = ctypes.c_uint32(len(request))
    if _libc.getsockopt(asked.fileno(), level, option, buffer, ctypes.byref(length)):
        if ctypes.get_errno() in _UNREADABLE:
            return b""
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), f"option {option}")
    return buffer.raw[: length.value]
