"""Network namespaces: made, entered, named and removed by threads of this process."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TypeVar

from pyroute2 import netns

from lab.hosts import WorldError

_T = TypeVar("_T")
_CLONE_NEWNET = 0x40000000
_LONGEST_STEP = 30.0
"""Seconds that an interrupt waits for building or taking down."""
_SYSCTLS = {
    "ipv4/conf/{}/rp_filter": "0",
    "ipv4/conf/{}/send_redirects": "0",
    "ipv4/conf/{}/accept_redirects": "0",
    "ipv6/conf/{}/disable_ipv6": "0",
    "ipv6/conf/{}/accept_dad": "0",
    "ipv6/conf/{}/accept_ra": "0",
    # IPv6 has no setting against sending redirects, which would lead a client past the node.
    "ipv6/conf/{}/accept_redirects": "0",
}
# The kernel sends about one ICMP error a second to each address.  Without these settings the
# second refused datagram looks silent.
_ICMP_SYSCTLS = {
    "ipv4/icmp_ratemask": "0",
    "ipv6/icmp/ratelimit": "0",
    "ipv6/icmp/ratemask": "",
}
# Switching forwarding on resets other settings of the same namespace, so it is written first.
_FORWARDING_SYSCTLS = {"ipv4/ip_forward": "1", "ipv6/conf/all/forwarding": "1"}
_libc = ctypes.CDLL(None, use_errno=True)


def in_fresh_thread(function: Callable[[], _T], to_the_end: bool = False) -> _T:
    """Call a function in a thread of its own, which may change its namespace and then ends.

    Ctrl-C interrupts the caller alone, never the function.

    to_the_end: let an interrupt wait until the function is done.  Building and taking down use
        it: what is half made or half removed when cleaning up begins would be left behind.
    """
    outcome: Future[_T] = Future()

    def body() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=body, daemon=True)
    try:
        thread.start()
        wait([outcome])
    except BaseException:
        # Not Thread.join: in Python 3.11 a join that was interrupted once does not wait again.
        # Bounded, because a thread that could not be started never has an outcome.
        wait([outcome], timeout=_LONGEST_STEP if to_the_end else 0)
        raise
    thread.join()
    return outcome.result()


def enter_namespace(descriptor: int) -> None:
    """Move the calling thread, and no other, into a network namespace."""
    if _libc.setns(descriptor, _CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot enter a network namespace: {os.strerror(code)}")


def unshare_network() -> None:
    """Move the calling thread, and no other, into a new network namespace."""
    if _libc.unshare(_CLONE_NEWNET) == 0:
        return
    code = ctypes.get_errno()
    if code == errno.EPERM:
        raise PermissionError(
            code, "needs root (CAP_SYS_ADMIN and CAP_NET_ADMIN) to make network namespaces"
        )
    if code == errno.EINVAL:
        raise WorldError("this kernel has no network namespaces: it needs CONFIG_NET_NS")
    if code == errno.ENOSPC:
        raise WorldError(
            "the kernel allows no more network namespaces: raise sysctl user.max_net_namespaces"
        )
    raise OSError(code, f"cannot make a network namespace: {os.strerror(code)}")


def name_namespace(name: str) -> None:
    """Keep the calling thread's namespace under a name, where pyroute2 and `ip netns` find it."""
    # The thread's id is the process id here: /proc/<id>/ns/net of another thread of this process
    # is another namespace.
    with _namespace_directory_lock():
        try:
            netns.attach(name, threading.get_native_id(), libc=_libc)
        except OSError as error:
            raise WorldError(
                f"cannot keep a network namespace as {namespace_path(name)}: {error.strerror}."
                " It needs the right to mount: a container must be privileged"
            ) from error


@contextlib.contextmanager
def _namespace_directory_lock() -> Iterator[None]:
    """The lock that `ip netns add` takes too, while it makes the directory a shared mount."""
    Path(netns.NETNS_RUN_DIR).mkdir(exist_ok=True)
    directory = os.open(netns.NETNS_RUN_DIR, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def namespace_path(name: str) -> str:
    """The file that keeps a namespace alive."""
    return f"{netns.NETNS_RUN_DIR}/{name}"


def remove_stale_worlds(prefix: str) -> None:
    """Remove the worlds of processes that are gone."""
    named = re.compile(rf"{re.escape(prefix)}-(\d+)-\d+-")
    owners = {match[1] for name in netns.listnetns() if (match := named.match(name))}
    for owner in owners:
        if not Path(f"/proc/{owner}").exists():
            remove_namespaces(re.compile(rf"{re.escape(prefix)}-{owner}-\d+-"))


def remove_namespaces(beginning: re.Pattern[str]) -> None:
    """Removes the namespaces whose names match."""
    for name in netns.listnetns():
        if beginning.match(name):
            # Another process may remove the same stale world.
            with contextlib.suppress(FileNotFoundError):
                netns.remove(name, libc=_libc)


def write_sysctls(forwarding: bool) -> None:
    """Set the network settings of the calling thread's namespace, before it has interfaces."""
    settings = dict(_FORWARDING_SYSCTLS) if forwarding else {}
    for which in ("all", "default"):
        settings |= {path.format(which): value for path, value in _SYSCTLS.items()}
    settings |= _ICMP_SYSCTLS
    for path, value in settings.items():
        _write_sysctl(path, value)


def _write_sysctl(path: str, value: str) -> None:
    try:
        # /proc/sys/net shows the namespace of the thread that opens the file.
        with open(f"/proc/sys/net/{path}", "w", encoding="ascii") as file:
            file.write(f"{value}\n")
    except FileNotFoundError:
        need = "IPv6 (CONFIG_IPV6, no ipv6.disable=1)" if path.startswith("ipv6") else "IPv4"
        raise WorldError(f"/proc/sys/net/{path} is missing: the kernel needs {need}") from None
    except OSError as error:
        raise WorldError(
            f"cannot write /proc/sys/net/{path}: {error.strerror}. /proc/sys must be writable:"
            " a container must be privileged"
        ) from error
