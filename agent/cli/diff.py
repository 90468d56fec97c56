"""`sliceproxy diff`: the changes that `run` would make to this kernel."""

from __future__ import annotations

from typing import Any

import click
from pyroute2 import IPRoute

from agent.cli.flags import fail, required_from_flag, settings, settings_flags
from agent.cli.output import output_flag, put
from agent.cli.state import from_manifests
from agent.kernel import addresses
from agent.kernel.errors import KernelError
from agent.kernel.tables import Kernel
from agent.loop import reader
from rules.transaction import commands


@click.command("diff")
@required_from_flag
@settings_flags("data plane", "tables")
@output_flag
def command(paths: tuple[str, ...], output: str, **flags: Any) -> None:
    """Show what `run` would change in this kernel now, as nft commands.

    Exit code 0 if nothing, 1 if something, 2 if the manifests or the kernel cannot be read.
    """
    chosen = settings(flags)[0]
    with IPRoute() as route:
        here = addresses.read(route)
    state = from_manifests(paths, chosen, addresses=here, whole=True)
    try:
        with Kernel(own=not chosen.no_own) as kernel:
            transaction = state.resync(reader(kernel))
    except KernelError as error:
        fail(error)
    lines = list(commands(transaction))
    put({"commands": lines}, output, lambda console: console.print("\n".join(lines), markup=False))
    raise SystemExit(1 if transaction else 0)
