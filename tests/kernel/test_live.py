"""The agent as a process with its API: every command, live and from manifests, against packets."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import yaml

from agent.cli.client import Client
from agent.kernel.counters import READ_SECONDS
from agent.kernel.lookups import KernelElements
from agent.kernel.tables import Kernel
from agent.loop import difference
from agent.serve.api import Flows
from lab.world import World
from rules.explain import Explanation, explain
from rules.tables import SETS
from tests.kernel.agent import PATIENCE, Agent, Connections, write
from tests.kernel.proxy import Proxy
from tests.kernel.test_run import until
from tests.manifest import (
    endpoint,
    endpoint_slice,
    node,
    node_document,
    service,
    service_document,
    slice_document,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make namespaces")

ROOT = Path(__file__).parents[2]
BIND = "127.0.0.1:10390"
DATA_PLANE = ("--detect-local-mode=NodeCIDR",)
PYTHON = "/usr/bin/python3"
UDP = {"name": "dns", "port": 53, "protocol": "UDP"}
UDP_TARGET = {"name": "dns", "port": 8080, "protocol": "UDP"}
NODE_PORT = {"name": "http", "port": 80, "nodePort": 30080}


def documents() -> list[dict[str, Any]]:
    """Services for the main rows of the semantics."""
    return [
        node_document(addresses=["172.31.0.2"], pod_cidrs=["10.244.1.0/24"]),
        {"kind": "ServiceCIDR", "metadata": {"name": "all"}, "spec": {"cidrs": ["10.96.0.0/16"]}},
        service_document(cluster_ips=["10.96.0.10"], type="NodePort", ports=[NODE_PORT]),
        slice_document("web", [endpoint("10.244.1.11", pod="web-1"), endpoint("10.244.1.12")]),
        service_document("dns", cluster_ips=["10.96.0.20"], ports=[UDP]),
        slice_document("dns", [endpoint("10.244.1.11")], ports=[UDP_TARGET]),
        service_document("empty", cluster_ips=["10.96.0.30"]),
        service_document(
            "local",
            cluster_ips=["10.96.0.40"],
            type="LoadBalancer",
            externalTrafficPolicy="Local",
            ports=[{"name": "http", "port": 80, "nodePort": 30081}],
            ingress=[{"ip": "203.0.113.9"}],
        ),
        slice_document("local", [endpoint("10.244.2.11", node="node-2")]),
        service_document("sticky", cluster_ips=["10.96.0.50"], sessionAffinity="ClientIP"),
        slice_document("sticky", [endpoint("10.244.1.11"), endpoint("10.244.1.12")]),
        service_document(
            "guarded",
            cluster_ips=["10.96.0.60"],
            type="LoadBalancer",
            ports=[{"name": "http", "port": 80, "nodePort": 30082}],
            ingress=[{"ip": "203.0.113.8"}],
            loadBalancerSourceRanges=["10.244.1.13/32"],
        ),
        slice_document("guarded", [endpoint("10.244.1.11")]),
    ]


class Live(NamedTuple):
    """A world in which the agent runs, and its socket."""

    world: World
    agent: Agent
    place: Path
    socket: Path

    def run(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """A command on the node."""
        command = [sys.executable, "-m", "agent", *arguments]
        return self.world.run(
            "node",
            lambda: subprocess.run(
                command, capture_output=True, text=True, check=False, cwd=ROOT, input=stdin
            ),
        )

    def ask(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command that asks the agent."""
        return self.run(*arguments, "--socket", str(self.socket))

    def record(self, *arguments: str) -> Any:
        """What a command prints as JSON."""
        done = self.ask(*arguments, "-o", "json")
        assert done.stdout, done.stderr
        return json.loads(done.stdout)

    def change(self, *changed: dict[str, Any]) -> None:
        """Other manifests; returns when they are programmed."""
        seen = len(self.agent.lines)
        write(self.place, *changed)
        self.agent.wait("programmed", since=seen)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    directory = tmp_path_factory.mktemp("live")
    place, socket = directory / "cluster.json", directory / "api.sock"
    write(place, *documents())
    flags = (f"--api-socket={socket}", f"--api-bind-address={BIND}", *DATA_PLANE)
    with World() as world:
        for host in ("pod-1", "pod-2", "remote-1"):
            for protocol in ("tcp", "udp"):
                world.serve(host, 8080, protocol)
        with Agent(world, place, *flags) as agent:
            agent.wait("programmed")
            until(socket.exists)
            yield Live(world, agent, place, socket)


# --- the commands -------------------------------------------------------------------------------


def test_the_api_lists_connections_and_listens_only_while_it_is_asked(live: Live) -> None:
    """Real connections, over the socket; no socket is subscribed before the first question."""

    def flows(after: int) -> Any:
        return Client(str(live.socket)).get(f"/v1/flows?after={after}", Flows)

    def subscribed() -> bool:
        lines = live.world.run("node", Path("/proc/thread-self/net/netlink").read_text)
        return any(c[1] == "12" and c[3] == "00000001" for c in map(str.split, lines.splitlines()))

    assert not subscribed()
    found = flows(0)
    assert subscribed()
    assert live.world.ask("pod-3", "10.96.0.10", 80).outcome == "answered"
    until(lambda: flows(found.sequence).flows)
    (flow,) = flows(found.sequence).flows
    assert (flow.service, flow.client.partition(":")[0]) == ("default/web", "10.244.1.13")
    assert flow.endpoint in ("10.244.1.11:8080", "10.244.1.12:8080")


def test_status_says_that_the_node_is_programmed(live: Live) -> None:
    status = live.record("status")
    assert (status["node"], status["programmed"], status["ready"]) == ("node-1", True, True)
    assert status["counts"]["services"] == 6
    assert status["options"]["api_socket"] == str(live.socket)
    done = live.ask("status")
    assert done.returncode == (1 if status["problems"] else 0)
    assert "up to date" in done.stdout
    assert live.ask("status", "-o", "name").stdout == "node/node-1\n"
    assert yaml.safe_load(live.ask("status", "-o", "yaml").stdout)["node"] == "node-1"


@pytest.mark.parametrize(
    "command",
    [
        *(("services", "-o", output) for output in ("text", "name")),
        *(("endpoints", "web", "-o", output) for output in ("text", "json", "name")),
        *(("explain", "web", "-o", output) for output in ("text", "json", "name")),
        ("services", "-n", "default"),
        ("endpoints", "svc/local"),
        ("explain", "10.96.0.30:80", "--from-address", "10.244.1.13"),
        ("diff",),
    ],
    ids=" ".join,
)
def test_a_command_says_the_same_live_and_from_the_manifests(
    live: Live, command: tuple[str, ...]
) -> None:
    asked = live.ask(*command)
    computed = live.run(*command, "--from", str(live.place), "--node=node-1", *DATA_PLANE)
    assert asked.stderr == computed.stderr == ""
    assert asked.stdout == computed.stdout
    assert asked.returncode == computed.returncode
    assert asked.stdout or command == ("diff",)


@pytest.mark.parametrize("output", ["json", "yaml"])
def test_services_live_are_those_of_the_manifests_with_counters(live: Live, output: str) -> None:
    asked = yaml.safe_load(live.ask("services", "-o", output).stdout)
    source = ("--from", str(live.place), "--node=node-1", *DATA_PLANE)
    computed = yaml.safe_load(live.run("services", "-o", output, *source).stdout)
    counters = ("connections", "refused", "dropped")
    for frontend in (f for line in asked for f in line["frontends"]):
        assert all(isinstance(frontend[name], int) for name in counters)
        frontend.update(dict.fromkeys(counters))
    assert asked == computed
    assert "CONNECTIONS" in live.ask("services", "-o", "wide").stdout.upper()


def test_doctor_live_knows_the_state_of_the_agent(live: Live) -> None:
    """The checks of a node and of what the agent knows of it, and a person's view of them."""
    checks = {c["id"]: c["state"] for c in live.record("doctor")}
    assert checks
    assert set(checks.values()) <= {"ok", "warning", "failed", "unknown"}
    assert live.ask("doctor").returncode == int(bool({"warning", "failed"} & {*checks.values()}))


def test_a_name_that_is_wrong_gets_a_suggestion(live: Live) -> None:
    for command in ("endpoints", "explain", "history"):
        done = live.ask(command, "wbe")
        assert done.returncode == 2, (command, done.stdout)
        assert "did you mean default/web?" in done.stderr, (command, done.stderr)
    done = live.ask("services", "-n", "defualt")
    assert (done.returncode, done.stdout) == (0, "No Services.\n")
    assert "did you mean default?" in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        *("status", "services", "endpoints web", "explain web", "explain 10.96.0.10:80", "diff"),
        *("history", "top --once", "doctor", "flows"),
    ],
)
def test_without_an_agent_the_exit_code_is_3(live: Live, tmp_path: Path, command: str) -> None:
    done = live.run(*command.split(), "--socket", str(tmp_path / "none"))
    assert (done.returncode, done.stdout) == (3, ""), done.stderr
    assert "no agent answers there" in done.stderr


@pytest.mark.parametrize(
    ("code", "command"),
    [
        *((0, c) for c in ("services", "endpoints web", "explain web", "explain 10.96.0.10:80")),
        *((0, c) for c in ("diff", "history", "history web", "history --since 10m")),
        *((0, c) for c in ("top --once --interval 0.1", "flows --seconds 0.1")),
        *((1, c) for c in ("explain empty", "explain 10.96.0.30:80", "explain 10.96.9.9:80")),
        *((2, c) for c in ("explain 10.96.0.10", "explain nothing", "explain fd00::1:80/icmp")),
        *((2, c) for c in ("endpoints nothing", "history nothing", "history --since yesterday")),
        *((2, c) for c in ("flows nothing", "top --interval 0", "services -o csv", "diff web")),
        *((2, c) for c in ("status web", "doctor --node", "services --config /nonexistent")),
    ],
)
def test_each_exit_code_of_a_live_command(live: Live, code: int, command: str) -> None:
    """As docs/commands.md has them; with 2 and 3 nothing is on standard output, and the reason is
    on standard error."""
    done = live.ask(*command.split())
    assert done.returncode == code, (done.stdout, done.stderr)
    assert bool(done.stderr) == (code == 2), done.stderr
    assert not (done.stdout and code == 2)


def test_status_is_exit_code_1_while_there_is_a_problem(live: Live) -> None:
    """One Service cannot be served as it is; without it the code is 0."""
    bad = service_document("bad", cluster_ips=["10.96.0.99"], externalIPs=["127.0.0.1"])
    codes = []
    for changed in ([*documents(), bad], documents()):
        live.change(*changed)
        codes.append(live.ask("status").returncode)
    assert codes == [1, 0]


@pytest.mark.parametrize(
    ("code", "command"),
    [
        (1, "trace 10.96.9.9:80 --seconds 0.1"),
        *((2, c) for c in ("trace 10.96.0.10", "trace 10.96.0.10:80 --from-address fd00::1")),
        (2, "trace 10.96.0.10:80 --count 0"),
    ],
)
def test_each_exit_code_of_trace_without_a_packet(live: Live, code: int, command: str) -> None:
    done = live.run(*command.split())
    assert (done.returncode, bool(done.stderr)) == (code, True)


# --- rates --------------------------------------------------------------------------------------


@contextmanager
def asking(live: Live) -> Iterator[None]:
    """Connections that are answered, refused and dropped, all the while."""
    addresses = ("10.96.0.10", "10.96.0.30", "10.96.9.9")
    with ExitStack() as stack:
        for address in addresses:
            stack.enter_context(Connections(live.world, "pod-3", address, 80, pause=0.02))
        yield


def test_top_prints_the_rates_of_each_service_once_when_piped(live: Live) -> None:
    for flags in (("--once",), ()):
        with asking(live):
            done = live.ask("top", "--interval", "1", *flags)
        assert (done.returncode, done.stderr) == (0, "")
        head, *lines = map(str.split, done.stdout.splitlines())
        assert head == ["SERVICE", "CONNECTIONS/S", "REFUSED/S", "DROPPED/S"]
        found = {" ".join(line[:-3]): [float(number) > 0 for number in line[-3:]] for line in lines}
        assert found == {
            "default/web": [True, False, False],
            "default/empty": [False, True, False],
            "(no Service)": [False, False, True],
        }
    assert live.ask("top", "--once", "--interval", "0.5", "-n", "other").stdout.split() == head


def test_top_on_a_terminal_shows_rates_until_q_and_leaves_the_terminal_as_it_was(
    live: Live,
) -> None:
    ours, its = os.openpty()
    before = termios.tcgetattr(its)
    command = [sys.executable, "-m", "agent", "top", "--interval", "0.3"]
    process = live.world.popen(
        "node",
        [*command, "--socket", str(live.socket)],
        stdin=its,
        stdout=its,
        stderr=its,
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "20"},
    )
    shown = b""
    with asking(live):
        while b"default/web" not in shown:
            shown += os.read(ours, 65536)
    os.write(ours, b"q")
    assert process.wait(PATIENCE) == 0
    assert termios.tcgetattr(its) == before
    os.close(ours)
    os.close(its)


def test_services_wide_has_the_counters_of_each_line(live: Live) -> None:
    """The sums of its frontends, and what kubectl's users look for: policies and affinity."""
    for _ in range(3):
        assert live.world.ask("pod-3", "10.96.0.10", 80).outcome == "answered"
    time.sleep(READ_SECONDS)
    lines = live.record("services")
    head, *rows = live.ask("services", "-o", "wide").stdout.splitlines()
    assert head.split()[-3:] == ["CONNECTIONS", "REFUSED", "DROPPED"]
    assert len(rows) == len(lines)
    for line, row in zip(lines, rows, strict=True):
        assert row.split()[:2] == [line["namespace"], line["name"]]
        sums = [
            str(sum(f[name] for f in line["frontends"]))
            for name in ("connections", "refused", "dropped")
        ]
        assert row.split()[-3:] == sums
        assert f"{line['internal_policy']}/{line['external_policy']}" in row
        assert ("10800 s" in row) == (line["name"] == "sticky")
        assert all(frontend["address"] in row for frontend in line["frontends"])
    (web,) = (line for line in lines if line["name"] == "web")
    assert sum(f["connections"] for f in web["frontends"]) >= 3


# --- what packets do ----------------------------------------------------------------------------


def test_explain_is_exit_code_1_where_a_client_is_refused_or_dropped(live: Live) -> None:
    assert live.ask("explain", "10.96.0.10:80").returncode == 0
    for address in ("10.96.0.30:80", "203.0.113.9:80", "10.96.9.9:80"):
        assert live.ask("explain", address).returncode == 1


def test_explain_live_says_what_the_kernel_has_and_not_what_the_agent_believes() -> None:
    """An endpoint's element was deleted: the agent's record has it, the kernel has not."""
    with World(pods=0, remotes=0) as world, Proxy(world) as proxy:
        proxy.put(
            service("web", cluster_ips=["10.96.0.10"]),
            endpoint_slice("web", [endpoint("10.244.1.11")]),
        )
        slots = SETS[4].endpoint_map(node_port=False, inside=False)
        proxy.kernel.destroy(slots, list(proxy.in_kernel()[slots].items()))
        computed = explain(proxy.state, "10.96.0.10:80", "198.51.100.1")
        with world.run("node", lambda: Kernel(own=False)) as reading:
            live = explain(proxy.state, "10.96.0.10:80", "198.51.100.1", KernelElements(reading))
    assert computed.asked[0].outcomes == ("sent",)
    assert live.asked[0].outcomes != ("sent",)
    assert (computed.from_kernel, live.from_kernel) == (False, True)


class Counting(Kernel):
    """Counts what is read of the kernel."""

    reads: int
    dumped: list[str]

    def element(self, owner: Any, key: bytes) -> Any:
        self.reads += 1
        return super().element(owner, key)

    def elements(self, owner: Any) -> Any:
        self.dumped.append(owner.name)
        return super().elements(owner)


def test_an_explanation_reads_only_the_elements_that_concern_it() -> None:
    """Looked up by key, equal to the whole; sets that grow with the cluster are not dumped."""
    services = [service(f"s{i}", cluster_ips=[f"10.96.1.{i}"]) for i in range(1, 100)]
    slices = [endpoint_slice(s.name.name, [endpoint("10.244.1.11")]) for s in services]
    with World(pods=0, remotes=0) as world, Proxy(world) as proxy:
        proxy.put(node(pod_cidrs=["10.244.1.0/24"]), *services, *slices)
        with world.run("node", lambda: Counting(own=False)) as reading:
            reading.reads, reading.dumped = 0, []
            found = explain(proxy.state, "10.96.1.7:80", None, KernelElements(reading))
            whole = explain(proxy.state, "10.96.1.7:80", None, proxy.in_kernel())
    assert found == whole
    assert reading.reads < 20
    assert set(reading.dumped) <= {"pod-cidrs", "service-cidrs", "nodeport-ips"}


# --- history, difference ------------------------------------------------------------------------


def test_history_shows_an_endpoints_change_and_its_reason(live: Live) -> None:
    before = documents()
    after = documents()
    after[3] = slice_document(
        "web", [endpoint("10.244.1.11", pod="web-1", ready=False), endpoint("10.244.1.12")]
    )
    try:
        live.change(*after)
        entry = live.record("history", "web")[-1]
        assert (entry["kind"], entry["service"]) == ("endpoint_changed", "default/web")
        assert (entry["endpoint"], entry["pod"]) == ("10.244.1.11", "web-1")
        assert entry["reason"] == "ready before, not ready now"
        assert entry["elements"] > 0
        text = live.ask("history", "web", "--since", "10m").stdout
        assert "pod web-1, on node-1, ready before, not ready now" in text
        assert live.ask("history", "web", "-o", "name").stdout == "service/default/web\n"
    finally:
        live.change(*before)


def test_a_difference_is_what_the_agent_would_repair_and_changes_nothing() -> None:
    """One element was deleted and one added; the snapshot that is compared is unchanged."""
    with World(pods=0, remotes=0) as world, Proxy(world) as proxy:
        proxy.put(
            service("web", cluster_ips=["10.96.0.10"]),
            endpoint_slice("web", [endpoint("10.244.1.11")]),
        )
        snapshot = proxy.state.snapshot()
        before = snapshot.elements()
        assert world.run("node", lambda: difference(snapshot, proxy.kernel)) == []
        slots = SETS[4].endpoint_map(node_port=False, inside=False)
        proxy.kernel.destroy(slots, list(proxy.in_kernel()[slots].items()))
        commands = world.run("node", lambda: difference(snapshot, proxy.kernel))
        assert commands
        assert all(c.startswith("add element ip sliceproxy endpoints") for c in commands), commands
        assert "10.244.1.11 . 8080" in commands[0]
        assert snapshot.elements() == before
        assert world.run("node", lambda: difference(snapshot, proxy.kernel)) == commands


# --- who may ask --------------------------------------------------------------------------------


def _get(live: Live, host: str) -> tuple[int, bytes]:
    def ask() -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(*BIND.split(":"), timeout=10)
        connection.request("GET", "/v1/status", headers={"Host": host})
        answer = connection.getresponse()
        return answer.status, answer.read()

    return live.world.run("node", ask)


def test_a_web_page_with_a_name_of_its_own_gets_nothing(live: Live) -> None:
    """DNS rebinding: the browser sends the page's host name."""
    assert _get(live, BIND)[0] == 200
    assert _get(live, "localhost:10390")[0] == 200
    status, body = _get(live, "evil.example:10390")
    assert (status, b"node-1" in body) == (421, False)


@pytest.mark.skipif(
    not (shutil.which("setpriv") and Path(PYTHON).exists()),
    reason="needs setpriv, and a Python that everyone may run",
)
def test_an_ordinary_user_cannot_use_the_socket(live: Live) -> None:
    for directory in live.socket.parents:  # pytest keeps others out of its own
        if directory.stat().st_mode & 0o5 != 0o5:
            directory.chmod(directory.stat().st_mode | 0o55)
        if directory == Path("/tmp"):
            break
    code = f"import socket; socket.socket(socket.AF_UNIX).connect({str(live.socket)!r})"
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"]
    done = subprocess.run([*user, PYTHON, "-c", code], capture_output=True, text=True, check=False)
    assert "PermissionError" in done.stderr, done.stderr
    assert subprocess.run([PYTHON, "-c", code], check=False).returncode == 0


def test_records_are_those_of_the_reports(live: Live) -> None:
    """What the agent answers decodes as the record that --from computes."""
    found = msgspec.convert(live.record("explain", "10.96.0.10:80"), Explanation)
    assert found.answering
    assert found.answering.service == "default/web"
