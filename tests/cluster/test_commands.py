"""Commands on a cluster's lists say what they say of the same objects in manifests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from agent.cli.main import main
from tests.cluster.apiserver import ApiServer
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
