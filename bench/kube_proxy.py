"""The same load and change, measured on kube-proxy. **Untested: no binary was at hand.**

kube-proxy speaks JSON if told so, and `--master` outweighs the server of a kubeconfig: so it can
follow the prepared server, and both programs get the same objects. It has no log line that says
"programmed"; what is waited for are the notifications of all endpoints' addresses.
"""

from __future__ import annotations

import random
import re
import socket
import time
from pathlib import Path

from bench.measure import Repeats, Setting, setting
from bench.objects import NODE, PER_SLICE, Size, generation
from bench.process import Listener, MeasureError, Process, clear, cpu_seconds, memory_mib
from bench.results import Results, metric, yardstick
from bench.server import chunk

MEASURES = {"load", "change"}
LONGEST = 1800.0
_POD = re.compile(rb"\x08\0\1\0(\x0a[\x80-\xff]..)", re.DOTALL)
"""A pod's address, 10.128.0.0/9, as data that a rule loads before it translates."""


def command(binary: Path, kubeconfig: Path | None, url: str) -> list[str]:
    return [
        str(binary),
        f"--master={url}",
        *([f"--kubeconfig={kubeconfig}"] if kubeconfig else []),
        "--kube-api-content-type=application/json",
        "--proxy-mode=nftables",
        f"--hostname-override={NODE}",
        "--cluster-cidr=10.128.0.0/9",
        "--conntrack-max-per-core=0",
        "--conntrack-tcp-timeout-established=0s",
        "--conntrack-tcp-timeout-close-wait=0s",
    ]


def measure(
    names: set[str],
    size: Size,
    repeats: Repeats,
    results: Results,
    *,
    binary: Path,
    kubeconfig: Path | None,
) -> None:
    wanted = MEASURES if "all" in names else names & MEASURES
    if not wanted:
        raise MeasureError("on kube-proxy only load and change are measured")
    before = yardstick()
    with setting(size) as made, Listener(made.world) as listener:
        clear(made.world)
        made.server.forget()
        process = Process(made.world, command(binary, kubeconfig, made.server.url))
        with process:
            at = _until_programmed(size, listener)
            results.add(
                "load",
                str(size),
                {
                    "time": metric([at - process.started], "s"),
                    "cpu": metric([cpu_seconds(process.pid)], "s"),
                    "peak": metric([memory_mib(process.pid)["VmHWM"]], "MiB"),
                },
                [before, yardstick()],
                without_its_children=True,
            )
            if "change" in wanted:
                _change(
                    made,
                    process,
                    listener,
                    count=min(20, repeats.changes),
                    results=results,
                    before=before,
                )


def _until_programmed(size: Size, listener: Listener) -> float:
    seen: set[bytes] = set()

    def enough(data: bytes) -> bool:
        seen.update(_POD.findall(data))
        return len(seen) >= size.total

    return listener.wait_until(enough, LONGEST)


def _change(
    made: Setting,
    process: Process,
    listener: Listener,
    *,
    count: int,
    results: Results,
    before: dict[str, float],
) -> None:
    cluster, rng = made.cluster, random.Random(1)
    made.server.wait_for_watch("endpointslices")
    time.sleep(5.0)
    times, used = [], cpu_seconds(process.pid)
    for number in range(count):
        index = rng.randrange(cluster.size.services)
        addresses = cluster.addresses(index)
        position = rng.randrange(len(addresses))
        addresses[position] = generation(20, number + 1)
        data = chunk(cluster.change(index, addresses)[position // PER_SLICE])
        time.sleep(0.5)
        listener.drain()
        started = time.perf_counter()
        made.server.push("endpointslices", data)
        at = listener.wait_for(socket.inet_aton(addresses[position]), LONGEST)
        times.append((at - started) * 1e3)
    each = (cpu_seconds(process.pid) - used) / len(times)
    results.add(
        "change",
        str(cluster.size),
        {"latency": metric(times, "ms"), "cpu": metric([each * 1e3], "ms of CPU")},
        [before, yardstick()],
        without_its_children=True,
    )
