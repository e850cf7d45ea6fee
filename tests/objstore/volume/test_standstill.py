"""Zones fail under the end of a log that others in service could take: it is appended again there, and goes on."""

import asyncio
import dataclasses
import random
from collections.abc import AsyncIterator

import pytest

from objstore.backend.base import ZoneFailed
from objstore.errors import Unavailable
from objstore.units import BLOCK_BYTES, KIB, MIB
from objstore.volume.settings import StoreSettings
from tests.conftest import ExpectedWarnings
from tests.support.disks import ModelDisk
from tests.support.serving import eventually
from tests.support.stepping import World, executor_of, turns

PATIENT = StoreSettings(segment_bytes=256 * KIB, dirty_age_seconds=60.0, write_wait_seconds=600.0)
IMPATIENT = StoreSettings(segment_bytes=256 * KIB, dirty_age_seconds=60.0, write_wait_seconds=0.0)


@pytest.fixture(autouse=True)
def _failures_are_logged(expected_warnings: ExpectedWarnings, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in (
        "is put out",
        "is out of service",
        "can't be done without",
        "waits for zones",
        "appended again",
        "given up",
        "can't be written",
        "stays until",
        "an old file stays",
        "is back",
        "read failed",
        "unreadable",
        "failed: ",
        "copies are missing",
        "a copy is missing",
        "a copy could not be written",
        "can't be looked at",
        "recovery",
        "no head could be written",
        "collection stopped",
        "could not be sealed",
        "log stopped log=0",
        "can't be collected",
        "a copy is bad",
        "a copy can't be read",
        "a checkpoint can't be read",
        "no zone has all of",
    ):
        expected_warnings.allow(text)
    monkeypatch.setattr("objstore.volume.zones.RETRY_SECONDS", 1e6)  # zones come back when a test says so


@pytest.fixture
async def worlds() -> AsyncIterator[list[World]]:
    made: list[World] = []
    yield made
    for world in made:
        await world.kill()


async def started(worlds: list[World], zones: int, settings: StoreSettings = PATIENT) -> World:
    world = World(zones, settings=settings)
    worlds.append(world)
    await world.open(create=True)
    return world


def dead(call: str, name: str) -> None:
    raise ZoneFailed(f"input/output error call={call} name={name}")


def break_zones(world: World, *zones: int) -> None:
    """Every call fails from now on."""
    for zone in zones:
        world.backends[zone].fault = dead


async def put_out(world: World, *zones: int) -> None:
    """Fail one after the other."""
    assert world.store is not None
    for zone in zones:
        break_zones(world, zone)
        await world.store.env.put_out(zone, ZoneFailed("input/output error"))


async def bring_back(world: World, zone: int) -> None:
    assert world.store is not None
    await world.store.zones.add(f"zone{zone}")


def end_zones(disk: ModelDisk) -> list[int]:
    segment = disk.vdi.disk.writer.segment
    assert segment is not None
    return list(segment.zones)


async def flushed(disk: ModelDisk, *blocks: int) -> None:
    for block in blocks:
        await disk.write(block)
    await disk.vdi.flush()


@pytest.mark.parametrize("durable", [False, True], ids=["nothing flushed", "some flushed"])
@pytest.mark.parametrize("clean", [False, True], ids=["killed", "stopped"])
async def test_a_flush_ends_on_other_zones(worlds: list[World], durable: bool, clean: bool) -> None:
    world = await started(worlds, 5)
    disk = await ModelDisk(world).create(copies=3)
    await flushed(disk, *((1, 2, 3) if durable else (1,)))
    if not durable:
        disk.vdi.disk.writer.finish_segment()
    await disk.write(3, 5)
    gone = end_zones(disk)[:2]
    executor_of(disk.vdi.disk.env).hold(*gone)
    flush = asyncio.create_task(disk.vdi.flush())
    await turns()
    assert not flush.done()
    for zone in gone:
        disk.vdi.disk.env.zone_failing(zone, ZoneFailed("no answer"))
    await flush
    writer = disk.vdi.disk.writer
    assert writer.generation == 2
    copies = [segment.zones for segment in disk.vdi.disk.segments.values() if segment.generation == 2]
    assert copies
    assert all(len(disk.vdi.disk.env.serving(zones)) == 3 for zones in copies)
    await disk.check()
    await flushed(disk, 7, 8)
    await disk.vdi.keeper.checkpoint()
    executor_of(disk.vdi.disk.env).release(*gone)  # what hangs keeps the zone until the process has ended
    await turns()
    await disk.reopen(clean=clean)
    await disk.check()


async def test_what_lay_there_before_is_no_part_of_the_log(worlds: list[World]) -> None:
    world = await started(worlds, 4)
    disk = await ModelDisk(world).create(copies=3)
    await flushed(disk, 1, 2)
    segment = disk.vdi.disk.writer.segment
    assert segment is not None
    gone = list(segment.zones)[:2]
    await disk.write(1, 5)
    await put_out(world, *gone)
    await disk.vdi.flush()
    await turns(300)
    assert not [name for zone in segment.zones[2:] for name in world.names(zone) if name == segment.name]
    for zone in gone:
        assert segment.name in world.names(zone)
        await bring_back(world, zone)
    store = world.store
    assert store is not None
    await eventually(lambda: not any(segment.name in world.names(zone) for zone in range(4)))
    await flushed(disk, 9)
    await disk.reopen(clean=False)
    await disk.check()


async def test_writes_wait_for_a_zone_and_go_on_with_it(worlds: list[World]) -> None:
    world = await started(worlds, 3)
    disk = await ModelDisk(world).create(copies=3)
    await flushed(disk, 1, 2)
    await disk.write(3, 4)
    await put_out(world, 1, 2)
    flush = asyncio.create_task(disk.vdi.flush())
    write = asyncio.create_task(disk.vdi.write(0, memoryview(disk.model)[:BLOCK_BYTES]))
    await turns(300)
    assert not flush.done()
    assert not write.done()
    await bring_back(world, 2)
    await flush
    await write
    await flushed(disk, 9)
    await disk.check()
    await world.kill()
    await world.open(here=[2, 0])
    await disk.open()
    await disk.check()


async def test_writes_that_failed_go_on_when_a_zone_is_back_and_nothing_acknowledged_is_lost(
    worlds: list[World],
) -> None:
    world = await started(worlds, 3, IMPATIENT)
    disk = await ModelDisk(world).create(copies=3)
    await flushed(disk, 1, 2)
    await disk.write(3, 4)  # acknowledged, and not durable
    await put_out(world, 1, 2)
    store = world.store
    assert store is not None
    await turns()
    for _ in range(2):
        with pytest.raises(Unavailable, match="too few zones"):
            await disk.vdi.flush()
        with pytest.raises(Unavailable, match="too few zones"):
            await disk.vdi.write(0, memoryview(bytes(BLOCK_BYTES)))
    assert (await store.status()).health == "stopped"
    assert not store.env.dirty_bytes, "other disks don't wait for what this one can't make durable"
    await disk.check()
    await bring_back(world, 1)
    await eventually(lambda: not disk.vdi.disk.writer.waits_for_takeover)
    await flushed(disk, 9)
    assert not store.env.dirty_bytes
    await disk.check()
    await disk.reopen(clean=False)
    await disk.check()


async def test_one_copy_on_a_zone_that_goes_and_comes(worlds: list[World]) -> None:
    world = await started(worlds, 3, IMPATIENT)
    disk = await ModelDisk(world).create(copies=1)
    await flushed(disk, 1, 2)
    (zone,) = end_zones(disk)
    await disk.write(3, 4)
    await put_out(world, zone)
    await turns()
    with pytest.raises(Unavailable):
        await disk.vdi.flush()
    await turns(200)
    with pytest.raises(Unavailable):
        await disk.vdi.flush()
    await bring_back(world, zone)
    await eventually(lambda: not disk.vdi.disk.writer.waits_for_takeover)
    await flushed(disk, 9)
    await disk.check()
    await disk.reopen(clean=True)
    await disk.check()


async def test_one_copy_of_which_nothing_was_durable_yet(worlds: list[World]) -> None:
    world = await started(worlds, 3)
    disk = await ModelDisk(world).create(copies=1)
    await disk.write(3, 4)
    (zone,) = end_zones(disk)
    await put_out(world, zone)
    await disk.vdi.flush()
    await disk.check()
    await world.kill()
    await world.open(here=[z for z in range(3) if z != zone])
    await disk.open()
    await disk.check()


async def test_a_sealed_segment_on_too_few_zones_is_appended_again(worlds: list[World]) -> None:
    world = await started(worlds, 5)
    disk = await ModelDisk(world).create(copies=5)
    await flushed(disk, 1)
    writer = disk.vdi.disk.writer
    break_zones(world, 1, 2)
    await disk.write(2, 5)
    writer.finish_segment()
    flush = asyncio.create_task(disk.vdi.flush())
    await turns(500)
    assert writer.waits_for_takeover
    assert writer.unsealed, "the zones that are left have all of it, and its seal, but they are too few"
    assert not flush.done()
    world.backends[1].fault = lambda call, name: None
    await bring_back(world, 1)
    await flush
    await flushed(disk, 9)
    await disk.check()
    assert writer.error is None
    await disk.reopen(clean=False)
    await disk.check()


async def test_what_became_durable_and_sealed_meanwhile_need_not_be_appended_again(worlds: list[World]) -> None:
    world = await started(worlds, 3)
    disk = await ModelDisk(world).create(copies=2)
    await flushed(disk, 1, 2)
    writer = disk.vdi.disk.writer
    executor_of(disk.vdi.disk.env).hold(0, 1, 2)
    writer.finish_segment()
    writer.request_sync()
    await turns()
    assert writer.unsealed, "its seals are being written"
    writer._stand_still()
    await turns()
    assert writer.waits_for_takeover
    executor_of(disk.vdi.disk.env).release(0, 1, 2)
    await eventually(lambda: not writer.waits_for_takeover)
    await flushed(disk, 2, 3)
    await disk.check()
    assert writer.error is None
    await world.kill()
    await world.open()
    await disk.check()


async def test_zones_that_fail_together_and_work_again(worlds: list[World], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three at once: no epoch can follow until one of them takes it."""
    monkeypatch.setattr("objstore.log.env.PUT_OUT_AGAIN_SECONDS", 0.02)
    world = await started(worlds, 3, IMPATIENT)
    disk = await ModelDisk(world).create(copies=3)
    await flushed(disk, 1, 2)
    break_zones(world, 1, 2)
    await disk.write(3, 4)
    with pytest.raises(Unavailable):
        await disk.vdi.flush()
    store = world.store
    assert store is not None
    assert store.membership.in_service == {0, 1, 2}
    with pytest.raises(Unavailable):
        await disk.vdi.write(0, memoryview(bytes(BLOCK_BYTES)))
    world.backends[1].fault = lambda call, name: None
    await eventually(lambda: store.membership.in_service == {0})
    await bring_back(world, 1)
    await eventually(lambda: not disk.vdi.disk.writer.waits_for_takeover)
    await flushed(disk, 9)
    await store.create_vdi("another", MIB)
    await disk.check()
    await disk.reopen(clean=False)
    await disk.check()


@pytest.mark.parametrize("step", range(0, 120, 4))
async def test_death_at_any_step(worlds: list[World], step: int) -> None:
    world = await started(worlds, 5)
    disk = await ModelDisk(world).create(copies=3)
    await disk.churn(20)
    await disk.vdi.flush()
    before = bytes(disk.model)
    await disk.write(5, 3)
    gone = end_zones(disk)[:2]
    break_zones(world, *gone)
    flush = asyncio.create_task(disk.vdi.flush())
    await turns(step)
    counts = flush.done() and not flush.exception()
    await world.kill()
    await asyncio.gather(flush, return_exceptions=True)
    await world.open()
    await disk.open()
    shown = b"".join([await disk.read(block) for block in range(disk.blocks)])
    assert shown in ((bytes(disk.model),) if counts else (before, bytes(disk.model)))
    disk.model[:] = shown
    await disk.churn(40)
    await disk.vdi.flush()
    await disk.check()


@pytest.mark.parametrize("seed", range(16))
async def test_under_everything_else(worlds: list[World], seed: int) -> None:
    """Requests of several parts, discards, collection and checkpoints are under way when zones fail, hang, return."""
    dice = random.Random(seed)
    world = await started(worlds, 5, dataclasses.replace(PATIENT, dirty_bytes_max=MIB))
    disk = await ModelDisk(world, blocks=2048, seed=seed).create(copies=dice.choice((1, 2, 3)))
    await disk.churn(dice.randrange(150))
    store = world.store
    assert store is not None
    executor = executor_of(store.env)
    work = asyncio.gather(
        disk.churn(150, blocks_max=600),
        disk.vdi.keeper.checkpoint(),
        *(disk.vdi.flush() for _ in range(2)),
        return_exceptions=True,
    )
    for _ in range(3):
        await turns(dice.randrange(400))
        writer = disk.vdi.disk.writer
        zones = [z for z in (writer.segment.zones if writer.segment else range(5)) if z in store.env.in_service]
        gone = dice.sample(zones, min(len(zones), dice.randint(1, 2), len(store.env.in_service) - 3))
        if dice.random() < 0.5:
            executor.hold(*gone)
            await turns(dice.randrange(100))
        for zone in gone:
            break_zones(world, zone)
            store.env.zone_failing(zone, ZoneFailed("input/output error"))
        await turns(dice.randrange(400))
        for zone in gone:
            executor.release(zone)
            await eventually(lambda zone=zone: zone not in store.env.in_service)  # type: ignore[misc]
            await turns()
            await bring_back(world, zone)
    churned, checkpoint, *flushes = await work
    assert [churned, *flushes] == [None] * 3
    assert checkpoint is None or isinstance(checkpoint, Unavailable), "all zones that it was to go to may have failed"
    await disk.vdi.flush()
    await disk.check()
    await disk.vdi.keeper.checkpoint()
    live = disk.vdi.disk.map.count_live()
    assert live == {s.key: s.live for s in disk.vdi.disk.segments.values() if s.live}
    clean = dice.random() < 0.5
    await disk.reopen(clean=clean)
    assert not clean or not store.env.dirty_bytes, "the account of dirty data comes out even"
    await disk.check()


async def test_a_snapshot_whose_map_is_being_written_stays_what_it_was(worlds: list[World]) -> None:
    """Its map names segments of the end: they stay until it is written, and writing stands still that long."""
    world = await started(worlds, 5)
    disk = await ModelDisk(world).create(copies=3)
    await flushed(disk, 1, 2)
    store = world.store
    assert store is not None
    gone = end_zones(disk)[:2]
    taking = asyncio.create_task(store.create_snapshot("disk", "tag"))
    await turns(3)
    assert not taking.done()
    expected = bytes(disk.model)
    await disk.write(3, 4)
    break_zones(world, *gone)
    for zone in gone:
        store.env.zone_failing(zone, ZoneFailed("input/output error"))
    await asyncio.gather(taking, return_exceptions=True)
    await eventually(lambda: not disk.vdi.disk.writer.waits_for_takeover)
    await disk.vdi.flush()
    await disk.check()
    await flushed(disk, 1, 7)
    await disk.reopen(clean=False)
    await disk.check()
    store = world.store
    assert store is not None
    if not taking.exception():
        snapshot = await store.open("disk@tag")
        into = bytearray(len(expected))
        await snapshot.read(0, len(expected), memoryview(into))
        assert into == expected


async def test_a_zone_is_tried_again_by_itself_once_every_call_has_returned(
    worlds: list[World], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = await started(worlds, 3, IMPATIENT)
    disk = await ModelDisk(world).create(copies=3)
    await flushed(disk, 1, 2)
    store = world.store
    assert store is not None
    executor = executor_of(store.env)
    executor.hold(2)
    await disk.write(3, 4)
    flush = asyncio.create_task(disk.vdi.flush())
    await turns()
    await store.env.put_out(2, ZoneFailed("no answer"))
    await flush
    monkeypatch.setattr("objstore.volume.zones.RETRY_SECONDS", 0.01)
    store.zones._wake.set()
    await eventually(lambda: 2 in store.zones._tried)
    await turns(100)
    assert store.env.in_service == {0, 1}, "a call from before could still write"
    executor.release(2)
    await turns()
    world.clock.now += 1e3  # the next attempt is due
    await eventually(lambda: store.env.in_service == {0, 1, 2})
    await flushed(disk, 9)
    await disk.check()
