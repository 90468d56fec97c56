"""`sliceproxy demo`: a small cluster in network namespaces, and real connections to its Services.

The demo shows a newcomer what the agent does. It is also a test: every table of answers is compared
with what was announced (`lab.questions`), and the first difference ends it with a DemoError.

`lab.stage` has the namespaces, the agent's process, the manifests and the signals.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from lab.asker import Asker
from lab.changes import MANY, add_endpoint, address_of, many, remove_endpoint, set_conditions
from lab.questions import (
    ASKERS,
    DNS_4,
    DNS_6,
    EMPTY_4,
    EMPTY_6,
    NODE_6,
    SERVICES,
    SHOP,
    SHOP_4,
    TIMES,
    WEB,
    WEB_4,
    Question,
)
from lab.screen import WIDTH, Screen, console, cost
from lab.stage import (
    NODE_OPTIONS,
    POD_OPTIONS,
    DemoError,
    Documents,
    Interrupted,
    Interrupts,
    Ruleset,
    Stage,
)

__all__ = ["DemoError", "run"]

_BREATH = 0.6
"""Seconds between two scenes, so that a reader can follow."""


def run(*, plain: bool) -> None:
    """Plays the demo. Raises DemoError if anything is not as announced, or cannot be shown here.

    plain: no colours and no pauses. Where standard output is no terminal it is plain anyway.
    Interrupted by SIGINT or SIGTERM it cleans up and exits with 128 and the signal's number.
    """
    interrupts = Interrupts()
    with interrupts, suppress(Interrupted), Stage(interrupts) as stage:
        screen = Screen(console(plain), interrupts, breath=0 if plain else _BREATH)
        _Demo(stage, screen).play()
    if interrupts.caught is not None:
        print("sliceproxy: interrupted; all namespaces of the demo were removed", file=sys.stderr)
        raise SystemExit(128 + interrupts.caught)


class _Demo:
    def __init__(self, stage: Stage, screen: Screen) -> None:
        self._stage = stage
        self._screen = screen
        self._asker = Asker(stage, screen)

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
        self._screen.title("A cluster of network namespaces, removed when the demo ends")
        hosts = self._stage.world.hosts
        for name, host, text in (
            ("node-1", "node", "the agent runs here, and only here"),
            ("node-2", "elsewhere", "a second machine; its pods are endpoints too"),
            ("", None, ""),
            ("pod", "pod-6", "a pod on node-1. It opens connections, and so do"),
            ("node", "node", "node-1 itself,"),
            ("client", "client", "a machine outside the cluster,"),
            ("stranger", "stranger", "and another one."),
        ):
            self._screen.say(f"  {name:<10}{hosts[host].ipv4 if host else '':<15}{text}".rstrip())
        self._screen.say(
            "\nThe Services are those of examples/. The agent on node-1 follows a copy of them:"
        )
        self._screen.command(f"sliceproxy run --from examples/ {shlex.join(NODE_OPTIONS)} \\")
        self._screen.command(f"    {shlex.join(POD_OPTIONS)}")
        done = self._stage.start_agent()
        size = self._stage.ruleset()
        self._screen.say(
            f"\n{done.end_to_end_ms / 1000:.1f} s after its start, one transaction has written"
            f" everything: {size.rules} rules, the same for any number of Services, and"
            f" {size.elements} elements of sets and maps, which are the Services."
        )

    def _services(self) -> None:
        self._screen.title("Which pods answer at which address")
        self._screen.say(
            f"Each line is {TIMES['answered']} connections (if refused, {TIMES['refused']}; if"
            f" dropped, {TIMES['silent']}): the client, the address, how many connections each pod"
            " got, and the client address that the pods saw."
        )
        for text, questions in SERVICES:
            self._screen.say(f"\n{text}", style="bold")
            self._asker.ask(questions)

    def _scale_up(self) -> None:
        self._screen.step("web gets a sixth pod, web-6 on node-2")
        self._screen.say(
            "The pods of an address are in numbered slots of the map `endpoints`, and"
            " `service-ips` names the chain that draws a slot at random. web has the chain for up"
            " to 6 slots, so the change is one element for each address, and one for the node port."
            " As nft commands (the agent itself runs no nft):"
        )
        self._change("web.yaml", partial(add_endpoint, host=self._stage.world.hosts["remote-8"]))
        self._asker.ask(
            (
                Question("pod", WEB_4, 80, pods=(*WEB, "web-6")),
                Question("client", NODE_6, 30080, pods=(*WEB, "web-6"), sees="node"),
            )
        )
        self._screen.say(
            "The times: the kernel's part; the agent's work on the transaction; and from the rename"
            " of the changed file until the agent has logged the transaction and each element."
        )

    def _make_unready(self) -> None:
        self._screen.step("web-2 fails its readiness probe: it gets no new connections")
        self._screen.say(
            "web-6 moves from the last slot into the slot of web-2. `hairpins` are pods of this"
            " node, which may reach themselves through their Service."
        )
        self._change("web.yaml", partial(set_conditions, pod="web-2", ready=False))
        left = ("web-1", "web-3", "web-4", "web-5", "web-6")
        self._asker.ask(
            (
                Question("pod", WEB_4, 80, pods=left),
                Question("client", NODE_6, 30080, pods=left, sees="node"),
            )
        )

    def _terminate(self) -> None:
        self._screen.step(
            "shop-1, the only pod of shop on this node, is terminating but still serves"
        )
        self._screen.say(
            "Clients outside may only use endpoints on this node, so they keep using it until it is"
            " removed. Clients inside use the ready one; their list is in the maps `inside-...`."
        )
        self._change(
            "shop.yaml", partial(set_conditions, pod="shop-1", ready=False, terminating=True)
        )
        self._asker.ask(
            (
                Question("client", SHOP_4, 80, pods=SHOP[:1]),
                Question("pod", SHOP_4, 80, pods=SHOP[1:]),
            )
        )

    def _explain(self) -> None:
        client = self._stage.world.hosts["client"].ipv4
        question = ("explain", f"{SHOP_4}:80", "--from-address", client)
        self._screen.say("\nWhy? `explain` follows a packet through the rules:\n")
        self._screen.command(f"sliceproxy {shlex.join(question)} --from examples/ ...")
        self._screen.say("")
        place = ("--from", str(self._stage.directory), *NODE_OPTIONS, *POD_OPTIONS)
        self._screen.indent(self._stage.output_of(*question, *place, columns=WIDTH - 4))

    def _remove_pod(self) -> None:
        self._screen.step("shop-1 is removed: no endpoint is left on this node for clients outside")
        self._change("shop.yaml", partial(remove_endpoint, pod="shop-1"))
        self._asker.ask(
            (
                Question("client", SHOP_4, 80, outcome="silent", because="no pod on this node"),
                Question("pod", SHOP_4, 80, pods=SHOP[1:]),
            )
        )

    def _fill_the_empty(self) -> None:
        self._screen.step("empty gets its first endpoint")
        self._change("empty.yaml", partial(add_endpoint, host=self._stage.world.hosts["remote-7"]))
        self._asker.ask(
            (
                Question("pod", EMPTY_4, 80, pods=("empty-1",)),
                Question("pod", EMPTY_6, 80, pods=("empty-1",)),
            )
        )

    def _kill_the_agent(self) -> None:
        self._screen.step("kill -9 of the agent while connections are opened, then a new agent")
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
                "announced was that the new agent has nothing to write, but it"
                f" {again.event} {again.elements} elements"
            )
        self._screen.say(
            f"{len(stream.answers)} connections, {without} of them before the new agent was"
            f" started: 0 failed. The new agent read back what the kernel had and wrote"
            f" {again.elements} elements, {again.end_to_end_ms / 1000:.1f} s after its start."
        )

    def _delete_service(self) -> None:
        self._screen.step("dns is deleted")
        self._screen.show(self._stage.remove("dns.yaml"))
        deleted = partial(Question, "pod", port=53, outcome="silent", because="no such Service")
        self._asker.ask((deleted(address=DNS_4), deleted(address=DNS_6)))

    def _many_more(self) -> None:
        self._screen.step(f"{MANY} more Services with two pods each, in one file")
        before = self._stage.ruleset()
        done = self._stage.write("many.json", json.dumps(many()))
        after = self._stage.ruleset()
        if (after.rules, after.chains) != (before.rules, before.chains):
            raise DemoError(f"the rules changed with the Services: {before}, then {after}")
        self._screen.say(cost(done))
        some = [
            Question("pod", address_of(n), 80, pods=WEB[2:4]) for n in range(0, MANY, MANY // 2)
        ]
        self._asker.ask(some)
        self._compare(before, after)

    def _compare(self, before: Ruleset, after: Ruleset) -> None:
        self._screen.title("Summary")
        services = len(SERVICES) - 1  # dns was deleted
        for count, size in ((services, before), (services + MANY, after)):
            self._screen.say(
                f"{count:>6} Services: {size.rules} rules in {size.chains} chains, "
                f"{size.elements:>5} elements"
            )
        self._screen.say(f"\n{self._stage.asked} connections, each of them as announced.")
        self._screen.say(
            "Try next: kubectl get no,svc,endpointslices -A -o yaml"
            " | sliceproxy render --from - --node NAME",
            style="bold",
        )

    def _change(self, name: str, change: Callable[[Documents], None]) -> None:
        self._screen.show(self._stage.edit(name, change))

    # printing
