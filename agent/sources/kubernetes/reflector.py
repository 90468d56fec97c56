"""List and watch: the protocol by which one resource is followed at an API server, without I/O.

The API server numbers all its writes. A list is the state as of one *resource version*; a watch
from that version is every change after it. Both together are the current state, a moment late. A
`Reflector` (client-go's name) turns them into events: its caller asks it for the next `ApiRequest`,
sends that, hands over the answer in pieces as they arrive, and learns at the end how long to wait
before the next one. Threads, sockets and clocks are the caller's. It does no I/O and is not in
`rules` because it is about the API server's protocol alone; nothing else uses it.

**Lists.** Servers with the feature WatchList (beta in 1.32) send a list as the beginning of a watch
(`sendInitialEvents`): each object as an ADDED event, then a bookmark annotated
`k8s.io/initial-events-end`, then the changes; neither side ever holds the whole text. Others refuse
with 422 and are asked for pages of 500. Each list tries streaming first, and pages if that fails,
in turn. If the continue token of a page expires, the server offers another that continues at a
newer version. It is not used, because deletions on pages already read would be missed: the list is
requested again as a whole, since reading it in pages may be slower than the server's compaction.

Lists are requested without a resource version: as of now. `resourceVersion=0`, any state in the
server's cache, is cheaper for servers before 1.31, but one that lags would take the node back in
time, to endpoints that are gone.

A relist becomes a difference: objects whose version is known are not decoded again, those that
are missing become deletions. For that only names and versions are kept.

**Watches.** A watch ends for many ordinary reasons: its time is over, or the server closes. An
event that was cut is dropped, and the next watch continues after the last complete one.
*Bookmarks* advance the version while nothing changes, about once a minute. If the version is too
old by then, the answer is 410, as the status or as an ERROR event in a good answer; then there is a
relist.

**Doubt.** A server that was restored from a backup is behind the known version, and to a watch from
the future it says nothing until it has counted up to there. A server or a load balancer may also
end every watch at once, send garbage, or send bookmarks without the events before them. So after a
watch that ended with an error or was *fruitless* (no change, and over within seconds or silent) a
*probe*, a list of one object, asks for the server's version:

- It is behind: no known version means anything any more. All objects are listed and passed on.
- It is equal: nothing was missed.
- It is ahead: ordinarily the next watch delivers the difference. If that was silent, or was the
  second fruitless one in a row, there is a relist, by pages.

The delay between fruitless watches doubles, so that in the worst case the agent polls lists.

https://kubernetes.io/docs/reference/using-api/api-concepts/, KEP 3157 (streaming lists), KEP 5504
(versions can be compared), client-go's tools/cache/reflector.go.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Literal, NamedTuple

from agent.sources.kubernetes.formats import (
    JSON,
    JSON_TYPE,
    PROTOBUF_TYPE,
    Encoded,
    EventTooLarge,
    Format,
    Identity,
    Status,
    WatchEvent,
    format_of,
)
from rules.events import Delete, Event, Upsert
from rules.objects import (
    HEADLESS_LABEL,
    PROXY_NAME_LABEL,
    EndpointSlice,
    InvalidObject,
    Name,
    Node,
    Object,
    Service,
    ServiceCIDR,
)

MAX_RETRY_AFTER = 300.0
PREFERRED_TYPES = f"{PROTOBUF_TYPE}, {JSON_TYPE}"


class Timing(NamedTuple):
    """How long things may take, in seconds, and how much is requested at once.

    A server sends something about once a minute (a bookmark), so after `silence` the other end of
    the connection counts as gone. (After a restart it may say nothing about what never changes;
    reconnecting is cheap.) Delays after failures are drawn from 0 to `backoff[0]`, and the bound
    doubles up to `backoff[1]`, so that the nodes of a cluster do not retry all at once. A watch
    that lasted `settled` with a message counts as working. `optional_retry` is shorter than the
    limit after which a resource without valid answers makes the agent unready. `pace` is how often
    a watch hands over changes: the interval and the burst of a `Pace`.
    """

    connect: float = 10.0
    answer: float = 60.0
    silence: float = 150.0
    watch: tuple[float, float] = (300.0, 600.0)
    backoff: tuple[float, float] = (0.8, 30.0)
    settled: float = 10.0
    optional_retry: float = 120.0
    page: int = 500
    pace: tuple[float, int] = (0.01, 1000)


class Resource(NamedTuple):
    """A resource to follow. Nothing is programmed before all that are `required` are listed."""

    record: type[Object]
    group: str
    plural: str
    namespaced: bool = True
    required: bool = True
    label_selector: str = ""
    field_selector: str = ""

    @property
    def kind(self) -> str:
        """The kind of its objects."""
        return self.record.__name__

    @property
    def full_name(self) -> str:
        """The plural and the API group, as RBAC and kubectl write it."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def path(self) -> str:
        """The path of the list, over all namespaces."""
        return f"/apis/{self.group}/v1/{self.plural}" if self.group else f"/api/v1/{self.plural}"

    @property
    def rule(self) -> str:
        """The RBAC rule that is needed, as YAML on one line."""
        return (
            f'- {{apiGroups: ["{self.group}"], resources: ["{self.plural}"],'
            ' verbs: ["list", "watch"]}'
        )


def resources(node: str, proxy_name: str = "") -> tuple[Resource, ...]:
    """What a proxy on `node` follows, selected as kube-proxy 1.36 does.

    `proxy_name` selects Services by the label service-proxy-name, as kube-proxy's option.
    """
    ours = f"{PROXY_NAME_LABEL}={proxy_name}" if proxy_name else f"!{PROXY_NAME_LABEL}"
    return (
        Resource(
            Service,
            "",
            "services",
            label_selector=ours,
            # a Service with a cluster IP is served whatever its headless label says
            field_selector="spec.clusterIP!=None",
        ),
        Resource(
            EndpointSlice,
            "discovery.k8s.io",
            "endpointslices",
            label_selector=f"!{HEADLESS_LABEL}",
        ),
        Resource(Node, "", "nodes", namespaced=False, field_selector=f"metadata.name={node}"),
        # v1 since Kubernetes 1.33
        Resource(
            ServiceCIDR, "networking.k8s.io", "servicecidrs", namespaced=False, required=False
        ),
    )


class RequestType(Enum):
    """What a request is for; STREAM is a list and a watch in one."""

    LIST = "list"
    STREAM = "stream"
    WATCH = "watch"
    PROBE = "probe"


class ApiRequest(NamedTuple):
    """A GET. `accept` is its Accept header; an answer that pauses for `silence` s is broken."""

    type: RequestType
    path: str
    query: dict[str, str]
    accept: str
    silence: float

    @property
    def verb(self) -> str:
        """The verb that RBAC sees."""
        return "watch" if "watch" in self.query else "list"

    @property
    def streams(self) -> bool:
        """Whether the answer is a watch."""
        return self.type in (RequestType.STREAM, RequestType.WATCH)


FailureKind = Literal[
    "unreachable", "busy", "unauthorized", "forbidden", "absent", "refused", "watch"
]


class Failure(NamedTuple):
    """What an operator should know. `text` stays the same as long as the reason does."""

    kind: FailureKind
    text: str


class Outcome(NamedTuple):
    """What follows from the end of an answer; `delay` is that of the next request, in seconds."""

    events: list[Event]
    delay: float = 0.0
    failure: Failure | None = None


def _behind(version: str, other: str) -> bool:
    """Whether a resource version is older than another; versions that are not numbers never are."""
    return version.isdecimal() and other.isdecimal() and int(version) < int(other)


class _PartialList:
    """A list while it arrives: the versions of all its objects, and those objects that are new."""

    def __init__(self, known: Mapping[Name | str, str]) -> None:
        self.known = known
        self.versions: dict[Name | str, str] = {}
        self.new: dict[Name | str, Object] = {}
        self.token = ""
        self.nameless = False

    def add(self, key: Name | str, version: str, parse: Callable[[], Object | None]) -> None:
        """Adds an object. It is parsed only if this version of it is not known."""
        if not (key.name if isinstance(key, Name) else key):
            self.nameless = True
            return
        if version and self.known.get(key) == version:
            self.new.pop(key, None)
        elif (found := parse()) is not None:
            key = found.name  # one name for both, once in memory
            self.new[key] = found
        self.versions[key] = version

    def add_new(self, found: Object, version: str) -> None:
        """Adds an object of which no version is known."""
        self.new[found.name] = found
        self.versions[found.name] = version

    def remove(self, key: Name | str) -> None:
        """Removes an object that was deleted while the list was being sent."""
        self.versions.pop(key, None)
        self.new.pop(key, None)


# --- the protocol -------------------------------------------------------------------------------


class Reflector:
    """See the module. For each `request()`: `answered`, `received` as often as needed, `finished`.

    `finished` alone if there was no answer. Objects that do not decode are appended to `invalid`.
    `failure` is set from the first failed request until requests work again; `valid_answers` counts
    those that showed the current state: lists, and messages of a watch.
    """

    def __init__(
        self, resource: Resource, timing: Timing | None = None, rng: random.Random | None = None
    ) -> None:
        self.resource = resource
        self.known: dict[Name | str, str] = {}
        self.version = ""
        self.complete = False
        self.settled = False
        self.relists = 0
        self.errors = 0
        self.valid_answers = 0
        self.failure: Failure | None = None
        self.invalid: list[InvalidObject] = []
        self.over = False
        """Nothing more is to be read of this answer, even if there is more."""
        self._timing = timing or Timing()
        self._random = rng or random.Random()
        self._latest = ""
        self._list: _PartialList | None = None
        self._accept = PREFERRED_TYPES
        self._paged = False
        self._whole = False
        self._doubt = False
        self._failures = 0
        self._expired = 0
        self._rejected = 0
        self._fruitless = 0
        self._silent = False
        self._trusted_version = ""
        self._begin(RequestType.LIST)

    def _begin(self, kind: RequestType) -> None:
        self._type = kind
        self._code = 0
        self._retry_after = ""
        self._format: Format = JSON
        self._body: list[bytes] = []
        self._splitter = self._format.splitter()
        self._messages = 0
        self._changed = False
        self._broken_off = ""
        self._began_at = self.version
        self.over = False

    # requests

    @property
    def listing(self) -> bool:
        """Whether the current state is not known, or no longer."""
        return not self.version

    def request(self) -> ApiRequest:
        """The next request."""
        if self.version:
            kind = RequestType.PROBE if self._doubt else RequestType.WATCH
        else:
            kind = RequestType.LIST if self._paged else RequestType.STREAM
            if kind is RequestType.STREAM or self._list is None:
                self._list = _PartialList(self.known)
        self._begin(kind)
        query = self._query(kind)
        if self.resource.label_selector:
            query["labelSelector"] = self.resource.label_selector
        if self.resource.field_selector:
            query["fieldSelector"] = self.resource.field_selector
        streams = kind in (RequestType.WATCH, RequestType.STREAM)
        silence = self._timing.silence if streams else self._timing.answer
        return ApiRequest(kind, self.resource.path, query, self._accept, silence)

    def _query(self, kind: RequestType) -> dict[str, str]:
        if kind is RequestType.PROBE:
            return {"limit": "1"}
        if kind is RequestType.LIST:
            query = {} if self._whole else {"limit": str(self._timing.page)}
            if self._list and self._list.token:
                query["continue"] = self._list.token
            return query
        query = {
            "watch": "1",
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(round(self._random.uniform(*self._timing.watch))),
        }
        if kind is RequestType.STREAM:
            query |= {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan"}
        else:
            query["resourceVersion"] = self.version
        return query

    # answers

    def answered(self, code: int, retry_after: str = "", content_type: str = "") -> None:
        """The answer begins: its HTTP status, and headers, empty where it has none."""
        self._code = code
        self._retry_after = retry_after
        self._format = format_of(content_type)
        self._splitter = self._format.splitter()

    def received(self, data: bytes, lasted: float = 0.0) -> list[Event]:
        """A piece of the answer's body, `lasted` seconds after the request; the events in it."""
        if self._code != 200 or self._type in (RequestType.LIST, RequestType.PROBE):
            self._body.append(data)
            return []
        events: list[Event] = []
        try:
            for message in self._splitter.feed(data):
                if self.over:
                    break
                events += self._message(self._format.event(message))
        except EventTooLarge as error:
            self._skip_event(error)
        except ValueError as error:
            self._break_off(f"not a watch event: {error}")
        if self._messages and lasted >= self._timing.settled:
            self._progressed()
        return events

    def _break_off(self, reason: str) -> None:
        self._broken_off, self.over = reason, True

    def _skip_event(self, error: EventTooLarge) -> None:
        """The same watch would end at this event again. A list of pages continues behind it."""
        self._break_off(str(error))
        self.failure = Failure("watch", f"{error}; listing instead")
        self._expire()
        self._paged = True

    def _message(self, message: WatchEvent) -> list[Event]:
        match message.type:
            case "ADDED" | "MODIFIED" | "DELETED":
                return self._change(message.object, deleted=message.type == "DELETED")
            case "BOOKMARK":
                bookmark = self._format.bookmark(message.object)
                if self._list is None:
                    self._advance(bookmark.version)
                elif bookmark.ends_list:
                    return self._conclude(bookmark.version)
            case "ERROR":
                status = self._format.error(message.object)
                if status.code == 410:
                    self._expire()
                self._break_off(status.message or f"error {status.code}")
        return []

    def _change(self, item: Encoded, *, deleted: bool) -> list[Event]:
        if self._list is not None and not deleted:
            self._listed(self._list, item)
            return []
        identity = self._identity(item)
        key = self._key(identity)
        if self._list is not None:
            self._list.remove(key)
            return []
        if _behind(self.version, identity.version):
            self._progressed()
        self._advance(identity.version)
        if self.over or not identity.name:
            return []
        if deleted:
            self.known.pop(key, None)
            return [Delete(self.resource.record, key)]
        found = self._decode(item)
        self.known[found.name if found else key] = identity.version
        return [Upsert(found)] if found else []

    def _listed(self, partial: _PartialList, item: Encoded) -> None:
        """Adds an object to a list. While none is known, all are new and decoded in one pass."""
        if not self.known:
            try:
                partial.add_new(*self._format.listed(self.resource.kind, item))
            except InvalidObject:
                pass  # it is noted below, under its name if it has one
            else:
                return
        identity = self._identity(item)
        partial.add(self._key(identity), identity.version, lambda: self._decode(item))

    def _identity(self, item: Encoded) -> Identity:
        """Which object it is; one without a name is invalid."""
        try:
            identity = self._format.identity(item)
            reason = "metadata.name is empty"
        except ValueError as error:
            identity, reason = Identity("", "", ""), str(error)
        if not identity.name:
            self.invalid.append(InvalidObject(f"{self.resource.kind} without a name", reason))
        return identity

    def _key(self, identity: Identity) -> Name | str:
        if self.resource.namespaced:
            return Name(identity.namespace or "default", identity.name)
        return identity.name

    def _decode(self, item: Encoded) -> Object | None:
        try:
            return self._format.record(self.resource.kind, item)
        except InvalidObject as error:
            self.invalid.append(error)
            return None

    def _advance(self, version: str) -> None:
        """A message of the watch has arrived."""
        if _behind(version, self.version):
            self._distrust()
            self._break_off("resource versions went backwards")
            return
        self.version = self._latest = version or self.version
        self._messages += 1
        self._valid()

    def _progressed(self) -> None:
        """The watch works: it has brought a change, or has lasted."""
        self._changed = True
        self._fruitless = self._failures = self._expired = 0
        self.failure = None

    def _valid(self) -> None:
        """A valid answer. That watches work shows only when they bring a change or last."""
        self.valid_answers += 1
        if self.failure and self.failure.kind != "watch":
            self.failure = None

    # lists

    def _conclude(self, version: str) -> list[Event]:
        """A list is complete as of `version`; the difference to what was known."""
        partial, self._list = self._list, None
        assert partial is not None
        self._paged = self._whole = False
        if _behind(version, self._latest):
            self._distrust()
            self._break_off("resource versions went backwards")
            return []
        events: list[Event] = [Upsert(new) for new in partial.new.values()]
        gone = [key for key in self.known if key not in partial.versions]
        if partial.nameless:  # any of those that seem to be gone may be the one without a name
            partial.versions.update((key, self.known[key]) for key in gone)
        else:
            events += [Delete(self.resource.record, key) for key in gone]
        self.known = partial.versions
        self.version = self._latest = self._began_at = self._trusted_version = version
        self.relists += self.complete
        self.complete = self.settled = True
        self._failures = 0
        self._valid()
        return events

    def _page(self, body: bytes) -> Outcome:
        partial = self._list
        assert partial is not None
        try:
            page = self._format.page(body)
            for item in page.items:
                self._listed(partial, item)
        except ValueError as error:
            return self._failed(Failure("refused", f"the answer is not a list: {error}"))
        if page.token:
            partial.token = page.token
            self._valid()
            return Outcome([])
        if not page.version:
            return self._failed(Failure("refused", "the list has no resource version"))
        return Outcome(self._conclude(page.version), self._relist_delay())

    def _relist_delay(self) -> float:
        return self._backoff(self._expired - 1) if self.listing and self._expired else 0.0

    def start_over(self) -> None:
        """After an unforeseen error: relist, and pass on all objects."""
        self._distrust()

    def _expire(self) -> None:
        """The version is too old to continue from: relist."""
        self.version, self._doubt, self._list = "", False, None
        self._expired += 1

    def _distrust(self) -> None:
        """The server went back in time: known versions may stand for other contents now."""
        self.known = dict.fromkeys(self.known, "")
        self._latest = ""
        self._expire()

    # ends

    def finished(self, broken: str = "", lasted: float = 0.0) -> Outcome:
        """The answer is over, or there is none; `broken` says why, where that was an error.

        `lasted` is the seconds since the request.
        """
        body, self._body = b"".join(self._body), []
        if not self._code:
            return self._failed(Failure("unreachable", broken))
        if self._code != 401:
            self._rejected = 0
        if self._code != 200:
            return self._refused(self._format.status(body, self._code))
        if self._type in (RequestType.WATCH, RequestType.STREAM):
            return self._watch_ended(broken or self._broken_off, lasted)
        if broken:
            return self._failed(Failure("unreachable", f"the answer broke off: {broken}"))
        return self._page(body) if self._type is RequestType.LIST else self._probed(body)

    def _watch_ended(self, broken: str, lasted: float) -> Outcome:
        if self._list is not None:  # a server that cannot stream after all, or a bad moment
            self._list, self._paged = None, True
            return self._failed()
        if self.listing:
            return Outcome([], self._relist_delay())
        if self._changed:
            return self._failed() if broken else Outcome([])
        if not self._fruitless:
            self._trusted_version = self._began_at
        self._fruitless += 1
        self._silent = not self._messages and lasted >= self._timing.settled
        if self._silent:  # connections are cut when nothing happens for a while
            self._failures = 0
            return self._failed()
        if self._fruitless == 1:
            return self._failed() if broken or not self._messages else Outcome([])
        self._failures = max(self._failures, self._fruitless - 1)
        reason = broken or ("it ended early" if self._messages else "it ended without a message")
        return self._failed(Failure("watch", reason))

    def _probed(self, body: bytes) -> Outcome:
        try:
            version = self._format.page(body).version
        except ValueError as error:
            return self._failed(Failure("refused", f"the answer is not a list: {error}"))
        self._doubt = False
        if _behind(version, self.version):
            self._distrust()
            return Outcome([], self._relist_delay())
        missed = bool(self._fruitless) and _behind(self._trusted_version, version)
        if missed and (self._silent or self._fruitless > 1):
            self.version, self._paged = "", True
        elif version == self.version:
            self._valid()
            if self._silent:
                self._fruitless = 0
        elif self.failure and self.failure.kind != "watch":
            self.failure = None
        return Outcome([])

    def _refused(self, status: Status) -> Outcome:
        code, words = self._code, status.message or status.reason or "no reason given"
        match code:
            case 410 if self._type is RequestType.LIST and self._list and self._list.token:
                self._list, self._whole = None, True
                return Outcome([])
            case 410 if self._type in (RequestType.WATCH, RequestType.STREAM):
                self._expire()
                return Outcome([], self._relist_delay())
            case 400 | 422 if self._type is RequestType.STREAM:
                self._list, self._paged = None, True
                return Outcome([])
            case 406 | 415 if self._accept != JSON_TYPE:
                self._accept = JSON_TYPE
                return Outcome([])
            case 401:
                self._rejected += 1
                if self._rejected == 1:  # the token expired; the caller has loaded another by now
                    return Outcome([])
                return self._failed(Failure("unauthorized", words))
            case 403 | 404:
                return self._denied("forbidden" if code == 403 else "absent", words)
            case 429:
                return self._failed(Failure("busy", "429"))
            case _ if code >= 500:
                return self._failed(Failure("unreachable", f"it answers {code}: {words}"))
        return self._failed(Failure("refused", f"it answers {code}: {words}"))

    def _denied(self, kind: FailureKind, words: str) -> Outcome:
        outcome = self._failed(Failure(kind, words))
        if self.resource.required:
            return outcome
        self.settled = True
        self.valid_answers += 1
        return outcome._replace(delay=self._timing.optional_retry)

    def _failed(self, failure: Failure | None = None) -> Outcome:
        """Try again later: when the server says so, and never all nodes at once."""
        self.errors += 1
        self.failure = failure or self.failure
        if self._type is RequestType.LIST and self._paged and not (self._list and self._list.token):
            self._paged, self._list = False, None
        self._doubt = bool(self.version)
        delay = self._backoff(self._failures)
        self._failures += 1
        if self._code in (429, 503) and self._retry_after.isdecimal():
            delay += min(float(self._retry_after), MAX_RETRY_AFTER)
        return Outcome([], delay, failure)

    def _backoff(self, failures: int) -> float:
        first, longest = self._timing.backoff
        return self._random.uniform(0.0, min(longest, first * 2.0 ** min(failures, 16)))
