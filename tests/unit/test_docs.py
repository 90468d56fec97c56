"""The commands in the documents work: see tests/console.py."""

from __future__ import annotations

import re
import subprocess

import pytest
from click.testing import CliRunner

from agent.cli.main import main
from tests.console import (
    LOOKS_LIKE_COMMANDS,
    ROOT,
    Block,
    blocks,
    commands,
    console,
    environment,
    fits,
    pages,
    sliceproxy_words,
    with_this_python,
)

ALL = [*console(where=""), *console(where="root"), *console(where="cluster")]


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_a_block_with_commands_says_where_they_work(page):
    unmarked = [
        block.name
        for block in blocks(page)
        if block.words[:1] != ("console",)
        and (block.words[:1] in (("sh",), ("bash",), ("shell",)) or not block.words)
        and LOOKS_LIKE_COMMANDS.search(block.text)
    ]
    assert not unmarked, "write ```console, ```console root or ```console cluster: tests/console.py"


@pytest.mark.parametrize("block", ALL, ids=lambda block: block.name)
def test_a_block_has_commands(block: Block) -> None:
    assert commands(block), "begin a command's line with `$ `"


@pytest.mark.parametrize(
    "block",
    [b for b in console(where="") if not re.search(r"^\$ make ", b.text, re.MULTILINE)],
    ids=lambda block: block.name,
)
def test_commands_print_what_the_document_shows(block: Block) -> None:
    every = commands(block)
    for command in every:
        run = subprocess.run(
            ["bash", "-o", "pipefail", "-c", with_this_python(command.text)],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        wanted = block.exit_code if command is every[-1] else 0
        assert run.returncode == wanted, (command.text, run.stderr)
        if command.output is not None:
            assert fits(command.output, run.stdout), (command.text, run.stdout)


@pytest.mark.parametrize("block", ALL, ids=lambda block: block.name)
def test_commands_have_flags_that_exist(block: Block) -> None:
    for command in commands(block):
        for words in sliceproxy_words(command.text):
            named = [word for word in words if not word.startswith("-")][:1]
            shown = CliRunner().invoke(main, [*named, "--help"])
            assert shown.exit_code == 0, (named, shown.output)
            for flag in (w.partition("=")[0] for w in words if w.startswith("--")):
                assert re.search(rf"{re.escape(flag)}\b", shown.output + " --help --version"), flag


@pytest.mark.parametrize("block", ALL, ids=lambda block: block.name)
def test_targets_of_make_exist(block: Block) -> None:
    targets = re.findall(r"^\$ make ([\w./-]+)", block.text, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert [t for t in targets if not re.search(rf"^{re.escape(t)}:", makefile, re.MULTILINE)] == []
