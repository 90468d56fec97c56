"""One line for each Service port: addresses, policies, endpoints used, and what a client meets."""

from __future__ import annotations

import pytest

from rules.events import Upsert
from rules.objects import Object
from rules.service_report import DROPPED, NOT_PROXIED, REFUSED, SERVED, ServiceLine, services
from rules.state import State
from tests import manifest
from tests.manifest import endpoint, endpoint_slice, node, service
from tests.unit.test_endpoints import stepped


def lines(*objects: Object, namespace: str = "") -> list[ServiceLine]:
    state: State = stepped(*objects)
    return services(state, namespace)


def test_a_line_counts_used_and_all_endpoints() -> None:
    (line,) = lines(
        service(cluster_ips=["10.96.0.10"]),
        endpoint_slice("web", [endpoint("10.0.0.1"), endpoint("10.0.0.2", ready=False)]),
    )
    assert (line.namespace, line.name, line.port, line.protocol, line.family) == (
        *("default", "web", "80 (http)", "tcp", 4),
    )
    assert (line.used, line.total, line.state) == (1, 2, SERVED)
    (frontend,) = line.frontends
    assert (frontend.address, frontend.kind) == ("10.96.0.10:80/tcp", "cluster IP")


@pytest.mark.parametrize("algorithm", ["random", "weighted", "source-hash"])
def test_a_line_counts_endpoints_and_not_their_slots(algorithm: str) -> None:
    annotations = manifest.balancing(
        algorithm, zone_weights="a=7" if algorithm != "random" else None
    )
    endpoints = [manifest.endpoint("10.0.0.1", zone="a"), manifest.endpoint("10.0.0.2")]
    (line,) = lines(
        manifest.service(cluster_ips=["10.96.0.10"], annotations=annotations),
        manifest.endpoint_slice(endpoints=endpoints),
    )
    assert (line.algorithm, line.used, line.total) == (algorithm, 2, 2)


def test_a_line_says_what_a_client_meets_without_endpoints() -> None:
    refused, dropped, headless = lines(
        service("a", cluster_ips=["10.96.0.1"]),
        service("b", cluster_ips=["10.96.0.2"], internalTrafficPolicy="Local"),
        endpoint_slice("b", [endpoint("10.0.0.1", node="elsewhere")]),
        service("c", cluster_ips=["None"]),
    )
    assert (refused.state, dropped.state, headless.state) == (REFUSED, DROPPED, NOT_PROXIED)
    assert (dropped.internal_policy, dropped.external_policy) == ("Local", "Cluster")


def test_an_address_that_another_service_has_names_it() -> None:
    found = lines(
        service("old", cluster_ips=["10.96.0.1"], externalIPs=["203.0.113.1"]),
        service(
            "young",
            cluster_ips=["10.96.0.2"],
            externalIPs=["203.0.113.1"],
            created="2026-02-01T00:00:00Z",
        ),
    )
    external = {line.name: line.frontends[-1] for line in found}
    assert external["old"].holder == ""
    assert (external["young"].holder, external["young"].state) == (
        *("default/old", "another Service has it"),
    )


def test_each_family_has_a_line_and_namespaces_filter() -> None:
    objects = [service("web"), service("web", namespace="shop", cluster_ips=["10.96.9.9"])]
    assert [(line.namespace, line.family) for line in lines(*objects)] == [
        *(("default", 4), ("default", 6), ("shop", 4)),
    ]
    state = State(stepped().options)
    state.apply([Upsert(o) for o in (node(), *objects)])
    state.step()
    assert [line.namespace for line in services(state, "shop")] == ["shop"]
