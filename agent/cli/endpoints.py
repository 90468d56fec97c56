"""`sliceproxy endpoints`: a Service's endpoints, which of them this node uses, and why."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from agent.cli.client import Client, socket_flag
from agent.cli.flags import fail, from_flag, settings, settings_flags
from agent.cli.output import output_flag, put, service_name
from agent.cli.state import chosen_state
from rules.endpoint_report import EndpointTable, PortTable, QuestionError, Row, Use, endpoints
from rules.objects import Algorithm


@click.command("endpoints")
@click.argument("service", metavar="[NAMESPACE/]NAME[:PORT]")
@click.option("-n", "--namespace", metavar="NAME", help="The namespace of NAME. [default: default]")
@from_flag
@socket_flag
@settings_flags("data plane", "cluster")
@output_flag
def command(
    service: str,
    namespace: str | None,
    paths: tuple[str, ...],
    socket_path: str,
    output: str,
    **flags: Any,
) -> None:
    """Show the endpoints of a Service, and which of them this node uses, and why.

    The agent also shows the connections to each, if the Service has them counted.

    Asks the agent on this node, or reads manifests (--from) or a cluster (--kubeconfig).
    """
    question = service_name(service, namespace or "")
    state = chosen_state(paths, settings(flags)[0])
    if state:
        try:
            table = endpoints(state, question)
        except QuestionError as error:
            fail(error)
    else:
        name, _, port = question.partition(":")
        path = f"/v1/services/{quote(name)}"
        table = Client(socket_path).get(path, EndpointTable, {"port": port, "counters": "true"})
    rows = (f"{row.address}:{row.port}" for port in table.ports for row in port.rows)
    put(table, output, lambda console: show(table, console), rows)


def show(table: EndpointTable, console: Console) -> None:
    """Prints the table for people."""
    where = f"node {table.node}" + (f" in zone {table.zone}" if table.zone else "")
    console.print(f"[bold]Service {escape(table.service)}[/bold], seen from {escape(where)}")
    if table.algorithm != Algorithm.RANDOM.value:
        console.print(f"algorithm {table.algorithm}")
    for note in table.notes:
        console.print(f"[yellow]{escape(note)}[/yellow]")
    for port in table.ports:
        console.print()
        console.print(_heading(port), highlight=False)
        if port.rows:
            console.print(_grid(port))
        for note in port.notes:
            console.print(f"[yellow]{escape(note)}[/yellow]")


def _heading(port: PortTable) -> str:
    name = f" ({escape(port.name)})" if port.name else ""
    rows = [r for r in port.rows if r.counts]
    counts = [f"{len(rows)} endpoint{'' if len(rows) == 1 else 's'}"]
    for policy in ("cluster", "local"):
        uses = [getattr(r, policy) for r in rows]
        if any(uses):
            used = sum(use.used for use in uses)
            counts.append(f"{used} used under policy {policy.capitalize()}")
    return f"[bold]port {port.port}/{port.protocol}{name}, IPv{port.family}[/bold]: " + ", ".join(
        counts
    )


def _grid(port: PortTable) -> Table:
    policies = [p for p in ("cluster", "local") if any(getattr(r, p) for r in port.rows)]
    grid = Table(box=None, pad_edge=False, header_style="dim")
    optional = [
        c
        for c in ("zone", "hints", "pod", "weight", "connections")
        if any(_cell(r, c) for r in port.rows)
    ]
    for column in ("endpoint", "condition", "node", *optional, "slice"):
        grid.add_column(column, overflow="fold")
    for policy in policies:
        grid.add_column(f"policy {policy.capitalize()}", overflow="fold")
    for row in port.rows:
        cells = [_cell(row, c) for c in ("endpoint", "condition", "node", *optional, "slice")]
        cells += [_use_cell(getattr(row, policy)) for policy in policies]
        grid.add_row(*cells, style=None if row.counts else "dim")
    return grid


def _cell(row: Row, column: str) -> str:
    match column:
        case "endpoint":
            address = f"[{row.address}]" if ":" in row.address else row.address
            return escape(f"{address}:{row.port}")
        case "condition":
            return _condition(row)
        case "weight" | "connections":
            number = row.weight if column == "weight" else row.connections
            return "" if number is None else str(number)
        case "hints":
            return escape(", ".join((*row.node_hints, *row.zone_hints)))
        case _:
            return escape(str(getattr(row, column)))


def _condition(row: Row) -> str:
    """The conditions in a word or two."""
    if row.ready:
        return "ready, terminating" if row.terminating else "ready"
    if row.terminating:
        return "terminating, serving" if row.serving else "terminating"
    return "not ready, serving" if row.serving else "not ready"


def _use_cell(use: Use | None) -> str:
    if use is None:
        return ""
    if use.used:
        return f"[green]used:[/green] {escape(use.reason)}"
    return f"[red]no:[/red] {escape(use.reason)}"
