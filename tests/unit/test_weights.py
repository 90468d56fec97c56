"""The annotations for algorithms and weights are read strictly, and a bad one costs its object."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest

from rules.events import Upsert
from rules.objects import (
    RANDOM_CHOICE,
    Algorithm,
    Balancing,
    Endpoint,
    EndpointSlice,
    Service,
    WeightedEndpoint,
)
from rules.options import Options
from rules.state import State
from rules.target import target_of
from rules.weights import MAX_WEIGHT, MAX_WEIGHTS, weigher
from tests import manifest

WEIGHTED, HASH = Algorithm.WEIGHTED, Algorithm.SOURCE_HASH


def packed(text: str) -> bytes:
    return ipaddress.ip_address(text).packed


def service(algorithm: str, **weights: str) -> Service:
    return manifest.service(annotations=manifest.balancing(algorithm, **weights))


def slice_with(weights: str, *endpoints: dict[str, Any]) -> EndpointSlice:
    annotations = {"sliceproxy.io/weights": weights}
    return manifest.endpoint_slice(endpoints=endpoints, annotations=annotations)


def test_a_service_without_annotations_is_random():
    assert manifest.service().balancing is RANDOM_CHOICE


@pytest.mark.parametrize("algorithm", list(Algorithm))
def test_each_algorithm_is_asked_for_by_its_name(algorithm):
    found = service(algorithm.value)
    assert (found.balancing, found.problems) == (Balancing(algorithm), ())


def test_weights_are_by_pod_by_address_and_by_zone():
    found = service("weighted", weights="db-0=3, 10.0.0.7=0,fd00::7=65535", zone_weights="a=2 ,b=1")
    assert found.problems == ()
    assert found.balancing == Balancing(
        WEIGHTED,
        (("db-0", 3), (packed("10.0.0.7"), 0), (packed("fd00::7"), 65535)),
        (("a", 2), ("b", 1)),
    )


def test_weights_have_no_effect_while_the_algorithm_is_random():
    assert service("random", weights="a=1").balancing is RANDOM_CHOICE
    annotations = {"sliceproxy.io/zone-weights": "a=3"}
    assert manifest.service(annotations=annotations).balancing is RANDOM_CHOICE
    piece = slice_with("a=0", manifest.endpoint("10.0.0.1", pod="a"))
    assert weights(service("random"), piece) == {"10.0.0.1": 1}


@pytest.mark.parametrize(
    "text", ["", "rr", "Random", "source-hash ", "weighted;random", "x" * 100_000]
)
def test_an_unknown_algorithm_is_random_and_a_problem(text):
    found = service(text)
    assert found.balancing is RANDOM_CHOICE
    (problem,) = found.problems
    assert "is none of random, source-hash, weighted; taken as random" in problem
    assert len(problem) < 300


BAD_WEIGHTS = {
    "": "is not NAME=WEIGHT",
    "a": "is not NAME=WEIGHT",
    "a=1,": "is not NAME=WEIGHT",
    "a=": "has no weight",
    "a=-1": "has no weight",
    "a=+1": "has no weight",
    "a=1.5": "has no weight",
    "a=1=2": "has no weight",
    "a=0x1": "has no weight",
    "a=\u0663": "has no weight",
    f"a={MAX_WEIGHT + 1}": "has no weight",
    "a=" + "9" * 100_000: "has no weight",
    "=1": "neither a pod's name",
    "A=1": "neither a pod's name",
    "a b=1": "neither a pod's name",
    "127.0.0.1=1": "neither a pod's name",
    "10.0.0=1": "neither a pod's name",
    '"; flush ruleset; #=1': "neither a pod's name",
    "a=1,b=1,a=1": "is a duplicate",
    "10.0.0.1=1,010.0.0.1=2": "is a duplicate",
    ",".join(f"p{n}=1" for n in range(MAX_WEIGHTS + 1)): "more than 1000 weights",
}


@pytest.mark.parametrize(("text", "because"), BAD_WEIGHTS.items(), ids=range(len(BAD_WEIGHTS)))
def test_bad_weights_make_the_service_random(text, because):
    found = service("weighted", weights=text, zone_weights="a=2")
    assert found.balancing is RANDOM_CHOICE
    (problem,) = found.problems
    assert problem.startswith("sliceproxy.io/weights: ")
    assert because in problem
    assert problem.endswith("; sliceproxy.io/algorithm is taken as random")
    assert len(problem) < 300


@pytest.mark.parametrize("text", ["", "a", "a=x", "a=1,a=1", "a b=1", "-a=1", "a=1;b=1"])
def test_bad_zone_weights_make_the_service_random(text):
    found = service("source-hash", zone_weights=text)
    assert found.balancing is RANDOM_CHOICE
    assert found.problems[0].startswith("sliceproxy.io/zone-weights: ")


@pytest.mark.parametrize(("text", "because"), BAD_WEIGHTS.items(), ids=range(len(BAD_WEIGHTS)))
def test_bad_weights_of_a_slice_leave_its_endpoints_without_weights(text, because):
    found = slice_with(text, manifest.endpoint("10.0.0.1", pod="a"))
    assert [type(e) for e in found.endpoints] == [Endpoint]
    (problem,) = found.problems
    assert because in problem
    assert problem.endswith("; ignored")


def weights(found: Service, *slices: EndpointSlice) -> dict[str, int]:
    weight = weigher(found.balancing)
    return {
        str(ipaddress.ip_address(e.address)): weight(e) for piece in slices for e in piece.endpoints
    }


def test_the_most_specific_weight_counts():
    endpoints = [
        manifest.endpoint(f"10.0.0.{n}", pod=pod, zone=zone)
        for n, (pod, zone) in enumerate((("s", "a"), ("t", "a"), ("u", "a"), ("v", "b")), start=1)
    ]
    piece = slice_with("s=5,10.0.0.9=1", *endpoints)
    assert [type(e) for e in piece.endpoints] == [WeightedEndpoint, Endpoint, Endpoint, Endpoint]
    found = service("weighted", weights="s=4,t=4,10.0.0.3=0", zone_weights="a=3")
    assert weights(found, piece) == {"10.0.0.1": 5, "10.0.0.2": 4, "10.0.0.3": 0, "10.0.0.4": 1}


def test_a_slice_names_its_endpoints_by_pod_or_by_address():
    piece = slice_with(
        "db-0=0,fd00::2=7",
        manifest.endpoint("fd00::1", pod="db-0"),
        manifest.endpoint("fd00::2", pod="db-1"),
        manifest.endpoint("fd00::3"),
    )
    assert piece.problems == ()
    assert weights(service("weighted"), piece) == {"fd00::1": 0, "fd00::2": 7, "fd00::3": 1}


def test_weights_of_endpoints_that_are_gone_are_no_problem():
    piece = slice_with("gone=3,10.0.0.9=1", manifest.endpoint("10.0.0.1", pod="db-0"))
    assert piece.problems == ()
    assert weights(service("weighted", weights="gone=1"), piece) == {"10.0.0.1": 1}


def test_a_bad_annotation_is_a_problem_of_its_object_alone():
    """Open while it is there, and closed when it is mended; the other objects are served."""
    state = State(Options(node="node-1"))
    good = manifest.endpoint_slice(endpoints=[manifest.endpoint("10.0.0.2", pod="b")], name="good")
    bad = slice_with("a=many", manifest.endpoint("10.0.0.1", pod="a"))
    state.apply([Upsert(service("weighted", weights="b=0,a=3")), Upsert(good), Upsert(bad)])
    state.step()
    (problem,) = state.problems.open()
    assert (problem.code, problem.subject.kind) == ("unusable_value", "EndpointSlice")
    assert (problem.subject.name, problem.subject.service) == (str(bad.name), "default/web")
    slots = {target for installed in state.installed.values() for target in installed.slots}
    assert slots == {target_of(packed("10.0.0.1"), 8080)}
    state.apply([Upsert(slice_with("a=2", manifest.endpoint("10.0.0.1", pod="a")))])
    state.step()
    assert state.problems.empty
