"""The paths given with `--from`: a file, a directory, or `-`, standard input.

In a directory the `*.yaml`, `*.yml` and `*.json` count, sorted, not those below it and not hidden
ones. A ConfigMap volume is listed through its `..data`, whose content is complete at any moment,
while the links beside it are updated one by one (`AtomicWriter` in kubernetes'
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
    """A path that does not exist or cannot be read. Says which, and what to do."""


class ManifestPath(NamedTuple):
    """A path, and its kind when the agent started."""

    path: str
    kind: Literal["file", "directory", "stream"]

    @property
    def listed(self) -> str:
        """The directory whose entries count: in a ConfigMap volume the target of the links."""
        payload = os.path.join(self.path, "..data")
        return payload if os.path.isdir(payload) else self.path

    def files(self) -> list[str]:
        """The paths of the files that exist.

        Raises OSError if that is unknown because a directory is missing, which is not the same as
        no files.
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


def resolve(texts: Sequence[str]) -> list[ManifestPath]:
    """The paths, each once. Raises ManifestError."""
    return [_resolved(text) for text in dict.fromkeys(texts)]


def _resolved(path: str) -> ManifestPath:
    if path == STDIN:
        if sys.stdin is None or sys.stdin.closed:
            raise ManifestError(f"{STDIN}: standard input is closed; pipe the manifests into it")
        return ManifestPath(path, "stream")
    try:
        mode = os.stat(path).st_mode
        if not os.access(path, os.R_OK | (os.X_OK if stat.S_ISDIR(mode) else 0)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise not_readable(path, error) from None
    if stat.S_ISDIR(mode):
        return ManifestPath(path, "directory")
    return ManifestPath(path, "file" if stat.S_ISREG(mode) else "stream")


def not_readable(path: str, error: Exception) -> ManifestError:
    """The error for a path that cannot be read, with the remedy."""
    todo = (
        "let this user read it"
        if isinstance(error, PermissionError)
        else f"give a manifest file, a directory of them, or {STDIN} for standard input"
    )
    return ManifestError(f"{path}: {os_reason(error)}; {todo}")


def os_reason(error: Exception) -> str:
    """The system's error message without number and path."""
    return getattr(error, "strerror", None) or str(error)
