"""The world itself, without sliceproxy: routing, distinct outcomes, nothing left behind."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyroute2 import IPRoute, netns

from lab.world import BOTH_FAMILIES, World, WorldError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make namespaces")

TALKERS = ("node", "elsewhere", "client", "stranger", "pod-1", "pod-2", "remote-1", "remote-2")
UNKNOWN = {socket.AF_INET: "10.96.0.77", socket.AF_INET6: "fd00:10:96::77"}
families = pytest.mark.parametrize("family", BOTH_FAMILIES, ids=["ipv4", "ipv6"])
protocols = pytest.mark.parametrize("protocol", ["tcp", "udp"])


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World(pods=2, remotes=2, prefix="sliceproxy-test") as built:
        for host in TALKERS:
            built.serve(host, 80, "tcp")
            built.serve(host, 80, "udp")
        yield built


@families
@protocols
def test_everyone_reaches_everyone_with_their_own_address(world, protocol, family):
    for asker, server in itertools.product(TALKERS, TALKERS):
        answer = world.ask(asker, world.hosts[server].address(family), 80, protocol)
        assert (answer.outcome, answer.server) == ("answered", server), asker
        assert answer.client == world.hosts[asker].address(family), (asker, server)
        assert answer.seconds < 1


@families
@protocols
@pytest.mark.parametrize("server", ["node", "pod-1", "remote-1", "client"])
def test_a_port_without_a_server_refuses_every_time(world, server, protocol, family):
    address = world.hosts[server].address(family)
    outcomes = {world.ask("stranger", address, 81, protocol).outcome for _ in range(50)}
    assert outcomes == {"refused"}


@families
@protocols
@pytest.mark.parametrize("asker", ["node", "pod-1", "client", "remote-1"])
def test_an_address_without_an_owner_is_silent(world, asker, protocol, family):
    answer = world.ask(asker, UNKNOWN[family], 80, protocol, timeout=0.2)
    assert answer.outcome == "silent"
    assert answer.server is None
    assert 0.2 <= answer.seconds < 0.5


@families
def test_a_packet_to_an_unallocated_cluster_ip_reaches_the_forward_hook(world, family):
    """It leaves the node on eth0 again, towards the fabric's gateway."""
    forwarded = {
        socket.AF_INET: ("snmp", "ForwDatagrams"),
        socket.AF_INET6: ("snmp6", "Ip6OutForwDatagrams"),
    }
    before = world.run("node", _counter, *forwarded[family])
    world.ask("client", UNKNOWN[family], 80, "udp", timeout=0.1)
    assert world.run("node", _counter, *forwarded[family]) == before + 1


@families
@protocols
def test_an_icmp_error_of_a_router_is_unreachable_at_once(world, protocol, family):
    address = {socket.AF_INET: "10.96.0.78/32", socket.AF_INET6: "fd00:10:96::78/128"}[family]

    def change(action):
        with IPRoute() as iproute:
            iproute.route(action, dst=address, family=family, type="unreachable")

    world.run("node", change, "add")
    try:
        answer = world.ask("client", address.partition("/")[0], 80, protocol)
    finally:
        world.run("node", change, "del")
    assert answer.outcome == "unreachable"
    assert answer.seconds < 0.5


@families
@protocols
@pytest.mark.parametrize(
    ("verdict", "outcome"),
    [
        ("drop", "silent"),
        ("reject with icmpx port-unreachable", "refused"),
        ("reject with icmpx admin-prohibited", "unreachable"),
    ],
)
@pytest.mark.parametrize("place", [("node", "output"), ("client", "forward")], ids="-".join)
def test_drop_and_reject_are_distinguished(  # noqa: PLR0917 - pytest passes them by name
    world, place, verdict, outcome, protocol, family
):
    """Also on the node itself, where the kernel returns EPERM from send() for both."""
    asker, hook = place
    chain = f"inet test_world {hook}"
    world.run(
        "node",
        _nft,
        "add table inet test_world\n"
        f"add chain {chain} {{ type filter hook {hook} priority 0; }}\n"
        f"add rule {chain} meta l4proto {{ tcp, udp }} th dport 80 {verdict}",
    )
    try:
        address = world.hosts["pod-1"].address(family)
        answer = world.ask(asker, address, 80, protocol, timeout=0.3)
    finally:
        world.run("node", _nft, "delete table inet test_world")
    assert answer.outcome == outcome


@families
@protocols
def test_masquerading_takes_the_nodes_address(world, protocol, family):
    """Neither the pods' gateway address nor a service address that lo holds."""
    service = {socket.AF_INET: "203.0.113.11", socket.AF_INET6: "2001:db8::11"}[family]
    world.add_address("node", service)
    world.run(
        "node",
        _nft,
        "add table inet test_world\n"
        "add chain inet test_world c { type nat hook postrouting priority 100; }\n"
        "add rule inet test_world c masquerade",
    )
    try:
        for pod in ("pod-1", "remote-1"):
            answer = world.ask("client", world.hosts[pod].address(family), 80, protocol)
            assert answer.client == world.hosts["node"].address(family)
    finally:
        world.run("node", _nft, "delete table inet test_world")
        world.remove_address("node", service)


@families
@protocols
def test_a_question_is_sent_from_the_given_address_and_port(world, protocol, family):
    extra = {socket.AF_INET: "172.31.0.150/24", socket.AF_INET6: "fd00:172:31::150/64"}[family]
    address = extra.partition("/")[0]
    world.add_address("client", extra, interface="eth0")
    try:
        for _ in range(3):
            answer = world.ask(
                "client",
                world.hosts["node"].address(family),
                80,
                protocol,
                source_port=4242,
                source_address=address,
            )
            assert (answer.client, answer.client_port) == (address, 4242)
    finally:
        world.remove_address("client", extra, interface="eth0")


@protocols
@pytest.mark.parametrize("address", ["203.0.113.10", "2001:db8::10"])
@pytest.mark.parametrize("interface", ["lo", "eth0"])
def test_an_added_address_answers_from_itself_until_removed(world, address, interface, protocol):
    world.add_address("node", address, interface)
    try:
        for asker in ("client", "pod-1"):
            assert world.ask(asker, address, 80, protocol).server == "node"
    finally:
        world.remove_address("node", address, interface)
    assert world.ask("client", address, 80, protocol, timeout=0.2).outcome == "silent"


@families
@protocols
def test_a_closed_server_refuses(world, protocol, family):
    address = world.hosts["pod-2"].address(family)
    with world.serve("pod-2", 8080, protocol) as server:
        assert world.ask("client", address, 8080, protocol).server == "pod-2"
    server.close()
    assert world.ask("client", address, 8080, protocol).outcome == "refused"


@protocols
def test_a_server_on_one_address_leaves_the_others_alone(world, protocol):
    pod = world.hosts["pod-2"]
    with world.serve("pod-2", 8081, protocol, address=pod.ipv6):
        assert world.ask("client", pod.ipv6, 8081, protocol).server == "pod-2"
        assert world.ask("client", pod.ipv4, 8081, protocol).outcome == "refused"


def test_a_thousand_connections_are_quick_and_leave_nothing(world):
    address = world.hosts["pod-1"].ipv4
    started = time.monotonic()
    for _ in range(1000):
        assert world.ask("client", address, 80).outcome == "answered"
    assert time.monotonic() - started < 5
    for host in ("client", "pod-1"):
        assert " tw 0 " in world.run(host, Path("/proc/thread-self/net/sockstat").read_text)


def test_threads_may_ask_at_the_same_time(world):
    answers = []

    def ask_often(asker):
        for _ in range(50):
            answers.append(world.ask(asker, world.hosts["pod-2"].ipv6, 80).client)

    threads = [threading.Thread(target=ask_often, args=(asker,)) for asker in TALKERS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {asker: answers.count(world.hosts[asker].ipv6) for asker in TALKERS} == dict.fromkeys(
        TALKERS, 50
    )


def test_run_is_inside_and_the_caller_stays_where_it_is(world):
    before = _namespace_inode()
    inside = world.run("node", _namespace_inode)
    assert inside == os.stat(f"{netns.NETNS_RUN_DIR}/{world.namespace('node')}").st_ino
    assert inside != before
    assert _namespace_inode() == before


def test_run_raises_what_the_function_raises(world):
    with pytest.raises(ZeroDivisionError):
        world.run("node", lambda: 1 // 0)


def test_a_pyroute2_object_opens_the_namespace_by_its_name(world):
    with IPRoute(netns=world.namespace("node")) as iproute:
        assert iproute.link_lookup(ifname="vethpod1")


def test_a_process_runs_inside_and_dies_with_the_world():
    with World(pods=0, remotes=0, prefix="sliceproxy-test") as small:
        code = "import os, time; print(os.stat('/proc/self/ns/net').st_ino, flush=True)"
        process = small.popen(
            "node", [sys.executable, "-c", f"{code}; time.sleep(60)"], stdout=subprocess.PIPE
        )
        assert int(process.stdout.readline()) == small.run("node", _namespace_inode)
    assert process.poll() == -signal.SIGKILL
    process.stdout.close()


def test_a_host_that_does_not_exist_is_named(world):
    with pytest.raises(WorldError, match=r"no host 'pod-9'.*pod-1, pod-2"):
        world.ask("pod-9", "10.244.1.11", 80)


def test_a_world_that_is_not_built_says_so():
    with pytest.raises(WorldError, match="with statement"):
        World().socket("node", socket.AF_INET, socket.SOCK_STREAM)


def test_more_machines_and_pods_on_request():
    with (
        World(pods=5, remotes=1, outside={"visitor": 150}, prefix="sliceproxy-test") as bigger,
        bigger.serve("pod-5", 80),
    ):
        for family in BOTH_FAMILIES:
            answer = bigger.ask("visitor", bigger.hosts["pod-5"].address(family), 80)
            assert answer.client == bigger.hosts["visitor"].address(family)
        assert bigger.hosts["visitor"].ipv4 == "172.31.0.150"


def test_worlds_side_by_side_do_not_meet():
    with _small_world() as one, _small_world() as other, one.serve("client", 80):
        address = one.hosts["client"].ipv4
        assert one.ask("node", address, 80).server == "client"
        assert other.ask("node", address, 80).outcome == "refused"


def test_building_is_quick_and_cleanup_leaves_nothing(leaves_nothing):
    started = time.monotonic()
    with World(prefix="sliceproxy-test") as built:
        assert time.monotonic() - started < 2
        built.serve("node", 80)
        built.ask("client", built.hosts["node"].ipv4, 80)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("step", ["_make_namespace", "_build_pods"])
def test_a_building_that_breaks_off_leaves_nothing(leaves_nothing, monkeypatch, step, failure):
    finish, calls = getattr(World, step), itertools.count(1)

    def break_off_at_the_second(self, host):
        finish(self, host)
        if next(calls) == 2:
            raise failure

    monkeypatch.setattr(World, step, break_off_at_the_second)
    with pytest.raises(failure), World(prefix="sliceproxy-test"):
        pytest.fail("the world must not come up")


def test_an_error_inside_the_world_leaves_nothing(leaves_nothing):
    with pytest.raises(ZeroDivisionError), _small_world():
        _ = 1 // 0


def test_the_world_of_a_killed_process_is_removed_by_the_next(leaves_nothing):
    # A prefix of this test's own: the same test in another process would remove it first.
    prefix = f"sliceproxy-killed{os.getpid()}"
    code = (
        "import os, signal; from lab.world import World\n"
        f"World(pods=1, remotes=0, prefix={prefix!r}).__enter__()\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = Path(__file__).parents[2]
    killed = subprocess.Popen([sys.executable, "-c", code], cwd=root)
    assert killed.wait(timeout=30) == -signal.SIGKILL
    assert [name for name in netns.listnetns() if name.startswith(f"{prefix}-{killed.pid}-")]
    with World(pods=0, remotes=0, prefix=prefix):
        left = [name for name in netns.listnetns() if name.startswith(prefix)]
        assert left
        assert not [name for name in left if name.startswith(f"{prefix}-{killed.pid}-")]


def test_ctrl_c_at_any_moment_leaves_nothing():
    # A shell starts its background jobs with SIGINT ignored, and these would inherit that.
    code = (
        "import signal; from lab.world import World\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    with World(prefix='sliceproxy-test') as world:\n"
        "        world.serve('node', 80)\n"
        "        world.ask('client', '172.31.0.2', 80)\n"
    )
    root = Path(__file__).parents[2]
    for moment in range(10):
        with subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as interrupted:
            interrupted.stdout.readline()
            time.sleep(moment * 0.017)
            interrupted.send_signal(signal.SIGINT)
            try:
                _, error = interrupted.communicate(timeout=30)
            finally:
                interrupted.kill()
        assert b"KeyboardInterrupt" in error
        own = f"sliceproxy-test-{interrupted.pid}-"
        assert not [name for name in netns.listnetns() if name.startswith(own)]


def test_without_root_the_error_says_what_is_needed(leaves_nothing, monkeypatch):
    class _Unprivileged:
        def unshare(self, _flags):
            return -1

    monkeypatch.setattr("lab.namespaces._libc", _Unprivileged())
    monkeypatch.setattr("lab.namespaces.ctypes.get_errno", lambda: errno.EPERM)
    with pytest.raises(PermissionError, match="needs root"), _small_world():
        pytest.fail("the world must not come up")


@pytest.fixture
def leaves_nothing() -> Iterator[None]:
    """Fails a test that leaves a namespace, an interface, a thread or a descriptor."""
    before = _left_in_this_process()
    yield
    assert _left_in_this_process() == before


def _left_in_this_process():
    own = f"sliceproxy-test-{os.getpid()}-"
    return (
        sorted(name for name in netns.listnetns() if name.startswith(own)),
        socket.if_nameindex(),
        threading.active_count(),
        sorted(os.listdir("/proc/self/fd")),
    )


def _nft(commands: str) -> None:
    """Run nft commands in the namespace of the calling thread."""
    nftables = pytest.importorskip("nftables")
    code, _, error = nftables.Nftables().cmd(commands)
    assert code == 0, error


def _small_world() -> World:
    return World(pods=0, remotes=0, prefix="sliceproxy-test")


def _namespace_inode() -> int:
    return os.stat("/proc/thread-self/ns/net").st_ino


def _counter(table: str, name: str) -> int:
    """A counter of /proc/net/snmp (a line of names, a line of values) or snmp6 (one a line)."""
    lines = Path(f"/proc/thread-self/net/{table}").read_text().splitlines()
    if table == "snmp6":
        return int(dict(line.split() for line in lines)[name])
    return int(dict(zip(lines[0].split(), lines[1].split(), strict=True))[name])
