"""The options of the data plane, from the settings."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from agent.config.checks import ConfigError, cidr
from rules.objects import Address, Network, parse_address, parse_network
from rules.options import DetectLocalMode, Options

if TYPE_CHECKING:
    from agent.config.settings import Settings

_KEYWORDS = {"all": ("0.0.0.0/0", "::/0"), "localhost": ("127.0.0.0/8", "::1/128")}
_PRIMARY = "primary"
_MAX_INTERFACE_NAME = 15  # IFNAMSIZ without the terminator


def options_of(settings: Settings) -> Options:
    """The data plane's options. Raises ConfigError."""
    cidrs = _networks("--cluster-cidr", filter(None, settings.cluster_cidr.split(",")))
    mode = _mode(settings.detect_local_mode, bool(cidrs))
    interface = {
        DetectLocalMode.BRIDGE_INTERFACE: settings.pod_bridge_interface,
        DetectLocalMode.INTERFACE_NAME_PREFIX: settings.pod_interface_name_prefix,
    }.get(mode, "")
    _complete(mode, cidrs, interface)
    texts = list(_separated(settings.nodeport_addresses)) or [_PRIMARY]
    return Options(
        node=settings.node or os.environ.get("NODE_NAME") or socket.gethostname().lower(),
        zone=settings.zone,
        proxy_name=settings.proxy_name,
        mark=1 << settings.masquerade_bit,
        masquerade_all=settings.masquerade_all,
        detect_local=mode,
        cluster_cidrs=cidrs,
        interface=interface,
        node_port_primary=_PRIMARY in texts,
        node_port_networks=_networks(
            "--nodeport-addresses",
            (c for text in texts if text != _PRIMARY for c in _KEYWORDS.get(text, (text,))),
        ),
        address=_own_address(settings.bind_address),
        allow_external_ips=settings.allow_service_external_ips,
        counters=settings.counters,
    )


def node_port_addresses(chosen: Iterable[str]) -> None:
    """Accepts what kube-proxy 1.37 does: `primary`, `localhost`, `all` and CIDRs, mixed."""
    for text in _separated(chosen):
        if text != _PRIMARY and text not in _KEYWORDS:
            cidr(text)


def serves_localhost(chosen: Iterable[str]) -> bool:
    """Whether node ports are to be served on loopback addresses.

    As in KEP-6032 only a loopback network asks for that: `localhost`, 127.0.0.1/32, ::1/128, but
    not `all`.
    """
    texts = (c for text in _separated(chosen) for c in _KEYWORDS.get(text, (text,)))
    return any(text != _PRIMARY and parse_network(text).is_loopback for text in texts)


def without_localhost(chosen: Iterable[str]) -> tuple[str, ...]:
    """The same node port addresses without those that `serves_localhost` asks for."""
    left = tuple(text for text in _separated(chosen) if not serves_localhost([text]))
    return left or (_PRIMARY,)


def _separated(chosen: Iterable[str]) -> Iterator[str]:
    return (text for part in chosen for text in part.split(",") if text)


def _mode(text: str | None, has_cidrs: bool) -> DetectLocalMode:
    if text is None:
        return DetectLocalMode.CLUSTER_CIDR if has_cidrs else DetectLocalMode.NONE
    try:
        return DetectLocalMode(text)
    except ValueError:
        names = ", ".join(mode.value for mode in DetectLocalMode)
        raise ConfigError(f"--detect-local-mode {text}: use one of {names}") from None


def _complete(mode: DetectLocalMode, cidrs: tuple[Network, ...], interface: str) -> None:
    if mode is DetectLocalMode.CLUSTER_CIDR and not cidrs:
        raise ConfigError("--detect-local-mode ClusterCIDR needs --cluster-cidr")
    if mode is DetectLocalMode.BRIDGE_INTERFACE and not interface:
        raise ConfigError("--detect-local-mode BridgeInterface needs --pod-bridge-interface")
    if mode is DetectLocalMode.INTERFACE_NAME_PREFIX and not interface:
        raise ConfigError(
            "--detect-local-mode InterfaceNamePrefix needs --pod-interface-name-prefix"
        )
    # the kernel's rule (dev_valid_name), without the characters that mean something to nft
    too_long = len(interface.encode()) > _MAX_INTERFACE_NAME
    if interface and (too_long or not _is_interface_name(interface)):
        raise ConfigError(f"{interface!r} is not a valid interface name")


def _is_interface_name(text: str) -> bool:
    return text not in (".", "..") and all(c.isalnum() or c in "._-@" for c in text)


def _networks(flag: str, texts: Iterable[str]) -> tuple[Network, ...]:
    networks = []
    for text in texts:
        try:
            networks.append(parse_network(text))
        except ValueError as error:
            raise ConfigError(f"{flag}: {error}; write it like 10.0.0.0/8") from None
    return tuple(networks)


def _own_address(text: str) -> Address | None:
    """None for "" and for the unspecified address, which chooses only a family."""
    try:
        if not text or ipaddress.ip_address(text).is_unspecified:
            return None
        return parse_address(text)
    except ValueError as error:
        raise ConfigError(f"--bind-address: {error}") from None
