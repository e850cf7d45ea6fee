"""Zone executors of the simulation: each call takes a random virtual time to start and another to be heard of.

A call runs as one step of the loop, over a file system that is simulated too, so it can end between any two of its
system calls. Calls of one zone overlap and overtake each other as those of several threads do; callers that need an
order wait for the completion.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

from objstore.replica.zone import Call
from tests.support.sim_loop import SimLoop

FAST_SECONDS = 20e-6


class SimExecutor:
    """objstore's Executor on a SimLoop.

    slow_seconds: mean delay per zone; a call in twenty takes ten times that. dead: no call runs or completes any more.
    """

    def __init__(self, loop: SimLoop, rng: random.Random, slow_seconds: list[float]) -> None:
        self._loop = loop
        self._rng = rng
        self._slow_seconds = slow_seconds
        self._closed = False
        self.dead = False
        self.outstanding = 0
        self.on_job: Callable[[int, Callable[..., Any]], None] | None = None

    def submit(
        self,
        zone: int,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        done: Callable[[Any, BaseException | None], None],
    ) -> None:
        if self.dead:
            return
        if self._closed:
            raise RuntimeError("the executor is closed")
        self.outstanding += 1
        self._loop.call_later(self._delay(zone), self._run, zone, function, args, done)

    def submit_together(self, calls: Sequence[Call]) -> None:
        for call in calls:
            self.submit(*call)

    def _delay(self, zone: int) -> float:
        chance = self._rng.random()
        mean = self._slow_seconds[zone]
        if chance < 0.3:
            return FAST_SECONDS
        return self._rng.expovariate(1.0) * (mean * 10 if chance > 0.95 else mean)

    def _run(
        self,
        zone: int,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        done: Callable[[Any, BaseException | None], None],
    ) -> None:
        if self.dead:
            return
        if self.on_job is not None:
            self.on_job(zone, function)
        result: Any = None
        error: BaseException | None = None
        try:
            result = function(*args)
        except BaseException as caught:  # noqa: BLE001 - handed to the caller, as a thread does
            error = caught
        if not self.dead and not self._loop.stopping_now:
            self._loop.call_later(self._delay(zone), self._finish, done, result, error)

    def _finish(
        self, done: Callable[[Any, BaseException | None], None], result: Any, error: BaseException | None
    ) -> None:
        if not self.dead:
            self.outstanding -= 1
            done(result, error)

    def close(self) -> None:
        self._closed = True
