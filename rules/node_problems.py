"""What is wrong with what is known of this node: an unknown Node, pod CIDRs that do not fit."""

from __future__ import annotations

from rules.node import LocalNode
from rules.objects import Address, Network, address_text
from rules.options import DetectLocalMode, in_networks
from rules.problems import (
    ENDPOINTS_OUTSIDE_POD_CIDRS,
    NODE_UNKNOWN,
    POD_CIDRS_MISSING,
    Problems,
    Subject,
    listed,
)
from rules.program import SetElement
from rules.tables import SETS


class NodeProblems:
    """Opens and closes the problems of one node.

    The endpoints on this node are those of the hairpins, which all Services share, so a change
    costs one comparison for each endpoint that is added or removed.
    """

    def __init__(self, local: LocalNode, problems: Problems) -> None:
        self._local = local
        self._problems = problems
        self._subject = Subject("Node", local.options.node)
        self._endpoints: dict[Address, None] = {}
        self._outside: dict[Address, None] = {}
        self._synced = False
        self._stale = False
        self._compared: tuple[tuple[Network, ...], frozenset[Address]] = ((), frozenset())

    def shared_added(self, element: SetElement) -> None:
        """An element that Services share was added."""
        owner, key, _ = element
        if owner is SETS[owner.family].hairpins:
            address = key[: len(key) // 2]
            self._endpoints[address] = None
            if self._is_outside(address):
                self._outside[address] = None
                self._stale = True

    def shared_gone(self, element: SetElement) -> None:
        """No Service has the shared element any more."""
        owner, key, _ = element
        if owner is SETS[owner.family].hairpins:
            address = key[: len(key) // 2]
            self._endpoints.pop(address, None)
            if address in self._outside:
                del self._outside[address]
                self._stale = True

    def synced(self) -> None:
        """The source is complete: until then, a missing Node may only not have been listed yet."""
        self._synced = self._stale = True

    def compare(self) -> None:
        """Something that is known of the node has changed."""
        self._stale = True
        compared = self._local.pod_cidrs(), self._local.own()
        if compared != self._compared:
            self._compared = compared
            self._outside = {a: None for a in self._endpoints if self._is_outside(a)}

    def update(self) -> None:
        """Opens and closes problems where something has changed since the last call."""
        if not (self._synced and self._stale):
            return
        self._stale = False
        self._problems.set(NODE_UNKNOWN, self._subject, self._unknown())
        self._problems.set(POD_CIDRS_MISSING, self._subject, self._missing())
        self._problems.set(ENDPOINTS_OUTSIDE_POD_CIDRS, self._subject, self._outside_text())

    def _is_outside(self, address: Address) -> bool:
        """Whether an endpoint on this node would not be identified as one of its pods. Pods in
        the host's network have the node's addresses."""
        cidrs, own = self._compared
        version = 4 if len(address) == 4 else 6
        of_family = tuple(n for n in cidrs if n.version == version)
        return bool(of_family) and address not in own and not in_networks(address, of_family)

    def _unknown(self) -> str:
        if self._local.exists or not (self._local.expected or self._local.object):
            return ""
        kept = "; its last known addresses, zone and podCIDRs stay in use"
        return (
            f"there is no Node of this name{kept if self._local.object else ''}; start the agent "
            "with the Node's name (--node or NODE_NAME)"
        )

    def _missing(self) -> str:
        if self._local.options.detect_local is not DetectLocalMode.NODE_CIDR:
            return ""
        if self._local.pod_cidrs():
            return ""
        return (
            "detectLocalMode is NodeCIDR and the Node has no spec.podCIDRs, so pods of this node "
            "are treated like clients outside; enable --allocate-node-cidrs in "
            "kube-controller-manager or choose another --detect-local-mode"
        )

    def _outside_text(self) -> str:
        if not self._outside:
            return ""
        cidrs = ", ".join(map(str, self._compared[0]))
        first = listed(map(address_text, sorted(self._outside)[:3]))
        return (
            f"{len(self._outside)} endpoints on this node are outside its pod CIDRs ({cidrs}): "
            f"{first}; such pods are treated like clients outside; choose another "
            "--detect-local-mode, or the --cluster-cidr that your network plugin uses"
        )
