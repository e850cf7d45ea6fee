"""Callers that are cancelled in the middle: a connection that breaks, a control client that leaves."""

import asyncio
from collections.abc import AsyncIterator

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
