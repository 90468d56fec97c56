"""Chains are in the kernel before a verdict names them: what is sent ahead of a transaction."""

from __future__ import annotations

from rules.events import Upsert
from rules.options import Options
from rules.state import State
from rules.transaction import Transaction, parts
from tests.manifest import endpoint_slice, service

HASHED = {"sliceproxy.io/algorithm": "source-hash"}


def asked(**fields: object) -> Transaction:
    """The transaction when a Service of a running state begins to ask for something."""
    state = State(Options(node="node-1"))
    state.apply([Upsert(service()), Upsert(endpoint_slice())])
    state.step()
    state.apply([Upsert(service(**fields))])
    return state.step()


def test_a_change_of_elements_has_nothing_ahead() -> None:
    state = State(Options(node="node-1"))
    state.apply([Upsert(service()), Upsert(endpoint_slice())])
    state.step()
    state.apply([Upsert(service("other", cluster_ips=["10.96.0.99"]))])
    transaction = state.step()
    ahead, rest = parts(transaction)
    assert not ahead
    assert rest is transaction


def test_new_tables_are_one_transaction() -> None:
    state = State(Options(node="node-1"))
    state.apply([Upsert(service(annotations=HASHED)), Upsert(endpoint_slice())])
    transaction = state.step()
    assert transaction.tables
    ahead, rest = parts(transaction)
    assert not ahead
    assert rest is transaction


def test_new_chains_are_ahead_of_the_verdicts_that_name_them() -> None:
    transaction = asked(annotations=HASHED)
    ahead, rest = parts(transaction)
    assert [t.new_chains for t in ahead.tables] == [
        t.new_chains for t in transaction.tables if t.new_chains
    ]
    assert ahead.tables
    assert not any(t.new_chains for t in rest.tables)
    assert not any(t.rewritten for t in ahead.tables)
    assert not ahead.change
    assert rest.change.added == transaction.change.added
    assert rest.change.removed == transaction.change.removed


def test_the_elements_of_new_sets_are_ahead_too() -> None:
    transaction = asked(sessionAffinity="ClientIP")
    ahead, rest = parts(transaction)
    new = {s for t in transaction.tables for s in t.new_sets}
    assert new
    assert ahead.change.added
    assert ahead.change.added.keys() <= new
    assert not rest.change.added.keys() & new
    assert ahead.change.added | rest.change.added == transaction.change.added
    assert not ahead.change.removed
