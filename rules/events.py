"""What the sources report to the loop.

A source puts lists of events into the loop's queue; a list is applied as a whole and ends in one
transaction, so whatever belongs together (a changed file, a relist) stays together.
"""

from __future__ import annotations

from typing import NamedTuple

from rules.objects import Address, Name, Object


class Upsert(NamedTuple):
    """An object was added or has changed: this is its current version."""

    object: Object


class Delete(NamedTuple):
    """An object was deleted. `kind` is the record's type, `name` its `name`."""

    kind: type[Object]
    name: Name | str


class Synced(NamedTuple):
    """The source has reported everything that existed when it started.

    Nothing is programmed before: an incomplete list would look like deletions.
    """


class NodeAddresses(NamedTuple):
    """The addresses of this machine's interfaces, all of them, after a change.

    `primary` holds at most one address per family: the one that traffic to the default route
    would have.
    """

    addresses: frozenset[Address]
    primary: tuple[Address, ...]


class ApiServers(NamedTuple):
    """Where the source reaches the API server: packed addresses and TCP ports, all of them.

    External addresses of Services that equal one of these are refused: they would cut the agent
    off from the only source that can report their removal.
    """

    endpoints: frozenset[tuple[Address, int]]


Event = Upsert | Delete | Synced | NodeAddresses | ApiServers
