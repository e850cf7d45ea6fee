"""Log lines that clients cause: the first at once, the others counted."""

import asyncio
import logging

import pytest

from nbdserver import complaints
from nbdserver.complaints import KINDS_MAX, Complaints
from tests.conftest import ExpectedWarnings

LOG = logging.getLogger("tests.complaints")


@pytest.fixture(autouse=True)
def _allowed(expected_warnings: ExpectedWarnings) -> None:
    expected_warnings.allow("export|suppressed")


async def test_a_flood_is_one_line_and_a_count(caplog: pytest.LogCaptureFixture) -> None:
    complain = Complaints(LOG)
    begun = []
    begin = complain._begin
    complain._begin = lambda kind, text: (begin(kind, text), begun.append((kind, text)))
    for _ in range(7000):
        complain("open", "export refused name=%s", "x")
    assert caplog.messages == ["export refused name=x"]
    complain._end(*begun.pop())
    assert caplog.messages[1:] == ["export refused name=x (6999 more suppressed in 10 s)"]
    complain("open", "export refused name=%s", "x")
    assert len(caplog.messages) == 2, "the count was a line of this kind, too"
    complain._end(*begun.pop())
    assert caplog.messages[2:] == ["export refused name=x (1 more suppressed in 10 s)"]
    complain._end(*begun.pop())
    assert not begun
    assert len(caplog.messages) == 3, "nothing came up, nothing is said"
    complain("open", "export refused name=%s", "x")
    assert caplog.messages[3:] == ["export refused name=x"]


async def test_the_count_comes_by_itself(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(complaints, "COMPLAINT_SECONDS", 0.01)
    ended = asyncio.Event()
    complain = Complaints(LOG)
    monkeypatch.setattr(Complaints, "_end", lambda self, kind, text: ended.set())
    complain("open", "export refused")
    async with asyncio.timeout(20):
        await ended.wait()


async def test_kinds_don_t_hide_each_other(caplog: pytest.LogCaptureFixture) -> None:
    complain = Complaints(LOG)
    for name in "abab":
        complain(("open", name), "export %s", name)
    assert caplog.messages == ["export a", "export b"]


async def test_kinds_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    complain = Complaints(LOG)
    for number in range(KINDS_MAX + 50):
        complain(number, "export %d", number)
    assert len(caplog.messages) == len(complain._suppressed) == KINDS_MAX + 1
