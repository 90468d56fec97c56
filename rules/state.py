"""What the agent knows and what it has programmed: the only mutable state.

Events change what is known and mark Services as dirty; `step` programs the dirty ones and returns
the one transaction that leads there. Nothing on that path is proportional to the cluster, except
for changes of the node itself (its addresses, its zone), which may concern every Service.

Three things are shared between Services:

- *claims*: a key that several Services claim belongs to one of them (`rules.claims`);
- *counts* of elements that several Services have alike (cluster IPs, hairpins);
- the *layouts*: which session affinity timeouts are in use, and whether source ranges,
  source-hash and counters by endpoint are, decides which rules exist.

`step` relies on the kernel having what the last transactions wrote. `resync` does not: it takes
what was read back, keeps the slots found there, and returns the difference.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from functools import cached_property
from itertools import chain
from typing import NamedTuple, TypeVar

from rules.claims import Claims, why_lost
from rules.diff import (
    Change,
    Installed,
    Lists,
    Shared,
    advance,
    between,
    collected,
    elements,
    install,
    lists_of,
    note_served,
    restored,
)
from rules.events import ApiServers, Delete, Event, NodeAddresses, Synced, Upsert
from rules.feed import Feed
from rules.frontends import FAMILY_OF_LENGTH
from rules.health_check import HealthCheck, health_check
from rules.history import ObjectChange
from rules.language import Set, Table
from rules.lookup import Destination, claim_met
from rules.node import LocalNode
from rules.node_problems import NodeProblems
from rules.objects import (
    Address,
    EndpointSlice,
    Name,
    Node,
    Object,
    Service,
    ServiceCIDR,
)
from rules.options import Options
from rules.problems import (
    ADDRESS_CONFLICT,
    UNUSABLE_VALUE,
    Problems,
    Subject,
    listed,
    service_subject,
    subject_of,
)
from rules.program import (
    NOTHING,
    Claim,
    Program,
    SetElement,
    Surroundings,
    no_local_endpoints,
    program,
)
from rules.selection import service_is_ours, slice_is_ours
from rules.stale_flows import Serving, is_udp
from rules.tables import FAMILIES, SETS, Layout, build
from rules.target import address_of
from rules.text import CATCH_ALL, Key, Value
from rules.transaction import TableChange, TableContents, Transaction, table_change

_Used = TypeVar("_Used", bound=Hashable)
_NOWHERE = Lists()
PER_SERVICE = frozenset(("services", "slices", "programs", "installed"))
"""The attributes of a State that have an item for each Service, or for each address and port."""
MAX_CHANGES = 10_000
"""So many changes are kept while the kernel takes none."""


class KernelView(NamedTuple):
    """What was read back of one table: what its rules are known to be, and its elements, which
    `State.resync` takes out."""

    known: TableContents
    elements: Mapping[Set, dict[Key, Value]]


class State:
    """See the module."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.services: dict[Name, Service] = {}
        self.slices: dict[Name, tuple[EndpointSlice, ...]] = {}
        self.local = LocalNode(options)
        self.programs: dict[Name, Program] = {}
        self.claims = Claims(self.programs)
        self.installed: dict[Claim, Installed] = {}
        self.problems = Problems()
        self.health_checks: dict[Name, HealthCheck] = {}
        self.endpoint_edges: dict[Name, bool] = {}
        """Services that gained their first endpoint (true) or lost their last one; the reader
        clears it."""
        self.lacking: Counter[tuple[int, str]] = Counter()
        self.element_counts: Mapping[Set, int] = {}
        """How many elements each set should have after the last `resync`."""
        self.changes: list[ObjectChange] = []
        """The changes of Services and EndpointSlices since the source was complete; the reader
        clears it."""
        self._synced = False
        self._dirty: set[Name] = set()
        self._review: set[Name] = set()  # Services that may have lost an address, or got one back
        self._affinity: Counter[tuple[int, int]] = Counter()
        self._guarded: Counter[int] = Counter()
        self._hashed: Counter[int] = Counter()
        self._by_endpoint: Counter[int] = Counter()
        self._node_elements: frozenset[SetElement] = frozenset()
        self._unjudged: set[int] = set()  # families whose remembered clients may be stale
        self._lingering: set[SetElement] = set()  # hairpins that those clients may still need
        self._around = self.local.surroundings()
        self._node_problems = NodeProblems(self.local, self.problems)
        self.version = 0
        """Another number after each change of this state."""
        self._feeds: list[Feed] = []
        self._tables: dict[int, Table] = {}
        self._layouts_changed = True  # what `_layout` depends on may be another than at `_tables`

    @cached_property
    def _slice_owner(self) -> dict[Name, Name]:
        """The Service of each slice."""
        return {piece.name: owner for owner, pieces in self.slices.items() for piece in pieces}

    @cached_property
    def _counts(self) -> Counter[SetElement]:
        """How many Services have each of the elements that several may have alike."""
        return Counter(chain.from_iterable(p.shared for p in self.programs.values()))

    # what is known

    @property
    def stepped(self) -> bool:
        """Whether a first transaction was made; until then there are no programs."""
        return bool(self._tables)

    @property
    def node(self) -> Node | None:
        """This node's object with its last known addresses, zone and pod CIDRs."""
        return self.local.object

    @property
    def node_leaving(self) -> bool:
        """Whether the node is being deleted, or was."""
        return self.local.leaving

    @property
    def addresses(self) -> NodeAddresses:
        """The addresses of this machine's interfaces."""
        return self.local.addresses

    def surroundings(self) -> Surroundings:
        """What every Service's program depends on."""
        return self.local.surroundings()

    def apply(self, events: Iterable[Event]) -> None:
        """Takes in events. Unusable values of objects are listed in `problems`."""
        self.version += 1
        for event in events:
            match event:
                case Upsert(new):
                    self._upsert(new)
                case Delete(kind, name):
                    self._delete(kind, name)
                case NodeAddresses() | ApiServers():
                    self.local.apply(event)
                case Synced():
                    self._synced = True
                    self._node_problems.synced()

    def _upsert(self, new: Object) -> None:
        match new:
            case Service():
                known = self.services.get(new.name)
                if known == new:
                    return
                self._note_change(known, new)
                self.services[new.name] = new
                self._mark(new.name)
            case EndpointSlice():
                if new.service is None:  # it may have had the label until now
                    self._note_change(self._drop_slice(new.name), None)
                    return
                if new in self.slices.get(new.service, ()):
                    return
                self._note_change(self._drop_slice(new.name), new)
                siblings = (*self.slices.get(new.service, ()), new)
                if len(siblings) > 1:
                    siblings = tuple(sorted(siblings, key=lambda s: s.name))
                self.slices[new.service] = siblings
                self._slice_owner[new.name] = new.service
                self._mark(new.service)
            case Node():
                if not self.local.put(new):
                    return
            case ServiceCIDR():
                self.local.put_service_cidr(new)
        if new.problems or not self.problems.empty:  # a start has 88,000 objects without any
            self.problems.set(UNUSABLE_VALUE, subject_of(new), listed(new.problems))

    def _delete(self, kind: type[Object], name: Name | str) -> None:
        if kind is Service and isinstance(name, Name):
            if gone := self.services.pop(name, None):
                self._note_change(gone, None)
                self._mark(name)
        elif kind is EndpointSlice and isinstance(name, Name):
            self._note_change(self._drop_slice(name), None)
            return
        elif kind is Node and isinstance(name, str):
            if not self.local.delete(name):
                return
        elif kind is ServiceCIDR and isinstance(name, str):
            self.local.delete_service_cidr(name)
        subject = Subject(kind.__name__, str(name), str(name) if kind is Service else "")
        self.problems.gone(UNUSABLE_VALUE, subject)

    def _mark(self, name: Name) -> None:
        """A Service is to be programmed again."""
        self._dirty.add(name)
        if self._feeds:
            self._note((name,))

    def _note_change(
        self, before: Service | EndpointSlice | None, after: Service | EndpointSlice | None
    ) -> None:
        """Keeps a change for the history, unless it is part of the first complete lists."""
        if self._synced and (before or after) and len(self.changes) < MAX_CHANGES:
            self.changes.append(ObjectChange(before, after))

    def _drop_slice(self, name: Name) -> EndpointSlice | None:
        """Forgets a slice; returns what was known of it."""
        owner = self._slice_owner.pop(name, None)
        if owner is None:
            return None
        self._mark(owner)
        self.problems.gone(UNUSABLE_VALUE, Subject("EndpointSlice", str(name), str(owner)))
        gone = next(s for s in self.slices[owner] if s.name == name)
        siblings = tuple(s for s in self.slices[owner] if s is not gone)
        if siblings:
            self.slices[owner] = siblings
        else:
            del self.slices[owner]
        return gone

    def slices_of(self, service: Name) -> list[EndpointSlice]:
        """The slices of a Service that are ours to proxy, ordered by name."""
        return [s for s in self.slices.get(service, ()) if slice_is_ours(s)]

    def snapshot(self) -> State:
        """A copy of this state. Shallow: all values are immutable. Linear in the Services; readers
        in other threads have a `Mirror` instead."""
        twin = self.without_services()
        for name in PER_SERVICE:
            setattr(twin, name, getattr(self, name).copy())
        twin.claims = self.claims.snapshot(twin.programs)
        return twin

    def attach(self, feed: Feed) -> None:
        """Has all changes noted in the feed, to which everything is unread."""
        # a Service that is gone and still programmed is only in `_dirty`
        feed.attach(self._dirty, self.services.keys(), self.slices.keys(), *self.claims.all())
        self._feeds.append(feed)

    def without_services(self) -> State:
        """A copy of this state without Services and claims: what does not grow with them. What
        follows from them is computed where it is used (`_slice_owner`, `_counts`)."""
        twin = copy.copy(self)
        for derived in ("_slice_owner", "_counts"):
            vars(twin).pop(derived, None)
        for name, value in vars(twin).items():
            if isinstance(value, (dict, set)):
                setattr(twin, name, {} if name in PER_SERVICE else value.copy())
        twin.changes, twin._feeds = [], []
        twin.local = self.local.snapshot()
        twin.problems = self.problems.snapshot()
        twin.claims = self.claims.without_claims(twin.programs)
        twin._node_problems = NodeProblems(twin.local, twin.problems)
        return twin

    def _note(self, changed: Collection[Name] | Collection[Claim]) -> None:
        """Has readers read these again."""
        if self._feeds:
            self._feeds = [feed for feed in self._feeds if feed.note(changed)]

    # one transaction

    def step(self) -> Transaction:
        """The transaction that programs everything that has changed since the last one."""
        self.version += 1
        change, shared = Change(), Shared()
        for claim in self._reprogram_dirty(change):
            advance(claim, *self._install(claim, shared), change, shared)
        self._advance_node(change)
        if self._unjudged or change.stale_affinity or self._lingering:
            self._linger(change)
        return Transaction(self._advance_tables() if self._layouts_changed else (), change)

    def clients_judged(self) -> bool:
        """To be called when the affinity maps have been gone through since the last transaction:
        no client is remembered for an endpoint that was removed. Returns whether a step is due."""
        self._unjudged.clear()
        return bool(self._lingering)

    def _linger(self, change: Change) -> None:
        """Keeps hairpins of endpoints that were removed, until their clients are forgotten.

        A pod may be remembered as a client of itself. Until that is deleted from the affinity map,
        which takes reading all of it, its packets are sent to itself; without the hairpin they
        are not masqueraded, and it gets no answer.
        """
        self._unjudged |= change.stale_affinity
        for family in FAMILIES:
            owner = SETS[family].hairpins
            added = change.added.pop(owner, [])
            if new := [(k, v) for k, v in added if (owner, k, v) not in self._lingering]:
                change.added[owner] = new
            self._lingering.difference_update((owner, k, v) for k, v in added)
            if family in self._unjudged:
                removed = change.removed.pop(owner, [])
                self._lingering.update((owner, k, v) for k, v in removed)
        if not self._unjudged:
            for element in self._lingering:
                change.remove(*element)
            self._lingering.clear()

    def resync(self, read: Callable[[Table], KernelView | None]) -> Transaction:
        """The transaction that makes the kernel right.

        `read` returns what the kernel has in place of a table, None for nothing. Slots and widths
        found there are kept where they are right.
        """
        self.version += 1
        for feed in self._feeds:  # slots and widths of all may change
            feed.attached = False
        self._feeds = []
        first = not self.installed and not self._node_elements
        change, shared = Change(), Shared()
        touched = self._reprogram_dirty(change)
        self._advance_node(change)
        views = {t.family: view for t in self.tables() if (view := read(t)) is not None}
        if first and not views:  # nothing there and nothing known: the change is everything
            for claim in touched:
                advance(claim, *self._install(claim, shared), change, shared)
            self.element_counts = {owner: len(items) for owner, items in change.added.items()}
            return Transaction(self._advance_tables(), change)
        lists: dict[Claim, Lists] = {}
        for family, view in views.items():
            lists.update(restored(family, view.elements))
        alike: dict[tuple[Key, ...], tuple[Key, ...]] = {}  # equal slots, kept once
        for claim in {*self.installed, *touched}:
            there = lists.get(claim, _NOWHERE)
            slots, inside = (alike.setdefault(s, s) for s in (there.slots, there.inside))
            there = there._replace(slots=slots, inside=inside)
            note_served(claim, *self._install(claim, shared, there), change)
        changes = []
        have: dict[Set, dict[Key, Value]] = {}
        for family in FAMILIES:
            table = build(self._layout(family))
            found = views.get(family)
            changed = table_change(table, found.known if found else None)
            self._tables[family] = table
            changes.append(changed)
            if found and not changed.create:
                have.update((s, e) for s, e in found.elements.items() if s not in changed.replaced)
        self._linger_from(have, first=first)
        difference, self.element_counts = between(have, self._all_elements())
        difference.stale_udp = self._served_formerly(lists, change)
        return Transaction(tuple(changes), difference)

    def _linger_from(self, have: Mapping[Set, Mapping[Key, Value]], *, first: bool) -> None:
        """As `_linger`, by what the kernel has: after a start the hairpins that another run left,
        later those that lingered already."""
        self._unjudged = {family for family, _ in self._affinity}
        present: set[SetElement] = {
            (owner, key, None)
            for owner in (SETS[family].hairpins for family in self._unjudged)
            for key in have.get(owner, {})
            if first or (owner, key, None) in self._lingering
        }
        self._lingering = present - self._counts.keys()

    def _served_formerly(
        self, lists: Mapping[Claim, Lists], change: Change
    ) -> dict[Claim, Serving]:
        """What served the claims that are gone: according to the kernel, and as known so far."""
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

    def _all_elements(self) -> Iterator[SetElement]:
        yield from self._node_elements
        yield from self._counts
        yield from self._lingering
        for claim, installed in self.installed.items():
            yield from elements(claim, installed)

    def tables(self) -> list[Table]:
        """The desired tables."""
        return [build(self._layout(family)) for family in FAMILIES]

    def _layout(self, family: int) -> Layout:
        seconds = sorted(s for f, s in self._affinity if f == family)
        return Layout(
            family,
            self.options.mark,
            self.local.pods(family),
            tuple(seconds),
            guarded=family in self._guarded,
            counters=self.options.counters,
            hashed=family in self._hashed,
            by_endpoint=family in self._by_endpoint,
        )

    def _advance_tables(self) -> tuple[TableChange, ...]:
        changes = []
        for family in FAMILIES:
            table, before = build(self._layout(family)), self._tables.get(family)
            if table is not before:
                changes.append(table_change(table, TableContents.of(before) if before else None))
                self._tables[family] = table
        self._layouts_changed = False
        return tuple(changes)

    def _advance_node(self, change: Change) -> None:
        if not self.local.changed:
            self._node_problems.update()
            return
        self.local.changed = False
        self._node_problems.compare()
        self._node_problems.update()
        wanted = frozenset(self.local.elements())
        for owner, key, value in self._node_elements - wanted:
            change.remove(owner, key, value)
        added = wanted - self._node_elements
        for owner, key, value in added:
            change.add(owner, key, value)
        if any(owner is SETS[owner.family].nodeport_ips for owner, _, _ in added):
            self._look_at_node_ports(change)
        self._node_elements = wanted

    def _look_at_node_ports(self, change: Change) -> None:
        """Flows to an address at which node ports did not answer were never translated."""
        for claim in self.installed:
            if claim.verdicts is SETS[claim.verdicts.family].service_nodeports and is_udp(claim):
                change.stale_udp.setdefault(claim, frozenset())

    # the programs of Services

    def _reprogram_dirty(self, change: Change) -> set[Claim]:
        """Computes the programs of dirty Services; adds to `change` what several share.

        Returns the claims whose outcome may be another now.
        """
        touched: set[Claim] = set()
        if self.local.changed:
            self._layouts_changed = True
            around = self.local.surroundings()
            if around != self._around:
                self._around = around
                self._dirty.update(self.services)
            touched.update(self.claims.move_node_ports(self.local.node_port_addresses()))
            for moved in touched:
                self._review.update(self.claims.claimants(moved))
        counted: dict[SetElement, bool] = {}
        for name in self._dirty:
            touched |= self._reprogram(name, counted)
        if self._feeds:
            self._note(self._dirty)
            self._note(touched)
        self._dirty.clear()
        for element, was_there in counted.items():
            if self._counts[element] <= 0:
                del self._counts[element]
            if was_there and element not in self._counts:
                change.remove(*element)
                self._node_problems.shared_gone(element)
            elif not was_there and element in self._counts:
                change.add(*element)
                self._node_problems.shared_added(element)
        self._review_claims()
        return touched

    def _reprogram(self, name: Name, counted: dict[SetElement, bool]) -> set[Claim]:
        """Computes a Service's program; returns the claims whose outcome may be another now."""
        service = self.services.get(name)
        if service and not service_is_ours(service, self.options.proxy_name):
            service = None
        slices = self.slices_of(name) if service else []
        new = program(service, slices, self._around) if service else NOTHING
        old = self.programs.get(name, NOTHING)
        self._observe(name, service, slices, old, new)
        if old.shared != new.shared:
            old_shared, new_shared = {*old.shared}, {*new.shared}
            for element in new_shared ^ old_shared:
                counted.setdefault(element, self._counts[element] > 0)
                self._counts[element] += 1 if element in new_shared else -1
        if (old.affinity, old.guarded, old.hashed, old.by_endpoint) != (
            *(new.affinity, new.guarded, new.hashed, new.by_endpoint),
        ):
            _count(self._affinity, old.affinity, new.affinity)
            _count(self._guarded, old.guarded, new.guarded)
            _count(self._hashed, old.hashed, new.hashed)
            _count(self._by_endpoint, old.by_endpoint, new.by_endpoint)
            self._layouts_changed = True
        if new is NOTHING:
            self.programs.pop(name, None)
        else:
            self.programs[name] = new
        return self._advance_claims(name, old, new)

    def _advance_claims(self, name: Name, old: Program, new: Program) -> set[Claim]:
        """Makes and withdraws a Service's claims; returns those whose outcome may be another."""
        touched: set[Claim] = set()
        passed: list[Claim] = []
        for claim in old.wanted:
            if claim not in new.wanted:
                self._review.add(name)
                if self.claims.remove(claim, name):
                    passed.append(claim)
                self._note((claim,))
        for claim, wanted in new.wanted.items():
            before = old.wanted.get(claim)
            if before is None or self.claims.is_contested(claim):
                self._note((claim,))
            if (before is None or self.claims.is_contested(claim)) and self.claims.put(claim, name):
                passed.append(claim)
            elif before != wanted:
                holder = self.claims.holder(claim)
                if holder in (name, None):
                    touched.add(claim)
                if holder != name:
                    self._note_rivals(claim, name)
        for claim in passed:
            touched.add(claim)
            self._note_rivals(claim, name)
            for beside in self.claims.beside_node_port(claim):
                touched.add(beside)
                self._review.update(self.claims.claimants(beside))
        return touched

    def _note_rivals(self, claim: Claim, name: Name) -> None:
        """Has those looked at that may have lost the claim or got it back."""
        if self.claims.is_contested(claim) or self.claims.holder(claim) != name:
            self._review.add(name)
            self._review.update(self.claims.to_review(claim))

    def _review_claims(self) -> None:
        """Opens and closes the problems of Services that lost an address or got one back."""
        for name in self._review:
            wanted = self.programs.get(name, NOTHING).wanted
            reasons = (why_lost(w.frontend, self.claims, c, name) for c, w in wanted.items())
            lost = [reason for reason in reasons if reason]
            text = f"{listed(lost)}; remove the address from one of the Services" if lost else ""
            self.problems.set(ADDRESS_CONFLICT, service_subject(name), text)
        self._review.clear()

    def _observe(
        self,
        name: Name,
        service: Service | None,
        slices: Iterable[EndpointSlice],
        old: Program,
        new: Program,
    ) -> None:
        """Keeps up what load balancers, metrics and problems say of a Service."""
        check = health_check(service, slices, self.options.node) if service else None
        if check:
            self.health_checks[name] = check
        else:
            self.health_checks.pop(name, None)
        for sign, program_ in ((-1, old), (1, new)):
            if program_ is NOTHING:
                continue
            for family, policy, _, _ in no_local_endpoints(program_):
                self.lacking[family, policy] += sign
        served, serves = (any(w.endpoints for w in p.wanted.values()) for p in (old, new))
        if served != serves:
            self.endpoint_edges[name] = serves
        if old.problems != new.problems:
            for code, text in {
                **{code: "" for code, _ in old.problems},
                **dict(new.problems),
            }.items():
                self.problems.set(code, service_subject(name), text)

    # which Service has a key

    def holder(self, claim: Claim) -> Name | None:
        """The Service that has the key, None if it is no Service's or a node port's."""
        return self.claims.holder(claim)

    def _install(
        self, claim: Claim, shared: Shared, there: Lists | None = None
    ) -> tuple[Installed | None, Installed | None]:
        """Gives the claim to its holder; returns what was installed before, and what is now.

        Slots are kept as they are `there`; None: as they were installed before.
        """
        holder = self.claims.holder(claim)
        before, after = self.installed.get(claim), None
        if holder is None:
            self.installed.pop(claim, None)
        else:
            wanted = self.programs[holder].wanted[claim]
            if there is None:
                there = lists_of(before)
            elif there.slots == wanted.endpoints:  # as after a restart: one object for both
                there = there._replace(slots=wanted.endpoints)
            after = install(wanted, there, shared)
            self.installed[claim] = after
        return before, after

    # what the kernel remembers

    def is_node_port_address(self, address: Address) -> bool:
        """Whether node ports answer at this address."""
        owner = SETS[FAMILY_OF_LENGTH[len(address)]].nodeport_ips
        return (owner, address, None) in self._node_elements

    def udp_serving(self) -> dict[Claim, Serving]:
        """What serves each UDP claim. Linear in the claims: for a start and for repairs."""
        return {c: i.wanted.serving for c, i in self.installed.items() if is_udp(c)}

    def node_port_addresses(self) -> frozenset[Address]:
        """The addresses at which node ports answer."""
        owners = {sets.nodeport_ips for sets in SETS.values()}
        return frozenset(key for owner, key, _ in self._node_elements if owner in owners)

    def is_current(self, key: Key, value: Value) -> bool:
        """Whether what an affinity map remembers leads where this client would be sent today.

        `key` is client, original destination, protocol, port; `value` the target.
        """
        if key == CATCH_ALL or not isinstance(value, bytes):
            return False
        length = len(address_of(value))
        client, where = key[:length], Destination.of(key[length:])
        claim = claim_met(where, self.is_node_port_address, self.installed)
        installed = self.installed[claim] if claim else None
        if installed is None or not installed.wanted.sticky:
            return False
        return value in installed.slots_for(inside=self._is_inside(client))

    def _is_inside(self, client: Address) -> bool:
        hairpins = SETS[FAMILY_OF_LENGTH[len(client)]].hairpins
        local_endpoint = (hairpins, client * 2, None) in self._counts
        return self.local.is_inside(client, local_endpoint=local_endpoint)


def _count(counts: Counter[_Used], old: frozenset[_Used], new: frozenset[_Used]) -> None:
    """Counts what was added and removed; an item that is not used any more has no count."""
    for item in new ^ old:
        counts[item] += 1 if item in new else -1
        if counts[item] <= 0:
            del counts[item]
