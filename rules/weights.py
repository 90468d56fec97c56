"""The annotations that choose how a Service's new connections are spread over its endpoints.

On a Service:

    sliceproxy.io/algorithm: random | source-hash | weighted
    sliceproxy.io/weights: "db-0=3, 10.0.0.7=0"      pods by name, endpoints by address
    sliceproxy.io/zone-weights: "a=3, b=1"           endpoints by zone

On an EndpointSlice `sliceproxy.io/weights`, for the endpoints of this slice. The most specific
weight counts: the slice's, the Service's, the zone's, else 1. An endpoint with weight 0 is
*drained*: it gets no new connections. Weights have no effect while the algorithm is `random`, or
absent.

An annotation is used as a whole or not at all. If one on a Service cannot be read, the Service is
`random` without weights; if one on an EndpointSlice cannot, its endpoints have no weights of their
own. Both are problems of that object (`rules.problems`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import msgspec

from rules.objects import (
    MAX_ENDPOINTS_PER_SLICE,
    RANDOM_CHOICE,
    Address,
    Algorithm,
    Balancing,
    Endpoint,
    Endpoints,
    WeightedEndpoint,
    parse_address,
)

ALGORITHM_ANNOTATION = "sliceproxy.io/algorithm"
WEIGHTS_ANNOTATION = "sliceproxy.io/weights"
ZONE_WEIGHTS_ANNOTATION = "sliceproxy.io/zone-weights"

MAX_WEIGHT = 65535  # as in IPVS
MAX_WEIGHTS = MAX_ENDPOINTS_PER_SLICE
"""So many weights one annotation may have."""
DEFAULT_WEIGHT = 1

Weights = tuple[tuple[Address | str, int], ...]

_ALGORITHMS = {algorithm.value: algorithm for algorithm in Algorithm}
_WEIGHT = re.compile(r"[0-9]{1,5}", re.ASCII)
_POD = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", re.ASCII)
_ZONE = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", re.ASCII)  # a label's value


def balancing(annotations: Mapping[str, str], problems: list[str]) -> Balancing:
    """The balancing that a Service's annotations ask for; what cannot be read is in `problems`.

    Raises KeyError without an algorithm."""
    text = annotations[ALGORITHM_ANNOTATION]
    algorithm = _ALGORITHMS.get(text)
    if algorithm is None:
        known = ", ".join(_ALGORITHMS)
        problems.append(
            f"{ALGORITHM_ANNOTATION}: {text[:64]!r} is none of {known}; taken as random"
        )
        return RANDOM_CHOICE
    if algorithm is Algorithm.RANDOM:
        return RANDOM_CHOICE
    try:
        return Balancing(
            algorithm,
            _parse(WEIGHTS_ANNOTATION, annotations.get(WEIGHTS_ANNOTATION), _endpoint),
            _parse(ZONE_WEIGHTS_ANNOTATION, annotations.get(ZONE_WEIGHTS_ANNOTATION), _zone),
        )
    except ValueError as error:
        problems.append(f"{error}; {ALGORITHM_ANNOTATION} is taken as random")
        return RANDOM_CHOICE


def weighted_endpoints(text: str, endpoints: Endpoints, problems: list[str]) -> Endpoints:
    """A slice's endpoints with the weights of its annotation."""
    try:
        weights = dict(_parse(WEIGHTS_ANNOTATION, text, _endpoint))
    except ValueError as error:
        problems.append(f"{error}; ignored")
        return endpoints
    found = tuple(weights.get(e.pod, weights.get(e.address)) for e in endpoints)
    return msgspec.structs.replace(endpoints, weights=found)


def _parse(name: str, text: str | None, key: Callable[[str], Address | str]) -> Weights:
    """The weights of an annotation, each key once. Raises ValueError."""
    if text is None:
        return ()
    entries = text.split(",", MAX_WEIGHTS)
    if len(entries) > MAX_WEIGHTS:
        raise ValueError(f"{name}: more than {MAX_WEIGHTS} weights")
    found: dict[Address | str, int] = {}
    for entry in entries:
        who, equals, number = (part.strip() for part in entry.partition("="))
        shown = repr(entry.strip()[:64])
        if not equals:
            raise ValueError(f"{name}: {shown} is not NAME=WEIGHT")
        if not _WEIGHT.fullmatch(number) or int(number) > MAX_WEIGHT:
            raise ValueError(f"{name}: {shown} has no weight from 0 to {MAX_WEIGHT}")
        try:
            parsed = key(who)
        except ValueError as error:
            raise ValueError(f"{name}: {shown}: {error}") from None
        if parsed in found:
            raise ValueError(f"{name}: {shown} is a duplicate")
        found[parsed] = int(number)
    return tuple(found.items())


def _endpoint(text: str) -> Address | str:
    """An address, packed, or the name of a pod."""
    try:
        return parse_address(text)
    except ValueError:
        if _POD.fullmatch(text) and not _looks_like_address(text):
            return text
        raise ValueError("neither a pod's name nor an address") from None


def _looks_like_address(text: str) -> bool:
    return text.replace(".", "").isdigit()


def _zone(text: str) -> str:
    if not _ZONE.fullmatch(text):
        raise ValueError("not the name of a zone")
    return text


def weigher(chosen: Balancing) -> Callable[[Endpoint], int]:
    """Gives the weight of a Service's endpoint. Under RANDOM weights have no effect."""
    if chosen.algorithm is Algorithm.RANDOM:
        return lambda _: DEFAULT_WEIGHT
    own, zones = dict(chosen.weights), dict(chosen.zone_weights)

    def weight(endpoint: Endpoint) -> int:
        if isinstance(endpoint, WeightedEndpoint):
            return endpoint.weight
        for weights, key in (own, endpoint.pod), (own, endpoint.address), (zones, endpoint.zone):
            if key in weights:
                return weights[key]
        return DEFAULT_WEIGHT

    return weight
