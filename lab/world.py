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
  to a cluster IP that no rule handles therefore has a route, passes the forward hook, and then
  vanishes: "silent" means that nothing took the packet, "refused" that something rejected it.
* The fabric is a namespace of its own, because the bridge must not meet the rules under test.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import os
import re
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType, TracebackType
from typing import Any, ParamSpec, Self, TypeVar

from pyroute2 import IPRoute

from lab import namespaces, wires
from lab.exchange import Server, ServerLoop, ask, listen, socket_kind
from lab.hosts import (
    BOTH_FAMILIES,
    Answer,
    Host,
    Outcome,
    Protocol,
    WorldError,
    family_of,
    machine_of_fabric,
    pod_of,
)
from lab.namespaces import in_fresh_thread

__all__ = [
    "BOTH_FAMILIES",
    "Answer",
    "Host",
    "Outcome",
    "Protocol",
    "Server",
    "World",
    "WorldError",
]

_P = ParamSpec("_P")
_T = TypeVar("_T")
_MOST_PODS = 240
_world_numbers = itertools.count(1)


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
        planned = [machine_of_fabric(self._own_prefix, "fabric", 1)]
        planned += [
            machine_of_fabric(self._own_prefix, name, number) for name, number in machines.items()
        ]
        planned += [
            pod_of(self._own_prefix, "pod", "node", 1, number) for number in range(1, pods + 1)
        ]
        planned += [
            pod_of(self._own_prefix, "remote", "elsewhere", 2, number)
            for number in range(1, remotes + 1)
        ]
        self.hosts = MappingProxyType({host.name: host for host in planned})
        self._namespaces: dict[str, int] = {}
        self._processes: list[subprocess.Popen[Any]] = []
        self._servers: ServerLoop | None = None

    def __enter__(self) -> Self:
        if self._namespaces:
            raise WorldError("this World is already built: make another one")
        try:
            in_fresh_thread(self._build, to_the_end=True)
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
            namespaces.enter_namespace(descriptor)
            return function(*args, **kwargs)

        return in_fresh_thread(inside)

    def socket(self, host: str, family: int, kind: int) -> socket.socket:
        """A socket that lives in the host's namespace; the caller closes it."""
        return self.run(host, socket.socket, family, kind)

    def popen(self, host: str, argv: Sequence[str], **kwargs: Any) -> subprocess.Popen[Any]:
        """Start a process inside the host's namespace; kwargs are those of subprocess.Popen.

        It is killed at the end of the world if it still runs.  The thread that starts it ends at
        once, so the process must not ask for a signal at its parent's death (PR_SET_PDEATHSIG
        depends on the thread).
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
            families = (family_of(address),)
        sockets = self.run(host, listen, port, protocol, address, families)
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
        with self.socket(host, family_of(address), socket_kind(protocol)) as sock:
            if source_port is not None or source_address is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind((source_address or "", source_port or 0))
            return ask(sock, address, port, timeout)

    def add_address(self, host: str, address: str, interface: str = "lo") -> None:
        """Give a host one more address, /32 or /128 unless it says otherwise ("10.0.0.1/24")."""
        self._configure(
            host,
            lambda iproute: wires.add_address(iproute, interface, ipaddress.ip_interface(address)),
        )

    def remove_address(self, host: str, address: str, interface: str = "lo") -> None:
        """Take an address away again; it is written as it was for add_address."""
        parsed = ipaddress.ip_interface(address)
        self._configure(
            host,
            lambda iproute: iproute.addr(
                "del",
                index=wires.interface_index(iproute, interface),
                address=str(parsed.ip),
                prefixlen=parsed.network.prefixlen,
            ),
        )

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
        namespaces.remove_stale_worlds(self._prefix)
        machines = [host for host in self.hosts.values() if host.machine is None]
        fabric, machines = machines[0], machines[1:]
        for host in self.hosts.values():
            self._make_namespace(host)
        self._configure(fabric.name, partial(wires.make_bridge, fabric))
        for machine in machines:
            self._configure(
                machine.name, partial(wires.make_wire, wires.port_name(machine.name), fabric)
            )
        self._configure(fabric.name, partial(wires.plug_in, machines))
        for machine in machines:
            self._configure(machine.name, partial(wires.configure_machine, machine, self.hosts))
        for name in ("node", "elsewhere"):
            self._build_pods(self.hosts[name])
        self._servers = ServerLoop()

    def _build_pods(self, machine: Host) -> None:
        pods = [host for host in self.hosts.values() if host.machine == machine.name]
        for pod in pods:
            self._configure(pod.name, partial(wires.make_wire, wires.veth_name(pod), machine))
        self._configure(machine.name, partial(wires.route_to_pods, machine, pods))
        for pod in pods:
            self._configure(pod.name, partial(wires.configure_pod, pod))

    def _make_namespace(self, host: Host) -> None:
        def inside() -> None:
            namespaces.unshare_network()
            namespaces.write_sysctls(forwarding=host.name in ("node", "elsewhere"))
            namespaces.name_namespace(host.namespace)

        in_fresh_thread(inside)
        self._namespaces[host.name] = os.open(
            namespaces.namespace_path(host.namespace), os.O_RDONLY
        )

    def _take_down(self) -> None:
        in_fresh_thread(self._remove_everything, to_the_end=True)

    def _remove_everything(self) -> None:
        # A stack, last step first, because every step is due even when another one fails.
        with contextlib.ExitStack() as steps:
            steps.callback(namespaces.remove_namespaces, re.compile(re.escape(self._own_prefix)))
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
