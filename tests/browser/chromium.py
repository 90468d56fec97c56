"""Chromium without a screen, and a page in it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PATIENCE = 20.0


def lacks() -> str:
    """What is missing here to run it, and how to get it; "" if nothing is."""
    if find_spec("selenium") is None:
        return "needs selenium, the extra `browser`"
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        return "needs chromium and chromedriver (tools/need-test-tools)"
    return ""


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A browser with an empty profile, driven by selenium. It asks nothing of its maker."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (
        *("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run"),
        *("disable-background-networking", "disable-component-update", "disable-sync"),
        *("no-proxy-server", "window-size=1280,800", f"user-data-dir={profile}"),
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    with webdriver.Chrome(options=options, service=service) as driver:
        yield driver


class Page:
    """The page in a browser."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver = driver
        self.url = url

    def open(self, route: str = "") -> None:
        self.driver.get("about:blank")
        self.driver.get(self.url + route)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    @property
    def text(self) -> str:
        return str(self.run("return document.body.innerText"))

    def until(self, condition: Callable[[], Any]) -> Any:
        """The first true value of a condition."""
        deadline = time.monotonic() + PATIENCE
        while not (found := condition()):
            assert time.monotonic() < deadline, self.text[:2000]
            time.sleep(0.01)
        return found

    def shows(self, *words: str) -> None:
        """Waits until the page has all these words."""
        self.until(lambda: all(word in self.text for word in words))

    def press(self, *keys: str) -> None:
        """Keys for whatever has the focus."""
        for key in keys:
            self.driver.switch_to.active_element.send_keys(key)

    def errors(self) -> list[str]:
        """What the browser complains about."""
        return [entry["message"] for entry in self.driver.get_log("browser")]
