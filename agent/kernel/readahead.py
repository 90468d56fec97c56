"""Reads the tables back while Services and slices are still being listed.

After a restart the kernel already has nearly all elements, and dumping many of them is slow: for
each message of a dump the kernel walks the map from its start. A thread dumps them meanwhile.

It only reads. It does not take the tables from their owner, so an agent that still runs can
continue to write, and an agent that never receives its lists has changed nothing. From before the
first dump a `Watcher` listens to the kernel's notifications of commits. If none of them is about
our tables, what was read is still valid at the end, whoever owned them: no process, an agent that
has exited, or one that exits meanwhile. Changes of other tables do not count. After a notification
about our tables, a lost notification or any failure, what was read is discarded, and the loop
reads the tables itself.

The read-ahead ends when the loop has taken the tables over. The kernel sends the notifications of a
commit before the next commit can begin, so by then all earlier ones have arrived, and from then on
no other process can write. Tables that cannot be owned are watched further by the loop's own
`Watcher`, which starts before this one ends.

Each map is decoded as soon as it has been read. That takes the interpreter from the main thread,
which mostly waits for the network, and is a small part of the time of a large map (250,000
endpoints: 1.5 s in the kernel, 0.06 s to decode).
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import time

import structlog

from agent.kernel.errors import KernelError
from agent.kernel.reading import ReadBack, TableReader
from agent.kernel.socket import NetlinkSocket
from agent.kernel.watcher import Watcher
from agent.worker import Worker
from rules.tables import FAMILIES

Log = structlog.typing.FilteringBoundLogger


class ReadAhead(Worker):
    """Reads both tables in a thread, for `take` to hand out if they have not changed since.

    `port` is the netlink port of the agent's own connection, whose changes do not count.
    """

    def __init__(self, port: int, log: Log) -> None:
        super().__init__("reading ahead", lambda _, error: self._give_up(error))
        self._log = log
        self._stale = threading.Event()
        self._tables: dict[int, ReadBack] = {}
        self._seconds = 0.0
        self._ended = False
        self._found = False
        self._watcher = Watcher(port, self._changed, lambda _, error: self._give_up(error))

    def start(self) -> None:
        """Begins to watch, then to read."""
        self._watcher.start()
        super().start()

    def work(self) -> None:
        """Reads both tables, or as much as it may."""
        started = time.perf_counter()
        try:
            with TableReader(lambda: BatchedSocket(self._stale)) as kernel:
                for family in FAMILIES:
                    if table := kernel.read_back(family, watched=True):
                        self._tables[family] = table
            self._found = bool(self._tables)
        finally:
            self._seconds = time.perf_counter() - started

    def _give_up(self, error: Exception) -> None:
        """The loop reads again, and reports what is still wrong then."""
        if not self._stale.is_set():
            self._log.debug("read_ahead_failed", error=repr(error))
        self._changed()

    def _changed(self) -> None:
        self._stale.set()
        self._tables = {}

    @property
    def unchanged(self) -> bool:
        """Whether both tables have been read, there were any, and no other process has changed
        them since."""
        return self._found and not self._stale.is_set()

    def take(self, family: int) -> ReadBack | None:
        """What was read of a family, if that is still true, once. Where tables can be owned, they
        have to be ours by now.

        It waits for the thread: what it has begun to read is complete sooner than a new read.
        """
        self._end()
        return self._tables.pop(family, None)

    def stop(self, seconds: float | None = None) -> bool:
        """Ends it, instead of `take`."""
        self._stale.set()
        self._end()
        return super().stop(seconds)

    def _end(self) -> None:
        if self._ended:
            return
        self._ended = True
        super().stop()
        self._watcher.stop()
        if self._stale.is_set():
            self._tables = {}
        self._log.debug("read_ahead", used=bool(self._tables), ms=round(self._seconds * 1e3, 2))


def read_ahead(kernel: TableReader, log: Log) -> ReadAhead | None:
    """Begins to read ahead, if there is anything to read."""
    try:
        if not any(kernel.info(family) for family in FAMILIES):
            return None
        ahead = ReadAhead(kernel.port, log)
    except (KernelError, OSError) as error:  # the loop will meet it, too
        log.debug("read_ahead_failed", error=str(error))
        return None
    ahead.start()
    return ahead


# --- a socket that needs the interpreter rarely -------------------------------------------------

_MESSAGES, _SIZE = 64, 1 << 15  # a message of a dump has up to 32 KiB, whatever the buffer
_MSG_WAITFORONE, _MSG_TRUNC = 0x10000, 0x20
_libc = ctypes.CDLL(None, use_errno=True)


class _Buffer(ctypes.Structure):
    """A struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Header(ctypes.Structure):
    """A struct msghdr."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("buffer_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Message(ctypes.Structure):
    """A struct mmsghdr."""

    _fields_ = (("header", _Header), ("length", ctypes.c_uint))


class BatchedSocket(NetlinkSocket):
    """A netlink socket for dumps, which reads many datagrams at a time, until `stale`.

    A thread that calls recv() for each message has to get the interpreter back from a busy main
    thread each time, for which it waits 5 ms (sys.getswitchinterval): more than the kernel takes.
    recvmmsg() stays in the kernel for the next 64.
    """

    def __init__(self, stale: threading.Event) -> None:
        super().__init__()
        self._stale = stale
        self._memory = (ctypes.c_char * _SIZE * _MESSAGES)()
        self._messages = (_Message * _MESSAGES)()
        for memory, message in zip(self._memory, self._messages, strict=True):
            buffer = _Buffer(ctypes.addressof(memory), _SIZE)
            message.header.buffers = ctypes.pointer(buffer)
            message.header.buffer_count = 1

    def receive_some(self) -> list[bytes]:
        """Up to 64 datagrams; waits for the first."""
        if self._stale.is_set():
            raise OSError(errno.EINTR, "cut short")
        count = _libc.recvmmsg(self.fileno(), self._messages, _MESSAGES, _MSG_WAITFORONE, None)
        if count < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        if any(m.header.flags & _MSG_TRUNC for m in self._messages[:count]):
            raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
        return [
            ctypes.string_at(memory, message.length)
            for memory, message in zip(self._memory, self._messages[:count], strict=False)
        ]
