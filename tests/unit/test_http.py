"""The HTTP server over real sockets: requests in pieces, limits, slow clients, few descriptors."""

from __future__ import annotations

import errno
import http.client
import json
import os
import resource
import socket
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.serve.http import (
    HttpAnswer,
    HttpRequest,
    HttpServer,
    Limits,
    Listener,
    TcpAddress,
    UnixAddress,
    listen,
    plain,
)
from tests.unit.test_health import ask, log

LOOPBACK = TcpAddress("127.0.0.1", 0)
BODY = os.urandom(5_000_000)
FEW = Limits(
    connections=24,
    listener_connections=16,
    head_bytes=4096,
    head_seconds=0.3,
    answer_seconds=0.3,
    answer_bytes=2 * len(BODY),
)


def respond(request: HttpRequest) -> HttpAnswer:
    if request.path == "/broken":
        raise RuntimeError("broken")
    if request.path == "/large":
        return HttpAnswer(200, (), BODY)
    return HttpAnswer(200, (), json.dumps(request).encode())


class Served:
    """A server with one listener on loopback."""

    def __init__(self, limits: Limits) -> None:
        self.lines: list[dict[str, Any]] = []
        self.failed: list[str] = []
        self.server = HttpServer(
            "test",
            log(self.lines),
            lambda name, error: self.failed.append(f"{name}: {error!r}"),
            limits=limits,
            tick_seconds=0.05,
        )
        self.port = self.add(Listener(LOOPBACK, "test", respond))
        self.server.start()
        assert self.server.settle()

    def add(self, listener: Listener) -> int:
        opened = listen(listener.address)
        self.server.adopt(listener, opened)
        return int(opened.getsockname()[1])


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served(FEW)
    yield made
    made.server.stop()
    assert made.failed == []


def exchange(port: int, *pieces: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
        for piece in pieces:
            sock.sendall(piece)
            time.sleep(0.01)
        received = b""
        while data := sock.recv(4096):
            received += data
        return received


def closed(sock: socket.socket) -> bool:
    """Whether the server ends the connection."""
    sock.settimeout(5)
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        pass
    except TimeoutError:
        return False
    return True


# --- requests -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pieces",
    [
        (b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n",),
        (b"GET /", b"a HTTP/1.0\r\n", b"\r\n"),
        (b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc",),
        (b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n", b"a" * 1000),
        (
            b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"3\r\nabc\r\n0\r\n\r\n",
        ),
        (b"GET /a HTTP/1.1\r\nHost: x\r\n\r\nGET /b HTTP/1.1\r\nHost: x\r\n\r\n",),
    ],
)
def test_requests_in_any_pieces(served: Served, pieces: tuple[bytes, ...]) -> None:
    answer = exchange(served.port, *pieces)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"connection: close\r\n" in answer.lower()
    assert json.loads(answer.partition(b"\r\n\r\n")[2])[1] == "/a"


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /livez SPDY/3\r\n\r\n", 400),
        (b"GET http://x/livez HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /livez HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n", 400),
        (b"GET /livez HTTP/1.1\r\n\r\n", 400),  # RFC 9112, 3.2: no Host
        (b"GET /livez HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\r\n\r\n", 400),
        (b"GET /" + b"x" * 20000, 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 20000, 431),
    ],
)
def test_what_is_no_request(served: Served, head: bytes, status: int) -> None:
    assert exchange(served.port, head).startswith(f"HTTP/1.1 {status} ".encode())
    assert ask(served.port).status == 200


def test_a_request_has_its_path_query_headers_and_family(served: Served) -> None:
    answer = exchange(
        served.port, b"GET /a%20b?c=d HTTP/1.1\r\nHost: x\r\nAccept: y\r\nX-Z:  z \r\n\r\n"
    )
    assert json.loads(answer.partition(b"\r\n\r\n")[2]) == [
        "GET",
        "/a%20b",
        "c=d",
        {"host": "x", "accept": "y", "x-z": "z"},
        4,
    ]


def test_head_has_the_headers_alone(served: Served) -> None:
    reply = ask(served.port, "/large", method="HEAD")
    assert (reply.status, reply.body) == (200, b"")
    assert reply.headers["Content-Length"] == str(len(BODY))


def test_large_answers_arrive_whole(served: Served) -> None:
    assert ask(served.port, "/large").body == BODY


def test_a_broken_answer_is_500_and_one_line(served: Served) -> None:
    """A flood of requests must not be a flood of lines."""
    for _ in range(3):
        assert ask(served.port, "/broken").status == 500
    assert [line["event"] for line in served.lines] == ["request_failed"]
    assert ask(served.port, "/").status == 200


def test_methods_and_hosts_are_checked_where_asked(served: Served) -> None:
    """A web page that resolves its own name to 127.0.0.1 reads nothing (DNS rebinding)."""
    listener = Listener(
        LOOPBACK, "api", respond, methods=("GET",), hosts=("localhost", "127.0.0.1", "::1")
    )
    port = served.add(listener)
    for host, status in (
        ("localhost", 200),
        ("LOCALHOST:1234", 200),
        (f"127.0.0.1:{port}", 200),
        ("[::1]:80", 200),
        ("evil.example", 421),
        ("localhost.evil.example:80", 421),
        ("", 421),
    ):
        answer = exchange(port, f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert answer.startswith(f"HTTP/1.1 {status} ".encode()), host
    answer = exchange(port, b"POST / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 405 ")
    assert b"\r\nallow: get\r\n" in answer.lower()


# --- listeners ----------------------------------------------------------------------------------


def test_a_unix_socket_is_for_its_owner_alone_and_replaced_at_the_next_start(
    served: Served, tmp_path: Path
) -> None:
    path = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    listener = Listener(UnixAddress(str(path)), "api", respond)
    served.server.serve(listener)
    served.server.settle()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(path))
    connection.request("GET", "/v1")
    assert json.loads(connection.getresponse().read())[4] == 0
    served.server.close(listener)
    served.server.settle()
    assert not path.exists()


def test_a_file_in_place_of_the_unix_socket_stays(served: Served, tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    path.write_text("precious")
    served.server.serve(Listener(UnixAddress(str(path)), "api", respond))
    served.server.settle()
    assert path.read_text() == "precious"
    assert [line["event"] for line in served.lines] == ["listener_failed"]


def test_many_ports_that_fail_are_few_lines(served: Served) -> None:
    with listen(TcpAddress("", 0)) as taken:
        port = taken.getsockname()[1]
        served.server.serve(*(Listener(TcpAddress("", port), "test", respond) for _ in range(100)))
        served.server.settle()
        time.sleep(0.2)
        served.server.settle()
    events = [line["event"] for line in served.lines]
    assert events == ["listener_failed"] * 3 + ["more_listeners_failed"]
    assert served.lines[-1]["count"] == 97


# --- limits -------------------------------------------------------------------------------------


def test_silent_clients_are_closed_and_keep_no_client_out(served: Served) -> None:
    idle = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(100)]
    try:
        assert ask(served.port).status == 200
        assert closed(idle[0])
        assert closed(idle[-1])
    finally:
        for sock in idle:
            sock.close()


def test_a_head_that_drips_is_closed(served: Served) -> None:
    """A byte now and then does not extend the time for the head."""
    with socket.create_connection(("127.0.0.1", served.port)) as sock:
        sock.settimeout(0.02)
        began = time.monotonic()
        try:
            while time.monotonic() - began < 5:
                sock.send(b"G")
                try:
                    if not sock.recv(1):
                        break
                except TimeoutError:
                    continue
            else:
                pytest.fail("it did not end")
        except ConnectionError:
            pass


def test_a_client_that_does_not_take_its_answer_is_closed(served: Served) -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", served.port))
        sock.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.6)
        assert ask(served.port, "/").status == 200
        received = 0
        sock.settimeout(5)
        try:
            while data := sock.recv(1 << 20):
                received += len(data)
        except ConnectionResetError:
            pass
        assert received < len(BODY)


def test_answers_that_wait_for_their_clients_are_bounded(served: Served) -> None:
    """Eight clients ask for 5 MB each and read nothing; two answers fit into the limit."""
    slow = []
    for _ in range(8):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", served.port))
        sock.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        slow.append(sock)
    served.server.settle()
    time.sleep(0.05)
    assert served.server._unsent <= FEW.answer_bytes
    assert ask(served.port, "/large").body == BODY
    for sock in slow:
        sock.close()


def test_a_client_that_floods_does_not_push_out_another(served: Served) -> None:
    """One address holds all connections of a listener; another one's unfinished request stays."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.2", 0))
        probe.connect(("127.0.0.1", served.port))
        probe.sendall(b"GET / HTTP/1.1\r\n")
        flood = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(100)]
        served.server.settle()
        probe.sendall(b"Host: x\r\n\r\n")
        assert probe.recv(100).startswith(b"HTTP/1.1 200 ")
        for sock in flood:
            sock.close()


def test_a_client_that_resets_does_no_harm(served: Served) -> None:
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", served.port)) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
    assert ask(served.port).status == 200


def test_nothing_is_kept_of_a_connection_that_is_closed(served: Served) -> None:
    """What an answered connection held until its time was over was 350 MB in 10 s of requests."""
    for _ in range(200):
        ask(served.port)
    served.server.settle()
    server = served.server
    assert (len(server._reading), len(server._answering), server._unsent) == (0, 0, 0)
    assert len(server._selector.get_map()) == 2  # the wake descriptor and the listener


# --- descriptors --------------------------------------------------------------------------------


def run(code: str) -> str:
    """What a child process prints that begins with a server of 300 ports and few descriptors."""
    head = """
    import resource, socket, sys, os
    resource.setrlimit(resource.RLIMIT_NOFILE, (600, 600))
    from agent.serve.http import HttpServer, Listener, TcpAddress, listen, plain
    from tests.unit.test_health import ask, log
    lines = []
    server = HttpServer("test", log(lines), lambda *a: print("failed", a), tick_seconds=0.1)
    first = listen(TcpAddress("127.0.0.1", 0))
    port = first.getsockname()[1]
    answer = lambda request: plain(200)
    server.adopt(Listener(TcpAddress("127.0.0.1", 0), "livez", answer), first)
    server.start()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_more_ports_than_descriptors_leave_some_for_connections() -> None:
    """300 ports where 600 descriptors are for everything: those that do not fit are reported."""
    out = run("""
    server.serve(
        *(Listener(TcpAddress("127.0.0.1", 0), "health_check", answer) for _ in range(300))
    )
    server.settle()
    print(len(server._listeners), ask(port, "/livez").status)
    print(sum(x.get("count", 1) for x in lines), lines[-1].get("advice"))
    server.stop()
    """)
    opened = 600 - 256 - 128
    advice = "raise the hard limit of open files, which is 600"
    assert out.splitlines() == [f"{opened} 200", f"{301 - opened} {advice}"]


def test_without_any_descriptor_left_it_still_answers() -> None:
    """Something else has used them all up; the reserve and old connections make room."""
    out = run("""
    server.settle()
    client = socket.socket()
    hog = []
    try:
        while True:
            hog.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass
    for _ in range(3):
        client.connect(("127.0.0.1", port))
        client.settimeout(5)
        client.sendall(b"GET /livez HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
        print(client.recv(12).decode())
        client.close()
        client = socket.socket()
    for fd in hog:
        os.close(fd)
    server.stop()
    """)
    assert out.splitlines() == ["HTTP/1.1 200"] * 3


def test_the_descriptor_limit_is_raised() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (128, 700));"
        "from agent.serve.http import raise_descriptor_limit;"
        "print(raise_descriptor_limit(), resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "700 700\n"


def test_what_is_no_address_is_an_error() -> None:
    for address in (TcpAddress("example", 80), TcpAddress("", 99999)):
        with pytest.raises(OSError, match=str(errno.EINVAL)):
            listen(address)
    assert plain(404).body == b"404 Not Found\n"
    assert resource.getrlimit(resource.RLIMIT_NOFILE)
