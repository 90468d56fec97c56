"""The status page in a real browser: a large cluster, keyboard, hostile names, no other host."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from rules.doctor import Check
from rules.events import Delete, Upsert
from rules.objects import Name, Service
from tests.browser.conftest import Backend, Page
from tests.manifest import endpoint, endpoint_slice, service

Keys = pytest.importorskip("selenium.webdriver", reason="needs selenium, the extra `browser`").Keys

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


def web(**fields: Any) -> Service:
    return service("web", cluster_ips=["10.96.0.10"], **fields)


def put_web(backend: Backend, **second: Any) -> None:
    """Service default/web with two endpoints; the second one's fields as given."""
    endpoints = [
        endpoint("10.244.1.11", pod="web-1", zone="a"),
        endpoint("10.244.1.12", pod="web-2", zone="a", **second),
    ]
    backend.put(Upsert(web()), Upsert(endpoint_slice("web", endpoints)))


def rows(page: Page) -> list[str]:
    script = "return [...document.querySelectorAll('#services tbody tr')].map(r => r.dataset.key)"
    return list(page.run(script))


# --- the overview -------------------------------------------------------------------------------


def test_an_overview_of_5000_services_finds_one_as_it_is_typed(
    backend: Backend, page: Page
) -> None:
    """Two requests and a bounded table, whatever the cluster's size; typing asks nothing more.

    Usable after 0.7 to 1.3 s and filtered in 20 ms, measured on two busy cores.
    """
    for number in range(5000):
        name, address = f"service-{number}", f"10.96.{number // 250}.{number % 250}"
        backend.state.apply([Upsert(service(name, cluster_ips=[address]))])
        slices = endpoint_slice(name, [endpoint(f"10.244.{number // 250}.{number % 250}")])
        backend.state.apply([Upsert(slices)])
    backend.put()
    page.open()
    page.until(lambda: len(rows(page)) == 200)
    asked = """return performance.getEntriesByType('resource')
        .map(e => e.name.split('/v1/')[1].split('?')[0])"""
    assert page.run(asked)[:2] == ["status", "services"]
    assert page.run(asked).count("services") == 1
    page.press("/", "service-4321")
    page.until(lambda: rows(page) == ["default/service-4321"])
    assert "1 of 5,000" in page.text
    assert page.run(asked).count("services") == 1


def test_search_finds_addresses_and_states_and_several_words(backend: Backend, page: Page) -> None:
    put_web(backend)
    backend.put(Upsert(service("empty", cluster_ips=["10.96.0.30"], namespace="shop")))
    page.open()
    page.until(lambda: sorted(rows(page)) == ["default/web", "shop/empty"])
    for words, found in (
        ("10.96.0.30", ["shop/empty"]),
        ("refused", ["shop/empty"]),
        ("default served", ["default/web"]),
        ("default refused", []),
    ):
        page.press("/", words)
        page.until(lambda wanted=found: rows(page) == wanted)
        page.press(Keys.ESCAPE)
        page.until(lambda: len(rows(page)) == 2)
        page.run("document.activeElement.blur()")


def test_a_change_is_shown_without_a_reload(backend: Backend, page: Page) -> None:
    put_web(backend)
    page.open()
    page.shows("2/2")
    put_web(backend, ready=False)
    page.shows("1/2")
    backend.put(Delete(Service, Name("default", "web")))
    page.until(lambda: rows(page) == [])


# --- one Service, history, explain, doctor -------------------------------------------------------


def test_a_services_endpoints_have_reasons_and_a_history(backend: Backend, page: Page) -> None:
    put_web(backend)
    put_web(backend, ready=False)
    page.open("#/services/default/web")
    page.shows("10.244.1.12:8080", "web-2", "not used, not ready", "Cluster: used")
    page.shows("endpoint changed", "ready before, not ready now")
    page.open("#/history")
    page.shows("default/web", "ready before, not ready now")


def test_the_box_explains_an_address(backend: Backend, page: Page) -> None:
    put_web(backend)
    page.open("#/explain")
    page.until(lambda: page.run("return document.activeElement.id") == "target")
    page.press("10.96.0.10:80", Keys.ENTER)
    page.shows("cluster IP of Service default/web", "a client outside", "10.244.1.11:8080")
    page.open("#/explain/10.96.0.10:81")
    page.shows("has no port 81/tcp")
    page.open("#/explain/nonsense")
    page.shows("not a valid ADDRESS:PORT")


def test_doctor_shows_what_to_do(backend: Backend, page: Page) -> None:
    backend.checks.append(Check("forward", "Forwarding", "failed", "is off", "sysctl -w x=1"))
    page.open("#/doctor")
    page.shows("Forwarding", "failed", "sysctl -w x=1")


# --- keyboard, colours ---------------------------------------------------------------------------


def test_everything_can_be_reached_with_the_keyboard(backend: Backend, page: Page) -> None:
    """/ to the search, arrows along the rows, Enter into a Service, Escape back."""
    for number in range(5):
        backend.put(Upsert(service(f"s{number}", cluster_ips=[f"10.96.0.{number}"])))
    page.open()
    page.until(lambda: len(rows(page)) == 5)
    page.press("/")
    assert page.run("return document.activeElement.id") == "search"
    page.press(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_UP)
    selected = "return document.querySelector('[aria-selected=true]').dataset.key"
    assert page.run(selected) == "default/s1"
    page.press(Keys.ENTER)
    page.shows("Service default/s1")
    assert page.run("return location.hash") == "#/services/default/s1"
    page.press(Keys.ESCAPE)
    page.until(lambda: len(rows(page)) == 5)


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_colours_follow_the_system_and_have_contrast(
    backend: Backend, page: Page, scheme: str
) -> None:
    """WCAG 2.2 AA: 4.5:1 between each text colour and both backgrounds."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    put_web(backend)
    page.open()
    page.shows("default/web")
    assert page.run("return getComputedStyle(document.documentElement).colorScheme") == scheme
    colour = "return getComputedStyle(document.documentElement).getPropertyValue(arguments[0])"
    for ink in ("--ink", "--dim", "--accent", "--good", "--warn", "--bad"):
        for ground in ("--bg", "--soft"):
            found = _contrast(page.run(colour, ink), page.run(colour, ground))
            assert found >= 4.5, (ink, ground, found)


def _contrast(one: str, other: str) -> float:
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    digits = colour.strip().removeprefix("#")
    if len(digits) == 3:
        digits = "".join(d * 2 for d in digits)
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_theme_can_be_switched_and_stays(backend: Backend, page: Page) -> None:
    page.open()
    before = page.run("return document.documentElement.dataset.theme")
    page.run("document.getElementById('theme').click()")
    assert page.run("return document.documentElement.dataset.theme") != before


# --- safety --------------------------------------------------------------------------------------


def test_names_of_tenants_are_text(backend: Backend, page: Page) -> None:
    """A pod's and a Service's name, a port's, a check's words: nothing of it becomes an element.

    The API server would refuse most of them; manifests and other servers may not.
    """
    name = f"x{HOSTILE}"
    backend.put(
        Upsert(
            service(
                name,
                cluster_ips=["10.96.0.11", "fd00::11"],
                ports=[{"name": HOSTILE, "port": 80}],
                externalIPs=["203.0.113.1"],
            )
        ),
        Upsert(
            endpoint_slice(
                name,
                [endpoint("10.244.1.11", pod=HOSTILE, node=HOSTILE, zone=HOSTILE)],
                ports=[{"name": HOSTILE, "port": 8080}],
            )
        ),
        Upsert(service("a", cluster_ips=["10.96.0.12"], externalIPs=["203.0.113.1"])),
        Upsert(endpoint_slice(name, [endpoint("10.244.1.12", pod=HOSTILE)])),
    )
    backend.checks.append(Check("x", HOSTILE, "failed", HOSTILE, HOSTILE))
    for route in (
        "",
        f"#/services/default/{quote(name, safe='')}",
        "#/history",
        "#/doctor",
        "#/explain/10.96.0.11:80",
    ):
        page.open(route)
        page.shows("<script>document.title")
        assert page.run("return document.title") == "sliceproxy"
        assert page.run("return document.querySelectorAll('main img, main script').length") == 0


def test_the_page_asks_nothing_but_its_own_agent(backend: Backend, page: Page) -> None:
    """By the browser's list of requests; and the policy forbids the rest."""
    put_web(backend)
    for route in ("", "#/services/default/web", "#/history", "#/doctor", "#/explain/10.96.0.10:80"):
        page.open(route)
        page.shows("sliceproxy")
        names = page.run("return performance.getEntriesByType('resource').map(e => e.name)")
        assert all(name.startswith(page.url) for name in names), names
    assert page.errors() == []
    blocked = page.driver.execute_async_script(
        """const done = arguments[0];
        document.addEventListener('securitypolicyviolation', e => done(e.violatedDirective));
        fetch('http://127.0.0.1:1/').catch(() => setTimeout(() => done('not blocked'), 500))"""
    )
    assert blocked == "connect-src"


def test_nothing_in_the_file_names_another_host() -> None:
    text = (Path(__file__).parents[2] / "agent" / "serve" / "page.html").read_text()
    found = set(re.findall(r"https?://[\w.-]+", text))
    assert found <= {"http://www.w3.org"}  # the namespace of SVG


def test_without_the_agent_the_last_answer_stays_with_a_word(backend: Backend, page: Page) -> None:
    put_web(backend)
    page.open()
    page.shows("default/web")
    backend.__exit__()
    page.shows("The agent does not answer", "default/web")
