"""Watching: which files to read again, told as soon as they have changed.

The same object in two files is the later one's, in the order of the places and then of the names;
when that one goes, the other one's counts again.

Following uses inotify on directories, never on files, since most writers replace files. Every
directory entry on the way to a file is watched, symlinks and their targets included. So a change
is seen wherever it is made: at a link, at its target, or at a directory further up. ConfigMap
volumes are the case in point: `svc.yaml` leads to `..data/svc.yaml`, `..data` to a directory named
after a time, and an update replaces the link `..data` in one rename. Such a directory is listed
through `..data`, whose content is complete at any moment, while the links beside it are brought up
to date one by one (`AtomicWriter` in kubernetes' pkg/volume/util/atomic_writer.go).
"""

from __future__ import annotations

import os
import select
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Protocol

import inotify_simple
from inotify_simple import flags

from agent.sources.manifests.places import Place, is_manifest

POLL_SECONDS = 1.0

_Entry = tuple[str, str]
"""A directory without symlinks in its path, and a name in it."""

Stale = set[str] | None
"""Paths of files to read again, and of places of which to read everything; None: all there is."""


class Watch(Protocol):
    """A way to notice changes: inotify, or polling where that cannot be had."""

    def follow(self, places: Sequence[Place]) -> None:
        """Notice what changes in `places` from now on. Raises OSError if that cannot be."""

    def wait(self) -> Stale:
        """What has changed, as soon as something has, or nothing when the thread is woken."""

    def close(self) -> None:
        """Watch no longer."""


class Inotify:
    """Watches the directory of every entry on the way to a file."""

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
        """See Watch."""
        self._inotify.close()

    def follow(self, places: Sequence[Place]) -> None:
        """See Watch."""
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

    def wait(self) -> Stale:
        """See Watch."""
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
        if is_manifest(name):
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


def _ways(places: Iterable[Place]) -> dict[_Entry, set[str]]:
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


class Polling:
    """Looks at size, time and inode of every file, once in POLL_SECONDS."""

    def __init__(self, wake: int) -> None:
        self._wake = wake
        self._places: Sequence[Place] = ()
        self._seen: dict[str, _Signature] = {}

    def close(self) -> None:
        """See Watch."""

    def follow(self, places: Sequence[Place]) -> None:
        """See Watch."""
        self._places = places
        self._seen = _signatures(places)

    def wait(self) -> Stale:
        """See Watch."""
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        while not poller.poll(POLL_SECONDS * 1000):
            now = _signatures(self._places)
            stale = {path for path, _ in now.items() ^ self._seen.items()}
            if stale:
                return stale
        return set()


_Signature = tuple[int, ...]


def _signatures(places: Iterable[Place]) -> dict[str, _Signature]:
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
