"""What the service manager hears while we serve: a line of status, and "WATCHDOG=1" while the data path moves.

The data path stands still if requests are in flight and none of them ends for the watchdog's time. A restart helps
against an error of ours, and costs every client what it has not flushed. It can't help against zones that don't answer,
so while the store waits for those nothing counts as standing still.
"""

import asyncio
import os
from collections.abc import Callable
from typing import Final, NamedTuple

from nbdserver.systemd import notify, watchdog_seconds

STATUS_SECONDS_MAX: Final = 10.0
BEATS_PER_WATCHDOG: Final = 3


class Progress(NamedTuple):
    """What the data path has done. ended: requests since the start. in_flight: those that the store works on.
    waits_for_zones: it may not be its fault. bound_seconds: how long the store may work on a request in good order."""

    ended: int
    in_flight: int
    waits_for_zones: bool
    bound_seconds: float
    status: str


class Heartbeat:
    """Owns one task from `start` to `stop`. progress: asked at every beat. clock: monotonic seconds."""

    def __init__(self, progress: Callable[[], Progress], clock: Callable[[], float]) -> None:
        self._progress = progress
        self._clock = clock
        self.watchdog_seconds = watchdog_seconds(os.environ, os.getpid())
        self._ended = -1
        self._moved_at = clock()
        self._said = ""
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Beat from now on, if there is a manager to hear it."""
        if os.environ.get("NOTIFY_SOCKET"):
            self._task = asyncio.get_running_loop().create_task(self._run())

    def stop(self) -> None:
        """Idempotent."""
        if self._task is not None:
            self._task.cancel()

    def beat(self) -> bool:
        """Say how things are; whether the data path moves."""
        progress = self._progress()
        now = self._clock()
        if progress.ended != self._ended or not progress.in_flight or progress.waits_for_zones:
            self._ended = progress.ended
            self._moved_at = now
        watchdog = self.watchdog_seconds
        moves = watchdog is None or now - self._moved_at <= max(watchdog, progress.bound_seconds)
        status = progress.status
        if not moves:
            status = f"no request has ended for {now - self._moved_at:.0f} s, {progress.in_flight} are in flight"
        states = [f"STATUS={status}"] if status != self._said else []
        if watchdog is not None and moves:
            states.append("WATCHDOG=1")
        if states:
            notify(*states)
        self._said = status
        return moves

    async def _run(self) -> None:
        watchdog = self.watchdog_seconds
        pause = STATUS_SECONDS_MAX if watchdog is None else min(STATUS_SECONDS_MAX, watchdog / BEATS_PER_WATCHDOG)
        while True:
            self.beat()
            await asyncio.sleep(pause)
