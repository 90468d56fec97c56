"""Counters in the description, in text and in netlink's bytes; off, they leave no trace."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from click.testing import CliRunner

from agent.cli.top import NO_SERVICE, Rates, rates, table
from agent.config.settings import Settings
from agent.kernel.counters import CountersReader, KeptCounts
from rules import text as nft
from rules.counts import FrontendCounts
from rules.diff import Change
from rules.events import Upsert
from rules.language import Set
from rules.netlink.attributes import attributes
from rules.netlink.counters import Count, decode_counts, encode_counted
from rules.state import State
from rules.tables import FAMILIES, SETS, Layout, build
from rules.text import Key
from rules.transaction import TableChange, Transaction, encode
from tests.manifest import endpoint, endpoint_slice, node, service

IPS = SETS[4].service_ips
REJECT = SETS[4].reject_ips
KEY = SETS[4].service_ips.key_length * b"\1"


def state(*, counters: bool) -> State:
    found = State(Settings(node="node-1", counters=counters).options())
    ranges = ["192.0.2.0/24"]
    web = service(
        type="LoadBalancer", ingress=[{"ip": "192.0.2.1"}], loadBalancerSourceRanges=ranges
    )
    objects = node(), web, endpoint_slice("web", [endpoint("10.0.0.1")])
    found.apply([Upsert(o) for o in objects])
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_off_the_rules_and_the_text_are_as_without(family: int) -> None:
    """And on, the rules are the same: sets have one line more."""
    for guarded in (False, True):
        off, on = (build(Layout(family, guarded=guarded, counters=c)) for c in (False, True))
        assert off.chains == on.chains
        assert nft.table(on, {}).replace("\t\tcounter\n", "") == nft.table(off, {})


def test_off_the_netlink_bytes_have_no_counter() -> None:
    sent = {on: encode(state(counters=on).step()).encode() for on in (False, True)}
    assert b"counter" not in sent[False]
    assert sent[True].count(b"counter\0") == sum(len(SETS[f].counted) for f in FAMILIES)


@pytest.mark.parametrize(
    "owner", [IPS, REJECT, SETS[6].outside_ranges, SETS[4].service_cidrs], ids=str
)
def test_an_initial_count_is_read_again(owner: Set) -> None:
    key = bytes(owner.key_length)
    value = "lb-1" if owner.verdicts else key if owner.interval else None
    count = Count(2**40 + 1, 2**50 + 7)
    first, *rest = encode_counted(owner, [(key, value)], {key: count})
    assert dict(decode_counts(owner, first + b"".join(rest))) == {key: count}
    assert list(attributes(first))


class Kernel:
    """Counters that a test sets."""

    def __init__(self, counts: dict[Set, dict[Key, Count]]) -> None:
        self.present = counts

    def counts(self, owner: Set) -> dict[Key, Count]:
        return dict(self.present.get(owner, {}))

    def counts_of(self, owner: Set, keys: Sequence[Key]) -> dict[Key, Count]:
        return {k: c for k, c in self.counts(owner).items() if k in keys}


def transaction(
    removed: dict[Set, list[Key]], added: dict[Set, list[Key]], *tables: TableChange
) -> Transaction:
    change = Change()
    for sets, note in ((removed, change.remove), (added, change.add)):
        for owner, keys in sets.items():
            for key in keys:
                note(owner, key)
    return Transaction(tables, change)


def test_a_replaced_element_begins_with_its_count() -> None:
    kept, count = KeptCounts(), Count(5, 300)
    change = transaction({IPS: [KEY]}, {IPS: [KEY]})
    assert kept.before(change, Kernel({IPS: {KEY: count}})) == {IPS: {KEY: count}}
    kept.after(change)
    assert not any(kept.absent().values())


def test_a_transaction_that_failed_leaves_the_counts_for_the_next() -> None:
    kept, kernel = KeptCounts(), Kernel({IPS: {KEY: Count(5, 300)}})
    change = transaction({IPS: [KEY]}, {IPS: [KEY]})
    kept.before(change, kernel)
    kernel.present[IPS][KEY] = Count(6, 360)
    assert kept.before(change, kernel) == {IPS: {KEY: Count(6, 360)}}


def test_a_recreated_table_begins_with_all_counts() -> None:
    kept, counts = KeptCounts(), {IPS: {KEY: Count(5, 300)}, REJECT: {KEY: Count(1, 60)}}
    change = transaction({}, {IPS: [KEY], REJECT: [KEY]}, TableChange(4, delete=True))
    assert kept.before(change, Kernel(counts)) == counts


def test_counts_of_an_absent_element_are_shown_until_its_address_ends() -> None:
    kept, kernel = KeptCounts(), Kernel({REJECT: {KEY: Count(4, 240)}})
    recovered = transaction({REJECT: [KEY]}, {})
    kept.before(recovered, kernel)
    kept.after(recovered)
    assert CountersReader(kept, lambda: Kernel({})).read()[REJECT] == {KEY: Count(4, 240)}
    ended = transaction({IPS: [KEY]}, {})
    kept.before(ended, Kernel({IPS: {KEY: Count(9, 9)}}))
    kept.after(ended)
    assert not any(kept.absent().values())


def test_rates_are_by_service_the_busiest_first() -> None:
    def counts(name: str, connections: int, refused: int = 0) -> FrontendCounts:
        return FrontendCounts("shop" if name else "", name, "", "x", connections, {"r": refused})

    before = [counts("web", 10), counts("idle", 7), counts("made-again", 50)]
    after = [counts("web", 14), counts("web", 2, 6), counts("idle", 7), counts("made-again", 8)]
    assert rates(before, [*after, counts("", 0, 2)], 2.0) == [
        Rates("shop/web", 3.0, 3.0, 0.0),
        Rates("shop/made-again", 4.0, 0.0, 0.0),
        Rates(NO_SERVICE, 0.0, 1.0, 0.0),
    ]
    assert table([Rates("shop/web", 3.0, 3.0, 0.0)] * 3, 2).row_count == 2


def test_top_says_that_no_agent_answers() -> None:
    from agent.cli.main import main

    result = CliRunner().invoke(main, ["top", "--once", "--socket", "/nonexistent"])
    assert result.exit_code == 3
