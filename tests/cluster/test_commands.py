"""Commands on a cluster's lists say what they say of the same objects in manifests."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from agent.cli.main import main
from agent.cli.state import chosen_state
from agent.config.settings import Settings
from agent.kernel import addresses
from agent.kernel.tables import Kernel
from agent.loop import reader
from rules.tables import SETS
from tests.cluster.apiserver import ApiServer
from tests.kernel.namespaces import in_empty_namespace
from tests.manifest import endpoint, node_document, service_document, slice_document

DOCUMENTS: list[dict[str, Any]] = [
    node_document(),
    {"kind": "ServiceCIDR", "metadata": {"name": "all"}, "spec": {"cidrs": ["10.96.0.0/16"]}},
    service_document(cluster_ips=["10.96.0.10"]),
    slice_document("web", [endpoint("10.244.1.11"), endpoint("10.244.1.12", ready=False)]),
    service_document("empty", cluster_ips=["10.96.0.30"]),
]
COMMANDS = [
    ("services", "-o", "wide"),
    ("services", "-o", "json"),
    ("endpoints", "web"),
    ("explain", "web"),
    ("explain", "10.96.0.30:80", "-o", "json"),
    ("render",),
]


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as server:
        server.put(*DOCUMENTS)
        yield server


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_cluster_and_its_manifests_give_the_same_output(
    server: ApiServer, command: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "all.json").write_text(json.dumps({"kind": "List", "items": DOCUMENTS}))
    listed = run(*command, "--node=node-1", f"--server={server.url}")
    written = run(*command, "--node=node-1", f"--from={tmp_path}")
    assert listed.stdout
    assert (listed.stdout, listed.exit_code) == (written.stdout, written.exit_code)


def test_a_server_that_is_away_ends_the_command_with_a_reason(server: ApiServer) -> None:
    server.down()
    done = run("services", f"--server={server.url}")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "services: Connection refused" in done.stderr


@pytest.mark.parametrize("resource", ["services", "servicecidrs"])
def test_what_may_not_be_listed_ends_the_command_if_it_is_required(
    server: ApiServer, resource: str
) -> None:
    server.answer(403, resource=resource)
    done = run("services", f"--server={server.url}")
    assert done.exit_code == (2 if resource == "services" else 0), done.stderr
    assert ("web" in done.stdout) is (resource == "servicecidrs")


def test_an_object_that_does_not_decode_is_named_and_the_others_are_shown(
    server: ApiServer,
) -> None:
    bad = service_document("bad", cluster_ips=["10.96.0.99"])
    bad["spec"]["ports"] = "none"
    server.put(bad)
    done = run("services", f"--server={server.url}")
    assert done.exit_code == 0
    assert "Service default/bad: " in done.stderr
    assert "web" in done.stdout


def test_manifests_and_a_cluster_at_once_are_a_usage_error(server: ApiServer) -> None:
    done = run("services", f"--server={server.url}", "--from=.")
    assert (done.exit_code, "not both" in done.stderr) == (2, True)


# --- which cluster ------------------------------------------------------------------------------


def kubeconfig(place: Path, **servers: str) -> Path:
    """A file with a context for each server; the first is the current one."""
    file = place / "kubeconfig"
    document = {
        "kind": "Config",
        "current-context": next(iter(servers)),
        "clusters": [{"name": n, "cluster": {"server": url}} for n, url in servers.items()],
        "contexts": [{"name": n, "context": {"cluster": n, "user": "me"}} for n in servers],
        "users": [{"name": "me", "user": {}}],
    }
    file.write_text(yaml.safe_dump(document))
    return file


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_context_of_a_kubeconfig_names_the_cluster(
    server: ApiServer, command: tuple[str, ...], tmp_path: Path
) -> None:
    """The current one, another by its name, and none by a name that the file has not."""
    file = kubeconfig(tmp_path, away="http://127.0.0.1:1", here=server.url)
    flags = "--node=node-1", f"--kubeconfig={file}"
    direct = run(*command, "--node=node-1", f"--server={server.url}")
    named = run(*command, *flags, "--context=here")
    assert (named.stdout, named.exit_code) == (direct.stdout, direct.exit_code)
    away = run(*command, *flags)
    assert (away.exit_code, away.stdout, "Connection refused" in away.stderr) == (2, "", True)
    unknown = run(*command, *flags, "--context=nowhere")
    assert (unknown.exit_code, unknown.stdout, "nowhere" in unknown.stderr) == (2, "", True)


# --- what a command compares with this machine --------------------------------------------------

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make namespaces")


@needs_root
def test_a_difference_to_a_cluster_is_what_run_would_change(tmp_path: Path) -> None:
    """Everything in an empty kernel, nothing after it was programmed, one element that is missing;
    the same to manifests. A kernel or a cluster that cannot be read is exit code 2."""

    def look() -> None:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        with ApiServer() as server:
            server.put(*DOCUMENTS)
            file = kubeconfig(tmp_path, here=server.url)
            (tmp_path / "all.json").write_text(json.dumps({"kind": "List", "items": DOCUMENTS}))

            def differences() -> list[tuple[int, list[str]]]:
                found = [
                    run("diff", "--node=node-1", "--no-own", where)
                    for where in (f"--from={tmp_path / 'all.json'}", f"--kubeconfig={file}")
                ]
                return [(done.exit_code, sorted(done.stdout.splitlines())) for done in found]

            everything = differences()
            assert everything[0] == everything[1]
            assert everything[0][0] == 1
            assert "add table ip sliceproxy" in everything[0][1]
            settings = Settings(node="node-1", kubeconfig=str(file), no_own=True)
            with addresses.route_socket() as route:
                state = chosen_state((), settings, addresses=addresses.read(route), whole=True)
            assert state
            with Kernel(own=False) as kernel:
                kernel.apply(state.resync(reader(kernel)))
                assert differences() == [(0, [])] * 2
                endpoints = SETS[4].endpoints
                kernel.destroy(endpoints, list(kernel.elements(endpoints).items()))
            command = (
                "add element ip sliceproxy endpoints { 10.96.0.10 . tcp . 80 . 0 : "
                "10.244.1.11 . 8080 }"
            )
            assert differences() == [(1, [command])] * 2
            server.down()
            assert run("diff", f"--kubeconfig={file}").exit_code == 2

    in_empty_namespace(look)


@needs_root
def test_doctor_takes_the_node_and_its_endpoints_from_a_cluster(tmp_path: Path) -> None:
    """As from manifests: a Node of this name, then none, then pods outside its podCIDRs."""

    def look() -> None:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        with ApiServer() as server:
            server.put(*DOCUMENTS)
            file = kubeconfig(tmp_path, here=server.url)

            def checks(*flags: str) -> dict[str, str]:
                done = run("doctor", "-o", "json", "--detect-local-mode=NodeCIDR", *flags)
                found = {check["id"]: check["state"] for check in json.loads(done.stdout)}
                assert done.exit_code == int(bool({"warning", "failed"} & {*found.values()}))
                return found

            (tmp_path / "all.json").write_text(json.dumps({"kind": "List", "items": DOCUMENTS}))
            here = checks("--node=node-1", f"--kubeconfig={file}", "--context=here")
            written = checks("--node=node-1", f"--from={tmp_path / 'all.json'}")
            assert (here["node"], here["pod-cidrs"]) == ("ok", "ok")
            assert here == written
            assert checks("--node=other", f"--kubeconfig={file}")["node"] == "failed"
            server.put(node_document(pod_cidrs=["10.245.0.0/24"]))
            moved = checks("--node=node-1", f"--kubeconfig={file}")
            assert moved["pod-cidrs"] == "failed"
            server.down()
            assert run("doctor", f"--kubeconfig={file}").exit_code == 2

    in_empty_namespace(look)
