"""Chromium without a screen, and the agent's API with a cluster behind it, without a kernel."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any
from urllib.parse import urlsplit

import pytest
import structlog

from agent.config.settings import Settings
from agent.serve.api import Api, ApiServer, Sources
from agent.serve.flows import RecentFlows
from agent.serve.health import Heartbeat
from agent.serve.http import HttpAnswer, HttpRequest, TcpAddress
from rules.counts import PacketCounts
from rules.doctor import Check
from rules.events import Event, Synced, Upsert
from rules.history import History
from rules.language import Set
from rules.netlink.counters import Count
from rules.state import State
from rules.text import Key
from tests.browser.chromium import Page, chromium, lacks
from tests.manifest import node
from tests.unit.fakes.flow_watch import FakeFlowWatch


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _fail(name: str, error: Exception) -> None:
    raise AssertionError(name) from error


class Watch:
    """A watch as the source reports it."""

    def __init__(self, resource: str, objects: int) -> None:
        now = time.monotonic()
        self.resource, self.objects, self.state = resource, objects, "watching"
        self.since = self.last_message = self.last_valid = now
        self.relists = self.errors = 0


class Backend:
    """A State, and its API at a loopback port.

    `asked` has the path and query of each request. `made` times a small number is
    what each verdict and refusal has counted. `broken` is what every answer but the page says.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.made = 0
        self.watches = [Watch("services", 5000), Watch("endpointslices", 5001)]
        self.broken: HttpAnswer | None = None
        self.watch = FakeFlowWatch()
        self.flows = RecentFlows(_fail, lambda: self.watch, listening_seconds=6.0)
        self.state = State(Settings(node="node-1").options())
        self.state.apply([Upsert(node(zone="a")), Synced()])
        self.state.step()
        self.history = History(lambda _: None)
        self.checks = [Check("kernel", "The kernel", "ok", "6.18 has owned tables")]
        self._snapshot: State | None = None
        heartbeat = Heartbeat()
        heartbeat.queued()
        heartbeat.synced()
        heartbeat.programmed()
        self.sources = Sources(
            state=self._take,
            heartbeat=heartbeat,
            history=self.history,
            watches=lambda: self.watches,
            options={},
            examine=lambda _: self.checks,
            conntrack=lambda: (12_345, 262_144),
            elements=lambda: nullcontext(None),
            difference=lambda _: [],
            version="0.2.0",
            owns_tables=True,
            started=time.time() - 3600,
            counts=dict,
            counts_of=self._counts_of,
            flows=self.flows,
        )
        self.api = Api(self.sources)
        self.url = f"http://127.0.0.1:{_free_port()}/"
        log = structlog.get_logger()
        address = TcpAddress("127.0.0.1", urlsplit(self.url).port or 0)
        self._new_server = lambda: ApiServer(self, log, _fail, None, address)
        self._server = self._new_server()

    def answer(self, request: HttpRequest) -> HttpAnswer:
        """As the Api, and notes it."""
        self.asked.append(f"{request.path}?{request.query}".rstrip("?"))
        if self.broken and request.path != "/":
            return self.broken
        return self.api.answer(request)

    def stop(self) -> None:
        """As the Api."""
        self.api.stop()

    def _counts_of(self, keys: Mapping[Set, Sequence[Key]]) -> PacketCounts:
        there = self.state.elements()
        return {
            owner: {k: Count(self.made * (sum(k) % 7), 0) for k in of_set if k in there[owner]}
            for owner, of_set in keys.items()
            if owner in there and (owner.verdicts or owner.name.startswith("reject"))
        }

    def __enter__(self) -> Backend:
        self._server.start()
        assert self._server.settle()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()

    def restart(self) -> None:
        """Answers again at the same port."""
        self._server = self._new_server()
        self.__enter__()

    def put(self, *events: Event) -> None:
        """Programs events, as the loop does."""
        self.state.apply(events)
        operations = self.state.step().change.operations
        self.history.record(self.state.changes, time.time(), operations)
        self.state.problems.collect(time.time())
        self.state.changes.clear()
        self._snapshot = None

    def _take(self) -> State:
        self._snapshot = self._snapshot or self.state.snapshot()
        return self._snapshot


@pytest.fixture
def backend() -> Iterator[Backend]:
    with Backend() as made:
        yield made


@pytest.fixture(scope="session")
def _driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if lacking := lacks():
        pytest.skip(lacking)
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture
def page(_driver: Any, backend: Backend) -> Page:
    _driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    _driver.get("about:blank")  # the page of the test before still asks an agent that has gone
    _driver.get_log("browser")
    return Page(_driver, backend.url)
