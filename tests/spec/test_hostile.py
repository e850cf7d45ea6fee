"""Clients that mean harm or are broken: bounded time, bounded memory, and nobody else notices.

proto.md allows a hard disconnect for denial of service and for broken MUST rules; which of them happens is left open
where only the others matter.
"""

import asyncio
import contextlib
import random
import struct
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import pytest

from nbdserver import server as server_module
from tests.conftest import ExpectedWarnings
from tests.support.channel import Disconnected
from tests.support.nbd_client import NbdClient, attached, connected
from tests.support.nbd_spec import OPTION_HEADER, Command, CommandFlag, Err, Option, Rep
from tests.support.our_server import serve, serve_volume
from tests.support.scripted_volume import ScriptedVolume
from tests.support.serving import MIB, Disk, Served

PAGE = 4096
IHAVEOPT = 0x49484156454F5054


def memory_bytes() -> int:
    """Resident memory of this process, which holds the server."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE


async def busy_others(served: Served, rounds: int = 50) -> None:
    """Another client works for a while; the server has met everything that was sent to it before."""
    async with served.attached() as other:
        for index in range(rounds):
            await other.write(index * PAGE, b"o" * PAGE)
            assert await other.read(index * PAGE, PAGE) == b"o" * PAGE
        await other.flush()


@contextlib.asynccontextmanager
async def meanwhile(work: Coroutine[None, None, None]) -> AsyncIterator[asyncio.Task[None]]:
    """Run something beside the block; what is not done at its end is given up."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


HALF_HANDSHAKES = {
    "silent": b"",
    "half the flags": b"\0\0",
    "flags only": b"\0\0\0\3",
    "half an option header": b"\0\0\0\3" + b"IHAVEO",
    "half an option": b"\0\0\0\3" + OPTION_HEADER.pack(IHAVEOPT, Option.GO, 100) + bytes(50),
}


@pytest.mark.parametrize("sent", HALF_HANDSHAKES.values(), ids=HALF_HANDSHAKES.keys())
async def test_handshake_has_a_deadline(tmp_path: Path, sent: bytes) -> None:
    """ "Termination of the session": a client that does not get through the handshake is dropped; others are not."""
    async with serve([Disk()], tmp_path, handshake_seconds=0.15) as served, served.attached() as patient:
        async with served.connected(flags=None) as client:
            await client.greeting()
            await client.send(sent)
            await client.expect_close()
        await patient.still_serves()  # its deadline has passed as well, but it is in transmission


async def test_handshake_deadline_covers_haggling(tmp_path: Path) -> None:
    """A client that keeps on asking is dropped as well: the deadline is that of the whole handshake."""
    async with serve([Disk()], tmp_path, handshake_seconds=0.15, options_max=1 << 30) as served:
        async with served.connected() as client:
            ended = False
            while not ended:
                try:
                    await client.exports()
                except Disconnected:
                    ended = True
        await served.others_are_served()


async def test_number_of_options_is_bounded(tmp_path: Path) -> None:
    """A client that never stops haggling is dropped after a bounded number of options."""
    async with serve([Disk()], tmp_path, handshake_seconds=60.0) as served:
        async with served.connected() as client:
            answered = 0
            with contextlib.suppress(Disconnected):
                while answered < 10_000:
                    await client.option(77)
                    answered += 1
            assert 16 <= answered < 10_000
        await served.others_are_served()


async def test_option_flood(nbd_server: Served) -> None:
    """Options without end and without reading: the flood stalls or its sender is dropped; others are served."""
    async with nbd_server.connected() as client:
        flood = OPTION_HEADER.pack(IHAVEOPT, Option.LIST, 0) * 5000

        async def pour() -> None:
            with contextlib.suppress(Disconnected):
                for _ in range(200):
                    await client.send(flood)

        async with meanwhile(pour()):
            await busy_others(nbd_server)


@pytest.mark.parametrize("option", [Option.LIST, Option.GO, Option.EXPORT_NAME, Option.SET_META_CONTEXT, 4242])
async def test_option_lengths_reserve_nothing(nbd_server: Served, option: int) -> None:
    """No memory is set aside for an announced option length."""
    before = memory_bytes()
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(30):
            client = await stack.enter_async_context(nbd_server.connected())
            await client.send_option(option, b"data" * 256, length=0xFFFF_FFFF)
        await busy_others(nbd_server)
        assert memory_bytes() - before < 32 * MIB


@pytest.mark.parametrize("length", [70_000, 1 << 20, 1 << 24])
@pytest.mark.parametrize("option", [Option.LIST, Option.INFO, Option.SET_META_CONTEXT, 9999])
async def test_long_option_is_refused(nbd_server: Served, option: int, length: int) -> None:
    """An option far longer than any sensible one: an error, with every byte of it skipped, or the end."""
    async with nbd_server.connected() as client:
        try:
            await client.send_option(option, b"", length=length)
            for start in range(0, length, 1 << 16):
                await client.send(bytes(min(length - start, 1 << 16)))
            replies = await client.option_replies(option)
        except Disconnected:
            replies = []
        if replies:
            assert replies[-1].type in (Rep.ERR_UNSUP, Rep.ERR_TOO_BIG, Rep.ERR_INVALID)
            await client.in_step()
    await nbd_server.others_are_served()


async def test_endless_option(nbd_server: Served) -> None:
    """An option of 4 GiB, of which a part is sent: others are served meanwhile, and its end is its sender's affair."""
    async with nbd_server.connected() as client:
        await client.send_option(9999, b"", length=0xFFFF_FFFF)
        with contextlib.suppress(Disconnected):
            for _ in range(64):
                await client.send(bytes(1 << 18))
        await nbd_server.others_are_served()


async def test_write_lengths_reserve_nothing(tmp_path: Path) -> None:
    """No memory is set aside for an announced payload, only for what has come of it."""
    async with serve([Disk()], tmp_path) as served:
        before = memory_bytes()
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(30):
                client = await stack.enter_async_context(served.attached())
                await client.send(client.pack_request(Command.WRITE, 0, 64 * MIB, cookie=1) + bytes(1000))
            await busy_others(served)
            assert memory_bytes() - before < 64 * MIB


async def test_hoarders_of_buffers_are_closed(tmp_path: Path) -> None:
    """Clients that announce payloads and stall hold buffers that others wait for: after a while they are dropped."""
    settings: dict[str, Any] = {"buffer_bytes_max": 128 * MIB, "stall_seconds": 0.2}
    async with serve([Disk()], tmp_path, **settings) as served, contextlib.AsyncExitStack() as stack:
        for _ in range(6):
            client = await stack.enter_async_context(served.attached())
            await client.send(client.pack_request(Command.WRITE, 0, 32 * MIB, cookie=1) + bytes(60_000))
        data = random.Random(8).randbytes(32 * MIB)
        async with served.attached() as honest:
            async with meanwhile(honest.write(64 * MIB, data)) as writing:
                await busy_others(served)
                await writing
            assert await honest.read(64 * MIB, 32 * MIB) == data


async def test_hoarders_that_move_a_byte_now_and_then_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients that announce payloads and send them drop by drop are dropped as well when others wait for memory."""
    monkeypatch.setattr(server_module, "WATCH_SECONDS", 0.05)
    settings: dict[str, Any] = {"buffer_bytes_max": 128 * MIB, "stall_seconds": 1.5}

    data = random.Random(8).randbytes(32 * MIB)

    async def drip(client: NbdClient) -> None:
        with contextlib.suppress(Disconnected):
            while True:
                await client.send(b"x")
                await asyncio.sleep(0.02)

    async with serve([Disk()], tmp_path, **settings) as served, contextlib.AsyncExitStack() as stack:
        for _ in range(6):
            client = await stack.enter_async_context(served.attached())
            await client.send(client.pack_request(Command.WRITE, 0, 32 * MIB, cookie=1) + bytes(60_000))
            await stack.enter_async_context(meanwhile(drip(client)))
        async with served.attached() as honest:
            await honest.write(64 * MIB, data)
            assert await honest.read(64 * MIB, 32 * MIB) == data


async def test_client_that_stops_reading(tmp_path: Path) -> None:
    """Replies that nobody takes: memory is bounded, others are served, and the sleeper gets all when it wakes."""
    async with serve([Disk()], tmp_path) as served:
        async with served.attached() as setup:
            await setup.write(64 * MIB, random.Random(4).randbytes(MIB))
        before = memory_bytes()
        async with served.attached(receive_buffer_bytes=4096) as sleeper:
            replies = [await sleeper.submit(Command.READ, 64 * MIB, MIB) for _ in range(500)]
            await busy_others(served)
            assert memory_bytes() - before < 96 * MIB
            first = await sleeper.wait(replies[0])
            for reply in await sleeper.wait_all(replies[1:]):
                assert reply.data == first.data
                reply.data.clear()
                reply.chunks.clear()


async def test_request_flood_without_reading(tmp_path: Path) -> None:
    """Small requests without end: the server stops reading them, others are served, memory is bounded."""
    async with serve([Disk()], tmp_path) as served, served.attached(structured=False) as client:
        before = memory_bytes()
        flood = b"".join(client.pack_request(Command.READ, 0, PAGE, cookie=index) for index in range(5000))

        async def pour() -> None:
            with contextlib.suppress(Disconnected):
                for _ in range(400):
                    await client.send(flood)

        async with meanwhile(pour()):
            await busy_others(served)
            assert memory_bytes() - before < 64 * MIB


async def test_slow_volume_bounds_what_is_taken_in(tmp_path: Path) -> None:
    """Writes that the volume does not take yet: a bounded amount is received, all is written in the end."""
    volume = ScriptedVolume()
    settings = {"held_bytes_max": 16 * MIB}
    async with serve_volume(volume, tmp_path, **settings) as served, served.attached(structured=False) as client:
        before = memory_bytes()
        volume.hold()
        payload = b"s" * (4 * MIB)
        replies = []

        async def pour() -> None:
            for index in range(50):
                replies.append(await client.submit(Command.WRITE, index % 16 * 4 * MIB, payload=payload))

        async with meanwhile(pour()) as pouring:
            await volume.arrived(1)
            quiet_rounds, sent = 0, 0
            while quiet_rounds < 20:
                async with served.connected() as other:
                    await other.in_step()
                quiet_rounds = quiet_rounds + 1 if len(replies) == sent else 0
                sent = len(replies)
            assert sent < 10
            assert memory_bytes() - before < 64 * MIB
            await volume.release()
            await pouring
        assert {reply.error for reply in await client.wait_all(replies)} == {Err.OK}


async def test_dead_clients_requests_do_not_outlive_it(tmp_path: Path) -> None:
    """A write that waited when its client vanished is dropped: it must not overwrite what a successor has written."""
    volume = ScriptedVolume()
    async with serve_volume(volume, tmp_path) as served:
        async with served.attached() as dying:
            volume.hold()
            await dying.submit(Command.WRITE, 0, payload=b"old" * 1000)
            await volume.arrived(1)
            dying.reset()
        async with served.attached() as successor:
            await volume.release()
            await successor.write(0, b"new" * 1000)
            await successor.flush()
            assert await successor.read(0, 3000) == b"new" * 1000


async def test_two_hundred_connections(nbd_server: Served) -> None:
    """Many connections at once, all of them at work."""
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(nbd_server.attached()) for _ in range(200)]
        writes = [
            await client.submit(Command.WRITE, index * PAGE, payload=struct.pack(">I", index) * 1024)
            for index, client in enumerate(clients)
        ]
        for client, reply in zip(clients, writes, strict=True):
            assert (await client.wait(reply)).error == Err.OK
        for index, client in enumerate(reversed(clients)):
            assert await client.read((199 - index) * PAGE, 4) == struct.pack(">I", 199 - index)


async def test_number_of_connections_is_bounded(
    tmp_path: Path, expected_warnings: ExpectedWarnings, caplog: pytest.LogCaptureFixture
) -> None:
    """Over connections_max a newcomer is turned away at once; when somebody leaves there is room again.

    Whoever tries again and again does not fill the log.
    """
    expected_warnings.allow("connections_max=3")
    async with serve([Disk()], tmp_path, connections_max=3) as served, contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(served.attached()) for _ in range(3)]
        for _ in range(20):
            newcomer = await NbdClient.connect(served.address)
            stack.callback(newcomer.close)
            rest, _ = await newcomer.receive_until_close()
            assert rest == b""
        assert sum("connections_max=3" in message for message in caplog.messages) == 1
        await clients[0].send_disc()
        await clients[0].expect_orderly_close()
        clients[0].close()
        async with asyncio.timeout(20):
            while True:
                with contextlib.suppress(Disconnected):
                    async with served.attached() as later:
                        await later.still_serves()
                        break
        await clients[1].still_serves()


@pytest.mark.parametrize("seed", range(8))
async def test_noise_in_the_handshake(tmp_path: Path, seed: int) -> None:
    """Random bytes, and random options with random data and lengths: a reply or the end, never harm to others."""
    dice = random.Random(seed)
    async with serve([Disk()], tmp_path, handshake_seconds=2.0) as served:
        for _ in range(60):
            async with served.connected(flags=dice.choice([0, 1, 3])) as client:
                with contextlib.suppress(Disconnected):
                    for _ in range(dice.randrange(1, 6)):
                        data = dice.randbytes(dice.choice([0, 1, 4, 6, 9, 40, 3000]))
                        if dice.random() < 0.4:
                            data = struct.pack(">I", dice.choice([0, 4, 5, 0xFFFF_FFFF])) + b"disk" + data
                        length = dice.choice([len(data), len(data), len(data), len(data) + 1, max(len(data) - 1, 0)])
                        await client.send_option(dice.choice([*Option, 0, 99]), data, length=length)
                    if dice.random() < 0.5:
                        await client.send(dice.randbytes(dice.randrange(200)))
                    client.half_close()
                    await client.receive_until_close()
        await served.others_are_served()


@pytest.mark.parametrize("kind", ["simple", "structured", "extended"])
@pytest.mark.parametrize("seed", range(4))
async def test_noise_in_transmission(tmp_path: Path, seed: int, kind: str) -> None:
    """Random requests, then random bytes: each gets a reply or the session ends; the disk of others stays usable."""
    dice = random.Random(seed)
    edges = [0, 1, 511, PAGE, 128 * MIB - 1, 128 * MIB, 1 << 32, (1 << 63) - 1, (1 << 64) - 1]
    async with serve([Disk()], tmp_path) as served:
        for _ in range(25):
            structured, extended = kind == "structured", kind == "extended"
            async with served.attached(structured=structured, extended=extended) as client:
                for _ in range(40):
                    command = dice.choice([*range(9), 77])
                    if command in (Command.DISC, Command.WRITE):
                        continue
                    flags = dice.choice([0, 0, 0, *CommandFlag, 1 << 15]) & ~CommandFlag.PAYLOAD_LEN
                    length = (
                        dice.choice(edges if extended else edges[:4])
                        if command != Command.READ
                        else dice.choice(edges[:4])
                    )
                    await client.call(command, dice.choice(edges), length, flags=flags, cookie=dice.getrandbits(64))
                await client.send(dice.randbytes(dice.randrange(1, 400)))
                client.half_close()
                await client.receive_until_close()
        await served.others_are_served()


async def test_extended_headers_can_be_switched_off(tmp_path: Path) -> None:
    """A configuration without extended headers treats NBD_OPT_EXTENDED_HEADERS as unknown."""
    async with serve([Disk()], tmp_path, extended_headers=False) as served, connected(served.address) as client:
        assert await client.final(Option.EXTENDED_HEADERS) == Rep.ERR_UNSUP
        assert await client.final(Option.EXTENDED_HEADERS, b"x") == Rep.ERR_UNSUP
        assert (await client.go()).accepted
        await client.still_serves()


async def test_tcp_clients_are_served_alike(tmp_path: Path) -> None:
    """Resets, half closes and large replies over TCP, where they differ from Unix sockets."""
    async with serve([Disk()], tmp_path, listen=["tcp"]) as served:
        async with attached(served.address) as client:
            await client.write(0, b"t" * 40 * MIB)
            replies = [await client.submit(Command.READ, 0, 20 * MIB) for _ in range(3)]
            client.half_close()
            for reply in await client.wait_all(replies):
                assert reply.data == b"t" * 20 * MIB
            await client.expect_orderly_close()
        for count in (0, 1, 8):
            async with attached(served.address) as rude:
                for _ in range(count):
                    await rude.submit(Command.READ, 0, 20 * MIB)
                rude.reset()
            await served.others_are_served()
