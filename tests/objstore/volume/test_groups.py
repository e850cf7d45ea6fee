"""Snapshots of groups: one instant for all of them, all or none."""

import asyncio
import random

import pytest

from objstore.errors import Exists, InvalidRequest, NotFound, Unavailable
from objstore.units import BLOCK_BYTES
from objstore.volume.vdi import Vdi
from tests.conftest import ExpectedWarnings
from tests.objstore.check.stores import Checked, faults
from tests.objstore.volume.test_snapshots import attach, get, make, put, store_of, whole, world
from tests.support.stepping import World, executor_of, turns

__all__ = ["world"]

NAMES = ("data", "log", "more")


async def counter_at(world: World, name: str) -> int:
    """The number that `count` has written to a VDI or snapshot last."""
    store = store_of(world)
    volume = await store.open(name)
    try:
        return int.from_bytes(await get(volume, 0, 8), "little")
    finally:
        await store.close(volume)


async def count(vdis: list[Vdi], dice: random.Random, end: asyncio.Event, answered: list[int]) -> None:
    """Write 1, 2, 3, ... to one VDI after the other, each once the one before was acknowledged."""
    number = 0
    while not end.is_set():
        number += 1
        for vdi in vdis:
            await put(vdi, 0, number.to_bytes(8, "little") + bytes(BLOCK_BYTES - 8))
            if dice.random() < 0.3:
                await asyncio.sleep(0)
        answered[0] = number
        await asyncio.sleep(0)


@pytest.mark.parametrize("seed", range(5))
async def test_one_instant_for_all(world: World, seed: int) -> None:
    """A write that began when another was acknowledged is in no snapshot of a group that lacks the other."""
    dice = random.Random(seed)
    vdis = [await make(world, name) for name in NAMES]
    end, answered = asyncio.Event(), [0]
    writer = asyncio.create_task(count(vdis, dice, end, answered))
    store = store_of(world)
    taken = []
    for turn in range(6):
        await turns(dice.randrange(40))
        if dice.random() < 0.5:
            dice.choice(vdis).keeper.hurry(now=True, waited_for=True)  # one is not ready, its checkpoint is under way
        before = answered[0]
        asked = list(NAMES)
        dice.shuffle(asked)
        found = await store.create_group_snapshot(asked, f"t{turn}")
        assert [snapshot.name for snapshot in found] == [f"{name}@t{turn}" for name in asked]
        taken.append((turn, before, answered[0]))
    end.set()
    await writer
    for turn, before, after in taken:
        numbers = [await counter_at(world, f"{name}@t{turn}") for name in NAMES]
        assert numbers == sorted(numbers, reverse=True), "what was written first is in first"
        assert numbers[0] - numbers[-1] <= 1
        assert before <= numbers[-1]
        assert numbers[0] <= after + 1
    await world.stop()
    assert faults(Checked(world).check()) == []


@pytest.mark.parametrize("last_turn", [*range(0, 60, 3), 200])
async def test_all_or_none_over_a_crash(world: World, last_turn: int) -> None:
    vdis = [await make(world, name) for name in NAMES]
    for number, vdi in enumerate(vdis, 1):
        await put(vdi, 0, bytes([number]) * BLOCK_BYTES)
    store = store_of(world)
    task = asyncio.create_task(store.create_group_snapshot(NAMES, "t"))
    await turns(last_turn)
    reported = task.done() and task.exception() is None
    await world.kill()
    await asyncio.gather(task, return_exceptions=True)
    store = await world.open()
    there = [snapshot.name for snapshot in store.snapshots()]
    assert there in ([], [f"{name}@t" for name in NAMES])
    assert there or not reported
    for number, name in enumerate(there, 1):
        assert (await whole(world, name))[:BLOCK_BYTES] == bytes([number]) * BLOCK_BYTES
    await world.stop()
    assert faults(Checked(world).check()) == []


async def test_who_does_not_fit_makes_it_none(world: World) -> None:
    for name in NAMES:
        await make(world, name)
    store = store_of(world)
    await store.create_snapshot("log", "taken")
    with pytest.raises(Exists, match="log@taken"):
        await store.create_group_snapshot(NAMES, "taken")
    with pytest.raises(NotFound):
        await store.create_group_snapshot(["data", "nobody"], "t")
    with pytest.raises(InvalidRequest, match="twice"):
        await store.create_group_snapshot(["data", "data"], "t")
    for names, tag in (([], "t"), (["data"], "")):
        with pytest.raises(InvalidRequest, match="a tag and at least one"):
            await store.create_group_snapshot(names, tag)
    assert [snapshot.name for snapshot in store.snapshots()] == ["log@taken"]
    (only,) = await store.create_group_snapshot(["more"], "t", protected=True)
    assert (only.name, only.protected) == ("more@t", True)


async def test_a_log_that_takes_nothing_more_lets_none_begin(world: World, expected_warnings: ExpectedWarnings) -> None:
    expected_warnings.allow("log stopped")
    vdis = [await make(world, name) for name in NAMES]
    vdis[-1].disk.writer.fail(Unavailable("it is broken"))
    with pytest.raises(Unavailable, match="broken"):
        await store_of(world).create_group_snapshot(NAMES, "t")
    assert store_of(world).snapshots() == []
    for vdi in vdis[:-1]:
        await put(vdi, 0, b"x" * BLOCK_BYTES)
        assert vdi.keeper.holds.maps == {}


async def test_one_that_is_deleted_meanwhile_makes_it_none(world: World) -> None:
    for name in NAMES:
        vdi = await make(world, name)
        await put(vdi, 0, b"x" * BLOCK_BYTES)
        await store_of(world).close(vdi)
    store = store_of(world)
    executor_of(store.env).hold(0, 1, 2)
    task = asyncio.create_task(store.create_group_snapshot(NAMES, "t"))
    await turns()
    deleting = asyncio.create_task(store.delete_vdi("log"))
    await turns()
    executor_of(store.env).release(0, 1, 2)
    results = await asyncio.gather(task, deleting, return_exceptions=True)
    there = [snapshot.name for snapshot in store.snapshots()]
    assert there == [] if isinstance(results[0], NotFound) else there == [f"{name}@t" for name in NAMES]
    assert results[1] is None
    for vdi in store.open_vdis():
        snapshots = store.catalog.state.snapshots_in(vdi.disk.log)
        assert vdi.keeper.holds.maps.keys() == {snapshot.checkpoint for snapshot in snapshots}
    await attach(world, "data")
