"""The hosts of a World, and what an answer from one says."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Literal

Protocol = Literal["tcp", "udp"]
Outcome = Literal["answered", "refused", "silent", "unreachable"]
BOTH_FAMILIES = (socket.AF_INET, socket.AF_INET6)


class WorldError(RuntimeError):
    """The world cannot be built or used; the text says what to do."""


@dataclass(frozen=True)
class Host:
    """One network namespace of a World."""

    name: str
    """The name in the World, such as "pod-1"."""
    namespace: str
    """The name of the network namespace under /var/run/netns."""
    ipv4: str
    """The address in the fabric (machines) or in the pod network (pods)."""
    ipv6: str
    """As ipv4."""
    machine: str | None = None
    """The machine a pod runs on; None for machines and the fabric."""

    def address(self, family: int) -> str:
        """The host's address of a family, AF_INET or AF_INET6."""
        return self.ipv6 if family == socket.AF_INET6 else self.ipv4


@dataclass(frozen=True)
class Answer:
    """The outcome of one question to an address and port."""

    outcome: Outcome
    """"answered": a server of the World replied.
    "refused": a TCP reset or an ICMP port unreachable came back.
    "silent": nothing came back in time.
    "unreachable": no route, or an ICMP error of type unreachable or prohibited."""
    server: str | None
    """The name of the host that answered; None unless answered."""
    client: str | None
    """The source address that the server saw; None unless answered."""
    client_port: int | None
    """The source port that the server saw; None unless answered."""
    seconds: float
    """The time from the first packet to the outcome, in seconds."""


def family_of(address: str) -> socket.AddressFamily:
    """AF_INET or AF_INET6, by the text of an address."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def machine_of_fabric(prefix: str, name: str, number: int) -> Host:
    """A machine of the fabric; `number` is the last part of both addresses."""
    if not 1 <= number <= 254:
        raise ValueError(f"machine {name}: its number is 1 to 254, not {number}")
    if len(name) > 12:  # the bridge's port is named after it, in the kernel's 15 characters
        raise ValueError(f"machine {name}: its name may have 12 characters at most")
    return Host(name, prefix + name, f"172.31.0.{number}", f"fd00:172:31::{number}")


def pod_of(prefix: str, kind: str, machine: str, network: int, number: int) -> Host:
    """A pod of a machine, numbered from 1."""
    name, last = f"{kind}-{number}", 10 + number
    address4, address6 = f"10.244.{network}.{last}", f"fd00:10:244:{network}::{last}"
    return Host(name, prefix + name, address4, address6, machine)
