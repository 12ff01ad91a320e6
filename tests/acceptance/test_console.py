"""The console page in a real browser."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import httpx
import pytest
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from bench.processes import free_port
from tests.support.fake_delivery import STORY, WORDS, FakeDelivery, fake_delivery

if TYPE_CHECKING:
    from tests.support.browser import Browser

pytest_plugins = ("tests.support.browser",)
pytestmark = pytest.mark.browser

STATE = ".generation:last-child .badge"
TEXT = ".generation:last-child .text"


@pytest.fixture
def server() -> Iterator[FakeDelivery]:
    with fake_delivery() as started:
        yield started


@pytest.fixture(params=["stand-in", "real"])
def console_url(request: pytest.FixtureRequest) -> str:
    """Return the URL of the page, on the fake server or on the running service."""
    if request.param == "stand-in":
        return str(request.getfixturevalue("server").url)
    return str(request.getfixturevalue("running"))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run the real services on free ports, or use the URL in ``TAILRACE_CONSOLE_URL``."""
    named = os.environ.get("TAILRACE_CONSOLE_URL")
    if named:
        yield named.rstrip("/")
        return
    port = free_port()
    flags = ["--port", str(port), "--grpc-port", "0", "--billing-port", "0", "--producer-port", "0", "--nats-port", "0"]
    data = tmp_path_factory.mktemp("console")
    process = subprocess.Popen(
        [sys.executable, "-m", "services.standalone.cli", "up", *flags, "--data", str(data)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while True:
            try:
                if httpx.get(f"{url}/readyz", timeout=2).status_code == 200:
                    break
            except httpx.HTTPError:
                assert time.monotonic() < deadline, "the service did not start"
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def ask(browser: "Browser", model: str, question: str = "Tell me a story.") -> None:
    browser.until(lambda: len(browser.driver.find_elements("css selector", "#model option")) > 1)
    Select(browser.one("#model")).select_by_value(model)
    browser.one("#question").send_keys(question, Keys.ENTER)


def number(browser: "Browser", css: str) -> int:
    return int(browser.text(css).replace(",", ""))


def session_of(browser: "Browser") -> str:
    browser.until(lambda: "session=" in browser.driver.current_url)
    return browser.driver.current_url.split("session=")[1]


def test_a_question_streams_to_its_end_with_counts_and_billing(browser: "Browser", console_url: str) -> None:
    browser.open(console_url)
    ask(browser, "scripted/story")
    browser.until_text(STATE, "Completed")
    assert browser.text(TEXT).strip()
    assert browser.text(".generation:last-child .prompt") == "Tell me a story."
    assert "out" in browser.text(".figure-counted dd")
    browser.until_text(".figure-reported dd", "out")
    browser.until_text(".figure-billing dd", "Matched")
    assert number(browser, "#received") > 3
    assert number(browser, "#duplicates") == 0
    browser.until_text("#sessions a[aria-current]", "1 answer")
    assert browser.complaints() == []
    browser.keep("completed")


def test_a_second_tab_shows_the_same_session_from_its_address(browser: "Browser", console_url: str) -> None:
    browser.open(console_url)
    ask(browser, "scripted/story")
    browser.until_text(STATE, "Completed")
    first = browser.text(TEXT)
    browser.click("#second-tab")
    browser.until(lambda: len(browser.driver.window_handles) == 2)
    browser.driver.switch_to.window(browser.driver.window_handles[1])
    browser.until_text(TEXT, first)
    assert browser.text(TEXT) == first
    browser.until_text(STATE, "Completed")
    assert browser.text(".generation:last-child .prompt") == "Tell me a story."


def test_drop_and_resume_while_the_answer_arrives_loses_and_doubles_nothing(
    browser: "Browser", console_url: str
) -> None:
    browser.open(console_url)
    ask(browser, "scripted/story")
    browser.until(lambda: number(browser, "#received") > 2)
    browser.click("#drop")
    browser.until_text("#link-state", "Dropped")
    browser.click("#resume")
    browser.until_text(STATE, "Completed")
    resumed = browser.text(TEXT)
    assert number(browser, "#duplicates") == 0
    assert not browser.visible("#missing-pair")
    browser.driver.refresh()
    browser.until_text(TEXT, resumed)
    assert browser.text(TEXT) == resumed


def test_drop_closes_the_stream_and_resume_continues_after_the_last_cursor(
    browser: "Browser", server: FakeDelivery
) -> None:
    browser.open(server.url)
    ask(browser, "scripted/held")
    browser.until_text(TEXT, WORDS[len(WORDS) // 2 - 1])
    cursor = browser.one("#cursor").get_attribute("title")
    browser.click("#drop")
    browser.until(lambda: not server._readers, "the connection was not closed")
    server.release()
    browser.until(lambda: server.sessions[session_of(browser)].log[-1]["type"] == "completed")
    assert browser.text(TEXT).strip() != STORY
    browser.keep("dropped")
    browser.click("#resume")
    browser.until_text(STATE, "Completed")
    assert server.resumed_after == [None, cursor]
    assert browser.text(TEXT).strip() == STORY
    assert number(browser, "#duplicates") == 0


def test_a_lost_connection_reconnects_automatically(browser: "Browser", server: FakeDelivery) -> None:
    browser.open(server.url)
    ask(browser, "scripted/held")
    browser.until_text(TEXT, WORDS[0])
    server.cut()
    browser.until_text("#link-state", "Lost")
    browser.until_text("#link-state", "Live")
    server.release()
    browser.until_text(STATE, "Completed")
    assert browser.text(TEXT).strip() == STORY
    assert server.resumed_after[-1] is not None


def test_the_page_resumes_after_bye(browser: "Browser", server: FakeDelivery) -> None:
    browser.open(server.url)
    ask(browser, "scripted/held")
    browser.until_text(TEXT, WORDS[0])
    server.dismiss("drain")
    browser.until(lambda: len(server.resumed_after) == 2)
    server.release()
    browser.until_text(STATE, "Completed")
    assert browser.text(TEXT).strip() == STORY
    assert number(browser, "#duplicates") == 0


def test_repeated_events_are_dropped_and_counted(browser: "Browser", server: FakeDelivery) -> None:
    server.repeat_on_resume = 3
    browser.open(server.url)
    ask(browser, "scripted/held")
    browser.until_text(TEXT, WORDS[4])
    browser.click("#drop")
    browser.click("#resume")
    server.release()
    browser.until_text(STATE, "Completed")
    assert browser.text(TEXT).strip() == STORY
    assert number(browser, "#duplicates") == 3


def test_cancel_ends_the_answer(browser: "Browser", console_url: str) -> None:
    browser.open(console_url)
    browser.until(lambda: browser.text("#model"))
    ask(browser, "scripted/held" if "scripted/held" in browser.text("#model") else "scripted/story")
    browser.until(lambda: browser.text(TEXT))
    browser.click(".cancel")
    browser.until_text(STATE, "Cancelled")
    assert "Stopped by request" in browser.text(".outcome")
    browser.until_text(".figure-billing dd", "Partial")
    assert not browser.visible(".cancel")


def test_reasoning_tool_calls_and_notices_have_their_own_shape(browser: "Browser", server: FakeDelivery) -> None:
    browser.open(server.url)
    ask(browser, "scripted/thinking", "What is the weather in Bern?")
    browser.until_text(STATE, "Completed")
    browser.until_text(".tool pre", '"city": "Bern"')
    assert browser.text(".tool strong") == "forecast"
    assert "I will call the tool" in browser.text(".reasoning div")
    assert browser.one(".reasoning").get_attribute("open") is None
    assert "busy" in browser.text(".notices li")
    browser.keep("thinking")


def test_images_sources_and_refusals_are_shown_without_running_scripts(
    browser: "Browser", server: FakeDelivery
) -> None:
    browser.open(server.url)
    ask(browser, "scripted/everything")
    browser.until_text(STATE, "Completed")
    assert "I cannot <img" in browser.text(".refusal .text")
    browser.until(lambda: browser.driver.execute_script("return document.querySelector('.file img')?.naturalWidth > 0"))
    assert len(browser.driver.find_elements("css selector", ".file img")) == 1, "an SVG is offered and not drawn"
    assert "image/svg+xml" in browser.text(".file .binary")
    links = [a.get_attribute("href") for a in browser.driver.find_elements("css selector", ".sources a")]
    assert links == ["https://h.example/a"], "an address that would run is no link"
    assert "[2] Source <img" in browser.text(".sources li")
    assert "executed_tools" in browser.text(".extra summary")
    assert "onerror" in browser.text(".extra pre")
    assert "run" not in browser.driver.title
    assert browser.complaints() == []
    browser.keep("everything")


def test_a_restart_clears_the_text_shown_before(browser: "Browser", server: FakeDelivery) -> None:
    browser.open(server.url)
    ask(browser, "scripted/restarting")
    browser.until_text(STATE, "Completed")
    assert browser.text(TEXT) == "A fresh start."
    assert "Started again" in browser.text(".notices li")


def test_a_failure_shows_its_code_and_message(browser: "Browser", server: FakeDelivery) -> None:
    browser.open(server.url)
    ask(browser, "scripted/failing")
    browser.until_text(STATE, "Failed")
    assert browser.text(".outcome code") == "upstream_cut_off"
    assert "without its end marker" in browser.text(".outcome")
    browser.keep("failed")


def test_a_refused_question_shows_the_problem_and_stays_in_the_form(browser: "Browser", server: FakeDelivery) -> None:
    browser.open(server.url)
    browser.until(lambda: len(browser.driver.find_elements("css selector", "#model option")) > 1)
    Select(browser.one("#model")).select_by_visible_text("Other …")
    browser.one("#other-model").send_keys("nobody/knows")
    browser.one("#question").send_keys("Hello?")
    browser.click("#ask")
    browser.until_text("#problem-detail", "nobody/knows")
    assert "422" in browser.text("#problem-code")
    assert browser.one("#question").get_attribute("value") == "Hello?"
    browser.until(lambda: browser.one("#ask").is_enabled())
    browser.click("#ask")
    browser.until(lambda: len(server.requests) == 2)
    assert server.requests[0]["key"] == server.requests[1]["key"]


def test_an_expired_cursor_is_reported_with_a_button_to_start_over(browser: "Browser", server: FakeDelivery) -> None:
    browser.open(server.url)
    ask(browser, "scripted/story")
    browser.until_text(STATE, "Completed")
    browser.click("#drop")
    server.refusal = (410, "cursor-expired", "the log no longer keeps this cursor")
    browser.click("#resume")
    browser.until_text("#link-state", "Refused")
    assert "410" in browser.text("#problem-code")
    server.refusal = None
    browser.click("#problem-action")
    browser.until(lambda: browser.text(TEXT).strip() == STORY, "the story did not come again")
    browser.until_text(STATE, "Completed")


def test_an_answer_with_an_expired_beginning_is_shown_from_its_first_kept_event(
    browser: "Browser", server: FakeDelivery
) -> None:
    server.seed(
        "old",
        [
            {"type": "delta", "generation": "g", "seq": 7, "text": "the end.", "tokens": 9},
            {"type": "completed", "generation": "g", "seq": 8},
        ],
        {"generation": "g", "state": "completed", "model": "scripted/story", "created_at": 1.0},
    )
    browser.open(f"{server.url}/?session=old")
    browser.until_text(STATE, "Completed")
    browser.until_text(TEXT, "the end.")
    browser.until_text(".outcome", "no longer kept")
    assert browser.text(TEXT).strip() == "the end."
    assert browser.complaints() == []


def test_earlier_turns_are_sent_with_the_next_question(browser: "Browser", server: FakeDelivery) -> None:
    browser.open(server.url)
    ask(browser, "scripted/story")
    browser.until_text(STATE, "Completed")
    browser.until(lambda: browser.one("#question").get_attribute("value") == "")
    ask(browser, "scripted/failing", "And then?")
    browser.until_text(STATE, "Failed")
    roles = [message["role"] for message in server.requests[1]["messages"]]
    assert roles == ["user", "assistant", "user"]


def test_empty_states_explain_themselves(browser: "Browser", server: FakeDelivery) -> None:
    browser.open(server.url)
    browser.until(lambda: browser.visible("#welcome"))
    assert browser.visible("#no-sessions")
    browser.keep("welcome")
    browser.click(".example")
    assert browser.one("#question").get_attribute("value")
    browser.open(f"{server.url}/?session=nobody")
    browser.until(lambda: browser.visible("#empty"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("name", "size"), [("desktop", (1280, 860)), ("phone", (390, 800))])
def test_nothing_overflows_in_any_width_or_theme(
    browser: "Browser", server: FakeDelivery, scheme: str, name: str, size: tuple[int, int]
) -> None:
    browser.prefer(scheme)
    browser.size(*size)
    browser.open(server.url)
    ask(browser, "scripted/thinking", "What is the weather in Bern?")
    browser.until_text(".figure-billing dd", "Matched")
    ask(browser, "scripted/held", "And a story, please.")
    browser.until_text(TEXT, WORDS[4])
    browser.keep(f"{name}-{scheme}")
    assert browser.driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.complaints() == []


def test_the_theme_is_chosen_and_remembered(browser: "Browser", server: FakeDelivery) -> None:
    browser.prefer("light")
    browser.open(server.url)
    paper = "return getComputedStyle(document.body).backgroundColor"
    light = browser.driver.execute_script(paper)
    browser.click("#theme")
    browser.click("#theme")
    assert browser.text("#theme-name") == "Dark"
    dark = browser.driver.execute_script(paper)
    assert dark != light
    browser.driver.refresh()
    assert browser.driver.execute_script(paper) == dark


def test_the_keyboard_reaches_everything_on_a_phone(browser: "Browser", server: FakeDelivery) -> None:
    browser.size(390, 800)
    server.seed("earlier", [], {"generation": "g", "state": "completed", "model": "m", "created_at": 1.0})
    browser.open(server.url)
    browser.until(lambda: browser.driver.switch_to.active_element.get_attribute("id") == "question")
    assert not browser.visible("#sessions a")
    browser.one("#menu").send_keys(Keys.ENTER)
    browser.until(lambda: browser.visible("#sessions a"))
    browser.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert browser.one("#menu").get_attribute("aria-expanded") == "false"
    assert browser.driver.switch_to.active_element.get_attribute("id") == "menu"
