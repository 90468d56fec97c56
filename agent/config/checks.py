"""Checks of option values, shared by flags, our own file and kube-proxy's."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from agent.config.durations import Duration
from rules.objects import parse_network

Check = Callable[[Any], object]
"""Raises ValueError, with the allowed values, for a value that cannot be used."""


class ConfigError(ValueError):
    """A configuration that cannot be used. One line: which option, and what is allowed."""


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


def one_of(*allowed: str) -> Check:
    """Accepts these words, and ""."""

    def check(value: str) -> None:
        if value and value not in allowed:
            raise ValueError(f"{value!r}; use one of {', '.join(filter(None, allowed))}")

    return check


def binds(port: int) -> Check:
    """Accepts an address to listen at, whose default port is `port`, and ""."""
    return lambda text: text and parse_bind(text, port)


def loopback(port: int) -> Check:
    """Accepts a loopback address to listen at, whose default port is `port`, and ""."""

    def check(text: str) -> None:
        if text and not ipaddress.ip_address(parse_bind(text, port).host).is_loopback:
            raise ValueError(f"{text!r} is not a loopback address; write it like 127.0.0.1:{port}")

    return check


def address(text: str) -> None:
    """Accepts an IP address, and ""."""
    if not text:
        return
    try:
        ipaddress.ip_address(text)
    except ValueError:
        raise ValueError(f"{text!r} is not an IP address") from None


def cidr(text: str) -> None:
    """Accepts a CIDR."""
    if "/" not in text:
        raise ValueError(f"{text!r} is not a CIDR; write it like 10.0.0.0/8")
    parse_network(text)


def cidr_list(text: str) -> None:
    """Accepts CIDRs separated by commas, and ""."""
    each_cidr(text.split(",") if text else ())


def each_cidr(texts: Iterable[str]) -> None:
    """Accepts a list of CIDRs."""
    for text in texts:
        cidr(text)


def not_negative(seconds: Duration) -> None:
    """Accepts 0 and more."""
    if seconds < 0:
        raise ValueError("must not be negative")


def positive(seconds: Duration) -> None:
    """Accepts more than 0."""
    if seconds <= 0:
        raise ValueError("must be greater than 0")
