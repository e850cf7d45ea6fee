"""Attributes across deaths of the process at any step, and their deletion with snapshots left behind."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from objstore.check.catalog import Catalog as CheckedCatalog
from objstore.check.layout import Damaged
from objstore.errors import NotFound
from objstore.units import MIB
from objstore.volume.store import Store
from tests.support.stepping import World

Work = Callable[[Store], Coroutine[Any, Any, None]]


async def _set(store: Store) -> None:
    await store.attributes.set("disk", "a", b"new" * 5000)


async def _delete(store: Store) -> None:
    await store.attributes.delete("disk", "a")


@pytest.mark.parametrize(("work", "after"), [(_set, {"a": 15_000}), (_delete, {})])
async def test_death_at_any_step_leaves_the_old_or_the_new(work: Work, after: dict[str, int]) -> None:
    """And what was reported as done is there."""
    seen = []
    for steps in range(0, 200, 3):
        world = World(2)
        await world.open(create=True)
        assert world.store is not None
        await world.store.create_vdi("disk", MIB)
        await world.store.attributes.set("disk", "a", b"old")
        task = asyncio.create_task(work(world.store))
        for _ in range(steps):
            await asyncio.sleep(0)
        done = task.done()
        await world.kill()
        task.cancel()
        await asyncio.wait([task])
        await world.open()
        found = world.store.attributes.names("disk")
        assert found in ({"a": 3}, after)
        assert found == after or not done
        seen.append(found)
        await world.kill()
        if done:
            break
    assert {"a": 3} in seen
    assert done


async def test_a_vdi_that_leaves_snapshots_behind_leaves_no_attributes() -> None:
    world = World(2)
    await world.open(create=True)
    store = world.store
    assert store is not None
    await store.create_vdi("disk", MIB)
    await store.attributes.set("disk", "a", b"x")
    await store.create_snapshot("disk", "kept")
    await store.delete_vdi("disk")
    with pytest.raises(NotFound):
        store.attributes.names("disk")
    assert store.catalog.state.attributes == {}
    await world.stop()
    await world.open()
    assert world.store is not None
    assert world.store.catalog.state.attributes == {}
    await world.kill()


def test_the_check_knows_them() -> None:
    vdi = {"type": "vdi", "vdi_id": 1, "name": "disk", "log": 1, "size_bytes": MIB, "copies": 1}
    attribute: dict[str, Any] = {"type": "attribute", "vdi_id": 1, "name": "a", "value": b"x"}
    catalog = CheckedCatalog()
    catalog.apply(vdi)
    catalog.apply(attribute)
    assert catalog.attributes == {(1, "a"): b"x"}
    catalog.apply({**attribute, "vdi_id": 2})
    catalog.apply({**attribute, "name": "b"})
    catalog.apply({**attribute, "value": None})
    assert catalog.attributes == {(1, "b"): b"x"}
    catalog.apply({**vdi, "hidden": True})
    assert catalog.attributes == {}
    for wrong in ({"name": ""}, {"name": "x" * 257}, {"value": "text"}, {"value": bytes(65537)}, {"vdi_id": -1}):
        with pytest.raises(Damaged):
            catalog.apply({**attribute, **wrong})
