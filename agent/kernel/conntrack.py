"""Conntrack over netlink: reads UDP flows, deletes those that are stale.

pyroute2 knows the messages (`nfct_msg`) and writes the requests. The entries that come back are
decoded here: its generic parser takes 115 us for one, 11.6 s for 100,000, and the agent would
stand still for that long. Looking at fixed offsets takes 1.2 us, about a third of what the kernel
needs to tell of one. An entry that does not look as expected is parsed attribute by attribute.

A dump costs the kernel a walk over its whole hash table, of all network namespaces together, and
some 2 us for each entry that it tells. So it is asked to tell only what may be stale (CTA_FILTER,
Linux 5.8; older kernels ignore it and tell everything, which is why every flow is judged here
whatever was asked for). Measured with 100,000 UDP flows and 262,144 buckets:

| | |
|---|---|
| flows to one address and port, 500 of them | 35 ms |
| all UDP flows, decoded and judged | 400 ms |
| anything, in an empty table | 12 ms |

Up to FEW destinations are therefore asked for one by one, more with one dump of everything. In
IPv6 only the port is asked for: the kernel's comparison of IPv6 addresses is the wrong way round
and tells all flows *but* those (`ctnetlink_filter_match_tuple`, 5.8 to at least 6.18, *checked*).

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
import os
import socket
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from types import TracebackType

import structlog
from pyroute2.netlink.nfnetlink import NFNL_SUBSYS_CTNETLINK
from pyroute2.netlink.nfnetlink.nfctsocket import (
    IPCTNL_MSG_CT_DELETE,
    IPCTNL_MSG_CT_GET,
    NFCTAttrTuple,
    nfct_msg,
)

from rules.netlink import (
    FAMILY_NUMBER,
    HEADER,
    NLM_F_ACK,
    NLM_F_DUMP,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    attribute,
    attributes,
    nest,
)
from rules.objects import UDP
from rules.program import Claim
from rules.stale_flows import Aim, Flow, Serving, aim
from rules.tables import FAMILIES
from rules.target import target_of

FEW = 4
"""So many destinations are asked for one by one."""

_NETLINK_NETFILTER = 12
_SO_RCVBUFFORCE = 33
_SOL_NETLINK, _NETLINK_CAP_ACK = 270, 10
_RECEIVE = 1 << 20
_GET = NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET
_DELETE = NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_DELETE
_DELETES_A_MESSAGE = 256  # 30 KB, and as many answers fit into the receive buffer
_NFGEN = 4  # struct nfgenmsg
_START = HEADER.size + _NFGEN  # of a message's attributes

_TUPLE_ORIG, _TUPLE_REPLY, _STATUS, _ID, _ZONE = 1, 2, 3, 12, 18
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_PROTO_NUMBER, _PROTO_SOURCE, _PROTO_DESTINATION = 1, 2, 3

_GONE = (errno.ENOENT, errno.EBUSY)
"""Not to be deleted: gone already; or in a flow table (offloaded), which the kernel refuses."""

_UNFILTERED = (errno.EINVAL, errno.EOPNOTSUPP)

Log = structlog.typing.FilteringBoundLogger


class ConntrackError(Exception):
    """Conntrack cannot be read or changed. The text tells the operator why and what to do."""

    def __init__(self, code: int, subject: str) -> None:
        words = f"{subject}: {os.strerror(code)} ({errno.errorcode.get(code, code)})"
        super().__init__(f"{words}. {_ADVICE.get(code, '')}".rstrip())
        self.errno = code


_MODULE = "Load the kernel module nf_conntrack_netlink."
_ADVICE = {
    errno.EPERM: "Run it as root or with CAP_NET_ADMIN.",
    errno.EINVAL: _MODULE,  # what nfnetlink answers for a subsystem that nobody has registered
    errno.EOPNOTSUPP: _MODULE,
    errno.EPROTONOSUPPORT: "The kernel needs nfnetlink and nf_conntrack_netlink.",
}


class Conntrack:
    """A connection to conntrack in this network namespace. Use it as a context manager.

    Its methods raise ConntrackError.
    """

    def __init__(self) -> None:
        try:
            self._socket = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER
            )
        except OSError as error:
            raise ConntrackError(error.errno or errno.EIO, "conntrack") from None
        self._socket.bind((0, 0))
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE * 4)
        except PermissionError:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE * 4)
        self._sequence = 0

    def __enter__(self) -> Conntrack:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection."""
        self._socket.close()

    def dump_udp(self, family: int, aimed: Aim | None = None) -> Iterator[Flow]:
        """The UDP flows of a family, 4 or 6; with `aimed` those sent there, if the kernel can
        tell them apart, else all. Use it up before the next call."""
        try:
            yield from self._dump(dump_request(family, aimed))
        except ConntrackError as error:
            if error.errno not in _UNFILTERED:
                raise
            yield from self._dump(_request(family, nfct_msg()))

    def delete(self, flows: Iterable[Flow]) -> int:
        """Deletes flows, each only if it still leads where it led. Returns how many were there and
        are gone."""
        waiting = list(flows)
        deleted = 0
        while waiting:
            some, waiting = waiting[:_DELETES_A_MESSAGE], waiting[_DELETES_A_MESSAGE:]
            deleted += self._delete(some)
        return deleted

    def forget(
        self, claims: Collection[Claim] | None, is_stale: Callable[[Flow], bool]
    ) -> dict[int, int]:
        """Deletes the flows that are stale; returns how many, by family, if there were any.

        Looks at those to the given claims, with None at all UDP flows. `is_stale` is asked once
        for each destination, target and zone.
        """
        deleted: dict[int, int] = {}
        for family in FAMILIES:
            aims = None if claims is None else _aims(claims, family)
            if aims is None or aims:
                stale = list(self._stale(family, aims, is_stale))
                if stale:
                    deleted[family] = self.delete(stale)
        return deleted

    def _stale(
        self, family: int, aims: Collection[Aim] | None, is_stale: Callable[[Flow], bool]
    ) -> Iterator[Flow]:
        asked = [None] if aims is None or len(aims) > FEW else list(aims)
        judged: dict[tuple[bytes, bytes, int], bool] = {}
        for aimed in asked:
            for flow in self.dump_udp(family, aimed):
                kind = flow[1:4]
                verdict = judged.get(kind)
                if verdict is None:
                    verdict = judged[kind] = is_stale(flow)
                if verdict:
                    yield flow

    def _dump(self, request: bytes) -> Iterator[Flow]:
        self._sequence += 1
        self._socket.send(_numbered(request, self._sequence))
        while True:
            data = self._receive()
            for kind, sequence, start, end in _messages(data):
                if sequence != self._sequence:
                    continue
                if kind in (NLMSG_DONE, NLMSG_ERROR):
                    if code := _code(data, start):
                        raise ConntrackError(code, "reading conntrack")
                    return
                flow = decode(data, start, end)
                if flow is not None:
                    yield flow

    def _delete(self, flows: list[Flow]) -> int:
        """Errors come for single flows; the last message is acknowledged in any case."""
        first = self._sequence + 1
        self._sequence += len(flows)
        messages = [delete_request(f, first + index) for index, f in enumerate(flows[:-1])]
        messages.append(delete_request(flows[-1], self._sequence, NLM_F_ACK))
        self._socket.send(b"".join(messages))
        deleted, answered = len(flows), False
        while not answered:
            data = self._receive()
            for kind, sequence, start, _ in _messages(data):
                if kind != NLMSG_ERROR or not first <= sequence <= self._sequence:
                    continue
                code = _code(data, start)
                if code and code not in _GONE:
                    raise ConntrackError(code, "deleting a conntrack entry")
                deleted -= bool(code)
                answered = answered or sequence == self._sequence
        return deleted

    def _receive(self) -> bytes:
        try:
            return self._socket.recv(_RECEIVE)
        except OSError as error:
            raise ConntrackError(error.errno or errno.EIO, "the answer of conntrack") from None


class Flows:
    """The UDP flows of the node, for the loop: what goes wrong is said once and not raised.

    Opened at the first use. The agent goes on without conntrack, since everything else works.
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        self._conntrack: Conntrack | None = None
        self._failing = False

    def forget(
        self,
        formerly: Mapping[Claim, Serving],
        is_stale: Callable[[Flow, Mapping[Claim, Serving]], bool],
        *,
        everything: bool = False,
    ) -> dict[int, int]:
        """Deletes stale flows, right behind the transaction: to the claims of `formerly`, or
        with `everything` all that are. Returns how many, by family."""
        if not formerly and not everything:
            return {}
        try:
            if self._conntrack is None:
                self._conntrack = Conntrack()
            claims = None if everything else formerly
            deleted = self._conntrack.forget(claims, lambda flow: is_stale(flow, formerly))
        except ConntrackError as error:
            self.close()  # answers to what was asked may still be under way
            if not self._failing:
                self._log.warning("stale UDP flows stay until they expire", error=str(error))
            self._failing = True
            return {}
        self._failing = False
        for family, count in deleted.items():
            self._log.info("stale UDP flows deleted", family=family, flows=count)
        return deleted

    def close(self) -> None:
        """Closes the connection; the next use opens another."""
        if self._conntrack:
            self._conntrack.close()
            self._conntrack = None


def _aims(claims: Iterable[Claim], family: int) -> set[Aim]:
    """What to ask for; by port alone in IPv6, since filters by address do the opposite there."""
    aims = {aim(claim) for claim in claims if claim.verdicts.family == family}
    return {a._replace(address=b"") for a in aims} if family == 6 else aims


# --- requests -----------------------------------------------------------------------------------


def dump_request(family: int, aimed: Aim | None = None) -> bytes:
    """A dump of UDP entries, or of those whose original destination is `aimed`, but for an IPv6
    address."""
    address = None
    if aimed and aimed.address and family == 4:
        address = socket.inet_ntop(FAMILY_NUMBER[family], aimed.address)
    original = NFCTAttrTuple(
        family=FAMILY_NUMBER[family],
        daddr=address,
        proto=UDP,
        dport=aimed.port if aimed else None,
    )
    original.attrs()  # finds out the flags
    wanted = {"attrs": [["CTA_FILTER_ORIG_FLAGS", original.flags]]}
    return _request(family, nfct_msg.create_from(tuple_orig=original, cta_filter=wanted))


def _request(family: int, message: nfct_msg) -> bytes:
    message["nfgen_family"] = FAMILY_NUMBER[family]
    message["header"]["type"] = _GET
    message["header"]["flags"] = NLM_F_REQUEST | NLM_F_DUMP
    message.encode()
    return bytes(message.data)


def _numbered(request: bytes, sequence: int) -> bytes:
    length, kind, flags, _, port = HEADER.unpack_from(request)
    return HEADER.pack(length, kind, flags, sequence, port) + request[HEADER.size :]


def delete_request(flow: Flow, sequence: int, flags: int = 0) -> bytes:
    """The deletion of one entry: the kernel's own attributes are sent back to it."""
    fields = dict(attributes(flow.entry))
    if _TUPLE_REPLY not in fields:
        raise ValueError(f"{flow} was not read from conntrack")  # the kernel would delete them all
    body = nest(_TUPLE_REPLY, fields[_TUPLE_REPLY])
    body += b"".join(attribute(kind, fields[kind]) for kind in (_ID, _ZONE) if kind in fields)
    family = FAMILY_NUMBER[4 if len(flow.destination) == 8 else 6]
    length = _START + len(body)
    head = HEADER.pack(length, _DELETE, NLM_F_REQUEST | flags, sequence, 0)
    return head + struct.pack("=BBH", family, 0, 0) + body


# --- answers ------------------------------------------------------------------------------------


class _Shape:
    """Where the fields of a UDP entry are, if it looks as usual: two tuples and then the status.

    A tuple begins with nest, nest and the source address' header, 12 bytes that fix its lengths;
    12 more before the ports fix the protocol. Ports are padded like those of a Target.
    """

    def __init__(self, length: int) -> None:
        source = 1 if length == 4 else 3  # CTA_IP_V4_SRC, CTA_IP_V6_SRC
        addresses = 2 * (4 + length)
        ports = struct.pack("=HHHHB3x", 28, _TUPLE_PROTO | 0x8000, 5, _PROTO_NUMBER, UDP)
        size = 8 + addresses + 28
        self._heads = tuple(
            struct.pack("=HHHHHH", size, kind, 4 + addresses, 0x8001, 4 + length, source)
            for kind in (_TUPLE_ORIG | 0x8000, _TUPLE_REPLY | 0x8000)
        )
        self._ports = ports
        self._status = struct.pack("=HH", 8, _STATUS)
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


_SHAPES = {FAMILY_NUMBER[4]: _Shape(4), FAMILY_NUMBER[6]: _Shape(16)}


def decode(data: bytes, start: int, end: int) -> Flow | None:
    """The flow that an entry, the content of a message, is about; None if it is not UDP."""
    shape = _SHAPES.get(data[start])
    flow = shape.read(data, start + _NFGEN, end) if shape else None
    return flow or parse(data[start + _NFGEN : end])


def parse(entry: bytes) -> Flow | None:
    """A flow from an entry's attributes, in whatever order; None if it is not UDP."""
    fields = dict(attributes(entry))
    original, reply = (_tuple(fields.get(kind, b"")) for kind in (_TUPLE_ORIG, _TUPLE_REPLY))
    if original is None or reply is None:
        return None
    zone = int.from_bytes(fields.get(_ZONE, b""), "big")
    return Flow(original[0], original[1], reply[0], zone, entry)


def _tuple(data: bytes) -> tuple[bytes, bytes] | None:
    """Source and destination of a UDP tuple."""
    nests = dict(attributes(data))
    addresses = dict(attributes(nests.get(_TUPLE_IP, b"")))
    ports = dict(attributes(nests.get(_TUPLE_PROTO, b"")))
    if ports.get(_PROTO_NUMBER) != bytes([UDP]):
        return None
    for source, destination in ((1, 2), (3, 4)):  # CTA_IP_V4_*, CTA_IP_V6_*
        if source in addresses and destination in addresses:
            return (
                target_of(addresses[source], _port(ports.get(_PROTO_SOURCE))),
                target_of(addresses[destination], _port(ports.get(_PROTO_DESTINATION))),
            )
    return None


def _port(content: bytes | None) -> int:
    """A port attribute's number; 0 without the attribute."""
    return int.from_bytes(content or b"", "big")


def _messages(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Type and sequence number of each message, and where its content begins and ends."""
    position = 0
    while position + HEADER.size <= len(data):
        length, kind, _, sequence, _ = HEADER.unpack_from(data, position)
        if length < HEADER.size:
            return
        yield kind, sequence, position + HEADER.size, position + length
        position += (length + 3) & ~3


def _code(data: bytes, start: int) -> int:
    """errno of an error message or of a dump's end, 0 if it went well."""
    return -int(struct.unpack_from("=i", data, start)[0])
