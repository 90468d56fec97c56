"""The stage of `sliceproxy demo`: a World, the real agent on its node, and manifests to edit.

A `Stage` is a small cluster. Its state is a directory of manifests, a copy of the examples. Its
agent is a process, `sliceproxy run` in the namespace of the World's node, which follows that
directory. The stage does not sleep: it reads the agent's log from a pipe, which reports what is
programmed.

Everything is removed on every exit. A KeyboardInterrupt could be raised between any two steps, also
while the stage is built or removed, or inside a lock of the standard library that is then never
released. So signals raise nothing here: `Interrupts` records them, and the stage checks the record
before each long step and regularly while it waits.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import yaml
from pyroute2 import NetlinkError

from agent.kernel.tables import Kernel
from lab.world import Answer, World, WorldError
from rules.tables import FAMILIES

NODE = "node-1"
CLUSTER_CIDRS = "10.244.0.0/16,fd00:10:244::/48"
NODE_OPTIONS = ("--node", NODE, "--detect-local-mode", "ClusterCIDR")
POD_OPTIONS = ("--cluster-cidr", CLUSTER_CIDRS)

Documents = list[dict[str, Any]]
"""The objects of a manifest file, as YAML has them."""

_PACKAGE = Path(__file__).resolve().parent
_PODS, _REMOTES = 6, 8
_THREADS = 4
_LOOK = 0.05
"""Seconds between two checks for a signal, while waiting."""
_PATIENCE = 10.0
"""Seconds within which the agent must have logged something; far more than it takes."""


class DemoError(Exception):
    """Something is not as announced, or the demo cannot be played here; the text says what."""


@dataclass(frozen=True)
class Programmed:
    """A transaction, as the agent logged it."""

    event: str
    """"programmed", or "verified" where the kernel had everything already."""
    commands: tuple[str, ...]
    """What changed, as nft's commands."""
    elements: int
    """How many elements were written and removed."""
    ms: float
    """The agent's `ms`."""
    kernel_ms: float
    """The agent's `kernel_ms`; 0 if no transaction was sent."""
    end_to_end_ms: float
    """The time from the change of the manifests (or the agent's start) until its log said so."""


@dataclass(frozen=True)
class Ruleset:
    """The size of the kernel's tables, both families together."""

    rules: int
    chains: int
    elements: int


class Interrupted(Exception):
    """SIGINT or SIGTERM came."""


class Interrupts:
    """Records SIGINT and SIGTERM. Use it as a context manager, in the main thread."""

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.caught: int | None = None
        """The number of the last signal."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Also where SIGINT was ignored, as shells have it for their background jobs.
        self._before = {number: signal.signal(number, self._note) for number in self._SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        if self.caught is not None:
            return  # the process ends, and an impatient second signal changes nothing about that
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises Interrupted after a signal."""
        if self.caught is not None:
            raise Interrupted

    def pause(self, seconds: float) -> None:
        """Sleeps, and raises Interrupted soon after a signal."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, _LOOK))
            self.check()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.caught = number


class Stage:
    """See the module. Use it as a context manager; raises DemoError if it cannot be built."""

    world: World
    directory: Path
    """The manifests that the agent follows."""

    def __init__(self, interrupts: Interrupts) -> None:
        self.interrupts = interrupts
        self.asked = 0
        """How many connections have been opened."""
        self._exits = ExitStack()
        self._agent: _Agent | None = None

    def __enter__(self) -> Self:
        with ExitStack() as exits:
            directory = exits.enter_context(tempfile.TemporaryDirectory(prefix="sliceproxy-demo-"))
            self.directory = Path(directory)
            for example in sorted(examples().glob("*.yaml")):
                shutil.copy(example, self.directory)
            self.world = exits.enter_context(_World())
            self._pool = ThreadPoolExecutor(_THREADS)
            exits.callback(self._pool.shutdown, cancel_futures=True)
            self._serve()
            self._exits = exits.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._exits.close()

    def _serve(self) -> None:
        """Every pod listens, whether it is an endpoint or not."""
        for host in self.world.hosts.values():
            if host.machine:
                self.world.serve(host.name, 8080, "tcp")
                self.world.serve(host.name, 5353, "tcp")
                self.world.serve(host.name, 5353, "udp")

    # the agent

    def start_agent(self) -> Programmed:
        """Starts the agent and waits until it has programmed or verified the kernel's tables."""
        started = time.perf_counter()
        self._agent = _Agent(
            self._popen(
                *("run", "--from", str(self.directory), *NODE_OPTIONS, *POD_OPTIONS),
                *("--log-level", "debug"),
                stderr=subprocess.PIPE,
            ),
            self.interrupts,
        )
        return self._agent.wait_for_programmed(started)

    def kill_agent(self) -> None:
        """Ends the agent with SIGKILL, so that it cannot tidy up."""
        if self._agent is not None:
            self._agent.kill()
            self._agent = None

    def output_of(self, *arguments: str, columns: int) -> str:
        """What a sliceproxy command prints on the node. Raises DemoError if it fails."""
        plain = {"COLUMNS": str(columns), "NO_COLOR": "1", "TERM": "dumb"}
        process = self._popen(
            *arguments,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={k: v for k, v in os.environ.items() if k != "FORCE_COLOR"} | plain,
        )
        try:
            output = str(process.communicate(timeout=_PATIENCE)[0])
        except subprocess.TimeoutExpired as error:
            raise DemoError(f"`sliceproxy {arguments[0]}` does not end") from error
        if process.returncode:
            raise DemoError(f"`sliceproxy {arguments[0]}` failed: {output.strip()}")
        return output

    def _popen(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        # In a session of its own: Ctrl-C is for the demo alone, which ends its children. From the
        # directory of this very package, as -m looks there first.
        self.interrupts.check()
        return self.world.popen(
            "node",
            [sys.executable, "-m", "agent", *arguments],
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            start_new_session=True,
            cwd=_PACKAGE.parent,
            **options,
        )

    # changes

    def edit(self, name: str, change: Callable[[Documents], None]) -> Programmed:
        """Changes a manifest in place and waits until that is programmed."""
        documents = list(yaml.safe_load_all((self.directory / name).read_text()))
        change(documents)
        return self.write(name, yaml.safe_dump_all(documents, sort_keys=False))

    def write(self, name: str, text: str) -> Programmed:
        """Puts a manifest into place with one rename and waits until that is programmed."""
        draft = self.directory / f".{name}"  # hidden files are not read
        draft.write_text(text)
        return self._after(lambda: draft.rename(self.directory / name))

    def remove(self, name: str) -> Programmed:
        """Removes a manifest and waits until that is programmed."""
        return self._after((self.directory / name).unlink)

    def _after(self, change: Callable[[], object]) -> Programmed:
        if self._agent is None:
            raise DemoError("no agent is running")
        self._agent.expect_silence()
        started = time.perf_counter()
        change()
        return self._agent.wait_for_programmed(started)

    # what is to be seen

    def ask(self, *arguments: Any, times: int, **options: Any) -> list[Answer]:
        """So many times `World.ask`, some at once."""
        self.interrupts.check()
        self.asked += times
        question = self._question(*arguments, **options)
        return list(self._pool.map(lambda _: question(), range(times)))

    def ask_on(self, targets: Iterable[tuple[Any, ...]]) -> Stream:
        """Asks these, the arguments of `World.ask`, in turn, in the background."""
        return Stream(self, self._pool, [self._question(*target) for target in targets])

    def _question(self, *arguments: Any, **options: Any) -> Callable[[], Answer]:
        return lambda: self.world.ask(*arguments, **options)

    def ruleset(self) -> Ruleset:
        """What the kernel has, read back."""
        return self.world.run("node", _read_ruleset)


class Stream:
    """Connections opened one after the other in the background. Use it as a context manager."""

    def __init__(
        self,
        stage: Stage,
        pool: ThreadPoolExecutor,
        questions: Sequence[Callable[[], Answer]],
    ) -> None:
        self.answers: list[Answer] = []
        """The answers until the last `wait_for`; at the end, all of them."""
        self._stage = stage
        self._pool = pool
        self._questions = questions
        self._new: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._stop = threading.Event()

    def __enter__(self) -> Self:
        self._done = self._pool.submit(self._run)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._done.result()
        self._collect()
        self._stage.asked += len(self.answers)

    def wait_for(self, count: int) -> int:
        """Waits for so many further connections; returns how many there have been then."""
        self._collect()
        wanted = len(self.answers) + count
        deadline = time.monotonic() + _PATIENCE
        while len(self.answers) < wanted:
            if time.monotonic() > deadline:
                raise DemoError(f"there were not {count} connections in {_PATIENCE:.0f} seconds")
            self._stage.interrupts.pause(_LOOK)
            self._collect()
        return len(self.answers)

    def _collect(self) -> None:
        with suppress(queue.Empty):
            while True:
                self.answers.append(self._new.get_nowait())

    def _run(self) -> None:
        while not self._stop.is_set():
            for question in self._questions:
                self._new.put(question())


class _Agent:
    """The process, and what it logs: JSON, one line an event, on its standard error."""

    def __init__(self, process: subprocess.Popen[str], interrupts: Interrupts) -> None:
        self._process = process
        self._interrupts = interrupts
        self._lines: queue.SimpleQueue[tuple[float, str] | None] = queue.SimpleQueue()
        self._last = ""
        threading.Thread(target=self._read, name="agent's log", daemon=True).start()

    def _read(self) -> None:
        if self._process.stderr is not None:
            with self._process.stderr as lines:
                for line in lines:
                    self._lines.put((time.perf_counter(), line))
        self._lines.put(None)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def expect_silence(self) -> None:
        """Raises DemoError if the agent has changed something unasked, or has ended."""
        while not self._lines.empty():
            _, entry = self._next(0)
            if entry.get("event") == "programmed":
                raise DemoError(
                    f"the agent programmed something although no manifest changed: {entry}"
                )

    def wait_for_programmed(self, started: float) -> Programmed:
        """The next transaction; `started` is when its cause was, by time.perf_counter."""
        deadline = time.perf_counter() + _PATIENCE
        commands = []
        while True:
            at, entry = self._next(deadline - time.perf_counter())
            if entry["event"] == "change":
                commands.append(entry["command"])
            elif entry["event"] in ("programmed", "verified"):
                return Programmed(
                    entry["event"],
                    tuple(commands),
                    entry["added"] + entry["removed"],
                    entry["ms"],
                    entry.get("kernel_ms", 0.0),
                    (at - started) * 1e3,
                )

    def _next(self, patience: float) -> tuple[float, dict[str, Any]]:
        """The next event of the log, and when it came. Raises DemoError for one that is bad."""
        deadline = time.perf_counter() + patience
        while True:
            item = self._next_line(deadline)
            if item is None:
                code = self._process.wait()
                raise DemoError(
                    f"the agent ended ({_ending_text(code)}): {self._last or 'it logged nothing'}"
                )
            at, line = item
            self._last = line.strip() or self._last
            entry = _entry(line)
            if entry.get("level") in ("error", "critical"):
                raise DemoError(f"the agent reports {entry['event']}: {entry.get('error', line)}")
            if entry:
                return at, entry

    def _next_line(self, deadline: float) -> tuple[float, str] | None:
        while True:
            self._interrupts.check()
            left = deadline - time.perf_counter()
            with suppress(queue.Empty):
                return self._lines.get(timeout=min(_LOOK, max(0.0, left)))
            if left <= 0:
                raise DemoError(
                    f"the agent did not program the change within {_PATIENCE:.0f} seconds; "
                    f"its last line was: {self._last or 'none'}"
                )


def _entry(line: str) -> dict[str, Any]:
    """A line of the log; nothing for a line that is none, such as those of a traceback."""
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) and "event" in entry else {}


def _ending_text(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def examples() -> Path:
    """The directory of the examples, in the checkout that this package is part of."""
    directory = _PACKAGE.parent / "examples"
    if not (directory / "cluster.yaml").is_file():
        raise DemoError(f"no examples in {directory}: run the demo from a checkout of sliceproxy")
    return directory


class _World(World):
    """The demo's World; what makes it impossible is a DemoError."""

    def __init__(self) -> None:
        super().__init__(pods=_PODS, remotes=_REMOTES, prefix="sliceproxy-demo")

    def __enter__(self) -> Self:
        try:
            return super().__enter__()
        except WorldError as error:
            raise DemoError(str(error)) from error
        except PermissionError as error:
            raise DemoError(
                "the demo needs root to make network namespaces: sudo sliceproxy demo"
            ) from error
        except (OSError, NetlinkError) as error:
            raise DemoError(
                f"the network namespaces of the demo cannot be made: {error}. It needs root, and a "
                "kernel with network namespaces, veth and bridge"
            ) from error


def _read_ruleset() -> Ruleset:
    with Kernel(own=False) as kernel:
        found = [back for family in FAMILIES if (back := kernel.read_back(family))]
        return Ruleset(
            rules=sum(len(rules) for back in found for rules in back.table.rules.values()),
            chains=sum(len(back.table.chains) for back in found),
            elements=sum(len(e) for back in found for e in back.elements.values()),
        )


def endpoints_of(documents: Documents, pod: str) -> Iterator[dict[str, Any]]:
    """The endpoints of a pod in all EndpointSlices of a manifest."""
    for document in documents:
        if document["kind"] == "EndpointSlice":
            yield from (e for e in document["endpoints"] if e["targetRef"]["name"] == pod)
