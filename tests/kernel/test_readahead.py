"""What is read ahead is used if nothing changed in our tables since, and only then."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import structlog
from structlog.testing import capture_logs

from agent.kernel import readahead
from agent.kernel.errors import OwnedByOther, Refused
from agent.kernel.readahead import ReadAhead, read_ahead
from agent.kernel.reading import KernelTable, TableReader
from agent.kernel.tables import Kernel
from agent.loop import reader
from lab.world import World
from rules.diff import Elements
from rules.netlink.batch import Batch
from rules.tables import FAMILIES, SETS, TABLE
from rules.text import Key
from tests.kernel.proxy import Proxy
from tests.manifest import endpoint, endpoint_slice, service

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make namespaces")

LOG = structlog.get_logger()
CLUSTER_IPS = SETS[4].cluster_ips
VIP, OTHER = bytes((10, 96, 0, 10)), bytes((10, 9, 9, 9))
OBJECTS = (service(), endpoint_slice("web", [endpoint("10.244.1.11"), endpoint("10.244.1.12")]))
Begin = Callable[[Kernel], ReadAhead | None]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World(pods=0, remotes=0) as built:
        yield built


@pytest.fixture(params=[True, False], ids=["owned", "not owned"])
def own(request: pytest.FixtureRequest, world: World) -> Iterator[bool]:
    yield request.param
    remove(world)


@pytest.fixture
def begin(world: World) -> Begin:
    return lambda kernel: world.run("node", read_ahead, kernel, LOG)


def connect(world: World, *, own: bool) -> Kernel:
    return world.run("node", lambda: Kernel(own=own))


def remove(world: World) -> None:
    with connect(world, own=False) as kernel:
        kernel.remove()


@pytest.fixture
def kernel(world: World, own: bool) -> Iterator[Kernel]:
    """An agent's connection, where another agent has died."""
    with Proxy(world, own=own) as proxy:
        proxy.put(*OBJECTS)
    with connect(world, own=own) as made:
        yield made


def wait(ahead: ReadAhead) -> None:
    """Until it has read what it can."""
    while ahead.alive:
        time.sleep(0.001)


def put(world: World, key: Key, table: str = TABLE) -> None:
    """What another process may do at any time: adds an element."""
    batch = Batch()
    if table != TABLE:
        batch.new_table(4, table, 0)
        batch.new_set(table, CLUSTER_IPS)
    batch.add_elements(table, CLUSTER_IPS, [(key, None)])
    with connect(world, own=False) as other:
        other.send(batch)


def test_it_reads_what_the_loop_would_read(kernel: Kernel, begin: Begin) -> None:
    ahead = begin(kernel)
    assert ahead
    kernel.take_over()
    for family in FAMILIES:
        found = kernel.find(family)
        there = ahead.take(family)
        assert found
        assert there
        assert there.elements == kernel.read(found)
        assert there.table._replace(flags=0, owner=0) == found._replace(flags=0, owner=0)
        assert kernel.fits(there.table)
    assert VIP in kernel.elements(CLUSTER_IPS)


def test_what_was_read_is_handed_out_once(kernel: Kernel, begin: Begin) -> None:
    ahead = begin(kernel)
    assert ahead
    assert ahead.take(4)
    assert ahead.take(4) is None
    assert ahead.take(6)
    ahead.stop()


def test_it_reads_maps_of_many_messages(world: World, kernel: Kernel, begin: Begin) -> None:
    """More than one call of recvmmsg() returns, and its last one ends in the middle."""
    keys = [bytes((11, a, b, c)) for a in range(4) for b in range(250) for c in range(120)]
    batch = Batch()
    batch.add_elements(TABLE, CLUSTER_IPS, [(k, None) for k in keys])
    with connect(world, own=False) as other:
        other.send(batch)
    ahead = begin(kernel)
    assert ahead
    there = ahead.take(4)
    assert there
    assert there.elements[CLUSTER_IPS].keys() == {VIP, *keys}


def test_nothing_is_begun_where_there_is_no_table(world: World, begin: Begin) -> None:
    with connect(world, own=True) as kernel:
        assert begin(kernel) is None


@pytest.mark.parametrize("finished", [True, False], ids=["behind the reading", "meanwhile"])
def test_a_change_before_the_tables_are_ours_is_noticed(
    world: World, kernel: Kernel, begin: Begin, finished: bool
) -> None:
    """Any process may change orphaned tables and those that cannot be owned."""
    ahead = begin(kernel)
    assert ahead
    if finished:
        wait(ahead)
    put(world, OTHER)
    kernel.take_over()
    assert not any(ahead.take(family) for family in FAMILIES)
    # the loop reads now what it could not read ahead
    table = next(t for t in Proxy(world).state.tables() if t.family == 4)
    view = reader(kernel, ahead)(table)
    assert view
    assert OTHER in view.elements[CLUSTER_IPS]


def test_a_table_that_was_deleted_meanwhile_is_noticed(
    world: World, kernel: Kernel, begin: Begin
) -> None:
    ahead = begin(kernel)
    assert ahead
    wait(ahead)
    remove(world)
    kernel.take_over()
    assert ahead.take(4) is None
    assert ahead.take(6) is None


def test_what_others_do_to_their_own_tables_does_not_count(
    world: World, kernel: Kernel, begin: Begin
) -> None:
    ahead = begin(kernel)
    assert ahead
    wait(ahead)
    before = kernel.generation()
    put(world, OTHER, "other")
    assert kernel.generation() != before
    kernel.take_over()
    assert ahead.take(4)
    batch = Batch()
    batch.delete_table(4, "other")
    kernel.send(batch)


def test_a_commit_elsewhere_does_not_make_it_read_all_elements_again(
    world: World, kernel: Kernel, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start's own commits, by which it takes over its tables, are such."""
    families: list[int] = []
    read = TableReader.read

    def read_during_commits(reading: TableReader, found: KernelTable) -> Elements:
        families.append(found.family)
        put(world, OTHER, f"other-{len(families)}")
        return read(reading, found)

    monkeypatch.setattr(TableReader, "read", read_during_commits)
    ahead = begin(kernel)
    assert ahead
    wait(ahead)
    kernel.take_over()
    assert ahead.take(4)
    assert families == list(FAMILIES)
    batch = Batch()
    for number in range(1, len(families) + 1):
        batch.delete_table(4, f"other-{number}")
    kernel.send(batch)


@pytest.mark.parametrize("changes", [False, True], ids=["changes nothing more", "changes them"])
def test_an_owner_that_exits_later(world: World, begin: Begin, changes: bool) -> None:
    with connect(world, own=True) as kernel:
        if not kernel.table_flags:
            pytest.skip("this kernel has no owned tables (Linux 6.9)")
        with Proxy(world, own=True) as one:
            one.put(*OBJECTS)
            ahead = begin(kernel)
            assert ahead
            wait(ahead)
            with pytest.raises(OwnedByOther):
                kernel.take_over()
            if changes:
                one.delete(*OBJECTS)
        kernel.take_over()
        there = ahead.take(4)
        assert bool(there) != changes
    remove(world)


@pytest.mark.parametrize("error", [Refused(12, "made up"), KeyError("made up"), OSError("made up")])
def test_a_failure_is_as_if_it_had_not_been_tried(
    kernel: Kernel, begin: Begin, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch, capture_logs() as lines:
        patch.setattr(readahead.BatchedSocket, "receive_some", fail)
        ahead = begin(kernel)
        assert ahead
        kernel.take_over()
        assert ahead.take(4) is None
    events = [(line["event"], line.get("used")) for line in lines]
    assert events == [("read_ahead_failed", None), ("read_ahead", False)]


def test_it_can_be_stopped_at_any_time(kernel: Kernel, begin: Begin) -> None:
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        ahead = begin(kernel)
        assert ahead
        ahead.stop()
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, files)
