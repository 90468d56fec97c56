"""The answers that load balancers, the kubelet and rollouts ask this node for.

Four askers, four questions:

- A *load balancer* asks whether to send this node traffic for one Service: a Service of type
  LoadBalancer with `externalTrafficPolicy: Local` has a `healthCheckNodePort`. 200 if a ready
  endpoint of it is on this node, in the IP family of the request, and the node forwards; else 503.
- A load balancer asks whether to send this node traffic at all (policy Cluster): `/healthz`. 200 if
  the node forwards: this run has programmed everything once, or the tables of an earlier run are in
  the kernel. 503 too while the Node is being deleted, has the cluster autoscaler's taint, or is
  unknown: the node still forwards then, and connections drain (KEP-3836).
- The *kubelet* asks whether to restart the agent: `/livez`. 503 only when a change has waited too
  long to be programmed. An agent that waits for the API server is alive: a restart would not help.
- A *rolling update* asks whether this run works, before it touches the next node: `/readyz`. 200 if
  this run has programmed everything once (tables of an earlier run do not count), every watch has
  had a valid answer lately, and the Node is known. A wrong configuration stops at the first nodes.

Changes do not wait before the first complete list: nothing is programmed from half a cluster. So a
node whose API server is away stays healthy and alive and forwards by the last valid state; it is
not ready once a watch is older than its limit.

Bodies and headers of the first three are kube-proxy 1.36's (pkg/proxy/healthcheck), with both
families always alike, as one transaction programs both. `lastUpdated` is the current time while all
is well, as in old releases of kube-proxy; there are scripts that read it.

Ports are opened on all addresses of the node, where kube-proxy opens them on those of
`nodePortAddresses` that the node had at its start: nothing has to follow changes of addresses, and
the answer holds no secret. One listener serves both families; the connection says which one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec

from agent.serve.http import (
    NOT_FOUND,
    RETRY_SECONDS,
    HttpAnswer,
    HttpRequest,
    HttpServer,
    Listener,
    Log,
    Respond,
    TcpAddress,
    listen,
)
from agent.worker import Failed
from rules.health_check import HealthCheck
from rules.objects import Name

HEALTHZ_TIMEOUT = 120.0

_JSON = (("Content-Type", "application/json"), ("X-Content-Type-Options", "nosniff"))


# --- what the loop reports ----------------------------------------------------------------------


class Health(NamedTuple):
    """The proxy's health at one moment. Times are seconds since the epoch.

    `healthy`: no change has waited too long. `eligible`: the Node is known and stays.
    `programmed_at`: the last complete programming by this run, None before the first one.
    `earlier_tables`: the kernel has the tables of an earlier run, unchanged.
    `silent_watches`: resources without a valid answer for longer than the limit.
    """

    healthy: bool
    eligible: bool
    programmed_at: float | None
    now: float
    earlier_tables: bool = False
    silent_watches: tuple[str, ...] = ()

    @property
    def forwarding(self) -> bool:
        """Whether Services work on this node, as far as the agent knows."""
        return self.healthy and (self.programmed_at is not None or self.earlier_tables)

    @property
    def not_ready(self) -> list[str]:
        """Why this run is not ready; empty if it is."""
        reasons = []
        if self.programmed_at is None:
            reasons.append("nothing has been programmed yet by this run")
        if not self.healthy:
            reasons.append("a change has waited too long to be programmed")
        if not self.eligible:
            reasons.append("the Node is unknown, being deleted, or tainted for deletion")
        if self.silent_watches:
            reasons.append(f"no valid answer lately for {', '.join(self.silent_watches)}")
        return reasons


def _none() -> tuple[str, ...]:
    return ()


class Heartbeat:
    """The loop's progress; written by the loop, read by any thread.

    `timeout` is how many seconds a change may wait. `clock` and `wall` are for tests.
    """

    def __init__(
        self,
        timeout: float = HEALTHZ_TIMEOUT,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._timeout, self._clock, self._wall = timeout, clock, wall
        self._lock = threading.Lock()
        self._waiting_since: float | None = None
        self._synced_at: float | None = None
        self._programmed_at: float | None = None
        self._eligible = True
        self.earlier_tables: Callable[[], bool] = lambda: False
        """Whether the kernel has the tables of an earlier run; asked until `programmed`."""
        self.silent_watches: Callable[[], tuple[str, ...]] = _none
        """Resources without a valid answer for too long; asked for each answer."""

    def queued(self) -> None:
        """A change waits to be programmed."""
        with self._lock:
            if self._waiting_since is None:
                self._waiting_since = self._clock()

    def synced(self) -> None:
        """The first complete lists are known: from now on, changes can be programmed."""
        with self._lock:
            if self._synced_at is None:
                self._synced_at = self._clock()

    def programmed(self) -> None:
        """The kernel has everything that is known."""
        with self._lock:
            self._waiting_since = None
            self._programmed_at = self._wall()

    def eligible(self, eligible: bool) -> None:
        """Whether the Node is known and stays: see `Node.leaving`."""
        self._eligible = eligible

    def synced_at(self) -> float | None:
        """When the kernel last had everything: now, unless a change waits. None before the first
        programming."""
        with self._lock:
            idle = self._waiting_since is None and self._programmed_at is not None
            return self._wall() if idle else self._programmed_at

    def health(self) -> Health:
        """The health now."""
        silent = self.silent_watches()
        with self._lock:
            late = (
                self._waiting_since is not None
                and self._synced_at is not None
                and self._clock() - max(self._waiting_since, self._synced_at) >= self._timeout
            )
            programmed_at = self._programmed_at
        earlier = programmed_at is None and self.earlier_tables()
        return Health(not late, self._eligible, programmed_at, self._wall(), earlier, silent)


class WatchAges:
    """Finds the watches that have had no valid answer for longer than `limit` seconds.

    `ages` gives seconds since the last valid answer, by resource; it is called in any thread.
    """

    def __init__(self, ages: Callable[[], Mapping[str, float]], limit: float, log: Log) -> None:
        self._ages = ages
        self._limit = limit
        self._log = log
        self._since: dict[str, float] = {}

    def silent(self) -> tuple[str, ...]:
        """The resources whose watch is older than the limit, in order."""
        return tuple(sorted(r for r, age in self._ages().items() if age > self._limit))

    def report(self) -> None:
        """Logs each resource once when it becomes silent, and once when it is answered again. For
        one thread only."""
        ages = self._ages()
        for resource, age in sorted(ages.items()):
            if age > self._limit and resource not in self._since:
                self._since[resource] = time.monotonic() - age
                self._log.warning(
                    "watch_silent",
                    resource=resource,
                    seconds=round(age, 1),
                    limit_seconds=self._limit,
                    advice="the node keeps forwarding by the last valid state; check the API"
                    " server, the network to it, and the agent's RBAC rules",
                )
            elif age <= self._limit and resource in self._since:
                seconds = time.monotonic() - self._since.pop(resource)
                self._log.info(
                    "watch_recovered", resource=resource, after_seconds=round(seconds, 1)
                )


# --- answers ------------------------------------------------------------------------------------


def _time(seconds: float | None) -> str:
    """RFC 3339 in UTC; Go's zero time for None."""
    if seconds is None:
        return "0001-01-01T00:00:00Z"
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def healthz(health: Health) -> HttpAnswer:
    """The answer at /healthz."""
    well = health.forwarding and health.eligible
    body = _proxy_body(health, well=well, healthy=health.forwarding, node=True)
    if health.earlier_tables:
        # of unknown age: at least as old as this run
        body["earlierTables"] = True
    return HttpAnswer(200 if well else 503, _JSON, msgspec.json.encode(body))


def livez(health: Health) -> HttpAnswer:
    """The answer at /livez."""
    body = _proxy_body(health, well=health.healthy, healthy=health.healthy, node=False)
    return HttpAnswer(200 if health.healthy else 503, _JSON, msgspec.json.encode(body))


def _proxy_body(health: Health, *, well: bool, healthy: bool, node: bool) -> dict[str, object]:
    body: dict[str, object] = {
        "lastUpdated": _time(health.now if well else health.programmed_at),
        "currentTime": _time(health.now),
    }
    if node:
        body["nodeEligible"] = health.eligible
    body["healthy"] = healthy
    if health.programmed_at is not None:
        family = {"lastUpdated": _time(health.programmed_at), "healthy": healthy}
        body["status"] = {"IPv4": family, "IPv6": family}
    return body


def readyz(health: Health) -> HttpAnswer:
    """The answer at /readyz."""
    reasons = health.not_ready
    body = {"ready": not reasons, "reasons": reasons, "currentTime": _time(health.now)}
    return HttpAnswer(503 if reasons else 200, _JSON, msgspec.json.encode(body))


def service_answer(name: Name, endpoints: int, *, healthy: bool) -> HttpAnswer:
    """The answer at a Service's health check port."""
    # the layout, too, is kube-proxy's: there are scripts that read it with grep
    body = (
        "{\n"
        '\t"service": {\n'
        f'\t\t"namespace": {_quoted(name.namespace)},\n'
        f'\t\t"name": {_quoted(name.name)}\n'
        "\t},\n"
        f'\t"localEndpoints": {endpoints},\n'
        f'\t"serviceProxyHealthy": {"true" if healthy else "false"}\n'
        "}"
    )
    weight = ("X-Load-Balancing-Endpoint-Weight", str(endpoints))
    return HttpAnswer(200 if endpoints and healthy else 503, (*_JSON, weight), body.encode())


def _quoted(text: str) -> str:
    return msgspec.json.encode(text).decode()


# --- the agent's health server ------------------------------------------------------------------

Answered = Callable[[str, int], None]
"""Called for every answer at one of PATHS: the path and the status."""

PATHS: dict[str, Callable[[Health], HttpAnswer]] = {
    "/healthz": healthz,
    "/livez": livez,
    "/readyz": readyz,
}


class HealthServer:
    """PATHS at `address` (None for nowhere), and the health check ports of Services, as `update`
    gives them, all in one thread.

    With `hard_fail` an address that cannot be opened is an OSError of `start`, else it is logged
    and tried again. `each_tick` is called every few seconds in the thread.
    """

    def __init__(
        self,
        heartbeat: Heartbeat,
        log: Log,
        failed: Failed,
        address: TcpAddress | None,
        *,
        hard_fail: bool = False,
        answered: Answered = lambda _path, _status: None,
        tick_seconds: float = RETRY_SECONDS,
        each_tick: Callable[[], None] = lambda: None,
    ) -> None:
        self._heartbeat = heartbeat
        self._address = address
        self._hard_fail = hard_fail
        self._answered = answered
        self._server = HttpServer(
            "health", log, failed, tick_seconds=tick_seconds, each_tick=each_tick
        )
        self._checks: Mapping[Name, HealthCheck] = {}
        self._listeners: dict[Name, tuple[int, Listener]] = {}

    def start(self) -> None:
        """Starts to answer. Raises OSError if `hard_fail`."""
        if self._address:
            listener = Listener(self._address, "healthz", self._respond)
            if self._hard_fail:
                self._server.adopt(listener, listen(self._address))
            else:
                self._server.serve(listener)
        self._server.start()

    def stop(self) -> None:
        """Closes all ports."""
        self._server.stop()

    def update(self, checks: Mapping[Name, HealthCheck]) -> None:
        """Sets the Services that have a health check port, all of them. Does not wait for any port
        to open or close."""
        if self._checks == checks:
            return
        checks = self._checks = dict(checks)
        # what closes goes first: a port may pass from one Service to another
        for name, (port, listener) in list(self._listeners.items()):
            if name not in checks or checks[name].port != port:
                self._server.close(listener)
                del self._listeners[name]
        new = []
        for name, check in checks.items():
            if name not in self._listeners:
                listener = Listener(
                    TcpAddress("", check.port),
                    "health_check",
                    self._respond_for(name),
                    service=str(name),
                )
                self._listeners[name] = check.port, listener
                new.append(listener)
        self._server.serve(*new)

    def settle(self) -> bool:
        """Waits until all ports that were set have been tried. For tests."""
        return self._server.settle()

    def _respond(self, request: HttpRequest) -> HttpAnswer:
        answer_of = PATHS.get(request.path)
        if answer_of is None:
            return NOT_FOUND
        answer = answer_of(self._heartbeat.health())
        self._answered(request.path, answer.status)
        return answer

    def _respond_for(self, name: Name) -> Respond:
        def respond(request: HttpRequest) -> HttpAnswer:
            check = self._checks.get(name)  # the whole mapping is replaced, so there is no lock
            endpoints = check.endpoints(request.family) if check else 0
            healthy = self._heartbeat.health().forwarding
            return service_answer(name, endpoints, healthy=healthy)

        return respond
