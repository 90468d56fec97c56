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
"""

from __future__ import annotations

import os
import select
import stat
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from structlog.typing import FilteringBoundLogger

from agent.sources.manifests.documents import Unusable, objects_of
from agent.sources.manifests.places import (
    STDIN,
    ManifestError,
    Place,
    not_readable,
    os_reason,
    resolve,
)
from agent.sources.manifests.watching import Inotify, Polling, Stale, Watch
from rules.decode import KINDS
from rules.events import Delete, Event, Synced, Upsert
from rules.objects import InvalidObject, Name, Object

MAX_FILE_BYTES = 512 * 2**20

__all__ = ["Content", "Follower", "ManifestError", "Problem", "read"]


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

    @property
    def whole(self) -> bool:
        """Whether nothing of the file could be used."""
        return not self.subject and not self.warning


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
    for place in resolve(places):
        if place.kind == "stream":
            files[place.path] = _load(place.path, partial(_stream, place.path), {})
            continue
        try:
            paths = place.files()
        except OSError as error:
            raise not_readable(place.path, error) from None
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
        self._places = resolve(places)
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
        self._watch: Watch = Polling(self._wake)

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
        stale: Stale = None
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
        broken = [p for p in self._complaints if p.whole]
        if broken:
            self._log.warning(
                "nothing is programmed until every manifest has been read once",
                paths=sorted(p.path for p in broken),
            )
        return not broken

    def _best_watch(self) -> Watch:
        try:
            return Inotify(self._wake)
        except OSError as error:
            return self._fall_back(error)

    def _fall_back(self, error: OSError) -> Watch:
        self._log.warning(
            "inotify cannot be had; manifests are looked at once a second instead. If a limit is "
            "the reason, raise fs.inotify.max_user_instances or fs.inotify.max_user_watches",
            reason=os_reason(error),
        )
        return Polling(self._wake)

    def _read_streams(self) -> None:
        for place in self._places:
            if place.kind == "stream":
                source = partial(_stream, place.path, self._wake)
                self._files[place.path][place.path] = _load(place.path, source, {})

    def _refresh(self, stale: Stale) -> dict[_Key, Object]:
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

    def _reread(self, place: Place, stale: Stale) -> Problem | None:
        before = self._files[place.path]
        try:
            paths = place.files()
        except OSError as error:
            return _broken(place.path, os_reason(error), kept=bool(before))
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


# --- reading ------------------------------------------------------------------------------------

_Key = tuple[type[Object], Name | str]


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
        found = list(objects_of(source()))
    except OSError as error:
        return _File(before, [_broken(path, f"cannot be read: {os_reason(error)}", bool(before))])
    except Unusable as error:
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
            raise Unusable("is not a regular file")
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
        raise Unusable(f"is larger than {MAX_FILE_BYTES >> 20} MiB; split it")
    return data
