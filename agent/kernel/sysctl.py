"""The node's conntrack settings, as kube-proxy sets them.

A node that forwards for a cluster needs room for more connections than the kernel's default, and
shorter timeouts for dead ones. Like kube-proxy, the agent sets these values when it starts. Unlike
kube-proxy it never lowers `nf_conntrack_max`, which an administrator may have raised on purpose,
and it also starts if it cannot write: in an unprivileged container /proc/sys is read-only, and in a
network namespace other than the machine's so are `nf_conntrack_max` and the size of the hash table.
One warning lists what could not be set.

A setting that has its value already is not written, so on a node where an administrator (or a
privileged init container) has set them there is nothing to warn of. `route_localnet` and all other
settings are left alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import structlog

HASH_SIZE = "sys/module/nf_conntrack/parameters/hashsize"
_NETFILTER = "proc/sys/net/netfilter"
_ENTRIES_A_BUCKET = 4  # kube-proxy's idea of how full the hash table may be on average

Log = structlog.typing.FilteringBoundLogger


class ConntrackSettings(msgspec.Struct, frozen=True):
    """kube-proxy's `conntrack` section, with its defaults. Times are whole seconds.

    `max_per_core` and `min` are numbers of connections. 0 leaves a setting as it is, and a
    `max_per_core` of 0 ignores `min` as well.
    """

    max_per_core: int = 32768
    min: int = 131072
    tcp_established_timeout: int = 86400
    tcp_close_wait_timeout: int = 3600
    tcp_be_liberal: bool = False
    udp_timeout: int = 0
    udp_stream_timeout: int = 0

    def most_connections(self, cores: int) -> int:
        """What `nf_conntrack_max` should be at least; 0 if it is to be left alone."""
        return max(self.max_per_core * cores, self.min) if self.max_per_core > 0 else 0


class Setting(NamedTuple):
    """A file below the root directory, and the number that it should hold."""

    path: str
    value: int
    at_least: bool = False

    @property
    def name(self) -> str:
        """How an operator knows it."""
        return "nf_conntrack_hashsize" if self.path == HASH_SIZE else Path(self.path).name


class Outcome(NamedTuple):
    """What has been set, by name, and what could not be: why, by name and value."""

    changed: dict[str, int]
    failed: dict[str, str]


def wanted(settings: ConntrackSettings, cores: int) -> Iterator[Setting]:
    """The files to write, in order."""
    most = settings.most_connections(cores)
    if most > 0:
        yield Setting(f"{_NETFILTER}/nf_conntrack_max", most, at_least=True)
        yield Setting(HASH_SIZE, most // _ENTRIES_A_BUCKET, at_least=True)
    for name, value in (
        ("tcp_timeout_established", settings.tcp_established_timeout),
        ("tcp_timeout_close_wait", settings.tcp_close_wait_timeout),
        ("tcp_be_liberal", int(settings.tcp_be_liberal)),
        ("udp_timeout", settings.udp_timeout),
        ("udp_timeout_stream", settings.udp_stream_timeout),
    ):
        if value > 0:
            yield Setting(f"{_NETFILTER}/nf_conntrack_{name}", value)


def apply(
    settings: ConntrackSettings, *, root: Path = Path("/"), cores: int | None = None
) -> Outcome:
    """Sets what is not as wanted, in the calling thread's network namespace. Never raises.

    `cores` are the machine's, not those that this process may use: conntrack is the machine's.
    Conntrack must be in use (its settings appear with the module), so call it when the tables are
    there.
    """
    outcome = Outcome({}, {})
    for setting in wanted(settings, cores or os.cpu_count() or 1):
        try:
            if _write(root / setting.path, setting):
                outcome.changed[setting.name] = setting.value
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            outcome.failed[f"{setting.name}={setting.value}"] = reason or str(error)
    return outcome


def configure(
    settings: ConntrackSettings, log: Log, *, root: Path = Path("/"), cores: int | None = None
) -> Outcome:
    """`apply`, and logs the outcome: one line for what was set, one for what was not."""
    outcome = apply(settings, root=root, cores=cores)
    if outcome.changed:
        log.info("conntrack_configured", **outcome.changed)
    if outcome.failed:
        reasons = ", ".join(sorted(set(outcome.failed.values())))
        log.warning(
            "conntrack_not_configured",
            settings=", ".join(outcome.failed),
            error=f"{reasons}. Set them on the node, or run the agent privileged.",
        )
    return outcome


def _write(path: Path, setting: Setting) -> bool:
    """Writes what is not right yet; returns whether it had to."""
    now = int(path.read_text(encoding="ascii"))
    if now == setting.value or (setting.at_least and now > setting.value):
        return False
    path.write_text(str(setting.value), encoding="ascii")
    return True
