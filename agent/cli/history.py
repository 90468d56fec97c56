"""`sliceproxy history`: what changed on this node, why, and how long it took."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import datetime
from urllib.parse import quote

import click
from rich.console import Console
from rich.markup import escape

from agent.cli.client import Client, socket_flag
from agent.cli.flags import fail
from agent.cli.output import output_flag, put, service_name
from agent.config.durations import parse_duration
from rules.history import Entry

_FOLLOW_SECONDS = 0.5


@click.command("history")
@click.argument("service", required=False, metavar="[NAMESPACE/]NAME")
@click.option("-n", "--namespace", metavar="NAME", help="The namespace of NAME. [default: default]")
@click.option("--since", metavar="DURATION", help="Only what is not older, like 10m or 1h.")
@click.option("-f", "--follow", is_flag=True, help="Continue with new changes until Ctrl-C.")
@socket_flag
@output_flag
def command(
    service: str | None,
    *,
    namespace: str | None,
    since: str | None,
    follow: bool,
    socket_path: str,
    output: str,
) -> None:
    """Show the changes that the agent on this node has programmed, of one Service or of all.

    A Service that was deleted has a history, too. What was there when the agent started has none.

    With --follow and -o json or yaml, each batch of changes is a document of its own.
    """
    client = Client(socket_path)
    query: dict[str, object] = {
        "service": service_name(service, namespace or "") if service else "",
        "since": _moment(since),
    }
    after = 0
    if service and not client.get("/v1/history", list[Entry], {"service": query["service"]}):
        client.raw(f"/v1/services/{quote(str(query['service']))}")  # an unknown name ends it here
    while True:
        entries = client.get("/v1/history", list[Entry], {**query, "after": after})
        if entries or not follow:
            put(entries, output, lambda console, es=entries: show(es, console), _names(entries))  # type: ignore[misc]
        if not follow:
            return
        after = entries[-1].sequence if entries else after
        time.sleep(_FOLLOW_SECONDS)


def _names(entries: Iterable[Entry]) -> Iterable[str]:
    return dict.fromkeys(f"service/{entry.service}" for entry in entries if entry.service)


def _moment(since: str | None) -> float:
    if not since:
        return 0.0
    try:
        return time.time() - parse_duration(since)
    except ValueError as error:
        fail(f"--since: {error}")


def show(entries: Iterable[Entry], console: Console) -> None:
    """Prints a line for each change, oldest first."""
    for entry in entries:
        at = datetime.fromtimestamp(entry.time).strftime("%H:%M:%S.%f")[:-3]
        parts = [
            entry.service and f"[bold]{escape(entry.service)}[/bold]",
            entry.endpoint,
            entry.pod and f"pod {escape(entry.pod)}",
            entry.node and f"on {escape(entry.node)}",
            escape(entry.reason),
        ]
        cost = f" [dim]{entry.elements} elements[/dim]" if entry.elements else ""
        if entry.delay_seconds is not None:
            cost += f" [dim]{entry.delay_seconds:.3f} s after its cause[/dim]"
        kind = entry.kind.replace("_", " ")
        console.print(f"{at}  {kind:<18}  {', '.join(p for p in parts if p)}{cost}")
