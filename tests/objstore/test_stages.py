"""Where a request's time goes."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from objstore.stages import StagedLock, Stages, follow, stage
from objstore.units import BLOCK_BYTES, MIB
from objstore.volume.settings import StoreSettings
from objstore.volume.store import open_store
from objstore.volume.vdi import Vdi
from tests.support.stepping import World, executor_of, turns


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_stages_add_up_and_nobody_who_does_not_ask_is_told() -> None:
    clock = FakeClock()
    with stage("sync"):
        clock.now = 1.0

    def fail() -> None:
        with stage("zone read"):
            clock.now += 4.0
            raise ValueError("on its way")

    async def followed() -> dict[str, float]:
        stages = Stages(clock)
        follow(stages)
        for seconds in (2.0, 3.0):
            with stage("sync"):
                clock.now += seconds
        with pytest.raises(ValueError, match="on its way"):
            fail()
        return stages.seconds

    assert asyncio.run(followed()) == {"sync": 5.0, "zone read": 4.0}
    with stage("sync"):
        clock.now += 1.0


async def test_requests_side_by_side_do_not_share_stages() -> None:
    clock = FakeClock()
    lock = StagedLock("turn")

    async def request(seconds: float) -> dict[str, float]:
        stages = Stages(clock)
        follow(stages)
        async with lock:
            await asyncio.sleep(0)
            clock.now += seconds
        return stages.seconds

    assert await asyncio.gather(request(1.0), request(2.0), request(4.0)) == [
        {"turn": 0.0},
        {"turn": 1.0},
        {"turn": 3.0},
    ]


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World(2)
    await world.open(create=True)
    yield world
    await world.kill()


async def test_what_a_write_waits_for(world: World) -> None:
    assert world.store is not None
    await world.store.create_vdi("disk", 4 * MIB, copies=2, mode="writethrough")
    vdi = await world.store.open("disk")
    assert isinstance(vdi, Vdi)
    clock = FakeClock()

    async def write(offset: int, length: int) -> dict[str, float]:
        stages = Stages(clock)
        follow(stages)
        await vdi.write(offset, memoryview(b"x" * length))
        return stages.seconds

    await write(0, BLOCK_BYTES)
    await turns()
    executor_of(vdi.disk.env).hold(1)
    writing = asyncio.create_task(write(0, BLOCK_BYTES))
    await turns()
    clock.now += 5.0
    executor_of(vdi.disk.env).release(1)
    assert (await writing)["sync"] == 5.0


async def test_what_a_write_at_the_dirty_limit_waits_for(tmp_path: Path) -> None:
    settings = StoreSettings(dirty_bytes_max=MIB)
    store = await open_store([tmp_path / "a"], settings=settings, create=True)
    await store.create_vdi("disk", 8 * MIB, mode="writeback-always")
    vdi = await store.open("disk")
    stages = Stages(asyncio.get_running_loop().time)

    async def write_all() -> None:
        follow(stages)
        for at in range(0, 8 * MIB, MIB):
            await vdi.write(at, memoryview(b"x" * MIB))

    await asyncio.create_task(write_all())
    assert stages.seconds["dirty limit"] > 0
    assert set(stages.seconds) <= {"turn", "dirty limit", "space", "map", "log append"}
    await store.close(vdi)
    await store.shutdown()
