"""Clones from the outside: made while clients are attached, the tree of what comes from what."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from nbdserver.cli import main
from nbdserver.cli_tree import family, tree_dot, tree_text
from objstore.volume.status import SnapshotStatus, VdiStatus
from tests.nbdserver.test_service import fails, runtime, serving, sheepfold, zones
from tests.support.nbd_client import attached

__all__ = ["runtime", "zones"]

A, B, C = b"a" * 65536, b"b" * 65536, b"c" * 65536


async def test_clones_of_a_disk_that_is_in_use(
    tmp_path: Path, zones: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    async def ask(*arguments: str) -> Any:
        return await asyncio.to_thread(sheepfold, capsys, "vdi", *arguments, "--zone", zones[0])

    with serving(tmp_path, zones, "--vdi", "disk:16M") as server:
        server.exports(1)
        async with attached(server.address, "disk") as client:
            await client.write(0, A)
            await ask("snapshot", "disk", "s")
            await client.write(0, B)
            made = await ask("clone", "disk@s", "old", "--copies", "1", "--mode", "writethrough")
            assert (made["parent"], made["copies"], made["mode"]) == ("disk@s", 1, "writethrough")
            assert (await ask("clone", "disk", "new"))["parent"] == "disk"
            await client.write(0, C)
            async with attached(server.address, "old") as old, attached(server.address, "new") as new:
                assert (await old.read(0, len(A)), await new.read(0, len(A))) == (A, B)
                await old.write(4096, C[:4096])
                await old.flush()
            assert await client.read(0, len(A)) == C
        code, line = await asyncio.to_thread(fails, capsys, "vdi", "delete", "disk@s", "--zone", zones[0])
        assert (code, "old" in line) == (5, True)
        code, line = await asyncio.to_thread(fails, capsys, "vdi", "clone", "disk@s", "old", "--zone", zones[0])
        assert (code, "'old'" in line) == (4, True)
        await ask("delete", "disk")
        assert server.stop() == (0, "")

    snapshot = {"name": "disk@s", "kind": "snapshot", "children": [{"name": "old", "kind": "vdi", "children": []}]}
    new = {"name": "new", "kind": "vdi", "children": []}
    assert await ask("tree") == [{"name": "disk", "kind": "deleted", "children": [snapshot, new]}]
    assert await asyncio.to_thread(main, ["vdi", "tree", "--zone", zones[0]]) == 0
    assert capsys.readouterr().out == "disk (deleted)\n  disk@s\n    old\n  new\n"
    assert await asyncio.to_thread(main, ["vdi", "tree", "--dot", "--zone", zones[0]]) == 0
    assert '"disk@s" -> "old";' in capsys.readouterr().out
    for name in ("old", "new", "disk@s"):
        await ask("delete", name)
    assert await ask("tree") == []


async def test_a_clone_is_flattened_under_its_client(
    tmp_path: Path, zones: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    async def ask(*arguments: str) -> Any:
        return await asyncio.to_thread(sheepfold, capsys, *arguments, "--zone", zones[0])

    with serving(tmp_path, zones, "--vdi", "disk:16M") as server:
        server.exports(1)
        async with attached(server.address, "disk") as client:
            await client.write(0, b"a" * 65536)
        await ask("vdi", "clone", "disk", "copy")
        async with attached(server.address, "copy") as client:
            assert (await ask("vdi", "flatten", "copy"))["state"] == "done"
            assert [job["kind"] for job in await ask("job", "list")] == ["flatten"]
            await ask("vdi", "delete", "disk")
            assert await client.read(0, 65536) == b"a" * 65536
        code, line = await asyncio.to_thread(fails, capsys, "vdi", "flatten", "copy", "--zone", zones[0])
        assert (code, "no clone" in line) == (2, True)
        assert server.stop() == (0, "")


def status(name: str, parent: str = "") -> VdiStatus:
    return VdiStatus(
        name=name,
        vdi_id=1,
        size_bytes=1,
        copies=1,
        mode="writeback",
        created=0.0,
        attached=0,
        state="closed",
        reason="",
        live_bytes=0,
        dirty_bytes=0,
        last_flush=None,
        log=1,
        parent=parent,
    )


def snapshot_status(vdi: str, tag: str, *, deleted: bool = False) -> SnapshotStatus:
    return SnapshotStatus(
        name=f"{vdi}@{tag}",
        vdi=vdi,
        vdi_deleted=deleted,
        tag=tag,
        index=1,
        size_bytes=1,
        created=0.0,
        protected=False,
        attached=0,
        clones=[],
    )


def test_a_tree_of_all_kinds() -> None:
    vdis = [status("a"), status("b", "a@s"), status("c", "b"), status("d", "gone@t"), status("e", "lost")]
    roots = family(vdis, [snapshot_status("a", "s"), snapshot_status("gone", "t", deleted=True)])
    assert tree_text(roots).split("\n") == [
        "a", "  a@s", "    b", "      c", "gone (deleted)", "  gone@t", "    d", "lost (deleted)", "  e",
    ]  # fmt: skip
    dot = tree_dot(roots)
    assert dot.startswith("digraph vdis {\n")
    assert '  "lost (deleted)" -> "e";' in dot.split("\n")
    assert family([], []) == []
