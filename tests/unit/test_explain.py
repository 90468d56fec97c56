"""What `explain` answers: who has the address, who meets what, and why not."""

from __future__ import annotations

import io
import re
from typing import Any

import msgspec
import pytest
from rich.console import Console

from agent.cli.explain import show
from agent.config.settings import Settings
from rules.diff import Elements
from rules.endpoint_report import QuestionError
from rules.events import NodeAddresses, Upsert
from rules.explain import (
    ADMITTED,
    NODE,
    OUTSIDE,
    POD,
    Asked,
    EndpointList,
    Explanation,
    Reached,
    destination_text,
    explain,
    parse_destination,
)
from rules.objects import SCTP, TCP, UDP, EndpointSlice, Object, parse_address
from rules.state import State
from rules.tables import SETS
from tests.manifest import balancing, endpoint, endpoint_slice, node, service, service_cidr

LOCAL, REMOTE, OTHER = "10.244.1.11", "10.244.2.11", "10.244.2.12"


def stepped(*objects: Object, **chosen: Any) -> State:
    state = State(Settings(node="node-1", **({"cluster_cidr": "10.244.0.0/16"} | chosen)).options())
    own = frozenset(map(parse_address, ("172.31.0.2", "172.31.0.77")))
    state.apply([NodeAddresses(own, (parse_address("172.31.0.2"),))])
    state.apply([Upsert(o) for o in (node(), service_cidr("10.96.0.0/16"), *objects)])
    state.step()
    return state


def web(**spec: Any) -> Object:
    return service(
        **{
            "type": "LoadBalancer",
            "cluster_ips": ["10.96.0.10"],
            "externalIPs": ["203.0.113.1"],
            "ingress": [{"ip": "203.0.113.2"}],
            "ports": [{"name": "http", "port": 80, "nodePort": 30080}],
            **spec,
        }
    )


def behind(*addresses: str) -> EndpointSlice:
    return endpoint_slice(
        "web",
        [endpoint(a, node="node-1" if a.startswith("10.244.1.") else "node-2") for a in addresses],
    )


def by_asker(found: Explanation) -> dict[str, Asked]:
    return {asked.who: asked for asked in found.asked}


def text(found: Explanation) -> str:
    console = Console(file=io.StringIO(), width=200)
    show(found, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# --- the question -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "protocol", "written"),
    [
        ("10.0.0.1:80", TCP, "10.0.0.1:80/tcp"),
        ("10.0.0.1:53/UDP", UDP, "10.0.0.1:53/udp"),
        ("[fd00::1]:80", TCP, "[fd00::1]:80/tcp"),
        ("[fd00::1]:9/sctp", SCTP, "[fd00::1]:9/sctp"),
    ],
)
def test_targets(question: str, protocol: int, written: str) -> None:
    target = parse_destination(question)
    assert (target.protocol, destination_text(target)) == (protocol, written)


@pytest.mark.parametrize(
    "question",
    [
        *("", "80", "10.0.0.1", "10.0.0.1:", "10.0.0.1:http", "10.0.0.1:0", "10.0.0.1:65536"),
        *("fd00::1:80", "10.0.0.1:80/icmp", "10.0.0:80", "[10.0.0.1:80", "web:80"),
        "10.0.0.1:" + "9" * 5000,
    ],
)
def test_a_target_that_is_none_says_what_to_write(question: str) -> None:
    with pytest.raises(QuestionError, match=r"write it|not one of|ports are 1 to") as caught:
        parse_destination(question)
    assert "\n" not in str(caught.value)


# --- who has it ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "kind", "policy", "used", "inside"),
    [
        ("10.96.0.10:80", "cluster IP", "internalTrafficPolicy: Cluster", "Cluster", None),
        ("203.0.113.1:80", "external IP", "externalTrafficPolicy: Local", "Local", "Cluster"),
        ("203.0.113.2:80", "load balancer IP", "externalTrafficPolicy: Local", "Local", "Cluster"),
        ("172.31.0.2:30080", "node port", "externalTrafficPolicy: Local", "Local", "Cluster"),
    ],
)
def test_the_frontend_its_policy_and_its_lists(
    question: str, kind: str, policy: str, used: str, inside: str | None
) -> None:
    state = stepped(web(externalTrafficPolicy="Local"), behind(LOCAL, REMOTE))
    answering = explain(state, question).answering
    assert answering is not None
    assert (answering.service, answering.port) == ("default/web", "80/tcp (http)")
    assert (answering.kind, answering.policy) == (kind, policy)
    cluster = EndpointList("Cluster", "ready", (f"{LOCAL}:8080", f"{REMOTE}:8080"))
    local = EndpointList("Local", "ready and on this node", (f"{LOCAL}:8080",))
    assert answering.list == (local if used == "Local" else cluster)
    assert answering.inside == (cluster if inside else None)


def test_a_contested_address_names_the_service_that_has_it_and_the_others() -> None:
    young = service(
        "young",
        created="2026-02-01T00:00:00Z",
        cluster_ips=["10.96.0.20"],
        externalIPs=["203.0.113.1"],
    )
    found = explain(stepped(young, web(), behind(LOCAL)), "203.0.113.1:80")
    assert found.answering is not None
    assert found.answering.service == "default/web"
    assert found.answering.lost_by == ("default/young",)
    assert "default/young" in text(found)


# --- who meets what -----------------------------------------------------------------------------


def test_each_asker_has_a_trace() -> None:
    found = by_asker(explain(stepped(web(), behind(LOCAL, REMOTE)), "10.96.0.10:80"))
    assert list(found) == [POD, NODE, OUTSIDE]
    assert found[POD].address == "10.244.1.1"
    assert found[POD].endpoints == (
        Reached(f"{LOCAL}:8080", 0, "no", 1),
        Reached(f"{REMOTE}:8080", 1, "no", 1),
    )
    assert {r.sees_node for r in found[NODE].endpoints} == {"mark"}
    assert {r.sees_node for r in found[OUTSIDE].endpoints} == {"mark"}
    assert "service-ips" in {m.set for s in found[POD].steps for m in s.matched}


def test_the_example_pod_is_no_endpoint() -> None:
    state = stepped(web(), behind("10.244.1.1", "10.244.1.2"))
    assert by_asker(explain(state, "10.96.0.10:80"))[POD].address == "10.244.1.3"


@pytest.mark.parametrize(
    ("address", "who"),
    [
        ("10.244.1.200", POD),
        (LOCAL, POD),
        ("172.31.0.2", NODE),
        ("172.31.0.77", NODE),
        ("198.51.100.9", OUTSIDE),
        ("172.31.0.3", OUTSIDE),
    ],
)
def test_an_address_that_asks_is_put_into_its_class(address: str, who: str) -> None:
    found = explain(stepped(web(), behind(LOCAL)), "10.96.0.10:80", address)
    assert [(a.who, a.address) for a in found.asked] == [(who, address)]


def test_a_local_endpoint_is_a_pod_even_if_no_network_identifies_pods() -> None:
    state = stepped(web(), behind(LOCAL), cluster_cidr="")
    (asked,) = explain(state, "10.96.0.10:80", LOCAL).asked
    assert asked.who == POD
    assert asked.endpoints == (Reached(f"{LOCAL}:8080", 0, "hairpin", 1),)


@pytest.mark.parametrize(
    ("chosen", "interfaces", "who"),
    [
        ({"pod_interface_name_prefix": "veth"}, {"10.244.9.9": "veth12"}, POD),
        ({"pod_interface_name_prefix": "veth"}, {"10.244.9.9": "eth0"}, OUTSIDE),
        ({"pod_interface_name_prefix": "veth"}, {}, OUTSIDE),
        ({"pod_bridge_interface": "cbr0"}, {"10.244.9.9": "cbr0"}, POD),
        ({"pod_bridge_interface": "cbr0"}, {"10.244.9.9": "cbr01"}, OUTSIDE),
    ],
)
def test_a_pod_is_identified_by_its_interface_where_the_rules_do_so(
    chosen: dict[str, Any], interfaces: dict[str, str], who: str
) -> None:
    """With the interfaces of the node; without them the answer says that they are not known."""
    mode = "BridgeInterface" if "pod_bridge_interface" in chosen else "InterfaceNamePrefix"
    spec = {"externalTrafficPolicy": "Local", "externalIPs": ["203.0.113.1"]}
    state = stepped(web(**spec), behind(REMOTE), cluster_cidr="", detect_local_mode=mode, **chosen)
    known = {parse_address(address): name for address, name in interfaces.items()}
    question = "203.0.113.1:80", "10.244.9.9"
    live = explain(state, *question, interface=lambda address: known.get(address, ""))
    outcome = "sent" if who == POD else "dropped"
    assert [(a.who, a.outcomes) for a in live.asked] == [(who, (outcome,))]
    assert not any("interface" in note for note in live.notes)
    (note,) = explain(state, *question).notes
    assert "10.244.9.9 was taken for a client outside" in note


def test_an_asker_of_the_other_family_is_an_error() -> None:
    with pytest.raises(QuestionError, match="one is IPv4 and the other IPv6"):
        explain(stepped(web()), "10.96.0.10:80", "fd00::1")
    with pytest.raises(QuestionError, match="no IP address; write it like"):
        explain(stepped(web()), "10.96.0.10:80", "some-pod")


def test_source_ranges_have_an_asker_on_either_side() -> None:
    state = stepped(web(loadBalancerSourceRanges=["172.31.0.100/32"]), behind(LOCAL))
    guarded = explain(state, "203.0.113.2:80")
    assert guarded.answering is not None
    assert guarded.answering.source_ranges == ("172.31.0.100/32",)
    found = by_asker(guarded)
    assert found[OUTSIDE].outcomes == ("dropped",)
    assert found[ADMITTED].address == "172.31.0.100"
    assert found[ADMITTED].outcomes == ("sent",)
    other = explain(state, "203.0.113.1:80")
    assert other.answering is not None
    assert other.answering.source_ranges == ()
    assert ADMITTED not in by_asker(other)


def test_elements_from_the_kernel_decide_what_is_met() -> None:
    state = stepped(web(), behind(LOCAL))
    elements = {**state.elements(), SETS[4].endpoints: {}}
    found = explain(state, "10.96.0.10:80", elements=elements)
    assert found.from_kernel
    assert found.answering is not None
    assert found.answering.list.endpoints == (f"{LOCAL}:8080",)
    assert {a.outcomes for a in found.asked} == {("refused",)}


def test_elements_of_another_program_are_an_error() -> None:
    state = stepped(web(), behind(LOCAL))
    verdicts = dict.fromkeys(state.elements()[SETS[4].service_ips], "lb-99")
    elements: Elements = {**state.elements(), SETS[4].service_ips: verdicts}
    with pytest.raises(QuestionError, match="no chain lb-99"):
        explain(state, "10.96.0.10:80", elements=elements)


def test_detectors_that_tell_nothing_are_noted() -> None:
    (note,) = explain(stepped(web(), cluster_cidr=""), "10.96.0.10:80").notes
    assert "detectLocalMode None" in note
    assert explain(stepped(web()), "10.96.0.10:80").notes == ()


def test_a_state_that_knows_nothing_still_answers() -> None:
    state = State(Settings(node="node-1").options())
    state.step()
    for question in ("10.96.0.10:80", "[fd00::1]:80"):
        found = explain(state, question)
        assert found.answering is None
        assert {a.outcomes for a in found.asked} == {("passed on untouched",)}
        assert text(found)


# --- why not ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        ("10.96.0.10:81", "a cluster IP of Service default/web, which has no port 81/tcp"),
        ("10.96.0.10:80/udp", r"no port 80/udp; its ports: 80/tcp \(http\)"),
        ("203.0.113.1:81", "an external IP of Service default/web"),
        ("203.0.113.2:81", "a load balancer IP of Service default/web"),
        ("10.96.0.99:80", "in a ServiceCIDR"),
        ("10.96.0.30:80", "service-proxy-name=mesh leave it to another proxy"),
        ("172.31.0.2:30081", "an address of this node, but no Service has node port 30081/tcp"),
        ("172.31.0.77:30080", r"node ports answer at 172.31.0.2 only \(--nodeport-addresses\)"),
        ("127.0.0.1:30080", "never at loopback"),
        (f"{REMOTE}:8080", "an endpoint of Service default/web"),
        ("192.0.2.9:80", "no Service has 192.0.2.9"),
    ],
)
def test_why_there_is_no_answer(question: str, reason: str) -> None:
    meshed = msgspec.structs.replace(
        service("meshed", cluster_ips=["10.96.0.30"]), proxy_name="mesh"
    )
    found = explain(stepped(web(), behind(LOCAL, REMOTE), meshed), question)
    assert found.answering is None
    assert re.search(reason, found.why_not), found.why_not
    assert "is answered by no Service" in text(found)


# --- showing ------------------------------------------------------------------------------------


def with_algorithm(algorithm: str, **weights: str) -> Explanation:
    state = stepped(
        service("web", annotations=balancing(algorithm, **weights)), behind(LOCAL, REMOTE, OTHER)
    )
    return explain(state, "10.96.0.10:80")


def test_a_weighted_endpoint_says_its_share_of_the_slots() -> None:
    found = with_algorithm("weighted", weights=f"{LOCAL}=3,{OTHER}=0")
    assert found.answering is not None
    assert (found.answering.algorithm, found.answering.drained) == ("weighted", 1)
    assert {r.endpoint: r.slots for r in by_asker(found)[OUTSIDE].endpoints} == {
        f"{LOCAL}:8080": 3,
        f"{REMOTE}:8080": 1,
    }
    shown = " ".join(text(found).split())
    assert "1 drained (weight 0)" in shown
    assert f"one of 2 at random: {LOCAL}:8080 (3 of 4 slots), {REMOTE}:8080 (1 of 4 slots)" in shown


def test_a_hashed_client_has_one_endpoint_and_clients_in_general_have_all() -> None:
    found = with_algorithm("source-hash")
    assert len(by_asker(found)[OUTSIDE].endpoints) == 3
    assert "one of 3 by its address" in " ".join(text(found).split())
    state = stepped(
        service("web", annotations=balancing("source-hash")), behind(LOCAL, REMOTE, OTHER)
    )
    reached = set()
    for number in range(1, 60):
        (asked,) = explain(state, "10.96.0.10:80", f"192.0.2.{number}").asked
        (one,) = asked.endpoints
        assert one.slots == 1
        reached.add(one.endpoint)
    assert reached == {f"{LOCAL}:8080", f"{REMOTE}:8080", f"{OTHER}:8080"}


def test_what_is_shown() -> None:
    state = stepped(
        web(externalTrafficPolicy="Local", sessionAffinity="ClientIP"), behind(LOCAL, REMOTE)
    )
    shown = text(explain(state, "203.0.113.1:80", LOCAL))
    for words in (
        "203.0.113.1:80/tcp is an external IP of Service default/web, port 80/tcp (http)",
        "goes to one of 2 at random: 10.244.1.11:8080, 10.244.2.11:8080",
        "10.244.1.11:8080 sees an address of this node, as it is the client itself (hairpin)",
        "comes back to the same one for 10800 s",
        "@inside-ips { 203.0.113.1 . tcp . 80 : goto sticky-inside-lb-2 }",
    ):
        assert words in shown


def test_long_lists_are_cut_for_people_only() -> None:
    state = stepped(web(), behind(*(f"10.244.2.{n}" for n in range(1, 101))))
    found = explain(state, "10.96.0.10:80")
    assert len(found.asked[0].endpoints) == 100
    assert "and 94 more" in text(found)
    assert len(text(found).splitlines()) < 40


def test_the_json_is_the_explanation() -> None:
    found = explain(stepped(web(), behind(LOCAL)), "10.96.0.10:80")
    assert msgspec.json.decode(msgspec.json.encode(found), type=Explanation) == found
