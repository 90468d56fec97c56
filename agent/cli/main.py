"""The command line: `sliceproxy run | render | diff | endpoints | explain | cleanup | demo`.

Commands import what they need when they run, so that the agent carries nothing of the others.
Exit codes: 0 well, 1 `diff` found differences, 2 something is wrong (one line says what).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click
from click.core import ParameterSource

from agent import __version__
from agent.config.options import ConfigError
from rules.options import DetectLocalMode, Options

if TYPE_CHECKING:
    from agent.config.file import ConfigFile, Settings
    from agent.kernel.tables import Kernel
    from agent.sources.manifests.follower import Content
    from rules.events import Event
    from rules.language import Set
    from rules.state import State
    from rules.text import Key, Value

F = TypeVar("F", bound=Callable[..., Any])


def fail(message: object) -> NoReturn:
    """Ends the command with one line on standard error and exit code 2."""
    click.echo(f"sliceproxy: {message}", err=True)
    raise SystemExit(2)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def main() -> None:
    """A Kubernetes service proxy with a constant number of nftables rules.

    Every node runs `sliceproxy run`. The other commands show what it does, would do, and why.
    """


# --- options that several commands share --------------------------------------------------------


def _node_options(command: F) -> F:
    for option in reversed(
        (
            click.option(
                "--config",
                metavar="FILE",
                help="kube-proxy's configuration or our own; flags win. See docs/configuration.md.",
            ),
            click.option(
                "--bind-address", default="", help="The node's primary address of its family."
            ),
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
                "--masquerade-all/--no-masquerade-all", help="Masquerade all cluster IP traffic."
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


def _conntrack_options(command: F) -> F:
    for name, usual, text in reversed(
        (
            ("max-per-core", 32768, "nf_conntrack_max for each CPU; 0 leaves it alone."),
            ("min", 131072, "nf_conntrack_max is not set lower than this."),
            ("tcp-timeout-established", "24h", "0s leaves it alone, here and below."),
            ("tcp-timeout-close-wait", "1h", "After the other side has closed."),
            ("tcp-be-liberal", False, "Packets outside the TCP window are not invalid."),
            ("udp-timeout", "0s", "Of a flow without an answer."),
            ("udp-timeout-stream", "0s", "Of a flow with answers."),
        )
    ):
        flag = f"--conntrack-{name}"
        if usual is False:
            flag += f"/--no-conntrack-{name}"
        command = click.option(flag, default=usual, show_default=True, help=text)(command)
    return command


def _server_options(command: F) -> F:
    for option in reversed(
        (
            click.option(
                "--healthz-bind-address", metavar="IP:PORT", help="[default: 0.0.0.0:10256]"
            ),
            click.option(
                "--metrics-bind-address", metavar="IP:PORT", help="[default: 127.0.0.1:10249]"
            ),
            click.option(
                "--bind-address-hard-fail/--no-bind-address-hard-fail",
                help="End if one of these two cannot be bound, instead of trying again.",
            ),
            click.option(
                "--healthz-timeout",
                default="2m",
                show_default=True,
                help="How long a change may wait before /healthz answers 503.",
            ),
        )
    ):
        command = option(command)
    return command


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


def _settings(flags: dict[str, Any]) -> tuple[Settings, ConfigFile | None]:
    """What the flags that were given choose, and the file that they name."""
    from agent.config.file import merged, read

    source = click.get_current_context().get_parameter_source
    given = {n: v for n, v in flags.items() if source(n) is not ParameterSource.DEFAULT}
    path = given.pop("config", None)
    try:
        file = read(path) if path else None
        return merged(file, given), file
    except ConfigError as error:
        fail(error)


def _options(flags: dict[str, Any]) -> Options:
    return _settings(flags)[0].options()


def _content(places: tuple[str, ...]) -> Content:
    from agent.sources.manifests.follower import ManifestError, read

    try:
        content = read(places)
    except ManifestError as error:
        fail(error)
    for problem in content.problems:
        click.echo(f"sliceproxy: {problem}", err=True)
    return content


def _state(places: tuple[str, ...], flags: dict[str, Any], *, local: bool) -> State:
    """A State that knows the manifests and, if `local`, this machine's addresses."""
    from rules.events import Upsert
    from rules.state import State

    state = State(_options(flags))
    events: list[Event] = [Upsert(o) for o in _content(places).objects]
    if local:
        from pyroute2 import IPRoute

        from agent.kernel.addresses import read

        with IPRoute() as route:
            events.append(read(route))
    state.apply(events)
    state.step()
    for notice in state.notices:
        click.echo(f"sliceproxy: {notice.event}: {notice.subject}: {notice.detail}", err=True)
    state.notices.clear()
    return state


def _kernel(*, own: bool) -> Kernel:
    from agent.kernel.tables import Kernel, KernelError

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
@_server_options
@_conntrack_options
@click.option("--oom-score-adj", type=click.IntRange(-1000, 1000), default=-999, show_default=True)
def run(
    *,
    places: tuple[str, ...],
    **flags: Any,
) -> None:
    """Run the agent: keep this kernel's tables as the API server or the manifests want them.

    Without --from it follows the API server; with it, the files, while they change. SIGTERM ends
    the agent and leaves the tables in place; connections and Services go on. `sliceproxy cleanup`
    removes them.
    """
    from agent.kernel.tables import KernelError
    from agent.run import CannotRun
    from agent.run import run as run_agent

    settings, file = _settings(flags)
    try:
        run_agent(places, settings, file)
    except (CannotRun, KernelError) as error:
        fail(error)


@main.command()
@click.option(
    "--kube-proxy",
    is_flag=True,
    help="Remove what kube-proxy has left here, instead of sliceproxy's tables.",
)
def cleanup(kube_proxy: bool) -> None:
    """Remove sliceproxy's tables from this kernel, or what kube-proxy has left in it.

    Only when the other proxy runs: with the last table, established connections break.
    """
    from agent.kernel.tables import KernelError

    with _kernel(own=False) as kernel:
        try:
            if kube_proxy:
                _cleanup_kube_proxy(kernel)
                return
            removed = kernel.remove()
        except KernelError as error:
            fail(error)
    click.echo("tables removed" if removed else "no tables here")


def _cleanup_kube_proxy(kernel: Kernel) -> None:
    """Exit code 2 if something is left that is not ours to remove."""
    from agent.kernel import kube_proxy

    removal = kube_proxy.remove(kernel)
    for line in removal.removed:
        click.echo(f"removed: {line}")
    for line in removal.left:
        click.echo(f"left: {line}", err=True)
    if not removal.removed and not removal.left:
        click.echo("nothing of kube-proxy here")
    if removal.left:
        raise SystemExit(2)


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
    from rules import text as nft

    state = _state(places, flags, local=False)
    elements = state.elements()
    text = "".join(nft.table(table, elements) for table in state.tables())
    if check:
        from agent.cli.nft_check import CheckFailed
        from agent.cli.nft_check import check as parse

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

    from agent.kernel.tables import KernelError
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

    from agent.cli.endpoints import show
    from rules import endpoint_report

    state = _state(places, flags, local=False)
    try:
        table = endpoint_report.endpoints(state, service)
    except endpoint_report.QuestionError as error:
        fail(error)
    if output == "json":
        click.echo(msgspec.json.encode(table).decode())
    else:
        show(table, Console())


def _elements_here(state: State) -> dict[Set, Mapping[Key, Value]] | None:
    """What this kernel has in our tables; None where it has none, or must not be asked."""
    from agent.kernel.tables import Kernel, KernelError
    from rules.tables import SETS

    elements: dict[Set, Mapping[Key, Value]] = {}
    try:
        with Kernel(own=False) as kernel:
            for table in state.tables():
                if found := kernel.find(table.family):
                    elements |= kernel.read(found)
                    affinity = SETS[table.family].affinity
                    if affinity.name in found.sets:
                        elements[affinity] = kernel.elements(affinity)
    except KernelError:
        return None
    return elements or None


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

    from agent.cli.explain import show
    from rules.endpoint_report import QuestionError
    from rules.explain import explain as explain_

    state = _state(places, flags, local=False)
    try:
        explanation = explain_(state, target, from_address, _elements_here(state))
    except QuestionError as error:
        fail(error)
    if output == "json":
        click.echo(msgspec.json.encode(explanation).decode())
    else:
        show(explanation, Console())


def _find_lab() -> None:
    """Makes `lab` importable in a checkout; the image and the installed package do not have it."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / "lab" / "demo.py").is_file():
        fail(
            "the demo is not part of the installed package: run `make demo` in a checkout of "
            "sliceproxy's repository"
        )
    if str(checkout) not in sys.path:
        sys.path.append(str(checkout))


@main.command()
@click.option("--plain", is_flag=True, help="No colours, no waiting for anybody to read.")
def demo(plain: bool) -> None:
    """Build a small cluster out of network namespaces and balance real connections in it.

    Needs root. Makes namespaces of its own, touches nothing else, and removes them again.
    """
    _find_lab()
    from lab.demo import DemoError
    from lab.demo import run as run_demo

    try:
        run_demo(plain=plain)
    except DemoError as error:
        fail(error)


if __name__ == "__main__":
    main()
