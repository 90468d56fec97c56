"""What a reader in another thread has not read of a State: see `rules.mirror`."""

from __future__ import annotations

from collections.abc import Iterable

from rules.objects import Name
from rules.program import Claim

MAX_ITEMS = 500
"""So many Services and claims are in one part: below a millisecond of the loop."""

MAX_UNREAD = 10_000
"""A reader that has left so many changes unread is forgotten, and starts over if it returns."""


class Feed:
    """What one reader has not read of a State. Used by the thread that changes the State."""

    def __init__(self) -> None:
        self.attached = False
        """Whether changes are noted here."""
        self.version = -1
        """The State's version at the last part of all."""
        self._changed: set[Name | Claim] = set()
        self._listings: list[Iterable[Name] | Iterable[Claim]] = []
        self._listed: list[Name | Claim] = []
        self._noted = 0

    def attach(self, *everything: Iterable[Name] | Iterable[Claim]) -> None:
        """Nothing has been read. Each collection is copied when it is its turn."""
        self.attached, self.version = True, -1
        self._changed, self._listings, self._listed = set(), list(everything), []
        self._noted = 0

    def note(self, changed: Iterable[Name] | Iterable[Claim]) -> bool:
        """These have changed. Returns whether the feed is still attached."""
        before = len(self._changed)
        self._changed.update(changed)
        self._noted += len(self._changed) - before
        if self._noted > MAX_UNREAD:
            self.attached = False
            self._changed, self._listings, self._listed = set(), [], []
        return self.attached

    def take(self) -> list[Name | Claim]:
        """The next keys to read, at most MAX_ITEMS."""
        self._noted = 0
        taken = [self._changed.pop() for _ in range(min(MAX_ITEMS, len(self._changed)))]
        if not taken:
            if not self._listed and self._listings:
                self._listed = list(self._listings.pop())
            taken = self._listed[-MAX_ITEMS:]
            del self._listed[-MAX_ITEMS:]
        return taken

    @property
    def empty(self) -> bool:
        """Whether everything has been read."""
        return not (self._changed or self._listed or self._listings)
