"""Collection, checkpoints and reads when a zone can't be read or is full: others' copies serve, and nobody waits for
space that nothing will free."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

import pytest

from objstore.backend.base import ZoneFailed
from objstore.errors import NoSpace
from objstore.units import BLOCK_BYTES, KIB, MIB
from objstore.volume.settings import StoreSettings
from objstore.volume.vdi import Vdi
from tests.conftest import ExpectedWarnings
from tests.support.stepping import WatchedHandle, World, turns

SIZE_BYTES = 4 * MIB
SETTINGS = StoreSettings(segment_bytes=256 * KIB, dirty_age_seconds=60.0, dirty_bytes_max=MIB)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World(2, settings=SETTINGS)
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
    await world.store.create_vdi("disk", SIZE_BYTES, copies=2, mode="writeback-always")
    vdi = await attach(world)
    await fill(vdi, 0)
    await vdi.flush()
    return vdi


def block(lba: int, turn: int) -> bytes:
    return f"{lba:8}{turn:8}".encode() * (BLOCK_BYTES // 16)


async def fill(vdi: Vdi, turn: int, step: int = 1) -> None:
    for lba in range(0, SIZE_BYTES // BLOCK_BYTES, step):
        await vdi.write(lba * BLOCK_BYTES, memoryview(block(lba, turn)))


async def ends(task: "asyncio.Task[None]") -> bool:
    """Whether a task ends without any help."""
    for _ in range(400):
        await turns()
        if task.done():
            return True
    task.cancel()
    return False


def unreadable(call: str, part: str) -> Callable[[str, str], None]:
    def fault(called: str, name: str) -> None:
        if called == call and part in name:
            raise ZoneFailed(f"input/output error call={call} name={name}")

    return fault


@pytest.mark.parametrize("call", ["open", "read"])
async def test_map_pages_come_from_another_zone_when_one_returns_errors(
    world: World, call: str, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings.allow("map pages unreadable")
    await make(world)
    await world.stop()
    await world.open()
    vdi = await attach(world)
    for backend in world.backends:
        backend.fault = unreadable(call, "checkpoint/")
        into = memoryview(bytearray(BLOCK_BYTES))
        await vdi.read(0, BLOCK_BYTES, into)
        assert into == block(0, 0)
        backend.fault = lambda call, name: None
        vdi.disk.map.evict(0, vdi.keeper.root.get(0))


@pytest.mark.parametrize("zones", [1, 2])
async def test_writes_go_on_when_segments_cannot_be_collected(
    world: World, zones: int, expected_warnings: ExpectedWarnings
) -> None:
    for text in (
        "directory unreadable",
        "collection stopped",
        "can't be collected",
        "read failed",
        "is out of service",
        "a copy (is bad|can't be read)",
        "no zone has all of a segment",
    ):
        expected_warnings.allow(text)
    vdi = await make(world)
    for backend in world.backends[:zones]:
        backend.fault = unreadable("open", "log/000001/")
    for turn in range(1, 12):
        assert await ends(asyncio.create_task(fill(vdi, turn, 2))), f"writes wait for ever in turn {turn}"
        await vdi.flush()
    if zones == 1:
        assert len(world.names(1, "log/000001/")) < 80, "the other zone's copies can be collected"


async def test_writes_are_told_of_a_full_zone_when_no_checkpoint_fits(
    world: World, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings.allow("checkpoint given up")
    vdi = await make(world)
    tries = 0

    def full(call: str, name: str) -> None:
        nonlocal tries
        if call == "put" and "checkpoint/" in name:
            tries += 1
            raise NoSpace("the zone is full")

    world.backends[0].fault = full
    for turn in range(1, 12):
        assert await ends(asyncio.create_task(fill(vdi, turn, 1))), f"writes wait for ever in turn {turn}"
        await vdi.flush()
    before = tries
    await turns(2000)
    assert tries - before < 3, "checkpoints are tried again without a pause"
    world.backends[0].fault = lambda call, name: None
    for turn in range(12, 15):
        assert await ends(asyncio.create_task(fill(vdi, turn, 1)))
        await vdi.flush()
    await vdi.keeper.checkpoint()
    await vdi.keeper.checkpoint()
    await turns()
    assert len(world.names(0, "log/000001/")) < 80


async def test_a_read_without_waiting_that_meets_an_error_goes_to_another_zone(
    world: World, monkeypatch: pytest.MonkeyPatch, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings.allow("read failed")
    vdi = await make(world)
    await vdi.keeper.checkpoint()
    into = memoryview(bytearray(2 * BLOCK_BYTES))

    def broken(handle: WatchedHandle, offset_bytes: int, buffers: Sequence[memoryview]) -> int:
        raise ZoneFailed("input/output error")

    monkeypatch.setattr(WatchedHandle, "read_nowait", broken)
    world.backends[0].fault = unreadable("read", "log/000001/")
    for count in (1, 2):
        into[:] = bytes(len(into))
        assert vdi.read_now(0, count * BLOCK_BYTES, into[: count * BLOCK_BYTES]) == -1
        await vdi.read(0, count * BLOCK_BYTES, into[: count * BLOCK_BYTES])
        assert into[: count * BLOCK_BYTES] == b"".join(block(lba, 0) for lba in range(count))


async def test_whoever_may_use_the_reserve_is_not_refused_for_another_who_may_not(world: World) -> None:
    vdi = await make(world)
    for storage in world.storages:
        storage.capacity_bytes = storage.used_bytes() + MIB
    full = False
    for lba in range(2048):
        try:
            await vdi.write(lba % 1024 * BLOCK_BYTES, memoryview(block(lba, 1)), fua=True)
        except NoSpace:
            full = True
            break
    assert full
    writer = vdi.disk.writer
    client = asyncio.create_task(writer.make_room(vdi.disk.env.reserve_bytes))
    collection = asyncio.create_task(writer.make_room(0))
    await asyncio.wait([client, collection])
    assert collection.exception() is None
    await asyncio.gather(client, return_exceptions=True)
