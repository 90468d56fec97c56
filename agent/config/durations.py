"""Durations as Go writes and reads them: 30s, 1m30s, 24h0m0s, 1.5h (`time.ParseDuration`)."""

from __future__ import annotations

import re

_UNITS = {
    "ns": 1,
    "us": 10**3,
    "µs": 10**3,  # U+00B5, which Go prints
    "μs": 10**3,  # U+03BC, which Go also reads
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
}
_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|μs|ms|s|m|h)", re.ASCII)
_MAX_NANOSECONDS = 2**63 - 1


class Duration(float):
    """Seconds."""

    __slots__ = ()

    def __str__(self) -> str:
        """The shortest text of whole hours, minutes or seconds: 24h, 2m, 90s."""
        seconds = float(self)
        for unit, size in (("h", 3600), ("m", 60)):
            if seconds and not seconds % size:
                return f"{seconds / size:g}{unit}"
        return f"{seconds:g}s"


def parse_duration(text: str) -> Duration:
    """The duration that Go's time.ParseDuration reads from `text`. Raises ValueError."""
    sign = -1 if text.startswith("-") else 1
    rest = text[1:] if text[:1] in ("-", "+") else text
    if rest == "0":
        return Duration(0)
    nanoseconds, position = 0, 0
    while match := _PART.match(rest, position):
        whole, _, fraction = match[1].partition(".")
        unit = _UNITS[match[2]]
        nanoseconds += int(whole or 0) * unit
        nanoseconds += int(fraction or 0) * unit // 10 ** len(fraction)
        position = match.end()
    if not rest or position != len(rest) or nanoseconds > _MAX_NANOSECONDS:
        raise ValueError(f"{text!r} is not a duration; write it like 30s, 1m30s or 24h")
    return Duration(sign * nanoseconds / 10**9)


def decode_duration(kind: type, value: object) -> object:
    """msgspec's `dec_hook` for Duration. Raises ValueError."""
    if kind is not Duration:
        raise NotImplementedError
    if isinstance(value, str):
        return parse_duration(value)
    raise ValueError(f"expected a duration like 30s, got {value!r}")
