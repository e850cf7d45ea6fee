"""Snapshots through the library, in this process and behind a server."""

import pytest

from objstore import Busy, Connection, NotFound, ReadOnly, VdiHandle

MIB = 1 << 20


async def names(store: Connection, name: str | None = None) -> list[str]:
    return [snapshot.name async for snapshot in store.snapshots(name)]


async def test_the_life_of_a_snapshot(store: Connection, vdi: VdiHandle) -> None:
    await vdi.write(0, b"then", writeback=True)
    taken = await store.create_snapshot("disk", "monday", protected=True)
    assert (taken.taken, taken.snapshot.name, taken.snapshot.protected) == (True, "disk@monday", True)
    again = await store.create_snapshot("disk", "tuesday", skip_unchanged=True)
    assert (again.taken, again.snapshot.name) == (False, "disk@monday")
    await vdi.write(0, b"now!")
    assert (await store.create_snapshot("disk")).snapshot.name == "disk@2"
    await store.create("other", MIB)
    await store.create_snapshot("other", "a b")
    assert await names(store, "disk") == ["disk@monday", "disk@2"]
    assert sorted(await names(store)) == ["disk@2", "disk@monday", "other@a b"]
    async with store.open("disk@monday") as snapshot:
        assert snapshot.read_only
        assert await snapshot.read(0, 5) == b"then\0"
        assert [extent.zero async for extent in snapshot.map()] == [False, True]
        with pytest.raises(ReadOnly):
            await snapshot.write(0, b"x")
    assert await vdi.read(0, 4) == b"now!"
    with pytest.raises(Busy, match="protected"):
        await store.delete_snapshot("disk@monday")
    assert not (await store.protect_snapshot("disk@monday", protected=False)).protected
    await store.delete_snapshot("disk@monday")
    with pytest.raises(NotFound):
        await store.open("disk@monday")
    assert await names(store, "disk") == ["disk@2"]


async def test_a_group(store: Connection, vdi: VdiHandle) -> None:
    await store.create("other", MIB)
    await vdi.write(0, b"then", writeback=True)
    taken = await store.create_group_snapshot(["other", "disk"], "t", protected=True)
    assert [(snapshot.name, snapshot.protected) for snapshot in taken] == [("other@t", True), ("disk@t", True)]
    await vdi.write(0, b"now!")
    async with store.open("disk@t") as snapshot:
        assert await snapshot.read(0, 4) == b"then"
    with pytest.raises(NotFound):
        await store.create_group_snapshot(["disk", "nobody"], "u")
    assert await names(store) == ["disk@t", "other@t"]


async def test_what_a_snapshot_alone_needs(store: Connection, vdi: VdiHandle) -> None:
    await vdi.write(0, b"x" * 8192)
    await store.create_snapshot("disk", "s")
    assert (await store.snapshot_space("disk@s")).exclusive_bytes == 0
    await vdi.write(0, b"y")
    assert (await store.snapshot_space("disk@s")).exclusive_bytes == 4096
