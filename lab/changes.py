"""What happens to the Services of the demo, as changes of their manifests."""

from __future__ import annotations

from lab.hosts import Host
from lab.questions import PODS
from lab.stage import Documents, endpoints_of

MANY = 1000


def add_endpoint(documents: Documents, *, host: Host) -> None:
    """Adds the host's pod to the EndpointSlices of a manifest."""
    for document in documents:
        if document["kind"] == "EndpointSlice":
            address = host.ipv4 if document["addressType"] == "IPv4" else host.ipv6
            document["endpoints"].append(
                {
                    "addresses": [address],
                    "conditions": {"ready": True, "serving": True, "terminating": False},
                    "nodeName": "node-2",
                    "targetRef": {"kind": "Pod", "namespace": "default", "name": PODS[host.name]},
                }
            )


def set_conditions(
    documents: Documents, *, pod: str, ready: bool, terminating: bool = False
) -> None:
    """What the controller writes: a pod that is not ready serves only while it terminates."""
    for endpoint in endpoints_of(documents, pod):
        serving = ready or terminating
        conditions = {"ready": ready, "serving": serving, "terminating": terminating}
        endpoint["conditions"] = conditions


def remove_endpoint(documents: Documents, *, pod: str) -> None:
    """Removes a pod from the EndpointSlices of a manifest."""
    removed = list(endpoints_of(documents, pod))
    for document in documents:
        if document["kind"] == "EndpointSlice":
            document["endpoints"] = [e for e in document["endpoints"] if e not in removed]


def address_of(number: int) -> str:
    """The cluster IP of one of the many Services."""
    return f"10.96.{4 + number // 250}.{1 + number % 250}"


def many() -> dict[str, object]:
    """The many Services and their slices: one JSON List, as kubectl prints it."""
    items: list[dict[str, object]] = []
    for number in range(MANY):
        name = f"many-{number:04}"
        items += (
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": name, "namespace": "default"},
                "spec": {"clusterIP": address_of(number), "ports": [{"port": 80}]},
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
