"""Which export a name means: proto.md, NBD_OPT_EXPORT_NAME, NBD_OPT_LIST, NBD_INFO_NAME, and the default export."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.nbd_client import attached, connected
from tests.support.nbd_spec import ExportFlag, Info, Option, Rep
from tests.support.our_server import serve
from tests.support.serving import MIB, Disk, Served

NAMES = ["disk", "b", "zwei Wörter", "диск/1", "n" * 200]
DISKS = [Disk(name, (index + 1) * MIB, read_only=name == "b") for index, name in enumerate(NAMES)]


@pytest.fixture
async def many(tmp_path: Path) -> AsyncIterator[Served]:
    """Five disks, none of them the default."""
    async with serve(DISKS, tmp_path, default_export=None) as served:
        yield served


async def test_list_gives_every_name_once(many: Served) -> None:
    """NBD_OPT_LIST: one NBD_REP_SERVER for each export, as NBD_OPT_GO expects its name."""
    async with many.connected() as client:
        assert sorted(name for name, _ in await client.exports()) == sorted(NAMES)


@pytest.mark.parametrize("disk", DISKS, ids=["plain", "read only", "space", "cyrillic", "long"])
async def test_each_name_is_its_own_disk(many: Served, disk: Disk) -> None:
    """NBD_OPT_INFO, NBD_OPT_GO and NBD_OPT_EXPORT_NAME find the same export by its name."""
    async with many.connected() as client:
        info = await client.info(disk.name, [Info.NAME, Info.DESCRIPTION])
        assert (info.size_bytes, info.name) == (disk.size_bytes, disk.name)
        assert bool(info.flags & ExportFlag.READ_ONLY) == disk.read_only
        listed = dict(await client.exports())
        assert info.description == listed[disk.name]
        await client.export_name(disk.name)
        assert (client.size_bytes, client.flags) == (info.size_bytes, info.flags)
    async with attached(many.address, disk.name) as client:
        assert client.size_bytes == disk.size_bytes
        await client.still_serves()


@pytest.mark.parametrize("name", ["", "Disk", "disk ", " disk", "dis", "disk/", "/disk", "*", "n" * 201])
async def test_only_whole_names_are_known(many: Served, name: str) -> None:
    """NBD_REP_ERR_UNKNOWN for a name that is not exported, and for the empty one where there is no default export."""
    async with many.connected() as client:
        assert (await client.info(name)).final == Rep.ERR_UNKNOWN
        assert (await client.go(name)).final == Rep.ERR_UNKNOWN
        await client.in_step()
    async with many.connected() as client:
        await client.send_option(Option.EXPORT_NAME, name.encode())
        await client.expect_close()


async def test_the_only_disk_is_the_default(nbd_server: Served) -> None:
    """NBD_OPT_EXPORT_NAME: the empty name is the default export; INFO_NAME tells its real name."""
    async with nbd_server.connected() as client:
        listed = await client.exports()
        info = await client.info("", [Info.NAME])
        assert [name for name, _ in listed] == [info.name] == [nbd_server.disk.name]
        assert (await client.go(nbd_server.disk.name)).raw


async def test_a_default_among_many(tmp_path: Path) -> None:
    """The configured default export is what the empty name means, in every option."""
    async with serve(DISKS, tmp_path, default_export=NAMES[2]) as served:
        async with connected(served.address) as client:
            info = await client.info("", [Info.NAME])
            assert (info.name, info.size_bytes) == (NAMES[2], DISKS[2].size_bytes)
            assert sorted(name for name, _ in await client.exports()) == sorted(NAMES)
            await client.structured_replies()
            assert await client.set_contexts("", ["base:allocation"]) == Rep.ACK
            await client.go("")
            assert await client.status(0, 4096)
        async with connected(served.address) as client:
            await client.export_name("")
            assert client.size_bytes == DISKS[2].size_bytes


async def test_a_server_without_exports(tmp_path: Path) -> None:
    """NBD_OPT_LIST: zero NBD_REP_SERVER replies, then NBD_REP_ACK."""
    async with serve([], tmp_path) as served, connected(served.address) as client:
        assert await client.exports() == []
        assert (await client.go("")).final == Rep.ERR_UNKNOWN


async def test_disks_do_not_share_contents(many: Served) -> None:
    """What is written to one export is not seen in another."""
    async with attached(many.address, "disk") as one, attached(many.address, NAMES[2]) as two:
        await one.write(0, b"one")
        await two.write(0, b"two")
        assert (await one.read(0, 3), await two.read(0, 3)) == (b"one", b"two")
