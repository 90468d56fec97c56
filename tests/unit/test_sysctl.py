"""The node's conntrack settings, in a directory that replaces /proc and /sys."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import structlog
from structlog.testing import capture_logs

from agent.kernel.sysctl import HASH_SIZE, ConntrackSettings, Outcome, apply, configure

NETFILTER = "proc/sys/net/netfilter"
KERNELS_DEFAULTS = {
    "nf_conntrack_max": 65536,
    "nf_conntrack_tcp_timeout_established": 432000,
    "nf_conntrack_tcp_timeout_close_wait": 60,
    "nf_conntrack_tcp_be_liberal": 0,
    "nf_conntrack_udp_timeout": 30,
    "nf_conntrack_udp_timeout_stream": 120,
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, value in KERNELS_DEFAULTS.items():
        put(tmp_path / NETFILTER / name, value)
    put(tmp_path / HASH_SIZE, 16384)
    return tmp_path


def put(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{value}\n")


def settings_in(root: Path) -> dict[str, int]:
    found = {p.name: int(p.read_text()) for p in (root / NETFILTER).iterdir()}
    return found | {"hashsize": int((root / HASH_SIZE).read_text())}


def test_the_defaults_are_kube_proxys(root: Path) -> None:
    outcome = apply(ConntrackSettings(), root=root, cores=8)
    assert settings_in(root) == {
        **KERNELS_DEFAULTS,
        "nf_conntrack_max": 262144,
        "hashsize": 65536,
        "nf_conntrack_tcp_timeout_established": 86400,
        "nf_conntrack_tcp_timeout_close_wait": 3600,
    }
    assert outcome.failed == {}
    assert set(outcome.changed) == {
        "nf_conntrack_max",
        "nf_conntrack_hashsize",
        "nf_conntrack_tcp_timeout_established",
        "nf_conntrack_tcp_timeout_close_wait",
    }


@pytest.mark.parametrize(
    ("settings", "cores", "most"),
    [
        (ConntrackSettings(), 1, 131072),
        (ConntrackSettings(), 4, 131072),
        (ConntrackSettings(), 5, 163840),
        (ConntrackSettings(min=0), 2, 65536),
        (ConntrackSettings(max_per_core=0), 64, 0),
        (ConntrackSettings(max_per_core=1, min=500000), 64, 500000),
    ],
)
def test_how_many_connections(settings: ConntrackSettings, cores: int, most: int) -> None:
    assert settings.most_connections(cores) == most


def test_zero_leaves_everything_as_it_is(root: Path) -> None:
    nothing = ConntrackSettings(0, 131072, 0, 0, False, 0, 0)
    assert apply(nothing, root=root, cores=64) == Outcome({}, {})
    assert settings_in(root) == {**KERNELS_DEFAULTS, "hashsize": 16384}


def test_what_is_asked_for_besides(root: Path) -> None:
    asked = ConntrackSettings(tcp_be_liberal=True, udp_timeout=10, udp_stream_timeout=60)
    apply(asked, root=root, cores=1)
    found = settings_in(root)
    assert found["nf_conntrack_tcp_be_liberal"] == 1
    assert found["nf_conntrack_udp_timeout"] == 10
    assert found["nf_conntrack_udp_timeout_stream"] == 60


def test_the_most_is_never_lowered_and_a_large_table_stays(root: Path) -> None:
    put(root / NETFILTER / "nf_conntrack_max", 2000000)
    put(root / HASH_SIZE, 500000)
    outcome = apply(ConntrackSettings(), root=root, cores=2)
    found = settings_in(root)
    assert (found["nf_conntrack_max"], found["hashsize"]) == (2000000, 500000)
    assert "nf_conntrack_max" not in outcome.changed


def test_a_second_time_nothing_is_written(root: Path) -> None:
    apply(ConntrackSettings(), root=root, cores=8)
    for path in (root / NETFILTER).iterdir():
        os.utime(path, (0, 0))
    assert apply(ConntrackSettings(), root=root, cores=8) == Outcome({}, {})
    assert all(p.stat().st_mtime == 0 for p in (root / NETFILTER).iterdir())


def test_read_only_is_one_warning_that_names_all(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "write_text", refuse)
    with capture_logs() as lines:
        configure(ConntrackSettings(), structlog.get_logger(), root=root, cores=8)
    assert [line["log_level"] for line in lines] == ["warning"]
    assert lines[0]["settings"] == (
        "nf_conntrack_max=262144, nf_conntrack_hashsize=65536,"
        " nf_conntrack_tcp_timeout_established=86400, nf_conntrack_tcp_timeout_close_wait=3600"
    )
    assert lines[0]["error"].startswith("Read-only file system. ")


def test_read_only_and_right_is_no_warning(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apply(ConntrackSettings(), root=root, cores=8)
    monkeypatch.setattr(Path, "write_text", None)
    with capture_logs() as lines:
        configure(ConntrackSettings(), structlog.get_logger(), root=root, cores=8)
    assert lines == []


def test_missing_sysctls_are_reported_and_the_rest_set(root: Path) -> None:
    (root / HASH_SIZE).unlink()
    (root / NETFILTER / "nf_conntrack_max").unlink()
    (root / NETFILTER / "nf_conntrack_tcp_timeout_close_wait").write_text("nonsense")
    outcome = apply(ConntrackSettings(), root=root, cores=8)
    assert outcome.changed == {"nf_conntrack_tcp_timeout_established": 86400}
    assert outcome.failed.keys() == {
        "nf_conntrack_max=262144",
        "nf_conntrack_hashsize=65536",
        "nf_conntrack_tcp_timeout_close_wait=3600",
    }
    assert not (root / HASH_SIZE).exists()


def test_what_was_changed_is_one_line(root: Path) -> None:
    with capture_logs() as lines:
        configure(ConntrackSettings(), structlog.get_logger(), root=root, cores=8)
    assert [line["event"] for line in lines] == ["conntrack_configured"]
    assert lines[0]["nf_conntrack_max"] == 262144
