"""The API's protobuf as a format. It is imported when a server answers with it.

See `agent.sources.kubernetes.formats`.
"""

from __future__ import annotations

import struct

from agent.sources.kubernetes import formats
from agent.sources.kubernetes.formats import (
    INITIAL_EVENTS_END,
    Bookmark,
    Encoded,
    EventTooLarge,
    Format,
    Identity,
    Page,
    Splitter,
    Status,
    WatchEvent,
)
from rules import decode_protobuf
from rules.objects import Object

_MAGIC = b"k8s\0"
_LENGTH = struct.Struct("!I")


class Frames:
    """Cuts frames: 4 bytes of length in network order, then that many bytes."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """See Splitter."""
        buffer, frames, start = self._buffer, [], 0
        buffer += data
        available = len(buffer)
        with memoryview(buffer) as view:
            while available - start >= 4:
                (length,) = _LENGTH.unpack_from(view, start)
                if length > formats.MAX_EVENT_BYTES:
                    raise EventTooLarge
                end = start + 4 + length
                if available < end:
                    break
                frames.append(bytes(view[start + 4 : end]))
                start = end
        del buffer[:start]
        return frames


def _unwrapped(data: bytes) -> bytes:
    """The message in an envelope."""
    if not data.startswith(_MAGIC):
        raise ValueError(f"does not begin with {_MAGIC!r}")
    raw: bytes = decode_protobuf.parse("Unknown", data[len(_MAGIC) :]).raw
    return raw


class _Protobuf:
    def splitter(self) -> Splitter:
        return Frames()

    def event(self, data: bytes) -> WatchEvent:
        event = decode_protobuf.parse("WatchEvent", data)
        return WatchEvent(event.type, _unwrapped(event.object.raw))

    def page(self, body: bytes) -> Page:
        page = decode_protobuf.parse("AnyList", _unwrapped(body))
        return Page(page.metadata.resource_version, page.metadata.token, page.items)

    def identity(self, item: Encoded) -> Identity:
        metadata = decode_protobuf.parse("Identified", item).metadata
        return Identity(metadata.name, metadata.namespace, metadata.resource_version)

    def bookmark(self, item: Encoded) -> Bookmark:
        metadata = decode_protobuf.parse("AnyObject", item).metadata
        return Bookmark(metadata.resource_version, INITIAL_EVENTS_END in metadata.annotations)

    def record(self, kind: str, item: Encoded) -> Object:
        return decode_protobuf.decode(kind, item)[0]

    def listed(self, kind: str, item: Encoded) -> tuple[Object, str]:
        return decode_protobuf.decode(kind, item)

    def error(self, item: Encoded) -> Status:
        status = decode_protobuf.parse("Status", item)
        return Status(status.code, status.reason, status.message)

    def status(self, body: bytes, code: int) -> Status:
        try:
            return self.error(_unwrapped(body))._replace(code=code)
        except ValueError:
            return Status(code)


PROTOBUF: Format = _Protobuf()
