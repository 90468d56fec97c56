"""Kubernetes Events about problems, on the objects that have them.

Who may read a Service then sees what is wrong with it, without access to the nodes: `kubectl events
--for service/web`. The option `post_events` turns this on, and the agent must be allowed to create
Events (deploy/components/events).

Every node finds the same problem. So the name of an Event is computed from object and problem: the
first node creates it, the others are answered that it exists (409). It stays until the API server
removes it, an hour by default; problems that are open now are in `sliceproxy status`.

`kubectl describe` finds Events by the object's UID. The agent keeps no UIDs, which no rule needs:
it asks for the object when an Event is about to be posted. That is a list of one, which takes no
right that the agent does not have already.
"""

from __future__ import annotations

import hashlib
import json
import queue
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlencode

import msgspec
import structlog

from agent.sources.kubernetes.pace import Pace
from agent.worker import Failed, Worker
from rules.problems import Problem

Log = structlog.typing.FilteringBoundLogger

QUEUED = 100
"""So many problems wait to be posted; more are left out."""
REPEAT_SECONDS = 3600.0
"""A problem that opens again is posted again after so long, the API server's default for how long
it keeps Events (--event-ttl)."""
REMEMBERED = 1000
"""So many posted problems are remembered for that."""
REQUEST_SECONDS = 5.0
STOP_SECONDS = 1.0
"""The end of the agent waits for a request no longer than this."""
REPORTER = "sliceproxy"

_NOTE = 1000  # the API allows 1,024 bytes
_NAME = 200  # of an object, in the name of an Event, which has at most 253 characters
_RESOURCES = {
    "Service": ("v1", "/api/v1/services"),
    "Node": ("v1", "/api/v1/nodes"),
    "EndpointSlice": ("discovery.k8s.io/v1", "/apis/discovery.k8s.io/v1/endpointslices"),
    "ServiceCIDR": ("networking.k8s.io/v1", "/apis/networking.k8s.io/v1/servicecidrs"),
}
"""apiVersion and path of each kind that may have problems."""


class PostTiming(NamedTuple):
    """How fast Events are posted: a burst, then one for each interval (a `Pace`). Each waits up to
    `spread` seconds first, at random, because all nodes find a problem at the same time."""

    burst: int = 10
    interval: float = 6.0
    spread: float = 5.0


class Exchanges(Protocol):
    """Sends a request; returns status and body. Raises an exception if there is no answer."""

    server: str

    def exchange(
        self, method: str, target: str, seconds: float, body: bytes | None = None
    ) -> tuple[int, bytes]:
        """As `Connection.exchange`."""


class EventPoster(Worker):
    """Posts an Event for each problem that opens. `opened` may be called from any thread and never
    waits. `requested` is called for each answer, as of `ClusterFollower`."""

    def __init__(
        self,
        connection: Exchanges,
        node: str,
        log: Log,
        failed: Failed,
        *,
        requested: Callable[[str, int | str, str, float | None], None] = lambda *_: None,
        timing: PostTiming = PostTiming(),  # noqa: B008, a tuple of numbers
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__("events", failed)
        self._connection = connection
        self._node = node
        self._log = log
        self._requested = requested
        self._spread = timing.spread
        self._pace = Pace(timing.interval, timing.burst, clock)
        self._clock = clock
        self._queue: queue.SimpleQueue[Problem | None] = queue.SimpleQueue()
        self._posted: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._ended = False

    def opened(self, problems: Iterable[Problem]) -> None:
        """Queues the problems, as far as there is room."""
        for problem in problems:
            if self._ended or self._queue.qsize() >= QUEUED:
                return
            self._queue.put(problem)

    def stop(self, seconds: float | None = STOP_SECONDS) -> bool:
        """See Worker. Problems that still wait are not posted."""
        self._ended = True
        self._queue.put(None)
        return super().stop(seconds)

    def work(self) -> None:
        """Posts until `stop`, or until the API server forbids it."""
        while (problem := self._queue.get()) is not None and not self.stopping:
            if not self._is_new(problem):
                continue
            if self.pause(random.uniform(0, self._spread)) or not self._post(problem):
                break
            if self._rest():  # after the post, as a `Pace` has it
                break
        self._ended = True

    def _rest(self) -> bool:
        """Waits until the next one may be posted; returns whether the worker is to stop."""
        until = self._clock() + self._pace.rest()
        while (left := until - self._clock()) > 0:
            if self.pause(left):
                return True
        return False

    def _is_new(self, problem: Problem) -> bool:
        """Whether the problem was not posted lately; it counts as posted from now on."""
        key, now = (problem.code, str(problem.subject)), self._clock()
        if now - self._posted.get(key, float("-inf")) < REPEAT_SECONDS:
            return False
        self._posted[key] = now
        self._posted.move_to_end(key)
        if len(self._posted) > REMEMBERED:
            self._posted.popitem(last=False)
        return True

    def _post(self, problem: Problem) -> bool:
        """Posts one Event. Returns whether to go on."""
        try:
            event = event_of(problem, self._uid(problem), self._node, datetime.now(UTC))
            path = f"/apis/events.k8s.io/v1/namespaces/{event['metadata']['namespace']}/events"
            data = json.dumps(event).encode()
            status, body = self._exchange("POST", path, data)
        except Exception as error:  # whatever the connection raises: the next one may be answered
            self._log.debug("event_not_posted", object=str(problem.subject), reason=str(error))
            return True
        if status == HTTPStatus.FORBIDDEN and not _is_terminating(body):
            self._log.warning(
                "events_forbidden",
                answer=_message(body),
                advice="allow to create events.events.k8s.io (deploy/components/events), or leave "
                "out --post-events; problems are also in `sliceproxy status`",
            )
            return False
        if status not in (HTTPStatus.CREATED, HTTPStatus.CONFLICT):
            reason = f"{status} {_message(body)}"
            self._log.debug("event_not_posted", object=str(problem.subject), reason=reason)
        return True

    def _uid(self, problem: Problem) -> str:
        """The UID of the object that has the problem; "" if there is no such object, or if the
        API server does not say. Raises what the connection raises."""
        kind, name, _ = problem.subject
        if kind not in _RESOURCES:
            return ""
        namespace, slash, own_name = name.rpartition("/")
        fields = f"metadata.name={own_name}" + (f",metadata.namespace={namespace}" if slash else "")
        query = urlencode({"fieldSelector": fields, "resourceVersion": "0"})  # from its cache
        target = f"{_RESOURCES[kind][1]}?{query}"
        status, body = self._exchange("GET", target)
        if status != HTTPStatus.OK:
            return ""
        with suppress(msgspec.MsgspecError):
            for item in msgspec.json.decode(body, type=_List).items:
                return item.metadata.uid
        return ""

    def _exchange(self, method: str, target: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Status and body of the answer. Raises what the connection raises."""
        began, server = time.monotonic(), self._connection.server
        try:
            status, answer = self._connection.exchange(method, target, REQUEST_SECONDS, body)
        except Exception:
            self._requested(method, "<error>", server, None)
            raise
        self._requested(method, status, server, time.monotonic() - began)
        return status, answer


class _Metadata(msgspec.Struct):
    uid: str = ""


class _Item(msgspec.Struct):
    metadata: _Metadata


class _List(msgspec.Struct):
    items: list[_Item]


def event_of(problem: Problem, uid: str, node: str, now: datetime) -> dict[str, Any]:
    """The Event (events.k8s.io/v1) about a problem of the object with this UID, as a document."""
    kind, name, _ = problem.subject
    namespace, slash, own_name = name.rpartition("/")
    # Events about objects without namespace are in "default" (the API refuses others)
    place = namespace if slash else "default"
    version, _ = _RESOURCES.get(kind, ("v1", ""))
    regarding = {"kind": kind, "name": own_name, "apiVersion": version}
    if slash:
        regarding["namespace"] = namespace
    if uid:
        regarding["uid"] = uid
    digest = hashlib.sha256(f"{kind} {name} {uid} {problem.code}".encode()).hexdigest()[:16]
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": f"{own_name[:_NAME].rstrip('.-')}.{digest}", "namespace": place},
        "eventTime": now.isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "reportingController": REPORTER,
        "reportingInstance": f"{REPORTER}-{node}"[:128],
        "action": "Program",
        "reason": "".join(word.capitalize() for word in problem.code.split("_")),
        "type": "Warning",
        "note": problem.text.encode()[:_NOTE].decode(errors="ignore"),
        "regarding": regarding,
    }


def _status_of(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _message(body: bytes) -> str:
    return str(_status_of(body).get("message", ""))[:300]


def _is_terminating(body: bytes) -> bool:
    """Whether the answer refuses one namespace because it is being deleted; that is a 403, too."""
    details = _status_of(body).get("details")
    causes = details.get("causes") if isinstance(details, dict) else None
    return any(
        isinstance(cause, dict) and cause.get("reason") == "NamespaceTerminating"
        for cause in causes or ()
    )
