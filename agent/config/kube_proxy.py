"""kube-proxy's configuration file: KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1).

The file is written for another program. `FIELDS` lists all of it, a row per field: either the
option that it becomes here, or the reason why it does not apply. A field that is absent, null,
zero or kube-proxy's own default asks for nothing and is ignored; one that asks for something that
does not apply is listed in `ConfigFile.without_meaning`, for *one* warning. docs/configuration.md
shows the same table.

kube-proxy ignores unknown fields in v1alpha1. A misspelt `nodePortAddreses` then opens node ports
that the operator meant to close, so here an unknown field is an error. So is a feature gate about
Services that sliceproxy does not know, for it may restrict what they may do.

`mode` decides which of the sections `iptables`, `ipvs` and `nftables` counts, as in kube-proxy: no
mode means iptables, and IPVS takes its masquerading from iptables.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import msgspec

from agent.config import checks
from agent.config.checks import Check, one_of
from agent.config.data_plane import node_port_addresses, without_localhost
from agent.config.durations import Duration, parse_duration
from agent.config.settings import HEALTHZ_PORT, METRICS_PORT
from rules.options import DetectLocalMode

DEBUG_VERBOSITY = 4  # klog: 0 to 3 is for operators, 4 and more is debugging


class Field(NamedTuple):
    """One field of KubeProxyConfiguration.

    `becomes` names the option that it becomes, `no_meaning` the reason why it does not apply; one
    of the two is "". `usual` are kube-proxy's defaults, which ask for nothing, as null and zero do.
    """

    path: str
    type: Any
    becomes: str = ""
    no_meaning: str = ""
    usual: tuple[object, ...] = ()
    check: Check | None = None

    def asks(self, value: object) -> bool:
        """Whether this value asks for anything."""
        return bool(value) and value not in self.usual


def _honoured(path: str, kind: Any, becomes: str, check: Check | None = None) -> Field:
    return Field(path, kind, becomes=becomes, check=check)


def _none(path: str, kind: Any, why: str, *usual: object, check: Check | None = None) -> Field:
    return Field(path, kind, no_meaning=why, usual=usual, check=check)


_Bit = Annotated[int, msgspec.Meta(ge=0, le=31)]
_Count = Annotated[int, msgspec.Meta(ge=0)]
_IPVS = "sliceproxy does not use IPVS"
_SCHEDULER = "a Service asks for an algorithm, by the annotation `sliceproxy.io/algorithm`"
_WINDOWS = "sliceproxy runs on Linux only"
_ONE_LIST = "one list and one watch per resource need no limit"
_JSON = "sliceproxy negotiates the encoding itself"
_AT_ONCE = "changes are programmed at once; above 100 a second for long, every 10 ms"
_STREAMS = "log lines go to standard error, unbuffered"
_SCHEDULERS = ("rr", "wrr", "lc", "wlc", "lblc", "lblcr", "sh", "dh", "sed", "nq", "mh")
_PERIOD = "`--healthz-timeout`, twice as long, in mode "


def _options_of(form: str) -> tuple[Field, ...]:
    return (
        _none(f"logging.options.{form}.splitStream", bool, _STREAMS),
        _none(f"logging.options.{form}.infoBufferSize", int | str, _STREAMS, "0"),
    )


EXTERNAL_IPS_GATE = "AllowServiceExternalIPs"  # KEP-5707
LOCALHOST_GATE = "KubeProxyNFTablesLocalhostNodePorts"  # KEP-6032
HARMLESS_GATES = frozenset(
    {
        # about kube-proxy's own working, or permanently on in the behaviour that sliceproxy has
        *("NFTablesProxyMode", "NFTablesNetlink", "KubeProxyIPVS", "MinimizeIPTablesRestore"),
        *("KubeProxyDrainingTerminatingNodes", "ProxyTerminatingEndpoints"),
        *(
            "EndpointSliceProxying",
            "WindowsEndpointSliceProxying",
            "EndpointSliceTerminatingCondition",
        ),
        *("TopologyAwareHints", "ServiceTrafficDistribution", "PreferSameTrafficDistribution"),
        *("ServiceInternalTrafficPolicy", "LoadBalancerIPMode"),
        # the API server's and the controllers', which some installers give to every component
        *("ServiceCIDRStatusFieldWiping", "MultiCIDRServiceAllocator", "DisableAllocatorDualWrite"),
        *("ServiceNodePortStaticSubrange", "ServiceIPStaticSubrange", "StrictIPCIDRValidation"),
        *("RelaxedServiceNameValidation", "TopologyManagerPolicyOptions"),
    }
)
"""Gates with a name like those of `_ABOUT_SERVICES` whose value changes nothing here."""

# a gate with such a name may restrict which Services are served, or to whom
_ABOUT_SERVICES = re.compile(
    "Service(?!Account)|External|NodePort|LoadBalancer|EndpointSlice|KubeProxy|NFTables|IPTables"
    "|TrafficPolicy|SourceRange|Localhost"
)


def _feature_gates(gates: Mapping[str, bool]) -> None:
    for gate in gates:
        known = gate in (EXTERNAL_IPS_GATE, LOCALHOST_GATE) or gate in HARMLESS_GATES
        if not known and _ABOUT_SERVICES.search(gate):
            raise ValueError(
                f"{gate} is not known to this version of sliceproxy and may restrict Services;"
                " remove it if this cluster does not depend on it"
            )


FIELDS: tuple[Field, ...] = (
    _honoured(
        "featureGates",
        dict[str, bool],
        "`AllowServiceExternalIPs: false` is `--no-allow-service-external-ips`;"
        " `KubeProxyNFTablesLocalhostNodePorts: false` removes `localhost` from"
        " `--nodeport-addresses`; other gates do not apply",
        _feature_gates,
    ),
    _honoured("clientConnection.kubeconfig", str, "`--kubeconfig`"),
    _none("clientConnection.acceptContentTypes", str, _JSON, "application/json"),
    _none(
        "clientConnection.contentType",
        str,
        _JSON,
        "application/json",
        "application/vnd.kubernetes.protobuf",
    ),
    _none("clientConnection.qps", float, _ONE_LIST, 5),
    _none("clientConnection.burst", _Count, _ONE_LIST, 10),
    _none(
        "logging.format",
        str,
        "JSON lines, unless standard error is a terminal",
        "text",
        "json",
        check=one_of("text", "json"),
    ),
    _none(
        "logging.flushFrequency",
        int | str,  # nanoseconds, or a duration
        _STREAMS,
        "0s",
        "5s",
        5 * 10**9,
        check=lambda value: isinstance(value, str) and parse_duration(value),
    ),
    _honoured("logging.verbosity", _Count, "`--log-level debug` from 4 on"),
    _none("logging.vmodule", list[Any], "sliceproxy has no Go files"),
    *_options_of("text"),
    *_options_of("json"),
    _honoured("hostnameOverride", str, "`--node`"),
    _honoured(
        "bindAddress",
        str,
        "`--bind-address`: the node's primary address of that family, unless 0.0.0.0 or ::",
        checks.address,
    ),
    _honoured("healthzBindAddress", str, "`--healthz-bind-address`", checks.binds(HEALTHZ_PORT)),
    _honoured("metricsBindAddress", str, "`--metrics-bind-address`", checks.binds(METRICS_PORT)),
    _honoured("bindAddressHardFail", bool, "`--bind-address-hard-fail`"),
    _none("enableProfiling", bool, "sliceproxy has no Go profiler"),
    _none("showHiddenMetricsForVersion", str, "no metric is hidden"),
    Field(
        "mode",
        str,
        becomes="which of the next sections counts",
        check=one_of("", "iptables", "ipvs", "nftables"),
    ),
    _honoured("iptables.masqueradeBit", _Bit, "`--masquerade-bit`, in modes iptables and ipvs"),
    _honoured("iptables.masqueradeAll", bool, "`--masquerade-all`, in modes iptables and ipvs"),
    _none(
        "iptables.localhostNodePorts",
        bool,
        "`localhost` in nodePortAddresses serves node ports on loopback addresses",
        True,
    ),
    _none("iptables.snatNodeInternalIP", bool, "the kernel picks the address to masquerade with"),
    _honoured("iptables.syncPeriod", Duration, _PERIOD + "iptables", checks.not_negative),
    _none("iptables.minSyncPeriod", Duration, _AT_ONCE, 1, check=checks.not_negative),
    _honoured("ipvs.syncPeriod", Duration, _PERIOD + "ipvs", checks.not_negative),
    _none("ipvs.minSyncPeriod", Duration, _AT_ONCE, check=checks.not_negative),
    _none("ipvs.scheduler", str, _SCHEDULER, check=one_of(*_SCHEDULERS)),
    _none("ipvs.excludeCIDRs", list[str], _IPVS, check=checks.each_cidr),
    _none("ipvs.strictARP", bool, _IPVS),
    _none("ipvs.tcpTimeout", Duration, _IPVS, check=checks.not_negative),
    _none("ipvs.tcpFinTimeout", Duration, _IPVS, check=checks.not_negative),
    _none("ipvs.udpTimeout", Duration, _IPVS, check=checks.not_negative),
    _honoured("nftables.masqueradeBit", _Bit, "`--masquerade-bit`, in mode nftables"),
    _honoured("nftables.masqueradeAll", bool, "`--masquerade-all`, in mode nftables"),
    _honoured("nftables.syncPeriod", Duration, _PERIOD + "nftables", checks.not_negative),
    _none("nftables.minSyncPeriod", Duration, _AT_ONCE, 1, check=checks.not_negative),
    _none("winkernel.networkName", str, _WINDOWS),
    _none("winkernel.sourceVip", str, _WINDOWS),
    _none("winkernel.enableDSR", bool, _WINDOWS),
    _none("winkernel.rootHnsEndpointName", str, _WINDOWS),
    _none("winkernel.forwardHealthCheckVip", bool, _WINDOWS),
    _honoured(
        "detectLocalMode",
        str,
        "`--detect-local-mode`; ClusterCIDR without clusterCIDR is None",
        # None exists in sliceproxy only
        one_of(*(m.value for m in DetectLocalMode if m is not DetectLocalMode.NONE)),
    ),
    _honoured("detectLocal.bridgeInterface", str, "`--pod-bridge-interface`"),
    _honoured("detectLocal.interfaceNamePrefix", str, "`--pod-interface-name-prefix`"),
    _honoured("clusterCIDR", str, "`--cluster-cidr`", checks.cidr_list),
    _honoured(
        "nodePortAddresses",
        list[str],
        "`--nodeport-addresses`; absent it is `primary` in every mode",
        node_port_addresses,
    ),
    _honoured("oomScoreAdj", Annotated[int, msgspec.Meta(ge=-1000, le=1000)], "`--oom-score-adj`"),
    _honoured("conntrack.maxPerCore", _Count, "`--conntrack-max-per-core`"),
    _honoured("conntrack.min", _Count, "`--conntrack-min`"),
    _honoured(
        "conntrack.tcpEstablishedTimeout",
        Duration,
        "`--conntrack-tcp-timeout-established`",
        checks.not_negative,
    ),
    _honoured(
        "conntrack.tcpCloseWaitTimeout",
        Duration,
        "`--conntrack-tcp-timeout-close-wait`",
        checks.not_negative,
    ),
    _honoured("conntrack.tcpBeLiberal", bool, "`--conntrack-tcp-be-liberal`"),
    _honoured("conntrack.udpTimeout", Duration, "`--conntrack-udp-timeout`", checks.not_negative),
    _honoured(
        "conntrack.udpStreamTimeout",
        Duration,
        "`--conntrack-udp-timeout-stream`",
        checks.not_negative,
    ),
    _none(
        "configSyncPeriod",
        Duration,
        "watches report every change; there is no periodic relist",
        15 * 60,
        check=checks.not_negative,
    ),
    _none("portRange", str, "kube-proxy has not used it since it lost its userspace mode"),
    _none("windowsRunAsService", bool, _WINDOWS),
)


def _shape(name: str, fields: Mapping[str, Any]) -> Any:
    """A strict msgspec type of kube-proxy's fields; `fields` maps a path to its type."""
    types: dict[str, Any] = {}
    for head in dict.fromkeys(path.partition(".")[0] for path in fields):
        below = {p.partition(".")[2]: t for p, t in fields.items() if p.startswith(head + ".")}
        types[head] = _shape(f"{name}.{head}", below) if below else fields[head]
    return msgspec.defstruct(
        name,
        [(field, kind | None, None) for field, kind in types.items()],
        forbid_unknown_fields=True,
        kw_only=True,
    )


Shape = _shape("KubeProxyConfiguration", {f.path: f.type for f in FIELDS})


def _value(shape: object, path: str) -> Any:
    for part in path.split("."):
        shape = getattr(shape, part, None)
    return shape


class Meaning(NamedTuple):
    """What a file chooses: values of options by name, the fields that they are from, and the
    fields that do not apply, each with the reason."""

    chosen: dict[str, Any]
    honoured: tuple[str, ...]
    without_meaning: tuple[str, ...]


def known_below(parent: str) -> set[str]:
    """The names of the fields below a path, "" for the top."""
    prefix = f"{parent}." if parent else ""
    return {
        f.path.removeprefix(prefix).partition(".")[0] for f in FIELDS if f.path.startswith(prefix)
    }


def field_values(shape: object) -> dict[str, Any]:
    """By path the values of an instance of `Shape`, None where a field is absent."""
    return {field.path: _value(shape, field.path) for field in FIELDS}


def meaning(values: Mapping[str, Any]) -> Meaning:
    """The meaning of `field_values` that have passed the fields' checks."""
    honoured, without = [], []
    mode = values["mode"] or "iptables"
    for field in FIELDS:
        value = values[field.path]
        if field.path == "featureGates":
            gates = value or {}
            honoured += [field.path] if {EXTERNAL_IPS_GATE, LOCALHOST_GATE} & gates.keys() else []
            without += [f"featureGates.{gate} (does not apply)" for gate in _ignored(gates)]
        elif field.no_meaning and field.asks(value):
            without.append(f"{field.path} ({field.no_meaning})")
        elif field.becomes and _counts(field.path, value, mode):
            honoured.append(field.path)
        elif field.becomes and value and field.path != "mode":
            without.append(f"{field.path} (mode is {mode})")
    if values["mode"] in ("iptables", "ipvs"):
        without.append("mode (sliceproxy's rules are nftables in every mode)")
    chosen = {
        name: value for name, value in _chosen(values, mode).items() if value not in (None, "", ())
    }
    return Meaning(chosen, tuple(honoured), tuple(without))


def _ignored(gates: Mapping[str, bool]) -> list[str]:
    return sorted(gates.keys() - {EXTERNAL_IPS_GATE, LOCALHOST_GATE})


_SECTIONS = {
    # mode: where masquerading and the period come from, as kube-proxy's conversion.go has it
    "iptables": ("iptables", "iptables"),
    "ipvs": ("iptables", "ipvs"),
    "nftables": ("nftables", "nftables"),
}
_ZERO_IS_A_CHOICE = frozenset({"conntrack.maxPerCore", "conntrack.min", "oomScoreAdj"})


def _counts(path: str, value: object, mode: str) -> bool:
    """Whether the value of an honoured field is a choice, and in a section that counts."""
    section, _, name = path.partition(".")
    if section in ("iptables", "ipvs", "nftables"):
        masquerading, period = _SECTIONS[mode]
        if section != (masquerading if name.startswith("masquerade") else period):
            return False
        if name == "masqueradeBit":
            return value is not None
    if path in _ZERO_IS_A_CHOICE or path.endswith(("EstablishedTimeout", "CloseWaitTimeout")):
        return value is not None
    return bool(value)


def _chosen(values: Mapping[str, Any], mode: str) -> dict[str, Any]:
    """Values of options by name; None, "" and () for no choice."""
    masquerading, period = _SECTIONS[mode]
    seconds = values[f"{period}.syncPeriod"]
    local = values["detectLocalMode"]
    if local == DetectLocalMode.CLUSTER_CIDR.value and not values["clusterCIDR"]:
        local = None  # kube-proxy, too, then treats no traffic as local
    gates = values["featureGates"] or {}
    addresses = tuple(values["nodePortAddresses"] or ())
    if gates.get(LOCALHOST_GATE) is False:
        addresses = without_localhost(addresses)
    return {
        "node": (values["hostnameOverride"] or "").strip().lower(),
        "kubeconfig": values["clientConnection.kubeconfig"],
        "bind_address": values["bindAddress"],
        "nodeport_addresses": addresses,
        "allow_service_external_ips": gates.get(EXTERNAL_IPS_GATE),
        "detect_local_mode": local,
        "cluster_cidr": values["clusterCIDR"],
        "pod_bridge_interface": values["detectLocal.bridgeInterface"],
        "pod_interface_name_prefix": values["detectLocal.interfaceNamePrefix"],
        "masquerade_all": values[f"{masquerading}.masqueradeAll"],
        "masquerade_bit": values[f"{masquerading}.masqueradeBit"],
        "healthz_bind_address": values["healthzBindAddress"],
        "metrics_bind_address": values["metricsBindAddress"],
        "bind_address_hard_fail": values["bindAddressHardFail"],
        # kube-proxy's health server, too, waits for two periods
        "healthz_timeout": Duration(2 * seconds) if seconds else None,
        "log_level": "debug" if (values["logging.verbosity"] or 0) >= DEBUG_VERBOSITY else None,
        "oom_score_adj": values["oomScoreAdj"],
        "conntrack_max_per_core": values["conntrack.maxPerCore"],
        "conntrack_min": values["conntrack.min"],
        "conntrack_tcp_timeout_established": values["conntrack.tcpEstablishedTimeout"],
        "conntrack_tcp_timeout_close_wait": values["conntrack.tcpCloseWaitTimeout"],
        "conntrack_tcp_be_liberal": values["conntrack.tcpBeLiberal"],
        "conntrack_udp_timeout": values["conntrack.udpTimeout"],
        "conntrack_udp_timeout_stream": values["conntrack.udpStreamTimeout"],
    }
