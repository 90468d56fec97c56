"""The commands in the documents: each fenced block of README.md, CONTRIBUTING.md and docs/.

The words behind the fence say where its commands work:

    ```console            in a checkout: tests/unit/test_docs.py runs them
    ```console root       as root: tests/kernel/test_docs.py runs them in a network namespace
    ```console machine    as root on a bare Debian, which they change: tools/follow-readme runs
                          all of README.md
    ```console cluster    in a cluster: not run, but the flags of `sliceproxy` and kubectl, the
                          targets of `make` and the files that are named are checked

A line that begins with `$ ` is a command; a backslash at its end continues it. The lines after it
are its output, which must be equal; a line `...` matches any lines. Without output only success
is asked for. `exit=1` behind the fence: the last command ends so.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^( *)```(.*)\n((?:.*\n)*?)\1```$", re.MULTILINE)
LOOKS_LIKE_COMMANDS = re.compile(
    r"^(\$ |sudo |kubectl |make |sliceproxy |nft |docker |helm )", re.MULTILINE
)


class Block(NamedTuple):
    """A fenced block with commands."""

    page: Path
    line: int
    words: tuple[str, ...]
    text: str

    @property
    def name(self) -> str:
        """For a test's name and its message."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def exit_code(self) -> int:
        """How its last command ends."""
        return next((int(w.partition("=")[2]) for w in self.words if w.startswith("exit=")), 0)


class Command(NamedTuple):
    """One command, and the output that the document shows; None if it shows none."""

    text: str
    output: str | None


def pages() -> list[Path]:
    """The documents."""
    return sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


def blocks(page: Path) -> Iterator[Block]:
    """All fenced blocks of a document."""
    text = page.read_text()
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        # inside a list everything is indented
        text_inside = re.sub(rf"^{match[1]}", "", match[3], flags=re.MULTILINE)
        yield Block(page, line, tuple(match[2].split()), text_inside)


def console(*, where: str) -> list[Block]:
    """The blocks whose commands work there: "", "root", "machine" or "cluster"."""
    found = [b for page in pages() for b in blocks(page) if b.words[:1] == ("console",)]
    places = {"root", "machine", "cluster"}
    return [b for b in found if ({where} if where else set()) == places & set(b.words)]


def commands(block: Block) -> list[Command]:
    """The commands of a block, in their order."""
    found: list[Command] = []
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        match = re.match(r"((?:[^\n]*\\\n)*[^\n]*)\n((?:.*\n)*)", part)
        assert match
        found.append(Command(match[1], match[2] or None))
    return found


def fits(shown: str, printed: str) -> bool:
    """Whether the printed text is the shown one; blanks at the ends of lines do not count."""
    lines = [line.rstrip() for line in shown.rstrip().splitlines()]
    pattern = "".join(r"(?:.*\n)*?" if line == "..." else re.escape(line) + r"\n" for line in lines)
    text = "".join(f"{line.rstrip()}\n" for line in printed.rstrip().splitlines())
    return re.fullmatch(pattern, text) is not None


def environment() -> dict[str, str]:
    """Where `sliceproxy` is found, and output is as wide as the documents are."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    plain = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    return {k: v for k, v in os.environ.items() if k != "FORCE_COLOR"} | {"PATH": path} | plain


def with_this_python(command: str) -> str:
    """The command, with the interpreter's `sliceproxy` in place of that of `.venv`."""
    return command.replace(".venv/bin/sliceproxy", "sliceproxy")


def sliceproxy_words(text: str) -> Iterator[Sequence[str]]:
    """The words of each call of `sliceproxy` in a command, without comments and pipes."""
    joined = re.sub(r"\\\n\s*", " ", text)
    for line in joined.splitlines():
        for part in re.split(r"[|;&]|\s#", line):
            words = part.split()
            for index, word in enumerate(words):
                first = index == 0 or words[index - 1] in ("--", "sudo")
                if word.endswith("bin/sliceproxy") or (word == "sliceproxy" and first):
                    yield words[index + 1 :]
                    break
