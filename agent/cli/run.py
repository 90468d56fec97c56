"""`sliceproxy run`: the agent."""

from __future__ import annotations

from typing import Any

import click

from agent.cli.flags import fail, from_flag, settings, settings_flags
from agent.kernel.errors import KernelError
from agent.run import CannotRun, run


@click.command("run")
@from_flag
@settings_flags("data plane", "tables", "cluster", "agent", "conntrack")
def command(*, paths: tuple[str, ...], **flags: Any) -> None:
    """Run the agent: keep this kernel's tables as the API server or the manifests say.

    Without --from it follows the API server; with it, the files. SIGTERM ends the agent and leaves
    the tables in place: connections and Services keep working. `sliceproxy cleanup` removes them.
    """
    chosen, file = settings(flags)
    try:
        run(paths, chosen, file)
    except (CannotRun, KernelError) as error:
        fail(error)
