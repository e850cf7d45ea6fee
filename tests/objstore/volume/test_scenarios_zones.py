"""Stories about zones that fail, come back and flap, told once each with a store and its clients."""

import asyncio
import dataclasses
import random
from collections.abc import AsyncIterator

import pytest

from objstore.backend.base import ZoneFailed
from objstore.check.report import Severity
from objstore.errors import StoreError, Unavailable
from objstore.units import BLOCK_BYTES, MIB
from objstore.volume import recovery, zones
from objstore.volume.vdi import Vdi
from tests.conftest import ExpectedWarnings
from tests.objstore.check.stores import Checked
from tests.support.disks import ModelDisk
from tests.support.stepping import SMALL_SEGMENTS, World, turns

BLOCKS = 256


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, expected_warnings: ExpectedWarnings) -> None:
    monkeypatch.setattr(recovery, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(recovery, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(zones, "RETRY_SECONDS", 3600.0)
    expected_warnings.allow(
        "is put out|is out of service|is out since|is back|failed and|stays|can't be|could not be|log stopped|"
        "waits for|a copy|read failed|unreadable|given up|recovery stopped|no zone has|no zone that holds|checksum"
    )


def broken(call: str, name: str) -> None:
    raise ZoneFailed(f"input/output error call={call} name={name}")


async def out(world: World, zone: int) -> None:
    """The zone answers nothing but EIO from now on, and is put out."""
    assert world.store is not None
    world.backends[zone].fault = broken
    await world.store.env.put_out(zone, ZoneFailed("input/output error"))


@pytest.fixture
async def worlds() -> AsyncIterator[list[World]]:
    made: list[World] = []
    yield made
    for world in made:
        await world.kill()


async def opened(worlds: list[World], *, min_copies: int = 0, count: int = 3) -> World:
    world = World(count, settings=dataclasses.replace(SMALL_SEGMENTS, min_copies=min_copies))
    worlds.append(world)
    await world.open(create=True)
    return world


async def test_scenario_23_strict_two_of_three_gone(worlds: list[World]) -> None:
    """min_copies 2: writes fail, reads go on, and nothing that was acknowledged before is lost."""
    world = await opened(worlds, min_copies=2)
    disk = await ModelDisk(world).create(copies=3)
    await disk.churn(60)
    await disk.vdi.flush()
    await out(world, 1)
    await disk.churn(60)
    await disk.vdi.flush()
    flushed = bytes(disk.model)
    await out(world, 2)
    for block in range(200):
        with pytest.raises(Unavailable):
            await disk.vdi.write(block * BLOCK_BYTES, memoryview(b"n" * BLOCK_BYTES))
    assert world.store is not None
    status = await world.store.status()
    assert status.health != "ok"
    assert sum("is out" in reason for reason in status.reasons) == 2
    assert bytes(disk.model) == flushed
    await disk.check()
    await world.kill()
    await world.open()
    await disk.open()
    await disk.check()


async def test_scenario_23_one_copy_is_enough_and_is_reported(worlds: list[World]) -> None:
    """min_copies 1: accepted and flushed, and the status says with how many copies."""
    world = await opened(worlds, min_copies=1)
    disk = await ModelDisk(world).create(copies=3)
    await disk.churn(60)
    await out(world, 1)
    await out(world, 2)
    await disk.churn(60)
    await disk.vdi.flush()
    await disk.check()
    assert world.store is not None
    status = await world.store.status()
    assert status.health == "degraded"
    assert status.under_replicated
    assert any("copies" in reason for reason in status.reasons)
    await world.kill()
    await world.open(here=[0])
    await disk.open()
    await disk.check()


async def test_scenario_32_one_call_several_all_and_the_last_zone(worlds: list[World]) -> None:
    """EIO from one call of a zone, from several zones, from the last one: each is dropped, I/O goes on while one that
    is enough is left, and the end is errors within a bounded time, not calls made again and again."""
    world = await opened(worlds, min_copies=1)
    disk = await ModelDisk(world).create(copies=3)
    await disk.churn(60)
    await disk.vdi.flush()
    failed: list[str] = []

    def once(call: str, name: str) -> None:
        if call in ("write", "write_durable", "sync") and not failed:
            failed.append(call)
            broken(call, name)

    world.backends[0].fault = once
    await disk.churn(60)
    await disk.vdi.flush()
    assert world.store is not None
    assert failed
    assert world.store.env.in_service == {1, 2}
    world.backends[1].fault = broken
    await disk.churn(60)
    await disk.vdi.flush()
    assert world.store.env.in_service == {2}
    await disk.check()
    asked = 0

    def counted(call: str, name: str) -> None:
        nonlocal asked
        asked += 1
        broken(call, name)

    world.backends[2].fault = counted
    with pytest.raises(StoreError):
        await disk.vdi.write(0, memoryview(b"n" * BLOCK_BYTES), fua=True)
    with pytest.raises(StoreError):
        await disk.vdi.write(0, memoryview(b"n" * BLOCK_BYTES), fua=True)
    assert (await world.store.status()).health == "stopped"
    before = asked
    await turns(2000)
    assert asked - before < 10, "the dead zone is asked again and again"
    await world.kill()
    await world.open()
    await disk.open()
    assert await disk.read(1, disk.blocks - 1) == disk.expected(1, disk.blocks - 1)


async def test_scenario_37_clients_and_creations_while_zones_come_and_go(worlds: list[World]) -> None:
    """Sixteen clients and a stream of creations; one zone after the other goes and comes back under them."""
    world = await opened(worlds, min_copies=1, count=4)
    store = world.store
    assert store is not None
    dice = random.Random(7)
    models: dict[str, bytearray] = {}
    created: list[str] = []
    done = asyncio.Event()

    async def client(number: int) -> None:
        name = f"disk{number}"
        await store.create_vdi(name, BLOCKS * BLOCK_BYTES, copies=3, mode="writeback-always")
        vdi = await store.open(name)
        model = models[name] = bytearray(BLOCKS * BLOCK_BYTES)
        turn = 0
        while not done.is_set() or turn < 20:
            turn += 1
            at = dice.randrange(BLOCKS - 8) * BLOCK_BYTES
            data = dice.randbytes(dice.randint(1, 8) * BLOCK_BYTES)
            await vdi.write(at, memoryview(data), fua=turn % 5 == 0)
            model[at : at + len(data)] = data
            await asyncio.sleep(0)
        await vdi.flush()

    async def creator() -> None:
        number = 0
        while not done.is_set():
            name = f"made{number}"
            await store.create_vdi(name, MIB, copies=3)
            created.append(name)
            number += 1
            await turns(20)

    async def flapper() -> None:
        for turn in range(12):
            zone = turn % 4
            await out(world, zone)
            await turns(60)
            await store.zones.add(f"zone{zone}")
            await turns(60)
        done.set()

    async with asyncio.TaskGroup() as group:
        for number in range(16):
            group.create_task(client(number))
        group.create_task(creator())
        group.create_task(flapper())
    await compare(world, models)
    await world.kill()
    store = await world.open()
    assert set(store.names()) == {*models, *created}
    assert len(created) == len(set(created))
    await compare(world, models)
    store.recovery.request()
    await store.wait_for_recovery()
    assert (await store.status()).reasons == []
    await world.stop()


async def compare(world: World, models: dict[str, bytearray]) -> None:
    assert world.store is not None
    for name, model in models.items():
        vdi = await world.store.open(name)
        into = memoryview(bytearray(len(model)))
        zeros = await vdi.read(0, len(into), into)
        assert zeros == len(into) or bytes(into) == model, name


@pytest.mark.parametrize("seed", range(4))
async def test_scenario_42_flushes_while_recovery_runs_and_zones_flap(worlds: list[World], seed: int) -> None:
    """A flush waits or fails; what one has covered is there after the process died in the middle of it all."""
    world = await opened(worlds, min_copies=1)
    disk = await ModelDisk(world, blocks=512, seed=seed).create(copies=2)
    await disk.churn(150)
    await disk.vdi.flush()
    dice = random.Random(seed)
    flushed = bytes(disk.model)
    done = False

    async def flapper() -> None:
        nonlocal done
        store = world.store
        assert store is not None
        for turn in range(6):
            zone = (turn + seed) % 3
            await out(world, zone)
            await turns(dice.randrange(100))
            await store.zones.add(f"zone{zone}")
            await turns(dice.randrange(200))
        done = True

    flapping = asyncio.create_task(flapper())
    flushes = 0
    while not done:
        await disk.churn(3)
        model = bytes(disk.model)
        await disk.vdi.flush()
        flushed = model
        flushes += 1
    await flapping
    assert flushes > 6
    assert world.store is not None
    assert isinstance(disk.vdi, Vdi)
    assert world.store.recovery.status().copies_made or world.store.recovery.status().running
    assert bytes(disk.model) == flushed, "everything was flushed last"
    await world.kill()
    await world.open()
    await disk.open()
    await disk.check()
    await world.kill()
    assert not [finding for finding in Checked(world).check().findings if finding.severity is Severity.DAMAGE]
