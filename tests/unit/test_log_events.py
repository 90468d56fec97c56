"""docs/log-events.md lists every log event of the agent, and the agent logs no others.

Found in the source by its syntax: each call of a logger's method in `agent`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from rules.problems import CODES

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "log-events.md"
METHODS = {"debug", "info", "warning", "error", "exception", "critical"}
LOGGERS = {"log", "_log", "logger", "_logger"}


class Call(NamedTuple):
    """One call of a logger's method."""

    where: str
    level: str
    event: ast.expr | None
    fields: frozenset[str]
    open: bool
    """Whether there are more fields, which only the running program knows (`**fields`)."""

    @property
    def names(self) -> list[str]:
        """The events that it may log; none if they are not literals."""
        if isinstance(self.event, ast.Attribute) and self.event.attr == "code":
            return list(CODES)  # a problem's code
        return list(literals(self.event))


class Row(NamedTuple):
    """One line of the table."""

    event: str
    levels: frozenset[str]
    meaning: str
    action: str
    fields: frozenset[str]


def literals(node: ast.expr | None) -> Iterator[str]:
    """The strings that an expression may be, where it is a literal or a choice of literals."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.IfExp):
        yield from literals(node.body)
        yield from literals(node.orelse)


def logging_method(function: ast.expr) -> str:
    """The level at which a called function logs, "any" if the program chooses; "" if it is none."""
    if isinstance(function, ast.Name):  # log = self._log.error if ... else self._log.warning
        return "any" if function.id == "log" else ""
    if not isinstance(function, ast.Attribute) or function.attr not in METHODS:
        return ""
    owner = function.value
    name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
    level = "error" if function.attr == "exception" else function.attr
    return level if name in LOGGERS else ""


def calls(path: Path) -> Iterator[Call]:
    """Every call of a logger's method in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and (method := logging_method(node.func)):
            yield Call(
                f"{path.relative_to(ROOT)}:{node.lineno}",
                method,
                node.args[0] if node.args else None,
                frozenset(k.arg for k in node.keywords if k.arg) - {"exc_info"},
                any(k.arg is None for k in node.keywords),
            )


def rows() -> Iterator[Row]:
    """The lines of the tables in docs/log-events.md."""
    for line in TABLE.read_text().splitlines():
        if line.startswith("| `"):
            event, level, meaning, action, fields = (c.strip() for c in line.strip("|").split("|"))
            yield Row(
                event.strip("`"),
                frozenset(re.findall(r"[a-z]+", level)),
                meaning,
                action,
                frozenset(re.findall(r"`([^`]+)`", fields)),
            )


CALLS = [call for path in sorted((ROOT / "agent").rglob("*.py")) for call in calls(path)]
ROWS = {row.event: row for row in rows()}


def test_the_table_names_each_event_once():
    assert len(ROWS) == len(list(rows()))


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.event)
def test_a_row_says_what_an_operator_needs(row):
    assert re.fullmatch(r"[a-z_]+", row.event)
    assert row.levels <= METHODS - {"exception"}
    assert row.levels
    assert row.meaning
    assert row.action


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.where)
def test_a_call_logs_events_of_the_table_at_its_level_with_its_fields(call):
    assert call.names, "an event is a literal, or the code of a problem"
    for event in call.names:
        assert event in ROWS, f"add `{event}` to docs/log-events.md"
        assert call.level in {"any", *ROWS[event].levels}
        assert call.fields <= ROWS[event].fields, "add its fields to docs/log-events.md"


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.where)
def test_an_object_is_named_in_one_field(call):
    """`service=namespace/name`, so that one search finds all lines about a Service."""
    assert not call.fields & {"subject", "namespace", "name", "svc"}


def test_every_event_of_the_table_is_logged():
    found = {event for call in CALLS for event in call.names}
    assert ROWS.keys() == found
