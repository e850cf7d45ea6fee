"""Where new data goes when zones are added and weighed, and additions that end anywhere."""

from collections import Counter
from collections.abc import AsyncIterator

import pytest

from objstore.errors import InvalidRequest, NotFound
from objstore.units import MIB
from objstore.volume.opening import Placement
from tests.conftest import ExpectedWarnings
from tests.support.disks import ModelDisk
from tests.support.stepping import SteppingExecutor, WatchedBackend, World, turns


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World(3)
    await world.open(create=True)
    yield world
    await world.kill()


async def add(world: World, weight: float | None = None) -> int:
    """Add one more zone to the open store; its number."""
    assert world.store is not None
    return await world.store.zones.add(f"zone{len(world.storages)}", weight)


def shares(world: World, copies: int = 1) -> Counter[int]:
    """Zones of many runs of segments of many logs."""
    assert world.store is not None
    found: Counter[int] = Counter()
    for log in range(1, 300):
        for zone in Placement(world.store.membership, log, copies)(0):
            found[zone] += 1
    return found


async def test_a_new_zone_gets_the_catalog_and_its_share(world: World) -> None:
    disk = await ModelDisk(world).create(copies=3)
    await disk.churn(30)
    number = await add(world)
    store = world.store
    assert store is not None
    assert store.membership.in_service == {0, 1, 2, 3}
    assert world.names(number, "catalog/") == world.names(0, "catalog/")
    assert shares(world)[number] == pytest.approx(75, abs=25)
    await disk.churn(200)
    await disk.vdi.flush()
    assert world.names(number, "log/000001/")
    await world.kill()
    # The catalog is there even if the others are what is missing.
    await world.open(here=[1, 2, 3])
    await disk.open()
    await disk.check()


async def test_what_moves_is_what_the_new_zone_wins(world: World) -> None:
    store = world.store
    assert store is not None
    before = {log: set(Placement(store.membership, log, 2)(0)) for log in range(300)}
    number = await add(world)
    for log, zones in before.items():
        after = set(Placement(store.membership, log, 2)(0))
        assert after == zones or (number in after and len(after & zones) == 1)


async def test_weights(world: World) -> None:
    store = world.store
    assert store is not None
    await store.zones.set_weight("zone1", 4.0)
    found = shares(world)
    assert found[1] == pytest.approx(200, abs=35)
    await world.stop()
    await world.open()
    assert shares(world) == found
    for wrong in (0.0, -1.0, float("nan"), float("inf"), 1e10):
        with pytest.raises(InvalidRequest, match="weight"):
            await world.store.zones.set_weight("zone1", wrong)
    with pytest.raises(NotFound):
        await world.store.zones.set_weight("zone9", 1.0)


@pytest.mark.parametrize("puts", range(14))
async def test_adding_ends_anywhere_and_is_repeated(puts: int, expected_warnings: ExpectedWarnings) -> None:
    """The process dies between any two calls; the zone is in or not, and can be added then."""
    expected_warnings.allow("is no zone of this store any more")
    world = World(2)
    store = await world.open(create=True)
    await store.create_vdi("disk", MIB)
    world.reopen("zone2")
    executor = store.env.executor
    assert isinstance(executor, SteppingExecutor)
    left = puts

    def count(call: str, name: str) -> None:
        nonlocal left
        left -= call in ("put", "delete", "create")
        executor.dead = executor.dead or left < 0

    for backend in world.backends:
        backend.fault = count
    opened = world.reopen

    def reopen(path: str) -> WatchedBackend:
        backend = opened(path)
        backend.fault = count
        return backend

    store.zones._reopen = reopen
    task = store.env.loop.create_task(store.zones.add("zone2"))
    await turns(300)
    await world.kill()
    assert task.done() or task.cancelled()
    await world.open(here=None if "superblock" in world.storages[2].objects else [0, 1])
    assert world.store is not None
    if len(world.store.membership.in_service) == 2:
        await world.store.zones.add("zone2")
    assert len(world.store.membership.in_service) == 3
    assert world.store.names() == ["disk"]
    await world.kill()
    await world.open()
    assert len(world.store.membership.in_service) == 3
    await world.kill()
