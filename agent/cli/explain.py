"""`sliceproxy explain`: what happens to a connection to an address, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from agent.cli.flags import fail, output_flag, required_from_flag, settings, settings_flags
from agent.cli.state import from_manifests
from agent.kernel.errors import KernelError
from agent.kernel.tables import Kernel
from rules.endpoint_report import QuestionError
from rules.explain import (
    Asked,
    EndpointList,
    Explanation,
    Reached,
    RuleStep,
    explain,
    with_article,
)
from rules.language import Set
from rules.state import State
from rules.tables import SETS
from rules.text import Key, Value
from rules.trace import Effect, End, Masquerade


@click.command("explain")
@click.argument("target", metavar="ADDRESS:PORT[/udp|/sctp]")
@required_from_flag
@settings_flags("data plane")
@click.option("--from-address", metavar="IP", help="Only for a client with this address.")
@output_flag
def command(
    target: str,
    paths: tuple[str, ...],
    from_address: str | None,
    output: str,
    **flags: Any,
) -> None:
    """Explain the path of a packet: which Service, which endpoints, which source they see.

    On a node that has sliceproxy's tables the answer is from the kernel's own elements.
    """
    state = from_manifests(paths, settings(flags)[0])
    try:
        explanation = explain(state, target, from_address, _elements_here(state))
    except QuestionError as error:
        fail(error)
    if output == "json":
        click.echo(msgspec.json.encode(explanation).decode())
    else:
        show(explanation, Console())


def _elements_here(state: State) -> dict[Set, Mapping[Key, Value]] | None:
    """The elements of our tables in this kernel; None if it has none or they are not readable."""
    elements: dict[Set, Mapping[Key, Value]] = {}
    try:
        with Kernel(own=False) as kernel:
            for table in state.tables():
                if back := kernel.read_back(table.family):
                    elements |= back.elements
                    affinity = SETS[table.family].affinity
                    if affinity.name in back.table.sets:
                        elements[affinity] = kernel.elements(affinity)
    except KernelError:
        return None
    return elements or None


def show(explanation: Explanation, console: Console) -> None:
    """Prints the explanation for people who need not know nftables."""
    for line in _heading(explanation):
        console.print(line, highlight=False)
    for note in explanation.notes:
        console.print(f"[yellow]note: {escape(note)}[/yellow]", highlight=False)
    for asked in explanation.asked:
        console.print()
        console.print(
            f"[bold]{escape(asked.who[0].upper() + asked.who[1:])}[/bold] ({asked.address})",
            highlight=False,
        )
        for line in _outcome_lines(asked):
            console.print(f"  {line}", highlight=False)
        if asked.steps:
            console.print(Padding(_steps_grid(asked.steps), (0, 0, 0, 4)))
    console.print()
    source = "read from the kernel" if explanation.from_kernel else "as they should be"
    console.print(f"[dim]rules and elements: {source}[/dim]", highlight=False)


def _heading(explanation: Explanation) -> Iterator[str]:
    answering, target = explanation.answering, escape(explanation.target)
    if answering is None:
        yield f"[bold]{target}[/bold] is answered by no Service:"
        yield f"  {escape(explanation.why_not)}"
        return
    yield (
        f"[bold]{target}[/bold] is {with_article(answering.kind)} of [bold]Service "
        f"{escape(answering.service)}[/bold], port {escape(answering.port)}"
    )
    if answering.lost_by:
        losers = escape(", ".join(answering.lost_by))
        yield f"  [yellow]also claimed by {losers}, which does not get it[/yellow]"
    yield f"  policy     {answering.policy}"
    yield f"  endpoints  {_list_text(answering.list)}"
    if answering.inside:
        yield f"  inside     {_list_text(answering.inside)}, for this node and its pods"
    if answering.affinity_seconds:
        yield (
            f"  affinity   a client keeps its endpoint until it stays away for "
            f"{answering.affinity_seconds} s"
        )
    if answering.source_ranges:
        yield f"  sources    only {', '.join(answering.source_ranges)} (loadBalancerSourceRanges)"


def _list_text(used: EndpointList) -> str:
    return f"{len(used.endpoints)} by policy {used.name}: {used.basis}"


def _outcome_lines(asked: Asked) -> Iterator[str]:
    for outcome in asked.outcomes:
        match End(outcome):
            case End.SENT:
                yield _sent_text(asked.endpoints)
                yield from _seen_lines(asked.endpoints)
                if asked.remembered_seconds:
                    yield f"and comes back to the same one for {asked.remembered_seconds} s"
            case End.DROPPED:
                yield "[red]is dropped:[/red] nothing comes back"
            case End.REFUSED:
                yield "[red]is refused[/red] at once"
            case End.PASSED:
                yield "[yellow]is not touched:[/yellow] it goes on to where it was sent"


def _sent_text(reached: tuple[Reached, ...]) -> str:
    texts = [r.endpoint for r in reached]
    if len(texts) == 1:
        return f"[green]goes to[/green] {escape(texts[0])}"
    return f"[green]goes to one of {len(texts)}[/green] at random: {escape(_some(texts))}"


_SEEN = {
    Masquerade.NO: "the client's own address",
    Masquerade.MARK: "an address of this node instead of the client's (masqueraded)",
    Masquerade.HAIRPIN: "an address of this node, as it is the client itself (hairpin)",
}


def _seen_lines(reached: tuple[Reached, ...]) -> Iterator[str]:
    """What the endpoints see as the client, by reason."""
    for why, text in _SEEN.items():
        those = [r.endpoint for r in reached if r.sees_node == why.value]
        if those and len(those) == len(reached):
            yield f"which sees {text}"
        elif those:
            yield f"{escape(_some(those))} sees {text}"


def _some(texts: list[str], shown: int = 6) -> str:
    """The first few, and how many more there are."""
    more = f" and {len(texts) - shown} more" if len(texts) > shown else ""
    return ", ".join(texts[:shown]) + more


def _steps_grid(steps: tuple[RuleStep, ...]) -> Table:
    grid = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    grid.add_column()
    grid.add_column(overflow="fold", style="dim")
    for step in steps:
        if step.effect != Effect.UNMARKS.value:
            why = f" ({step.comment})" if step.comment else ""
            grid.add_row(escape(step.effect + why), escape(_from(step)))
    return grid


def _from(step: RuleStep) -> str:
    """The chain that a step is of, and what matched there: elements, else the rule."""
    if not step.matched:
        # what an update writes differs by client and endpoint; which map it is says enough
        return f"chain {step.chain}: {step.rule.partition(' {')[0].partition(' comment ')[0]}"
    found: dict[str, list[str]] = {}
    for match in step.matched:
        found.setdefault(match.set, []).append(match.element or "nothing that matches")
    texts = (f"@{name} {{ {_some(elements, shown=2)} }}" for name, elements in found.items())
    return f"chain {step.chain}: {', '.join(texts)}"
