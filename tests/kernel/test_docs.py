"""The commands in the documents that need root work in a network namespace: tests/console.py."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator

import pytest

from lab.world import World
from tests.console import (
    ROOT,
    Block,
    commands,
    console,
    environment,
    fits,
    with_this_python,
)

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make namespaces"),
    pytest.mark.skipif(not shutil.which("nft"), reason="needs the nft program"),
]


@pytest.fixture
def world() -> Iterator[World]:
    with World(pods=0, remotes=0, prefix="sliceproxy-docs") as built:
        yield built


def run(world: World, command: str) -> tuple[int, str, str]:
    """The exit code and the output of a command on the node.

    An agent is ended as an operator ends it, after its first transaction.
    """
    process = world.popen(
        "node",
        ["bash", "-o", "pipefail", "-c", f"exec {with_this_python(command)}"],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if command.startswith("sliceproxy run"):
        for line in process.stderr:
            if '"programmed"' in line or '"verified"' in line:
                process.send_signal(signal.SIGTERM)
                break
    out, err = process.communicate()
    return process.returncode, out, err


@pytest.mark.parametrize("block", console(where="root"), ids=lambda block: block.name)
def test_commands_work_as_root(world: World, block: Block) -> None:
    every = commands(block)
    for command in every:
        code, out, err = run(world, command.text)
        assert code == (block.exit_code if command is every[-1] else 0), (command.text, err)
        assert command.output is None or fits(command.output, out), (command.text, out)
