"""Every statement of docs/semantics.md: the document, `explain` live and real packets agree.

One agent runs with all cases of `semantics_rows` at once, in both families, and one more for each
other group of options. Clients ask at every address of every case; the agent explains each of
these questions from the kernel's own elements; at the end its counters must be the connections that
were made. Then one change of all Services, and the same again.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from pyroute2 import IPRoute

from agent.cli.client import Client
from agent.kernel.counters import READ_SECONDS
from agent.kernel.tables import Kernel
from lab.world import Answer, World
from rules.counts import FrontendCounts
from rules.explain import Explanation
from tests.kernel.agent import Agent, write
from tests.kernel.conftest import PROTOCOLS, Net, StockedWorld
from tests.kernel.semantics_rows import (
    ASKERS,
    CASES,
    ELSEWHERE,
    FAMILIES,
    LOCAL_NETWORK,
    NOT_HERE,
    OF_THE_NODE,
    OPTIONS,
    SECOND,
    Case,
    Documents,
    Meeting,
    Place,
)
from tests.kernel.semantics_stories import STORIES, Story, Tally, reached, written
from tests.kernel.test_packets import nft
from tests.kernel.test_run import until
from tests.manifest import node_document

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make namespaces")

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "semantics.md"
AT_LEAST, AT_MOST = 4, 80
"""So many connections where some are answered, until each endpoint that is expected has."""
STORY_PLACES = 196
PLACES = {case: Place(number) for number, case in enumerate(CASES, 1)}


# --- the document -------------------------------------------------------------------------------


def statements(text: str) -> list[str]:
    """Each paragraph, item and row of the document, without the introduction, the rows that head
    tables, and sentences that only announce what is listed below them."""
    body = text[text.index("\n## ") :]
    found: list[str] = []
    for block in re.split(r"\n\s*\n", body.strip()):
        if block.startswith("|"):
            found += block.splitlines()[2:]
        elif block.startswith(("- ", "1. ")):
            found += re.split(r"\n(?=- |\d\. )", block)
        elif not block.startswith("#") and block.endswith("."):
            found.append(block)
    return [" ".join(statement.split()) for statement in found]


def test_every_statement_of_the_document_is_shown_or_has_a_reason_why_not() -> None:
    said = statements(DOCUMENT.read_text())
    assert len(said) > 50
    shown = {case.says for case in CASES} | {story.says for story in STORIES} | {MARK}
    for words in (*shown, *NOT_HERE):
        assert sum(words in statement for statement in said) == 1, words
    left = [s for s in said if not any(words in s for words in (*shown, *NOT_HERE))]
    assert not left


def test_what_shows_the_other_statements_exists() -> None:
    for _, test in NOT_HERE.values():
        path, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / path).read_text(), test


# --- asking -------------------------------------------------------------------------------------


class Question(NamedTuple):
    """Who asks where. `asker` is a host, or "node from second" for another address of it."""

    case: Case
    after: bool
    where: str
    asker: str
    protocol: str
    family: int


class Seen(NamedTuple):
    """An outcome, and the endpoints that answer, each with the client address that it sees."""

    outcome: str
    endpoints: frozenset[tuple[str, str]]


class Found(NamedTuple):
    """The same from three sides, and the whole explanation. What packets meet is said in the word
    that the document has for it."""

    document: Seen
    explained: Seen
    packets: Seen
    explanation: Explanation


class Asking:
    """Asks at the addresses of cases, and has the agent explain."""

    def __init__(self, world: World, client: Client, tally: Tally) -> None:
        self._nets = {family: Net(world, family) for family in FAMILIES}
        self._client, self._tally = client, tally

    def ask(self, question: Question) -> Found:
        net, place = self._nets[question.family], PLACES[question.case]
        address, port = target(question.where, place, net)
        host, _, origin = question.asker.partition(" from ")
        source = target(origin, place, net)[0] if origin else None
        own = source or net.address(host)
        case = question.case.afterwards() if question.after else question.case
        expected = meeting(case, question)
        seen_as = {"own": own, "node": net.address("node")}
        document = Seen(
            expected.explained, frozenset((h, seen_as[seen]) for h, seen in expected.endpoints)
        )
        query = {"target": f"{written(address, port)}/{question.protocol}", "from": own}
        explanation = self._client.get("/v1/explain", Explanation, query)
        explained = Seen(
            " or ".join(explanation.asked[0].outcomes),
            frozenset(
                (host, seen_as["node" if by_node else "own"])
                for host, by_node in reached(explanation, net)
            ),
        )
        ask = partial(net.ask, host, (address, port), question.protocol, source=source)
        packets, made = _packets(ask, expected)
        self._count(explanation, net.family, packets.outcome, made)
        if expected.one and len(explained.endpoints) == 1:
            document = document._replace(endpoints=document.endpoints & explained.endpoints)
        if packets.outcome == expected.outcome:
            packets = packets._replace(outcome=expected.explained)
        return Found(document, explained, packets, explanation)

    def _count(self, explanation: Explanation, family: int, outcome: str, packets: int) -> None:
        address = explanation.target.rpartition(":")[0].strip("[]")
        port = explanation.target.rpartition(":")[2]
        answering = explanation.answering
        if answering and answering.kind == "node port":
            frontend = f"node port {port}"
        elif answering:
            frontend = explanation.target
        elif outcome == "refused":
            frontend = address
        else:
            frontend = "ip6" if family == 6 else "ip"
        kind = {"answered": "connections", "refused": "refused", "silent": "dropped"}[outcome]
        if explanation.asked[0].outcomes != ("passed on untouched",):
            self._tally.add(frontend, kind, packets)


def _packets(ask: Callable[..., Answer], expected: Meeting) -> tuple[Seen, int]:
    """What connections meet, and how many were made: one, where they are not answered."""
    timeout = {"answered": 5.0, "refused": 0.9, "silent": 0.3}[expected.outcome]
    seen: set[tuple[str, str]] = set()
    for number in range(1, AT_MOST + 1):
        answer = ask(timeout=timeout)
        if answer.outcome != "answered":
            return Seen(answer.outcome, frozenset(seen)), number
        seen.add((str(answer.server), str(answer.client)))
        if number >= AT_LEAST and (expected.one or len(seen) >= len(expected.endpoints)):
            break
    return Seen("answered", frozenset(seen)), number


def target(where: str, place: Place, net: Net) -> tuple[str, int]:
    """The address and port that a case names."""
    name, _, port = where.partition(":")
    if name == "node-port":
        return net.address("node"), place.node_port
    if name in ELSEWHERE:
        return ELSEWHERE[name][net.family], place.node_port if name in OF_THE_NODE else 80
    address: str = getattr(place, name.replace("-", "_"))(net.family)
    return address, int(port or 80)


def meeting(case: Case, question: Question) -> Meeting:
    """What the document says of it."""
    meets = case.meets[question.where]
    return meets if isinstance(meets, Meeting) else meets[question.asker]


def questions(options: str, *, after: bool) -> Iterator[Question]:
    """All questions about the cases of these options; after the change, about those it changes."""
    for case in CASES:
        if case.options != options or (after and not case.later):
            continue
        for where, meets in (case.afterwards() if after else case).meets.items():
            askers = ASKERS if isinstance(meets, Meeting) else tuple(meets)
            for asker in askers:
                for protocol in PROTOCOLS:
                    for family in case.families:
                        yield Question(case, after, where, asker, protocol, family)


# --- the runs -----------------------------------------------------------------------------------

MARK = "The mark bit that decides about masquerading is cleared"
OTHER_BITS = 0x10001
MARKING = f"""
add table inet other
add chain inet other arriving {{ type filter hook prerouting priority -150; }}
add rule inet other arriving ct direction original meta mark set {OTHER_BITS:#x}
add chain inet other made {{ type filter hook output priority -150; }}
add rule inet other made ct direction original meta mark set {OTHER_BITS:#x}
add chain inet other leaving {{ type filter hook postrouting priority 150; }}
add rule inet other leaving ct direction original meta mark != {OTHER_BITS:#x} drop
"""
"""Sets other bits of every packet's mark, and drops what leaves with other bits than these."""


class Run(NamedTuple):
    """What came of one group of options."""

    found: dict[Question, Found]
    told: dict[tuple[type[Story], int], Exception | None]
    expected: Counter[tuple[str, str]]
    counted: Counter[tuple[str, str]]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with StockedWorld(prefix="sliceproxy-semantics") as built:
        for host in ("pod-1", "pod-2", "pod-3", "remote-1", "node"):
            for protocol in PROTOCOLS:
                built.serve(host, 8080, protocol)
        for protocol in PROTOCOLS:
            built.serve("pod-1", 9001, protocol)
            built.serve("pod-2", 9002, protocol)
        for family in FAMILIES:
            built.add_address("node", SECOND[family])
        for case in CASES:
            if any("node from balancer-ip" in meets for meets in case.meets.values()):
                for family in FAMILIES:
                    built.add_address("node", PLACES[case].balancer_ip(family))
        built.run("node", _local_routes)
        yield built


def _local_routes() -> None:
    with IPRoute() as routes:
        loopback = routes.link_lookup(ifname="lo")[0]
        for family, network in LOCAL_NETWORK.items():
            scope = 254 if family == 4 else 0
            routes.route("add", dst=network, oif=loopback, type="local", table=255, scope=scope)


@pytest.fixture(scope="module")
def runs(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """All questions of all groups, asked once."""
    directory = tmp_path_factory.mktemp("semantics")
    return {options: _run(world, directory, options) for options in OPTIONS}


def _run(world: World, directory: Path, options: str) -> Run:
    place, api, tally = directory / "cluster.json", directory / "api.sock", Tally()
    client = Client(str(api))
    asking = Asking(world, client, tally)
    stories = [
        kind(Net(world, family), Place(number), client, tally)
        for number, kind in enumerate(STORIES if options == "usual" else (), STORY_PLACES)
        for family in FAMILIES
    ]
    told: dict[tuple[type[Story], int], Exception | None] = {}
    cases = [case for case in CASES if case.options == options]
    found: dict[Question, Found] = {}
    with ExitStack() as stack:
        for story in stories:
            stack.enter_context(story.stack)
        write(place, *_documents(world, cases, stories, after=False))
        stack.callback(_remove_tables, world)
        agent = stack.enter_context(Agent(world, place, f"--api-socket={api}", *OPTIONS[options]))
        agent.wait("programmed")
        until(client.answers)
        with _marking(world):
            found |= _ask_all(asking, list(questions(options, after=False)))
        for story in stories:
            told[type(story), story.net.family] = _outcome(story.begin)
        if stories:
            seen = len(agent.lines)
            write(place, *_documents(world, cases, stories, after=True))
            agent.wait("programmed", since=seen)
            for story in stories:
                told[type(story), story.net.family] = told[
                    type(story), story.net.family
                ] or _outcome(story.end)
            found |= _ask_all(asking, list(questions(options, after=True)))
        counted = _counted(client)
    return Run(found, told, tally.expected, counted)


def _documents(
    world: World, cases: Sequence[Case], stories: Sequence[Story], *, after: bool
) -> Documents:
    """Everything before the change, or after it; then the Node is deleted."""

    def address(host: str, family: int) -> str:
        return Net(world, family).address(host)

    cidrs = {"cidrs": ["10.96.0.0/16", "fd00:10:96::/64"]}
    found = [{"kind": "ServiceCIDR", "metadata": {"name": "kubernetes"}, "spec": cidrs}]
    if not after:
        found.append(node_document(zone="a"))
    for case in cases:
        found += (case.afterwards() if after else case).documents(PLACES[case], address)
    for story in stories:
        found += story.documents(after=after)
    return found


def _ask_all(asking: Asking, asked: Sequence[Question]) -> dict[Question, Found]:
    with ThreadPoolExecutor(16) as pool:
        return dict(zip(asked, pool.map(asking.ask, asked), strict=True))


def _outcome(step: Callable[[], None]) -> Exception | None:
    try:
        step()
    except Exception as error:
        return error
    return None


@contextmanager
def _marking(world: World) -> Iterator[None]:
    world.run("node", nft, MARKING)
    try:
        yield
    finally:
        world.run("node", nft, "delete table inet other")


def _remove_tables(world: World) -> None:
    with world.run("node", lambda: Kernel(own=False)) as kernel:
        kernel.remove()


def _counted(client: Client) -> Counter[tuple[str, str]]:
    time.sleep(READ_SECONDS)  # an older reading is answered for so long
    counted: Counter[tuple[str, str]] = Counter()
    for one in client.get("/v1/counters", list[FrontendCounts]):
        counted[one.frontend, "connections"] += one.connections
        counted[one.frontend, "refused"] += sum(one.refused.values())
        counted[one.frontend, "dropped"] += sum(one.dropped.values())
    return +counted


# --- what must hold -----------------------------------------------------------------------------


@needs_root
@pytest.mark.parametrize(
    ("case", "family"),
    [
        pytest.param(case, family, id=f"{case.says}: {case.title}, IPv{family}")
        for case in CASES
        for family in case.families
    ],
)
def test_the_document_explain_and_packets_agree(
    runs: dict[str, Run], case: Case, family: int
) -> None:
    """On the outcome, on who answers, and on whom the endpoints see, for every client, over TCP and
    UDP; the endpoints of a list are named once."""
    found = {
        q: f for q, f in runs[case.options].found.items() if (q.case, q.family) == (case, family)
    }
    assert bool(found) == (family in case.families)
    for question, (document, explained, packets, explanation) in found.items():
        assert explained == document, (question[1:], explanation)
        assert packets == document, (question[1:], explanation)
        if explanation.answering:
            listed = explanation.answering.list.endpoints
            assert len(set(listed)) == len(listed)


@needs_root
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_what_outlasts_a_change_is_as_the_document_says(
    runs: dict[str, Run], story: type[Story], family: int
) -> None:
    if error := runs["usual"].told[story, family]:
        raise error


@needs_root
@pytest.mark.parametrize("options", OPTIONS)
def test_the_counters_are_the_connections_that_were_made(
    runs: dict[str, Run], options: str
) -> None:
    run = runs[options]
    assert dict(run.counted) == dict(run.expected)
