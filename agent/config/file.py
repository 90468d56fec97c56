"""The configuration file: kube-proxy's, as it lies in a cluster, or our own.

`--config FILE` takes YAML or JSON of one of these kinds:

- `KubeProxyConfiguration` (kubeproxy.config.k8s.io/v1alpha1), what kube-proxy itself is given;
- `ConfigMap`, as kubeadm leaves it in kube-system, with one of these two under `config.conf`;
- `SliceproxyConfiguration` (sliceproxy/v1), which has a field for every flag.

kube-proxy's file was written for another program. `FIELDS` is the whole of it, a row per field:
either the setting that it becomes here, or the reason why it has no meaning here. A field that
asks for nothing (absent, null, zero, or kube-proxy's own default) is passed over; one that asks
for something which has no meaning here is named in `ConfigFile.without_meaning`, for *one* warning.
docs/configuration.md shows the same table, and a test holds the two together.

Everything else is an error, one line that names the file, the field and what is allowed: a field
that nobody knows, a field that is there twice (YAML parsers keep the last one in silence), a
string for a number, a value out of range. kube-proxy passes over unknown fields in v1alpha1; a
misspelt `nodePortAddreses` then opens node ports that it was to close, so here it does not start.

Which of kube-proxy's `iptables`, `ipvs` and `nftables` sections counts is decided by `mode`, as
kube-proxy does it: no mode means iptables, and IPVS takes its masquerading from iptables.

Flags win over the file: see `merged`.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec

from agent.config.options import ConfigError, options
from agent.kernel.sysctl import ConntrackSettings
from rules.objects import parse_network
from rules.options import DetectLocalMode, Options

KUBE_PROXY = ("KubeProxyConfiguration", "kubeproxy.config.k8s.io/v1alpha1")
OWN = ("SliceproxyConfiguration", "sliceproxy/v1")
CONFIG_MAP_KEYS = ("config.conf", "config.yaml")

HEALTHZ_PORT, METRICS_PORT = 10256, 10249
DEBUG_VERBOSITY = 4  # klog: 0 to 3 is what an operator wants to see, from 4 on it is debugging

# --- durations ----------------------------------------------------------------------------------

_UNITS = {
    "ns": 1,
    "us": 10**3,
    "µs": 10**3,  # U+00B5, which Go prints
    "μs": 10**3,  # U+03BC, which Go also reads
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
}
_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|μs|ms|s|m|h)", re.ASCII)
_MAX_NANOSECONDS = 2**63 - 1


class Duration(float):
    """Seconds. In files and flags it is written as Go does: 30s, 1m30s, 24h0m0s, 1.5h."""

    __slots__ = ()


def parse_duration(text: str) -> Duration:
    """What Go's time.ParseDuration reads. Raises ValueError."""
    sign = -1 if text.startswith("-") else 1
    rest = text[1:] if text[:1] in ("-", "+") else text
    if rest == "0":
        return Duration(0)
    nanoseconds, position = 0, 0
    while match := _PART.match(rest, position):
        whole, _, fraction = match[1].partition(".")
        unit = _UNITS[match[2]]
        nanoseconds += int(whole or 0) * unit
        nanoseconds += int(fraction or 0) * unit // 10 ** len(fraction)
        position = match.end()
    if not rest or position != len(rest) or nanoseconds > _MAX_NANOSECONDS:
        raise ValueError(f"{text!r} is not a duration; write it like 30s, 1m30s or 24h")
    return Duration(sign * nanoseconds / 10**9)


def _decode(kind: type, value: object) -> object:
    """msgspec's hook for Duration, which it does not know."""
    if kind is not Duration:
        raise NotImplementedError
    if not isinstance(value, str):
        raise ValueError(f"expected a duration like 30s, got {value!r}")  # noqa: TRY004
    return parse_duration(value)


# --- addresses to listen at ---------------------------------------------------------------------


class Bind(NamedTuple):
    """Where a server listens. 0.0.0.0 and :: both mean every address of both families, as they
    do to Go and therefore to kube-proxy."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_bind(text: str, port: int) -> Bind:
    """An address with or without a port (then `port`). Raises ValueError."""
    match = re.fullmatch(r"(?:\[([^\]]*)\]|([^:\[\]]*))(?::(\d+))?", text)
    host, digits = (match[1] or match[2], match[3]) if match else (text, None)
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise ValueError(f"{text!r} is not IP:PORT; write it like 0.0.0.0:{port}") from None
    number = port if digits is None else int(digits)
    if not 1 <= number <= 65535:
        raise ValueError(f"{text!r}: a port is 1 to 65535")
    return Bind(str(address), number)


# --- our settings -------------------------------------------------------------------------------

LOG_LEVELS = ("debug", "info", "warning", "error")
_Port32 = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]


def _camel(name: str) -> str:
    head, *tail = name.split("_")
    camel = head + "".join(part.capitalize() for part in tail)
    return camel.replace("Cidr", "CIDR")


class Settings(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename=_camel
):
    """Everything that can be chosen: the flags, the fields of SliceproxyConfiguration.

    Times are seconds. `healthz_bind_address` and `metrics_bind_address` are None for the default,
    which follows the family of `bind_address`, and "" for no server.
    """

    node: str | None = None
    zone: str = ""
    proxy_name: str = ""
    kubeconfig: str | None = None
    context: str | None = None
    server: str | None = None
    bind_address: str = ""
    nodeport_addresses: tuple[str, ...] = ()
    detect_local_mode: str | None = None
    cluster_cidr: str = ""
    pod_bridge_interface: str = ""
    pod_interface_name_prefix: str = ""
    masquerade_all: bool = False
    masquerade_bit: Annotated[int, msgspec.Meta(ge=0, le=31)] = 14
    healthz_bind_address: str | None = None
    metrics_bind_address: str | None = None
    bind_address_hard_fail: bool = False
    healthz_timeout: Duration = Duration(120)
    log_level: str = "info"
    no_own: bool = False
    oom_score_adj: Annotated[int, msgspec.Meta(ge=-1000, le=1000)] = -999
    conntrack_max_per_core: _Port32 = 32768
    conntrack_min: _Port32 = 131072
    conntrack_tcp_timeout_established: Duration = Duration(86400)
    conntrack_tcp_timeout_close_wait: Duration = Duration(3600)
    conntrack_tcp_be_liberal: bool = False
    conntrack_udp_timeout: Duration = Duration(0)
    conntrack_udp_timeout_stream: Duration = Duration(0)

    def options(self) -> Options:
        """What the data plane depends on. Raises ConfigError."""
        return options(
            node=self.node,
            zone=self.zone,
            proxy_name=self.proxy_name,
            masquerade_bit=self.masquerade_bit,
            masquerade_all=self.masquerade_all,
            detect_local_mode=self.detect_local_mode,
            cluster_cidr=self.cluster_cidr,
            pod_bridge_interface=self.pod_bridge_interface,
            pod_interface_name_prefix=self.pod_interface_name_prefix,
            nodeport_addresses=tuple(
                cidr
                for texts in self.nodeport_addresses
                for text in texts.split(",")
                for cidr in _KEYWORDS.get(text, (text,))
            ),
            bind_address=self.bind_address,
        )

    def healthz(self) -> Bind | None:
        """Where /healthz and /livez are served. Raises ValueError."""
        return _bind(self.healthz_bind_address, self._every(), HEALTHZ_PORT)

    def metrics(self) -> Bind | None:
        """Where /metrics is served; by default only this machine can read it. Raises ValueError."""
        return _bind(self.metrics_bind_address, "::1" if self._six() else "127.0.0.1", METRICS_PORT)

    def _six(self) -> bool:
        return ":" in self.bind_address

    def _every(self) -> str:
        return "::" if self._six() else "0.0.0.0"

    def conntrack(self) -> ConntrackSettings:
        """What the node's connection tracking is set to, in whole seconds."""
        return ConntrackSettings(
            max_per_core=self.conntrack_max_per_core,
            min=self.conntrack_min,
            tcp_established_timeout=int(self.conntrack_tcp_timeout_established),
            tcp_close_wait_timeout=int(self.conntrack_tcp_timeout_close_wait),
            tcp_be_liberal=self.conntrack_tcp_be_liberal,
            udp_timeout=int(self.conntrack_udp_timeout),
            udp_stream_timeout=int(self.conntrack_udp_timeout_stream),
        )


def _bind(chosen: str | None, host: str, port: int) -> Bind | None:
    if chosen is None:
        return Bind(host, port)
    return parse_bind(chosen, port) if chosen else None


# --- what a value has to be ---------------------------------------------------------------------

Check = Callable[[Any], object]
"""Raises ValueError for a value that cannot be used; what it returns does not matter."""


def _one_of(*allowed: str) -> Check:
    def check(value: str) -> None:
        if value and value not in allowed:
            raise ValueError(f"{value!r}; use one of {', '.join(filter(None, allowed))}")

    return check


def _address(text: str) -> None:
    if not text:
        return
    try:
        ipaddress.ip_address(text)
    except ValueError:
        raise ValueError(f"{text!r} is not an IP address") from None


def _binds(port: int) -> Check:
    return lambda text: text and parse_bind(text, port)


def _cidrs(text: str) -> None:
    for part in text.split(",") if text else ():
        _cidr(part)


def _cidr(text: str) -> None:
    if "/" not in text:
        raise ValueError(f"{text!r} is not a CIDR; write it like 10.0.0.0/8")
    parse_network(text)


def _each_cidr(texts: list[str]) -> None:
    for text in texts:
        _cidr(text)


# keywords that kube-proxy takes after 1.36; no address of the node's is a loopback one, so
# `localhost` selects nothing
_KEYWORDS = {"all": ("0.0.0.0/0", "::/0"), "localhost": ("127.0.0.0/8", "::1/128")}


def _node_port_addresses(chosen: Iterable[str]) -> None:
    texts = [text for part in chosen for text in part.split(",")]
    if "primary" in texts and len(texts) > 1:
        raise ValueError("`primary` cannot be combined with others")
    _each_cidr([t for t in texts if t != "primary" and t not in _KEYWORDS])


def _not_negative(seconds: Duration) -> None:
    if seconds < 0:
        raise ValueError("must not be negative")


def _positive(seconds: Duration) -> None:
    if seconds <= 0:
        raise ValueError("must be greater than 0")


_MODES = _one_of(*(m.value for m in DetectLocalMode))

_SETTINGS_CHECKS: dict[str, Check] = {
    "bind_address": _address,
    "nodeport_addresses": _node_port_addresses,
    "cluster_cidr": _cidrs,
    "healthz_bind_address": _binds(HEALTHZ_PORT),
    "metrics_bind_address": _binds(METRICS_PORT),
    "log_level": _one_of(*LOG_LEVELS),
    "healthz_timeout": _positive,
    "conntrack_tcp_timeout_established": _not_negative,
    "conntrack_tcp_timeout_close_wait": _not_negative,
    "conntrack_udp_timeout": _not_negative,
    "conntrack_udp_timeout_stream": _not_negative,
}

# --- kube-proxy's fields ------------------------------------------------------------------------


class Field(NamedTuple):
    """One field of KubeProxyConfiguration.

    `becomes` says what it is here, `no_meaning` why it is nothing; one of the two is "". `usual`
    are values that ask for nothing, besides null and zero: kube-proxy's defaults.
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
_IPVS = "there is no IPVS here"
_WINDOWS = "there is no Windows here"
_ONE_LIST = "one list and one watch per resource need no limit"
_JSON = "the API is read as JSON"
_AT_ONCE = "changes are programmed at once; what comes meanwhile goes together"
_STREAMS = "log lines go to standard error, unbuffered"
_SCHEDULERS = ("rr", "wrr", "lc", "wlc", "lblc", "lblcr", "sh", "dh", "sed", "nq", "mh")
_PERIOD = "`--healthz-timeout`, twice as long, in mode "


def _options_of(form: str) -> tuple[Field, ...]:
    return (
        _none(f"logging.options.{form}.splitStream", bool, _STREAMS),
        _none(f"logging.options.{form}.infoBufferSize", int | str, _STREAMS, "0"),
    )


FIELDS: tuple[Field, ...] = (
    _none("featureGates", dict[str, bool], "there are no feature gates here"),
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
        check=_one_of("text", "json"),
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
    _none("logging.vmodule", list[Any], "there are no Go files here"),
    *_options_of("text"),
    *_options_of("json"),
    _honoured("hostnameOverride", str, "`--node`"),
    _honoured(
        "bindAddress",
        str,
        "`--bind-address`: the node's primary address of that family, unless 0.0.0.0 or ::",
        _address,
    ),
    _honoured("healthzBindAddress", str, "`--healthz-bind-address`", _binds(HEALTHZ_PORT)),
    _honoured("metricsBindAddress", str, "`--metrics-bind-address`", _binds(METRICS_PORT)),
    _honoured("bindAddressHardFail", bool, "`--bind-address-hard-fail`"),
    _none("enableProfiling", bool, "there is no Go profiler here"),
    _none("showHiddenMetricsForVersion", str, "no metric is hidden"),
    Field(
        "mode",
        str,
        becomes="which of the next sections counts",
        check=_one_of("", "iptables", "ipvs", "nftables"),
    ),
    _honoured("iptables.masqueradeBit", _Bit, "`--masquerade-bit`, in modes iptables and ipvs"),
    _honoured("iptables.masqueradeAll", bool, "`--masquerade-all`, in modes iptables and ipvs"),
    _none(
        "iptables.localhostNodePorts",
        bool,
        "node ports never answer on loopback addresses",
        True,
    ),
    _none("iptables.snatNodeInternalIP", bool, "the kernel picks the address to masquerade with"),
    _honoured("iptables.syncPeriod", Duration, _PERIOD + "iptables", _not_negative),
    _none("iptables.minSyncPeriod", Duration, _AT_ONCE, 1, check=_not_negative),
    _honoured("ipvs.syncPeriod", Duration, _PERIOD + "ipvs", _not_negative),
    _none("ipvs.minSyncPeriod", Duration, _AT_ONCE, check=_not_negative),
    _none("ipvs.scheduler", str, _IPVS, check=_one_of(*_SCHEDULERS)),
    _none("ipvs.excludeCIDRs", list[str], _IPVS, check=_each_cidr),
    _none("ipvs.strictARP", bool, _IPVS),
    _none("ipvs.tcpTimeout", Duration, _IPVS, check=_not_negative),
    _none("ipvs.tcpFinTimeout", Duration, _IPVS, check=_not_negative),
    _none("ipvs.udpTimeout", Duration, _IPVS, check=_not_negative),
    _honoured("nftables.masqueradeBit", _Bit, "`--masquerade-bit`, in mode nftables"),
    _honoured("nftables.masqueradeAll", bool, "`--masquerade-all`, in mode nftables"),
    _honoured("nftables.syncPeriod", Duration, _PERIOD + "nftables", _not_negative),
    _none("nftables.minSyncPeriod", Duration, _AT_ONCE, 1, check=_not_negative),
    _none("winkernel.networkName", str, _WINDOWS),
    _none("winkernel.sourceVip", str, _WINDOWS),
    _none("winkernel.enableDSR", bool, _WINDOWS),
    _none("winkernel.rootHnsEndpointName", str, _WINDOWS),
    _none("winkernel.forwardHealthCheckVip", bool, _WINDOWS),
    _honoured(
        "detectLocalMode",
        str,
        "`--detect-local-mode`; ClusterCIDR without clusterCIDR is None",
        # None is ours alone: kube-proxy has no word for it
        _one_of(*(m.value for m in DetectLocalMode if m is not DetectLocalMode.NONE)),
    ),
    _honoured("detectLocal.bridgeInterface", str, "`--pod-bridge-interface`"),
    _honoured("detectLocal.interfaceNamePrefix", str, "`--pod-interface-name-prefix`"),
    _honoured("clusterCIDR", str, "`--cluster-cidr`", _cidrs),
    _honoured(
        "nodePortAddresses",
        list[str],
        "`--nodeport-addresses`; absent it is `primary` in every mode",
        _node_port_addresses,
    ),
    _honoured("oomScoreAdj", Annotated[int, msgspec.Meta(ge=-1000, le=1000)], "`--oom-score-adj`"),
    _honoured("conntrack.maxPerCore", _Count, "`--conntrack-max-per-core`"),
    _honoured("conntrack.min", _Count, "`--conntrack-min`"),
    _honoured(
        "conntrack.tcpEstablishedTimeout",
        Duration,
        "`--conntrack-tcp-timeout-established`",
        _not_negative,
    ),
    _honoured(
        "conntrack.tcpCloseWaitTimeout",
        Duration,
        "`--conntrack-tcp-timeout-close-wait`",
        _not_negative,
    ),
    _honoured("conntrack.tcpBeLiberal", bool, "`--conntrack-tcp-be-liberal`"),
    _honoured("conntrack.udpTimeout", Duration, "`--conntrack-udp-timeout`", _not_negative),
    _honoured(
        "conntrack.udpStreamTimeout", Duration, "`--conntrack-udp-timeout-stream`", _not_negative
    ),
    _none(
        "configSyncPeriod",
        Duration,
        "a watch tells every change; nothing is listed again for the sake of it",
        15 * 60,
        check=_not_negative,
    ),
    _none("portRange", str, "kube-proxy has not used it since its userspace mode went"),
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


_KubeProxyShape = _shape("KubeProxyConfiguration", {f.path: f.type for f in FIELDS})


def _value(shape: object, path: str) -> Any:
    for part in path.split("."):
        shape = getattr(shape, part, None)
    return shape


# --- files --------------------------------------------------------------------------------------


class ConfigFile(msgspec.Struct, frozen=True):
    """What a file chooses.

    `chosen` maps names of Settings to values. `honoured` names the file's fields that it comes
    from, `without_meaning` those that ask for something that has no meaning here, each with the
    reason.
    """

    path: str
    chosen: dict[str, Any]
    honoured: tuple[str, ...] = ()
    without_meaning: tuple[str, ...] = ()


def read(path: str | Path) -> ConfigFile:
    """Reads a configuration file. Raises ConfigError, one line."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    return parse(data, str(path))


def parse(data: bytes | str, where: str) -> ConfigFile:
    """The contents of a configuration file; `where` names it. Raises ConfigError, one line."""
    document = _load(data, where)
    if document.get("kind") == "ConfigMap":
        document, where = _unwrap(document, where)
    kind, version = document.pop("kind", None), document.pop("apiVersion", None)
    for known, reader in ((KUBE_PROXY, _kube_proxy), (OWN, _own)):
        if kind == known[0]:
            if version != known[1]:
                raise ConfigError(f"{where}: apiVersion: {version!r}; use {known[1]}")
            return reader(document, where)
    raise ConfigError(f"{where}: kind: {kind!r}; use {KUBE_PROXY[0]}, {OWN[0]} or ConfigMap")


def _load(data: bytes | str, where: str) -> dict[str, Any]:
    import yaml  # 12 ms and 1 MB that an agent without a file saves

    class Loader(yaml.CSafeLoader):
        """Refuses a key that is there twice, which the YAML specification demands."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and keys.count(key.value) > 1:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key.value!r} is there twice", key.start_mark
                    )
            return super().construct_mapping(node, deep)

    try:
        documents = [d for d in yaml.load_all(data, Loader=Loader) if d is not None]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ConfigError(f"{where}: {line}{problem}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{where}: is not text in UTF-8") from None
    if len(documents) != 1 or not isinstance(documents[0], dict):
        raise ConfigError(f"{where}: must hold one YAML or JSON object, the configuration")
    return dict(documents[0])


def _unwrap(config_map: dict[str, Any], where: str) -> tuple[dict[str, Any], str]:
    data = config_map.get("data")
    for key in CONFIG_MAP_KEYS:
        text = data.get(key) if isinstance(data, dict) else None
        if isinstance(text, str):
            inside = f"{where}: data[{key}]"
            return _load(text, inside), inside
    raise ConfigError(f"{where}: data: the ConfigMap has no {' or '.join(CONFIG_MAP_KEYS)}")


_T = TypeVar("_T")
_AT = re.compile(r"(?s)(.*?)(?: - at `\$\.?(.*)`)?")


def _convert(document: dict[str, Any], kind: type[_T], where: str) -> _T:
    try:
        return msgspec.convert(document, kind, dec_hook=_decode)
    except msgspec.ValidationError as error:
        match = _AT.fullmatch(str(error))
        problem, path = (match[1], match[2] or "") if match else (str(error), "")
        unknown = re.fullmatch("Object contains unknown field `(.*)`", problem)
        if unknown:
            path, problem = _unknown(kind, path, unknown[1])
        elif problem.startswith("Expected"):
            problem = problem[0].lower() + problem[1:].replace("`", "").replace(" | null", "")
        raise ConfigError(f"{where}: {path + ': ' if path else ''}{problem}") from None


def _unknown(kind: type, parent: str, name: str) -> tuple[str, str]:
    """Path and description of a field that nobody knows, with what was perhaps meant."""
    prefix = f"{parent}." if parent else ""
    if kind is Settings:
        known = {f.encode_name for f in msgspec.structs.fields(Settings)}
    else:
        known = {
            f.path.removeprefix(prefix).partition(".")[0]
            for f in FIELDS
            if f.path.startswith(prefix)
        }
    near = difflib.get_close_matches(name, known, 1)
    allowed = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
    return prefix + name, f"unknown field; {allowed}"


def _own(document: dict[str, Any], where: str) -> ConfigFile:
    given = {name: value for name, value in document.items() if value is not None}
    settings = _convert(given, Settings, where)
    names = {f.encode_name: f.name for f in msgspec.structs.fields(Settings)}
    chosen = {names[name]: getattr(settings, names[name]) for name in given}
    for name, value in chosen.items():
        check = _MODES if name == "detect_local_mode" else _SETTINGS_CHECKS.get(name)
        _verify(check, value, f"{where}: {_camel(name)}")
    return ConfigFile(where, chosen, tuple(given))


def _verify(check: Check | None, value: object, where: str) -> None:
    if check is None or value is None:
        return
    try:
        check(value)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def _kube_proxy(document: dict[str, Any], where: str) -> ConfigFile:
    shape = _convert(document, _KubeProxyShape, where)
    values = {f.path: _value(shape, f.path) for f in FIELDS}
    for field in FIELDS:
        _verify(field.check, values[field.path], f"{where}: {field.path}")
    honoured, without = [], []
    mode = values["mode"] or "iptables"
    for field in FIELDS:
        value = values[field.path]
        if field.no_meaning and field.asks(value):
            without.append(f"{field.path} ({field.no_meaning})")
        elif field.becomes and _counts(field.path, value, mode):
            honoured.append(field.path)
        elif field.becomes and value and field.path != "mode":
            without.append(f"{field.path} (mode is {mode})")
    if values["mode"] in ("iptables", "ipvs"):
        without.append("mode (the rules are nf_tables' in every mode)")
    chosen = {
        name: value for name, value in _chosen(values, mode).items() if value not in (None, "", ())
    }
    return ConfigFile(where, chosen, tuple(honoured), tuple(without))


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
    """Names of Settings and what the file wants of them; None, "" and () for no choice."""
    masquerading, period = _SECTIONS[mode]
    seconds = values[f"{period}.syncPeriod"]
    local = values["detectLocalMode"]
    if local == DetectLocalMode.CLUSTER_CIDR.value and not values["clusterCIDR"]:
        local = None  # kube-proxy goes on without telling local traffic, too
    return {
        "node": (values["hostnameOverride"] or "").strip().lower(),
        "kubeconfig": values["clientConnection.kubeconfig"],
        "bind_address": values["bindAddress"],
        "nodeport_addresses": tuple(values["nodePortAddresses"] or ()),
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


# --- file and flags -----------------------------------------------------------------------------


def merged(file: ConfigFile | None, flags: Mapping[str, Any]) -> Settings:
    """The settings: flags before the file before the defaults. Raises ConfigError.

    `flags` holds the flags that were *given*, under their names in Settings; durations may still
    be text.
    """
    given = {name: _flag(name, value) for name, value in flags.items()}
    settings = Settings(**{**(file.chosen if file else {}), **given})
    try:
        settings.options()
    except ConfigError as error:
        raise ConfigError(f"{file.path}: {error}" if file else str(error)) from None
    return settings


_DURATIONS = frozenset(f.name for f in msgspec.structs.fields(Settings) if f.type is Duration)


def _flag(name: str, value: Any) -> Any:
    flag = "--" + name.replace("_", "-")
    if name in _DURATIONS and isinstance(value, str):
        try:
            value = parse_duration(value)
        except ValueError as error:
            raise ConfigError(f"{flag}: {error}") from None
    _verify(_SETTINGS_CHECKS.get(name), value, flag)
    return value
