"""Throttling a VDI: how many operations and bytes a second its clients may have, and who goes next when they wait.

Token buckets: each limit fills at its rate up to its burst and is emptied by requests. A request goes when every bucket
that counts it has something left, and may leave them in debt: so a long request is never impossible, and the sum over
time is the rate. Who must wait stands in line with the requests of the same connection and direction; the lines take
turns, so that a connection with many requests takes nothing from one with few, and writes at their limit don't hold up
reads. Flushes are never held up: a guest that flushes would stand still.
"""

import asyncio
from collections import deque
from collections.abc import Mapping
from typing import Final, TypeAlias

from objstore.errors import InvalidRequest
from objstore.format.catalog import Limit
from objstore.volume.settings import LIMIT_KINDS

BURST_SECONDS: Final = 0.1
"""Of a limit that names no burst: so much of its rate may be saved up. Longer than the event loop is ever busy with
something else, so that nothing is lost by being late."""
TICK_SECONDS: Final = 0.001
"""What timers are good for."""
LIMIT_MAX: Final = 1 << 53

_OPERATIONS: Final = (("iops", "iops-read"), ("iops", "iops-write"))
_LENGTHS: Final = (("bytes", "bytes-read"), ("bytes", "bytes-write"))
"""The kinds that count a read, and those that count a write."""

_Lines: TypeAlias = "dict[object, deque[tuple[int, asyncio.Future[bool]]]]"


def checked(limits: Mapping[str, Limit]) -> dict[str, Limit]:
    """The limits without those of rate 0, which stand for none. InvalidRequest."""
    for kind, limit in limits.items():
        if kind not in LIMIT_KINDS:
            raise InvalidRequest(f"there is no limit {kind!r}; there are {', '.join(LIMIT_KINDS)}")
        if not 0 <= limit.rate <= LIMIT_MAX or not 0 <= limit.burst <= LIMIT_MAX:
            raise InvalidRequest(f"limit {kind}: {limit.rate}:{limit.burst} is out of range: 0 to {LIMIT_MAX}")
    return {kind: limit for kind, limit in sorted(limits.items()) if limit.rate}


class Bucket:
    """One limit. level: what may still be used; below 0 = debt."""

    __slots__ = ("_filled_at", "burst", "level", "rate")

    def __init__(self, limit: Limit, now: float) -> None:
        self.rate = float(limit.rate)
        self.burst = float(limit.burst) or max(1.0, self.rate * BURST_SECONDS)
        self.level = self.burst
        self._filled_at = now

    def fill(self, now: float) -> None:
        """Add what the time since the last filling gives."""
        self.level = min(self.burst, self.level + (now - self._filled_at) * self.rate)
        self._filled_at = now

    @property
    def wait_seconds(self) -> float:
        """Until something is left."""
        return 0.0 if self.level > 0 else TICK_SECONDS - self.level / self.rate


class Throttle:
    """The limits of one VDI at work. Touched by the event loop only.

    `write` (a bool) is the direction. owner: whoever makes the requests, a connection.
    """

    def __init__(self, limits: Mapping[str, Limit], loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._buckets: dict[str, Bucket] = {}
        self._ops: tuple[list[Bucket], list[Bucket]] = ([], [])
        self._bytes: tuple[list[Bucket], list[Bucket]] = ([], [])
        self._lines: tuple[_Lines, _Lines] = ({}, {})
        """For each direction: owner -> its requests, the owner whose turn it is first."""
        self._timer: asyncio.TimerHandle | None = None
        self._next_writes = False
        self.delayed = 0
        """Requests that had to wait, ever."""
        self.set(limits)

    @property
    def waiting(self) -> int:
        """Requests that wait now."""
        return sum(len(line) for lines in self._lines for line in lines.values())

    def set(self, limits: Mapping[str, Limit]) -> None:
        """Other limits from now on; those that stay the same keep what was used of them."""
        now = self._loop.time()
        old, self._buckets = self._buckets, {}
        for kind, limit in limits.items():
            bucket = Bucket(limit, now)
            before = old.get(kind)
            if before is not None:
                before.fill(now)
                bucket.level = min(bucket.burst, before.level)
            self._buckets[kind] = bucket
        for write in (False, True):
            ops, size = _OPERATIONS[write], _LENGTHS[write]
            self._ops[write][:] = [self._buckets[kind] for kind in ops if kind in self._buckets]
            self._bytes[write][:] = [self._buckets[kind] for kind in size if kind in self._buckets]
        self._go_on()

    def take(self, *, write: bool, length_bytes: int) -> bool:
        """Whether a request may go at once; then it is counted."""
        if self._lines[write] or not self._open(write, self._loop.time()):
            return False
        self._count(write, length_bytes)
        return True

    async def wait(self, owner: object, *, write: bool, length_bytes: int) -> bool:
        """Return when the request may go; it is counted then. False: it is not to be done (`dismiss`)."""
        turn: asyncio.Future[bool] = self._loop.create_future()
        self.delayed += 1
        self._lines[write].setdefault(owner, deque()).append((length_bytes, turn))
        self._go_on()
        return await turn

    def dismiss(self, owner: object, *, go: bool) -> None:
        """Let nothing of this owner wait any more: it goes at once, or is not done."""
        for write, lines in enumerate(self._lines):
            for length_bytes, turn in lines.pop(owner, ()):
                if not turn.done():
                    turn.set_result(go)
                    if go:
                        self._count(bool(write), length_bytes)

    def _open(self, write: bool, now: float) -> bool:
        for bucket in (*self._ops[write], *self._bytes[write]):
            bucket.fill(now)
            if bucket.level <= 0:
                return False
        return True

    def _count(self, write: bool, length_bytes: int) -> None:
        for bucket in self._ops[write]:
            bucket.level -= 1
        for bucket in self._bytes[write]:
            bucket.level -= length_bytes

    def _go_on(self) -> None:
        """Let go who may, one of each line and direction in turn, and come back when the next one may."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self._loop.time()
        blocked = 0
        while blocked < 2:
            self._next_writes = write = not self._next_writes
            if self._lines[write] and self._open(write, now):
                self._let_go(write)
                blocked = 0
            else:
                blocked += 1
        waits = [
            max(bucket.wait_seconds for bucket in (*self._ops[write], *self._bytes[write]))
            for write in (False, True)
            if self._lines[write]
        ]
        if waits:
            self._timer = self._loop.call_later(max(TICK_SECONDS, min(waits)), self._go_on)

    def _let_go(self, write: bool) -> None:
        """The first request of the line whose turn it is; that line is the last one then."""
        lines = self._lines[write]
        owner = next(iter(lines))
        line = lines.pop(owner)
        length_bytes, turn = line.popleft()
        if line:
            lines[owner] = line
        if not turn.done():
            self._count(write, length_bytes)
            turn.set_result(True)
