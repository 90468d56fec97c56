"""What the kernel can refuse, and what the operator can do about it. One line each."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from rules.netlink.attributes import Malformed


class KernelError(Exception):
    """The kernel refused a request. `errno` is its reason, `subject` what the request was about."""

    def __init__(self, code: int, subject: str, detail: str = "") -> None:
        words = f"{subject}: {detail or os.strerror(code)} ({errno.errorcode.get(code, code)})"
        super().__init__(f"{words}. {self.advice(code)}".rstrip())
        self.errno = code
        self.subject = subject

    @staticmethod
    def advice(code: int) -> str:
        """What the operator can do, in a sentence."""
        return _SHORTAGES.get(code, "")


class NotPermitted(KernelError):
    """The process has no CAP_NET_ADMIN in this network namespace."""

    @staticmethod
    def advice(_code: int) -> str:
        """What the operator can do."""
        return "Run it as root or with CAP_NET_ADMIN."


class OwnedByOther(KernelError):
    """The tables belong to another process that is alive."""

    @staticmethod
    def advice(_code: int) -> str:
        """What the operator can do."""
        return "Another sliceproxy is running on this node; stop it first."


class Stale(KernelError):
    """The tables differ from what we believed; read them back and compare."""


class Full(Stale):
    """A set has as many elements as it was made for (`Set.room`); recreate the table."""


class Refused(KernelError):
    """The kernel cannot do this, or not now (no memory, a missing module)."""

    @staticmethod
    def advice(code: int) -> str:
        """What the operator can do."""
        if code in (errno.EOPNOTSUPP, errno.ENOENT, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT):
            return (
                "The kernel needs nf_tables with nat, fib, masq and reject (Linux 5.13 or later)."
            )
        return _SHORTAGES.get(code, "")


class ConntrackError(KernelError):
    """Conntrack cannot be read or changed."""

    @staticmethod
    def advice(code: int) -> str:
        """What the operator can do."""
        return _CONNTRACK.get(code) or _SHORTAGES.get(code, "")


_DESCRIPTORS = "Raise the limit of open files (LimitNOFILE, ulimit -n)."
_MEMORY = "The node or the agent's cgroup has too little memory."
_SHORTAGES = {
    errno.EMFILE: _DESCRIPTORS,
    errno.ENFILE: "Raise fs.file-max.",
    errno.ENOMEM: _MEMORY,
    errno.ENOBUFS: _MEMORY,
}
_MODULE = "Load the kernel module nf_conntrack_netlink."
_CONNTRACK = {
    errno.EPERM: "Run it as root or with CAP_NET_ADMIN.",
    errno.EINVAL: _MODULE,  # nfnetlink's answer for a subsystem that no module has registered
    errno.EOPNOTSUPP: _MODULE,
    errno.EPROTONOSUPPORT: "The kernel needs nfnetlink and nf_conntrack_netlink.",
}


@contextmanager
def raised_as(kind: type[KernelError], subject: str) -> Iterator[None]:
    """Raises OSError and Malformed (as EBADMSG) as an error of this kind."""
    try:
        yield
    except Malformed as error:
        raise kind(errno.EBADMSG, subject, str(error)) from None
    except OSError as error:
        raise kind(error.errno or errno.EIO, subject, error.strerror or "") from None


_STALE = {errno.ENOENT, errno.EEXIST, errno.EBUSY, errno.ERESTART, errno.ENOTEMPTY}


def nf_tables_error(code: int, subject: str, detail: str = "") -> KernelError:
    """The error for an errno of nf_tables."""
    if code == errno.EPERM:
        kind: type[KernelError] = OwnedByOther if _may_administer() else NotPermitted
    elif code == errno.ENFILE:
        kind = Full
    elif code in _STALE:
        kind = Stale
    else:
        kind = Refused
    return kind(code, subject, detail)


def _may_administer() -> bool:
    """Whether this process has CAP_NET_ADMIN."""
    with open("/proc/self/status", encoding="ascii") as status:
        line = next(line for line in status if line.startswith("CapEff"))
    return bool(int(line.split()[1], 16) >> 12 & 1)
