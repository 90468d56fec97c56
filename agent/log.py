"""Log lines on standard error: for people on a terminal, JSON for everything else.

Logging never raises and never ends anything: a full disk or a closed standard error costs the line.
Values are bounded, so that no name or answer from outside makes a line of any length.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any, TextIO

import structlog

# from Python 3.12 on each LogRecord else asks asyncio for the task, if it has been imported
logging.logAsyncioTasks = False  # type: ignore[attr-defined]

MAX_TEXT = 2000
MAX_ITEMS = 20


def bounded(value: object) -> object:
    """The value, or the beginning of it if it is a long text or list."""
    if isinstance(value, str) and len(value) > MAX_TEXT:
        return f"{value[:MAX_TEXT]}... ({len(value)} characters)"
    if isinstance(value, list | tuple):
        items = [bounded(item) for item in value[:MAX_ITEMS]]
        more = len(value) - MAX_ITEMS
        return [*items, f"... and {more} more"] if more > 0 else items
    return value


def _bound_values(
    _logger: object, _method: str, fields: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    for name, value in fields.items():
        # a traceback is long, and its end is what matters
        fields[name] = value[-4 * MAX_TEXT :] if name == "exception" else bounded(value)
    return fields


class _Lines:
    """What structlog calls a logger: writes lines, each with one call, and drops what cannot be
    written. Unbuffered: a line that fails does not come back later."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._fd: int | None = None
        if stream is not None:
            with suppress(OSError, ValueError):
                self._fd = stream.fileno()

    def msg(self, line: str) -> None:
        """Writes a line."""
        with suppress(OSError, ValueError):
            if self._fd is not None:
                os.write(self._fd, f"{line}\n".encode(errors="backslashreplace"))
            elif self._stream is not None:
                self._stream.write(f"{line}\n")

    debug = info = warning = error = critical = exception = msg


def configure(level: str = "info") -> structlog.typing.FilteringBoundLogger:
    """A logger that writes to standard error, if that is open."""
    stream: TextIO | None = sys.stderr  # None if the descriptor was closed at the start
    terminal = stream is not None and stream.isatty()
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer() if terminal else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(
                fmt="%H:%M:%S.%f" if terminal else "iso", utc=not terminal
            ),
            structlog.processors.format_exc_info,
            _bound_values,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: _Lines(stream),
        cache_logger_on_first_use=True,
    )
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return logger
