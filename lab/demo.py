"""`sliceproxy demo`: a small cluster in network namespaces, real connections, and what they met.

The demo tells a newcomer what the agent does, and it is a test that does not believe itself: every
table of answers is compared with what was announced, and the first difference ends it with a
DemoError. What is announced stands here in plain sight (`Question`), and comes from the semantics
of Services, not from the code under test.

`lab.stage` has the machinery: namespaces, the agent's process, manifests, signals.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lab.stage import (
    NODE_OPTIONS,
    POD_OPTIONS,
    DemoError,
    Documents,
    Interrupted,
    Interrupts,
    Programmed,
    Ruleset,
    Stage,
    endpoints_of,
)
from lab.world import Answer, Outcome, Protocol

__all__ = ["DemoError", "run"]

PODS = {
    **{"pod-1": "web-1", "pod-2": "web-2", "remote-1": "web-3", "remote-2": "web-4"},
    **{"remote-6": "web-5"},
    **{"remote-8": "web-6", "remote-7": "empty-1"},  # these two come in the course of the demo
    **{"pod-3": "dns-1", "remote-3": "dns-2"},
    **{"pod-4": "shop-1", "remote-4": "shop-2"},
    **{"pod-5": "sessions-1", "remote-5": "sessions-2"},
}
"""The pods of the examples, by the World's names of those who play them."""

ASKERS = {"pod": "pod-6", "node": "node", "client": "client", "stranger": "stranger"}
"""Who asks, by the World's names."""

TIMES: dict[Outcome, int] = {"answered": 100, "refused": 20, "silent": 3}
SILENCE = 0.2
"""Seconds without any answer that are called silence; an answer takes less than a millisecond."""

WIDTH = 100
MOST_COMMANDS = 8
MANY = 1000
_BREATH = 0.6
"""Seconds between two scenes, for somebody who reads along."""


@dataclass(frozen=True)
class Question:
    """Who asks where, and what must come of it."""

    asker: str
    address: str
    port: int
    protocol: Protocol = "tcp"
    pods: tuple[str, ...] = ()
    """Who must answer, all of them and nobody else."""
    sees: Literal["asker", "node"] = "asker"
    """Whose address the pods must see."""
    sticky: bool = False
    """Only one of the pods must answer, always the same one."""
    outcome: Outcome = "answered"
    because: str = ""

    @property
    def where(self) -> str:
        """Address, port and protocol."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}{'' if self.protocol == 'tcp' else '/' + self.protocol}"


WEB_4, WEB_6, NODE_4, NODE_6 = "10.96.0.80", "fd00:10:96::80", "172.31.0.2", "fd00:172:31::2"
SHOP_4, SHOP_6 = "203.0.113.44", "2001:db8::44"
DNS_4, DNS_6, EMPTY_4, EMPTY_6 = "10.96.0.10", "fd00:10:96::10", "10.96.0.90", "fd00:10:96::90"
SESSIONS_4, NOBODYS = "10.96.0.70", "10.96.0.99"
WEB = ("web-1", "web-2", "web-3", "web-4", "web-5")
DNS = ("dns-1", "dns-2")
SHOP = ("shop-1", "shop-2")
SESSIONS = ("sessions-1", "sessions-2")

SERVICES: Sequence[tuple[str, Sequence[Question]]] = (
    (
        "web: ClusterIP for pods, NodePort 30080 for clients outside. 2 of 5 pods are on node-1.",
        (
            Question("pod", WEB_4, 80, pods=WEB),
            Question("pod", WEB_6, 80, pods=WEB),
            Question("node", WEB_4, 80, pods=WEB, sees="node"),
            Question("client", NODE_4, 30080, pods=WEB, sees="node"),
            Question("client", NODE_6, 30080, pods=WEB, sees="node"),
            Question("pod", WEB_4, 81, outcome="refused", because="web has no port 81"),
        ),
    ),
    (
        "dns: one port under UDP and under TCP.",
        (
            Question("pod", DNS_4, 53, "udp", pods=DNS),
            Question("pod", DNS_6, 53, "udp", pods=DNS),
            Question("pod", DNS_4, 53, "tcp", pods=DNS),
        ),
    ),
    (
        "shop: LoadBalancer with externalTrafficPolicy Local: who comes from outside gets pods of"
        " this node only, which see the client's address. The stranger is not within its"
        " loadBalancerSourceRanges.",
        (
            Question("client", SHOP_4, 80, pods=SHOP[:1]),
            Question("client", SHOP_6, 80, pods=SHOP[:1]),
            Question("pod", SHOP_4, 80, pods=SHOP),
            Question("stranger", SHOP_4, 80, outcome="silent", because="not in its ranges"),
            Question("stranger", SHOP_6, 80, outcome="silent", because="not in its ranges"),
        ),
    ),
    (
        "sessions: sessionAffinity ClientIP: whoever got a pod gets the same one again.",
        (
            Question("pod", SESSIONS_4, 80, pods=SESSIONS, sticky=True),
            Question("client", SESSIONS_4, 80, pods=SESSIONS, sees="node", sticky=True),
        ),
    ),
    (
        "empty: no endpoints, so nobody has to wait. 10.96.0.99 belongs to no Service at all.",
        (
            Question("pod", EMPTY_4, 80, outcome="refused", because="no endpoints"),
            Question("pod", EMPTY_6, 80, outcome="refused", because="no endpoints"),
            Question("pod", NOBODYS, 80, outcome="silent", because="no such Service"),
        ),
    ),
)


def run(*, plain: bool) -> None:
    """Plays the demo. Raises DemoError if anything is not as announced, or cannot be shown here.

    plain: no colours and no pauses. Where standard output is no terminal it is plain anyway.
    Interrupted by SIGINT or SIGTERM it cleans up and exits with 128 and the signal's number.
    """
    interrupts = Interrupts()
    with interrupts, suppress(Interrupted), Stage(interrupts) as stage:
        _Demo(stage, _console(plain), breath=0 if plain else _BREATH).play()
    if interrupts.caught is not None:
        print("sliceproxy: interrupted; what the demo made is gone again", file=sys.stderr)
        raise SystemExit(128 + interrupts.caught)


def _console(plain: bool) -> Console:
    # Neither markup nor emoji: an IPv6 address has the colons and brackets of both.
    console = Console(
        markup=False, emoji=False, highlight=False, force_terminal=False if plain else None
    )
    console.width = min(WIDTH, console.width) if console.is_terminal else WIDTH
    return console


class _Demo:
    def __init__(self, stage: Stage, console: Console, *, breath: float) -> None:
        self._stage = stage
        self._console = console
        self._breath = breath if console.is_terminal else 0
        self._scenes = 0

    def play(self) -> None:
        """The whole demo."""
        self._introduce()
        self._services()
        self._scale_up()
        self._make_unready()
        self._terminate()
        self._explain()
        self._remove_pod()
        self._fill_the_empty()
        self._kill_the_agent()
        self._delete_service()
        self._many_more()

    # scenes

    def _introduce(self) -> None:
        self._title("A cluster made of network namespaces, which go when the demo ends")
        hosts = self._stage.world.hosts
        for name, host, text in (
            ("node-1", "node", "the agent runs here, and only here"),
            ("node-2", "elsewhere", "its pods are endpoints, too"),
            ("", None, ""),
            ("pod", "pod-6", "a pod on node-1: it asks, and so do"),
            ("node", "node", "node-1 itself,"),
            ("client", "client", "a machine outside the cluster,"),
            ("stranger", "stranger", "and another one."),
        ):
            self._say(f"  {name:<10}{hosts[host].ipv4 if host else '':<15}{text}".rstrip())
        self._say(
            "\nThe Services are those of examples/, in a copy that the agent on node-1 follows:"
        )
        self._command(f"sliceproxy run --from examples/ {shlex.join(NODE_OPTIONS)} \\")
        self._command(f"    {shlex.join(POD_OPTIONS)}")
        done = self._stage.start_agent()
        size = self._stage.ruleset()
        self._say(
            f"\n{done.end_to_end_ms / 1000:.1f} s after its start everything is in the kernel, by"
            f" one transaction: {size.rules} rules, the same for any number of Services, and"
            f" {size.elements} elements of sets and maps, which are the Services."
        )

    def _services(self) -> None:
        self._title("Who answers where")
        self._say(
            f"A line is {TIMES['answered']} connections, or {TIMES['refused']} that are refused, or"
            f" {TIMES['silent']} that nobody answers: who opened them, to where, how many each pod"
            " got, whose address it saw."
        )
        for text, questions in SERVICES:
            self._say(f"\n{text}", style="bold")
            self._ask(questions)

    def _scale_up(self) -> None:
        self._step("web gets a sixth pod, web-6 on node-2")
        self._say(
            "The pods of an address stand in numbered slots of the map `endpoints`, and"
            " `service-ips` names the chain that draws a slot at random. web has the chain for up"
            " to 6 slots, so one element is all, and one more for its node port. As nft commands"
            " (the agent itself runs no nft):"
        )
        self._change("web.yaml", partial(self._add_endpoint, host="remote-8"))
        self._ask(
            (
                Question("pod", WEB_4, 80, pods=(*WEB, "web-6")),
                Question("client", NODE_6, 30080, pods=(*WEB, "web-6"), sees="node"),
            )
        )
        self._say(
            "The times: until the kernel has answered; all the agent's work on the transaction; and"
            " from the rename of the changed file until the agent's log, a line for every element,"
            " says done."
        )

    def _make_unready(self) -> None:
        self._step("web-2 fails its readiness probe; its port is open, but nobody is sent there")
        self._say(
            "web-6 moves from the last slot into the hole. `hairpins` are the pods of this node,"
            " which may draw themselves."
        )
        self._change("web.yaml", partial(_set_conditions, pod="web-2", ready=False))
        left = ("web-1", "web-3", "web-4", "web-5", "web-6")
        self._ask(
            (
                Question("pod", WEB_4, 80, pods=left),
                Question("client", NODE_6, 30080, pods=left, sees="node"),
            )
        )

    def _terminate(self) -> None:
        self._step("shop-1, the only pod of shop on this node, has to stop, but still serves")
        self._say(
            "It is the last one that clients outside can have here, so they keep it until it is"
            " gone. Clients inside have a better one; theirs stand in the maps `inside-...`."
        )
        self._change(
            "shop.yaml", partial(_set_conditions, pod="shop-1", ready=False, terminating=True)
        )
        self._ask(
            (
                Question("client", SHOP_4, 80, pods=SHOP[:1]),
                Question("pod", SHOP_4, 80, pods=SHOP[1:]),
            )
        )

    def _explain(self) -> None:
        client = self._stage.world.hosts["client"].ipv4
        question = ("explain", f"{SHOP_4}:80", "--from-address", client)
        self._say("\nWhy is that so? The agent's rules can be asked:\n")
        self._command(f"sliceproxy {shlex.join(question)} --from examples/ ...")
        self._say("")
        place = ("--from", str(self._stage.directory), *NODE_OPTIONS, *POD_OPTIONS)
        self._indent(self._stage.output_of(*question, *place, columns=WIDTH - 4))

    def _remove_pod(self) -> None:
        self._step("shop-1 is gone, and with it what clients outside could have here")
        self._change("shop.yaml", partial(_remove_endpoint, pod="shop-1"))
        self._ask(
            (
                Question("client", SHOP_4, 80, outcome="silent", because="no pod on this node"),
                Question("pod", SHOP_4, 80, pods=SHOP[1:]),
            )
        )

    def _fill_the_empty(self) -> None:
        self._step("empty gets its first pod")
        self._change("empty.yaml", partial(self._add_endpoint, host="remote-7"))
        self._ask(
            (
                Question("pod", EMPTY_4, 80, pods=("empty-1",)),
                Question("pod", EMPTY_6, 80, pods=("empty-1",)),
            )
        )

    def _kill_the_agent(self) -> None:
        self._step("kill -9 of the agent in the middle of new connections, then a new agent")
        targets = (
            (ASKERS["pod"], WEB_4, 80, "tcp"),
            (ASKERS["client"], NODE_6, 30080, "tcp"),
            (ASKERS["pod"], DNS_4, 53, "udp"),
        )
        with self._stage.ask_on(targets) as stream:
            before = stream.wait_for(100)
            self._stage.kill_agent()
            without = stream.wait_for(200) - before
            again = self._stage.start_agent()
            stream.wait_for(100)
        failed = [answer for answer in stream.answers if answer.outcome != "answered"]
        if failed:
            raise DemoError(f"{len(failed)} connections failed around kill -9, such as {failed[0]}")
        if again.event != "verified" or again.elements:
            raise DemoError(
                "announced was that the new agent finds nothing to do, but it"
                f" {again.event} {again.elements} elements"
            )
        self._say(
            f"{len(stream.answers)} connections, {without} of them before the new agent was"
            f" started: 0 failed. The new agent read back what the kernel had and wrote"
            f" {again.elements} elements, {again.end_to_end_ms / 1000:.1f} s after its start."
        )

    def _delete_service(self) -> None:
        self._step("dns is deleted")
        self._tell(self._stage.remove("dns.yaml"))
        gone = partial(Question, "pod", port=53, outcome="silent", because="no such Service")
        self._ask((gone(address=DNS_4), gone(address=DNS_6)))

    def _many_more(self) -> None:
        self._step(f"{MANY} more Services with two pods each, in one file")
        before = self._stage.ruleset()
        done = self._stage.write("many.json", json.dumps(_many()))
        after = self._stage.ruleset()
        if (after.rules, after.chains) != (before.rules, before.chains):
            raise DemoError(f"the rules changed with the Services: {before}, then {after}")
        self._say(_cost(done))
        some = [Question("pod", _address(n), 80, pods=WEB[2:4]) for n in range(0, MANY, MANY // 2)]
        self._ask(some)
        self._compare(before, after)

    def _compare(self, before: Ruleset, after: Ruleset) -> None:
        self._title("What it comes to")
        services = len(SERVICES) - 1  # dns is gone
        for count, size in ((services, before), (services + MANY, after)):
            self._say(
                f"{count:>6} Services: {size.rules} rules in {size.chains} chains, "
                f"{size.elements:>5} elements"
            )
        self._say(f"\n{self._stage.asked} connections, each of them as announced.")
        self._say(
            "Try next: kubectl get no,svc,endpointslices -A -o yaml"
            " | sliceproxy render --from - --node NAME",
            style="bold",
        )

    # changes

    def _add_endpoint(self, documents: Documents, *, host: str) -> None:
        played_by = self._stage.world.hosts[host]
        for document in documents:
            if document["kind"] == "EndpointSlice":
                address = played_by.ipv4 if document["addressType"] == "IPv4" else played_by.ipv6
                document["endpoints"].append(
                    {
                        "addresses": [address],
                        "conditions": {"ready": True, "serving": True, "terminating": False},
                        "nodeName": "node-2",
                        "targetRef": {"kind": "Pod", "namespace": "default", "name": PODS[host]},
                    }
                )

    def _change(self, name: str, change: Callable[[Documents], None]) -> None:
        self._tell(self._stage.edit(name, change))

    def _tell(self, done: Programmed) -> None:
        """What changed in the kernel, and how long that took."""
        shown = [command for command in done.commands if " ip sliceproxy " in command]
        if not shown:
            raise DemoError("the agent logged a transaction, but no change of table ip sliceproxy")
        for command in shown[:MOST_COMMANDS]:
            self._say(f"  {command}", style="cyan")
        more, others = len(shown) - MOST_COMMANDS, len(done.commands) - len(shown)
        rest = [f"{more} more"] if more > 0 else []
        rest += [f"{others} for table ip6, which say the same"] if others else []
        if rest:
            self._say(f"  and {', and '.join(rest)}")
        self._say(_cost(done))

    # answers

    def _ask(self, questions: Sequence[Question]) -> None:
        """Asks, prints what came, and raises DemoError if it is not what must come.

        A sticky question is asked once before all the others at once: a client is remembered when
        its first packet leaves the node, so packets on two CPUs at once may both be the first.
        """
        table = Table.grid(padding=(0, 2))
        # in a narrow terminal only the column of pods is narrower, and wraps
        for width in (8, 23, max(12, min(48, self._console.width - 49)), 12):
            table.add_column(width=width)
        for question in questions:
            ask = partial(
                self._stage.ask,
                ASKERS[question.asker],
                question.address,
                question.port,
                question.protocol,
                timeout=SILENCE if question.outcome == "silent" else 1.0,
            )
            alone = int(question.sticky)
            answers = ask(times=alone) + ask(times=TIMES[question.outcome] - alone)
            table.add_row(question.asker, question.where, *_row(question, answers))
            try:
                self._check(question, answers)
            except DemoError:
                self._console.print(table)
                raise
        self._console.print(table)

    def _check(self, question: Question, answers: Sequence[Answer]) -> None:
        what = f"{question.asker} asked {question.where}"
        outcomes = Counter(answer.outcome for answer in answers)
        if set(outcomes) != {question.outcome}:
            came = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
            raise DemoError(f"{what}: announced was {question.outcome}, but it was: {came}")
        if question.outcome != "answered":
            return
        pods = {_pod(answer) for answer in answers}
        wanted = set(question.pods)
        if not (len(pods) == 1 and pods <= wanted if question.sticky else pods == wanted):
            raise DemoError(
                f"{what}: {', '.join(sorted(pods))} answered, but announced was "
                f"{'always the same of ' if question.sticky else ''}{', '.join(sorted(wanted))}"
            )
        self._check_source(question, {answer.client for answer in answers})

    def _check_source(self, question: Question, seen: set[str | None]) -> None:
        host = self._stage.world.hosts[
            "node" if question.sees == "node" else ASKERS[question.asker]
        ]
        wanted = host.ipv6 if ":" in question.address else host.ipv4
        if seen != {wanted}:
            raise DemoError(
                f"{question.asker} asked {question.where}: announced was that the pods see"
                f" {wanted}, but they saw {', '.join(sorted(map(str, seen)))}"
            )

    # printing

    def _title(self, text: str) -> None:
        self._stage.interrupts.pause(self._breath)
        self._console.print(Text(f"\n{text}\n{'-' * len(text)}", style="bold green"))

    def _step(self, text: str) -> None:
        self._scenes += 1
        self._title(f"{self._scenes}. {text}")

    def _say(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style=style))

    def _command(self, text: str) -> None:
        self._say(f"    {text}", style="cyan")

    def _indent(self, text: str) -> None:
        for line in text.rstrip().splitlines():
            self._say(f"    {line}".rstrip())


def _row(question: Question, answers: Sequence[Answer]) -> tuple[str, str]:
    """What a table says of answers: how many each pod gave, and whose address it saw."""
    pods = Counter(_pod(answer) for answer in answers if answer.outcome == "answered")
    others = Counter(answer.outcome for answer in answers if answer.outcome != "answered")
    if not pods and len(others) == 1:
        return f"{question.outcome}: {question.because}", ""
    cells = [f"{name} {count}" for name, count in (*sorted(pods.items()), *others.items())]
    return "  ".join(cells), "the node's" if question.sees == "node" else f"the {question.asker}'s"


def _pod(answer: Answer) -> str:
    return PODS.get(answer.server or "", str(answer.server))


def _cost(done: Programmed) -> str:
    return (
        f"{done.elements} elements in one transaction: kernel {done.kernel_ms:.2f} ms, "
        f"agent {done.ms:.2f} ms, from file to done {done.end_to_end_ms:.1f} ms"
    )


def _set_conditions(
    documents: Documents, *, pod: str, ready: bool, terminating: bool = False
) -> None:
    """What the controller writes: a pod that is not ready serves only while it terminates."""
    for endpoint in endpoints_of(documents, pod):
        serving = ready or terminating
        conditions = {"ready": ready, "serving": serving, "terminating": terminating}
        endpoint["conditions"] = conditions


def _remove_endpoint(documents: Documents, *, pod: str) -> None:
    gone = list(endpoints_of(documents, pod))
    for document in documents:
        if document["kind"] == "EndpointSlice":
            document["endpoints"] = [e for e in document["endpoints"] if e not in gone]


def _address(number: int) -> str:
    """The cluster IP of one of the many Services."""
    return f"10.96.{4 + number // 250}.{1 + number % 250}"


def _many() -> dict[str, object]:
    """The many Services and their slices: one JSON List, as kubectl prints it."""
    items: list[dict[str, object]] = []
    for number in range(MANY):
        name = f"many-{number:04}"
        items += (
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": name, "namespace": "default"},
                "spec": {"clusterIP": _address(number), "ports": [{"port": 80}]},
            },
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "name": name,
                    "namespace": "default",
                    "labels": {"kubernetes.io/service-name": name},
                },
                "addressType": "IPv4",
                "ports": [{"port": 8080}],
                "endpoints": [{"addresses": [a]} for a in ("10.244.2.11", "10.244.2.12")],
            },
        )
    return {"apiVersion": "v1", "kind": "List", "items": items}
