"""Modules that libraries import and the agent does not use: loaded when something asks for them.

Importing `kubernetes` imports pydantic, requests, a websocket client and more; structlog imports
rich; pyroute2 imports all that it has. With them the agent starts 0.3 s later and has 29 MB more
(*measured*), for the configuration and the connection pool of a client, lines of JSON, and the
messages of rtnetlink and conntrack.

A deferred module is in `sys.modules` and has its spec and its path, so it can be imported and so
can its submodules; its own code has not run. The first thing asked of it that it has not (PEP 562)
runs it, once, in the same module object. So nothing is missing, it only comes later. importlib's
LazyLoader does nearly that, but with it a second `import` loads the module.

`from module import name` asks at once. For a name that is not used before the importing module is
there, and then only called or asked for attributes, something stands in that loads the real one.

Whether a library bears that depends on its version; those in requirements.lock do (see
tests/unit/test_deferred.py), and with others `load` starts over without deferring anything.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def load(wanted: Sequence[str], deferred: Mapping[str, Sequence[str]]) -> None:
    """Imports `wanted`, without running the code of the modules in `deferred`.

    Parents come before their children there. The values are the names that `wanted` imports from
    them and uses only later. What has been imported before stays as it is. If it does not work
    out, all is imported as usual.
    """
    before = set(sys.modules)
    try:
        with ExitStack() as stack:
            for name, used in deferred.items():
                stack.enter_context(_deferred(name, used))
            for name in wanted:
                import_module(name)
    except Exception:  # the library is of another version, and what it says would mislead
        roots = {name.partition(".")[0] for name in deferred}
        for name in sys.modules.keys() - before:
            if name.partition(".")[0] in roots:
                del sys.modules[name]
        for name in wanted:
            import_module(name)


@contextmanager
def _deferred(name: str, used: Sequence[str]) -> Iterator[None]:
    """Defers a module, for good; its names have stand-ins as long as the context lasts."""
    if name not in sys.modules:
        _defer(name)
    names = vars(sys.modules[name])
    standing = {n: _Name(name, n) for n in used if n not in names}
    names.update(standing)
    try:
        yield
    finally:
        for wanted, stand_in in standing.items():
            if names.get(wanted) is stand_in:
                del names[wanted]


class _Name:
    """Stands for a class or a function; loads its module when it is used."""

    def __init__(self, module: str, name: str) -> None:
        self._module = module
        self._name = name

    def _real(self) -> Any:
        return getattr(import_module(self._module), self._name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._real()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real(), name)


def _defer(name: str) -> None:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(name)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    vars(module)["__getattr__"] = _Code(module, spec, spec.loader)
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


class _Code:
    """The code of a deferred module, which has not run. It is the module's `__getattr__`."""

    def __init__(self, module: ModuleType, spec: ModuleSpec, loader: Loader) -> None:
        self._module = module
        self._spec = spec
        self._loader = loader
        self._lock = threading.RLock()
        self._begun = False

    def __call__(self, name: str) -> Any:
        """What the module does not have, or not yet."""
        if name == "__path__":  # how an import finds out that this is no package
            raise AttributeError(name)
        submodule = f"{self._spec.name}.{name}"
        # parts of a package ask for each other in that way, before the whole could run
        if self._spec.submodule_search_locations and importlib.util.find_spec(submodule):
            return import_module(submodule)
        self._run()
        if vars(self._module).get("__getattr__") is self:  # it asks itself while it runs
            raise AttributeError(f"module {self._spec.name!r} has no attribute {name!r}")
        return getattr(self._module, name)

    def _run(self) -> None:
        """Runs it, unless it has or does; other threads wait for that."""
        with self._lock:
            if self._begun:
                return
            self._begun = True
            try:
                self._loader.exec_module(self._module)
            except BaseException:
                self._begun = False
                raise
            if vars(self._module).get("__getattr__") is self:  # it may have one of its own
                del vars(self._module)["__getattr__"]
