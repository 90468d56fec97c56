"""Where the API server is, how it knows us, and requests to it.

The official client reads configurations (a pod's service account, kubeconfigs, exec plugins) and
keeps tokens fresh, and its urllib3 pool carries the bytes. Its model classes and its own watch are
not used: for 5,000 endpoints they take 190 ms where our records take 16 (*measured*). They are not
even imported (`agent.imports`). What the client does not keep fresh (a kubeconfig's `tokenFile`, as
kubeadm's has it, and certificates) is loaded again every few minutes, and at once when the server
does not accept it.

In a pod the API server's default address is that of the Service `kubernetes`, and that one works
only where a proxy runs already. A replacement of kube-proxy has to be given another address, as
kube-proxy is in its kubeconfig.
"""

from __future__ import annotations

import http.client
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from typing import Any, cast
from urllib.parse import urlencode, urlsplit

import urllib3

from agent.sources.kubernetes.reflector import ApiRequest
from rules.objects import Address

RELOAD_SECONDS = 300.0

_IN_CLUSTER = "KUBERNETES_SERVICE_HOST"


class ConnectError(Exception):
    """The API server's address or the credentials are missing or wrong. Says what to give."""


class Connection:
    """Connections to one API server. Threads may share it.

    `origin` is where the configuration was found, `server` the API server's URL.
    `at_service_address`: the URL is that of the Service `kubernetes`. `verifies`: its certificate
    is checked.
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
        self.verifies = True
        self._pinned = server
        self._load = load
        self._lock = threading.Lock()
        self._endpoints: frozenset[tuple[Address, int]] = frozenset()
        self._resolved_at = float("-inf")
        self._resolving = threading.Lock()
        self._client = self._new_client()

    def get(self, request: ApiRequest, connect_seconds: float) -> urllib3.BaseHTTPResponse:
        """Sends a request; returns when the headers of the answer have arrived.

        Raises ConnectError if credentials are not available, and urllib3's HTTPErrors.
        """
        client, server, headers = self._credentials()
        headers["Accept"] = request.accept
        headers["Accept-Encoding"] = "identity" if request.streams else "gzip"
        response: urllib3.BaseHTTPResponse = client.pool_manager.request(
            "GET",
            f"{server}{request.path}?{urlencode(request.query)}",
            headers=headers,
            timeout=urllib3.Timeout(connect=connect_seconds, read=request.silence),
            preload_content=False,
            retries=False,
            redirect=False,
        )
        self._note_status(client, response.status)
        return response

    def exchange(
        self, method: str, target: str, seconds: float, body: bytes | None = None
    ) -> tuple[int, bytes]:
        """Sends a short request, with a body of JSON; returns the answer's status and body, JSON
        too. `target` is a path with its query.

        Raises ConnectError if credentials are not available, and urllib3's HTTPErrors.
        """
        client, server, headers = self._credentials()
        headers["Accept"] = "application/json"
        if body is not None:
            headers["Content-Type"] = "application/json"
        response: urllib3.BaseHTTPResponse = client.pool_manager.request(
            method,
            f"{server}{target}",
            body=body,
            headers=headers,
            timeout=urllib3.Timeout(total=seconds),
            retries=False,
            redirect=False,
        )
        self._note_status(client, response.status)
        return response.status, response.data

    def _note_status(self, client: Any, status: int) -> None:
        """Has the credentials loaded again if the server did not accept them."""
        if status == http.HTTPStatus.UNAUTHORIZED:
            with self._lock:
                if client is self._client:  # else another thread was faster
                    self._loaded_at = float("-inf")

    def endpoints(self) -> frozenset[tuple[Address, int]]:
        """Packed addresses and TCP ports where the API server, or the proxy to it, is reached.

        Names are resolved at most every RELOAD_SECONDS, which may block; where that fails, the
        last addresses stay.
        """
        with self._resolving:
            if time.monotonic() - self._resolved_at > RELOAD_SECONDS:
                self._resolved_at = time.monotonic()
                found: set[tuple[Address, int]] = set()
                for url in (self.server, self._client.configuration.proxy):
                    found |= _resolved(url) if url else set()
                self._endpoints = frozenset(found) or self._endpoints
            return self._endpoints

    def _credentials(self) -> tuple[Any, str, dict[str, str]]:
        with self._lock:
            if time.monotonic() - self._loaded_at > RELOAD_SECONDS:
                with suppress(ConnectError):  # the last valid one may still work
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
        self.verifies = bool(configuration.verify_ssl)
        if not self.verifies:  # the follower logs it; urllib3 would print it at each request
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
        return client


def _resolved(url: str) -> set[tuple[Address, int]]:
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except OSError:
        return set()
    return {(ip_address(str(a[0]).partition("%")[0]).packed, port) for *_, a in found}


def connect(
    kubeconfig: str | None = None, context: str | None = None, server: str | None = None
) -> Connection:
    """The connection to the API server, as given or found.

    In this order: `kubeconfig`, the files in $KUBECONFIG, the service account of the pod this
    runs in, ~/.kube/config. `server`, a URL, overrides their address of the API server, and needs
    none of them. Sends nothing. Raises ConnectError.
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
        ours = record.name == "root" or record.name.startswith("kubernetes")
        if ours and record.thread == self._thread:
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


def reason_of(error: BaseException) -> str:
    """What the system says of an error, which urllib3 wraps."""
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
