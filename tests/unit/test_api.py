"""The API answers from snapshots: paths, parameters, errors; over a real unix socket and port."""

from __future__ import annotations

import errno
import gzip
import http.client
import json
import os
import socket
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import msgspec
import pytest
import structlog

from agent.cli.client import NO_AGENT, Client
from agent.config.settings import Settings
from agent.kernel.errors import ConntrackError, Refused
from agent.serve.api import CHOSEN, Api, ApiServer, Sources, Status
from agent.serve.flows import RecentFlows
from agent.serve.health import Heartbeat
from agent.serve.http import HttpAnswer, HttpRequest, TcpAddress, UnixAddress
from rules.counts import PacketCounts
from rules.doctor import Check
from rules.events import Synced, Upsert
from rules.flow_report import NewConnection
from rules.history import History
from rules.language import Set
from rules.netlink.counters import Count
from rules.objects import Object
from rules.service_report import services
from rules.state import State
from rules.target import target_of
from rules.text import Key
from tests.manifest import endpoint, endpoint_slice, node, service
from tests.unit.fakes.flow_watch import FakeFlowWatch
from tests.unit.test_endpoints import stepped

PATIENCE = 20.0
WEB = (service("web"), endpoint_slice("web", [endpoint("10.0.0.1")]))


class Agent:
    """A state, and the API that answers from it."""

    def __init__(self, *objects: Object) -> None:
        self.state = stepped(*objects)
        self.snapshot: State | None = None
        self.history = History(lambda _: None)
        self.heartbeat = Heartbeat()
        self.sources = Sources(
            state=self.take,
            heartbeat=self.heartbeat,
            history=self.history,
            watches=list,
            options={"node": "node-1"},
            examine=lambda _: [Check("kernel", "The kernel", "ok", "fine")],
            conntrack=lambda: (7, 100),
            elements=lambda: nullcontext(None),
            difference=lambda _: ["add element"],
            version="1.2.3",
            owns_tables=True,
            started=1_800_000_000.0,
        )
        self.api = Api(self.sources)

    def take(self) -> State:
        self.snapshot = self.snapshot or self.state.snapshot()
        return self.snapshot

    def change(self, *objects: Object) -> None:
        self.state.apply([Upsert(o) for o in objects])
        self.state.step()
        self.snapshot = None

    def get(self, path: str, **query: str) -> tuple[int, Any]:
        request = HttpRequest("GET", path, urlencode(query), {}, 4)
        answer = self.api.answer(request)
        return answer.status, json.loads(answer.body)


def test_the_status_says_what_is_not_programmed_and_counts() -> None:
    agent = Agent(*WEB)
    code, found = agent.get("/v1/status")
    assert code == 200
    status = msgspec.convert(found, Status)
    assert (status.version, status.node, status.started) == (
        *("1.2.3", "node-1", "2027-01-15T08:00:00Z"),
    )
    assert (status.programmed, status.ready) == (False, False)
    assert status.reason
    assert (status.counts.services, status.counts.endpoints) == (1, 1)
    assert status.conntrack == (7, 100)
    agent.heartbeat.synced()
    agent.heartbeat.programmed()
    assert agent.get("/v1/status")[1]["programmed"] is True


def test_the_generation_changes_with_the_state_alone() -> None:
    agent = Agent(*WEB)
    first = agent.get("/v1/status")[1]["generation"]
    assert agent.get("/v1/status")[1]["generation"] == first
    agent.change(service("shop", cluster_ips=["10.96.0.20"]))
    assert agent.get("/v1/status")[1]["generation"] == first + 1


def test_services_endpoints_explain_and_doctor_are_the_reports() -> None:
    agent = Agent(*WEB)
    assert [line["family"] for line in agent.get("/v1/services")[1]] == [4, 6]
    assert agent.get("/v1/services", namespace="other") == (200, [])
    code, table = agent.get("/v1/services/default/web")
    assert (code, table["ports"][0]["rows"][0]["address"]) == (200, "10.0.0.1")
    assert agent.get("/v1/explain", target="10.96.0.10:80")[1]["answering"]["service"] == (
        "default/web"
    )
    assert agent.get("/v1/doctor")[1][0]["id"] == "kernel"


@pytest.mark.parametrize(
    ("path", "query", "code", "word"),
    [
        ("/v1/nothing", {}, 404, "no such path"),
        ("/v1/services/default/nothing", {}, 404, "there is no Service"),
        ("/v1/explain", {}, 400, "give ?target="),
        ("/v1/explain", {"target": "nonsense"}, 400, "not a valid"),
        ("/v1/services", {"namespaces": "a"}, 400, "unknown parameter 'namespaces'"),
        ("/v1/history", {"since": "yesterday"}, 400, "numbers"),
        ("/v1/status", {"x": "1"}, 400, "this path takes none"),
    ],
)
def test_a_bad_request_says_what_is_wrong(
    path: str, query: dict[str, str], code: int, word: str
) -> None:
    found, body = Agent(*WEB).get(path, **query)
    assert (found, list(body)) == (code, ["error"])
    assert word in body["error"]


def test_a_snapshot_does_not_change_with_the_state() -> None:
    state = State(stepped().options)
    state.apply([Upsert(o) for o in (node(), *WEB)])
    state.apply([Synced()])
    state.step()
    snapshot = state.snapshot()
    before = snapshot.elements()
    state.apply([Upsert(endpoint_slice("web", [endpoint("10.0.0.2"), endpoint("10.0.0.3")]))])
    state.apply([Upsert(service("shop", cluster_ips=["10.96.0.10"]))])
    state.step()
    assert snapshot.elements() == before
    assert list(snapshot.services) == [WEB[0].name]
    assert snapshot.problems.open() == ()
    assert [len(state.changes), len(snapshot.changes)] == [2, 0]


# --- over real sockets --------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = tmp_path / "api.sock"
    server = ApiServer(
        Agent(*WEB).api,
        structlog.get_logger(),
        lambda name, error: pytest.fail(f"{name}: {error}"),
        UnixAddress(str(path)),
        TcpAddress("127.0.0.1", port),
    )
    server.start()
    assert server.settle()
    yield path, port
    server.stop()


def ask(port: int, path: str, method: str = "GET", **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, headers=headers)
    return connection.getresponse()


def test_the_client_asks_over_the_unix_socket_which_is_roots_alone(
    served: tuple[Path, int],
) -> None:
    path, _ = served
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert Client(str(path)).get("/v1/status", Status).node == "node-1"


def test_the_client_says_that_no_agent_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        Client(str(tmp_path / "none.sock")).get("/v1/status", Status)
    assert ended.value.code == NO_AGENT
    assert "no agent answers there" in capsys.readouterr().err


def test_a_foreign_host_header_is_refused_and_so_is_any_method_but_get(
    served: tuple[Path, int],
) -> None:
    _, port = served
    assert ask(port, "/v1/status").status == 200
    assert ask(port, "/v1/status", Host=f"localhost:{port}").status == 200
    assert ask(port, "/v1/status", Host="evil.example:80").status == 421
    assert ask(port, "/v1/status", method="POST").status == 405


def test_the_page_is_one_file_that_may_load_nothing_from_elsewhere(
    served: tuple[Path, int],
) -> None:
    answer = ask(served[1], "/")
    assert answer.status == 200
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    text = answer.read().decode()
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text


def test_a_client_that_has_the_answer_gets_no_body_until_the_state_changes(
    served: tuple[Path, int],
) -> None:
    """ETag and If-None-Match over a real socket; another run's tag is not taken for one's own."""
    port = served[1]
    for path in ("/v1/services", "/v1/services/default/web"):
        first = ask(port, path)
        tag = first.headers["ETag"]
        assert first.read()
        again = ask(port, path, **{"If-None-Match": tag})
        assert (again.status, again.headers["ETag"], again.read()) == (304, tag, b"")
        assert again.headers["Content-Length"] is None
        assert ask(port, path, **{"If-None-Match": '"0-1"'}).status == 200
    assert ask(port, "/v1/status").headers["ETag"] is None
    assert ask(port, "/v1/services?counters=true").headers["ETag"] is None


def test_a_change_makes_another_tag() -> None:
    agent = Agent(*WEB)

    def answer(tag: str) -> HttpAnswer:
        return agent.api.answer(HttpRequest("GET", "/v1/services", "", {"if-none-match": tag}, 4))

    first = dict(answer("").headers)["ETag"]
    assert answer(first).status == 304
    agent.change(service("shop", cluster_ips=["10.96.0.20"]))
    assert (answer(first).status, dict(answer(first).headers)["ETag"] != first) == (200, True)


def test_long_answers_are_compressed_for_clients_that_take_gzip() -> None:
    agent = Agent(*(service(f"s{i}", cluster_ips=[f"10.96.1.{i}"]) for i in range(50)))

    def answer(path: str, accepted: str) -> HttpAnswer:
        headers = {"accept-encoding": accepted}
        return agent.api.answer(HttpRequest("GET", path, "", headers, 4))

    plain = answer("/v1/services", "identity")
    small = answer("/v1/services", "deflate, gzip;q=0.8, br")
    assert dict(small.headers)["Content-Encoding"] == "gzip"
    assert gzip.decompress(small.body) == plain.body
    assert len(small.body) * 10 < len(plain.body)
    for short in (answer("/v1/status", "gzip"), plain):
        assert "Content-Encoding" not in dict(short.headers)
        assert dict(short.headers)["Vary"] == "Accept-Encoding"


def test_before_everything_is_read_the_status_alone_answers() -> None:
    """What an agent has not programmed yet would look as if it were not proxied."""
    agent = Agent()
    agent.state = State(Settings(node="node-1").options())
    agent.state.apply(Upsert(o) for o in WEB)
    assert agent.get("/v1/status")[0] == 200
    for path in ("/v1/services", "/v1/services/default/web", "/v1/diff"):
        code, body = agent.get(path)
        assert (code, "has not read everything" in body["error"]) == (503, True)


def test_a_long_list_is_encoded_in_parts_and_kept_until_the_state_changes() -> None:
    agent = Agent(*(service(f"s{i}", cluster_ips=[f"10.96.1.{i % 250}"]) for i in range(450)))
    lines = agent.get("/v1/services")[1]
    assert lines == json.loads(msgspec.json.encode(services(agent.take())))
    assert len(lines) == 450
    agent.change(service("new", cluster_ips=["10.96.9.9"]))
    assert len(agent.get("/v1/services")[1]) == 451


def test_a_kernel_that_cannot_be_read_is_503_with_its_words() -> None:
    def refuse() -> AbstractContextManager[None]:
        raise Refused(1, "reading the tables")

    agent = Agent(*WEB)
    agent.api = Api(agent.api._sources._replace(elements=refuse))
    code, body = agent.get("/v1/explain", target="10.96.0.10:80")
    assert (code, "the kernel's tables cannot be read" in body["error"]) == (503, True)


# --- flows --------------------------------------------------------------------------------------


def test_flows_are_named_with_service_and_pod_by_the_state() -> None:
    """At a cluster IP and a node port, to a pod; connections to others are left out."""
    pod = endpoint("10.0.0.1", pod="web-1", node="node-2")
    web = service("web", type="NodePort", ports=[{"name": "http", "port": 80, "nodePort": 30080}])
    agent = Agent(web, endpoint_slice("web", [pod]))
    watch = FakeFlowWatch()
    agent.api = Api(agent.sources._replace(flows=RecentFlows(pytest.fail, lambda: watch)))
    first = agent.get("/v1/flows")[1]
    assert first == {"sequence": first["sequence"], "lost": 0, "flows": []}
    client, target = target_of(bytes([10, 0, 0, 9]), 40000), target_of(bytes([10, 0, 0, 1]), 8080)
    for address, port in (([10, 96, 0, 10], 80), ([172, 31, 0, 2], 30080), ([10, 0, 0, 1], 8080)):
        where = target_of(bytes(address), port)
        watch.made.put(NewConnection(6, client, where, target, client))
    query = {"after": str(first["sequence"])}
    deadline = time.monotonic() + PATIENCE
    while (answer := agent.get("/v1/flows", **query)[1])["sequence"] < first["sequence"] + 3:
        assert time.monotonic() < deadline
    seen = answer["flows"]
    assert [(f["destination"], f["service"], f["port"], f["pod"], f["node"]) for f in seen] == [
        (where, "default/web", "80 (http)", "web-1", "node-2")
        for where in ("10.96.0.10:80", "172.31.0.2:30080")
    ]
    assert len(agent.get("/v1/flows", service="default/web", **query)[1]["flows"]) == 2
    assert agent.get("/v1/flows", service="default/db", **query)[1]["flows"] == []
    assert agent.get("/v1/flows", after="x")[0] == 400
    agent.api.stop()
    assert not watch.open


def test_flows_that_cannot_be_listened_to_are_503_with_the_remedy() -> None:
    def refuse() -> FakeFlowWatch:
        raise ConntrackError(errno.EPERM, "listening to conntrack")

    agent = Agent(*WEB)
    agent.api = Api(agent.sources._replace(flows=RecentFlows(pytest.fail, refuse)))
    code, body = agent.get("/v1/flows")
    assert (code, "CAP_NET_ADMIN" in body["error"]) == (503, True)


# --- counters -----------------------------------------------------------------------------------


def test_counters_are_those_of_the_services_asked_for() -> None:
    agent = Agent(*WEB, service("db", cluster_ips=["10.96.0.99"]))
    assert agent.get("/v1/counters")[0] == 404
    assert agent.get("/v1/services", counters="true")[1][0]["frontends"][0]["connections"] is None
    claim = next(c for c in agent.state.installed if str(agent.state.holder(c)) == "default/web")
    counts = {claim.verdicts: {claim.key: Count(7, 420)}}
    agent.api = Api(agent.sources._replace(counts=lambda: counts))
    code, found = agent.get("/v1/counters", name="web")
    assert code == 200
    assert {c["service"] for c in found} == {"web"}
    assert sum(c["connections"] for c in found) == 7
    assert {c["service"] for c in agent.get("/v1/counters")[1]} == {"web", "db"}
    lines = agent.get("/v1/services", counters="true")[1]
    assert sum(f["connections"] for line in lines for f in line["frontends"]) == 7


def test_named_services_are_listed_alone_and_no_other_counters_are_read() -> None:
    """What the page asks for: the rows that it shows, whatever the number of Services."""
    agent = Agent(*WEB, service("db", cluster_ips=["10.96.0.99"]))
    asked: list[set[str]] = []

    def counts_of(keys: Mapping[Set, Sequence[Key]]) -> PacketCounts:
        asked.append({owner.name for owner in keys})
        return {owner: dict.fromkeys(found, Count(3, 180)) for owner, found in keys.items()}

    agent.api = Api(agent.sources._replace(counts=dict, counts_of=counts_of))
    named = {"services": "default/db,default/gone,default/db", "counters": "true"}
    code, lines = agent.get("/v1/services", **named)
    assert (code, [line["name"] for line in lines]) == (200, ["db"])
    sets = {"service-ips", "inside-ips", "reject-ips", "drop-ips"}
    assert asked == [{*sets, "outside-ranges", "outside-ranges-known"}]
    assert agent.get("/v1/services", services="default/db")[1][0]["frontends"][0]["refused"] is None
    assert len(asked) == 1
    for bad in ("db", "/db", "default/", ",".join(f"a/{number}" for number in range(CHOSEN + 1))):
        assert agent.get("/v1/services", services=bad)[0] == 400
