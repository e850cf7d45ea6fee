"""The watchdog hears from us as long as requests end, or zones are what they wait for."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserver.heartbeat import Heartbeat, Progress
from tests.nbdserver.volumes import until

QUIET = Progress(0, 0, False, 50.0, "1 VDIs, 0 connections")


class Manager:
    """The service manager's end of the socket, and the world that the heart looks at."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.progress = QUIET
        self.now = 0.0

    def heard(self) -> list[str]:
        found: list[str] = []
        while True:
            try:
                found += self.socket.recv(4096).decode().split("\n")
            except BlockingIOError:
                return found

    def heart(self) -> Heartbeat:
        return Heartbeat(lambda: self.progress, lambda: self.now)


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "60000000")
        monkeypatch.delenv("WATCHDOG_PID", raising=False)
        yield Manager(sock)


def test_status_is_said_when_it_changes(manager: Manager) -> None:
    heart = manager.heart()
    assert heart.beat()
    assert manager.heard() == ["STATUS=1 VDIs, 0 connections", "WATCHDOG=1"]
    assert heart.beat()
    assert manager.heard() == ["WATCHDOG=1"]


def test_requests_that_do_not_end_stop_the_heart_and_ends_start_it_again(manager: Manager) -> None:
    heart = manager.heart()
    manager.progress = QUIET._replace(ended=10, in_flight=3)
    assert heart.beat()
    manager.heard()
    manager.now = 60.0
    assert heart.beat(), "not before the watchdog's time is over"
    assert manager.heard() == ["WATCHDOG=1"]
    manager.now = 61.0
    assert not heart.beat()
    assert manager.heard() == ["STATUS=no request has ended for 61 s, 3 are in flight"]
    manager.progress = manager.progress._replace(ended=11)
    assert heart.beat()
    assert "WATCHDOG=1" in manager.heard()


@pytest.mark.parametrize(
    "progress",
    [
        QUIET._replace(ended=10),
        QUIET._replace(ended=10, in_flight=3, waits_for_zones=True),
        QUIET._replace(ended=10, in_flight=3, bound_seconds=1e6),
    ],
    ids=["nothing to do", "zones don't answer", "the store may take so long"],
)
def test_what_a_restart_would_not_mend_is_no_standstill(manager: Manager, progress: Progress) -> None:
    heart = manager.heart()
    manager.progress = progress
    for _ in range(10):
        assert heart.beat()
        manager.now += 100.0
    assert manager.heard().count("WATCHDOG=1") == 10


def test_without_a_watchdog_only_status_is_said(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WATCHDOG_USEC")
    assert manager.heart().beat()
    assert manager.heard() == ["STATUS=1 VDIs, 0 connections"]


async def test_it_beats_by_itself(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "3000")
    heart = manager.heart()
    heart.start()
    beats = 0

    def heard_three() -> bool:
        nonlocal beats
        beats += manager.heard().count("WATCHDOG=1")
        return beats >= 3

    await until(heard_three)
    heart.stop()


async def test_nobody_listens_nobody_speaks(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET")
    heart = manager.heart()
    heart.start()
    heart.stop()
    assert manager.heard() == []
