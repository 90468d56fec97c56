"""Each check of `doctor` finds the trouble that is made here in a namespace, and else is quiet."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.cli.client import Client
from agent.kernel.facts import base_chains, collect
from lab.world import World
from rules.doctor import FAILED, OK, UNKNOWN, WARNING, Check, Facts, examine
from tests.kernel.agent import Agent
from tests.kernel.namespaces import in_empty_namespace, is_root
from tests.kernel.proxy import Proxy
from tests.manifest import endpoint, endpoint_slice, service

pytestmark = pytest.mark.skipif(not is_root(), reason="needs root for network namespaces")
needs_nft = pytest.mark.skipif(shutil.which("nft") is None, reason="no nft")
needs_iptables = pytest.mark.skipif(
    shutil.which("iptables-nft-restore") is None, reason="no iptables-nft"
)


ROOT = Path(__file__).parents[2]
PATIENCE = 20.0


def run(*command: str, text: str = "") -> None:
    subprocess.run(command, input=text, text=True, check=True, capture_output=True)


def write(path: str, value: object) -> None:
    Path("/proc/sys/net", path).write_text(str(value))


def doctor(*trouble: Callable[[], object]) -> dict[str, Check]:
    """The checks by id, in a namespace of its own in which this trouble was made."""

    def look() -> Facts:
        run("ip", "link", "set", "lo", "up")
        write("ipv4/ip_forward", 1)
        write("ipv6/conf/all/forwarding", 1)
        for one in trouble:
            one()
        return collect()

    return {check.id: check for check in examine(in_empty_namespace(look))}


def test_a_namespace_in_order_has_no_complaint() -> None:
    found = doctor()
    assert {c.id: c.detail for c in found.values() if c.state in (WARNING, FAILED)} == {}
    assert found["firewall"].state == OK


def test_forwarding_that_is_off_is_a_failure_with_the_sysctl() -> None:
    check = doctor(lambda: write("ipv4/ip_forward", 0))["forwarding-ipv4"]
    assert (check.state, check.remedy) == (FAILED, "sysctl -w net.ipv4.ip_forward=1")


FIREWALLD = """
table inet firewalld {
  chain filter_FORWARD {
    type filter hook forward priority filter + 10; policy accept;
    ct state { established, related } accept
    iifname "lo" accept
    reject with icmpx admin-prohibited
  }
}
"""


@needs_nft
def test_a_firewall_like_firewalld_is_named_with_its_command() -> None:
    check = doctor(lambda: run("nft", "-f", "-", text=FIREWALLD))["firewall"]
    assert check.state == WARNING
    assert "inet firewalld filter_FORWARD (hook forward, 10): a rule rejects" in check.detail
    assert "firewall-cmd" in check.remedy


UFW = """
*filter
:INPUT DROP [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:ufw-before-forward - [0:0]
-A FORWARD -j ufw-before-forward
COMMIT
"""
DOCKER = """
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
COMMIT
"""


@needs_iptables
@pytest.mark.parametrize(
    ("rules", "remedy"), [(UFW, "ufw"), (DOCKER, "DOCKER-USER")], ids=["ufw", "docker"]
)
def test_a_forward_policy_of_drop_names_the_program_that_sets_it(rules: str, remedy: str) -> None:
    check = doctor(lambda: run("iptables-nft-restore", text=rules))["firewall"]
    assert check.state == FAILED  # the chains that they jump to are empty
    assert "ip filter FORWARD (hook forward, 0): its policy is drop" in check.detail
    assert remedy in check.remedy


ESTABLISHED = "ct state established,related accept;"


@needs_nft
@pytest.mark.parametrize(
    ("chain", "state"),
    [
        # certain: no rule accepts a new connection
        ("type filter hook forward priority 0; policy drop;", FAILED),
        (f"type filter hook forward priority 0; policy drop; {ESTABLISHED}", FAILED),
        (f"type filter hook forward priority 5; {ESTABLISHED} counter drop; accept;", FAILED),
        ("type filter hook forward priority 0; policy drop; jump nothing;", FAILED),
        ("type filter hook output priority 0; ct state established accept; reject;", FAILED),
        # a rule may accept what is sent to endpoints, or the chain is passed by few
        ("type filter hook forward priority 0; policy drop; ip saddr 10.0.0.0/8 accept;", WARNING),
        ("type filter hook forward priority 0; policy drop; ct status dnat accept;", WARNING),
        ("type filter hook forward priority 0; policy drop; jump something;", WARNING),
        ("type filter hook forward priority 0; policy drop; ct state vmap { new : accept };",
         WARNING),
        ("type filter hook forward priority 0; iifname lo accept; drop;", WARNING),
        (f"type filter hook input priority 0; policy drop; {ESTABLISHED}", WARNING),
        ("type filter hook forward priority 0; policy accept;", OK),
    ],
)  # fmt: skip
def test_a_chain_that_drops_every_new_connection_is_a_failure_one_that_may_a_warning(
    chain: str, state: str
) -> None:
    text = (
        "table inet t { chain nothing { return; }; chain more { tcp dport 80 accept; }; "
        f"chain something {{ jump more; }}; chain c {{ {chain} }}; }}"
    )
    check = doctor(lambda: run("nft", "-f", "-", text=text))["firewall"]
    assert check.state == state, check
    assert ("no rule in them accepts" in check.detail) == (state == FAILED)


@needs_nft
def test_what_the_doctor_calls_a_failure_drops_a_services_packets(world: World) -> None:
    """And what it warns of lets them pass, here."""
    with Proxy(world) as proxy, world.serve("pod-1", 8080):
        web = service(cluster_ips=["10.96.0.10"])
        proxy.put(web, endpoint_slice("web", [endpoint(world.hosts["pod-1"].ipv4)]))
        found = {}
        for rule in ("", "ip daddr 10.244.0.0/16 accept;"):
            chain = f"type filter hook forward priority 0; policy drop; {ESTABLISHED} {rule}"
            world.run("node", run, "nft", f"table inet t {{ chain c {{ {chain} }}; }}")
            checks = world.run("node", lambda: examine(collect()))
            state = next(check.state for check in checks if check.id == "firewall")
            found[state] = world.ask("pod-2", "10.96.0.10", 80, timeout=0.3).outcome
            world.run("node", run, "nft", "delete table inet t")
        proxy.kernel.remove()
    assert found == {FAILED: "silent", WARNING: "answered"}


@needs_nft
def test_a_drop_behind_a_condition_is_not_reported() -> None:
    text = 'table ip t { chain c { type filter hook forward priority 0; iifname "x" drop; }; }'

    def look() -> list[str]:
        run("nft", "-f", "-", text=text)
        return [chain.drops for chain in base_chains()]

    assert in_empty_namespace(look) == [""]


def two_interfaces() -> None:
    run("ip", "link", "add", "one", "type", "veth", "peer", "name", "two")
    for name in ("one", "two"):
        run("ip", "link", "set", name, "up")


def test_strict_reverse_path_filtering_with_several_interfaces_is_a_warning() -> None:
    def strict() -> None:
        two_interfaces()
        write("ipv4/conf/all/rp_filter", 0)
        write("ipv4/conf/one/rp_filter", 1)
        write("ipv4/conf/two/rp_filter", 0)

    check = doctor(strict)["rp-filter"]
    assert check.state == WARNING
    assert "net.ipv4.conf.one.rp_filter=2" in check.remedy

    def loose() -> None:
        two_interfaces()
        for name in ("all", "one", "two"):
            write(f"ipv4/conf/{name}/rp_filter", 0)

    assert doctor(loose)["rp-filter"].state == OK


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World(pods=2, remotes=0, prefix="sliceproxy-doctor") as built:
        yield built


def test_strict_filtering_drops_on_an_asymmetric_route_until_the_remedy_is_followed(
    world: World,
) -> None:
    """The node's route to a client's second address leads to a pod; its packets arrive at eth0."""
    source, port = "203.0.113.5", 9000
    client, node = world.hosts["client"], world.hosts["node"]
    world.add_address("client", source)
    pod = ("dev", "vethpod2")
    world.run("node", run, "ip", "route", "add", f"{source}/32", *pod)
    world.run("node", write, "ipv4/conf/all/rp_filter", 0)
    world.run("node", write, "ipv4/conf/eth0/rp_filter", 1)

    def arrives(address: str = source, seconds: float = 0.5) -> bool:
        with (
            world.socket("node", socket.AF_INET, socket.SOCK_DGRAM) as receiver,
            world.socket("client", socket.AF_INET, socket.SOCK_DGRAM) as sender,
        ):
            receiver.bind((node.ipv4, port))
            receiver.settimeout(seconds)
            sender.bind((address, 0))
            sender.sendto(b"?", (node.ipv4, port))
            try:
                return receiver.recv(10) == b"?"
            except TimeoutError:
                return False

    def check() -> Check:
        found = world.run("node", lambda: {c.id: c for c in examine(collect())})
        return found["rp-filter"]

    # the kernel answers no ARP for a source that it filters, so the neighbour is resolved before
    assert arrives(client.ipv4, PATIENCE)
    assert not arrives()
    found = check()
    assert found.state == WARNING
    assert "strict (1) on eth0" in found.detail
    words = found.remedy.split(" (loose)")[0].split()
    world.run("node", run, *words)
    assert arrives(seconds=PATIENCE)
    assert check().state == OK


def test_connections_that_are_made_fill_the_share_of_conntrack(world: World) -> None:
    """The maximum is the machine's and cannot be set in a namespace (nf_conntrack_max is read-only
    there), so the real number of entries is judged against a small one."""

    def fill() -> Facts:
        rules = "add table ip t; add chain ip t c { type filter hook output priority 0; }; "
        run("nft", rules + "add rule ip t c ct state new accept")  # so that this is tracked at all
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for port in range(9001, 9101):
                sender.sendto(b"?", (world.hosts["pod-1"].ipv4, port))
        return collect()

    facts = world.run("node", fill)
    assert facts.conntrack
    used = facts.conntrack[0]
    assert used >= 100

    def state(most: int) -> str:
        judged = examine(msgspec.structs.replace(facts, conntrack=(used, most, 0)))
        return next(c.state for c in judged if c.id == "conntrack")

    assert [state(used * 2), state(used * 10 // 9), state(used)] == [OK, WARNING, FAILED]


def test_a_live_agent_judges_its_own_node_and_endpoints(world: World, tmp_path: Path) -> None:
    """podCIDRs that do not contain the endpoints; without the agent only the machine is judged."""
    place, path = tmp_path / "cluster.yaml", str(tmp_path / "api.sock")
    place.write_text(NODE)
    flags = ("--api-socket", path, "--detect-local-mode", "NodeCIDR")

    def ask(*where: str) -> tuple[int, dict[str, Any]]:
        command = [sys.executable, "-m", "agent", "doctor", "-o", "json", *where]
        process = world.popen("node", command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        out, _ = process.communicate()
        return process.returncode, {check["id"]: check for check in json.loads(out)}

    with Agent(world, place, *flags) as agent:
        agent.wait("programmed")
        code, checks = ask("--socket", path)
        assert Client(path).answers()
        agent.kill()
    assert (code, checks["pod-cidrs"]["state"], checks["node"]["state"]) == (1, FAILED, OK)
    assert "10.244.1.5" in checks["pod-cidrs"]["detail"]
    assert Path(path).exists()
    assert not Client(path).answers(), "a socket that a killed agent left is no agent"
    assert ask()[1]["node"]["state"] == UNKNOWN


def test_conntrack_nearly_full_is_judged_by_its_share() -> None:
    def state(used: int) -> str:
        checks = examine(Facts(conntrack=(used, 1000, 3)))
        return next(c.state for c in checks if c.id == "conntrack")

    assert [state(used) for used in (100, 799, 800, 985)] == [OK, OK, WARNING, FAILED]


def test_conntracks_real_figures_are_read() -> None:
    facts = in_empty_namespace(collect)
    if facts.conntrack is None:
        pytest.skip("no conntrack here")
    used, most, _ = facts.conntrack
    assert 0 <= used <= most


@needs_nft
def test_what_kube_proxy_left_is_found() -> None:
    check = doctor(lambda: run("nft", "add", "table", "ip", "kube-proxy"))["kube-proxy"]
    assert check.state == WARNING
    assert "cleanup --kube-proxy" in check.remedy


def test_the_address_of_node_local_dns_is_recognized() -> None:
    def look() -> Facts:
        run("ip", "link", "set", "lo", "up")
        run("ip", "addr", "add", "10.96.0.10/32", "dev", "lo")
        return collect()

    found = in_empty_namespace(look)
    assert "10.96.0.10" in found.local_addresses


NODE = """
apiVersion: v1
kind: Node
metadata: {name: node-1}
spec: {podCIDRs: [10.244.9.0/24]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec: {clusterIP: 10.96.0.1, clusterIPs: [10.96.0.1], ports: [{port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: default, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
endpoints: [{addresses: [10.244.1.5], nodeName: node-1}]
ports: [{port: 8080}]
"""


def test_the_command_checks_the_objects_and_its_exit_code_reports_failures(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(NODE)

    def ask(*flags: str) -> tuple[int, dict[str, Any]]:
        command = [sys.executable, "-m", "agent", "doctor", "--output", "json"]
        done = subprocess.run(
            [*command, "--from", str(tmp_path), *flags], capture_output=True, text=True, check=False
        )
        assert done.stdout, done.stderr
        return done.returncode, {check["id"]: check for check in json.loads(done.stdout)}

    def look() -> tuple[int, dict[str, Any]]:
        return ask("--node", "node-1", "--detect-local-mode", "NodeCIDR")

    code, checks = in_empty_namespace(look)
    assert code == 1
    assert checks["pod-cidrs"]["state"] == FAILED
    assert "10.244.1.5" in checks["pod-cidrs"]["detail"]
    assert checks["node"]["state"] == OK
    _, checks = in_empty_namespace(lambda: ask("--node", "nobody-here"))
    assert checks["node"]["state"] == FAILED
