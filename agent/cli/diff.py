"""`sliceproxy diff`: the changes that the agent would make to this kernel."""

from __future__ import annotations

from typing import Any

import click
from rich.console import Console

from agent.cli.client import Client, socket_flag
from agent.cli.flags import fail, from_flag, settings, settings_flags
from agent.cli.output import output_flag, put
from agent.cli.state import chosen_state
from agent.config.settings import Settings
from agent.kernel import addresses
from agent.kernel.errors import KernelError
from agent.kernel.tables import Kernel
from agent.loop import reader
from agent.serve.api import Difference
from rules.transaction import commands


@click.command("diff")
@from_flag
@socket_flag
@settings_flags("data plane", "tables", "cluster")
@output_flag
def command(*, paths: tuple[str, ...], socket_path: str, output: str, **flags: Any) -> None:
    """Show what the agent would change in this kernel now, as nft commands.

    Asks the agent on this node what it would repair. With manifests (--from) or a cluster
    (--kubeconfig) it shows what `run` would change at its start. Exit code 0 if nothing, 1 if
    something, 2 if the objects or the kernel cannot be read.
    """
    found = _computed(paths, settings(flags)[0])
    if found is None:
        found = Client(socket_path).get("/v1/diff", Difference)
    put(found, output, lambda console: _show(found, console))
    raise SystemExit(1 if found.commands else 0)


def _show(found: Difference, console: Console) -> None:
    for line in found.commands:
        console.print(line, markup=False)


def _computed(paths: tuple[str, ...], chosen: Settings) -> Difference | None:
    """The difference to manifests or a cluster; None if the flags name neither."""
    with addresses.route_socket() as route:
        here = addresses.read(route)
    state = chosen_state(paths, chosen, addresses=here, whole=True)
    if not state:
        return None
    try:
        with Kernel(own=not chosen.no_own) as kernel:
            return Difference(tuple(commands(state.resync(reader(kernel)))))
    except KernelError as error:
        fail(error)
