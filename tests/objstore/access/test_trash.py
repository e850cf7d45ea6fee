"""The trash through the library, in this process, behind a server, and by the blocking facade."""

from contextlib import AsyncExitStack
from pathlib import Path

import pytest

import objstore
from objstore import NotFound, StoreSettings, blocking
from tests.objstore.access.conftest import KINDS, serving

MIB = 1 << 20
SETTINGS = StoreSettings(trash_days=1.0)


@pytest.mark.parametrize("kind", KINDS)
async def test_deleted_brought_back_and_purged(kind: str, zones: list[Path], socket_path: Path) -> None:
    async with AsyncExitStack() as stack:
        if kind == "local":
            store = await stack.enter_async_context(objstore.connect(zones, create=True, settings=SETTINGS))
        else:
            await stack.enter_async_context(serving(zones, socket_path, SETTINGS))
            store = await stack.enter_async_context(objstore.connect(socket=socket_path))
        numbers = []
        for text in (b"first", b"second"):
            numbers.append((await store.create("disk", MIB)).vdi_id)
            async with store.open("disk") as vdi:
                await vdi.write(0, text, writeback=False)
            await store.delete("disk")
        found = [entry async for entry in store.trash()]
        assert [(entry.name, entry.vdi_id) for entry in found] == [("disk", number) for number in numbers]
        assert all(entry.file_bytes > 0 and entry.kept_until > entry.deleted for entry in found)
        assert (await store.undelete("disk", "old", vdi_id=numbers[0])).name == "old"
        assert (await store.undelete("disk")).name == "disk"
        for name, text in (("old", b"first"), ("disk", b"second")):
            async with store.open(name) as vdi:
                assert await vdi.read(0, len(text)) == text
        await store.delete("old")
        await store.purge("old", vdi_id=numbers[0])
        assert [entry.name async for entry in store.trash()] == []
        with pytest.raises(NotFound, match="trash"):
            await store.undelete("old")


def test_blocking(zones: list[Path]) -> None:
    with blocking.connect(zones, create=True, settings=SETTINGS) as store:
        store.create("disk", MIB)
        store.delete("disk")
        assert [entry.name for entry in store.trash()] == ["disk"]
        assert store.undelete("disk").name == "disk"
        store.delete("disk")
        store.purge("disk")
        assert list(store.trash()) == []
