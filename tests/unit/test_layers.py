"""`rules` is pure, and its modules import each other in one direction."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in (ROOT / "rules").rglob("*.py")
    if path.stem != "__init__"
}

FORBIDDEN = {
    *("agent", "lab", "tests", "bench"),
    *("socket", "socketserver", "ssl", "select", "selectors", "http", "urllib", "asyncio"),
    *("os", "subprocess", "signal", "threading", "multiprocessing", "queue", "pathlib", "io"),
    *("time", "datetime", "random", "secrets"),
    *("logging", "structlog", "warnings"),
    *("kubernetes", "pyroute2", "urllib3", "click", "rich", "yaml", "nftables", "inotify_simple"),
}
"""Sockets, files, processes and threads, clocks and chance, logs, clusters."""

PURE = {("socket", "inet_pton"), ("socket", "AF_INET"), ("socket", "AF_INET6")}
"""Names of forbidden modules that are values or turn text into bytes and do nothing else."""

ALLOWED_PACKAGES = {"msgspec", "google", "rules"}
"""What is not in the standard library: msgspec for JSON and google.protobuf for protobuf, which
turn bytes into values and do nothing else."""

DOWN = (
    *("language", "objects", "weights", "problems", "target", "selection", "slots", "shares"),
    *("tables", "text"),
    *("frontends", "program", "lookup", "stale_flows", "diff"),
    *("netlink.attributes", "netlink.messages", "netlink.nftables"),
    *("netlink.expressions", "netlink.elements", "netlink.counters", "netlink.sets"),
    *("netlink.batch", "transaction"),
)
"""The path of a change: each module imports only those before it. Others are not on the path."""


def imports(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, anywhere in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute here"
            assert node.module
            if {(node.module, alias.name) for alias in node.names} <= PURE:
                continue
            yield node.module
            # `from rules import text` names a module too
            if node.module == "rules":
                yield from (f"rules.{alias.name}" for alias in node.names)


def calls(path: Path) -> Iterator[str]:
    """The names of functions that a file calls directly."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id


GRAPH = {
    name: {i for i in imports(path) if i in MODULES and i != name} for name, path in MODULES.items()
}


def test_the_modules_are_found():
    assert {f"rules.{name}" for name in DOWN} <= MODULES.keys()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_rules_imports_no_io_no_clock_no_agent(module):
    roots = {name.partition(".")[0] for name in imports(MODULES[module])}
    assert not roots & FORBIDDEN
    assert not {"open", "print", "input", "__import__", "eval", "exec"} & set(
        calls(MODULES[module])
    )


@pytest.mark.parametrize("module", sorted(MODULES))
def test_rules_imports_nothing_from_outside_but_decoders(module):

    roots = {name.partition(".")[0] for name in imports(MODULES[module])}
    assert roots - set(sys.stdlib_module_names) <= ALLOWED_PACKAGES


def test_rules_has_no_import_cycle():
    assert set(TopologicalSorter(GRAPH).static_order()) == MODULES.keys()


@pytest.mark.parametrize("name", DOWN)
def test_a_module_imports_only_those_before_it(name):
    before = {f"rules.{earlier}" for earlier in DOWN[: DOWN.index(name)]}
    assert GRAPH[f"rules.{name}"] <= before


@pytest.mark.skipif("coverage" in sys.modules, reason="coverage imports sockets into each process")
def test_rules_can_be_imported_alone():
    """In a fresh interpreter nothing forbidden is loaded through what msgspec loads, either."""

    code = (
        "import sys\n"
        f"for name in {sorted(MODULES)!r}: __import__(name)\n"
        "print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(run.stdout.split())
    assert not loaded & {"agent", "ssl", "kubernetes", "pyroute2", "structlog", "yaml"}


ROOT_ROOMS = ("tests.kernel", "tests.cluster.test", "tests.container")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "tests" / "unit").rglob("*.py")), ids=lambda path: path.stem
)
def test_a_unit_test_needs_no_other_room(path):
    """`make test-unit` works without an engine's client, without root and without pyroute2."""
    assert [name for name in imports(path) if name.startswith(ROOT_ROOMS)] == []


def test_the_product_imports_neither_lab_nor_bench_nor_tests():
    product = [*(ROOT / "agent").rglob("*.py"), *(ROOT / "rules").rglob("*.py")]
    found = {
        (path.relative_to(ROOT).parts[:2], name.partition(".")[0])
        for path in product
        for name in imports(path)
        if name.partition(".")[0] in ("tests", "bench", "lab")
    }
    # `sliceproxy demo` runs lab in a checkout, and elsewhere names the place to get it
    assert found <= {(("agent", "cli"), "lab")}
