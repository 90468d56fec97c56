"""How full the maps of session affinity are, looked at from time to time.

The rules fill these maps, not the agent, and the kernel does not notify of it. Newer kernels
say how many elements a set has; on others they are dumped and counted, 60 ms for a full map in
a thread of its own. That a map is full is one element of another set, see
`rules.tables`.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

from agent.kernel.errors import KernelError
from agent.kernel.reading import TableReader
from agent.worker import Failed, Worker
from rules.tables import AFFINITY_SIZE, FAMILIES, SETS

SECONDS = 10.0

Log = structlog.typing.FilteringBoundLogger
Record = Callable[[int, int], None]
"""Called with the family and how many clients are remembered."""


class AffinityWatch(Worker):
    """Looks every `seconds` until it is stopped; logs when a map becomes full, and when it has
    had room for all clients for an hour."""

    def __init__(
        self, record: Record, log: Log, failed: Failed, *, seconds: float = SECONDS
    ) -> None:
        super().__init__("session affinity", failed)
        self._record = record
        self._log = log
        self._seconds = seconds
        self._full: set[int] = set()

    def work(self) -> None:
        """Looks, and pauses."""
        with TableReader() as kernel:
            while not self.pause(self._seconds):
                for family in FAMILIES:
                    try:
                        self._look(kernel, family)
                    except KernelError:
                        continue  # the tables are being recreated; the next look will do

    def _look(self, kernel: TableReader, family: int) -> None:
        sets = SETS[family]
        clients = kernel.count(sets.affinity)
        self._record(family, clients or 0)
        full = clients is not None and bool(kernel.elements(sets.affinity_full))
        if full and family not in self._full:
            self._full.add(family)
            self._log.warning(
                "affinity_full",
                family=family,
                clients=clients,
                limit=AFFINITY_SIZE,
                consequence="new clients are placed by their address and are not remembered",
            )
        elif not full and family in self._full:
            self._full.remove(family)
            self._log.info("affinity_has_room", family=family, clients=clients or 0)
