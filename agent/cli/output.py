"""What commands print: tables for people, or the same records for programs, as kubectl does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

import click
import msgspec
import yaml
from rich.console import Console

FORMATS = ("text", "wide", "json", "yaml", "name")
WIDTH = 10_000
"""Columns where the output is no terminal: nothing is wrapped for a program or a pipe."""

output_flag = click.option(
    "-o",
    "--output",
    type=click.Choice(FORMATS),
    default="text",
    show_default=True,
    help="How to print it; json and yaml have all fields.",
)


def console() -> Console:
    """A console that does not wrap when it is piped."""
    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)


def put(
    record: object,
    output: str,
    show: Callable[[Console], None],
    names: Iterable[str] = (),
) -> None:
    """Prints a record in the format that was asked for; `show` prints it for people."""
    match output:
        case "json":
            click.echo(msgspec.json.encode(record).decode())
        case "yaml":
            click.echo(yaml.safe_dump(msgspec.to_builtins(record), sort_keys=False), nl=False)
        case "name":
            for name in names:
                click.echo(name)
        case _:
            show(console())


def service_name(text: str, namespace: str = "") -> str:
    """NAMESPACE/NAME from what people write: default/web, svc/web, service/web, web."""
    head, slash, rest = text.partition("/")
    if slash and head.lower() in ("svc", "service", "services") and rest:
        text = rest
    return text if "/" in text else f"{namespace or 'default'}/{text}"
