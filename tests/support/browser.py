"""A real headless Chromium, driven through ChromeDriver."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.common.exceptions import ElementClickInterceptedException, StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from tests.conftest import require

DEADLINE = 15.0


class Browser:
    """One window; everything that is read from the page is waited for."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        self.driver.get(url)

    def one(self, css: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def text(self, css: str) -> str:
        """Return the text of the last element that matches, '' while there is none; read in one step."""
        found = self.driver.execute_script(
            "return [...document.querySelectorAll(arguments[0])].at(-1)?.textContent ?? ''", css
        )
        return str(found)

    def visible(self, css: str) -> bool:
        return any(element.is_displayed() for element in self.driver.find_elements(By.CSS_SELECTOR, css))

    def until(self, condition: Callable[[], Any], what: str = "") -> Any:
        """Wait until ``condition()`` is truthy and return its value."""
        wait = WebDriverWait(self.driver, DEADLINE, poll_frequency=0.05)
        return wait.until(lambda _driver: condition(), what or f"{condition}")

    def until_text(self, css: str, wanted: str) -> None:
        self.until(lambda: wanted in self.text(css), f"{css} did not show {wanted!r} but {self.text(css)[-300:]!r}")

    def click(self, css: str) -> None:
        """Click the matching element; repeat while a stream moves the page and another element covers it."""

        def clicked() -> bool:
            try:
                self.one(css).click()
            except (ElementClickInterceptedException, StaleElementReferenceException):
                return False
            return True

        self.until(lambda: self.visible(css), f"{css} is not shown")
        self.until(clicked, f"{css} stays covered")

    def size(self, width: int, height: int) -> None:
        """Set the size of the page itself, as a phone or a desktop has it."""
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )

    def prefer(self, scheme: str) -> None:
        """Prefer the ``light`` or the ``dark`` colour scheme, as the operating system would."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def complaints(self) -> list[str]:
        """Return the browser's errors since the last call: script errors, refused sources."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def keep(self, name: str) -> None:
        """Keep a picture of the page where ``TAILRACE_SCREENSHOTS`` names a folder."""
        if folder := os.environ.get("TAILRACE_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.driver.save_screenshot(str(Path(folder) / f"{name}.png"))


def _options() -> webdriver.ChromeOptions:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    options.add_argument("--headless=new")
    options.add_argument("--disable-gpu")
    options.add_argument("--disable-dev-shm-usage")
    options.add_argument("--hide-scrollbars")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium refuses to sandbox what root runs
    options.accept_insecure_certs = True  # those of tests, made a moment ago
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return options


@pytest.fixture(scope="session")
def chromium() -> Iterator[webdriver.Chrome]:
    options = _options()
    chromedriver = shutil.which("chromedriver")
    require(options.binary_location and chromedriver, "needs chromium and chromedriver (Debian: chromium-driver)")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=str(chromedriver)))
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium: webdriver.Chrome) -> Iterator[Browser]:
    """A browser with one blank window and nothing remembered."""
    opened = Browser(chromium)
    opened.size(1280, 860)
    opened.complaints()
    yield opened
    for handle in chromium.window_handles[1:]:
        chromium.switch_to.window(handle)
        chromium.close()
    chromium.switch_to.window(chromium.window_handles[0])
    chromium.execute_script("try { localStorage.clear() } catch {}")
    chromium.get("about:blank")
