"""Four troubles of a night, and what the commands say: docs/an-operators-night.md is their output.

`NIGHT=write pytest tests/kernel/test_night.py` writes the document; without it, it is compared.
Times and numbers that differ from run to run are replaced by one example of them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab.world import World
from tests.cluster.cluster import FAST, FabricServer, cidr_document
from tests.kernel.agent import PATIENCE, Agent
from tests.manifest import endpoint, node_document, service_document, slice_document

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make namespaces"),
    pytest.mark.skipif(not shutil.which("nft"), reason="needs the nft program"),
]

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "an-operators-night.md"
FIREWALL = """
table inet corporate {
    chain forward {
        type filter hook forward priority filter; policy drop;
        ct state established accept
    }
}
"""
EXAMPLES = (
    (r"\d\d:\d\d:\d\d\.\d{3}", "02:13:37.000"),
    (r"since \d\d:\d\d:\d\d", "since 02:13:37"),
    (r"last answer \d+ s ago", "last answer 1 s ago"),
    (r", \d+ errors, \d+ relists", ", 3 errors, 0 relists"),
    (r" \d+ elements?", " 4 elements"),
    (r"http://[\d.]+:\d+", "https://10.0.0.1:6443"),
)


class Night:
    """The cluster, its agent, and the document so far."""

    def __init__(self, world: World, server: FabricServer, socket: Path) -> None:
        self.world = world
        self.server = server
        self._socket = socket
        self.text = [
            "# An operator's night",
            "",
            "Four troubles, each made in a network namespace with a real agent, and what the",
            "commands say on that node. tests/kernel/test_night.py writes this document. Times and",
            "counts are examples.",
        ]

    def say(self, *lines: str) -> None:
        self.text += ["", *lines]

    def run(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "agent", *arguments, f"--socket={self._socket}"]
        done = self.world.run(
            "node",
            lambda: subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT),
        )
        return done.stdout + done.stderr

    def show(self, command: str, keep: str = "") -> str:
        """Appends a command and its output, of that only lines that match `keep`."""
        output = self.run(*command.split())
        lines = [line.rstrip() for line in output.splitlines() if re.search(keep, line)]
        text = "\n".join(lines)
        for pattern, example in EXAMPLES:
            text = re.sub(pattern, example, text)
        self.text += ["", "```text", f"$ sliceproxy {command}", text, "```"]
        return output

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, self.run("status")
            time.sleep(0.05)

    def nft(self, text: str) -> None:
        self.world.run("node", lambda: subprocess.run(["nft", text], check=True))


@pytest.fixture
def night(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Night]:
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    socket = tmp_path / "api.sock"
    with World(prefix="sliceproxy-night") as world, FabricServer(world) as server:
        world.serve("remote-1", 8080)
        server.put(
            node_document(addresses=["172.31.0.2"], pod_cidrs=["10.244.1.0/24"]),
            cidr_document("10.96.0.0/16"),
            service_document(cluster_ips=["10.96.0.10"]),
            slice_document("web", [endpoint("10.244.2.11", node="node-2", pod="web-1")]),
        )
        flags = (f"--server={server.url}", f"--api-socket={socket}", "--detect-local-mode=NodeCIDR")
        with Agent(world, None, *flags, module=FAST) as agent:
            agent.wait("programmed")
            made = Night(world, server, socket)
            made.until(socket.exists)
            yield made


SUMMARY = r"^(programming|ready|services|endpointslices|nodes) |open problem|^  "
OUTCOME = r"is a|is answered|policy|endpoints|^(A|The|  [a-z]+ to|  is|  which)|rules and"


def test_an_operators_night(night: Night) -> None:
    """Every command names the trouble, and the document says what it says."""
    _lost_endpoints(night)
    _firewall(night)
    _pod_cidrs(night)
    _api_server(night)
    text = "\n".join(night.text) + "\n"
    if os.environ.get("NIGHT") == "write":
        PAGE.write_text(text)
    assert PAGE.read_text() == text


def _lost_endpoints(night: Night) -> None:
    night.say("## A Service has lost its endpoints")
    assert night.world.ask("pod-1", "10.96.0.10", 80).outcome == "answered"
    lost = endpoint("10.244.2.11", node="node-2", pod="web-1", ready=False)
    night.server.put(slice_document("web", [lost]))
    night.until(lambda: "refused" in night.run("services"))
    assert night.world.ask("pod-1", "10.96.0.10", 80).outcome == "refused"
    night.say("Clients of `web` get `connection refused`. Nothing is wrong with the node:")
    assert "up to date" in night.show("status", SUMMARY)
    night.say("The address is refused because the list is empty:")
    assert "is refused" in night.show("explain 10.96.0.10:80 --from-address 10.244.1.11", OUTCOME)
    night.say("And the history says which pod, and why:")
    assert "ready before, not ready now" in night.show("history web")
    night.say("So look at the pod: its readiness probe fails.")
    night.server.put(slice_document("web", [endpoint("10.244.2.11", node="node-2", pod="web-1")]))
    night.until(lambda: "served" in night.run("services"))


def _firewall(night: Night) -> None:
    night.say("## A firewall drops what is forwarded")
    night.nft(FIREWALL)
    assert night.world.ask("pod-1", "10.96.0.10", 80, timeout=0.3).outcome == "silent"
    night.say("Clients of `web` wait until they give up. `explain` sends them to the endpoint:")
    assert "goes to" in night.show("explain 10.96.0.10:80 --from-address 10.244.1.11", OUTCOME)
    night.say("So something behind the translation drops them. `doctor` reads all other tables:")
    assert "corporate" in night.show("doctor", "corporate")
    night.nft("delete table inet corporate")
    assert night.world.ask("pod-1", "10.96.0.10", 80).outcome == "answered"


def _pod_cidrs(night: Night) -> None:
    night.say("## Pods outside the pod CIDRs of their Node")
    night.server.delete("Node", "node-1", "")
    night.server.put(node_document(addresses=["172.31.0.2"], pod_cidrs=["10.245.0.0/24"]))
    local = endpoint("10.244.1.12", pod="web-2")
    night.server.put(slice_document("web", [local]))
    night.until(lambda: "endpoints_outside_pod_cidrs" in night.run("status"))
    night.say(
        "The network plugin gives pods other addresses than the Node's `podCIDRs`, so the rules",
        "take pods of this node for clients outside. `status` has it as a problem, with a remedy:",
    )
    assert "detect-local-mode" in night.show("status", "open problem|^  ")
    night.say("`explain` says what a pod is taken for:")
    found = night.show("explain 10.96.0.10:80 --from-address 10.244.1.11", OUTCOME)
    assert "A client outside" in found
    night.server.put(node_document(addresses=["172.31.0.2"], pod_cidrs=["10.244.1.0/24"]))
    night.until(lambda: "endpoints_outside_pod_cidrs" not in night.run("status"))


def _api_server(night: Night) -> None:
    night.say("## The API server is away")
    night.server.down()
    night.until(lambda: "backing off" in night.run("status"))
    night.until(lambda: night.run("status").count("backing off") >= 3)
    night.say("The node forwards by what it knew last. `status` says how old that is:")
    night.show("status", r"^(programming|services|endpointslices|nodes) ")
    night.say("`explain` reads the kernel, so its answer counts as before:")
    found = night.show("explain 10.96.0.10:80 --from-address 10.244.1.11", OUTCOME)
    assert "read from the kernel" in found
    night.server.up()
    night.until(lambda: "backing off" not in night.run("status"))
