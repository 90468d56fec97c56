"""Reads the clients that session affinity remembers, in a thread, for the loop to forget some.

When an endpoint is removed, its clients are in the affinity map among all others, up to 65,536 a
family, and only reading it all finds them. Neither that nor the deletion may hold up the loop.
This worker reads with a socket of its own and hands over a few clients at a time. The loop judges
them by its state and deletes the stale ones through the socket that owns the tables; then it asks
for more. Changes that are queued meanwhile are programmed in between.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import NamedTuple

import structlog

from agent.kernel.errors import KernelError
from agent.kernel.reading import TableReader
from agent.worker import Failed, Worker
from rules.tables import SETS
from rules.text import Element

CLIENTS = 512
"""As many are handed over at a time: 3 ms of the loop, *measured*."""

Log = structlog.typing.FilteringBoundLogger


class Clients(NamedTuple):
    """Some remembered clients of a family; `last` if no more follow."""

    family: int
    remembered: list[Element]
    last: bool


class ClientReader(Worker):
    """See the module. `put` gets Clients; `more` has to be called for each."""

    def __init__(
        self,
        put: Callable[[Clients], None],
        log: Log,
        failed: Failed,
        connect: Callable[[], TableReader],
    ) -> None:
        super().__init__("client reader", failed)
        self._put = put
        self._connect = connect
        self._log = log
        self._requests: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._more = threading.Semaphore(1)

    def read(self, family: int) -> None:
        """Asks for all clients of a family."""
        self._requests.put(family)

    def more(self) -> None:
        """Says that the last Clients have been dealt with."""
        self._more.release()

    def stop(self, seconds: float | None = None) -> bool:
        """Ends it, whatever it is waiting for."""
        self._stopping.set()
        self._requests.put(None)
        self._more.release()
        return super().stop(seconds)

    def work(self) -> None:
        """Reads whenever asked to."""
        while (family := self._requests.get()) is not None and not self.stopping:
            remembered = self._remembered(family)
            for start in range(0, max(len(remembered), 1), CLIENTS):
                self._more.acquire()
                if self.stopping:
                    return
                end = start + CLIENTS
                self._put(Clients(family, remembered[start:end], end >= len(remembered)))

    def _remembered(self, family: int) -> list[Element]:
        """A map that cannot be read, or has been deleted, has nothing to forget."""
        try:
            with self._connect() as kernel:
                return list(kernel.complete(SETS[family].affinity).items())
        except KernelError as error:
            self._log.debug("affinity_not_read", family=family, error=str(error))
            return []
