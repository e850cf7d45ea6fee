"""Zone numbers are never used again: what happens when a store has used up all 64."""

import pytest

from objstore.errors import InvalidRequest
from objstore.replica.members import ZONES_MAX
from objstore.replica.membership import Plan
from objstore.units import MIB
from tests.conftest import ExpectedWarnings
from tests.support.stepping import World


async def test_zone_numbers_end_at_64_and_nothing_is_written_then(expected_warnings: ExpectedWarnings) -> None:
    """Numbers are never used again: the 65th zone in a store's life is refused by name, the store goes on."""
    expected_warnings.allow("left alone|old epoch records|can't be looked at|is out of service")
    world = World(1)
    store = await world.open(create=True)
    for number in range(1, ZONES_MAX):
        await store.zones.add(f"zone{number}", weight=1.0)
        if number < ZONES_MAX - 1:
            await store.membership.change(lambda plan, gone=number: _without(plan, gone))  # type: ignore[misc]
    for turn in range(2):
        assert len(store.env.zones) == ZONES_MAX
        epoch = store.membership.epoch.number
        with pytest.raises(InvalidRequest, match="has had 64 zones; 64 are possible"):
            await store.zones.add(f"zone{ZONES_MAX}", weight=1.0)
        with pytest.raises(InvalidRequest, match="has had 64 zones; 64 are possible"):
            await store.zones.replace("zone63", f"zone{ZONES_MAX}")
        assert len(world.storages) == ZONES_MAX
        assert store.membership.epoch.number == epoch
        if not turn:
            await world.stop()
            store = await world.open(here=[0, 63])
    await store.create_vdi("disk", MIB, copies=2)
    vdi = await store.open("disk")
    await vdi.write(0, memoryview(b"x" * 4096), fua=True)
    await world.stop()
    store = await world.open(here=[0, 63])
    vdi = await store.open("disk")
    into = memoryview(bytearray(4096))
    assert await vdi.read(0, 4096, into) == 0
    assert into == b"x" * 4096
    await world.stop()


def _without(plan: Plan, number: int) -> Plan:
    return Plan({n: m for n, m in plan.members.items() if n != number}, plan.out, plan.catalog)


async def test_a_store_of_more_than_64_zones_is_not_made() -> None:
    world = World(ZONES_MAX + 1)
    with pytest.raises(InvalidRequest, match="64"):
        await world.open(create=True)
    assert not any(storage.objects for storage in world.storages)
