"""What only one snapshot needs, against models of everything that there is."""

import random

import pytest

from objstore.errors import NotFound
from objstore.units import BLOCK_BYTES, MIB
from tests.objstore.volume.test_snapshots import attach, make, put, store_of, world
from tests.support.stepping import World

__all__ = ["world"]

BLOCKS = 256


async def scribble(world: World, name: str, model: dict[int, object], dice: random.Random, writes: int) -> None:
    """Write and discard blocks; the model has for each block with data who wrote it."""
    vdi = await attach(world, name)
    for _ in range(writes):
        block = dice.randrange(BLOCKS)
        if dice.random() < 0.2:
            await vdi.trim(block * BLOCK_BYTES, BLOCK_BYTES)
            model.pop(block, None)
        else:
            await put(vdi, block * BLOCK_BYTES, dice.randbytes(BLOCK_BYTES))
            model[block] = object()
    await vdi.flush()
    await store_of(world).close(vdi)


def alone(models: dict[str, dict[int, object]], name: str) -> int:
    others = {id(writer) for other, model in models.items() if other != name for writer in model.values()}
    return sum(id(writer) not in others for writer in models[name].values()) * BLOCK_BYTES


@pytest.mark.parametrize("seed", range(4))
async def test_it_is_what_no_other_has(world: World, seed: int) -> None:
    dice = random.Random(seed)
    store = store_of(world)
    await store.close(await make(world, size=BLOCKS * BLOCK_BYTES))
    models: dict[str, dict[int, object]] = {"disk": {}}

    async def check() -> None:
        for name in [snapshot.name for snapshot in store.snapshots()]:
            space = await store.snapshot_space(name)
            assert (space.name, space.exclusive_bytes) == (name, alone(models, name))

    for turn in range(4):
        await scribble(world, "disk", models["disk"], dice, 90)
        await store.create_snapshot("disk", f"s{turn}")
        models[f"disk@s{turn}"] = dict(models["disk"])
    await check()
    await scribble(world, "disk", models["disk"], dice, 60)
    await store.clone("disk@s1", "clone")
    models["clone"] = dict(models["disk@s1"])
    await check()
    await scribble(world, "clone", models["clone"], dice, 60)
    await store.create_snapshot("clone", "c")
    models["clone@c"] = dict(models["clone"])
    await scribble(world, "clone", models["clone"], dice, 60)
    await store.delete_snapshot("disk@s2")
    del models["disk@s2"]
    await check()
    for vdi in store.open_vdis():  # what collection moves changes nothing
        await vdi.give_back()
    await check()
    await world.kill()
    store = await world.open()
    await check()


async def test_of_a_disk_that_is_gone(world: World) -> None:
    store = store_of(world)
    vdi = await make(world, size=MIB)
    await put(vdi, 0, b"x" * 5 * BLOCK_BYTES)
    await store.close(vdi)
    await store.create_snapshot("disk", "s")
    assert (await store.snapshot_space("disk@s")).exclusive_bytes == 0
    await store.delete_vdi("disk")
    assert (await store.snapshot_space("disk@1")).exclusive_bytes == 5 * BLOCK_BYTES
    with pytest.raises(NotFound):
        await store.snapshot_space("disk@nobody")
