"""Empty network namespaces, and the nft programs to look into them with."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

TRIXIE = Path(__file__).parents[2] / "build" / "trixie"
_CLONE_NEWNET = 0x40000000


def in_empty_namespace(function: Callable[[], T]) -> T:
    """Calls `function` in a thread of its own that has a new network namespace; so have the
    processes that it starts."""

    def work() -> T:
        if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare")
        return function()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def nft_programs() -> dict[str, list[str]]:
    """The nft programs there are, by version: the machine's, and that of a Debian 13 tree."""
    found = {}
    for command in ([shutil.which("nft") or ""], ["chroot", str(TRIXIE), "nft"]):
        if command[0] and (command[0] != "chroot" or (TRIXIE / "usr/sbin/nft").exists()):
            version = subprocess.run(
                [*command, "--version"], capture_output=True, text=True, check=True
            ).stdout.split()[1]
            found[version.removeprefix("v")] = command
    return found


def list_ruleset(command: list[str]) -> str:
    """What `nft list ruleset` prints here. Fails if it does not end well."""
    done = subprocess.run(
        [*command, "list", "ruleset"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (command, done.returncode, done.stderr[-500:])
    return done.stdout


def normal(listing: str) -> list[str]:
    """A listing without the order of elements, which is that of a hash table."""
    lines: list[str] = []
    elements: list[str] = []
    for line in listing.splitlines():
        text = line.strip()
        if text.startswith("elements = {") or elements:
            elements.append(text.removeprefix("elements = {").removesuffix("}").strip(" ,"))
            if text.endswith("}"):
                # nft prints several elements on a line where they are short
                lines += sorted(e for part in elements for e in part.split(", "))
                elements = []
        else:
            lines.append(text)
    return lines


def is_root() -> bool:
    return os.geteuid() == 0
