"""An encoder of the API's protobuf, for the test server: from documents, as JSON has them.

Written by hand and apart from the decoder under test: the wire format, and field numbers as in the
files generated.proto of Kubernetes. It also writes fields that the agent does not read. As the real
server does, it writes strings that are not pointers even if they are empty (test_apiserver.py
compares its lists with recordings).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import msgspec

Encoder = Callable[[Any], bytes]
Fields = dict[str, tuple[int, Encoder]]

MAGIC = b"k8s\0"
_DAMAGED = b"\xff"
"""Neither a message nor text."""


def varint(number: int) -> bytes:
    number &= 2**64 - 1
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def field(number: int, value: bytes) -> bytes:
    """A length-delimited field."""
    return varint(number << 3 | 2) + varint(len(value)) + value


def _bytes(text: str) -> bytes:
    """UTF-8, with lone surrogates as the bytes that they stand for."""
    return text.encode(errors="surrogateescape")


def _text(number: int) -> tuple[int, Encoder]:
    return number, lambda value: field(number, _bytes(value))


def _texts(number: int) -> tuple[int, Encoder]:
    def encode(values: Any) -> bytes:
        if not isinstance(values, list):
            return field(number, _DAMAGED)
        return b"".join(field(number, _bytes(v)) for v in values)

    return number, encode


def _int(number: int) -> tuple[int, Encoder]:
    return number, lambda value: varint(number << 3) + varint(int(value))


def _map(number: int) -> tuple[int, Encoder]:
    def encode(values: Mapping[str, str]) -> bytes:
        pairs = sorted(values.items())
        return b"".join(field(number, field(1, _bytes(k)) + field(2, _bytes(v))) for k, v in pairs)

    return number, encode


def _one(number: int, fields: Fields) -> tuple[int, Encoder]:
    return number, lambda value: field(number, message(value, fields))


def _many(number: int, fields: Fields) -> tuple[int, Encoder]:
    return number, lambda values: b"".join(field(number, message(v, fields)) for v in values)


def _time(number: int) -> tuple[int, Encoder]:
    def encode(value: str) -> bytes:
        seconds = int(datetime.fromisoformat(value.replace("Z", "+00:00")).timestamp())
        return field(number, varint(1 << 3) + varint(seconds) + varint(2 << 3) + varint(0))

    return number, encode


def message(document: Any, fields: Fields) -> bytes:
    """The fields of a document that have a number, ordered by it.

    In place of what is not a document: bytes that are no message.
    """
    if not isinstance(document, Mapping):
        return _DAMAGED
    parts = []
    for name, (number, encode) in fields.items():
        value = document.get(name)
        if value is not None:
            parts.append((number, encode(value)))
    return b"".join(part for _, part in sorted(parts))


def _int_or_string(value: int | str) -> bytes:
    parts = (0, value, "") if isinstance(value, int) else (1, 0, value)
    return field(4, message(dict(zip(("type", "int", "text"), parts, strict=True)), _ALTERNATIVES))


_ALTERNATIVES: Fields = {"type": _int(1), "int": _int(2), "text": _text(3)}
_INT_OR_STRING: tuple[int, Encoder] = (4, _int_or_string)
_FIELDS_V1: tuple[int, Encoder] = (7, lambda v: field(7, field(1, msgspec.json.encode(v))))

METADATA: Fields = {
    "name": _text(1),
    "generateName": _text(2),
    "namespace": _text(3),
    "selfLink": _text(4),
    "uid": _text(5),
    "resourceVersion": _text(6),
    "generation": _int(7),
    "creationTimestamp": _time(8),
    "deletionTimestamp": _time(9),
    "labels": _map(11),
    "annotations": _map(12),
    "ownerReferences": _many(
        13,
        {
            "kind": _text(1),
            "name": _text(3),
            "uid": _text(4),
            "apiVersion": _text(5),
            "controller": _int(6),
            "blockOwnerDeletion": _int(7),
        },
    ),
    "managedFields": _many(
        17,
        {
            "manager": _text(1),
            "operation": _text(2),
            "apiVersion": _text(3),
            "time": _time(4),
            "fieldsType": _text(6),
            "fieldsV1": _FIELDS_V1,
            "subresource": _text(8),
        },
    ),
}
SERVICE: Fields = {
    "metadata": _one(1, METADATA),
    "spec": _one(
        2,
        {
            "ports": _many(
                1,
                {
                    "name": _text(1),
                    "protocol": _text(2),
                    "port": _int(3),
                    "targetPort": _INT_OR_STRING,
                    "nodePort": _int(5),
                    "appProtocol": _text(6),
                },
            ),
            "selector": _map(2),
            "clusterIP": _text(3),
            "type": _text(4),
            "externalIPs": _texts(5),
            "sessionAffinity": _text(7),
            "loadBalancerIP": _text(8),
            "loadBalancerSourceRanges": _texts(9),
            "externalName": _text(10),
            "externalTrafficPolicy": _text(11),
            "healthCheckNodePort": _int(12),
            "publishNotReadyAddresses": _int(13),
            "sessionAffinityConfig": _one(14, {"clientIP": _one(1, {"timeoutSeconds": _int(1)})}),
            "ipFamilyPolicy": _text(17),
            "clusterIPs": _texts(18),
            "ipFamilies": _texts(19),
            "internalTrafficPolicy": _text(22),
            "trafficDistribution": _text(23),
        },
    ),
    "status": _one(
        3,
        {
            "loadBalancer": _one(
                1, {"ingress": _many(1, {"ip": _text(1), "hostname": _text(2), "ipMode": _text(3)})}
            )
        },
    ),
}
_NAME: Fields = {"name": _text(1)}
SLICE: Fields = {
    "metadata": _one(1, METADATA),
    "endpoints": _many(
        2,
        {
            "addresses": _texts(1),
            "conditions": _one(2, {"ready": _int(1), "serving": _int(2), "terminating": _int(3)}),
            "hostname": _text(3),
            "targetRef": _one(
                4,
                {
                    "kind": _text(1),
                    "namespace": _text(2),
                    "name": _text(3),
                    "uid": _text(4),
                    "apiVersion": _text(5),
                    "resourceVersion": _text(6),
                    "fieldPath": _text(7),
                },
            ),
            "nodeName": _text(6),
            "zone": _text(7),
            "hints": _one(8, {"forZones": _many(1, _NAME), "forNodes": _many(2, _NAME)}),
        },
    ),
    "ports": _many(
        3, {"name": _text(1), "protocol": _text(2), "port": _int(3), "appProtocol": _text(4)}
    ),
    "addressType": _text(4),
}
NODE: Fields = {
    "metadata": _one(1, METADATA),
    "spec": _one(
        2,
        {
            "podCIDR": _text(1),
            "providerID": _text(3),
            "taints": _many(5, {"key": _text(1), "value": _text(2), "effect": _text(3)}),
            "podCIDRs": _texts(7),
        },
    ),
    "status": _one(3, {"addresses": _many(5, {"type": _text(1), "address": _text(2)})}),
}
SERVICE_CIDR: Fields = {"metadata": _one(1, METADATA), "spec": _one(2, {"cidrs": _texts(1)})}
KINDS = {
    "Service": SERVICE,
    "EndpointSlice": SLICE,
    "Node": NODE,
    "ServiceCIDR": SERVICE_CIDR,
}
LIST_METADATA: Fields = {
    "selfLink": _text(1),
    "resourceVersion": _text(2),
    "continue": _text(3),
    "remainingItemCount": _int(4),
}
STATUS: Fields = {
    "metadata": _one(1, LIST_METADATA),
    "status": _text(2),
    "message": _text(3),
    "reason": _text(4),
    "code": _int(6),
}

_METADATA_DEFAULTS = {"name": "", "generateName": "", "namespace": "", "selfLink": "", "uid": ""}
_LIST_DEFAULTS = {"selfLink": "", "resourceVersion": "", "continue": ""}


def enveloped(api_version: str, kind: str, raw: bytes) -> bytes:
    """The magic and an Unknown."""
    type_meta = field(1, api_version.encode()) + field(2, kind.encode())
    return MAGIC + field(1, type_meta) + field(2, raw) + field(3, b"") + field(4, b"")


def item(kind: str, document: Mapping[str, Any]) -> bytes:
    """An object without an envelope."""
    metadata = {**_METADATA_DEFAULTS, **(document.get("metadata") or {})}
    return message({**document, "metadata": metadata}, KINDS[kind])


def whole_list(kind: str, document: Mapping[str, Any]) -> bytes:
    """A list, as the body of an answer."""
    metadata = {**_LIST_DEFAULTS, **document["metadata"]}
    items = b"".join(field(2, item(kind, i)) for i in document["items"] or ())
    raw = field(1, message(metadata, LIST_METADATA)) + items
    return enveloped(document["apiVersion"], document["kind"], raw)


def status(document: Mapping[str, Any]) -> bytes:
    """An error, as the body of an answer."""
    metadata = {**_LIST_DEFAULTS, **document["metadata"]}
    return enveloped("v1", "Status", message({**document, "metadata": metadata}, STATUS))


def watch_event(event: str, document: Mapping[str, Any]) -> bytes:
    """A frame of a watch; the document has its kind and API version."""
    if document["kind"] == "Status":
        wrapped = status(document)
    else:
        raw = item(document["kind"], document)
        wrapped = enveloped(document["apiVersion"], document["kind"], raw)
    data = field(1, event.encode()) + field(2, field(1, wrapped))
    return struct.pack(">I", len(data)) + data
