"""When a reply may be sent: proto.md, "Ordering of messages and writes", NBD_CMD_FLAG_FUA, NBD_CMD_FLUSH.

The volume is a scripted one: it holds requests, so that a reply that comes too early is seen; it notes what it was
asked for.
"""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.channel import Disconnected
from tests.support.nbd_client import NbdClient
from tests.support.nbd_spec import Command, CommandFlag, Err, Reply
from tests.support.our_server import OurServed, serve_volume
from tests.support.scripted_volume import ScriptedVolume

PAGE = 4096
FUA_COMMANDS = [Command.WRITE, Command.TRIM, Command.WRITE_ZEROES]
KIND = {Command.WRITE: "write", Command.TRIM: "trim", Command.WRITE_ZEROES: "zero"}


@pytest.fixture
async def volume() -> ScriptedVolume:
    return ScriptedVolume()


@pytest.fixture
async def served(volume: ScriptedVolume, tmp_path: Path) -> AsyncIterator[OurServed]:
    async with serve_volume(volume, tmp_path) as served:
        yield served


async def submit(client: NbdClient, command: Command, flags: int = 0) -> Reply:
    if command == Command.WRITE:
        return await client.submit(command, 0, payload=b"w" * PAGE, flags=flags)
    return await client.submit(command, 0, 0 if command == Command.FLUSH else PAGE, flags=flags)


@pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
@pytest.mark.parametrize(
    ("command", "flags"),
    [*((command, CommandFlag.FUA) for command in FUA_COMMANDS), (Command.FLUSH, 0), (Command.FLUSH, CommandFlag.FUA)],
)
async def test_no_reply_before_it_is_durable(
    volume: ScriptedVolume, served: OurServed, command: Command, flags: int, structured: bool
) -> None:
    """A reply to FLUSH or to a command with FUA MUST NOT be sent before the data is on stable storage."""
    async with served.attached(structured=structured) as client, served.connected() as other:
        volume.hold()
        reply = await submit(client, command, flags)
        await volume.arrived(1)
        for _ in range(3):
            await other.in_step()  # the server has been around its loop since
        assert not client.something_to_receive()
        await volume.release()
        assert (await client.wait(reply)).error == Err.OK


@pytest.mark.parametrize("command", FUA_COMMANDS)
@pytest.mark.parametrize("fua", [False, True])
async def test_fua_reaches_the_volume(volume: ScriptedVolume, served: OurServed, command: Command, fua: bool) -> None:
    """NBD_CMD_FLAG_FUA is handed to the volume with each writing command, and only when it was set."""
    async with served.attached() as client:
        reply = await client.wait(await submit(client, command, CommandFlag.FUA if fua else 0))
        assert reply.error == Err.OK
    assert volume.fua_commands == ([KIND[command]] if fua else [])


@pytest.mark.parametrize("no_hole", [False, True])
@pytest.mark.parametrize("fast", [False, True])
async def test_flags_of_write_zeroes_reach_the_volume(
    volume: ScriptedVolume, served: OurServed, no_hole: bool, fast: bool
) -> None:
    """NBD_CMD_FLAG_NO_HOLE and NBD_CMD_FLAG_FAST_ZERO are the volume's to keep; each alone, both, or none."""
    flags = (CommandFlag.NO_HOLE if no_hole else 0) | (CommandFlag.FAST_ZERO if fast else 0)
    async with served.attached() as client:
        assert (await client.call(Command.WRITE_ZEROES, 0, PAGE, flags=flags)).error == Err.OK
    assert volume.zero_flags == [(no_hole, fast)]


async def test_slow_fast_zero_is_enotsup(volume: ScriptedVolume, served: OurServed) -> None:
    """NBD_CMD_FLAG_FAST_ZERO: MUST be NBD_ENOTSUP, nothing changed, where zeroing needs a write: parts of blocks."""
    async with served.attached() as client:
        await client.write(0, b"d" * PAGE)
        reply = await client.call(Command.WRITE_ZEROES, 10, 100, flags=CommandFlag.FAST_ZERO)
        assert reply.error == Err.ENOTSUP
        assert await client.read(0, PAGE) == b"d" * PAGE
        assert (await client.call(Command.WRITE_ZEROES, 10, 100)).error == Err.OK


async def test_flush_reaches_the_volume(volume: ScriptedVolume, served: OurServed) -> None:
    """NBD_CMD_FLUSH is never answered without the volume: there is no such thing as nothing to flush."""
    async with served.attached() as client:
        for count in range(1, 4):
            await client.flush()
            assert volume.flush_count == count


async def test_flush_overtakes_a_held_write_of_another(volume: ScriptedVolume, served: OurServed) -> None:
    """A flush covers what was answered before it; a write without an answer does not hold it up."""
    async with served.attached() as one, served.attached() as two:
        volume.hold()
        held = await submit(one, Command.WRITE)
        await volume.arrived(1)
        await volume.release_only("flush")
        await two.flush()
        assert not one.something_to_receive()
        await volume.release()
        assert (await one.wait(held)).error == Err.OK


async def test_replies_out_of_order(volume: ScriptedVolume, served: OurServed) -> None:
    """ "Transmission": replies need not have the order of the requests: a held write delays no read behind it."""
    async with served.attached() as client:
        volume.hold()
        held = await submit(client, Command.WRITE)
        await volume.arrived(1)
        await volume.release_only("read")
        read = await client.call(Command.READ, PAGE, PAGE)
        assert read.error == Err.OK
        await volume.release()
        assert (await client.wait(held)).error == Err.OK


async def test_disc_waits_for_the_volume(volume: ScriptedVolume, served: OurServed) -> None:
    """NBD_CMD_DISC: the server MUST handle all outstanding requests before it closes."""
    async with served.attached() as client:
        volume.hold()
        replies = [await submit(client, Command.WRITE), await submit(client, Command.FLUSH)]
        await client.send_disc()
        await volume.arrived(1)
        await volume.release()
        assert {reply.error for reply in await client.wait_all(replies)} == {Err.OK}
        await client.expect_orderly_close()


async def test_disc_and_gone_still_writes(volume: ScriptedVolume, served: OurServed) -> None:
    """NBD_CMD_DISC: requests in front of it are finished even if the client does not stay to hear of it."""
    async with served.attached() as client:
        volume.hold()
        await submit(client, Command.WRITE)
        await client.send_disc()
        await volume.arrived(1)
    await volume.release()
    async with served.attached() as other:
        await other.flush()
    await served.server.stop()
    into = bytearray(PAGE)
    await volume.read(0, PAGE, memoryview(into))
    assert into == b"w" * PAGE


async def test_half_close_before_the_volume_is_done(volume: ScriptedVolume, served: OurServed) -> None:
    """The end of the client's stream can't be told from its death, so a write that still waits may be dropped then.

    Dropped means without a reply: an error would tell a client that is still there that its disk has failed. What can
    be answered is answered with success, and the connection closes.
    """
    async with served.attached() as client:
        volume.hold()
        write = await submit(client, Command.WRITE)
        read = await submit(client, Command.READ)
        client.half_close()
        await volume.arrived(1)
        await volume.release()
        answered = []
        with contextlib.suppress(Disconnected):
            while client.outstanding():
                answered.append(await client.next_reply())
        assert all(reply.error == Err.OK for reply in answered)
        await client.expect_orderly_close()
    async with served.attached() as other:
        content = await other.read(0, PAGE)
        assert content == (b"w" * PAGE if write in answered else content)
        assert read not in answered or bytes(read.data) in (b"w" * PAGE, bytes(PAGE))


async def test_disc_behind_more_than_can_be_in_flight(volume: ScriptedVolume, served: OurServed) -> None:
    """NBD_CMD_DISC behind hundreds of requests, more than a server takes at once: all of them are handled."""
    async with served.attached() as client:
        volume.hold()
        replies = [
            await client.submit(Command.WRITE, index * 16, payload=bytes([index % 251 + 1]) * 16)
            for index in range(400)
        ]
        replies.append(await client.submit(Command.READ, 0, PAGE))
        await client.send_disc()
        await volume.arrived(1)
        await volume.release()
        assert {reply.error for reply in await client.wait_all(replies)} == {Err.OK}
        await client.expect_orderly_close()
    async with served.attached() as other:
        content = await other.read(0, 400 * 16)
        assert content == b"".join(bytes([index % 251 + 1]) * 16 for index in range(400))
