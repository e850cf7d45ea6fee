"""Memory of block maps stays inside its limit whatever clients write; who waits for it goes on in the end."""

import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from objstore.errors import NoSpace, Unavailable
from objstore.log.mapmemory import PINNED_BYTES_MIN, MapMemory
from objstore.log.regionmap import ARRAY_BYTES, EVICTION_BYTES_MIN, REGION_OVERHEAD_BYTES
from objstore.log.regions import TABLE_RUNS_MAX
from objstore.units import BLOCK_BYTES, GIB, KIB, MIB, REGION_BLOCKS, TIB
from objstore.volume.settings import StoreSettings
from objstore.volume.vdi import Vdi
from tests.conftest import ExpectedWarnings
from tests.support.serving import eventually
from tests.support.stepping import World, executor_of, failing, turns

LIMIT = 4 * MIB
HEAVY = ARRAY_BYTES + REGION_OVERHEAD_BYTES
RUNS = 9
"""Single blocks that make a region an array."""
SETTINGS = StoreSettings(segment_bytes=1 * MIB, dirty_age_seconds=60.0, map_memory_bytes=LIMIT)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World(1, settings=SETTINGS, capacity_bytes=4 * GIB)
    await world.open(create=True)
    yield world
    await world.kill()


async def create(world: World, name: str = "big", size_bytes: int = TIB) -> Vdi:
    assert world.store is not None
    await world.store.create_vdi(name, size_bytes, copies=1, mode="writeback-always")
    vdi = await world.store.open(name)
    assert isinstance(vdi, Vdi)
    return vdi


def account(world: World) -> MapMemory:
    assert world.store is not None
    return world.store.env.maps


async def write(vdi: Vdi, block: int, value: int = 7) -> None:
    """As the network side writes."""
    data = memoryview(value.to_bytes(8, "little") * (BLOCK_BYTES // 8))
    if not vdi.write_now(block * BLOCK_BYTES, data):
        await vdi.write(block * BLOCK_BYTES, data)


async def scatter(vdi: Vdi, region: int, runs: int = RUNS) -> None:
    """Make a region of the map an array."""
    for index in range(runs):
        await write(vdi, region * REGION_BLOCKS + 2 * index)


def heavy_in(vdi: Vdi) -> int:
    return vdi.disk.map.memory_bytes - EVICTION_BYTES_MIN * len(vdi.disk.map.regions)


@pytest.mark.timeout(120)
async def test_random_writes_all_over_a_large_disk(world: World) -> None:
    """The map is far larger than its limit: at no moment is more of it in memory."""
    vdi = await create(world)
    memory = account(world)
    dice = random.Random(1)
    model: dict[int, int] = {}
    places = [dice.randrange(TIB // BLOCK_BYTES // REGION_BLOCKS) for _ in range(1100)]
    highest = 0
    for turn in range(RUNS + 2):
        for place in places:
            block = place * REGION_BLOCKS + 2 * turn
            model[block] = len(model) + 1
            await write(vdi, block, model[block])
            highest = max(highest, memory.pinned_bytes)
            assert memory.pinned_bytes <= LIMIT + HEAVY
            assert memory.loaded_bytes <= 2 * LIMIT
    assert len(places) * HEAVY > 2 * LIMIT
    assert highest * 2 > LIMIT, "memory was never short"
    assert vdi.keeper.number > 2
    assert heavy_in(vdi) <= 2 * LIMIT
    await vdi.flush()
    await world.kill()
    await world.open()
    assert world.store is not None
    again = await world.store.open("big")
    into = memoryview(bytearray(BLOCK_BYTES))
    for block in dice.sample(sorted(model), 500):
        assert await again.read(block * BLOCK_BYTES, BLOCK_BYTES, into) == 0
        assert int.from_bytes(into[:8], "little") == model[block]
    assert account(world).loaded_bytes <= 2 * LIMIT


async def test_a_writer_that_would_pin_more_waits_and_readers_do_not(world: World) -> None:
    vdi = await create(world)
    memory = account(world)
    executor = executor_of(vdi.disk.env)
    regions = 0
    while memory.pinned_bytes * 2 + HEAVY < LIMIT:
        await scatter(vdi, regions)
        regions += 1
    assert vdi.keeper.number == 0
    vdi.disk.writer.finish_segment()
    await vdi.flush()
    await scatter(vdi, regions)
    await turns(300)
    memory.limit_bytes = memory.pinned_bytes_max = memory.pinned_bytes
    executor.hold(0)
    waiting = asyncio.create_task(write(vdi, 5000 * REGION_BLOCKS))
    await turns()
    assert memory.waiting == 1
    assert not waiting.done()
    assert world.store is not None
    status = asyncio.create_task(world.store.status())
    into = memoryview(bytearray(BLOCK_BYTES))
    assert vdi.read_now(regions * REGION_BLOCKS * BLOCK_BYTES, BLOCK_BYTES, into) == 0
    assert vdi.disk.map.lookup(5000 * REGION_BLOCKS) == 0
    executor.release(0)
    await waiting
    assert memory.waiting == 0
    assert (await status).map_bytes_max == memory.limit_bytes
    assert vdi.keeper.number >= 1


async def test_who_pins_most_has_the_checkpoint_even_if_it_is_idle(world: World) -> None:
    idle = await create(world, "idle")
    busy = await create(world, "busy")
    memory = account(world)
    memory.pinned_bytes_max = LIMIT * 100
    for region in range(40):
        await scatter(idle, region)
    memory.pinned_bytes_max = memory.pinned_bytes
    await write(busy, 0)
    assert idle.keeper.number == 1
    assert busy.keeper.number == 0
    assert memory.pinned_bytes == 0


async def test_a_log_that_failed_holds_nobody_up(world: World, expected_warnings: ExpectedWarnings) -> None:
    expected_warnings.allow("log stopped")
    failed = await create(world, "failed")
    other = await create(world, "other")
    memory = account(world)
    for region in range(40):
        await scatter(failed, region)
    memory.pinned_bytes_max = memory.pinned_bytes
    world.backends[0].fault = failing("write", "log/")
    failed.disk.writer.fail(NoSpace("for this test"))
    assert memory.pinned_bytes == 0
    world.backends[0].fault = lambda call, name: None
    await write(other, 0)


async def test_checkpoints_without_space_are_an_error_for_who_waits(
    world: World, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings.allow("checkpoint given up")
    vdi = await create(world)
    memory = account(world)
    for region in range(32):
        await scatter(vdi, region, TABLE_RUNS_MAX + 1)  # its page is an array, too
    await vdi.flush()
    memory.pinned_bytes_max = memory.pinned_bytes
    storage = world.storages[0]
    before, storage.capacity_bytes = storage.capacity_bytes, 1
    with pytest.raises(NoSpace, match="no room for the checkpoint"):
        await vdi.write(5000 * REGION_BLOCKS * BLOCK_BYTES, memoryview(bytes(BLOCK_BYTES)))
    assert vdi.disk.map.lookup(5000 * REGION_BLOCKS) == 0
    storage.capacity_bytes = before
    await write(vdi, 5000 * REGION_BLOCKS)
    assert memory.pinned_bytes < memory.pinned_bytes_max


async def test_a_deleted_disk_leaves_the_account(world: World) -> None:
    vdi = await create(world)
    for region in range(20):
        await scatter(vdi, region)
    memory = account(world)
    assert memory.pinned_bytes == 20 * HEAVY
    assert world.store is not None
    await world.store.close(vdi)
    await world.store.delete_vdi("big")
    await eventually(lambda: (memory.pinned_bytes, memory.loaded_bytes, memory.owners) == (0, 0, []))


def test_a_limit_below_what_is_worth_a_checkpoint() -> None:
    assert MapMemory(1).pinned_bytes_max == PINNED_BYTES_MIN == 256 * KIB


async def test_who_waits_for_a_disk_whose_checkpoint_can_not_come_is_told() -> None:
    """The map of another disk's snapshot waits for zones that stay away: a write waited for ever (simulation, seed
    606)."""

    class Owner:
        gave_up = False
        pinned_bytes = PINNED_BYTES_MIN
        error = None
        stuck: Unavailable | None = None
        asked = 0

        def evict(self, excess_bytes: int) -> None: ...

        def relieve(self) -> None:
            self.asked += 1

    memory, owner = MapMemory(1), Owner()
    memory.pinned_bytes = PINNED_BYTES_MIN
    memory.owners.append(owner)
    waiting = asyncio.create_task(memory.room(lambda: True))
    await turns()
    memory.wake()
    await turns()
    assert not waiting.done()
    owner.stuck = Unavailable("no zone is left for a checkpoint")
    memory.wake()
    with pytest.raises(Unavailable, match="no zone is left"):
        await waiting
    assert owner.asked == 2
