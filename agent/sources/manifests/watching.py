"""Which files to read again, as soon as they have changed: by inotify, else by polling.

inotify watches directories, never files, because most writers replace files. Every directory entry
on the path to a file is watched, symlinks and their targets included. So a change is seen wherever
it is made: at a link, at its target, or at a directory further up. In a ConfigMap volume `svc.yaml`
leads to `..data/svc.yaml` and `..data` to a directory named after a time, and an update replaces
the link `..data` in one rename.

Both kinds report every change made after `follow` was called for the first time, also those made
while the caller reads files.
"""

from __future__ import annotations

import os
import select
import stat
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Protocol

import inotify_simple
from inotify_simple import flags

from agent.sources.manifests.paths import ManifestPath, is_manifest

POLL_SECONDS = 1.0
RACY_SECONDS = 2.0
"""Two writes this close together may leave the same times: the coarsest that file systems in use
store are those of FAT."""

_Entry = tuple[str, str]
"""A directory without symlinks in its path, and a name in it."""

Changes = set[str] | None
"""The files to read again, and the manifest paths of which to read everything; None for all."""


class ChangeWatch(Protocol):
    """Notices changes of files."""

    def follow(self, paths: Sequence[ManifestPath]) -> None:
        """Notices changes in `paths` from now on; to be called again after each `wait`, before
        files are read. Raises OSError if it cannot."""

    def wait(self) -> Changes:
        """The changes, as soon as there are any; none if the thread is woken."""

    def close(self) -> None:
        """Releases its descriptors."""


class InotifyWatch:
    """Watches the directory of every entry on the path to a file."""

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
        self._entries: dict[_Entry, set[str]] = {}  # what is reached through an entry
        self._listed: dict[str, set[str]] = {}  # by directory: its names in the paths

    def close(self) -> None:
        """See ChangeWatch."""
        self._inotify.close()

    def follow(self, paths: Sequence[ManifestPath]) -> None:
        """See ChangeWatch."""
        # a link may be changed before its target's directory is watched: look until nothing is new
        while True:
            self._entries = _entries(paths)
            if not self._watch_directories({directory for directory, _ in self._entries}):
                break
        self._listed = {}
        for path in paths:
            if path.kind == "directory":
                listed = path.listed
                self._listed.setdefault(os.path.realpath(listed), set()).add(listed)

    def _watch_directories(self, wanted: set[str]) -> bool:
        """Watches these directories only. Returns whether one of them was not watched before.

        A directory that was replaced by another of its name counts as new.
        """
        watches: dict[int, set[str]] = {}
        for directory in wanted:
            try:
                watch = self._inotify.add_watch(directory, self._MASK)
            except (FileNotFoundError, NotADirectoryError):
                continue  # the watch of the directory above reports when it exists
            watches.setdefault(watch, set()).add(directory)
        for watch in self._directories.keys() - watches.keys():
            with suppress(OSError):  # it was removed with its directory
                self._inotify.rm_watch(watch)
        is_new = not watches.keys() <= self._directories.keys()
        self._directories = watches
        return is_new

    def wait(self) -> Changes:
        """See ChangeWatch."""
        poller = select.poll()
        poller.register(self._inotify.fileno(), select.POLLIN)
        poller.register(self._wake, select.POLLIN)
        while self._wake not in dict(poller.poll()):
            changed: set[str] = set()
            for event in self._inotify.read(timeout=0):
                if event.mask & flags.Q_OVERFLOW:
                    return None
                for directory in self._directories.get(event.wd, ()):
                    if self._counts(event.mask, os.path.join(directory, event.name)):
                        changed |= self._led_to(directory, event.name)
            if changed:
                return changed
        return set()

    def _led_to(self, directory: str, name: str) -> set[str]:
        changed = self._entries.get((directory, name), set())
        if is_manifest(name):
            changed = changed | {os.path.join(at, name) for at in self._listed.get(directory, ())}
        return changed

    @staticmethod
    def _counts(mask: int, path: str) -> bool:
        """Whether the file is complete now, or was removed."""
        if mask & (flags.CLOSE_WRITE | flags.MOVED_TO):
            return True
        try:
            found = os.lstat(path)
        except OSError:
            return bool(mask & (flags.MOVED_FROM | flags.DELETE))
        # a new file will be closed; a directory, a symlink or a hard link will not
        return bool(mask & flags.CREATE) and (not stat.S_ISREG(found.st_mode) or found.st_nlink > 1)


def _entries(paths: Iterable[ManifestPath]) -> dict[_Entry, set[str]]:
    """By entry, the paths and files that are reached through it."""
    entries: dict[_Entry, set[str]] = {}
    for given in paths:
        goals = {given.path: given.path}
        if given.kind == "directory":
            goals[given.path] = os.path.join(given.path, "..data")
            with suppress(OSError):
                goals.update((path, path) for path in given.files())
        for path, goal in goals.items():
            for entry in _entries_to(goal):
                entries.setdefault(entry, set()).add(path)
    return entries


def _entries_to(path: str) -> set[_Entry]:
    """The entries that are looked up, one after the other, to open `path`."""
    at, entries, links = "/", set(), 0
    ahead = os.path.join(os.getcwd(), path).split("/")[::-1]
    while ahead:
        name = ahead.pop()
        if name in ("", "."):
            continue
        if name == "..":
            at = os.path.dirname(at)
            continue
        entries.add((at, name))
        try:
            target = os.readlink(os.path.join(at, name))
        except OSError:
            at = os.path.join(at, name)
            continue
        links += 1
        if links > 40:  # the kernel's limit, as in a circle of links
            break
        at = "/" if target.startswith("/") else at
        ahead += target.split("/")[::-1]
    return entries


class PollingWatch:
    """Compares size, times and inode of every file every POLL_SECONDS.

    A file whose times are younger than RACY_SECONDS is reported once more when they are not,
    because a write after it was read may have left the same times.
    """

    def __init__(self, wake: int) -> None:
        self._wake = wake
        self._paths: Sequence[ManifestPath] = ()
        self._seen: dict[str, _Signature] | None = None
        self._racy: set[str] = set()

    def close(self) -> None:
        """See ChangeWatch."""

    def follow(self, paths: Sequence[ManifestPath]) -> None:
        """See ChangeWatch."""
        self._paths = paths
        # later it stays as `wait` saw it: what has changed since then is reported next time
        if self._seen is None:
            self._look()

    def _look(self) -> set[str]:
        """The paths whose signature is not what it was; what it is now is remembered."""
        before, racy = self._seen or {}, self._racy
        now = self._seen = _signatures(self._paths)
        newest = (time.time() - RACY_SECONDS) * 1e9
        self._racy = {path for path, found in now.items() if found and found[1] > newest}
        return {path for path, _ in now.items() ^ before.items()} | (racy - self._racy)

    def wait(self) -> Changes:
        """See ChangeWatch."""
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        while not poller.poll(POLL_SECONDS * 1000):
            if changed := self._look():
                return changed
        return set()


_Signature = tuple[int, ...]


def _signatures(paths: Iterable[ManifestPath]) -> dict[str, _Signature]:
    signatures: dict[str, _Signature] = {}
    for given in paths:
        try:
            files = given.files()
        except OSError:
            signatures[given.path] = ()
            continue
        for path in files:
            try:
                found = os.stat(path)
            except OSError:
                signatures[path] = ()
            else:
                # a writer may set the data's time back (cp -p), never the inode's
                signatures[path] = (
                    found.st_mtime_ns,
                    found.st_ctime_ns,
                    found.st_size,
                    found.st_ino,
                )
    return signatures
