"""`sliceproxy flows`: connections through Services, as they are made."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import datetime
from typing import Any, Protocol
from urllib.parse import quote, urlencode

import click
import msgspec

from agent.cli.client import Client, socket_flag
from agent.cli.flags import fail, from_flag, settings, settings_flags
from agent.cli.output import service_name
from agent.cli.state import chosen_state
from agent.kernel.errors import KernelError
from agent.kernel.flow_watch import FlowWatch, sends_events
from agent.serve.api import Status
from rules.counts import (
    NO_ENDPOINTS,
    NO_LOCAL_ENDPOINTS,
    SOURCE_RANGES,
    UNALLOCATED,
    UNKNOWN_PORT,
    FrontendCounts,
)
from rules.endpoint_report import EndpointTable, QuestionError, endpoints
from rules.flow_report import Counting, Directory, Flow, Lost, NewConnection, Unanswered
from rules.service_report import ServiceLine, services
from rules.state import State

SECONDS = 10.0
"""How long it listens without --follow, --seconds or --count."""
REFRESH_SECONDS = 2.0
"""The agent is asked at most so often whether anything has changed, and for its counters."""
_REASONS = {
    NO_ENDPOINTS: "no endpoints",
    UNKNOWN_PORT: "no Service port has this port",
    NO_LOCAL_ENDPOINTS: "traffic policy Local, and no endpoints on this node",
    SOURCE_RANGES: "from outside loadBalancerSourceRanges",
    UNALLOCATED: "no Service has this address",
}


@click.command("flows")
@click.argument("service", required=False, metavar="[NAMESPACE/]NAME")
@click.option("-n", "--namespace", metavar="NAME", help="The namespace of NAME. [default: default]")
@click.option("-f", "--follow", is_flag=True, help="Continue until Ctrl-C.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    metavar="N",
    help=f"End after N seconds. [default: {SECONDS:.0f} without --follow and --count]",
)
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="End after N connections.")
@from_flag
@socket_flag
@settings_flags("data plane", "cluster")
@click.option(
    "-o",
    "--output",
    type=click.Choice(("text", "json")),
    default="text",
    show_default=True,
    help="json prints one object a line.",
)
def command(
    service: str | None,
    *,
    namespace: str | None,
    follow: bool,
    seconds: float | None,
    count: int | None,
    paths: tuple[str, ...],
    socket_path: str,
    output: str,
    **flags: Any,
) -> None:
    """Show connections through Services as they are made: client, Service, endpoint, pod.

    Listens to the events of conntrack in this network namespace, so it must run on the node as root
    or in the agent's container. Whose the addresses are it asks the agent, or with --from reads
    manifests, or with --kubeconfig a cluster's lists. The kernel sends events only while this
    command runs. An established connection is not shown again. Ctrl-C ends it with exit code 0.

    Packets that were refused or dropped are no connections. Every two seconds a line has how many
    there were at each address, by the counters of the agent; who sent them is not known, see
    `trace`. With manifests or a cluster's lists there are no such lines.
    """
    if seconds is None and not follow and count is None:
        seconds = SECONDS
    name = service_name(service, namespace or "") if service else ""
    state = chosen_state(paths, settings(flags)[0])
    source = _Objects(state) if state else _Agent(Client(socket_path))
    show = _print_json if output == "json" else _print_text
    with suppress(KeyboardInterrupt):
        try:
            _watch(source, name, show, seconds, count)
        except KernelError as error:
            fail(error)


class _Source(Protocol):
    """Where the Services and endpoints are known from."""

    def directory(self) -> Directory:
        """The current one; the same object while nothing has changed."""

    def table(self, service: str) -> EndpointTable | None:
        """The endpoints of a Service; None if there is no such Service."""

    def counts(self, service: str) -> list[FrontendCounts] | None:
        """What was counted for a Service, or for all (""); None where nothing is."""


class _Objects:
    def __init__(self, state: State) -> None:
        self._state = state
        self._directory = Directory(services(state))

    def directory(self) -> Directory:
        return self._directory

    def table(self, service: str) -> EndpointTable | None:
        with suppress(QuestionError):
            return endpoints(self._state, service)
        return None

    def counts(self, service: str) -> None:
        return None


class _Agent:
    """What the agent has, asked for again when the generation of its state is another."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._asked = time.monotonic()
        self._generation = self._current_generation()
        self._directory = self._read()

    def directory(self) -> Directory:
        now = time.monotonic()
        if now - self._asked >= REFRESH_SECONDS:
            self._asked = now
            generation = self._current_generation()
            if generation != self._generation:
                self._generation = generation
                self._directory = self._read()
        return self._directory

    def table(self, service: str) -> EndpointTable | None:
        return self._client.find(f"/v1/services/{quote(service)}", EndpointTable)

    def counts(self, service: str) -> list[FrontendCounts] | None:
        namespace, _, name = service.partition("/")
        query = urlencode({"namespace": namespace, "name": name})
        return self._client.find(f"/v1/counters?{query}", list[FrontendCounts])

    def _current_generation(self) -> int:
        return self._client.get("/v1/status", Status).generation

    def _read(self) -> Directory:
        return Directory(self._client.get("/v1/services", list[ServiceLine]))


def _watch(
    source: _Source,
    service: str,
    show: Callable[[Flow | Lost | Unanswered], None],
    seconds: float | None,
    count: int | None,
) -> None:
    """Shows the connections to a Service, or to all, until the time is over or so many have been
    shown. Raises KernelError."""
    if service and source.table(service) is None:
        fail(f"there is no Service {service}; `sliceproxy services -A` lists them")
    counted = source.counts(service)
    counting = None if counted is None else Counting(counted)
    with FlowWatch() as watch:
        if not sends_events():
            fail("conntrack sends no events here: sysctl -w net.netfilter.nf_conntrack_events=2")
        shown = 0
        for record in _records(watch.events, source, service, counting, seconds):
            show(record)
            shown += isinstance(record, Flow)
            if shown == count:
                return


def _records(
    events: Callable[[float], Iterator[NewConnection | Lost]],
    source: _Source,
    service: str,
    counting: Counting | None,
    seconds: float | None,
) -> Iterator[Flow | Lost | Unanswered]:
    """Connections as they are made, and between them what was refused and dropped meanwhile, the
    last time at the end. Raises KernelError."""
    end = math.inf if seconds is None else time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        for event in events(min(REFRESH_SECONDS, left)):
            found = event if isinstance(event, Lost) else _resolved(source, event, service)
            if found is not None:
                yield found
        if counting and (counted := source.counts(service)) is not None:
            yield from counting.since(counted, time.time())


def _resolved(source: _Source, connection: NewConnection, service: str) -> Flow | None:
    """The connection with names; None if it goes through no Service, or through another one than
    the one that is asked for ("": any)."""
    directory = source.directory()
    owner = directory.owner(connection)
    if owner is None or (service and owner.service != service):
        return None
    if not directory.knows_endpoints(owner.service):
        directory.add_endpoints(owner.service, source.table(owner.service))
    return directory.flow(connection, owner, time.time())


def _print_json(record: Flow | Lost | Unanswered) -> None:
    click.echo(msgspec.json.encode(record).decode())


def _print_text(record: Flow | Lost | Unanswered) -> None:
    if isinstance(record, Lost):
        click.echo(f"{record.lost} events were lost: more connections than this command can read")
        return
    at = datetime.fromtimestamp(record.time).strftime("%H:%M:%S.%f")[:-3]
    if isinstance(record, Unanswered):
        packets = f"{record.packets} packet{'s' if record.packets != 1 else ''}"
        port = f":{record.port}" if record.port else ""
        where = f"  {record.service}{port}" if record.service else ""
        reason = _REASONS.get(record.reason, record.reason)
        click.echo(f"{at}  {record.outcome}  {record.destination}{where}  {packets}: {reason}")
        return
    click.echo(
        f"{at}  {record.protocol}  {record.client} > {record.destination}  "
        f"{record.service}:{record.port} > {record.endpoint}  {' '.join(_where(record))}"
    )


def _where(flow: Flow) -> Iterable[str]:
    if flow.pod:
        yield f"pod {flow.pod}"
    if flow.node:
        yield f"on {flow.node}"
    if flow.masqueraded:
        yield "(masqueraded)"
