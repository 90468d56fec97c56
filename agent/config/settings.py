"""Every option of the agent, declared once.

To add an option, add one field to `Settings`: its type and default are the field's, its help and
the rest are in the `Option` beside it. From that line follow

- the flag `--name` of the commands in `Option.group` (agent/cli/flags.py): a bool becomes
  `--name/--no-name`, a tuple may be repeated, bounds and choices are checked;
- the field `name` (in camelCase) of the file `SliceproxyConfiguration` (agent/config/file.py);
- the row in docs/configuration.md: run `python -m agent.config.document` to bring it up to date.

A field of kube-proxy's file that becomes the option is a row of agent/config/kube_proxy.py. If the
data plane needs the option, `agent.config.data_plane` passes it on to `rules.options.Options`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import msgspec

from agent.config import checks
from agent.config.checks import Bind, Check, parse_bind
from agent.config.data_plane import node_port_addresses, options_of
from agent.config.durations import Duration
from agent.kernel.sysctl import ConntrackSettings
from rules.options import DetectLocalMode, Options

HEALTHZ_PORT, METRICS_PORT, API_PORT = 10256, 10249, 10270
LOG_LEVELS = ("debug", "info", "warning", "error")

Group = Literal["data plane", "tables", "cluster", "agent", "conntrack"]
"""Which commands have the flag: all that compute rules (`data plane`), those of them that may
write tables (`tables`), `run` alone (`agent`), `run` and `init` (`conntrack`)."""


class Option(NamedTuple):
    """What an option has besides its name, type and default.

    `usual` is the default in words where the default value does not say it. `help` may contain
    backticks, which the command line leaves out.
    """

    group: Group
    help: str
    usual: str = ""
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    check: Check | None = None


def _camel(name: str) -> str:
    head, *tail = name.split("_")
    camel = head + "".join(part.capitalize() for part in tail)
    return camel.replace("Cidr", "CIDR").replace("Ips", "IPs")


_Bit = Annotated[int, msgspec.Meta(ge=0, le=31)]
_Score = Annotated[int, msgspec.Meta(ge=-1000, le=1000)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
_Entries = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]


class Settings(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename=_camel
):
    """The options, and the fields of SliceproxyConfiguration. Times are seconds.

    `healthz_bind_address` and `metrics_bind_address` are None for the default, which follows the
    family of `bind_address`, and "" for no server.
    """

    node: Annotated[
        str | None,
        Option("data plane", "This node's name.", "`$NODE_NAME`, else the host's name"),
    ] = None
    zone: Annotated[
        str,
        Option(
            "data plane",
            "The zone whose hinted endpoints this node uses.",
            "the Node's zone label",
        ),
    ] = ""
    proxy_name: Annotated[
        str,
        Option(
            "data plane",
            "Serve the Services labelled `service.kubernetes.io/service-proxy-name=NAME` instead"
            " of those without that label.",
            metavar="NAME",
        ),
    ] = ""
    kubeconfig: Annotated[
        str | None,
        Option(
            "cluster",
            "How to reach the API server, without `--from`.",
            "`$KUBECONFIG`, else the pod's service account, else `~/.kube/config`",
            metavar="FILE",
        ),
    ] = None
    context: Annotated[
        str | None, Option("cluster", "A context of the kubeconfig.", "its current one")
    ] = None
    server: Annotated[
        str | None,
        Option(
            "cluster",
            "The API server's own address. In a pod the default is a Service IP, unreachable"
            " until a proxy runs.",
            "as the kubeconfig or the service account says",
            metavar="URL",
        ),
    ] = None
    watch_silence_limit: Annotated[
        Duration,
        Option(
            "agent",
            "How long a watch may bring no valid answer before the node is not ready.",
            check=checks.positive,
        ),
    ] = Duration(300)
    bind_address: Annotated[
        str,
        Option(
            "data plane",
            "The node's primary address of its family, where the Node object and the routes say"
            " something else. `0.0.0.0` and `::` only choose the family of the default addresses"
            " of the health and metrics servers. Nothing is bound to it.",
            metavar="IP",
            check=checks.address,
        ),
    ] = ""
    nodeport_addresses: Annotated[
        tuple[str, ...],
        Option(
            "data plane",
            "Which addresses of this node accept node ports, in any combination: CIDRs,"
            " `primary` (the node's primary address per family), `all`, and `localhost`, which"
            " serves TCP node ports on 127.0.0.1 and ::1 by a forwarder in the agent.",
            "`primary`",
            metavar="CIDR|primary|localhost|all",
            check=node_port_addresses,
        ),
    ] = ()
    allow_service_external_ips: Annotated[
        bool,
        Option(
            "data plane",
            "Serve `spec.externalIPs` of Services (KEP-5707). Load balancer IPs are not affected.",
        ),
    ] = True
    detect_local_mode: Annotated[
        str | None,
        Option(
            "data plane",
            "How this node's pods are recognized, whose source address is kept.",
            "ClusterCIDR with a cluster CIDR, else None",
            choices=tuple(mode.value for mode in DetectLocalMode),
        ),
    ] = None
    cluster_cidr: Annotated[
        str,
        Option("data plane", "The pods' CIDRs, comma separated.", check=checks.cidr_list),
    ] = ""
    pod_bridge_interface: Annotated[
        str, Option("data plane", "The bridge of mode BridgeInterface.", metavar="NAME")
    ] = ""
    pod_interface_name_prefix: Annotated[
        str, Option("data plane", "The prefix of mode InterfaceNamePrefix.", metavar="PREFIX")
    ] = ""
    masquerade_all: Annotated[bool, Option("data plane", "Masquerade all cluster IP traffic.")] = (
        False
    )
    masquerade_bit: Annotated[
        _Bit,
        Option("data plane", "The bit of the packet mark that requests masquerading, 0 to 31."),
    ] = 14
    counters: Annotated[
        bool,
        Option(
            "data plane",
            "Count new connections and refused and dropped packets of each Service address, in the"
            " kernel.",
        ),
    ] = True
    metrics_frontends: Annotated[
        _Count,
        Option(
            "agent",
            "How many Service addresses have series of their own in `/metrics`; the others are"
            " summed in one. 0 for no such series at all.",
        ),
    ] = 1000
    healthz_bind_address: Annotated[
        str | None,
        Option(
            "agent",
            "Where `/healthz` and `/livez` are served; empty for no server. Both unspecified"
            " addresses mean every address of both families.",
            f"`0.0.0.0:{HEALTHZ_PORT}`, with `--bind-address ::` `[::]:{HEALTHZ_PORT}`",
            metavar="IP:PORT",
            check=checks.binds(HEALTHZ_PORT),
        ),
    ] = None
    metrics_bind_address: Annotated[
        str | None,
        Option(
            "agent",
            "Where `/metrics` is served; empty for no server.",
            f"`127.0.0.1:{METRICS_PORT}`, with `--bind-address ::` `[::1]:{METRICS_PORT}`",
            metavar="IP:PORT",
            check=checks.binds(METRICS_PORT),
        ),
    ] = None
    api_socket: Annotated[
        str,
        Option(
            "agent",
            "The path of a unix socket at which the read-only API is served, which the other"
            " commands ask; empty for none.",
            metavar="PATH",
        ),
    ] = ""
    api_bind_address: Annotated[
        str,
        Option(
            "agent",
            "A loopback address at which the read-only API and the status page are served; empty"
            " for none.",
            metavar="IP:PORT",
            check=checks.loopback(API_PORT),
        ),
    ] = ""
    history_size: Annotated[
        _Entries,
        Option(
            "agent",
            "How many changes the history keeps; one takes about half a kilobyte.",
        ),
    ] = 2000
    post_events: Annotated[
        bool,
        Option(
            "agent",
            "Create a Kubernetes Event on an object for each problem with it. The agent must be"
            " allowed to create `events.events.k8s.io` (deploy/components/events).",
        ),
    ] = False
    bind_address_hard_fail: Annotated[
        bool,
        Option(
            "agent",
            "Exit when the health or the metrics address cannot be bound. Otherwise the agent"
            " warns once and tries again every 5 seconds.",
        ),
    ] = False
    healthz_timeout: Annotated[
        Duration,
        Option(
            "agent",
            "How long a change may wait to be programmed before `/healthz` and `/livez` answer"
            " 503.",
            check=checks.positive,
        ),
    ] = Duration(120)
    log_level: Annotated[
        str,
        Option("agent", "`debug` also logs every element that changes.", choices=LOG_LEVELS),
    ] = "info"
    no_own: Annotated[
        bool,
        Option("tables", "Do not set nftables table ownership (Linux 6.9 and later have it)."),
    ] = False
    oom_score_adj: Annotated[
        _Score,
        Option(
            "agent",
            "How reluctant the kernel is to kill the agent when memory is short, -1000 to 1000.",
        ),
    ] = -999
    conntrack_max_per_core: Annotated[
        _Count,
        Option("conntrack", "`nf_conntrack_max` for each CPU; 0 leaves it unchanged."),
    ] = 32768
    conntrack_min: Annotated[
        _Count, Option("conntrack", "The lowest value that `nf_conntrack_max` is set to.")
    ] = 131072
    conntrack_tcp_timeout_established: Annotated[
        Duration,
        Option(
            "conntrack",
            "`nf_conntrack_tcp_timeout_established`; 0s leaves it unchanged.",
            check=checks.not_negative,
        ),
    ] = Duration(86400)
    conntrack_tcp_timeout_close_wait: Annotated[
        Duration,
        Option(
            "conntrack",
            "`nf_conntrack_tcp_timeout_close_wait`; 0s leaves it unchanged.",
            check=checks.not_negative,
        ),
    ] = Duration(3600)
    conntrack_tcp_be_liberal: Annotated[
        bool,
        Option(
            "conntrack",
            "Set `nf_conntrack_tcp_be_liberal`: packets outside the TCP window are not invalid.",
        ),
    ] = False
    conntrack_udp_timeout: Annotated[
        Duration,
        Option(
            "conntrack",
            "`nf_conntrack_udp_timeout`; 0s leaves it unchanged.",
            check=checks.not_negative,
        ),
    ] = Duration(0)
    conntrack_udp_timeout_stream: Annotated[
        Duration,
        Option(
            "conntrack",
            "`nf_conntrack_udp_timeout_stream`; 0s leaves it unchanged.",
            check=checks.not_negative,
        ),
    ] = Duration(0)

    def options(self) -> Options:
        """The options that the data plane depends on. Raises ConfigError."""
        return options_of(self)

    def healthz(self) -> Bind | None:
        """Where /healthz and /livez are served. Raises ValueError."""
        every = "::" if self._prefers_ipv6 else "0.0.0.0"
        return _bind(self.healthz_bind_address, every, HEALTHZ_PORT)

    def metrics(self) -> Bind | None:
        """Where /metrics is served; by default only this machine can read it. Raises ValueError."""
        loopback = "::1" if self._prefers_ipv6 else "127.0.0.1"
        return _bind(self.metrics_bind_address, loopback, METRICS_PORT)

    def api(self) -> Bind | None:
        """Where the API is served on TCP, if at all. Raises ValueError."""
        return _bind(self.api_bind_address, "127.0.0.1", API_PORT)

    @property
    def _prefers_ipv6(self) -> bool:
        return ":" in self.bind_address

    def conntrack(self) -> ConntrackSettings:
        """The node's connection tracking settings, in whole seconds."""
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


class Declaration(NamedTuple):
    """An option as a field of Settings declares it.

    `type` is bool, int, str, Duration or tuple; `bounds` are those of an int. `check` covers the
    choices, too.
    """

    name: str
    field: str
    type: type
    bounds: tuple[int | None, int | None]
    default: Any
    option: Option
    check: Check | None

    @property
    def flag(self) -> str:
        """Its flag, as it is written to switch it on."""
        return "--" + self.name.replace("_", "-")

    @property
    def default_text(self) -> str:
        """The default for people, "" if it is empty."""
        if self.option.usual:
            return self.option.usual
        if isinstance(self.default, bool):
            return "true" if self.default else "false"
        return str(self.default) if self.default not in (None, ()) else ""


def _declaration(field: msgspec.structs.FieldInfo) -> Declaration:
    kind, *notes = get_args(field.type)
    bounds = next((n for n in notes if isinstance(n, msgspec.Meta)), msgspec.Meta())
    option = next(n for n in notes if isinstance(n, Option))
    plain = [k for k in get_args(kind) if k is not type(None)] if get_origin(kind) else [kind]
    check = option.check or (checks.one_of(*option.choices) if option.choices else None)
    return Declaration(
        field.name,
        field.encode_name,
        tuple if get_origin(kind) is tuple else plain[0],
        (_whole(bounds.ge), _whole(bounds.le)),
        field.default,
        option,
        check,
    )


def _whole(bound: float | None) -> int | None:
    return None if bound is None else int(bound)


OPTIONS: dict[str, Declaration] = {
    field.name: _declaration(field) for field in msgspec.structs.fields(Settings)
}
"""By name, in the order of the documentation."""
