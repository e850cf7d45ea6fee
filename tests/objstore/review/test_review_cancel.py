"""Callers that are cancelled in the middle: a connection that breaks, a control client that leaves."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from objstore.backend.base import Handle
from objstore.units import BLOCK_BYTES, MIB
from objstore.volume.vdi import Vdi
from tests.support.stepping import WatchedBackend, World, executor_of, turns


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World(2)
    await world.open(create=True)
    yield world
    await world.kill()


async def attach(world: World) -> Vdi:
    assert world.store is not None
    vdi = await world.store.open("disk")
    assert isinstance(vdi, Vdi)
    return vdi


async def make(world: World) -> Vdi:
    assert world.store is not None
    await world.store.create_vdi("disk", 16 * MIB, copies=2, mode="writeback-always")
    return await attach(world)


async def contents(vdi: Vdi, length: int) -> bytes:
    into = memoryview(bytearray(length))
    return bytes(length) if await vdi.read(0, length, into) == length else bytes(into)


async def test_a_request_cancelled_between_its_parts_leaves_no_parts(world: World) -> None:
    vdi = await make(world)
    old, new = b"o" * MIB, b"n" * MIB
    await vdi.write(0, memoryview(old), fua=True)
    executor = executor_of(vdi.disk.env)
    executor.hold(0, 1)
    task = asyncio.create_task(vdi.write(0, memoryview(new)))
    await turns()
    assert vdi.disk.between_parts
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    executor.release(0, 1)
    number = vdi.keeper.number
    await vdi.write(2 * MIB, memoryview(bytes(BLOCK_BYTES)), fua=True)
    await vdi.keeper.checkpoint()
    assert vdi.keeper.number > number, "no checkpoint can begin between parts"
    assert await contents(vdi, MIB) == old
    await world.kill()
    await world.open()
    assert await contents(await attach(world), MIB) == old


async def test_a_read_cancelled_while_its_segment_is_opened_leaves_no_descriptor(world: World) -> None:
    vdi = await make(world)
    await vdi.write(0, memoryview(bytes([7]) * BLOCK_BYTES), fua=True)
    await world.stop()
    await world.open()
    vdi = await attach(world)
    opened: list[Handle] = []
    closed: list[Handle] = []
    for backend in world.backends:
        watch(backend, opened, closed)
    executor = executor_of(vdi.disk.env)
    executor.hold(0, 1)
    for steps in (1, 1, 0, 0, 1, 2):
        into = memoryview(bytearray(BLOCK_BYTES))
        task = asyncio.create_task(vdi.read(0, BLOCK_BYTES, into))
        for _ in range(steps):
            await turns()
            for zone in (0, 1):
                if executor.waiting(zone):
                    executor.step(zone)
                    break
        await turns()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        for zone in (0, 1):
            while executor.waiting(zone):
                executor.step(zone)
        held = [handle for segment in vdi.disk.segments.values() for handle in segment.handles.values()]
        assert len(opened) - len(closed) == len(held)
        for segment in vdi.disk.segments.values():
            segment.close_handles()
    executor.release(0, 1)


def watch(backend: WatchedBackend, opened: list[Handle], closed: list[Handle]) -> None:
    """Note every handle that the backend gives out, and every one given back."""
    plain = backend.open

    def open_watched(name: str) -> Handle:
        handle = plain(name)
        opened.append(handle)
        handle.close = lambda: closed.append(handle)  # type: ignore[method-assign]
        return handle

    backend.open = open_watched  # type: ignore[method-assign]
