"""An asyncio event loop with a virtual clock that does no I/O: one sequence of calls gives one schedule.

Ready callbacks run in the order in which they became ready, as in asyncio and uvloop, and one at a time: `on_step` runs
before each of them, so a test can end the run at any of them, which is at any await. When nothing is ready the clock
jumps to the next timer; when there is none either, nobody will ever go on: SimDeadlock shows where every task waits.
"""

import asyncio
import contextvars
import heapq
from asyncio import base_events
from collections.abc import Callable
from typing import Any

STEPS_MAX = 500_000
"""Callbacks of one loop: a run that takes more is going round in a circle."""


class SimDeadlock(AssertionError):
    """Nothing is ready, no timer runs, and the main task has not ended."""


class SimStopped(BaseException):
    """`SimLoop.stop_now` was called: the process is gone."""


class SimClock:
    """objstore's Clock on the virtual time of a loop. wall_offset: seconds between 1970 and the loop's time 0."""

    def __init__(self, loop: "SimLoop", wall_offset: float = 1_700_000_000.0) -> None:
        self._loop = loop
        self._wall_offset = wall_offset

    def monotonic(self) -> float:
        return self._loop.now

    def wall(self) -> float:
        return self._wall_offset + self._loop.now


class _Handle(asyncio.Handle):
    """A callback that is ready: asyncio's, made and run with fewer calls."""

    __slots__ = ()

    def __init__(self, callback: Any, args: Any, context: Any) -> None:
        self._callback = callback
        self._args = args
        self._context = contextvars.copy_context() if context is None else context
        self._cancelled = False
        self._repr = self._source_traceback = None

    def cancel(self) -> None:
        self._cancelled = True


class _Timer(_Handle, asyncio.TimerHandle):
    """A callback for later. `cancel` leaves it in the heap, where it is passed over."""

    __slots__ = ()

    def __init__(self, callback: Any, args: Any, context: Any, when: float) -> None:
        super().__init__(callback, args, context)
        self._when = when


class SimLoop(base_events.BaseEventLoop):
    """Single-threaded; a callback that raises ends the run with its exception.

    now: virtual seconds. steps: callbacks run so far. failures: what escaped from callbacks and tasks.
    """

    def __init__(self, now: float = 0.0) -> None:
        super().__init__()
        self.now = now
        self.steps = 0
        self.on_step: Callable[[], None] | None = None
        self.tasks: dict[int, asyncio.Task[Any]] = {}
        self.failures: list[dict[str, Any]] = []
        self.stopping_now = False
        self._task_numbers = 0
        self._timers: list[tuple[float, int, _Timer]] = []
        self._timer_numbers = 0
        self.set_exception_handler(lambda loop, context: self.failures.append(context))
        self.set_task_factory(self._make_task)

    def _make_task(self, loop: asyncio.AbstractEventLoop, coro: Any, **kwargs: Any) -> asyncio.Task[Any]:
        self._task_numbers += 1
        number = self._task_numbers
        task = asyncio.Task(coro, loop=loop, name=f"task-{number}", **kwargs)
        self.tasks[number] = task
        task.add_done_callback(lambda done: self._task_done(number))
        return task

    def _task_done(self, number: int) -> None:
        self.tasks.pop(number, None)

    # what BaseEventLoop asks of its subclasses

    def time(self) -> float:
        return self.now

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def _write_to_self(self) -> None:
        """Nobody sleeps in a selector here."""

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:
        handle = _Handle(callback, args, context)
        self._ready.append(handle)
        return handle

    def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        return self.call_at(self.now + delay, callback, *args, context=context)

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        timer = _Timer(callback, args, context, when)
        self._timer_numbers += 1
        heapq.heappush(self._timers, (when, self._timer_numbers, timer))
        return timer

    def _run_once(self) -> None:
        """Callback after callback until the loop is to stop."""
        ready, timers, failures = self._ready, self._timers, self.failures
        on_step = self.on_step
        pop_first, pop_timer = ready.popleft, heapq.heappop
        while not self._stopping:
            if self.stopping_now:
                raise SimStopped
            if not ready:
                while timers and timers[0][2]._cancelled:
                    pop_timer(timers)
                if not timers:
                    raise SimDeadlock(f"everybody waits for somebody else\n{self.stacks()}")
                now = self.now = max(self.now, timers[0][0])
                while timers and timers[0][0] <= now:
                    timer = pop_timer(timers)[2]
                    if not timer._cancelled:
                        ready.append(timer)
            handle = pop_first()
            if handle._cancelled:
                continue
            self.steps += 1
            if self.steps > STEPS_MAX:
                raise SimDeadlock(f"{self.steps} callbacks and no end\n{self.stacks()}")
            if on_step is not None:
                on_step()
                if self.stopping_now:
                    raise SimStopped
            try:
                handle._context.run(handle._callback, *handle._args)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:  # noqa: BLE001 - as asyncio does
                self.call_exception_handler({"message": f"Exception in callback {handle!r}", "exception": error})
            if self.stopping_now:
                raise SimStopped
            if failures:
                raise_failure(failures[0])

    # for tests

    def stop_now(self) -> None:
        """End the run behind the callback under way (or before the next one) with SimStopped."""
        self.stopping_now = True

    def stacks(self) -> str:
        """Where every task stands: its coroutines from the outermost to the one that waits."""
        lines = []
        for task in self.tasks.values():
            places = []
            coro = task.get_coro()
            while (frame := getattr(coro, "cr_frame", None)) is not None:
                places.append(f"{coro.__qualname__}:{frame.f_lineno}")
                coro = coro.cr_await
            lines.append(f"  {task.get_name()}: {' > '.join(places)}")
        return "\n".join(lines)

    def discard(self) -> None:
        """Forget everything as a killed process would. Coroutines under way are closed: whatever their `finally`
        blocks ask of the outside world must fail by then."""
        self.stopping_now = True
        self._ready.clear()
        self._timers.clear()
        while self.tasks:  # what is closed may start something more
            _, task = self.tasks.popitem()
            task._log_destroy_pending = False
            coro = task.get_coro()
            try:
                coro.close()
            except BaseException:  # noqa: BLE001 - the process is dead; whatever its clean-up meets, nobody sees it
                pass
        self._ready.clear()
        self._timers.clear()
        self.failures.clear()
        self.close()


def raise_failure(context: dict[str, Any]) -> None:
    """Raise what an exception handler was told."""
    error = context.get("exception")
    if error is not None:
        raise AssertionError(f"{context.get('message')}: {error!r}") from error
    raise AssertionError(str(context.get("message")))
