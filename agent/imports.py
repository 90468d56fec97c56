"""Imports the agent without the parts of libraries that it does not use.

Importing `kubernetes` imports pydantic, requests and a websocket client; `structlog` imports rich
and asyncio; `pyroute2` imports all that it has. docs/design/0007-imports.md has the milliseconds
and megabytes.

`lightly` is called once, by the command line, before anything else of the agent is imported. It
registers a `_Skipped` module for each name in SKIPPED: one with a spec and a path, so that it and
its submodules can be imported, whose own code does not run. All other imports are ordinary ones.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import threading
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

SKIPPED: dict[str, tuple[str, ...]] = {
    # packages of which the agent uses some modules
    "pyroute2": (),
    "prometheus_client": (),
    "kubernetes": (),
    "kubernetes.utils": (),
    "kubernetes.config": (),
    # for the tokens of the auth provider oidc
    "kubernetes.client": ("ApiClient",),
    "oauthlib.oauth2": (),
    "requests_oauthlib": ("OAuth2Session",),
    # for structlog's loggers with asynchronous methods
    "asyncio": (),
    # structlog's tracebacks for people
    "rich": (),
    "rich.console": ("Console",),
    "rich.pretty": (),
    "rich.traceback": ("Traceback",),
    # protobuf without its C library
    "google.protobuf.internal.python_message": (),
    # tempfile removes directories with it (3.13 names the function); it imports all compressions
    "shutil": ("rmtree",),
    # urllib3 looks up the version of its HTTP/2 library when one is wanted
    "importlib.metadata": ("version",),
}
"""By module, parents first: the names that others import from it and use only later, by a call."""

REEXPORTED = {("kubernetes.client", "Configuration"): "kubernetes.client.configuration"}
"""Names of skipped packages that are used at once, and the module that defines them."""


def lightly(name: str) -> ModuleType:
    """The module `name`, imported without running the code of the modules in SKIPPED.

    What has been imported before stays as it is. If that does not work with the installed version
    of a library, the module is imported in the ordinary way.
    """
    before = set(sys.modules)
    # From Python 3.12 on each log record asks asyncio for its task if asyncio is in sys.modules.
    vars(logging)["logAsyncioTasks"] = False
    try:
        for skipped, called in SKIPPED.items():
            _skip(skipped, called)
        return import_module(name)
    except Exception:  # of any kind, and its text would mislead
        roots = {n.partition(".")[0] for n in SKIPPED} | {"agent", "structlog", "urllib3"}
        for added in sys.modules.keys() - before:
            if added.partition(".")[0] in roots:
                del sys.modules[added]
        return import_module(name)


def _skip(name: str, called: tuple[str, ...]) -> None:
    spec = None if name in sys.modules else importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    module.__class__ = _Skipped
    vars(module).update(_lock=threading.RLock(), _running=False)
    vars(module).update({n: _Callable(name, n) for n in called})
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


class _Skipped(ModuleType):
    """A module whose code has not run. It runs when the module is asked for a name it lacks."""

    __spec__: ModuleSpec
    _lock: threading.RLock
    _running: bool

    def __getattr__(self, name: str) -> Any:
        if name == "__path__":  # how an import finds out that this is no package
            raise AttributeError(name)
        spec = self.__spec__
        # modules of a package ask it for each other, perhaps before its code could run
        if spec.submodule_search_locations and importlib.util.find_spec(f"{spec.name}.{name}"):
            return import_module(f"{spec.name}.{name}")
        if defining := REEXPORTED.get((spec.name, name)):
            return getattr(import_module(defining), name)
        self._run()
        if type(self) is _Skipped:  # the running code asks for its own names
            raise AttributeError(f"module {spec.name!r} has no attribute {name!r}")
        return getattr(self, name)

    def _run(self) -> None:
        """Runs the code, once; other threads wait for it. Then this is an ordinary module."""
        with self._lock:
            if self._running or type(self) is not _Skipped:
                return
            self._running = True
            stand_ins = {n: v for n, v in vars(self).items() if isinstance(v, _Callable)}
            for name in stand_ins:
                delattr(self, name)
            try:
                assert self.__spec__.loader
                self.__spec__.loader.exec_module(self)
                self.__class__ = ModuleType  # type: ignore[assignment]
            except BaseException:
                vars(self).update(stand_ins)
                raise
            finally:
                self._running = False


class _Callable:
    """Replaces a class or function of a skipped module, and runs the module when it is called."""

    def __init__(self, module: str, name: str) -> None:
        self._module = module
        self._name = name

    def _real(self) -> Any:
        module = import_module(self._module)
        if isinstance(module, _Skipped):
            module._run()
        return getattr(module, self._name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._real()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real(), name)
