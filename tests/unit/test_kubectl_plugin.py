"""`kubectl sliceproxy` finds the agent's pod on a node and runs the command there."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "deploy" / "kubectl-sliceproxy"
FAKE = """#!/bin/sh
for word in "$@"; do printf '%s\\n' "$word"; done >>"$RECORD"
echo >>"$RECORD"
case " $* " in
    *" get pods "*) printf '%s' "$PODS" ;;
    *" exec "*) echo "its output"; exit "${CODE:-0}" ;;
esac
"""


@pytest.fixture
def kubectl(tmp_path: Path) -> Path:
    """A directory with a kubectl that records its arguments."""
    fake = tmp_path / "kubectl"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    return tmp_path


def run(
    kubectl: Path, *arguments: str, pods: str = "pod/sliceproxy-x1\n", code: int = 0
) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """The plugin's end, and kubectl's arguments, call by call."""
    record = kubectl / "record"
    environment = {
        "PATH": f"{kubectl}:{os.environ['PATH']}",
        "RECORD": str(record),
        "PODS": pods,
        "CODE": str(code),
    }
    done = subprocess.run(
        [str(PLUGIN), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    calls = record.read_text().split("\n\n") if record.exists() else []
    return done, [call.split("\n") for call in calls if call]


def test_it_runs_the_command_in_the_agents_container_on_the_node(kubectl: Path) -> None:
    """Arguments arrive as they are, also with blanks and what looks like the plugin's options."""
    command = ["explain", "10.96.0.10:53/udp", "--from-address", "a b", "--node=other"]
    done, (get, execute) = run(kubectl, "--node", "worker-1", *command)
    assert (done.returncode, done.stdout) == (0, "its output\n")
    assert get == [
        *("get", "pods", "--namespace=kube-system", "--selector=app.kubernetes.io/name=sliceproxy"),
        *("--field-selector=spec.nodeName=worker-1,status.phase=Running", "--output=name"),
    ]
    assert execute == [
        *("exec", "--namespace=kube-system", "pod/sliceproxy-x1", "--container=sliceproxy"),
        *("--", "sliceproxy", *command),
    ]


def test_its_options_reach_kubectl(kubectl: Path) -> None:
    options = ("-N", "n", "--context=blue one", "--kubeconfig", "/k c", "--agent-namespace=net")
    _, (get, execute) = run(kubectl, *options, "--selector=app=sp", "status")
    assert get[:5] == ["--context=blue one", "--kubeconfig=/k c", "get", "pods", "--namespace=net"]
    assert get[5] == "--selector=app=sp"
    assert execute[:4] == ["--context=blue one", "--kubeconfig=/k c", "exec", "--namespace=net"]


def test_its_exit_code_is_that_of_the_command(kubectl: Path) -> None:
    assert run(kubectl, "--node=n", "status", code=1)[0].returncode == 1


@pytest.mark.parametrize(
    ("arguments", "pods", "words"),
    [
        (("status",), "pod/a", "which node? give --node NODE"),
        (("--node", "n"), "pod/a", "no command"),
        (("--node",), "pod/a", "--node needs a value"),
        (("--nodes=n", "status"), "pod/a", "--nodes is not an option before the command"),
        (("--node=n", "status"), "", "no running pod"),
    ],
    ids=str,
)
def test_what_is_wrong_is_exit_code_2_and_one_line(
    kubectl: Path, arguments: tuple[str, ...], pods: str, words: str
) -> None:
    done, calls = run(kubectl, *arguments, pods=pods)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("kubectl sliceproxy: ")
    assert words in done.stderr
    assert not any("exec" in call for call in calls)


def test_help_names_every_option(kubectl: Path) -> None:
    done, calls = run(kubectl, "--help")
    assert (done.returncode, calls) == (0, [])
    for option in ("--node", "--context", "--kubeconfig", "--agent-namespace", "--selector"):
        assert option in done.stdout


def test_it_looks_for_the_daemonsets_pods() -> None:
    """Namespace, label, container and socket are those of deploy/base."""
    daemonset = yaml.safe_load((ROOT / "deploy" / "base" / "daemonset.yaml").read_text())
    text = PLUGIN.read_text()
    ((label, value),) = daemonset["spec"]["selector"]["matchLabels"].items()
    assert f"selector={label}={value}" in text
    assert f"namespace={daemonset['metadata']['namespace']} " in text
    (container,) = daemonset["spec"]["template"]["spec"]["containers"]
    assert f"--container={container['name']} " in text
    assert "--api-socket=/run/sliceproxy/api.sock" in container["args"]


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck")
def test_shellcheck_has_no_complaint() -> None:
    done = subprocess.run(["shellcheck", str(PLUGIN)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
