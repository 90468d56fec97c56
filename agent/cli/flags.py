"""Flags: made from the declarations of agent.config.settings, and those of the command line alone.

A command takes the flags of the groups that concern it with `@settings_flags(...)`; its function
gets them as keyword arguments and passes them to `settings`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

import click
from click.core import ParameterSource

from agent.config.checks import ConfigError
from agent.config.durations import Duration
from agent.config.file import ConfigFile, merged, read
from agent.config.settings import OPTIONS, Declaration, Group, Settings

F = TypeVar("F", bound=Callable[..., Any])

FAILURE = 2
"""The exit code of a command that could not do its work."""

_CONFIG = click.option(
    "--config",
    metavar="FILE",
    help="kube-proxy's configuration file or sliceproxy's own; flags override it. See"
    " docs/configuration.md.",
)
_FROM_HELP = "A file or directory of manifests (YAML or JSON), or - for standard input. Repeatable."

from_flag = click.option("--from", "paths", multiple=True, metavar="PATH", help=_FROM_HELP)


def fail(message: object) -> NoReturn:
    """Ends the command with one line on standard error and exit code FAILURE."""
    click.echo(f"sliceproxy: {message}", err=True)
    raise SystemExit(FAILURE)


def settings_flags(*groups: Group) -> Callable[[F], F]:
    """A decorator that gives a command `--config` and the flags of these groups of options."""

    def decorate(command: F) -> F:
        for declared in reversed(OPTIONS.values()):
            if declared.option.group in groups:
                command = _flag(declared)(command)
        return _CONFIG(command)

    return decorate


def settings(flags: Mapping[str, Any]) -> tuple[Settings, ConfigFile | None]:
    """The settings that the flags and the file named by `--config` choose, and that file.

    Ends the command if they cannot be used.
    """
    source = click.get_current_context().get_parameter_source
    given = {n: v for n, v in flags.items() if source(n) is not ParameterSource.DEFAULT}
    path = given.pop("config", None)
    try:
        file = read(path) if path else None
        return merged(file, given), file
    except ConfigError as error:
        fail(error)


def _flag(declared: Declaration) -> Callable[[F], F]:
    option, name = declared.option, declared.name.replace("_", "-")
    text = option.help.replace("`", "")
    if declared.type is bool:
        # `--no-own` is the name of an option, not the negation of one
        form = f"--{name}" if name.startswith("no-") else f"--{name}/--no-{name}"
        return click.option(form, is_flag=True, default=declared.default, help=text)
    default = declared.default_text.replace("`", "")
    return click.option(
        f"--{name}",
        type=_type(declared),
        multiple=declared.type is tuple,
        default=None if declared.type is tuple else declared.default,
        metavar=option.metavar or ("DURATION" if declared.type is Duration else None),
        help=f"{text} [default: {default}]" if default else text,
    )


def _type(declared: Declaration) -> Any:
    if declared.option.choices:
        return click.Choice(declared.option.choices, case_sensitive=False)
    if declared.type is int:
        low, high = declared.bounds
        return click.IntRange(low, high)
    return click.STRING
