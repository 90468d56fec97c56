"""kube-proxy's configuration file and ours: every field, every mistake."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from agent.config import document
from agent.config.checks import Bind, ConfigError, parse_bind
from agent.config.data_plane import serves_localhost
from agent.config.durations import Duration, parse_duration
from agent.config.file import KUBE_PROXY, OWN, ConfigFile, merged, parse, read
from agent.config.kube_proxy import FIELDS, Field
from agent.config.settings import OPTIONS, Settings
from agent.kernel.sysctl import ConntrackSettings
from rules.options import DetectLocalMode
from tests.fuzzing import fuzzed

HERE = Path(__file__).parent
KUBEADM = HERE.parent / "recordings" / "kubeadm-kube-proxy.yaml"
DOCS = HERE.parents[1] / "docs" / "configuration.md"


def nested(path: str, value: object) -> dict[str, Any]:
    for part in reversed(path.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def kube_proxy(**fields: Any) -> ConfigFile:
    document = {"kind": KUBE_PROXY[0], "apiVersion": KUBE_PROXY[1], **fields}
    return parse(json.dumps(document), "f.yaml")


def own(**fields: Any) -> ConfigFile:
    return parse(json.dumps({"kind": OWN[0], "apiVersion": OWN[1], **fields}), "f.yaml")


# --- kubeadm ------------------------------------------------------------------------------------


def test_kubeadms_config_map_is_taken_as_it_lies_in_the_cluster() -> None:
    file = read(KUBEADM)
    assert file.without_meaning == ()
    assert set(file.honoured) == {"bindAddress", "clientConnection.kubeconfig", "clusterCIDR"}
    settings = merged(file, {"node": "worker-1"})
    options = settings.options()
    assert options.node == "worker-1"
    assert options.detect_local is DetectLocalMode.CLUSTER_CIDR
    assert [str(n) for n in options.cluster_cidrs] == ["10.244.0.0/16"]
    assert options.mark == 1 << 14
    assert options.node_port_primary
    assert options.node_port_networks == ()
    assert options.allow_external_ips
    assert settings.kubeconfig == "/var/lib/kube-proxy/kubeconfig.conf"
    assert settings.healthz() == Bind("0.0.0.0", 10256)
    assert settings.metrics() == Bind("127.0.0.1", 10249)
    assert settings.oom_score_adj == -999
    assert settings.healthz_timeout == 120


def test_the_configuration_inside_the_config_map_alone_is_the_same() -> None:
    inside = yaml.safe_load(KUBEADM.read_text())["data"]["config.conf"]
    assert parse(inside, "x").chosen == read(KUBEADM).chosen
    as_json = json.dumps(yaml.safe_load(inside))
    assert parse(as_json, "x").chosen == read(KUBEADM).chosen


def test_kubeadms_file_has_every_field_but_those_it_leaves_out_when_empty() -> None:
    inside = yaml.safe_load(yaml.safe_load(KUBEADM.read_text())["data"]["config.conf"])
    there = {
        f"{key}.{name}" if isinstance(value, dict) else key
        for key, value in inside.items()
        for name in (value if isinstance(value, dict) else [""])
    } - {"kind", "apiVersion", "logging.options"}
    ours = {f.path for f in FIELDS if not f.path.startswith("logging.options")}
    assert there <= ours
    assert ours - there == {
        "featureGates",
        "iptables.snatNodeInternalIP",
        "logging.format",
        "logging.vmodule",
        "windowsRunAsService",
    }


# --- every field --------------------------------------------------------------------------------

# what to write, in which mode, and what it must become
HONOURED: dict[str, tuple[object, str, dict[str, object]]] = {
    "featureGates": (
        {"AllowServiceExternalIPs": False},
        "",
        {"allow_service_external_ips": False},
    ),
    "clientConnection.kubeconfig": ("/k", "", {"kubeconfig": "/k"}),
    "logging.verbosity": (4, "", {"log_level": "debug"}),
    "hostnameOverride": (" Worker-1 ", "", {"node": "worker-1"}),
    "bindAddress": ("192.0.2.7", "", {"bind_address": "192.0.2.7"}),
    "healthzBindAddress": ("192.0.2.7", "", {"healthz_bind_address": "192.0.2.7"}),
    "metricsBindAddress": ("[::]:9", "", {"metrics_bind_address": "[::]:9"}),
    "bindAddressHardFail": (True, "", {"bind_address_hard_fail": True}),
    "mode": ("nftables", "nftables", {}),
    "iptables.masqueradeBit": (0, "iptables", {"masquerade_bit": 0}),
    "iptables.masqueradeAll": (True, "ipvs", {"masquerade_all": True}),
    "iptables.syncPeriod": ("45s", "", {"healthz_timeout": 90.0}),
    "ipvs.syncPeriod": ("45s", "ipvs", {"healthz_timeout": 90.0}),
    "nftables.masqueradeBit": (3, "nftables", {"masquerade_bit": 3}),
    "nftables.masqueradeAll": (True, "nftables", {"masquerade_all": True}),
    "nftables.syncPeriod": ("1m", "nftables", {"healthz_timeout": 120.0}),
    "detectLocalMode": ("NodeCIDR", "", {"detect_local_mode": "NodeCIDR"}),
    "detectLocal.bridgeInterface": ("cni0", "", {"pod_bridge_interface": "cni0"}),
    "detectLocal.interfaceNamePrefix": ("veth", "", {"pod_interface_name_prefix": "veth"}),
    "clusterCIDR": ("10.0.0.0/8,fd00::/48", "", {"cluster_cidr": "10.0.0.0/8,fd00::/48"}),
    "nodePortAddresses": (["192.0.2.0/24"], "", {"nodeport_addresses": ("192.0.2.0/24",)}),
    "oomScoreAdj": (0, "", {"oom_score_adj": 0}),
    "conntrack.maxPerCore": (0, "", {"conntrack_max_per_core": 0}),
    "conntrack.min": (0, "", {"conntrack_min": 0}),
    "conntrack.tcpEstablishedTimeout": (
        "0s",
        "",
        {"conntrack_tcp_timeout_established": 0.0},
    ),
    "conntrack.tcpCloseWaitTimeout": ("2h", "", {"conntrack_tcp_timeout_close_wait": 7200.0}),
    "conntrack.tcpBeLiberal": (True, "", {"conntrack_tcp_be_liberal": True}),
    "conntrack.udpTimeout": ("30s", "", {"conntrack_udp_timeout": 30.0}),
    "conntrack.udpStreamTimeout": ("300s", "", {"conntrack_udp_timeout_stream": 300.0}),
}
SAMPLES: dict[Any, object] = {
    bool: True,
    str: "x",
    float: 7.5,
    Duration: "17s",
    list[str]: ["192.0.2.0/24"],
    list[Any]: [{"filePattern": "x", "verbosity": 3}],
    int | str: 7,
}
NO_MEANING = {"logging.format": "json", "ipvs.scheduler": "wrr"}


def test_each_honoured_field_is_tested() -> None:
    assert {f.path for f in FIELDS if f.becomes} == set(HONOURED)


@pytest.mark.parametrize("path", HONOURED)
def test_an_honoured_field_becomes_a_setting(path: str) -> None:
    value, mode, becomes = HONOURED[path]
    file = kube_proxy(**{"mode": mode, **nested(path, value)})
    assert path in file.honoured
    assert not any(w.startswith(path) for w in file.without_meaning if path != "mode")
    assert becomes.items() <= file.chosen.items()
    for name in becomes:
        assert hasattr(merged(None, {}), name)


@pytest.mark.parametrize("field", [f for f in FIELDS if f.no_meaning], ids=lambda f: f.path)
def test_a_field_without_meaning_is_named_once_with_the_reason(field: Field) -> None:
    sample = NO_MEANING.get(field.path) or SAMPLES.get(field.type, 7)
    file = kube_proxy(**nested(field.path, sample))
    if field.path in ("logging.format", "iptables.localhostNodePorts"):  # asks for nothing
        assert file.without_meaning == ()
    else:
        assert file.without_meaning == (f"{field.path} ({field.no_meaning})",)
    assert file.honoured == ()


@pytest.mark.parametrize("field", FIELDS, ids=lambda f: f.path)
def test_a_field_that_asks_for_nothing_is_passed_over(field: Field) -> None:
    nothing = {bool: False, str: "", Duration: "0s", list[str]: [], list[Any]: []}
    for value in (None, nothing.get(field.type)):
        file = kube_proxy(**nested(field.path, value))
        assert file.without_meaning == ()
        if value is None:
            assert file.honoured == ()


def test_kube_proxys_defaults_ask_for_nothing() -> None:
    # pkg/proxy/apis/config/scheme/testdata/.../after/v1alpha1.yaml
    file = kube_proxy(
        bindAddress="0.0.0.0",
        clientConnection={
            "burst": 10,
            "contentType": "application/vnd.kubernetes.protobuf",
            "qps": 5,
        },
        configSyncPeriod="15m0s",
        iptables={"localhostNodePorts": True, "minSyncPeriod": "1s", "syncPeriod": "30s"},
        nftables={"minSyncPeriod": "1s"},
        ipvs={"minSyncPeriod": "0s", "excludeCIDRs": None},
        logging={"flushFrequency": "5s", "format": "text"},
        mode="",
    )
    assert file.without_meaning == ()


def test_sections_of_another_mode_are_named() -> None:
    file = kube_proxy(mode="nftables", iptables={"masqueradeAll": True, "masqueradeBit": 5})
    assert file.without_meaning == (
        "iptables.masqueradeBit (mode is nftables)",
        "iptables.masqueradeAll (mode is nftables)",
    )
    assert "masquerade_bit" not in file.chosen


@pytest.mark.parametrize("mode", ["iptables", "ipvs"])
def test_a_mode_that_is_not_ours_is_named(mode: str) -> None:
    assert "mode (" in kube_proxy(mode=mode).without_meaning[0]


def test_cluster_cidr_mode_without_a_cidr_is_no_detection_as_in_kube_proxy() -> None:
    options = merged(kube_proxy(detectLocalMode="ClusterCIDR"), {}).options()
    assert options.detect_local is DetectLocalMode.NONE


@pytest.mark.parametrize(
    ("chosen", "primary", "networks"),
    [
        ([], True, []),
        (["primary"], True, []),
        (["all"], False, ["0.0.0.0/0", "::/0"]),
        (["localhost"], False, ["127.0.0.0/8", "::1/128"]),
        (["primary", "localhost"], True, ["127.0.0.0/8", "::1/128"]),
        (["primary", "192.0.2.0/24", "all"], True, ["192.0.2.0/24", "0.0.0.0/0", "::/0"]),
        (["primary,10.0.0.0/8", "fd00::/8"], True, ["10.0.0.0/8", "fd00::/8"]),
    ],
    ids=str,
)
def test_node_port_addresses_mix_keywords_and_cidrs(
    chosen: list[str], primary: bool, networks: list[str]
) -> None:
    """As Kubernetes 1.37 takes them."""
    options = merged(kube_proxy(nodePortAddresses=chosen), {}).options()
    assert options.node_port_primary is primary
    assert [str(n) for n in options.node_port_networks] == networks


@pytest.mark.parametrize(
    ("chosen", "wanted"),
    [
        (["localhost"], True),
        (["primary", "::1/128"], True),
        (["0.0.0.0/0,127.0.0.1/32"], True),
        (["all"], False),
        (["primary"], False),
        ([], False),
    ],
    ids=str,
)
def test_only_an_explicit_loopback_network_asks_for_localhost(
    chosen: list[str], wanted: bool
) -> None:
    """The activation rule of KEP-6032."""
    assert serves_localhost(chosen) is wanted


def test_the_gate_of_localhost_node_ports_switched_off_removes_localhost() -> None:
    def chosen(gate: bool) -> tuple[str, ...]:
        gates = {"KubeProxyNFTablesLocalhostNodePorts": gate}
        file = kube_proxy(featureGates=gates, nodePortAddresses=["primary", "localhost"])
        return merged(file, {}).nodeport_addresses

    assert serves_localhost(chosen(True))
    assert not serves_localhost(chosen(False))
    assert chosen(False) == ("primary",)


def test_external_ips_can_be_forbidden_by_kube_proxys_gate_our_field_and_the_flag() -> None:
    gate = kube_proxy(featureGates={"AllowServiceExternalIPs": False})
    assert not merged(gate, {}).options().allow_external_ips
    assert not merged(own(allowServiceExternalIPs=False), {}).options().allow_external_ips
    assert not merged(None, {"allow_service_external_ips": False}).options().allow_external_ips


def test_gates_that_change_nothing_here_are_named_in_the_warning() -> None:
    gates = {"NFTablesProxyMode": True, "DynamicResourceAllocation": False}
    file = kube_proxy(featureGates=gates)
    assert file.without_meaning == (
        "featureGates.DynamicResourceAllocation (does not apply)",
        "featureGates.NFTablesProxyMode (does not apply)",
    )
    assert file.honoured == ()


# --- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"nodePortAddreses": []},
            "nodePortAddreses: unknown field; did you mean nodePortAddresses?",
        ),
        ({"conntrack": {"mni": 1}}, "conntrack.mni: unknown field; did you mean min?"),
        (
            {"detectLocal": {"zzz": 1}},
            "detectLocal.zzz: unknown field; known are bridgeInterface, interfaceNamePrefix",
        ),
        ({"conntrack": {"min": "1"}}, "conntrack.min: expected int, got str"),
        ({"conntrack": {"min": -1}}, "conntrack.min: expected int >= 0"),
        ({"conntrack": 1}, "conntrack: expected object, got int"),
        ({"iptables": {"masqueradeBit": 32}}, "iptables.masqueradeBit: expected int <= 31"),
        ({"oomScoreAdj": 2000}, "oomScoreAdj: expected int <= 1000"),
        (
            {"ipvs": {"udpTimeout": "1x"}},
            "ipvs.udpTimeout: '1x' is not a duration; write it like 30s, 1m30s or 24h",
        ),
        ({"ipvs": {"udpTimeout": 1}}, "ipvs.udpTimeout: expected a duration like 30s, got 1"),
        ({"conntrack": {"udpTimeout": "-1s"}}, "conntrack.udpTimeout: must not be negative"),
        ({"mode": "kernelspace"}, "mode: 'kernelspace'; use one of iptables, ipvs, nftables"),
        ({"ipvs": {"scheduler": "x"}}, "ipvs.scheduler: 'x'; use one of rr, wrr, lc, "),
        ({"nodePortAddresses": ["::1"]}, "nodePortAddresses: '::1' is not a CIDR"),
        (
            {"featureGates": {"RestrictExternalIPs": True}},
            "featureGates: RestrictExternalIPs is not known to this version of sliceproxy and may",
        ),
        ({"clusterCIDRs": ""}, "clusterCIDRs: unknown field; did you mean clusterCIDR?"),
        ({"clusterCIDR": "10.0.0.0"}, "clusterCIDR: '10.0.0.0' is not a CIDR"),
        ({"clusterCIDR": "10.0.0.0/33"}, "clusterCIDR: '10.0.0.0/33' is not a CIDR"),
        ({"bindAddress": "host"}, "bindAddress: 'host' is not an IP address"),
        ({"healthzBindAddress": ":1"}, "healthzBindAddress: ':1' is not IP:PORT"),
        ({"metricsBindAddress": "::1:x"}, "metricsBindAddress: '::1:x' is not IP:PORT"),
        ({"metricsBindAddress": "[::1]:0"}, "metricsBindAddress: '[::1]:0': a port is"),
        ({"detectLocalMode": "Magic"}, "detectLocalMode: 'Magic'; use one of ClusterCIDR, "),
        ({"featureGates": {"A": 1}}, "featureGates[...]: expected bool, got int"),
        ({"apiVersion": "v1"}, "apiVersion: 'v1'; use kubeproxy.config.k8s.io/v1alpha1"),
        ({"kind": "Pod"}, "kind: 'Pod'; use KubeProxyConfiguration, "),
    ],
    ids=str,
)
def test_a_mistake_is_one_clear_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        kube_proxy(**fields)
    assert str(error.value).startswith(f"f.yaml: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "line 1: 'a' is duplicate"),
        ("x:\n- [", "line 3: did not find"),
        ("", "must hold one YAML or JSON object"),
        ("- 1", "must hold one YAML or JSON object"),
        ("a: 1\n---\nb: 2", "must hold one YAML or JSON object"),
        ("kind: ConfigMap\ndata: {}", "data: the ConfigMap has no config.conf or config.yaml"),
        ("kind: ConfigMap\ndata: {config.conf: 'kind: Pod'}", "data[config.conf]: kind: 'Pod'"),
        (b"\xff\xfe\xff", ""),
    ],
    ids=str,
)
def test_what_is_no_configuration_at_all(text: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(text, "f.yaml")
    assert str(error.value).startswith(f"f.yaml: {message}")
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read(tmp_path / "none")


# --- our own kind, and flags --------------------------------------------------------------------


def test_our_own_kind_has_a_field_for_every_setting() -> None:
    for field in msgspec.structs.fields(Settings):
        value = getattr(Settings(), field.name)
        if isinstance(value, Duration):
            value = "30s"
        assert own(**{field.encode_name: value}).without_meaning == ()


def test_our_own_kind() -> None:
    file = own(
        node="n",
        healthzTimeout="30s",
        clusterCIDR="10.0.0.0/8",
        nodeportAddresses=["192.0.2.0/24", "fd00::/64"],
        healthzBindAddress="",
        zone=None,
    )
    settings = merged(file, {})
    assert settings.healthz() is None
    assert settings.metrics() == Bind("127.0.0.1", 10249)
    assert settings.healthz_timeout == 30
    assert len(settings.options().node_port_networks or ()) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"healthztimeout": 3}, "healthztimeout: unknown field; did you mean healthzTimeout?"),
        ({"masqueradeBit": 40}, "masqueradeBit: expected int <= 31"),
        ({"logLevel": "loud"}, "logLevel: 'loud'; use one of debug, info, warning, error"),
        ({"healthzTimeout": "0s"}, "healthzTimeout: must be greater than 0"),
        ({"detectLocalMode": "x"}, "detectLocalMode: 'x'; use one of None, ClusterCIDR"),
        ({"apiVersion": "sliceproxy/v2"}, "apiVersion: 'sliceproxy/v2'; use sliceproxy/v1"),
    ],
    ids=str,
)
def test_mistakes_in_our_own_kind(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        own(**fields)
    assert str(error.value).startswith(f"f.yaml: {message}")


def test_flags_win_over_the_file_and_the_file_over_the_defaults() -> None:
    file = kube_proxy(
        hostnameOverride="from-file", clusterCIDR="10.0.0.0/8", iptables={"masqueradeBit": 3}
    )
    settings = merged(file, {"node": "from-flag", "healthz_timeout": "5s"})
    assert (settings.node, settings.masquerade_bit, settings.healthz_timeout) == ("from-flag", 3, 5)
    assert settings.cluster_cidr == "10.0.0.0/8"
    assert settings.conntrack_min == 131072


def test_a_bad_flag_names_the_flag() -> None:
    with pytest.raises(ConfigError, match=r"^--healthz-timeout: '5' is not a duration"):
        merged(None, {"healthz_timeout": "5"})
    with pytest.raises(ConfigError, match=r"^--healthz-bind-address: 'x' is not IP:PORT"):
        merged(None, {"healthz_bind_address": "x"})


def test_what_does_not_go_together_names_the_file() -> None:
    with pytest.raises(ConfigError, match=r"^f.yaml: --detect-local-mode BridgeInterface needs"):
        merged(kube_proxy(detectLocalMode="BridgeInterface"), {})


def test_defaults_follow_the_family_of_the_bind_address() -> None:
    settings = merged(kube_proxy(bindAddress="::"), {})
    assert (settings.healthz(), settings.metrics()) == (Bind("::", 10256), Bind("::1", 10249))


def test_connection_tracking_has_kube_proxys_defaults() -> None:
    assert merged(read(KUBEADM), {}).conntrack() == ConntrackSettings()
    file = kube_proxy(conntrack={"maxPerCore": 0, "udpTimeout": "1m30s", "tcpBeLiberal": True})
    assert merged(file, {}).conntrack() == ConntrackSettings(
        max_per_core=0, udp_timeout=90, tcp_be_liberal=True
    )


# --- small languages ----------------------------------------------------------------------------


def as_go_prints(nanoseconds: int) -> str:
    """time.Duration.String for whole seconds and above."""
    hours, rest = divmod(nanoseconds, 3600 * 10**9)
    minutes, rest = divmod(rest, 60 * 10**9)
    seconds = f"{rest / 10**9:.9f}".rstrip("0").rstrip(".")
    if hours:
        return f"{hours}h{minutes}m{seconds}s"
    return f"{minutes}m{seconds}s" if minutes else f"{seconds}s"


@fuzzed(100)
@given(st.integers(0, 2**53))
def test_durations_as_go_prints_them(nanoseconds: int) -> None:
    assert parse_duration(as_go_prints(nanoseconds)) == pytest.approx(nanoseconds / 1e9, abs=1e-9)


@fuzzed(100)
@given(st.integers(0, 10**6), st.sampled_from(["ns", "us", "µs", "μs", "ms", "s", "m", "h"]))
def test_durations_of_one_unit(number: int, unit: str) -> None:
    factor = {"ns": 1e-9, "ms": 1e-3, "s": 1, "m": 60, "h": 3600}.get(unit, 1e-6)
    assert parse_duration(f"{number}{unit}") == pytest.approx(number * factor)
    assert parse_duration(f"-{number}{unit}") == pytest.approx(-number * factor)


@fuzzed(100)
@given(st.text(max_size=12))
def test_any_text_is_a_duration_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(parse_duration(text), float)


@pytest.mark.parametrize("text", ["", "1", "s", "1s ", "1h 2m", "1d", "1e3s", "+", "--1s", "٣s"])
def test_no_durations(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "bind"),
    [
        ("0.0.0.0:1", Bind("0.0.0.0", 1)),
        ("192.0.2.1", Bind("192.0.2.1", 99)),
        ("[::1]:2", Bind("::1", 2)),
        ("[::1]", Bind("::1", 99)),
    ],
)
def test_addresses_to_listen_at(text: str, bind: Bind) -> None:
    assert parse_bind(text, 99) == bind
    assert parse_bind(str(bind), 99) == bind


# --- the documentation --------------------------------------------------------------------------


def test_the_documentation_is_made_from_the_declarations() -> None:
    """Generating it again changes nothing."""
    assert document.updated(DOCS.read_text()) == DOCS.read_text()


def test_the_documentation_has_a_row_for_every_option_and_field() -> None:
    text = DOCS.read_text()
    for declared in OPTIONS.values():
        assert f"| `{declared.flag}` | `{declared.field}` |" in text
    for field in FIELDS:
        assert f"| `{field.path}` |" in text
