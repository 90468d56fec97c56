"""Where the API server is reached: its addresses, followed while the agent runs.

No Service may take them over (`rules.events.ApiServers`): with an external IP equal to the API
server's address and port and no endpoints behind it, a node locks itself out for good.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from agent.worker import Failed, Worker
from rules.events import ApiServers, Event
from rules.objects import Address

RESOLVE_SECONDS = 60.0
"""A name is resolved again after so long; load balancers of API servers change addresses."""

_DEFAULT_PORTS = {"https": 443, "http": 80}


def api_servers(url: str) -> frozenset[tuple[Address, int]]:
    """The addresses and TCP ports of a server's URL. Raises OSError if its name has none."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or _DEFAULT_PORTS.get(parts.scheme, 443)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    texts = {str(address[0]).partition("%")[0] for *_, address in found}
    return frozenset((ipaddress.ip_address(text).packed, port) for text in texts)


class ApiServerAddresses(Worker):
    """Puts an `ApiServers` event whenever the addresses of the server's URL are others.

    While the name cannot be resolved, the last addresses stay.
    """

    def __init__(
        self,
        url: Callable[[], str],
        put: Callable[[Sequence[Event]], None],
        failed: Failed,
    ) -> None:
        super().__init__("API server addresses", failed)
        self._url = url
        self._put = put
        self._last: frozenset[tuple[Address, int]] = frozenset()

    def work(self) -> None:
        """Resolves until `stop`."""
        while True:
            self.resolve()
            if self.pause(RESOLVE_SECONDS):
                return

    def resolve(self) -> None:
        """Resolves the name once."""
        try:
            found = api_servers(self._url())
        except (OSError, ValueError):  # the follower meets the same error, and logs it
            return
        if found != self._last:
            self._last = found
            self._put([ApiServers(found)])
