"""A limit on bytes a second that can be changed while somebody waits for it."""

import asyncio
from typing import Final

from objstore.clock import Clock
from objstore.errors import InvalidRequest
from objstore.units import MIB, TIB, format_size

RATE_MIN: Final = 1 * MIB
RATE_MAX: Final = 1 * TIB
BURST_SECONDS: Final = 0.25


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
