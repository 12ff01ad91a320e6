"""Run the HTTP/1 tests under both event loops: services run under uvloop, most tests under asyncio's."""

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop

BOTH = {"test_http1.py"}


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Return the event loops under which a test is to run."""
    factories: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
    if item.path.name in BOTH:
        factories["uvloop"] = uvloop.new_event_loop
    return factories
