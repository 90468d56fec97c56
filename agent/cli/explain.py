"""`sliceproxy explain`: what happens to a connection to an address, and why."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from urllib.parse import quote

import click
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from agent.cli.client import Client, socket_flag
from agent.cli.flags import fail, from_flag, settings, settings_flags
from agent.cli.output import output_flag, put, service_name
from agent.cli.state import chosen_state
from agent.kernel.errors import KernelError
from agent.kernel.lookups import kernel_elements
from rules.endpoint_report import QuestionError, endpoints
from rules.explain import (
    Answering,
    Asked,
    EndpointList,
    Explanation,
    Reached,
    RuleStep,
    explain,
    with_article,
)
from rules.frontends import Kind
from rules.objects import Algorithm, Name
from rules.service_report import ServiceLine, service_lines
from rules.state import State
from rules.trace import Effect, End, Masquerade


@click.command("explain")
@click.argument("target", metavar="ADDRESS:PORT[/udp|/sctp]|[NAMESPACE/]NAME")
@click.option("-n", "--namespace", metavar="NAME", help="The namespace of NAME. [default: default]")
@from_flag
@socket_flag
@settings_flags("data plane", "cluster")
@click.option("--from-address", metavar="IP", help="Only for a client with this address.")
@output_flag
def command(
    target: str,
    *,
    namespace: str | None,
    paths: tuple[str, ...],
    socket_path: str,
    from_address: str | None,
    output: str,
    **flags: Any,
) -> None:
    """Explain the path of a packet: which Service, which endpoints, which source they see.

    A Service's name means all its addresses, except node ports. Asks the agent on this node,
    or reads manifests (--from) or a cluster (--kubeconfig). On a node that has sliceproxy's tables
    the answer is from the kernel's own elements. Exit code 0 if every client is sent to an
    endpoint, 1 if one is refused or dropped or no Service has the address.
    """
    state = chosen_state(paths, settings(flags)[0])
    if state:
        found = _from_state(state, target, namespace, from_address)
    else:
        found = _from_agent(Client(socket_path), target, namespace, from_address)
    record = found[0] if len(found) == 1 else found
    put(record, output, lambda console: _show_all(found, console), (e.target for e in found))
    raise SystemExit(0 if all(map(_is_served, found)) else 1)


_BAD_ENDS = (End.REFUSED.value, End.DROPPED.value)


def _is_served(explanation: Explanation) -> bool:
    """Whether a Service has the address and sends every client to an endpoint."""
    outcomes = {outcome for asked in explanation.asked for outcome in asked.outcomes}
    return explanation.answering is not None and not outcomes & {*_BAD_ENDS}


def _is_address(target: str) -> bool:
    """Whether this is meant as an address, not as a Service's name."""
    return bool(re.match(r"\[|[^/]*:\d", target)) or target[:1] == "["


def _from_state(
    state: State, target: str, namespace: str | None, client: str | None
) -> list[Explanation]:
    addresses = [target]
    try:
        if not _is_address(target):
            text = service_name(target, namespace or "")
            name = Name(*text.split("/", 1))
            if name not in state.services:
                endpoints(state, text)  # raises the error that names what was perhaps meant
            addresses = _addresses(service_lines(state, name))
        with kernel_elements() as elements:
            return [explain(state, address, client, elements) for address in addresses]
    except (QuestionError, KernelError) as error:
        fail(error)


def _from_agent(
    client: Client, target: str, namespace: str | None, from_address: str | None
) -> list[Explanation]:
    addresses = [target]
    if not _is_address(target):
        name = service_name(target, namespace or "")
        client.raw(f"/v1/services/{quote(name)}")  # an unknown name ends the command here
        query = {"namespace": name.partition("/")[0]}
        lines = client.get("/v1/services", list[ServiceLine], query)
        addresses = _addresses(line for line in lines if f"{line.namespace}/{line.name}" == name)
    return [
        client.get("/v1/explain", Explanation, {"target": address, "from": from_address})
        for address in addresses
    ]


def _addresses(lines: Iterable[ServiceLine]) -> list[str]:
    """The addresses of these lines that can be asked about: all but node ports."""
    frontends = (frontend for line in lines for frontend in line.frontends)
    return [f.address for f in frontends if f.kind != Kind.NODE_PORT.value]


def _show_all(found: Sequence[Explanation], console: Console) -> None:
    if not found:
        console.print("No addresses: the Service is not proxied, or has only node ports.")
    for number, explanation in enumerate(found):
        if number:
            console.print()
        show(explanation, console)


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
        for line in _outcome_lines(asked, explanation.answering):
            console.print(f"  {line}", highlight=False)
        if asked.steps:
            console.print(Padding(_steps_grid(asked.steps), (0, 0, 0, 4), expand=False))
    console.print()
    source = (
        "read from the kernel" if explanation.from_kernel else "computed, not read from the kernel"
    )
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
    drained = f"; {answering.drained} drained (weight 0)" if answering.drained else ""
    yield f"  endpoints  {_list_text(answering.list)}{drained}"
    if answering.inside:
        yield f"  inside     {_list_text(answering.inside)}, for this node and its pods"
    if text := _ALGORITHMS.get(answering.algorithm):
        yield f"  algorithm  {text}"
    if answering.affinity_seconds:
        yield (
            f"  affinity   a client keeps its endpoint until it stays away for "
            f"{answering.affinity_seconds} s"
        )
    if answering.source_ranges:
        yield f"  sources    only {', '.join(answering.source_ranges)} (loadBalancerSourceRanges)"


_ALGORITHMS = {
    Algorithm.SOURCE_HASH.value: "source-hash: a client's address names its endpoint",
    Algorithm.WEIGHTED.value: "weighted: an endpoint has as many slots as its weight",
}


def _list_text(used: EndpointList) -> str:
    return f"{len(used.endpoints)} by policy {used.name}: {used.basis}"


def _outcome_lines(asked: Asked, answering: Answering | None) -> Iterator[str]:
    for outcome in asked.outcomes:
        match End(outcome):
            case End.SENT:
                yield _sent_text(asked.endpoints, answering.algorithm if answering else "")
                yield from _seen_lines(asked.endpoints)
                if asked.remembered_seconds:
                    yield f"and comes back to the same one for {asked.remembered_seconds} s"
            case End.DROPPED:
                yield "[red]is dropped:[/red] nothing comes back"
            case End.REFUSED:
                yield "[red]is refused[/red] at once"
            case End.PASSED:
                yield "[yellow]is not touched:[/yellow] it goes on to where it was sent"


def _sent_text(reached: tuple[Reached, ...], algorithm: str) -> str:
    texts = [r.endpoint for r in reached]
    if len(texts) == 1:
        return f"[green]goes to[/green] {escape(texts[0])}"
    how = "by its address" if algorithm == Algorithm.SOURCE_HASH.value else "at random"
    slots = [r.slots for r in reached]
    if max(slots) > min(slots):
        texts = [f"{t} ({n} of {sum(slots)} slots)" for t, n in zip(texts, slots, strict=True)]
    return f"[green]goes to one of {len(texts)}[/green] {how}: {escape(_some(texts))}"


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
