"""`sliceproxy init`: the node's conntrack settings, set once by a privileged container."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import click

from agent import log
from agent.cli.flags import settings, settings_flags
from agent.kernel.conntrack import Conntrack
from agent.kernel.errors import ConntrackError
from agent.kernel.sysctl import configure


@click.command("init")
@settings_flags("conntrack")
def command(**flags: Any) -> None:
    """Set the node's conntrack settings, and exit.

    For a privileged init container, as kube-proxy's --init-only, so that the agent itself needs no
    more than NET_ADMIN. The agent finds the settings as it wants them and does not write them.
    A setting that cannot be written is a warning, not a failure: a node with a smaller conntrack
    table is better than a node without a proxy, which a failed init container would leave.
    """
    chosen, file = settings(flags)
    logger = log.configure("info")
    _load_conntrack()
    outcome = configure(chosen.conntrack(), logger)
    logger.info("initialized", changed=outcome.changed, config=file.path if file else None)


def _load_conntrack() -> None:
    """On a node that has just booted conntrack may not be loaded, and then its settings do not
    exist. The kernel loads it for the first request about its entries."""
    with suppress(OSError, ConntrackError), Conntrack() as conntrack:
        next(conntrack.dump_udp(4), None)
