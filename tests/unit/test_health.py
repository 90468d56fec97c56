"""Health: codes, bodies and headers as load balancers and kubelets meet them, over real HTTP."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import structlog

from agent.serve.health import Health, HealthServer, Heartbeat, WatchAges, livez
from agent.serve.http import Log, TcpAddress, listen
from rules.health_check import HealthCheck, health_check
from rules.objects import (
    READY,
    SERVING,
    TCP,
    TERMINATING,
    Endpoint,
    Endpoints,
    EndpointSlice,
    Name,
    SlicePort,
)
from rules.objects import Service as ServiceObject

WEB = Name("shop", "web")
DNS = Name("kube-system", "dns")
ANY = TcpAddress("", 0)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Reply(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(port: int, path: str = "/healthz", method: str = "GET", host: str = "127.0.0.1") -> Reply:
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return Reply(answer.status, answer.headers, answer.read())
    finally:
        connection.close()


def free_port() -> int:
    with listen(ANY) as sock:
        return int(sock.getsockname()[1])


def quiet_ports(count: int) -> list[int]:
    """Free ports that the kernel gives to no client, so they stay free until they are opened."""
    found: list[int] = []
    for port in random.sample(range(10_000, 32_768), 20_000):
        with contextlib.suppress(OSError):
            listen(TcpAddress("", port)).close()
            found.append(port)
            if len(found) == count:
                break
    return found


def ignore(_name: str, _error: Exception) -> None:
    """No worker fails here."""


def log(lines: list[dict[str, Any]] | None = None) -> Log:
    """A logger that keeps its lines, whatever other tests have made of structlog's global one."""

    def keep(_logger: object, level: str, event: Any) -> Any:
        if lines is not None:
            lines.append({**event, "log_level": level})
        raise structlog.DropEvent

    logger: Log = structlog.wrap_logger(
        None, processors=[keep], wrapper_class=structlog.make_filtering_bound_logger(0)
    )
    return logger


class World(NamedTuple):
    clock: Clock
    heartbeat: Heartbeat
    servers: HealthServer
    port: int
    answered: list[tuple[str, int]]
    lines: list[dict[str, Any]]


@pytest.fixture
def world() -> Iterator[World]:
    clock, port = Clock(), free_port()
    answered: list[tuple[str, int]] = []
    lines: list[dict[str, Any]] = []
    heartbeat = Heartbeat(120, clock, lambda: 1_800_000_000 + clock.now)
    servers = HealthServer(
        heartbeat,
        log(lines),
        ignore,
        TcpAddress("0.0.0.0", port),
        answered=lambda path, status: answered.append((path, status)),
        tick_seconds=0.05,
    )
    servers.start()
    assert servers.settle()
    yield World(clock, heartbeat, servers, port, answered, lines)
    servers.stop()


# --- /healthz and /livez ------------------------------------------------------------------------


def test_before_the_first_programming_the_node_is_alive_and_neither_healthy_nor_ready(
    world: World,
) -> None:
    """An agent that waits for the API server must not be restarted, and gets no traffic."""
    world.clock.now += 10_000
    reply = ask(world.port)
    assert reply.status == 503
    assert reply.json == {
        "lastUpdated": "0001-01-01T00:00:00Z",
        "currentTime": "2027-01-15T11:03:20Z",
        "nodeEligible": True,
        "healthy": False,
    }
    assert reply.headers["Content-Type"] == "application/json"
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    assert reply.headers["Content-Length"] == str(len(reply.body))
    assert ask(world.port, "/livez").status == 200
    ready = ask(world.port, "/readyz")
    assert ready.status == 503
    assert ready.json["reasons"] == ["nothing has been programmed yet by this run"]


def test_tables_of_an_earlier_run_make_a_node_healthy_but_this_run_not_ready(world: World) -> None:
    """Load balancers send traffic, which works; a rolling update does not go on."""
    world.heartbeat.earlier_tables = lambda: True
    reply = ask(world.port)
    assert (reply.status, reply.json["earlierTables"]) == (200, True)
    assert ask(world.port, "/readyz").status == 503
    world.heartbeat.programmed()
    assert "earlierTables" not in ask(world.port).json
    assert ask(world.port, "/readyz").status == 200


def test_tables_of_an_earlier_run_that_another_process_changes_do_not_count(world: World) -> None:
    unchanged = [True, False]
    world.heartbeat.earlier_tables = lambda: unchanged.pop(0)
    assert ask(world.port).status == 200
    assert ask(world.port).status == 503


def test_a_silent_watch_is_not_ready_and_logged_at_its_start_and_end() -> None:
    """The node still forwards, so it is healthy and alive."""
    ages, lines = {"services": 1.0, "nodes": 301.0}, list[dict[str, Any]]()
    watches, heartbeat = WatchAges(lambda: ages, 300, log(lines)), Heartbeat()
    heartbeat.silent_watches = watches.silent
    heartbeat.synced()
    heartbeat.programmed()
    for _ in range(3):
        watches.report()
    assert heartbeat.health().not_ready == ["no valid answer lately for nodes"]
    assert heartbeat.health().forwarding
    ages["nodes"] = 0.0
    for _ in range(3):
        watches.report()
    assert heartbeat.health().not_ready == []
    assert [(x["event"], x["resource"]) for x in lines] == [
        ("watch_silent", "nodes"),
        ("watch_recovered", "nodes"),
    ]
    assert lines[1]["after_seconds"] >= 301


def test_changes_that_wait_for_the_first_complete_list_are_not_late(world: World) -> None:
    world.heartbeat.queued()
    world.clock.now += 10_000
    assert ask(world.port, "/livez").status == 200
    world.heartbeat.synced()
    world.clock.now += 119
    assert ask(world.port, "/livez").status == 200


def test_a_first_transaction_that_never_gets_through_is_unhealthy(world: World) -> None:
    world.heartbeat.earlier_tables = lambda: True
    world.heartbeat.queued()
    world.heartbeat.synced()
    world.clock.now += 120
    for path in ("/healthz", "/livez"):
        reply = ask(world.port, path)
        assert reply.status == 503
        assert reply.json["lastUpdated"] == "0001-01-01T00:00:00Z"
        assert reply.json["healthy"] is False
        assert "status" not in reply.json


def test_after_the_first_sync(world: World) -> None:
    world.heartbeat.queued()
    world.heartbeat.synced()
    world.heartbeat.programmed()
    world.clock.now += 10_000
    families = {"lastUpdated": "2027-01-15T08:16:40Z", "healthy": True}
    now = "2027-01-15T11:03:20Z"
    assert ask(world.port).json == {
        "lastUpdated": now,
        "currentTime": now,
        "nodeEligible": True,
        "healthy": True,
        "status": {"IPv4": families, "IPv6": families},
    }
    assert ask(world.port, "/livez").json == {
        "lastUpdated": now,
        "currentTime": now,
        "healthy": True,
        "status": {"IPv4": families, "IPv6": families},
    }
    # the order, too, is kube-proxy's
    assert ask(world.port).body.startswith(b'{"lastUpdated":"')


def test_a_stuck_kernel_write(world: World) -> None:
    world.heartbeat.synced()
    world.heartbeat.programmed()
    world.clock.now += 1000
    world.heartbeat.queued()
    world.clock.now += 100
    world.heartbeat.queued()  # the oldest one counts
    world.clock.now += 19.9
    assert ask(world.port).status == 200
    world.clock.now += 0.1
    for path in ("/healthz", "/livez"):
        reply = ask(world.port, path)
        assert reply.status == 503
        assert reply.json["healthy"] is False
        assert reply.json["lastUpdated"] == "2027-01-15T08:16:40Z"
        assert reply.json["status"]["IPv6"]["healthy"] is False
    world.heartbeat.programmed()
    assert ask(world.port).status == 200


def test_a_node_that_is_about_to_go(world: World) -> None:
    world.heartbeat.synced()
    world.heartbeat.programmed()
    world.heartbeat.eligible(False)
    reply = ask(world.port)
    assert reply.status == 503
    assert (reply.json["nodeEligible"], reply.json["healthy"]) == (False, True)
    live = ask(world.port, "/livez")
    assert live.status == 200
    assert "nodeEligible" not in live.json
    world.heartbeat.eligible(True)
    assert ask(world.port).status == 200


def test_answers_are_counted(world: World) -> None:
    world.heartbeat.programmed()
    world.heartbeat.eligible(False)
    ask(world.port)
    ask(world.port, "/livez?verbose")
    assert world.answered == [("/healthz", 503), ("/livez", 200)]


def test_other_paths(world: World) -> None:
    reply = ask(world.port, "/")
    assert (reply.status, reply.body) == (404, b"404 page not found\n")
    assert world.answered == []


def test_other_methods_are_answered_as_by_kube_proxy(world: World) -> None:
    world.heartbeat.programmed()
    head = ask(world.port, method="HEAD")
    assert (head.status, head.body) == (200, b"")
    assert int(head.headers["Content-Length"]) > 0
    assert ask(world.port, method="POST").status == 200


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6")
def test_the_unspecified_address_means_both_families(world: World) -> None:
    assert ask(world.port, "/livez", host="::1").status == 200


def test_times_have_fractions_and_a_zone() -> None:
    answer = livez(Health(True, True, 1.5, 2.25))
    assert json.loads(answer.body)["currentTime"] == "1970-01-01T00:00:02.250000Z"


# --- Services' ports ----------------------------------------------------------------------------


def test_a_services_health_check_port(world: World) -> None:
    world.heartbeat.programmed()
    port = free_port()
    world.servers.update({WEB: HealthCheck(port, 2)})
    world.servers.settle()
    reply = ask(port, "/")
    assert reply.status == 200
    assert reply.json == {
        "service": {"namespace": "shop", "name": "web"},
        "localEndpoints": 2,
        "serviceProxyHealthy": True,
    }
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    assert reply.headers["X-Load-Balancing-Endpoint-Weight"] == "2"
    assert reply.headers["Content-Type"] == "application/json"
    assert reply.body == (
        b'{\n\t"service": {\n\t\t"namespace": "shop",\n\t\t"name": "web"\n\t},\n'
        b'\t"localEndpoints": 2,\n\t"serviceProxyHealthy": true\n}'
    )
    assert ask(port, "/any/path").status == 200


def test_no_endpoint_here_is_503(world: World) -> None:
    port = free_port()
    world.servers.update({WEB: HealthCheck(port, 1)})
    world.servers.update({WEB: HealthCheck(port, 0)})
    world.servers.settle()
    reply = ask(port)
    assert reply.status == 503
    assert reply.json["localEndpoints"] == 0
    assert reply.headers["X-Load-Balancing-Endpoint-Weight"] == "0"


def test_an_unhealthy_proxy_is_503_but_a_node_about_to_go_is_not(world: World) -> None:
    world.heartbeat.programmed()
    port = free_port()
    world.servers.update({WEB: HealthCheck(port, 3)})
    world.servers.settle()
    world.heartbeat.eligible(False)
    assert ask(port).status == 200
    world.heartbeat.synced()
    world.heartbeat.queued()
    world.clock.now += 121
    reply = ask(port)
    assert reply.status == 503
    assert (reply.json["localEndpoints"], reply.json["serviceProxyHealthy"]) == (3, False)


def test_ports_open_close_and_move(world: World) -> None:
    world.heartbeat.programmed()
    one, two = free_port(), free_port()
    world.servers.update({WEB: HealthCheck(one, 1), DNS: HealthCheck(two, 2)})
    world.servers.settle()
    assert ask(two).json["service"]["name"] == "dns"
    world.servers.update({WEB: HealthCheck(two, 1), DNS: HealthCheck(one, 2)})  # they swap
    world.servers.settle()
    assert ask(two).json["service"]["name"] == "web"
    assert ask(one).json["service"]["name"] == "dns"
    world.servers.update({DNS: HealthCheck(one, 2)})
    world.servers.settle()
    with pytest.raises(ConnectionRefusedError):
        ask(two)
    assert ask(one).status == 200


def test_a_port_that_is_taken_is_one_warning_and_tried_again(world: World) -> None:
    world.heartbeat.programmed()
    with listen(ANY) as other:
        port = other.getsockname()[1]
        world.servers.update({WEB: HealthCheck(port, 1)})
        time.sleep(0.3)  # several retries
        world.servers.settle()
        warnings = [line for line in world.lines if line["log_level"] == "warning"]
        assert [(w["event"], w["service"]) for w in warnings] == [("listener_failed", "shop/web")]
        assert warnings[0]["address"] == f":{port}"
        assert "in use" in warnings[0]["error"]
    deadline = time.monotonic() + 5
    while True:
        try:
            assert ask(port).status == 200
            break
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_port_that_is_taken_and_then_not_wanted_is_not_tried_again(world: World) -> None:
    with listen(ANY) as other:
        port = other.getsockname()[1]
        world.servers.update({WEB: HealthCheck(port, 1)})
        world.servers.update({})
        world.servers.settle()
    time.sleep(0.2)
    with pytest.raises(ConnectionRefusedError):
        ask(port)


def test_a_number_that_is_no_port_does_no_harm(world: World) -> None:
    world.heartbeat.programmed()
    port = free_port()
    world.servers.update({WEB: HealthCheck(99999, 1), DNS: HealthCheck(port, 1)})
    world.servers.settle()
    assert [line["address"] for line in world.lines] == [":99999"]
    assert ask(port).status == 200


def test_five_hundred_services_are_one_thread(world: World) -> None:
    # not their number: threads of earlier tests may end meanwhile
    before = set(threading.enumerate())
    names = [Name("many", f"s{i}") for i in range(500)]
    ports = quiet_ports(len(names))
    world.servers.update({n: HealthCheck(p, 1) for n, p in zip(names, ports, strict=True)})
    assert world.servers.settle()
    assert set(threading.enumerate()) <= before
    assert world.lines == []
    assert ask(ports[-1]).json["service"]["name"] == "s499"


def test_hard_fail_raises() -> None:
    with listen(ANY) as other:
        taken = TcpAddress("0.0.0.0", other.getsockname()[1])
        servers = HealthServer(Heartbeat(), log(), ignore, taken, hard_fail=True)
        with pytest.raises(OSError, match="in use"):
            servers.start()
        servers.stop()


def test_no_address_is_no_server() -> None:
    servers = HealthServer(Heartbeat(), log(), ignore, None)
    servers.start()
    servers.stop()


# --- which endpoints count ----------------------------------------------------------------------


def service(**changes: Any) -> ServiceObject:
    fields: dict[str, Any] = {
        "name": WEB,
        "created": "",
        "proxy_name": None,
        "headless": False,
        "proxied": True,
        "cluster_ips": (IPV4, IPV6),
        "external_ips": (),
        "load_balancer_ips": (),
        "ports": (),
        "internal_local": False,
        "external_local": True,
        "affinity_seconds": 0,
        "source_ranges": (),
        "health_check_node_port": 32000,
    }
    return ServiceObject(**{**fields, **changes})


IPV4, IPV6 = bytes(4), bytes(16)


def piece(family: int, *endpoints: tuple[str, int, str], ports: int = 1) -> EndpointSlice:
    return EndpointSlice(
        Name("shop", "web-x"),
        WEB,
        None,
        False,
        family,
        tuple(SlicePort(str(i), TCP, 8000 + i) for i in range(ports)),
        Endpoints.of([Endpoint(ipaddress.ip_address(a).packed, c, n) for a, c, n in endpoints]),
    )


@pytest.mark.parametrize(
    ("changes", "slices", "expected"),
    [
        ({}, [], (0, 0)),
        ({}, [piece(4, ("10.0.0.1", READY | SERVING, "here"))], (1, 0)),
        ({}, [piece(4, ("10.0.0.1", READY | SERVING, "there"))], (0, 0)),
        ({}, [piece(4, ("10.0.0.1", SERVING | TERMINATING, "here"))], (0, 0)),
        ({}, [piece(4, ("10.0.0.1", READY, "here"), ports=3)], (1, 0)),
        ({}, [piece(4, ("10.0.0.1", READY, "here"), ports=0)], (0, 0)),
        ({}, [piece(4, ("10.0.0.1", READY, "here"))] * 2, (1, 0)),
        (
            {},
            [
                piece(4, ("10.0.0.1", READY, "here"), ("10.0.0.2", READY, "here")),
                piece(6, ("fd00::1", READY, "here")),
            ],
            (2, 1),
        ),
        # a Service of one family answers by it whatever the load balancer probes over
        ({"cluster_ips": (IPV4,)}, [piece(4, ("10.0.0.1", READY, "here"))], (1, 1)),
        ({"cluster_ips": (IPV6,)}, [piece(6, ("fd00::1", READY, "here"))], (1, 1)),
        ({"external_local": False}, [], None),
        ({"health_check_node_port": 0}, [], None),
        ({"proxied": False}, [], None),
    ],
)
def test_local_ready_endpoints(
    changes: dict[str, Any], slices: list[EndpointSlice], expected: tuple[int, int] | None
) -> None:
    """Over IPv4 and over IPv6."""
    check = health_check(service(**changes), slices, "here")
    assert (check and (check.endpoints(4), check.endpoints(6))) == expected


def test_a_health_check_port_answers_each_family_by_its_own_endpoints(world: World) -> None:
    world.heartbeat.programmed()
    world.servers.update({WEB: HealthCheck(port := free_port(), ipv4=2, ipv6=0)})
    assert world.servers.settle()
    assert ask(port)[0] == 200
    assert ask(port, host="::1")[0] == 503
