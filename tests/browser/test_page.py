"""The status page in a real browser: a large cluster, keyboard, hostile names, no other host."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from agent.serve.api import Api
from agent.serve.health import Heartbeat
from agent.serve.http import HttpAnswer
from rules.doctor import Check
from rules.events import Delete, Upsert
from rules.flow_report import Lost, NewConnection
from rules.objects import Name, Service
from rules.target import target_of
from tests.browser.chromium import Page
from tests.browser.conftest import Backend, Watch
from tests.manifest import balancing, endpoint, endpoint_slice, service

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


def put_many(backend: Backend, services: int) -> None:
    """So many Services with an endpoint each."""
    for number in range(services):
        name, address = f"service-{number:04}", f"10.96.{number // 250}.{number % 250}"
        backend.state.apply([Upsert(service(name, cluster_ips=[address]))])
        slices = endpoint_slice(name, [endpoint(f"10.244.{number // 250}.{number % 250}")])
        backend.state.apply([Upsert(slices)])
    backend.put()


def rows(page: Page) -> list[str]:
    script = """return [...document.querySelectorAll('#services tbody tr')]
        .map(r => r.dataset.key).filter(Boolean)"""
    return list(page.run(script))


def seen_rows(page: Page) -> list[str]:
    """Those on the screen."""
    script = """const top = document.querySelector('header').offsetHeight;
        return [...document.querySelectorAll('#services tr[data-key]')].filter(row => {
            const at = row.getBoundingClientRect();
            return at.top >= top && at.bottom <= innerHeight;
        }).map(row => row.dataset.key)"""
    return list(page.run(script))


def asked(backend: Backend, word: str, since: int = 0) -> list[str]:
    return [path for path in backend.asked[since:] if word in path]


# --- the overview -------------------------------------------------------------------------------


def test_an_overview_of_5000_services_finds_one_as_it_is_typed(
    backend: Backend, page: Page
) -> None:
    """The list is sent once and drawn as far as it is on the screen; typing asks nothing more."""
    put_many(backend, 5000)
    page.open()
    page.until(lambda: len(seen_rows(page)) > 5)
    assert len(rows(page)) < 60
    lists = [path for path in backend.asked if path == "/v1/services"]
    assert len(lists) == 1
    page.press("/", "service-4321")
    page.until(lambda: rows(page) == ["default/service-4321"])
    assert "1 of 5,000" in page.text
    assert [p for p in backend.asked if p == "/v1/services"] == lists


def test_what_has_not_changed_is_not_sent_again(backend: Backend, page: Page) -> None:
    """The second question is answered 304, and a change is shown all the same."""
    put_many(backend, 100)
    page.open()
    page.until(
        lambda: (
            len(asked(backend, "/v1/services")) >= 3 and backend.asked.count("/v1/services") >= 2
        )
    )
    script = """return performance.getEntriesByType('resource')
        .filter(e => e.name.endsWith('/v1/services')).map(e => e.responseStatus)"""
    assert page.until(lambda: len(found := page.run(script)) >= 2 and found) == [200, 304]
    backend.put(Delete(Service, Name("default", "service-0000")))
    page.until(lambda: rows(page)[0] == "default/service-0001")


def test_rows_are_drawn_and_counted_as_they_are_scrolled_to(backend: Backend, page: Page) -> None:
    put_many(backend, 2000)
    page.open()
    page.until(lambda: "default/service-0000" in seen_rows(page))
    page.until(lambda: asked(backend, "counters=true"))
    assert "service-1999" not in asked(backend, "counters=true")[-1]
    page.run("scrollTo(0, document.body.scrollHeight)")
    page.until(lambda: "default/service-1999" in seen_rows(page))
    assert len(rows(page)) < 60
    page.until(lambda: "service-1999" in asked(backend, "counters=true")[-1])
    assert "service-0000" not in asked(backend, "counters=true")[-1]
    numbers = page.run(
        """return [...document.querySelectorAll('#services tr[aria-rowindex]')]
        .map(r => [r.dataset.key, Number(r.getAttribute('aria-rowindex'))])"""
    )
    assert all(int(key.rpartition("-")[2]) + 2 == index for key, index in numbers)
    assert page.run("return document.getElementById('services').ariaRowCount") == "2001"


def test_new_connections_are_shown_by_second(backend: Backend, page: Page) -> None:
    put_web(backend)
    page.open()
    page.shows("default/web")
    cell = "return document.querySelector('#services tr[data-key] td:nth-child(6)').innerText"
    page.until(lambda: page.run(cell) == "0.0")
    backend.made += 1_000_000
    page.until(lambda: page.run(cell) not in ("", "0.0"))
    backend.api = Api(backend.sources._replace(counts=None, counts_of=None))
    page.open()
    page.shows("counts no connections")


def test_problems_come_first(backend: Backend, page: Page) -> None:
    """As do the Services that have one, and a filter leaves the others out."""
    put_many(backend, 50)
    backend.put(Upsert(service("zoo", cluster_ips=["10.96.9.1"], namespace="zoo")))
    backend.put(Upsert(service("copy", cluster_ips=["10.96.0.7"], namespace="xcopy")))
    page.open()
    page.until(lambda: rows(page)[:2] == ["xcopy/copy", "zoo/zoo"])
    page.shows("1 problem needs attention", "belongs to Service default/service-0007")
    heads = (
        "return [...document.querySelectorAll('h1, #problems, #tiles, #services')].map(e => e.id)"
    )
    assert page.run(heads) == ["", "problems", "tiles", "services"]
    page.run(
        "[...document.querySelectorAll('button')].find(b => /^With prob/.test(b.innerText)).click()"
    )
    page.until(lambda: rows(page) == ["xcopy/copy", "zoo/zoo"])


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
        if not found:
            page.shows("No Service matches")
        page.press(Keys.ESCAPE)
        page.until(lambda: len(rows(page)) == 2)
        page.run("document.activeElement.blur()")


def test_a_change_is_shown_without_a_reload(backend: Backend, page: Page) -> None:
    put_web(backend)
    page.open()
    page.shows("2 of 2")
    put_web(backend, ready=False)
    page.shows("1 of 2")
    backend.put(Delete(Service, Name("default", "web")))
    page.shows("There are no Services")


def test_a_hidden_page_asks_nothing_and_goes_on_when_it_is_seen(
    backend: Backend, page: Page
) -> None:
    put_web(backend)
    hide = """Object.defineProperty(document, 'hidden', {value: arguments[0], configurable: true});
        document.dispatchEvent(new Event('visibilitychange'))"""
    page.open()
    page.shows("2 of 2")
    page.run(hide, True)
    quiet = 0.0
    while quiet < 6:  # longer than each interval; what was under way has ended
        before = len(backend.asked)
        time.sleep(0.5)
        quiet = quiet + 0.5 if len(backend.asked) == before else 0.0
    put_web(backend, ready=False)
    page.run(hide, False)
    page.shows("1 of 2")


# --- one Service, history, explain, doctor -------------------------------------------------------


def test_a_services_endpoints_have_reasons_and_a_history(backend: Backend, page: Page) -> None:
    put_web(backend)
    put_web(backend, ready=False)
    page.open("#/services/default/web")
    page.shows("10.244.1.12:8080", "web-2", "not used, not ready", "used, ready")
    page.shows("endpoint changed", "ready before, not ready now")
    page.open("#/history")
    page.shows("default/web", "ready before, not ready now")


def test_an_algorithm_and_its_weights_are_shown(backend: Backend, page: Page) -> None:
    put_web(backend)
    page.open("#/services/default/web")
    page.shows("10.244.1.12:8080")
    assert "Weight" not in page.text
    backend.put(Upsert(web(annotations=balancing("weighted", weights="web-1=3,web-2=0"))))
    page.shows("endpoints by weight", "Weight", "drained: its weight is 0")
    weight = "return [...document.querySelectorAll('table[aria-label=Endpoints] td:last-child')]"
    assert sorted(page.run(f"{weight}.map(cell => cell.innerText)")) == ["0", "3"]
    backend.put(Upsert(web(annotations=balancing("source-hash"))))
    page.shows("endpoint by the client's address")


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


def test_connections_are_listened_to_from_start_until_the_view_is_left(
    backend: Backend, page: Page
) -> None:
    """Named with Service and pod, the newest first; what is lost is said."""
    put_web(backend)
    page.open("#/flows")
    page.shows("Not listening")
    assert not asked(backend, "/v1/flows")
    page.run("document.getElementById('listen').click()")
    page.until(lambda: backend.flows.listening)
    client, target = (
        target_of(bytes([10, 0, 0, 9]), 40000),
        target_of(bytes([10, 244, 1, 11]), 8080),
    )
    where = target_of(bytes([10, 96, 0, 10]), 80)
    backend.watch.made.put(NewConnection(6, client, where, target, client))
    page.shows("10.0.0.9:40000", "10.96.0.10:80", "default/web", "10.244.1.11:8080", "web-1")
    page.shows("Listening: 1 connection.")
    backend.watch.made.put(Lost(12))
    page.shows("12 were lost")
    for number in range(400):
        again = target_of(bytes([10, 0, 0, 8]), number)
        backend.watch.made.put(NewConnection(6, again, where, target, again))
    page.shows("401 connections, the last 300 are shown", "10.0.0.8:399")
    assert page.run("return document.querySelectorAll('main tbody tr').length") == 300
    page.open("#/history")
    page.until(lambda: not backend.flows.listening)


def test_flows_of_one_service_are_asked_for_by_name(backend: Backend, page: Page) -> None:
    put_web(backend)
    page.open("#/services/default/web")
    page.shows("Watch its connections")
    page.run(
        "[...document.querySelectorAll('a')].find(a => a.innerText.startsWith('Watch')).click()"
    )
    page.until(lambda: page.run("return document.activeElement.id") == "listen")
    page.press(Keys.ENTER)
    page.until(lambda: asked(backend, "service=default%2Fweb"))


def test_doctor_shows_what_to_do(backend: Backend, page: Page) -> None:
    backend.checks.append(Check("forward", "Forwarding", "failed", "is off", "sysctl -w x=1"))
    page.open("#/doctor")
    page.shows("Forwarding", "failed", "sysctl -w x=1")


# --- keyboard, screens, colours ------------------------------------------------------------------


def test_everything_can_be_reached_with_the_keyboard(backend: Backend, page: Page) -> None:
    """/ to the search, arrows along the rows, Enter into a Service, Escape back."""
    for number in range(5):
        backend.put(Upsert(service(f"s{number}", cluster_ips=[f"10.96.0.{number}"])))
    page.open()
    page.until(lambda: len(rows(page)) == 5)
    page.press("/")
    assert page.run("return document.activeElement.id") == "search"
    page.press(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_UP)
    focused = "return document.activeElement.closest('tr')?.dataset.key"
    assert page.run(focused) == "default/s1"
    page.press(Keys.ENTER)
    page.shows("default/s1", "All Services")
    assert page.run("return location.hash") == "#/services/default/s1"
    page.press(Keys.ESCAPE)
    page.until(lambda: len(rows(page)) == 5)
    page.open("#/doctor")
    page.shows("Look again")
    page.press("/")
    page.until(lambda: page.run("return document.activeElement.id") == "search")


def test_the_focus_stays_on_its_row_while_the_list_is_refreshed(
    backend: Backend, page: Page
) -> None:
    put_many(backend, 300)
    page.open()
    page.until(lambda: len(rows(page)) > 5)
    page.press("/", *[Keys.ARROW_DOWN] * 60)
    focused = "return document.activeElement.closest('tr')?.dataset.key"
    assert page.run(focused) == "default/service-0059"
    assert "default/service-0059" in seen_rows(page)
    before = len(backend.asked)
    both = [endpoint("10.244.9.9"), endpoint("10.244.9.8", ready=False)]
    backend.put(Upsert(endpoint_slice("service-0059", both)))
    page.shows("1 of 2")
    assert len(backend.asked) > before
    page.until(lambda: page.run(focused) == "default/service-0059")


ROUTES = (
    "",
    "#/services/default/web",
    "#/flows",
    "#/history",
    "#/doctor",
    "#/explain/10.96.0.10:80",
)


@pytest.mark.parametrize("route", ROUTES)
def test_every_control_has_a_name_and_every_view_a_heading(
    backend: Backend, page: Page, route: str
) -> None:
    """By the tree that the browser gives to screen readers."""
    put_web(backend)
    page.open(route)
    page.until(lambda: page.run("return document.querySelectorAll('h1').length") == 1)
    page.driver.execute_cdp_cmd("Accessibility.enable", {})
    tree = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    nodes = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in tree
        if not node["ignored"] and "role" in node
    ]
    controls = ("button", "link", "textbox", "searchbox", "table", "navigation", "list")
    assert not [role for role, name in nodes if role in controls[:-1] and not name.strip()]
    roles = [role for role, _ in nodes]
    assert roles.count("main") == roles.count("banner") == 1
    assert page.run("return document.documentElement.lang") == "en"
    current = "return document.querySelector('nav [aria-current=page]').innerText"
    assert page.run(current) in ("Services", "Flows", "History", "Doctor", "Explain")


@pytest.mark.parametrize("route", ROUTES)
def test_a_narrow_screen_needs_no_sideways_scrolling(
    backend: Backend, page: Page, route: str
) -> None:
    put_web(backend)
    size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": False}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page.open(route)
        page.until(lambda: page.run("return document.querySelectorAll('h1').length") == 1)
        assert page.run("return document.documentElement.scrollWidth") <= 360
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


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
    theme = "return document.documentElement.dataset.theme"
    before = page.run(theme)
    page.run("document.getElementById('theme').click()")
    assert page.run(theme) != before
    page.open()
    assert page.run(theme) != before
    page.run("localStorage.clear()")


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
    for route in ROUTES:
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


# --- when there is no answer ---------------------------------------------------------------------


def test_without_the_agent_the_last_answer_stays_with_a_word(backend: Backend, page: Page) -> None:
    """And when it answers again, the warning is removed."""
    put_web(backend)
    page.open()
    page.shows("default/web", "live")
    backend.__exit__()
    page.shows("The agent does not answer. What you see is its last answer, of", "default/web")
    backend.restart()
    put_web(backend, ready=False)
    page.shows("1 of 2", "live")
    assert "does not answer" not in page.text


@pytest.mark.parametrize("route", ROUTES)
def test_an_agent_that_cannot_answer_yet_says_why_in_every_view(
    backend: Backend, page: Page, route: str
) -> None:
    body = b'{"error": "the agent has not read everything yet"}'
    backend.broken = HttpAnswer(503, (("Content-Type", "application/json"),), body)
    page.open(route)
    if route == "#/flows":
        page.run("document.getElementById('listen').click()")
    page.shows("the agent has not read everything yet")
    backend.broken = None


def test_an_agent_that_is_not_programmed_is_the_headline(backend: Backend, page: Page) -> None:
    backend.api = Api(backend.sources._replace(heartbeat=Heartbeat()))
    page.open()
    page.shows("This node is not programmed")


def test_an_api_server_that_is_away_is_the_headline_and_an_old_one_is_not(
    backend: Backend, page: Page
) -> None:
    """A resource that an older API server does not have is named, and is no alarm."""
    backend.watches.append(Watch("servicecidrs", 0))
    cidrs, services = backend.watches[-1], backend.watches[0]
    cidrs.state, cidrs.last_valid = "backing off", None
    page.open()
    page.shows("Everything is programmed", "servicecidrs: backing off, last answer never")
    services.state = "backing off"
    page.shows("The API server does not answer", "The node forwards by its last valid state")


def test_a_service_that_does_not_exist_is_said_with_a_proposal(
    backend: Backend, page: Page
) -> None:
    put_web(backend)
    page.open("#/services/default/wbe")
    page.shows("there is no Service default/wbe; did you mean default/web?")
