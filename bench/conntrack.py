"""A UDP endpoint is removed beside a large conntrack table: CPU, and how long the loop waits.

The flows are made by ctnetlink in a namespace of their own, with the addresses of cluster IPs and
endpoints; few of them lead to the removed endpoint. The agent's own flow cleaner deletes those.
Python runs one thread at a time, so the loop waits while the cleaner holds the interpreter; a
thread that sleeps for a millisecond at a time measures the longest wait.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from pathlib import Path
from typing import Any

import structlog

from agent.kernel.conntrack import Conntrack
from agent.kernel.flows import FlowCleaner
from agent.kernel.socket import NetlinkSocket
from bench.process import HOST, MeasureError
from bench.results import Results, metric, say, yardstick
from lab.world import World
from rules.frontends import destination_key
from rules.netlink.attributes import attribute, nest, u32
from rules.netlink.messages import NFGENMSG, NLM_F_ACK, NLM_F_CREATE, NLM_F_REQUEST, message
from rules.objects import UDP
from rules.program import Claim
from rules.stale_flows import Look, Serving
from rules.tables import SETS

FLOWS, QUICK_FLOWS = 1_000_000, 50_000
STALE = 500
_SERVICES = 5_000
_AT_ONCE = 300
_NLM_F_EXCL, _IPCTNL_MSG_CT_NEW = 0x200, 0x100
_CLIENTS, _CLUSTER_IPS, _PODS = 0x0AF40000, 0x0A600000, 0x0AF50000
_MAX = Path("/proc/sys/net/netfilter/nf_conntrack_max")
_COUNT = Path("/proc/sys/net/netfilter/nf_conntrack_count")


def measure(results: Results, *, flows: int) -> None:
    """Adds `conntrack`."""
    before, most = yardstick(), _MAX.read_text()
    _MAX.write_text(str(max(int(most), 2 * flows)))  # of the whole machine
    try:
        with World(pods=0, remotes=0, prefix="sliceproxy-bench") as world:
            found: dict[str, Any] = world.run(HOST, _measure, flows)
    finally:
        _MAX.write_text(most)
    results.add(
        "conntrack",
        f"{flows} flows",
        {
            "wait": metric([found["wait"] * 1e3], "ms"),
            "cpu": metric([found["cpu"]], "s"),
            "time": metric([found["time"]], "s"),
            "memory": metric([found["memory"]], "MiB"),
            "deleted beyond those concerned": metric([found["gone"] - STALE], "flows"),
        },
        [before, yardstick()],
        waits_while_idle_ms=found["idle"] * 1e3,
    )


def _measure(flows: int) -> dict[str, float]:
    _fill(flows)
    say(f"  conntrack: {_count()} flows made")
    done = threading.Event()
    cleaner = FlowCleaner(structlog.get_logger(), _failed, lambda *_: None, lambda: _Reported(done))
    cleaner.start()
    try:
        return _without(cleaner, done)
    finally:
        cleaner.stop()


def _without(cleaner: FlowCleaner, done: threading.Event) -> dict[str, float]:
    """What deleting takes after one endpoint of a Service has gone."""
    claim, gone, stays = _claim(1), _target(1), _target(2)
    others = {_claim(n): frozenset({_target(n)}) for n in range(10, 10 + _SERVICES)}
    formerly: dict[Claim, Serving] = {claim: frozenset({gone, stays})}
    cleaner.expect({**others, **formerly}, everything=True)
    ends = time.perf_counter() + 1.5
    idle = _longest_wait(lambda: time.perf_counter() > ends)
    cleaner.expect({claim: frozenset({stays})})
    count, memory = _count(), _resident()
    used, started = time.process_time(), time.perf_counter()
    own = time.thread_time()
    cleaner.look(Look(formerly, frozenset()))
    wait = _longest_wait(done.is_set)
    return {
        "idle": idle,
        "wait": wait,
        "time": time.perf_counter() - started,
        "cpu": time.process_time() - used - (time.thread_time() - own),
        "memory": _resident() - memory,
        "gone": count - _count(),
    }


class _Reported(Conntrack):
    """Says when it has been through the table."""

    def __init__(self, done: threading.Event) -> None:
        super().__init__()
        self._done = done

    def forget(self, *arguments: Any) -> Any:
        """See Conntrack."""
        result = super().forget(*arguments)
        self._done.set()
        return result


def _failed(name: str, error: Exception) -> None:
    say(f"  conntrack: {name}: {error!r}")


def _longest_wait(over: Any) -> float:
    """How much longer than a millisecond a thread slept that was to sleep so long."""
    worst, last = 0.0, time.perf_counter()
    while not over():
        time.sleep(0.001)
        now = time.perf_counter()
        worst, last = max(worst, now - last - 0.001), now
    return worst


def _fill(flows: int) -> None:
    with NetlinkSocket() as sock:
        for start in range(0, flows, _AT_ONCE):
            count = min(_AT_ONCE, flows - start)
            first = sock.number(count)
            flags = NLM_F_REQUEST | NLM_F_CREATE | _NLM_F_EXCL
            data = b"".join(
                message(
                    _IPCTNL_MSG_CT_NEW,
                    flags | (NLM_F_ACK if n == count - 1 else 0),
                    first + n,
                    NFGENMSG.pack(socket.AF_INET, 0, 0) + _flow(start + n),
                )
                for n in range(count)
            )
            if failed := sock.transact(data, first, count):
                raise MeasureError(f"flows could not be made: {failed[0]}")


def _flow(number: int) -> bytes:
    """A UDP flow through a cluster IP; the first STALE ones lead to the removed endpoint."""
    service = 1 if number < STALE else 10 + number % _SERVICES
    client, port = _packed(_CLIENTS + (number >> 14)), 1024 + (number & 16383)
    address, pod = _packed(_CLUSTER_IPS + service), _packed(_PODS + service)
    timeout, confirmed = u32(7, 600), u32(3, 8)
    tuples = _tuple(1, client, port, address, 53) + _tuple(2, pod, 53, client, port)
    return tuples + timeout + confirmed


def _tuple(kind: int, source: bytes, port: int, destination: bytes, to: int) -> bytes:
    addresses = nest(1, attribute(1, source), attribute(2, destination))
    ports = attribute(2, struct.pack("!H", port)), attribute(3, struct.pack("!H", to))
    return nest(kind, addresses, nest(2, attribute(1, bytes([UDP])), *ports))


def _packed(number: int) -> bytes:
    return number.to_bytes(4)


def _claim(service: int) -> Claim:
    key = destination_key(_packed(_CLUSTER_IPS + service), UDP, 53)
    return Claim(SETS[4].service_ips, key)


def _target(service: int) -> bytes:
    return _packed(_PODS + service) + struct.pack("!Hxx", 53)


def _count() -> int:
    return int(_COUNT.read_text())


def _resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
