"""Zone executors of the simulation: each call takes a random virtual time to start and another to be heard of.

A call runs as one step of the loop, over a file system that is simulated too, so it can end between any two of its
system calls. Calls of one zone overlap and overtake each other as those of several threads do; callers that need an
order wait for the completion.
"""

import functools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from objstore.backend.base import Handle, Writer
from objstore.errors import Busy, StoreError
from objstore.replica.zone import Call, Closable, Done, Write, give_back
from tests.support.sim_loop import SimLoop

FAST_SECONDS = 20e-6


class SimExecutor:
    """objstore's Executor on a SimLoop.

    slow_seconds: mean delay per zone; a call in twenty takes ten times that, one in a hundred a hundred times.
    slow: of the calls named here one in four starts later by up to so many seconds.
    dead: no call runs or completes any more. late: zones that a call from before their re-admission reached behind it.
    """

    def __init__(self, loop: SimLoop, rng: random.Random, slow_seconds: list[float]) -> None:
        self._loop = loop
        self._rng = rng
        self._slow_seconds = slow_seconds
        self.slow: dict[str, float] = {}
        self._closed = False
        self._now = 0.0
        self._calls: dict[int, dict[Done, float]] = {}
        """By zone, calls that somebody waits for, and when they were made."""
        self._left: Counter[int] = Counter()
        self._orphans: dict[int, list[Closable]] = {}
        self._out: dict[int, StoreError] = {}
        self._hanging: set[int] = set()
        self._held: list[tuple[tuple[int, ...], Callable[[], None]]] = []
        self._admitted: Counter[int] = Counter()
        self.late: list[int] = []
        self.dead = False
        self.on_job: Callable[[int, Callable[..., Any]], None] | None = None

    def submit(
        self,
        zone: int,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        done: Done,
        others: tuple[int, ...] = (),
    ) -> None:
        if self.dead:
            return
        if self._closed:
            raise RuntimeError("the executor is closed")
        if zone in self._out:
            self._loop.call_soon(done, None, self._out[zone])
            return
        delay = self._delay(zone)
        if self.slow and (most := self.slow.get(getattr(function, "__name__", ""), 0)) and self._rng.random() < 0.25:
            delay += self._rng.random() * most
        # One callable may be given for several calls.
        done = functools.partial(done)
        zones = (zone, *others)
        for each in zones:
            self._calls.setdefault(each, {})[done] = self._now
        self._loop.call_later(delay, self._run, zones, function, args, done, self._admissions(zones))

    submit_long = submit

    def submit_together(self, calls: Sequence[Call]) -> None:
        for call in calls:
            self.submit(*call)

    def start_writes(self, writes: Sequence[Write]) -> list[bool]:
        """None: the simulated file system has to see every call, and `submit_together` makes them one by one too."""
        return [False] * len(writes)

    def _delay(self, zone: int) -> float:
        chance = self._rng.random()
        mean = self._slow_seconds[zone % len(self._slow_seconds)]
        if chance < 0.3:
            return FAST_SECONDS
        if chance > 0.94:
            mean *= 100 if chance > 0.99 else 10
        return self._rng.expovariate(1.0) * mean

    def _run(
        self,
        zones: tuple[int, ...],
        function: Callable[..., Any],
        args: tuple[Any, ...],
        done: Done,
        admissions: list[int],
    ) -> None:
        if self.dead:
            return
        awaited = any(done in self._calls[zone] for zone in zones)
        if awaited and not self._hanging.isdisjoint(zones) and self._rng.random() < 0.7:
            self._held.append((zones, functools.partial(self._do, zones, function, args, done, True, admissions)))
        else:
            self._do(zones, function, args, done, awaited, admissions)

    def _admissions(self, zones: Sequence[int]) -> list[int]:
        return [self._admitted[zone] for zone in zones]

    def _do(
        self,
        zones: tuple[int, ...],
        function: Callable[..., Any],
        args: tuple[Any, ...],
        done: Done,
        begun: bool,
        admissions: list[int],
    ) -> None:
        if self.dead:
            return
        if begun and admissions != self._admissions(zones):
            self.late += zones
        result: Any = None
        error: BaseException | None = None
        if begun:
            if self.on_job is not None:
                self.on_job(zones[0], function)
            try:
                result = function(*args)
            except BaseException as caught:  # noqa: BLE001 - handed to the caller, as a thread does
                error = caught
        if not self.dead and not self._loop.stopping_now:
            self._loop.call_later(self._delay(zones[0]), self._finish, zones, done, result, error)

    def hang(self, zone: int) -> None:
        """Calls of this zone don't return any more until `release`: some do their work before, some behind it."""
        self._hanging.add(zone)

    def release(self, zone: int) -> None:
        """What hung goes on, whoever waits for it still or again or no more."""
        self._hanging.discard(zone)
        held, self._held = self._held, []
        for zones, go_on in held:
            if self._hanging.isdisjoint(zones):
                self._loop.call_later(self._delay(zone), go_on)
            else:
                self._held.append((zones, go_on))

    def _finish(self, zones: tuple[int, ...], done: Done, result: Any, error: BaseException | None) -> None:
        if self.dead:
            return
        if not self._hanging.isdisjoint(zones):
            self._held.append((zones, functools.partial(self._finish, zones, done, result, error)))
            return
        awaited = False
        for zone in zones:
            if self._calls[zone].pop(done, None) is not None:
                awaited = True
                continue
            self._left[zone] -= 1
            self._close_orphans(zone)
        if awaited:
            done(result, error)
        elif isinstance(result, Handle | Writer):
            give_back(result)

    def poll(self, now: float) -> None:
        self._now = now

    def oldest(self, zone: int) -> float | None:
        return next(iter(self._calls.get(zone, {}).values()), None)

    @property
    def busy(self) -> bool:
        """Whether a call of a zone that does not hang has not returned."""
        return any(self.outstanding(zone) for zone in self._calls if zone not in self._hanging)

    def outstanding(self, zone: int) -> int:
        return len(self._calls.get(zone, ())) + self._left[zone]

    def abandon(self, zone: int, error: StoreError, orphans: Sequence[Closable] = ()) -> None:
        self._out[zone] = error
        self._orphans.setdefault(zone, []).extend(orphans)
        left = list(self._calls.pop(zone, ()))
        self._calls[zone] = {}
        self._left[zone] += len(left)
        for done in left:
            if not any(done in calls for calls in self._calls.values()):
                done(None, error)
        self._close_orphans(zone)

    def _close_orphans(self, zone: int) -> None:
        if not self.outstanding(zone):
            for orphan in self._orphans.pop(zone, ()):
                orphan.close()

    def readmit(self, zone: int) -> None:
        if self.outstanding(zone):
            raise Busy(f"calls have not returned zone={zone}")
        self._out.pop(zone, None)
        self._admitted[zone] += 1

    def close(self) -> None:
        self._closed = True
