"""What a measurement gives: values with median and spread, and what they can be related to."""

from __future__ import annotations

import json
import os
import platform
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.process import ROOT, versions

FORMAT = 1
LEAST_NOISE = 0.05
"""Differences below this share of a value are noise, however steady the repeats were."""


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def metric(values: Iterable[float], unit: str) -> dict[str, Any]:
    """Values with their median, quartiles and ends; the values themselves if they are few."""
    values = [round(v, 6) for v in values]
    summary: dict[str, Any] = {
        "unit": unit,
        "repeats": len(values),
        "median": round(statistics.median(values), 6),
        "quartiles": [round(quantile(values, q), 6) for q in (0.25, 0.75)],
        "least": min(values),
        "most": max(values),
    }
    if len(values) > 100:
        summary["p99"] = round(quantile(values, 0.99), 6)
    else:
        summary["values"] = values
    return summary


# --- the machine --------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory = int(Path("/proc/meminfo").read_text(encoding="ascii").split()[1]) // 1024
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": memory,
        "load_average": os.getloadavg()[0],
    }


def commit() -> str:
    """The commit of the tree, "+" behind it if product files differ from it."""
    git = ["git", "-C", str(ROOT)]
    try:
        name = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "agent", "rules"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name + ("+" if dirty else "")


def yardstick() -> dict[str, float]:
    """How fast this machine is at this moment: a loop, JSON, and waking another process."""
    text = json.dumps([{"name": f"n{i}", "values": [i, i + 1], "on": True} for i in range(20_000)])
    started = time.perf_counter()
    total = 0
    for number in range(2_000_000):
        total += number
    looped = time.perf_counter()
    json.loads(text)
    decoded = time.perf_counter()
    return {
        "python_loop_ms": round((looped - started) * 1e3, 3),
        "json_decode_ms": round((decoded - looped) * 1e3, 3),
        "wake_up_us": round(_wake_up() * 1e6, 1),
    }


def _wake_up() -> float:
    """Median time from writing to a process that waits until its answer is here."""
    code = "import os\nwhile d := os.read(0, 1): os.write(1, d)"
    with subprocess.Popen(
        [sys.executable, "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdin
        assert child.stdout
        write, read, times = child.stdin.fileno(), child.stdout.fileno(), []
        for _ in range(100):
            time.sleep(0.001)
            started = time.perf_counter()
            os.write(write, b"x")
            select.select([read], [], [])
            os.read(read, 1)
            times.append(time.perf_counter() - started)
        child.stdin.close()
    return statistics.median(times)


# --- files --------------------------------------------------------------------------------------


class Results:
    """The results of a run, one file for each measure, written after each size."""

    def __init__(self, directory: Path, *, quick: bool) -> None:
        self._directory = directory
        self._head = {
            "format": FORMAT,
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "kernel": platform.release(),
            "python": platform.python_version(),
            "versions": dict(versions()),
            "machine": machine(),
            "quick": quick,
        }
        self.prefix = ""
        self._runs: dict[str, list[dict[str, Any]]] = {}

    def add(
        self,
        measure: str,
        size: str,
        metrics: dict[str, dict[str, Any]],
        yardsticks: list[dict[str, float]],
        **notes: Any,
    ) -> None:
        """Keeps and shows what was measured. `yardsticks` were taken before and after."""
        mean = {
            name: round(statistics.mean(y[name] for y in yardsticks), 3) for name in yardsticks[0]
        }
        run = {"size": size, "metrics": metrics, "yardstick": mean, "notes": notes}
        measure = self.prefix + measure
        self._runs.setdefault(measure, []).append(run)
        for name, one in metrics.items():
            tail = f", p99 {one['p99']:.4g}" if "p99" in one else ""
            low, high = one["quartiles"]
            say(
                f"  {measure} {size}: {name} {one['median']:.4g} {one['unit']}"
                f" ({low:.4g} to {high:.4g}{tail}, {one['repeats']} times)"
            )
        self.write(measure)

    def write(self, measure: str) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        content = {**self._head, "measure": measure, "runs": self._runs[measure]}
        path = self._directory / f"{measure}.json"
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- comparing ----------------------------------------------------------------------------------

_YARDSTICK = {"s": "python_loop_ms", "ms": "wake_up_us"}
_RATES = {"a second", "Gbit/s"}
"""Units of values that are better when they are more."""


def compare(before: Path, after: Path) -> tuple[list[str], int]:
    """Lines that say what changed beyond noise, and how many values got worse.

    Times are related to the yardstick of their own run. Noise is the wider of the two spreads
    (between the quartiles), and LEAST_NOISE at least. Values are better when they are less, rates
    when they are more.
    """
    old, new = _by_name(before), _by_name(after)
    lines, worse = [], 0
    for key in sorted(old.keys() & new.keys()):
        (a, yard_a), (b, yard_b) = old[key], new[key]
        stick = _YARDSTICK.get(a["unit"])
        speed = yard_b[stick] / yard_a[stick] if stick else 1.0
        expected = a["median"] * speed
        noise = max(
            LEAST_NOISE * expected,
            speed * (a["quartiles"][1] - a["quartiles"][0]),
            b["quartiles"][1] - b["quartiles"][0],
        )
        difference = b["median"] - expected
        if abs(difference) <= noise:
            continue
        is_worse = (difference > 0) != (a["unit"] in _RATES)
        verdict = "WORSE" if is_worse else "better"
        worse += is_worse
        lines.append(
            f"{verdict}: {' '.join(key)}: {a['median']:.4g} -> {b['median']:.4g} {a['unit']}"
            f" (expected {expected:.4g} on this machine now, noise {noise:.2g})"
        )
    for key in sorted(old.keys() - new.keys()):
        lines.append(f"gone: {' '.join(key)}")
    return lines or ["nothing differs beyond noise"], worse


def _by_name(path: Path) -> dict[tuple[str, str, str], tuple[dict[str, Any], dict[str, float]]]:
    found = {}
    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        content = json.loads(file.read_text(encoding="utf-8"))
        for run in content.get("runs", ()):
            for name, one in run["metrics"].items():
                found[content["measure"], run["size"], name] = (one, run["yardstick"])
    return found
