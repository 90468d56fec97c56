"""Builds the objects that tests program, in the API's JSON, so that decoding is tested too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from rules.decode import decode
from rules.objects import EndpointSlice, Node, Object, Service, ServiceCIDR

CREATED = "2026-01-01T00:00:00Z"


def of(document: dict[str, Any]) -> Object:
    return decode(document["kind"], msgspec.json.encode(document))


def service_document(
    name: str = "web",
    *,
    namespace: str = "default",
    cluster_ips: Sequence[str] = ("10.96.0.10", "fd00:10:96::10"),
    ports: Sequence[dict[str, Any]] = ({"name": "http", "port": 80},),
    created: str = CREATED,
    ingress: Sequence[dict[str, Any]] = (),
    annotations: dict[str, str] | None = None,
    **spec: Any,
) -> dict[str, Any]:
    """`spec` takes the API's field names: type, externalIPs, sessionAffinity ..."""
    return {
        "kind": "Service",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "creationTimestamp": created,
            **({"annotations": annotations} if annotations else {}),
        },
        "spec": {
            "clusterIP": cluster_ips[0],
            "clusterIPs": list(cluster_ips),
            "ports": list(ports),
            "type": "ClusterIP",
            **spec,
        },
        "status": {"loadBalancer": {"ingress": list(ingress)}},
    }


def service(name: str = "web", **fields: Any) -> Service:
    result = of(service_document(name, **fields))
    assert isinstance(result, Service)
    return result


def balancing(
    algorithm: str, *, weights: str | None = None, zone_weights: str | None = None
) -> dict[str, str]:
    """The annotations of a Service that asks for an algorithm."""
    texts = {"algorithm": algorithm, "weights": weights, "zone-weights": zone_weights}
    return {f"sliceproxy.io/{name}": text for name, text in texts.items() if text is not None}


def endpoint(
    address: str,
    *,
    node: str = "node-1",
    ready: bool | None = True,
    serving: bool | None = None,
    terminating: bool | None = None,
    zone: str | None = None,
    for_zones: Sequence[str] = (),
    for_nodes: Sequence[str] = (),
    pod: str = "",
) -> dict[str, Any]:
    hints = {}
    if for_zones:
        hints["forZones"] = [{"name": z} for z in for_zones]
    if for_nodes:
        hints["forNodes"] = [{"name": n} for n in for_nodes]
    return {
        "addresses": [address],
        "conditions": {"ready": ready, "serving": serving, "terminating": terminating},
        "nodeName": node,
        "zone": zone,
        "hints": hints,
        **({"targetRef": {"kind": "Pod", "name": pod}} if pod else {}),
    }


def slice_document(
    service: str = "web",
    endpoints: Sequence[dict[str, Any]] = (),
    *,
    name: str | None = None,
    namespace: str = "default",
    ports: Sequence[dict[str, Any]] = ({"name": "http", "port": 8080},),
    family: str | None = None,
    created: str | None = CREATED,
    annotations: dict[str, str] | None = None,
) -> dict[str, Any]:
    if family is None:
        v6 = bool(endpoints) and ":" in endpoints[0]["addresses"][0]
        family = "IPv6" if v6 else "IPv4"
    return {
        "kind": "EndpointSlice",
        "metadata": {
            "name": name or f"{service}-{family.lower()}",
            "namespace": namespace,
            "labels": {"kubernetes.io/service-name": service},
            "creationTimestamp": created,
            **({"annotations": annotations} if annotations else {}),
        },
        "addressType": family,
        "endpoints": list(endpoints),
        "ports": list(ports),
    }


def endpoint_slice(
    service: str = "web", endpoints: Sequence[dict[str, Any]] = (), **fields: Any
) -> EndpointSlice:
    result = of(slice_document(service, endpoints, **fields))
    assert isinstance(result, EndpointSlice)
    return result


def node_document(
    name: str = "node-1",
    *,
    addresses: Sequence[str] = ("172.31.0.2", "fd00:172:31::2"),
    zone: str = "",
    pod_cidrs: Sequence[str] = ("10.244.1.0/24", "fd00:10:244:1::/64"),
) -> dict[str, Any]:
    return {
        "kind": "Node",
        "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone}},
        "spec": {"podCIDRs": list(pod_cidrs)},
        "status": {"addresses": [{"type": "InternalIP", "address": a} for a in addresses]},
    }


def node(name: str = "node-1", **fields: Any) -> Node:
    result = of(node_document(name, **fields))
    assert isinstance(result, Node)
    return result


def service_cidr(*cidrs: str, name: str = "kubernetes") -> ServiceCIDR:
    result = of({"kind": "ServiceCIDR", "metadata": {"name": name}, "spec": {"cidrs": list(cidrs)}})
    assert isinstance(result, ServiceCIDR)
    return result
