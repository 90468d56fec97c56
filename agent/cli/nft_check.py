"""Has libnftables parse and load a ruleset, in a process and a network namespace of its own.

libnftables aborts the process on some input (1.0.6 on IPv6 affinity maps: an assertion), so it is
called in a child, `python -m agent.cli.nft_check`. The child enters a new network namespace, with
root's rights or within a user namespace of its own, so the ruleset can be loaded for real: what the
kernel would refuse is found as well, and the namespace ends with the process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000


class CheckFailed(Exception):
    """libnftables did not accept the ruleset, or could not be asked."""


def check(ruleset: str) -> None:
    """Returns if libnftables parses the ruleset and the kernel takes it; else raises
    CheckFailed with its words."""
    done = subprocess.run(
        [sys.executable, "-m", "agent.cli.nft_check"],
        input=ruleset,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise CheckFailed(
            f"libnftables died of {name} while parsing"
            " (1.0.6 does so on IPv6 session affinity maps): use libnftables 1.0.7 or later"
        )
    if done.returncode:
        raise CheckFailed(done.stderr.strip() or "libnftables refused the ruleset")


def _enter_namespace() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _CLONE_NEWNET if os.geteuid() == 0 else _CLONE_NEWUSER | _CLONE_NEWNET
    if libc.unshare(flags):
        reason = os.strerror(ctypes.get_errno())
        raise SystemExit(f"no network namespace to check in: {reason}; run it as root")


def _main() -> None:
    _enter_namespace()  # first: libnftables opens its socket as soon as it is made
    try:
        import nftables

        library = nftables.Nftables()
    except (ImportError, OSError) as error:
        raise SystemExit(f"libnftables is missing ({error}); install libnftables1") from None
    failed, _, errors = library.cmd(sys.stdin.read())
    if failed:
        raise SystemExit(errors.strip())


if __name__ == "__main__":
    _main()
