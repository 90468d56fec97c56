"""Four troubles of a night, and what the commands and the page say: docs/an-operators-night.md.

`NIGHT=write pytest tests/kernel/test_night.py` writes the document and takes the pictures; without
it, the text is compared. Times and numbers that differ from run to run are replaced by one example
of them. Without Chromium the commands alone are compared.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from lab.world import World
from tests.browser.chromium import Page, chromium, lacks
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
    (r"(answer is of|last answer) \d+ s ago", r"\1 1 s ago"),
    (r"\b\d\d:\d\d:\d\d\b", "02:13:37"),
)


class Night:
    """The cluster, its agent, the page if there is a browser, and the document so far."""

    def __init__(self, world: World, server: FabricServer, socket: Path, page: Page | None) -> None:
        self.world = world
        self.server = server
        self._socket = socket
        self._page = page
        self.text = [
            "# An operator's night",
            "",
            "Four troubles, each made in a network namespace with a real agent, and what the",
            "commands and the status page say on that node. tests/kernel/test_night.py writes this",
            "document. Times and counts are examples.",
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
        self.text += ["", "```text", f"$ sliceproxy {command}", _example(lines), "```"]
        return output

    def show_page(self, picture: str, route: str, *words: str, keep: str = "") -> None:
        """Appends what the page shows once it has these words, of that only lines that match
        `keep`, and a picture. Without a browser it is what the document has already."""
        head = f"![The page, `/{route}`](images/{picture}.png)"
        if self._page is None:
            known = PAGE.read_text()
            self.text += ["", known[known.index(head) :].partition("\n```\n")[0], "```"]
            return
        page = self._page
        page.open(route)

        def complete() -> str:
            text = str(page.run("return document.querySelector('main').innerText"))
            return text if all(word in text for word in words) else ""

        lines = page.until(complete).splitlines()
        shown = [line.rstrip().replace("\t", "  ") for line in lines if line.strip()]
        text = _example([line for line in shown if re.search(keep, line)])
        self.text += ["", head, "", "```text", text, "```"]
        if os.environ.get("NIGHT") == "write":
            image = PAGE.parent / "images" / f"{picture}.png"
            image.write_bytes(page.driver.get_screenshot_as_png())

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, self.run("status")
            time.sleep(0.05)

    def nft(self, text: str) -> None:
        self.world.run("node", lambda: subprocess.run(["nft", text], check=True))


def _example(lines: list[str]) -> str:
    text = "\n".join(lines)
    for pattern, example in EXAMPLES:
        text = re.sub(pattern, example, text)
    return text


class _Forward(socketserver.StreamRequestHandler):
    """Passes one request on to the agent's socket, as `kubectl port-forward` does."""

    server: _Forwarder

    def handle(self) -> None:
        with socket.socket(socket.AF_UNIX) as agent:
            agent.connect(str(self.server.place))
            head = b""
            while not head.endswith(b"\r\n\r\n") and (line := self.rfile.readline()):
                head += line
            agent.sendall(head)
            with suppress(BrokenPipeError, ConnectionResetError):
                while data := agent.recv(65536):
                    self.wfile.write(data)


class _Forwarder(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def __init__(self, place: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Forward)
        self.place = place


@contextmanager
def page_of(place: Path, profile: Path) -> Iterator[Page | None]:
    """The page of the agent at this socket; None where no browser is installed."""
    if lacks():
        yield None
        return
    with _Forwarder(place) as forwarder, chromium(profile) as driver:
        threading.Thread(target=forwarder.serve_forever, daemon=True).start()
        yield Page(driver, f"http://127.0.0.1:{forwarder.server_address[1]}/")
        forwarder.shutdown()


@pytest.fixture
def night(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Night]:
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    place = tmp_path / "api.sock"
    with World(prefix="sliceproxy-night") as world, FabricServer(world) as server:
        world.serve("remote-1", 8080)
        server.put(
            node_document(addresses=["172.31.0.2"], pod_cidrs=["10.244.1.0/24"]),
            cidr_document("10.96.0.0/16"),
            service_document(cluster_ips=["10.96.0.10"]),
            slice_document("web", [endpoint("10.244.2.11", node="node-2", pod="web-1")]),
        )
        flags = (f"--server={server.url}", f"--api-socket={place}", "--detect-local-mode=NodeCIDR")
        with Agent(world, None, *flags, module=FAST) as agent:
            agent.wait("programmed")
            with page_of(place, tmp_path / "profile") as page:
                made = Night(world, server, place, page)
                made.until(place.exists)
                yield made


SUMMARY = r"^(programming|ready|services|endpointslices|nodes) |open problem|^  "
OVERVIEW = r"attention|answer|forwards|pod CIDRs|since|^Service  |^default/"
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
    night.say("The page has the same on one screen:")
    night.show_page(
        "night-endpoints",
        "#/services/default/web",
        "refused: no endpoints",
        "not used, not ready",
        "not ready now",
        "0.0",
    )
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
    night.say("The page's doctor begins with what needs attention:")
    night.show_page("night-firewall", "#/doctor", "corporate", keep="attention|firewall|corporate")
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
    night.say("On the page the problem is the headline:")
    night.show_page("night-pod-cidrs", "", "1 problem needs", "served\t0.0", keep=OVERVIEW)
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
    night.say("And the page says what the node does meanwhile:")
    late = [f"{name}: backing off" for name in ("services", "endpointslices", "nodes")]
    night.show_page(
        "night-api-server", "", "servicecidrs: backing", *late, "served\t0.0", keep=OVERVIEW
    )
    night.server.up()
    night.until(lambda: "backing off" not in night.run("status"))
