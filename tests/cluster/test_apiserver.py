"""The API server of these tests answers as the recorded one did."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.apiserver import INITIAL_EVENTS_END, ApiServer
from tests.manifest import service_document

RECORDINGS = Path(__file__).parents[1] / "recordings"
OURS = "!service.kubernetes.io/service-proxy-name,!service.kubernetes.io/headless"
SLICES = "/apis/discovery.k8s.io/v1/endpointslices"
SERVICES = "/api/v1/services"
VERSION_849 = 849  # of the recorded lists


def recording(name: str) -> Any:
    return json.loads((RECORDINGS / name).read_bytes())


def lines(name: str) -> list[Any]:
    return [json.loads(line) for line in (RECORDINGS / name).read_bytes().splitlines()]


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as server:
        for name in ("services", "endpointslices", "nodes", "servicecidrs"):
            server.load(recording(f"list-{name}.json"))
        yield server


def get(server: ApiServer, path: str, **query: str) -> Any:
    with urllib.request.urlopen(f"{server.url}{path}?{urllib.parse.urlencode(query)}") as answer:
        return json.loads(answer.read())


def refused(server: ApiServer, path: str, **query: str) -> tuple[int, Any]:
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(server, path, **query)
    with caught.value as answer:
        return answer.code, json.loads(answer.read())


class Watch:
    def __init__(self, server: ApiServer, path: str, **query: str) -> None:
        text = urllib.parse.urlencode({"watch": "1", "allowWatchBookmarks": "true", **query})
        self._answer = urllib.request.urlopen(f"{server.url}{path}?{text}", timeout=10)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self._answer.close()

    def next(self) -> Any:
        return json.loads(self._answer.readline())

    def next_bookmark(self) -> Any:
        while (event := self.next())["type"] != "BOOKMARK":
            pass
        return event

    def next_change(self) -> Any:
        while (event := self.next())["type"] == "BOOKMARK":
            pass
        return event


def shape(value: Any, depth: int) -> Any:
    """The keys, down to a depth, in their order, and the types below."""
    if isinstance(value, dict) and depth:
        return {key: shape(item, depth - 1) for key, item in value.items()}
    return type(value).__name__


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (SERVICES, "list-services.json"),
        (SLICES, "list-endpointslices.json"),
        ("/api/v1/nodes", "list-nodes.json"),
        ("/apis/networking.k8s.io/v1/servicecidrs", "list-servicecidrs.json"),
    ],
)
def test_lists(server: ApiServer, path: str, name: str) -> None:
    assert get(server, path) == recording(name)


def test_pages_with_selectors(server: ApiServer) -> None:
    recorded = [recording(f"list-endpointslices-page{n}.json") for n in (1, 2)]
    first = get(server, SLICES, labelSelector=OURS, limit="8")
    second = get(
        server, SLICES, labelSelector=OURS, limit="8", **{"continue": first["metadata"]["continue"]}
    )
    for ours, theirs in zip((first, second), recorded, strict=True):
        assert ours["items"] == theirs["items"]
        assert shape(ours, 2) == shape(theirs, 2)


def test_pages_are_of_one_version(server: ApiServer) -> None:
    first = get(server, SERVICES, limit="5")
    server.delete("Service", "frontend", "web")
    server.put(service_document("newcomer"))
    items, answer = first["items"], first
    while token := answer["metadata"].get("continue"):
        answer = get(server, SERVICES, limit="5", **{"continue": token})
        items += answer["items"]
    assert items == recording("list-services.json")["items"]


def test_expired_pages(server: ApiServer) -> None:
    first = get(server, SERVICES, limit="5")
    server.delete("Service", "frontend", "web")
    server.compact()
    token = first["metadata"]["continue"]
    code, status = refused(server, SERVICES, limit="5", **{"continue": token})
    theirs = recording("status-410-continue.json")
    assert (code, shape(status, 2)) == (410, shape(theirs, 2))
    assert status["reason"] == theirs["reason"]
    fresh = get(server, SERVICES, limit="50", **{"continue": status["metadata"]["continue"]})
    assert len(fresh["items"]) == len(recording("list-services.json")["items"]) - 5 - 1


def test_other_selectors(server: ApiServer) -> None:
    server.put(
        {**service_document("theirs"), "metadata": {"name": "theirs", "labels": {"a": "b"}}},
    )

    def names(**query: str) -> list[str]:
        return [i["metadata"]["name"] for i in get(server, SERVICES, **query)["items"]]

    assert names(labelSelector="a=b") == names(labelSelector="a==b") == ["theirs"]
    assert names(labelSelector="a") == ["theirs"]
    assert names(labelSelector="a=c") == []
    assert "theirs" not in names(labelSelector="!a")
    assert "theirs" not in names(labelSelector="a!=b")
    (node,) = get(server, "/api/v1/nodes", fieldSelector="metadata.name=node-2")["items"]
    assert node["metadata"]["name"] == "node-2"


def test_a_watch(server: ApiServer) -> None:
    recorded = lines("watch-services.jsonl")
    with Watch(server, SERVICES, resourceVersion=str(VERSION_849), labelSelector=OURS) as watch:
        server.put(service_document("newcomer"))
        added = watch.next_change()
        assert added["type"] == "ADDED"
        server.put(service_document("newcomer", type="NodePort"))
        modified = watch.next_change()
        assert modified["type"] == "MODIFIED"
        version = server.delete("Service", "newcomer")
        deleted = watch.next_change()
        assert deleted["type"] == "DELETED"
        assert deleted["object"]["spec"] == modified["object"]["spec"]
        assert deleted["object"]["metadata"]["resourceVersion"] == str(version)
        for ours in (added, modified, deleted):
            theirs = next(e for e in recorded if e["type"] == ours["type"])
            assert shape(ours, 2).keys() == shape(theirs, 2).keys()
            assert list(ours["object"]) == list(theirs["object"])
        theirs = next(e for e in recorded if e["type"] == "BOOKMARK")
        theirs["object"]["metadata"]["resourceVersion"] = str(version)
        assert watch.next_bookmark() == theirs


def test_labels_that_come_and_go(server: ApiServer) -> None:
    document = service_document("newcomer")
    label = {"service.kubernetes.io/service-proxy-name": "other"}
    foreign = {**document, "metadata": {**document["metadata"], "labels": label}}
    with Watch(server, SERVICES, resourceVersion=str(VERSION_849), labelSelector=OURS) as watch:
        server.put(foreign, document, foreign)
        assert [watch.next_change()["type"] for _ in range(2)] == ["ADDED", "DELETED"]


def test_a_stream(server: ApiServer) -> None:
    recorded = lines("watchlist-endpointslices.jsonl")
    query = {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan"}
    end = next(i for i, e in enumerate(recorded) if e["type"] == "BOOKMARK")
    with Watch(server, SLICES, labelSelector=OURS, **query) as watch:
        ours = [watch.next() for _ in range(end + 1)]
    assert ours[end] == recorded[end]
    assert INITIAL_EVENTS_END in ours[end]["object"]["metadata"]["annotations"]

    def by_name(events: list[Any]) -> list[Any]:
        return sorted(events, key=lambda e: e["object"]["metadata"]["name"])

    assert by_name(ours[:end]) == by_name(recorded[:end])


def test_no_stream(server: ApiServer) -> None:
    server.streaming = False
    code, status = refused(server, SERVICES, watch="1", sendInitialEvents="true")
    assert (code, status["reason"]) == (422, "Invalid")


def test_too_old(server: ApiServer) -> None:
    server.compact()
    (theirs,) = lines("watch-410.jsonl")
    with Watch(server, SERVICES, resourceVersion="300") as watch:
        ours = watch.next()
        assert watch._answer.readline() == b""
    ours["object"]["message"] = theirs["object"]["message"]
    assert ours == theirs
    server.gone_as_status = True
    code, status = refused(server, SERVICES, watch="1", resourceVersion="300")
    assert (code, shape(status, 2)) == (410, shape(recording("status-410.json"), 2))


def test_statuses(server: ApiServer) -> None:
    server.forbidden.add(("list", "services"))
    code, status = refused(server, SERVICES)
    assert code == 403
    theirs = recording("status-403.json")
    status["message"] = status["message"].replace(
        "system:serviceaccount:kube-system:sliceproxy", "system:anonymous"
    )
    assert status == theirs
    server.token = "secret"
    code, status = refused(server, SERVICES)
    assert (code, status) == (401, recording("status-401.json"))
    server.absent.add("services")
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(server, SERVICES)
    with caught.value as answer:
        assert (answer.code, answer.read()) == (404, b"404 page not found\n")


def test_a_watch_from_the_future(server: ApiServer) -> None:
    with Watch(server, SERVICES, resourceVersion=str(VERSION_849 + 1)) as watch:
        server.put(service_document("unseen"))
        server.put(service_document("seen"))
        assert watch.next()["object"]["metadata"]["name"] == "seen"
