"""A rule that the kernel lists reads as `rules.text` writes it."""

from __future__ import annotations

import pytest

from rules import text
from rules.netlink.attributes import Fields, fields, nest, string, u32
from rules.netlink.expressions import rule_body
from rules.netlink.nftables import (
    NFTA_EXPR_DATA,
    NFTA_EXPR_NAME,
    NFTA_LIST_ELEM,
    NFTA_RULE_EXPRESSIONS,
)
from rules.netlink.rule_text import rule_text
from rules.tables import TABLE, Layout, PodInterface, build

LAYOUTS = [
    Layout(
        family,
        pods=pods,
        affinity=affinity,
        guarded=bool(affinity),
        counters=bool(affinity),
        by_endpoint=bool(affinity),
    )
    for family in (4, 6)
    for pods, affinity in (
        (None, ()),
        (True, (60, 10800)),
        (PodInterface("cni0", prefix=False), ()),
        (PodInterface("veth", prefix=True), (1,)),
    )
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_each_rule_of_our_tables_reads_as_it_is_written(layout: Layout) -> None:
    rules = [(chain, rule) for chain in build(layout).chains for rule in chain.rules]
    assert rules
    for chain, rule in rules:
        found = rule_text(fields(rule_body(TABLE, chain.name, rule, layout.family)))
        assert found == text.rule(rule)


def test_an_unknown_expression_is_named_and_does_not_hide_the_others() -> None:
    def expression(name: str, *data: bytes) -> bytes:
        return nest(NFTA_LIST_ELEM, string(NFTA_EXPR_NAME, name), nest(NFTA_EXPR_DATA, *data))

    reject = expression("reject", u32(1, 0), b"\x05\x00\x02\x00\x0d\x00\x00\x00")
    body = nest(NFTA_RULE_EXPRESSIONS, expression("xyz"), expression("counter"), reject)
    assert rule_text(fields(body)) == "[xyz] counter reject with icmp 13"
    assert rule_text(Fields()) == ""
