"""Cloning, renaming, growing and rolling back through the library, in this process and behind a server."""

import pytest

from objstore import Busy, Connection, Exists, Fenced, InvalidRequest, NotFound, Suspended, VdiHandle

MIB = 1 << 20


async def test_clones_names_and_sizes(store: Connection, vdi: VdiHandle) -> None:
    await vdi.write(0, b"then")
    await store.create_snapshot("disk", "s")
    await vdi.write(0, b"now!")
    clone = await store.clone("disk@s", "old", copies=1, mode="writethrough")
    assert (clone.parent, clone.copies, clone.mode) == ("disk@s", 1, "writethrough")
    assert (await store.clone("disk", "new")).parent == "disk"
    with pytest.raises(Exists):
        await store.clone("disk", "old")
    with pytest.raises(NotFound):
        await store.clone("disk@t", "other")
    for name, contents in (("old", b"then"), ("new", b"now!")):
        async with store.open(name) as handle:
            assert await handle.read(0, 4) == contents
    assert (await store.rename("old", "older")).name == "older"
    with pytest.raises(Exists):
        await store.rename("older", "disk")
    assert (await store.resize("disk", 9 * MIB)).size_bytes == 9 * MIB
    assert vdi.size_bytes == 8 * MIB
    async with store.open("disk") as handle:
        assert await handle.read(9 * MIB - 1, 1) == b"\0"
    with pytest.raises(InvalidRequest):
        await store.resize("disk", 0)


async def test_a_new_size_for_whoever_has_it_open(store: Connection, vdi: VdiHandle) -> None:
    await vdi.write(8 * MIB - 4, b"last")
    await store.resize("disk", 9 * MIB, reconnect=True)
    with pytest.raises(Fenced, match="another size"):
        await vdi.read(0, 1)
    async with store.open("disk") as handle:
        assert handle.size_bytes == 9 * MIB
        assert await handle.read(8 * MIB - 4, 5) == b"last\0"
        with pytest.raises(InvalidRequest, match="force"):
            await store.resize("disk", MIB)
        assert (await store.resize("disk", MIB, force=True)).suspended
        with pytest.raises(Fenced, match="made smaller"):
            await handle.read(0, 1)
    with pytest.raises(Suspended, match="made smaller"):
        await store.open("disk")
    await store.resume("disk")
    await store.resize("disk", 9 * MIB)
    async with store.open("disk") as handle:
        assert await handle.read(8 * MIB - 4, 4) == bytes(4)


async def test_going_back(store: Connection, vdi: VdiHandle) -> None:
    await vdi.write(0, b"then")
    await store.create_snapshot("disk", "s")
    await vdi.write(0, b"now!", writeback=True)
    with pytest.raises(Busy):
        await store.rollback("disk@s")
    undo = await store.rollback("disk@s", force=True)
    with pytest.raises(Fenced, match="rolled back"):
        await vdi.write(0, b"old!")
    with pytest.raises(Suspended, match="rolled back"):
        await store.open("disk")
    assert (await store.info("disk")).suspended
    assert not (await store.resume("disk")).suspended
    async with store.open("disk") as handle:
        assert await handle.read(0, 4) == b"then"
    await store.rollback(undo.name)
    async with store.open("disk") as handle:
        assert await handle.read(0, 4) == b"now!"
