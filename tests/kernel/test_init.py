"""`sliceproxy init` sets the conntrack settings of the network namespace it runs in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.namespaces import in_empty_namespace, is_root

pytestmark = pytest.mark.skipif(not is_root(), reason="needs root to make namespaces")

ROOM = ["--conntrack-max-per-core=0"]  # the machine's own, not this namespace's


def initialized(*arguments: str) -> tuple[int, list[dict[str, Any]], dict[str, int]]:
    """Exit code and log lines of `sliceproxy init`, and the settings after it."""
    names = ("tcp_timeout_established", "tcp_timeout_close_wait", "tcp_be_liberal")

    def work() -> tuple[int, list[dict[str, Any]], dict[str, int]]:
        done = subprocess.run(
            [sys.executable, "-m", "agent", "init", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        paths = [f"/proc/sys/net/netfilter/nf_conntrack_{name}" for name in names]
        read = subprocess.run(["cat", *paths], capture_output=True, text=True, check=True)
        lines = [json.loads(line) for line in done.stderr.splitlines()]
        found = dict(zip(names, map(int, read.stdout.split()), strict=True))
        return done.returncode, lines, found

    return in_empty_namespace(work)


def test_it_sets_what_kube_proxy_sets_and_exits() -> None:
    """With kube-proxy's defaults; upstream's e2e test asks for CLOSE_WAIT after 3600 seconds."""
    code, lines, found = initialized(*ROOM)
    assert code == 0
    assert found == {
        "tcp_timeout_established": 86400,
        "tcp_timeout_close_wait": 3600,
        "tcp_be_liberal": 0,
    }
    assert lines[-1]["event"] == "initialized"


def test_it_takes_the_file_and_flags_override_it(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
        "conntrack: {tcpCloseWaitTimeout: 7m, tcpBeLiberal: true, tcpEstablishedTimeout: 1h}\n"
    )
    flags = ["--conntrack-tcp-timeout-established=2h", *ROOM]
    code, lines, found = initialized(f"--config={file}", *flags)
    assert code == 0
    assert found == {
        "tcp_timeout_established": 7200,
        "tcp_timeout_close_wait": 420,
        "tcp_be_liberal": 1,
    }
    assert lines[-1]["config"] == str(file)


def test_a_setting_that_cannot_be_written_is_a_warning_and_no_failure() -> None:
    """`nf_conntrack_max` is the machine's; a failed init container would keep the proxy away."""
    code, lines, found = initialized("--conntrack-max-per-core=2000000000")
    assert code == 0
    assert found["tcp_timeout_close_wait"] == 3600
    assert "nf_conntrack_max" in str([line for line in lines if line["level"] == "warning"])


def test_a_bad_configuration_is_a_failure(tmp_path: Path) -> None:
    """A wrong file is to stop a rolling update at the first node."""
    file = tmp_path / "config.yaml"
    file.write_text("kind: KubeProxyConfiguration\n")
    command = [sys.executable, "-m", "agent", "init", f"--config={file}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"sliceproxy: {file}: apiVersion")
