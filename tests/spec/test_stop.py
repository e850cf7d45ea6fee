"""The server's stop: what was received is finished and answered, no error is sent, every connection closes in order.

proto.md, "Terminating the transmission phase" would allow NBD_ESHUTDOWN; the kernel and qemu turn that into I/O errors
of their users, whereas both recover from a connection that closes.
"""

import asyncio
import contextlib
import struct
from pathlib import Path

import pytest

from tests.support.channel import Disconnected
from tests.support.nbd_client import NbdClient, attached, connected
from tests.support.nbd_spec import Command, Err, Option, Rep
from tests.support.our_server import serve, serve_volume
from tests.support.scripted_volume import ScriptedVolume
from tests.support.serving import MIB, Disk

PAGE = 4096
LINGER_SECONDS = 0.05
"""These clients stay while the server waits for them to go."""


async def test_stop_closes_idle_connections(tmp_path: Path) -> None:
    """Nothing is in flight: the connections close without a byte or a reset, in both phases."""
    async with (
        serve([Disk()], tmp_path, linger_seconds=LINGER_SECONDS) as served,
        served.attached() as idle,
        served.connected() as haggling,
    ):
        await idle.still_serves()
        await haggling.exports()
        await served.server.stop()
        await idle.expect_orderly_close()
        await haggling.expect_close()
        with pytest.raises((ConnectionError, FileNotFoundError)):
            await NbdClient.connect(served.address)


@pytest.mark.parametrize("kind", ["simple", "structured", "extended"])
async def test_stop_answers_what_is_in_flight(tmp_path: Path, kind: str) -> None:
    """Requests that the volume works on when the stop begins are answered with success, and took effect."""
    volume = ScriptedVolume()
    structured, extended = kind == "structured", kind == "extended"
    async with (
        serve_volume(volume, tmp_path, linger_seconds=LINGER_SECONDS) as served,
        served.attached(structured=structured, extended=extended) as client,
    ):
        await client.write(9 * PAGE, b"r" * PAGE)
        volume.hold()
        replies = [await client.submit(Command.WRITE, index * PAGE, payload=b"w" * PAGE) for index in range(8)]
        replies.append(await client.submit(Command.READ, 9 * PAGE, PAGE))
        replies.append(await client.submit(Command.FLUSH))
        await volume.arrived(1)
        stopping = asyncio.create_task(served.server.stop())
        await asyncio.sleep(0)
        await volume.release()
        for reply in await client.wait_all(replies):
            assert reply.error == Err.OK
        assert replies[8].data == b"r" * PAGE
        await client.expect_orderly_close()
        await stopping
    into = bytearray(8 * PAGE)
    await volume.read(0, len(into), memoryview(into))
    assert into == b"w" * 8 * PAGE


async def test_stop_never_sends_an_error(tmp_path: Path) -> None:
    """Requests that race with the stop are answered with success or not at all, and what was answered was done."""
    volume = ScriptedVolume()
    async with serve_volume(volume, tmp_path, linger_seconds=LINGER_SECONDS) as served, served.attached() as client:
        for index in range(400):
            await client.submit(Command.WRITE, index * PAGE, payload=b"s" * PAGE)
        stopping = asyncio.create_task(served.server.stop())
        answered = []
        with contextlib.suppress(Disconnected):
            while True:
                answered.append(await client.next_reply())
        await stopping
    assert all(reply.error == Err.OK for reply in answered)
    into = bytearray(PAGE)
    for reply in answered:
        await volume.read(reply.request.offset_bytes, PAGE, memoryview(into))
        assert into == b"s" * PAGE


async def test_stop_drops_an_unfinished_request(tmp_path: Path) -> None:
    """A payload that is not complete when the stop comes: nothing is written, no error is sent, the stop goes on."""
    volume = ScriptedVolume()
    async with (
        serve_volume(volume, tmp_path, stop_seconds=1.0, linger_seconds=LINGER_SECONDS) as served,
        served.attached() as client,
    ):
        await client.write(PAGE, b"whole")
        await client.send(client.pack_request(Command.WRITE, 0, MIB, cookie=1) + b"p" * PAGE)
        await served.others_are_served()
        await served.server.stop()
        await client.expect_close()
    into = bytearray(PAGE)
    if await volume.read(0, PAGE, memoryview(into)) < PAGE:
        assert into == bytes(PAGE)


async def test_stop_does_not_wait_for_a_client_that_does_not_read(tmp_path: Path) -> None:
    """A client that takes no replies delays the stop by a bounded time only."""
    async with (
        serve([Disk()], tmp_path, stop_seconds=0.2) as served,
        served.attached(receive_buffer_bytes=4096) as client,
    ):
        await client.write(0, b"x" * 16 * MIB)
        for _ in range(8):
            await client.submit(Command.READ, 0, 16 * MIB)
        await served.others_are_served()
        async with asyncio.timeout(20):
            await served.server.stop()


async def test_stop_during_haggling(tmp_path: Path) -> None:
    """ "Termination of the session during option haggling": NBD_REP_ERR_SHUTDOWN or a close, and no other reply."""
    async with serve([Disk()], tmp_path, linger_seconds=LINGER_SECONDS) as served, served.connected() as client:
        await client.exports()
        stopping = asyncio.create_task(served.server.stop())
        await asyncio.sleep(0)
        try:
            await client.send_option(Option.GO, struct.pack(">IH", 0, 0))
            replies = await client.option_replies(Option.GO)
        except ConnectionError:
            replies = []
        assert all(reply.type == Rep.ERR_SHUTDOWN for reply in replies)
        await client.receive_until_close()
        await stopping


async def test_stop_flushes(tmp_path: Path) -> None:
    """The last thing a stop does is to flush the volumes that were in use."""
    volume = ScriptedVolume()
    async with serve_volume(volume, tmp_path, linger_seconds=LINGER_SECONDS) as served, served.attached() as client:
        await client.write(0, b"dirty")
        await served.server.stop()
        assert volume.flush_count >= 1


async def test_server_starts_again_on_its_socket(tmp_path: Path) -> None:
    """A stopped server leaves its address free for the next."""
    for _ in range(2):
        async with serve([Disk()], tmp_path, listen=["unix", "tcp"]) as served:
            for address in served.addresses:
                async with attached(address) as client:
                    await client.still_serves()
                async with connected(address) as client:
                    await client.in_step()
