"""What on a node would break Services, judged from facts that were collected elsewhere.

Each check looks at one cause that operators of service proxies meet: another program's firewall
drops what was sent to an endpoint, the kernel does not forward, reverse path filtering drops
answers, the connection tracking table is full, the Node object does not say which pods are local.
A check says what was found and the line that mends it; it never changes anything.

`agent.kernel.facts` collects the facts of a live node.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator

import msgspec

from rules.objects import Network

OK, WARNING, FAILED, UNKNOWN = "ok", "warning", "failed", "unknown"

CONNTRACK_WARNING = 0.8
"""Share of nf_conntrack_max from which a node is close to dropping new connections."""

OWNED_TABLES_SINCE = (6, 9)
OLDEST_KERNEL = (5, 13)
NODE_LOCAL_DNS = "169.254.20.10"
"""The usual address of NodeLocal DNSCache."""


class Check(msgspec.Struct, frozen=True):
    """The outcome of one check. `state` is ok, warning, failed or unknown."""

    id: str
    title: str
    state: str
    detail: str
    remedy: str = ""


class BaseChain(msgspec.Struct, frozen=True):
    """A base chain of any table. `drops` names what in it drops packets that no rule accepted:
    its policy, or rules; "" for nothing. `accepts` says whether a rule before that may accept the
    first packet of a connection. `program` is who usually makes such a table, or ""."""

    family: str
    table: str
    chain: str
    hook: str
    priority: int
    drops: str = ""
    program: str = ""
    accepts: bool = True

    @property
    def drops_services(self) -> bool:
        """Whether it drops the first packet of every connection to a Service. Packets to endpoints
        are forwarded; `input` is passed only by those to an endpoint in the node's network."""
        return bool(self.drops) and not self.accepts and self.hook != "input"

    def __str__(self) -> str:
        return f"{self.family} {self.table} {self.chain} (hook {self.hook}, {self.priority})"


class Interface(msgspec.Struct, frozen=True):
    """A network interface. `rp_filter` is the mode in force, the larger of its own and `all`."""

    name: str
    rp_filter: int = 0
    default_route: bool = False


class Facts(msgspec.Struct, frozen=True):
    """What was found on a node; None where it could not be read.

    `forwarding` is by family. `conntrack` is entries, maximum, and how many insertions failed.
    `bridge_netfilter` is None without that module. `local_addresses` are the node's own, as text;
    `endpoints_here` the addresses of endpoints on this node.
    """

    kernel: tuple[int, int] = (0, 0)
    owns_tables: bool = True
    forwarding: dict[int, bool] = {}
    interfaces: tuple[Interface, ...] = ()
    bridge_netfilter: bool | None = None
    conntrack: tuple[int, int, int] | None = None
    base_chains: tuple[BaseChain, ...] | None = None
    kube_proxy: tuple[str, ...] = ()
    local_addresses: tuple[str, ...] = ()
    node_known: bool | None = None
    pod_cidrs: tuple[Network, ...] = ()
    needs_pod_cidrs: bool = False
    endpoints_here: tuple[str, ...] = ()
    api_server: str = ""
    api_server_is_service: bool = False
    cluster_dns: tuple[str, ...] = ()


def examine(facts: Facts) -> list[Check]:
    """Every check, in the order in which a person would look."""
    return [
        _kernel(facts),
        *_forwarding(facts),
        _firewalls(facts),
        _reverse_path(facts),
        _bridge(facts),
        _conntrack(facts),
        _node(facts),
        _pod_cidrs(facts),
        _api_server(facts),
        _leftovers(facts),
        _node_local_dns(facts),
    ]


def worst(checks: Iterable[Check]) -> str:
    """The worst state of these checks."""
    order = (OK, UNKNOWN, WARNING, FAILED)
    return max((check.state for check in checks), key=order.index, default=OK)


def _kernel(facts: Facts) -> Check:
    title = "The kernel has what sliceproxy needs"
    version = ".".join(map(str, facts.kernel))
    if facts.kernel < OLDEST_KERNEL:
        return Check("kernel", title, FAILED, f"Linux {version}", "Use Linux 5.13 or later.")
    if facts.kernel < OWNED_TABLES_SINCE:
        return Check(
            "kernel",
            title,
            WARNING,
            f"Linux {version} has no owned tables: another program can change or flush ours. The "
            "agent repairs them within a second",
            "Use Linux 6.9 or later.",
        )
    if not facts.owns_tables:
        return Check(
            "kernel",
            title,
            WARNING,
            "the tables have no owner: another program can change or flush them",
            "Run the agent without --no-own.",
        )
    return Check("kernel", title, OK, f"Linux {version}, the tables belong to the agent")


def _forwarding(facts: Facts) -> Iterator[Check]:
    for family, sysctl in ((4, "net.ipv4.ip_forward"), (6, "net.ipv6.conf.all.forwarding")):
        if family not in facts.forwarding:
            continue
        on = facts.forwarding[family]
        yield Check(
            f"forwarding-ipv{family}",
            f"The kernel forwards IPv{family}",
            OK if on else FAILED,
            f"{sysctl} is {int(on)}"
            + ("" if on else ": packets to endpoints on other nodes and in pods are dropped"),
            "" if on else f"sysctl -w {sysctl}=1",
        )


def _firewalls(facts: Facts) -> Check:
    title = "No other firewall drops Service traffic"
    if facts.base_chains is None:
        return Check("firewall", title, UNKNOWN, "the base chains could not be read")
    dropping = [chain for chain in facts.base_chains if chain.drops]
    if not dropping:
        return Check("firewall", title, OK, f"{len(facts.base_chains)} base chains, none drops")
    # with those that certainly drop at hand, those that may are of no interest
    certain = [chain for chain in dropping if chain.drops_services]
    found = "; ".join(f"{chain}: {chain.drops}" for chain in certain or dropping)
    programs = sorted({chain.program for chain in certain or dropping if chain.program})
    return Check(
        "firewall",
        title,
        FAILED if certain else WARNING,
        f"{found}. A packet that sliceproxy accepts still passes these chains"
        + (", and no rule in them accepts a new connection" if certain else ""),
        " ".join(_FIREWALL_REMEDIES.get(program, "") for program in programs).strip()
        or "Accept the pod and Service networks in these chains (nft list chain FAMILY TABLE "
        "CHAIN).",
    )


_FIREWALL_REMEDIES = {
    "firewalld": "firewall-cmd --permanent --zone=trusted --add-source=POD_CIDR && firewall-cmd "
    "--reload",
    "ufw": 'ufw default allow routed, or: ufw route allow from POD_CIDR; DEFAULT_FORWARD_POLICY="'
    'ACCEPT" in /etc/default/ufw',
    "docker": "iptables -I DOCKER-USER -s POD_CIDR -j ACCEPT; iptables -I DOCKER-USER -d POD_CIDR "
    "-j ACCEPT",
    "iptables": "iptables -P FORWARD ACCEPT, or accept POD_CIDR in the chain FORWARD",
}


def program_of(table: str, chains: Iterable[str]) -> str:
    """Which program usually makes a table with these chains; "" if that is not known."""
    names = set(chains)
    if table == "firewalld":
        return "firewalld"
    if any(name.startswith("ufw-") for name in names):
        return "ufw"
    if any(name.startswith("DOCKER") for name in names):
        return "docker"
    if table == "filter" and names & {"INPUT", "FORWARD", "OUTPUT"}:
        return "iptables"
    return ""


def _reverse_path(facts: Facts) -> Check:
    title = "Reverse path filtering lets answers in"
    strict = [i.name for i in facts.interfaces if i.rp_filter == 1]
    # with a default route alone it is the route to every source: strict does no harm
    others = [i.name for i in facts.interfaces if not i.default_route and i.name != "lo"]
    if not strict or (len(others) <= 1 and len(strict) <= 1):
        return Check("rp-filter", title, OK, "no interface is strict where routes may differ")
    first = strict[0]
    return Check(
        "rp-filter",
        title,
        WARNING,
        f"rp_filter is strict (1) on {_some(strict)}: packets that arrive on another interface "
        "than the route to their source leaves by are dropped",
        f"sysctl -w net.ipv4.conf.{first}.rp_filter=2 (loose), likewise for the others",
    )


def _bridge(facts: Facts) -> Check:
    title = "Bridged packets pass nf_tables"
    if facts.bridge_netfilter is None:
        return Check("br-netfilter", title, OK, "the module br_netfilter is not loaded")
    if facts.bridge_netfilter:
        return Check("br-netfilter", title, OK, "net.bridge.bridge-nf-call-iptables is 1")
    return Check(
        "br-netfilter",
        title,
        WARNING,
        "net.bridge.bridge-nf-call-iptables is 0: a pod that reaches a pod on the same bridge "
        "through a Service gets the answer from the wrong address",
        "sysctl -w net.bridge.bridge-nf-call-iptables=1 net.bridge.bridge-nf-call-ip6tables=1",
    )


def _conntrack(facts: Facts) -> Check:
    title = "The connection tracking table has room"
    if facts.conntrack is None:
        return Check("conntrack", title, UNKNOWN, "its figures could not be read")
    used, most, failed = facts.conntrack
    detail = f"{used:,} of {most:,} entries, {failed:,} insertions failed"
    if most and used >= most * CONNTRACK_WARNING:
        state = FAILED if used >= most * 0.98 else WARNING
        return Check(
            "conntrack",
            title,
            state,
            f"{detail}: new connections are dropped when it is full",
            f"sysctl -w net.netfilter.nf_conntrack_max={most * 2}, or --conntrack-max-per-core",
        )
    return Check("conntrack", title, OK, detail)


def _node(facts: Facts) -> Check:
    title = "The API server knows this Node"
    if facts.node_known is None:
        return Check("node", title, UNKNOWN, "not following an API server")
    if facts.node_known:
        return Check("node", title, OK, "the Node was found")
    return Check(
        "node",
        title,
        FAILED,
        "no Node has this node's name: endpoints here are not recognized as local",
        "Give --node with the name that `kubectl get nodes` shows (NODE_NAME from spec.nodeName).",
    )


def _pod_cidrs(facts: Facts) -> Check:
    title = "podCIDRs contain the endpoints on this node"
    if not facts.needs_pod_cidrs:
        return Check("pod-cidrs", title, OK, "the detect-local mode does not use podCIDRs")
    remedy = (
        "Use --detect-local-mode ClusterCIDR with --cluster-cidr, or InterfaceNamePrefix with the "
        "prefix of the CNI's interfaces."
    )
    if not facts.pod_cidrs:
        return Check(
            *("pod-cidrs", title, FAILED, "the Node has no podCIDRs, and the mode needs them"),
            remedy,
        )
    outside = [
        text
        for text in facts.endpoints_here
        if not any(ipaddress.ip_address(text) in network for network in facts.pod_cidrs)
        and text not in facts.local_addresses
    ]
    if outside:
        networks = ", ".join(map(str, facts.pod_cidrs))
        return Check(
            "pod-cidrs",
            title,
            FAILED,
            f"{_some(outside)} are not in {networks}: these pods count as clients outside",
            remedy,
        )
    return Check("pod-cidrs", title, OK, ", ".join(map(str, facts.pod_cidrs)))


def _api_server(facts: Facts) -> Check:
    title = "The API server is reached without a Service"
    if not facts.api_server:
        return Check("api-server", title, UNKNOWN, "not following an API server")
    if facts.api_server_is_service:
        return Check(
            "api-server",
            title,
            WARNING,
            f"{facts.api_server} is the address of a Service, which works only while a proxy has "
            "programmed it",
            "Give --server with the API server's own address.",
        )
    return Check("api-server", title, OK, facts.api_server)


def _leftovers(facts: Facts) -> Check:
    title = "No rules of kube-proxy are left"
    if facts.kube_proxy:
        return Check(
            "kube-proxy",
            title,
            WARNING,
            f"found {_some(list(facts.kube_proxy))}",
            "sliceproxy cleanup --kube-proxy (once kube-proxy is stopped)",
        )
    return Check("kube-proxy", title, OK, "none found")


def _node_local_dns(facts: Facts) -> Check:
    title = "NodeLocal DNSCache and the cluster DNS address"
    both = [a for a in facts.cluster_dns if a in facts.local_addresses]
    if both:
        return Check(
            "node-local-dns",
            title,
            OK,
            f"{', '.join(both)} is an address of this node: NodeLocal DNSCache answers there and "
            "its NOTRACK rules keep those packets away from Services",
        )
    if NODE_LOCAL_DNS in facts.local_addresses:
        return Check("node-local-dns", title, OK, f"it listens at {NODE_LOCAL_DNS} only")
    return Check("node-local-dns", title, OK, "not on this node")


def _some(items: list[str], shown: int = 5) -> str:
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(items[:shown]) + more
