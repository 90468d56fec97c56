"""Where the API server is: resolved from its URL, and reported when it changes."""

from __future__ import annotations

import socket

import pytest

from agent.sources.kubernetes.api_servers import ApiServerAddresses, api_servers
from rules.events import ApiServers, Event
from rules.objects import Address


def packed(text: str) -> Address:
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


@pytest.mark.parametrize(
    ("url", "address", "port"),
    [
        ("https://172.31.0.99:6443", "172.31.0.99", 6443),
        ("https://10.96.0.1", "10.96.0.1", 443),
        ("https://[fd00::1]:6443/prefix", "fd00::1", 6443),
    ],
)
def test_a_url_with_an_address(url, address, port):
    assert api_servers(url) == {(packed(address), port)}


def test_a_name_has_all_its_addresses():
    assert (packed("127.0.0.1"), 6443) in api_servers("https://localhost:6443")


def test_an_event_for_each_change_and_none_for_a_name_that_cannot_be_resolved():
    put: list[Event] = []
    url = ["https://10.0.0.1:6443"]
    worker = ApiServerAddresses(lambda: url[0], put.extend, lambda *_: None)
    worker.resolve()
    worker.resolve()
    url[0] = "https://name.invalid:6443"
    worker.resolve()
    url[0] = "https://10.0.0.2:6443"
    worker.resolve()
    worker.stop()
    expected = [ApiServers(frozenset({(packed(f"10.0.0.{n}"), 6443)})) for n in (1, 2)]
    assert put == expected
