"""How fast work in the background goes: at most at a rate that somebody sets, and making way for clients."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final

from objstore.clock import Clock
from objstore.errors import InvalidRequest
from objstore.units import MIB, TIB, format_size

RATE_MIN: Final = 1 * MIB
RATE_MAX: Final = 1 * TIB
BURST_SECONDS: Final = 0.25
REQUESTS_PER_SECOND: Final = 8
"""Clients that make fewer don't count as active."""
LOOK_SECONDS: Final = 0.05
"""Least time over which requests are counted."""
REST_SECONDS: Final = 0.25
"""Who rests looks so often whether clients are still active."""


def check_rate(bytes_per_second: int) -> None:
    """InvalidRequest unless a rate is 0 (no limit) or RATE_MIN to RATE_MAX."""
    if bytes_per_second and not RATE_MIN <= bytes_per_second <= RATE_MAX:
        raise InvalidRequest(
            f"a rate of {bytes_per_second} bytes a second is not possible: 0 (no limit), or {format_size(RATE_MIN)} to "
            f"{format_size(RATE_MAX)}"
        )


class Pace:
    """Who takes bytes waits until they are due. Touched by the event loop only. rate: bytes a second, 0 = no limit."""

    def __init__(self, clock: Clock, rate: int = 0) -> None:
        check_rate(rate)
        self._clock = clock
        self.rate = rate
        self._due = clock.monotonic()
        self._changed = asyncio.Event()

    def set_rate(self, rate: int) -> None:
        """From now on, for those who wait too. InvalidRequest."""
        check_rate(rate)
        self.rate = rate
        self._due = min(self._due, self._clock.monotonic())
        self._changed.set()

    def release(self) -> None:
        """Let everybody who waits go."""
        self.rate = 0
        self._changed.set()

    async def take(self, count_bytes: int) -> None:
        """Wait until so many bytes may go. What nobody took in time is lost, but for a quarter of a second's."""
        loop = asyncio.get_running_loop()
        while self.rate:
            now = self._clock.monotonic()
            if self._due <= now:
                self._due = max(self._due, now - BURST_SECONDS) + count_bytes / self.rate
                return
            self._changed.clear()
            timer = loop.call_later(self._due - now, self._changed.set)
            await self._changed.wait()
            timer.cancel()


class Courtesy:
    """Work in the background takes only a share of the time while clients are active, all of it while they are not.

    Which requests suffer from it, and how much, is then bounded by how long it works at all: percentiles below
    1 - share don't change, whatever the device does. Touched by the event loop only.
    """

    def __init__(self, clock: Clock, requests: Callable[[], int], share: float) -> None:
        """requests: how many clients have made so far. share: of the time, while they make some."""
        self._clock = clock
        self._requests = requests
        self._share = share
        self._seen = requests()
        self._looked = clock.monotonic()
        self._crowded = False
        self._released = asyncio.Event()

    def crowded(self) -> bool:
        """Whether clients are active: they have made REQUESTS_PER_SECOND or more, on average, since the last look."""
        elapsed = self._clock.monotonic() - self._looked
        if elapsed >= LOOK_SECONDS:
            seen = self._requests()
            self._crowded = seen - self._seen >= REQUESTS_PER_SECOND * elapsed
            self._seen = seen
            self._looked += elapsed
        return self._crowded

    async def make_way(self, worked_seconds: float) -> None:
        """After so much work: rest until it was no more than the share, or until clients are quiet."""
        until = self._clock.monotonic() + worked_seconds * (1 / self._share - 1)
        while (left := until - self._clock.monotonic()) > 0 and self.crowded() and not self._released.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._released.wait(), min(left, REST_SECONDS))

    def release(self) -> None:
        """Let everybody who rests go, now and later."""
        self._released.set()
