"""Services, EndpointSlices, this Node and the ServiceCIDRs of a cluster, listed and watched.

What is asked and what the answers mean is in `agent.sources.kubernetes.reflector`. Here is the
rest: where the API server is and how it knows us, the connections, a thread for each resource, and
what an operator is told.

The official client reads configurations (a pod's service account, kubeconfigs, exec plugins) and
keeps tokens fresh, and its urllib3 pool carries the bytes. Its model classes and its own watch are
not used: for 5,000 endpoints they take 190 ms where our records take 16 (*measured*). They are not
even imported (`agent.imports`). What the client does not keep fresh (a kubeconfig's `tokenFile`, as
kubeadm's has it, and certificates) is loaded anew every few minutes, and at once when the server
does not accept us.

In a pod the API server's address is usually that of the Service `kubernetes`, and that one works
only where a proxy runs already. What replaces kube-proxy has to be given another address, as
kube-proxy is in its kubeconfig.

Each list is told as soon as it is complete, as one, and `Synced` behind the last one that is
required; until then the loop programs nothing. Nothing is ever taken back because the API server
is away.
"""

from __future__ import annotations

import http.client
import logging
import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal, NamedTuple, cast
from urllib.parse import urlencode, urlsplit

import urllib3
from structlog.typing import FilteringBoundLogger

from agent.sources.kubernetes.reflector import (
    Ask,
    Reflector,
    Request,
    Resource,
    Timing,
    Trouble,
    resources,
)
from rules.events import Event, Synced

RELOAD_SECONDS = 300.0
MAX_BATCH = 10_000
STOP_SECONDS = 0.5

_READ_BYTES = 1 << 18
_IN_CLUSTER = "KUBERNETES_SERVICE_HOST"


class ConnectError(Exception):
    """There is no API server to talk to, or no way to say who we are; says what to give."""


# --- the connection -----------------------------------------------------------------------------


class Connection:
    """A way to an API server. Threads may share one.

    `origin` says where the configuration comes from, `server` is the API server's URL;
    `at_service_address` tells that this is what pods are told, the Service `kubernetes`.
    """

    def __init__(
        self,
        load: Callable[[], Any],
        origin: str,
        server: str | None = None,
        *,
        in_cluster: bool = False,
    ) -> None:
        self.origin = origin
        self.server = server or ""
        self.at_service_address = in_cluster and not server
        self._pinned = server
        self._load = load
        self._lock = threading.Lock()
        self._client = self._new_client()

    def get(self, request: Request, connect_seconds: float) -> urllib3.BaseHTTPResponse:
        """Sends a request; returns when the answer's headers have come.

        Raises ConnectError where credentials cannot be had, and urllib3's HTTPErrors.
        """
        client, server, headers = self._credentials()
        streams = request.ask in (Ask.WATCH, Ask.STREAM)
        headers["Accept"] = "application/json"
        headers["Accept-Encoding"] = "identity" if streams else "gzip"
        response: urllib3.BaseHTTPResponse = client.pool_manager.request(
            "GET",
            f"{server}{request.path}?{urlencode(request.query)}",
            headers=headers,
            timeout=urllib3.Timeout(connect=connect_seconds, read=request.silence),
            preload_content=False,
            retries=False,
            redirect=False,
        )
        if response.status == 401:
            with self._lock:
                if client is self._client:  # else another thread was faster
                    self._loaded_at = float("-inf")
        return response

    def _credentials(self) -> tuple[Any, str, dict[str, str]]:
        with self._lock:
            if time.monotonic() - self._loaded_at > RELOAD_SECONDS:
                with suppress(ConnectError):  # what was good until now may still be
                    self._client = self._new_client()
            client = self._client
            headers = {"User-Agent": "sliceproxy"}
            with _loading(self.origin):
                for auth in client.configuration.auth_settings().values():  # the token, if any
                    headers[auth["key"]] = (auth["value"] or "").strip()
            return client, self.server, headers

    def _new_client(self) -> Any:
        self._loaded_at = time.monotonic()
        with _loading(self.origin):
            from kubernetes.client.rest import RESTClientObject

            configuration = self._load()
            if self._pinned:
                configuration.host = self._pinned  # decides on a proxy; its hooks may change it
            client = RESTClientObject(configuration)
        self.server = str(configuration.host).rstrip("/")
        return client


def connect(
    kubeconfig: str | None = None, context: str | None = None, server: str | None = None
) -> Connection:
    """The way to the API server, as told or found.

    In this order: `kubeconfig`, the files in $KUBECONFIG, the service account of the pod this
    runs in, ~/.kube/config; `server`, a URL, overrides where they say the API server is, or
    stands alone if there are none of them. Sends nothing. Raises ConnectError.
    """
    if server and urlsplit(server).scheme not in ("http", "https"):
        raise ConnectError(f"--server {server}: write it like https://10.0.0.1:6443")
    paths = kubeconfig or os.environ.get("KUBECONFIG")
    if kubeconfig and not os.path.exists(os.path.expanduser(kubeconfig)):
        raise ConnectError(f"kubeconfig {kubeconfig}: no such file")
    home = os.path.expanduser("~/.kube/config")
    if not paths and not context and os.environ.get(_IN_CLUSTER):
        origin = "the service account of this pod"
        return Connection(_in_cluster, origin, server, in_cluster=True)
    if not paths and os.path.exists(home):
        paths = home
    if paths:
        origin = f"kubeconfig {paths}" + (f", context {context}" if context else "")
        return Connection(lambda: _from_file(paths, context), origin, server)
    if context:
        raise ConnectError(f"--context {context} needs a kubeconfig: give --kubeconfig FILE")
    if server:
        return Connection(_configuration, "no credentials", server)
    raise ConnectError(
        f"no API server is known: not in a pod (${_IN_CLUSTER} is not set), and there is no "
        "kubeconfig; give --kubeconfig FILE, or --from PATH for manifests instead of a cluster"
    )


def _configuration() -> Any:
    from kubernetes.client.configuration import Configuration

    configuration = Configuration()
    configuration.keep_alive = True
    return configuration


def _in_cluster() -> Any:
    configuration = _configuration()
    from kubernetes.config import incluster_config

    loader = cast(Any, incluster_config)
    loader.load_incluster_config(configuration)
    return configuration


def _from_file(paths: str, context: str | None) -> Any:
    configuration = _configuration()
    from kubernetes.config import kube_config

    loader = cast(Any, kube_config)
    loader.load_kube_config(paths, context, configuration, persist_config=False)
    return configuration


class _Overheard(logging.Handler):
    """What this thread logs: the client reports failures of exec plugins in no other way."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._thread = threading.get_ident()
        self.words: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self._thread:
            self.words.append(record.getMessage())


@contextmanager
def _loading(origin: str) -> Iterator[None]:
    """Makes ConnectErrors of what the client raises, or only logs, while it loads."""
    overheard = _Overheard()
    logging.root.addHandler(overheard)
    try:
        yield
    except ConnectError:
        raise
    except Exception as error:  # a configuration can be wrong in more ways than the client knows
        raise ConnectError(f"{origin}: {error or type(error).__name__}") from error
    finally:
        logging.root.removeHandler(overheard)
    if overheard.words:
        raise ConnectError(f"{origin}: {'; '.join(overheard.words)}")


# --- what an operator is told -------------------------------------------------------------------


class _Outlook:
    """Logs each trouble once, when it begins, and once when it is over."""

    def __init__(self, connection: Connection, log: FilteringBoundLogger) -> None:
        self._connection = connection
        self._log = log
        self._lock = threading.Lock()
        self._troubles: dict[Resource, str] = {}
        self._since: dict[str, float] = {}
        self.synced = False

    def trouble(self, resource: Resource, verb: str, trouble: Trouble) -> None:
        """A request has failed."""
        event, fields = self._words(resource, verb, trouble)
        with self._lock:
            self._over(self._troubles.get(resource), resource, unless=event)
            self._troubles[resource] = event
            if event in self._since:
                return
            self._since[event] = time.monotonic()
        ours = trouble.kind in ("unauthorized", "forbidden") and resource.required
        log = self._log.error if ours else self._log.warning
        log(event, server=self._connection.server, **fields)

    def fine(self, resource: Resource) -> None:
        """A request has been answered as it should be."""
        with self._lock:
            self._over(self._troubles.get(resource), resource)

    def _over(self, event: str | None, resource: Resource, unless: str = "") -> None:
        if event is None or event == unless:
            return
        del self._troubles[resource]
        if event in self._troubles.values():
            return
        seconds = round(time.monotonic() - self._since.pop(event), 1)
        self._log.info("the API server answers again", was=event, after_seconds=seconds)

    def _words(
        self, resource: Resource, verb: str, trouble: Trouble
    ) -> tuple[str, dict[str, object]]:
        what = f"{resource.plural}.{resource.group}".rstrip(".")
        match trouble.kind:
            case "unreachable":
                hint = {}
                if self._connection.at_service_address and not self.synced:
                    hint["hint"] = (
                        "this is the address of a Service, which works where a proxy runs already;"
                        " give --server with the API server's own address"
                    )
                event = "the API server cannot be reached; the node keeps what it has"
                return event, {"reason": trouble.text, "resource": what, **hint}
            case "busy":
                return "the API server is busy; waiting as it asks for", {"resource": what}
            case "unauthorized":
                event = (
                    "the API server does not accept our credentials (401); check that they have "
                    "not expired and that they are meant for this cluster"
                )
                return event, {"credentials": self._connection.origin, "answer": trouble.text}
            case "forbidden":
                event = (
                    f"the API server does not allow us to {verb} {what} (403); "
                    f"add this rule to our ClusterRole: {resource.rule}"
                )
                return event, {"answer": trouble.text}
            case "absent" if not resource.required:
                event = (
                    f"the API server has no {what} (Kubernetes before 1.33); packets to addresses "
                    "of no Service are not dropped"
                )
                return event, {"answer": trouble.text}
        return f"the API server does not answer as it should about {what}", {"reason": trouble.text}


class Status(NamedTuple):
    """How following a resource goes. Times are of `time.monotonic`; ages are the reader's sums.

    `last_message` is that of the last byte from the server, None before the first one.
    """

    resource: str
    state: Literal["listing", "watching", "backing off", "stopped"]
    since: float
    last_message: float | None
    resource_version: str
    objects: int
    complete: bool
    relists: int
    errors: int


# --- following ----------------------------------------------------------------------------------


class Follower:
    """Tells a loop what an API server has, and from then on what changes there.

    `put` is called in threads of this Follower, one at a time: with a list of events for each list
    that is complete, and for whatever has arrived when a watch is read. `Synced` comes once, at
    the end of the list that completes Services, EndpointSlices and the Node (ServiceCIDRs too,
    unless the server has none or does not allow them). An unreachable API server is waited for.
    `requested` is told of every answer: method, status (<error> for none), and server.
    """

    def __init__(
        self,
        connection: Connection,
        node: str,
        proxy_name: str,
        put: Callable[[list[Event]], None],
        log: FilteringBoundLogger,
        *,
        requested: Callable[[str, int | str, str], None] = lambda *_: None,
        timing: Timing | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._put = put
        self.requested = requested
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._outlook = _Outlook(connection, log)
        self._threads = [
            _Thread(self, resource, connection, self._outlook, log, timing=timing, rng=rng)
            for resource in resources(node, proxy_name)
        ]
        self._awaited = {thread.resource for thread in self._threads}

    def start(self) -> None:
        """Begins to follow."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends it; nothing is put from then on. Takes half a second at most.

        A thread in the middle of connecting ends by itself later; no process waits for it.
        """
        with self._lock:
            self._stopping.set()
        for thread in self._threads:
            thread.interrupt()
        deadline = time.monotonic() + STOP_SECONDS
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, deadline - time.monotonic()))

    def status(self) -> list[Status]:
        """How it goes, for each resource."""
        return [thread.status() for thread in self._threads]

    @property
    def stopping(self) -> bool:
        """Whether `stop` has been called."""
        return self._stopping.is_set()

    def wait(self, seconds: float) -> None:
        """Returns after some seconds, or when it is to be stopped."""
        self._stopping.wait(seconds)

    def tell(self, resource: Resource, events: list[Event], *, settled: bool) -> None:
        """Puts events of a resource; it is `settled` if they are at least all of its list.

        If now there is all that was waited for, `Synced` follows them.
        """
        with self._lock:
            if settled and resource in self._awaited:
                self._awaited.remove(resource)
                if not self._awaited:
                    events = [*events, Synced()]
                    self._outlook.synced = True
            if events and not self.stopping:
                self._put(events)


class _Thread(threading.Thread):
    """Follows one resource."""

    def __init__(
        self,
        follower: Follower,
        resource: Resource,
        connection: Connection,
        outlook: _Outlook,
        log: FilteringBoundLogger,
        *,
        timing: Timing | None,
        rng: random.Random | None,
    ) -> None:
        super().__init__(name=f"follow {resource.plural}", daemon=True)
        self.resource = resource
        self._follower = follower
        self._timing = timing or Timing()
        self._reflector = Reflector(resource, self._timing, rng)
        self._connection = connection
        self._outlook = outlook
        self._log = log.bind(resource=resource.plural)
        self._lock = threading.Lock()
        self._response: urllib3.BaseHTTPResponse | None = None
        self._state: Literal["listing", "watching", "backing off", "stopped"] = "listing"
        self._since = time.monotonic()
        self._last_message: float | None = None

    def status(self) -> Status:
        """See Status."""
        reflector = self._reflector
        return Status(
            self.resource.plural,
            self._state,
            self._since,
            self._last_message,
            reflector.version,
            len(reflector.known),
            reflector.complete,
            reflector.relists,
            reflector.errors,
        )

    def interrupt(self) -> None:
        """Ends a read that is waiting for bytes."""
        with self._lock:
            if self._response is not None:
                with suppress(Exception):  # it may be over just now
                    self._response.shutdown()

    def run(self) -> None:
        """The thread's work; use `start`."""
        while not self._follower.stopping:
            try:
                delay = self._turn()
            except Exception:
                if self._follower.stopping:  # what ends a read also disturbs it
                    break
                # nobody else would notice that nothing is followed any more
                self._log.exception("following failed; listing anew")
                self._reflector.start_over()
                delay = self._timing.backoff[1]
            if delay > 0:
                self._enter("backing off")
                self._follower.wait(delay)
        self._enter("stopped")

    def _enter(self, state: Literal["listing", "watching", "backing off", "stopped"]) -> None:
        if state != self._state:
            self._state, self._since = state, time.monotonic()

    def _turn(self) -> float:
        """One request and all of its answer; returns the seconds to wait before the next one."""
        request, began = self._reflector.request(), time.monotonic()
        self._enter("listing" if self._reflector.listing else "watching")
        broken = ""
        try:
            self._exchange(request)
        except (urllib3.exceptions.HTTPError, OSError, ConnectError) as error:
            broken = _reason(error)
        if self._follower.stopping:
            return 0.0
        step = self._reflector.finished(broken, time.monotonic() - began)
        if broken:
            self._log.debug("request broken", request=request.ask.value, reason=broken)
        if step.trouble:
            self._outlook.trouble(self.resource, request.verb, step.trouble)
        elif request.ask in (Ask.LIST, Ask.PROBE) and not broken:
            self._outlook.fine(self.resource)
        self._tell(step.events)
        return step.delay

    def _exchange(self, request: Request) -> None:
        try:
            response = self._connection.get(request, self._timing.connect)
        except (urllib3.exceptions.HTTPError, OSError, ConnectError):
            self._follower.requested("GET", "<error>", self._connection.server)
            raise
        with self._lock:
            self._response = response
        try:
            self._follower.requested("GET", response.status, self._connection.server)
            self._reflector.answered(response.status, response.headers.get("Retry-After", ""))
            if response.status == 200 and request.ask in (Ask.WATCH, Ask.STREAM):
                self._outlook.fine(self.resource)
            self._read(response, request)
        finally:
            with self._lock:
                self._response = None
            if self._reflector.over or not response.closed:
                response.close()
            response.release_conn()

    def _read(self, response: urllib3.BaseHTTPResponse, request: Request) -> None:
        """Hands over all of an answer; what has arrived by then of a watch is told as one."""
        reflector, events, due, spoke = self._reflector, list[Event](), False, False
        try:
            for data in _pieces(response):
                self._last_message, spoke = time.monotonic(), True
                listing = reflector.listing
                events += reflector.received(data)
                if listing and not reflector.listing:
                    self._enter("watching")
                    due = True  # that a list is empty is news, too
                due = due or bool(events or reflector.invalid)
                if due and not (len(events) < MAX_BATCH and _has_more(response)):
                    self._tell(events)
                    events, due = [], False
                if reflector.over or self._follower.stopping:
                    break
        except urllib3.exceptions.ReadTimeoutError:
            if spoke:
                self._log.info("connection fell silent; connecting anew", seconds=request.silence)
            raise
        finally:
            self._tell(events)

    def _tell(self, events: list[Event]) -> None:
        for invalid in self._reflector.invalid:
            self._log.error(
                "object cannot be used; what was known of it stays",
                object=invalid.subject,
                reason=invalid.reason,
            )
        self._reflector.invalid.clear()
        self._follower.tell(self.resource, events, settled=self._reflector.settled)


def _pieces(response: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
    """The body as it comes. A chunk at a time costs half of what `read1` takes for one."""
    if isinstance(response, urllib3.HTTPResponse) and response.chunked:
        # a list of more than 128 KB is gzip inside chunks
        yield from response.read_chunked(_READ_BYTES, decode_content=True)
    else:
        while data := response.read1(_READ_BYTES):
            yield data


def _has_more(response: urllib3.BaseHTTPResponse) -> bool:
    """Whether more of a chunked answer is here already, so that reading on does not wait.

    The server sends each event as a chunk of its own, and they are read one at a time.
    """
    stream = getattr(getattr(response, "_fp", None), "fp", None)
    connection = getattr(response, "connection", None)
    sock: socket.socket | None = getattr(connection, "sock", None)
    if stream is None or sock is None:
        return False
    timeout = sock.gettimeout()
    sock.settimeout(0)
    try:
        # shorter than a chunk's head and any event: perhaps not even the head is whole
        return len(stream.peek(1)) > 20
    except (OSError, ValueError):
        return False
    finally:
        sock.settimeout(timeout)


def _reason(error: BaseException) -> str:
    """The innermost words of an error; urllib3 wraps what the system says."""
    inner: BaseException | None = error
    while inner is not None:
        match inner:
            case http.client.IncompleteRead():
                return "connection closed"
            case ssl.SSLError():
                return inner.reason or str(inner)
            case urllib3.exceptions.ReadTimeoutError():
                return "no answer in time"
            case OSError() if inner.strerror:
                return inner.strerror
        inner = inner.__cause__ or inner.__context__
    return str(error) or type(error).__name__
