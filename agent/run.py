"""The agent, put together: sources and signals in front of the loop, the kernel behind it, health
and metrics beside it.

The order of a start matters. The kernel's socket comes first, since nothing goes without it; then
the health and metrics servers, so that a probe gets an answer from the beginning; then a thread
that reads the tables back beside all the rest; then the node's addresses, which Services depend on;
the source of Services last.
"""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Protocol

from agent import __version__, log
from agent.config.file import ConfigFile
from agent.config.settings import Settings
from agent.kernel import addresses, kube_proxy
from agent.kernel.errors import KernelError
from agent.kernel.readahead import read_ahead
from agent.kernel.sysctl import configure
from agent.kernel.tables import Kernel
from agent.loop import Failed, Loop, Observers, Stop
from agent.serve.health import HealthServers, Heartbeat
from agent.serve.metrics import Metrics, MetricsServer, Recorder
from rules.events import Event
from rules.state import State

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger


class CannotRun(Exception):
    """The agent cannot start; the message says why and what to do."""


class Source(Protocol):
    """What tells the loop of events: a thread that starts and stops."""

    def start(self) -> None:
        """Begins to tell."""

    def stop(self) -> None:
        """Ends, and returns when it has."""


def run(places: tuple[str, ...], settings: Settings, file: ConfigFile | None) -> None:
    """Runs until SIGTERM or SIGINT; the tables stay. Services come from manifests in `places`, or
    from the API server if there are none.

    Raises CannotRun, or NotPermitted without CAP_NET_ADMIN.
    """
    logger = log.configure(settings.log_level)
    if file and file.without_meaning:
        logger.warning(
            "configuration without meaning here", file=file.path, fields=file.without_meaning
        )
    gc.disable()  # until the loop has programmed what is there: a load makes no garbage
    with Kernel(own=not settings.no_own) as kernel, _observed(settings, logger) as observers:
        chosen = settings.options()
        loop = Loop(
            State(chosen),
            kernel,
            logger,
            show_elements=settings.log_level == "debug",
            observers=observers,
            ahead=read_ahead(kernel, logger),
        )
        _stop_on_signals(loop)
        source = _source(places, settings, loop.put, logger, observers.recorder)
        network = addresses.AddressFollower(loop.put, lambda _, error: loop.put(Failed(error)))
        logger.info("started", node=chosen.node, owns_tables=bool(kernel.table_flags))
        if not places:  # who tries manifests on a machine does not want it configured
            _set_oom_score(settings.oom_score_adj, logger)
            configure(settings.conntrack(), logger)
        _warn_of_kube_proxy(kernel, logger)
        network.start()
        network.ready.wait()
        source.start()
        loop.run()
        logger.info("stopped", tables="left in place")
        source.stop()
        network.stop()


def _stop_on_signals(loop: Loop) -> None:
    def stop(_signal: int, _frame: FrameType | None) -> None:
        loop.put(Stop())

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


def _source(
    places: tuple[str, ...],
    settings: Settings,
    put: Callable[[list[Event]], None],
    logger: FilteringBoundLogger,
    recorder: Recorder,
) -> Source:
    if places:
        from agent.sources.manifests.follower import Follower as Manifests
        from agent.sources.manifests.follower import ManifestError

        try:
            return Manifests(places, put, logger)
        except ManifestError as error:
            raise CannotRun(str(error)) from None
    from agent.sources.kubernetes.follower import ConnectError, connect
    from agent.sources.kubernetes.follower import Follower as Kubernetes

    try:
        connection = connect(settings.kubeconfig, settings.context, settings.server)
    except ConnectError as error:
        raise CannotRun(str(error)) from None
    chosen = settings.options()
    follower = Kubernetes(
        connection, chosen.node, chosen.proxy_name, put, logger, requested=recorder.requested
    )
    recorder.follows(follower.status)
    return follower


@contextmanager
def _observed(settings: Settings, logger: FilteringBoundLogger) -> Iterator[Observers]:
    """The health and metrics servers, while they run."""
    heartbeat, hard = Heartbeat(settings.healthz_timeout), settings.bind_address_hard_fail
    place = settings.metrics()
    metrics = Metrics(__version__) if place else None
    recorder = metrics or Recorder()
    health = HealthServers(
        heartbeat, logger, settings.healthz(), hard_fail=hard, answered=recorder.answered
    )
    servers: list[HealthServers | MetricsServer] = [health]
    if metrics and place:
        servers.append(MetricsServer(metrics, logger, place, hard_fail=hard))
    try:
        for server in servers:
            server.start()
    except OSError as error:
        raise CannotRun(f"cannot serve health and metrics: {error}") from None
    try:
        yield Observers(recorder, heartbeat, health.update)
    finally:
        for server in servers:
            server.stop()


def _set_oom_score(score: int, logger: FilteringBoundLogger) -> None:
    try:
        Path("/proc/self/oom_score_adj").write_text(str(score))
    except OSError as error:
        logger.info("oom_score_adj stays as it is", wanted=score, error=str(error))


def _warn_of_kube_proxy(kernel: Kernel, logger: FilteringBoundLogger) -> None:
    try:
        found = kube_proxy.find(kernel)
    except KernelError as error:
        found = [str(error)]
    if found:
        logger.warning(
            "kube-proxy is or was on this node; once it is stopped, remove what it left",
            found=found,
            command="sliceproxy cleanup --kube-proxy",
        )
