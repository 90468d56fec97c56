"""Rules as kube-proxy 1.36 makes them in nftables mode, written from its source by hand.

A yardstick for the first packet: what a chain per Service and per endpoint costs on this machine in
this run. It is an imitation: a cluster IP with UDP endpoints, and everything that a packet to it
meets (pkg/proxy/nftables/proxier.go), for as many Services as asked for. The other Services share
two endpoints, as their own are never reached.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

_OTHERS = int(ipaddress.IPv4Address("10.97.0.0"))


def ruleset(
    address: str, port: int, targets: Sequence[str], services: int, protocol: str = "udp"
) -> str:
    """A table for nft: the Service at `address` and `port`, and others.

    targets: address:port of each of its endpoints, two at least.
    """
    others = [str(ipaddress.IPv4Address(_OTHERS + n)) for n in range(services - 1)]
    addresses = [address, *others]
    chains = [
        _service("asked", address, f"{protocol} dport {port}", len(targets)),
        *(_service(str(n), other, f"{protocol} dport {port}", 2) for n, other in enumerate(others)),
    ]
    verdicts = [f"{address} . {protocol} . {port} : goto service-asked"]
    verdicts += [
        f"{other} . {protocol} . {port} : goto service-{n}" for n, other in enumerate(others)
    ]
    return "\n".join(
        (
            "table ip kube-proxy {",
            _map("service-ips", "ipv4_addr . inet_proto . inet_service", verdicts),
            _map("service-nodeports", "inet_proto . inet_service"),
            _map("no-endpoint-services", "ipv4_addr . inet_proto . inet_service"),
            _map("no-endpoint-nodeports", "inet_proto . inet_service"),
            _map("firewall-ips", "ipv4_addr . inet_proto . inet_service"),
            f"set cluster-ips {{ type ipv4_addr; elements = {{ {', '.join(addresses)} }}; }}",
            "set nodeport-ips { type ipv4_addr; }",
            "chain mark-for-masquerade { meta mark set meta mark or 0x4000; }",
            *(_endpoint(n, target, protocol) for n, target in enumerate(targets)),
            *chains,
            _SHARED,
            "}",
        )
    )


def _map(name: str, key: str, elements: Sequence[str] = ()) -> str:
    content = f"elements = {{ {', '.join(elements)} }};" if elements else ""
    return f"map {name} {{ type {key} : verdict; {content} }}"


def _service(name: str, address: str, port: str, endpoints: int) -> str:
    verdicts = ", ".join(f"{n} : goto endpoint-{n}" for n in range(endpoints))
    return (
        f"chain service-{name} {{\n"
        # clients outside the cluster CIDR are masqueraded; here there are none
        f"ip daddr {address} {port} ip saddr != 0.0.0.0/0 jump mark-for-masquerade\n"
        f"numgen random mod {endpoints} vmap {{ {verdicts} }}\n}}"
    )


def _endpoint(number: int, target: str, protocol: str) -> str:
    return (
        f"chain endpoint-{number} {{\n"
        f"ip saddr {target.partition(':')[0]} jump mark-for-masquerade\n"
        f"meta l4proto {protocol} dnat to {target}\n}}"
    )


_SHARED = """
chain services {
    ip daddr . meta l4proto . th dport vmap @service-ips
    ip daddr != 127.0.0.0/8 ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
}
chain firewall-check { ip daddr . meta l4proto . th dport vmap @firewall-ips; }
chain service-endpoints-check {
    ip daddr . meta l4proto . th dport vmap @no-endpoint-services
}
chain nodeport-endpoints-check {
    ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports
}
chain cluster-ips-check { ip daddr @cluster-ips reject; }
chain masquerading {
    meta mark and 0x4000 == 0 return
    meta mark set meta mark xor 0x4000
    masquerade fully-random
}
chain filter-prerouting {
    type filter hook prerouting priority -110
    ct state new jump firewall-check
}
chain filter-input {
    type filter hook input priority -110
    ct state new jump nodeport-endpoints-check
    ct state new jump service-endpoints-check
}
chain filter-forward {
    type filter hook forward priority -110
    ct state new jump service-endpoints-check
    ct state new jump cluster-ips-check
}
chain filter-output {
    type filter hook output priority -110
    ct state new jump service-endpoints-check
    ct state new jump firewall-check
}
chain filter-output-post-dnat {
    type filter hook output priority -90
    ct state new jump cluster-ips-check
}
chain nat-prerouting {
    type nat hook prerouting priority -100
    jump services
}
chain nat-output {
    type nat hook output priority -100
    jump services
}
chain nat-postrouting {
    type nat hook postrouting priority 100
    jump masquerading
}
"""
