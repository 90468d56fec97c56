"""The commands in the documents work: see tests/console.py."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from agent.cli.main import main
from tests.console import (
    FENCE,
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

VERBS = {
    "annotate",
    "apply",
    "delete",
    "exec",
    "get",
    "label",
    "logs",
    "patch",
    "rollout",
    "wait",
    "port-forward",
}
ALL = [b for place in ("", "root", "machine", "cluster") for b in console(where=place)]


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_a_block_with_commands_says_where_they_work(page):
    unmarked = [
        block.name
        for block in blocks(page)
        if block.words[:1] != ("console",)
        and (block.words[:1] in (("sh",), ("bash",), ("shell",)) or not block.words)
        and LOOKS_LIKE_COMMANDS.search(block.text)
    ]
    assert not unmarked, "begin it with ```console and the place: tests/console.py"


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


def flags_exist(text: str) -> None:
    """Every call of `sliceproxy` in a text names a command and flags that it has."""
    for words in sliceproxy_words(text):
        named = [word for word in words if not word.startswith("-")][:1]
        shown = CliRunner().invoke(main, [*named, "--help"])
        assert shown.exit_code == 0, (named, shown.output)
        for flag in (w.partition("=")[0] for w in words if w.startswith("--")):
            assert re.search(rf"{re.escape(flag)}\b", shown.output + " --help --version"), flag


@pytest.mark.parametrize("block", ALL, ids=lambda block: block.name)
def test_commands_have_flags_that_exist(block: Block) -> None:
    for command in commands(block):
        flags_exist(command.text)


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_sentences_and_tables_have_flags_that_exist(page: Path) -> None:
    for inline in re.findall(r"`([^`]*)`", FENCE.sub("", page.read_text())):
        flags_exist(inline)


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_the_image_has_no_other_program_to_run(page: Path) -> None:
    executed = re.findall(r"\bexec [\w/${}#. -]+ -- (\S+)", page.read_text())
    assert set(executed) <= {"sliceproxy"}


@pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl")
@pytest.mark.parametrize("block", console(where="cluster"), ids=lambda block: block.name)
def test_commands_have_flags_that_kubectl_has(block: Block) -> None:
    joined = re.sub(r"\\\n\s*", " ", block.text)
    for call in re.findall(r"\bkubectl ([^|;&)\n#]*)", joined):
        words = call.split(" -- ")[0].split()
        if words[:1] == ["sliceproxy"]:
            continue  # the plugin: test_kubectl_plugin.py
        verb = next(w for w in words if w in VERBS)
        asked = ["kubectl", verb, "--help"]
        shown = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
        for flag in (w.partition("=")[0] for w in words if w.startswith("-")):
            assert re.search(rf"(?<![\w-]){flag}\b", shown + " -n --namespace"), (verb, flag)


@pytest.mark.parametrize("block", ALL, ids=lambda block: block.name)
def test_targets_of_make_exist(block: Block) -> None:
    targets = re.findall(r"^\$ make ([\w./-]+)", block.text, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert [t for t in targets if not re.search(rf"^{re.escape(t)}:", makefile, re.MULTILINE)] == []


@pytest.mark.parametrize("block", console(where="cluster"), ids=lambda block: block.name)
def test_files_that_commands_name_exist(block: Block) -> None:
    named = re.findall(r"(?<![\w/])(?:deploy|docs|examples|tools)/[\w./-]*", block.text)
    assert [name for name in named if not (ROOT / name).exists()] == []
