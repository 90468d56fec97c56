"""The image as a cluster runs it: what is in it, what it makes do with, that nothing is lost."""

from __future__ import annotations

import io
import json
import re
import shutil
import socket
import stat
import subprocess
import sys
import tarfile
import tomllib
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import docker
import pytest
import yaml
from packaging.requirements import Requirement
from spdx_tools.spdx.parser.parse_anything import parse_file
from spdx_tools.spdx.validation.document_validator import validate_full_spdx_document

from agent import __version__
from agent.kernel.kube_proxy import find, remove
from agent.kernel.tables import Kernel
from lab.world import World
from rules.tables import FAMILIES
from tests.cluster.apiserver import ApiServer
from tests.container.conftest import REVISION, ROOT, Node, Running
from tests.kernel.agent import Connections, write
from tests.kernel.test_kube_proxy import connection, on_node, start_kube_proxy
from tests.kernel.test_run import Notifications
from tests.manifest import endpoint, service_document, slice_document

VIP, PORT = "10.96.0.10", 80
STAY = "10.96.0.11"
PORTS = [
    {"name": "http", "port": 80},
    {"name": "dns", "port": 53, "protocol": "UDP"},
]
TARGETS = [
    {"name": "http", "port": 8080},
    {"name": "dns", "port": 8080, "protocol": "UDP"},
]
MOST_MEGABYTES = 61  # the size when it was measured last; more than this needs a reason


def documents(*pods: int) -> list[dict[str, Any]]:
    """A Service `web` over TCP and UDP with these pods as endpoints, and one for connections that
    stay open."""
    endpoints = [endpoint(f"10.244.1.{10 + pod}") for pod in pods]
    return [
        service_document(cluster_ips=[VIP], ports=PORTS),
        slice_document("web", endpoints, ports=TARGETS),
        service_document("stay", cluster_ips=[STAY]),
        slice_document("stay", [endpoint("10.244.1.11")], ports=[{"name": "http", "port": 9000}]),
    ]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory of manifests."""
    write(tmp_path / "cluster.json", *documents(1, 2))
    return tmp_path


def run(node: Node, place: Path, *flags: str, **how: Any) -> Running:
    """The agent, following the manifests in `place`, which it may only read."""
    mounted = {str(place): {"bind": "/manifests", "mode": "ro"}}
    arguments = ("run", "--from", "/manifests", "--node", "node-1", *flags)
    return node.start(*arguments, volumes=mounted, **how)


# --- what is in it ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(engine: docker.DockerClient, image: str) -> dict[str, tarfile.TarInfo]:
    """All of the image's files."""
    container = engine.containers.create(image)
    try:
        data = io.BytesIO(b"".join(container.export()))
    finally:
        container.remove()
    with tarfile.open(fileobj=data) as tar:
        return {f"/{member.name}": member for member in tar}


def test_size(engine: docker.DockerClient, image: str) -> None:
    size = engine.images.get(image).attrs["Size"] / 1e6
    print(f"the image has {size:.1f} MB")
    assert size < MOST_MEGABYTES


def test_nothing_to_log_in_with(files: dict[str, tarfile.TarInfo]) -> None:
    programs = {
        name
        for name, member in files.items()
        # those of no size are the engine's, to mount over: /etc/hosts and the like
        if member.isfile() and member.size and member.mode & 0o111 and ".so" not in name
    }
    assert programs == {"/usr/bin/python3", "/usr/local/bin/sliceproxy"}, programs
    special = {n for n, m in files.items() if m.mode & (stat.S_ISUID | stat.S_ISGID)}
    assert not special
    assert not any("pip" in n.split("/") or "ensurepip" in n.split("/") for n in files)


def test_all_code_is_compiled(files: dict[str, tarfile.TarInfo]) -> None:
    """Nothing could be written where it runs."""
    for name in files:
        if name.endswith(".py"):
            directory, _, module = name.rpartition("/")
            assert re.search(r"/dist-packages/(agent|rules)(/|$)", directory), name
            compiled = f"{directory}/__pycache__/{module.removesuffix('.py')}.cpython-3"
            assert any(other.startswith(compiled) for other in files), name


def test_what_it_is_made_of_is_written_down(files: dict[str, tarfile.TarInfo]) -> None:
    """For people, and for scanners of vulnerabilities."""
    for package in ("libc6", "libssl3t64", "libpython3.13-stdlib", "python3.13-minimal"):
        assert f"/var/lib/dpkg/status.d/{package}" in files
        assert f"/usr/share/doc/{package}/copyright" in files, package
    assert "/usr/share/sliceproxy/versions" in files
    assert "/etc/os-release" in files


def read(engine: docker.DockerClient, image: str, path: str) -> bytes:
    """A file of the image."""
    container = engine.containers.create(image)
    try:
        chunks, _ = container.get_archive(path)
        with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as tar:
            found = tar.extractfile(tar.getmembers()[0])
            assert found
            return found.read()
    finally:
        container.remove()


def test_sbom_is_valid_spdx_and_names_every_package(
    engine: docker.DockerClient, image: str, tmp_path: Path
) -> None:
    """By the SPDX project's own library, and against the list of versions in the image."""
    file = tmp_path / "image.spdx.json"
    file.write_bytes(read(engine, image, "/usr/share/sliceproxy/sbom.spdx.json"))
    document = parse_file(str(file))
    assert not validate_full_spdx_document(document, "SPDX-2.3")
    assert document.creation_info.created == datetime(2026, 1, 1)
    named = {
        (re.sub(r"[-_.]+", "-", package.name).lower(), str(package.version))
        for package in document.packages
        if package.name != "sliceproxy" or not package.primary_package_purpose
    }
    versions = read(engine, image, "/usr/share/sliceproxy/versions").decode()
    pairs = [re.split(" |==", line) for line in versions.splitlines()]
    assert named == {(re.sub(r"[-_.]+", "-", name).lower(), version) for name, version in pairs}
    assert {name for name, _ in named} >= {"libc6", "pyroute2", "sliceproxy"}


def test_labels(engine: docker.DockerClient, image: str, base: str) -> None:
    labels = {
        name.removeprefix("org.opencontainers.image."): value
        for name, value in engine.images.get(image).labels.items()
    }
    assert labels["version"] == __version__
    assert labels["revision"] == REVISION
    assert labels["licenses"] == "Apache-2.0"
    assert labels["base.name"] == base


def test_build_arguments_leave_no_trace(engine: docker.DockerClient, image: str) -> None:
    """Neither the certificates nor the index of whoever built it."""
    history = json.dumps(engine.images.get(image).history())
    assert "CERTIFICATE" not in history
    assert "INDEX" not in history


def test_every_module_can_be_imported(node: Node) -> None:
    """With the packages that the image has been relieved of."""
    program = """
import importlib, pkgutil, agent, rules
for package in (rules, agent):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
        print(module.name)
from kubernetes import client, config
client.ApiClient(client.Configuration())
"""
    code, said = node.once("-I", "-c", program, entrypoint=["/usr/bin/python3"])
    assert code == 0, said
    for module in ("agent.loop", "agent.sources.manifests.follower", "rules.netlink.batch"):
        assert module in said.split()


def test_lock_has_what_pyproject_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lock = (ROOT / "requirements.lock").read_text()
    pinned = dict(re.findall(r"^([a-z0-9_.-]+)==(\S+) \\$", lock, re.MULTILINE))
    for line in project["dependencies"]:
        wanted = Requirement(line)
        version = pinned.get(wanted.name.lower().replace("_", "-"))
        assert version, f"{wanted.name} is missing: make requirements.lock again, as its head says"
        assert wanted.specifier.contains(version), line
    hashes = re.findall(r"--hash=sha256:[0-9a-f]{64}", lock)
    assert len(hashes) >= len(pinned)


# --- with what it makes do ----------------------------------------------------------------------


def test_confinement(node: Node, place: Path) -> None:
    agent = run(node, place)
    agent.wait("programmed")
    status = Path(f"/proc/{agent.pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    net_admin = 1 << 12
    for kind in ("CapEff", "CapPrm", "CapBnd"):
        assert int(fields[kind], 16) == net_admin, kind
    assert int(fields["CapAmb"], 16) == 0
    assert fields["NoNewPrivs"] == "1"
    mounts = Path(f"/proc/{agent.pid}/mounts").read_text().splitlines()
    (root,) = (line.split() for line in mounts if line.split()[1] == "/")
    assert "ro" in root[3].split(",")


def test_without_its_capability_it_says_so(node: Node, place: Path) -> None:
    agent = run(node, place, cap_add=[])
    code = agent.container.wait(timeout=20)["StatusCode"]
    assert code == 2
    assert "CAP_NET_ADMIN" in agent.container.logs().decode()


def test_commands_for_people(node: Node, place: Path) -> None:
    """What `kubectl exec` would run."""
    agent = run(node, place)
    agent.wait("programmed")
    where = ["--from", "/manifests", "--node", "node-1"]
    for command in (
        ["explain", f"{VIP}:{PORT}", *where],
        ["endpoints", "default/web", *where],
        ["render", *where],
    ):
        code, said = agent.container.exec_run(["sliceproxy", *command])
        assert code == 0, (command, said.decode())
        assert "10.244.1.11" in said.decode()
    code, said = agent.container.exec_run(["sh", "-c", "true"])
    assert code in (126, 127), said


# --- packets, and nothing lost ------------------------------------------------------------------


def servers(world: World, client: str, protocol: Any = "tcp", port: int = PORT) -> set[str | None]:
    return {world.ask(client, VIP, port, protocol, timeout=5).server for _ in range(30)}


def test_packets(node: Node, place: Path) -> None:
    agent = run(node, place)
    agent.wait("programmed")
    for client in ("pod-3", "client", "node"):
        assert servers(node.world, client) == {"pod-1", "pod-2"}
        assert servers(node.world, client, "udp", 53) == {"pod-1", "pod-2"}
    write(place / "cluster.json", *documents(2))
    agent.wait("programmed", after=1)
    assert servers(node.world, "pod-3") == {"pod-2"}


def nft_elements(world: World) -> dict[str, Any]:
    """All elements of our sets, as the kernel has them."""

    def read() -> dict[str, Any]:
        with Kernel(own=False) as kernel:
            return {
                f"{family} {owner.name}": elements
                for family in FAMILIES
                if (found := kernel.find(family))
                for owner, elements in kernel.read(found).items()
            }

    return world.run("node", read)


@pytest.mark.parametrize("how", ["started again", "replaced"])
def test_nothing_is_lost(node: Node, place: Path, how: str) -> None:
    """Stopped, away for a while, there again: as when a node's container is restarted, and as in a
    rolling update."""
    world = node.world
    agent = run(node, place)
    agent.wait("programmed")
    before = nft_elements(world)
    assert before["4 endpoints"]
    with (
        connection(world, "pod-1", STAY) as stays,
        Connections(world, "pod-3", VIP, PORT) as connections,
    ):
        seen = Notifications(world)
        assert agent.stop() == 0
        assert agent.lines()[-1]["event"] == "stopped"
        assert stays()
        assert servers(world, "client") == {"pod-1", "pod-2"}
        if how == "replaced":
            agent.container.remove()
            agent = run(node, place)
        else:
            agent.start_again()
        line = agent.wait("verified")
        assert "added" not in line or (line["added"], line["removed"]) == (0, 0)
        assert seen.element_messages() == 0
        assert stays()
        assert nft_elements(world) == before
        write(place / "cluster.json", *documents(2))
        agent.wait("programmed")
        assert stays()
        assert servers(world, "pod-3") == {"pod-2"}
    assert connections.outcomes["answered"] > 20
    assert not connections.failed


def test_killed_in_the_middle(node: Node, place: Path) -> None:
    agent = run(node, place)
    agent.wait("programmed")
    agent.container.kill()
    agent.container.wait()
    assert servers(node.world, "pod-3") == {"pod-1", "pod-2"}
    agent.start_again()
    agent.wait("verified")


def test_cleanup_behind_kube_proxy(node: Node, place: Path) -> None:
    """In the agent's own container, while it runs: what docs/migrate.md has people do."""
    if not shutil.which("nft"):
        pytest.skip("needs the nft program")
    start_kube_proxy(node.world)
    try:
        agent = run(node, place)
        agent.wait("programmed")
        code, said = agent.container.exec_run(["sliceproxy", "cleanup", "--kube-proxy"])
        assert code == 0, said
        assert b"table ip kube-proxy" in said
        line = agent.wait("kube_proxy_found")
        assert "sliceproxy cleanup --kube-proxy" in line["advice"]
        assert on_node(node.world, find) == []
        assert servers(node.world, "pod-3") == {"pod-1", "pod-2"}
    finally:
        on_node(node.world, remove)


def test_cleanup_by_the_rollback_manifest(node: Node, place: Path) -> None:
    """deploy/cleanup, as its DaemonSet runs it: refused while an agent owns the tables."""
    text = (ROOT / "deploy/cleanup/daemonset.yaml").read_text()
    pod = yaml.safe_load(text)["spec"]["template"]["spec"]
    (cleanup,), (waiting,) = pod["initContainers"], pod["containers"]
    agent = run(node, place)
    agent.wait("programmed")
    if agent.wait("started")["owns_tables"]:
        code, said = node.once(*cleanup["args"])
        assert code == 2, said
        assert nft_elements(node.world)
    assert agent.stop() == 0
    code, said = node.once(*cleanup["args"])
    assert (code, said) == (0, "tables removed\n")
    assert not nft_elements(node.world)
    context = waiting["securityContext"]
    user = f"{context['runAsUser']}:{context['runAsGroup']}"
    program, *arguments = waiting["command"]
    idle = node.start(*arguments, entrypoint=[program], user=user, cap_add=[])
    idle.container.reload()
    assert idle.container.status == "running", idle.lines()


# --- as the DaemonSet runs it -------------------------------------------------------------------


@pytest.fixture(scope="module")
def wired(engine: docker.DockerClient, image: str) -> str:
    """What `sliceproxy run --help` says."""
    said: bytes = engine.containers.run(image, ["run", "--help"], remove=True, network_mode="none")
    return said.decode()


def get(world: World, host: str, url: str) -> tuple[int, str]:
    def fetch() -> tuple[int, str]:
        try:
            with closing(urllib.request.urlopen(url, timeout=5)) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    return world.run(host, fetch)


def test_health_and_metrics(node: Node, place: Path, wired: str) -> None:
    if "--healthz-bind-address" not in wired:
        pytest.skip("not wired yet: `run` has no --healthz-bind-address")
    agent = run(node, place)
    agent.wait("programmed")
    for path in ("livez", "healthz"):
        code, said = get(node.world, "client", f"http://172.31.0.2:10256/{path}")
        assert code == 200, said
        assert "lastUpdated" in json.loads(said)
    code, said = get(node.world, "node", "http://127.0.0.1:10249/metrics")
    assert code == 200
    assert "kubeproxy_sync_proxy_rules_duration_seconds" in said
    with pytest.raises(OSError):  # noqa: PT011 # refused: metrics are the node's own business
        get(node.world, "client", "http://172.31.0.2:10249/metrics")


def deployed() -> Mapping[str, Any]:
    """The documents of daemonset.yaml by kind."""
    text = (ROOT / "daemonset.yaml").read_text()
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def test_as_the_daemonset_has_it(node: Node, tmp_path: Path, wired: str) -> None:
    """Arguments, environment, configuration and kubeconfig of daemonset.yaml, and an API server."""
    if "--config" not in wired:
        pytest.skip("not wired yet: `run` has no --config")
    there = deployed()
    (container,) = there["DaemonSet"]["spec"]["template"]["spec"]["containers"]
    listener = node.world.socket("node", socket.AF_INET, socket.SOCK_STREAM)
    listener.bind(("127.0.0.1", 0))
    with ApiServer(sock=listener, token="what the kubelet wrote") as server:
        server.put(*documents(1, 2), NODE)
        config, account = tmp_path / "config", tmp_path / "account"
        config.mkdir()
        for name, text in there["ConfigMap"]["data"].items():
            place = f"http://127.0.0.1:{listener.getsockname()[1]}"
            (config / name).write_text(text.replace("https://CONTROL-PLANE:6443", place))
        account.mkdir()
        (account / "token").write_text("what the kubelet wrote\n")
        (account / "ca.crt").write_text("")
        mounted = {str(config): {"bind": "/etc/sliceproxy", "mode": "ro"}}
        (init,) = there["DaemonSet"]["spec"]["template"]["spec"]["initContainers"]
        # In a container without privileges it names what it cannot set, and does not fail.
        code, said = node.once(*init["args"], volumes=mounted)
        assert code == 0, said
        events = [json.loads(line)["event"] for line in said.splitlines()]
        assert len(events) == 2, said
        assert events[-1] == "initialized"
        # A container engine inside a container starts no privileged one, so the command itself runs
        # in the node's namespace with the rights that the manifest gives it.
        command = [sys.executable, "-m", "agent", *init["args"][:2], str(config / "config.conf")]
        initialized = node.world.popen("node", command, cwd=ROOT, stderr=subprocess.DEVNULL)
        assert initialized.wait(20) == 0
        agent = node.start(
            *container["args"],
            environment={"NODE_NAME": "node-1", "KUBERNETES_SERVICE_HOST": "10.96.0.1"},
            volumes={
                **mounted,
                str(account): {
                    "bind": "/var/run/secrets/kubernetes.io/serviceaccount",
                    "mode": "ro",
                },
            },
            tmpfs={"/run/sliceproxy": "size=1m"},
        )
        agent.wait("programmed")
        assert servers(node.world, "pod-3") == {"pod-1", "pod-2"}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            path = container[probe]["httpGet"]["path"]
            code, said = get(node.world, "client", f"http://172.31.0.2:10256{path}")
            assert code == 200, (probe, said)
        code, said = agent.container.exec_run(["sliceproxy", "status", "-o", "json"])
        assert (code, json.loads(said)["ready"]) == (0, True), said
        warnings = [line for line in agent.lines() if line.get("level") in ("warning", "error")]
        assert not warnings
        assert agent.stop() == 0


NODE = {
    "kind": "Node",
    "metadata": {"name": "node-1"},
    "spec": {"podCIDRs": ["10.244.1.0/24", "fd00:10:244:1::/64"]},
    "status": {"addresses": [{"type": "InternalIP", "address": "172.31.0.2"}]},
}
