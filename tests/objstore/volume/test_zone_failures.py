"""A store of three zones, one or two of which fail while it works, and a process that dies somewhere meanwhile."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable

import pytest

from objstore.backend.base import ZoneFailed
from objstore.errors import NoSpace, StoreError, Unavailable
from objstore.log.checkpoint import CheckpointZones
from objstore.units import BLOCK_BYTES, KIB, MIB
from objstore.volume.settings import StoreSettings
from tests.conftest import ExpectedWarnings
from tests.support.disks import ModelDisk
from tests.support.serving import eventually
from tests.support.stepping import World, executor_of, turns

SETTINGS = StoreSettings(segment_bytes=256 * KIB, dirty_age_seconds=60.0, write_wait_seconds=0.0)
STEPS = range(0, 60, 3)
"""Loop turns between a failure and the death of the process: an epoch is complete after about thirty."""


@pytest.fixture(autouse=True)
def _failures_are_logged(expected_warnings: ExpectedWarnings) -> None:
    for text in (
        "is put out",
        "is out of service",
        "can't be done without",
        "log stopped",
        "stays until",
        "waits for",
        "can't be written",
    ):
        expected_warnings.allow(text)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World(3, settings=SETTINGS)
    await world.open(create=True)
    yield world
    await world.kill()


def dead(call: str, name: str) -> None:
    """The fault of a zone that is gone for good."""
    raise ZoneFailed(f"input/output error call={call} name={name}")


def dead_in(*calls: str, part: str = "") -> Callable[[str, str], None]:
    def fault(call: str, name: str) -> None:
        if call in calls and part in name:
            dead(call, name)

    return fault


def in_service(world: World) -> frozenset[int]:
    assert world.store is not None
    return world.store.env.in_service


async def test_a_dead_zone_is_put_out_and_nobody_notices(world: World) -> None:
    disk = await ModelDisk(world).create(copies=3)
    await disk.churn(60)
    await disk.vdi.flush()
    world.backends[1].fault = dead
    await disk.churn(200)
    await disk.vdi.flush()
    assert in_service(world) == {0, 2}
    assert world.store is not None
    await world.store.create_vdi("another", MIB)
    await disk.vdi.keeper.checkpoint()
    await disk.churn(200)
    await disk.check()
    status = await world.store.status()
    assert status.health == "degraded"
    assert any("zone1" in reason for reason in status.reasons)
    await world.stop()


@pytest.mark.parametrize("part", ["log/000001/", "log/000000/", "checkpoint/", ""])
@pytest.mark.parametrize("calls", [("put",), ("create",), ("sync", "write_durable"), ("open", "read")])
async def test_any_part_of_a_zone_may_fail(
    world: World, calls: tuple[str, ...], part: str, expected_warnings: ExpectedWarnings
) -> None:
    for text in ("read failed", "unreadable", "bad copies"):
        expected_warnings.allow(text)
    disk = await ModelDisk(world, blocks=2048).create(copies=3)
    await disk.churn(40)
    world.backends[2].fault = dead_in(*calls, part=part)
    for _ in range(4):
        await disk.churn(100)
        await disk.vdi.keeper.checkpoint()
        await disk.vdi.flush()
    assert world.store is not None
    await world.store.create_vdi("another", MIB)
    await turns(200)
    await disk.check()
    await world.stop()


async def test_reads_go_to_another_zone_and_the_failure_is_reported(
    world: World, expected_warnings: ExpectedWarnings
) -> None:
    for text in ("read failed", "directory unreadable"):
        expected_warnings.allow(text)
    disk = await ModelDisk(world).create(copies=3)
    await disk.churn(60)
    await disk.vdi.flush()
    await world.stop()
    store = await world.open()
    await disk.open()
    world.backends[0].fault = dead_in("open", "read", part="log/000001/")
    await disk.check()
    assert store.env.zones[0].read_errors
    assert in_service(world) == {0, 1, 2}, "a bad sector is no reason to do without a disk"


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("here", [[0, 1, 2], [0, 2], [0, 1], [1, 2]], ids=str)
async def test_death_at_any_step_between_a_failure_and_the_epoch(world: World, step: int, here: list[int]) -> None:
    disk = await ModelDisk(world).create(copies=3)
    await disk.churn(20)
    await disk.vdi.flush()
    flushed = bytes(disk.model)
    world.backends[1].fault = dead
    await disk.write(5, 3)
    flush = asyncio.create_task(disk.vdi.flush())
    await turns(step)
    counts = flush.done() and not flush.exception()
    await world.kill()
    await asyncio.gather(flush, return_exceptions=True)
    try:
        await world.open(here=here)
        await disk.open()
    except StoreError:
        # Zone 1 knows nothing of what was flushed without it, and of two zones the other may have seen that.
        assert 1 in here
        assert len(here) < 3
        assert world.store is None or counts
        await world.kill()
        await world.open()
        await disk.open()
    shown = b"".join([await disk.read(block) for block in range(disk.blocks)])
    if counts:
        assert shown == disk.model
    else:
        assert shown in (flushed, bytes(disk.model))


@pytest.mark.parametrize("step", STEPS)
async def test_two_zones_fail_together_and_the_process_dies(world: World, step: int) -> None:
    disk = await ModelDisk(world).create(copies=3)
    await disk.churn(20)
    await disk.vdi.flush()
    flushed = bytes(disk.model)
    for zone in (1, 2):
        world.backends[zone].fault = dead
    await disk.write(5, 3)
    flush = asyncio.create_task(disk.vdi.flush())
    await turns(step)
    counts = flush.done() and not flush.exception()
    await world.kill()
    await asyncio.gather(flush, return_exceptions=True)
    assert not counts, "one copy where two are wanted"
    await world.open()
    await disk.open()
    shown = b"".join([await disk.read(block) for block in range(disk.blocks)])
    assert shown in (flushed, bytes(disk.model))


async def test_a_zone_that_hangs_under_everything(world: World) -> None:
    disk = await ModelDisk(world, blocks=2048).create(copies=3)
    await disk.churn(100)
    store = world.store
    assert store is not None
    executor_of(store.env).hold(1)
    work = asyncio.gather(
        disk.churn(300),
        disk.vdi.keeper.checkpoint(),
        store.create_vdi("another", MIB),
        disk.vdi.flush(),
    )
    await turns(500)
    assert not work.done()
    store.env.zone_failing(1, ZoneFailed("no answer"))
    await work
    await disk.vdi.flush()
    await disk.check()
    await world.stop()
    assert executor_of(store.env).outstanding(1), "the stop did not wait for what hangs"


async def let_time_pass(world: World, seconds: float) -> None:
    """In ticks of the watch, each on time."""
    assert world.store is not None
    watch = world.store.env.watch
    assert watch is not None
    watch.close()
    for _ in range(round(seconds * 10)):
        world.clock.now += 0.1
        watch.tick()
        await turns(20)


@pytest.mark.parametrize("first_fails", [False, True])
async def test_two_zones_that_hang_at_once_go_both(first_fails: bool) -> None:
    """The record that puts one of them out goes to the other one too, which would be waited for for ever."""
    world = World(5, settings=SETTINGS)
    store = await world.open(create=True)
    disk = await ModelDisk(world).create(copies=3)
    await disk.churn(30)
    open_zones = next(iter(disk.vdi.disk.writer.unsealed.values())).zones
    other = min({0, 1, 2, 3, 4} - set(open_zones))
    executor_of(store.env).hold(open_zones[0], other)
    await disk.write(5, 3)
    flush = asyncio.create_task(disk.vdi.flush())
    if first_fails:
        store.env.zone_failing(open_zones[0], ZoneFailed("input/output error"))
    await let_time_pass(world, 8.0)
    assert in_service(world) == {0, 1, 2, 3, 4} - {open_zones[0], other}
    await flush
    await disk.check()
    executor_of(store.env).release(open_zones[0], other)
    await world.stop()


@pytest.mark.parametrize("only", ["", "segment", "checkpoint"])
async def test_a_slow_zone_stays_that_has_the_only_copy_of_something(world: World, only: str) -> None:
    """Not only of what is being written: of anything that is sealed, and of the map."""
    disk = await ModelDisk(world).create(copies=3)
    await disk.churn(30)
    await disk.vdi.keeper.checkpoint()
    store, keeper, zones = world.store, disk.vdi.keeper, disk.vdi.disk.checkpoint_zones
    assert store is not None
    assert isinstance(zones, CheckpointZones)
    if only == "segment":
        next(iter(disk.vdi.disk.segments.values())).zones = (1,)
    elif only == "checkpoint":
        zones.found(keeper.number, [1])
    executor_of(store.env).hold(1)
    await disk.write(5, 3)
    flush = asyncio.create_task(disk.vdi.flush())
    await let_time_pass(world, 8.0)
    assert in_service(world) == ({0, 1, 2} if only else {0, 2})
    assert flush.done() is not bool(only)
    executor_of(store.env).release(1)
    await flush
    await disk.check()


async def test_below_min_copies_writes_fail_and_reads_go_on(world: World, expected_warnings: ExpectedWarnings) -> None:
    expected_warnings.allow("bad copies")
    disk = await ModelDisk(world).create(copies=3)
    await disk.churn(40)
    await disk.vdi.flush()
    store = world.store
    assert store is not None
    for zone in (1, 2):
        await store.env.put_out(zone, ZoneFailed("input/output error"))
    for block in itertools.count():
        try:
            await disk.vdi.write(block % disk.blocks * BLOCK_BYTES, memoryview(bytes(BLOCK_BYTES)), fua=True)
        except Unavailable:
            break
        disk.model[block % disk.blocks * BLOCK_BYTES : (block % disk.blocks + 1) * BLOCK_BYTES] = bytes(BLOCK_BYTES)
    await disk.check()
    assert (await store.status()).health == "stopped"


async def test_a_full_zone_fails_writes_at_once_and_hinders_no_read(
    world: World, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings.allow("given up")
    disk = await ModelDisk(world, blocks=4096).create(copies=3)
    await disk.churn(100)
    await disk.vdi.flush()
    world.storages[1].capacity_bytes = world.storages[1].used_bytes() + 100 * MIB
    store = world.store
    assert store is not None
    await store.create_vdi("big", 1 << 30, copies=3, mode="writeback-always")
    big = await store.open("big")

    async def fill() -> None:
        for mib in range(1024):
            await big.write(mib * MIB, memoryview(bytes(MIB)))

    with pytest.raises(NoSpace):
        await fill()
    await disk.check()
    assert in_service(world) == {0, 1, 2}, "no space is no failure"
    await big.trim(0, 1 << 30)
    await big.flush()
    await store.close(big)
    await store.delete_vdi("big")
    await eventually(lambda: not world.names(1, "log/000002/"))
    await disk.churn(100)
    await disk.vdi.flush()
    await disk.check()


async def test_reserving_zeros_asks_the_zones_that_answer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = await ModelDisk(world).create(copies=3)

    def broken() -> int:
        raise ZoneFailed("input/output error call=free_bytes")

    monkeypatch.setattr(world.backends[1], "free_bytes", broken)
    await disk.vdi.zero(0, MIB, no_hole=True)
    monkeypatch.setattr(world.backends[0], "free_bytes", broken)
    monkeypatch.setattr(world.backends[2], "free_bytes", broken)
    with pytest.raises(Unavailable, match="how much space"):
        await disk.vdi.zero(0, MIB, no_hole=True)
