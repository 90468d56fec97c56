"""The one kind of thread that the agent has.

A worker has a name, runs `work` once, and ends when `work` returns. It can be asked to stop, which
wakes it wherever it waits with `pause` or polls `wake_fd`. If `work` raises, `failed` is called in
the worker's own thread with the worker's name and the error: the loop gets it as a message, and the
agent ends with one log line. So no thread dies unnoticed.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from contextlib import suppress

Failed = Callable[[str, Exception], None]
"""Called with the name of a worker that cannot go on, and why. May be called from any thread."""


class Worker:
    """See the module. Subclasses implement `work`, and close what they opened when it ends."""

    def __init__(self, name: str, failed: Failed) -> None:
        self.name = name
        self._failed = failed
        self._stopping = threading.Event()
        self.wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """Readable once the worker is to stop; for select and poll."""
        self._closing = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def work(self) -> None:
        """What the thread does. Returns soon after `stopping` has become true."""
        raise NotImplementedError

    def start(self) -> None:
        """Starts the thread, once."""
        self._thread.start()

    def stop(self, seconds: float | None = None) -> bool:
        """Asks the worker to stop and waits for it, for so many seconds at most.

        Returns whether it has ended. May be called more than once, and without `start`.
        """
        self._stopping.set()
        self._wake()
        if self._thread.ident is None:
            self._close()
        elif self._thread is not threading.current_thread():
            self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def stopping(self) -> bool:
        """Whether `stop` has been called."""
        return self._stopping.is_set()

    @property
    def alive(self) -> bool:
        """Whether the thread is running."""
        return self._thread.is_alive()

    def pause(self, seconds: float) -> bool:
        """Sleeps for so long, or until the worker is to stop; returns whether it is to stop."""
        return self._stopping.wait(seconds)

    def wait_readable(self, *fds: int, seconds: float | None = None) -> bool:
        """Waits until one of the descriptors can be read. Returns false if the worker is to stop,
        or when so many seconds have passed."""
        poll = select.poll()
        for fd in (*fds, self.wake_fd):
            poll.register(fd, select.POLLIN)
        ready = poll.poll(None if seconds is None else seconds * 1000)
        return bool(ready) and not self.stopping

    def _wake(self) -> None:
        with self._closing:
            if not self._closed:
                with suppress(BlockingIOError):
                    os.eventfd_write(self.wake_fd, 1)

    def _close(self) -> None:
        with self._closing:
            if not self._closed:
                self._closed = True
                os.close(self.wake_fd)

    def _run(self) -> None:
        try:
            self.work()
        except Exception as error:
            self._failed(self.name, error)
        finally:
            self._close()
