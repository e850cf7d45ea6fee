"""The watch over zones that lag: how old is the oldest thing that a zone owes, and may it be put out for that.

Slowness is judged by lag, not by the time of single calls: a zone that answers each of them a little below the deadline
would else throttle everyone for ever. Ages are monotonic. A tick that comes late voids them: the process or the host
stood still, and what zones did meanwhile is unknown. Where everybody is late nobody is put out, and slowness alone
never takes a zone that some log needs for its `min_copies`.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from objstore.backend.base import ZoneFailed
from objstore.clock import Clock
from objstore.errors import StoreError
from objstore.replica.zone import Executor, Zone

log = logging.getLogger(__name__)

TICK_SECONDS: Final = 0.1
TICK_LATE_SECONDS: Final = 0.4
"""So late is no busy loop any more."""
CHECK_SECONDS: Final = 2.0
"""Every zone is asked that often whether it is still the directory that was opened."""


class ZoneWatch:
    """Ticks as long as it is open. Touched by the event loop only.

    zones: those in service now. lag: since when a zone owes data that somebody wants durable, None = it owes nothing.
    expendable: whether every log could go on without that zone and those that are being put out. lagging: told of a
    zone that is late; false: it knows. failing: told of one that is not what it was.
    """

    def __init__(
        self,
        executor: Executor,
        clock: Clock,
        deadline_seconds: float,
        *,
        zones: Callable[[], Sequence[Zone]],
        lag: Callable[[int, float], float | None],
        expendable: Callable[[int], bool],
        lagging: Callable[[int, StoreError], bool],
        failing: Callable[[int, StoreError], object],
    ) -> None:
        self._executor = executor
        self._clock = clock
        self.deadline_seconds = deadline_seconds
        self._zones = zones
        self._lag = lag
        self._expendable = expendable
        self._lagging = lagging
        self._failing = failing
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._last = clock.monotonic()
        self._valid_from = self._last
        """Nothing counts as owed since before this."""
        self._checked = self._last
        self._checking: set[int] = set()
        self.late: frozenset[int] = frozenset()
        """Zones past their deadline that nobody can do without."""

    def start(self) -> None:
        """Tick from now on."""
        self._executor.poll(self._clock.monotonic())
        self._timer = self._loop.call_later(TICK_SECONDS, self._ticked)

    def close(self) -> None:
        """Tick no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ticked(self) -> None:
        self._timer = self._loop.call_later(TICK_SECONDS, self._ticked)
        self.tick()

    def tick(self) -> None:
        """Look at every zone."""
        now = self._clock.monotonic()
        if now - self._last > TICK_SECONDS + TICK_LATE_SECONDS:
            log.info("the event loop stood still, lags are measured anew seconds=%.1f", now - self._last)
            self._valid_from = now
        self._last = now
        # Completions that wait for others to share a wake-up would make their zones look late.
        self._executor.poll(now)
        zones = self._zones()
        since = {zone.index: self._owing_since(zone.index, now) for zone in zones}
        late = [z for z, start in since.items() if now - start > self.deadline_seconds]
        if late:
            self._judge(late, zones, since, now)
        else:
            self.late = frozenset()
        if now - self._checked >= CHECK_SECONDS:
            self._checked = now
            self._check(zones)

    def _owing_since(self, zone: int, now: float) -> float:
        """Since when the zone has owed something without a break, as far as is certain; now: it owes nothing."""
        oldest = self._executor.oldest(zone)
        # Calls are stamped with the tick before them: they may be younger by that much.
        begun = now if oldest is None else oldest + TICK_SECONDS
        lag = self._lag(zone, now)
        if lag is not None:
            begun = min(begun, lag)
        return max(begun, self._valid_from)

    def _judge(self, late: list[int], zones: Sequence[Zone], since: dict[int, float], now: float) -> None:
        late.sort(key=lambda z: since[z])
        kept = []
        for z in late:
            if len(late) < len(zones) and self._expendable(z):
                seconds = now - since[z]
                error = ZoneFailed(f"no answer for {seconds:.1f} s deadline={self.deadline_seconds:g} s")
                if self._lagging(z, error):
                    break  # one at a time: the next is judged in the next tick
                continue  # it is on its way out, which may wait for the next one
            kept.append(z)
        if frozenset(kept) - self.late:
            log.warning(
                "zones lag that can't be done without: %s",
                ", ".join(repr(zone) for zone in zones if zone.index in kept),
            )
        self.late = frozenset(kept)

    def _check(self, zones: Iterable[Zone]) -> None:
        """Ask each zone whether it is still what was opened."""
        for zone in zones:
            if zone.index in self._checking:
                continue
            self._checking.add(zone.index)

            def done(result: object, error: BaseException | None, number: int = zone.index) -> None:
                self._checking.discard(number)
                if isinstance(error, StoreError):
                    self._failing(number, error)

            self._executor.submit(zone.index, zone.backend.check, (), done)
