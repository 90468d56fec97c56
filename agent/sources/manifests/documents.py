"""From the bytes of a file to objects.

A file holds YAML documents or JSON documents: single objects, a `List`, or what the API answers
(`kubectl get --raw`). The first byte, not the name, decides between JSON and YAML. JSON is decoded
directly, some 30 MB a second; YAML becomes Python objects first, some 5 MB a second, so its limit
is smaller.

Files are not trusted. Their sizes are bounded, and so are the nesting of YAML and what its aliases
expand to (a few lines can expand to gigabytes).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import yaml

from rules.decode import decode_any
from rules.objects import InvalidObject, Object

MAX_YAML_BYTES = 32 * 2**20
MAX_YAML_DEPTH = 100
MAX_ALIASED_BYTES = 8 * 2**20
"""What all aliases of a YAML file may stand for together, in characters of scalars."""


class Unusable(ValueError):
    """A file of which nothing can be used, and why."""


_any_json = msgspec.json.Decoder(msgspec.Raw)
_NOT_BLANK = re.compile(r"\S")


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


# finds where a document ends; what it holds is thrown away at once
_json_extent = json.JSONDecoder(object_pairs_hook=lambda pairs: None, parse_constant=_no_constant)


def objects_of(data: bytes) -> Iterator[Object | InvalidObject]:
    """The objects of a file. Raises Unusable if it cannot be parsed as a whole."""
    try:
        for document in _documents(data):
            yield from decode_any(document)
    except RecursionError:
        raise Unusable("is nested too deep") from None


def _documents(data: bytes) -> Iterator[bytes]:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise Unusable(
            f"is not UTF-8 text (byte 0x{byte:02x} at offset {error.start}); is it a manifest?"
        ) from None
    if text.startswith("\ufeff"):
        text, data = text[1:], data[3:]
    first = _NOT_BLANK.search(text)
    if not first:
        raise Unusable('is empty; where no objects are meant, write "kind: List"')
    if first[0] in "{[":
        yield from _json_documents(text, data)
    elif len(data) > MAX_YAML_BYTES:
        raise Unusable(f"is YAML of more than {MAX_YAML_BYTES >> 20} MiB; use JSON or split it")
    else:
        yield from _yaml_documents(text)


def _json_documents(text: str, data: bytes) -> Iterator[bytes]:
    if _json_error(data) is None:
        yield data
        return
    start = 0
    while following := _NOT_BLANK.search(text, start):
        start = following.start()
        try:
            end = _json_extent.raw_decode(text, start)[1]
        except ValueError as error:
            reason = _json_error(text[start:].encode()) or error
            line = text.count("\n", 0, start) + 1
            raise Unusable(f"is not JSON: {reason}, document of line {line}") from None
        yield text[start:end].encode()
        start = end


def _json_error(data: bytes) -> str | None:
    try:
        _any_json.decode(data)
    except ValueError as error:
        return str(error)
    return None


def _yaml_documents(text: str) -> Iterator[bytes]:
    try:
        for document in _Composer(text).documents():
            if document is not None:
                yield msgspec.json.encode(document)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = f"line {mark.line + 1}: {getattr(error, 'problem', '')}" if mark else str(error)
        raise Unusable(f"is not YAML: {' '.join(reason.split())}") from None


# --- YAML ---------------------------------------------------------------------------------------

_CONSTANTS: dict[str, bool | None] = {
    form: value
    for value, words in (
        (None, ("", "~", "null")),
        (True, ("true", "yes", "on")),
        (False, ("false", "no", "off")),
    )
    for word in words
    for form in (word, word.title(), word.upper())
}
# without those of YAML 1.1 to the base of sixty, which some IPv6 addresses look like; how many
# digits there may be is bounded because int() takes quadratic time
_NUMBERS: tuple[tuple[re.Pattern[str], Callable[[str], int | float]], ...] = (
    (re.compile(r"[-+]?(?:0|[1-9][0-9]{0,30})"), int),
    (re.compile(r"[-+]?0[0-7]{1,30}"), lambda text: int(text, 8)),
    (re.compile(r"[-+]?0(?:x[0-9a-fA-F]{1,30}|b[01]{1,100})"), lambda text: int(text, 0)),
    (re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"), float),
)
_MERGE = object()  # the key <<


def _plain(text: str) -> bool | int | float | str | None:
    """The value of a scalar without quotes. Dates are strings, as Kubernetes has them."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if text[0] in "+-.0123456789":
        for pattern, parse in _NUMBERS:
            if pattern.fullmatch(text):
                return parse(text)
    return text


class _Collection:
    """A sequence or a mapping (its keys and values in turn) that is being read."""

    __slots__ = ("anchor", "is_mapping", "items", "size")

    def __init__(self, is_mapping: bool, anchor: str | None) -> None:
        self.is_mapping = is_mapping
        self.anchor = anchor
        self.items: list[Any] = []
        self.size = 1

    @property
    def wants_key(self) -> bool:
        return self.is_mapping and len(self.items) % 2 == 0

    def value(self) -> list[Any] | dict[Any, Any]:
        if not self.is_mapping:
            return self.items
        pairs = list(zip(self.items[::2], self.items[1::2], strict=True))
        mapping = dict(pairs)
        if _MERGE in mapping:
            del mapping[_MERGE]
            for key, source in pairs:
                if key is _MERGE:
                    mapping = _with_merged(mapping, source)
        return mapping


def _with_merged(mapping: dict[Any, Any], source: Any) -> dict[Any, Any]:
    for base in source if isinstance(source, list) else [source]:
        if not isinstance(base, dict):
            raise ValueError("<< is given something that is no mapping")  # noqa: TRY004
        mapping = base | mapping
    return mapping


class _Composer:
    """Builds plain values from the events of libyaml's parser, in a flat loop.

    libyaml's own composer overruns the C stack where nesting is deep, and PyYAML's constructors
    take five times as long. Tags change nothing but that a tagged scalar is a string.
    """

    def __init__(self, text: str) -> None:
        self._parser = yaml.CSafeLoader(text)
        self._opened = [_Collection(is_mapping=False, anchor=None)]  # the document's own list
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._aliased = 0
        self._acts: dict[type[yaml.Event], Callable[[Any], None]] = {
            yaml.ScalarEvent: self._scalar,
            yaml.AliasEvent: self._alias,
            yaml.SequenceStartEvent: self._start,
            yaml.MappingStartEvent: self._start,
            yaml.SequenceEndEvent: self._end,
            yaml.MappingEndEvent: self._end,
        }

    def documents(self) -> Iterator[Any]:
        """The documents, one after the other. Raises YAMLError and Unusable."""
        event: Any = self._parser.get_event()
        while not isinstance(event, yaml.StreamEndEvent):
            if act := self._acts.get(type(event)):
                try:
                    act(event)
                except ValueError as error:
                    line = event.start_mark.line + 1
                    raise Unusable(f"is YAML of no use: line {line}: {error}") from None
            elif isinstance(event, yaml.DocumentEndEvent):
                yield self._opened[0].items.pop()
                self._anchors.clear()
            event = self._parser.get_event()

    def _add(self, value: Any, size: int) -> None:
        parent = self._opened[-1]
        if parent.wants_key and not isinstance(value, str) and value is not _MERGE:
            raise ValueError("a key is not a string")
        parent.items.append(value)
        parent.size += size

    def _scalar(self, event: yaml.ScalarEvent) -> None:
        value: Any = event.value
        if event.implicit[0]:  # no quotes, no tag
            if not self._opened[-1].wants_key:
                value = _plain(value)
            elif value == "<<":
                value = _MERGE
        size = len(event.value) + 1
        if event.anchor is not None:
            self._anchors[event.anchor] = value, size
        self._add(value, size)

    def _alias(self, event: yaml.AliasEvent) -> None:
        if event.anchor not in self._anchors:
            raise ValueError(f"alias *{event.anchor} has no complete value before it")
        value, size = self._anchors[event.anchor]
        self._aliased += size
        if self._aliased > MAX_ALIASED_BYTES:
            raise ValueError(f"aliases stand for more than {MAX_ALIASED_BYTES >> 20} MiB")
        self._add(value, size)

    def _start(self, event: yaml.CollectionStartEvent) -> None:
        if len(self._opened) > MAX_YAML_DEPTH:
            raise ValueError(f"nested deeper than {MAX_YAML_DEPTH} levels")
        is_mapping = isinstance(event, yaml.MappingStartEvent)
        self._opened.append(_Collection(is_mapping, event.anchor))
        if event.anchor is not None:
            self._anchors.pop(event.anchor, None)  # nothing may hold itself

    def _end(self, event: yaml.CollectionEndEvent) -> None:
        ended = self._opened.pop()
        value = ended.value()
        if ended.anchor is not None:
            self._anchors[ended.anchor] = value, ended.size
        self._add(value, ended.size)
