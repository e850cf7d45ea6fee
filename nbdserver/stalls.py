"""Who stands in the way when memory is short: connections that hold buffers and move nothing, or next to nothing."""

import time
from collections.abc import Callable, Iterable
from typing import Final, Generic, Protocol, TypeVar

from objstore.units import KIB

SLOW_BYTES_PER_SECOND: Final = 64 * KIB
"""Who moves less while others wait is in their way: a byte now and then would keep a buffer for ever."""


class Moving(Protocol):
    """A connection."""

    @property
    def stalled_since(self) -> float | None:
        """Monotonic time of the last byte that the client took or sent although we wait for it; None: we do not."""
        ...

    @property
    def moved_bytes(self) -> int:
        """Received and sent so far."""
        ...


M = TypeVar("M", bound=Moving)


class Stalls(Generic[M]):
    """Looks at all connections now and then. clock: monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._marks: dict[M, tuple[float, int]] = {}
        """Since when, and from how many bytes on, a connection is watched: somebody waits for memory all the time."""

    def found(self, connections: Iterable[M], *, short: bool, stall_seconds: float) -> list[M]:
        """Those that are to go. short: somebody waits for memory."""
        marks, self._marks = self._marks, {}
        if not short:
            return []
        now = self._clock()
        going = []
        for connection in connections:
            since = connection.stalled_since
            if since is None:
                continue
            moved = connection.moved_bytes
            marked_at, moved_then = marks.get(connection, (now, moved))
            if now - marked_at >= stall_seconds:
                if moved - moved_then < (now - marked_at) * SLOW_BYTES_PER_SECOND:
                    going.append(connection)
                    continue
                marked_at, moved_then = now, moved
            if since < now - stall_seconds:
                going.append(connection)
                continue
            self._marks[connection] = (marked_at, moved_then)
        return going
