"""The elements of our tables as the kernel has them at this moment, read as they are looked up.

An explanation looks at some dozens of elements of hundreds of thousands. So elements of hash sets
are requested by key (NFT_MSG_GETSETELEM), each once, and only the sets of ranges and the node
ports' addresses, which are small, are read as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property

from agent.kernel.errors import KernelError
from agent.kernel.reading import TableReader
from rules.diff import Elements
from rules.language import Set
from rules.tables import FAMILIES, SETS
from rules.text import Element, Key, Value


class KernelElements(Mapping[Set, Mapping[Key, Value]]):
    """The sets that the kernel has of our tables. Look-ups raise KernelError."""

    def __init__(self, kernel: TableReader) -> None:
        self._kernel = kernel
        self._found: dict[Set, Mapping[Key, Value]] = {}

    def __getitem__(self, owner: Set) -> Mapping[Key, Value]:
        if owner not in self._found:
            if owner not in self._present:
                raise KeyError(owner)
            small = owner.interval or owner is SETS[owner.family].nodeport_ips
            of_set = self._kernel.elements if small else self._by_key
            self._found[owner] = of_set(owner)
        return self._found[owner]

    def __iter__(self) -> Iterator[Set]:
        return iter(self._present)

    def __len__(self) -> int:
        return len(self._present)

    @cached_property
    def _present(self) -> frozenset[Set]:
        sets = []
        for family in FAMILIES:
            names = self._kernel.set_names(family)
            known = SETS[family]
            every = (*known.always, *known.sticky, *known.by_endpoint)
            sets += [s for s in every if s.name in names]
        return frozenset(sets)

    def _by_key(self, owner: Set) -> Mapping[Key, Value]:
        return _ByKey(self._kernel, owner)


class _ByKey(Mapping[Key, Value]):
    """A set of which each element is read when it is looked up, and kept."""

    def __init__(self, kernel: TableReader, owner: Set) -> None:
        self._kernel = kernel
        self._owner = owner
        self._found: dict[Key, Element | None] = {}

    def __getitem__(self, key: Key) -> Value:
        if key not in self._found:
            self._found[key] = self._kernel.element(self._owner, key)
        element = self._found[key]
        if element is None:
            raise KeyError(key)
        return element[1]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._kernel.complete(self._owner))

    def __len__(self) -> int:
        return len(self._kernel.complete(self._owner))


@contextmanager
def kernel_elements() -> Iterator[Elements | None]:
    """The elements in this network namespace; None if it has none of our tables, or if they are
    not readable (without CAP_NET_ADMIN)."""
    try:
        kernel = TableReader()
    except KernelError:
        yield None
        return
    with kernel:
        found = KernelElements(kernel)
        try:
            readable = len(found) > 0
        except KernelError:
            readable = False
        yield found if readable else None
