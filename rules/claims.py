"""Who owns which key, and why.

Several Services can claim one key of a verdict map: nothing stops a tenant from writing another
Service's cluster IP into `externalIPs`. The key belongs to the claim that is first in this order:

1. a cluster IP. The API server allocates it, to one Service at a time; any tenant may write any
   address as an external IP. Age does not matter: otherwise an older Service of a tenant would
   take over the address of a cluster DNS that was deleted and recreated;
2. a node port, at the node's own addresses, for the same reason. It is found in a map of its own,
   which rules ask after the addresses, so an external address at which a node port answers is not
   programmed;
3. load balancer IPs and external IPs: first those of Services with endpoints (as kube-proxy has
   it), then those of the older Service, at one age by namespace and name.

The cost of a change is logarithmic in the number of Services that claim the same key.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from rules.frontends import Frontend, Kind
from rules.lookup import Destination, node_port_claim
from rules.objects import Address, Name
from rules.program import Claim, Program
from rules.tables import SETS
from rules.target import PORT_LENGTH

CROWD = 64
"""With more claimants the holder is not named: each change of it would reword all of them."""
_UNDATED = "9999"
"""A creation time after all others, for objects without one."""


class Rank(NamedTuple):
    """The place of one Service among those that claim a key; the lowest has it."""

    external: bool
    without_endpoints: bool
    created: str
    name: Name


def rank(program: Program, claim: Claim, name: Name) -> Rank:
    """The rank of a Service's claim."""
    wanted = program.wanted[claim]
    external = wanted.frontend.kind in (Kind.LOAD_BALANCER_IP, Kind.EXTERNAL_IP)
    # external addresses are asked from inside too, so this counts endpoints on all nodes
    everywhere = wanted.endpoints if wanted.inside is None else wanted.inside
    return Rank(external, external and not everywhere, program.created or _UNDATED, name)


class Rivals:
    """The Services that claim one key, in their order."""

    def __init__(self) -> None:
        self._ranks: dict[Name, Rank] = {}
        self._order: list[Rank] = []

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Name]:
        return (r.name for r in self._order)

    @property
    def first(self) -> Name:
        """The Service that has the key."""
        return self._order[0].name

    def snapshot(self) -> Rivals:
        """These rivals as they are now."""
        twin = Rivals()
        twin._ranks, twin._order = self._ranks.copy(), self._order.copy()
        return twin

    def put(self, new: Rank) -> None:
        """Adds a Service, or moves it to its new place."""
        if self._ranks.get(new.name) != new:
            self.remove(new.name)
            self._ranks[new.name] = new
            insort(self._order, new)

    def remove(self, name: Name) -> None:
        """Removes a Service."""
        if old := self._ranks.pop(name, None):
            del self._order[bisect_left(self._order, old)]


Claimants = Name | Rivals
"""The one Service that claims a key, or several."""


class Claims:
    """All claims of all Services. `programs` are the State's, kept up to date by it."""

    def __init__(self, programs: Mapping[Name, Program]) -> None:
        self._programs = programs
        self._only: dict[Claim, Name] = {}
        """The claims of one Service alone: nearly all."""
        self._contested: dict[Claim, Rivals] = {}
        self._node_port_addresses: frozenset[Address] = frozenset()

    def snapshot(self, programs: Mapping[Name, Program]) -> Claims:
        """These claims as they are now, of a copy of the programs."""
        twin = self.without_claims(programs)
        twin._only = self._only.copy()
        twin._contested = {claim: rivals.snapshot() for claim, rivals in self._contested.items()}
        return twin

    def without_claims(self, programs: Mapping[Name, Program]) -> Claims:
        """No claims, of these programs, where node ports answer at the same addresses."""
        twin = Claims(programs)
        twin._node_port_addresses = self._node_port_addresses
        return twin

    def all(self) -> tuple[Collection[Claim], Collection[Claim]]:
        """All claims: those of one Service alone, and those of several."""
        return self._only.keys(), self._contested.keys()

    def entry(self, claim: Claim) -> Claimants | None:
        """Who has the claim now, for `replace`; None for an unclaimed key."""
        rivals = self._contested.get(claim)
        return rivals.snapshot() if rivals else self._only.get(claim)

    def replace(self, claim: Claim, claimants: Claimants | None) -> None:
        """Sets who has the claim."""
        self._only.pop(claim, None)
        self._contested.pop(claim, None)
        if isinstance(claimants, Rivals):
            self._contested[claim] = claimants
        elif claimants is not None:
            self._only[claim] = claimants

    def adopt(self, programs: Mapping[Name, Program], claims: Claims | None = None) -> None:
        """Has the claims of `claims`, not of a copy; none without it."""
        self._programs = programs
        self._only = claims._only if claims else {}
        self._contested = claims._contested if claims else {}

    def holder(self, claim: Claim) -> Name | None:
        """The Service that has the key, None if it is no Service's or a node port's."""
        name = self._first(claim)
        if name is None or self._node_port_over(claim, name):
            return None
        return name

    def owner(self, claim: Claim) -> Name | None:
        """The Service that answers at the key: its holder, else that of the node port there."""
        name = self._first(claim)
        return self._node_port_over(claim, name) or name if name else None

    def claimants(self, claim: Claim) -> tuple[Name, ...]:
        """The Services that claim the key, in their order."""
        if rivals := self._contested.get(claim):
            return tuple(rivals)
        name = self._only.get(claim)
        return (name,) if name else ()

    def to_review(self, claim: Claim) -> tuple[Name, ...]:
        """The claimants whose problem names the holder: all, unless they are a CROWD; of a crowd
        the first two, one of which has just got the key or lost it."""
        rivals = self.claimants(claim)
        return rivals if len(rivals) <= CROWD + 1 else rivals[:2]

    def is_contested(self, claim: Claim) -> bool:
        """Whether several Services claim the key."""
        return claim in self._contested

    def put(self, claim: Claim, name: Name) -> bool:
        """Notes a Service's claim, new or with another rank. Returns whether the key passes to
        another Service."""
        only, rivals = self._only.get(claim), self._contested.get(claim)
        if rivals is None:
            if only in (None, name):
                self._only[claim] = name
                return only is None
            rivals = self._contested[claim] = Rivals()
            rivals.put(rank(self._programs[self._only.pop(claim)], claim, only))
        before = rivals.first
        rivals.put(rank(self._programs[name], claim, name))
        return rivals.first != before

    def remove(self, claim: Claim, name: Name) -> bool:
        """Withdraws a Service's claim. Returns whether the key passes to another Service."""
        rivals = self._contested.get(claim)
        if rivals is None:
            return self._only.pop(claim, None) is not None
        before = rivals.first
        rivals.remove(name)
        if len(rivals) == 1:
            self._only[claim] = rivals.first
            del self._contested[claim]
        return rivals.first != before

    def beside_node_port(self, claim: Claim) -> Iterator[Claim]:
        """The claims on external addresses that may pass to a node port, or back, where the claim
        on it is made or withdrawn."""
        sets = SETS[claim.verdicts.family]
        if claim.verdicts is sets.service_nodeports:
            for address in self._node_port_addresses:
                beside = Claim(sets.service_ips, address + claim.key)
                if beside in self._only or beside in self._contested:
                    yield beside

    def move_node_ports(self, new: Iterable[Address]) -> list[Claim]:
        """Node ports answer at these addresses from now on. Returns the claims that may pass to
        a node port or back."""
        addresses = frozenset(new)
        moved = addresses ^ self._node_port_addresses
        self._node_port_addresses = addresses
        if not moved:
            return []
        return [
            c for c in (*self._only, *self._contested) if Destination.of(c.key).address in moved
        ]

    def _first(self, claim: Claim) -> Name | None:
        rivals = self._contested.get(claim)
        return rivals.first if rivals else self._only.get(claim)

    def _node_port_over(self, claim: Claim, name: Name) -> Name | None:
        """The Service whose node port answers where this claim would."""
        if claim.key[: -2 * PORT_LENGTH] not in self._node_port_addresses:
            return None
        if self._programs[name].wanted[claim].frontend.kind is Kind.CLUSTER_IP:
            return None
        return self._first(node_port_claim(Destination.of(claim.key)))


def why_lost(frontend: Frontend, claims: Claims, claim: Claim, loser: Name) -> str:
    """Why a Service does not answer at an address of its own, and who does; "" if it does."""
    holder = claims.owner(claim)
    if holder is None or holder == loser:
        return ""
    rivals = claims.claimants(claim)
    if len(rivals) > CROWD:
        return f"{frontend} is claimed by more than {CROWD} Services and belongs to another one"
    return f"{frontend} belongs to Service {holder}"
