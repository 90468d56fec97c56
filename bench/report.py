"""Writes docs/performance.md and its plots from the JSON files, and nothing from memory."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from bench.objects import Size
from bench.process import ROOT

PAGE = ROOT / "docs" / "performance.md"
COLUMNS = ("5000x10", "5000x50", "44000x1")
TITLES = {"5000x10": "5,000 x 10", "5000x50": "5,000 x 50", "44000x1": "44,000 x 1"}
GOAL_OF_GROWTH = Size(100_000, 10)

KUBE_PROXY = {
    # kube-proxy 1.36.2: another run, against a real API server
    "time": {"5000x10": 4.4, "5000x50": 6.2, "44000x1": 457.0},
    "cpu": {"5000x10": 4.15, "5000x50": 6.1, "44000x1": 458.0},
    "peak": {"5000x10": 188.0, "5000x50": 907.0, "44000x1": 1250.0},
    "latency": {"5000x10": 1333.0, "5000x50": 2442.0, "44000x1": 20000.0},
}
KUBE_PROXY_TEXT = {
    "time": ("4.0 to 4.8 s", "6.2 s", "457 s"),
    "cpu": ("3.7 to 4.6 s", "6.1 s", "458 s"),
    "peak": ("188 MB + `nft`", "463 + 444 MB (`nft`)", "637 + 613 MB (`nft`)"),
    "latency": ("1,058 to 1,333 ms", "2,442 ms", "over 20 s"),
    "change cpu": ("about 1 s", "about 2 s", ""),
    "first packet": ("2.7 to 3.2 us", "", ""),
}


class Row(NamedTuple):
    """A row of the table of what must be reached; `goals` are in the metric's unit."""

    title: str
    measure: str
    metric: str
    goals: tuple[float | None, ...]
    field: str = "median"
    theirs: str = ""
    next_idea: str = ""


_START = (
    "a quarter of the CPU is imports at 5,000 x 10; of the rest, decoding and computing have equal "
    "parts, 15 to 35 us for each Service with its slice, whatever it holds"
)
_RESTART = "idea: rules of chains are compared as bytes"
_MEMORY = (
    "35 MB are the interpreter, libraries and code; at 44,000 x 1 the state is 2.7 KB for each "
    "Service with its slice, in 25 objects and 8 entries of dictionaries"
)
_BYTES = (
    "this is all that a server sends of these objects in protobuf, each once; with the sizes of "
    "recordings of a real server it would be 12.5 MB. Streamed lists are never compressed. In "
    "compressed pages (`bench load --lists pages`) the bench's objects, which are much alike, are "
    "1.0 MB, and those of the recordings would be 2.8: gzip makes 4.5 bytes one. Pages are asked "
    "for only where a server does not stream. Compressing takes the API server CPU for each node, "
    "and when all nodes restart it is short of that, not of bytes within a data centre: Kubernetes "
    "lowered its level and lets clients turn it off for that reason (kubernetes issue 112296, pull "
    "requests 80919 and 111507); and a stream needs no memory for whole pages there (KEP-3157)"
)
_PACKET = (
    "the rows below tell how much of it NAT hooks cost that have no rules, and what rules like "
    "kube-proxy's cost here; what is left is three lookups, in tables too large for the cache"
)
ROWS = (
    Row("process start to all programmed", "load", "time", (0.8, 3, 1.8), "median", "time", _START),
    Row("CPU for it", "load", "cpu", (0.75, None, None), "median", "cpu", _START),
    Row("the kernel's part: encode and commit", "load", "kernel", (0.15, 0.6, 0.3), next_idea=(
        "idea: elements encoded while they are computed")),
    Row("peak resident memory", "load", "peak", (65, 200, 150), "median", "peak", _MEMORY),
    Row("bytes from the API server", "load", "received", (8, None, None), next_idea=_BYTES),
    Row("one endpoint replaced, p50", "change", "latency", (1, 1.5, 1), "median", "latency",
        "idea: decode only what is new of a slice"),
    Row("one endpoint replaced, p99", "change", "latency", (5, 6, 5), "p99"),
    Row("CPU for it", "change", "cpu", (0.4, None, None), "median", "change cpu", (
        "the work takes 0.2 ms where changes follow at once; the rest is cold caches and the"
        " wake-ups of two threads")),
    Row("bytes from the API server for it", "change", "received", ()),
    Row("every endpoint replaced over 60 s, p99", "churn", "latency", (20, None, None), "p99"),
    Row("CPU for it", "churn", "cpu", (15, None, None), next_idea=(
        "833 changes a second; to decode an event takes 0.03 to 0.06 ms, 3 to 5 %")),
    Row("bytes from the API server for it", "churn", "received", ()),
    Row("all endpoints replaced at once", "burst", "time", (2.5, 8, 6)),
    Row("restart, nothing changed: to verified", "restart", "time", (1.5, 3.5, 4.5),
        next_idea=_RESTART),
    Row("restart: elements written", "restart", "written", (0, 0, 0)),
    Row("idle, CPU", "idle", "cpu", (0.1, 0.1, 0.1)),
    Row("resident when idle", "memory", "resident", ()),
    Row("first packet, 10 endpoints, added", "first-packet", "added: 10 endpoints",
        (1.5, 1.5, 1.5), "median", "first packet", _PACKET),
    Row("first packet, 10 endpoints, without counters", "first-packet",
        "added: 10 endpoints, without counters", ()),
    Row("first packet, 10 endpoints, by the commit before counters", "first-packet",
        "added: 10 endpoints, earlier commit", ()),
    Row("first packet, 1 endpoint, added", "first-packet", "added: 1 endpoint", ()),
    Row("first packet, NAT hooks without rules", "first-packet", "added: NAT hooks alone", ()),
    Row("first packet, rules like kube-proxy's, 10 endpoints", "first-packet",
        "added: rules like kube-proxy's, 10 endpoints", ()),
    Row("first packet, 10 endpoints, other Services sticky", "first-packet",
        "added: 10 endpoints, others sticky", ()),
    Row("first packet, sticky, 10 endpoints", "first-packet", "added: sticky, 10 endpoints", ()),
    Row("first packet, sticky, 1,000 endpoints", "first-packet", "added: sticky, 1000 endpoints",
        ()),
)  # fmt: skip


Runs = dict[str, dict[str, dict[str, Any]]]


def read(directory: Path) -> tuple[Runs, list[dict[str, Any]]]:
    """Runs by measure and size, and the heads of the files."""
    runs: Runs = {}
    heads = []
    for path in sorted(directory.glob("*.json"), key=lambda p: not p.name.startswith("growth")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if "measure" not in content:
            continue
        name = content["measure"].removeprefix("growth-")
        heads.append(content)
        runs.setdefault(name, {}).update({run["size"]: run for run in content["runs"]})
    return runs, heads


def write(directory: Path) -> Path:
    """Makes the page and the plots; returns the page's path."""
    runs, heads = read(directory)
    if not heads:
        raise SystemExit(f"bench: no results in {directory}; measure first")
    profile_path = directory / "profile.json"
    profile = json.loads(profile_path.read_text()) if profile_path.exists() else None
    plots = PAGE.parent / "performance"
    plots.mkdir(parents=True, exist_ok=True)
    _plots(runs, plots)
    lines = [*_head(heads), *_table(runs), *_growth(runs), *_before(runs, directory / "before")]
    lines += [*_connections(runs), *_conntrack(runs), *_theirs(runs), *_curves(), *_how(runs)]
    lines += _profile(profile)
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return PAGE


def _head(heads: list[dict[str, Any]]) -> Iterable[str]:
    one = max(heads, key=lambda h: h["made"])
    machine, day = one["machine"], one["made"][:10]
    commits = ", ".join(sorted({h["commit"] for h in heads if h["made"][:10] == day}))
    loads = [h["machine"]["load_average"] for h in heads]
    older = sorted({(h["made"][:10], h["measure"]) for h in heads if h["made"][:10] != day})
    yield "# Performance"
    yield ""
    yield "Written by `python -m bench report` from the JSON files in `docs/performance/`."
    yield f"Measured {one['made'][:10]} at commit {commits} on {machine['cores']} cores"
    yield f"({machine['processor']}), Linux {one['kernel']}, Python {one['python']}. The load"
    yield f"average was {min(loads):.1f} to {max(loads):.1f} when the measurements began."
    yield "Sizes are Services x endpoints of each. Values are medians; spreads, repeats and the"
    yield "machine's own speed at that moment (yardsticks) are in the files."
    if max(loads) > machine["cores"]:
        yield ""
        yield "**The machine was shared**: where the load average is above the number of cores,"
        yield "times say how long a process waited for its turn, and CPU rises, too, as caches and"
        yield "cores are shared. Only memory, bytes and element counts do not depend on that."
    for remark in dict.fromkeys(r for h in heads for r in h.get("remarks", ())):
        yield ""
        yield remark
    if older:
        yield ""
        listed = ", ".join(f"{measure} ({made})" for made, measure in older)
        yield f"Older than that, and not measured again: {listed}."
    if any(h["quick"] for h in heads):
        yield ""
        yield "**Some of this is from a `--quick` run and means little.**"
    yield ""


def _value(runs: Runs, row: Row, size: str) -> tuple[float, str] | None:
    found = runs.get(row.measure, {}).get(size, {}).get("metrics", {}).get(row.metric)
    if found is None:
        return None
    return found.get(row.field, found["most"]), found["unit"]


def _text(value: tuple[float, str]) -> str:
    return f"{_short(value[0])} {value[1]}"


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def _table(runs: Runs) -> Iterable[str]:
    yield "## What must be reached, and what is"
    yield ""
    yield "| measure | " + " | ".join(f"{TITLES[c]} | goal" for c in COLUMNS) + " |"
    yield "|---|" + "---|---|" * len(COLUMNS)
    missed = []
    for row in ROWS:
        cells = []
        for index, size in enumerate(COLUMNS):
            value = _value(runs, row, size)
            goal = row.goals[index] if row.goals else None
            if value is None:
                missing = "" if row.measure == "churn" else "not measured"
                cells += [missing, f"{goal:g}" if goal is not None else ""]
                continue
            text = _text(value)
            if goal is None:
                cells += [text, ""]
            elif value[0] <= goal:
                cells += [text, f"{goal:g}, met"]
            else:
                cells += [f"**{text}**", f"{goal:g}, **not met**"]
                missed.append((row, size, value[0] / goal))
        yield f"| {row.title} | " + " | ".join(cells) + " |"
    yield ""
    sticky = _sticky(runs)
    if sticky:
        yield sticky
        yield ""
    if missed:
        yield "Not met; with what is known of the reason, or an idea that was not tried:"
        yield ""
        for row in dict.fromkeys(row for row, _, _ in missed):
            ratios = (f"{TITLES[s]} {ratio:.2g}" for r, s, ratio in missed if r is row)
            idea = f"; {row.next_idea}" if row.next_idea else ""
            yield f"- {row.title}: times the goal: {', '.join(ratios)}{idea}."
        yield ""


def _sticky(runs: Runs) -> str:
    for run in runs.get("first-packet", {}).values():
        few, many = (run["metrics"][f"added: sticky, {n} endpoints"] for n in (10, 1000))
        noise = max(m["quartiles"][1] - m["quartiles"][0] for m in (few, many))
        difference = many["median"] - few["median"]
        verdict = "equal within noise" if abs(difference) <= noise else "not equal"
        return (
            f"Session affinity with 1,000 endpoints against 10: {difference:+.2f} us,"
            f" {verdict} (quartiles of the batches {noise:.2f} us apart)."
        )
    return ""


ELSEWHERE = (
    ("process start to programmed", "7.0 to 14.8 s", "6.3 to 16.6 s", "1.31 to 1.74 s"),
    ("CPU for it, child processes included", "6.7 to 14.6 s", "6.2 to 16.3 s", "1.25 to 1.69 s"),
    ("peak resident memory", "185 MB and `nft`", "180 MB and `nft`", "81 MB"),
    ("bytes from the API server for it", "10.7 MB", "10.7 MB", "20.4 MB"),
    ("CPU of the API server for it", "0.5 to 0.7 s", "0.4 to 0.7 s", "0.4 to 0.9 s"),
    (
        "one endpoint replaced, API write to kernel, p50 / p99",
        "2,112 / 2,561 ms",
        "134 / 205 ms",
        "6.8 / 18.9 ms (the write itself: 4.5)",
    ),
    ("CPU for that change", "2,190 ms", "173 ms", "about 1 ms"),
)
"""5,000 Services x 10 endpoints: kube-proxy 1.36.2, the same with its lists over netlink as 1.37
has them, sliceproxy 0.1. Medians of 3 on 2 noisy cores, beside a real API server 1.36.2."""


def _theirs(runs: Runs) -> Iterable[str]:
    yield "## Beside kube-proxy"
    yield ""
    yield "kube-proxy cannot run where this page is made; its figures were **measured elsewhere**:"
    yield "a real kube-apiserver 1.36.2 with 5,000 Services of 10 endpoints, kube-proxy 1.36.2 in"
    yield "nftables mode (nft 1.1.3) and sliceproxy 0.1 one after the other on the same 2 cores,"
    yield "medians of 3 on a noisy machine. *Listing by netlink* is the same kube-proxy with the"
    yield "change of 1.37 that lists nftables objects over netlink instead of with `nft`."
    yield ""
    yield "| measure | kube-proxy 1.36.2 | listing by netlink, as 1.37 | sliceproxy 0.1 |"
    yield "|---|---|---|---|"
    for cells_of_row in ELSEWHERE:
        yield f"| {' | '.join(cells_of_row)} |"
    yield ""
    yield "An earlier run had other sizes too; ours are of this page's run, with prepared answers:"
    yield ""
    yield "| measure | " + " | ".join(f"ours {TITLES[c]} | kube-proxy" for c in COLUMNS) + " |"
    yield "|---|" + "---|---|" * len(COLUMNS)
    for row in ROWS:
        if not row.theirs:
            continue
        cells = []
        for index, size in enumerate(COLUMNS):
            value = _value(runs, row, size)
            cells += [
                _text(value) if value else "not measured",
                KUBE_PROXY_TEXT[row.theirs][index],
            ]
        yield f"| {row.title} | " + " | ".join(cells) + " |"
    yield ""


def _curves() -> Iterable[str]:
    for name, words in (
        ("time", "Process start to all programmed"),
        ("memory", "Peak resident memory"),
        ("latency", "One endpoint replaced"),
    ):
        yield f"![{words}](performance/{name}.svg)"
        yield ""


def _how(runs: Runs) -> Iterable[str]:
    loads = runs.get("load", {}).values()
    megabytes = ", ".join(f"{r['size']}: {r['notes']['object_bytes'] / 1e6:.0f} MB" for r in loads)
    yield "## How it was measured"
    yield ""
    yield "Everything is in network namespaces, against an API server of the bench whose answers"
    yield "lie ready as bytes. Objects carry all that a real server sends (managed fields, owner"
    yield f"references), in protobuf: {megabytes}. Lists are streamed, a chunk per object."
    yield ""
    yield "- **load**: from starting the process, on a kernel without our tables, to its line"
    yield '  "programmed" at the pipe. CPU is the process\'s own clock; the peak is VmHWM. The'
    yield "  kernel's part is `kernel_ms` of that line: encode, send and commit, with all rules."
    yield "- **change**: from writing a watch event into the socket to the nf_tables notification"
    yield "  with the new address, heard in the agent's namespace. Every change is taken back"
    yield "  before the next; CPU is that of the process over all of them."
    yield "- **churn**: one event for each endpoint, evenly over a minute; latency is that from its"
    yield "  bytes in the socket to the notification."
    yield "- **burst**: from the first byte of events that rewrite every slice to the notification"
    yield "  of the last element. Listening costs the kernel time while it commits; it is included."
    yield "- **restart**: SIGKILL, then from the new process's start to its line"
    yield '  "verified"; elements written are that line\'s.'
    yield "- **first packet**: the duration of the client's `sendto`, in which it crosses"
    yield "  the client's, the node's and the pod's namespaces; a new flow each time, in random"
    yield "  turns. *Added* is the difference to a second world whose node only tracks connections"
    yield "  and has no NAT; each repeat is the difference of medians of 250. `added: direct` in"
    yield "  the file is a packet that our tables see and let pass. Rules like kube-proxy's are an"
    yield "  imitation by hand (`bench/like_kube_proxy.py`), with 5,000 Services at the most."
    yield ""


def _profile(profile: dict[str, Any] | None) -> Iterable[str]:
    if profile is None:
        return
    imports = profile["imports"]
    yield "## Where the time goes"
    yield ""
    yield f"A bare Python takes {imports['python']:.2f} s from start to end, one that imports what"
    yield f"the agent needs {imports['imports']:.2f} s. The rest, stage by stage without threads:"
    yield ""
    sizes = profile["sizes"]
    names = list(next(iter(sizes.values()))["stages"])
    yield "| stage, s | " + " | ".join(sizes) + " |"
    yield "|---|" + "---|" * len(sizes)
    for name in names:
        yield f"| {name} | " + " | ".join(f"{s['stages'][name]:.2f}" for s in sizes.values()) + " |"
    yield ""
    yield "| one change, ms | " + " | ".join(sizes) + " |"
    yield "|---|" + "---|" * len(sizes)
    for name in next(iter(sizes.values()))["change_ms"]:
        cells = (f"{s['change_ms'][name]:.3f}" for s in sizes.values())
        yield f"| {name} | " + " | ".join(cells) + " |"
    yield ""
    memory = sizes.get("5000x10", {}).get("memory")
    if memory:
        yield f"Python objects after a start at 5,000 x 10 ({sum(memory.values()):.0f} MiB), by the"
        yield "module that made them (tracemalloc):"
        yield ", ".join(f"`{name}` {mib:.1f}" for name, mib in list(memory.items())[:8]) + "."
        yield ""
    yield "The hottest functions by cProfile (their own share of the stage):"
    yield ""
    size = max(sizes, key=lambda s: Size.parse(s).total)
    for name, rows in sizes[size]["hot"].items():
        if name == "apply":
            continue
        top = ", ".join(f"`{r['function']}` {r['share']:.0%}" for r in rows[:6])
        yield f"- {name}, {size}: {top}"
    yield ""


def _growth(runs: Runs) -> Iterable[str]:
    series = _series(runs)
    if len(series) < 2:
        return
    yield "## Growth"
    yield ""
    yield "With 10 endpoints in each Service:"
    yield ""
    yield "| Services | endpoints | start, s | peak, MiB | change p50, ms | restart, s | |"
    yield "|---|---|---|---|---|---|---|"
    for size in series:
        values = [_metric(runs, size, *m) for m in _GROWTH]
        cells = " | ".join("" if v is None else f"{v:.3g}" for v in values)
        yield f"| {size.services:,} | {size.total:,} | {cells} | measured |"
    goal = GOAL_OF_GROWTH
    if goal in series:
        verdicts = []
        for what, limit in zip(_GROWTH, _GOALS_OF_GROWTH, strict=True):
            value = _metric(runs, goal, *what)
            met = value is not None and value <= limit
            verdicts.append(f"{limit:g}, {'met' if met else '**not met**'}")
        yield f"| goal at {goal.services:,} | {goal.total:,} | {' | '.join(verdicts)} | |"
    else:
        computed = [_extrapolated(runs, series, m) for m in _GROWTH]
        cells = " | ".join("" if v is None else f"{v:.3g}" for v in computed)
        yield f"| {goal.services:,} | {goal.total:,} | {cells} | **computed**, a straight line |"
        yield ""
        yield f"`python -m bench growth --size {goal}` measures what is computed here."
    yield ""


def _before(runs: Runs, directory: Path) -> Iterable[str]:
    """The same measures with the code of an earlier commit, in turns with this one's."""
    before, heads = read(directory)
    if not heads:
        return
    yield "## Before and after"
    yield ""
    yield f"Version 0.1.0 (commit {heads[0]['commit']}, JSON) and this one, for each size one after"
    yield "the other on one machine, which was not quiet:"
    yield ""
    yield "| measure | " + " | ".join(f"{TITLES[c]} before | after" for c in COLUMNS) + " |"
    yield "|---|" + "---|---|" * len(COLUMNS)
    for row in ROWS:
        if row.measure not in before or (row.measure, row.metric) == ("load", "received"):
            continue
        cells = []
        for size in COLUMNS:
            for of in (before, runs):
                value = _value(of, row, size)
                cells.append(_text(value) if value else "")
        if any(cells):
            yield f"| {row.title} | " + " | ".join(cells) + " |"
    yield ""


def _connections(runs: Runs) -> Iterable[str]:
    for size, run in runs.get("connections", {}).items():
        metrics = run["metrics"]
        yield "## Connections"
        yield ""
        yield f"One client opens TCP connections one after the other; {TITLES.get(size, size)}; the"
        yield f"worlds in random order, {metrics['opened: sliceproxy']['repeats']} rounds of"
        yield f"{run['notes']['seconds']} s, client and servers on one processor. Medians of the"
        yield "rounds, and of the ratios within a round with the interval that has the median with"
        yield "95 %. Without rules nothing is tracked, either."
        yield ""
        yield "| | opened a second | one connection, Gbit/s |"
        yield "|---|---|---|"
        for name in (n.removeprefix("opened: ") for n in metrics if n.startswith("opened")):
            cells = []
            for found in (metrics[f"{kind}: {name}"] for kind in ("opened", "sent")):
                if "interval" in found:
                    low, high = found["interval"]
                    cells.append(f"{found['median']:.2f} ({low:.2f} to {high:.2f})")
                else:
                    cells.append(_short(found["median"]))
            yield f"| {name} | {' | '.join(cells)} |"
        yield ""


def _conntrack(runs: Runs) -> Iterable[str]:
    for size, run in runs.get("conntrack", {}).items():
        metrics = run["metrics"]
        wait, cpu = metrics["wait"]["median"], metrics["cpu"]["median"]
        extra = metrics["deleted beyond those concerned"]["most"]
        yield "## A large conntrack table"
        yield ""
        yield f"{size} in the table, and a UDP endpoint with 500 of them is removed: the loop waits"
        yield f"{wait:.1f} ms at the longest (goal 20, {_verdict(wait, 20)}; without any work here:"
        yield f"{run['notes']['waits_while_idle_ms']:.1f} ms), {cpu:.2f} s of CPU in the cleaner's"
        yield f"thread (goal 0.5, {_verdict(cpu, 0.5)}), {metrics['memory']['median']:.1f} MiB more"
        yield f"memory, {extra:.0f} flows deleted that are not concerned."
        yield ""


def _verdict(value: float, goal: float) -> str:
    return "met" if value <= goal else "**not met**"


_GROWTH = (("load", "time"), ("load", "peak"), ("change", "latency"), ("restart", "time"))
_GOALS_OF_GROWTH = (8, 650, 1.5, 9)


def _series(runs: Runs) -> list[Size]:
    sizes = (Size.parse(s) for s in runs.get("load", {}))
    return sorted(s for s in sizes if s.endpoints == GOAL_OF_GROWTH.endpoints)


def _metric(runs: Runs, size: Size, measure: str, name: str) -> float | None:
    found = runs.get(measure, {}).get(str(size))
    return found["metrics"][name]["median"] if found else None


def _extrapolated(runs: Runs, series: list[Size], what: tuple[str, str]) -> float | None:
    points = [(s.services, v) for s in series if (v := _metric(runs, s, *what)) is not None]
    if len(points) < 2:
        return None
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points)
    slope /= sum((x - mean_x) ** 2 for x, _ in points)
    return mean_y + slope * (GOAL_OF_GROWTH.services - mean_x)


# --- plots --------------------------------------------------------------------------------------


def _plots(runs: Runs, directory: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "sliceproxy"
    from matplotlib import pyplot as plt

    for name, measure, metric, theirs, label in (
        ("time", "load", "time", "time", "start to all programmed, s"),
        ("memory", "load", "peak", "peak", "peak resident memory, MiB (kube-proxy with its nft)"),
        ("latency", "change", "latency", "latency", "one endpoint replaced, ms"),
    ):
        figure, axes = plt.subplots(figsize=(7, 4))
        ours = sorted(
            (Size.parse(s), run["metrics"][metric]) for s, run in runs.get(measure, {}).items()
        )
        labels = [str(s) for s, _ in ours]
        places, reference = range(len(ours)), KUBE_PROXY[theirs]
        heights = [m["median"] for _, m in ours]
        axes.bar([p - 0.2 for p in places], heights, 0.4, label="sliceproxy")
        known = [(p, reference[s]) for p, s in enumerate(labels) if s in reference]
        axes.bar(
            [p + 0.2 for p, _ in known],
            [v for _, v in known],
            0.4,
            label="kube-proxy 1.36.2 (measured elsewhere)",
        )
        axes.set_xticks(list(places), labels, rotation=20)
        axes.set_yscale("log")
        axes.set_ylabel(label)
        axes.set_xlabel("Services x endpoints of each")
        axes.legend()
        figure.tight_layout()
        figure.savefig(directory / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)
