"""`sliceproxy top`: new connections, refused and dropped packets a second, by Service."""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import click
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from agent.cli.client import Client, socket_flag
from agent.cli.output import console
from rules.counts import FrontendCounts, by_service

NO_SERVICE = "(no Service)"


class Rates(NamedTuple):
    """What happened in a second at one Service; `name` is namespace/name."""

    name: str
    connections: float
    refused: float
    dropped: float


def rates(before: list[FrontendCounts], after: list[FrontendCounts], seconds: float) -> list[Rates]:
    """The Services at which something happened, the busiest first."""
    known, found = by_service(before), []
    for (namespace, service), counts in by_service(after).items():
        base = known.get((namespace, service), (0, 0, 0))
        # less than before: the Service was made again, and counts from 0
        gained = [now - was if now >= was else now for now, was in zip(counts, base, strict=True)]
        if any(gained):
            name = f"{namespace}/{service}" if service else NO_SERVICE
            found.append(Rates(name, *(number / seconds for number in gained)))
    return sorted(found, key=lambda r: (-sum(r[1:]), r.name))


def table(found: list[Rates], rows: int | None = None) -> Table:
    """The rates for people, the first `rows` of them."""
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    grid.add_column("SERVICE", no_wrap=True)
    for column in ("CONNECTIONS/S", "REFUSED/S", "DROPPED/S"):
        grid.add_column(column, justify="right", no_wrap=True)
    for one in found[:rows]:
        colours = ("", "red" if one.refused else "", "red" if one.dropped else "")
        numbers = (
            f"[{colour}]{value:.1f}[/{colour}]" if colour else f"{value:.1f}"
            for colour, value in zip(colours, one[1:], strict=True)
        )
        grid.add_row(escape(one.name), *numbers)
    return grid


@click.command("top")
@click.option("-n", "--namespace", metavar="NAME", help="Only this namespace. [default: all]")
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 3600),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="The time between two readings.",
)
@click.option("--once", is_flag=True, help="Print one table and end; so it is when piped.")
@socket_flag
def command(*, namespace: str | None, interval: float, once: bool, socket_path: str) -> None:
    """Show the rates of each Service on this node, the busiest first.

    `q` or Ctrl-C ends it. The agent counts unless it runs with --no-counters.
    """
    client, query = Client(socket_path), {"namespace": namespace}

    def read() -> tuple[float, list[FrontendCounts]]:
        found = client.get("/v1/counters", list[FrontendCounts], query)
        return time.monotonic(), found

    before = read()
    if once or not sys.stdout.isatty():
        time.sleep(interval)
        after = read()
        console().print(table(rates(before[1], after[1], after[0] - before[0])))
        return
    with suppress(KeyboardInterrupt), _keys(), Live(table([]), auto_refresh=False) as live:
        while not _quits(interval):
            after = read()
            found = rates(before[1], after[1], after[0] - before[0])
            live.update(table(found, max(1, live.console.height - 2)), refresh=True)
            before = after


@contextmanager
def _keys() -> Iterator[None]:
    """Keys arrive one by one; the terminal is as before afterwards."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _quits(seconds: float) -> bool:
    """Waits; whether `q` was pressed meanwhile."""
    if not sys.stdin.isatty():
        time.sleep(seconds)
        return False
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if select.select([sys.stdin], [], [], left)[0]:
            key = os.read(sys.stdin.fileno(), 1)
            if key in (b"q", b"Q", b""):
                return True
    return False
