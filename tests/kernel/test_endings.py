"""The real agent where the machine is short of something: it continues, or ends with one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from agent.kernel.tables import Kernel
from lab.world import World
from tests.kernel.agent import PATIENCE, Agent, write
from tests.kernel.test_run import until
from tests.manifest import endpoint, service_document, slice_document

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make namespaces")

ROOT = Path(__file__).parents[2]
FIRST_PORT = 40_000


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World(prefix="sliceproxy-endings") as built:
        yield built


@pytest.fixture(autouse=True)
def _clean(world: World) -> Iterator[None]:
    yield
    with world.run("node", lambda: Kernel(own=False)) as kernel:
        kernel.remove()


def documents(health_checks: int = 0) -> list[dict[str, Any]]:
    """A Service, and so many with a health check port and an endpoint here."""
    found = [
        service_document(cluster_ips=["10.96.0.10"]),
        slice_document("web", [endpoint("10.244.1.11")]),
    ]
    for number in range(health_checks):
        name = f"balanced-{number}"
        found += [
            service_document(
                name,
                cluster_ips=[f"10.96.{1 + number // 250}.{number % 250}"],
                type="LoadBalancer",
                externalTrafficPolicy="Local",
                healthCheckNodePort=FIRST_PORT + number,
            ),
            slice_document(name, [endpoint("10.244.1.11")]),
        ]
    return found


@pytest.fixture
def place(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.json"
    write(path, *documents())
    return path


def limited(soft: int, hard: int) -> str:
    """For a shell: limits of open files."""
    return f"ulimit -S -n {soft}; ulimit -H -n {hard}"


def start(world: World, place: Path, shell: str, **options: Any) -> subprocess.Popen[str]:
    """The agent, after and with what a shell does."""
    command = [sys.executable, "-m", "agent", "run", "--from", str(place), "--node", "node-1"]
    process: subprocess.Popen[str] = world.popen(
        "node", ["sh", "-c", shell, "sh", *command], text=True, cwd=ROOT, **options
    )
    return process


def programmed(world: World) -> bool:
    with world.run("node", lambda: Kernel(own=False)) as kernel:
        return kernel.find(4) is not None


GET = """
import http.client, sys
for port, path in zip(sys.argv[1::2], sys.argv[2::2]):
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=5)
    try:
        connection.request("GET", path)
        print(connection.getresponse().status)
    except OSError as error:
        print(type(error).__name__)
"""


def statuses(world: World, *asked: tuple[int, str]) -> list[str]:
    """The HTTP status at each port and path on the node."""
    arguments = [str(part) for pair in asked for part in pair]
    process = world.popen(
        "node", [sys.executable, "-c", GET, *arguments], stdout=subprocess.PIPE, text=True
    )
    return str(process.communicate(timeout=PATIENCE)[0]).split()


@pytest.mark.parametrize("stderr", ["&-", "/dev/full"], ids=["closed", "full"])
def test_without_a_place_to_log_to_it_works(world: World, place: Path, stderr: str) -> None:
    """Standard error is closed, or a full disk; SIGTERM ends it as always."""
    process = start(world, place, f'exec "$@" 2>{stderr}')
    until(lambda: programmed(world))
    assert process.poll() is None
    process.terminate()
    assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize("files", [7, 12, 14, 16])
def test_with_too_few_descriptors_it_ends_with_one_line(
    world: World, place: Path, files: int
) -> None:
    """Wherever in its start they run out."""
    shell = f'{limited(files, files)}; exec "$@"'
    process = start(world, place, shell, stderr=subprocess.PIPE)
    try:
        error = process.communicate(timeout=PATIENCE)[1]
    finally:
        process.kill()
    last = error.splitlines()[-1]
    assert "Traceback" not in error
    assert "open files" in last
    assert process.returncode == 2


FAILS_AT_ONCE = """
from agent.serve.http import HttpServer

def work(self):
    raise RuntimeError("broken")

HttpServer.work = work
from agent.cli.main import main
main()
"""


def test_a_server_that_fails_as_soon_as_it_starts_ends_the_agent(world: World, place: Path) -> None:
    """Its failure is reported before the loop runs, and is not lost."""
    command = [sys.executable, "-c", FAILS_AT_ONCE, "run", "--from", str(place), "--node", "node-1"]
    process = world.popen("node", command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        error = process.communicate(timeout=PATIENCE)[1]
    finally:
        process.kill()
    last = json.loads(error.splitlines()[-1])
    assert last["event"] == "ended"
    assert "broken" in last["reason"]
    assert process.returncode == 2


@pytest.mark.parametrize(
    ("files", "opened"), [((1024, 4096), 1100), ((1024, 1024), 1024 - 256 - 128 - 1)]
)
def test_more_health_check_ports_than_the_soft_limit_of_files(
    world: World, tmp_path: Path, files: tuple[int, int], opened: int
) -> None:
    """The soft limit is raised; at the hard one, those that do not fit are reported in few lines.
    /livez and the ports that are open always answer."""
    place = tmp_path / "cluster.json"
    write(place, *documents(1100))
    with Agent(world, place, shell=limited(*files)) as agent:
        agent.wait("programmed")
        ports = [(FIRST_PORT + number, "/") for number in range(1100)]
        until(lambda: statuses(world, *ports).count("200") == opened)
        answers = statuses(world, (10256, "/livez"), (10256, "/healthz"), (10256, "/readyz"))
        assert answers == ["200"] * 3
        failed = [x for x in agent.lines if x["event"].endswith("_failed")]
        if opened == 1100:
            assert failed == []
        else:
            assert sum(x.get("count", 1) for x in failed) == 1100 - opened
            assert len(failed) == 4
            assert all("service" in x for x in failed[:3])


def test_health_before_the_first_programming_and_with_tables_of_an_earlier_run(
    world: World, place: Path
) -> None:
    """With nothing programmed: alive, not healthy, not ready. With the tables of an earlier run:
    healthy, and not ready before this run has programmed its own."""
    asked = [(10256, "/livez"), (10256, "/healthz"), (10256, "/readyz")]
    place.write_text("{ not json")
    with Agent(world, place) as agent:
        agent.wait("started")
        until(lambda: statuses(world, *asked) == ["200", "503", "503"])
        write(place, *documents())
        agent.wait("programmed")
        until(lambda: statuses(world, *asked) == ["200"] * 3)
        place.write_text("{ not json")
        agent.kill()
        first = agent.restart()
        agent.wait("earlier_tables_found", since=first)
        until(lambda: statuses(world, *asked) == ["200", "200", "503"])
        write(place, *documents())
        agent.wait("verified", since=first)
        assert statuses(world, *asked) == ["200"] * 3


@pytest.mark.parametrize("flags", [(), ("--no-own",)])
def test_a_metric_says_whether_the_tables_are_owned(
    world: World, place: Path, flags: tuple[str, ...]
) -> None:
    """As the kernel reports their owner."""

    def owned() -> set[str]:
        with urlopen("http://127.0.0.1:10249/metrics") as answer:
            text = answer.read().decode()
        return set(re.findall(r"^sliceproxy_table_owned\{.*", text, re.MULTILINE))

    with Agent(world, place, *flags) as agent:
        agent.wait("programmed")
        value = "0.0" if flags else "1.0"
        wanted = {f'sliceproxy_table_owned{{family="{f}"}} {value}' for f in ("IPv4", "IPv6")}
        assert world.run("node", owned) == wanted


def test_what_uses_the_metrics_port_of_kube_proxy_finds_the_mode(world: World, place: Path) -> None:
    with Agent(world, place) as agent:
        agent.wait("programmed")
        assert statuses(world, (10249, "/proxyMode"), (10249, "/metrics")) == ["200", "200"]
