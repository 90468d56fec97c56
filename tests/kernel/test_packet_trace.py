"""`sliceproxy trace` reports what real packets met, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agent.kernel.trace import rule_texts
from rules.language import FAMILY_NAME
from rules.packet_trace import TRACE_TABLE, RuleKey
from rules.text import rule
from tests import manifest
from tests.kernel.conftest import NODE_PORT, TARGET_PORT, Net
from tests.kernel.proxy import Proxy

ROOT = Path(__file__).parents[2]
PATIENCE = 20.0
Start = Callable[..., Proxy]
needs_nft = pytest.mark.skipif(shutil.which("nft") is None, reason="no nft")


def tables(net: Net) -> set[str]:
    """The names of all tables on the node."""
    listed = net.world.run(
        "node",
        lambda: subprocess.run(
            ["nft", "list", "tables"], capture_output=True, text=True, check=True
        ),
    )
    return {line.split()[2] for line in listed.stdout.splitlines()}


def target(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


@contextmanager
def tracing(net: Net, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The command on the node, once its table is there."""
    command = [sys.executable, "-m", "agent", "trace", *arguments]
    process = net.world.popen(
        "node", command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert process.stderr
        line = process.stderr.readline()
        assert line.startswith("waiting for packets"), line
        yield process
    finally:
        process.kill()
        process.communicate()


def trace(net: Net, where: str, send: Callable[[], object], *flags: str) -> tuple[int, Any]:
    """Exit code and the packets of a trace, during which `send` sends them."""
    with tracing(net, where, "-o", "json", *flags) as process:
        send()
        out, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, json.loads(out)


@pytest.fixture
def web(net: Net, proxy: Start) -> Proxy:
    """A Service with an endpoint here, and one without any."""
    started = proxy(cluster_cidr="10.244.0.0/16,fd00:10:244::/48")
    started.put(net.service(), net.slice("pod-1"))
    started.put(manifest.service("empty", cluster_ips=[net.other_cluster_ip]))
    return started


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_packet_that_is_sent_to_an_endpoint(net: Net, web: Proxy, protocol: str) -> None:
    where = target(net.cluster_ip, 80)
    code, (packet,) = trace(
        net, f"{where}/{protocol}", lambda: net.ask("pod-3", (net.cluster_ip, 80), protocol)
    )
    assert (code, packet["outcome"], packet["protocol"]) == (0, "sent", protocol)
    endpoint = target(net.address("pod-1"), TARGET_PORT)
    assert packet["detail"] == f"to {endpoint} through vethpod1"
    assert packet["destination"] == where
    first, *_, last = packet["passages"]
    assert first["from_interface"] == "vethpod3"
    assert last["destination"] == endpoint
    steps = [(s["chain"], s["rule"].split(" comment ")[0], s["verdict"]) for s in first["steps"]]
    family = FAMILY_NAME[net.family]
    key = f"{family} daddr . meta l4proto . th dport"
    assert steps[0][0] == "nat-prerouting"
    assert [s[1] for s in steps if "vmap" in s[1]] == [f"{key} vmap @service-ips"]
    assert not any("deleted since" in s[1] for s in steps)
    dnat = f"dnat to {key} . numgen random mod 1 map @endpoints"
    assert ("draw-1", dnat, "accept") in steps


def test_a_packet_that_is_masqueraded(net: Net, web: Proxy) -> None:
    node = net.address("node")
    code, (packet,) = trace(
        net, target(node, NODE_PORT), lambda: net.ask("client", (node, NODE_PORT))
    )
    assert code == 0
    assert packet["detail"].endswith("through vethpod1, masqueraded")


def test_a_packet_that_the_node_itself_sends(net: Net, web: Proxy) -> None:
    code, (packet,) = trace(
        net, target(net.cluster_ip, 80), lambda: net.ask("node", (net.cluster_ip, 80))
    )
    assert (code, packet["outcome"]) == (0, "sent")
    assert packet["passages"][0]["from_interface"] == ""
    assert packet["passages"][0]["steps"][0]["chain"] == "nat-output"


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_packet_that_is_refused_names_the_rule(net: Net, web: Proxy, protocol: str) -> None:
    where = (net.other_cluster_ip, 80)
    code, packets = trace(
        net, f"{target(*where)}/{protocol}", lambda: net.ask("pod-3", where, protocol)
    )
    assert (code, packets[0]["outcome"]) == (1, "refused")
    assert f"{FAMILY_NAME[net.family]} sliceproxy refuse: reject" in packets[0]["detail"].replace(
        "meta l4proto tcp ", ""
    )


def test_a_packet_that_is_dropped_names_the_rule(net: Net, web: Proxy) -> None:
    web.put(net.service(externalTrafficPolicy="Local"), net.slice("remote-1"))
    where = (net.external_ip, 80)
    code, packets = trace(net, target(*where), lambda: net.ask("client", where, timeout=0.2))
    assert (code, packets[0]["outcome"]) == (1, "dropped")
    assert "sliceproxy no-endpoints: " in packets[0]["detail"]
    assert packets[0]["detail"].endswith("@drop-ips drop")


@needs_nft
def test_a_packet_that_another_programs_firewall_drops_names_it(net: Net, web: Proxy) -> None:
    text = (
        "table inet firewalld { chain filter_FORWARD { type filter hook forward priority 10; "
        "tcp dport 8080 reject with icmpx admin-prohibited; }; }"
    )

    def nft(*words: str) -> None:
        net.world.run("node", lambda: subprocess.run(["nft", *words], check=True))

    nft(text)
    try:
        where = (net.cluster_ip, 80)
        code, packets = trace(net, target(*where), lambda: net.ask("pod-3", where))
    finally:
        nft("delete table inet firewalld")
    assert (code, packets[0]["outcome"]) == (1, "refused")
    assert packets[0]["detail"].startswith("by inet firewalld filter_FORWARD: ")
    assert "th dport 8080 reject" in packets[0]["detail"]


def test_a_packet_that_no_rule_touches(net: Net, web: Proxy) -> None:
    where = (net.address("remote-1"), TARGET_PORT)
    code, (packet,) = trace(net, target(*where), lambda: net.ask("pod-3", where))
    assert (code, packet["outcome"]) == (0, "not touched")
    assert packet["detail"] == f"it goes on to {target(*where)} as it was sent"
    assert {s["verdict"] for p in packet["passages"] for s in p["steps"]} <= {
        *("accept", "continue", "jump inside", "jump unanswered", "jump no-endpoints"),
    }


def test_only_the_address_the_port_and_the_source_that_are_asked_for(net: Net, web: Proxy) -> None:
    where = (net.cluster_ip, 80)

    def send() -> None:
        net.ask("pod-3", (net.other_cluster_ip, 80))
        net.ask("pod-3", (net.cluster_ip, 81))
        net.ask("pod-3", where, "udp")
        net.ask("pod-2", where)
        net.ask("pod-3", where)

    code, packets = trace(
        net, target(*where), send, "--from-address", net.address("pod-3"), "--seconds", "3",
        *("--count", "5"),
    )  # fmt: skip
    assert code == 0
    assert [p["source"].rpartition(":")[0].strip("[]") for p in packets] == [net.address("pod-3")]


def test_a_flow_that_conntrack_knows_is_said_to_be_known(net: Net, web: Proxy) -> None:
    """UDP from one port twice: the second datagram passes no nat chain."""
    where = (net.cluster_ip, 80)

    def ask() -> None:
        net.world.ask("pod-3", *where, "udp", source_port=29500)

    ask()
    _, (packet,) = trace(net, f"{target(*where)}/udp", ask)
    assert packet["outcome"] == "sent"
    assert "conntrack knows the flow" in packet["detail"]


def test_people_read_chains_rules_and_the_end(net: Net, web: Proxy) -> None:
    with tracing(net, target(net.cluster_ip, 80)) as process:
        net.ask("pod-3", (net.cluster_ip, 80))
        out, _ = process.communicate(timeout=PATIENCE)
    lines = out.splitlines()
    family = FAMILY_NAME[net.family]
    assert lines[0].startswith("tcp ")
    assert f"    {family} sliceproxy nat-prerouting" in lines
    assert any("vmap @service-ips  -> goto " in line for line in lines), out
    assert lines[-1] == f"  sent to {target(net.address('pod-1'), TARGET_PORT)} through vethpod1"


@needs_nft
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM, None])
def test_no_ending_leaves_the_table(net: Net, web: Proxy, how: signal.Signals | None) -> None:
    flags = ["--seconds", "0.5"] if how is None else []
    with tracing(net, target(net.cluster_ip, 80), *flags) as process:
        if how is None:
            assert "no packet" in process.communicate(timeout=PATIENCE)[1]
        else:
            assert TRACE_TABLE in tables(net)
            process.send_signal(how)
            process.communicate(timeout=PATIENCE)
        assert process.returncode == (-how if how == signal.SIGKILL else 1)
        # the kernel closes a killed process' sockets before its parent learns of its end
        assert TRACE_TABLE not in tables(net)


@needs_nft
def test_a_table_without_an_owner_is_replaced(net: Net, web: Proxy) -> None:
    """As a kernel without owned tables would leave it."""
    family = FAMILY_NAME[net.family]
    net.world.run(
        "node", lambda: subprocess.run(["nft", "add", "table", family, TRACE_TABLE], check=True)
    )
    code, packets = trace(
        net, target(net.cluster_ip, 80), lambda: net.ask("pod-3", (net.cluster_ip, 80))
    )
    assert (code, len(packets)) == (0, 1)
    assert TRACE_TABLE not in tables(net)


def test_a_second_trace_is_refused_while_one_runs(net: Net, web: Proxy) -> None:
    with tracing(net, target(net.cluster_ip, 80)):
        command = [sys.executable, "-m", "agent", "trace", target(net.cluster_ip, 80)]
        second = net.world.popen("node", command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        _, error = second.communicate(timeout=PATIENCE)
    assert second.returncode == 2
    assert "Another `sliceproxy trace` runs on this node" in error


def test_the_agents_tables_are_not_disturbed(net: Net, web: Proxy) -> None:
    trace(net, target(net.cluster_ip, 80), lambda: net.ask("pod-3", (net.cluster_ip, 80)))
    web.check()


def test_the_rules_that_the_kernel_lists_read_as_ours(net: Net, web: Proxy) -> None:
    """Text from the kernel's own dump equals text from the description, for every rule."""
    found = net.world.run("node", rule_texts)
    listed = sorted(t for key, t in found.items() if key.table == "sliceproxy")
    described = sorted(rule(r) for t in web.state.tables() for c in t.chains for r in c.rules)
    assert listed == described
    assert all(isinstance(key, RuleKey) for key in found)
