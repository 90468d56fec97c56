"""Asks what the demo announces, prints the answers, and compares the two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

from rich.table import Table

from lab.hosts import Answer
from lab.questions import ASKERS, PODS, SILENCE, TIMES, Question
from lab.screen import Screen
from lab.stage import DemoError, Stage


class Asker:
    """Asks on a stage, and prints on a screen."""

    def __init__(self, stage: Stage, screen: Screen) -> None:
        self._stage = stage
        self._screen = screen

    def ask(self, questions: Sequence[Question]) -> None:
        """Asks, prints what came, and raises DemoError if it is not what must come.

        A sticky question is asked once before all the others at once: a client is remembered when
        its first packet leaves the node, so packets on two CPUs at once may both be the first.
        """
        table = Table.grid(padding=(0, 2))
        # in a narrow terminal only the column of pods is narrower, and wraps
        for width in (8, 23, max(12, min(48, self._screen.console.width - 49)), 12):
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
                self._screen.console.print(table)
                raise
        self._screen.console.print(table)

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
