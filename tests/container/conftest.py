"""The image, built from our Dockerfile, and a world whose node is a container's network namespace.

An engine's own networks are of no use here: the tests want a node with pods behind it and clients
in front of it, as `lab.world` builds them. So a first container of the image, the *holder*, does
nothing but hold a network namespace of its own, as a pod's sandbox does; the world is built around
that namespace; and the agent runs in further containers that join it. They come and go as pods of
a DaemonSet do, and the namespace stays.

Everything that is made here is taken away again: containers, images, the layers in between.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import docker
import pytest
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.models.containers import Container

from lab import namespaces
from lab.world import Host, World
from tests.confinement import CONFINED

ROOT = Path(__file__).parents[2]
TREE = ROOT / "build" / "trixie"
BASE = "debian:trixie-slim"
PATIENCE = 30.0
REVISION = "0" * 40


@pytest.fixture(scope="session")
def engine() -> Iterator[docker.DockerClient]:
    if os.geteuid() != 0:
        pytest.skip("needs root to wire a container's network namespace")
    try:
        client = docker.from_env(timeout=900)
        client.ping()
    except DockerException as error:
        pytest.skip(f"no container engine answers (tools/need-engine starts one): {error}")
    yield client
    client.close()


@pytest.fixture(scope="session")
def base(engine: docker.DockerClient) -> Iterator[str]:
    """The image that ours is built from: Debian's own if the engine has it or can get it, else
    one of the Debian 13 tree of tools/need-test-tools."""
    with suppress(ImageNotFound):
        engine.images.get(BASE)
        yield BASE
        return
    if not (TREE / "usr/bin/apt-get").exists():
        yield BASE  # the build gets it, or says why not
        return
    name = f"sliceproxy-test-base:{os.getpid()}"
    with tempfile.NamedTemporaryFile(suffix=".tar") as file:
        _write_base(Path(file.name))
        repository, tag = name.split(":")
        engine.api.import_image_from_file(file.name, repository=repository, tag=tag)
    yield name
    engine.images.remove(name)


def _write_base(file: Path) -> None:
    """The tree, without what tests and apt have left in it."""

    def chosen(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        left = (".nft", "/var/lib/apt/lists/", "/var/cache/apt/archives/")
        return None if any(part in f"{member.name}/" for part in left) else member

    with tarfile.open(file, "w") as tar:
        tar.add(TREE.resolve(), arcname=".", filter=chosen)


def _build_arguments(base: str) -> dict[str, str]:
    """What this machine needs to build: the package index that its pip is configured for, and the
    certificates that it trusts beyond Debian's."""
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    index = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    certificates = sorted(Path("/usr/local/share/ca-certificates").glob("*.crt"))
    return {
        "BASE": base,
        "INDEX": index,
        "CERTIFICATES": "\n".join(file.read_text(encoding="ascii") for file in certificates),
        "REVISION": REVISION,
        "SOURCE_DATE_EPOCH": "1767225600",
    }


@pytest.fixture(scope="session")
def image(engine: docker.DockerClient, base: str) -> Iterator[str]:
    """The name of the image, as `docker build` makes it of the repository."""
    name = f"sliceproxy-test:{os.getpid()}"
    made: list[str] = []
    said: list[str] = []
    try:
        for line in engine.api.build(
            path=str(ROOT),
            tag=name,
            buildargs=_build_arguments(base),
            network_mode="host",
            rm=True,
            forcerm=True,
            decode=True,
        ):
            said.append(line.get("stream") or line.get("error") or "")
            made += re.findall(r"^ ---> ([0-9a-f]{12})\n", said[-1])
            assert "error" not in line, "".join(said[-40:])
        yield name
    finally:
        with suppress(ImageNotFound):
            engine.images.remove(name)
        for layer in reversed(made):  # stages and steps have no names
            with suppress(ImageNotFound, APIError):
                if not engine.images.get(layer).tags:
                    engine.images.remove(layer)


class ContainerWorld(World):
    """A World whose node has the network namespace of a process."""

    def __init__(self, pid: int, **how: Any) -> None:
        super().__init__(**how)
        self._pid = pid

    def _make_namespace(self, host: Host) -> None:
        if host.name != "node":
            super()._make_namespace(host)
            return

        def inside() -> None:
            theirs = os.open(f"/proc/{self._pid}/ns/net", os.O_RDONLY)
            try:
                namespaces.enter_namespace(theirs)
            finally:
                os.close(theirs)
            namespaces.write_sysctls(forwarding=True)
            namespaces.name_namespace(host.namespace)

        namespaces.in_fresh_thread(inside)
        path = namespaces.namespace_path(host.namespace)
        self._namespaces[host.name] = os.open(path, os.O_RDONLY)


class Node:
    """A node with pods, and containers of the image that run on it as a DaemonSet's would."""

    def __init__(self, engine: docker.DockerClient, image: str, holder: Container, world: World):
        self.engine = engine
        self.image = image
        self.world = world
        self._holder = holder
        self._containers: list[Container] = []

    def start(self, *arguments: str, **how: Any) -> Running:
        """Starts a container with these arguments for the image's entry point."""
        container = self.engine.containers.create(
            self.image,
            list(arguments),
            **{"network_mode": f"container:{self._holder.id}", **CONFINED, **how},
        )
        self._containers.append(container)
        container.start()
        return Running(container)

    def once(self, *arguments: str, **how: Any) -> tuple[int, str]:
        """Runs a container to its end; returns its exit code and what it said."""
        running = self.start(*arguments, **how)
        code = running.container.wait(timeout=PATIENCE)["StatusCode"]
        return int(code), running.container.logs().decode()

    def clear(self) -> None:
        """Takes away all containers and tables."""
        for container in self._containers:
            with suppress(NotFound):  # a test has removed it
                container.remove(force=True)
        self._containers.clear()
        code, said = self.once("cleanup")
        self._containers.pop().remove()
        assert code == 0, said


class Running:
    """A container that runs the agent."""

    def __init__(self, container: Container) -> None:
        self.container = container
        self._started = 0

    @property
    def pid(self) -> int:
        self.container.reload()
        return int(self.container.attrs["State"]["Pid"])

    def lines(self) -> list[dict[str, Any]]:
        """What the agent has logged since the container was started last."""
        said = []
        for line in self.container.logs().decode().splitlines()[self._started :]:
            try:
                said.append(json.loads(line))
            except ValueError:
                said.append({"event": line})
        return said

    def wait(self, event: str, after: int = 0) -> dict[str, Any]:
        """The first line with this event after so many others of its kind."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            found = [line for line in self.lines() if line["event"] == event]
            if len(found) > after:
                return found[after]
            time.sleep(0.05)
        raise AssertionError(event, self.lines())

    def stop(self) -> int:
        """As the kubelet does it: SIGTERM, and SIGKILL after some time. Returns the exit code."""
        self.container.stop(timeout=10)
        return int(self.container.wait()["StatusCode"])

    def start_again(self) -> None:
        self._started = len(self.container.logs().decode().splitlines())
        self.container.start()


@pytest.fixture(scope="session")
def _node(engine: docker.DockerClient, image: str) -> Iterator[Node]:
    with ExitStack() as stack:
        holder = engine.containers.create(
            image,
            entrypoint=["/usr/bin/python3", "-c", "import signal; signal.pause()"],
            network_mode="none",
            cap_drop=["ALL"],
            read_only=True,
        )
        stack.callback(partial(holder.remove, force=True))
        holder.start()
        holder.reload()
        pid = holder.attrs["State"]["Pid"]
        world = ContainerWorld(pid, pods=3, remotes=0, prefix="sliceproxy-container")
        stack.enter_context(world)
        for pod in ("pod-1", "pod-2"):
            world.serve(pod, 8080)
            world.serve(pod, 8080, "udp")
        yield Node(engine, image, holder, world)


@pytest.fixture
def node(_node: Node) -> Iterator[Node]:
    """A node on which nothing runs and no table is."""
    yield _node
    _node.clear()
