"""`sliceproxy doctor`: what on this node would break Services, and the line that mends it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from agent.cli.client import Client, socket_flag
from agent.cli.flags import from_flag, settings, settings_flags
from agent.cli.output import output_flag, put
from agent.cli.state import chosen_state
from agent.kernel.facts import collect, with_state
from rules.doctor import FAILED, OK, UNKNOWN, WARNING, Check, examine, worst

_COLOURS = {OK: "green", WARNING: "yellow", FAILED: "red", UNKNOWN: "dim"}


@click.command("doctor")
@from_flag
@socket_flag
@settings_flags("data plane", "cluster")
@output_flag
def command(*, paths: tuple[str, ...], socket_path: str, output: str, **flags: Any) -> None:
    """Look for what on this node would break Services. Changes nothing.

    Asks the agent on this node, which knows the Node and the endpoints; without an agent it checks
    the kernel alone. With manifests (--from) or a cluster (--kubeconfig) it takes the Node and the
    endpoints from there. Exit code 0 if all is well, 1 if there is a warning or a failure, 2 if it
    cannot tell.
    """
    given = click.get_current_context().get_parameter_source("socket_path")
    agent = Client(socket_path)
    state = chosen_state(paths, settings(flags)[0])
    if state:
        checks = examine(with_state(collect(), state))
    elif given is not ParameterSource.DEFAULT or agent.answers():
        checks = agent.get("/v1/doctor", list[Check])
    else:
        checks = examine(collect())
    put(checks, output, lambda console: show(checks, console), (c.id for c in checks))
    raise SystemExit(1 if worst(checks) in (WARNING, FAILED) else 0)


def show(checks: Iterable[Check], console: Console) -> None:
    """Prints one line for each check, and the remedy below those that need one."""
    grid = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for check in checks:
        colour = _COLOURS[check.state]
        grid.add_row(
            f"[{colour}]{check.state}[/{colour}]",
            f"{escape(check.title)}: {escape(check.detail)}",
        )
        if check.remedy:
            grid.add_row("", f"[bold]{escape(check.remedy)}[/bold]")
    console.print(grid)
