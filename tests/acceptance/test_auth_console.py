"""Test the console with required credentials, in a real browser: a key, tickets for its streams, and their expiry."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from selenium.webdriver.common.keys import Keys

from services.kit.jetstream.broker import Broker
from tests.support.credentials import guarded, make_key
from tests.support.delivery_server import Stage
from tests.support.producer_worker import producing

if TYPE_CHECKING:
    from tests.support.browser import Browser

pytest_plugins = ("tests.support.browser",)
pytestmark = pytest.mark.browser


@pytest.fixture
async def stage(broker: Broker, nats_url: str, tmp_path: Path) -> AsyncIterator[Stage]:
    async with guarded(nats_url, tmp_path, console=True) as running, producing(broker):
        yield running


async def test_the_page_asks_for_a_key_and_streams_with_tickets(stage: Stage, browser: "Browser") -> None:
    good = await make_key(stage, "start", "read", "cancel")

    def visit() -> str:
        browser.open(stage.url)
        browser.until(lambda: browser.visible("#key-dialog"))
        browser.one("#key").send_keys("tr_abcdef_" + "x" * 43, Keys.ENTER)
        browser.until_text("#key-fault", "not valid")
        assert browser.visible("#key-dialog")
        browser.one("#key").send_keys(good["key"], Keys.ENTER)
        browser.until(lambda: not browser.visible("#key-dialog"))
        browser.complaints()  # the refusal above
        browser.one("#question").send_keys("Tell me", Keys.SHIFT, Keys.ENTER, Keys.NULL, "a story.", Keys.ENTER)
        browser.until_text(".generation:last-child .badge", "Completed")
        browser.keep("key")
        return str(browser.driver.execute_script("return performance.getEntries().map((e) => e.name).join(' ')"))

    addresses = await asyncio.to_thread(visit)
    assert "/v1/tickets" in addresses
    assert good["key"] not in addresses
    assert good["key"].split("_", 2)[2] not in await asyncio.to_thread(lambda: browser.driver.page_source)
    assert await asyncio.to_thread(browser.complaints) == []

    def second_tab() -> None:
        first = browser.driver.current_window_handle
        browser.driver.switch_to.new_window("tab")
        try:
            browser.open(stage.url)
            browser.until(lambda: browser.text("#sessions li"))
            assert not browser.visible("#key-dialog")
        finally:
            browser.driver.close()
            browser.driver.switch_to.window(first)

    await asyncio.to_thread(second_tab)
    stored = await asyncio.to_thread(lambda: browser.driver.execute_script("return Object.keys(localStorage).join()"))
    assert "key" not in stored
