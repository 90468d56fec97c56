"""What a real API server said, replayed into the State: it must end where the server did."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from agent.sources.kubernetes.reflector import Reflector, RequestType, Timing, resources
from rules.decode import decode_any
from rules.events import NodeAddresses, Upsert
from rules.options import Options
from rules.slots import fitting
from rules.state import State
from tests.cluster.cluster import ENDPOINT_MAPS

RECORDINGS = Path(__file__).parents[1] / "recordings"
SERVICES, SLICES, NODE, CIDRS = resources("node-1")
HERE = NodeAddresses(frozenset({b"\xac\x1f\x00\x02"}), (b"\xac\x1f\x00\x02",))


def recording(name: str) -> bytes:
    return (RECORDINGS / name).read_bytes()


def new_state() -> State:
    """A State that knows the node and the ServiceCIDRs, which did not change."""
    state = State(Options(node="node-1"))
    state.apply([HERE])
    for name in ("nodes", "servicecidrs"):
        feed(state, f"list-{name}.json")
    return state


def feed(state: State, name: str) -> None:
    found = [o for o in decode_any(recording(name)) if not isinstance(o, Exception)]
    assert found
    state.apply([Upsert(o) for o in found])


def final() -> State:
    state = new_state()
    feed(state, "final-list-services.json")
    feed(state, "final-list-endpointslices.json")
    state.step()
    return state


def elements(state: State, *, widths: bool = True) -> dict[object, object]:
    """All elements; of the endpoint maps the set of endpoints of each list, whatever their slots.

    Without `widths`, the verdicts are without theirs.
    """
    found: dict[object, object] = {}
    lists: dict[object, set[object]] = {}
    for owner, items in state.elements().items():
        for key, value in items.items():
            if owner in ENDPOINT_MAPS:
                lists.setdefault((owner, key[:-4]), set()).add(value)
            elif not widths and isinstance(value, str):
                found[owner, key] = re.sub(r"lb-\d+$", "lb", value)
            else:
                found[owner, key] = value
    assert lists
    return found | {name: frozenset(endpoints) for name, endpoints in lists.items()}


def replayed(pieces: int) -> State:
    """The lists, then the watches, read in pieces; after each piece a transaction."""
    rng = random.Random(pieces)
    state = new_state()
    for resource, plural in ((SERVICES, "services"), (SLICES, "endpointslices")):
        reflector = Reflector(resource, Timing(), rng)
        reflector.request()
        reflector.answered(422)
        reflector.finished()
        assert reflector.request().type is RequestType.LIST
        reflector.answered(200)
        reflector.received(recording(f"list-{plural}.json"))
        state.apply(reflector.finished().events)
        assert reflector.request().type is RequestType.WATCH
        reflector.answered(200)
        data = recording(f"watch-{plural}.jsonl")
        cuts = sorted(rng.sample(range(1, len(data)), pieces - 1))
        for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
            state.apply(reflector.received(data[start:end]))
            state.step()
            if state.clients_judged():  # as the loop says once it has read the affinity maps
                state.step()
        assert not reflector.invalid
    return state


def test_lists_and_watches_end_in_the_table_of_the_final_lists() -> None:
    ours, theirs = replayed(pieces=1), final()
    assert elements(ours) == elements(theirs)
    assert ours.programs == theirs.programs
    assert ours.tables() == theirs.tables()


@pytest.mark.parametrize("pieces", [2, 10, 300])
def test_transactions_on_the_way_change_widths_at_most(pieces: int) -> None:
    """A list that shrinks keeps its width for a while (rules.slots), so its past may show."""
    ours, theirs = replayed(pieces), final()
    assert elements(ours, widths=False) == elements(theirs, widths=False)
    assert ours.programs == theirs.programs
    assert ours.tables() == theirs.tables()
    for installed in ours.installed.values():
        assert installed.width == fitting(len(installed.slots), installed.width)


def test_the_recordings_change_the_table() -> None:
    before = new_state()
    feed(before, "list-services.json")
    feed(before, "list-endpointslices.json")
    before.step()
    assert elements(before) != elements(final())
