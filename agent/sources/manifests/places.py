"""Places: where manifests lie. A file, a directory (its `*.yaml`, `*.yml` and `*.json`, sorted, not
those below it, not hidden ones), or `-`, standard input.

A ConfigMap volume is listed through its `..data`, whose content is complete at any moment, while
the links beside it are brought up to date one by one (`AtomicWriter` in kubernetes'
pkg/volume/util/atomic_writer.go).
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Sequence
from typing import Literal, NamedTuple

SUFFIXES = (".yaml", ".yml", ".json")
STDIN = "-"


class ManifestError(Exception):
    """A place that is not there or cannot be read; says which and what to do."""


class Place(NamedTuple):
    """A place, and what it was when it was given."""

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
            paths = [os.path.join(listed, n) for n in sorted(os.listdir(listed)) if is_manifest(n)]
            return [path for path in paths if not os.path.isdir(path)]
        if os.path.lexists(self.path):
            return [self.path]
        os.stat(os.path.dirname(self.path) or ".")
        return []


def is_manifest(name: str) -> bool:
    """Whether a directory's entry of this name counts."""
    return name.endswith(SUFFIXES) and not name.startswith(".")


def resolve(texts: Sequence[str]) -> list[Place]:
    """The places, each once. Raises ManifestError."""
    return [_place(text) for text in dict.fromkeys(texts)]


def _place(path: str) -> Place:
    if path == STDIN:
        if sys.stdin is None or sys.stdin.closed:
            raise ManifestError(f"{STDIN}: standard input is closed; pipe the manifests into it")
        return Place(path, "stream")
    try:
        mode = os.stat(path).st_mode
        if not os.access(path, os.R_OK | (os.X_OK if stat.S_ISDIR(mode) else 0)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise not_readable(path, error) from None
    if stat.S_ISDIR(mode):
        return Place(path, "directory")
    return Place(path, "file" if stat.S_ISREG(mode) else "stream")


def not_readable(path: str, error: Exception) -> ManifestError:
    """The error for a place that cannot be read, with what to do about it."""
    todo = (
        "let this user read it"
        if isinstance(error, PermissionError)
        else f"give a manifest file, a directory of them, or {STDIN} for standard input"
    )
    return ManifestError(f"{path}: {os_reason(error)}; {todo}")


def os_reason(error: Exception) -> str:
    """What the system says, without number and path."""
    return getattr(error, "strerror", None) or str(error)
