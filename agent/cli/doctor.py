"""`sliceproxy doctor`: what on this node would break Services, and the line that mends it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from agent.cli.flags import from_flag, output_flag, settings, settings_flags
from agent.cli.state import from_manifests
from agent.kernel.facts import collect
from rules.doctor import FAILED, OK, UNKNOWN, WARNING, Check, Facts, examine, worst
from rules.objects import address_text
from rules.options import DetectLocalMode
from rules.state import State

_COLOURS = {OK: "green", WARNING: "yellow", FAILED: "red", UNKNOWN: "dim"}


@click.command("doctor")
@from_flag
@settings_flags("data plane")
@output_flag
def command(paths: tuple[str, ...], output: str, **flags: Any) -> None:
    """Look for what on this node would break Services. Changes nothing.

    With --from it also checks the Node and the endpoints in these manifests. Exit code 0 if all is
    well, 1 if there is a warning or a failure, 2 if it cannot tell.
    """
    facts = collect()
    if paths:
        facts = with_state(facts, from_manifests(paths, settings(flags)[0]))
    checks = examine(facts)
    if output == "json":
        click.echo(msgspec.json.encode(checks).decode())
    else:
        show(checks, Console())
    raise SystemExit(1 if worst(checks) in (WARNING, FAILED) else 0)


def with_state(facts: Facts, state: State) -> Facts:
    """The facts, with what the objects say about this node."""
    node = state.options.node
    return msgspec.structs.replace(
        facts,
        node_known=state.node is not None,
        pod_cidrs=state.node.pod_cidrs if state.node else (),
        needs_pod_cidrs=state.options.detect_local is DetectLocalMode.NODE_CIDR,
        endpoints_here=tuple(
            dict.fromkeys(
                address_text(endpoint.address)
                for pieces in state.slices.values()
                for piece in pieces
                for endpoint in piece.endpoints
                if endpoint.node == node
            )
        ),
        cluster_dns=tuple(
            address_text(address)
            for name, service in state.services.items()
            if name == ("kube-system", "kube-dns")
            for address in service.cluster_ips
        ),
    )


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
    console.print(grid, highlight=False, soft_wrap=not console.is_terminal)
