"""Time as a parameter: nobody below the server reads a clock of its own."""

import time
from typing import Protocol


class Clock(Protocol):
    """Source of time. `monotonic` decides (deadlines, ages); `wall` only labels."""

    def monotonic(self) -> float:
        """Seconds since an arbitrary start, never going back."""
        ...

    def wall(self) -> float:
        """Seconds since 1970-01-01 UTC; may jump."""
        ...


class SystemClock:
    """The clock of this host."""

    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()
