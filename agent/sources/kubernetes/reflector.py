"""List and watch: how the objects of one resource are followed at an API server, without I/O.

The API server numbers all its writes. A list tells what there is as of one *resource version*; a
watch from that version tells every change after it, each as a line of JSON. Whoever has both has
the truth, a moment late. A `Reflector` (client-go's name) turns this into events: its caller asks
it for the next `Request`, sends that, hands over what comes back as it comes, and at the end is
told how long to wait before the next one. Threads, sockets and clocks are the caller's.

How a list is had. Servers with the feature WatchList (beta in 1.32) send it as the beginning of a
watch (`sendInitialEvents`): each object as an ADDED event, then a bookmark annotated
`k8s.io/initial-events-end`, then the changes; nobody ever holds the whole text. Others refuse with
422, and are asked for pages of 500. If the continue token of a page expires, the server offers
another that goes on at a newer version. That one is not taken: what was deleted on pages already
read would never be heard of. The list starts anew, in one piece this time, since its pages may be
slower than the server's compaction.

Lists are asked for without a resource version: as of now. `resourceVersion=0`, "whatever your
cache has", is cheaper for servers before 1.31, but one that lags would take the node back in time,
to endpoints that are gone.

A relist becomes a difference: objects whose version is known are not decoded again, those that
are missing become deletions. For that only names and versions are kept.

A watch ends for many reasons and most are none to worry about: the server ends it after the time
that was asked for, or closes; a line that was cut is dropped, and the next watch starts after the
last version that arrived whole. *Bookmarks* move that version on where nothing changes, about
once a minute. If the version is too old by then, the server says 410, as its status or as an
ERROR event in a good answer, and there is a relist.

The trap is a server that was restored from a backup. Its versions are behind ours, and to a watch
from the future it says nothing, until it has counted up to there. So whenever a watch ended with
an error, or never said anything, a *probe* (a list of one object) asks where the server is now. If
that is behind what is known, no known version means anything any more: all objects are told anew,
and the receiver finds out which differ.

https://kubernetes.io/docs/reference/using-api/api-concepts/, KEP 3157 (streaming lists), KEP 5504
(versions can be compared), client-go's tools/cache/reflector.go.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Literal, NamedTuple

import msgspec

from rules.decode import decode, decode_json
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

INITIAL_EVENTS_END = "k8s.io/initial-events-end"

MAX_LINE_BYTES = 16 * 2**20
"""etcd takes objects of at most 1.5 MiB; a line longer than this is no event."""

MAX_RETRY_AFTER = 300.0


class Timing(NamedTuple):
    """How long things may take, in seconds, and how much is asked for at once.

    A server says something about once a minute (a bookmark), so `silence` tells a connection whose
    other end is gone. (After a restart it may say nothing about what never changes; reconnecting
    costs little.) Delays after failures are drawn from 0 to `backoff[0]`, and the bound
    doubles up to `backoff[1]`, so that the nodes of a cluster do not come all at once.
    """

    connect: float = 10.0
    answer: float = 60.0
    silence: float = 150.0
    watch: tuple[float, float] = (300.0, 600.0)
    backoff: tuple[float, float] = (0.8, 30.0)
    optional_retry: float = 300.0
    page: int = 500


class Resource(NamedTuple):
    """What is followed. Only where `required` must it be listed before anything is programmed."""

    record: type[Object]
    group: str
    plural: str
    namespaced: bool = True
    required: bool = True
    label_selector: str = ""
    field_selector: str = ""

    @property
    def kind(self) -> str:
        """The API's name for one of them."""
        return self.record.__name__

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


class Ask(Enum):
    """What a request is for; STREAM is a list and a watch in one."""

    LIST = "list"
    STREAM = "stream"
    WATCH = "watch"
    PROBE = "probe"


class Request(NamedTuple):
    """A GET. `silence` is how many seconds the answer may pause before it counts as broken."""

    ask: Ask
    path: str
    query: dict[str, str]
    silence: float

    @property
    def verb(self) -> str:
        """The verb that RBAC sees."""
        return "watch" if "watch" in self.query else "list"


class Trouble(NamedTuple):
    """What an operator should know. `text` is the same as long as the trouble is."""

    kind: Literal["unreachable", "busy", "unauthorized", "forbidden", "absent", "refused"]
    text: str


class Step(NamedTuple):
    """What follows from the end of an answer; `delay` is that of the next request, in seconds."""

    events: list[Event]
    delay: float = 0.0
    trouble: Trouble | None = None


# --- the API's shapes ---------------------------------------------------------------------------


class _Shape(msgspec.Struct, rename="camel"):
    pass


class _Metadata(_Shape):
    name: str = ""
    namespace: str = ""
    resource_version: str = ""


class _Object(_Shape):
    metadata: _Metadata = msgspec.field(default_factory=_Metadata)


class _BookmarkMetadata(_Shape):
    resource_version: str
    annotations: dict[str, str] | None = None


class _Bookmark(_Shape):
    metadata: _BookmarkMetadata


class _ListMetadata(_Shape):
    resource_version: str = ""
    token: str | None = msgspec.field(default=None, name="continue")


class _List(_Shape):
    metadata: _ListMetadata
    items: list[msgspec.Raw] | None = None


class _Status(_Shape):
    code: int = 0
    reason: str | None = None
    message: str | None = None


class _WatchEvent(_Shape):
    type: str
    object: msgspec.Raw


_objects = msgspec.json.Decoder(_Object)
_bookmarks = msgspec.json.Decoder(_Bookmark)
_lists = msgspec.json.Decoder(_List)
_statuses = msgspec.json.Decoder(_Status)
_watch_events = msgspec.json.Decoder(_WatchEvent)


def _status(data: bytes | msgspec.Raw, code: int = 0) -> _Status:
    """A Status, or what can be said where the body is none (a load balancer's, for instance)."""
    try:
        status = decode_json(_statuses, data)
    except ValueError:
        return _Status(code)
    return _Status(status.code or code, status.reason, status.message)


def _behind(version: str, other: str) -> bool:
    """Whether a resource version is older than another; versions that are no numbers never are."""
    return version.isdecimal() and other.isdecimal() and int(version) < int(other)


# --- pieces -------------------------------------------------------------------------------------


class Lines:
    """Cuts bytes, however they arrive, into lines. Each byte is copied at most twice."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that are complete now. Raises ValueError if one is too long to be meant."""
        first, *others = data.split(b"\n")
        self._pieces.append(first)
        self._size += len(first)
        if self._size > MAX_LINE_BYTES:
            raise ValueError(f"a line of more than {MAX_LINE_BYTES >> 20} MiB")
        if not others:
            return []
        lines = [b"".join(self._pieces), *others]
        rest = lines.pop()
        self._pieces, self._size = [rest], len(rest)
        return [line for line in lines if line]


class _Listing:
    """A list while it arrives: what there is, and what of it is news."""

    def __init__(self, known: Mapping[Name | str, str]) -> None:
        self.known = known
        self.versions: dict[Name | str, str] = {}
        self.news: dict[Name | str, Object] = {}
        self.token = ""
        self.nameless = False

    def add(self, key: Name | str, version: str, parse: Callable[[], Object | None]) -> None:
        """An object is there; it is parsed only if this version of it is not known."""
        if not (key.name if isinstance(key, Name) else key):
            self.nameless = True
            return
        if version and self.known.get(key) == version:
            self.news.pop(key, None)
        elif (found := parse()) is not None:
            key = found.name  # one name for both, once in memory
            self.news[key] = found
        self.versions[key] = version

    def remove(self, key: Name | str) -> None:
        """An object went while the list was being sent."""
        self.versions.pop(key, None)
        self.news.pop(key, None)


# --- the protocol -------------------------------------------------------------------------------


class Reflector:
    """See the module. For each `request()`: `answered`, `received` as often as needed, `finished`.

    `finished` alone if there was no answer. What cannot be decoded is appended to `invalid`.
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
        self.invalid: list[InvalidObject] = []
        self.over = False
        """Nothing more is to be read of this answer, though there may be more."""
        self._timing = timing or Timing()
        self._random = rng or random.Random()
        self._latest = ""
        self._listing: _Listing | None = None
        self._streams = True
        self._paged = False
        self._whole = False
        self._doubt = False
        self._failures = 0
        self._gone = 0
        self._rejected = 0
        self._begin(Ask.LIST)

    def _begin(self, ask: Ask) -> None:
        self._ask = ask
        self._code = 0
        self._retry_after = ""
        self._body: list[bytes] = []
        self._lines = Lines()
        self._messages = 0
        self._reason = ""
        self.over = False

    # asking

    @property
    def listing(self) -> bool:
        """Whether it is not known what there is, or no longer."""
        return not self.version

    def request(self) -> Request:
        """What to ask next."""
        if self.version:
            ask = Ask.PROBE if self._doubt else Ask.WATCH
        else:
            ask = Ask.STREAM if self._streams and not self._paged else Ask.LIST
            if ask is Ask.STREAM or self._listing is None:
                self._listing = _Listing(self.known)
                self.relists += self.complete
        self._begin(ask)
        timing = self._timing
        query = self._query(ask)
        if self.resource.label_selector:
            query["labelSelector"] = self.resource.label_selector
        if self.resource.field_selector:
            query["fieldSelector"] = self.resource.field_selector
        silence = timing.silence if ask in (Ask.WATCH, Ask.STREAM) else timing.answer
        return Request(ask, self.resource.path, query, silence)

    def _query(self, ask: Ask) -> dict[str, str]:
        if ask is Ask.PROBE:
            return {"limit": "1"}
        if ask is Ask.LIST:
            query = {} if self._whole else {"limit": str(self._timing.page)}
            if self._listing and self._listing.token:
                query["continue"] = self._listing.token
            return query
        query = {
            "watch": "1",
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(round(self._random.uniform(*self._timing.watch))),
        }
        if ask is Ask.STREAM:
            query |= {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan"}
        else:
            query["resourceVersion"] = self.version
        return query

    # answers

    def answered(self, code: int, retry_after: str = "") -> None:
        """The answer begins: its HTTP status, and its Retry-After header if it has one."""
        self._code = code
        self._retry_after = retry_after

    def received(self, data: bytes) -> list[Event]:
        """A piece of the answer's body; what is news in it."""
        if self._code != 200 or self._ask in (Ask.LIST, Ask.PROBE):
            self._body.append(data)
            return []
        events: list[Event] = []
        try:
            for line in self._lines.feed(data):
                if self.over:
                    break
                events += self._message(decode_json(_watch_events, line))
        except ValueError as error:
            self._break_off(f"not a watch event: {error}")
        return events

    def _break_off(self, reason: str) -> None:
        self._reason, self.over = reason, True

    def _message(self, message: _WatchEvent) -> list[Event]:
        match message.type:
            case "ADDED" | "MODIFIED" | "DELETED":
                return self._change(message.object, deleted=message.type == "DELETED")
            case "BOOKMARK":
                metadata = decode_json(_bookmarks, message.object).metadata
                if self._listing is None:
                    self._advance(metadata.resource_version)
                elif INITIAL_EVENTS_END in (metadata.annotations or {}):
                    return self._conclude(metadata.resource_version)
            case "ERROR":
                status = _status(message.object)
                if status.code == 410:
                    self._expire()
                self._break_off(status.message or f"error {status.code}")
        return []

    def _change(self, raw: msgspec.Raw, *, deleted: bool) -> list[Event]:
        metadata = self._metadata(raw)
        key = self._key(metadata)
        if self._listing is not None:
            if deleted:
                self._listing.remove(key)
            else:
                self._listing.add(key, metadata.resource_version, lambda: self._decode(raw))
            return []
        self._advance(metadata.resource_version)
        if self.over or not metadata.name:
            return []
        if deleted:
            self.known.pop(key, None)
            return [Delete(self.resource.record, key)]
        found = self._decode(raw)
        self.known[found.name if found else key] = metadata.resource_version
        return [Upsert(found)] if found else []

    def _metadata(self, raw: msgspec.Raw) -> _Metadata:
        """Who an object is; without a name if it does not say so."""
        try:
            metadata = decode_json(_objects, raw).metadata
            reason = "metadata.name is empty"
        except ValueError as error:
            metadata, reason = _Metadata(), str(error)
        if not metadata.name:
            self.invalid.append(InvalidObject(f"{self.resource.kind} without a name", reason))
        return metadata

    def _key(self, metadata: _Metadata) -> Name | str:
        if self.resource.namespaced:
            return Name(metadata.namespace or "default", metadata.name)
        return metadata.name

    def _decode(self, raw: msgspec.Raw) -> Object | None:
        try:
            return decode(self.resource.kind, raw)
        except InvalidObject as error:
            self.invalid.append(error)
            return None

    def _advance(self, version: str) -> None:
        """A message of the watch has arrived, which is the proof that all is well."""
        if _behind(version, self.version):
            self._distrust()
            self._break_off("resource versions went backwards")
            return
        self.version = self._latest = version or self.version
        self._messages += 1
        self._failures = self._gone = 0

    # lists

    def _conclude(self, version: str) -> list[Event]:
        """A list is complete as of `version`; the difference to what was known."""
        listing, self._listing = self._listing, None
        assert listing is not None
        self._paged = self._whole = False
        if _behind(version, self._latest):
            self._distrust()
            self._break_off("resource versions went backwards")
            return []
        events: list[Event] = [Upsert(new) for new in listing.news.values()]
        gone = [key for key in self.known if key not in listing.versions]
        if listing.nameless:  # any of those that seem to be gone may be the one without a name
            listing.versions.update((key, self.known[key]) for key in gone)
        else:
            events += [Delete(self.resource.record, key) for key in gone]
        self.known = listing.versions
        self.version = self._latest = version
        self.complete = self.settled = True
        self._failures = 0
        return events

    def _page(self, body: bytes) -> Step:
        listing = self._listing
        assert listing is not None
        try:
            page = decode_json(_lists, body)
        except ValueError as error:
            return self._failed(Trouble("refused", f"the answer is not a list: {error}"))
        for raw in page.items or ():
            metadata = self._metadata(raw)
            listing.add(
                self._key(metadata),
                metadata.resource_version,
                lambda raw=raw: self._decode(raw),  # type: ignore[misc]
            )
        if page.metadata.token:
            listing.token = page.metadata.token
            return Step([])
        if not page.metadata.resource_version:
            return self._failed(Trouble("refused", "its list has no resource version"))
        return Step(self._conclude(page.metadata.resource_version), self._relist_delay())

    def _relist_delay(self) -> float:
        return self._backoff(self._gone - 1) if self.listing and self._gone else 0.0

    def start_over(self) -> None:
        """Something unforeseen has happened: list anew, and take nothing for known."""
        self._distrust()

    def _expire(self) -> None:
        """The version is too old to go on from: list anew."""
        self.version, self._doubt, self._listing = "", False, None
        self._gone += 1

    def _distrust(self) -> None:
        """The server went back in time: known versions may stand for other contents now."""
        self.known = dict.fromkeys(self.known, "")
        self._latest = ""
        self._expire()

    # ends

    def finished(self, broken: str = "", lasted: float = 0.0) -> Step:
        """The answer is over, or there is none; `broken` says what went wrong, if something did.

        A watch that `lasted` longer than the longest delay, in seconds, is no reason for a longer
        one: connections are cut when nothing happens for a while.
        """
        body, self._body = b"".join(self._body), []
        if not self._code:
            return self._failed(Trouble("unreachable", broken))
        if self._code != 401:
            self._rejected = 0
        if self._code != 200:
            return self._refused(_status(body, self._code))
        if self._ask in (Ask.WATCH, Ask.STREAM):
            if lasted > self._timing.backoff[1]:
                self._failures = 0
            return self._watch_ended(broken or self._reason)
        if broken:
            return self._failed(Trouble("unreachable", f"the answer broke off: {broken}"))
        return self._page(body) if self._ask is Ask.LIST else self._probed(body)

    def _watch_ended(self, broken: str) -> Step:
        if self._listing is not None:  # a server that cannot stream after all, or a bad moment
            self._listing, self._paged = None, True
            return self._failed()
        if self.listing:
            return Step([], self._relist_delay())
        return self._failed() if broken or not self._messages else Step([])

    def _probed(self, body: bytes) -> Step:
        try:
            version = decode_json(_lists, body).metadata.resource_version
        except ValueError as error:
            return self._failed(Trouble("refused", f"the answer is not a list: {error}"))
        self._doubt = False
        if _behind(version, self.version):
            self._distrust()
            return Step([], self._relist_delay())
        return Step([])

    def _refused(self, status: _Status) -> Step:
        code, words = self._code, status.message or status.reason or "no reason given"
        match code:
            case 410 if self._ask is Ask.LIST and self._listing and self._listing.token:
                self._listing, self._whole = None, True
                return Step([])
            case 410 if self._ask in (Ask.WATCH, Ask.STREAM):
                self._expire()
                return Step([], self._relist_delay())
            case 400 | 422 if self._ask is Ask.STREAM:
                self._streams, self._listing = False, None
                return Step([])
            case 401:
                self._rejected += 1
                if self._rejected == 1:  # the token ran out; the caller has got a new one by now
                    return Step([])
                return self._failed(Trouble("unauthorized", words))
            case 403 | 404:
                return self._denied("forbidden" if code == 403 else "absent", words)
            case 429:
                return self._failed(Trouble("busy", "429"))
            case _ if code >= 500:
                return self._failed(Trouble("unreachable", f"it answers {code}: {words}"))
        return self._failed(Trouble("refused", f"it answers {code}: {words}"))

    def _denied(self, kind: Literal["forbidden", "absent"], words: str) -> Step:
        step = self._failed(Trouble(kind, words))
        if self.resource.required:
            return step
        self.settled = True
        return step._replace(delay=self._timing.optional_retry)

    def _failed(self, trouble: Trouble | None = None) -> Step:
        """Try again later: when the server says so, and never all nodes at once."""
        self.errors += 1
        self._doubt = bool(self.version)
        delay = self._backoff(self._failures)
        self._failures += 1
        if self._code in (429, 503) and self._retry_after.isdecimal():
            delay += min(float(self._retry_after), MAX_RETRY_AFTER)
        return Step([], delay, trouble)

    def _backoff(self, failures: int) -> float:
        first, longest = self._timing.backoff
        return self._random.uniform(0.0, min(longest, first * 2.0 ** min(failures, 16)))
