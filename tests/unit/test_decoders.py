"""Both decoders make the same records of the same objects, and neither fails on anything else."""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.sources.kubernetes.formats import (
    JSON,
    EventTooLarge,
    Format,
    Lines,
)
from agent.sources.kubernetes.protobuf import PROTOBUF, Frames
from agent.sources.kubernetes.reflector import Reflector, RequestType, resources
from rules import decode, decode_protobuf
from rules.objects import InvalidObject, Object
from tests.cluster import protobuf
from tests.fuzzing import fuzzed
from tests.http_recording import body_of

RECORDINGS = Path(__file__).parents[1] / "recordings"
LISTS = sorted(RECORDINGS.glob("*list-*.json"))
RAW = sorted((RECORDINGS / "raw").glob("*.http"))
KINDS = ("Service", "EndpointSlice", "Node", "ServiceCIDR")


def in_json(kind: str, document: dict[str, Any]) -> Object:
    return decode.decode(kind, msgspec.json.encode(document))


def in_protobuf(kind: str, document: dict[str, Any]) -> Object:
    return decode_protobuf.decode(kind, protobuf.item(kind, document))[0]


@pytest.mark.parametrize("path", LISTS, ids=lambda p: p.stem)
def test_recorded_objects(path: Path) -> None:
    document = json.loads(path.read_bytes())
    kind = document["kind"].removesuffix("List")
    for item in document["items"]:
        assert in_protobuf(kind, item) == in_json(kind, item)


@pytest.mark.parametrize(
    ("kind", "plural"), [("Service", "services"), ("EndpointSlice", "endpointslices")]
)
def test_the_same_list_in_both_encodings_of_the_server(kind: str, plural: str) -> None:
    raw = RECORDINGS / "raw"
    pages = (
        (JSON, JSON.page(body_of((raw / f"list-{plural}.json.gzip.http").read_bytes()))),
        (PROTOBUF, PROTOBUF.page(body_of((raw / f"list-{plural}.protobuf.http").read_bytes()))),
    )
    of_json, of_protobuf = (
        [(f.identity(i), f.record(kind, i)) for i in page.items] for f, page in pages
    )
    assert of_json == of_protobuf
    assert pages[0][1][:2] == pages[1][1][:2]
    assert len(of_json) > 20


# --- objects as the API server accepts them, with addresses of every kind ------------------------

names = st.from_regex(r"[a-z]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)
odd_addresses = st.sampled_from(
    ("010.0.0.1", "::ffff:10.0.0.1", "127.0.0.1", "fe80::1", "None", "", "x", "10.0.0.256")
)
addresses = st.ip_addresses().map(str) | odd_addresses
networks = addresses.flatmap(lambda a: st.sampled_from((f"{a}/8", f"{a}/24", f"{a}/99")))
ports = st.integers(1, 65535)
protocols = st.sampled_from(("TCP", "UDP", "SCTP", "ICMP"))
policies = st.sampled_from(("Cluster", "Local", "Other"))
times = st.datetimes().map(lambda t: f"{t:%Y-%m-%dT%H:%M:%S}Z".rjust(20, "0"))
labels = st.dictionaries(
    st.sampled_from(
        (
            "kubernetes.io/service-name",
            "service.kubernetes.io/service-proxy-name",
            "service.kubernetes.io/headless",
            "topology.kubernetes.io/zone",
        )
    ),
    names | st.just(""),
)


def some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Documents with any of these fields."""
    return st.fixed_dictionaries({}, optional=fields)


metadata = st.fixed_dictionaries(
    {"name": names},
    optional={
        "namespace": names,
        "labels": labels,
        "creationTimestamp": times,
        "deletionTimestamp": times,
        "annotations": st.fixed_dictionaries(
            {},
            optional={
                "endpoints.kubernetes.io/last-change-trigger-time": st.just("now"),
                "sliceproxy.io/algorithm": st.sampled_from(
                    ("random", "source-hash", "weighted", "rr", "")
                ),
                "sliceproxy.io/weights": st.sampled_from(
                    ("a=3,10.0.0.1=0", "a=1,a=2", "a=70000", "")
                ),
                "sliceproxy.io/endpoint-counters": st.sampled_from(("true", "false", "yes", "")),
                "sliceproxy.io/zone-weights": st.sampled_from(("a=3, b=1", "a", "=1")),
            },
        ),
    },
)
hints = st.lists(st.fixed_dictionaries({"name": names}), max_size=2)
DOCUMENTS = {
    "Service": st.fixed_dictionaries(
        {
            "metadata": metadata,
            "spec": some(
                type=st.sampled_from(("ClusterIP", "NodePort", "LoadBalancer", "ExternalName")),
                clusterIP=addresses,
                clusterIPs=st.lists(addresses, max_size=2),
                externalIPs=st.lists(addresses, max_size=3),
                ports=st.lists(
                    st.fixed_dictionaries(
                        {"port": ports},
                        optional={"name": names, "protocol": protocols, "nodePort": ports},
                    ),
                    max_size=3,
                ),
                sessionAffinity=st.sampled_from(("None", "ClientIP")),
                sessionAffinityConfig=some(clientIP=some(timeoutSeconds=st.integers(0, 90000))),
                internalTrafficPolicy=policies,
                externalTrafficPolicy=policies,
                loadBalancerSourceRanges=st.lists(networks, max_size=3),
                healthCheckNodePort=ports,
            ),
        },
        optional={
            "status": some(
                loadBalancer=some(
                    ingress=st.lists(
                        some(
                            ip=addresses, hostname=names, ipMode=st.sampled_from(("VIP", "Proxy"))
                        ),
                        max_size=3,
                    )
                )
            )
        },
    ),
    "EndpointSlice": st.fixed_dictionaries(
        {"metadata": metadata, "addressType": st.sampled_from(("IPv4", "IPv6", "FQDN", "IPX"))},
        optional={
            "endpoints": st.lists(
                st.fixed_dictionaries(
                    {"addresses": st.lists(addresses, max_size=2)},
                    optional={
                        "conditions": some(
                            ready=st.booleans(), serving=st.booleans(), terminating=st.booleans()
                        ),
                        "hints": some(forZones=hints, forNodes=hints),
                        "nodeName": names,
                        "zone": names,
                        "targetRef": some(kind=st.just("Pod"), name=names),
                    },
                ),
                max_size=4,
            ),
            "ports": st.lists(some(name=names, protocol=protocols, port=ports), max_size=3),
        },
    ),
    "Node": st.fixed_dictionaries(
        {"metadata": metadata},
        optional={
            "spec": some(
                podCIDR=networks,
                podCIDRs=st.lists(networks, max_size=2),
                taints=st.lists(
                    st.fixed_dictionaries(
                        {"key": names | st.just("ToBeDeletedByClusterAutoscaler")}
                    ),
                    max_size=2,
                ),
            ),
            "status": some(
                addresses=st.lists(
                    st.fixed_dictionaries(
                        {
                            "type": st.sampled_from(("InternalIP", "ExternalIP", "Hostname")),
                            "address": addresses,
                        }
                    ),
                    max_size=3,
                )
            ),
        },
    ),
    "ServiceCIDR": st.fixed_dictionaries(
        {"metadata": metadata, "spec": some(cidrs=st.lists(networks, max_size=2))}
    ),
}


def outcome(decoder: Any, kind: str, document: dict[str, Any]) -> object:
    try:
        return decoder(kind, document)
    except InvalidObject as error:
        return error.subject, error.reason


@pytest.mark.parametrize("kind", KINDS)
@fuzzed(100)
@given(data=st.data())
def test_generated_objects(kind: str, data: st.DataObject) -> None:
    document = data.draw(DOCUMENTS[kind])
    assert outcome(in_protobuf, kind, document) == outcome(in_json, kind, document)


# --- anything -----------------------------------------------------------------------------------

SEEDS = {
    "Service": protobuf.item(
        "Service", json.loads((RECORDINGS / "list-services.json").read_bytes())["items"][3]
    ),
    "EndpointSlice": protobuf.item(
        "EndpointSlice",
        json.loads((RECORDINGS / "list-endpointslices.json").read_bytes())["items"][5],
    ),
}


@st.composite
def damaged(draw: st.DrawFn, seed: bytes) -> bytes:
    """A seed with some bytes replaced, removed and added."""
    data = bytearray(seed)
    for _ in range(draw(st.integers(1, 8))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 8)))
        data[start:end] = draw(st.binary(max_size=8))
    return bytes(data)


@pytest.mark.parametrize("field", ["name", "addressType", "addresses", "labels"])
def test_text_that_is_not_utf_8_is_invalid(field: str) -> None:
    """protobuf gives bytes for it where nothing asks it to validate."""
    items = json.loads((RECORDINGS / "list-endpointslices.json").read_bytes())["items"]
    metadata = {"name": "\udc80" if field == "name" else "a", "labels": {"a": "b"}}
    if field == "labels":
        metadata["labels"] = {"kubernetes.io/service-name": "\udc80"}
    document = {**items[5], "metadata": metadata}
    if field == "addressType":
        document[field] = "\udc80"
    if field == "addresses":
        document["endpoints"] = [{"addresses": ["\udc80"]}]
    item = protobuf.item("EndpointSlice", document)
    with pytest.raises(InvalidObject, match="is not a protobuf message"):
        decode_protobuf.decode("EndpointSlice", item)


@pytest.mark.parametrize("kind", SEEDS)
@fuzzed(100)
@given(data=st.data())
def test_a_damaged_message_is_a_record_or_one_invalid_object(
    kind: str, data: st.DataObject
) -> None:
    item = data.draw(damaged(SEEDS[kind]) | st.binary(max_size=60))
    with contextlib.suppress(InvalidObject):
        decode_protobuf.decode(kind, item)


@pytest.mark.parametrize("splitter", [Lines, Frames])
@fuzzed(100)
@given(data=st.data())
def test_events_do_not_depend_on_how_their_bytes_arrive(splitter: Any, data: st.DataObject) -> None:
    events = data.draw(
        st.lists(st.binary(min_size=1, max_size=40).filter(lambda b: b"\n" not in b))
    )
    if splitter is Lines:
        whole = b"".join(event + b"\n" for event in events)
    else:
        whole = b"".join(len(event).to_bytes(4) + event for event in events)
    cuts = data.draw(st.lists(st.integers(0, len(whole)), max_size=20))
    bounds = [0, *sorted(cuts), len(whole)]
    cutter = splitter()
    found = [e for a, b in itertools.pairwise(bounds) for e in cutter.feed(whole[a:b])]
    assert found == events


def test_a_frame_that_is_too_large_is_refused_before_it_has_arrived() -> None:
    with pytest.raises(EventTooLarge, match="16 MiB"):
        Frames().feed((16 * 2**20 + 1).to_bytes(4))


def follow(body: bytes, kind: RequestType, content_type: str) -> Reflector:
    """A Reflector that was answered with this body, whatever it asked for."""
    reflector = Reflector(resources("node-1")[1])
    request = reflector.request()
    while request.type is not kind:
        reflector.answered(422)
        reflector.finished()
        request = reflector.request()
    reflector.answered(200, "", content_type)
    for start in range(0, len(body), 512):
        if reflector.over:
            break
        reflector.received(body[start : start + 512])
    reflector.finished()
    return reflector


def head_of(format_: Format) -> str:
    return "application/json" if format_ is JSON else "application/vnd.kubernetes.protobuf"


@pytest.mark.parametrize("path", RAW, ids=lambda p: p.name.removesuffix(".http"))
@fuzzed(20)
@given(data=st.data())
def test_damaged_recordings_never_raise(path: Path, data: st.DataObject) -> None:
    """Lists and streams with damage anywhere, as if of either format."""
    body = data.draw(damaged(body_of(path.read_bytes())[:20_000]))
    for kind in (RequestType.LIST, RequestType.STREAM):
        for format_ in (JSON, PROTOBUF):
            follow(body, kind, head_of(format_))
