"""The facts of a live node for `rules.doctor`, from /proc, /sys and netlink. Changes nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from agent.kernel import kube_proxy
from agent.kernel.addresses import read, route_socket
from agent.kernel.errors import KernelError
from agent.kernel.reading import TableReader
from rules.doctor import BaseChain, Facts, Interface, program_of
from rules.netlink.attributes import attributes, fields, integer, text
from rules.netlink.nftables import (
    NF_DROP,
    NFPROTO_NAMES,
    NFT_MSG_GETCHAIN,
    NFT_MSG_GETRULE,
    NFTA_CHAIN_HOOK,
    NFTA_CHAIN_NAME,
    NFTA_CHAIN_POLICY,
    NFTA_CHAIN_TABLE,
    NFTA_DATA_VERDICT,
    NFTA_EXPR_DATA,
    NFTA_EXPR_NAME,
    NFTA_HOOK_HOOKNUM,
    NFTA_HOOK_PRIORITY,
    NFTA_IMMEDIATE_DATA,
    NFTA_LIST_ELEM,
    NFTA_RULE_CHAIN,
    NFTA_RULE_EXPRESSIONS,
    NFTA_RULE_TABLE,
    NFTA_VERDICT_CODE,
)
from rules.netlink.rule_text import rule_text
from rules.objects import address_text
from rules.options import DetectLocalMode
from rules.state import State
from rules.tables import TABLE

_SYS = Path("/proc/sys/net")
_PROC = Path("/proc/thread-self/net")
"""Not /proc/net: that is the namespace of the process's first thread."""
_HOOKS = ("prerouting", "input", "forward", "output", "postrouting")


def collect() -> Facts:
    """The facts of this network namespace. What cannot be read is None, or absent."""
    owns, chains = True, None
    leftovers: tuple[str, ...] = ()
    with suppress(KernelError, OSError), TableReader() as kernel:
        owns = all(
            info[1] is not None for family in (4, 6) if (info := kernel.info(family)) is not None
        )
        leftovers = tuple(kube_proxy.find(kernel))
    with suppress(KernelError):
        chains = tuple(base_chains())
    addresses: tuple[str, ...] = ()
    with suppress(OSError), route_socket() as route:
        addresses = tuple(address_text(a) for a in sorted(read(route).addresses))
    return Facts(
        kernel=_kernel_version(),
        owns_tables=owns,
        forwarding=dict(_forwarding()),
        interfaces=tuple(_interfaces()),
        bridge_netfilter=_flag(_SYS / "bridge/bridge-nf-call-iptables"),
        conntrack=conntrack(),
        base_chains=chains,
        kube_proxy=leftovers,
        local_addresses=addresses,
    )


def with_state(facts: Facts, state: State) -> Facts:
    """The facts, with what the objects say about this node."""
    node = state.options.node
    return msgspec.structs.replace(
        facts,
        node_known=state.local.exists,
        pod_cidrs=state.node.pod_cidrs if state.node else (),
        needs_pod_cidrs=state.options.detect_local is DetectLocalMode.NODE_CIDR,
        endpoints_here=tuple(
            dict.fromkeys(
                address_text(endpoint.address)
                for pieces in state.slices.values()
                for piece in pieces
                for endpoint in piece.endpoints
                if endpoint.node == node
            )
        ),
        cluster_dns=tuple(
            address_text(address)
            for name, service in state.services.items()
            if name == ("kube-system", "kube-dns")
            for address in service.cluster_ips
        ),
    )


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _flag(path: Path) -> bool | None:
    number = _number(path)
    return None if number is None else bool(number)


def _kernel_version() -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _forwarding() -> Iterator[tuple[int, bool]]:
    for family, path in ((4, "ipv4/ip_forward"), (6, "ipv6/conf/all/forwarding")):
        on = _flag(_SYS / path)
        if on is not None:
            yield family, on


def _interfaces() -> Iterator[Interface]:
    everywhere = _number(_SYS / "ipv4/conf/all/rp_filter") or 0
    default = _default_route_interfaces()
    with suppress(OSError):
        for name in sorted({*os.listdir(_SYS / "ipv4/conf")} - {"all", "default"}):
            own = _number(_SYS / "ipv4/conf" / name / "rp_filter")
            if own is not None:
                # the kernel takes the larger one (Documentation/networking/ip-sysctl.rst)
                yield Interface(name, max(own, everywhere), name in default)


def _default_route_interfaces() -> set[str]:
    found = set()
    with suppress(OSError):
        for line in (_PROC / "route").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[1] == columns[7] == "00000000":
                found.add(columns[0])
    return found


def conntrack() -> tuple[int, int, int] | None:
    """Entries, maximum, failed insertions of all CPUs (column insert_failed, hexadecimal)."""
    used = _number(_SYS / "netfilter/nf_conntrack_count")
    most = _number(_SYS / "netfilter/nf_conntrack_max")
    if used is None or most is None:
        return None
    failed = 0
    with suppress(OSError, ValueError):
        head, *cpus = (_PROC / "stat/nf_conntrack").read_text().splitlines()
        column = head.split().index("insert_failed")
        failed = sum(int(line.split()[column], 16) for line in cpus)
    return used, most, failed


# --- base chains --------------------------------------------------------------------------------


def base_chains() -> Iterator[BaseChain]:
    """The base chains of all tables but ours, with what drops packets in them, and whether rules
    before that may accept new connections.

    Raises KernelError.
    """
    with TableReader() as reader:
        chains = reader.dump_all(NFT_MSG_GETCHAIN)
        rules = reader.dump_all(NFT_MSG_GETRULE)
    names: dict[tuple[int, str], set[str]] = {}
    for number, body in chains:
        chain = fields(body)
        names.setdefault((number, text(chain[NFTA_CHAIN_TABLE])), set()).add(
            text(chain[NFTA_CHAIN_NAME])
        )
    dropping, accepting = _dropping(rules), _accepting(rules)
    for number, body in chains:
        chain = fields(body)
        table, name = text(chain[NFTA_CHAIN_TABLE]), text(chain[NFTA_CHAIN_NAME])
        if table == TABLE or NFTA_CHAIN_HOOK not in chain or number not in NFPROTO_NAMES:
            continue
        hook = fields(chain[NFTA_CHAIN_HOOK])
        numbered = integer(hook[NFTA_HOOK_HOOKNUM])
        policy = chain.get(NFTA_CHAIN_POLICY)
        drops = [
            *(["its policy is drop"] if policy and integer(policy) == NF_DROP else []),
            *dropping.get((number, table, name), []),
        ]
        yield BaseChain(
            NFPROTO_NAMES[number],
            table,
            name,
            _HOOKS[numbered] if numbered < len(_HOOKS) else str(numbered),
            int.from_bytes(hook[NFTA_HOOK_PRIORITY], "big", signed=True),
            " and ".join(dict.fromkeys(drops)),
            program_of(table, names[number, table]),
            _Chain(number, table, name) in accepting,
        )


class _Chain(NamedTuple):
    """A chain of any table, by the number of its family (NFPROTO_*)."""

    family: int
    table: str
    name: str


_ACCEPTS = re.compile(r"\b(accept|queue|vmap|xt target)\b|\[")
"""What may accept a packet, in the text of a rule. Unknown expressions, in brackets, may, too."""
_KNOWN_ONLY = re.compile(r"ct state (established|related|,)+ (counter .*)?accept")
"""Accepts no packet that opens a connection."""
_TO_CHAIN = re.compile(r"\b(?:jump|goto) (\S+)")


def _accepting(rules: Iterable[tuple[int, bytes]]) -> set[_Chain]:
    """The chains in which a packet that opens a connection may be accepted, in them or in one that
    they lead to, before a rule drops or rejects whatever is left."""
    accepting: set[_Chain] = set()
    leading: dict[_Chain, set[_Chain]] = {}  # from the chain that is led to
    closed: set[_Chain] = set()
    for number, body in rules:
        rule = fields(body)
        chain = _Chain(number, text(rule[NFTA_RULE_TABLE]), text(rule[NFTA_RULE_CHAIN]))
        if chain in closed:
            continue
        if _unconditional(rule.get(NFTA_RULE_EXPRESSIONS, b"")):
            closed.add(chain)
            continue
        words = rule_text(rule).partition(' comment "')[0]
        if _ACCEPTS.search(words) and not _KNOWN_ONLY.fullmatch(words):
            accepting.add(chain)
        for name in _TO_CHAIN.findall(words):
            leading.setdefault(chain._replace(name=name), set()).add(chain)
    found = list(accepting)
    while found:
        before = leading.get(found.pop(), set()) - accepting
        accepting |= before
        found += before
    return accepting


def _dropping(rules: Iterable[tuple[int, bytes]]) -> dict[tuple[int, str, str], list[str]]:
    """By family number, table and chain, the rules that drop or reject without a condition."""
    found: dict[tuple[int, str, str], list[str]] = {}
    for number, body in rules:
        rule = fields(body)
        word = _unconditional(rule.get(NFTA_RULE_EXPRESSIONS, b""))
        if word:
            key = number, text(rule[NFTA_RULE_TABLE]), text(rule[NFTA_RULE_CHAIN])
            found.setdefault(key, []).append(f"a rule {word} whatever is left")
    return found


def _unconditional(expressions: bytes) -> str:
    """What a rule without any condition does: drops, rejects, or nothing of the kind ("")."""
    word = ""
    for kind, payload in attributes(expressions):
        if kind != NFTA_LIST_ELEM:
            continue
        expression = fields(payload)
        match text(expression[NFTA_EXPR_NAME]):
            case "counter" | "log":
                continue
            case "reject":
                word = "rejects"
            case "immediate" if _is_drop(expression.get(NFTA_EXPR_DATA, b"")):
                word = "drops"
            case _:
                return ""
    return word


def _is_drop(immediate: bytes) -> bool:
    data = fields(fields(immediate).get(NFTA_IMMEDIATE_DATA, b""))
    verdict = fields(data.get(NFTA_DATA_VERDICT, b""))
    return NFTA_VERDICT_CODE in verdict and integer(verdict[NFTA_VERDICT_CODE]) == NF_DROP
