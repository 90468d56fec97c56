"""Objects that are broken, or meant to break something, beside others that are not.

Each is applied to a State in one transaction with a good Service, and the outcome is read back from
the kernel: the good Service works as if it were alone, the tables are whole, and what is wrong is
said of the one object that is wrong.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from lab.world import World
from rules import text as nft
from rules.decode import decode_any
from rules.events import Delete, Event, Upsert
from rules.objects import InvalidObject, Name, Object, Service
from rules.options import Options
from rules.tables import SETS
from rules.transaction import commands, encode
from tests import manifest, oracle
from tests.kernel.proxy import Proxy
from tests.oracle import Objects, Where

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make namespaces")

OPTIONS = Options(node="node-1")
NFT = shutil.which("nft")
GOOD = (
    manifest.service(
        "good", type="NodePort", ports=[{"name": "http", "port": 80, "nodePort": 31000}]
    ),
    manifest.endpoint_slice(
        "good", [manifest.endpoint("10.244.1.1"), manifest.endpoint("10.244.2.1")]
    ),
    manifest.endpoint_slice("good", [manifest.endpoint("fd00:10:244:1::1")]),
)
AROUND = (manifest.node(), manifest.service_cidr("10.96.0.0/16", "fd00:10:96::/112"))


@pytest.fixture(scope="module")
def bare_world() -> Iterator[World]:
    with World(pods=0, remotes=0, prefix="sliceproxy-hostile") as built:
        yield built


@pytest.fixture
def proxy(bare_world: World) -> Iterator[Proxy]:
    """A proxy that knows its node; afterwards its tables must be well-formed to everybody."""
    with Proxy(bare_world, options=OPTIONS) as started:
        started.put(*AROUND)
        yield started
        started.check()
        list_with_nft(bare_world)
        started.kernel.remove()


def list_with_nft(world: World) -> str:
    """What `nft list ruleset` prints in the namespace; "" where there is no nft."""
    if NFT is None:
        return ""
    process = world.popen("node", [NFT, "list", "ruleset"], stdout=-1, stderr=-1, text=True)
    listing, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return str(listing)


def decoded(*documents: Any) -> tuple[list[Object], list[InvalidObject]]:
    """Documents as a source decodes them: records, and what is none."""
    found = list(decode_any(json.dumps({"kind": "List", "items": documents}).encode()))
    return (
        [o for o in found if not isinstance(o, InvalidObject)],
        [o for o in found if isinstance(o, InvalidObject)],
    )


def picture(proxy: Proxy) -> oracle.Picture:
    """What the kernel holds."""
    found = {family: proxy.kernel.find(family) for family in SETS}
    chains = {family: table.chains for family, table in found.items() if table}
    return oracle.observed(proxy.in_kernel(), chains)[0]


def wanted(*objects: Object) -> oracle.Picture:
    """What the kernel must hold for these and what is around them."""
    known = (*objects, *AROUND)
    kinds = {kind: tuple(o for o in known if type(o).__name__ == kind) for kind in KINDS}
    return oracle.expected(
        Objects(kinds["Service"], kinds["EndpointSlice"], AROUND[0], kinds["ServiceCIDR"]), OPTIONS
    )


KINDS = ("Service", "EndpointSlice", "Node", "ServiceCIDR")


def service(name: str = "evil", **spec: Any) -> dict[str, Any]:
    spec.setdefault("cluster_ips", ["10.96.0.66", "fd00:10:96::66"])
    return manifest.service_document(name, **spec)


def piece(*endpoints: Any, name: str | None = None, **fields: Any) -> dict[str, Any]:
    """A slice of the Service `evil`; `fields` replace those of the document's top."""
    documents = [manifest.endpoint(e) if isinstance(e, str) else e for e in endpoints]
    return {**manifest.slice_document("evil", documents, name=name, family="IPv4"), **fields}


def with_spec(**spec: Any) -> dict[str, Any]:
    document = service()
    document["spec"].update(spec)
    return document


def balanced(*sources: Any) -> dict[str, Any]:
    return service(
        type="LoadBalancer",
        ingress=[{"ip": "198.51.100.9"}],
        loadBalancerSourceRanges=list(sources),
    )


# --- objects that are none -----------------------------------------------------------------------

INVALID = {
    "a Service without a name": {"kind": "Service", "metadata": {}, "spec": {}},
    "a Service without a spec": {"kind": "Service", "metadata": {"name": "evil"}},
    "a Service with a text for a port": service(ports=[{"port": "80"}]),
    "a Service with a number for an address": with_spec(externalIPs=[1]),
    "a Service with a null address": with_spec(clusterIPs=[None]),
    "a Service with a list for a policy": with_spec(externalTrafficPolicy=["Local"]),
    "a slice of an unknown family": piece("10.0.0.1", addressType="IPv9"),
    "a slice of 1,001 endpoints": piece(*(f"10.1.{n >> 8}.{n & 255}" for n in range(1, 1002))),
    "a slice with a text for a condition": piece(
        {"addresses": ["10.0.0.1"], "conditions": {"ready": "yes"}}
    ),
    "a slice with a null endpoint": piece(None),
    "a Node with a text for addresses": {
        "kind": "Node",
        "metadata": {"name": "node-1"},
        "status": {"addresses": "10.0.0.1"},
    },
    "a ServiceCIDR without a spec": {"kind": "ServiceCIDR", "metadata": {"name": "evil"}},
    "no object at all": "; flush ruleset",
    "an object of no kind": {"metadata": {"name": "evil"}},
}  # fmt: skip


@pytest.mark.parametrize("document", INVALID.values(), ids=INVALID)
def test_what_is_no_object_is_named_and_hides_nothing(proxy, document):
    good = [json.loads(json.dumps(d)) for d in (service("good"), service("other"))]
    records, invalid = decoded(good[0], document, good[1])
    assert [r.name.name for r in records] == ["good", "other"]
    (error,) = invalid
    assert error.subject
    assert error.reason in str(error)
    if isinstance(document, dict) and document["metadata"].get("name"):
        assert document["metadata"]["name"] in error.subject
    proxy.put(*records)
    assert picture(proxy) == wanted(*records)


# --- objects with unusable values ----------------------------------------------------------------

HTTP = {"name": "http", "port": 80}
PROBLEMS = {
    "an external IP that is none": (with_spec(externalIPs=["nonsense"]), "externalIPs"),
    "a loopback external IP": (with_spec(externalIPs=["127.0.0.1", "::1"]), "loopback"),
    "an external IP with a zone": (with_spec(externalIPs=["fe80::1%eth0"]), "zone index"),
    "a cluster IP that is none": (with_spec(clusterIPs=["10.96.0.66", "x"]), "clusterIPs"),
    "a port beyond ports": (service(ports=[{"port": 65536}, HTTP]), "65536 is not a port"),
    "a negative node port": (
        service(ports=[{"port": 81, "nodePort": -1}, HTTP]),
        "-1 is not a port",
    ),
    "an unknown protocol": (service(ports=[{"port": 443, "protocol": "QUIC"}, HTTP]), "'QUIC'"),
    "an unknown policy": (with_spec(externalTrafficPolicy="Nowhere"), "'Nowhere'"),
    "an unknown type": (with_spec(type="Portal"), "'Portal'"),
    "an unknown affinity": (with_spec(sessionAffinity="Always"), "'Always'"),
    "a source range that is none": (balanced("10.0.0.0/33"), "'10.0.0.0/33' is not a CIDR"),
    "an endpoint that is none": (piece("10.0.0.1", "nonsense"), "'nonsense'"),
    "a loopback endpoint": (piece("127.0.0.1", "10.0.0.1"), "127.0.0.1 is a loopback address"),
    "an endpoint with a zone": (piece("fd00::1%eth0"), "has a zone index"),
    "an endpoint of the other family": (piece("10.0.0.1", "fd00::1"), "addressType"),
    "an endpoint without address": (piece({"addresses": []}), "has no address"),
    "a target port beyond ports": (piece("10.0.0.1", ports=[{"port": 0}]), "0 is not a port"),
    "a ServiceCIDR that is none": (
        {"kind": "ServiceCIDR", "metadata": {"name": "evil"}, "spec": {"cidrs": ["x", "::/0"]}},
        "'x' is not a CIDR",
    ),
}


@pytest.mark.parametrize(("document", "word"), PROBLEMS.values(), ids=PROBLEMS)
def test_an_unusable_value_is_noted_for_its_object_alone(proxy, document, word):
    (record,), invalid = decoded(document)
    assert not invalid
    beside = () if isinstance(record, Service) else decoded(service())[0]
    objects = (*GOOD, *beside, record)
    proxy.put(*objects)
    (problem,) = proxy.state.problems.collect(1.0).opened
    assert str(problem.subject) == f"{type(record).__name__} {record.name}"
    assert problem.code == "unusable_value"
    assert word in problem.text
    assert picture(proxy) == wanted(*objects)
    # the same object again opens nothing
    assert not proxy.put(*objects)
    assert not any(proxy.state.problems.collect(2.0))
    proxy.delete(record)
    assert proxy.state.problems.collect(3.0).closed == (problem,)


STRANGE = {
    "null lists": (
        with_spec(externalIPs=None, ports=None, loadBalancerSourceRanges=None),
        piece(endpoints=None, ports=None),
    ),
    "no ports": (service(ports=[]), piece("10.0.0.1")),
    "an address twice in a slice and in another": (
        service(),
        piece("10.0.0.1", "10.0.0.1", "10.0.0.2"),
        piece("10.0.0.1", name="more"),
    ),
    "a cluster IP as an external IP": (
        with_spec(externalIPs=["10.96.0.66", "10.96.0.66"]),
        piece("10.0.0.1"),
    ),
    "endpoints that are cluster IPs": (service(), piece("10.96.0.66", "10.96.0.10")),
    "one name for all ports": (
        service(ports=[{"port": 80}, {"port": 81, "protocol": "UDP"}, {"port": 82}]),
        piece("10.0.0.1", ports=[{"port": 80}, {"port": 81}, {"port": 81, "protocol": "UDP"}]),
    ),
    "one node port for all ports": (
        service(type="NodePort", ports=[{"port": p, "nodePort": 30000} for p in (80, 81, 82)]),
        piece("10.0.0.1"),
    ),
    "all sources and none": (
        balanced("0.0.0.0/0", "::/0", "0.0.0.0/32"),
        piece("10.0.0.1"),
    ),
    "sources that hold the node, so that the address itself is one too": (
        balanced("172.31.0.0/24", "172.31.0.0/16"),
        piece("10.0.0.1"),
    ),
    "no source that parses": (balanced("all"), piece("10.0.0.1")),
    "sources that overlap and touch": (
        balanced("10.0.0.0/8", "10.0.0.0/9", "11.0.0.0/8", "9.255.255.255", "255.255.255.255"),
        piece("10.0.0.1"),
    ),
    "sources of the other family": (balanced("fd00::/8"), piece("10.0.0.1")),
    "ServiceCIDRs of everything": (
        *(
            {"kind": "ServiceCIDR", "metadata": {"name": f"c{n}"}, "spec": {"cidrs": cidrs}}
            for n, cidrs in enumerate((["0.0.0.0/0", "::/0"], ["10.0.0.1/0"], ["255.255.255.0/24"]))
        ),
    ),
    "sticky for a day and a second": (
        with_spec(
            sessionAffinity="ClientIP",
            sessionAffinityConfig={"clientIP": {"timeoutSeconds": 86400}},
        ),
        {
            **manifest.service_document("short", cluster_ips=["10.96.0.67"]),
            "spec": {
                "clusterIP": "10.96.0.67",
                "ports": [{"port": 80}],
                "sessionAffinity": "ClientIP",
                "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 1}},
            },
        },
        piece("10.0.0.1"),
    ),
    "the highest numbers": (
        with_spec(
            externalIPs=["255.255.255.255", "feff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"],
            ports=[{"port": 65535, "nodePort": 65535, "protocol": "SCTP"}],
        ),
        piece("255.255.255.255", ports=[{"port": 65535, "protocol": "SCTP"}]),
    ),
    "a slice of a Service that is not there": (piece("10.0.0.1"),),
}  # fmt: skip


@pytest.mark.parametrize("documents", STRANGE.values(), ids=STRANGE)
def test_strange_but_legal_objects_leave_the_others_working(proxy, documents):
    records, invalid = decoded(*documents)
    assert not invalid
    proxy.put(*GOOD, *records)
    seen = picture(proxy)
    if documents is STRANGE["null lists"] or documents is STRANGE["no ports"]:
        # whether a cluster IP without any port is known as one does not matter
        seen = seen._replace(cluster_ips=wanted(*GOOD, *records).cluster_ips)
    assert seen == wanted(*GOOD, *records)
    proxy.check()
    list_with_nft(proxy.world)
    proxy.delete(*records)
    assert picture(proxy) == wanted(*GOOD)


# --- what means something to nft -----------------------------------------------------------------

SYNTAX = ('"; flush ruleset; #', "x }\nflush ruleset\ntable ip evil {", "a\\\nflush ruleset", "*;#")
MARKS = ("flush ruleset", "evil", "*;#", "shibboleth")


@pytest.mark.parametrize("text", [*SYNTAX, "shibboleth"])
def test_no_text_of_an_object_reaches_the_kernel_or_the_dry_run(proxy, text):
    document = service(
        text,
        namespace=text,
        ports=[{"name": text, "port": 80, "nodePort": 30066}],
        type="NodePort",
        sessionAffinity="ClientIP",
    )
    document["metadata"].update(labels={text: text}, annotations={text: text})
    endpoint = manifest.endpoint(
        "10.0.0.1", node=text, zone=text, for_zones=[text, "z"], for_nodes=[text, "node-1"]
    )
    endpoint["targetRef"] = {"kind": "Pod", "name": text, "namespace": text}
    evil_slice = manifest.slice_document(
        text, [endpoint], name=text, namespace=text, ports=[{"name": text, "port": 8080}]
    )
    evil_slice["metadata"]["annotations"] = {
        "endpoints.kubernetes.io/last-change-trigger-time": text,
        text: text,
    }
    node = json.loads(
        json.dumps({"kind": "Node", "metadata": {"name": "node-1", "annotations": {text: text}}})
    )
    node["metadata"]["labels"] = {"topology.kubernetes.io/zone": text, text: text}
    cidr = {"kind": "ServiceCIDR", "metadata": {"name": text}, "spec": {"cidrs": ["10.96.0.0/16"]}}
    records, invalid = decoded(document, evil_slice, node, cidr)
    assert not invalid
    transaction = proxy.put(*records)
    assert transaction.change.added[SETS[4].endpoints], "the endpoint was programmed"

    tables, elements = proxy.state.tables(), proxy.state.elements()
    texts = [
        *(nft.table(table, elements) for table in tables),
        *commands(transaction),
        list_with_nft(proxy.world),
    ]
    raw = encode(transaction).encode()
    for mark in (*MARKS, text):
        assert not any(mark in written for written in texts)
        assert mark.encode() not in raw
    for family in SETS:
        found = proxy.kernel.find(family)
        names = (*found.sets, *found.chains, *found.rules)
        assert all(name.replace("-", "").isalnum() and name.isascii() for name in names), names


# --- two Services with one address ---------------------------------------------------------------

CONTESTED = {
    "cluster IP": {
        "ours": {},
        "where": [Where(4, bytes((10, 96, 0, 10)), 6, 80)],
        "own": False,
    },
    "external IP": {
        "ours": {"externalIPs": ["198.51.100.1"]},
        "where": [Where(4, bytes((198, 51, 100, 1)), 6, 80)],
        "own": True,
    },
    "load balancer IP": {
        "ours": {"type": "LoadBalancer", "ingress": [{"ip": "198.51.100.1"}]},
        "where": [Where(4, bytes((198, 51, 100, 1)), 6, 80)],
        "own": True,
    },
    "node port": {
        "ours": {
            "type": "NodePort",
            "ports": [{"name": "http", "port": 80, "nodePort": 30080}],
        },
        "where": [Where(4, b"", 6, 30080), Where(6, b"", 6, 30080)],
        "own": True,
    },
}
OLD, YOUNG = "2026-01-01T00:00:00Z", "2026-01-01T00:00:01Z"
contested = pytest.mark.parametrize("kind", list(CONTESTED))


def rivals(kind: str, **created: str | None) -> dict[str, tuple[Object, ...]]:
    """Services that claim one address, each with its slices, whose endpoints tell them apart."""
    result = {}
    for number, (name, age) in enumerate(sorted(created.items()), 1):
        own = [f"10.96.0.{10 + number}", f"fd00:10:96::{10 + number}"]
        if not CONTESTED[kind]["own"]:
            own[0] = "10.96.0.10"
        result[name] = (
            manifest.service(name, cluster_ips=own, created=age, **CONTESTED[kind]["ours"]),
            manifest.endpoint_slice(name, [manifest.endpoint(f"10.244.9.{number}", node="n")]),
            manifest.endpoint_slice(
                name, [manifest.endpoint(f"fd00:10:244:9::{number}", node="n")]
            ),
        )
    return result


def holder(proxy: Proxy, kind: str) -> str:
    """Whose endpoints stand at the contested address in the kernel."""
    seen = picture(proxy)
    numbers = {
        target.address[-1]
        for where in CONTESTED[kind]["where"]
        for target in seen.frontends[where].endpoints
    }
    (number,) = numbers
    return "abc"[number - 1]


def assert_as_wanted(proxy: Proxy, *groups: tuple[Object, ...]) -> None:
    objects = [o for group in groups for o in group]
    assert picture(proxy) == wanted(*objects)
    proxy.check()


@contested
@pytest.mark.parametrize("order", list(itertools.permutations("abc")), ids="".join)
def test_the_oldest_keeps_the_address_in_any_order_of_events(proxy, kind, order):
    known = rivals(kind, a=YOUNG, b=OLD, c="2026-02-02T00:00:00Z")
    for name in order:
        proxy.put(*known[name])
    assert holder(proxy, kind) == "b"
    assert_as_wanted(proxy, *known.values())


@contested
@pytest.mark.parametrize("order", list(itertools.permutations("abc")), ids="".join)
def test_the_oldest_keeps_the_address_in_one_transaction(proxy, kind, order):
    known = rivals(kind, a=YOUNG, b=OLD, c=YOUNG)
    proxy.put(*(o for name in order for o in known[name]))
    assert holder(proxy, kind) == "b"
    assert_as_wanted(proxy, *known.values())


@contested
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_at_one_age_the_first_by_namespace_and_name_keeps_it(proxy, kind, order):
    known = rivals(kind, a=OLD, b=OLD)
    for name in order:
        proxy.put(*known[name])
    assert holder(proxy, kind) == "a"
    assert proxy.state.services[Name("default", "a")].age < known["b"][0].age


def test_at_one_age_the_namespace_decides_before_the_name(proxy):
    same = {"cluster_ips": ["10.96.0.10"]}
    for namespace, name, address in (("b", "a", "10.244.9.2"), ("a", "b", "10.244.9.1")):
        proxy.put(
            manifest.service(name, namespace=namespace, **same),
            manifest.endpoint_slice(name, [manifest.endpoint(address)], namespace=namespace),
        )
    assert holder(proxy, "cluster IP") == "a"


@contested
def test_a_service_without_an_age_has_the_weakest_claim(proxy, kind):
    known = rivals(kind, a=None, b=YOUNG)
    for name in "ab":
        proxy.put(*known[name])
    assert holder(proxy, kind) == "b"


@contested
def test_the_address_passes_to_another_when_its_holder_is_deleted_and_back(proxy, kind):
    known = rivals(kind, a=OLD, b=YOUNG)
    proxy.put(*known["a"], *known["b"])
    assert holder(proxy, kind) == "a"
    proxy.delete(known["a"][0])
    assert holder(proxy, kind) == "b"
    assert_as_wanted(proxy, known["a"][1:], known["b"])
    proxy.put(known["a"][0])
    assert holder(proxy, kind) == "a"
    assert_as_wanted(proxy, *known.values())


@contested
def test_the_address_is_handed_over_when_its_holder_gives_it_up(proxy, kind):
    known = rivals(kind, a=OLD, b=YOUNG)
    proxy.put(*known["a"], *known["b"])
    without = manifest.service("a", cluster_ips=["10.96.0.77"], created=OLD)
    proxy.put(without)
    assert holder(proxy, kind) == "b"
    assert_as_wanted(proxy, (without, *known["a"][1:]), known["b"])


@contested
@pytest.mark.parametrize("missed", [False, True], ids=["notified", "missed"])
def test_a_recreated_holder_gives_the_address_to_the_older_service(proxy, kind, missed):
    """Deletion and creation may come as one change: in one transaction, or in one relist, where
    nothing shows but another creation time."""
    known = rivals(kind, a=OLD, b=YOUNG)
    proxy.put(*known["a"], *known["b"])
    younger = rivals(kind, a="2026-03-03T00:00:00Z", b=YOUNG)["a"]
    events: list[Event] = [] if missed else [Delete(Service, younger[0].name)]
    proxy.apply(*events, Upsert(younger[0]))
    assert holder(proxy, kind) == "b"
    assert_as_wanted(proxy, younger, known["b"])


@contested
def test_who_loses_an_address_has_one_problem_and_keeps_its_other_addresses(proxy, kind):
    known = rivals(kind, a=OLD, b=YOUNG)
    proxy.put(*known["a"])
    assert not proxy.state.problems.open()
    proxy.put(*known["b"])
    (problem,) = proxy.state.problems.collect(1.0).opened
    assert problem.subject.service == "default/b"
    assert problem.code == "address_conflict"
    assert "belongs to Service default/a" in problem.text
    own = Where(6, known["b"][0].cluster_ips[-1], 6, 80)
    assert picture(proxy).frontends[own].endpoints
    proxy.delete(known["a"][0])
    assert proxy.state.problems.collect(2.0).closed == (problem,)


@contested
def test_who_loses_an_address_is_reported_once(proxy, kind):
    """Not with every endpoint that is added to or removed from the Service that has it."""
    known = rivals(kind, a=OLD, b=YOUNG)
    proxy.put(*known["a"], *known["b"])
    assert len(proxy.state.problems.collect(1.0).opened) == 1
    for last in (5, 6):
        piece = [manifest.endpoint(f"10.244.9.{n}", node="n") for n in (1, last)]
        proxy.put(manifest.endpoint_slice("a", piece))
    assert not any(proxy.state.problems.collect(2.0))


def test_a_service_cannot_take_another_ones_cluster_ip_as_its_external_ip(proxy):
    victim = rivals("external IP", a=OLD)["a"]
    proxy.put(*victim)
    thief = (
        manifest.service(
            "b", cluster_ips=["10.96.0.66"], created=YOUNG, externalIPs=["10.96.0.11"]
        ),
        manifest.endpoint_slice("b", [manifest.endpoint("10.244.9.2", node="n")]),
    )
    proxy.put(*thief)
    where = Where(4, bytes((10, 96, 0, 11)), 6, 80)
    seen = picture(proxy).frontends[where]
    assert [t.address for t in seen.endpoints] == [bytes((10, 244, 9, 1))]
    assert [p.subject.service for p in proxy.state.problems.open()] == ["default/b"]


def test_the_ruleset_can_be_listed_by_nft_with_everything_in_it(proxy):
    """Session affinity in both families too, which old versions of nft stumble over."""
    proxy.put(
        *GOOD,
        manifest.service(
            "sticky",
            type="LoadBalancer",
            cluster_ips=["10.96.0.20", "fd00:10:96::20"],
            ingress=[{"ip": "198.51.100.9"}, {"ip": "2001:db8::9"}],
            loadBalancerSourceRanges=["10.0.0.0/8", "fd00::/8"],
            externalTrafficPolicy="Local",
            sessionAffinity="ClientIP",
        ),
    )
    listing = list_with_nft(proxy.world)
    if NFT is not None:
        assert listing.count("table ip sliceproxy") == 1
        assert listing.count("table ip6 sliceproxy") == 1
        version = subprocess.run([NFT, "--version"], capture_output=True, text=True, check=True)
        assert "nftables v" in version.stdout
