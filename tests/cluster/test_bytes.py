"""What a start asks of the API server: every object once, in protobuf."""

from __future__ import annotations

import socket
import threading

import pytest

from agent import log
from agent.sources.kubernetes.connection import connect
from agent.sources.kubernetes.follower import ClusterFollower
from bench.objects import NODE, Cluster, Size
from bench.server import Prepared, Server
from rules.events import Synced


@pytest.mark.parametrize(("encoding", "received"), [("json", 1_443_000), ("protobuf", 777_000)])
def test_the_bytes_of_a_start(encoding, received):
    """300 Services with 10 endpoints; protobuf is preferred, and JSON accepted."""
    done = threading.Event()

    def put(events):
        if any(isinstance(event, Synced) for event in events):
            done.set()

    prepared = Prepared(Cluster(Size(300, 10), encoding=encoding))
    with Server(prepared, socket.socket) as server:
        follower = ClusterFollower(
            connect(server=server.url), NODE, "", put, log.configure(), failed=print
        )
        follower.start()
        assert done.wait(30)
        sent, asked = server.sent, list(server.asked)
        follower.stop()
    assert len([a for a in asked if "sendInitialEvents" in a]) == len(asked) == 4
    assert sent == pytest.approx(received, rel=0.01)
