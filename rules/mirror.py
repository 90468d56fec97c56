"""A State for a reader in another thread, kept up to date by parts.

Copying a State takes the loop 20 ms at 44,000 Services, and a reader that polls would have it
copied after every change. So each reader has a mirror, and its `Feed` notes what the mirror lacks:
everything at first, then what changes. The loop answers with a `Part` of bounded size, and the
reader asks until one is the last. What changes meanwhile is noted again. So when nothing is left,
all values are of one moment; only then the mirror takes them over.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import NamedTuple, TypeVar

from rules.claims import Claimants
from rules.diff import Installed
from rules.feed import Feed
from rules.objects import EndpointSlice, Name, Service
from rules.program import Claim, Program
from rules.state import State

_K = TypeVar("_K")
_V = TypeVar("_V")


class ServicePart(NamedTuple):
    """What a State has under one Service's name; None for what it does not have."""

    service: Service | None
    slices: tuple[EndpointSlice, ...] | None
    program: Program | None


class ClaimPart(NamedTuple):
    """What a State has under one claim; None for what it does not have."""

    installed: Installed | None
    claimants: Claimants | None


class Part(NamedTuple):
    """Some of a State as it is now. With `first`, what was read before is void. `rest` is a State
    with all else, in the last part; None there if nothing has changed since the last time."""

    first: bool
    last: bool
    services: dict[Name, ServicePart]
    claims: dict[Claim, ClaimPart]
    rest: State | None


def read(state: State, feed: Feed) -> Part:
    """The next part of the state that the reader of the feed has not read. Called by the thread
    that changes the state."""
    first = not feed.attached
    if first:
        state.attach(feed)
    services: dict[Name, ServicePart] = {}
    claims: dict[Claim, ClaimPart] = {}
    for key in feed.take():
        if isinstance(key, Claim):
            claims[key] = ClaimPart(state.installed.get(key), state.claims.entry(key))
        else:
            services[key] = ServicePart(
                state.services.get(key), state.slices.get(key), state.programs.get(key)
            )
    rest = None
    if feed.empty and feed.version != state.version:
        feed.version, rest = state.version, state.without_services()
    return Part(first, feed.empty, services, claims, rest)


class Mirror:
    """The State of one reader. It is not changed between two calls of `take`."""

    def __init__(self) -> None:
        self.state: State | None = None
        """The State as of the last complete parts; None before them."""
        self._parts: list[Part] = []

    def take(self, part: Part) -> bool:
        """Takes a part in; returns whether it is the last one, so that `state` is up to date."""
        if part.first:
            self._parts = []
        self._parts.append(part)
        if part.last:
            parts, self._parts = self._parts, []
            if part.rest is not None:
                self._take_over(parts, part.rest)
        return part.last

    def _take_over(self, parts: list[Part], state: State) -> None:
        """Makes `state` complete: with what the last one had and the parts have."""
        last = None if parts[0].first else self.state
        if last is not None:
            state.services, state.slices = last.services, last.slices
            state.programs, state.installed = last.programs, last.installed
            state.claims.adopt(state.programs, last.claims)
        else:
            state.claims.adopt(state.programs)
        for part in parts:
            for name, (service, slices, program) in part.services.items():
                _put(state.services, name, service)
                _put(state.slices, name, slices)
                _put(state.programs, name, program)
            for claim, (installed, claimants) in part.claims.items():
                _put(state.installed, claim, installed)
                state.claims.replace(claim, claimants)
        self.state = state


def _put(items: MutableMapping[_K, _V], key: _K, value: _V | None) -> None:
    if value is None:
        items.pop(key, None)
    else:
        items[key] = value
