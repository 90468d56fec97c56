"""Log lines: for people on a terminal, JSON for everything else.

Whoever imports this before anything else that logs has a structlog without asyncio and rich, which
it imports for what nobody here does: to log from coroutines and to colour tracebacks.
"""

from __future__ import annotations

import logging
import sys

from agent.deferred import load

# else, from Python 3.12 on, each LogRecord asks asyncio for the task, if somebody has imported it
logging.logAsyncioTasks = False  # type: ignore[attr-defined]

load(
    ["structlog"],
    {
        "asyncio": (),
        "rich": (),
        "rich.console": ("Console",),
        "rich.pretty": (),
        "rich.traceback": ("Traceback",),
    },
)

import structlog  # noqa: E402 - load has imported it


def configure(level: str = "info") -> structlog.typing.FilteringBoundLogger:
    """A logger that writes to standard error."""
    terminal = sys.stderr.isatty()
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
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return logger
