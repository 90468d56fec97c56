"""Other programs' rules on the same node, and what packets to Services do beside them.

Each test starts `sliceproxy run`, then the neighbor, and sends real connections before and after,
and while the neighbor reloads. docs/coexistence.md has the same as a table. The programs are
Debian's and run in the node's namespace. Where a rule set is written down here instead, the test
names the program that writes such rules.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from agent.kernel.tables import Kernel
from lab.world import Protocol, World
from tests.kernel.agent import PATIENCE, Agent, Connections, write
from tests.kernel.namespaces import nft_programs
from tests.kernel.test_kube_proxy import call, connection
from tests.manifest import endpoint, service_document, slice_document

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make namespaces"),
    pytest.mark.skipif(not shutil.which("nft"), reason="needs the nft program"),
]


def needs(*programs: str) -> pytest.MarkDecorator:
    missing = [name for name in programs if not shutil.which(name)]
    reason = f"not installed: {', '.join(missing)} (tools/need-test-tools)"
    return pytest.mark.skipif(bool(missing), reason=reason)


class Addresses(NamedTuple):
    """What is asked, in one family."""

    vip: str
    external: str
    node: str
    pod_1: str
    pod_2: str
    pod_3: str
    pods: str
    node_pods: str
    """The network of all pods, and that of the node's."""
    stay: str
    dns: str
    dns_local: str
    iptables: str
    """The program, and the beginning of the names of its companions."""


OF = {
    4: Addresses(
        *("10.96.0.10", "203.0.113.1", "172.31.0.2"),
        *("10.244.1.11", "10.244.1.12", "10.244.1.13", "10.244.0.0/16", "10.244.1.0/24"),
        *("10.96.0.11", "10.96.0.53", "169.254.20.10", "iptables"),
    ),
    6: Addresses(
        *("fd00:10:96::10", "2001:db8:203::1", "fd00:172:31::2"),
        *("fd00:10:244:1::11", "fd00:10:244:1::12", "fd00:10:244:1::13"),
        *("fd00:10:244::/48", "fd00:10:244:1::/64"),
        *("fd00:10:96::11", "fd00:10:96::53", "fd00:169:254:20::10", "ip6tables"),
    ),
}
NODE_PORT, STAY_PORT = 30080, 9000
families = pytest.mark.parametrize("family", [4, 6], ids=["IPv4", "IPv6"])

Way = tuple[str, int]
"""A name and an address family."""
# Who asks, and where: every kind of frontend, and every hook that a packet takes.
WAYS: dict[Way, tuple[str, str, int]] = {
    (name, family): way
    for family, of in OF.items()
    for name, way in {
        "pod to cluster IP": ("pod-3", of.vip, 80),
        "node to cluster IP": ("node", of.vip, 80),
        "client to external IP": ("client", of.external, 80),
        "client to node port": ("client", of.node, NODE_PORT),
        "pod to pod": ("pod-3", of.pod_1, 8080),  # not ours: does the neighbor forward at all?
    }.items()
}
ALL_ANSWERED = dict.fromkeys(WAYS, "answered")


def forwarded(outcome: str, *families: int) -> dict[Way, str]:
    """All answered, but this outcome for all that the node forwards, in these families."""
    ways = [way for way in WAYS if way[1] in families and not way[0].startswith("node ")]
    return ALL_ANSWERED | dict.fromkeys(ways, outcome)


def documents() -> list[dict[str, Any]]:
    pods = [[endpoint(of.pod_1), endpoint(of.pod_2)] for of in OF.values()]
    dns_ports = [{"name": "dns", "port": 53, "protocol": "UDP"}]
    dns_targets = [{"name": "dns", "port": 8080, "protocol": "UDP"}]
    stay_ports = [{"name": "http", "port": STAY_PORT}]
    return [
        service_document(
            cluster_ips=[of.vip for of in OF.values()],
            type="NodePort",
            externalIPs=[of.external for of in OF.values()],
            ports=[{"name": "http", "port": 80, "nodePort": NODE_PORT}],
        ),
        *(slice_document("web", both) for both in pods),
        service_document("stay", cluster_ips=[of.stay for of in OF.values()]),
        *(slice_document("stay", both[:1], ports=stay_ports) for both in pods),
        service_document("kube-dns", cluster_ips=[of.dns for of in OF.values()], ports=dns_ports),
        *(slice_document("kube-dns", both, ports=dns_targets) for both in pods),
        NODE_DOCUMENT,
    ]


NODE_DOCUMENT = {
    "kind": "Node",
    "metadata": {"name": "node-1"},
    "spec": {"podCIDRs": [of.node_pods for of in OF.values()]},
    "status": {"addresses": [{"type": "InternalIP", "address": of.node} for of in OF.values()]},
}


@pytest.fixture
def world() -> Iterator[World]:
    """One each: what x_tables has created in a namespace is never removed."""
    with World(pods=3, remotes=0, prefix="sliceproxy-coexist") as built:
        for pod in ("pod-1", "pod-2"):
            built.serve(pod, 8080)
            built.serve(pod, 8080, "udp")
        yield built
        with built.run("node", lambda: Kernel(own=False)) as kernel:
            kernel.remove()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.json"
    write(path, *documents())
    return path


@pytest.fixture
def agent(world: World, place: Path, request: pytest.FixtureRequest) -> Iterator[Agent]:
    flags = getattr(request, "param", ())
    with Agent(world, place, "--detect-local-mode", "NodeCIDR", *flags) as started:
        started.wait("programmed")
        yield started


owned_and_not = pytest.mark.parametrize(
    "agent", [(), ("--no-own",)], ids=["owned", "not owned"], indirect=True
)


def outcomes(world: World) -> dict[Way, str]:
    """What a connection each way meets."""
    with ThreadPoolExecutor(len(WAYS)) as pool:
        answers = pool.map(lambda way: world.ask(*way, timeout=0.5).outcome, WAYS.values())
        return dict(zip(WAYS, answers, strict=True))


def settled(world: World, expected: dict[Way, str]) -> dict[Way, str]:
    """The outcomes, once they are the expected ones; the last ones if they never are."""
    deadline = time.monotonic() + PATIENCE
    while (found := outcomes(world)) != expected and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def ours(world: World) -> list[str]:
    """Our tables without the elements, which may count."""
    tables = [call(world, "nft", "list", "table", family, "sliceproxy") for family in ("ip", "ip6")]
    return [table.split("elements")[0] for table in tables]


class Traffic(NamedTuple):
    """In both families: a connection that stays open, and new ones all the while."""

    stays: list[Callable[[], bool]]
    new: list[Connections]


@contextmanager
def traffic(world: World) -> Iterator[Traffic]:
    with ExitStack() as stack:
        yield Traffic(
            [
                stack.enter_context(connection(world, "pod-1", of.stay, STAY_PORT))
                for of in OF.values()
            ],
            [
                stack.enter_context(Connections(world, "pod-3", of.vip, 80, pause=0.01))
                for of in OF.values()
            ],
        )


# --- nft -f /etc/nftables.conf --------------------------------------------------------------------


@owned_and_not
def test_debians_nftables_conf_with_flush_ruleset(
    world: World, agent: Agent, tmp_path: Path
) -> None:
    """`systemctl reload nftables`. Owned tables are not flushed; others are repaired."""
    file = Path("/etc/nftables.conf")
    if not file.exists():
        pytest.skip("Debian's package nftables has it")
    assert "flush ruleset" in file.read_text()
    owned = agent.wait("started")["owns_tables"]
    with traffic(world) as sent:
        for _ in range(3):
            call(world, "nft", "-f", str(file))
            assert settled(world, ALL_ANSWERED) == ALL_ANSWERED
            assert all(stays() for stays in sent.stays)
    if owned:
        assert [connections.failed for connections in sent.new] == [[], []]


HOST_FIREWALL = """
flush ruleset
table inet filter {
  chain input {
    type filter hook input priority filter; policy drop;
    ct state established,related accept
    iif lo accept
    meta l4proto { icmp, ipv6-icmp } accept
    tcp dport { 22, 10250 } accept
  }
  chain forward { type filter hook forward priority filter; policy FORWARD; }
}
"""


@pytest.mark.parametrize("forward", ["accept", "drop"])
def test_a_host_firewall_in_nftables_conf(world: World, agent: Agent, forward: str) -> None:
    """Node ports need no hole in `input`, for they are translated before and then forwarded. A
    `forward` that drops, drops Services and pods alike."""
    call(world, "nft", "-f", "-", text=HOST_FIREWALL.replace("FORWARD", forward))
    expected = ALL_ANSWERED if forward == "accept" else forwarded("silent", 4, 6)
    assert settled(world, expected) == expected


# --- firewalld ------------------------------------------------------------------------------------

BUS = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>system</type><listen>unix:path={}/bus</listen><auth>EXTERNAL</auth>
<policy context="default"><allow own="*"/><allow send_destination="*"/>
<allow receive_sender="*"/><allow send_type="method_call"/></policy></busconfig>
"""


@contextmanager
def firewalld(world: World, place: Path) -> Iterator[Any]:
    """The real one with its default configuration, on a bus of its own; yields a function that
    runs firewall-cmd."""
    (place / "bus.conf").write_text(BUS.format(place))
    environment = {**os.environ, "DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={place}/bus"}
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = ["dbus-daemon", f"--config-file={place}/bus.conf", "--nofork", "--nopidfile"]
    bus = subprocess.Popen(command, **silent)
    configuration = place / "firewalld"
    configuration.mkdir()
    daemon = None

    def firewall_cmd(*arguments: str) -> subprocess.CompletedProcess[str]:
        return world.run(
            "node",
            lambda: subprocess.run(
                ["firewall-cmd", *arguments],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            ),
        )

    try:
        until((place / "bus").exists)
        daemon = world.popen(
            "node",
            [
                *("firewalld", "--nofork", "--nopid", f"--system-config={configuration}"),
                f"--log-file={place}/log",
            ],
            env=environment,
            **silent,
        )
        until(lambda: firewall_cmd("--state").returncode == 0)
        yield firewall_cmd
    finally:
        for process in filter(None, (daemon, bus)):
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE)


def until(condition: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, condition
        time.sleep(0.05)


@owned_and_not
@needs("firewalld", "firewall-cmd", "dbus-daemon")
def test_firewalld_and_its_reload(world: World, agent: Agent, tmp_path: Path) -> None:
    """Its chain `filter_FORWARD` accepts translated connections, and rejects those from pod to pod
    until the pods' network is in a trusted zone."""
    assert outcomes(world) == ALL_ANSWERED
    before = ours(world)
    with firewalld(world, tmp_path) as firewall_cmd:
        expected = ALL_ANSWERED | {("pod to pod", family): "unreachable" for family in OF}
        assert outcomes(world) == expected
        with traffic(world) as sent:
            for _ in range(3):
                assert firewall_cmd("--reload").returncode == 0
                assert outcomes(world) == expected
                assert all(stays() for stays in sent.stays)
        assert ours(world) == before
        for of in OF.values():
            trusted = ("--zone=trusted", f"--add-source={of.pods}")
            assert firewall_cmd(*trusted).returncode == 0
        assert outcomes(world) == ALL_ANSWERED
        # while it reloads it lets packets through or drops them, but it never touches our tables
        for connections in sent.new:
            assert connections.outcomes["answered"] > 5
            assert set(connections.outcomes) <= {"answered", "silent", "unreachable"}
    assert outcomes(world) == ALL_ANSWERED


# --- ufw ------------------------------------------------------------------------------------------


@needs("ufw", "iptables")
@pytest.mark.parametrize("forward", ["DROP", "ACCEPT"])
def test_ufw(world: World, agent: Agent, tmp_path: Path, forward: str) -> None:
    """Its own start script and rules. Its default drops everything that is forwarded, pods too;
    with DEFAULT_FORWARD_POLICY="ACCEPT" Services and node ports work without a rule for them."""
    for directory in ("etc/ufw", "lib/ufw"):
        shutil.copytree(Path("/") / directory, tmp_path / directory)
    (tmp_path / "etc/default").mkdir()
    defaults = Path("/etc/default/ufw").read_text()
    (tmp_path / "etc/default/ufw").write_text(
        defaults.replace('FORWARD_POLICY="DROP"', f'FORWARD_POLICY="{forward}"').replace(
            "IPT_SYSCTL=/etc/ufw/sysctl.conf", "IPT_SYSCTL="
        )
    )
    conf = tmp_path / "etc/ufw/ufw.conf"
    conf.write_text(conf.read_text().replace("ENABLED=no", "ENABLED=yes"))
    script = [str(tmp_path / "lib/ufw/ufw-init"), "--rootdir", str(tmp_path)]
    script += ["--datadir", str(tmp_path)]
    with traffic(world) as sent:
        call(world, *script, "start")
        assert "ufw-before-forward" in call(world, "iptables-save")
        assert "ufw6-before-forward" in call(world, "ip6tables-save")
        expected = ALL_ANSWERED if forward == "ACCEPT" else forwarded("silent", 4, 6)
        assert outcomes(world) == expected
        assert all(stays() for stays in sent.stays), "established connections are accepted"
        call(world, *script, "force-reload")
        assert outcomes(world) == expected
        call(world, *script, "force-stop")
        assert outcomes(world) == ALL_ANSWERED


# --- Docker ---------------------------------------------------------------------------------------

DOCKER: dict[tuple[str, ...], tuple[int, ...]] = {
    (): (4,),
    ("--experimental", "--ip6tables", "--ipv6", "--fixed-cidr-v6=fd00:d0c::/64"): (4, 6),
}
"""Flags of the daemon, and the families in which it then filters what is forwarded."""


@needs("dockerd", "docker")
@pytest.mark.parametrize("flags", DOCKER, ids=lambda flags: " ".join(flags) or "default")
def test_docker_sets_the_policy_of_forward_to_drop(
    world: World, agent: Agent, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    """The real daemon with its default bridge. If it is the one that switches forwarding on, it
    drops what is forwarded, pods included; its chain DOCKER-USER is the place for the exception.
    IPv6 is left alone unless it is given `--ip6tables`."""
    filtered = DOCKER[flags]
    call(world, "sysctl", "-qw", "net.ipv4.ip_forward=0")
    if 6 in filtered:
        call(world, "sysctl", "-qw", "net.ipv6.conf.all.forwarding=0")
    ours_before = ours(world)
    command = ["dockerd", f"--data-root={tmp_path}/data", f"--exec-root={tmp_path}/exec"]
    command += [f"--host=unix://{tmp_path}/sock", f"--pidfile={tmp_path}/pid"]
    command += ["--storage-driver=vfs", *flags]
    with (tmp_path / "log").open("w") as log:
        daemon = world.popen("node", command, stdout=log, stderr=log)
        try:
            until(
                lambda: (
                    daemon.poll() is not None or "API listen on" in (tmp_path / "log").read_text()
                )
            )
            if daemon.poll() is not None:
                pytest.skip(f"dockerd does not start here: {(tmp_path / 'log').read_text()[-300:]}")
            assert ours(world) == ours_before
            assert outcomes(world) == forwarded("silent", *filtered)
            for of in (OF[family] for family in filtered):
                rules = call(world, f"{of.iptables}-save")
                assert ":FORWARD DROP" in rules
                # Docker 20.10 has no DOCKER-USER in IPv6
                chain = "DOCKER-USER" if ":DOCKER-USER " in rules else "FORWARD"
                for direction in ("-s", "-d"):
                    call(world, of.iptables, "-I", chain, direction, of.pods, "-j", "ACCEPT")
            assert outcomes(world) == ALL_ANSWERED
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(PATIENCE)


# --- iptables-legacy ------------------------------------------------------------------------------


@needs("iptables-legacy", "iptables-legacy-save")
def test_rules_of_iptables_legacy(world: World, agent: Agent) -> None:
    """Both kinds of NAT at once: x_tables' chains run at the same priorities as ours."""
    for of in OF.values():
        target = at(of.pod_2, 8080)
        for rule in (
            "-t filter -A INPUT -p tcp --dport 9 -j DROP",
            "-t filter -A FORWARD -m conntrack --ctstate INVALID -j DROP",
            f"-t nat -A PREROUTING -p tcp --dport 8443 -j DNAT --to-destination {target}",
            f"-t nat -A POSTROUTING -s {of.vip} -j MASQUERADE",
            "-t mangle -A PREROUTING -j MARK --set-xmark 0x1/0x1",
        ):
            call(world, f"{of.iptables}-legacy", *rule.split())
    assert outcomes(world) == ALL_ANSWERED
    for of in OF.values():
        assert world.ask("client", of.node, 8443).server == "pod-2"


def at(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


# --- two versions of nft --------------------------------------------------------------------------

NEWER = """
table FAMILY of-the-house {
  set clients {
    typeof FAMILY saddr . tcp dport
    flags interval, timeout
    timeout 1h
    counter
    elements = { NETWORK . 1-9 }
  }
  map ports { typeof tcp dport : FAMILY daddr; elements = { 8443 : POD } }
  chain input { type filter hook input priority 0; FAMILY saddr . tcp dport @clients drop; }
  chain prerouting {
    type nat hook prerouting priority -101;
    dnat to tcp dport map @ports : 8080
  }
}
"""


@pytest.mark.parametrize("loader", ["1.0", "1.1"])
def test_sets_of_one_nft_while_another_lists_ours(world: World, agent: Agent, loader: str) -> None:
    """Debian 12's nft (1.0.6) and Debian 13's (1.1.3), each loading sets beside our tables."""
    programs = {version[:3]: command for version, command in nft_programs().items()}
    if set(programs) != {"1.0", "1.1"}:
        pytest.skip(f"needs nft 1.0 and 1.1 (tools/need-test-tools), has {list(programs)}")
    for of, word, network in ((OF[4], "ip", "192.0.2.0/24"), (OF[6], "ip6", "2001:db8::/64")):
        text = NEWER.replace("FAMILY", word).replace("NETWORK", network).replace("POD", of.pod_2)
        call(world, *programs[loader], "-f", "-", text=text)
    assert outcomes(world) == ALL_ANSWERED
    for of in OF.values():
        assert world.ask("client", of.node, 8443).server == "pod-2"
    for version, command in programs.items():
        listing = call(world, *command, "list", "ruleset")
        for name in ("sliceproxy", "of-the-house"):
            assert f"table ip {name} {{" in listing, version
            assert f"table ip6 {name} {{" in listing, version


# --- NodeLocal DNSCache ---------------------------------------------------------------------------


@needs("iptables-nft-restore", "ip6tables-nft-restore")
@families
@pytest.mark.parametrize("protocol", ["udp", "tcp"])
def test_nodelocal_dns_answers_in_place_of_the_service(
    world: World, agent: Agent, protocol: Protocol, family: int
) -> None:
    """Its rules and its interface written down here, after node-cache 1.23. The cluster IP of
    kube-dns is an address of the node; packets to it skip conntrack, so no proxy translates them.
    """
    of = OF[family]
    assert world.ask("pod-3", of.dns, 53, "udp").server in ("pod-1", "pod-2")

    def link(arguments: str) -> None:
        call(world, "ip", "link", *arguments.split())

    # a dummy in real life, which not every kernel has
    link("add nodelocaldns type veth peer name nodelocal-peer")
    link("set nodelocaldns up")
    for address in (of.dns, of.dns_local):
        world.add_address("node", address, "nodelocaldns")
    rules = {"raw": [":PREROUTING ACCEPT", ":OUTPUT ACCEPT"], "filter": [":INPUT ACCEPT"]}
    rules["filter"] += [":OUTPUT ACCEPT"]
    for address in (of.dns, of.dns_local):
        for name in ("tcp", "udp"):
            to = f"-d {address} -p {name} -m {name} --dport 53"
            back = f"-s {address} -p {name} -m {name} --sport 53"
            rules["raw"] += [f"-A PREROUTING {to} -j NOTRACK", f"-A OUTPUT {back} -j NOTRACK"]
            rules["raw"] += [f"-A OUTPUT {to} -j NOTRACK"]
            rules["filter"] += [f"-A INPUT {to} -j ACCEPT", f"-A OUTPUT {back} -j ACCEPT"]
    text = "".join(
        f"*{table}\n" + "\n".join(lines) + "\nCOMMIT\n" for table, lines in rules.items()
    )
    call(world, f"{of.iptables}-nft-restore", "--noflush", text=text)
    with (
        world.serve("node", 53, protocol, of.dns),
        world.serve("node", 53, protocol, of.dns_local),
    ):
        for client in ("pod-3", "node"):
            for address in (of.dns, of.dns_local):
                answer = world.ask(client, address, 53, protocol)
                assert answer.server == "node", (client, address, answer)
        assert outcomes(world) == ALL_ANSWERED
    # an upgrade of node-cache removes its rules and its interface
    for table, lines in rules.items():
        for line in lines:
            if line.startswith("-A"):
                call(world, f"{of.iptables}-nft", "-t", table, "-D", *line.split()[1:])
    link("delete nodelocaldns")
    assert world.ask("pod-3", of.dns, 53, "udp").server in ("pod-1", "pod-2")


# --- CNI plugins ----------------------------------------------------------------------------------

# After what portmap (CNI plugins 1.x, backend iptables) and flannel 0.2x write.
CNI = {
    "nat": """
        :CNI-HOSTPORT-DNAT - [0:0]
        :CNI-HOSTPORT-SETMARK - [0:0]
        :CNI-HOSTPORT-MASQ - [0:0]
        :CNI-DN-0123456789abcdef01234 - [0:0]
        :FLANNEL-POSTRTG - [0:0]
        -A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
        -A OUTPUT -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
        -A POSTROUTING -m comment --comment "CNI portfwd masquerade" -j CNI-HOSTPORT-MASQ
        -A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
        -A CNI-HOSTPORT-SETMARK -j MARK --set-xmark 0x2000/0x2000
        -A CNI-HOSTPORT-MASQ -m mark --mark 0x2000/0x2000 -j MASQUERADE
        -A CNI-HOSTPORT-DNAT -p tcp -m multiport --dports 8443 -j CNI-DN-0123456789abcdef01234
        -A CNI-DN-0123456789abcdef01234 -s NODE-PODS -p tcp --dport 8443 -j CNI-HOSTPORT-SETMARK
        -A CNI-DN-0123456789abcdef01234 -p tcp --dport 8443 -j DNAT --to-destination TARGET
        -A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -j RETURN
        -A FLANNEL-POSTRTG -s NODE-PODS -d PODS -j RETURN
        -A FLANNEL-POSTRTG -s PODS -d NODE-PODS -j RETURN
        -A FLANNEL-POSTRTG ! -s PODS -d NODE-PODS -j RETURN
        -A FLANNEL-POSTRTG -s PODS ! -d MULTICAST -j MASQUERADE --random-fully
        -A FLANNEL-POSTRTG ! -s PODS -d PODS -j MASQUERADE --random-fully
    """,
    "filter": """
        :FLANNEL-FWD - [0:0]
        -A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
        -A FLANNEL-FWD -s PODS -j ACCEPT
        -A FLANNEL-FWD -d PODS -j ACCEPT
    """,
}


@needs("iptables-nft-restore", "ip6tables-nft-restore")
@families
def test_a_network_plugins_masquerading_and_host_ports(
    world: World, agent: Agent, family: int
) -> None:
    """Both work, and a pod's own address still reaches the endpoint. The mark bit 0x4000 is the one
    that flannel leaves to the proxy."""
    of = OF[family]
    words = {
        "NODE-PODS": of.node_pods,
        "PODS": of.pods,
        "MULTICAST": "ff00::/8" if family == 6 else "224.0.0.0/4",
        "TARGET": at(of.pod_1, 8080),
    }
    for table, lines in CNI.items():
        text = f"*{table}\n{textwrap.dedent(lines).strip()}\nCOMMIT\n"
        for word, value in words.items():
            text = text.replace(word, value)
        call(world, f"{of.iptables}-nft-restore", "--noflush", text=text)
    assert outcomes(world) == ALL_ANSWERED
    assert world.ask("client", of.node, 8443).server == "pod-1"
    assert world.ask("pod-3", of.vip, 80).client == of.pod_3
    client = world.hosts["client"]
    seen = world.ask("client", of.node, NODE_PORT).client
    assert seen not in (client.ipv4, client.ipv6), "externalTrafficPolicy: Cluster masquerades"
