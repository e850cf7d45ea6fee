"""Zone threads: what becomes of calls when a zone is put out while they hang."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from objstore.backend.base import ZoneFailed
from objstore.backend.memory import MemoryHandle
from objstore.errors import Busy
from objstore.replica.zone import Call, ThreadExecutor, run, run_long
from tests.support.serving import eventually

OUT = ZoneFailed("the zone is out of service")


class Gate:
    """A call that hangs until it is let go."""

    def __init__(self, result: object = None) -> None:
        self.result = result
        self.began = threading.Event()
        self._go = threading.Event()

    def __call__(self) -> object:
        self.began.set()
        self._go.wait()
        return self.result

    def let_go(self) -> None:
        self._go.set()


class ClosingHandle(MemoryHandle):
    """Says whether it was closed, and in which thread."""

    closed_by = ""

    def close(self) -> None:
        self.closed_by = threading.current_thread().name


@pytest.fixture
async def executor() -> AsyncIterator[ThreadExecutor]:
    made = ThreadExecutor()
    yield made
    made.close()


async def hang(executor: ThreadExecutor, gate: Gate, zone: int = 0) -> "asyncio.Task[object]":
    task = asyncio.create_task(run(executor, zone, gate))
    await asyncio.to_thread(gate.began.wait)
    return task


async def test_who_waits_for_a_hung_call_is_released(executor: ThreadExecutor) -> None:
    gate = Gate()
    hung = await hang(executor, gate)
    executor.abandon(0, OUT)
    with pytest.raises(ZoneFailed):
        await hung
    with pytest.raises(ZoneFailed):
        await run(executor, 0, int)
    with pytest.raises(ZoneFailed):
        await run_long(executor, 0, int)
    assert await run(executor, 1, int) == 0, "other zones go on"
    assert executor.outstanding(0) == 1
    with pytest.raises(Busy):
        executor.readmit(0)
    gate.let_go()
    await eventually(lambda: not executor.outstanding(0))
    executor.readmit(0)
    assert await run(executor, 0, int) == 0


async def test_calls_that_had_not_begun_never_run(executor: ThreadExecutor) -> None:
    gates = [Gate() for _ in range(4)]
    hung = [await hang(executor, gate) for gate in gates]
    late = Gate()
    waiting = asyncio.create_task(run(executor, 0, late))
    await asyncio.sleep(0)
    executor.abandon(0, OUT)
    results = await asyncio.gather(*hung, waiting, return_exceptions=True)
    assert all(result is OUT for result in results)
    for gate in gates:
        gate.let_go()
    await eventually(lambda: not executor.outstanding(0))
    assert not late.began.is_set()


async def test_what_a_late_call_opened_is_closed_before_the_zone_comes_back(executor: ThreadExecutor) -> None:
    handle, orphan = ClosingHandle("late", bytearray(1)), ClosingHandle("orphan", bytearray(1))
    gate = Gate(handle)
    hung = await hang(executor, gate)
    executor.abandon(0, OUT, [orphan])
    await asyncio.gather(hung, return_exceptions=True)
    assert not orphan.closed_by, "the hung call may be using it"
    gate.let_go()
    await eventually(lambda: not executor.outstanding(0))
    assert handle.closed_by.startswith("zone0-")
    assert orphan.closed_by.startswith("zone0-")


async def test_orphans_of_a_quiet_zone_are_closed_in_its_threads(executor: ThreadExecutor) -> None:
    orphan = ClosingHandle("orphan", bytearray(1))
    executor.abandon(0, OUT, [orphan])
    await eventually(lambda: bool(orphan.closed_by))
    assert orphan.closed_by.startswith("zone0-")


async def test_the_age_of_the_oldest_call(executor: ThreadExecutor) -> None:
    executor.poll(10.0)
    assert executor.oldest(0) is None
    gate = Gate()
    hung = await hang(executor, gate)
    executor.poll(20.0)
    younger = Gate()
    other = await hang(executor, younger)
    assert executor.oldest(0) == 10.0
    assert executor.oldest(1) is None
    gate.let_go()
    await hung
    assert executor.oldest(0) == 20.0
    younger.let_go()
    await other
    assert executor.oldest(0) is None


async def test_long_calls_make_no_zone_old_and_keep_nobody_waiting(executor: ThreadExecutor) -> None:
    gates = [Gate() for _ in range(6)]
    tasks = [asyncio.create_task(run_long(executor, 0, gate)) for gate in gates]
    await asyncio.to_thread(gates[0].began.wait)
    assert executor.oldest(0) is None
    assert await run(executor, 0, int) == 0
    assert not any(gate.began.is_set() for gate in gates[1:])
    for gate in gates:
        gate.let_go()
    await asyncio.gather(*tasks)


async def test_calls_made_together_with_a_hung_one_are_delivered_by_the_next_poll(executor: ThreadExecutor) -> None:
    gate = Gate()
    finished: list[int] = []

    def done(zone: int) -> Callable[[Any, BaseException | None], None]:
        return lambda result, error: finished.append(zone)

    executor.submit_together([Call(0, int, (), done(0)), Call(1, gate, (), done(1))])
    await asyncio.to_thread(gate.began.wait)

    def delivered() -> bool:
        executor.poll(1.0)
        return finished == [0]

    await eventually(delivered)
    executor.abandon(1, OUT)
    assert finished == [0, 1]
    gate.let_go()
    await eventually(lambda: not executor.outstanding(1))


async def test_a_call_for_several_zones_is_awaited_as_long_as_one_is_in_service(executor: ThreadExecutor) -> None:
    gate = Gate()
    finished: list[object] = []
    executor.poll(3.0)
    executor.submit_together([Call(0, gate, (), lambda result, error: finished.append(error), (1,))])
    await asyncio.to_thread(gate.began.wait)
    assert executor.oldest(0) == executor.oldest(1) == 3.0
    executor.abandon(0, OUT)
    assert not finished
    assert executor.outstanding(0) == executor.outstanding(1) == 1
    gate.let_go()
    await eventually(lambda: bool(finished))
    assert finished == [None]
    assert executor.outstanding(0) == executor.outstanding(1) == 0


async def test_calls_that_hang_do_not_keep_the_executor_open() -> None:
    executor = ThreadExecutor()
    gate = Gate()
    hung = await hang(executor, gate)
    executor.abandon(0, OUT)
    await asyncio.gather(hung, return_exceptions=True)
    executor.close()
    hanging = [thread for thread in threading.enumerate() if thread.name.startswith("zone0-")]
    assert hanging
    assert all(thread.daemon for thread in hanging)
    gate.let_go()
