"""Connections that a test makes, instead of conntrack's."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from types import TracebackType

from agent.kernel.errors import ConntrackError
from agent.kernel.flow_watch import FlowWatch
from rules.flow_report import Lost, NewConnection


class FakeFlowWatch(FlowWatch):
    """A watch whose events, or whose failure, are put by the test."""

    def __init__(self) -> None:
        self.made: queue.SimpleQueue[NewConnection | Lost | ConntrackError] = queue.SimpleQueue()
        self.open = False

    def __enter__(self) -> FakeFlowWatch:
        self.open = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.open = False

    def events(self, seconds: float | None = None) -> Iterator[NewConnection | Lost]:
        """What is put within so many seconds."""
        try:
            while True:
                event = self.made.get(timeout=seconds)
                if isinstance(event, ConntrackError):
                    raise event
                yield event
        except queue.Empty:
            return
