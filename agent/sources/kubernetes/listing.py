"""A cluster's objects as of now, listed once: for commands, which do not follow them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import urllib3

from agent.sources.kubernetes.connection import ConnectError, Connection, reason_of
from agent.sources.kubernetes.reflector import Reflector, Resource, Timing, resources
from rules.events import ApiServers, Event
from rules.objects import InvalidObject

_REQUESTS = 1000
"""More than any list has pages."""
_PIECE = 1 << 18


def listed(
    connection: Connection,
    node: str,
    proxy_name: str,
    unusable: Callable[[InvalidObject], object],
) -> Iterator[Event]:
    """Events that bring every object that an agent on `node` would follow.

    `unusable` is called for each that does not decode. Raises ConnectError.
    """
    yield ApiServers(connection.endpoints())
    for resource in resources(node, proxy_name):
        yield from _list(connection, resource, unusable)


def _list(
    connection: Connection, resource: Resource, unusable: Callable[[InvalidObject], object]
) -> Iterator[Event]:
    timing, reflector = Timing(), Reflector(resource)
    for _ in range(_REQUESTS):
        request, broken = reflector.request(), ""
        try:
            response = connection.get(request, timing.connect)
            try:
                kind = response.headers.get("Content-Type", "")
                reflector.answered(response.status, content_type=kind)
                while not (reflector.settled or reflector.over):
                    data = response.read1(_PIECE)
                    if not data:
                        break
                    yield from reflector.received(data)
            finally:
                response.close()
        except (urllib3.exceptions.HTTPError, OSError) as error:
            broken = reason_of(error)
        if not reflector.settled:
            outcome = reflector.finished(broken)
            yield from outcome.events
            if outcome.failure and not reflector.settled:
                text = outcome.failure.text or outcome.failure.kind
                raise ConnectError(f"{connection.server}: {resource.full_name}: {text}")
        for invalid in reflector.invalid:
            unusable(invalid)
        reflector.invalid.clear()
        if reflector.settled:
            return
    raise ConnectError(f"{connection.server}: {resource.full_name}: no list after many requests")
