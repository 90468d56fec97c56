"""Services, EndpointSlices, Nodes and ServiceCIDRs from files, read once or followed.

A *place* is a file, a directory (its `*.yaml`, `*.yml` and `*.json`, sorted, not those below it,
not hidden ones) or `-`, standard input. A *file* holds YAML documents or JSON documents: single
objects, a `List`, or what the API answers (`kubectl get --raw`). Its first byte tells JSON from
YAML, not its name. JSON goes to the decoder as it is and is the fast way (some 75 MB a second);
YAML is built as Python objects first (some 5 MB a second), so less of it is taken.

What is known is kept until something better is there, for half a cluster looks like deletions:

- A file that cannot be parsed, or a link that leads nowhere, keeps what it held when it last
  could be read.
- An object that cannot be used keeps its last good form from that file. Where it is so broken that
  nobody can tell which object it is, it may be any of its kind that the file held before: those
  that are missing now stay until the file is in order.
- A directory that vanishes keeps its files. A file that vanishes from a directory that is there,
  and an object that vanishes from a file in order, are gone.

The same object in two files is the later one's, in the order of the places and then of the names;
when that one goes, the other one's counts again.

Following uses inotify on directories, never on files, since most writers replace files. Every
directory entry on the way to a file is watched, symlinks and their targets included. So a change
is seen wherever it is made: at a link, at its target, or at a directory further up. ConfigMap
volumes are the case in point: `svc.yaml` leads to `..data/svc.yaml`, `..data` to a directory named
after a time, and an update replaces the link `..data` in one rename. Such a directory is listed
through `..data`, whose content is complete at any moment, while the links beside it are brought up
to date one by one (`AtomicWriter` in kubernetes' pkg/volume/util/atomic_writer.go).

A file is read when its writer has closed it, when it was moved or linked into place; a file that
is merely there may be half written, and half a YAML file is often good YAML. There is no delay to
wait for more, so a writer who removes the file and then writes it anew is seen doing so: move the
new file over the old one instead. Only where inotify cannot be had (its instances and watches are
few, and containers share them) are files looked at once a second.

Nobody trusts a file. Sizes are bounded, and so are the nesting of YAML and what its aliases
expand to (a few lines can stand for gigabytes).
"""

from __future__ import annotations

import errno
import json
import os
import re
import select
import stat
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import inotify_simple
import msgspec
import yaml
from inotify_simple import flags
from structlog.typing import FilteringBoundLogger

from agent.events import Delete, Event, Synced, Upsert
from rules.objects import KINDS, InvalidObject, Name, Object, decode_any

MAX_FILE_BYTES = 512 * 2**20
MAX_YAML_BYTES = 32 * 2**20
MAX_YAML_DEPTH = 100
MAX_ALIASED_BYTES = 8 * 2**20
"""What all aliases of a YAML file may stand for together, in characters of scalars."""

POLL_SECONDS = 1.0
SUFFIXES = (".yaml", ".yml", ".json")
STDIN = "-"


class ManifestError(Exception):
    """A place that is not there or cannot be read; says which and what to do."""


class Problem(NamedTuple):
    """What is wrong with a file, or with one object of it if `subject` is not empty.

    `warning` is true where nothing is lost but somebody should know.
    """

    path: str
    subject: str
    reason: str
    warning: bool = False

    def __str__(self) -> str:
        return ": ".join(part for part in self[:3] if part)


class Content(NamedTuple):
    """What some places hold: each object once, and what was wrong."""

    objects: list[Object]
    problems: list[Problem]


def read(places: Sequence[str]) -> Content:
    """What `places` hold now.

    Files that cannot be parsed, and unreadable files in directories, are among the problems.
    Raises ManifestError for a place that is not there or cannot be read.
    """
    files: dict[str, _File] = {}
    for place in _places(places):
        if place.kind == "stream":
            files[place.path] = _load(place.path, partial(_stream, place.path), {})
            continue
        try:
            paths = place.files()
        except OSError as error:
            raise _not_readable(place.path, error) from None
        files.update((path, _load(path, partial(_bytes, path), {})) for path in paths)
    objects, problems = _merge(files.items())
    return Content(list(objects.values()), problems)


class Follower(threading.Thread):
    """Tells a loop what some places hold, and from then on what changes there.

    `put` is called in this thread: first with one list of all Upserts and a Synced (which waits
    for files that cannot be parsed to be in order), then with a list for every change that made a
    difference, its Upserts before its Deletes. What is wrong
    with the files is logged, each thing once for as long as it lasts. Standard input is read to
    its end before anything is told, and not followed.

    Raises ManifestError, at once, for a place that is not there or cannot be read.
    """

    def __init__(
        self,
        places: Sequence[str],
        put: Callable[[list[Event]], None],
        log: FilteringBoundLogger,
    ) -> None:
        super().__init__(name="manifests", daemon=True)
        self._places = _places(places)
        for place in self._places:
            if place.kind == "stream" and place.path != STDIN:
                raise ManifestError(
                    f"{place.path}: is not a regular file, so it cannot be followed; pipe it into "
                    f"standard input and give {STDIN}"
                )
        self._put = put
        self._log = log
        self._files: dict[str, dict[str, _File]] = {place.path: {} for place in self._places}
        self._told: dict[_Key, Object] = {}
        self._complaints: set[Problem] = set()
        self._stopping = threading.Event()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._watch: _Watch = _Polling(self._wake)

    def stop(self) -> None:
        """End the thread and wait for it: at most as long as reading one file takes."""
        if self._wake < 0:
            return
        self._stopping.set()
        os.eventfd_write(self._wake, 1)
        if self.is_alive():
            self.join()
        os.close(self._wake)
        self._wake = -1

    def run(self) -> None:
        """The thread's work; use `start`."""
        try:
            self._watch = self._best_watch()
            self._read_streams()
            self._follow()
        except Exception:
            # nobody else would notice that the thread is gone
            self._log.exception("manifests are no longer followed; restart to follow them again")
        finally:
            self._watch.close()

    def _follow(self) -> None:
        stale: _Stale = None
        synced = False
        while not self._stopping.is_set():
            events = self._news(self._refresh(stale))
            if self._stopping.is_set():
                return
            if not synced and self._complete():
                events.append(Synced())
                synced = True
            if events:
                self._put(events)
            stale = self._watch.wait()

    def _complete(self) -> bool:
        """Whether every file could be parsed as a whole.

        Until that has been so once, an agent that starts again must not take what it cannot see
        for deleted.
        """
        broken = [p for p in self._complaints if not p.subject and not p.warning]
        if broken:
            self._log.warning(
                "nothing is programmed until every manifest has been read once",
                paths=sorted(p.path for p in broken),
            )
        return not broken

    def _best_watch(self) -> _Watch:
        try:
            return _Inotify(self._wake)
        except OSError as error:
            return self._fall_back(error)

    def _fall_back(self, error: OSError) -> _Watch:
        self._log.warning(
            "inotify cannot be had; manifests are looked at once a second instead. If a limit is "
            "the reason, raise fs.inotify.max_user_instances or fs.inotify.max_user_watches",
            reason=_os_reason(error),
        )
        return _Polling(self._wake)

    def _read_streams(self) -> None:
        for place in self._places:
            if place.kind == "stream":
                source = partial(_stream, place.path, self._wake)
                self._files[place.path][place.path] = _load(place.path, source, {})

    def _refresh(self, stale: _Stale) -> dict[_Key, Object]:
        """All objects, after reading again what is stale; later changes will be noticed."""
        followed = [place for place in self._places if place.kind != "stream"]
        try:
            self._watch.follow(followed)  # before reading, so that nothing falls in between
        except OSError as error:
            self._watch.close()
            self._watch = self._fall_back(error)
            self._watch.follow(followed)
        gone = [problem for place in followed if (problem := self._reread(place, stale))]
        objects, problems = _merge(
            item for place in self._places for item in self._files[place.path].items()
        )
        self._complain([*gone, *problems])
        return objects

    def _reread(self, place: _Place, stale: _Stale) -> Problem | None:
        before = self._files[place.path]
        try:
            paths = place.files()
        except OSError as error:
            return _broken(place.path, _os_reason(error), kept=bool(before))
        files = self._files[place.path] = {}
        everything = stale is None or place.path in stale
        for path in paths:
            known = before.get(path)
            if self._stopping.is_set():
                break
            if everything or (stale and path in stale):
                files[path] = _load(path, partial(_bytes, path), known.objects if known else {})
            elif known:
                files[path] = known
            # else it is being written, and its writer will close it
        return None

    def _news(self, objects: dict[_Key, Object]) -> list[Event]:
        """What the loop has not been told yet."""
        told, self._told = self._told, objects
        news: list[Event] = [
            Upsert(object)
            for key, object in objects.items()
            if (old := told.get(key)) is not object and old != object
        ]
        news += [Delete(*key) for key in told if key not in objects]
        return news

    def _complain(self, problems: list[Problem]) -> None:
        for problem in problems:
            if problem in self._complaints:
                continue
            log = self._log.warning if problem.warning else self._log.error
            where = {"object": problem.subject} if problem.subject else {}
            log("manifest not in order", path=problem.path, **where, reason=problem.reason)
        self._complaints = set(problems)


# --- places -------------------------------------------------------------------------------------


class _Place(NamedTuple):
    path: str
    kind: Literal["file", "directory", "stream"]

    @property
    def listed(self) -> str:
        """The directory whose entries count: in a ConfigMap volume the one behind the links."""
        payload = os.path.join(self.path, "..data")
        return payload if os.path.isdir(payload) else self.path

    def files(self) -> list[str]:
        """The paths of the files that are there.

        Raises OSError where that is unknown because a directory is gone: not the same as no files.
        """
        if self.kind == "directory":
            listed = self.listed
            paths = [os.path.join(listed, n) for n in sorted(os.listdir(listed)) if _is_manifest(n)]
            return [path for path in paths if not os.path.isdir(path)]
        if os.path.lexists(self.path):
            return [self.path]
        os.stat(os.path.dirname(self.path) or ".")
        return []


def _is_manifest(name: str) -> bool:
    return name.endswith(SUFFIXES) and not name.startswith(".")


def _places(texts: Sequence[str]) -> list[_Place]:
    return [_place(text) for text in dict.fromkeys(texts)]


def _place(path: str) -> _Place:
    if path == STDIN:
        if sys.stdin is None or sys.stdin.closed:
            raise ManifestError(f"{STDIN}: standard input is closed; pipe the manifests into it")
        return _Place(path, "stream")
    try:
        mode = os.stat(path).st_mode
        if not os.access(path, os.R_OK | (os.X_OK if stat.S_ISDIR(mode) else 0)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise _not_readable(path, error) from None
    if stat.S_ISDIR(mode):
        return _Place(path, "directory")
    return _Place(path, "file" if stat.S_ISREG(mode) else "stream")


def _not_readable(path: str, error: Exception) -> ManifestError:
    todo = (
        "let this user read it"
        if isinstance(error, PermissionError)
        else f"give a manifest file, a directory of them, or {STDIN} for standard input"
    )
    return ManifestError(f"{path}: {_os_reason(error)}; {todo}")


def _os_reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


# --- reading ------------------------------------------------------------------------------------

_Key = tuple[type[Object], Name | str]


class _Unusable(ValueError):
    """A file of which nothing can be used, and why."""


class _File(NamedTuple):
    """What a file holds, or held when it last was in order."""

    objects: Mapping[_Key, Object]
    problems: Sequence[Problem]


def _key(object: Object) -> _Key:
    return type(object), object.name


def _subject(object: Object) -> str:
    """The object's name in the words of InvalidObject.subject."""
    name = object.name if isinstance(object.name, Name) else Name("default", object.name)
    return f"{type(object).__name__} {name}"


def _broken(path: str, reason: str, kept: bool) -> Problem:
    return Problem(path, "", reason + ("; what it held before stays in use" if kept else ""))


def _load(path: str, source: Callable[[], bytes], before: Mapping[_Key, Object]) -> _File:
    """What the bytes of `source` say; from `before` what they should have said but do not."""
    try:
        found = list(_objects(source()))
    except OSError as error:
        return _File(before, [_broken(path, f"cannot be read: {_os_reason(error)}", bool(before))])
    except _Unusable as error:
        return _File(before, [_broken(path, str(error), bool(before))])
    objects: dict[_Key, Object] = {}
    problems = []
    for one in found:
        if isinstance(one, InvalidObject):
            continue
        if _key(one) in objects:
            reason = "is there more than once; the last one counts"
            problems.append(Problem(path, _subject(one), reason, warning=True))
        objects[_key(one)] = one
    missing = {key: object for key, object in before.items() if key not in objects}
    for one in found:
        if isinstance(one, InvalidObject):
            kept = {key: object for key, object in missing.items() if _may_be(one, object)}
            objects |= kept
            problems.append(Problem(path, one.subject, one.reason + _kept_text(one, kept)))
    return _File(objects, problems)


def _kept_text(broken: InvalidObject, kept: Mapping[_Key, Object]) -> str:
    if not kept:
        return ""
    if broken.subject in map(_subject, kept.values()):
        return "; its last good form stays in use"
    return f"; nobody can tell which one it is, so {len(kept)} that the file held before stay"


def _may_be(broken: InvalidObject, object: Object) -> bool:
    """Whether an object that cannot be used may be this one, by what is known of its name.

    Its subject is "Service namespace/name" at best, else "Service without a name" or less.
    """
    kind, _, name = broken.subject.partition(" ")
    known_kind, _, known_name = _subject(object).partition(" ")
    if kind in KINDS and kind != known_kind:
        return False
    nameless = "/" not in name or name.endswith("/")
    return nameless or name == known_name


def _merge(files: Iterable[tuple[str, _File]]) -> tuple[dict[_Key, Object], list[Problem]]:
    """All objects, later files before earlier ones, and all problems."""
    objects: dict[_Key, Object] = {}
    holders: dict[_Key, str] = {}
    problems: list[Problem] = []
    for path, file in files:
        problems += file.problems
        for key, object in file.objects.items():
            if key in holders and holders[key] != path:
                reason = f"is also in {path}, which counts"
                problems.append(Problem(holders[key], _subject(object), reason, warning=True))
            objects[key] = object
            holders[key] = path
    return objects, problems


def _bytes(path: str) -> bytes:
    # a FIFO among the files would block the open without O_NONBLOCK
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise _Unusable("is not a regular file")
        return _bounded(file.read(MAX_FILE_BYTES + 1))


def _stream(path: str, wake: int | None = None) -> bytes:
    """All of a stream; what has come so far as soon as `wake` can be read."""
    if path != STDIN:
        with open(path, "rb") as file:
            return _bounded(file.read(MAX_FILE_BYTES + 1))
    fd, chunks, size = sys.stdin.fileno(), [], 0
    poller = select.poll()
    for each in (fd, wake):
        if each is not None:
            poller.register(each, select.POLLIN)
    while size <= MAX_FILE_BYTES and wake not in dict(poller.poll()):
        chunk = os.read(fd, 2**20)
        if not chunk:
            break
        chunks.append(chunk)
        size += len(chunk)
    return _bounded(b"".join(chunks))


def _bounded(data: bytes) -> bytes:
    if len(data) > MAX_FILE_BYTES:
        raise _Unusable(f"is larger than {MAX_FILE_BYTES >> 20} MiB; split it")
    return data


# --- documents ----------------------------------------------------------------------------------

_any_json = msgspec.json.Decoder(msgspec.Raw)
_NOT_BLANK = re.compile(r"\S")


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


# finds where a document ends; what it holds is thrown away at once
_json_extent = json.JSONDecoder(object_pairs_hook=lambda pairs: None, parse_constant=_no_constant)


def _objects(data: bytes) -> Iterator[Object | InvalidObject]:
    """The objects of a file. Raises _Unusable if it cannot be parsed as a whole."""
    try:
        for document in _documents(data):
            yield from decode_any(document)
    except RecursionError:
        raise _Unusable("is nested too deep") from None


def _documents(data: bytes) -> Iterator[bytes]:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise _Unusable(
            f"is not UTF-8 text (byte 0x{byte:02x} at offset {error.start}); is it a manifest?"
        ) from None
    if text.startswith("\ufeff"):
        text, data = text[1:], data[3:]
    first = _NOT_BLANK.search(text)
    if not first:
        raise _Unusable('is empty; where no objects are meant, write "kind: List"')
    if first[0] in "{[":
        yield from _json_documents(text, data)
    elif len(data) > MAX_YAML_BYTES:
        raise _Unusable(f"is YAML of more than {MAX_YAML_BYTES >> 20} MiB; use JSON or split it")
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
            raise _Unusable(f"is not JSON: {reason}, document of line {line}") from None
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
        raise _Unusable(f"is not YAML: {' '.join(reason.split())}") from None


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
        """The documents, one after the other. Raises YAMLError and _Unusable."""
        event: Any = self._parser.get_event()
        while not isinstance(event, yaml.StreamEndEvent):
            if act := self._acts.get(type(event)):
                try:
                    act(event)
                except ValueError as error:
                    line = event.start_mark.line + 1
                    raise _Unusable(f"is YAML of no use: line {line}: {error}") from None
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


# --- watching -----------------------------------------------------------------------------------

_Entry = tuple[str, str]
"""A directory without symlinks in its path, and a name in it."""

_Stale = set[str] | None
"""Paths of files to read again, and of places of which to read everything; None: all there is."""


class _Watch(Protocol):
    def follow(self, places: Sequence[_Place]) -> None:
        """Notice what changes in `places` from now on. Raises OSError if that cannot be."""

    def wait(self) -> _Stale:
        """What has changed, as soon as something has, or nothing when the thread is woken."""

    def close(self) -> None:
        """Watch no longer."""


class _Inotify:
    _MASK = (
        flags.CLOSE_WRITE
        | flags.MOVED_TO
        | flags.MOVED_FROM
        | flags.CREATE
        | flags.DELETE
        | flags.ONLYDIR
    )

    def __init__(self, wake: int) -> None:
        self._wake = wake
        self._inotify = inotify_simple.INotify()
        self._directories: dict[int, set[str]] = {}  # by watch; bind mounts share one
        self._ways: dict[_Entry, set[str]] = {}  # what leads through an entry
        self._listed: dict[str, set[str]] = {}  # by directory: the places' names for it

    def close(self) -> None:
        self._inotify.close()

    def follow(self, places: Sequence[_Place]) -> None:
        # a link may be changed before its target's directory is watched: look until nothing is new
        while True:
            self._ways = _ways(places)
            if not self._watch_directories({directory for directory, _ in self._ways}):
                break
        self._listed = {}
        for place in places:
            if place.kind == "directory":
                listed = place.listed
                self._listed.setdefault(os.path.realpath(listed), set()).add(listed)

    def _watch_directories(self, wanted: set[str]) -> bool:
        """Watch these directories and no others; whether one of them was not watched before.

        A directory that was replaced by another of its name counts as new.
        """
        watches: dict[int, set[str]] = {}
        for directory in wanted:
            try:
                watch = self._inotify.add_watch(directory, self._MASK)
            except (FileNotFoundError, NotADirectoryError):
                continue  # the directory above tells when it is there
            watches.setdefault(watch, set()).add(directory)
        for watch in self._directories.keys() - watches.keys():
            with suppress(OSError):  # it went with its directory
                self._inotify.rm_watch(watch)
        is_new = not watches.keys() <= self._directories.keys()
        self._directories = watches
        return is_new

    def wait(self) -> _Stale:
        poller = select.poll()
        poller.register(self._inotify.fileno(), select.POLLIN)
        poller.register(self._wake, select.POLLIN)
        while self._wake not in dict(poller.poll()):
            stale: set[str] = set()
            for event in self._inotify.read(timeout=0):
                if event.mask & flags.Q_OVERFLOW:
                    return None
                for directory in self._directories.get(event.wd, ()):
                    if self._counts(event.mask, os.path.join(directory, event.name)):
                        stale |= self._led_to(directory, event.name)
            if stale:
                return stale
        return set()

    def _led_to(self, directory: str, name: str) -> set[str]:
        stale = self._ways.get((directory, name), set())
        if _is_manifest(name):
            stale = stale | {os.path.join(at, name) for at in self._listed.get(directory, ())}
        return stale

    @staticmethod
    def _counts(mask: int, path: str) -> bool:
        """Whether there is something whole to read now, or nothing any more."""
        if mask & (flags.CLOSE_WRITE | flags.MOVED_TO):
            return True
        try:
            found = os.lstat(path)
        except OSError:
            return bool(mask & (flags.MOVED_FROM | flags.DELETE))
        # a new file will be closed; a directory, a symlink or a hard link will not
        return bool(mask & flags.CREATE) and (not stat.S_ISREG(found.st_mode) or found.st_nlink > 1)


def _ways(places: Iterable[_Place]) -> dict[_Entry, set[str]]:
    """For every entry that leads to a place or a file, the paths it leads to."""
    ways: dict[_Entry, set[str]] = {}
    for place in places:
        goals = {place.path: place.path}
        if place.kind == "directory":
            goals[place.path] = os.path.join(place.path, "..data")
            with suppress(OSError):
                goals.update((path, path) for path in place.files())
        for path, goal in goals.items():
            for entry in _way(goal):
                ways.setdefault(entry, set()).add(path)
    return ways


def _way(path: str) -> set[_Entry]:
    """The entries that are looked up, one after the other, to open `path`."""
    at, way, links = "/", set(), 0
    ahead = os.path.join(os.getcwd(), path).split("/")[::-1]
    while ahead:
        name = ahead.pop()
        if name in ("", "."):
            continue
        if name == "..":
            at = os.path.dirname(at)
            continue
        way.add((at, name))
        try:
            target = os.readlink(os.path.join(at, name))
        except OSError:
            at = os.path.join(at, name)
            continue
        links += 1
        if links > 40:  # as the kernel has it: a circle
            break
        at = "/" if target.startswith("/") else at
        ahead += target.split("/")[::-1]
    return way


class _Polling:
    def __init__(self, wake: int) -> None:
        self._wake = wake
        self._places: Sequence[_Place] = ()
        self._seen: dict[str, _Signature] = {}

    def close(self) -> None:
        pass

    def follow(self, places: Sequence[_Place]) -> None:
        self._places = places
        self._seen = _signatures(places)

    def wait(self) -> _Stale:
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        while not poller.poll(POLL_SECONDS * 1000):
            now = _signatures(self._places)
            stale = {path for path, _ in now.items() ^ self._seen.items()}
            if stale:
                return stale
        return set()


_Signature = tuple[int, ...]


def _signatures(places: Iterable[_Place]) -> dict[str, _Signature]:
    signatures: dict[str, _Signature] = {}
    for place in places:
        try:
            paths = place.files()
        except OSError:
            signatures[place.path] = ()
            continue
        for path in paths:
            try:
                found = os.stat(path)
            except OSError:
                signatures[path] = ()
            else:
                signatures[path] = (found.st_mtime_ns, found.st_size, found.st_ino)
    return signatures
