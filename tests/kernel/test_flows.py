"""`sliceproxy flows` shows the connections that are made through Services, and whose they are."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.kernel.counters import READ_SECONDS
from agent.kernel.flow_watch import FlowWatch, sends_events
from agent.kernel.socket import SO_RCVBUFFORCE
from agent.kernel.tables import Kernel
from agent.kernel.trace import rule_texts
from lab.world import World
from rules.flow_report import Lost
from tests import manifest
from tests.kernel.agent import Agent, write
from tests.kernel.conftest import NODE_PORT, SERVICE_PORTS, SLICE_PORTS, TARGET_PORT, Net
from tests.kernel.proxy import Proxy

ROOT = Path(__file__).parents[2]
Start = Callable[..., Proxy]


def documents(net: Net) -> list[dict[str, Any]]:
    """A Service with an endpoint here, whose pod has a name, and one with one on another node."""
    own = {**net.endpoint("pod-1"), "targetRef": {"kind": "Pod", "name": "web-abc"}}
    far = {"addresses": [net.address("remote-1")], "nodeName": "node-2"}
    family = f"IPv{net.family}"
    return [
        {"kind": "Node", "metadata": {"name": "node-1"}, "spec": {}},
        manifest.service_document(
            "web", cluster_ips=[net.cluster_ip], ports=SERVICE_PORTS, type="NodePort"
        ),
        manifest.slice_document("web", [own], ports=SLICE_PORTS, family=family),
        manifest.service_document(
            "far", cluster_ips=[net.other_cluster_ip], ports=[{"name": "web", "port": 80}]
        ),
        manifest.slice_document("far", [far], ports=SLICE_PORTS[:1], family=family),
    ]


@contextmanager
def flows(world: World, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """The command on the node, once it listens. Its standard output is a pipe."""
    command = [sys.executable, "-m", "agent", "flows", *flags]
    process = world.popen(
        "node", command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        world.run("node", _until_listening, process)
        yield process
    finally:
        process.kill()
        process.communicate()


def _until_listening(process: subprocess.Popen[str]) -> None:
    """Returns once the process has a socket that is subscribed to new connections."""
    while process.poll() is None:
        for line in Path("/proc/thread-self/net/netlink").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[1] == "12" and int(columns[2]) == process.pid and columns[3] == "00000001":
                return
    raise AssertionError(process.communicate())


@pytest.fixture
def cluster(net: Net, proxy: Start, tmp_path: Path) -> Path:
    """The documents in the kernel, and in a file."""
    started = proxy(cluster_cidr="10.244.0.0/16,fd00:10:244::/48")
    started.put(*map(manifest.of, documents(net)))
    place = tmp_path / "cluster.json"
    write(place, *documents(net))
    return place


def from_(place: Path) -> tuple[str, ...]:
    return "--from", str(place), "--node", "node-1"


def test_connections_are_named_with_client_service_endpoint_pod_and_node(
    net: Net, cluster: Path
) -> None:
    """TCP and UDP, at a cluster IP and a node port, kept and masqueraded source."""
    with flows(net.world, *from_(cluster), "--count", "4", "-o", "json") as process:
        net.ask("pod-3", (net.cluster_ip, 80))
        net.ask("pod-3", (net.cluster_ip, 80), "udp")
        net.ask("client", (net.address("node"), NODE_PORT))
        net.ask("pod-3", (net.other_cluster_ip, 80))
        out, error = process.communicate()
    assert (process.returncode, error) == (0, "")
    found = [json.loads(line) for line in out.splitlines()]
    bracketed = {
        host: f"[{net.address(host)}]" if net.family == 6 else net.address(host)
        for host in ("pod-3", "client", "pod-1", "remote-1", "node")
    }
    assert [f["client"].rpartition(":")[0] for f in found] == [
        *(bracketed["pod-3"], bracketed["pod-3"], bracketed["client"], bracketed["pod-3"])
    ]
    assert [(f["protocol"], f["service"], f["port"]) for f in found] == [
        ("tcp", "default/web", "80 (web)"),
        ("udp", "default/web", "80 (dns)"),
        ("tcp", "default/web", "80 (web)"),
        ("tcp", "default/far", "80 (web)"),
    ]
    assert [(f["endpoint"], f["pod"], f["node"]) for f in found] == [
        *[(f"{bracketed['pod-1']}:{TARGET_PORT}", "web-abc", "node-1")] * 3,
        (f"{bracketed['remote-1']}:{TARGET_PORT}", "", "node-2"),
    ]
    assert found[2]["destination"] == f"{bracketed['node']}:{NODE_PORT}"
    assert [f["masqueraded"] for f in found] == [False, False, True, False]


def test_one_service_can_be_asked_for_and_other_connections_are_left_out(
    net: Net, cluster: Path
) -> None:
    with flows(net.world, "far", *from_(cluster), "--count", "1") as process:
        net.ask("pod-3", (net.cluster_ip, 80))  # another Service
        net.ask("pod-3", (net.address("pod-1"), TARGET_PORT))  # no Service
        net.ask("pod-3", (net.other_cluster_ip, 80))
        out, _ = process.communicate()
    (line,) = out.splitlines()
    assert re.match(r"\d\d:\d\d:\d\d\.\d{3}  tcp  ", line)
    assert "default/far:80 (web) > " in line
    assert line.endswith("on node-2")


def test_ctrl_c_ends_it_with_success_and_seconds_end_it_too(net: Net, cluster: Path) -> None:
    with flows(net.world, *from_(cluster), "--follow") as process:
        process.send_signal(signal.SIGINT)
        assert process.communicate() == ("", "")
        assert process.returncode == 0
    with flows(net.world, *from_(cluster), "--seconds", "0.3") as process:
        assert process.communicate() == ("", "")
        assert process.returncode == 0


def test_an_unknown_service_is_a_failure(net: Net, cluster: Path) -> None:
    command = [sys.executable, "-m", "agent", "flows", "nothing", *from_(cluster)]
    process = net.world.popen("node", command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    _, error = process.communicate()
    assert (process.returncode, "there is no Service default/nothing" in error) == (2, True)


def test_lost_events_are_counted(net: Net, cluster: Path) -> None:
    """A socket with a small buffer that is not read while connections are made."""

    def listen() -> list[object]:
        with FlowWatch() as watch:
            watch._socket._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 2048)
            for _ in range(40):
                net.ask("node", (net.address("pod-1"), TARGET_PORT), "udp")
            return list(watch.events(0.2))

    found = net.world.run("node", listen)
    (lost,) = (event for event in found if isinstance(event, Lost))
    assert lost.lost + len(found) - 1 == 40


def test_the_kernel_sends_events_here(net: Net) -> None:
    assert net.world.run("node", sends_events)


def test_the_agent_says_whose_the_addresses_are_also_after_a_change(
    world: World, tmp_path: Path
) -> None:
    net = Net(world, 4)
    place, path = tmp_path / "cluster.json", str(tmp_path / "api.sock")
    first, later = documents(net)[:3], documents(net)
    write(place, *first)
    with Agent(world, place, "--api-socket", path) as agent:
        agent.wait("programmed")
        with flows(world, "--socket", path, "--count", "2", "-o", "json") as process:
            net.ask("pod-3", (net.cluster_ip, 80))
            assert process.stdout
            assert json.loads(process.stdout.readline())["pod"] == "web-abc"
            since = len(agent.lines)
            write(place, *later)
            agent.wait("programmed", since)
            line = ""
            while not line:  # the agent is asked again only every other second
                net.ask("pod-3", (net.other_cluster_ip, 80))
                if process.poll() is not None:
                    line = process.stdout.readline()
            assert msgspec.json.decode(line)["service"] == "default/far"
        agent.terminate()


# --- what is no connection ----------------------------------------------------------------------


@pytest.fixture
def counting(net: Net, tmp_path: Path) -> Iterator[str]:
    """The socket of an agent with Services that refuse and drop."""
    place, socket = tmp_path / "cluster.json", str(tmp_path / "api.sock")
    cidr = "fd00:10:96::/112" if net.family == 6 else "10.96.0.0/16"
    write(
        place,
        *documents(net),
        {"kind": "ServiceCIDR", "metadata": {"name": "all"}, "spec": {"cidrs": [cidr]}},
        manifest.service_document(
            "local",
            cluster_ips=[f"{net.other_cluster_ip}0"],
            ports=SERVICE_PORTS,
            type="LoadBalancer",
            ingress=[{"ip": net.balancer_ip}],
            internalTrafficPolicy="Local",
            loadBalancerSourceRanges=["192.0.2.0/24", "2001:db8:7::/64"],
        ),
        manifest.slice_document(
            "local",
            [net.endpoint("remote-1")],
            ports=SLICE_PORTS,
            family=f"IPv{net.family}",
        ),
        manifest.service_document(
            "empty", cluster_ips=[f"{net.other_cluster_ip}1"], ports=SERVICE_PORTS
        ),
    )
    with Agent(net.world, place, "--api-socket", socket) as agent:
        agent.wait("programmed")
        yield socket
    with net.world.run("node", lambda: Kernel(own=False)) as kernel:
        kernel.remove()


def refuse_and_drop(net: Net) -> None:
    """Packets of each reason, in different numbers."""
    net.ask("pod-3", (f"{net.other_cluster_ip}1", 80))
    for _ in range(2):
        net.ask("pod-3", (net.cluster_ip, 81), "udp", timeout=0.9)
    for _ in range(3):
        net.ask("pod-3", (f"{net.other_cluster_ip}0", 80), "udp", timeout=0.1)
    for _ in range(4):
        net.ask("client", (net.balancer_ip, 80), "udp", timeout=0.1)
    for _ in range(5):
        net.ask("pod-3", (net.unallocated_ip, 80), "udp", timeout=0.1)


def test_what_was_refused_and_dropped_is_shown_with_its_reason(net: Net, counting: str) -> None:
    """The packets since the command began, and none of those before; connections beside them."""
    refuse_and_drop(net)
    time.sleep(READ_SECONDS)  # an older reading is answered for so long
    with flows(net.world, "--socket", counting, "--seconds", "4", "-o", "json") as process:
        refuse_and_drop(net)
        net.ask("pod-3", (net.cluster_ip, 80))
        out, error = process.communicate()
    assert (process.returncode, error) == (0, "")
    found: Counter[tuple[str, ...]] = Counter()
    for record in map(json.loads, out.splitlines()):
        if "packets" in record:
            parts = ("outcome", "destination", "service", "port", "reason")
            found[tuple(record[part] for part in parts)] += record["packets"]
    at = "[{}]:80/{}" if net.family == 6 else "{}:80/{}"
    assert found == {
        ("refused", at.format(f"{net.other_cluster_ip}1", "tcp"), "default/empty", "web",
         "no_endpoints"): 1,
        ("refused", net.cluster_ip, "default/web", "", "unknown_port"): 2,
        ("dropped", at.format(f"{net.other_cluster_ip}0", "udp"), "default/local", "dns",
         "no_local_endpoints"): 3,
        ("dropped", at.format(net.balancer_ip, "udp"), "default/local", "dns", "source_ranges"): 4,
        ("dropped", "ip6" if net.family == 6 else "ip", "", "", "unallocated"): 5,
    }  # fmt: skip
    assert '"pod":"web-abc"' in out


def test_of_one_service_only_its_own_refusals_are_shown(net: Net, counting: str) -> None:
    with flows(net.world, "web", "--socket", counting, "--seconds", "3") as process:
        refuse_and_drop(net)
        out, _ = process.communicate()
    (line,) = out.splitlines()
    where = re.escape(f"{net.cluster_ip}  default/web  2 packets: no Service port has this port")
    assert re.fullmatch(rf"\d\d:\d\d:\d\d\.\d{{3}}  refused  {where}", line)


def test_nothing_is_added_to_the_rules_while_flows_watches(net: Net, counting: str) -> None:
    """The packet path is that of a node on which no command runs."""
    rules = net.world.run("node", rule_texts)
    with flows(net.world, "web", "--socket", counting, "--follow"):
        assert net.world.run("node", rule_texts) == rules
