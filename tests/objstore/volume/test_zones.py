"""Where new data goes when zones are added and weighed, and additions that end anywhere."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from objstore.backend.base import ZoneFailed
from objstore.errors import InvalidRequest, NotFound, Unavailable
from objstore.units import KIB, MIB
from objstore.volume import zones as zone_life
from objstore.volume.opening import Placement
from objstore.volume.settings import StoreSettings
from tests.conftest import ExpectedWarnings
from tests.support.disks import ModelDisk
from tests.support.serving import eventually
from tests.support.stepping import SteppingExecutor, WatchedBackend, World, executor_of, failing, turns


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


IMPATIENT = StoreSettings(segment_bytes=256 * KIB, write_wait_seconds=0.0, zone_deadline_seconds=0.5)


@pytest.fixture
async def impatient(expected_warnings: ExpectedWarnings) -> AsyncIterator[World]:
    """Three zones of which one is out; nobody waits long."""
    expected_warnings.allow("is out of service|is put out|is back|can't be written|stays until|a zone can't be looked")
    world = World(3, settings=IMPATIENT)
    store = await world.open(create=True)
    await store.env.put_out(1, ZoneFailed("input/output error"))
    yield world
    await world.kill()


async def come_back(world: World) -> frozenset[int]:
    """Try the zones that are out once; those in service then."""
    assert world.store is not None
    world.clock.now += 3600
    async with asyncio.timeout(10):
        await world.store.zones._look_after()
    return world.store.membership.in_service


@pytest.mark.parametrize("calls", range(4))
async def test_a_zone_that_hangs_while_it_comes_back_stays_out_and_holds_nobody_up(
    impatient: World, calls: int
) -> None:
    """calls: so many of it return; the first opens it, the next take the epoch records, then it gets the catalog."""
    store = impatient.store
    assert store is not None
    executor = executor_of(store.env)
    executor.hold(1)
    attempt = asyncio.create_task(come_back(impatient))
    for _ in range(calls):
        await turns(100)
        executor.step(1)
    if calls == 3:  # it is in service by now, and watched
        executor.release(1)
        assert await attempt == {0, 1, 2}
        return
    await store.create_vdi(f"disk{calls}", MIB)
    assert await attempt == {0, 2}
    assert await come_back(impatient) == {0, 2}, "a call from before has not returned"
    executor.release(1)
    await turns()
    assert await come_back(impatient) == {0, 1, 2}
    await impatient.stop()


async def test_the_stop_does_not_wait_for_a_zone_that_hangs_while_it_comes_back(
    impatient: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zone_life, "RETRY_SECONDS", 0.01)
    store = impatient.store
    assert store is not None
    await impatient.stop()
    store = await impatient.open()
    await store.env.put_out(1, ZoneFailed("input/output error"))
    executor = executor_of(store.env)
    executor.hold(1)
    impatient.clock.now += 3600
    await eventually(lambda: executor.waiting(1))
    async with asyncio.timeout(10):
        await impatient.stop()
    executor.release(1)


@pytest.mark.parametrize("times", [1, 2])
async def test_a_zone_that_fails_while_it_comes_back_is_not_back(impatient: World, times: int) -> None:
    store = impatient.store
    assert store is not None
    opened = impatient.reopen

    def reopen(path: str) -> WatchedBackend:
        backend = opened(path)
        backend.fault = failing("put", "epoch/", times=times)
        return backend

    store.zones._reopen = reopen
    assert await come_back(impatient) == {0, 2}
    assert "input/output error" in str(store.env.zones[1].error)
    with pytest.raises(ZoneFailed, match="failed while it was taken into service: input/output error"):
        await store.zones.add("zone1")
    store.zones._reopen = opened
    await store.zones.add("zone1")
    assert store.membership.in_service == {0, 1, 2}


async def test_a_directory_that_hangs_while_it_is_added_can_be_added_later(impatient: World) -> None:
    store = impatient.store
    assert store is not None
    executor = executor_of(store.env)
    executor.hold(3)
    with pytest.raises(Unavailable, match=r"zone3 did not answer in 0\.5 s"):
        await store.zones.add("zone3")
    await store.zones.set_weight("zone0", 2.0)
    executor.release(3)
    await turns()
    assert await store.zones.add("zone3") == 4, "nobody knows what the late call will do under the first number"
    assert store.membership.in_service == {0, 2, 4}
    await impatient.stop()
    store = await impatient.open()
    assert store.membership.in_service == {0, 1, 2, 4}


async def test_what_hung_while_it_was_added_and_ends_later_keeps_no_lock(impatient: World) -> None:
    store = impatient.store
    assert store is not None
    executor = executor_of(store.env)
    executor.hold(3)
    attempt = asyncio.create_task(store.zones.add("zone3"))
    await turns()
    executor.step(3)  # it has made the zone, and that is heard of in time: now the epoch record hangs
    with pytest.raises(ZoneFailed, match="it does not answer"):
        await attempt
    assert store.membership.in_service == {0, 2}
    executor.release(3)
    await turns()
    await store.zones.add("zone3")
    assert store.membership.in_service == {0, 2, 3}


async def test_a_zone_that_was_removed_is_given_back(impatient: World) -> None:
    store = impatient.store
    assert store is not None
    await store.zones.remove("zone1", force=True)
    impatient.storages[1].objects.clear()
    assert await store.zones.add("zone1") == 3
    assert store.membership.in_service == {0, 2, 3}
    await impatient.stop()


async def test_no_change_of_zones_calls_a_zone_in_the_event_loop(impatient: World) -> None:
    """It may hang, and everybody with it."""
    store = impatient.store
    assert store is not None
    executor = executor_of(store.env)
    step, opened = executor.step, impatient.reopen
    inside = False
    outside: list[tuple[str, str]] = []

    def stepped(zone: int) -> None:
        nonlocal inside
        inside = True
        step(zone)
        inside = False

    def fault(call: str, name: str) -> None:
        if not inside:
            outside.append((call, name))

    def reopen(path: str) -> WatchedBackend:
        if not inside:
            outside.append(("reopen", path))
        backend = opened(path)
        backend.fault = fault
        return backend

    executor.step = stepped  # type: ignore[method-assign]
    store.zones._reopen = reopen
    for backend in impatient.backends:
        backend.fault = fault
    await store.zones.add("zone3")
    assert await come_back(impatient) == {0, 1, 2, 3}
    await store.zones.set_weight("zone0", 2.0)
    await store.zones.drain("zone0")
    await store.wait_for_recovery()
    await store.zones.remove("zone0")
    assert outside == []
