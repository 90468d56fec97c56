"""What the real kernel does and the FakeKernel must do alike, as cases that run on either.

A case gets a function that opens a connection, with `own` as of Kernel; each runs in an empty
namespace (or a new FakeNetfilter) and closes what it opens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import pytest

from agent.kernel.errors import Full, OwnedByOther, Stale
from agent.kernel.tables import Kernel
from agent.loop import reader
from rules.diff import Change, Elements
from rules.events import Delete, NodeAddresses, Upsert
from rules.language import LARGE
from rules.netlink.nftables import NFT_TABLE_F_PERSIST
from rules.options import Options
from rules.state import State
from rules.tables import FAMILIES, SETS
from rules.transaction import Transaction, table_change
from tests.manifest import endpoint, endpoint_slice, service


class Connect(Protocol):
    """Opens a connection."""

    def __call__(self, *, own: bool = True) -> Kernel: ...


Case = Callable[[Connect], None]


def _state(*pods: int) -> State:
    state = State(Options(node="node-1"))
    endpoints = [endpoint(f"10.244.1.{pod}") for pod in pods]
    state.apply(
        [
            NodeAddresses(frozenset(), ()),
            Upsert(service(cluster_ips=["10.96.0.10"])),
            Upsert(endpoint_slice("web", endpoints)),
        ]
    )
    return state


def _program(kernel: Kernel, state: State) -> Transaction:
    kernel.take_over()
    transaction = state.resync(reader(kernel))
    if transaction:
        kernel.apply(transaction)
    return transaction


def _read(kernel: Kernel) -> Elements:
    elements: dict[object, object] = {}
    for family in FAMILIES:
        there = kernel.read_back(family)
        assert there is not None
        elements |= {s: dict(items) for s, items in there.elements.items() if items}
    return elements  # type: ignore[return-value]


def _change(added: object = None, removed: object = None) -> Transaction:
    change = Change()
    change.added.update(added or {})  # type: ignore[call-overload]
    change.removed.update(removed or {})  # type: ignore[call-overload]
    return Transaction((), change)


def reads_back_what_was_written(connect: Connect) -> None:
    with connect() as kernel:
        assert kernel.find(4) is None
        state = _state(1, 2, 3)
        assert _program(kernel, state)
        assert _read(kernel) == {s: e for s, e in state.elements().items() if e}
        for table in state.tables():
            found = kernel.find(table.family)
            assert found is not None
            assert table_change(table, found.known(table)).empty
        assert not _program(kernel, _state(3, 2, 1))
        kernel.remove()
        assert kernel.find(4) is None
        assert not kernel.remove()


def a_step_changes_elements(connect: Connect) -> None:
    with connect() as kernel:
        state = _state(1, 2)
        _program(kernel, state)
        state.apply([Delete(type(service()), service().name)])
        kernel.apply(state.step())
        assert _read(kernel) == {s: e for s, e in state.elements().items() if e}
        kernel.remove()


def a_refused_transaction_changes_nothing(connect: Connect) -> None:
    """Absent elements and present ones with other data refuse it as a whole."""
    with connect() as kernel:
        _program(kernel, _state(1, 2))
        before = _read(kernel)
        ips, cluster = SETS[4].service_ips, SETS[4].cluster_ips
        (key,) = before[ips]
        other = bytes([10, 96, 9, 9])
        for refused in (
            _change({cluster: [(other, None)]}, {ips: [(bytes(len(key)), "lb-1")]}),
            _change({cluster: [(other, None)], ips: [(key, "lb-1")]}),
        ):
            with pytest.raises(Stale):
                kernel.apply(refused)
            assert _read(kernel) == before
        # the same data is no error
        kernel.apply(_change({ips: [(key, before[ips][key])]}))
        kernel.remove()


def a_set_with_a_size_is_full_at_it(connect: Connect) -> None:
    def keys(first: int, count: int) -> list[tuple[bytes, None]]:
        return [((0x0B000000 + n).to_bytes(4, "big"), None) for n in range(first, first + count)]

    with connect() as kernel:
        state = _state(1)
        cluster = SETS[4].cluster_ips
        transaction = state.resync(reader(kernel))
        transaction.change.added.setdefault(cluster, []).extend(keys(0, LARGE))
        kernel.apply(transaction)
        room = cluster.room(len(kernel.elements(cluster)))
        kernel.apply(_change({cluster: keys(LARGE, room - len(kernel.elements(cluster)))}))
        assert len(kernel.elements(cluster)) == room
        with pytest.raises(Full):
            kernel.apply(_change({cluster: keys(2 * LARGE, 1)}))
        assert len(kernel.elements(cluster)) == room
        kernel.remove()


def an_owned_table_is_for_its_owner_until_that_is_gone(connect: Connect) -> None:
    with connect() as one, connect() as two:
        if not one.table_flags:
            pytest.skip("this kernel has no owned tables (Linux 6.9)")
        state = _state(1)
        _program(one, state)
        assert one.info(4) == (one.table_flags, one.port)
        with pytest.raises(OwnedByOther):
            two.take_over()
        with pytest.raises(OwnedByOther):
            two.apply(_change({SETS[4].cluster_ips: [(bytes(4), None)]}))
        assert _read(two) == _read(one)
        one.close()
        assert two.info(4) == (NFT_TABLE_F_PERSIST, 0)
        two.take_over()
        two.apply(_change({SETS[4].cluster_ips: [(bytes([10, 96, 9, 9]), None)]}))
        two.remove()


def a_table_without_owner_is_for_all(connect: Connect) -> None:
    with connect(own=False) as one, connect(own=False) as two:
        _program(one, _state(1))
        assert one.info(4) == (0, None)
        two.take_over()
        two.apply(_change({SETS[4].cluster_ips: [(bytes([10, 96, 9, 9]), None)]}))
        assert _read(one) == _read(two)
        two.remove()
        with pytest.raises(Stale):
            one.apply(_change({SETS[4].cluster_ips: [(bytes([10, 96, 9, 8]), None)]}))


def other_ownership_does_not_fit(connect: Connect) -> None:
    with connect(own=False) as one, connect() as two:
        if not two.table_flags:
            pytest.skip("this kernel has no owned tables (Linux 6.9)")
        _program(one, _state(1))
        found = two.find(4)
        assert found
        assert one.fits(found)
        assert not two.fits(found)
        assert [t.create for t in _program(two, _state(1)).tables] == [True, True]
        assert two.info(4) == (two.table_flags, two.port)
        two.remove()


CASES: tuple[Case, ...] = (
    reads_back_what_was_written,
    a_step_changes_elements,
    a_refused_transaction_changes_nothing,
    a_set_with_a_size_is_full_at_it,
    an_owned_table_is_for_its_owner_until_that_is_gone,
    a_table_without_owner_is_for_all,
    other_ownership_does_not_fit,
)
