"""An API server for tests: lists and watches of an in-memory store over real HTTP, and its faults.

It answers in the shapes of a kube-apiserver 1.36 (test_apiserver.py compares them with recordings)
as far as a proxy asks: lists with `limit` and `continue` as of one resource version, watches with
bookmarks, streaming lists (`streaming=False` makes it a server of 1.30), label and field
selectors, compaction, in JSON or protobuf as the Accept header asks, large lists in gzip inside
chunks. Like the real one it is silent to a watch from a version it has not reached.

The server runs in a thread with an event loop of its own; every method may be called from any
other thread and has taken effect when it returns. `put` and the faults are the tests' hands:

    with ApiServer() as server:
        server.put(service_document("web"))
        server.answer(500, times=3, resource="services")
        server.cut_next("services")
"""

from __future__ import annotations

import asyncio
import base64
import copy
import gzip
import json
import re
import socket
import ssl
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
from aiohttp import web

from tests.cluster import protobuf

Document = dict[str, Any]
Key = tuple[str, str]

INITIAL_EVENTS_END = "k8s.io/initial-events-end"
USER = "system:serviceaccount:kube-system:sliceproxy"
PATIENCE = 10.0
CHUNK_BYTES = 2048
GZIP_BYTES = 128 * 1024


class Kind(NamedTuple):
    name: str
    group: str
    plural: str
    namespaced: bool
    empty: Document
    """What a bookmark's object has besides its metadata."""

    @property
    def api_version(self) -> str:
        return f"{self.group}/v1" if self.group else "v1"

    @property
    def path(self) -> str:
        return f"/apis/{self.group}/v1/{self.plural}" if self.group else f"/api/v1/{self.plural}"

    @property
    def full_name(self) -> str:
        return f"{self.plural}.{self.group}" if self.group else self.plural


KINDS = {
    kind.name: kind
    for kind in (
        Kind("Service", "", "services", True, {"spec": {}, "status": {"loadBalancer": {}}}),
        Kind(
            "EndpointSlice",
            "discovery.k8s.io",
            "endpointslices",
            True,
            {"addressType": "", "endpoints": None, "ports": None},
        ),
        Kind("Node", "", "nodes", False, {"spec": {}, "status": {}}),
        Kind("ServiceCIDR", "networking.k8s.io", "servicecidrs", False, {"spec": {}, "status": {}}),
    )
}


EVENT = Kind("Event", "events.k8s.io", "events", True, {})
"""Can be created, not read."""


class Seen(NamedTuple):
    """A request that came in, as RBAC would see it."""

    verb: str
    group: str
    resource: str
    query: dict[str, str]
    authorization: str
    accept: str


class Entry(NamedTuple):
    """A write: `new` is None for a deletion."""

    version: int
    key: Key
    new: Document | None
    old: Document | None


class Backup(NamedTuple):
    version: int
    entries: dict[str, list[Entry]]


@dataclass(eq=False)
class _Fault:
    """How to answer instead, some times."""

    times: float
    resource: str | None
    verb: str | None
    code: int = 0
    retry_after: int | None = None
    abort: bool = False

    def takes(self, verb: str, resource: str) -> bool:
        if self.times <= 0 or self.resource not in (None, resource):
            return False
        if self.verb not in (None, verb):
            return False
        self.times -= 1
        return True


class Encoding(NamedTuple):
    """How lists, the events of a watch and errors are written."""

    type: str
    watch_type: str
    list: Callable[[str, Document], bytes]
    event: Callable[[str, Document], bytes]
    status: Callable[[Document], bytes]


JSON = Encoding(
    "application/json",
    "application/json",
    lambda _kind, document: msgspec.json.encode(document),
    lambda event, document: msgspec.json.encode({"type": event, "object": document}) + b"\n",
    msgspec.json.encode,
)
PROTOBUF_TYPE = "application/vnd.kubernetes.protobuf"
PROTOBUF = Encoding(
    PROTOBUF_TYPE,
    f"{PROTOBUF_TYPE};stream=watch",
    protobuf.whole_list,
    protobuf.watch_event,
    protobuf.status,
)


class _Refused(Exception):
    def __init__(self, response: web.Response) -> None:
        super().__init__(response.status)
        self.response = response


@dataclass(eq=False)
class _Watch:
    kind: Kind
    request: web.Request
    encoding: Encoding
    version: int
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    ending: bool = False
    cut: bool = False
    mute: bool = False

    def event(self, event: str, item: Document) -> bytes:
        kind = {"kind": self.kind.name, "apiVersion": self.kind.api_version}
        return self.encoding.event(event, {**kind, **item})

    def bookmark(self, version: int, annotations: Mapping[str, str] | None = None) -> bytes:
        metadata: Document = {"resourceVersion": str(version)}
        if annotations:
            metadata["annotations"] = dict(annotations)
        return self.event("BOOKMARK", {"metadata": metadata, **self.kind.empty})


class ApiServer:
    """See the module. Use as a context manager."""

    def __init__(
        self,
        *,
        streaming: bool = True,
        bookmark_seconds: float = 0.1,
        token: str = "",
        sock: socket.socket | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.streaming = streaming
        self.token = token
        self.protobuf: bool | int = True
        """Whether it answers in protobuf; False for JSON, or the status to refuse it with."""
        self.gone_as_status = False
        """Say 410 with the HTTP status instead of an ERROR event."""
        self.absent: set[str] = set()
        """Resources (plural) that this server does not have."""
        self.forbidden: set[tuple[str, str]] = set()
        """(verb, resource) pairs that RBAC does not allow."""
        self.events: dict[Key, Document] = {}
        """The Events that were created, by namespace and name."""
        self.terminating: set[str] = set()
        """Namespaces that are being deleted: nothing can be created in them."""
        self.seen: list[Seen] = []
        self.version = 0
        self._bookmark_seconds = bookmark_seconds
        self._entries: dict[str, list[Entry]] = {name: [] for name in KINDS}
        self._now: dict[str, dict[Key, Document]] = {name: {} for name in KINDS}
        self._compacted = 0
        self._faults: list[_Fault] = []
        self._spoiled: dict[str, str] = {}
        self._watches: set[_Watch] = set()
        self._open: dict[int, web.Request] = {}
        self._silent = False
        self._lock = threading.RLock()
        self._news = threading.Condition(self._lock)
        self._sock = sock
        self._tls = tls
        self._port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> ApiServer:
        self._thread.start()
        self._do(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self.down()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def url(self) -> str:
        return f"http{'s' if self._tls else ''}://127.0.0.1:{self._port}"

    # the store

    def put(self, *documents: Document) -> int:
        """Creates or replaces objects; returns the last one's resource version."""
        with self._lock:
            for document in documents:
                self._write(document)
            self._wake()
            return self.version

    def _write(self, document: Document) -> None:
        kind, new = KINDS[document["kind"]], copy.deepcopy(document)
        self.version += 1
        new.pop("kind")
        new.pop("apiVersion", None)
        metadata = new["metadata"]
        if kind.namespaced:
            metadata.setdefault("namespace", "default")
        metadata["resourceVersion"] = str(self.version)
        key = _key(new)
        old = self._now[kind.name].get(key)
        self._entries[kind.name].append(Entry(self.version, key, new, old))
        self._now[kind.name][key] = new

    def delete(self, kind: str, name: str, namespace: str = "default") -> int:
        """Deletes an object; returns the resource version of that."""
        with self._lock:
            key = (namespace if KINDS[kind].namespaced else "", name)
            old = self._now[kind].pop(key)
            self.version += 1
            self._entries[kind].append(Entry(self.version, key, None, old))
            self._wake()
            return self.version

    def load(self, document: Document) -> None:
        """Takes in a list as an API server gave it, with its resource versions."""
        kind = KINDS[document["kind"].removesuffix("List")]
        with self._lock:
            items = sorted(document["items"], key=lambda i: int(i["metadata"]["resourceVersion"]))
            self._entries[kind.name] = [
                Entry(int(i["metadata"]["resourceVersion"]), _key(i), i, None) for i in items
            ]
            self._now[kind.name] = self._replayed(kind, sys.maxsize)
            self.version = max(self.version, int(document["metadata"]["resourceVersion"]))
            self._wake()

    def objects(self, kind: str) -> dict[Key, Document]:
        """The current objects, by namespace and name."""
        with self._lock:
            return dict(self._now[kind])

    def _state(self, kind: Kind, version: int) -> dict[Key, Document]:
        now = version == self.version
        state = self._now[kind.name] if now else self._replayed(kind, version)
        return dict(sorted(state.items()))

    def _replayed(self, kind: Kind, version: int) -> dict[Key, Document]:
        state: dict[Key, Document] = {}
        for entry in self._entries[kind.name]:
            if entry.version > version:
                break
            if entry.new is None:
                state.pop(entry.key, None)
            else:
                state[entry.key] = entry.new
        return state

    # faults

    def answer(
        self,
        code: int,
        *,
        times: float = float("inf"),
        resource: str | None = None,
        verb: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        """Answers the next requests with an error."""
        self._fault(_Fault(times, resource, verb, code, retry_after))

    def close_in_list(self, *, times: float = 1, resource: str | None = None) -> None:
        """Closes the connection in the middle of the next lists."""
        self._fault(_Fault(times, resource, "list", abort=True))

    def _fault(self, fault: _Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def heal(self) -> None:
        """Ends the faults that last."""
        with self._lock:
            self._faults.clear()
            self._spoiled.clear()
            self.forbidden.clear()
            self._silent = False
            self._wake()

    def compact(self) -> None:
        """Forgets all versions but the current one: older ones are 410 now."""
        with self._lock:
            self._compacted = self.version

    def cut_next(self, resource: str) -> None:
        """Closes the open watches of a resource in the middle of the next event they send."""
        self._each_watch(resource, "cut")

    def mute(self, resource: str) -> None:
        """The open watches of a resource say nothing any more: a half-open connection."""
        self._each_watch(resource, "mute")

    def end_watches(self, resource: str) -> None:
        """Ends the open watches of a resource as when their time is over."""
        self._each_watch(resource, "ending")

    def _each_watch(self, resource: str, attribute: str) -> None:
        with self._lock:
            for watch in self._watches:
                if watch.kind.plural == resource:
                    setattr(watch, attribute, True)
            self._wake()

    def spoil_watches(self, resource: str, how: str) -> None:
        """Watches of a resource that bring nothing, until `heal`: each "ends" at once, says
        "garbage", or has only a "bookmark"; "" for good ones. Ends those that are open."""
        with self._lock:
            self._spoiled[resource] = how
        self.end_watches(resource)

    def silence(self) -> None:
        """Accepts connections and requests, and answers none, until `heal`."""
        with self._lock:
            self._silent = True

    def abort(self) -> None:
        """Resets all connections."""
        self._do(self._abort())

    def down(self) -> None:
        """Stops listening and resets all connections: the process is gone."""
        self._do(self._stop())

    def up(self) -> None:
        """Listens again, at the same port."""
        self._do(self._listen())

    def backup(self) -> Backup:
        """What `restore` takes."""
        with self._lock:
            return Backup(self.version, {name: list(e) for name, e in self._entries.items()})

    def restore(self, backup: Backup) -> None:
        """Goes back in time, as a cluster does whose etcd is restored; resets all connections."""
        with self._lock:
            self.version = backup.version
            self._entries = {name: list(entries) for name, entries in backup.entries.items()}
            self._now = {name: self._replayed(kind, sys.maxsize) for name, kind in KINDS.items()}
            self._compacted = 0
        self.abort()

    # waiting

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Waits until a condition on this server (its `seen`, its watches) holds."""
        with self._news:
            assert self._news.wait_for(condition, PATIENCE), self.seen[-10:]

    def watching(self, *resources: str) -> bool:
        """Whether there are watches of all of these that have received everything."""
        with self._lock:
            served = {w.kind.plural for w in self._watches if w.version == self.version}
            return set(resources) <= served

    # the server

    def _do(self, action: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(action, self._loop).result(PATIENCE)

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_get("/{path:.*}", self._handle)
        app.router.add_post(
            "/apis/events.k8s.io/v1/namespaces/{namespace}/events", self._create_event
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.0)
        await self._runner.setup()
        await self._listen()

    async def _listen(self) -> None:
        if self._sock is not None:
            site: web.BaseSite = web.SockSite(self._runner, self._sock, ssl_context=self._tls)
        else:
            site = web.TCPSite(
                self._runner, "127.0.0.1", self._port, reuse_address=True, ssl_context=self._tls
            )
        await site.start()
        self._site = site
        self._port = self._runner.addresses[0][1]

    async def _stop(self) -> None:
        if self._site in self._runner.sites:
            await self._site.stop()
        await self._abort()

    async def _abort(self) -> None:
        for request in list(self._open.values()):
            if request.transport:
                request.transport.abort()
        for watch in list(self._watches):
            watch.ending = True
            watch.wake.set()
        while self._open:
            await asyncio.sleep(0)

    async def _create_event(self, request: web.Request) -> web.StreamResponse:
        document, authorization = await request.json(), request.headers.get("Authorization", "")
        namespace, accept = request.match_info["namespace"], request.headers.get("Accept", "")
        key = (namespace, document["metadata"].get("name", ""))
        with self._lock:
            self.seen.append(Seen("create", EVENT.group, EVENT.plural, {}, authorization, accept))
            fault = next((f for f in self._faults if f.takes("create", EVENT.plural)), None)
            if (refusal := self._refusal_of(document, namespace)) is not None:
                answer = refusal
            elif fault:
                answer = _failure(fault.code, fault.retry_after)
            elif key in self.events:
                answer = _status(
                    409,
                    "AlreadyExists",
                    f'{EVENT.full_name} "{key[1]}" already exists',
                    {"name": key[1], "group": EVENT.group, "kind": EVENT.plural},
                )
            else:
                self.version += 1
                document["metadata"].update(
                    uid=f"00000000-0000-0000-0000-{self.version:012}",
                    resourceVersion=str(self.version),
                    creationTimestamp=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                )
                self.events[key] = document
                answer = web.json_response(document, status=201)
            self._news.notify_all()
        return answer

    def _refusal_of(self, event: Document, namespace: str) -> web.Response | None:
        """RBAC, namespaces that are being deleted, and validation
        (pkg/apis/core/validation/events.go), as far as a poster can fail."""
        name = event["metadata"].get("name", "")
        if ("create", EVENT.plural) in self.forbidden:
            return _forbidden("create", EVENT, f'in the namespace "{namespace}"')
        if namespace in self.terminating:
            cause = f"namespace {namespace} is being terminated"
            return _status(
                403,
                "Forbidden",
                f'{EVENT.full_name} "{name}" is forbidden: unable to create new content in '
                f"namespace {namespace} because it is being terminated",
                {
                    **{"name": name, "group": EVENT.group, "kind": EVENT.plural},
                    "causes": [{"reason": "NamespaceTerminating", "message": cause}],
                },
            )
        wrong = [
            field
            for field, limit in (("reportingController", 253), ("reportingInstance", 128),
                                 ("action", 128), ("reason", 128), ("eventTime", 64))
            if not 0 < len(event.get(field, "")) <= limit
        ]  # fmt: skip
        if event.get("type") not in ("Normal", "Warning"):
            wrong.append("type")
        if len(event.get("note", "").encode()) > 1024:
            wrong.append("note")
        if event["regarding"].get("namespace", "default") != namespace:
            wrong.append("regarding.namespace")
        if not re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", name) or len(name) > 253:
            wrong.append("metadata.name")
        if not wrong:
            return None
        return _status(422, "Invalid", f'Event "{name}" is invalid: {", ".join(wrong)}')

    def _wake(self) -> None:
        def wake() -> None:
            for watch in self._watches:
                watch.wake.set()

        self._news.notify_all()
        self._loop.call_soon_threadsafe(wake)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self._open[id(request)] = request
        try:
            return await self._answer(request)
        except (ConnectionError, asyncio.CancelledError):
            return web.Response()
        finally:
            del self._open[id(request)]

    def _speaks_protobuf(self, request: web.Request) -> bool:
        """Whether to answer in protobuf; raises _Refused if that has been made an error."""
        if not request.headers.get("Accept", "").startswith(PROTOBUF_TYPE):
            return False
        if self.protobuf in (True, False):
            return bool(self.protobuf)
        raise _Refused(_status(self.protobuf, "NotAcceptable", "only JSON"))

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        try:
            encoding = PROTOBUF if self._speaks_protobuf(request) else JSON
        except _Refused as refused:
            return refused.response
        response = await self._respond(request, encoding)
        if isinstance(response, web.Response) and isinstance(response.body, bytes):
            document = json.loads(response.body) if response.content_type == JSON.type else None
            if document and document.get("kind") == "Status":
                response.body = encoding.status(document)
                response.content_type = encoding.type
        return response

    async def _respond(self, request: web.Request, encoding: Encoding) -> web.StreamResponse:
        kind = next((k for k in KINDS.values() if k.path == request.path), None)
        if kind is None or kind.plural in self.absent:
            return web.Response(status=404, text="404 page not found\n")
        query = dict(request.query)
        verb = "watch" if query.get("watch") in ("1", "true") else "list"
        with self._lock:
            authorization = request.headers.get("Authorization", "")
            accept = request.headers.get("Accept", "")
            self.seen.append(Seen(verb, kind.group, kind.plural, query, authorization, accept))
            fault = next((f for f in self._faults if f.takes(verb, kind.plural)), None)
            self._news.notify_all()
        while self._silent:
            if request.transport is None or request.transport.is_closing():
                return web.Response()
            await asyncio.sleep(0.01)
        if self.token and authorization != f"Bearer {self.token}":
            return _status(401, "Unauthorized", "Unauthorized")
        if (verb, kind.plural) in self.forbidden:
            return _forbidden(verb, kind)
        if fault and fault.code:
            return _failure(fault.code, fault.retry_after)
        if verb == "watch":
            return await self._watch(request, kind, query, encoding)
        abort = bool(fault and fault.abort)
        return await self._list(request, kind, query, encoding, abort=abort)

    async def _list(
        self,
        request: web.Request,
        kind: Kind,
        query: Mapping[str, str],
        encoding: Encoding,
        *,
        abort: bool,
    ) -> web.StreamResponse:
        with self._lock:
            version, start = self.version, ("", "")
            if token := query.get("continue"):
                version, start = _from_token(token)
                if version < 0:
                    version = self.version
                elif version < self._compacted:
                    return _status(410, "Expired", _CONTINUE_EXPIRED, token=_token(-1, start))
            matches = _selector(query)
            found = [
                (key, item)
                for key, item in self._state(kind, version).items()
                if key >= start and matches(item)
            ]
        limit = int(query.get("limit", "0")) or len(found)
        metadata: Document = {"resourceVersion": str(version)}
        if len(found) > limit:
            # the keys after a key, in etcd's order
            namespace, name = found[limit - 1][0]
            metadata["continue"] = _token(version, (namespace, name + "\0"))
        body = encoding.list(
            kind.name,
            {
                "kind": f"{kind.name}List",
                "apiVersion": kind.api_version,
                "metadata": metadata,
                "items": [item for _, item in found[:limit]],
            },
        )
        if abort:
            response = web.StreamResponse(headers={"Content-Type": encoding.type})
            await response.prepare(request)
            await response.write(body[: len(body) // 2])
            assert request.transport
            request.transport.abort()
            return response
        return await self._send_list(request, body, encoding.type)

    @staticmethod
    async def _send_list(request: web.Request, body: bytes, type_: str) -> web.StreamResponse:
        """As the real one sends it: in chunks if it is large, compressed if it is larger."""
        headers = {"Content-Type": type_}
        if len(body) > GZIP_BYTES and "gzip" in request.headers.get("Accept-Encoding", ""):
            headers |= {"Content-Encoding": "gzip", "Vary": "Accept-Encoding"}
            body = gzip.compress(body, 1)
        response = web.StreamResponse(headers=headers)
        if len(body) > CHUNK_BYTES:
            response.enable_chunked_encoding()
        else:
            response.content_length = len(body)
        await response.prepare(request)
        for start in range(0, len(body), CHUNK_BYTES):
            await response.write(body[start : start + CHUNK_BYTES])
        await response.write_eof()
        return response

    async def _watch(
        self, request: web.Request, kind: Kind, query: Mapping[str, str], encoding: Encoding
    ) -> web.StreamResponse:
        stream = "sendInitialEvents" in query
        if stream and (not self.streaming or query.get("resourceVersionMatch") != "NotOlderThan"):
            return _status(422, "Invalid", _NO_STREAM)
        asked = query.get("resourceVersion") or "0"
        if self.gone_as_status and 0 < int(asked) < self._compacted:
            return _status(410, "Expired", f"too old resource version: {asked} ({self._compacted})")
        response = web.StreamResponse(headers={"Content-Type": encoding.watch_type})
        response.enable_chunked_encoding()
        await response.prepare(request)
        with self._lock:
            watch = _Watch(kind, request, encoding, self.version if stream else int(asked))
            if not stream and 0 < watch.version < self._compacted:
                message = f"too old resource version: {asked} ({self._compacted})"
                lines = [encoding.event("ERROR", _status_document(410, "Expired", message))]
                watch.ending = True
            else:
                lines = list(self._initial(watch, query, stream=stream))
                self._watches.add(watch)
        try:
            if how := self._spoiled.get(kind.plural):
                lines, watch.ending = [], True
                if how == "garbage":
                    lines = [b"<html>\n", b"\0\0\0\2<>"]
                if how == "bookmark":
                    lines = [watch.bookmark(self.version)]
            for line in lines:
                await response.write(line)
            await self._follow(watch, response, query)
        finally:
            with self._news:
                self._watches.discard(watch)
                self._news.notify_all()
        if request.transport and not request.transport.is_closing():
            await response.write_eof()
        return response

    def _initial(self, watch: _Watch, query: Mapping[str, str], *, stream: bool) -> Iterable[bytes]:
        if stream or watch.version == 0:
            matches = _selector(query)
            for item in self._state(watch.kind, self.version).values():
                if matches(item):
                    yield watch.event("ADDED", item)
            watch.version = self.version
        if stream:
            yield watch.bookmark(watch.version, {INITIAL_EVENTS_END: "true"})

    async def _follow(
        self, watch: _Watch, response: web.StreamResponse, query: Mapping[str, str]
    ) -> None:
        matches = _selector(query)
        ends_at = time.monotonic() + float(query.get("timeoutSeconds", "1800"))
        while not watch.ending and time.monotonic() < ends_at:
            watch.wake.clear()
            with self._lock:
                log = self._entries[watch.kind.name]
                entries = log[bisect_right(log, watch.version, key=lambda e: e.version) :]
                # to a watch from the future nothing is said, not even bookmarks
                is_ahead = watch.version > self.version
            if not watch.mute and not self._silent:
                for entry in entries:
                    await self._send(watch, response, entry, matches)
                    if watch.ending:
                        return
                if not is_ahead:
                    watch.version = max(watch.version, entries[-1].version if entries else 0)
                    with self._news:
                        self._news.notify_all()
            try:
                await asyncio.wait_for(watch.wake.wait(), self._bookmark_seconds)
            except TimeoutError:
                if not is_ahead and not watch.mute and not self._silent:
                    watch.version = await self._send_bookmark(watch, response)

    async def _send_bookmark(self, watch: _Watch, response: web.StreamResponse) -> int:
        with self._news:
            entries = self._entries[watch.kind.name]
            behind = entries and entries[-1].version > watch.version
            version = watch.version if behind else self.version
            watch.version = version
            self._news.notify_all()
        await response.write(watch.bookmark(version))
        return version

    async def _send(
        self,
        watch: _Watch,
        response: web.StreamResponse,
        entry: Entry,
        matches: Callable[[Document], bool],
    ) -> None:
        is_in = entry.new is not None and matches(entry.new)
        was_in = entry.old is not None and matches(entry.old)
        if is_in:
            assert entry.new is not None
            line = watch.event("MODIFIED" if was_in else "ADDED", entry.new)
        elif was_in:
            assert entry.old is not None
            gone = copy.deepcopy(entry.old)
            gone["metadata"]["resourceVersion"] = str(entry.version)
            line = watch.event("DELETED", gone)
        else:
            return
        if watch.cut:
            await response.write(line[: len(line) // 2])
            await asyncio.sleep(0.01)  # so that the half has been sent before the reset
            assert watch.request.transport
            watch.request.transport.close()
            watch.ending = True
            return
        await response.write(line)


# --- answers ------------------------------------------------------------------------------------

_CONTINUE_EXPIRED = (
    "The provided continue parameter is too old to display a consistent list result. You can "
    "start a new list without the continue parameter, or use the continue token in this response "
    "to retrieve the remainder of the results."
)
_NO_STREAM = (
    'ListOptions.meta.k8s.io "" is invalid: sendInitialEvents: Forbidden: sendInitialEvents is '
    "forbidden for watch unless the WatchList feature gate is enabled"
)


def _key(item: Document) -> Key:
    return item["metadata"].get("namespace", ""), item["metadata"]["name"]


def _status_document(
    code: int, reason: str, message: str, details: Document | None = None, token: str = ""
) -> Document:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {"continue": token} if token else {},
        "status": "Failure",
        "message": message,
        "reason": reason,
        **({"details": details} if details else {}),
        "code": code,
    }


def _status(
    code: int, reason: str, message: str, details: Document | None = None, token: str = ""
) -> web.Response:
    document = _status_document(code, reason, message, details, token)
    return web.json_response(document, status=code)


def _forbidden(verb: str, kind: Kind, where: str = "at the cluster scope") -> web.Response:
    details = {"group": kind.group} if kind.group else {}
    return _status(
        403,
        "Forbidden",
        f'{kind.full_name} is forbidden: User "{USER}" cannot {verb} resource "{kind.plural}" '
        f'in API group "{kind.group}" {where}',
        {**details, "kind": kind.plural},
    )


def _failure(code: int, retry_after: int | None) -> web.Response:
    reason = {
        401: "Unauthorized",
        410: "Expired",
        429: "TooManyRequests",
        500: "InternalError",
        503: "ServiceUnavailable",
    }.get(code, "BadRequest")
    response = _status(code, reason, f"made up by the test: {code}")
    if retry_after is not None:
        response.headers["Retry-After"] = str(retry_after)
    return response


def _token(version: int, start: Key) -> str:
    token = {"v": "meta.k8s.io/v1", "rv": version, "start": "/".join(start)}
    return base64.urlsafe_b64encode(json.dumps(token).encode()).decode().rstrip("=")


def _from_token(text: str) -> tuple[int, Key]:
    token = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    namespace, _, name = token["start"].partition("/")
    return token["rv"], (namespace, name)


def _selector(query: Mapping[str, str]) -> Callable[[Document], bool]:
    """What `labelSelector` and `fieldSelector` ask for: `!a`, `a`, `a=b`, `a!=b`, all of them."""
    tests: list[Callable[[Document], bool]] = []
    for term in filter(None, query.get("labelSelector", "").split(",")):
        tests.append(_label_test(term))
    for term in filter(None, query.get("fieldSelector", "").split(",")):
        tests.append(_field_test(term))
    return lambda item: all(test(item) for test in tests)


def _field_test(term: str) -> Callable[[Document], bool]:
    path, operator, value = term.partition("=")
    match path:
        case "metadata.name":
            return lambda item: item["metadata"]["name"] == value
        case "metadata.namespace":
            return lambda item: item["metadata"].get("namespace", "") == value
        case "spec.clusterIP!":
            return lambda item: item["spec"].get("clusterIP") != value
    raise AssertionError(f"{path}{operator}")


def _label_test(term: str) -> Callable[[Document], bool]:
    def labels(item: Document) -> Mapping[str, str]:
        found: Mapping[str, str] = item["metadata"].get("labels") or {}
        return found

    if term.startswith("!"):
        return lambda item: term[1:] not in labels(item)
    label, operator, value = term.partition("=")
    if label.endswith("!"):
        return lambda item: labels(item).get(label[:-1]) != value
    if operator:
        return lambda item: labels(item).get(label) == value.removeprefix("=")
    return lambda item: label in labels(item)
