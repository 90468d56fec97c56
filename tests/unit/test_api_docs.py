"""docs/api.md and docs/api/v1.json have every path and field of the API, and nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.serve.api import ANSWERS, Api
from agent.serve.flows import RecentFlows
from tests.manifest import service
from tests.unit.fakes.flow_watch import FakeFlowWatch
from tests.unit.test_api import WEB, Agent

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "docs/api/v1.json").read_text())
TEXT = (ROOT / "docs/api.md").read_text()
SIMPLE = {
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}


def test_the_schemas_are_those_of_the_records() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "tools/api-schema"), "--check"], check=False)
    assert done.returncode == 0, "run tools/api-schema"


def test_the_document_has_each_path_once() -> None:
    headings = re.findall(r"^### `GET (/[^`?]*)", TEXT, re.MULTILINE)
    assert sorted(headings) == sorted(["/", *ANSWERS])


@pytest.mark.parametrize("path", ANSWERS)
def test_the_document_names_each_field_of_an_answer(path: str) -> None:
    section = TEXT.split(f"### `GET {path}")[1].split("\n### ")[0]
    for name in _fields(SCHEMA["paths"][path], set()):
        assert f"`{name}`" in section, f"{path}: {name}"


def _fields(part: dict[str, Any], seen: set[str]) -> Iterator[str]:
    """All names of fields below a part of a schema."""
    for key in ("items", "additionalProperties"):
        if isinstance(part.get(key), dict):
            yield from _fields(part[key], seen)
    for one in (*part.get("prefixItems", ()), *part.get("anyOf", ())):
        yield from _fields(one, seen)
    if (reference := part.get("$ref")) and reference not in seen:
        seen.add(reference)
        record = SCHEMA["$defs"][reference.rsplit("/", 1)[1]]
        for name, field in record["properties"].items():
            yield name
            yield from _fields(field, seen)


TARGETS = {
    "/v1/services/{namespace}/{name}": ("/v1/services/default/web", {}),
    "/v1/explain": ("/v1/explain", {"target": "10.96.0.10:80"}),
}


@pytest.mark.parametrize("path", ANSWERS)
def test_an_answer_is_valid_by_its_schema(path: str) -> None:
    agent = Agent(*WEB, service("twin", cluster_ips=["10.96.0.10"]))
    flows = RecentFlows(pytest.fail, FakeFlowWatch)
    agent.api = Api(agent.sources._replace(counts=dict, flows=flows))
    agent.state.problems.collect(1.0)
    agent.history.note("started", 1.0, "a test")
    target, query = TARGETS.get(path, (path, {}))
    code, body = agent.get(target, **query)
    assert code == 200
    agent.api.stop()
    _check(body, SCHEMA["paths"][path], path)


def _check(value: Any, part: dict[str, Any], where: str) -> None:
    """The few words of JSON Schema that msgspec writes. Raises AssertionError."""
    if "$ref" in part:
        return _check(value, SCHEMA["$defs"][part["$ref"].rsplit("/", 1)[1]], where)
    if "anyOf" in part:
        errors = []
        for one in part["anyOf"]:
            try:
                return _check(value, one, where)
            except AssertionError as error:
                errors.append(error)
        raise AssertionError(where, errors)
    match part.get("type"):
        case "object":
            assert isinstance(value, dict), where
            assert set(part.get("required", ())) <= set(value), where
            for name, inner in value.items():
                known = part.get("properties", {}).get(name, part.get("additionalProperties"))
                assert isinstance(known, dict), f"{where}.{name}"
                _check(inner, known, f"{where}.{name}")
        case "array":
            assert isinstance(value, list), where
            inner = part.get("prefixItems") or [part.get("items")] * len(value)
            for index, (item, one) in enumerate(zip(value, inner, strict=True)):
                _check(item, one, f"{where}[{index}]")
        case str(name):
            assert isinstance(value, SIMPLE[name]), (where, value)
    return None


def test_a_client_of_v1_ignores_fields_that_it_does_not_know() -> None:
    """Within v1 fields may be added."""
    for kind in ANSWERS.values():
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            assert not kind.__struct_config__.forbid_unknown_fields
