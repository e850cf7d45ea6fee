"""Requests that are under way when their disk is closed."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from objstore.units import BLOCK_BYTES, MIB
from objstore.volume.vdi import Vdi
from tests.support.stepping import World, executor_of, turns


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World(2)
    await world.open(create=True)
    yield world
    await world.kill()


@pytest.mark.parametrize("slow", ["read_pages", "look_at", "open", "read"])
async def test_shutdown_waits_for_the_reads_under_way(world: World, slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert world.store is not None
    await world.store.create_vdi("disk", 16 * MIB, copies=2, mode="writeback-always")
    vdi = await world.store.open("disk")
    await vdi.write(0, memoryview(b"\x5a" * BLOCK_BYTES), fua=True)
    await world.stop()
    store = await world.open()
    vdi = await store.open("disk")
    assert isinstance(vdi, Vdi)
    executor = executor_of(store.env)
    submit = executor.submit
    waiting: list[tuple[int, Any, Any, Any]] = []

    def submit_slowly(zone: int, function: Any, args: Any, done: Any) -> None:
        if function.__name__ == slow:
            waiting.append((zone, function, args, done))
        else:
            submit(zone, function, args, done)

    monkeypatch.setattr(executor, "submit", submit_slowly)
    into = memoryview(bytearray(BLOCK_BYTES))
    reading = asyncio.create_task(vdi.read(0, BLOCK_BYTES, into))
    extents = asyncio.create_task(vdi.extents(0, BLOCK_BYTES))
    await turns()
    assert not reading.done()
    stopping = asyncio.create_task(world.stop())
    await turns(1000)
    assert not stopping.done()
    monkeypatch.undo()
    for job in waiting:
        submit(*job)
    await stopping
    assert await reading == 0
    assert into == b"\x5a" * BLOCK_BYTES
    assert not (await extents)[0].hole
