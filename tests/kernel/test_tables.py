"""The connection to nf_tables beside writers, garbage, failing system calls and old kernels."""

from __future__ import annotations

import errno
import itertools
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from agent.kernel import tables
from agent.kernel.addresses import read, route_socket
from agent.kernel.errors import KernelError, Stale
from agent.kernel.tables import Kernel
from agent.kernel.watcher import Watcher
from lab.world import World
from rules.events import NodeAddresses
from rules.netlink.attributes import string
from rules.netlink.batch import Batch, content, nft_type
from rules.netlink.messages import NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, message
from rules.netlink.nftables import (
    NFT_MSG_DELTABLE,
    NFT_MSG_GETSETELEM,
    NFTA_SET_ELEM_LIST_SET,
    NFTA_SET_ELEM_LIST_TABLE,
    NFTA_TABLE_NAME,
)
from rules.tables import FAMILIES, SETS, TABLE
from tests.kernel.namespaces import in_empty_namespace
from tests.kernel.proxy import Proxy
from tests.manifest import endpoint, endpoint_slice, service

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make namespaces")

SET = SETS[4].cluster_ips
OTHER = SETS[4].nodeport_ips
PATIENCE = 10.0


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World(pods=0, remotes=0) as built:
        yield built


@pytest.fixture
def kernel(world: World) -> Iterator[Kernel]:
    """A connection to a table without an owner."""
    with connect(world) as made:
        batch = Batch()
        batch.new_table(4, TABLE, 0)
        batch.new_set(TABLE, SET)
        batch.new_set(TABLE, OTHER)
        made.send(batch)
        yield made
        made.remove()


def connect(world: World, *, own: bool = False) -> Kernel:
    return world.run("node", lambda: Kernel(own=own))


def key(number: int) -> bytes:
    return (0x0A600000 + number).to_bytes(4, "big")


def add(kernel: Kernel, *numbers: int) -> None:
    batch = Batch()
    batch.add_elements(TABLE, SET, [(key(n), None) for n in numbers])
    kernel.send(batch)


# --- answers ------------------------------------------------------------------------------------


def test_a_late_answer_is_not_taken_for_another_batchs(kernel: Kernel) -> None:
    """An error that was never read must not fail what is sent next, and with numbers that
    begin at 1 for each batch it would be the same message's."""
    body = content(4, string(NFTA_TABLE_NAME, "absent"))
    flags = NLM_F_REQUEST | NLM_F_ACK
    for number in (kernel._socket.number() for _ in range(8)):
        kernel._socket._socket.send(message(nft_type(NFT_MSG_DELTABLE), flags, number, body))
    add(kernel, 1)
    assert kernel.elements(SET).keys() == {key(1)}
    batch = Batch()
    batch.delete_elements(TABLE, SET, [(key(2), None)])
    with pytest.raises(Stale):
        kernel.send(batch)
    add(kernel, 3)


def test_a_dump_that_was_given_up_does_not_disturb_the_next_request(kernel: Kernel) -> None:
    add(kernel, *range(20_000))
    wanted = string(NFTA_SET_ELEM_LIST_TABLE, TABLE) + string(NFTA_SET_ELEM_LIST_SET, SET.name)
    answers = kernel._socket.ask(nft_type(NFT_MSG_GETSETELEM), content(4, wanted), NLM_F_DUMP)
    next(answers)
    assert len(kernel.elements(SET)) == 20_000
    add(kernel, 20_001)


@pytest.mark.parametrize("code", [errno.ENOBUFS, errno.ENOMEM, errno.EPERM])
def test_a_failing_send_is_an_error_of_the_kernels_and_the_next_one_works(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    class Failing:
        """The socket, but for its first send."""

        def __init__(self, real: socket.socket) -> None:
            self.real, self.failed = real, False

        def send(self, data: bytes) -> int:
            if not self.failed:
                self.failed = True
                raise OSError(code, os.strerror(code))
            return self.real.send(data)

        def __getattr__(self, name: str) -> object:
            return getattr(self.real, name)

    monkeypatch.setattr(kernel._socket, "_socket", Failing(kernel._socket._socket))
    with pytest.raises(KernelError):
        add(kernel, 1)
    add(kernel, 1)
    assert kernel.elements(SET).keys() == {key(1)}


# --- reading beside a writer --------------------------------------------------------------------


class Writer:
    """Moves an element back and forth between two sets, each time in one transaction."""

    def __init__(self, kernel: Kernel, *, table: str = TABLE, pause: float = 0.0) -> None:
        self._kernel = kernel
        self._table = table
        self._pause = pause
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Writer:
        self._move(None, SET)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _move(self, out: object, into: object) -> None:
        batch = Batch()
        if out:
            batch.delete_elements(self._table, out, [(key(1), None)])  # type: ignore[arg-type]
        batch.add_elements(self._table, into, [(key(1), None)])  # type: ignore[arg-type]
        self._kernel.send(batch)

    def _run(self) -> None:
        for out, into in itertools.cycle(((SET, OTHER), (OTHER, SET))):
            if self._stop.wait(self._pause):
                return
            self._move(out, into)


def test_what_is_read_beside_a_writer_is_of_one_moment(world: World, kernel: Kernel) -> None:
    """The element is in exactly one of the two sets, whenever one looks."""
    read = 0
    with connect(world) as other, Writer(other, pause=0.001):
        for _ in range(100):
            try:
                back = kernel.read_back(4)
            except Stale:
                continue  # it says that it could not
            assert back
            assert len(back.elements[SET]) + len(back.elements[OTHER]) == 1
            read += 1
    assert read


def test_a_writer_that_never_rests_does_not_hold_up_a_reader_for_ever(
    world: World, kernel: Kernel
) -> None:
    add(kernel, *range(2, 3000))
    with connect(world) as other:
        batch = Batch()
        batch.new_table(4, "foreign", 0)
        for named in (SET, OTHER):
            batch.new_set("foreign", named)
        other.send(batch)
        with Writer(other, table="foreign"):
            assert kernel.read_back(4, watched=True)
        batch = Batch()
        batch.delete_table(4, "foreign")
        other.send(batch)


# --- the watcher --------------------------------------------------------------------------------


GARBAGE = (
    b"x",
    bytes(16),
    bytes(40),
    message(0x0A0C, 0, 1, b""),
    message(0x0A0C, 0, 1, b"\x02"),
    message(0x0A0C, 0, 1, b"\x02\0\0\0" + b"\xff\xff\x01\0"),
    message(0xFFFF, 0, 1, bytes(100)),
    message(2, 0, 1, b""),
    b"\xff" * 300,
)


def test_the_watcher_survives_unexpected_messages(world: World, kernel: Kernel) -> None:
    disturbed, failures = threading.Event(), list[Exception]()
    with connect(world) as own:
        watcher = world.run(
            "node",
            lambda: Watcher(own.port, disturbed.set, lambda _, error: failures.append(error)),
        )
        world.run("node", watcher.start)
        sender = world.run("node", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12))
        with sender:
            for data in GARBAGE:
                sender.sendto(data, (watcher._socket.port, 0))
        time.sleep(0.1)
        disturbed.clear()
        add(kernel, 7)
        assert disturbed.wait(PATIENCE)
        assert watcher.stop(PATIENCE)
    assert not failures


# --- forgetting ---------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", [(), (0,), (511,), (100, 300), range(512)], ids=str)
@pytest.mark.parametrize("destroys", [True, False], ids=["Linux 6.3", "before Linux 6.3"])
def test_elements_that_have_expired_do_not_keep_others_from_being_deleted(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, absent: range, destroys: bool
) -> None:
    """One that is absent costs some more transactions on old kernels, not one for each element."""
    add(kernel, *(set(range(513)) - set(absent)))
    monkeypatch.setattr(kernel, "_destroys", destroys)
    sent = []
    send = kernel.send
    monkeypatch.setattr(kernel, "send", lambda batch: (sent.append(len(batch)), send(batch)))
    kernel.destroy(SET, [(key(n), None) for n in range(512)])
    assert kernel.elements(SET).keys() == {key(512)}
    assert len(sent) <= (1 if destroys else 1 + 2 * 9 * len(absent))


def test_a_kernel_that_does_not_know_destroy_is_found_out(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number beyond the kernel's messages is refused as NFT_MSG_DESTROYSETELEM is before 6.3."""
    monkeypatch.setattr("rules.netlink.batch.NFT_MSG_DESTROYSETELEM", 200)
    add(kernel, 1, 2)
    kernel.destroy(SET, [(key(1), None), (key(9), None)])
    assert kernel.elements(SET).keys() == {key(2)}
    assert not kernel._destroys


# --- without IPv6 -------------------------------------------------------------------------------


def test_a_kernel_without_ipv6_gets_the_ipv4_table_alone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ipv6.disable=1 the address family has no sockets."""
    real = socket.socket

    def without_ipv6(family: int = -1, *rest: int, **more: object) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
        return real(family, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(tables.socket, "socket", without_ipv6)
    with Proxy(world, own=True) as proxy:
        assert proxy.kernel.families == (4,)
        proxy.put(
            service(cluster_ips=["10.96.0.10", "fd00:10:96::10"]),
            endpoint_slice("web", [endpoint("10.244.1.11")]),
            endpoint_slice("web", [endpoint("fd00:10:244:1::11")], name="web-6", family="IPv6"),
        )
        assert proxy.kernel.info(6) is None
        assert key(10) in proxy.kernel.elements(SET)
        proxy.resync()
        proxy.kernel.remove()


def test_a_kernel_with_ipv6_has_both(world: World) -> None:
    with connect(world) as kernel:
        assert kernel.families == FAMILIES


def test_a_namespace_that_never_had_an_address_has_none() -> None:
    """Its table `local` does not exist, which ends a dump with an error and its explanation."""

    def look() -> NodeAddresses:
        with route_socket() as route:
            return read(route)

    assert in_empty_namespace(look) == NodeAddresses(frozenset(), ())
