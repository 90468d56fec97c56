"""What all tests share: a marker for each room, and logging that no test leaves behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

ROOMS = {
    "unit": "pure parts and fakes: no root, no network, no kernel tables",
    "kernel": "the kernel's nftables and real packets, in network namespaces: root",
    "cluster": "the agent against an API server over real HTTP; most of them need root",
    "browser": "the page in chromium: needs the extra `browser`, chromium and chromedriver",
    "container": "the image, in a container engine: root",
}
"""The directories of tests/, which are also markers: `pytest -m "unit or cluster"`."""


def pytest_configure(config: pytest.Config) -> None:
    """Declares the markers."""
    for room, what in ROOMS.items():
        config.addinivalue_line("markers", f"{room}: {what}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks each test with the room it is in."""
    here = Path(__file__).parent
    for item in items:
        room = item.path.relative_to(here).parts[0]
        if room in ROOMS:
            item.add_marker(room)


@pytest.fixture(autouse=True)
def _fresh_logging() -> Iterator[None]:
    """A test that configures logging leaves nothing to the next one."""
    yield
    structlog.reset_defaults()
