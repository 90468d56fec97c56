"""The scenarios in tests/scenarios: the specification by example, read by people and by this test.

A file says in `about` what it shows. Each step applies and deletes objects and then states

- `changes`: every element that the transaction adds (+) or deletes (-), in nft's text, all of them;
- `explain`: what a connection to an address meets, for some of those who may ask;
- `problems`: what is reported to the operator, by code.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from agent.config.settings import Settings
from rules import text
from rules.diff import Change
from rules.events import Delete, NodeAddresses, Upsert
from rules.explain import Asked, explain
from rules.language import FAMILY_NAME, Set
from rules.objects import EndpointSlice, Name, Service, parse_address
from rules.state import State
from tests import manifest

SCENARIOS = sorted((Path(__file__).parents[1] / "scenarios").glob("*.yaml"))
KINDS = {"Service": Service, "EndpointSlice": EndpointSlice}
NODE_ADDRESSES = ("172.31.0.2", "fd00:172:31::2")


def start(options: dict[str, Any]) -> State:
    """A node named node-1 in zone a, as the scenarios know it."""
    state = State(Settings(**{"node": "node-1", **options}).options())
    addresses = tuple(map(parse_address, NODE_ADDRESSES))
    state.apply([NodeAddresses(frozenset(addresses), addresses)])
    state.apply([Upsert(manifest.node(addresses=NODE_ADDRESSES, zone="a"))])
    state.step()
    return state


def apply(state: State, step: dict[str, Any]) -> Change:
    """What the step's transaction changes."""
    for document in step.get("apply", ()):
        document.setdefault("metadata", {}).setdefault("creationTimestamp", manifest.CREATED)
        state.apply([Upsert(manifest.of(document))])
    for which in step.get("delete", ()):
        kind, name = which.split()
        state.apply([Delete(KINDS[kind], Name(*name.split("/")))])
    return state.step().change


def changes(change: Change) -> Iterator[str]:
    """One line an element, for instance `+ service-ips: 10.96.0.10 . tcp . 80 : goto lb-2`."""
    for sign, side in (("-", change.removed), ("+", change.added)):
        lines = [
            f"{sign} {_set_name(owner)}: {text.element(owner, element)}"
            for owner, elements in side.items()
            for element in elements
        ]
        yield from sorted(lines)


def _set_name(owner: Set) -> str:
    return owner.name if owner.family == 4 else f"{FAMILY_NAME[owner.family]} {owner.name}"


def meets(asked: Asked) -> str:
    """What a client meets, for instance `10.0.0.1:80 or 10.0.0.2:80, as the node`."""
    if asked.outcomes != ("sent",):
        return " or ".join(asked.outcomes)
    seen = {"" if e.sees_node == "no" else ", as the node" for e in asked.endpoints}
    targets = " or ".join(sorted({e.endpoint for e in asked.endpoints}))
    return targets + "".join(seen)


def explained(state: State, destination: str) -> dict[str, str]:
    """By who asks."""
    return {asked.who: meets(asked) for asked in explain(state, destination).asked}


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_scenario(path: Path) -> None:
    """After each step the changes, the explanations and the problems are those stated, and all
    changes together make the elements that the kernel should have."""
    scenario = yaml.safe_load(path.read_text())
    state = start(scenario.get("options", {}))
    elements = {owner: dict(found) for owner, found in state.elements().items()}
    for step in scenario["steps"]:
        change = apply(state, step)
        assert list(changes(change)) == step.get("changes", "").splitlines(), step["when"]
        for destination, askers in step.get("explain", {}).items():
            outcomes = explained(state, destination)
            assert {who: outcomes[who] for who in askers} == askers, (step["when"], destination)
        assert sorted(p.code for p in state.problems.open()) == step.get("problems", []), step[
            "when"
        ]
        for owner, removed in change.removed.items():
            for key, _ in removed:
                del elements[owner][key]
        for owner, added in change.added.items():
            elements.setdefault(owner, {}).update(added)
        assert {o: found for o, found in elements.items() if found} == {
            o: found for o, found in state.elements().items() if found
        }
