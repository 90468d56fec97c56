"""The pictures in the documents: `PICTURES=write pytest tests/browser/test_pictures.py` takes them.

Without it the same pages are opened and looked at, so a picture can always be taken.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from rules.events import Event, Upsert
from rules.flow_report import NewConnection
from rules.target import target_of
from tests.browser.chromium import Page
from tests.browser.conftest import Backend
from tests.manifest import endpoint, endpoint_slice, service

IMAGES = Path(__file__).parents[2] / "docs" / "images"
NAMES = (
    "web",
    "database",
    "cache",
    "accounts",
    "cart",
    "search",
    "mail",
    "queue",
    "feed",
    "images",
)
NAMESPACES = ("billing", "default", "monitoring", "shop")


def _cluster() -> Iterator[Event]:
    """Services with a few endpoints each; one has none, one claims another's address."""
    for number in range(400):
        name = NAMES[number % 10] + (f"-{number // 40}" if number >= 40 else "")
        namespace = NAMESPACES[number // 10 % 4]
        fields = {"type": "NodePort"} if number % 7 == 0 else {}
        port = {"name": "http", "port": 80, **({"nodePort": 30000 + number} if fields else {})}
        address = f"10.96.{number // 250}.{number % 250}"
        yield Upsert(
            service(name, namespace=namespace, cluster_ips=[address], ports=[port], **fields)
        )
        pods = [
            endpoint(
                f"10.244.{one}.{number % 200 + 10}",
                pod=f"{name}-6c9f-{one}",
                node=f"node-{one + 1}",
                zone="a" if one % 2 else "b",
                ready=one != 3,
            )
            for one in range(0 if number == 23 else number % 5 + 1)
        ]
        yield Upsert(endpoint_slice(name, pods, namespace=namespace))
    claims = {"cluster_ips": ["10.96.8.8"], "externalIPs": ["10.96.0.31"]}
    yield Upsert(service("mirror", namespace="shop", **claims))
    yield Upsert(endpoint_slice("mirror", [endpoint("10.244.1.9")], namespace="shop"))


@pytest.mark.parametrize(
    ("name", "route", "scheme"),
    [
        ("page-overview", "", "light"),
        ("page-service", "#/services/billing/cart", "dark"),
        ("page-flows", "#/flows", "light"),
    ],
)
def test_the_pictures_of_the_documents(
    backend: Backend, page: Page, name: str, route: str, scheme: str
) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    backend.put(*_cluster())
    ready = [
        endpoint(f"10.244.{n}.14", pod=f"cart-6c9f-{n}", node=f"node-{n + 1}") for n in range(5)
    ]
    backend.put(Upsert(endpoint_slice("cart", ready, namespace="billing")))
    ready[1] = endpoint("10.244.1.14", pod="cart-6c9f-1", node="node-2", ready=False)
    backend.put(Upsert(endpoint_slice("cart", ready, namespace="billing")))
    page.open(route)
    if route == "#/flows":
        page.run("document.getElementById('listen').click()")
        page.until(lambda: backend.flows.listening)
        for number in range(12):
            client = target_of(bytes([10, 244, number % 3, 77]), 40000 + 37 * number)
            where = target_of(bytes([10, 96, 0, 4 + number % 3]), 80)
            target = target_of(bytes([10, 244, number % 2, 14 + number % 3]), 8080)
            backend.watch.made.put(NewConnection(6, client, where, target, client))
        page.shows("12 connections", "billing/cart")
    else:
        page.shows("billing/")
        for step in (40, 90, 60, 130, 80):
            backend.made += step
            before = len(backend.asked)
            page.until(
                lambda since=before: any("counters=true" in one for one in backend.asked[since:])
            )
        page.shows("of 5") if not route else page.shows("ready before, not ready now")
    picture = page.driver.get_screenshot_as_png()
    if os.environ.get("PICTURES") == "write":
        (IMAGES / f"{name}.png").write_bytes(picture)
    assert picture
    assert page.errors() == []
