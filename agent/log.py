"""Log lines: for people on a terminal, JSON for everything else."""

from __future__ import annotations

import logging
import sys

import structlog

# from Python 3.12 on each LogRecord else asks asyncio for the task, if it has been imported
logging.logAsyncioTasks = False  # type: ignore[attr-defined]


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
