"""The API's JSON, decoded into records.

msgspec decodes it into private mirrors of the API's shapes, which declare only the fields that are
needed: it skips all others without building them. `rules.checks` makes records from the shapes.

msgspec follows nested values with the C stack and gives up at Python's recursion limit, but a
tenant may store values nested more deeply than that, in `managedFields` for instance. Then the
text is decoded a second time without what is nested too deeply; no declared field is.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import msgspec

from rules import checks
from rules.checks import EndpointFields, Metadata
from rules.objects import InvalidObject, Object, Place

# --- the API's shapes ---------------------------------------------------------------------------


class _Shape(msgspec.Struct, rename="camel"):
    pass


class _Metadata(_Shape):
    name: str
    namespace: str | None = None
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None

    def checked(self) -> Metadata:
        return Metadata(
            self.name,
            self.namespace or "",
            self.creation_timestamp or "",
            self.deletion_timestamp is not None,
            self.labels or {},
            self.annotations or {},
        )


class _AnyObject(_Shape):
    metadata: _Metadata
    kind: str | None = None
    api_version: str | None = None


class _ServicePortShape(_Shape):
    port: int
    name: str | None = None
    protocol: str | None = None
    node_port: int | None = None


class _ClientIP(_Shape):
    timeout_seconds: int | None = None


class _AffinityConfig(_Shape):
    client_ip: _ClientIP | None = msgspec.field(default=None, name="clientIP")


class _ServiceSpec(_Shape):
    type: str | None = None
    cluster_ip: str | None = msgspec.field(default=None, name="clusterIP")
    cluster_ips: list[str] | None = msgspec.field(default=None, name="clusterIPs")
    external_ips: list[str] | None = msgspec.field(default=None, name="externalIPs")
    ports: list[_ServicePortShape] | None = None
    session_affinity: str | None = None
    session_affinity_config: _AffinityConfig | None = None
    internal_traffic_policy: str | None = None
    external_traffic_policy: str | None = None
    load_balancer_source_ranges: list[str] | None = None
    health_check_node_port: int | None = None


class _Ingress(_Shape):
    ip: str | None = None
    ip_mode: str | None = None


class _LoadBalancerStatus(_Shape):
    ingress: list[_Ingress] | None = None


class _ServiceStatus(_Shape):
    load_balancer: _LoadBalancerStatus | None = None


class _ServiceShape(_Shape):
    metadata: _Metadata
    spec: _ServiceSpec
    status: _ServiceStatus | None = None


class _Conditions(_Shape):
    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class _Hint(_Shape):
    name: str


class _Hints(_Shape):
    for_zones: list[_Hint] | None = None
    for_nodes: list[_Hint] | None = None


class _TargetRef(_Shape):
    name: str | None = None


class _EndpointShape(_Shape):
    addresses: list[str]
    conditions: _Conditions | None = None
    hints: _Hints | None = None
    target_ref: _TargetRef | None = None
    node_name: str | None = None
    zone: str | None = None


class _SlicePortShape(_Shape):
    name: str | None = None
    protocol: str | None = None
    port: int | None = None


class _SliceShape(_Shape):
    metadata: _Metadata
    address_type: str
    endpoints: list[_EndpointShape] | None = None
    ports: list[_SlicePortShape] | None = None


class _NodeAddress(_Shape):
    type: str
    address: str


class _NodeStatus(_Shape):
    addresses: list[_NodeAddress] | None = None


class _Taint(_Shape):
    key: str


class _NodeSpec(_Shape):
    taints: list[_Taint] | None = None
    pod_cidr: str | None = msgspec.field(default=None, name="podCIDR")
    pod_cidrs: list[str] | None = msgspec.field(default=None, name="podCIDRs")


class _NodeShape(_Shape):
    metadata: _Metadata
    spec: _NodeSpec | None = None
    status: _NodeStatus | None = None


class _CIDRSpec(_Shape):
    cidrs: list[str] | None = None


class _ServiceCIDRShape(_Shape):
    metadata: _Metadata
    spec: _CIDRSpec


class _ListShape(_Shape):
    kind: str | None = None
    api_version: str | None = None
    items: list[msgspec.Raw] | None = None


# --- nesting ------------------------------------------------------------------------------------

MAX_DEPTH = 64
"""No declared field is nested more deeply, in a list of objects in an event: about 12 levels."""

_T = TypeVar("_T")
_STRING_OR_BRACKET = re.compile(rb'"(?:[^"\\]|\\.)*"|[{}\[\]]', re.DOTALL)


def shallow(data: bytes | msgspec.Raw) -> bytes:
    """JSON text whose values nested more deeply than MAX_DEPTH are replaced by null.

    Text that is not JSON stays such. Linear in the text; needs no stack.
    """
    text, pieces, depth, kept = bytes(data), list[bytes](), 0, 0
    for token in _STRING_OR_BRACKET.finditer(text):
        match text[token.start()]:
            case 0x7B | 0x5B:  # { [
                if depth == MAX_DEPTH:
                    pieces += text[kept : token.start()], b"null"
                depth += 1
            case 0x7D | 0x5D:  # } ]
                depth -= 1
                if depth == MAX_DEPTH:
                    kept = token.end()
    pieces.append(text[kept:] if depth <= MAX_DEPTH else b"")
    return b"".join(pieces)


def decode_json(decoder: msgspec.json.Decoder[_T], data: bytes | msgspec.Raw) -> _T:
    """What the decoder makes of a text, however deeply it is nested. Raises ValueError."""
    try:
        return decoder.decode(data)
    except RecursionError:
        return decoder.decode(shallow(data))


# --- objects ------------------------------------------------------------------------------------


def _service(shape: _ServiceShape) -> Object:
    return checks.service(shape, shape.metadata.checked())


def _slice(shape: _SliceShape) -> Object:
    return checks.endpoint_slice(shape, shape.metadata.checked(), shape.ports or (), _fields)


def _fields(shapes: Sequence[_EndpointShape]) -> EndpointFields:
    return EndpointFields(
        [shape.addresses[0] if shape.addresses else None for shape in shapes],
        [_place(shape) for shape in shapes],
        [(shape.target_ref and shape.target_ref.name) or "" for shape in shapes],
    )


def _place(shape: _EndpointShape) -> Place:
    state, hints = shape.conditions or _Conditions(), shape.hints or _Hints()
    return checks.place(
        checks.condition_bits(state.ready, state.serving, state.terminating),
        shape.node_name or "",
        shape.zone or "",
        _hint_names(hints.for_nodes),
        _hint_names(hints.for_zones),
    )


def _hint_names(shapes: list[_Hint] | None) -> tuple[str, ...]:
    return tuple(sys.intern(shape.name) for shape in shapes or ())


def _node(shape: _NodeShape) -> Object:
    return checks.node(shape, shape.metadata.checked())


def _service_cidr(shape: _ServiceCIDRShape) -> Object:
    return checks.service_cidr(shape, shape.metadata.checked())


_ABSENT = checks.condition_bits(None, None, None)

_PARSERS: dict[str, tuple[msgspec.json.Decoder[Any], Callable[[Any], Object]]] = {
    "Service": (msgspec.json.Decoder(_ServiceShape), _service),
    "EndpointSlice": (msgspec.json.Decoder(_SliceShape), _slice),
    "Node": (msgspec.json.Decoder(_NodeShape), _node),
    "ServiceCIDR": (msgspec.json.Decoder(_ServiceCIDRShape), _service_cidr),
}
KINDS = tuple(_PARSERS)
_GROUPS = {
    "Service": "",
    "EndpointSlice": "discovery.k8s.io",
    "Node": "",
    "ServiceCIDR": "networking.k8s.io",
}

_list_decoder = msgspec.json.Decoder(_ListShape)
_any_decoder = msgspec.json.Decoder(_AnyObject)


def decode(kind: str, data: bytes | msgspec.Raw) -> Object:
    """One object of a known kind from the API's JSON. Raises InvalidObject."""
    decoder, parse = _PARSERS[kind]
    try:
        return parse(decode_json(decoder, data))
    except ValueError as error:  # msgspec's errors are ValueErrors that say where
        raise InvalidObject(_subject(kind, data), str(error)) from None


def _subject(kind: str, data: bytes | msgspec.Raw) -> str:
    try:
        metadata = decode_json(_any_decoder, data).metadata
    except ValueError:
        return f"{kind} without a name"
    return f"{kind} {metadata.namespace or 'default'}/{metadata.name}"


def decode_any(data: bytes) -> Iterator[Object | InvalidObject]:
    """The objects of one JSON document: a single object, a `List`, or a list answer of the API.

    Objects of kinds that this program does not use are skipped. An unusable object, also one whose
    kind looks misspelt, is an InvalidObject in its place, so that it does not hide the others.
    """
    try:
        document = decode_json(_list_decoder, data)
    except ValueError as error:
        yield InvalidObject("document", str(error))
        return
    if document.items is None:
        yield from _decode_known(document.kind, document.api_version, data)
        return
    # the items of an API list carry no kind of their own: "ServiceList" says it for all
    item_kind = (document.kind or "List").removesuffix("List")
    for raw in document.items:
        kind, version = item_kind, document.api_version
        if not kind:
            try:
                item = decode_json(_any_decoder, raw)
            except ValueError as error:
                yield InvalidObject("an item of a List", str(error))
                continue
            kind, version = item.kind or "", item.api_version
        yield from _decode_known(kind, version, raw)


def _decode_known(
    kind: str | None, version: str | None, data: bytes | msgspec.Raw
) -> Iterator[Object | InvalidObject]:
    if not kind:
        yield InvalidObject(_subject("object", data), "has no kind")
    elif kind in _PARSERS and _is_of_group(version, _GROUPS[kind]):
        try:
            yield decode(kind, data)
        except InvalidObject as error:
            yield error
    elif (meant := _meant(kind)) and _is_of_group(version, _GROUPS[meant]):
        yield InvalidObject(_subject(kind, data), f"unknown kind; did you mean {meant}?")


@lru_cache(256)
def _meant(kind: str) -> str | None:
    """The kind of which another one is perhaps a misspelling."""
    folded = {known.casefold(): known for known in KINDS if known != kind}
    near = difflib.get_close_matches(kind[:64].casefold(), folded, 1, cutoff=0.85)
    return folded[near[0]] if near else None


def _is_of_group(version: str | None, group: str) -> bool:
    """Whether an apiVersion is of the API group; Knative, for one, has Services of its own."""
    if version is None:
        return True
    return version.rpartition("/")[0] == group
