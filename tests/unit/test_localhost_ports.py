"""Node ports on loopback addresses, through real sockets. The "cluster IP" is 127.0.0.2."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import msgspec
import pytest
import structlog
from structlog.testing import LogCapture

from agent.serve.localhost_ports import LocalhostPorts, LocalPort, upstreams
from rules.events import Delete, Upsert
from rules.objects import Name, Service
from tests import manifest

PATIENCE = 20.0


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def service(port: int, node_port: int, *, protocol: str = "TCP", name: str = "web") -> Service:
    ports = [{"port": port, "nodePort": node_port, "protocol": protocol}]
    made = manifest.service(name, cluster_ips=["10.96.0.1"], ports=ports, type="NodePort")
    return msgspec.structs.replace(made, cluster_ips=(bytes([127, 0, 0, 2]),))


class Backend:
    """Listens where the Service is, and gives each connection to `serve`."""

    def __init__(self, serve: Callable[[socket.socket], None]) -> None:
        self._listener = socket.create_server(("127.0.0.2", 0))
        self.port: int = self._listener.getsockname()[1]
        self._serve = serve
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def until_end(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(1 << 16), b""))


def reverse(sock: socket.socket) -> None:
    """Answers only once the client has half-closed."""
    with sock:
        sock.sendall(until_end(sock)[::-1])


@pytest.fixture
def backend() -> Iterator[Callable[..., Backend]]:
    made: list[Backend] = []

    def make(serve: Callable[[socket.socket], None] = reverse) -> Backend:
        made.append(Backend(serve))
        return made[-1]

    yield make
    for each in made:
        each.close()


class Forwarding:
    def __init__(self, **options: Any) -> None:
        self.capture = LogCapture()
        self.failures: list[tuple[str, Exception]] = []
        log = structlog.wrap_logger(None, processors=[self.capture])
        self.ports = LocalhostPorts(log, lambda *why: self.failures.append(why), **options)
        self.ports.start()


@pytest.fixture
def forwarding() -> Iterator[Callable[..., Forwarding]]:
    made: list[Forwarding] = []

    def make(**options: Any) -> Forwarding:
        made.append(Forwarding(**options))
        return made[-1]

    yield make
    for each in made:
        assert each.ports.stop(PATIENCE)
        assert each.failures == []


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), PATIENCE)


def accepts(port: int) -> bool:
    try:
        connect(port).close()
    except ConnectionRefusedError:
        return False
    except ConnectionResetError:  # accepted, but the Service refused
        return True
    return True


def test_only_tcp_node_ports_of_services_with_a_cluster_ip_are_served() -> None:
    dual = manifest.service(
        cluster_ips=["10.96.0.1", "fd00::1"],
        ports=[
            {"name": "a", "port": 80, "nodePort": 30080},
            {"name": "b", "port": 53, "nodePort": 30053, "protocol": "UDP"},
            {"name": "c", "port": 81},
        ],
    )
    assert set(upstreams(dual)) == {LocalPort(4, 30080), LocalPort(6, 30080)}
    assert upstreams(manifest.service(cluster_ips=["None"])) == {}


def test_bytes_and_half_closes_pass_in_both_directions(
    backend: Callable[..., Backend], forwarding: Callable[..., Forwarding]
) -> None:
    """More bytes than all buffers hold, answered after the client has half-closed."""
    port, sent = free_port(), bytes(range(256)) * 40_000
    started = forwarding()
    started.ports.update([Upsert(service(backend().port, port))])
    started.ports.programmed()
    until(lambda: accepts(port))
    with connect(port) as sock:
        writer = threading.Thread(
            target=lambda: (sock.sendall(sent), sock.shutdown(socket.SHUT_WR)), daemon=True
        )
        writer.start()
        assert until_end(sock) == sent[::-1]
    until(lambda: started.ports.connections == 0)


def test_nothing_is_opened_before_the_kernel_has_rules(
    backend: Callable[..., Backend], forwarding: Callable[..., Forwarding]
) -> None:
    first, second = free_port(), free_port()
    started = forwarding(proxy_name="")
    started.ports.update([Upsert(service(backend().port, first))])
    assert not accepts(first)
    started.ports.programmed()
    until(lambda: accepts(first))
    started.ports.update([Upsert(service(backend().port, second, name="other"))])
    until(lambda: accepts(second))


def test_ports_are_closed_with_their_service_and_connections_stay(
    backend: Callable[..., Backend], forwarding: Callable[..., Forwarding]
) -> None:
    port, moved = free_port(), free_port()
    upstream = backend()
    started = forwarding()
    started.ports.update([Upsert(service(upstream.port, port))])
    started.ports.programmed()
    until(lambda: accepts(port))
    with connect(port) as sock:
        until(lambda: started.ports.connections == 1)
        started.ports.update([Upsert(service(upstream.port, moved))])
        until(lambda: accepts(moved) and not accepts(port))
        started.ports.update([Delete(Service, Name("default", "web"))])
        until(lambda: not accepts(moved))
        sock.sendall(b"abc")
        sock.shutdown(socket.SHUT_WR)
        assert until_end(sock) == b"cba"


def test_connections_are_bounded_and_the_others_wait(
    backend: Callable[..., Backend], forwarding: Callable[..., Forwarding]
) -> None:
    port = free_port()
    started = forwarding(connections=2)
    started.ports.update([Upsert(service(backend().port, port))])
    started.ports.programmed()
    until(lambda: accepts(port))
    until(lambda: started.ports.connections == 0)
    socks = [connect(port) for _ in range(5)]
    until(lambda: started.ports.connections == 2)
    for sock in socks:
        with sock:
            sock.sendall(b"ab")
            sock.shutdown(socket.SHUT_WR)
            assert until_end(sock) == b"ba"
            assert started.ports.connections <= 2
    until(lambda: started.ports.connections == 0)


def test_a_service_that_refuses_resets_the_client(forwarding: Callable[..., Forwarding]) -> None:
    port = free_port()
    started = forwarding()
    started.ports.update([Upsert(service(free_port(), port))])
    started.ports.programmed()
    until(lambda: accepts(port))
    with pytest.raises(ConnectionResetError), connect(port) as sock:
        sock.recv(1)


def test_a_port_in_use_is_one_line_and_opened_when_it_is_free(
    backend: Callable[..., Backend],
    forwarding: Callable[..., Forwarding],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("agent.serve.localhost_ports.RETRY_SECONDS", 0.02)
    holder = socket.create_server(("127.0.0.1", 0))
    port = holder.getsockname()[1]
    started = forwarding()
    started.ports.update([Upsert(service(backend().port, port))])
    started.ports.programmed()
    until(lambda: bool(started.capture.entries))
    holder.close()

    def answered() -> bool:
        try:
            with connect(port) as sock:
                sock.sendall(b"xy")
                sock.shutdown(socket.SHUT_WR)
                return until_end(sock) == b"yx"
        except ConnectionError:
            return False

    until(answered)
    (line,) = started.capture.entries
    assert (line["event"], line["service"]) == ("localhost_port_failed", "default/web")
    assert line["address"] == f"127.0.0.1:{port}"


def test_services_of_another_proxy_have_no_port(
    backend: Callable[..., Backend], forwarding: Callable[..., Forwarding]
) -> None:
    first, second = free_port(), free_port()
    started = forwarding(proxy_name="other")
    ours = msgspec.structs.replace(service(backend().port, second, name="ours"), proxy_name="other")
    started.ports.update([Upsert(service(backend().port, first)), Upsert(ours)])
    started.ports.programmed()
    until(lambda: accepts(second))
    assert not accepts(first)
