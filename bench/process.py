"""What is measured: a proxy as a process in a network namespace, and what is seen of it there."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from agent.kernel.tables import Kernel
from lab.world import World
from rules.target import packed_port

ROOT = Path(__file__).parent.parent
HOST = "node"

_SOL_NETLINK, _ADD_MEMBERSHIP, _RCVBUFFORCE, _NETFILTER, _NFTABLES = 270, 1, 33, 12, 7
_BUFFER = 1 << 30


class MeasureError(RuntimeError):
    """What was to be measured did not come about."""


def apply_nice() -> None:
    """Has `nice` count against other sessions' processes, too. With sched_autogroup the scheduler
    compares sessions first, and a process's nice value only within its session."""
    if os.nice(0):
        with suppress(OSError):  # the leader of a process group stays in its session
            os.setsid()
        with suppress(OSError):  # a kernel without autogroups
            Path("/proc/self/autogroup").write_text(str(os.nice(0)), encoding="ascii")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far, to the nanosecond (CPUCLOCK_SCHED)."""
    return time.clock_gettime((~pid << 3) | 2)


def memory_mib(pid: int) -> dict[str, float]:
    """VmHWM (the peak) and VmRSS of a process."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return {name: int(kib) / 1024 for name, kib in re.findall(r"(VmHWM|VmRSS):\s+(\d+) kB", text)}


class Process:
    """The agent of a checkout. `command` decides which program; sliceproxy's log lines are JSON."""

    def __init__(self, world: World, command: list[str], tree: Path = ROOT) -> None:
        self.lines: list[tuple[float, dict[str, Any]]] = []
        self._news = threading.Condition()
        environment = {k: v for k, v in os.environ.items() if k != "KUBECONFIG"}
        self.started = time.perf_counter()
        self.process: subprocess.Popen[str] = world.popen(
            HOST,
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tree,
            env={**environment, "HOME": "/nonexistent"},
        )
        self.pid = self.process.pid
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            at = time.perf_counter()
            try:
                content = json.loads(line)
            except ValueError:
                content = {"event": "text", "text": line.rstrip()}
            with self._news:
                self.lines.append((at, content))
                self._news.notify_all()

    def wait(self, *events: str, seconds: float = 120.0) -> tuple[float, dict[str, Any]]:
        """The first line with one of these events, and when it came."""

        def found() -> tuple[float, dict[str, Any]] | None:
            return next(((at, line) for at, line in self.lines if line["event"] in events), None)

        with self._news:
            result = self._news.wait_for(
                lambda: found() or self.process.poll() is not None, seconds
            )
        entry = found()
        if not result or entry is None:
            last = [line for _, line in self.lines[-5:]]
            raise MeasureError(f"no {' or '.join(events)} within {seconds:.0f} s; last: {last}")
        return entry

    def total(self, field: str) -> int:
        return sum(line.get(field, 0) for _, line in self.lines)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self._reader.join()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def agent_command(url: str, *flags: str) -> list[str]:
    command = [sys.executable, "-m", "agent", "run", "--server", url, "--node", "node-1"]
    return [*command, *flags]


def clear(world: World) -> None:
    """Removes the tables that an agent left."""

    def remove() -> None:
        with Kernel(own=False) as kernel:
            kernel.remove()

    world.run(HOST, remove)


class Listener:
    """Hears every notification of nf_tables in the namespace, as kube-proxy was measured."""

    def __init__(self, world: World) -> None:
        def make() -> socket.socket:
            made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETFILTER)
            made.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, _BUFFER)
            made.bind((0, 0))
            made.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _NFTABLES)
            return made

        self._socket = world.run(HOST, make)
        self._buffer = bytearray(1 << 21)

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def drain(self) -> None:
        """Forgets what has come."""
        self._socket.setblocking(False)
        try:
            while self._socket.recv_into(self._buffer):
                pass
        except BlockingIOError:
            pass
        finally:
            self._socket.setblocking(True)

    def wait_for(self, content: bytes, seconds: float = 60.0) -> float:
        """When a notification with these bytes came."""
        return self.wait_until(lambda data: content in data, seconds)

    def wait_for_count(self, pattern: re.Pattern[bytes], count: int, seconds: float) -> float:
        """When so many matches had come in all notifications."""
        seen = 0

        def enough(data: bytes) -> bool:
            nonlocal seen
            seen += len(pattern.findall(data))
            return seen >= count

        return self.wait_until(enough, seconds)

    def wait_for_all(self, pattern: re.Pattern[bytes], heard: list[float], seconds: float) -> None:
        """Notes for each number in a match (its group) when the first notification with it came."""
        left = len(heard)

        def enough(data: bytes) -> bool:
            nonlocal left
            for match in pattern.finditer(data):
                number = int.from_bytes(match[1])
                if number < len(heard) and not heard[number]:
                    heard[number] = time.perf_counter()
                    left -= 1
            return not left

        self.wait_until(enough, seconds)

    def wait_until(self, enough: Callable[[bytes], bool], seconds: float) -> float:
        deadline = time.monotonic() + seconds
        self._socket.settimeout(seconds)
        while True:
            try:
                length = self._socket.recv_into(self._buffer)
            except TimeoutError:
                raise MeasureError(f"nf_tables was silent for {seconds:.0f} s") from None
            at = time.perf_counter()
            if enough(bytes(memoryview(self._buffer)[:length])):
                return at
            if time.monotonic() > deadline:
                raise MeasureError(f"the notification did not come within {seconds:.0f} s")


def data_pattern(octet: int, port: int) -> re.Pattern[bytes]:
    """An IPv4 target octet.x.x.x:port as the data of an element; the group is x.x.x."""
    behind = packed_port(port)
    head = b"\x0c\0\1\0" + bytes((octet,))
    return re.compile(re.escape(head) + b"(...)" + re.escape(behind), re.DOTALL)


def versions() -> Mapping[str, str]:
    from importlib.metadata import version

    names = ("msgspec", "urllib3", "kubernetes", "pyroute2", "structlog")
    return {name: version(name) for name in names}
