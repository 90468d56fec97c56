"""Where the time goes: the stages of a start and of a change, one after the other in one process.

Each stage is timed as it is, and then profiled with cProfile in a second run (which makes Python
two to three times slower, so only the shares count there). Imports are timed in processes of
their own.
"""

from __future__ import annotations

import cProfile
import gc
import json
import pstats
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from agent.config.settings import Settings
from agent.kernel.tables import Kernel
from agent.loop import reader
from agent.sources.kubernetes.reflector import Reflector, resources
from bench.objects import KINDS, NODE, Cluster, Size, generation
from bench.process import HOST, ROOT
from bench.results import say
from lab.world import World
from rules.events import Event, NodeAddresses
from rules.state import State
from rules.transaction import Transaction, encode

T = TypeVar("T")
TOP = 14
_IMPORTS = (
    "from agent.imports import lightly; lightly('agent.cli.run'); import agent.serve.metrics; "
    "from agent.sources.kubernetes.connection import connect; "
    "agent.serve.metrics.Metrics(''); connect(server='https://127.0.0.1:6443')"
)


class Stages:
    """Times stages, or profiles them."""

    def __init__(self, *, profiled: bool) -> None:
        self.profiled = profiled
        self.times: dict[str, float] = {}
        self.hot: dict[str, list[dict[str, Any]]] = {}

    def run(self, name: str, function: Callable[[], T]) -> T:
        profile = cProfile.Profile() if self.profiled else None
        started = time.perf_counter()
        result = profile.runcall(function) if profile else function()
        self.times[name] = time.perf_counter() - started
        if profile:
            self.hot[name] = hottest(profile)
        return result


def hottest(profile: cProfile.Profile) -> list[dict[str, Any]]:
    """The functions in which most time is spent, without what they call."""
    rows = []
    total = 0.0
    for (file, line, name), (_, calls, own, _, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        total += own
        where = f"{Path(file).parent.name}/{Path(file).name}:{line} {name}" if line else name
        rows.append((own, calls, where))
    rows.sort(reverse=True)
    return [
        {"function": where, "calls": calls, "share": round(own / (total or 1), 4)}
        for own, calls, where in rows[:TOP]
    ]


def one_start(size: Size, *, profiled: bool) -> dict[str, Any]:
    """A start, then changes, in the namespace of the calling thread."""
    cluster, stages = Cluster(size), Stages(profiled=profiled)
    lines = {plural: list(cluster.stream(plural)) for plural in KINDS}
    reflectors = {r.plural: Reflector(r) for r in resources(NODE)}
    gc.collect()
    gc.disable()

    def decode() -> list[Event]:
        events: list[Event] = []
        for plural, reflector in reflectors.items():
            reflector.request()
            reflector.answered(200, content_type=cluster.encoding.content_type)
            for line in lines[plural]:
                events += reflector.received(line)
        return events

    state = State(Settings(node=NODE).options())
    with Kernel() as kernel:
        events = stages.run("decode", decode)
        lines.clear()
        stages.run("apply", lambda: state.apply([NodeAddresses(frozenset(), ()), *events]))
        transaction = stages.run("compute", lambda: state.resync(reader(kernel)))
        stages.run("encode", lambda: encode(transaction, kernel.table_flags).encode())
        started = time.perf_counter()
        kernel.apply(transaction)
        stages.times["kernel"] = time.perf_counter() - started - stages.times["encode"]
        events.clear()
        gc.freeze()
        gc.enable()
        elements = transaction.change.operations
        result = {"elements": elements, **_changes(cluster, reflectors, state, kernel, stages)}
        again = State(Settings(node=NODE).options())
        again.services, again.slices = state.services, state.slices
        again.local = state.local
        again._dirty.update(state.services)
        stages.run("read back and compare", lambda: again.resync(reader(kernel)))
        kernel.remove()
    return {**result, "stages": stages.times, "hot": stages.hot}


def memory_by_part(size: Size) -> dict[str, float]:
    """MiB that Python objects hold after a start, by the module whose code made them."""
    cluster = Cluster(size)
    lines = {plural: list(cluster.stream(plural)) for plural in KINDS}
    state = State(Settings(node=NODE).options())
    tracemalloc.start()
    try:
        reflectors = {r.plural: Reflector(r) for r in resources(NODE)}
        for plural, reflector in reflectors.items():
            reflector.request()
            reflector.answered(200, content_type=cluster.encoding.content_type)
            for line in lines[plural]:
                state.apply(reflector.received(line))
        state.apply([NodeAddresses(frozenset(), ())])
        state.resync(lambda _: None)
        gc.collect()
        statistics_ = tracemalloc.take_snapshot().statistics("filename")
    finally:
        tracemalloc.stop()
    parts: dict[str, float] = {}
    for one in statistics_:
        path = Path(one.traceback[0].filename)
        inside = path.is_relative_to(ROOT) and ".venv" not in path.parts
        name = str(path.relative_to(ROOT)) if inside else "libraries"
        parts[name] = parts.get(name, 0) + one.size / 2**20
    return {name: round(parts[name], 2) for name in sorted(parts, key=lambda n: -parts[n])}


def _changes(
    cluster: Cluster,
    reflectors: dict[str, Reflector],
    state: State,
    kernel: Kernel,
    stages: Stages,
) -> dict[str, Any]:
    reflector, count = reflectors["endpointslices"], 200
    profile = cProfile.Profile()
    parts: dict[str, list[float]] = {"decode": [], "apply and compute": [], "encode and commit": []}
    operations = 0
    for number in range(count):
        index = number * 7 % cluster.size.services
        addresses = cluster.addresses(index)
        addresses[0] = generation(21, number)
        data = cluster.change(index, addresses)[0]
        if stages.profiled:
            profile.enable()
        times = [time.perf_counter()]
        events = reflector.received(data)
        times.append(time.perf_counter())
        state.apply(events)
        transaction: Transaction = state.step()
        times.append(time.perf_counter())
        kernel.apply(transaction)
        times.append(time.perf_counter())
        if stages.profiled:
            profile.disable()
        operations += transaction.change.operations
        for name, begin, end in zip(parts, times, times[1:], strict=False):
            parts[name].append(end - begin)
    if stages.profiled:
        stages.hot["one change"] = hottest(profile)
    medians = {name: statistics.median(v) * 1e3 for name, v in parts.items()}
    return {"change_ms": medians, "operations_per_change": operations / count}


def imports() -> dict[str, float]:
    """Seconds of a process that does nothing, and of one that imports what the agent needs."""
    found = {}
    for name, code in (("python", "pass"), ("imports", _IMPORTS)):
        times = []
        for _ in range(5):
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
            times.append(time.perf_counter() - started)
        found[name] = statistics.median(times)
    return found


def measure(sizes: list[Size], output: Path) -> None:
    """Writes profile.json, which the report shows; it is not compared."""
    content: dict[str, Any] = {"imports": imports(), "sizes": {}}
    for size in sizes:
        with World(pods=0, remotes=0, prefix="sliceproxy-bench") as world:
            plain = world.run(HOST, one_start, size, profiled=False)
            profiled = world.run(HOST, one_start, size, profiled=True)
        memory = memory_by_part(size)
        content["sizes"][str(size)] = {**plain, "hot": profiled["hot"], "memory": memory}
        stages = ", ".join(f"{n} {t:.2f} s" for n, t in plain["stages"].items())
        changes = ", ".join(f"{n} {t:.3f} ms" for n, t in plain["change_ms"].items())
        say(f"  profile {size}: {stages}\n  one change: {changes}")
    output.mkdir(parents=True, exist_ok=True)
    (output / "profile.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
