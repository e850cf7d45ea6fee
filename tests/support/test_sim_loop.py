"""The simulated loop and executor: virtual time, order, deadlocks, sudden ends."""

import asyncio
import inspect
import random
from typing import Any

import pytest

from tests.support.sim_executor import SimExecutor
from tests.support.sim_loop import SimClock, SimDeadlock, SimLoop, SimStopped


def test_time_jumps() -> None:
    loop = SimLoop(now=10.0)
    clock = SimClock(loop)

    async def main() -> list[float]:
        found = [clock.monotonic()]
        await asyncio.sleep(3600)
        found.append(clock.monotonic())
        return found

    wall = clock.wall()
    assert loop.run_until_complete(main()) == [10.0, 3610.0]
    assert clock.wall() - wall == 3600.0
    loop.discard()


def test_deadlock_shows_who_waits() -> None:
    loop = SimLoop()

    async def waits_for_ever() -> None:
        await loop.create_future()

    with pytest.raises(SimDeadlock, match="waits_for_ever"):
        loop.run_until_complete(waits_for_ever())
    loop.discard()


def test_callback_that_raises_ends_the_run() -> None:
    loop = SimLoop()

    def broken() -> None:
        raise ValueError("oh")

    async def main() -> None:
        loop.call_soon(broken)
        await asyncio.sleep(1)

    with pytest.raises(AssertionError, match="oh"):
        loop.run_until_complete(main())
    loop.discard()


def test_what_is_started_while_a_run_is_discarded_is_closed_too() -> None:
    loop = SimLoop()
    started = []

    async def later() -> None:
        raise AssertionError("never run")

    async def first() -> None:
        try:
            await loop.create_future()
        finally:
            started.append(later())
            loop.create_task(started[0])

    with pytest.raises(SimDeadlock):
        loop.run_until_complete(first())
    loop.discard()
    assert inspect.getcoroutinestate(started[0]) == inspect.CORO_CLOSED


@pytest.mark.parametrize("step", [1, 2, 5])
def test_end_at_any_step(step: int) -> None:
    loop = SimLoop()
    cleaned = []

    def on_step() -> None:
        if loop.steps == step:
            loop.stop_now()

    async def main() -> None:
        try:
            for _ in range(100):
                await asyncio.sleep(0.1)
        finally:
            cleaned.append(True)

    loop.on_step = on_step
    with pytest.raises(SimStopped):
        loop.run_until_complete(main())
    assert loop.steps == step
    loop.discard()
    assert len(cleaned) == (step > 1)


def _executor_order(seed: int) -> list[Any]:
    loop = SimLoop()
    executor = SimExecutor(loop, random.Random(seed), [1e-3, 1e-2])
    events: list[Any] = []

    async def main() -> None:
        left = 20
        ended = loop.create_future()

        def done(result: Any, error: BaseException | None) -> None:
            nonlocal left
            events.append(("done", result, error and str(error), loop.now))
            left -= 1
            if not left:
                ended.set_result(None)

        def job(number: int) -> int:
            events.append(("runs", number))
            if number == 7:
                raise ValueError("seven")
            return number

        for number in range(20):
            executor.submit(number % 2, job, (number,), done)
        await ended

    loop.run_until_complete(main())
    loop.discard()
    return events


def test_executor_overtakes_but_repeats_itself() -> None:
    events = _executor_order(1)
    assert events == _executor_order(1)
    assert events != _executor_order(2)
    ran = [event[1] for event in events if event[0] == "runs"]
    assert sorted(ran) == list(range(20))
    assert ran != sorted(ran)
    assert [event[2] for event in events if event[0] == "done" and event[1] is None] == ["seven"]
