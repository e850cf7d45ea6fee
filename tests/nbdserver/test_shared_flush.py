"""Flushes that share one: answered together, but never by one that began before the last change."""

import asyncio
from pathlib import Path

import pytest

from nbdserver.wire.constants import Command
from objstore.errors import Unavailable
from tests.conftest import ExpectedWarnings
from tests.nbdserver.test_dispatch import Harness, ask, write
from tests.nbdserver.volumes import TestVolume, until
from tests.support.nbd_spec import Err
from tests.support.our_server import serve_volume


class Counting(TestVolume):
    """A volume whose flush waits at a gate and whose flush_state is that of a log."""

    def __init__(self) -> None:
        super().__init__()
        self.position = 0
        self.durable = 0
        self.flushes = 0
        self.gate = asyncio.Event()

    def write_now(self, offset_bytes: int, data: memoryview) -> bool:
        self.position += 1
        return super().write_now(offset_bytes, data)

    def flush_state(self) -> int:
        return 0 if self.durable == self.position else self.position

    async def flush(self) -> None:
        self.flushes += 1
        position = self.position
        assert self.gate is not None
        await self.gate.wait()
        if self.fails is not None:
            raise self.fails
        self.durable = max(self.durable, position)


async def begun(harness: Harness, *requests: tuple) -> None:  # type: ignore[type-arg]
    harness.dispatch.run(list(requests))
    for _ in range(3):
        await asyncio.sleep(0)


async def test_repeated_flushes_share_one() -> None:
    volume = Counting()
    harness = Harness(volume)
    await begun(harness, write(harness, 0, b"x" * 4096, cookie=1))
    await begun(harness, *(ask(Command.FLUSH, cookie=cookie) for cookie in range(2, 34)))
    await begun(harness, *(ask(Command.FLUSH, cookie=cookie) for cookie in range(34, 40)))
    assert volume.flushes == 1
    assert [piece.cookie for piece in harness.parsed()] == [1], "no flush is answered before it is done"
    volume.gate.set()
    await harness.dispatch.settle()
    assert [piece.cookie for piece in harness.parsed()] == list(range(2, 40))


async def test_flush_behind_a_change_is_one_of_its_own() -> None:
    volume = Counting()
    harness = Harness(volume)
    await begun(harness, write(harness, 0, b"x" * 4096, cookie=1), ask(Command.FLUSH, cookie=2))
    await begun(harness, write(harness, 0, b"y" * 4096, cookie=3), ask(Command.FLUSH, cookie=4))
    assert volume.flushes == 2
    volume.gate.set()
    await harness.dispatch.settle()
    assert sorted(piece.cookie for piece in harness.parsed()) == [1, 2, 3, 4]


async def test_flush_of_nothing_is_answered_at_once() -> None:
    volume = Counting()
    harness = Harness(volume)
    assert [piece.cookie for piece in await harness.run(ask(Command.FLUSH, cookie=7))] == [7]
    assert volume.flushes == 0


@pytest.mark.parametrize("count", [1, 5])
async def test_a_failed_flush_fails_for_all_who_share_it(count: int, expected_warnings: ExpectedWarnings) -> None:
    expected_warnings.allow(".*")
    volume = Counting()
    harness = Harness(volume)
    await begun(harness, write(harness, 0, b"x" * 4096, cookie=99))
    await begun(harness, *(ask(Command.FLUSH, cookie=cookie) for cookie in range(count)))
    volume.fails = Unavailable("a zone failed")
    volume.gate.set()
    await harness.dispatch.settle()
    errors = {piece.cookie: piece.error for piece in harness.parsed()}
    assert all(errors[cookie] == 5 for cookie in range(count))


async def test_a_client_that_repeats_a_flush_is_not_read_until_that_is_done(tmp_path: Path) -> None:
    volume = Counting()
    async with serve_volume(volume, tmp_path) as served, served.attached() as client:
        await client.write(0, b"x" * 512)
        flushes = [await client.submit(Command.FLUSH) for _ in range(6)]
        (connection,) = served.server._connections
        try:
            await until(lambda: not connection._reading)
            read = await client.submit(Command.READ, 0, 512)
            async with served.attached() as other:  # others are not held, and the server has its turns
                assert await other.read(0, 512) == b"x" * 512
            assert not connection._reading
        finally:
            volume.gate.set()
        answered = [await client.next_reply() for _ in range(7)]
        assert all(reply.error == Err.OK for reply in answered)
        assert {id(reply) for reply in answered[:6]} == {id(reply) for reply in flushes}
        assert answered[6] is read
        assert volume.flushes == 1
