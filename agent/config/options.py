"""Options of the data plane from the texts of flags and files."""

from __future__ import annotations

import ipaddress
import os
import socket

from rules.objects import Address, Network, parse_address, parse_network
from rules.options import DetectLocalMode, Options


class ConfigError(ValueError):
    """An option that cannot be used; the message says which, and what would do."""


def options(
    *,
    node: str | None,
    zone: str = "",
    proxy_name: str = "",
    masquerade_bit: int = 14,
    masquerade_all: bool = False,
    detect_local_mode: str | None = None,
    cluster_cidr: str = "",
    pod_bridge_interface: str = "",
    pod_interface_name_prefix: str = "",
    nodeport_addresses: tuple[str, ...] = (),
    bind_address: str = "",
) -> Options:
    """Options from flags. Raises ConfigError."""
    if not 0 <= masquerade_bit <= 31:
        raise ConfigError(f"--masquerade-bit {masquerade_bit}: a mark has bits 0 to 31")
    cidrs = _networks("--cluster-cidr", cluster_cidr.split(",") if cluster_cidr else [])
    mode = _mode(detect_local_mode, bool(cidrs))
    interface = {
        DetectLocalMode.BRIDGE_INTERFACE: pod_bridge_interface,
        DetectLocalMode.INTERFACE_NAME_PREFIX: pod_interface_name_prefix,
    }.get(mode, "")
    _complete(mode, cidrs, interface)
    return Options(
        node=node or os.environ.get("NODE_NAME") or socket.gethostname().lower(),
        zone=zone,
        proxy_name=proxy_name,
        mark=1 << masquerade_bit,
        masquerade_all=masquerade_all,
        detect_local=mode,
        cluster_cidrs=cidrs,
        interface=interface,
        node_port_networks=_node_port_networks(nodeport_addresses),
        address=_own_address(bind_address),
    )


def _mode(text: str | None, has_cidrs: bool) -> DetectLocalMode:
    if text is None:
        return DetectLocalMode.CLUSTER_CIDR if has_cidrs else DetectLocalMode.NONE
    for mode in DetectLocalMode:
        if mode.value.lower() == text.lower():
            return mode
    names = ", ".join(mode.value for mode in DetectLocalMode)
    raise ConfigError(f"--detect-local-mode {text}: use one of {names}")


def _complete(mode: DetectLocalMode, cidrs: tuple[Network, ...], interface: str) -> None:
    if mode is DetectLocalMode.CLUSTER_CIDR and not cidrs:
        raise ConfigError("--detect-local-mode ClusterCIDR needs --cluster-cidr")
    if mode is DetectLocalMode.BRIDGE_INTERFACE and not interface:
        raise ConfigError("--detect-local-mode BridgeInterface needs --pod-bridge-interface")
    if mode is DetectLocalMode.INTERFACE_NAME_PREFIX and not interface:
        raise ConfigError(
            "--detect-local-mode InterfaceNamePrefix needs --pod-interface-name-prefix"
        )
    # what the kernel takes as a name (dev_valid_name), and nothing that means something to nft
    if interface and (len(interface.encode()) > 15 or not _is_interface_name(interface)):
        raise ConfigError(f"{interface!r} cannot be the name of an interface")


def _is_interface_name(text: str) -> bool:
    return text not in (".", "..") and all(c.isalnum() or c in "._-@" for c in text)


def _networks(flag: str, texts: list[str] | tuple[str, ...]) -> tuple[Network, ...]:
    networks = []
    for text in texts:
        try:
            networks.append(parse_network(text))
        except ValueError as error:
            raise ConfigError(f"{flag}: {error}; write it like 10.0.0.0/8") from None
    return tuple(networks)


def _node_port_networks(texts: tuple[str, ...]) -> tuple[Network, ...] | None:
    wanted = [part for text in texts for part in text.split(",") if part]
    if not wanted or wanted == ["primary"]:
        return None
    if "primary" in wanted:
        raise ConfigError("--nodeport-addresses: `primary` cannot be combined with CIDRs")
    return _networks("--nodeport-addresses", wanted)


def _own_address(text: str) -> Address | None:
    """None for none and for the unspecified address, which chooses nothing."""
    try:
        if not text or ipaddress.ip_address(text).is_unspecified:
            return None
        return parse_address(text)
    except ValueError as error:
        raise ConfigError(f"--bind-address: {error}") from None
