"""What has changed between snapshots, through the library, in this process and behind a server."""

from pathlib import Path

import pytest

import objstore
from objstore import Connection, InvalidRequest, VdiHandle, blocking
from objstore.volume.base import Change

MIB = 1 << 20
B = 4096


async def test_changes_between_handles(store: Connection, vdi: VdiHandle) -> None:
    for block in range(0, 200, 2):
        await vdi.write(block * B, b"a" * B, writeback=True)
    await store.create_snapshot("disk", "s")
    async with store.open("disk@s") as since:
        assert [change async for change in vdi.changes(since)] == [Change(8 * MIB, False)]
        await vdi.write(B, b"b" * B)
        await vdi.discard(4 * B, B)
        await vdi.zero(6 * B, B, no_hole=True)
        assert [change async for change in vdi.changes(since)] == [
            Change(B, False),
            Change(B, True),
            Change(2 * B, False),
            Change(B, True, hole=True, zero=True),
            Change(B, False),
            Change(B, True, hole=False, zero=True),
            Change(8 * MIB - 7 * B, False),
        ]
        assert [change async for change in vdi.changes(since, B + 1, 10)] == [Change(10, True)]
        with pytest.raises(InvalidRequest):
            await anext(vdi.changes(since, 8 * MIB, 1))
    with pytest.raises(InvalidRequest, match="was closed"):
        await anext(vdi.changes(since))


async def test_handles_of_different_connections(store: Connection, vdi: VdiHandle, tmp_path: Path) -> None:
    async with objstore.connect([tmp_path / "other"], create=True) as other:
        await other.create("disk", 8 * MIB)
        async with other.open("disk") as theirs:
            with pytest.raises(InvalidRequest, match=r"another connection|same store"):
                await anext(vdi.changes(theirs))


def test_blocking(tmp_path: Path) -> None:
    with blocking.connect([tmp_path / "a"], create=True) as store:
        store.create("disk", MIB)
        store.create_snapshot("disk", "s")
        with store.open("disk") as vdi, store.open("disk@s") as since:
            vdi.write(0, b"x")
            assert list(vdi.changes(since)) == [Change(B, True), Change(MIB - B, False)]
