"""Metadata contexts that compare with a snapshot, and the depth of allocation, from the outside.

qemu's nbd.txt: "dirty-bitmap", "allocation-depth"; proto.md, "Metadata querying".
"""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from nbdserver.exports import SNAPSHOT_CONTEXTS_MAX, Exports, View, context_ids, matching_contexts
from nbdserver.identity import Peer
from objstore.volume.memory import MemorySource, MemoryVolume
from tests.nbdserver.test_service import fails, runtime, serving, sheepfold, zones
from tests.support.nbd_client import attached, connected, context_request
from tests.support.nbd_spec import Command, Err, Option, Rep
from tests.support.serving import MIB

__all__ = ["runtime", "zones"]

B = 4096
FIXED = ["base:allocation", "qemu:allocation-depth"]


class Tagged(MemorySource):
    """Every volume has these snapshots."""

    def tags(self, name: str) -> list[str]:
        return ["a", "b"]


NAMES = View(Exports(Tagged({"disk": MemoryVolume("disk", MIB)})), Peer("test"), secure=False).contexts("disk")
BITMAPS = ["qemu:dirty-bitmap:a", "qemu:dirty-bitmap:b"]
CHANGED = ["x-sheepfold:changed:a", "x-sheepfold:changed:b"]


@pytest.mark.parametrize(
    ("query", "listed", "selected"),
    [
        ("base:", FIXED[:1], []),
        ("base", FIXED[:1], []),
        ("qemu:", [FIXED[1], *BITMAPS], []),
        ("qemu:dirty-bitmap:", BITMAPS, []),
        ("qemu:dirty-bitmap", [], []),
        ("qemu:dirty-bitmap:a", BITMAPS[:1], BITMAPS[:1]),
        ("qemu:dirty-bitmap:a:", [], []),
        ("qemu:dirty-bitmap:c", [], []),
        ("qemu:allocation-depth", FIXED[1:], FIXED[1:]),
        ("qemu:allocation-depth:", [], []),
        ("x-sheepfold:", CHANGED, []),
        ("x-sheepfold:changed:", CHANGED, []),
        ("x-sheepfold:changed:b", CHANGED[1:], CHANGED[1:]),
        ("x-other:", [], []),
    ],
)
def test_what_queries_name(query: str, listed: list[str], selected: list[str]) -> None:
    assert [*FIXED, *BITMAPS, *CHANGED] == NAMES
    assert matching_contexts(query, NAMES, listing=True) == listed
    assert matching_contexts(query, NAMES, listing=False) == selected


def test_ids() -> None:
    assert context_ids(FIXED) == [1, 2]
    assert context_ids([CHANGED[0], FIXED[1], BITMAPS[0]]) == [3, 2, 4]


async def test_changes_over_the_wire(tmp_path: Path, zones: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    async def ask(*arguments: str) -> Any:
        return await asyncio.to_thread(sheepfold, capsys, *arguments, "--zone", zones[0])

    with serving(tmp_path, zones, "--vdi", "disk:16M") as server:
        server.exports(1)
        async with attached(server.address, "disk") as client:
            await client.write(0, b"a" * MIB)
            await ask("vdi", "snapshot", "disk", "one")
            await client.write(B, b"b" * B)
            await client.call(Command.TRIM, 3 * B, B)
            await ask("vdi", "snapshot", "disk", "two")
            await client.write(5 * B, b"c" * B)
        async with connected(server.address) as client:
            await client.structured_replies()
            assert await client.list_contexts("disk", []) == [
                *FIXED,
                *(f"qemu:dirty-bitmap:{tag}" for tag in ("one", "two")),
                *(f"x-sheepfold:changed:{tag}" for tag in ("one", "two")),
            ]
            assert await client.list_contexts("disk@two", ["x-sheepfold:"]) == ["x-sheepfold:changed:one"]
        wanted = ["base:allocation", "qemu:dirty-bitmap:two", "x-sheepfold:changed:one", "qemu:allocation-depth"]
        for extended in (False, True):
            async with attached(server.address, "disk", extended=extended, contexts=wanted) as client:
                assert list(client.contexts.values()) == wanted
                reply = await client.call(Command.BLOCK_STATUS, 0, 16 * MIB)
                found = {client.contexts[number]: extents for number, extents in reply.extents.items()}
                end = 16 * MIB
                assert found == {
                    "base:allocation": [(3 * B, 0), (B, 3), (MIB - 4 * B, 0), (end - MIB, 3)],
                    "qemu:dirty-bitmap:two": [(5 * B, 0), (B, 1), (end - 6 * B, 0)],
                    "x-sheepfold:changed:one": [(B, 0), (B, 1), (B, 0), (B, 7), (B, 0), (B, 1), (end - 6 * B, 0)],
                    "qemu:allocation-depth": [(3 * B, 1), (B, 0), (MIB - 4 * B, 1), (end - MIB, 0)],
                }
        async with attached(server.address, "disk", contexts=["qemu:dirty-bitmap:two"]) as client:
            await client.write(9 * B, b"d" * 100)
            assert await client.status(8 * B, 4 * B) == [(B, 0), (B, 1), (2 * B, 0)], "at the moment of asking"
        async with attached(server.address, "disk@one", contexts=["qemu:dirty-bitmap:two"]) as client:
            assert await client.status(0, 6 * B) == [(B, 0), (B, 1), (B, 0), (B, 1), (2 * B, 0)]
            code, line = await asyncio.to_thread(fails, capsys, "vdi", "delete", "disk@two", "--zone", zones[0])
            assert (code, "attached" in line) == (5, True), "what a connection compares with stays"
        assert await ask("vdi", "delete", "disk@two") == {"deleted": "disk@two"}
        assert server.stop() == (0, "")


async def test_a_snapshot_that_goes_between_selecting_and_opening(
    tmp_path: Path, zones: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(tmp_path, zones, "--vdi", "disk:1M") as server:
        server.exports(1)
        await asyncio.to_thread(sheepfold, capsys, "vdi", "snapshot", "disk", "s", "--zone", zones[0])
        async with connected(server.address) as client:
            await client.structured_replies()
            assert await client.set_contexts("disk", ["qemu:dirty-bitmap:s", "base:allocation"]) == Rep.ACK
            await asyncio.to_thread(sheepfold, capsys, "vdi", "delete", "disk@s", "--zone", zones[0])
            refused = await client.go("disk")
            assert (refused.accepted, refused.final) == (False, Rep.ERR_UNKNOWN)
            assert await client.set_contexts("disk", ["qemu:dirty-bitmap:s", "base:allocation"]) == Rep.ACK
            assert list(client.contexts.values()) == ["base:allocation"]
            assert (await client.go("disk")).accepted
            assert await client.status(0, MIB) == [(MIB, 3)]
        code, complaint = server.stop()
        assert (code, "there is no snapshot 'disk@s'" in complaint, complaint.count("\n")) == (0, True, 1)


async def test_contexts_of_one_connection_are_bounded(
    tmp_path: Path, zones: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(tmp_path, zones, "--vdi", "disk:1M") as server:
        server.exports(1)
        tags = [f"t{n}" for n in range(SNAPSHOT_CONTEXTS_MAX // 2 + 1)]
        for tag in tags:
            await asyncio.to_thread(sheepfold, capsys, "vdi", "snapshot", "disk", tag, "--zone", zones[0])
        async with connected(server.address) as client:
            await client.structured_replies()
            every = [prefix + tag for prefix in ("qemu:dirty-bitmap:", "x-sheepfold:changed:") for tag in tags]
            assert await client.set_contexts("disk", every[: SNAPSHOT_CONTEXTS_MAX + 1]) == Rep.ERR_TOO_BIG
            assert await client.set_contexts("disk", every[:SNAPSHOT_CONTEXTS_MAX]) == Rep.ACK
            (reply,) = await client.option(Option.SET_META_CONTEXT, context_request("disk", every))
            assert reply.type == Rep.ERR_TOO_BIG
            client.contexts = {}
            assert (await client.go("disk")).accepted, "what was selected before is not selected any more"
            assert (await client.call(Command.BLOCK_STATUS, 0, B)).error == Err.EINVAL
        assert server.stop() == (0, "")
