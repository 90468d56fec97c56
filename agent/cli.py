"""The command line: `sliceproxy run | render | diff | endpoints | explain | cleanup | demo`.

Commands import what they need when they run, so that the agent carries nothing of the others.
Exit codes: 0 well, 1 `diff` found differences, 2 something is wrong (one line says what).
"""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

import click

from agent.config import ConfigError, DetectLocalMode, Options, options

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from agent.events import Event
    from agent.kernel import Kernel
    from agent.sources.manifests import Content
    from agent.state import State

F = TypeVar("F", bound=Callable[..., Any])


def fail(message: object) -> NoReturn:
    """Ends the command with one line on standard error and exit code 2."""
    click.echo(f"sliceproxy: {message}", err=True)
    raise SystemExit(2)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="sliceproxy")
def main() -> None:
    """A Kubernetes service proxy with a constant number of nftables rules.

    Every node runs `sliceproxy run`. The other commands show what it does, would do, and why.
    """


# --- options that several commands share --------------------------------------------------------


def _node_options(command: F) -> F:
    for option in reversed(
        (
            click.option(
                "--node", help="This node's name. [default: $NODE_NAME, else the host's name]"
            ),
            click.option("--zone", default="", help="Its zone. [default: the Node's zone label]"),
            click.option(
                "--nodeport-addresses",
                multiple=True,
                metavar="CIDR|primary",
                help="Which addresses of this node answer at node ports. [default: primary]",
            ),
            click.option(
                "--detect-local-mode",
                metavar="MODE",
                help="How to tell pods of this node, whose addresses are kept: "
                + ", ".join(m.value for m in DetectLocalMode)
                + ". [default: ClusterCIDR with --cluster-cidr, else None]",
            ),
            click.option("--cluster-cidr", default="", help="The pods' CIDRs, comma separated."),
            click.option("--pod-bridge-interface", default="", help="For mode BridgeInterface."),
            click.option(
                "--pod-interface-name-prefix", default="", help="For mode InterfaceNamePrefix."
            ),
            click.option(
                "--masquerade-all", is_flag=True, help="Masquerade all cluster IP traffic."
            ),
            click.option(
                "--masquerade-bit",
                type=int,
                default=14,
                show_default=True,
                help="The bit of the packet mark that stands for masquerading.",
            ),
            click.option(
                "--proxy-name",
                default="",
                help="Take the Services labelled service.kubernetes.io/service-proxy-name=NAME"
                " instead of those without that label.",
            ),
        )
    ):
        command = option(command)
    return command


_FROM_HELP = "A file or directory of manifests (YAML or JSON), or - for standard input. Repeatable."
_from = click.option(
    "--from", "places", multiple=True, required=True, metavar="PATH", help=_FROM_HELP
)
_output = click.option(
    "--output", type=click.Choice(["text", "json"]), default="text", show_default=True
)
_no_own = click.option(
    "--no-own",
    is_flag=True,
    help="Do not make the tables belong to the agent, even if the kernel can (Linux 6.9).",
)


def _options(flags: dict[str, Any]) -> Options:
    try:
        return options(**flags)
    except ConfigError as error:
        fail(error)


def _content(places: tuple[str, ...]) -> Content:
    from agent.sources.manifests import ManifestError, read

    try:
        content = read(places)
    except ManifestError as error:
        fail(error)
    for problem in content.problems:
        click.echo(f"sliceproxy: {problem}", err=True)
    return content


def _state(places: tuple[str, ...], flags: dict[str, Any], *, local: bool) -> State:
    """A State that knows the manifests and, if `local`, this machine's addresses."""
    from agent.events import Upsert
    from agent.state import State

    state = State(_options(flags))
    events: list[Event] = [Upsert(o) for o in _content(places).objects]
    if local:
        from pyroute2 import IPRoute

        from agent.addresses import read

        with IPRoute() as route:
            events.append(read(route))
    state.apply(events)
    state.step()
    for notice in state.notices:
        click.echo(f"sliceproxy: {notice.event}: {notice.subject}: {notice.detail}", err=True)
    state.notices.clear()
    return state


def _kernel(*, own: bool) -> Kernel:
    from agent.kernel import Kernel, KernelError

    try:
        return Kernel(own=own)
    except KernelError as error:
        fail(error)


# --- the agent ----------------------------------------------------------------------------------


@main.command()
@click.option("--from", "places", multiple=True, metavar="PATH", help=_FROM_HELP)
@click.option(
    "--kubeconfig",
    metavar="FILE",
    help="How to reach the API server, without --from. [default: $KUBECONFIG, the pod's service"
    " account, ~/.kube/config]",
)
@click.option("--context", help="A context of the kubeconfig. [default: its current one]")
@click.option(
    "--server",
    metavar="URL",
    help="The API server's own address. A pod is told that of a Service, which needs a proxy.",
)
@_node_options
@_no_own
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="debug also logs every element that changes.",
)
def run(
    *,
    places: tuple[str, ...],
    kubeconfig: str | None,
    context: str | None,
    server: str | None,
    no_own: bool,
    log_level: str,
    **flags: Any,
) -> None:
    """Run the agent: keep this kernel's tables as the API server or the manifests want them.

    Without --from it follows the API server; with it, the files, while they change. SIGTERM ends
    the agent and leaves the tables in place; connections and Services go on. `sliceproxy cleanup`
    removes them.
    """
    from agent import addresses, log
    from agent.loop import Failed, Loop, Stop
    from agent.state import State

    chosen = _options(flags)
    logger = log.configure(log_level)
    gc.disable()  # until the loop has programmed what is there: a load makes no garbage
    with _kernel(own=not no_own) as kernel:
        loop = Loop(State(chosen), kernel, logger, show_elements=log_level == "debug")

        def stop(_signal: int, _frame: FrameType | None) -> None:
            loop.put(Stop())

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        if places:
            source = _manifests(places, loop.put, logger)
        else:
            source = _api_server((kubeconfig, context, server), chosen, loop.put, logger)
        network = addresses.Follower(loop.put, lambda error: loop.put(Failed(error)))
        logger.info("started", node=chosen.node, owns_tables=bool(kernel.table_flags))
        network.start()
        network.told.wait()
        source.start()
        loop.run()
        logger.info("stopped", tables="left in place")
        source.stop()
        network.stop()


class _Source(Protocol):
    """What tells the loop of events: a thread that starts and stops."""

    def start(self) -> None: ...
    def stop(self) -> None: ...


def _manifests(
    places: tuple[str, ...], put: Callable[[list[Event]], None], logger: FilteringBoundLogger
) -> _Source:
    from agent.sources.manifests import Follower, ManifestError

    try:
        return Follower(places, put, logger)
    except ManifestError as error:
        fail(error)


def _api_server(
    settings: tuple[str | None, str | None, str | None],
    chosen: Options,
    put: Callable[[list[Event]], None],
    logger: FilteringBoundLogger,
) -> _Source:
    from agent.sources.kubernetes import ConnectError, Follower, connect

    try:
        connection = connect(*settings)
    except ConnectError as error:
        fail(error)
    return Follower(connection, chosen.node, chosen.proxy_name, put, logger)


@main.command()
def cleanup() -> None:
    """Remove sliceproxy's tables from this kernel."""
    from agent.kernel import KernelError

    with _kernel(own=False) as kernel:
        try:
            removed = kernel.remove()
        except KernelError as error:
            fail(error)
    click.echo("tables removed" if removed else "no tables here")


# --- what it would do ---------------------------------------------------------------------------


@main.command()
@_from
@_node_options
@click.option("--check", is_flag=True, help="Have libnftables parse the ruleset, too.")
def render(places: tuple[str, ...], check: bool, **flags: Any) -> None:
    """Print the ruleset in nft's language: the dry run.

    Touches nothing and needs no privilege. `nft -f` loads what it prints. Node ports answer at
    the addresses of the Node object named by --node, so give that one too.
    """
    from rules import nft

    state = _state(places, flags, local=False)
    elements = state.elements()
    text = "".join(nft.table(table, elements) for table in state.tables())
    if check:
        from agent.check import CheckFailed
        from agent.check import check as parse

        try:
            parse(text)
        except CheckFailed as error:
            fail(error)
    sys.stdout.write(text)


@main.command()
@_from
@_node_options
@_no_own
@_output
def diff(places: tuple[str, ...], no_own: bool, output: str, **flags: Any) -> None:
    """Show what `run` would change in this kernel now, as nft commands.

    Exit code 0 if nothing, 1 if something, 2 if it cannot tell.
    """
    import msgspec

    from agent.kernel import KernelError
    from agent.loop import reader
    from rules.transaction import commands

    state = _state(places, flags, local=True)
    with _kernel(own=not no_own) as kernel:
        try:
            transaction = state.resync(reader(kernel))
        except KernelError as error:
            fail(error)
    lines = list(commands(transaction))
    if output == "json":
        click.echo(msgspec.json.encode({"commands": lines}).decode())
    else:
        for line in lines:
            click.echo(line)
    raise SystemExit(1 if transaction else 0)


# --- why ----------------------------------------------------------------------------------------


@main.command()
@click.argument("service", metavar="NAMESPACE/NAME[:PORT]")
@_from
@_node_options
@_output
def endpoints(service: str, places: tuple[str, ...], output: str, **flags: Any) -> None:
    """Show the endpoints of a Service, and which of them this node uses, and why."""
    import msgspec
    from rich.console import Console

    from agent import endpoints as view
    from agent.endpoints import QuestionError

    state = _state(places, flags, local=False)
    try:
        table = view.endpoints(state, service)
    except QuestionError as error:
        fail(error)
    if output == "json":
        click.echo(msgspec.json.encode(table).decode())
    else:
        view.show(table, Console())


@main.command()
@click.argument("target", metavar="ADDRESS:PORT[/udp|/sctp]")
@_from
@_node_options
@click.option("--from-address", metavar="IP", help="Only for a client with this address.")
@_output
def explain(
    target: str,
    places: tuple[str, ...],
    from_address: str | None,
    output: str,
    **flags: Any,
) -> None:
    """Explain the way of a packet: which Service, which endpoints, whose address they see.

    Asked on a node with sliceproxy's tables, it shows the slots that the kernel has.
    """
    import msgspec
    from rich.console import Console

    from agent import explain as view
    from agent.endpoints import QuestionError

    state = _state(places, flags, local=False)
    try:
        explanation = view.explain(state, target, from_address)
    except QuestionError as error:
        fail(error)
    if output == "json":
        click.echo(msgspec.json.encode(explanation).decode())
    else:
        view.show(explanation, Console())


@main.command()
@click.option("--plain", is_flag=True, help="No colours, no waiting for anybody to read.")
def demo(plain: bool) -> None:
    """Build a small cluster out of network namespaces and balance real connections in it.

    Needs root. Makes namespaces of its own, touches nothing else, and removes them again.
    """
    from agent.demo import DemoError
    from agent.demo import run as run_demo

    try:
        run_demo(plain=plain)
    except DemoError as error:
        fail(error)


if __name__ == "__main__":
    main()
