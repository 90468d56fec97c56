"""`sliceproxy services`: one line for each Service port: what this node does with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from agent.cli.client import Client, socket_flag
from agent.cli.flags import from_flag, settings, settings_flags
from agent.cli.output import output_flag, put
from agent.cli.state import chosen_state
from rules.service_report import NOT_PROXIED, SERVED, ServiceLine, services
from rules.state import State

_COLOURS = {SERVED: "green", NOT_PROXIED: "dim"}


@click.command("services")
@click.option("-n", "--namespace", metavar="NAME", help="Only this namespace. [default: all]")
@click.option("-A", "--all-namespaces", is_flag=True, help="All namespaces, which is the default.")
@from_flag
@socket_flag
@settings_flags("data plane", "cluster")
@output_flag
def command(
    namespace: str | None,
    all_namespaces: bool,
    paths: tuple[str, ...],
    socket_path: str,
    output: str,
    **flags: Any,
) -> None:
    """Show every Service port: addresses, endpoints used of all, and what a client meets.

    Asks the agent on this node, or reads manifests (--from) or a cluster (--kubeconfig).
    """
    chosen = "" if all_namespaces else namespace or ""
    state = chosen_state(paths, settings(flags)[0])
    if state:
        lines = services(state, chosen)
    else:
        counted = "true" if output in ("wide", "json", "yaml") else ""
        query = {"namespace": chosen, "counters": counted}
        lines = Client(socket_path).get("/v1/services", list[ServiceLine], query)
    if chosen and not lines:
        _suggest(chosen, state, socket_path)
    names = dict.fromkeys(f"service/{line.namespace}/{line.name}" for line in lines)
    put(lines, output, lambda console: show(lines, console, wide=output == "wide"), names)


def _suggest(namespace: str, state: State | None, socket_path: str) -> None:
    """Names the namespaces that were perhaps meant, on standard error."""
    if state:
        known = {name.namespace for name in state.services}
    else:
        known = {
            line.namespace for line in Client(socket_path).get("/v1/services", list[ServiceLine])
        }
    if namespace in known:
        return
    near = difflib.get_close_matches(namespace, sorted(known))
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    click.echo(f"sliceproxy: no Service is in namespace {namespace}{hint}", err=True)


def show(lines: Sequence[ServiceLine], console: Console, *, wide: bool = False) -> None:
    """Prints the lines as a table; `wide` adds policies, affinity, algorithm and counters."""
    if not lines:
        console.print("No Services.")
        return
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    columns = ("NAMESPACE", "NAME", "PORT", "FAMILY", "ADDRESSES", "ENDPOINTS", "STATE")
    for column in (
        *columns,
        *(_WIDE if wide else ()),
    ):
        grid.add_column(column, no_wrap=True)
    for line in lines:
        colour = _COLOURS.get(line.state, "red")
        cells = [
            escape(line.namespace),
            escape(line.name),
            f"{line.port}/{line.protocol}",
            f"IPv{line.family}" if line.family else "",
            escape(_addresses(line, wide=wide)),
            f"{line.used}/{line.total}",
            f"[{colour}]{line.state}[/{colour}]",
        ]
        if wide:
            cells += [
                f"{line.internal_policy}/{line.external_policy}",
                f"{line.affinity_seconds} s" if line.affinity_seconds else "",
                line.algorithm,
                *(_sum(getattr(f, name) for f in line.frontends) for name in _COUNTED),
            ]
        grid.add_row(*cells)
    console.print(grid)


_WIDE = ("POLICIES", "AFFINITY", "ALGORITHM", "CONNECTIONS", "REFUSED", "DROPPED")
_COUNTED = ("connections", "refused", "dropped")


def _sum(counts: Iterable[int | None]) -> str:
    """Empty without counters."""
    known = [count for count in counts if count is not None]
    return str(sum(known)) if known else ""


def _addresses(line: ServiceLine, *, wide: bool) -> str:
    """The addresses without the port that the line has already."""
    texts = [f.address + (f" (held by {f.holder})" if f.holder else "") for f in line.frontends]
    shown = texts if wide else texts[:2]
    return ", ".join(shown) + (f" +{len(texts) - len(shown)}" if len(texts) > len(shown) else "")
