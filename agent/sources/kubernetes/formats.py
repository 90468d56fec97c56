"""The two encodings of lists, watch events and errors in which the API server answers.

JSON: a list is one document, a watch is a line for each event. Protobuf: everything but a watch
event is in an envelope, `k8s\\0` and a message `Unknown` that holds the object in `raw`; a watch is
a frame for each event, 4 bytes of length in network order and a `WatchEvent`, whose object is in
such an envelope again. Protobuf has half the bytes.

https://kubernetes.io/docs/reference/using-api/api-concepts/#alternate-representations-of-resources
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import msgspec

from rules import decode
from rules.decode import decode_json
from rules.objects import Object

JSON_TYPE = "application/json"
PROTOBUF_TYPE = "application/vnd.kubernetes.protobuf"

MAX_EVENT_BYTES = 16 * 2**20
"""etcd takes objects of at most 1.5 MiB by default; anything larger than this is not an event."""

INITIAL_EVENTS_END = "k8s.io/initial-events-end"

Encoded = Any
"""One object in a format's encoding: `msgspec.Raw` or bytes."""


class EventTooLarge(ValueError):
    """A watch event of more than MAX_EVENT_BYTES."""

    def __init__(self) -> None:
        super().__init__(f"an event of more than {MAX_EVENT_BYTES >> 20} MiB")


class Identity(NamedTuple):
    """Which object, in which version."""

    name: str
    namespace: str
    version: str


class Page(NamedTuple):
    """A list or a part of it; `token` continues it and is empty at the end."""

    version: str
    token: str
    items: Iterable[Encoded]


class WatchEvent(NamedTuple):
    """An event of a watch."""

    type: str
    object: Encoded


class Bookmark(NamedTuple):
    """A version up to which nothing is missing; `ends_list` ends the list of a streaming watch."""

    version: str
    ends_list: bool


class Status(NamedTuple):
    """An error."""

    code: int
    reason: str = ""
    message: str = ""


class Splitter(Protocol):
    """Cuts the bytes of a watch, however they arrive, into events."""

    def feed(self, data: bytes) -> list[bytes]:
        """The events that are complete now. Raises EventTooLarge."""


class Format(Protocol):
    """An encoding. All methods but `status` raise ValueError for what is not in that encoding."""

    def splitter(self) -> Splitter:
        """A new splitter, for one watch."""

    def event(self, data: bytes) -> WatchEvent:
        """An event that a splitter has cut out."""

    def page(self, body: bytes) -> Page:
        """The body of a list."""

    def identity(self, item: Encoded) -> Identity:
        """The identity of an object of any kind."""

    def bookmark(self, item: Encoded) -> Bookmark:
        """The object of a BOOKMARK event."""

    def record(self, kind: str, item: Encoded) -> Object:
        """An object of a known kind. Raises InvalidObject."""

    def listed(self, kind: str, item: Encoded) -> tuple[Object, str]:
        """An object and its resource version, in one pass. Raises InvalidObject."""

    def error(self, item: Encoded) -> Status:
        """The object of an ERROR event."""

    def status(self, body: bytes, code: int) -> Status:
        """The body of an answer with an error code, which may hold anything."""


def format_of(content_type: str) -> Format:
    """The format of an answer with this Content-Type; JSON if it is unknown."""
    if content_type.startswith(PROTOBUF_TYPE):
        # 3 MB of libraries, where a server answers with it
        from agent.sources.kubernetes.protobuf import PROTOBUF

        return PROTOBUF
    return JSON


# --- JSON ---------------------------------------------------------------------------------------


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


class Lines:
    """Cuts lines. Each byte is copied at most twice."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> list[bytes]:
        """See Splitter."""
        first, *others = data.split(b"\n")
        self._pieces.append(first)
        self._size += len(first)
        if self._size > MAX_EVENT_BYTES:
            raise EventTooLarge
        if not others:
            return []
        lines = [b"".join(self._pieces), *others]
        rest = lines.pop()
        self._pieces, self._size = [rest], len(rest)
        return [line for line in lines if line]


class _Json:
    def splitter(self) -> Splitter:
        return Lines()

    def event(self, data: bytes) -> WatchEvent:
        event = decode_json(_watch_events, data)
        return WatchEvent(event.type, event.object)

    def page(self, body: bytes) -> Page:
        page = decode_json(_lists, body)
        return Page(page.metadata.resource_version, page.metadata.token or "", page.items or ())

    def identity(self, item: Encoded) -> Identity:
        metadata = decode_json(_objects, item).metadata
        return Identity(metadata.name, metadata.namespace, metadata.resource_version)

    def bookmark(self, item: Encoded) -> Bookmark:
        metadata = decode_json(_bookmarks, item).metadata
        annotations = metadata.annotations or {}
        return Bookmark(metadata.resource_version, INITIAL_EVENTS_END in annotations)

    def record(self, kind: str, item: Encoded) -> Object:
        return decode.decode(kind, item)

    def listed(self, kind: str, item: Encoded) -> tuple[Object, str]:
        return decode.decode(kind, item), self.identity(item).version

    def error(self, item: Encoded) -> Status:
        status = decode_json(_statuses, item)
        return Status(status.code, status.reason or "", status.message or "")

    def status(self, body: bytes, code: int) -> Status:
        try:
            return self.error(body)._replace(code=code)
        except ValueError:  # a load balancer's words, for instance
            return Status(code)


JSON: Format = _Json()
