"""`sliceproxy demo`: it plays to its end, it notices what is wrong, it leaves nothing behind."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pyroute2 import netns

from lab import demo, questions, stage
from lab.demo import DemoError
from lab.questions import Question
from lab.stage import Interrupted, Interrupts

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make namespaces")

LONGEST = 60
"""Seconds; the demo takes about 5 on an idle machine."""


@contextmanager
def playing(
    tmp_path: Path, *before: str, new_session: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """The demo as a process that keeps its files in tmp_path; fails if it leaves anything."""
    with subprocess.Popen(
        [*before, sys.executable, "-m", "agent", "demo", "--plain"],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=new_session,
    ) as process:
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            left = namespaces_of(process.pid), processes_in(tmp_path), os.listdir(tmp_path)
    assert left == ([], [], [])


def namespaces_of(pid: int) -> list[str]:
    return [name for name in netns.listnetns() if name.startswith(f"sliceproxy-demo-{pid}-")]


def processes_in(directory: Path) -> list[int]:
    """Processes that have the directory in their command line, as the demo's children do."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if os.fsencode(directory) in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


def read_until(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout
    for line in process.stdout:
        if text in line:
            return
    assert process.stderr
    pytest.fail(f"the demo ended without {text!r}: {process.stderr.read()}")


def test_plays_to_its_end(tmp_path):
    with playing(tmp_path) as process:
        output, errors = process.communicate(timeout=LONGEST)
    assert (process.returncode, errors) == (0, "")
    lines = output.splitlines()
    assert lines[-1].startswith("Try next: ")
    assert max(map(len, lines)) <= 100
    assert re.fullmatch(r"[\n -~]*", output), "control codes, or not ASCII"
    assert "wrote 0 elements" in " ".join(output.split())


MOMENTS = ["A cluster of", "Which pods answer", "Why? `explain`", "6. kill -9"]
"""Lines behind which the agent starts, connections run, a command runs, all of that does."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", MOMENTS)
def test_interrupted_it_leaves_nothing(tmp_path, number, moment):
    with playing(tmp_path) as process:
        read_until(process, moment)
        process.send_signal(number)
        _, errors = process.communicate(timeout=LONGEST)
    assert process.returncode == 128 + number
    assert errors == "sliceproxy: interrupted; all namespaces of the demo were removed\n"


@pytest.mark.parametrize("seconds", [0.1, 0.2, 0.3, 0.4, 0.5])
def test_interrupted_while_it_is_built_it_leaves_nothing(tmp_path, seconds):
    with playing(tmp_path) as process:
        time.sleep(seconds)
        process.terminate()
        process.communicate(timeout=LONGEST)
    assert process.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM)


def test_interrupted_in_the_background_of_a_script(tmp_path):
    """There SIGINT is ignored at first."""
    with playing(tmp_path, "sh", "-c", 'trap "" INT; exec "$@"', "sh") as process:
        read_until(process, "Which pods answer")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=LONGEST)
    assert process.returncode == 128 + signal.SIGINT


def test_an_impatient_ctrl_c_changes_nothing(tmp_path):
    """A terminal signals the whole process group, here again and again."""
    with playing(tmp_path, new_session=True) as process:
        read_until(process, "Which pods answer")
        while process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.005)
        _, errors = process.communicate(timeout=LONGEST)
    # the last of them may find an interpreter that has ended all but itself
    assert process.returncode in (128 + signal.SIGINT, -signal.SIGINT)
    assert "Traceback" not in errors


def test_a_reader_that_leaves(tmp_path):
    with playing(tmp_path) as process:
        read_until(process, "Which pods answer")
        process.stdout.close()
        assert process.wait(LONGEST) != 0


def test_an_agent_that_dies_is_an_error(tmp_path):
    with playing(tmp_path) as process:
        read_until(process, "Which pods answer")
        (agent,) = processes_in(tmp_path)
        os.kill(agent, signal.SIGKILL)
        _, errors = process.communicate(timeout=LONGEST)
    assert process.returncode == 2
    assert errors.startswith("sliceproxy: the agent ended (SIGKILL)")


def test_without_root_it_says_what_is_needed(monkeypatch):
    class _Unprivileged:
        def unshare(self, _flags):
            return -1

    monkeypatch.setattr("lab.namespaces._libc", _Unprivileged())
    monkeypatch.setattr("lab.namespaces.ctypes.get_errno", lambda: errno.EPERM)
    with pytest.raises(DemoError, match=r"^the demo needs root .*: sudo sliceproxy demo$"):
        demo.run(plain=True)


# --- what is wrong is noticed -------------------------------------------------------------------

WEB = Question("pod", questions.WEB_4, 80, pods=questions.WEB)
LIES = {
    r"web-1.* answered, but announced was web-2, web-3, web-4, web-5$": {"pods": questions.WEB[1:]},
    r"answered, but announced was web-1, .*, web-6$": {"pods": (*questions.WEB, "web-6")},
    r"announced was always the same of": {"sticky": True},
    r"the pods see 172\.31\.0\.2, but they saw 10\.244\.1\.16$": {"sees": "node"},
    r"announced was refused, but it was: 20 answered$": {"outcome": "refused"},
    r"announced was silent, but it was: 3 answered$": {"outcome": "silent"},
    r"announced was answered, but it was: 100 refused$": {"port": 81},
}


@pytest.mark.parametrize("message", LIES)
def test_what_is_not_as_announced_is_an_error(monkeypatch, capsys, message):
    lie = dataclasses.replace(WEB, **LIES[message])
    monkeypatch.setattr(demo, "SERVICES", [("a lie", [WEB, lie])])
    with pytest.raises(DemoError, match=message):
        demo.run(plain=True)
    assert capsys.readouterr().out.rstrip().splitlines()[-1].startswith("pod "), "the evidence"
    assert namespaces_of(os.getpid()) == []


def test_a_change_that_is_not_programmed_is_an_error(monkeypatch):
    with Interrupts() as interrupts, stage.Stage(interrupts) as played:
        played.start_agent()
        monkeypatch.setattr(stage, "_PATIENCE", 0.5)
        with pytest.raises(DemoError, match=r"did not program the change within .* last line was"):
            played.edit("web.yaml", lambda _: None)


def test_missing_examples_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(stage, "_PACKAGE", tmp_path / "agent")
    with pytest.raises(DemoError, match=r"no examples in .*: run the demo from a checkout"):
        demo.run(plain=True)


# --- signals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_taken_note_of_and_raise_nothing_by_themselves(number):
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    with Interrupts() as interrupts:
        interrupts.check()
        interrupts.pause(0.01)
    assert signal.getsignal(number) is before[number]
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            assert interrupts.caught == number
            with pytest.raises(Interrupted):
                interrupts.check()
            with pytest.raises(Interrupted):
                interrupts.pause(60)
        os.kill(os.getpid(), number)  # while the process ends
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
