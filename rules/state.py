"""What the agent knows and what it has programmed: the only mutable state.

Events change what is known and mark Services as dirty; `step` programs the dirty ones and returns
the one transaction that leads there. Nothing is proportional to the cluster on that way, but for
changes of the node itself (its addresses, its zone), which may concern every Service.

Three things are shared between Services and therefore kept here:

- *claims*: a key of a verdict map that several Services want belongs to the oldest of them;
- *counts* of elements that several Services want alike (cluster IPs, hairpins);
- the *layouts*: which session affinity timeouts are in use, and whether source ranges are, decides
  which rules exist.

`step` believes that the kernel has what the last transactions gave it. `resync` does not: it takes
what was read back, keeps the slots found there, and returns the difference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import NamedTuple, TypeVar

from rules.diff import (
    Change,
    Elements,
    Installed,
    Lists,
    advance,
    between,
    collected,
    elements,
    install,
    lists_of,
    note_served,
    restored,
)
from rules.events import Delete, Event, NodeAddresses, Synced, Upsert
from rules.frontends import FAMILY_OF_LENGTH
from rules.health_check import HealthCheck, health_check
from rules.language import Set, Table
from rules.objects import (
    Address,
    EndpointSlice,
    Name,
    Network,
    Node,
    Object,
    Service,
    ServiceCIDR,
)
from rules.options import DetectLocalMode, Options, in_networks
from rules.program import NOTHING, Claim, Owned, Program, Surroundings, no_local_endpoints, program
from rules.selection import NodeLocation, service_is_ours, slice_is_ours
from rules.stale_flows import Flow, Serving, is_stale, is_udp
from rules.tables import FAMILIES, SETS, Layout, PodInterface, build
from rules.text import Key, Value
from rules.transaction import Known, TableChange, Transaction, table_change

_Used = TypeVar("_Used", bound=Hashable)
_NOWHERE = Lists()


class Notice(NamedTuple):
    """Something an operator would act on: a log line's event, its subject, and the rest."""

    event: str
    subject: str
    detail: str


class KernelView(NamedTuple):
    """What was read back of one table: what its rules are known to be, and its elements."""

    known: Known
    elements: Elements


class State:
    """See the module."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.services: dict[Name, Service] = {}
        self.slices: dict[Name, tuple[EndpointSlice, ...]] = {}
        self.node: Node | None = None
        self.service_cidrs: dict[str, ServiceCIDR] = {}
        self.addresses = NodeAddresses(frozenset(), ())
        self.programs: dict[Name, Program] = {}
        self.installed: dict[Claim, Installed] = {}
        self.notices: list[Notice] = []
        self.health_checks: dict[Name, HealthCheck] = {}
        self.lacking: Counter[tuple[int, str]] = Counter()
        self.node_leaving = False
        self.element_counts: Mapping[Set, int] = {}
        """How many elements each set should have after the last `resync`."""
        self._slice_owner: dict[Name, Name] = {}
        self._claimants: dict[Claim, tuple[Name, ...]] = {}
        self._rivals: dict[Claim, tuple[Name, frozenset[Name]]] = {}  # as they were told
        self._dirty: set[Name] = set()
        self._counts: Counter[Owned] = Counter()
        self._affinity: Counter[tuple[int, int]] = Counter()
        self._guarded: Counter[int] = Counter()
        self._node_elements: frozenset[Owned] = frozenset()
        self._around = Surroundings(NodeLocation(options.node, options.zone))
        self._tables: dict[int, Table] = {}

    # what is known

    def apply(self, events: Iterable[Event]) -> None:
        """Takes in events. What is wrong with single values of objects goes to `notices`."""
        for event in events:
            match event:
                case Upsert(new):
                    self._upsert(new)
                case Delete(kind, name):
                    self._delete(kind, name)
                case NodeAddresses():
                    self.addresses = event
                case Synced():
                    pass

    def _upsert(self, new: Object) -> None:
        match new:
            case Service():
                if self.services.get(new.name) == new:
                    return
                self.services[new.name] = new
                self._dirty.add(new.name)
            case EndpointSlice():
                if new.service is None:  # it may have had the label until now
                    self._drop_slice(new.name)
                    return
                if new in self.slices.get(new.service, ()):
                    return
                self._drop_slice(new.name)
                siblings = (*self.slices.get(new.service, ()), new)
                if len(siblings) > 1:
                    siblings = tuple(sorted(siblings, key=lambda s: s.name))
                self.slices[new.service] = siblings
                self._slice_owner[new.name] = new.service
                self._dirty.add(new.service)
            case Node():
                if new.name != self.options.node or new == self.node:
                    return
                self.node = new
                self.node_leaving = new.leaving
            case ServiceCIDR():
                if self.service_cidrs.get(new.name) == new:
                    return
                self.service_cidrs[new.name] = new
        for problem in new.problems:
            self.notices.append(Notice("object has a problem", _subject(new), problem))

    def _delete(self, kind: type[Object], name: Name | str) -> None:
        if kind is Service and isinstance(name, Name):
            if self.services.pop(name, None):
                self._dirty.add(name)
        elif kind is EndpointSlice and isinstance(name, Name):
            self._drop_slice(name)
        elif kind is Node:
            if name == self.options.node:
                self.node = None
                self.node_leaving = True
        elif kind is ServiceCIDR and isinstance(name, str):
            self.service_cidrs.pop(name, None)

    def _drop_slice(self, name: Name) -> None:
        owner = self._slice_owner.pop(name, None)
        if owner is None:
            return
        self._dirty.add(owner)
        siblings = tuple(s for s in self.slices[owner] if s.name != name)
        if siblings:
            self.slices[owner] = siblings
        else:
            del self.slices[owner]

    def slices_of(self, service: Name) -> list[EndpointSlice]:
        """The slices of a Service that are ours to proxy, ordered by name."""
        return [s for s in self.slices.get(service, ()) if slice_is_ours(s)]

    # the node

    def surroundings(self) -> Surroundings:
        """What every Service's program depends on."""
        zone = self.options.zone or (self.node.zone if self.node else "")
        tells = frozenset(f for f in FAMILIES if self._pods(f) is not None)
        return Surroundings(
            NodeLocation(self.options.node, zone),
            self._primary(),
            self.options.masquerade_all,
            tells,
            self.options.allow_external_ips,
        )

    def _primary(self) -> tuple[Address, ...]:
        """The node's primary address per family: as the options say, else its Node, its routes."""
        first: dict[int, Address] = {}
        declared = self.node.addresses if self.node else ()
        chosen = (self.options.address,) if self.options.address else ()
        for address in (*chosen, *declared, *self.addresses.primary):
            first.setdefault(len(address), address)
        return tuple(first.values())

    def _pods(self, family: int) -> bool | PodInterface | None:
        mode = self.options.detect_local
        if mode is DetectLocalMode.BRIDGE_INTERFACE:
            return PodInterface(self.options.interface, prefix=False)
        if mode is DetectLocalMode.INTERFACE_NAME_PREFIX:
            return PodInterface(self.options.interface, prefix=True)
        return True if any(n.version == family for n in self._pod_cidrs()) else None

    def _pod_cidrs(self) -> tuple[Network, ...]:
        if self.options.detect_local is DetectLocalMode.CLUSTER_CIDR:
            return self.options.cluster_cidrs
        if self.options.detect_local is DetectLocalMode.NODE_CIDR and self.node:
            return self.node.pod_cidrs
        return ()

    def _node_port_addresses(self) -> tuple[Address, ...]:
        primary, networks = self._primary(), self.options.node_port_networks
        first = primary if self.options.node_port_primary else ()
        own = self.addresses.addresses or frozenset(primary)
        return tuple(dict.fromkeys((*first, *(a for a in sorted(own) if in_networks(a, networks)))))

    def _wanted_of_node(self) -> Iterator[Owned]:
        for address in self._node_port_addresses():
            yield SETS[FAMILY_OF_LENGTH[len(address)]].nodeport_ips, address, None
        cidrs = [n for c in self.service_cidrs.values() for n in c.cidrs]
        for family, sets in SETS.items():
            yield from _ranges(sets.service_cidrs, (n for n in cidrs if n.version == family))
            yield from _ranges(
                sets.pod_cidrs, (n for n in self._pod_cidrs() if n.version == family)
            )

    # one transaction

    def step(self) -> Transaction:
        """The transaction that programs everything that has changed since the last one."""
        change = Change()
        for claim in self._reprogram_dirty(change):
            advance(claim, *self._install(claim), change)
        self._advance_node(change)
        return Transaction(tuple(self._advance_tables()), change)

    def resync(self, read: Callable[[Table], KernelView | None]) -> Transaction:
        """The transaction that makes the kernel right.

        `read` tells what the kernel has in place of a table, None for nothing. Slots and widths
        found there are kept where they are right.
        """
        first = not self.installed and not self._node_elements
        change = Change()
        touched = self._reprogram_dirty(change)
        self._advance_node(change)
        views = {t.family: view for t in self.tables() if (view := read(t)) is not None}
        if first and not views:  # nothing there and nothing known: the change is everything
            for claim in touched:
                advance(claim, *self._install(claim), change)
            self.element_counts = {owner: len(items) for owner, items in change.added.items()}
            return Transaction(tuple(self._advance_tables()), change)
        lists: dict[Claim, Lists] = {}
        for family, view in views.items():
            lists.update(restored(family, view.elements))
        shared: dict[tuple[Key, ...], tuple[Key, ...]] = {}  # equal slots, kept once
        for claim in {*self.installed, *touched}:
            there = lists.get(claim, _NOWHERE)
            slots, inside = (shared.setdefault(s, s) for s in (there.slots, there.inside))
            there = there._replace(slots=slots, inside=inside)
            note_served(claim, *self._install(claim, there), change)
        changes = []
        have: dict[Set, Mapping[Key, Value]] = {}
        for family in FAMILIES:
            table = build(self._layout(family))
            found = views.get(family)
            changed = table_change(table, found.known if found else None)
            self._tables[family] = table
            changes.append(changed)
            if found and not changed.create:
                have.update(found.elements)
        want = self.elements()
        self.element_counts = {owner: len(items) for owner, items in want.items()}
        difference = between(have, want)
        difference.stale_udp = self._served_formerly(lists, change)
        return Transaction(tuple(changes), difference)

    def _served_formerly(
        self, lists: Mapping[Claim, Lists], change: Change
    ) -> dict[Claim, Serving]:
        """What served the claims that have gone: as the kernel says, and as was known so far."""
        served = {
            claim: frozenset((*there.slots, *there.inside))
            for claim, there in lists.items()
            if is_udp(claim) and claim not in self.installed
        }
        for claim, known in change.stale_udp.items():
            served[claim] = served.get(claim, frozenset()) | known
        return served

    def elements(self) -> dict[Set, dict[Key, Value]]:
        """Every element that the kernel should have after the last step."""
        return collected(self._all_elements())

    def _all_elements(self) -> Iterator[Owned]:
        yield from self._node_elements
        yield from self._counts
        for claim, installed in self.installed.items():
            yield from elements(claim, installed)

    def tables(self) -> list[Table]:
        """The tables as they are wanted now."""
        return [build(self._layout(family)) for family in FAMILIES]

    def _layout(self, family: int) -> Layout:
        seconds = sorted(s for f, s in self._affinity if f == family)
        pods, guarded = self._pods(family), family in self._guarded
        return Layout(family, self.options.mark, pods, tuple(seconds), guarded)

    def _advance_tables(self) -> Iterator[TableChange]:
        for family in FAMILIES:
            table, before = build(self._layout(family)), self._tables.get(family)
            if table is not before:
                yield table_change(table, Known.of(before) if before else None)
                self._tables[family] = table

    def _advance_node(self, change: Change) -> None:
        wanted = frozenset(self._wanted_of_node())
        for owner, key, value in self._node_elements - wanted:
            change.remove(owner, key, value)
        for owner, key, value in wanted - self._node_elements:
            change.add(owner, key, value)
        came = wanted - self._node_elements
        if any(owner is SETS[owner.family].nodeport_ips for owner, _, _ in came):
            self._look_at_node_ports(change)
        self._node_elements = wanted

    def _look_at_node_ports(self, change: Change) -> None:
        """Flows to an address that has begun to answer at node ports were never translated."""
        for claim in self.installed:
            if claim.verdicts is SETS[claim.verdicts.family].service_nodeports and is_udp(claim):
                change.stale_udp.setdefault(claim, frozenset())

    def _reprogram_dirty(self, change: Change) -> set[Claim]:
        """Computes the programs of dirty Services; adds to `change` what several share.

        Returns the claims whose outcome may be another now.
        """
        around = self.surroundings()
        if around != self._around:
            self._around = around
            self._dirty.update(self.services)
        touched: set[Claim] = set()
        counted: dict[Owned, bool] = {}
        for name in self._dirty:
            touched |= self._reprogram(name, counted)
        self._dirty.clear()
        for element, was_there in counted.items():
            if self._counts[element] <= 0:
                del self._counts[element]
            if was_there and element not in self._counts:
                change.remove(*element)
            elif not was_there and element in self._counts:
                change.add(*element)
        return touched

    def _reprogram(self, name: Name, counted: dict[Owned, bool]) -> set[Claim]:
        """Computes a Service's program; returns the claims whose outcome may be another now."""
        service = self.services.get(name)
        if service and not service_is_ours(service, self.options.proxy_name):
            service = None
        slices = self.slices_of(name) if service else []
        new = program(service, slices, self._around) if service else NOTHING
        old = self.programs.get(name, NOTHING)
        self._observe(name, service, slices, old, new)
        for element in {*new.shared} ^ {*old.shared}:
            counted.setdefault(element, self._counts[element] > 0)
            self._counts[element] += 1 if element in new.shared else -1
        _count(self._affinity, old.affinity, new.affinity)
        _count(self._guarded, old.guarded, new.guarded)
        if new is NOTHING:
            self.programs.pop(name, None)
        else:
            self.programs[name] = new
        touched = {
            claim
            for claim in {**old.wanted, **new.wanted}
            if old.wanted.get(claim) != new.wanted.get(claim)
        }
        for claim in touched:
            if (claim in old.wanted) != (claim in new.wanted):
                self._claim(claim, name, wants=claim in new.wanted)
        # a Service that was made anew is younger than before: others may win now
        return touched.union(c for c in new.wanted if len(self._claimants[c]) > 1)

    def _observe(
        self,
        name: Name,
        service: Service | None,
        slices: Iterable[EndpointSlice],
        old: Program,
        new: Program,
    ) -> None:
        """Keeps up what is told to load balancers and to metrics."""
        check = health_check(service, slices, self.options.node) if service else None
        if check:
            self.health_checks[name] = check
        else:
            self.health_checks.pop(name, None)
        for sign, program_ in ((-1, old), (1, new)):
            for family, policy, _, _ in no_local_endpoints(program_):
                self.lacking[family, policy] += sign

    def _claim(self, claim: Claim, name: Name, *, wants: bool) -> None:
        others = tuple(n for n in self._claimants.get(claim, ()) if n != name)
        claimants = (*others, name) if wants else others
        if claimants:
            self._claimants[claim] = claimants
        else:
            self._claimants.pop(claim, None)

    def holder(self, claim: Claim) -> Name | None:
        """The Service that has the claim: the oldest of those that want it."""
        claimants = self._claimants.get(claim, ())
        return min(claimants, key=lambda n: self.services[n].age, default=None)

    def _install(
        self, claim: Claim, there: Lists | None = None
    ) -> tuple[Installed | None, Installed | None]:
        """Gives the claim to its holder; returns what was installed before, and what is now.

        Slots are kept as they are `there`; None: as they were installed before.
        """
        holder = self.holder(claim)
        before, after = self.installed.get(claim), None
        if holder is None:
            self.installed.pop(claim, None)
        else:
            wanted = self.programs[holder].wanted[claim]
            after = install(wanted, lists_of(before) if there is None else there)
            self.installed[claim] = after
        self._note_rivals(claim, holder)
        return before, after

    def _note_rivals(self, claim: Claim, holder: Name | None) -> None:
        """One notice for each Service that lost the claim, when it does."""
        rivals = frozenset(self._claimants.get(claim, ())) - {holder}
        if not rivals:
            self._rivals.pop(claim, None)
        elif holder and self._rivals.get(claim) != (holder, rivals):
            self._rivals[claim] = (holder, rivals)
            wanted = self.programs[holder].wanted[claim]
            for rival in sorted(rivals):
                self.notices.append(
                    Notice(
                        "address is taken",
                        f"Service {rival}",
                        f"{wanted.frontend} belongs to Service {holder}, which is older",
                    )
                )

    def flow_is_stale(self, flow: Flow, formerly: Mapping[Claim, Serving]) -> bool:
        """Whether a UDP flow leads nowhere, as `rules.conntrack` has it. `formerly` is
        `Change.stale_udp` of the transaction that was applied last."""
        return is_stale(flow, self._serving, self._is_node_port_address, formerly)

    def _serving(self, claim: Claim) -> Serving | None:
        installed = self.installed.get(claim)
        return installed.wanted.serving if installed else None

    def _is_node_port_address(self, address: Address) -> bool:
        owner = SETS[FAMILY_OF_LENGTH[len(address)]].nodeport_ips
        return (owner, address, None) in self._node_elements

    def is_current(self, key: Key, value: Value) -> bool:
        """Whether what an affinity map remembers leads where this client would be sent today.

        `key` is client, original destination, protocol, port; `value` the target.
        """
        length = len(value) - 4 if isinstance(value, bytes) else 0
        sets = SETS[FAMILY_OF_LENGTH[length]]
        client, destination = key[:length], key[length:]
        installed = self.installed.get(Claim(sets.service_ips, destination))
        if installed is None and self._is_node_port_address(destination[:length]):
            installed = self.installed.get(Claim(sets.service_nodeports, destination[length:]))
        if installed is None or not installed.wanted.sticky:
            return False
        if installed.wanted.inside is not None and self._is_inside(client):
            return value in installed.inside
        return value in installed.slots

    def _is_inside(self, client: Address) -> bool:
        """Whether a client is this node or one of its pods, as far as its address tells.

        Where pods are told by interface, their CIDR and the endpoints on this node stand in. A pod
        that is taken for a stranger loses its stickiness sooner than it had to, no more.
        """
        if client in self.addresses.addresses or client in self._around.node_addresses:
            return True
        mode = self.options.detect_local
        if mode in (DetectLocalMode.BRIDGE_INTERFACE, DetectLocalMode.INTERFACE_NAME_PREFIX):
            hairpins = SETS[FAMILY_OF_LENGTH[len(client)]].hairpins
            cidrs = self.node.pod_cidrs if self.node else ()
            return in_networks(client, cidrs) or (hairpins, client * 2, None) in self._counts
        return in_networks(client, self._pod_cidrs())


def _count(counts: Counter[_Used], old: frozenset[_Used], new: frozenset[_Used]) -> None:
    """Counts what came and what went; what nobody has any more is not there."""
    for item in new ^ old:
        counts[item] += 1 if item in new else -1
        if counts[item] <= 0:
            del counts[item]


def _subject(item: Object) -> str:
    return f"{type(item).__name__} {item.name}"


def _ranges(owner: Set, networks: Iterable[Network]) -> Iterator[Owned]:
    """Networks as ranges that neither overlap nor touch, as the kernel's sets want them."""
    bounds = sorted((int(n.network_address), int(n.broadcast_address)) for n in networks)
    merged: list[tuple[int, int]] = []
    for low, high in bounds:
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    length = owner.key_length
    for low, high in merged:
        yield owner, low.to_bytes(length, "big"), high.to_bytes(length, "big")
