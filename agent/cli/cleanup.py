"""`sliceproxy cleanup`: removes sliceproxy's tables, or kube-proxy's rules."""

from __future__ import annotations

import click

from agent.cli.flags import FAILURE, fail
from agent.kernel import kube_proxy
from agent.kernel.errors import KernelError
from agent.kernel.tables import Kernel


@click.command("cleanup")
@click.option(
    "--kube-proxy",
    "of_kube_proxy",
    is_flag=True,
    help="Remove kube-proxy's rules instead of sliceproxy's tables.",
)
def command(of_kube_proxy: bool) -> None:
    """Remove sliceproxy's tables from this kernel, or the rules that kube-proxy left in it.

    Do this only while the other proxy runs: without any proxy, established connections break.
    """
    try:
        with Kernel(own=False) as kernel:
            if of_kube_proxy:
                _kube_proxy(kernel)
            else:
                click.echo("tables removed" if kernel.remove() else "no tables found")
    except KernelError as error:
        fail(error)


def _kube_proxy(kernel: Kernel) -> None:
    removal = kube_proxy.remove(kernel)
    for line in removal.removed:
        click.echo(f"removed: {line}")
    for line in removal.left:
        click.echo(f"left: {line}", err=True)
    if not removal.removed and not removal.left:
        click.echo("no kube-proxy rules found")
    if removal.left:
        raise SystemExit(FAILURE)
