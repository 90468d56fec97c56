"""The series of /metrics that each Service address has: as text, since the library takes a tenth of
a millisecond for ten of them."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from rules.counts import FrontendCounts

OTHERS = ("", "", "", "others")
"""The labels of the series that sums up the frontends without series of their own."""


class FrontendSeries:
    """Series for `most` frontends, the first that were met and exist still; the others are summed.

    No series falls while its frontend exists: what left the sum for a series of its own, or was
    deleted, stays in the sum.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._own: dict[tuple[str, ...], tuple[str, str]] = {}
        self._last: dict[tuple[str, ...], FrontendCounts] = {}
        self._others = _Sums()

    def text(self, found: Iterable[FrontendCounts]) -> str:
        """The series as of now, in Prometheus's text format. Most records are those of the last
        time (`FrontendCounter`), and those without a series of their own take no more than a
        look-up then."""
        now: dict[tuple[str, ...], FrontendCounts] = {
            (c.namespace, c.service, c.port, c.frontend): c for c in found
        }
        self._own = {labels: names for labels, names in self._own.items() if labels in now}
        lines = _Lines()
        for labels, found_counts in now.items():
            last = self._last.get(labels)
            if last is None and len(self._own) < self._most:
                self._own[labels] = _names(labels)
            names = self._own.get(labels)
            if last is not found_counts:
                counts = now[labels] = _not_fallen(last, found_counts)
                if not names:
                    self._others.add(last, counts)
            if names:
                lines.add(names, now[labels])
        if len(self._own) < len(now) or self._others:
            lines.add(_names(OTHERS), self._others)
        self._last = now
        return lines.text()


class _Sums:
    """Counts of one or more frontends."""

    def __init__(self) -> None:
        self.connections = 0
        self.refused: dict[str, int] = {}
        self.dropped: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self.connections or self.refused or self.dropped)

    def add(self, before: FrontendCounts | None, after: FrontendCounts) -> None:
        """Adds what was counted between two readings of a frontend; None: since it exists."""
        self.connections += _gain(before.connections if before else 0, after.connections)
        for sums, was, now in (
            (self.refused, before.refused if before else {}, after.refused),
            (self.dropped, before.dropped if before else {}, after.dropped),
        ):
            for reason, value in now.items():
                sums[reason] = sums.get(reason, 0) + _gain(was.get(reason, 0), value)


def _gain(before: int, after: int) -> int:
    """A counter that fell was made again."""
    return after - before if after >= before else after


def _not_fallen(last: FrontendCounts | None, counts: FrontendCounts) -> FrontendCounts:
    """Refusals are read a moment before the packets they are taken off from. So connections may
    look fewer than at the last reading, while refusals grew: then they have not changed."""
    if last is None or counts.connections >= last.connections:
        return counts
    unserved, before = (sum(c.refused.values()) + sum(c.dropped.values()) for c in (counts, last))
    if unserved <= before:
        return counts
    return msgspec.structs.replace(counts, connections=last.connections)


class _Lines:
    """Lines of the three metrics."""

    def __init__(self) -> None:
        self._connections: list[str] = []
        self._refused: list[str] = []
        self._dropped: list[str] = []

    def add(self, names: tuple[str, str], counts: FrontendCounts | _Sums) -> None:
        """The lines of a frontend, or of the sum."""
        before, behind = names
        self._connections.append(f"{_CONNECTIONS}{before}{behind} {counts.connections}.0")
        for lines, metric, reasons in (
            (self._refused, _REFUSED, counts.refused),
            (self._dropped, _DROPPED, counts.dropped),
        ):
            for reason, value in reasons.items():
                lines.append(f'{metric}{before}reason="{_escaped(reason)}",{behind} {value}.0')

    def text(self) -> str:
        """All of them."""
        lines: list[str] = []
        for metric, text, found in (
            (_CONNECTIONS, "New connections through an address of a Service", self._connections),
            (_REFUSED, "Packets to an address of a Service that were refused", self._refused),
            (_DROPPED, "Packets to an address of a Service that were dropped", self._dropped),
        ):
            lines += (f"# HELP {metric} {text}", f"# TYPE {metric} counter", *found)
        return "\n".join(lines) + "\n"


_CONNECTIONS, _REFUSED, _DROPPED = (
    f"sliceproxy_service_{what}_total" for what in ("connections", "refused", "dropped")
)


def _names(labels: tuple[str, ...]) -> tuple[str, str]:
    """The labels as text, before and behind where a reason is: by name, as prometheus_client sorts
    them."""
    namespace, service, port, frontend = map(_escaped, labels)
    before = f'{{frontend="{frontend}",namespace="{namespace}",port="{port}",'
    return before, f'service="{service}"}}'


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
