"""Services, EndpointSlices, Nodes and ServiceCIDRs from files, read once or followed.

A file holds YAML documents or JSON documents: single objects, a `List`, or an answer of the API
(`kubectl get --raw`). Its first byte decides between JSON and YAML, not its name.

What is known is kept until something better is there, because half a cluster looks like deletions:

- A file that cannot be parsed, or a link that leads nowhere, keeps the objects that it held when it
  could last be read.
- An object that cannot be used keeps its last valid form from that file. If it is so broken that it
  has no name, it may be any of its kind that the file held before: those that are missing now stay
  until the file is valid.
- A directory that vanishes keeps its files, and so does one without manifests, for that is what an
  unmounted volume, an emptied ConfigMap and a synchronization that failed look like. An operator
  who wants no objects leaves a file with `kind: List`.
- A file that vanishes from a directory that has others, and an object that vanishes from a valid
  file, are deleted.
- The same object in two files is the later one's, in the order of the paths given and then of the
  names. If that one is removed, the other one's is used again.
"""

from __future__ import annotations

import os
import select
import stat
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from structlog.typing import FilteringBoundLogger

from agent.sources.manifests.documents import Unusable, objects_of
from agent.sources.manifests.paths import (
    STDIN,
    ManifestError,
    ManifestPath,
    not_readable,
    os_reason,
    resolve,
)
from agent.sources.manifests.watching import Changes, ChangeWatch, InotifyWatch, PollingWatch
from agent.worker import Failed, Worker
from rules.decode import KINDS
from rules.events import Delete, Event, Synced, Upsert
from rules.objects import InvalidObject, Name, Object

MAX_FILE_BYTES = 512 * 2**20
MAX_LOGGED = 100
"""So many problems found at once are logged one by one."""
MAX_REASON = 500

__all__ = ["Content", "ManifestError", "ManifestFollower", "Problem", "read"]


class Problem(NamedTuple):
    """A problem of a file or directory, or of one object in a file if `subject` is not empty.

    `warning` is true if every object counts all the same.
    """

    path: str
    subject: str
    reason: str
    warning: bool = False

    def __str__(self) -> str:
        return ": ".join(part for part in self[:3] if part)

    @property
    def whole(self) -> bool:
        """Whether none of its objects is known: they may exist, but look deleted."""
        return not self.subject and not self.warning


class Content(NamedTuple):
    """The objects of some paths, each once, and the problems."""

    objects: list[Object]
    problems: list[Problem]


def read(texts: Sequence[str]) -> Content:
    """The content of these paths now.

    Files that cannot be parsed, unreadable files in directories, and directories without manifests
    are among the problems. Raises ManifestError for a path that does not exist or cannot be read.
    """
    files: dict[str, _File] = {}
    for path in resolve(texts):
        if path.kind == "stream":
            files[path.path] = _load(path.path, partial(_stream, path.path), {})
            continue
        try:
            found = path.files()
        except OSError as error:
            raise not_readable(path.path, error) from None
        if not found:
            files[path.path] = _File({}, [_empty(path, kept=False)])
        files.update((file, _load(file, partial(_bytes, file), {})) for file in found)
    objects, problems = _merge(files.items())
    return Content(list(objects.values()), problems)


class ManifestFollower(Worker):
    """Gives a loop the objects of some paths, and from then on the changes.

    `put` is called in this thread: first with one list of all Upserts and a Synced (which waits
    until every file could be parsed once), then with a list for every change that made a
    difference, its Upserts before its Deletes. Each problem is logged once for as long as it lasts.
    Standard input is read to its end before the first list, and not followed.

    Raises ManifestError, at once, for a path that does not exist or cannot be read.
    """

    def __init__(
        self,
        texts: Sequence[str],
        put: Callable[[list[Event]], None],
        log: FilteringBoundLogger,
        failed: Failed,
    ) -> None:
        self._paths = resolve(texts)
        for path in self._paths:
            if path.kind == "stream" and path.path != STDIN:
                raise ManifestError(
                    f"{path.path}: is not a regular file, so it cannot be followed; pipe it into "
                    f"standard input and give {STDIN}"
                )
        super().__init__("manifests", failed)
        self._put = put
        self._log = log
        self._files: dict[str, dict[str, _File]] = {path.path: {} for path in self._paths}
        self._reported: dict[_Key, Object] = {}
        self._complaints: set[Problem] = set()
        self._watch: ChangeWatch = PollingWatch(self.wake_fd)

    def work(self) -> None:
        """See Worker."""
        try:
            self._watch = self._best_watch()
            self._read_streams()
            self._follow()
        finally:
            self._watch.close()

    def _follow(self) -> None:
        changes: Changes = None
        synced = False
        while not self.stopping:
            events = self._news(self._refresh(changes))
            if self.stopping:
                return
            if not synced and self._complete():
                events.append(Synced())
                synced = True
            if events:
                self._put(events)
            changes = self._watch.wait()

    def _complete(self) -> bool:
        """Whether everything could be read once.

        Until then an agent that starts must not take objects that it cannot see for deleted.
        """
        broken = sorted(p.path for p in self._complaints if p.whole)
        if broken:
            self._log.warning(
                "manifests_incomplete",
                paths=broken[:MAX_LOGGED],
                more=len(broken[MAX_LOGGED:]),
                consequence="nothing is programmed until every manifest has been read once",
            )
        return not broken

    def _best_watch(self) -> ChangeWatch:
        try:
            return InotifyWatch(self.wake_fd)
        except OSError as error:
            return self._fall_back(error)

    def _fall_back(self, error: OSError) -> ChangeWatch:
        self._log.warning(
            "inotify_unavailable",
            error=os_reason(error),
            consequence="manifests are polled once a second",
            advice="raise fs.inotify.max_user_instances or fs.inotify.max_user_watches if the"
            " error is a limit",
        )
        return PollingWatch(self.wake_fd)

    def _read_streams(self) -> None:
        for path in self._paths:
            if path.kind == "stream":
                source = partial(_stream, path.path, self.wake_fd)
                self._files[path.path][path.path] = _load(path.path, source, {})

    def _refresh(self, changes: Changes) -> dict[_Key, Object]:
        """All objects, after reading again what has changed; later changes will be noticed."""
        followed = [path for path in self._paths if path.kind != "stream"]
        try:
            self._watch.follow(followed)  # before reading, so that no change falls in between
        except OSError as error:
            self._watch.close()
            self._watch = self._fall_back(error)
            self._watch.follow(followed)
            changes = None  # inotify may have missed some
        unknown = [problem for path in followed if (problem := self._reread(path, changes))]
        objects, problems = _merge(
            item for path in self._paths for item in self._files[path.path].items()
        )
        self._complain([*unknown, *problems])
        return objects

    def _reread(self, given: ManifestPath, changes: Changes) -> Problem | None:
        """Reads again the changed files of a path; the problem if its files are unknown."""
        before = self._files[given.path]
        try:
            paths = given.files()
        except OSError as error:
            return _broken(given.path, os_reason(error), kept=bool(before))
        if given.kind == "directory" and not paths:
            return _empty(given, kept=bool(before))
        files = self._files[given.path] = {}
        everything = changes is None or given.path in changes
        for path in paths:
            known = before.get(path)
            if self.stopping:
                break
            if everything or (changes and path in changes):
                files[path] = _load(path, partial(_bytes, path), known.objects if known else {})
            elif known:
                files[path] = known
            # else it is being written, and its writer will close it
        return None

    def _news(self, objects: dict[_Key, Object]) -> list[Event]:
        """The differences from the objects that the loop has."""
        reported, self._reported = self._reported, objects
        news: list[Event] = [
            Upsert(object)
            for key, object in objects.items()
            if (old := reported.get(key)) is not object and old != object
        ]
        news += [Delete(*key) for key in reported if key not in objects]
        return news

    def _complain(self, problems: list[Problem]) -> None:
        new = [problem for problem in problems if problem not in self._complaints]
        for problem in new[:MAX_LOGGED]:
            where = {"object": problem.subject} if problem.subject else {}
            reason = problem.reason[:MAX_REASON]
            if problem.warning:
                self._log.warning("manifest_ambiguous", path=problem.path, **where, reason=reason)
            else:
                self._log.error("manifest_invalid", path=problem.path, **where, reason=reason)
        if more := len(new[MAX_LOGGED:]):
            self._log.error("manifests_invalid", more=more)
        self._complaints = set(problems)


# --- reading ------------------------------------------------------------------------------------

_Key = tuple[type[Object], Name | str]


class _File(NamedTuple):
    """The objects of a file, or those of when it was last valid, and its problems."""

    objects: Mapping[_Key, Object]
    problems: Sequence[Problem]


def _key(object: Object) -> _Key:
    return type(object), object.name


def _subject(object: Object) -> str:
    """Kind and name in the form of InvalidObject.subject."""
    name = object.name if isinstance(object.name, Name) else Name("default", object.name)
    return f"{type(object).__name__} {name}"


def _broken(path: str, reason: str, kept: bool) -> Problem:
    return Problem(path, "", reason + ("; its last valid content stays in use" if kept else ""))


def _empty(directory: ManifestPath, kept: bool) -> Problem:
    reason = (
        "contains no manifest (.yaml, .yml or .json); where no objects are meant, add a file with"
        ' "kind: List"'
    )
    return _broken(directory.path, reason, kept)


def _load(path: str, source: Callable[[], bytes], before: Mapping[_Key, Object]) -> _File:
    """The file whose bytes are from `source`; invalid objects are as they were in `before`."""
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
            reason = "is defined more than once; the last definition is used"
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
        return "; its last valid form stays in use"
    return f"; it has no name, so {len(kept)} objects that the file held before stay in use"


def _may_be(broken: InvalidObject, object: Object) -> bool:
    """Whether an invalid object may be this one, by the known part of its name.

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
                reason = f"is also defined in {path}, which is used"
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
    """All of a stream, or the part received so far when `wake` becomes readable."""
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
