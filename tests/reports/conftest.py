"""Fixtures of tests that look at served runs in a browser."""

from collections.abc import Generator

import pytest

from llmevo.reports.web import followed
from llmevo.reports.web.server import TOKEN
from support.browser import Page, browser


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that looks often for what is new, and asks for no token."""
    monkeypatch.delenv(TOKEN, raising=False)
    for name, seconds in (("POLL", 0.1), ("IDLE", 0.1), ("REFRESH", 0.3)):
        monkeypatch.setattr(followed, name, seconds)


@pytest.fixture(scope="module")
def window() -> Generator[Page]:
    with browser() as page:
        yield page
