"""`sliceproxy trace`: the path of the next real packet to an address, through every rule."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from types import FrameType
from typing import NoReturn

import click
from rich.console import Console
from rich.markup import escape

from agent.cli.flags import fail
from agent.cli.output import output_flag, put
from agent.kernel.errors import KernelError
from agent.kernel.trace import Trace
from rules.endpoint_report import QuestionError
from rules.explain import parse_address, parse_destination
from rules.netlink.trace import TraceFilter
from rules.packet_trace import DROPPED, REFUSED, TracedPacket, TracedStep


@click.command("trace")
@click.argument("target", metavar="ADDRESS:PORT[/udp|/sctp]")
@click.option("--from-address", metavar="IP", help="Only packets with this source address.")
@click.option(
    "--count",
    type=click.IntRange(1, 1000),
    default=1,
    show_default=True,
    metavar="N",
    help="End after N packets.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=30.0,
    show_default=True,
    metavar="N",
    help="End after N seconds.",
)
@output_flag
def command(
    target: str, *, from_address: str | None, count: int, seconds: float, output: str
) -> None:
    """Show the path of the next real packet to an address through all rules of this node.

    The live twin of `explain`. It waits for a packet and sends none. Of TCP it takes packets that
    open a connection. While it runs, a table of its own compares each packet with the address; the
    kernel removes that table when the command ends, however it ends. Needs root on the node, or the
    agent's container.

    Exit code 0 if each packet was sent to an endpoint or left as it was, 1 if one was refused or
    dropped, or none came.
    """
    signal.signal(signal.SIGTERM, _interrupted)
    found: list[TracedPacket] = []
    with suppress(KeyboardInterrupt):
        try:
            wanted = _filter(target, from_address)
            with Trace(wanted) as trace:
                click.echo(f"waiting for packets to {target} for {seconds:g} s", err=True)
                for packet in islice(trace.packets(seconds), count):
                    found.append(packet)
                    if output in ("text", "wide"):
                        put(packet, output, lambda console, p=packet: show(p, console))  # type: ignore[misc]
        except KernelError as error:
            fail(error)
        except QuestionError as error:
            fail(error)
    if output not in ("text", "wide"):
        put(found, output, lambda _: None, (packet.outcome for packet in found))
    if not found:
        click.echo(f"sliceproxy: no packet to {target} was seen", err=True)
    bad = not found or any(packet.outcome in (REFUSED, DROPPED) for packet in found)
    raise SystemExit(1 if bad else 0)


def _interrupted(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _filter(target: str, from_address: str | None) -> TraceFilter:
    """Raises QuestionError."""
    where = parse_destination(target)
    source = parse_address(from_address) if from_address else None
    if source is not None and len(source) != len(where.address):
        raise QuestionError(f"{from_address} is of another family than {target}")
    return TraceFilter(where.family, where.address, where.protocol, where.port, source)


def show(packet: TracedPacket, console: Console) -> None:
    """Prints a packet's path: the chains, the rules that matched, and the end."""
    console.print(f"[bold]{packet.protocol} {packet.source} > {packet.destination}[/bold]")
    for passage in packet.passages:
        route = f"{passage.source} > {passage.destination}"
        if passage.from_interface:
            route += f", in by {passage.from_interface}"
        if passage.to_interface:
            route += f", out by {passage.to_interface}"
        console.print(f"  {escape(route)}", style="dim")
        for line in _lines(passage.steps):
            console.print(line, markup=False)
    console.print(f"  {packet.outcome} {escape(packet.detail)}", style="bold")


def _lines(steps: Iterable[TracedStep]) -> Iterator[str]:
    """The chain once, then a line for each of its rules that matched."""
    place = ""
    for step in steps:
        if step.place != place:
            place = step.place
            yield f"    {place}"
        # a verdict that the rule ends with is not repeated
        verdict = "" if step.rule.endswith(step.verdict) else f"  -> {step.verdict}"
        yield f"      {step.rule}{verdict}"
