"""The command line of the bench suite: `python -m bench`."""

from __future__ import annotations

import argparse
import compileall
import sys
import time
from pathlib import Path

from bench.process import ROOT

SIZES = "5000x10,5000x50,44000x1"
QUICK_SIZES = "500x10"
GROWTH_SIZES = ("1250x10", "2500x10", "10000x10", "20000x10")
OUTPUT = ROOT / "docs" / "performance"

DESCRIPTION = """\
Measures sliceproxy as an operator would, in network namespaces of its own (root).

load          process start to all programmed; CPU, peak memory, the kernel's part
restart       killed and started again with nothing changed
memory, idle  what it holds and uses while nothing happens
churn         every endpoint replaced, one by one, over a minute
change        one endpoint replaced: event in the socket to notification; CPU for it
burst         all endpoints of all Services replaced at once
api           the agent's API: the loop's pause, answers, changes while it is polled
first-packet  what a connection's first packet through a cluster IP takes longer
connections   opened a second, and the throughput of one, with our rules, others and none
conntrack     a UDP endpoint is removed while the table holds a million flows
growth        load at more sizes, for the curve
all           all of these, then profile and report (about 15 minutes)

profile       where the time of a start and of a change goes
report        writes docs/performance.md and its plots from the JSON files
compare A B   what got worse from A to B (files or directories of results) beyond noise
"""


def main() -> int:
    arguments = _arguments()
    match arguments.what:
        case "compare":
            from bench.results import compare

            if len(arguments.files) != 2:
                raise SystemExit("bench: compare needs two files or two directories")
            lines, worse = compare(*arguments.files)
            print("\n".join(lines))
            return 1 if worse else 0
        case "report":
            from bench.report import write

            print(write(arguments.output))
            return 0
    return _measure(arguments)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "what",
        nargs="?",
        default="all",
        choices=(
            *("load", "restart", "memory", "idle", "change", "churn", "burst", "first-packet"),
            *("growth", "connections", "conntrack", "api"),
            *("all", "profile", "report", "compare"),
        ),
    )
    parser.add_argument("files", nargs="*", type=Path, help="for compare: two results")
    parser.add_argument("--size", help=f"Services x endpoints, comma separated [{SIZES}]")
    parser.add_argument("--quick", action="store_true", help="one small size, few repeats")
    parser.add_argument(
        "--earlier", type=Path, help="for first-packet: a checkout to compare with, too"
    )
    parser.add_argument("--output", type=Path, help=f"where the JSON files go [{OUTPUT}]")
    parser.add_argument(
        "--lists", choices=("streamed", "pages"), default="streamed", help="how lists are sent"
    )
    parser.add_argument(
        "--encoding",
        choices=("protobuf", "json"),
        default="protobuf",
        help="how lists and watches are encoded",
    )
    arguments = parser.parse_args()
    if arguments.output is None:
        arguments.output = ROOT / "build" / "bench-quick" if arguments.quick else OUTPUT
    return arguments


def _measure(arguments: argparse.Namespace) -> int:
    from bench import api, connections, conntrack, first_packet, profiling
    from bench.measure import MEASURES, Repeats, measure
    from bench.objects import Size
    from bench.process import MeasureError, apply_nice
    from bench.results import Results, say

    started = time.monotonic()
    apply_nice()
    # the image has bytecode; here a start would make its own if PYTHONDONTWRITEBYTECODE is set
    for part in ("agent", "rules"):
        compileall.compile_dir(ROOT / part, quiet=1)
    sizes = [
        Size.parse(s)
        for s in (arguments.size or (QUICK_SIZES if arguments.quick else SIZES)).split(",")
    ]
    repeats = Repeats.few() if arguments.quick else Repeats()
    results = Results(arguments.output, quick=arguments.quick)
    how = {"streams": arguments.lists == "streamed", "encoding": arguments.encoding}
    chosen = {arguments.what} if arguments.what != "all" else {"all"}
    everything = "all" in chosen
    try:
        wanted = set(MEASURES) if everything else chosen & set(MEASURES)
        for size in sizes if wanted else ():
            measure(wanted, size, repeats, results, **how)
        if everything or "api" in chosen:
            api.measure(sizes, results, quick=arguments.quick)
        if everything or "first-packet" in chosen:
            first_packet.measure(sizes, results, quick=arguments.quick, earlier=arguments.earlier)
        if everything or "connections" in chosen:
            rounds, seconds = (3, 0.1) if arguments.quick else (100, 0.1)
            connections.measure(sizes[0], results, rounds=rounds, seconds=seconds)
        if everything or "conntrack" in chosen:
            conntrack.measure(
                results, flows=conntrack.QUICK_FLOWS if arguments.quick else conntrack.FLOWS
            )
        if "growth" in chosen or (everything and not arguments.quick):
            few = repeats._replace(loads=1, restarts=1, changes=100)
            results.prefix = "growth-"
            for text in GROWTH_SIZES if not arguments.size else arguments.size.split(","):
                measure({"load", "restart", "change"}, Size.parse(text), few, results, **how)
            results.prefix = ""
        if everything or "profile" in chosen:
            profiling.measure(sizes, arguments.output)
        if everything and not arguments.quick:
            from bench.report import write

            say(f"written: {write(arguments.output)}")
    except MeasureError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    say(f"{time.monotonic() - started:.0f} seconds; results in {arguments.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
