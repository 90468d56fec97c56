"""Runs the real agent, `sliceproxy run`, on a host of a World, and listens to its log."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from lab.world import Answer, World

PATIENCE = 20.0  # seconds until a test gives up waiting for something that should come


class Agent:
    """The agent as a child process. Use as a context manager; leaving it kills the process.

    `place` holds its manifests; without one, flags say where the API server is. `module` is what
    runs instead of the command line itself, `shell` what runs before it in the same process.
    """

    def __init__(
        self,
        world: World,
        place: Path | None,
        *flags: str,
        host: str = "node",
        module: str = "agent",
        shell: str = "",
    ) -> None:
        source = ("--from", str(place)) if place else ()
        self._shell = ("sh", "-c", f'{shell}; exec "$@"', "sh") if shell else ()
        self._arguments = (world, module, (*source, *flags), host)
        self.lines: list[dict[str, Any]] = []
        self._news = threading.Condition()
        self._start()

    def _start(self) -> None:
        world, module, flags, host = self._arguments
        command = [*self._shell, sys.executable, "-m", module, "run"]
        self.process: subprocess.Popen[str] = world.popen(
            host,
            [*command, "--node", "node-1", "--log-level", "debug", *flags],
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        self._reader = threading.Thread(target=self._read, args=(self.process,), daemon=True)
        self._reader.start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr
        for line in process.stderr:
            with self._news:
                try:
                    self.lines.append(json.loads(line))
                except ValueError:
                    self.lines.append({"event": "not JSON", "text": line})
                self._news.notify_all()

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def wait(self, event: str, since: int = 0, **fields: object) -> dict[str, Any]:
        """The first line at or after index `since` with this event and these fields."""
        deadline = time.monotonic() + PATIENCE
        with self._news:
            while True:
                for line in self.lines[since:]:
                    if line["event"] == event and fields.items() <= line.items():
                        return line
                left = deadline - time.monotonic()
                assert left > 0, (event, fields, self.lines[since:])
                self._news.wait(left)

    def kill(self) -> None:
        """SIGKILL, as a node's memory pressure would."""
        self.process.kill()
        self.process.wait()
        self._reader.join()

    def terminate(self) -> int:
        """SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(PATIENCE)
        self._reader.join()
        return code

    def restart(self) -> int:
        """Starts it again; returns the index of its first line."""
        first = len(self.lines)
        self._start()
        return first


def write(place: Path, *documents: dict[str, Any]) -> None:
    """Replaces a manifest file atomically."""
    scratch = place.with_suffix(".new")
    scratch.write_bytes(msgspec.json.encode({"kind": "List", "items": documents}))
    scratch.rename(place)


class Connections(threading.Thread):
    """Connects in a loop, all the while something else happens, and counts the outcomes.

    It pauses for some seconds between two connections. A connection whose first packet passed the
    rules untouched is never answered, as conntrack does not ask them again; one that is merely
    waiting for a busy machine is.
    """

    def __init__(
        self, world: World, host: str, address: str, port: int, *, pause: float = 0.0
    ) -> None:
        super().__init__(daemon=True)
        self._target = (world, host, address, port)
        self._pause = pause
        self._done = threading.Event()
        self.outcomes: Counter[str] = Counter()
        self.failed: list[Answer] = []

    def __enter__(self) -> Connections:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()

    def run(self) -> None:
        world, host, address, port = self._target
        while not self._done.wait(self._pause):
            answer = world.ask(host, address, port, timeout=PATIENCE)
            self.outcomes[answer.outcome] += 1
            if answer.outcome != "answered":
                self.failed.append(answer)
