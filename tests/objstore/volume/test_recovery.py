"""Recovery and zone life: copies go where they should, whatever failed, came back, joined, drained or was removed."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from objstore.backend.base import ZoneFailed
from objstore.errors import Busy, Exists, InvalidRequest, NoSpace, NotFound, Unavailable
from objstore.log import shelves
from objstore.log.checkpoint import checkpoint_folder, checkpoint_name
from objstore.log.keeper import Keeper
from objstore.log.segment import log_folder
from objstore.replica.zone import Executor, run_long
from objstore.units import MIB
from objstore.volume import recovery, zones
from tests.conftest import ExpectedWarnings
from tests.support.disks import LOG, ModelDisk
from tests.support.serving import eventually
from tests.support.stale import make_stale
from tests.support.stepping import WatchedBackend, World, executor_of, failing, turns

EXPECTED = (
    "is put out|is out of service|is out since|a copy is (missing|another segment's)|is back|failed and|"
    "stays until|can't be written|can't be looked at|old epoch records|can't be read|could not be copied|"
    "could not be written|recovery stopped for now: the zones are full"
)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(recovery, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(zones, "RETRY_SECONDS", 3600.0)


@pytest.fixture
async def world(expected_warnings: ExpectedWarnings) -> AsyncIterator[World]:
    expected_warnings.allow(EXPECTED)
    world = World(3)
    await world.open(create=True)
    yield world
    await world.kill()


async def filled(world: World, *, copies: int = 3, changes: int = 30) -> ModelDisk:
    disk = await ModelDisk(world).create(copies=copies)
    await disk.churn(changes)
    await disk.vdi.flush()
    return disk


async def recover(world: World) -> None:
    assert world.store is not None
    world.store.recovery.request()
    await world.store.wait_for_recovery()


async def settle(world: World) -> None:
    """Everything is sealed, nothing waits to be freed or copied."""
    assert world.store is not None
    for vdi in world.store._open.values():
        await vdi.keeper.checkpoint()
        await vdi.keeper.checkpoint()
    await recover(world)


def copies_of(world: World, log: int = LOG) -> dict[str, set[int]]:
    """Sealed segments and checkpoints of a log: name -> zones that show it."""
    found: dict[str, set[int]] = {}
    for zone, storage in enumerate(world.storages):
        for name, data in storage.objects.items():
            sealed = data[-128:-120] in (b"SHEEPDIR", b"SHEEPEND")
            if sealed and name.startswith((log_folder(log), checkpoint_folder(log))):
                found.setdefault(name, set()).add(zone)
    return found


async def out(world: World, zone: int) -> None:
    """The zone fails and is put out."""
    assert world.store is not None

    def broken(call: str, name: str) -> None:
        raise ZoneFailed(f"input/output error call={call} name={name}")

    world.backends[zone].fault = broken
    await world.store.env.put_out(zone, ZoneFailed("input/output error"))


async def test_scenario_22_a_zone_goes_and_the_missing_copies_are_counted(world: World) -> None:
    disk = await filled(world)
    assert world.store is not None
    await out(world, 1)
    await disk.churn(10)
    await disk.vdi.flush()
    await disk.check()
    status = await world.store.status()
    assert status.health == "degraded"
    assert any("zone1 is out" in reason for reason in status.reasons)


async def test_scenario_24_zones_that_vanish_and_come_back_are_repaired(world: World) -> None:
    disk = await filled(world)
    await settle(world)
    await world.stop()
    await world.open(here=[0, 1])
    await disk.open()
    await disk.churn(20)
    await settle(world)
    assert all(2 not in where for name, where in copies_of(world).items() if name not in before_names(world))
    await world.stop()
    await world.open()
    await disk.open()
    await settle(world)
    assert set(map(frozenset, copies_of(world).values())) == {frozenset({0, 1, 2})}
    assert (await world.store.status()).health == "ok"  # type: ignore[union-attr]
    await disk.check()
    await world.stop()
    await world.open(here=[1, 2])
    await disk.open()
    await disk.check()


def before_names(world: World) -> set[str]:
    """What zone 2 still shows."""
    return {name for name, where in copies_of(world).items() if 2 in where}


async def test_scenario_25_old_copies_of_a_zone_that_returns_are_never_served(world: World) -> None:
    disk = await filled(world)
    assert world.store is not None
    await settle(world)
    await out(world, 2)
    await disk.churn(60)
    await settle(world)
    await world.store.zones.add("zone2")
    assert [member.number for member in world.store.membership.epoch.members] == [0, 1, 2]
    await disk.check()
    await settle(world)
    copies = copies_of(world)
    assert set(map(frozenset, copies.values())) == {frozenset({0, 1, 2})}
    for name, _ in copies.items():
        assert len({bytes(storage.objects[name]) for storage in world.storages}) == 1
    await disk.check()
    await world.stop()
    await world.open(here=[1, 2])
    await disk.open()
    await disk.check()


async def test_scenario_26_what_was_deleted_while_a_zone_was_away_goes_when_it_returns(world: World) -> None:
    disk = await filled(world)
    assert world.store is not None
    await world.store.create_vdi("stays", MIB, copies=3)
    await settle(world)
    await world.store.close(disk.vdi)
    await out(world, 2)
    await world.store.delete_vdi("disk")
    await recover(world)
    assert world.names(2, log_folder(LOG))
    await world.store.zones.add("zone2")
    await recover(world)
    assert not world.names(2, log_folder(LOG))
    assert not world.names(2, checkpoint_folder(LOG))
    assert world.store.names() == ["stays"]


async def test_scenario_27_one_copy_and_zones_that_come_one_after_the_other(world: World) -> None:
    """With one copy nothing of a zone that is away can be restored; when it is back all is there."""
    disk = await filled(world, copies=1)
    await settle(world)
    (holder,) = min(copies_of(world).items())[1]
    await world.stop()
    await world.open(here=[zone for zone in range(3) if zone != holder])
    assert world.store is not None
    await recover(world)
    status = await world.store.status()
    assert status.recovery.objects_unreachable or status.recovery.problems
    await world.stop()
    await world.open()
    await disk.open()
    await settle(world)
    await disk.check()
    assert world.store is not None
    assert (await world.store.status()).health == "ok"


@pytest.mark.parametrize("attached", [True, False])
async def test_a_lost_zone_is_replaced(world: World, attached: bool) -> None:
    disk = await filled(world)
    assert world.store is not None
    await settle(world)
    if not attached:
        await world.stop()
        await world.open()
    await out(world, 0)
    await recover(world)
    await world.store.zones.replace("zone0", "zone3")
    await recover(world)
    kept = [where - {0} for where in copies_of(world).values() if where != {0}]
    assert all(where == {1, 2, 3} for where in kept)
    await world.store.zones._look_after()
    assert [zone.path for zone in world.store.membership.epoch.out] == []
    assert world.store.recovery.status().copies_missing == 0
    await world.stop()
    await world.open(here=[1, 2, 3])
    await disk.open()
    await disk.check()


async def test_the_end_of_an_idle_log_gets_its_copies_too(world: World) -> None:
    """What was written last, on the zones that were left, and not sealed since: nobody writes any more."""
    disk = await filled(world)
    assert world.store is not None
    await settle(world)
    await out(world, 0)
    await disk.churn(4)
    await disk.vdi.flush()
    await world.store.zones.replace("zone0", "zone3")
    await recover(world)
    here = world.store.env.serving
    assert all(len(here(segment.zones)) == 3 for segment in disk.vdi.disk.segments.values())
    await disk.check()


async def test_a_zone_is_drained_and_removed(world: World) -> None:
    disk = await filled(world, copies=2)
    assert world.store is not None
    await settle(world)
    with pytest.raises(InvalidRequest, match="drain it first"):
        await world.store.zones.remove("zone1")
    await world.store.zones.drain("zone1")
    with pytest.raises(Busy, match="not empty yet"):
        await world.store.zones.remove("zone1")
    await disk.churn(10)
    await settle(world)
    await settle(world)
    assert not [name for name, where in copies_of(world).items() if 1 in where]
    assert all(where == {0, 2} for where in copies_of(world).values())
    await world.store.zones.remove("zone1")
    assert [member.number for member in world.store.membership.epoch.members] == [0, 2]
    await disk.check()
    await world.stop()
    await world.open(here=[0, 2])
    await disk.open()
    await disk.check()


async def test_draining_needs_enough_other_zones(world: World) -> None:
    await filled(world, copies=3)
    assert world.store is not None
    with pytest.raises(InvalidRequest, match="VDI disk has 3 copies, and without zone1 there are 2 zones"):
        await world.store.zones.drain("zone1")


async def test_scenario_33_a_zone_that_is_added_gets_its_share_and_nothing_else_moves(world: World) -> None:
    disk = await filled(world, copies=2, changes=120)
    assert world.store is not None
    await settle(world)
    before = copies_of(world)
    await world.store.zones.add("zone3", 1.0)
    for zone in ("zone0", "zone1", "zone2"):
        await world.store.zones.set_weight(zone, 1.0)
    await settle(world)
    await settle(world)
    after = copies_of(world)
    assert set(map(len, after.values())) == {2}
    moved = [name for name in before if name in after and before[name] != after[name]]
    assert all(3 in after[name] and len(before[name] - after[name]) == 1 for name in moved)
    await disk.check()
    await world.stop()
    await world.open()
    await disk.open()
    await disk.check()
    assert len(world.store.membership.epoch.members) == 4 if world.store else False


async def test_scenario_36_copies_change_online(world: World) -> None:
    disk = await filled(world, copies=3)
    assert world.store is not None
    await settle(world)
    for copies in (2, 3, 1, 3):
        shown = await world.store.set_copies("disk", copies)
        assert shown.copies == copies
        await disk.churn(10)
        await disk.vdi.flush()
        await settle(world)
        await settle(world)
        assert set(map(len, copies_of(world).values())) == {copies}
        await disk.check()
        await disk.reopen(clean=copies != 2)
        await disk.check()
        assert world.store is not None
        assert world.store.vdi("disk").copies == copies
    for impossible in (0, 4):
        with pytest.raises(InvalidRequest, match="the store has 3 zones"):
            await world.store.set_copies("disk", impossible)


async def test_copies_of_a_detached_vdi_change(world: World) -> None:
    disk = await filled(world, copies=3)
    await world.stop()
    await world.open()
    assert world.store is not None
    await world.store.set_copies("disk", 2)
    await recover(world)
    await recover(world)
    assert set(map(len, copies_of(world).values())) == {2}
    assert world.store.vdi("disk").state == "closed"
    await disk.open()
    await disk.check()


async def test_scenario_35_fewer_zones_than_copies_is_said(world: World) -> None:
    disk = await filled(world)
    assert world.store is not None
    await out(world, 0)
    await recover(world)
    reasons = (await world.store.status()).reasons
    assert any("zone0 is out" in reason for reason in reasons)
    await disk.check()


async def test_a_zone_without_room_is_left_alone_and_named(world: World) -> None:
    await filled(world)
    assert world.store is not None
    await settle(world)
    await out(world, 2)
    world.storages[0].capacity_bytes = 1 << 40
    await world.store.set_copies("disk", 2)
    await settle(world)
    world.storages.append(type(world.storages[0])(80 * MIB))
    world.backends.append(type(world.backends[0])(world.storages[3]))
    await world.store.zones.add("zone3", 1.0)
    await world.store.zones.drain("zone1")
    world.store.env.reserve_bytes = 80 * MIB
    await world.store.wait_for_recovery()
    problems = world.store.recovery.status().problems
    assert any("zone3" in problem and "too little" in problem for problem in problems)
    assert not [name for name, where in copies_of(world).items() if 3 in where and name.endswith("0")]


async def test_scenario_49_the_throttle_is_changed_while_it_runs_and_bad_values_are_refused(world: World) -> None:
    await filled(world)
    assert world.store is not None
    for bad in (-1, 1, MIB - 1, 1 << 50):
        with pytest.raises(InvalidRequest, match="bytes a second is not possible"):
            world.store.set_recovery_rate(bad)
    await settle(world)
    assert world.store.set_recovery_rate(MIB).bytes_per_second_max == MIB
    await out(world, 2)
    await settle(world)
    for name in list(world.storages[2].objects):
        if name.startswith(log_folder(LOG)):
            del world.storages[2].objects[name]
    await world.store.zones.add("zone2")
    for _ in range(2000):
        if world.store.recovery.status().copies_made:
            break
        await turns(1)
    status = world.store.recovery.status()
    assert status.running
    assert 0 < status.copies_missing < status.copies_missing + status.copies_made
    assert status.bytes_total > status.bytes_done
    world.store.set_recovery_rate(0)
    await world.store.wait_for_recovery()
    assert world.store.recovery.status().copies_missing == 0


@pytest.mark.parametrize("steps", range(0, 120, 7))
async def test_killed_at_any_step_recovery_goes_on(world: World, steps: int) -> None:
    disk = await filled(world, copies=2)
    assert world.store is not None
    await settle(world)
    await world.store.zones.add("zone3", 5.0)
    await world.store.zones.drain("zone0")
    for _ in range(steps):
        await turns(1)
    await disk.reopen(clean=False)
    await disk.check()
    await settle(world)
    await settle(world)
    copies = copies_of(world)
    assert all(len(where) == 2 and 0 not in where for where in copies.values())
    await disk.check()
    await disk.reopen(clean=True)
    await disk.check()


async def test_a_returning_zone_with_rotten_copies_serves_none_of_them(
    world: World, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings.allow("checksum wrong|a copy is bad|read failed|directory unreadable")
    disk = await filled(world)
    assert world.store is not None
    await settle(world)
    await out(world, 2)
    await recover(world)
    for name, data in world.storages[2].objects.items():
        if name.startswith(log_folder(LOG)):
            data[5000] ^= 1
    await world.store.zones.add("zone2")
    await disk.check()
    await recover(world)
    await disk.check()


async def test_what_zone_commands_refuse(world: World) -> None:
    assert world.store is not None
    admin = world.store.zones
    with pytest.raises(NotFound, match="no zone 'nowhere'"):
        await admin.drain("nowhere")
    with pytest.raises(Exists, match="zone1 is a zone already"):
        await admin.add("zone1")
    for weight in (0.0, -1.0, float("nan"), 1e12):
        with pytest.raises(InvalidRequest, match="weight"):
            await admin.set_weight("zone0", weight)
    await admin.set_weight("0", 2.5)
    assert world.store.membership.epoch.members[0].weight == 2.5
    await out(world, 2)
    world.backends[2].fault = lambda call, name: None
    del world.storages[2].objects["superblock"]
    with pytest.raises(InvalidRequest, match="not the zone"):
        await admin.add("zone2")
    assert [zone.number for zone in world.store.membership.epoch.out] == [2]


async def test_a_zone_whose_calls_hang_stays_out(world: World) -> None:
    disk = await filled(world)
    assert world.store is not None
    executor_of(world.store.env).hold(1)
    await disk.write(0, 4)
    disk.vdi.disk.writer.request_sync()
    await turns(1)
    await world.store.env.put_out(1, ZoneFailed("it hangs"))
    with pytest.raises(Busy, match="have not returned"):
        await world.store.zones.add("zone1")
    executor_of(world.store.env).release(1)
    for _ in range(50):
        await turns(1)
    await world.store.zones.add("zone1")
    await settle(world)
    await disk.check()


async def test_nothing_is_looked_at_after_a_good_end(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 VDIs are not opened at every start."""
    await filled(world)
    await settle(world)
    await world.stop()
    await world.open()
    assert world.store is not None
    await world.store.wait_for_recovery()
    assert world.store.vdi("disk").state == "closed"
    assert not world.store.recovery._looked or world.store.recovery.status().copies_missing == 0
    await world.stop()
    await world.open(here=[0, 1])
    opened: list[str] = []
    using = world.store.using
    monkeypatch.setattr(world.store, "using", lambda entry: opened.append(entry.name) or using(entry))
    await world.store.wait_for_recovery()
    assert "disk" in opened


async def test_a_zone_that_fails_during_recovery_does_not_stop_it(world: World) -> None:
    disk = await filled(world, copies=2)
    assert world.store is not None
    await settle(world)

    def reopen(path: str) -> WatchedBackend:
        backend = World.reopen(world, path)
        backend.fault = failing("put", log_folder(LOG), times=1)
        return backend

    world.store.zones._reopen = reopen
    await world.store.zones.add("zone3", 1000.0)
    await recover(world)
    await settle(world)
    assert [zone.number for zone in world.store.membership.epoch.out] == [3]
    assert all(len(where - {3}) == 2 for where in copies_of(world).values())
    await disk.check()


async def test_a_torn_copy_of_a_checkpoint_does_not_hide_the_whole_ones(world: World) -> None:
    """Its length says nothing about what a whole copy must have."""
    disk = await filled(world)
    await disk.vdi.keeper.checkpoint()
    number = disk.vdi.keeper.number
    name = checkpoint_name(LOG, number)
    whole = {zone: bytes(storage.objects[name]) for zone, storage in enumerate(world.storages)}
    for torn in range(3):
        await world.kill()
        del world.storages[torn].objects[name][100:]
        await world.open()
        await disk.open()
        await recover(world)
        assert set(disk.vdi.disk.checkpoint_zones(number)) == {0, 1, 2}
        assert {zone: bytes(storage.objects[name]) for zone, storage in enumerate(world.storages)} == whole
        await disk.check()


@pytest.mark.parametrize("running", [True, False])
async def test_a_zone_returns_with_another_writers_segments(world: World, running: bool) -> None:
    """Right in number and length, whole and sealed: only the seal's CRC tells that they are not the log's."""
    disk = await filled(world)
    assert world.store is not None
    await settle(world)
    right = {name: bytes(world.storages[1].objects[name]) for name in copies_of(world)}
    await out(world, 2)
    if not running:
        await world.stop()
    for name, image in world.storages[2].objects.items():
        if name.startswith(log_folder(LOG)) and image[-128:-120] == b"SHEEPDIR":
            make_stale(image)
    if running:
        await world.store.zones.add("zone2")
    else:
        await world.open()
        await disk.open()
    await settle(world)
    for name in copies_of(world).keys() & right.keys():
        assert bytes(world.storages[2].objects[name]) == right[name]
    assert set(map(frozenset, copies_of(world).values())) == {frozenset({0, 1, 2})}
    assert (await world.store.status()).health == "ok"
    await world.stop()
    await world.open(here=[1, 2])
    await disk.open()
    await disk.check()


async def test_seals_are_read_of_zones_that_are_not_known_to_be_right(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One zone comes back: its copies are looked at, those of zones that never left are not, nor is anything twice."""
    disk = await filled(world)
    assert world.store is not None
    await settle(world)
    await out(world, 2)
    await settle(world)
    await world.store.zones.add("zone2")
    looked: list[tuple[int, int]] = []
    real = shelves.other_seals

    def noting(backend: WatchedBackend, store_id: bytes, log: int, wanted: list[tuple[int, int]]) -> list[int]:
        looked.extend((world.backends.index(backend), number) for number, _ in wanted)
        return real(backend, store_id, log, wanted)

    monkeypatch.setattr(shelves, "other_seals", noting)
    sealed = {segment.number for segment in disk.vdi.disk.segments.values() if segment.sealed and 2 in segment.zones}
    await recover(world)
    assert sealed
    assert set(looked) >= {(2, number) for number in sealed}
    assert {zone for zone, _ in looked} == {2}
    looked.clear()
    await recover(world)
    assert not looked
    await disk.check()


async def test_a_removed_zone_is_not_missed_when_another_one_is(world: World) -> None:
    """A log that was open all the time names an epoch in which the removed zone still took part."""
    disk = await filled(world, copies=2)
    assert world.store is not None
    await world.store.zones.add("zone3", 1.0)
    await settle(world)
    await world.store.zones.drain("zone1")
    await settle(world)
    await settle(world)
    await world.store.zones.remove("zone1")
    await disk.churn(10)
    await disk.vdi.flush()
    await world.kill()
    await world.open(here=[2, 3])
    await disk.open()
    await disk.check()


async def test_what_goes_while_others_are_copied_is_not_missed_for_ever(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints are superseded between the look and the copying: nobody can make those copies any more."""
    disk = await filled(world)
    assert world.store is not None
    await settle(world)
    await out(world, 2)
    await disk.churn(40)
    await disk.vdi.keeper.checkpoint()
    looked = recovery.Recovery._check_space

    async def checkpoints_come(self: recovery.Recovery, *args: Any) -> None:
        for _ in range(2):
            await disk.churn(2)
            await disk.vdi.keeper.checkpoint()
        await looked(self, *args)

    monkeypatch.setattr(recovery.Recovery, "_check_space", checkpoints_come)
    await world.store.zones.add("zone2")
    await recover(world)
    status = world.store.recovery.status()
    assert (status.running, status.copies_missing, status.problems) == (False, 0, [])
    assert (await world.store.status()).health == "ok"


async def test_flushed_data_of_a_log_that_stands_still_stays_when_its_zones_come_back(
    world: World, expected_warnings: ExpectedWarnings
) -> None:
    """The zones with the log's end failed one after the other, and return: what they have is known to them alone until
    the end has been appended again. Recovery must not take it for leftovers."""
    expected_warnings.allow("waits for zones|appended again")
    disk = await filled(world, copies=2)
    assert world.store is not None
    await disk.vdi.keeper.checkpoint()
    await disk.churn(20)
    await disk.vdi.flush()
    segment = disk.vdi.disk.writer.segment
    assert segment is not None
    for zone in segment.zones:
        await out(world, zone)
    await turns(300)
    writer = disk.vdi.disk.writer
    assert writer.waits_for_takeover
    for zone in segment.zones:
        await world.store.zones.add(f"zone{zone}")
    await eventually(lambda: not writer.waits_for_takeover)
    await recover(world)
    await disk.check()
    await world.kill()
    await world.open()
    await disk.open()
    await disk.check()


async def test_a_stop_is_no_end_of_a_recovery(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass that a stop cuts short was refused its VDIs: the next start has to look again."""
    disk = await filled(world)
    assert world.store is not None
    await settle(world)
    await out(world, 2)
    await disk.churn(40)
    await settle(world)
    await world.stop()
    await world.open()
    monkeypatch.setattr(recovery, "SETTLE_SECONDS", 3600.0)
    await turns(100)
    store = world.store
    assert store is not None
    closing = store.zones.close

    async def close_behind_a_pass() -> None:
        assert store is not None
        store.recovery._wake.set()
        await turns(300)
        await closing()

    monkeypatch.setattr(store.zones, "close", close_behind_a_pass)
    await world.stop()
    assert store.recovery.status().copies_made == 0
    monkeypatch.setattr(recovery, "SETTLE_SECONDS", 0.0)
    await world.open()
    assert world.store is not None
    await disk.open()
    await world.store.wait_for_recovery()
    assert world.store.recovery.status().copies_made > 0
    await world.stop()
    await world.open(here=[2, 1])
    await disk.open()
    await disk.check()


async def test_a_disk_that_was_refused_opens_when_its_zones_are_back(world: World) -> None:
    """Without a new start."""
    disk = await filled(world, copies=1)
    (holder,) = disk.vdi.disk.writer.segment.zones  # type: ignore[union-attr]
    await world.kill()
    await world.open(here=[zone for zone in range(3) if zone != holder])
    assert world.store is not None
    with pytest.raises(Unavailable, match=f"missing: zone zone{holder}"):
        await disk.open()
    await world.store.zones.add(f"zone{holder}")
    await disk.open()
    await disk.check()


async def test_what_a_power_cut_brings_back_on_an_empty_zone_goes_before_it_is_removed(world: World) -> None:
    disk = await filled(world, copies=2)
    assert world.store is not None
    await settle(world)
    await world.store.zones.drain("zone1")
    await settle(world)
    await settle(world)
    await world.stop()
    world.storages[1].objects[checkpoint_name(LOG, 1)] = bytearray(b"left")
    await world.open()
    assert world.store is not None
    await disk.open()
    await world.store.wait_for_recovery()
    with pytest.raises(Busy, match="not empty yet"):
        await world.store.zones.remove("zone1")
    await world.store.wait_for_recovery()
    await world.store.zones.remove("zone1")
    await disk.check()


async def test_the_file_of_a_dead_segment_is_missed_by_nobody(world: World) -> None:
    """A checkpoint lists it as dead, its file went, and the process ended before the next checkpoint."""
    disk = await filled(world)
    assert world.store is not None
    await disk.trim(0, disk.blocks)
    dead: list[str] = []
    while not dead:
        await disk.write(0)
        await disk.vdi.keeper.checkpoint()
        dead = [segment.name for segment, checkpoints in disk.vdi.disk.dead.values() if checkpoints]
    assert dead
    await world.kill()
    for storage in world.storages:
        for name in dead:
            storage.objects.pop(name, None)
    await world.open()
    assert world.store is not None
    await disk.open()
    await recover(world)
    status = world.store.recovery.status()
    assert (status.copies_missing, status.objects_unreachable) == (0, 0)


async def test_a_backup_is_not_believed_about_its_recovery(world: World) -> None:
    """Its note is from the same backup: nothing was missing then."""
    disk = await filled(world)
    await settle(world)
    await world.stop()
    backup = {name: bytearray(data) for name, data in world.storages[2].objects.items()}
    await world.open()
    await disk.open()
    await disk.churn(60)
    await settle(world)
    await world.stop()
    world.storages[2].objects = backup
    await world.open()
    assert world.store is not None
    await disk.open()
    await world.store.wait_for_recovery()
    assert world.store.recovery.status().copies_made > 0
    await settle(world)
    assert set(map(frozenset, copies_of(world).values())) == {frozenset({0, 1, 2})}


async def test_zones_that_are_left_alone_know_the_past(world: World) -> None:
    """An epoch that held of the zones here none: one was out then, the other one came later."""
    disk = await filled(world, copies=2)
    assert world.store is not None
    await out(world, 1)
    await world.store.zones.set_weight("zone0", 3.0)
    await world.store.zones.add("zone1")
    await world.store.zones.add("zone3", 1.0)
    await world.store.zones.drain("zone2")
    await settle(world)
    await settle(world)
    await world.store.zones.remove("zone2")
    await disk.churn(5)
    await disk.vdi.flush()
    await world.kill()
    await world.open(here=[1, 3])
    await disk.open()
    await disk.check()


async def test_a_zone_that_could_not_be_listed_is_looked_at_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have lost anything, and a pass that ended well would be believed for ever."""
    await filled(world)
    await settle(world)
    await world.stop()
    name = world.names(1, log_folder(LOG))[0]
    for storage in world.storages:
        del storage.objects[recovery.NOTE_NAME]
    del world.storages[1].objects[name]
    left = 1

    async def listed(executor: Executor, zone: int, function: Callable[..., object], *args: object) -> object:
        nonlocal left
        if left and zone == 1 and args == (log_folder(LOG),):
            left -= 1
            raise ZoneFailed("input/output error call=list")
        return await run_long(executor, zone, function, *args)

    monkeypatch.setattr(shelves, "run_long", listed)
    await world.open()
    assert world.store is not None
    await eventually(lambda: not left)
    await eventually(lambda: name in world.storages[1].objects)
    await world.store.wait_for_recovery()
    assert world.store.recovery.status().problems == []


async def test_copies_that_are_given_up_stay_until_two_checkpoints_do_without_them(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = await filled(world)
    await settle(world)
    store = world.store
    assert store is not None
    before = copies_of(world)
    checkpoint = Keeper.checkpoint
    fails = True

    async def failing_checkpoint(keeper: Keeper) -> None:
        if fails and keeper is disk.vdi.keeper:
            raise NoSpace("the zones are full")
        await checkpoint(keeper)

    monkeypatch.setattr(Keeper, "checkpoint", failing_checkpoint)
    await store.set_copies("disk", 2)
    await store.wait_for_recovery()
    assert "the zones are full" in store.recovery.status().problems[0]
    for _ in range(3):
        await recover(world)
    assert copies_of(world) == before
    fails = False
    await recover(world)
    await settle(world)
    assert all(len(where) == 2 for where in copies_of(world).values())
    await disk.check()
