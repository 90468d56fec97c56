"""`sliceproxy init`: the node's conntrack settings, set once by a privileged container."""

from __future__ import annotations

from typing import Any

import click

from agent import log
from agent.cli.flags import fail, settings, settings_flags
from agent.kernel.sysctl import configure


@click.command("init")
@settings_flags("conntrack")
def command(**flags: Any) -> None:
    """Set the node's conntrack settings, and exit.

    For a privileged init container, as kube-proxy's --init-only, so that the agent itself needs no
    more than NET_ADMIN. The agent finds the settings as it wants them and does not write them.
    Exit code 2 if one of them could not be set.
    """
    chosen, file = settings(flags)
    logger = log.configure("info")
    outcome = configure(chosen.conntrack(), logger)
    if outcome.failed:
        fail("could not set all conntrack settings; run `sliceproxy init` privileged")
    logger.info("initialized", changed=outcome.changed, config=file.path if file else None)
