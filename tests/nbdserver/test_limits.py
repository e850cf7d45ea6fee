"""Limits of a VDI at the protocol, at the control socket and across restarts."""

import asyncio
from collections import deque
from pathlib import Path
from typing import Any

import pytest

import objstore
from nbdserver.cli_admin import note_of
from nbdserver.wire.constants import Command
from tests.nbdserver.test_dispatch import Harness, ask, read, write
from tests.nbdserver.test_service import fails, runtime, serving, sheepfold, zones
from tests.nbdserver.volumes import TestVolume
from tests.support.nbd_client import attached

__all__ = ["runtime", "zones"]


class Gate:
    """A limiter that lets nobody go until it is told to. counted: what was asked for leave."""

    def __init__(self) -> None:
        self.counted: list[tuple[bool, int]] = []
        self.line: deque[tuple[object, asyncio.Future[bool]]] = deque()
        self.shut = True

    def take(self, *, write: bool, length_bytes: int) -> bool:
        if not self.shut:
            self.counted.append((write, length_bytes))
        return not self.shut

    async def wait(self, owner: object, *, write: bool, length_bytes: int) -> bool:
        self.counted.append((write, length_bytes))
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.line.append((owner, turn))
        return await turn

    def dismiss(self, owner: object, *, go: bool) -> None:
        for _, turn in [one for one in self.line if one[0] is owner]:
            turn.set_result(go)
        self.line = deque(one for one in self.line if one[0] is not owner)

    def let_go(self) -> None:
        self.line.popleft()[1].set_result(True)


async def _turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize("slow", [False, True])
async def test_what_is_limited_waits_and_flushes_do_not(slow: bool) -> None:
    volume = TestVolume()
    volume.slow = slow
    volume.limiter = gate = Gate()
    harness = Harness(volume)
    data = bytearray(b"x" * 4096)
    harness.dispatch.run(
        [
            write(harness, 0, data, cookie=1),
            read(0, 512, cookie=2),
            ask(Command.TRIM, 0, 1 << 20, cookie=3),
            ask(Command.WRITE_ZEROES, 0, 4096, cookie=4),
            ask(Command.CACHE, 0, 8192, cookie=5),
            ask(Command.FLUSH, cookie=6),
        ]
    )
    data[:] = bytes(4096)  # the receive buffer belongs to the connection again
    await _turns()
    assert [piece.cookie for piece in harness.parsed()] == [6]
    assert gate.counted == [(True, 4096), (False, 512), (True, 0), (True, 0), (False, 8192)]
    assert harness.dispatch.in_flight == 5
    gate.let_go()
    await _turns()
    assert [piece.cookie for piece in harness.parsed()] == [1]
    into = bytearray(4096)
    await volume.read(0, 4096, memoryview(into))
    assert into == b"x" * 4096
    while gate.line:
        gate.let_go()
        await _turns()
    await harness.dispatch.settle()
    assert harness.pool.held_bytes == 0


async def test_what_may_go_at_once_takes_the_short_way() -> None:
    volume = TestVolume()
    volume.limiter = gate = Gate()
    gate.shut = False
    harness = Harness(volume)
    pieces = await harness.run(write(harness, 0, b"x" * 512, cookie=1), read(0, 512, cookie=2))
    assert {piece.cookie for piece in pieces} == {1, 2}
    assert gate.counted == [(True, 512), (False, 512)]
    assert not volume.calls


async def test_requests_of_a_dead_connection_are_dropped() -> None:
    volume = TestVolume()
    volume.limiter = Gate()
    harness = Harness(volume)
    harness.dispatch.run([write(harness, 0, b"x" * 4096), read(0, 512, cookie=2)])
    await _turns()
    harness.is_alive = False
    harness.dispatch.drop_limited()
    await harness.dispatch.settle()
    assert harness.parsed() == []
    assert harness.finished
    assert harness.pool.held_bytes == 0
    into = bytearray(4096)
    assert await volume.read(0, 4096, memoryview(into)) == 4096, "nothing was written"


async def test_a_stop_waits_for_no_limit() -> None:
    volume = TestVolume()
    volume.limiter = gate = Gate()
    harness = Harness(volume)
    harness.dispatch.run([write(harness, 0, b"x" * 4096, cookie=1)])
    await _turns()
    harness.dispatch.hurry()
    pieces = await harness.run(read(0, 4096, cookie=2))
    assert {piece.cookie for piece in pieces} == {1, 2}
    assert len(gate.counted) == 1


async def test_limits_of_a_disk_in_use(tmp_path: Path, zones: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    async def ask_for(*arguments: str) -> Any:
        return await asyncio.to_thread(sheepfold, capsys, "vdi", *arguments, "--zone", zones[0])

    with serving(tmp_path, zones, "--vdi", "disk:16M") as server:
        server.exports(1)
        async with attached(server.address, "disk") as client:
            await client.write(0, b"a" * 4096)
            shown = await ask_for("limit", "disk", "--iops", "1:2", "--bytes-read", "1M")
            assert shown["limits"] == {"bytes-read": {"rate": 1 << 20, "burst": 0}, "iops": {"rate": 1, "burst": 2}}
            for n in range(100):
                await client.submit(Command.WRITE, 4096 * n, payload=b"b" * 4096)
            await client.flush()
            assert client.outstanding(), "writes for a hundred seconds"
            assert (await ask_for("limit", "disk", "--iops", "0"))["limits"]["bytes-read"]["rate"] == 1 << 20
            while client.outstanding():
                await client.next_reply()
            assert await client.read(99 * 4096, 4096) == b"b" * 4096
            assert (await ask_for("info", "disk"))["limits"].keys() == {"bytes-read"}
        refused = await asyncio.to_thread(fails, capsys, "vdi", "limit", "disk", "--bytes", "9000T", "--zone", zones[0])
        assert refused[0] == 2
        assert server.stop() == (0, "")
    assert (await ask_for("limit", "disk"))["limits"]["bytes-read"] == {"rate": 1 << 20, "burst": 0}
    changed = await ask_for("limit", "disk", "--iops-write", "5", "--bytes-read", "0", "--weight", "300")
    assert (changed["limits"].keys(), changed["weight"]) == ({"iops-write"}, 300)
    assert (await ask_for("info", "disk"))["weight"] == 300
    assert (await asyncio.to_thread(fails, capsys, "vdi", "limit", "disk", "--weight", "0", "--zone", zones[0]))[0] == 2


async def test_a_stop_does_not_wait_for_requests_at_their_limit(
    tmp_path: Path, zones: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(tmp_path, zones, "--vdi", "disk:16M") as server:
        server.exports(1)
        await asyncio.to_thread(sheepfold, capsys, "vdi", "limit", "disk", "--iops", "1", "--zone", zones[0])
        async with attached(server.address, "disk") as client:
            for n in range(50):
                await client.submit(Command.WRITE, 4096 * n, payload=b"c" * 4096)
            await client.flush()
            assert client.outstanding() > 40
            assert await asyncio.to_thread(server.stop) == (0, "")
            while client.outstanding():
                assert (await client.next_reply()).error == 0


async def test_the_library_at_a_server_keeps_to_them(
    tmp_path: Path, zones: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(tmp_path, zones, "--vdi", "disk:16M") as server:
        server.exports(1)
        note = note_of([Path(zones[0])])
        assert note is not None
        control = note.control
        async with await objstore.connect(socket=control) as store:
            shown = await store.set_limits("disk", {"iops-write": (1, 0)})
            assert shown.limits["iops-write"].rate == 1
            async with await store.open("disk") as vdi:
                await vdi.write(0, b"d" * 4096)
                waiting = asyncio.create_task(vdi.write(4096, b"d" * 40_960))
                assert await vdi.read(0, 4096) == b"d" * 4096
                await store.set_limits("disk", {"iops-write": (0, 0)})
                await waiting
                assert await vdi.read(4096, 4096) == b"d" * 4096
        assert server.stop() == (0, "")
