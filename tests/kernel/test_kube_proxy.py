"""What kube-proxy leaves: found, removed, and what packets and connections do meanwhile."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from pyroute2 import IPRoute

from agent.kernel.kube_proxy import Removal, find, is_kube_proxys, legacy_command, remove
from agent.kernel.tables import Kernel
from lab.world import World
from rules.objects import EndpointSlice, Service
from tests.kernel.agent import Connections
from tests.kernel.proxy import Proxy
from tests.manifest import endpoint, endpoint_slice, service

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make namespaces"),
    pytest.mark.skipif(not shutil.which("nft"), reason="needs the nft program"),
]
needs_iptables = pytest.mark.skipif(
    not shutil.which("iptables-nft-restore"), reason="needs Debian's iptables (iptables-nft)"
)
needs_legacy = pytest.mark.skipif(
    not shutil.which("iptables-legacy-restore"), reason="needs Debian's iptables (iptables-legacy)"
)

VIP, PORT, TARGET = "10.96.0.10", 80, 8080
POD_1, POD_2 = "10.244.1.11", "10.244.1.12"

# After what kube-proxy 1.36 writes in nftables mode, priorities and hooks as there.
KUBE_PROXY = """
table FAMILY kube-proxy {
  comment "rules for kube-proxy"
  map service-ips {
    type ADDRESS . inet_proto . inet_service : verdict
    elements = { VIP . tcp . 80 : goto service-ULMVA6XW }
  }
  map no-endpoint-services {
    type ADDRESS . inet_proto . inet_service : verdict
    elements = { OTHER . tcp . 80 : goto reject-chain }
  }
  set cluster-ips { type ADDRESS; elements = { VIP, OTHER } }
  chain filter-prerouting { type filter hook prerouting priority -110; }
  chain filter-forward {
    type filter hook forward priority -110
    ct state new jump service-endpoints-check
  }
  chain filter-output {
    type filter hook output priority -110
    ct state new jump service-endpoints-check
  }
  chain nat-prerouting { type nat hook prerouting priority -100; jump services; }
  chain nat-output { type nat hook output priority -100; jump services; }
  chain nat-postrouting { type nat hook postrouting priority 100; jump masquerading; }
  chain service-endpoints-check {
    FAMILY daddr . meta l4proto . th dport vmap @no-endpoint-services
  }
  chain reject-chain { reject; }
  chain masquerading {
    meta mark & 0x4000 == 0 return
    meta mark set meta mark ^ 0x4000
    masquerade fully-random
  }
  chain services { FAMILY daddr . meta l4proto . th dport vmap @service-ips; }
  chain service-ULMVA6XW { meta l4proto tcp dnat to ENDPOINT; }
}
"""
STRANGER = """
table ip filters-of-the-house {
  chain input { type filter hook input priority 0; tcp dport 9 drop; }
}
"""

# What containers' port mappers, the kubelet, and an administrator have.
OTHERS = {
    "nat": """
        :CNI-HOSTPORT-DNAT - [0:0]
        :KUBE-KUBELET-CANARY - [0:0]
        :KUBE-SERVICES-OF-MINE - [0:0]
        -A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
        -A PREROUTING -j KUBE-SERVICES-OF-MINE
        -A CNI-HOSTPORT-DNAT -p tcp --dport 8443 -m comment --comment "not KUBE-SERVICES"
        -A POSTROUTING -p tcp --dport 2 -m comment --comment "mine" -j MASQUERADE
    """,
    "filter": """
        :KUBE-FIREWALL - [0:0]
        :KUBE-KUBELET-CANARY - [0:0]
        -A INPUT -j KUBE-FIREWALL
        -A INPUT -p tcp --dport 2222 -j ACCEPT
        -A FORWARD -p tcp --dport 3 -j DROP
        -A KUBE-FIREWALL -p tcp --dport 4 -m comment --comment "block incoming" -j DROP
    """,
    "mangle": """
        :KUBE-IPTABLES-HINT - [0:0]
        :KUBE-KUBELET-CANARY - [0:0]
        -A PREROUTING -p tcp --dport 5 -j MARK --set-xmark 0x1/0x1
    """,
}
KUBE_PROXYS = {
    "nat": """
        :KUBE-SERVICES - [0:0]
        :KUBE-NODEPORTS - [0:0]
        :KUBE-POSTROUTING - [0:0]
        :KUBE-MARK-MASQ - [0:0]
        :KUBE-PROXY-CANARY - [0:0]
        :KUBE-SVC-NPX46M4PTMTKRN6Y - [0:0]
        :KUBE-SVL-NPX46M4PTMTKRN6Y - [0:0]
        :KUBE-EXT-NPX46M4PTMTKRN6Y - [0:0]
        :KUBE-FW-NPX46M4PTMTKRN6Y - [0:0]
        :KUBE-XLB-NPX46M4PTMTKRN6Y - [0:0]
        :KUBE-SEP-TCJHZSCXTI4N6DLW - [0:0]
        -A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
        -A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
        -A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
        -A KUBE-SERVICES -d VIP -p tcp --dport 80 -j KUBE-SVC-NPX46M4PTMTKRN6Y
        -A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
        -A KUBE-NODEPORTS -p tcp --dport 30080 -j KUBE-EXT-NPX46M4PTMTKRN6Y
        -A KUBE-EXT-NPX46M4PTMTKRN6Y -j KUBE-MARK-MASQ
        -A KUBE-EXT-NPX46M4PTMTKRN6Y -j KUBE-SVC-NPX46M4PTMTKRN6Y
        -A KUBE-FW-NPX46M4PTMTKRN6Y -j KUBE-EXT-NPX46M4PTMTKRN6Y
        -A KUBE-XLB-NPX46M4PTMTKRN6Y -j KUBE-SVL-NPX46M4PTMTKRN6Y
        -A KUBE-SVC-NPX46M4PTMTKRN6Y -j KUBE-SEP-TCJHZSCXTI4N6DLW
        -A KUBE-SEP-TCJHZSCXTI4N6DLW -p tcp -j DNAT --to-destination ENDPOINT
        -A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
        -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
        -A KUBE-POSTROUTING -j MASQUERADE --random-fully
    """,
    "filter": """
        :KUBE-FORWARD - [0:0]
        :KUBE-SERVICES - [0:0]
        :KUBE-EXTERNAL-SERVICES - [0:0]
        :KUBE-NODEPORTS - [0:0]
        :KUBE-PROXY-FIREWALL - [0:0]
        :KUBE-PROXY-CANARY - [0:0]
        -I INPUT -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
        -I INPUT -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES
        -A INPUT -m comment --comment "health check service ports" -j KUBE-NODEPORTS
        -I FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
        -A FORWARD -m conntrack --ctstate NEW -j KUBE-SERVICES
        -A OUTPUT -m conntrack --ctstate NEW -j KUBE-SERVICES
        -A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
        -A KUBE-SERVICES -d VIP -p tcp --dport 81 -j REJECT
    """,
    "mangle": """
        :KUBE-PROXY-CANARY - [0:0]
    """,
}
BOTH = pytest.mark.parametrize("family", [4, 6], ids=["ipv4", "ipv6"])


@pytest.fixture(scope="module")
def shared_world() -> Iterator[World]:
    with World(pods=3, remotes=0, prefix="sliceproxy-kube-proxy") as built:
        built.serve("pod-1", TARGET)
        built.serve("pod-2", TARGET)
        yield built


@pytest.fixture
def world(shared_world: World) -> Iterator[World]:
    yield shared_world
    with shared_world.run("node", lambda: Kernel(own=False)) as kernel:
        kernel.remove()
    call(shared_world, "nft", "flush", "ruleset")


def call(world: World, *command: str, text: str | None = None) -> str:
    """Runs a program on the node; returns what it prints."""
    done = world.run(
        "node",
        lambda: subprocess.run(command, input=text, capture_output=True, text=True, check=False),
    )
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout


def of_family(text: str, family: int, target: str = POD_1) -> str:
    words = {
        4: ("ip", "ipv4_addr", VIP, "10.96.0.20", f"{target}:{TARGET}"),
        6: ("ip6", "ipv6_addr", "fd00::10", "fd00::20", f"[fd00:10:244:1::11]:{TARGET}"),
    }[family]
    for name, word in zip(("FAMILY", "ADDRESS", "VIP", "OTHER", "ENDPOINT"), words, strict=True):
        text = text.replace(name, word)
    return text


def start_kube_proxy(world: World, target: str = POD_1) -> None:
    for family in (4, 6):
        call(world, "nft", "-f", "-", text=of_family(KUBE_PROXY, family, target))


def restore(world: World, family: int, kind: str, tables: dict[str, str]) -> None:
    program = f"ip{'' if family == 4 else '6'}tables-{kind}-restore"
    for table, content in tables.items():
        lines = [line.strip() for line in of_family(content, family).splitlines()]
        text = "\n".join([f"*{table}", *filter(None, lines), "COMMIT", ""])
        call(world, program, "--noflush", text=text)


def saved(world: World, family: int, kind: str) -> list[str]:
    text = call(world, f"ip{'' if family == 4 else '6'}tables-{kind}-save")
    return [line.split(" [")[0] for line in text.splitlines() if not line.startswith("#")]


def on_node(world: World, function: Any) -> Any:
    """Calls the function with a Kernel, in the node's namespace."""

    def inside() -> Any:
        with Kernel(own=False) as kernel:
            return function(kernel)

    return world.run("node", inside)


# --- what is found and removed ------------------------------------------------------------------


def test_names() -> None:
    assert is_kube_proxys("KUBE-SVC-NPX46M4PTMTKRN6Y")
    for other in ("KUBE-FIREWALL", "KUBE-KUBELET-CANARY", "KUBE-IPTABLES-HINT", "KUBE-SERVICES2"):
        assert not is_kube_proxys(other)


def test_nothing_of_kube_proxy(world: World) -> None:
    call(world, "nft", "-f", "-", text=STRANGER)
    before = call(world, "nft", "list", "ruleset")
    assert on_node(world, find) == []
    assert on_node(world, remove) == Removal([], [])
    assert call(world, "nft", "list", "ruleset") == before


def test_its_nftables_tables(world: World) -> None:
    call(world, "nft", "-f", "-", text=STRANGER)
    before = call(world, "nft", "list", "ruleset")
    start_kube_proxy(world)
    lines = ["nftables: table ip kube-proxy", "nftables: table ip6 kube-proxy"]
    assert on_node(world, find) == lines
    assert on_node(world, remove) == Removal(lines, [])
    assert call(world, "nft", "list", "ruleset") == before


@needs_iptables
@BOTH
def test_its_iptables_nft_chains_and_nothing_else(world: World, family: int) -> None:
    restore(world, family, "nft", OTHERS)
    before = saved(world, family, "nft")
    restore(world, family, "nft", KUBE_PROXYS)
    assert any("KUBE-SEP-" in line for line in saved(world, family, "nft"))
    found = on_node(world, find)
    assert [line.split(" (")[0] for line in found] == [
        f"iptables-nft: {count} chains in table {'ip' if family == 4 else 'ip6'} {table}"
        for table, count in (("nat", 11), ("filter", 6), ("mangle", 1))
    ]
    removal = on_node(world, remove)
    assert removal == Removal(found, [])
    assert saved(world, family, "nft") == before
    assert on_node(world, find) == []


@needs_iptables
@BOTH
def test_a_chain_that_a_stranger_uses_stays(world: World, family: int) -> None:
    restore(world, family, "nft", KUBE_PROXYS)
    mapper = ":HOSTPORTS - [0:0]\n-A PREROUTING -j HOSTPORTS\n-A HOSTPORTS -j KUBE-MARK-MASQ"
    restore(world, family, "nft", {"nat": mapper})
    removal = on_node(world, remove)
    (line,) = removal.left
    assert "1 chains" in line
    assert "KUBE-MARK-MASQ" in line
    left = saved(world, family, "nft")
    assert [line for line in left if "KUBE" in line] == [
        ":KUBE-MARK-MASQ -",
        "-A HOSTPORTS -j KUBE-MARK-MASQ",
        "-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000",
    ]


@needs_iptables
def test_another_process_writes_meanwhile(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    restore(world, 4, "nft", KUBE_PROXYS)
    send, interruptions = Kernel.send, []

    def interrupted(self: Kernel, *arguments: Any) -> int:
        if len(interruptions) < 2:
            interruptions.append(1)
            new = ["iptables-nft", "-t", "nat", "-N", f"NEW{len(interruptions)}"]
            subprocess.run(new, check=True)
        return send(self, *arguments)

    monkeypatch.setattr(Kernel, "send", interrupted)
    assert on_node(world, remove).removed
    left = saved(world, 4, "nft")
    assert ":NEW1 -" in left
    assert ":NEW2 -" in left
    assert not any("KUBE" in line for line in left)


@pytest.fixture
def namespace() -> Iterator[World]:
    """A world of its own: x_tables cannot be made to forget a table."""
    with World(pods=0, remotes=0, prefix="sliceproxy-x-tables") as built:
        yield built


@needs_legacy
def test_x_tables_are_reported_with_a_command_that_works(namespace: World) -> None:
    world = namespace
    assert on_node(world, find) == []
    # looking has not made tables
    assert call(world, "cat", "/proc/thread-self/net/ip_tables_names") == ""
    for family in (4, 6):
        restore(world, family, "legacy", OTHERS)
        before = saved(world, family, "legacy")
        restore(world, family, "legacy", KUBE_PROXYS)
        with_it = saved(world, family, "legacy")
        found = on_node(world, find)
        word = "ip" if family == 4 else "ip6"
        assert [line.split(" (")[0] for line in found[:3]] == [
            f"iptables-legacy: {count} chains in table {word} {table}"
            for table, count in (("mangle", 1), ("filter", 6), ("nat", 11))
        ], found
        assert found[3:] == [
            f"iptables-legacy: remove them on the host with: {legacy_command(family)}"
        ]
        assert on_node(world, remove) == Removal([], found)
        assert saved(world, family, "legacy") == with_it
        call(world, "sh", "-c", legacy_command(family))
        assert saved(world, family, "legacy") == before
        assert on_node(world, find) == []


def test_ipvs_is_reported(namespace: World) -> None:
    def make() -> None:
        with IPRoute() as route:
            # a dummy in real life, which this kernel may not have
            route.link("add", ifname="kube-ipvs0", kind="veth", peer="other-end")

    namespace.run("node", make)
    (line,) = on_node(namespace, find)
    assert "ipvsadm --clear" in line
    assert on_node(namespace, remove) == Removal([], [line])


# --- both at once, and the way over -------------------------------------------------------------


def web() -> tuple[Service, EndpointSlice]:
    """The Service that the table above has, with pod-2 in place of pod-1."""
    return service(cluster_ips=[VIP]), endpoint_slice("web", [endpoint(POD_2)])


def answered_by(world: World, *clients: str) -> set[str | None]:
    return {world.ask(c, VIP, PORT, timeout=5).server for c in clients for _ in range(5)}


@contextmanager
def connection(world: World, pod: str, vip: str = VIP, port: int = 9000) -> Iterator[Any]:
    """A TCP connection from pod-3 to the VIP that stays open, as long as the pod's port is where
    it leads; yields a function that sends through it, both ways, and returns whether it got there.
    """
    family = socket.AF_INET6 if ":" in vip else socket.AF_INET
    with ExitStack() as stack:
        listener = stack.enter_context(world.socket(pod, family, socket.SOCK_STREAM))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(("", port))
        listener.listen()
        client = stack.enter_context(world.socket("pod-3", family, socket.SOCK_STREAM))
        client.settimeout(2)
        client.connect((vip, PORT))
        server = stack.enter_context(listener.accept()[0])
        server.settimeout(2)

        def alive() -> bool:
            """Whether words get through both ways within 2 seconds."""
            try:
                client.sendall(b"there")
                assert server.recv(16) == b"there"
                server.sendall(b"back")
                assert client.recv(16) == b"back"
            except OSError:
                return False
            return True

        assert alive()
        yield alive


@pytest.mark.parametrize("clients", [("pod-3",), ("client",), ("node",)], ids=str)
def test_with_both_the_later_one_translates(world: World, clients: tuple[str, ...]) -> None:
    """nf_tables puts a chain in front of those with the same hook and priority."""
    start_kube_proxy(world)
    assert answered_by(world, *clients) == {"pod-1"}
    with Proxy(world) as proxy:
        proxy.put(*web())
        assert answered_by(world, *clients) == {"pod-2"}
        # the other order
        on_node(world, remove)
        assert answered_by(world, *clients) == {"pod-2"}
        start_kube_proxy(world)
        assert answered_by(world, *clients) == {"pod-1"}
        proxy.kernel.remove()
        assert answered_by(world, *clients) == {"pod-1"}


@needs_iptables
def test_over_an_iptables_kube_proxy_the_later_one_translates(world: World) -> None:
    restore(world, 4, "nft", OTHERS)
    restore(world, 4, "nft", KUBE_PROXYS)
    assert answered_by(world, "pod-3", "client", "node") == {"pod-1"}
    with Proxy(world) as proxy:
        proxy.put(*web())
        assert answered_by(world, "pod-3", "client", "node") == {"pod-2"}
        on_node(world, remove)
        assert answered_by(world, "pod-3", "client", "node") == {"pod-2"}
        # back: its rules go into chains that have been there all the time, behind ours
        restore(world, 4, "nft", KUBE_PROXYS)
        assert answered_by(world, "pod-3", "client", "node") == {"pod-2"}
        proxy.kernel.remove()
        assert answered_by(world, "pod-3", "client", "node") == {"pod-1"}


@needs_legacy
def test_over_x_tables_the_later_one_translates() -> None:
    with World(pods=3, remotes=0, prefix="sliceproxy-x-tables") as world:
        world.serve("pod-1", TARGET)
        world.serve("pod-2", TARGET)
        restore(world, 4, "legacy", KUBE_PROXYS)
        assert answered_by(world, "pod-3", "client", "node") == {"pod-1"}
        with Proxy(world) as proxy:
            proxy.put(*web())
            assert answered_by(world, "pod-3", "client", "node") == {"pod-2"}
            call(world, "sh", "-c", legacy_command(4))
            assert answered_by(world, "pod-3", "client", "node") == {"pod-2"}


def test_with_both_an_outside_client_is_masqueraded_and_answered(world: World) -> None:
    """Both mark packets with 0x4000 and masquerade what has the mark, in whatever order."""
    external = "203.0.113.9"
    outside, slices = service(cluster_ips=[VIP], externalIPs=[external]), web()[1]
    start_kube_proxy(world)
    with Proxy(world) as proxy:
        proxy.put(outside, slices)
        for _ in range(2):
            answer = world.ask("client", external, PORT)
            assert (answer.server, answer.client) == ("pod-2", "172.31.0.2"), "the node's"
            on_node(world, remove)
            start_kube_proxy(world)  # its chains are the later ones now


def test_kube_proxys_leftovers_still_refuse(world: World) -> None:
    """Why the leftovers must go: its check of 10.96.0.20 is in front of all translation."""
    start_kube_proxy(world)
    with Proxy(world) as proxy:
        proxy.put(
            service("late", cluster_ips=["10.96.0.20"]), endpoint_slice("late", [endpoint(POD_2)])
        )
        assert world.ask("node", "10.96.0.20", PORT).outcome == "refused"
        assert world.ask("pod-3", "10.96.0.20", PORT).outcome == "answered"
        on_node(world, remove)
        assert world.ask("node", "10.96.0.20", PORT).outcome == "answered"


def test_the_way_over_and_back_breaks_nothing(world: World) -> None:
    start_kube_proxy(world)
    call(world, "nft", "-f", "-", text=KEPT)
    with connection(world, "pod-1") as old_one:
        call(world, "nft", "delete", "table", "ip", "kept")
        with Connections(world, "pod-3", VIP, PORT) as connections, Proxy(world) as proxy:
            proxy.put(*web())
            assert old_one()
            on_node(world, remove)
            assert old_one()
            assert answered_by(world, "pod-3") == {"pod-2"}
            # and back
            start_kube_proxy(world)
            assert old_one()
            proxy.kernel.remove()
            assert old_one()
            assert answered_by(world, "pod-3") == {"pod-1"}
    assert connections.outcomes["answered"] > 20
    assert not connections.failed


# The same as kube-proxy's, to a port where a connection stays open. Its chain is the later one.
KEPT = f"""
table ip kept {{
  chain pre {{
    type nat hook prerouting priority -100;
    ip daddr {VIP} tcp dport {PORT} dnat to {POD_1}:9000
  }}
}}
"""


def test_tables_that_an_agent_has_left_can_be_deleted_with_nft(world: World) -> None:
    """The way back on a node's own command line, where no image can be run any more."""
    with Proxy(world, own=True) as proxy:
        proxy.put(*web())
        if not proxy.kernel.table_flags:
            pytest.skip("needs Linux 6.9: tables with an owner")
    start_kube_proxy(world)
    for family in ("ip", "ip6"):
        call(world, "nft", "delete", "table", family, "sliceproxy")
    assert answered_by(world, "pod-3") == {"pod-1"}


def test_removed_too_early_established_connections_break(world: World) -> None:
    """Without any NAT chain the kernel translates no packet, whatever conntrack remembers."""
    call(world, "nft", "-f", "-", text=KEPT)
    with connection(world, "pod-1") as old_one:
        call(world, "nft", "delete", "table", "ip", "kept")
        assert not old_one()
