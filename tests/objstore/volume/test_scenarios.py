"""Stories that users' data depends on, told to the store as a library; SCENARIOS.md says where the others are."""

import asyncio
import dataclasses
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from objstore.check.check import check_store, zones_of
from objstore.check.report import Verdict
from objstore.errors import InvalidRequest, NoSpace, OutOfRange
from objstore.units import BLOCK_BYTES, KIB, MIB
from objstore.volume.settings import StoreSettings
from objstore.volume.store import Store, open_store
from objstore.volume.vdi import Vdi
from tests.objstore.check.stores import Checked
from tests.support.stepping import World, executor_of, turns

MODES = ("writeback", "writeback-always", "writethrough")


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World(3)
    await world.open(create=True)
    yield world
    await world.kill()


async def make(store: Store | None, size_bytes: int, *, name: str = "disk", mode: str = "writeback-always") -> Vdi:
    assert store is not None
    await store.create_vdi(name, size_bytes, copies=2, mode=mode)
    return await attach(store, name)


async def attach(store: Store, name: str = "disk") -> Vdi:
    vdi = await store.open(name)
    assert isinstance(vdi, Vdi)
    return vdi


async def put(vdi: Vdi, offset: int, data: bytes) -> None:
    await vdi.write(offset, memoryview(data))


async def get(vdi: Vdi, offset: int, length: int) -> bytes:
    """As a front end reads: into a buffer that somebody has used, zeros only where it is told of them."""
    into = memoryview(bytearray(b"\xee" * length))
    zeros = vdi.read_now(offset, length, into)
    if zeros < 0:
        zeros = await vdi.read(offset, length, into)
    return bytes(length) if zeros == length else bytes(into)


@pytest.mark.parametrize("clean", [True, False])
async def test_scenario_13_a_few_bytes_of_an_odd_disk(world: World, clean: bool) -> None:
    vdi = await make(world.store, 4095)
    model = bytearray(4095)
    number = 0
    for offset in (1, 510, 511, 1020, 4089):
        for length in range(1, 7):
            number += 1
            data = bytes([number]) * length
            await put(vdi, offset, data)
            model[offset : offset + length] = data
            assert await get(vdi, 0, 4095) == model
            assert await get(vdi, offset, length) == data
    for offset, length in ((4090, 6), (4095, 1), (4096, 1)):
        with pytest.raises(OutOfRange):
            await put(vdi, offset, b"x" * length)
        with pytest.raises(OutOfRange):
            await get(vdi, offset, length)
    await vdi.flush()
    await (world.stop() if clean else world.kill())
    again = await attach(await world.open())
    assert again.size_bytes == 4095
    assert await get(again, 0, 4095) == model


async def test_scenario_14_zeros_in_the_data(world: World) -> None:
    """What was never written takes no room; zeros that a client wrote are data like any other."""
    vdi = await make(world.store, 8 * MIB)
    block, zeros = b"d" * BLOCK_BYTES, bytes(BLOCK_BYTES)
    writes = [(0, zeros + block + block), (64 * KIB, block + zeros + block), (128 * KIB + 512, block + block + zeros)]
    for offset, data in writes:
        await put(vdi, offset, data)
    for offset, data in writes:
        assert await get(vdi, offset, len(data)) == data
        assert await get(vdi, offset + 512, len(data) - 512) == data[512:]
    await vdi.flush()
    stored = sum(len(data) for storage in world.storages for name, data in storage.objects.items() if "log/" in name)
    assert stored < vdi.size_bytes


async def test_scenario_15_eight_small_writes_at_odd_places(world: World) -> None:
    vdi = await make(world.store, MIB)
    model = bytearray(MIB)
    places = [(2 * index + 1) * 12345 % (MIB - 512) // 512 * 512 for index in range(8)]
    await asyncio.gather(*(put(vdi, offset, bytes([1 + i]) * 512) for i, offset in enumerate(places)))
    for i, offset in enumerate(places):
        model[offset : offset + 512] = bytes([1 + i]) * 512
    assert await get(vdi, 0, MIB) == model


async def test_scenario_16_unwritten_ranges_are_zeros_in_any_buffer(world: World) -> None:
    vdi = await make(world.store, 3 * MIB + 7)
    await put(vdi, MIB, b"x" * BLOCK_BYTES)
    for offset, length in ((0, 1), (5, 4096), (MIB - 100, 100), (MIB + BLOCK_BYTES, 9000), (3 * MIB, 7)):
        assert await get(vdi, offset, length) == bytes(length)


async def test_scenario_17_nothing_comes_of_a_write_past_the_end(world: World) -> None:
    vdi = await make(world.store, MIB)
    await put(vdi, 0, b"x" * BLOCK_BYTES)
    await vdi.flush()
    await turns()
    before = [world.names(zone) for zone in range(3)]
    for offset, length in ((MIB - 4096, 8192), (MIB, 1), (2 * MIB, 4096), (1 << 60, 4096)):
        with pytest.raises(OutOfRange):
            await put(vdi, offset, bytes(length))
        with pytest.raises(OutOfRange):
            await vdi.trim(offset, length)
        with pytest.raises(OutOfRange):
            await vdi.zero(offset, length, no_hole=True)
    with pytest.raises(InvalidRequest):
        await put(vdi, -4096, bytes(4096))
    await turns()
    assert [world.names(zone) for zone in range(3)] == before
    assert await get(vdi, MIB - 4096, 4096) == bytes(4096)


async def test_scenario_18_trimming_a_full_disk_frees_every_zone(world: World) -> None:
    vdi = await make(world.store, 4 * MIB)
    data = random.Random(1).randbytes(4 * MIB)
    await put(vdi, 0, data)
    await vdi.flush()
    full = [sum(len(o) for n, o in storage.objects.items() if n.startswith("log/000001")) for storage in world.storages]
    assert sum(full) >= 2 * len(data)
    await vdi.trim(0, 4 * MIB)
    assert await get(vdi, 0, 4 * MIB) == bytes(4 * MIB)
    assert [(extent.length_bytes, extent.hole, extent.zero) for extent in await vdi.extents(0, 4 * MIB)] == [
        (4 * MIB, True, True)
    ]
    for _ in range(3):
        await vdi.flush()
        await vdi.keeper.checkpoint()
        await turns()
    await world.stop()
    empty = [
        sum(len(o) for n, o in storage.objects.items() if n.startswith("log/000001")) for storage in world.storages
    ]
    assert max(empty) <= 2 * world.settings.segment_bytes
    assert Checked(world).check().verdict is Verdict.CLEAN


async def test_scenario_20_a_trim_inside_is_whole_blocks_and_zeroing_is_exact(world: World) -> None:
    vdi = await make(world.store, MIB)
    for offset in (256 * KIB, 256 * KIB + 100):
        data = bytearray(random.Random(2).randbytes(MIB))
        await put(vdi, 0, bytes(data))
        await vdi.trim(offset, 64 * KIB)
        first, last = -(-offset // BLOCK_BYTES) * BLOCK_BYTES, (offset + 64 * KIB) // BLOCK_BYTES * BLOCK_BYTES
        data[first:last] = bytes(last - first)
        assert await get(vdi, 0, MIB) == data
        await vdi.zero(offset + 7, 64 * KIB, no_hole=False)
        data[offset + 7 : offset + 7 + 64 * KIB] = bytes(64 * KIB)
        assert await get(vdi, 0, MIB) == data


async def test_scenario_29_an_interrupted_replay_is_repeated(world: World) -> None:
    """Killed after a flush, then while the log is read again, more than once: the same contents."""
    vdi = await make(world.store, MIB)
    model = bytearray(MIB)
    dice = random.Random(4)
    for _ in range(60):
        offset, data = dice.randrange(200) * BLOCK_BYTES, dice.randbytes(3 * BLOCK_BYTES)
        await put(vdi, offset, data)
        model[offset : offset + len(data)] = data
    await vdi.flush()
    for steps in (1, 3, 8, 20, 60):
        await world.kill()
        opening = asyncio.create_task(attach(await world.open()))
        await turns(steps)
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)
    await world.kill()
    assert Checked(world).check().verdict is Verdict.CLEAN
    again = await attach(await world.open())
    assert await get(again, 0, MIB) == model


@pytest.fixture
async def small() -> AsyncIterator[World]:
    """A store whose zones have 14 MiB each."""
    settings = StoreSettings(segment_bytes=256 * KIB, dirty_age_seconds=60.0, dirty_bytes_max=MIB)
    world = World(2, settings=settings, capacity_bytes=14 * MIB)
    await world.open(create=True)
    yield world
    await world.kill()


async def fill_up(vdi: Vdi) -> int:
    """Write until there is no space; bytes that were taken."""
    offset = 0
    while True:
        try:
            await put(vdi, offset, bytes([1 + offset // BLOCK_BYTES % 255]) * 8 * BLOCK_BYTES)
        except NoSpace:
            return offset
        offset += 8 * BLOCK_BYTES


async def test_scenario_30_a_full_store_goes_on_when_space_is_freed(small: World) -> None:
    store = small.store
    other = await make(store, MIB, name="other")
    await put(other, 0, b"o" * BLOCK_BYTES)
    vdi = await make(store, 64 * MIB)
    taken = await fill_up(vdi)
    assert taken > MIB
    await vdi.flush()  # what was acknowledged before is kept
    assert await get(vdi, taken - BLOCK_BYTES, 1) == bytes([1 + (taken - 8 * BLOCK_BYTES) // BLOCK_BYTES % 255])
    assert await get(other, 0, 1) == b"o"
    await other.flush()
    with pytest.raises(NoSpace):
        await put(vdi, taken, b"x" * 8 * BLOCK_BYTES)
    await vdi.trim(0, taken)
    await vdi.flush()
    await put(vdi, 0, b"n" * 64 * BLOCK_BYTES)
    await put(other, BLOCK_BYTES, b"p" * BLOCK_BYTES)
    await vdi.flush()
    assert await get(vdi, 0, BLOCK_BYTES) == b"n" * BLOCK_BYTES


@pytest.mark.parametrize("clean", [True, False])
async def test_scenario_31_a_full_store_starts_and_serves_reads(small: World, clean: bool) -> None:
    vdi = await make(small.store, 64 * MIB)
    taken = await fill_up(vdi)
    await vdi.flush()
    await (small.stop() if clean else small.kill())
    assert Checked(small).check().verdict is Verdict.CLEAN
    again = await attach(await small.open())
    for offset in range(0, taken, 8 * BLOCK_BYTES):
        assert await get(again, offset, BLOCK_BYTES) == bytes([1 + offset // BLOCK_BYTES % 255]) * BLOCK_BYTES


@pytest.mark.parametrize("mode", MODES)
async def test_scenario_38_after_a_flush_every_zone_has_the_data(tmp_path: Path, mode: str) -> None:
    """Read from the zones' own files, while the store is open."""
    paths = [tmp_path / name for name in ("a", "b", "c")]
    store = await open_store(paths, create=True)
    try:
        await store.create_vdi("disk", 8 * MIB, copies=3, mode=mode)
        vdi = await attach(store)
        data = os.urandom(MIB)
        for offset in range(0, MIB, 32 * KIB):
            await put(vdi, 3 * offset, data[offset : offset + 32 * KIB])
        await vdi.flush()
        for path in paths:
            stored = b"".join(file.read_bytes() for file in sorted((path / "log" / "000001").iterdir()))
            missing = [at for at in range(0, MIB, BLOCK_BYTES) if data[at : at + BLOCK_BYTES] not in stored]
            assert missing == [], path
    finally:
        await store.shutdown()
    assert check_store(zones_of(paths)).verdict is Verdict.CLEAN


async def test_scenario_41_dirty_data_keeps_to_its_limit_also_to_a_smaller_one(small: World) -> None:
    """Far more is written than may be dirty; nothing of it is lost when the limit is lowered at a restart."""
    model = bytearray(4 * MIB)
    vdi = await make(small.store, 4 * MIB)
    dice = random.Random(5)
    peaks = []
    for limit in (2 * MIB, MIB):
        small.settings = dataclasses.replace(small.settings, dirty_bytes_max=limit)
        await small.stop()
        store = await small.open()
        vdi = await attach(store)
        assert await get(vdi, 0, 4 * MIB) == model
        peak = 0
        for _ in range(150):
            offset = dice.randrange(900) * BLOCK_BYTES
            data = dice.randbytes(16 * BLOCK_BYTES)
            await put(vdi, offset, data)
            model[offset : offset + len(data)] = data
            peak = max(peak, store.env.dirty_bytes)
            # Whoever is let in is taken whole, a client and a collection at once: a record each.
            assert store.env.dirty_bytes < limit + 2 * 257 * BLOCK_BYTES
        peaks.append(peak)
    assert peaks[0] > MIB
    assert peaks[1] > MIB // 2, "the limits were never near"
    await vdi.flush()
    await small.kill()
    vdi = await attach(await small.open())
    assert await get(vdi, 0, 4 * MIB) == model


async def test_scenario_55_reads_go_on_while_writers_wait_at_the_limit() -> None:
    world = World(2, settings=StoreSettings(segment_bytes=4 * MIB, dirty_bytes_max=MIB, dirty_age_seconds=60.0))
    store = await world.open(create=True)
    reader, writer = await make(store, MIB, name="reader"), await make(store, 8 * MIB, name="writer")
    await put(reader, 0, b"r" * MIB)
    await reader.flush()
    await put(writer, 0, b"w" * BLOCK_BYTES)
    await writer.flush()
    executor_of(store.env).hold(0, 1)
    offset = 0
    while store.env.dirty_bytes < store.env.dirty_bytes_max:
        await put(writer, offset, b"w" * 16 * BLOCK_BYTES)
        offset += 16 * BLOCK_BYTES
    waiting = asyncio.create_task(put(writer, offset, b"w" * 16 * BLOCK_BYTES))
    await turns()
    assert not waiting.done()
    for offset in range(0, MIB, 16 * BLOCK_BYTES):
        assert await get(reader, offset, BLOCK_BYTES) == b"r" * BLOCK_BYTES
    assert not waiting.done(), "the reads were served while it waited"
    executor_of(store.env).release(0, 1)
    await waiting
    await writer.flush()
    await world.stop()


async def test_scenario_24_zones_that_vanish_and_come_back(tmp_path: Path) -> None:
    """Two of three are unplugged while nobody uses the store, and plugged in again."""
    paths = [tmp_path / name for name in ("a", "b", "c")]
    store = await open_store(paths, create=True)
    await store.create_vdi("disk", MIB, copies=3)
    vdi = await attach(store)
    data = os.urandom(MIB)
    await put(vdi, 0, data)
    await vdi.flush()
    await store.shutdown()
    for path in paths[1:]:
        path.rename(path.with_name(f"{path.name}-unplugged"))
    report = check_store(zones_of(paths))
    assert report.verdict is Verdict.UNAVAILABLE
    assert [state for _, _, state in report.zones] == ["checked", "missing", "missing"]
    for path in paths[1:]:
        path.with_name(f"{path.name}-unplugged").rename(path)
    assert check_store(zones_of(paths)).verdict is Verdict.CLEAN
    store = await open_store(paths)
    try:
        assert await get(await attach(store), 0, MIB) == data
    finally:
        await store.shutdown()
