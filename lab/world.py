"""A small world of network namespaces: machines, pods and the wires between them.

`sliceproxy demo` shows its work in such a world, and the packet tests send real packets through
it.  Everything is inside network namespaces; no interface, address or route of the machine that
runs it is touched.

                     fabric (bridge br0)   172.31.0.0/24   fd00:172:31::/64
     .1 |------+---------------+------------------+------------------+
               |               |                  |                  |
            .2 | eth0       .3 | eth0        .100 | eth0        .200 | eth0
         +-----+-----+   +-----+-----+      +-----+-----+      +-----+-----+
         |   node    |   | elsewhere |      |  client   |      | stranger  |
         +-+---+---+-+   +-+---+---+-+      +-----------+      +-----------+
           |   |   |       |   |   |        default route via node (.2)
    vethpod1   2   3       1   2   3
           |   |   |       |   |   |
       pod-1 pod-2 pod-3  remote-1 remote-2 remote-3
       10.244.1.11 .12    10.244.2.11 .12 .13
       fd00:10:244:1::11  fd00:10:244:2::11 ...

Why it is like this:

* `node` is where the agent runs.  It routes to its pods (a veth and a host route each, as ptp,
  Calico and kindnet do) rather than bridging them, so that every packet of a pod passes the
  node's IP hooks.
* `elsewhere` is a second machine without an agent.  Its pods are endpoints that the node reaches
  over the network, and its answers to `client` do not pass the node by themselves: a service that
  does not masquerade when it must is silent here, as it would be in a cluster.
* `client` and `stranger` send everything they do not know to the node, so cluster IPs, external
  IPs and load balancer IPs arrive there.  They differ in their source address only, for source
  ranges and session affinity.
* The node's own default route leads to the fabric's address .1, which forwards nothing.  A packet
  to a cluster IP that nobody handles therefore has a route, passes the forward hook, and then
  vanishes: "silent" means that nothing took the packet, "refused" that something rejected it.
* The fabric is a namespace of its own, because the bridge must not meet the rules under test.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import ipaddress
import itertools
import os
import re
import select
import selectors
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Literal, ParamSpec, Self, TypeVar

from pyroute2 import IPRoute, NetlinkError, netns

Protocol = Literal["tcp", "udp"]
Outcome = Literal["answered", "refused", "silent", "unreachable"]

BOTH_FAMILIES = (socket.AF_INET, socket.AF_INET6)

_P = ParamSpec("_P")
_T = TypeVar("_T")

_CLONE_NEWNET = 0x40000000
_RT_SCOPE_LINK = 253
_RT_SCOPE_HOST = 254
_IFA_F_NODAD = 0x02
# Python 3.11 does not name these.
_IP_PKTINFO = 8
_IP_RECVERR = 11
_IPV6_RECVERR = 25

_IN_PKTINFO = struct.Struct("=i4s4s")
_IN6_PKTINFO = struct.Struct("=16si")

_POD_GATEWAY_IPV4 = "169.254.1.1"
_POD_GATEWAY_IPV6 = "fe80::1"
_MOST_PODS = 240
_BACKLOG = 1024
_LONGEST_STEP = 30.0
"""Seconds that an interrupt waits for building or taking down."""

_SYSCTLS = {
    "ipv4/conf/{}/rp_filter": "0",
    "ipv4/conf/{}/send_redirects": "0",
    "ipv4/conf/{}/accept_redirects": "0",
    "ipv6/conf/{}/disable_ipv6": "0",
    "ipv6/conf/{}/accept_dad": "0",
    "ipv6/conf/{}/accept_ra": "0",
    # IPv6 cannot be told not to send redirects, and a redirect would lead a client past the node.
    "ipv6/conf/{}/accept_redirects": "0",
}
# The kernel sends about one ICMP error a second to each address.  Without these settings the
# second refused datagram looks silent.
_ICMP_SYSCTLS = {
    "ipv4/icmp_ratemask": "0",
    "ipv6/icmp/ratelimit": "0",
    "ipv6/icmp/ratemask": "",
}
# Switching forwarding on resets other settings of the same namespace, so it is written first.
_FORWARDING_SYSCTLS = {"ipv4/ip_forward": "1", "ipv6/conf/all/forwarding": "1"}

_OUTCOME_OF_ERROR: Mapping[int, Outcome] = {
    errno.ECONNREFUSED: "refused",
    errno.ECONNRESET: "refused",
    errno.EHOSTUNREACH: "unreachable",
    errno.ENETUNREACH: "unreachable",
    # ICMPv6 "administratively prohibited", and routes of type prohibit.
    errno.EACCES: "unreachable",
}

_libc = ctypes.CDLL(None, use_errno=True)
_world_numbers = itertools.count(1)


class WorldError(RuntimeError):
    """The world cannot be built or used; the text tells what to do."""


@dataclass(frozen=True)
class Host:
    """One network namespace of a World."""

    name: str
    """The name in the World, such as "pod-1"."""
    namespace: str
    """The name of the network namespace under /var/run/netns."""
    ipv4: str
    """The address in the fabric (machines) or in the pod network (pods)."""
    ipv6: str
    """As ipv4."""
    machine: str | None = None
    """The machine a pod runs on; None for machines and the fabric."""

    def address(self, family: int) -> str:
        """The host's address of a family, AF_INET or AF_INET6."""
        return self.ipv6 if family == socket.AF_INET6 else self.ipv4


@dataclass(frozen=True)
class Answer:
    """What came of one question to an address and port."""

    outcome: Outcome
    """"answered": a server of the World replied.
    "refused": a TCP reset or an ICMP port unreachable came back.
    "silent": nothing came back in time.
    "unreachable": no route, or an ICMP error that says so or prohibits it."""
    server: str | None
    """The name of the host that answered; None unless answered."""
    client: str | None
    """The source address that the server saw; None unless answered."""
    client_port: int | None
    """The source port that the server saw; None unless answered."""
    seconds: float
    """The time from the first packet to the outcome, in seconds."""


class Server:
    """Listening sockets of one `World.serve` call.  Closing them makes the port refuse."""

    def __init__(self, loop: _ServerLoop, sockets: Sequence[socket.socket]) -> None:
        self._loop = loop
        self._sockets = sockets

    def close(self) -> None:
        """Stop listening.  May be called twice."""
        self._loop.remove(self._sockets)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class World:
    """Network namespaces, wired as the module says, from entering the context to leaving it.

    Several worlds may exist at once, in one process or in many: the names of their namespaces
    carry the process id and a number.  Entering also removes what killed processes have left.

    All methods may be called from any thread, and none changes the namespace of its caller.
    """

    hosts: Mapping[str, Host]
    """The hosts by name: "fabric", "node", "elsewhere", "client", "stranger", "pod-1" and so on."""

    def __init__(
        self,
        pods: int = 3,
        remotes: int = 3,
        outside: Mapping[str, int] | None = None,
        prefix: str = "sliceproxy",
    ) -> None:
        """Plan a world; nothing is built before it is entered.

        pods: how many pods run on the node, "pod-1" and on.
        remotes: how many pods run elsewhere, "remote-1" and on.
        outside: machines on the fabric besides client (100) and stranger (200), by name.  The
            number is the last part of both addresses: 150 means 172.31.0.150 and
            fd00:172:31::150.
        prefix: the beginning of every namespace name.
        """
        if not 0 <= pods <= _MOST_PODS or not 0 <= remotes <= _MOST_PODS:
            raise ValueError(f"a machine holds 0 to {_MOST_PODS} pods, not {pods} and {remotes}")
        self._prefix = prefix
        self._own_prefix = f"{prefix}-{os.getpid()}-{next(_world_numbers)}-"
        machines = {"node": 2, "elsewhere": 3, "client": 100, "stranger": 200, **(outside or {})}
        planned = [self._machine("fabric", 1)]
        planned += [self._machine(name, number) for name, number in machines.items()]
        planned += [self._pod("pod", "node", 1, number) for number in range(1, pods + 1)]
        planned += [self._pod("remote", "elsewhere", 2, number) for number in range(1, remotes + 1)]
        self.hosts = MappingProxyType({host.name: host for host in planned})
        self._namespaces: dict[str, int] = {}
        self._processes: list[subprocess.Popen[Any]] = []
        self._servers: _ServerLoop | None = None

    def __enter__(self) -> Self:
        if self._namespaces:
            raise WorldError("this World is already built: make another one")
        try:
            _in_fresh_thread(self._build, to_the_end=True)
        except BaseException:
            self._take_down()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._take_down()

    def namespace(self, host: str) -> str:
        """The name under /var/run/netns, as pyroute2's netns= and `ip netns` take it."""
        return self._host(host).namespace

    def run(self, host: str, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Call a function in a fresh thread inside the host's namespace.

        Returns what it returns and raises what it raises.  The thread ends with the call, and
        pyroute2 opens one socket for each thread: a pyroute2 object that must outlive the call
        is better opened with netns=world.namespace(host) by the thread that will use it.
        """
        descriptor = self._descriptor(host)

        def inside() -> _T:
            _enter_namespace(descriptor)
            return function(*args, **kwargs)

        return _in_fresh_thread(inside)

    def socket(self, host: str, family: int, kind: int) -> socket.socket:
        """A socket that lives in the host's namespace; the caller closes it."""
        return self.run(host, socket.socket, family, kind)

    def popen(self, host: str, argv: Sequence[str], **kwargs: Any) -> subprocess.Popen[Any]:
        """Start a process inside the host's namespace; kwargs are those of subprocess.Popen.

        It is killed at the end of the world if it still runs.  The thread that starts it ends at
        once, so the process must not ask for a signal at its parent's death (PR_SET_PDEATHSIG
        goes by the thread).
        """
        # A child inherits the namespace of the thread that forks it: no preexec_fn, which may
        # deadlock in a process with threads, and no helper program.
        process: subprocess.Popen[Any] = self.run(host, partial(subprocess.Popen, argv, **kwargs))
        self._processes.append(process)
        return process

    def serve(
        self,
        host: str,
        port: int,
        protocol: Protocol = "tcp",
        address: str | None = None,
        families: Sequence[int] = BOTH_FAMILIES,
    ) -> Server:
        """Answer every connection or datagram with "<host> <client address> <client port>\\n".

        A TCP connection is answered at once, without waiting for a request, and closed.  Without
        an address the server listens on all addresses of the families.
        """
        if self._servers is None:
            raise WorldError("the world is not built: use it in a with statement")
        if address is not None:
            families = (_family(address),)
        sockets = self.run(host, _listen, port, protocol, address, families)
        self._servers.add(host, protocol, sockets)
        return Server(self._servers, sockets)

    def ask(
        self,
        host: str,
        address: str,
        port: int,
        protocol: Protocol = "tcp",
        *,
        timeout: float = 1.0,
        source_port: int | None = None,
        source_address: str | None = None,
    ) -> Answer:
        """Ask an address and port, from a host, who answers there and whom it sees asking.

        timeout: seconds to wait in all.  A lost SYN or datagram is not repeated within the
            first second.
        source_port, source_address: where to ask from; the kernel chooses without them.
        """
        family = _family(address)
        with self.socket(host, family, _socket_kind(protocol)) as sock:
            if source_port is not None or source_address is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind((source_address or "", source_port or 0))
            started = time.monotonic()
            outcome, text = _question(sock, (address, port), started + timeout)
            seconds = time.monotonic() - started
        if outcome != "answered":
            return Answer(outcome, None, None, None, seconds)
        server, client, client_port = _parse_answer(text, address, port)
        return Answer(outcome, server, client, client_port, seconds)

    def add_address(self, host: str, address: str, interface: str = "lo") -> None:
        """Give a host one more address, /32 or /128 unless it says otherwise ("10.0.0.1/24")."""
        self._configure(
            host, lambda iproute: _add_address(iproute, interface, ipaddress.ip_interface(address))
        )

    def remove_address(self, host: str, address: str, interface: str = "lo") -> None:
        """Take an address away again; it is written as it was for add_address."""
        parsed = ipaddress.ip_interface(address)
        self._configure(
            host,
            lambda iproute: iproute.addr(
                "del",
                index=_index(iproute, interface),
                address=str(parsed.ip),
                prefixlen=parsed.network.prefixlen,
            ),
        )

    def _machine(self, name: str, number: int) -> Host:
        if not 1 <= number <= 254:
            raise ValueError(f"machine {name}: its number is 1 to 254, not {number}")
        if len(_port_name(name)) > 15:
            raise ValueError(f"machine {name}: its name may have 12 characters at most")
        address4, address6 = f"172.31.0.{number}", f"fd00:172:31::{number}"
        return Host(name, self._own_prefix + name, address4, address6)

    def _pod(self, kind: str, machine: str, network: int, number: int) -> Host:
        name, last = f"{kind}-{number}", 10 + number
        address4, address6 = f"10.244.{network}.{last}", f"fd00:10:244:{network}::{last}"
        return Host(name, self._own_prefix + name, address4, address6, machine)

    def _host(self, name: str) -> Host:
        try:
            return self.hosts[name]
        except KeyError:
            known = ", ".join(self.hosts)
            raise WorldError(f"no host {name!r} in this world; it has {known}") from None

    def _descriptor(self, host: str) -> int:
        name = self._host(host).name
        try:
            return self._namespaces[name]
        except KeyError:
            raise WorldError("the world is not built: use it in a with statement") from None

    def _configure(self, host: str, configuration: Callable[[IPRoute], object]) -> None:
        def inside() -> None:
            with IPRoute() as iproute:
                configuration(iproute)

        self.run(host, inside)

    def _build(self) -> None:
        _remove_stale_worlds(self._prefix)
        machines = [host for host in self.hosts.values() if host.machine is None]
        fabric, machines = machines[0], machines[1:]
        for host in self.hosts.values():
            self._make_namespace(host)
        self._configure(fabric.name, partial(_make_bridge, fabric))
        for machine in machines:
            self._configure(machine.name, partial(_make_wire, _port_name(machine.name), fabric))
        self._configure(fabric.name, partial(_plug_in, machines))
        for machine in machines:
            self._configure(machine.name, partial(_configure_machine, machine, self.hosts))
        for name in ("node", "elsewhere"):
            self._build_pods(self.hosts[name])
        self._servers = _ServerLoop()

    def _build_pods(self, machine: Host) -> None:
        pods = [host for host in self.hosts.values() if host.machine == machine.name]
        for pod in pods:
            self._configure(pod.name, partial(_make_wire, _veth_name(pod), machine))
        self._configure(machine.name, partial(_route_to_pods, machine, pods))
        for pod in pods:
            self._configure(pod.name, partial(_configure_pod, pod))

    def _make_namespace(self, host: Host) -> None:
        def inside() -> None:
            _unshare_network()
            _write_sysctls(forwarding=host.name in ("node", "elsewhere"))
            _name_namespace(host.namespace)

        _in_fresh_thread(inside)
        self._namespaces[host.name] = os.open(_namespace_path(host.namespace), os.O_RDONLY)

    def _take_down(self) -> None:
        _in_fresh_thread(self._remove_everything, to_the_end=True)

    def _remove_everything(self) -> None:
        # A stack, last step first, because every step is due even when another one fails.
        with contextlib.ExitStack() as steps:
            steps.callback(_remove_namespaces, re.compile(re.escape(self._own_prefix)))
            steps.callback(self._close_namespaces)
            steps.callback(self._stop_processes)
            if self._servers is not None:
                steps.callback(self._servers.close)
                self._servers = None

    def _close_namespaces(self) -> None:
        while self._namespaces:
            _, descriptor = self._namespaces.popitem()
            os.close(descriptor)

    def _stop_processes(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        self._processes.clear()


class _ServerLoop:
    """All servers of a world, in one thread."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._stop = os.eventfd(0)
        self._selector.register(self._stop, selectors.EVENT_READ)
        # Held while sockets are answered, so that none is closed under the answering thread.
        self._answering = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="world-servers", daemon=True)
        self._thread.start()

    def close(self) -> None:
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        self.remove([k.fileobj for k in self._keys() if isinstance(k.fileobj, socket.socket)])
        self._selector.close()
        os.close(self._stop)

    def add(self, host: str, protocol: Protocol, sockets: Sequence[socket.socket]) -> None:
        reply = _answer_connections if protocol == "tcp" else _answer_datagrams
        for sock in sockets:
            self._selector.register(sock, selectors.EVENT_READ, partial(reply, sock, host))

    def remove(self, sockets: Sequence[socket.socket]) -> None:
        with self._answering:
            for sock in sockets:
                if sock.fileno() != -1:
                    self._selector.unregister(sock)
                    sock.close()

    def _keys(self) -> list[selectors.SelectorKey]:
        return list(self._selector.get_map().values())

    def _run(self) -> None:
        while True:
            ready = self._selector.select()
            with self._answering:
                for key, _ in ready:
                    if key.fileobj == self._stop:
                        return
                    key.data()


def _answer_connections(listener: socket.socket, host: str) -> None:
    # An error here is a client that left early, or a listener that was closed since it was ready.
    with contextlib.suppress(OSError):
        while True:
            connection, peer = listener.accept()
            with connection:
                connection.send(_answer_text(host, peer))


def _answer_datagrams(sock: socket.socket, host: str) -> None:
    with contextlib.suppress(OSError):
        while True:
            _, control, _, peer = sock.recvmsg(2048, 128)
            sock.sendmsg([_answer_text(host, peer)], _reply_source(control), 0, peer)


def _reply_source(control: Sequence[tuple[int, int, bytes]]) -> list[tuple[int, int, bytes]]:
    """The control message that sends a reply from the address the datagram came to.

    A host with several addresses would otherwise answer from another one than it was asked at.
    """
    for level, kind, data in control:
        if (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO):
            _, _, arrived_at = _IN_PKTINFO.unpack(data)
            return [(level, kind, _IN_PKTINFO.pack(0, arrived_at, b""))]
        if (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
            arrived_at, _ = _IN6_PKTINFO.unpack(data)
            return [(level, kind, _IN6_PKTINFO.pack(arrived_at, 0))]
    return []


def _answer_text(host: str, peer: tuple[Any, ...]) -> bytes:
    return f"{host} {peer[0]} {peer[1]}\n".encode()


def _parse_answer(text: bytes, address: str, port: int) -> tuple[str, str, int]:
    try:
        server, client, client_port = text.decode().split()
        return server, client, int(client_port)
    except ValueError:
        raise WorldError(
            f"{address} port {port} was answered with {text!r}, which is not from a server of"
            " this world: ask only what World.serve serves"
        ) from None


def _listen(
    port: int, protocol: Protocol, address: str | None, families: Sequence[int]
) -> list[socket.socket]:
    with contextlib.ExitStack() as on_error:
        sockets = []
        for family in families:
            sock = on_error.enter_context(socket.socket(family, _socket_kind(protocol)))
            sock.setblocking(False)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if protocol == "tcp":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            elif family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            else:
                sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
            sock.bind((address or "", port))
            if protocol == "tcp":
                sock.listen(_BACKLOG)
            sockets.append(sock)
        on_error.pop_all()
    return sockets


def _question(
    sock: socket.socket, address: tuple[str, int], deadline: float
) -> tuple[Outcome, bytes]:
    question = _question_tcp if sock.type == socket.SOCK_STREAM else _question_udp
    try:
        return "answered", question(sock, address, deadline)
    except TimeoutError:
        return "silent", b""
    except OSError as error:
        outcome = _OUTCOME_OF_ERROR.get(error.errno or 0)
        if outcome is None:
            raise
        return outcome, b""


def _question_tcp(sock: socket.socket, address: tuple[str, int], deadline: float) -> bytes:
    # Close with a reset: thousands of connections leave no TIME_WAIT, and a source port can be
    # used again at once.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    _connect(sock, address, deadline)
    text = b""
    while not text.endswith(b"\n"):
        _wait_until(sock, deadline)
        if not (part := sock.recv(512)):
            break
        text += part
    return text


def _connect(sock: socket.socket, address: tuple[str, int], deadline: float) -> None:
    """Connect, and take every ICMP error for the end of it.

    Between namespaces the error arrives while the kernel still holds the socket for sending the
    SYN.  IPv6 then only notes it in SO_ERROR, and a caller of connect() learns of it a second
    later, when the SYN is repeated.
    """
    sock.setblocking(False)
    code = sock.connect_ex(address)
    if code == errno.EINPROGRESS:
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code == 0:
            connected = select.poll()
            connected.register(sock, select.POLLOUT)
            in_time = connected.poll(max(0.0, deadline - time.monotonic()) * 1000)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code == 0 and not in_time:
                code = errno.ETIMEDOUT
    if code != 0:
        raise OSError(code, os.strerror(code))


def _question_udp(sock: socket.socket, address: tuple[str, int], deadline: float) -> bytes:
    # Without this, only "port unreachable" of all ICMP errors ends the wait on an IPv4 socket.
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
    _wait_until(sock, deadline)
    sock.connect(address)
    # A datagram that a rule of this very host rejects or drops gives EPERM in both cases; only
    # the ICMP error that follows a reject tells them apart.
    try:
        sock.send(b"who\n")
    except OSError as error:
        if error.errno != errno.EPERM:
            raise
    return sock.recv(512)


def _wait_until(sock: socket.socket, deadline: float) -> None:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    sock.settimeout(left)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _socket_kind(protocol: Protocol) -> socket.SocketKind:
    return socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM


def _in_fresh_thread(function: Callable[[], _T], to_the_end: bool = False) -> _T:
    """Call a function in a thread of its own, which may change its namespace and then ends.

    Ctrl-C interrupts the caller alone, never the function.

    to_the_end: let an interrupt wait until the function is done.  Building and taking down use
        it: what is half made or half removed when cleaning up begins would be left behind.
    """
    outcome: Future[_T] = Future()

    def body() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=body, daemon=True)
    try:
        thread.start()
        wait([outcome])
    except BaseException:
        # Not Thread.join: in Python 3.11 a join that was interrupted once does not wait again.
        # Bounded, because a thread that could not be started never has an outcome.
        wait([outcome], timeout=_LONGEST_STEP if to_the_end else 0)
        raise
    thread.join()
    return outcome.result()


def _enter_namespace(descriptor: int) -> None:
    """Move the calling thread, and no other, into a network namespace."""
    if _libc.setns(descriptor, _CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot enter a network namespace: {os.strerror(code)}")


def _unshare_network() -> None:
    """Move the calling thread, and no other, into a new network namespace."""
    if _libc.unshare(_CLONE_NEWNET) == 0:
        return
    code = ctypes.get_errno()
    if code == errno.EPERM:
        raise PermissionError(
            code, "needs root (CAP_SYS_ADMIN and CAP_NET_ADMIN) to make network namespaces"
        )
    if code == errno.EINVAL:
        raise WorldError("this kernel has no network namespaces: it needs CONFIG_NET_NS")
    if code == errno.ENOSPC:
        raise WorldError(
            "the kernel allows no more network namespaces: raise sysctl user.max_net_namespaces"
        )
    raise OSError(code, f"cannot make a network namespace: {os.strerror(code)}")


def _name_namespace(name: str) -> None:
    """Keep the calling thread's namespace under a name, where pyroute2 and `ip netns` find it."""
    # The thread's id is the process id here: /proc/<id>/ns/net of another thread of this process
    # is another namespace.
    with _namespace_directory_lock():
        try:
            netns.attach(name, threading.get_native_id(), libc=_libc)
        except OSError as error:
            raise WorldError(
                f"cannot keep a network namespace as {_namespace_path(name)}: {error.strerror}."
                " It needs the right to mount: a container must be privileged"
            ) from error


@contextlib.contextmanager
def _namespace_directory_lock() -> Iterator[None]:
    """The lock that `ip netns add` takes too, while it makes the directory a shared mount."""
    Path(netns.NETNS_RUN_DIR).mkdir(exist_ok=True)
    directory = os.open(netns.NETNS_RUN_DIR, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def _namespace_path(name: str) -> str:
    return f"{netns.NETNS_RUN_DIR}/{name}"


def _remove_stale_worlds(prefix: str) -> None:
    """Remove the worlds of processes that are gone."""
    named = re.compile(rf"{re.escape(prefix)}-(\d+)-\d+-")
    owners = {match[1] for name in netns.listnetns() if (match := named.match(name))}
    for owner in owners:
        if not Path(f"/proc/{owner}").exists():
            _remove_namespaces(re.compile(rf"{re.escape(prefix)}-{owner}-\d+-"))


def _remove_namespaces(beginning: re.Pattern[str]) -> None:
    for name in netns.listnetns():
        if beginning.match(name):
            # Another process may remove the same stale world.
            with contextlib.suppress(FileNotFoundError):
                netns.remove(name, libc=_libc)


def _write_sysctls(forwarding: bool) -> None:
    """Set the network settings of the calling thread's namespace, before it has interfaces."""
    settings = dict(_FORWARDING_SYSCTLS) if forwarding else {}
    for which in ("all", "default"):
        settings |= {path.format(which): value for path, value in _SYSCTLS.items()}
    settings |= _ICMP_SYSCTLS
    for path, value in settings.items():
        _write_sysctl(path, value)


def _write_sysctl(path: str, value: str) -> None:
    try:
        # /proc/sys/net shows the namespace of the thread that opens the file.
        with open(f"/proc/sys/net/{path}", "w", encoding="ascii") as file:
            file.write(f"{value}\n")
    except FileNotFoundError:
        need = "IPv6 (CONFIG_IPV6, no ipv6.disable=1)" if path.startswith("ipv6") else "IPv4"
        raise WorldError(f"/proc/sys/net/{path} is missing: the kernel needs {need}") from None
    except OSError as error:
        raise WorldError(
            f"cannot write /proc/sys/net/{path}: {error.strerror}. /proc/sys must be writable:"
            " a container must be privileged"
        ) from error


def _port_name(machine: str) -> str:
    return f"to-{machine}"


def _veth_name(pod: Host) -> str:
    return f"vethpod{pod.name.rpartition('-')[2]}"


def _make_bridge(fabric: Host, iproute: IPRoute) -> None:
    # Snooping would hold back neighbour solicitations until it has learnt the groups.
    _add_link(iproute, ifname="br0", kind="bridge", br_mcast_snooping=0)
    _raise(iproute, "br0")
    _add_fabric_addresses(iproute, "br0", fabric)
    # What arrives for an unknown address is to vanish.  Without a route IPv6 would report it as
    # unreachable; with one, it finds that forwarding is off and drops without a word.
    for family in BOTH_FAMILIES:
        _add_route(iproute, "default", family, oif=_index(iproute, "br0"))


def _make_wire(far_name: str, far_host: Host, iproute: IPRoute) -> None:
    """Make eth0, with its other end in another namespace.

    Both ends are born where they stay, so two worlds never meet in the caller's namespace.
    """
    peer = {"ifname": far_name, "net_ns_fd": far_host.namespace}
    _add_link(iproute, ifname="eth0", kind="veth", peer=peer)


def _plug_in(machines: Sequence[Host], iproute: IPRoute) -> None:
    bridge = _index(iproute, "br0")
    for machine in machines:
        port = _port_name(machine.name)
        iproute.link("set", index=_index(iproute, port), master=bridge)
        _raise(iproute, port)


def _configure_machine(machine: Host, hosts: Mapping[str, Host], iproute: IPRoute) -> None:
    _raise(iproute, "lo")
    _raise(iproute, "eth0")
    _add_fabric_addresses(iproute, "eth0", machine)
    node, elsewhere = hosts["node"], hosts["elsewhere"]
    router = hosts["fabric"] if machine in (node, elsewhere) else node
    for family in BOTH_FAMILIES:
        _add_route(iproute, "default", family, gateway=router.address(family))
    if machine == node:
        _add_route(iproute, "10.244.2.0/24", socket.AF_INET, gateway=elsewhere.ipv4)
        _add_route(iproute, "fd00:10:244:2::/64", socket.AF_INET6, gateway=elsewhere.ipv6)
    if machine == elsewhere:
        _add_route(iproute, "10.244.1.0/24", socket.AF_INET, gateway=node.ipv4)
        _add_route(iproute, "fd00:10:244:1::/64", socket.AF_INET6, gateway=node.ipv6)


def _route_to_pods(machine: Host, pods: Sequence[Host], iproute: IPRoute) -> None:
    for pod in pods:
        veth = _veth_name(pod)
        _raise(iproute, veth)
        # Of scope link, so that masquerading takes the machine's address instead.
        _add_address(iproute, veth, ipaddress.ip_interface(_POD_GATEWAY_IPV4), scope=_RT_SCOPE_LINK)
        _add_address(iproute, veth, ipaddress.ip_interface(f"{_POD_GATEWAY_IPV6}/64"))
        index = _index(iproute, veth)
        for family, length in ((socket.AF_INET, 32), (socket.AF_INET6, 128)):
            # What the machine itself sends would come from the gateway address without prefsrc.
            _add_route(
                iproute,
                f"{pod.address(family)}/{length}",
                family,
                oif=index,
                prefsrc=machine.address(family),
                **({"scope": _RT_SCOPE_LINK} if family == socket.AF_INET else {}),
            )


def _configure_pod(pod: Host, iproute: IPRoute) -> None:
    _raise(iproute, "lo")
    _raise(iproute, "eth0")
    for family in BOTH_FAMILIES:
        _add_address(iproute, "eth0", ipaddress.ip_interface(pod.address(family)))
    index = _index(iproute, "eth0")
    _add_route(
        iproute, "default", socket.AF_INET, gateway=_POD_GATEWAY_IPV4, oif=index, flags=["onlink"]
    )
    _add_route(iproute, "default", socket.AF_INET6, gateway=_POD_GATEWAY_IPV6, oif=index)


def _add_link(iproute: IPRoute, kind: str, **attributes: Any) -> None:
    try:
        iproute.link("add", kind=kind, **attributes)
    except NetlinkError as error:
        if error.code != errno.EOPNOTSUPP:
            raise
        raise WorldError(
            f"this kernel cannot make a {kind} interface: load the module {kind}, or use a kernel"
            f" with CONFIG_{kind.upper()}"
        ) from error


def _index(iproute: IPRoute, interface: str) -> int:
    found = iproute.link_lookup(ifname=interface)
    if not found:
        raise WorldError(f"there is no interface {interface} in this namespace")
    return int(found[0])


def _raise(iproute: IPRoute, interface: str) -> None:
    iproute.link("set", index=_index(iproute, interface), state="up")


def _add_fabric_addresses(iproute: IPRoute, interface: str, host: Host) -> None:
    _add_address(iproute, interface, ipaddress.ip_interface(f"{host.ipv4}/24"))
    _add_address(iproute, interface, ipaddress.ip_interface(f"{host.ipv6}/64"))


def _add_address(
    iproute: IPRoute,
    interface: str,
    address: ipaddress.IPv4Interface | ipaddress.IPv6Interface,
    scope: int | None = None,
) -> None:
    attributes: dict[str, Any] = {}
    if address.version == 6:
        # Usable at once: even with accept_dad=0 an address is tentative until a kernel worker ran.
        attributes["flags"] = _IFA_F_NODAD
    elif scope is not None:
        attributes["scope"] = scope
    elif interface == "lo":
        # Masquerading towards a pod falls back to the addresses of lo first, and would take a
        # service address of wider scope for the node's own.
        attributes["scope"] = _RT_SCOPE_HOST
    iproute.addr(
        "add",
        index=_index(iproute, interface),
        address=str(address.ip),
        prefixlen=address.network.prefixlen,
        **attributes,
    )


def _add_route(
    iproute: IPRoute, destination: str, family: socket.AddressFamily, **attributes: Any
) -> None:
    iproute.route("add", dst=destination, family=family, **attributes)
