"""`sliceproxy render`: the dry run."""

from __future__ import annotations

import sys
from typing import Any

import click

from agent.cli import nft_check
from agent.cli.flags import fail, from_flag, settings, settings_flags
from agent.cli.state import chosen_state
from rules import text as nft


@click.command("render")
@from_flag
@settings_flags("data plane", "cluster")
@click.option("--check", is_flag=True, help="Parse and load the ruleset with libnftables, too.")
def command(paths: tuple[str, ...], check: bool, **flags: Any) -> None:
    """Print the ruleset in nft's language: the dry run.

    Changes nothing and needs no privilege. `nft -f` loads the output. The node ports' addresses
    are those of the Node object named by --node, so include that object.
    """
    state = chosen_state(paths, settings(flags)[0], whole=True)
    if not state:
        fail("name the objects: --from PATH, or --kubeconfig FILE for a cluster's")
    elements = state.elements()
    text = "".join(nft.table(table, elements) for table in state.tables())
    if check:
        try:
            nft_check.check(text)
        except nft_check.CheckFailed as error:
            fail(error)
    sys.stdout.write(text)
