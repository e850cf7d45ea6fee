"""Snapshots from the outside: commands against a running server and without one, exports beside the live disk."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from nbdserver.wire.constants import TransmissionFlag
from tests.nbdserver.test_service import fails, runtime, serving, sheepfold, zones
from tests.support.nbd_client import attached, connected

__all__ = ["runtime", "zones"]

A, B = b"a" * 65536, b"b" * 65536


async def test_a_snapshot_beside_the_live_disk(
    tmp_path: Path, zones: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    async def ask(*arguments: str) -> Any:
        return await asyncio.to_thread(sheepfold, capsys, *arguments, "--zone", zones[0])

    async def refused(*arguments: str) -> tuple[int, str]:
        return await asyncio.to_thread(fails, capsys, *arguments, "--zone", zones[0])

    with serving(tmp_path, zones, "--vdi", "disk:16M") as server:
        server.exports(1)
        async with attached(server.address, "disk") as client:
            await client.write(0, A)
            taken = await ask("vdi", "snapshot", "disk", "first", "--protect")
            assert taken["taken"]
            assert (taken["snapshot"]["name"], taken["snapshot"]["protected"]) == ("disk@first", True)
            again = await ask("vdi", "snapshot", "disk", "second", "--skip-unchanged")
            assert (again["taken"], again["snapshot"]["name"]) == (False, "disk@first")
            await client.write(0, B)
            await client.flush()
            assert (await ask("vdi", "snapshot", "disk"))["snapshot"]["name"] == "disk@2"
            async with attached(server.address, "disk@first") as old, attached(server.address, "disk@2") as new:
                assert old.flags & TransmissionFlag.READ_ONLY
                assert await old.read(0, len(A)) == A
                assert await new.read(0, len(A)) == B
                assert await client.read(0, len(A)) == B
                code, line = await refused("vdi", "delete", "disk@2")
                assert (code, "attached" in line) == (5, True)
        names = [snapshot["name"] for snapshot in await ask("vdi", "snapshots", "disk")]
        assert names == ["disk@first", "disk@2"]
        code, line = await refused("vdi", "delete", "disk@first")
        assert (code, "protected" in line) == (5, True)
        assert not (await ask("vdi", "unprotect", "disk@first"))["protected"]
        assert await ask("vdi", "delete", "disk@2") == {"deleted": "disk@2"}
        assert await ask("vdi", "delete", "disk") == {"deleted": "disk"}
        (left,) = await ask("vdi", "snapshots")
        assert (left["name"], left["vdi_deleted"]) == ("disk@first", True)
        assert server.stop() == (0, "")

    assert (await ask("vdi", "protect", "disk@first"))["protected"]
    assert (await refused("vdi", "delete", "disk@first"))[0] == 5
    assert (await refused("vdi", "snapshot", "nobody"))[0] == 3
    assert (await refused("vdi", "snapshots", "nobody"))[0] == 3
    with serving(tmp_path, zones[:1]) as server:
        async with asyncio.timeout(30):
            while not Path(tmp_path, "nbd.sock").exists():  # noqa: ASYNC110 - another process makes it
                await asyncio.sleep(0.01)
        async with attached(server.address, "disk@first") as old:
            assert await old.read(0, len(A)) == A
        assert server.stop() == (0, "")
    assert not (await ask("vdi", "unprotect", "disk@first"))["protected"]
    assert await ask("vdi", "delete", "disk@first") == {"deleted": "disk@first"}
    assert await ask("vdi", "snapshots") == []


async def test_snapshots_are_listed_where_that_is_asked_for(
    tmp_path: Path, zones: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    async def ask(*arguments: str) -> Any:
        return await asyncio.to_thread(sheepfold, capsys, *arguments, "--zone", zones[0])

    async def listed(address: Any) -> list[str]:
        async with connected(address) as client:
            return [name for name, _ in await client.exports()]

    with serving(tmp_path, zones, "--vdi", "disk:1M", "--list-snapshots") as server:
        server.exports(1)
        assert await listed(server.address) == ["disk"]
        await ask("vdi", "snapshot", "disk", "s")
        await ask("vdi", "snapshot", "disk")
        assert await listed(server.address) == ["disk", "disk@2", "disk@s"]
        await ask("vdi", "rename", "disk", "other")
        await ask("vdi", "clone", "other", "copy")
        assert await listed(server.address) == ["copy", "other", "other@2", "other@s"]
        await ask("vdi", "delete", "other")
        await ask("vdi", "delete", "other@s")
        assert await listed(server.address) == ["copy", "other@2"]
        assert server.stop() == (0, "")
    with serving(tmp_path, zones) as server:
        server.exports(1)
        assert await listed(server.address) == ["copy"]
        assert server.stop() == (0, "")


def test_a_group(tmp_path: Path, zones: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with serving(tmp_path, zones, "--vdi", "data:1M", "--vdi", "log:1M") as server:
        server.exports(2)
        taken = sheepfold(capsys, "vdi", "snapshot-group", "evening", "log", "data", "--protect", "--zone", zones[0])
        assert [(s["name"], s["protected"]) for s in taken] == [("log@evening", True), ("data@evening", True)]
        assert server.stop() == (0, "")
    code, line = fails(capsys, "vdi", "snapshot-group", "evening", "log", "--zone", zones[0])
    assert (code, "log@evening" in line) == (4, True)
    taken = sheepfold(capsys, "vdi", "snapshot-group", "night", "log", "data", "--zone", zones[0])
    assert [s["name"] for s in taken] == ["log@night", "data@night"]


def test_what_people_see(tmp_path: Path, zones: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from nbdserver.cli import main

    with serving(tmp_path, zones, "--vdi", "disk:1M") as server:
        server.exports(1)
        for arguments, words in (
            (["vdi", "snapshot", "disk", "s"], ["disk@s", "1M (1048576 bytes)"]),
            (["vdi", "snapshot", "disk", "--skip-unchanged"], ["nothing was written to disk since disk@s"]),
            (["vdi", "snapshots"], ["NAME", "disk@s", "1M"]),
            (["vdi", "exclusive", "disk@s"], ["disk@s: 0 bytes"]),
            (["vdi", "protect", "disk@1"], ["protected"]),
        ):
            assert main([*arguments, "--zone", zones[0]]) == 0
            shown = capsys.readouterr().out
            assert all(word in shown for word in words), shown


@pytest.mark.parametrize(
    "arguments", [("snapshot", "disk", "7"), ("snapshot", "disk", "a@b"), ("protect", "disk"), ("delete", "disk@")]
)
def test_names_that_mean_nothing(arguments: tuple[str, ...], tmp_path: Path) -> None:
    from nbdserver.cli import main

    with pytest.raises(SystemExit, match="2"):
        main(["vdi", *arguments, "--zone", str(tmp_path)])
