"""Empty network namespaces, and the nft programs to look into them with."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from agent.kernel.socket import NETLINK_ADD_MEMBERSHIP, NETLINK_NETFILTER, SOL_NETLINK

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


def notifications(group: int) -> socket.socket:
    """A socket that receives a group of netfilter's notifications (NFNLGRP_*) in this network
    namespace, and does not block."""
    listener = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
    listener.bind((0, 0))
    listener.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
    listener.setblocking(False)
    return listener


def nft_programs() -> dict[str, list[str]]:
    """The nft programs, by version: this machine's, and that of the Debian 13 tree if it exists."""
    commands = [["nft"]] if shutil.which("nft") else []
    if (TRIXIE / "usr/sbin/nft").exists():
        commands.append(["chroot", str(TRIXIE), "nft"])
    return {nft_version(command): command for command in commands}


def nft_version(command: list[str]) -> str:
    """The version of an nft program, like 1.0.6."""
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    return done.stdout.split()[1].removeprefix("v")


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
