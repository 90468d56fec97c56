"""Asks the agent on this node over its unix socket."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlencode

import click
import msgspec

from agent.cli.flags import FAILURE

SOCKET = "/run/sliceproxy/api.sock"
NO_AGENT = 3
"""The exit code where no agent answers."""
_SECONDS = 30.0

T = TypeVar("T")

socket_flag = click.option(
    "--socket",
    "socket_path",
    default=SOCKET,
    show_default=True,
    metavar="PATH",
    help="The agent's socket (--api-socket of `run`).",
)


class _Connection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Client:
    """The API of the agent that has the socket. Its methods end the command if it cannot answer."""

    def __init__(self, path: str = SOCKET) -> None:
        self._path = path

    def answers(self) -> bool:
        """Whether an agent listens at the socket."""
        connection = _Connection(self._path)
        try:
            connection.connect()
        except OSError:
            return False
        finally:
            connection.close()
        return True

    def get(self, path: str, kind: type[T], query: Mapping[str, object] | None = None) -> T:
        """The answer at a path, as a record."""
        return msgspec.json.decode(self.raw(path, query), type=kind)

    def find(self, path: str, kind: type[T]) -> T | None:
        """As `get`; None if the agent knows no such object."""
        status, body = self._ask(path)
        if status == http.HTTPStatus.NOT_FOUND:
            return None
        return msgspec.json.decode(self._checked(status, body), type=kind)

    def raw(self, path: str, query: Mapping[str, object] | None = None) -> bytes:
        """The answer at a path, as the agent's JSON."""
        given = {name: value for name, value in (query or {}).items() if value}
        return self._checked(*self._ask(path + ("?" + urlencode(given) if given else "")))

    def _ask(self, target: str) -> tuple[int, bytes]:
        """Status and body of the answer, whatever it is."""
        connection = _Connection(self._path)
        try:
            connection.request("GET", target)
            answer = connection.getresponse()
            body = answer.read()
        except PermissionError:
            self._fail("only root may ask; run it as root, or in the agent's container", FAILURE)
        except (FileNotFoundError, ConnectionRefusedError):
            self._fail(
                "no agent answers there; start it with --api-socket, name its socket with --socket,"
                " or give --from PATH for manifests",
                NO_AGENT,
            )
        except (OSError, http.client.HTTPException) as error:
            self._fail(f"{error or type(error).__name__}", FAILURE)
        finally:
            connection.close()
        return answer.status, body

    def _checked(self, status: int, body: bytes) -> bytes:
        if status != http.HTTPStatus.OK:
            self._fail(_error(body), FAILURE, named=False)
        return body

    def _fail(self, reason: str, code: int, *, named: bool = True) -> NoReturn:
        click.echo(f"sliceproxy: {self._path + ': ' if named else ''}{reason}", err=True)
        raise SystemExit(code)


def _error(body: bytes) -> str:
    try:
        found: Any = json.loads(body)
        return str(found["error"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace").strip() or "the agent gave no reason"
