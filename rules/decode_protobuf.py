"""The API's protobuf, decoded into records.

The messages declare only the fields that are needed; the decoder skips all others, however large
or deeply nested they are. Numbers and types are those of the files generated.proto in
k8s.io/api/{core,discovery,networking}/v1 and k8s.io/apimachinery/pkg/{apis/meta/v1,runtime}. They
never change: they are the format in which the API server stores objects in etcd.

A message inside another is the same on the wire as bytes. Where a cluster has few different values
of a message (an endpoint's conditions and hints, a slice's ports, times), it is declared as bytes
and decoded once for each value. Items of a list are bytes so that one that is damaged costs
no other.

Each kind has the attributes of the JSON shapes in `rules.decode`, and `rules.checks` makes the
same records of both.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import Edition, FieldDescriptorProto, FileDescriptorProto
from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

from rules import checks
from rules.checks import EndpointFields, Metadata
from rules.objects import DEFAULT_AFFINITY_SECONDS, InvalidObject, Object, Place

_PACKAGE = "sliceproxy.kubernetes"

# --- the messages -------------------------------------------------------------------------------


class _Field(NamedTuple):
    """A field: its number, its name in snake_case, and the name of its type.

    `map` is map<string, string>. Types with a capital are messages.
    """

    number: int
    name: str
    type: str = "string"
    repeated: bool = False
    default: str | None = None


_MESSAGES: dict[str, tuple[_Field, ...]] = {
    # meta/v1
    "ObjectMeta": (
        _Field(1, "name"),
        _Field(3, "namespace"),
        _Field(6, "resource_version"),
        _Field(8, "creation_timestamp", "bytes"),
        _Field(9, "deletion_timestamp", "bytes"),
        _Field(11, "labels", "map"),
        _Field(12, "annotations", "map"),
    ),
    # of every object before it is known whether it is new; labels would take longer than the rest
    "Identity": (_Field(1, "name"), _Field(3, "namespace"), _Field(6, "resource_version")),
    "Identified": (_Field(1, "metadata", "Identity"),),
    "ListMeta": (_Field(2, "resource_version"), _Field(3, "token")),
    "AnyObject": (_Field(1, "metadata", "ObjectMeta"),),
    "AnyList": (_Field(1, "metadata", "ListMeta"), _Field(2, "items", "bytes", repeated=True)),
    "Status": (_Field(3, "message"), _Field(4, "reason"), _Field(6, "code", "int32")),
    "WatchEvent": (_Field(1, "type"), _Field(2, "object", "RawExtension")),
    # runtime
    "RawExtension": (_Field(1, "raw", "bytes"),),
    "Unknown": (_Field(2, "raw", "bytes"),),
    # core/v1
    "Service": (
        _Field(1, "metadata", "ObjectMeta"),
        _Field(2, "spec", "ServiceSpec"),
        _Field(3, "status", "ServiceStatus"),
    ),
    "ServiceSpec": (
        _Field(1, "ports", "ServicePort", repeated=True),
        _Field(3, "cluster_ip"),
        _Field(4, "type"),
        _Field(5, "external_ips", repeated=True),
        _Field(7, "session_affinity"),
        _Field(9, "load_balancer_source_ranges", repeated=True),
        _Field(11, "external_traffic_policy"),
        _Field(12, "health_check_node_port", "int32"),
        _Field(14, "session_affinity_config", "SessionAffinityConfig"),
        _Field(18, "cluster_ips", repeated=True),
        _Field(22, "internal_traffic_policy"),
    ),
    "ServicePort": (
        _Field(1, "name"),
        _Field(2, "protocol"),
        _Field(3, "port", "int32"),
        _Field(5, "node_port", "int32"),
    ),
    "SessionAffinityConfig": (_Field(1, "client_ip", "ClientIPConfig"),),
    "ClientIPConfig": (
        _Field(1, "timeout_seconds", "int32", default=str(DEFAULT_AFFINITY_SECONDS)),
    ),
    "ServiceStatus": (_Field(1, "load_balancer", "LoadBalancerStatus"),),
    "LoadBalancerStatus": (_Field(1, "ingress", "LoadBalancerIngress", repeated=True),),
    "LoadBalancerIngress": (_Field(1, "ip"), _Field(3, "ip_mode")),
    "Node": (
        _Field(1, "metadata", "ObjectMeta"),
        _Field(2, "spec", "NodeSpec"),
        _Field(3, "status", "NodeStatus"),
    ),
    "NodeSpec": (
        _Field(1, "pod_cidr"),
        _Field(5, "taints", "Taint", repeated=True),
        _Field(7, "pod_cidrs", repeated=True),
    ),
    "Taint": (_Field(1, "key"),),
    "NodeStatus": (_Field(5, "addresses", "NodeAddress", repeated=True),),
    "NodeAddress": (_Field(1, "type"), _Field(2, "address")),
    # discovery/v1
    "EndpointSlice": (
        _Field(1, "metadata", "ObjectMeta"),
        _Field(2, "endpoints", "Endpoint", repeated=True),
        _Field(3, "ports", "bytes", repeated=True),
        _Field(4, "address_type"),
    ),
    "Endpoint": (
        _Field(1, "addresses", repeated=True),
        _Field(2, "conditions", "bytes"),
        _Field(4, "target_ref", "ObjectReference"),
        _Field(6, "node_name"),
        _Field(7, "zone"),
        _Field(8, "hints", "bytes"),
    ),
    "EndpointConditions": (
        _Field(1, "ready", "bool", default="true"),
        _Field(2, "serving", "bool", default="true"),
        _Field(3, "terminating", "bool"),
    ),
    "EndpointHints": (
        _Field(1, "for_zones", "NamedHint", repeated=True),
        _Field(2, "for_nodes", "NamedHint", repeated=True),
    ),
    "NamedHint": (_Field(1, "name"),),
    "EndpointPort": (_Field(1, "name"), _Field(2, "protocol"), _Field(3, "port", "int32")),
    "ObjectReference": (_Field(3, "name"),),
    # networking/v1
    "ServiceCIDR": (_Field(1, "metadata", "ObjectMeta"), _Field(2, "spec", "ServiceCIDRSpec")),
    "ServiceCIDRSpec": (_Field(1, "cidrs", repeated=True),),
}


def _message_classes() -> dict[str, Any]:
    """The class of each message, by its name."""
    file = FileDescriptorProto(
        name="sliceproxy/kubernetes.proto",
        package=_PACKAGE,
        # as proto2, which Kubernetes uses, but for text that is not UTF-8: an error, not bytes
        syntax="editions",
        edition=Edition.EDITION_2023,
    )
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field in fields:
            declared = message.field.add(name=field.name, number=field.number)
            repeated = field.repeated or field.type == "map"
            declared.label = (
                FieldDescriptorProto.LABEL_REPEATED
                if repeated
                else FieldDescriptorProto.LABEL_OPTIONAL
            )
            if field.default is not None:
                declared.default_value = field.default
            if field.type == "map":
                entry = f"{field.name.title()}Entry"
                nested = message.nested_type.add(name=entry)
                nested.options.map_entry = True
                for number, part in ((1, "key"), (2, "value")):
                    nested.field.add(
                        name=part,
                        number=number,
                        type=FieldDescriptorProto.TYPE_STRING,
                        label=FieldDescriptorProto.LABEL_OPTIONAL,
                    )
                declared.type_name = f".{_PACKAGE}.{name}.{entry}"
            elif field.type in _MESSAGES:
                declared.type_name = f".{_PACKAGE}.{field.type}"
            else:
                declared.type = FieldDescriptorProto.Type.Value(f"TYPE_{field.type.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}"))
        for name in _MESSAGES
    }


MESSAGES = _message_classes()


def parse(name: str, data: bytes) -> Any:
    """The message of this name in `MESSAGES`. Raises ValueError."""
    try:
        return MESSAGES[name].FromString(data)
    except DecodeError as error:
        raise ValueError(f"is not a protobuf message {name}: {error}") from None


# --- records ------------------------------------------------------------------------------------


class _PortShape(NamedTuple):
    name: str
    protocol: str
    port: int | None


def _metadata(message: Any) -> Metadata:
    metadata = message.metadata
    return Metadata(
        metadata.name,
        metadata.namespace,
        _time(metadata.creation_timestamp),
        bool(metadata.deletion_timestamp),
        metadata.labels,
        metadata.annotations,
    )


@lru_cache(maxsize=1024)
def _time(data: bytes) -> str:
    """The API's Time, which is protobuf's Timestamp, in RFC 3339; empty where it is absent."""
    try:
        return Timestamp.FromString(data).ToJsonString() if data else ""
    except DecodeError as error:
        raise ValueError(f"not a time: {error}") from None


@lru_cache(maxsize=1024)
def _port(data: bytes) -> _PortShape:
    message = parse("EndpointPort", data)
    port = message.port if message.HasField("port") else None
    return _PortShape(message.name, message.protocol, port)


def _fields(messages: Sequence[Any]) -> EndpointFields:
    messages = list(messages)  # each access to a message of a list makes an object
    return EndpointFields(
        [message.addresses[0] if message.addresses else None for message in messages],
        [_place(m.conditions, m.node_name, m.zone, m.hints) for m in messages],
        [message.target_ref.name for message in messages],
    )


@lru_cache(maxsize=16384)
def _place(conditions: bytes, node: str, zone: str, hints: bytes) -> Place:
    state, hinted = parse("EndpointConditions", conditions), parse("EndpointHints", hints)
    bits = checks.condition_bits(state.ready, state.serving, state.terminating)
    return checks.place(bits, node, zone, _names(hinted.for_nodes), _names(hinted.for_zones))


def _names(hints: Any) -> tuple[str, ...]:
    return tuple(sys.intern(hint.name) for hint in hints)


def _service(message: Any) -> Object:
    return checks.service(message, _metadata(message))


def _endpoint_slice(message: Any) -> Object:
    ports = [_port(data) for data in message.ports]
    return checks.endpoint_slice(message, _metadata(message), ports, _fields)


def _node(message: Any) -> Object:
    return checks.node(message, _metadata(message))


def _service_cidr(message: Any) -> Object:
    return checks.service_cidr(message, _metadata(message))


_PARSERS: dict[str, Callable[[Any], Object]] = {
    "Service": _service,
    "EndpointSlice": _endpoint_slice,
    "Node": _node,
    "ServiceCIDR": _service_cidr,
}


def decode(kind: str, data: bytes) -> tuple[Object, str]:
    """One object of a known kind from a message without an envelope, and its resource version.
    Raises InvalidObject."""
    try:
        message = parse(kind, data)
        return _PARSERS[kind](message), message.metadata.resource_version
    except ValueError as error:
        raise InvalidObject(_subject(kind, data), str(error)) from None


def _subject(kind: str, data: bytes) -> str:
    try:
        metadata = parse("AnyObject", data).metadata
        namespace, name = metadata.namespace, metadata.name
    except ValueError:
        name = ""
    return f"{kind} {namespace or 'default'}/{name}" if name else f"{kind} without a name"
