"""The agent's addresses, against what pyroute2 reads of the same machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from socket import AF_INET, AF_INET6, inet_pton

import pytest
from pyroute2 import IPRoute

from agent.addresses import read
from agent.world import World

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make namespaces")


@pytest.fixture
def world() -> Iterator[World]:
    with World(pods=0, remotes=0, prefix="sliceproxy-test") as built:
        yield built


def test_addresses_are_read_as_pyroute2_reads_them(world: World) -> None:
    """More of them than fit into one answer, one of a point-to-point link, and those of no use."""
    own, other = "198.51.100.1", "198.51.100.2"
    with IPRoute(netns=world.namespace("node")) as route:
        (link,) = route.link_lookup(ifname="lo")
        route.addr("add", index=link, local=own, address=other, prefixlen=32)
        route.addr("add", index=link, address="fe80::77", prefixlen=64)
        for number in range(1500):
            route.addr(
                "add", index=link, address=f"198.18.{number >> 8}.{number & 255}", prefixlen=32
            )
        told = [(m.get_attr("IFA_LOCAL") or m.get_attr("IFA_ADDRESS")) for m in route.get_addr()]
    expected = {
        inet_pton(AF_INET6 if ":" in text else AF_INET, text)
        for text in told
        if not text.startswith(("127.", "fe80:")) and text != "::1"
    }
    found = world.run("node", read)
    assert found.addresses == expected
    assert len(expected) > 1500
    assert inet_pton(AF_INET, own) in found.addresses
    assert inet_pton(AF_INET, other) not in found.addresses
    assert found.primary == tuple(
        inet_pton(family, world.hosts["node"].address(family)) for family in (AF_INET, AF_INET6)
    )
