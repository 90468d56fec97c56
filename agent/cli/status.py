"""`sliceproxy status`: whether the agent on this node has programmed what it knows."""

from __future__ import annotations

import time

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from agent.cli.client import Client, socket_flag
from agent.cli.output import output_flag, put
from agent.serve.api import Status


@click.command("status")
@socket_flag
@output_flag
def command(socket_path: str, output: str) -> None:
    """Show the state of the agent on this node: programming, watches, counts, open problems.

    Exit code 0 if it is ready and has no open problem, 1 otherwise, 3 if no agent answers.
    """
    status = Client(socket_path).get("/v1/status", Status)
    put(status, output, lambda console: show(status, console), [f"node/{status.node}"])
    raise SystemExit(0 if status.ready and not status.problems else 1)


def show(status: Status, console: Console) -> None:
    """Prints the status for people."""
    zone = f" in zone {status.zone}" if status.zone else ""
    owned = "owned by the agent" if status.owns_tables else "not owned: Linux before 6.9, or noOwn"
    state = "[green]up to date[/green]" if status.programmed else "[red]not programmed[/red]"
    rows = [
        ("node", escape(status.node + zone)),
        ("version", f"{status.version}, since {status.started}"),
        ("programming", state + (f": {escape(status.reason)}" if status.reason else "")),
        ("ready", "yes" if status.ready else f"[red]no[/red]: {escape(status.reason)}"),
        ("tables", owned),
        (
            "counts",
            f"{status.counts.services:,} Services, {status.counts.endpoints:,} endpoints, "
            f"{status.counts.frontends:,} addresses, {status.counts.elements:,} elements",
        ),
    ]
    if status.conntrack:
        used, most = status.conntrack
        rows.append(("conntrack", f"{used:,} of {most:,} entries"))
    for watch in status.watches:
        age = (
            "no answer yet"
            if watch.last_valid_seconds is None
            else (f"last answer {watch.last_valid_seconds:.0f} s ago")
        )
        errors = f", {watch.errors} errors, {watch.relists} relists" if watch.errors else ""
        rows.append((watch.resource, f"{watch.state}, {watch.objects:,} objects, {age}{errors}"))
    grid = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for row in rows:
        grid.add_row(*row)
    console.print(grid)
    if status.problems:
        plural = "s" if len(status.problems) > 1 else ""
        console.print(f"\n[yellow]{len(status.problems)} open problem{plural}[/yellow]")
    for problem in status.problems[:100]:
        since = time.strftime("%H:%M:%S", time.localtime(problem.since))
        times = f", {problem.count} times" if problem.count > 1 else ""
        console.print(
            f"  [bold]{escape(problem.object)}[/bold]: {escape(problem.text)} "
            f"[dim]({problem.code}, since {since}{times})[/dim]"
        )
