"""The rows of docs/semantics.md as Services, and what clients must meet at them.

A case quotes the statement of the document that it shows. It is one Service with its slices (and
others beside it), at addresses of its own, and what each client meets at some of them. `later` is
the same Service after one change of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from lab.world import Outcome
from rules.objects import HEADLESS_LABEL, PROXY_NAME_LABEL, SERVICE_NAME_LABEL
from tests.manifest import CREATED, endpoint, service_document, slice_document

Documents = list[dict[str, Any]]

FAMILIES = (4, 6)
ASKERS = ("pod-3", "node", "client")
"""A pod of the node that is no endpoint, the node, and a machine outside."""
SECOND = {4: "198.51.100.2", 6: "fd80:198::2"}
"""Another address of the node; endpoints cannot answer to it."""
LINK_LOCAL = "169.254.77.7"
LOCAL_NETWORK = {4: "198.18.5.0/24", 6: "fd80:18:5::/64"}
"""The node has a route of type local to it."""

Ports = Sequence[Mapping[str, Any]]


def on_port(number: int) -> Ports:
    """A slice's ports, both at one target port."""
    return (
        {"name": "web", "port": number},
        {"name": "dns", "port": number, "protocol": "UDP"},
    )


SERVED = on_port(8080)


class Place(NamedTuple):
    """The addresses of a case's Service, by the number of the case."""

    number: int

    def cluster_ip(self, family: int) -> str:
        return f"10.96.1.{self.number}" if family == 4 else f"fd00:10:96::1:{self.number}"

    def external_ip(self, family: int) -> str:
        return f"203.0.113.{self.number}" if family == 4 else f"2001:db8:e::{self.number}"

    def balancer_ip(self, family: int) -> str:
        return f"192.0.2.{self.number}" if family == 4 else f"2001:db8:b::{self.number}"

    @property
    def node_port(self) -> int:
        return 30000 + self.number

    @property
    def ports(self) -> Documents:
        return [
            {"name": "web", "port": 80, "nodePort": self.node_port},
            {"name": "dns", "port": 80, "nodePort": self.node_port, "protocol": "UDP"},
        ]

    def all(self, kind: str) -> list[str]:
        return [getattr(self, kind)(family) for family in FAMILIES]


class Meeting(NamedTuple):
    """What a client meets: the word of `explain`, what its packets must meet, and the endpoints
    that answer, each with the client that it sees: "own" or "node". With `one` each client always
    gets the same one of them."""

    explained: str
    outcome: Outcome
    endpoints: tuple[tuple[str, str], ...] = ()
    one: bool = False


def sent(*hosts: str, seen: str | Mapping[str, str] = "own") -> Meeting:
    endpoints = ((host, seen if isinstance(seen, str) else seen[host]) for host in hosts)
    return Meeting("sent", "answered", tuple(sorted(endpoints)))


REFUSED = Meeting("refused", "refused")
DROPPED = Meeting("dropped", "silent")
LOST = Meeting("passed on untouched", "silent")
"""Not ours: the packet leaves towards a router that knows no such address."""
UNHEARD = Meeting("passed on untouched", "refused")
"""Not ours: it is delivered to the node, where no process listens."""

Meetings = Meeting | Mapping[str, Meeting]


def at_cluster_ip(*hosts: str) -> dict[str, Meeting]:
    """By every client, with pods of the node identified."""
    masqueraded = sent(*hosts, seen="node")
    return {"pod-3": sent(*hosts), "node": masqueraded, "client": masqueraded}


def at_cluster_ip_by_client(*hosts: str) -> dict[str, Meeting]:
    """As `at_cluster_ip`, each client by one of them."""
    return {who: met._replace(one=True) for who, met in at_cluster_ip(*hosts).items()}


def at_external(*hosts: str) -> dict[str, Meeting]:
    """By every client, under policy Cluster."""
    return dict.fromkeys(ASKERS, sent(*hosts, seen="node"))


def under_local(local: Meeting, *all_hosts: str) -> dict[str, Meeting]:
    """By a client outside, and by those inside, who get all endpoints."""
    return {"pod-3": sent(*all_hosts), "node": sent(*all_hosts, seen="node"), "client": local}


class Pod(NamedTuple):
    """An endpoint: a host, and the fields of `manifest.endpoint`."""

    host: str
    fields: Mapping[str, Any] = {}


def pod(host: str, **fields: Any) -> Pod:
    return Pod(host, fields)


@dataclass(frozen=True)
class Slice:
    """EndpointSlices with these endpoints, one in each family."""

    pods: tuple[str | Pod, ...]
    ports: Ports = SERVED
    labels: Mapping[str, str | None] | None = None
    """Besides the name of the Service; None in place of a value removes the label."""
    annotations: Mapping[str, str] = field(default_factory=dict)
    created: str = CREATED
    families: tuple[int, ...] = FAMILIES

    def documents(self, service: str, number: int, address: Callable[[str, int], str]) -> Documents:
        found = []
        for family in self.families:
            endpoints = []
            for one in self.pods:
                host, fields = one if isinstance(one, Pod) else (one, {})
                node = "node-2" if host.startswith("remote") else "node-1"
                made = endpoint(address(host, family), **{"node": node, **fields})
                endpoints.append(made)
            document = slice_document(
                service,
                endpoints,
                name=f"{service}-{number}-v{family}",
                ports=self.ports,
                family=f"IPv{family}",
                created=self.created,
            )
            document["metadata"]["annotations"] = dict(self.annotations)
            labels = document["metadata"]["labels"]
            for label, value in (self.labels or {}).items():
                labels[label] = value
                if value is None:
                    del labels[label]
            found.append(document)
        return found


def slices(*pods: str | Pod) -> tuple[Slice, ...]:
    return (Slice(pods),)


Where = str
"""cluster-ip, external-ip, balancer-ip or node-port, with ":81" for another port; or the name of an
address in ELSEWHERE."""

ELSEWHERE: dict[str, dict[int, str]] = {
    "unallocated": {4: "10.96.200.1", 6: "fd00:10:96::200:1"},
    "outside the ServiceCIDR": {4: "10.97.0.1", 6: "fd00:10:97::1"},
    "loopback": {4: "127.0.0.1", 6: "::1"},
    "second": SECOND,
    "in a local network": {4: "198.18.5.7", 6: "fd80:18:5::7"},
    "link-local": {4: "169.254.1.1"},
    "link-local balancer-ip": {4: LINK_LOCAL},
}


OF_THE_NODE = ("loopback", "second", "in a local network", "link-local")
"""Those that are asked at the case's node port, as they are delivered to the node."""


@dataclass(frozen=True, eq=False)
class Case:
    """See the module.

    `says` quotes the document. `meets` has what clients meet by address, then by client, where one
    Meeting is for ASKERS; a client is written "node from SECOND" if it asks from another address.
    `options` names the agent's options.
    """

    says: str
    title: str
    meets: Mapping[Where, Meetings]
    slices: tuple[Slice, ...] = ()
    service: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    labels: Mapping[str, str] | None = None
    annotations: Mapping[str, str] = field(default_factory=dict)
    created: str = CREATED
    beside: Callable[[Place], Documents] = lambda _: []
    families: tuple[int, ...] = FAMILIES
    options: str = "usual"
    later: Later | None = None

    def documents(self, place: Place, address: Callable[[str, int], str]) -> Documents:
        name = self.name or f"s{place.number}"
        fields = {
            "cluster_ips": place.all("cluster_ip"),
            "ports": place.ports,
            "type": "LoadBalancer",
            "externalIPs": place.all("external_ip"),
            "ingress": [{"ip": ip} for ip in place.all("balancer_ip")],
            "created": self.created,
        }
        for spec_field, value in self.service.items():
            fields[spec_field] = value(place) if callable(value) else value
        service = service_document(name, **fields)
        service["metadata"]["labels"] = dict(self.labels or {})
        service["metadata"]["annotations"] = dict(self.annotations)
        found = [service, *self.beside(place)]
        for number, piece in enumerate(self.slices):
            found += piece.documents(name, number, address)
        return found

    def afterwards(self) -> Case:
        """The case after the change."""
        if not self.later:
            return self
        slices = self.slices if self.later.slices is None else self.later.slices
        return replace(
            self,
            meets=self.later.meets,
            slices=slices,
            service={**self.service, **self.later.service},
            later=None,
        )


@dataclass(frozen=True)
class Later:
    """What a change brings; `slices` None leaves them."""

    meets: Mapping[Where, Meetings]
    slices: tuple[Slice, ...] | None = None
    service: Mapping[str, Any] = field(default_factory=dict)


# --- shapes -------------------------------------------------------------------------------------

LEAVING = {"ready": False, "serving": True, "terminating": True}
GONE = {"ready": False, "serving": False, "terminating": True}
UNREADY = {"ready": False, "serving": True, "terminating": False}
ZONE_A, ZONE_B = {"for_zones": ["a"]}, {"for_zones": ["b"]}
HERE, THERE = {"for_nodes": ["node-1"]}, {"for_nodes": ["node-2"]}
LOCAL = {"externalTrafficPolicy": "Local"}
INTERNAL_LOCAL = {"internalTrafficPolicy": "Local"}
ONLY_CLIENT = {"loadBalancerSourceRanges": ["172.31.0.100/32", "fd00:172:31::100/128"]}
ONLY_NODE = {"loadBalancerSourceRanges": ["172.31.0.2/32", "fd00:172:31::2/128"]}
OLD, YOUNG = "2026-01-01T00:00:00Z", "2026-02-02T00:00:00Z"


def fqdn_slice(place: Place) -> Documents:
    return [
        {
            **slice_document(f"s{place.number}", ports=SERVED, name=f"s{place.number}-names"),
            "addressType": "FQDN",
            "endpoints": [{"addresses": ["pod-1.example"], "conditions": {"ready": True}}],
        }
    ]


def two_addresses(hosts: tuple[str, str]) -> Callable[[Place], Documents]:
    """Slices whose endpoint has the addresses of two hosts."""
    first, second = hosts
    text = {
        "pod-1": ("10.244.1.11", "fd00:10:244:1::11"),
        "pod-2": ("10.244.1.12", "fd00:10:244:1::12"),
    }

    def make(place: Place) -> Documents:
        found = []
        for index, family in enumerate(FAMILIES):
            one = endpoint(text[first][index])
            one["addresses"].append(text[second][index])
            found.append(
                slice_document(
                    f"s{place.number}",
                    [one],
                    name=f"s{place.number}-two-v{family}",
                    ports=SERVED,
                    family=f"IPv{family}",
                )
            )
        return found

    return make


def rival(
    created: str, *pods: str, at: str = "external_ip", ports: Any = None
) -> Callable[[Place], Documents]:
    """Another tenant's Service whose external IPs are the addresses of the case's Service (`at`)
    or of the node."""
    text = {"pod-3": ("10.244.1.13", "fd00:10:244:1::13")}

    def make(place: Place) -> Documents:
        own = Place(place.number + 100)
        wanted = ["172.31.0.2", "fd00:172:31::2"] if at == "node" else place.all(at)
        name = f"rival{place.number}"
        service = service_document(
            name,
            cluster_ips=own.all("cluster_ip"),
            ports=ports(place) if ports else [{**p, "nodePort": None} for p in place.ports],
            externalIPs=wanted,
            created=created,
        )
        pieces = [
            slice_document(
                name,
                [endpoint(text[one][index]) for one in pods],
                name=f"{name}-v{family}",
                ports=SERVED,
                family=f"IPv{family}",
            )
            for index, family in enumerate(FAMILIES)
        ]
        return [service, *pieces]

    return make


def at_node_port(place: Place) -> Documents:
    return [
        {"name": "web", "port": place.node_port},
        {"name": "dns", "port": place.node_port, "protocol": "UDP"},
    ]


# --- the cases ----------------------------------------------------------------------------------

OBJECTS = [
    Case(
        "**Services** are selected by the label",
        "another proxy's",
        {"cluster-ip": DROPPED, "external-ip": LOST, "node-port": UNHEARD},
        slices("pod-1"),
        labels={PROXY_NAME_LABEL: "other"},
    ),
    Case(
        "**Services** are selected by the label",
        "the headless label, and a cluster IP",
        {"cluster-ip": at_cluster_ip("pod-1")},
        slices("pod-1"),
        labels={HEADLESS_LABEL: ""},
    ),
    Case(
        "**Services** are selected by the label",
        "ours by the option",
        {"cluster-ip": sent("pod-1", seen="node")},
        slices("pod-1"),
        labels={PROXY_NAME_LABEL: "mine"},
        options="an interface's prefix, a proxy name, masquerade all",
    ),
    Case(
        "**Services** are selected by the label",
        "another's by the option",
        {"cluster-ip": DROPPED},
        slices("pod-1"),
        options="an interface's prefix, a proxy name, masquerade all",
    ),
    Case(
        "**EndpointSlices** are selected by the absence",
        "by the label headless alone",
        {"cluster-ip": at_cluster_ip("pod-1", "remote-1")},
        (
            Slice(("pod-1",)),
            Slice(("pod-2",), labels={HEADLESS_LABEL: ""}),
            Slice(("remote-1",), labels={PROXY_NAME_LABEL: "other"}),
        ),
    ),
    Case(
        "**EndpointSlices** are selected by the absence",
        "a slice loses its Service",
        {"cluster-ip": at_cluster_ip("pod-1")},
        slices("pod-1"),
        later=Later(
            {"cluster-ip": REFUSED}, (Slice(("pod-1",), labels={SERVICE_NAME_LABEL: None}),)
        ),
    ),
    Case(
        "The **Node** of this machine",
        "its zone",
        {"cluster-ip": at_cluster_ip("pod-1")},
        slices(pod("pod-1", **ZONE_A), pod("remote-1", **ZONE_B)),
    ),
    Case(
        "The **Node** of this machine",
        "its addresses",
        {"node-port": at_external("pod-1")},
        slices("pod-1"),
    ),
    Case(
        "**ServiceCIDRs** give",
        "inside and outside",
        {"unallocated": DROPPED, "outside the ServiceCIDR": LOST},
    ),
    Case(
        "These Services are not served",
        "clusterIP None",
        {"external-ip": LOST},
        slices("pod-1"),
        {"cluster_ips": ["None"]},
    ),
    Case(
        "These Services are not served",
        "ExternalName",
        {"external-ip": LOST, "cluster-ip": DROPPED},
        slices("pod-1"),
        {"type": "ExternalName", "externalName": "example.com"},
    ),
    Case(
        "These Services are not served",
        "no cluster IP yet",
        {"external-ip": LOST},
        slices("pod-1"),
        {"cluster_ips": [""]},
    ),
    Case(
        "These Services are not served",
        "FQDN slices are ignored",
        {"cluster-ip": REFUSED},
        beside=fqdn_slice,
    ),
]

ENDPOINTS = [
    Case(
        "one or two cluster IPs",
        "slices of each family",
        {"cluster-ip": at_cluster_ip("pod-1"), "node-port": at_external("pod-1")},
        (Slice(("pod-1",), families=(4,)), Slice(("pod-2",), families=(6,))),
        families=(4,),
    ),
    Case(
        "one or two cluster IPs",
        "slices of the other family",
        {"cluster-ip": at_cluster_ip("pod-2"), "node-port": at_external("pod-2")},
        (Slice(("pod-1",), families=(4,)), Slice(("pod-2",), families=(6,))),
        families=(6,),
    ),
    Case(
        "A slice's port matches the Service port by name",
        "target ports differ",
        {"cluster-ip": at_cluster_ip("pod-1", "pod-2", "remote-1")},
        (
            Slice(("pod-1",), ports=on_port(9001)),
            Slice(("pod-2",), ports=on_port(9002)),
            Slice(("remote-1",)),
        ),
    ),
    Case(
        "A slice's port matches the Service port by name",
        "no such port, and no number",
        {"cluster-ip": at_cluster_ip("pod-1")},
        (
            Slice(("pod-1",)),
            Slice(("pod-2",), ports=[{"name": "other", "port": 8080}]),
            Slice(("remote-1",), ports=[{"name": "web"}, {"name": "dns", "protocol": "UDP"}]),
        ),
    ),
    Case(
        "A slice's port matches the Service port by name",
        "the protocol is another",
        {"cluster-ip": REFUSED},
        (
            Slice(
                ("pod-1",),
                ports=[
                    {"name": "web", "port": 8080, "protocol": "UDP"},
                    {"name": "dns", "port": 8080, "protocol": "TCP"},
                ],
            ),
        ),
    ),
    Case(
        "Only `addresses[0]`",
        "two addresses",
        {"cluster-ip": at_cluster_ip("pod-1")},
        beside=two_addresses(("pod-1", "pod-2")),
    ),
    Case(
        "Conditions: `ready` absent",
        "nothing is said",
        {"cluster-ip": at_cluster_ip("pod-1", "pod-2")},
        slices(pod("pod-1", ready=None), pod("pod-2", ready=None), pod("remote-1", **GONE)),
    ),
    Case(
        "Conditions: `ready` absent",
        "terminating, and serving is absent",
        {"cluster-ip": at_cluster_ip("pod-1")},
        slices(pod("pod-1", ready=False, terminating=True), pod("pod-2", **GONE)),
    ),
    Case(
        "Conditions: `ready` absent",
        "published",
        {"cluster-ip": at_cluster_ip("pod-1")},
        slices(pod("pod-1", ready=True, serving=False, terminating=False)),
    ),
    Case(
        "two slices may hold it",
        "the ready copy counts",
        {"cluster-ip": at_cluster_ip("pod-1", "pod-2")},
        (
            Slice(("pod-1", "pod-2"), created=OLD),
            Slice((pod("pod-1", **UNREADY), "pod-2"), created=YOUNG),
        ),
    ),
    Case(
        "two slices may hold it",
        "the younger copy counts: gone",
        {"cluster-ip": REFUSED},
        (
            Slice((pod("pod-1", **LEAVING),), created=OLD),
            Slice((pod("pod-1", **GONE),), created=YOUNG),
        ),
    ),
    Case(
        "two slices may hold it",
        "the younger copy counts: leaving",
        {"cluster-ip": at_cluster_ip("pod-1")},
        (
            Slice((pod("pod-1", **LEAVING),), created=YOUNG),
            Slice((pod("pod-1", **GONE),), created=OLD),
        ),
    ),
]

_LIST_CASES: dict[str, tuple[tuple[Pod, ...], tuple[str, ...]]] = {
    "no hints": ((pod("pod-1"), pod("remote-1")), ("pod-1", "remote-1")),
    "this node": ((pod("pod-1", **HERE), pod("remote-1", **THERE)), ("pod-1",)),
    "other nodes": (
        (pod("pod-1", **THERE), pod("remote-1", **THERE)),
        ("pod-1", "remote-1"),
    ),
    "this zone": ((pod("pod-1", **ZONE_B), pod("remote-1", **ZONE_A)), ("remote-1",)),
    "other zones": ((pod("pod-1", **ZONE_B), pod("remote-1", **ZONE_B)), ("pod-1", "remote-1")),
    "missing at one": ((pod("pod-1", **ZONE_A), pod("remote-1")), ("pod-1", "remote-1")),
    "missing at one that is not ready": (
        (pod("pod-1", **ZONE_A), pod("remote-1", **ZONE_B), pod("pod-2", **UNREADY)),
        ("pod-1",),
    ),
    "nodes before zones": (
        (pod("pod-1", **HERE, **ZONE_B), pod("remote-1", **THERE, **ZONE_A)),
        ("pod-1",),
    ),
    "zones, as a node is missing": (
        (pod("pod-1", **HERE, **ZONE_B), pod("remote-1", **ZONE_A)),
        ("remote-1",),
    ),
    "all leaving": ((pod("pod-1", **LEAVING), pod("remote-1", **LEAVING)), ("pod-1", "remote-1")),
    "leaving beside ready": ((pod("pod-1", **LEAVING), pod("remote-1")), ("remote-1",)),
    "serving, not ready": ((pod("pod-1", **UNREADY), pod("remote-1")), ("remote-1",)),
}

LISTS = [
    *(
        Case(
            "The **cluster list**",
            title,
            {"cluster-ip": at_cluster_ip(*hosts), "external-ip": at_external(*hosts)},
            (Slice(pods),),
        )
        for title, (pods, hosts) in _LIST_CASES.items()
    ),
    Case(
        "The **local list**",
        "the ready ones here, whatever their hints",
        {"external-ip": under_local(sent("pod-1", "pod-2"), "pod-1", "remote-1")},
        slices(pod("pod-1", **ZONE_A), pod("pod-2", **ZONE_B), pod("remote-1", **ZONE_A)),
        LOCAL,
    ),
    Case(
        "The **local list**",
        "those here that leave",
        {"external-ip": under_local(sent("pod-1"), "remote-1")},
        slices(pod("pod-1", **LEAVING), pod("pod-2", **GONE), "remote-1"),
        LOCAL,
    ),
    Case(
        "A Service port **has endpoints**",
        "elsewhere",
        {"external-ip": under_local(DROPPED, "remote-1")},
        slices("remote-1"),
        LOCAL,
        later=Later({"external-ip": REFUSED}, slices(pod("remote-1", **GONE))),
    ),
]

ADDRESSES = [
    Case(
        "| cluster IP | `spec.clusterIPs`",
        "internalTrafficPolicy Local",
        {
            "cluster-ip": {
                "pod-3": sent("pod-1"),
                "node": sent("pod-1", seen="node"),
                "client": sent("pod-1", seen="node"),
            },
            "external-ip": at_external("pod-1", "remote-1"),
        },
        slices("pod-1", "remote-1"),
        INTERNAL_LOCAL,
    ),
    Case(
        "| load balancer IP | `status.loadBalancer",
        "by externalTrafficPolicy",
        {
            "balancer-ip": under_local(sent("pod-1"), "pod-1", "remote-1"),
            "cluster-ip": at_cluster_ip("pod-1", "remote-1"),
        },
        slices("pod-1", "remote-1"),
        LOCAL,
    ),
    Case(
        "| load balancer IP | `status.loadBalancer",
        "ipMode Proxy",
        {"balancer-ip": LOST},
        slices("pod-1"),
        {"ingress": lambda p: [{"ip": ip, "ipMode": "Proxy"} for ip in p.all("balancer_ip")]},
    ),
    Case(
        "| external IP | `spec.externalIPs`",
        "by externalTrafficPolicy",
        {"external-ip": under_local(sent("pod-1"), "pod-1", "remote-1")},
        slices("pod-1", "remote-1"),
        LOCAL,
    ),
    Case(
        "| node port | `spec.ports[].nodePort`",
        "by externalTrafficPolicy",
        {"node-port": under_local(sent("pod-1"), "pod-1", "remote-1")},
        slices("pod-1", "remote-1"),
        LOCAL,
    ),
    Case(
        "Policy `Cluster` uses the cluster list",
        "everywhere",
        dict.fromkeys(
            ("external-ip", "balancer-ip", "node-port"), at_external("pod-1", "remote-1")
        ),
        slices("pod-1", "remote-1"),
    ),
    Case(
        "Load balancer IPs count whatever",
        "type NodePort, and a host name",
        {"balancer-ip": at_external("pod-1")},
        slices("pod-1"),
        {
            "type": "NodePort",
            "ingress": lambda p: [
                {"hostname": "lb.example.com"},
                *({"ip": ip} for ip in p.all("balancer_ip")),
            ],
        },
    ),
    Case(
        "of a family in which the Service has no cluster IP",
        "only an IPv6 cluster IP",
        {"external-ip": LOST, "balancer-ip": LOST, "node-port": UNHEARD},
        slices("pod-1"),
        {"cluster_ips": lambda p: [p.cluster_ip(6)]},
        families=(4,),
    ),
    Case(
        "of a family in which the Service has no cluster IP",
        "only an IPv4 cluster IP",
        {"external-ip": LOST, "balancer-ip": LOST, "node-port": UNHEARD},
        slices("pod-1"),
        {"cluster_ips": lambda p: [p.cluster_ip(4)]},
        families=(6,),
    ),
    Case(
        "External IPs are not served where",
        "the option is off",
        {"external-ip": LOST, "balancer-ip": at_external("pod-1")},
        slices("pod-1"),
        options="the pods' IPv4 network, no external IPs, node ports in a network",
    ),
    Case(
        "Node ports answer in the families",
        "at the primary address alone",
        {"node-port": at_external("pod-1"), "second": UNHEARD, "loopback": {"node": UNHEARD}},
        slices("pod-1"),
    ),
    Case(
        "Node ports answer in the families",
        "at all addresses",
        {
            "node-port": at_external("pod-1"),
            "second": at_external("pod-1"),
            "in a local network": UNHEARD,
            "loopback": {"node": UNHEARD},
        },
        slices("pod-1"),
        options="no pods, node ports at all addresses",
    ),
    Case(
        "Node ports answer in the families",
        "at link-local addresses",  # an IPv6 one needs a zone index
        {"link-local": {"pod-3": sent("pod-1", seen="node")}},
        slices("pod-1"),
        options="no pods, node ports at all addresses",
        families=(4,),
    ),
]

NOTHING = [
    Case(
        "| no endpoints anywhere | refuse |",
        "at every address",
        dict.fromkeys(("cluster-ip", "external-ip", "balancer-ip", "node-port"), REFUSED),
    ),
    Case(
        "| no endpoints anywhere | refuse |",
        "policy Local too",
        dict.fromkeys(("cluster-ip", "external-ip", "balancer-ip", "node-port"), REFUSED),
        service={**LOCAL, **INTERNAL_LOCAL},
    ),
    Case(
        "| policy Local, endpoints elsewhere only",
        "external addresses",
        dict.fromkeys(
            ("external-ip", "balancer-ip", "node-port"), under_local(DROPPED, "remote-1")
        ),
        slices("remote-1"),
        LOCAL,
    ),
    Case(
        "| policy Local, endpoints elsewhere only",
        "cluster IP",
        {"cluster-ip": DROPPED},
        slices("remote-1"),
        INTERNAL_LOCAL,
    ),
    Case(
        "| a cluster IP at a port that no Service port has",
        "port 81",
        {"cluster-ip:81": REFUSED, "external-ip:81": LOST},
        slices("pod-1"),
    ),
    Case(
        "| an address in a ServiceCIDR that no Service has", "unallocated", {"unallocated": DROPPED}
    ),
]

CLAIMS = [
    Case(
        "Address, protocol and port together belong to one Service",
        "a cluster IP before an older external IP",
        {"cluster-ip": at_cluster_ip("pod-1")},
        slices("pod-1"),
        created=YOUNG,
        beside=rival(OLD, "pod-3", at="cluster_ip"),
    ),
    Case(
        "Address, protocol and port together belong to one Service",
        "the one with endpoints before the older",
        {"external-ip": at_external("pod-1")},
        slices("pod-1"),
        created=YOUNG,
        beside=rival(OLD),
    ),
    Case(
        "Address, protocol and port together belong to one Service",
        "the older of two",
        {"external-ip": at_external("pod-1")},
        slices("pod-1"),
        created=OLD,
        beside=rival(YOUNG, "pod-3"),
    ),
    Case(
        "Address, protocol and port together belong to one Service",
        "a node port before an older external IP",
        {"node-port": at_external("pod-1")},
        slices("pod-1"),
        created=YOUNG,
        beside=rival(OLD, "pod-3", at="node", ports=at_node_port),
    ),
    Case(
        "Address, protocol and port together belong to one Service",
        "within a Service a load balancer IP before an external IP",
        {
            "balancer-ip": {
                "client": sent("pod-1", seen="node"),
                "pod-3": DROPPED,
                "node": DROPPED,
            }
        },
        slices("pod-1"),
        {**ONLY_CLIENT, "externalIPs": lambda p: p.all("balancer_ip")},
    ),
    Case(
        "Address, protocol and port together belong to one Service",
        "other ports of the address are another's",
        {"external-ip": at_external("pod-1"), "external-ip:81": at_external("pod-3")},
        slices("pod-1"),
        beside=rival(
            OLD,
            "pod-3",
            ports=lambda _: [
                {"name": "web", "port": 81},
                {"name": "dns", "port": 81, "protocol": "UDP"},
            ],
        ),
    ),
]

ALGORITHM, WEIGHTS = "sliceproxy.io/algorithm", "sliceproxy.io/weights"
ZONE_WEIGHTS = "sliceproxy.io/zone-weights"
WEIGHTED, BY_HASH = {ALGORITHM: "weighted"}, {ALGORITHM: "source-hash"}
NAMED = slices(pod("pod-1", pod="a", zone="a"), pod("remote-1", pod="b", zone="b"))

ALGORITHMS = [
    Case(
        "| `random`, or absent |",
        "named",
        {"cluster-ip": at_cluster_ip("pod-1", "remote-1")},
        NAMED,
        annotations={ALGORITHM: "random"},
    ),
    Case(
        "| `weighted` |",
        "all weights are 1",
        {"cluster-ip": at_cluster_ip("pod-1", "remote-1")},
        NAMED,
        annotations=WEIGHTED,
    ),
    Case(
        "| `source-hash` |",
        "one endpoint for each client",
        {"cluster-ip": at_cluster_ip_by_client("pod-1", "pod-2", "remote-1")},
        slices("pod-1", "pod-2", "remote-1"),
        annotations=BY_HASH,
    ),
    Case(
        "`sliceproxy.io/weights` on its EndpointSlice",
        "before those of the Service",
        {"cluster-ip": at_cluster_ip("pod-1")},
        (Slice(NAMED[0].pods, annotations={WEIGHTS: "a=1,b=0"}),),
        annotations={**WEIGHTED, WEIGHTS: "a=0,b=1"},
    ),
    Case(
        "`sliceproxy.io/weights` on the Service",
        "by the addresses of endpoints, before those of zones",
        {"cluster-ip": at_cluster_ip("remote-1")},
        NAMED,
        annotations={
            **WEIGHTED,
            WEIGHTS: "10.244.1.11=0,fd00:10:244:1::11=0",
            ZONE_WEIGHTS: "a=1",
        },
    ),
    Case(
        "`sliceproxy.io/zone-weights` on the Service",
        "of source-hash, too",
        {"cluster-ip": at_cluster_ip("remote-1")},
        NAMED,
        annotations={**BY_HASH, ZONE_WEIGHTS: "a=0,b=2"},
    ),
    Case(
        "An endpoint with weight 0 is **drained**",
        "all",
        {"cluster-ip": REFUSED, "external-ip": REFUSED},
        NAMED,
        annotations={**WEIGHTED, WEIGHTS: "a=0,b=0"},
    ),
    Case(
        "An endpoint with weight 0 is **drained**",
        "all of this node, policy Local",
        {"external-ip": under_local(DROPPED, "remote-1")},
        NAMED,
        LOCAL,
        annotations={**WEIGHTED, WEIGHTS: "a=0"},
    ),
    Case(
        "An endpoint with weight 0 is **drained**",
        "before hints are looked at",
        {"cluster-ip": at_cluster_ip("remote-1")},
        slices(pod("pod-1", pod="a", **HERE), pod("remote-1", **THERE)),
        annotations={**WEIGHTED, WEIGHTS: "a=0"},
    ),
    Case(
        "Weights have no effect while the algorithm is `random`",
        "no algorithm",
        {"cluster-ip": at_cluster_ip("pod-1", "remote-1")},
        NAMED,
        annotations={WEIGHTS: "a=0"},
    ),
    Case(
        "An annotation of a Service that cannot be read",
        "an unknown algorithm",
        {"cluster-ip": at_cluster_ip("pod-1", "remote-1")},
        NAMED,
        annotations={ALGORITHM: "fastest", WEIGHTS: "a=0"},
    ),
    Case(
        "An annotation of a Service that cannot be read",
        "weights of a slice",
        {"cluster-ip": at_cluster_ip("pod-1", "remote-1")},
        (Slice(NAMED[0].pods, annotations={WEIGHTS: "a=heavy"}),),
        annotations=WEIGHTED,
    ),
]

RANGES = [
    Case(
        "They guard load balancer IPs",
        "and no other addresses",
        {
            "balancer-ip": {
                "client": sent("pod-1", seen="node"),
                **dict.fromkeys(("stranger", "pod-3", "node"), DROPPED),
            },
            "external-ip": at_external("pod-1"),
            "node-port": at_external("pod-1"),
            "cluster-ip": at_cluster_ip("pod-1"),
        },
        slices("pod-1"),
        ONLY_CLIENT,
    ),
    Case(
        "They guard load balancer IPs",
        "without endpoints",
        {
            "balancer-ip": {
                "client": REFUSED,
                **dict.fromkeys(("stranger", "pod-3", "node"), DROPPED),
            }
        },
        service=ONLY_CLIENT,
    ),
    Case(
        "They guard load balancer IPs",
        "policy Local",
        {"balancer-ip": {"client": sent("pod-1"), "stranger": DROPPED, "pod-3": DROPPED}},
        slices("pod-1", "remote-1"),
        {**ONLY_CLIENT, **LOCAL},
    ),
    Case(
        "They guard load balancer IPs",
        "no range can be parsed",
        {"balancer-ip": DROPPED, "external-ip": at_external("pod-1")},
        slices("pod-1"),
        {"loadBalancerSourceRanges": ["172.31.0.0/255.0.255.0"]},
    ),
    Case(
        "They guard load balancer IPs",
        "the load balancer's own address, where the node is in the ranges",
        {
            "balancer-ip": {
                "node": sent("pod-1", seen="node"),
                "node from balancer-ip": sent("pod-1", seen="node"),
                "client": DROPPED,
            }
        },
        slices("pod-1"),
        ONLY_NODE,
    ),
    Case(
        "They guard load balancer IPs",
        "the load balancer's own address, where the node is not",
        {"balancer-ip": {"node from balancer-ip": DROPPED}},
        slices("pod-1"),
        ONLY_CLIENT,
    ),
    Case(
        "The check is repeated for every packet",
        "narrower, for new connections",
        {"balancer-ip": at_external("pod-1")},
        slices("pod-1"),
        {"loadBalancerSourceRanges": ["0.0.0.0/0", "::/0"]},
        later=Later(
            {"balancer-ip": {"client": sent("pod-1", seen="node"), "stranger": DROPPED}},
            service=ONLY_CLIENT,
        ),
    ),
]

SOURCES = [
    Case(
        "external traffic under policy Cluster",
        "from every client",
        {"external-ip": at_external("pod-1", "remote-1")},
        slices("pod-1", "remote-1"),
    ),
    Case(
        "traffic to a cluster IP from outside the cluster",
        "pods are identified",
        {
            "cluster-ip": {
                **at_cluster_ip("pod-1", "remote-1"),
                "node from second": sent("pod-1", "remote-1", seen="node"),
            }
        },
        slices("pod-1", "remote-1"),
    ),
    Case(
        "traffic to a cluster IP from outside the cluster",
        "masqueradeAll",
        {"cluster-ip": at_external("pod-1", "remote-1")},
        slices("pod-1", "remote-1"),
        labels={PROXY_NAME_LABEL: "mine"},
        options="an interface's prefix, a proxy name, masquerade all",
    ),
    Case(
        "a pod that reaches itself through a Service",
        "at every address",
        {
            "cluster-ip": {"pod-1": sent("pod-1", "pod-2", seen={"pod-1": "node", "pod-2": "own"})},
            "external-ip": {"pod-1": sent("pod-1", "pod-2", seen="node")},
            "node-port": {"pod-1": sent("pod-1", "pod-2", seen="node")},
        },
        slices("pod-1", "pod-2"),
    ),
    Case(
        "a pod that reaches itself through a Service",
        "under policy Local",
        {
            where: {"pod-1": sent("pod-1", "pod-2", seen={"pod-1": "node", "pod-2": "own"})}
            for where in ("external-ip", "balancer-ip", "node-port")
        },
        slices("pod-1", "pod-2"),
        LOCAL,
    ),
    Case(
        "what the node itself sends to an external address under policy Local",
        "from any address",
        {
            "external-ip": {
                "node": sent("pod-1", "remote-1", seen="node"),
                "node from second": sent("pod-1", "remote-1", seen="node"),
            }
        },
        slices("pod-1", "remote-1"),
        LOCAL,
    ),
    Case(
        "All others keep their address",
        "a pod at a cluster IP, a client outside under policy Local",
        {"cluster-ip": {"pod-3": sent("pod-1")}, "external-ip": {"client": sent("pod-1")}},
        slices("pod-1"),
        LOCAL,
    ),
    Case(
        "`detectLocalMode` says how a pod of this node is identified",
        "NodeCIDR",
        {"external-ip": under_local(sent("pod-1"), "pod-1", "remote-1")},
        slices("pod-1", "remote-1"),
        LOCAL,
    ),
    Case(
        "`detectLocalMode` says how a pod of this node is identified",
        "InterfaceNamePrefix",
        {"external-ip": under_local(sent("pod-1"), "pod-1", "remote-1")},
        slices("pod-1", "remote-1"),
        LOCAL,
        labels={PROXY_NAME_LABEL: "mine"},
        options="an interface's prefix, a proxy name, masquerade all",
    ),
    Case(
        "`detectLocalMode` says how a pod of this node is identified",
        "BridgeInterface",
        {
            "external-ip": under_local(sent("pod-1"), "pod-1", "remote-1"),
            "cluster-ip": {
                "pod-3": sent("pod-1", "remote-1"),
                "pod-2": sent("pod-1", "remote-1", seen="node"),
            },
        },
        slices("pod-1", "remote-1"),
        LOCAL,
        options="a bridge",
    ),
    Case(
        "`detectLocalMode` says how a pod of this node is identified",
        "ClusterCIDR",
        {"cluster-ip": at_cluster_ip("pod-1")},
        slices("pod-1"),
        options="the pods' IPv4 network, no external IPs, node ports in a network",
        families=(4,),
    ),
    Case(
        "`detectLocalMode` says how a pod of this node is identified",
        "ClusterCIDR without a range of this family",
        {"cluster-ip": sent("pod-1")},
        slices("pod-1"),
        options="the pods' IPv4 network, no external IPs, node ports in a network",
        families=(6,),
    ),
    Case(
        "`detectLocalMode` says how a pod of this node is identified",
        "None",
        {"cluster-ip": sent("pod-1")},
        slices("pod-1"),
        options="no pods, node ports at all addresses",
    ),
]

CORNERS = [
    Case(
        "| IPv4 addresses with leading zeros",
        "an external IP",
        {"external-ip": at_external("pod-1")},
        slices("pod-1"),
        {"externalIPs": lambda p: [f"203.000.113.{p.number:03}"]},
        families=(4,),
    ),
    Case(
        "| IPv4-mapped IPv6 addresses",
        "an external IP",
        {"external-ip": at_external("pod-1")},
        slices("pod-1"),
        {"externalIPs": lambda p: [f"::ffff:{p.external_ip(4)}"]},
        families=(4,),
    ),
    Case(
        "| link-local load balancer IPs | served |",
        "IPv4",  # IPv6's are not forwarded
        {"link-local balancer-ip": at_external("pod-1")},
        slices("pod-1"),
        {"ingress": [{"ip": LINK_LOCAL}]},
        families=(4,),
    ),
    Case(
        "| loopback, multicast or unspecified addresses",
        "of endpoints",
        {"cluster-ip": REFUSED},
        beside=lambda p: [
            slice_document(
                f"s{p.number}",
                [endpoint(address) for address in addresses],
                name=f"s{p.number}-v{family}",
                ports=SERVED,
                family=f"IPv{family}",
            )
            for family, addresses in (
                (4, ("127.0.0.1", "224.0.0.1", "0.0.0.0")),
                (6, ("::1", "ff02::1", "::")),
            )
        ],
    ),
    Case(
        "| Service and port names that begin with a digit",
        "1web",
        {"cluster-ip": at_cluster_ip("pod-1")},
        slices("pod-1"),
        name="1web",
    ),
    Case(
        "| the same endpoint twice in one slice",
        "twice",
        {"cluster-ip": at_cluster_ip("pod-1", "pod-2")},
        slices("pod-1", "pod-1", "pod-2"),
    ),
    Case(
        "| the Node is deleted, or loses its zone",
        "deleted",
        {"cluster-ip": at_cluster_ip("pod-1"), "node-port": at_external("pod-1")},
        slices(pod("pod-1", **ZONE_A), pod("pod-2", **ZONE_B)),
        later=Later({"cluster-ip": at_cluster_ip("pod-1"), "node-port": at_external("pod-1")}),
    ),
    Case(
        "| `nodePortAddresses` with networks of one family only",
        "IPv4 networks",
        {"second": at_external("pod-1"), "node-port": UNHEARD},
        slices("pod-1"),
        options="the pods' IPv4 network, no external IPs, node ports in a network",
        families=(4,),
    ),
    Case(
        "| `nodePortAddresses` with networks of one family only",
        "the other family",
        {"second": UNHEARD, "node-port": UNHEARD},
        slices("pod-1"),
        options="the pods' IPv4 network, no external IPs, node ports in a network",
        families=(6,),
    ),
    Case(
        "| a pod of this node that cannot be identified, policy Local",
        "counts as outside",
        {
            "external-ip": {
                "pod-3": sent("pod-1"),
                "client": sent("pod-1"),
                "node": sent("pod-1", "remote-1", seen="node"),
            }
        },
        slices("pod-1", "remote-1"),
        LOCAL,
        options="no pods, node ports at all addresses",
    ),
]

CASES = [
    *OBJECTS, *ENDPOINTS, *LISTS, *ALGORITHMS, *ADDRESSES, *NOTHING, *CLAIMS, *RANGES, *SOURCES,
    *CORNERS,
]  # fmt: skip

OPTIONS: dict[str, tuple[str, ...]] = {
    "usual": ("--detect-local-mode=NodeCIDR",),
    "an interface's prefix, a proxy name, masquerade all": (
        "--detect-local-mode=InterfaceNamePrefix",
        "--pod-interface-name-prefix=vethpod",
        "--proxy-name=mine",
        "--masquerade-all",
    ),
    "a bridge": ("--detect-local-mode=BridgeInterface", "--pod-bridge-interface=vethpod3"),
    "the pods' IPv4 network, no external IPs, node ports in a network": (
        "--cluster-cidr=10.244.0.0/16",
        "--no-allow-service-external-ips",
        "--nodeport-addresses=198.51.100.0/24",
    ),
    "no pods, node ports at all addresses": ("--nodeport-addresses=0.0.0.0/0,::/0",),
}
"""The agent's options for each group of cases. Only these need another process."""

NOT_HERE = {
    "Nothing is programmed before Services and EndpointSlices": (
        "manifests are always complete: needs an API server",
        "tests/cluster/test_agent.py::test_nothing_is_programmed_before_everything_is_listed",
    ),
    "Up to 65,536 clients are remembered": (
        "needs a full map",
        "tests/kernel/test_affinity.py::test_a_flood_to_one_service_does_not_move_the_clients_of_another",
    ),
    "Weights are exact while their sum": (
        "shares of thousands of slots",
        "tests/kernel/test_algorithms.py::test_connections_are_in_proportion_to_the_weights",
    ),
    "`source-hash` with session affinity": (
        "needs many clients",
        "tests/kernel/test_algorithms.py::"
        "test_a_remembered_client_stays_and_a_new_one_is_placed_by_its_hash",
    ),
    "When an endpoint is added or removed, of N": (
        "needs many clients",
        "tests/kernel/test_algorithms.py::test_few_clients_move_when_an_endpoint_is_removed_or_added",
    ),
    "kube-proxy does not count them. With the annotation": (
        "what is counted for each endpoint is no packet's outcome",
        "tests/kernel/test_endpoint_counters.py::"
        "test_connections_add_up_by_endpoint_and_no_other_service_is_counted",
    ),
    "A count begins with the first connection": (
        "a day is not waited for; the agent's restart shows that the kernel keeps the counts",
        "tests/kernel/test_endpoint_counters.py::test_the_agent_shows_them_also_after_a_restart",
    ),
    "The counts of a port's endpoints add up": (
        "needs the counts of the whole Service",
        "tests/kernel/test_endpoint_counters.py::"
        "test_connections_add_up_by_endpoint_and_no_other_service_is_counted",
    ),
    "65,536 pairs of an address and an endpoint": (
        "needs a full set",
        "tests/kernel/test_endpoint_counters.py::"
        "test_a_full_set_counts_no_more_endpoints_and_connects_all_the_same",
    ),
    "With `--no-counters` the annotation": (
        "needs an agent without counters",
        "tests/kernel/test_endpoint_counters.py::test_nothing_is_counted_without_counters",
    ),
    "`healthCheckNodePort` (policy Local)": (
        "the agent's own answer over HTTP, behind no rule",
        "tests/unit/test_health.py::test_a_health_check_port_answers_each_family_by_its_own_endpoints",
    ),
    "An endpoint is an address here": (
        "a number in that answer",
        "tests/unit/test_health.py::test_a_services_health_check_port",
    ),
    "| a flow to a Service in a conntrack zone other than 0": (
        "needs another stage of the packet's path, and what is deleted is no packet's outcome",
        "tests/unit/test_conntrack.py::test_an_untranslated_flow_in_another_zone_is_another_stage_of_the_way",
    ),
}
"""Statements that the packets of this test cannot show: why, and what holds them."""
