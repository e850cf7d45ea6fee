"""Renaming, growing and rolling back from the outside."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

import objstore
from nbdserver.cli import main
from objstore.units import MIB
from tests.nbdserver.test_service import fails, runtime, serving, sheepfold, zones
from tests.support.channel import Disconnected
from tests.support.nbd_client import attached, connected, export_request
from tests.support.nbd_spec import Option, Rep

__all__ = ["runtime", "zones"]

A, B = b"a" * 65536, b"b" * 65536


async def test_changes_of_a_disk_that_is_in_use(
    tmp_path: Path, zones: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    async def ask(*arguments: str) -> Any:
        return await asyncio.to_thread(sheepfold, capsys, "vdi", *arguments, "--zone", zones[0])

    async def refused(*arguments: str) -> tuple[int, str]:
        return await asyncio.to_thread(fails, capsys, "vdi", *arguments, "--zone", zones[0])

    with serving(tmp_path, zones, "--vdi", "disk:16M") as server:
        server.exports(1)
        async with attached(server.address, "disk") as client:
            assert client.size_bytes == 16 * MIB
            await client.write(0, A)
            await ask("snapshot", "disk", "s")
            await client.write(0, B)
            assert (await ask("resize", "disk", "32M"))["size_bytes"] == 32 * MIB
            assert (await ask("rename", "disk", "new"))["attached"] == 1
            await client.write(4096, A[:4096])
            await client.flush()
            async with attached(server.address, "new") as second:
                assert second.size_bytes == 32 * MIB
                assert await second.read(0, 12288) == B[:4096] + A[:4096] + B[:4096]
                assert await second.read(16 * MIB, 65536) == bytes(65536)
            assert (await refused("rollback", "new@s"))[0] == 5
        for _ in range(100):
            if not (await ask("info", "new"))["attached"]:
                break
            await asyncio.sleep(0.05)
        assert (await ask("rollback", "new@s"))["name"] == "new@2"
        async with attached(server.address, "new") as client:
            assert client.size_bytes == 16 * MIB
            assert await client.read(0, len(A)) == A
        assert (await refused("rollback", "new@t"))[0] == 3
        assert (await refused("resize", "new", "1M"))[0] == 2
        async with attached(server.address, "new") as client:
            await client.write(8 * MIB, B)
            assert (await ask("resize", "new", "24M", "--reconnect"))["attached"] == 0
            with pytest.raises(Disconnected):
                await client.read(0, 1)
        async with attached(server.address, "new") as client:
            assert client.size_bytes == 24 * MIB
            assert await client.read(8 * MIB, len(B)) == B
            assert "made smaller" in (await ask("resize", "new", "8M", "--force"))["suspended"]
            with pytest.raises(Disconnected):
                await client.read(0, 1)
        await ask("resume", "new")
        await ask("resize", "new", "24M")
        async with attached(server.address, "new") as client:
            assert await client.read(8 * MIB, len(B)) == bytes(len(B))
        assert server.stop() == (0, "")
    assert await asyncio.to_thread(main, ["vdi", "rollback", "new@2", "--zone", zones[0]]) == 0
    assert "what it was before is new@3" in capsys.readouterr().out
    assert (await ask("info", "new"))["size_bytes"] == 32 * MIB


async def test_a_forced_rollback_disconnects_clients_and_keeps_them_out_until_resumed(
    tmp_path: Path, zones: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    async def ask(*arguments: str) -> Any:
        return await asyncio.to_thread(sheepfold, capsys, "vdi", *arguments, "--zone", zones[0])

    with serving(tmp_path, zones, "--vdi", "disk:16M") as server:
        server.exports(1)
        socket = objstore.control_socket(zones[0])
        async with (
            attached(server.address, "disk") as client,
            objstore.connect(socket=socket) as library,
            library.open("disk") as handle,
        ):
            await client.write(0, A)
            await ask("snapshot", "disk", "s")
            await client.write(0, B)
            assert (await ask("rollback", "disk@s", "--force"))["name"] == "disk@2"
            with pytest.raises(Disconnected):
                await client.write(0, B)
            for stale in (handle.write(0, B), handle.read(0, 1), handle.flush()):
                with pytest.raises(objstore.Fenced, match="rolled back"):
                    await stale
            with pytest.raises(objstore.Fenced, match="rolled back"):
                _ = [extent async for extent in handle.map()]
            with pytest.raises(objstore.Suspended, match="resume"):
                await library.open("disk")
        assert server.stop() == (0, "")
    with serving(tmp_path, zones) as server:
        server.exports(1)
        async with connected(server.address) as client:
            for option in (Option.INFO, Option.GO):
                (reply,) = await client.option(option, export_request("disk"))
                assert reply.type == Rep.ERR_POLICY
                assert b"rolled back to disk@s" in reply.data
            ((_, description),) = await client.exports()
            assert "suspended" in description
            await client.send_option(Option.EXPORT_NAME, b"disk")
            await client.expect_close()
        assert "rolled back" in (await ask("info", "disk"))["suspended"]
        assert not (await ask("resume", "disk"))["suspended"]
        async with attached(server.address, "disk") as client:
            assert await client.read(0, len(A)) == A
        async with attached(server.address, "disk@2") as client:
            assert await client.read(0, len(B)) == B
        server.stop()
