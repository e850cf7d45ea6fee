"""What a store says about itself: its epochs and why there was one, what lies where; looking changes nothing."""

from collections.abc import AsyncIterator

import pytest

from objstore.backend.base import ZoneFailed
from objstore.log.checkpoint import checkpoint_folder
from objstore.log.segment import log_folder
from objstore.volume import recovery
from tests.conftest import ExpectedWarnings
from tests.support.disks import LOG, ModelDisk
from tests.support.stepping import World


@pytest.fixture
async def world(expected_warnings: ExpectedWarnings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(recovery, "SETTLE_SECONDS", 0.0)
    expected_warnings.allow("is put out|is out of service|is back|failed and|can't be looked at")
    world = World(3)
    await world.open(create=True)
    yield world
    await world.kill()


async def test_epochs_are_told_with_their_reasons(world: World) -> None:
    store = world.store
    assert store is not None
    made = world.clock.wall()
    world.clock.now += 100
    await store.env.put_out(2, ZoneFailed("input/output error"))
    await store.zones.add("zone2")
    await store.zones.set_weight("zone1", 2.5)
    await store.zones.drain("zone0")
    info = await store.info()
    assert info.store_id == store.env.store_id.hex()
    assert info.created == made
    assert info.format_version == 1
    assert info.features_read == ["membership"]
    assert info.epoch == store.membership.epoch.number
    reasons = [epoch.reason for epoch in info.epochs if "catalog" not in epoch.reason]
    assert reasons == [
        "start",
        "zone 2 out: zone zone2: input/output error",
        "zone 2 back",
        "zone 1 has weight 2.5",
        "zone 0 draining",
    ]
    out = next(epoch for epoch in info.epochs if epoch.out)
    assert (out.members, out.out, out.w) == ([0, 1], [2], store.membership.history.epochs[1].w)
    assert out.time == made + 100


async def test_what_lies_in_the_zones_is_counted_and_nothing_is_written(world: World) -> None:
    disk = await ModelDisk(world).create(copies=2)
    await disk.churn(60)
    await disk.vdi.keeper.checkpoint()
    await world.stop()
    before = [{name: bytes(data) for name, data in storage.objects.items()} for storage in world.storages]
    store = await world.open(read_only=True)
    info = await store.info()
    assert (await store.status()).zones
    await world.stop()
    after = [{name: bytes(data) for name, data in storage.objects.items()} for storage in world.storages]
    assert after == before
    for zone in info.zones:
        names = [n for n in before[zone.number] if n.startswith(("log/", "checkpoint/"))]
        assert zone.segments == sum(name.startswith("log/") for name in names)
        assert zone.checkpoints == sum(name.startswith("checkpoint/") for name in names)
        assert zone.segment_bytes + zone.checkpoint_bytes == sum(len(before[zone.number][name]) for name in names)
    assert info.segments == sum(zone.segments for zone in info.zones) > 0
    assert any(name.startswith(log_folder(LOG)) for name in before[0])
    assert any(name.startswith(checkpoint_folder(LOG)) for objects in before for name in objects)


async def test_status_has_lag_last_error_and_flushes(world: World) -> None:
    store = world.store
    assert store is not None
    disk = await ModelDisk(world).create(copies=3)
    status = await store.status()
    assert status.last_flushes == {"disk": None}
    assert [zone.since_epoch for zone in status.zones] == [1, 1, 1]
    await disk.churn(5)
    await disk.vdi.flush()
    await store.env.put_out(2, ZoneFailed("input/output error"))
    status = await store.status()
    assert status.health == "degraded"
    assert status.last_flushes["disk"] is not None
    assert status.under_replicated > 0
    assert status.zones[2].state == "out"
    assert status.zones[2].last_error.endswith("input/output error")
    assert status.zones[2].since_epoch == store.membership.epoch.out[0].since
    await store.zones.add("zone2")
    await store.wait_for_recovery()
    status = await store.status()
    assert status.zones[2].state == "in"
    assert status.zones[2].last_error.endswith("input/output error")
    assert status.zones[2].since_epoch == store.membership.epoch.number or status.zones[2].since_epoch > 1
    assert [zone.lag_seconds for zone in status.zones] == [0.0, 0.0, 0.0]
