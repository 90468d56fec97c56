"""`sliceproxy demo`: the demonstration, which lives in `lab` beside the product."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from agent.cli.flags import fail

_CHECKOUT = Path(__file__).resolve().parents[2]


@click.command("demo")
@click.option("--plain", is_flag=True, help="No colours, and no pauses for a reader.")
def command(plain: bool) -> None:
    """Build a small cluster out of network namespaces and balance real connections in it.

    Needs root and a checkout of sliceproxy's repository. Makes namespaces of its own, changes
    nothing else, and removes them again.
    """
    if not (_CHECKOUT / "lab" / "demo.py").is_file():
        fail(
            "the demo is not part of the installed package: run `make demo` in a checkout of"
            " sliceproxy's repository"
        )
    if str(_CHECKOUT) not in sys.path:
        sys.path.append(str(_CHECKOUT))
    from lab.demo import DemoError, run

    try:
        run(plain=plain)
    except DemoError as error:
        fail(error)
