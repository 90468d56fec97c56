"""`sliceproxy`: the group of its commands, each in a module of its own.

A command's module is imported when the command runs, so that the agent does not load what only
others need. Exit codes of all commands:

- 0: success; `diff` found no difference
- 1: `diff` found differences; `doctor` a warning or a failure; `status` is not ready or has an open
  problem; `explain` that a client is refused or dropped, or that no Service has the address
- 3: no agent answers on this node
- 2: the command could not do its work, or not all of it; one line on standard error says why
"""

from __future__ import annotations

import difflib
from importlib import import_module

import click

from agent import __version__
from agent.imports import lightly

COMMANDS = (
    *("run", "init", "cleanup"),
    *("status", "services", "endpoints", "explain", "history"),
    *("top", "flows", "trace", "doctor"),
    *("render", "diff", "demo"),
)


class _Commands(click.Group):
    """Finds the command NAME as `command` in the module agent.cli.NAME."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"agent.cli.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] == "run":  # on every node, for long; the other commands need not be light
            lightly("agent.cli.run")
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = difflib.get_close_matches(args[0], COMMANDS)
            if not near:
                raise
            text = f"{error.message} Did you mean {' or '.join(near)}?"
            raise click.UsageError(text, ctx) from None


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 success, 1 something was found (see each command), 2 failure, 3 no agent"
    " answers.",
)
@click.version_option(__version__)
def main() -> None:
    """A Kubernetes service proxy with a constant number of nftables rules.

    Every node runs `sliceproxy run`. The other commands show what it does, would do, and why.
    """


if __name__ == "__main__":
    main()
