"""Conntrack over netlink: reads UDP flows, deletes those that are stale.

A generic parser takes 115 us for an entry (pyroute2's), 11.6 s for 100,000, and would hold the
interpreter for that long. Reading fixed offsets takes 1.2 us, about a third of what the kernel
needs to dump one. An entry that does not look as expected is parsed attribute by attribute.

For a dump the kernel walks its whole hash table, of all network namespaces together, and needs
some 2 us for each entry that it sends. So the request filters for flows that may be stale
(CTA_FILTER, Linux 5.8; older kernels ignore it and send everything, so every flow is judged here in
any case). Measured with 100,000 UDP flows and 262,144 buckets:

| | |
|---|---|
| flows to one address and port, 500 of them | 35 ms |
| all UDP flows, decoded and judged | 400 ms |
| anything, in an empty table | 12 ms |

Up to FEW destinations are therefore queried individually, more with one dump of everything. In
IPv6 the filter has only the port: the kernel's comparison of IPv6 addresses is inverted and
sends all flows *but* those (`ctnetlink_filter_match_tuple`, 5.8 to at least 6.18, *checked*).

An entry is deleted by its *reply* tuple, zone and id. The reply tuple names the target, so if the
entry has gone since the dump and the client was sent to another endpoint, that flow stays; the id
alone does not say so (it is a hash of the original tuple and of where the entry lies in memory,
which is used again at once). A deletion without a tuple would flush the whole family, so none is
ever made. A packet that was sent to the old endpoint before the transaction, and
that conntrack confirms only after the dump, escapes; it would have to spend as long inside the
kernel as the dump takes to begin.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from itertools import islice

from agent.kernel.errors import ConntrackError, raised_as
from agent.kernel.socket import Closing, Interrupted, NetlinkSocket
from rules.netlink.attributes import (
    NLA_F_NESTED,
    Fields,
    Malformed,
    attribute,
    fields,
    integer,
    nest,
)
from rules.netlink.messages import (
    NFGENMSG,
    NLM_F_ACK,
    NLM_F_DUMP,
    NLM_F_REQUEST,
    NLMSG_HEADER,
    message,
)
from rules.netlink.nftables import NFPROTO
from rules.objects import UDP
from rules.program import Claim
from rules.stale_flows import Flow, FlowFilter, flow_filter
from rules.tables import FAMILIES
from rules.target import target_of

FEW = 4
"""Up to this many destinations are queried individually."""

_DELETES_A_MESSAGE = 256  # 30 KB, and as many answers fit into the receive buffer
_START = NLMSG_HEADER.size + NFGENMSG.size  # of a message's attributes

# include/uapi/linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h
NFNL_SUBSYS_CTNETLINK = 1
IPCTNL_MSG_CT_NEW, IPCTNL_MSG_CT_GET, IPCTNL_MSG_CT_DELETE = 0, 1, 2
CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, CTA_STATUS, CTA_ID, CTA_ZONE = 1, 2, 3, 12, 18
CTA_TUPLE_IP, CTA_TUPLE_PROTO = 1, 2
CTA_IP_V4_SRC, CTA_IP_V4_DST, CTA_IP_V6_SRC, CTA_IP_V6_DST = 1, 2, 3, 4
CTA_PROTO_NUM, CTA_PROTO_SRC_PORT, CTA_PROTO_DST_PORT = 1, 2, 3
CTA_FILTER, CTA_FILTER_ORIG_FLAGS = 25, 1

# net/netfilter/nf_conntrack_netlink.c, also for users: which fields of the tuple count
CTA_FILTER_F_CTA_IP_DST, CTA_FILTER_F_CTA_PROTO_NUM = 1 << 1, 1 << 3
CTA_FILTER_F_CTA_PROTO_DST_PORT = 1 << 5

_GET = NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET
_DELETE = NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_DELETE
_UDP = bytes([UDP])

_GONE = (errno.ENOENT, errno.EBUSY)
"""Not to be deleted: gone already; or in a flow table (offloaded), which the kernel refuses."""

_UNFILTERED = (errno.EINVAL, errno.EOPNOTSUPP)


class Conntrack(Closing):
    """A connection to conntrack in this network namespace. Use it as a context manager.

    Its methods raise ConntrackError. It has one socket for dumps and one for deletions, so that
    flows can be deleted while a dump runs and none of them have to be kept.
    """

    def __init__(self) -> None:
        self._reading = _open()
        try:
            self._deleting = _open()
        except ConntrackError:
            self._reading.close()
            raise

    def close(self) -> None:
        """Closes the connection."""
        self._reading.close()
        self._deleting.close()

    def dump_udp(self, family: int, only: FlowFilter | None = None) -> Iterator[Flow]:
        """The UDP flows of a family, 4 or 6; with `only` those sent there, if the kernel can
        distinguish them, else all. Each is handed out as soon as it has been received."""
        try:
            yield from self._dump(dump_request(family, only))
        except ConntrackError as error:
            if error.errno not in _UNFILTERED:
                raise
            yield from self._dump(_everything(family))

    def delete(self, flows: Iterable[Flow]) -> int:
        """Deletes flows, each only if it still leads where it led. Returns how many it deleted;
        those that had ended before are not counted."""
        waiting = iter(flows)
        deleted = 0
        while some := list(islice(waiting, _DELETES_A_MESSAGE)):
            deleted += self._delete(some)
        return deleted

    def forget(
        self, claims: Collection[Claim] | None, is_stale: Callable[[Flow], bool]
    ) -> dict[int, int]:
        """Deletes the flows that are stale; returns how many, by family, if any.

        Looks at the flows to the given claims, with None at all UDP flows. Needs the same memory
        for any number of flows.
        """
        deleted: dict[int, int] = {}
        for family in FAMILIES:
            for only in [None] if claims is None else filters_of(claims, family):
                stale = (flow for flow in self.dump_udp(family, only) if is_stale(flow))
                if count := self.delete(stale):
                    deleted[family] = deleted.get(family, 0) + count
        return deleted

    def _dump(self, content: bytes) -> Iterator[Flow]:
        # a dump is interrupted often: entries appear and end all the time
        with raised_as(ConntrackError, "reading conntrack"), suppress(Interrupted):
            for data, start, end in self._reading.ask(_GET, content, NLM_F_DUMP):
                flow = decode(data, start, end)
                if flow is not None:
                    yield flow

    def _delete(self, flows: list[Flow]) -> int:
        """Errors are answered for single flows; the last message is acknowledged in any case."""
        first = self._deleting.number(len(flows))
        requests = [delete_request(f, first + index) for index, f in enumerate(flows[:-1])]
        requests.append(delete_request(flows[-1], first + len(flows) - 1, NLM_F_ACK))
        with raised_as(ConntrackError, "deleting conntrack entries"):
            failures = self._deleting.transact(b"".join(requests), first, len(flows))
        for failure in failures:
            if failure.errno not in _GONE:
                raise ConntrackError(failure.errno, "deleting a conntrack entry", failure.detail)
        return len(flows) - len(failures)


def _open() -> NetlinkSocket:
    with raised_as(ConntrackError, "conntrack"):
        return NetlinkSocket()


def filters_of(claims: Iterable[Claim], family: int) -> list[FlowFilter | None]:
    """The dumps to ask for to see the flows to these claims: up to FEW filters, or [None] for
    everything; empty if no claim is of the family.

    By port alone in IPv6, since filters by address select the opposite there.
    """
    filters = {flow_filter(claim) for claim in claims if claim.verdicts.family == family}
    if family == 6 or len(filters) > FEW:
        filters = {f._replace(address=b"") for f in filters}
    return [None] if len(filters) > FEW else list(filters)


# --- requests -----------------------------------------------------------------------------------


def dump_request(family: int, only: FlowFilter | None = None) -> bytes:
    """A dump of UDP entries, or of those whose original destination is `only`, but for an IPv6
    address."""
    flags, addresses, ports = CTA_FILTER_F_CTA_PROTO_NUM, b"", attribute(CTA_PROTO_NUM, _UDP)
    if only:
        flags |= CTA_FILTER_F_CTA_PROTO_DST_PORT
        ports += attribute(CTA_PROTO_DST_PORT, only.port.to_bytes(2, "big"))
        if only.address and family == 4:
            flags |= CTA_FILTER_F_CTA_IP_DST
            addresses = nest(CTA_TUPLE_IP, attribute(CTA_IP_V4_DST, only.address))
    original = nest(CTA_TUPLE_ORIG, addresses, nest(CTA_TUPLE_PROTO, ports))
    wanted = attribute(CTA_FILTER_ORIG_FLAGS, struct.pack("=I", flags))
    return _everything(family) + original + nest(CTA_FILTER, wanted)


def _everything(family: int) -> bytes:
    """A dump of all entries of a family."""
    return NFGENMSG.pack(NFPROTO[family], 0, 0)


def delete_request(flow: Flow, sequence: int, flags: int = 0) -> bytes:
    """The deletion of one entry: the kernel's own attributes are sent back to it."""
    known = fields(flow.entry)
    if CTA_TUPLE_REPLY not in known:
        raise ValueError(f"{flow} was not read from conntrack")  # the kernel would delete them all
    body = NFGENMSG.pack(NFPROTO[4 if len(flow.destination) == 8 else 6], 0, 0)
    body += nest(CTA_TUPLE_REPLY, known[CTA_TUPLE_REPLY])
    body += b"".join(attribute(kind, known[kind]) for kind in (CTA_ID, CTA_ZONE) if kind in known)
    return message(_DELETE, NLM_F_REQUEST | flags, sequence, body)


# --- answers ------------------------------------------------------------------------------------


class _Layout:
    """Where the fields of a UDP entry are, if it looks as usual: two tuples and then the status.

    A tuple begins with nest, nest and the source address' header, 12 bytes that fix its lengths;
    12 more before the ports fix the protocol. Ports are padded like those of a Target.
    """

    def __init__(self, length: int) -> None:
        source = CTA_IP_V4_SRC if length == 4 else CTA_IP_V6_SRC
        addresses = 2 * (4 + length)
        ports = struct.pack("=HHHHB3x", 28, CTA_TUPLE_PROTO | NLA_F_NESTED, 5, CTA_PROTO_NUM, UDP)
        size = 8 + addresses + 28
        first = CTA_TUPLE_IP | NLA_F_NESTED
        self._heads = tuple(
            struct.pack("=HHHHHH", size, kind, 4 + addresses, first, 4 + length, source)
            for kind in (CTA_TUPLE_ORIG | NLA_F_NESTED, CTA_TUPLE_REPLY | NLA_F_NESTED)
        )
        self._ports = ports
        self._status = struct.pack("=HH", 8, CTA_STATUS)
        one = f"12s {length}s 4x {length}s 12s 4x 4s 4x 4s "
        self._struct = struct.Struct("=" + one + one + "4s")
        self._size = self._struct.size

    def read(self, data: bytes, start: int, end: int) -> Flow | None:
        """The flow in the attributes from `start` to `end`; None if they look otherwise."""
        if start + self._size > end:
            return None
        first, source, asked, ports, sport, dport, second, answering, _, again, port, _, status = (
            self._struct.unpack_from(data, start)
        )
        if (
            first != self._heads[0]
            or second != self._heads[1]
            or ports != self._ports
            or again != ports
            or status != self._status
        ):
            return None
        return Flow(source + sport, asked + dport, answering + port, 0, data[start:end])


_LAYOUTS = {NFPROTO[4]: _Layout(4), NFPROTO[6]: _Layout(16)}


def decode(data: bytes, start: int, end: int) -> Flow | None:
    """The flow that an entry, the content of a message, is about; None if it is not UDP.

    Raises Malformed.
    """
    if end - start < NFGENMSG.size:
        raise Malformed("no room for a header")
    layout = _LAYOUTS.get(data[start])
    flow = layout.read(data, start + NFGENMSG.size, end) if layout else None
    return flow or parse(data[start + NFGENMSG.size : end])


def parse(entry: bytes) -> Flow | None:
    """A flow from an entry's attributes, in whatever order; None if it is not UDP.

    Raises Malformed.
    """
    found = fields(entry)
    original, reply = (_tuple(found.get(kind, b"")) for kind in (CTA_TUPLE_ORIG, CTA_TUPLE_REPLY))
    if original is None or reply is None:
        return None
    zone = integer(found.get(CTA_ZONE, b""))
    return Flow(original[0], original[1], reply[0], zone, entry)


def _tuple(data: bytes) -> tuple[bytes, bytes] | None:
    """Source and destination of a UDP tuple."""
    protocol, source, destination = tuple_of(data)
    return (source, destination) if protocol == UDP and source else None


def tuple_of(data: bytes) -> tuple[int, bytes, bytes]:
    """Protocol, source and destination of a tuple; both are empty without addresses.

    Raises Malformed.
    """
    nests = fields(data)
    addresses = fields(nests.get(CTA_TUPLE_IP, b""))
    ports = fields(nests.get(CTA_TUPLE_PROTO, b""))
    protocol = integer(ports.get(CTA_PROTO_NUM, b""))
    for source, destination, length in (
        (CTA_IP_V4_SRC, CTA_IP_V4_DST, 4),
        (CTA_IP_V6_SRC, CTA_IP_V6_DST, 16),
    ):
        if source in addresses and destination in addresses:
            if len(addresses[source]) != length or len(addresses[destination]) != length:
                raise Malformed("an address of another length than its family's")
            return (
                protocol,
                target_of(addresses[source], _port(ports, CTA_PROTO_SRC_PORT)),
                target_of(addresses[destination], _port(ports, CTA_PROTO_DST_PORT)),
            )
    return protocol, b"", b""


def _port(ports: Fields, kind: int) -> int:
    port = ports.get(kind, b"\0\0")
    if len(port) != 2:
        raise Malformed(f"a port of {len(port)} bytes")
    return integer(port)
