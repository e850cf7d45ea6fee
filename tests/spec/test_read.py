"""proto.md, NBD_CMD_READ, "Simple reply message", "Structured reply chunk message", NBD_CMD_FLAG_DF."""

import random

import pytest

from tests.support.nbd_client import NbdClient
from tests.support.nbd_spec import ChunkType, Command, CommandFlag, Err
from tests.support.serving import MIB, Disk

PAGE = 4096
END = Disk().size_bytes
PAST_THE_END = [
    (END, 1),
    (END - 1, 2),
    (END - PAGE, 2 * PAGE),
    (END + PAGE, PAGE),
    (0, END + 1),
    (1 << 63, PAGE),
    ((1 << 64) - 1, 1),
    ((1 << 64) - PAGE, PAGE),
    ((1 << 64) - PAGE, 2 * PAGE),
    ((1 << 64) - 1, 0xFFFF_FFFF),
]


@pytest.mark.parametrize(("offset", "length"), PAST_THE_END)
async def test_read_past_the_end(any_client: NbdClient, offset: int, length: int) -> None:
    """ "Error values": NBD_EINVAL for a read beyond the size, offset + length over 2^64 included; no payload."""
    reply = await any_client.call(Command.READ, offset, length)
    assert reply.error == Err.EINVAL
    assert not reply.data
    await any_client.still_serves()


async def test_read_up_to_the_end(any_client: NbdClient) -> None:
    """The last byte belongs to the export."""
    await any_client.write(END - 3, b"end")
    assert await any_client.read(END - 3, 3) == b"end"
    assert await any_client.read(END - 1, 1) == b"d"


async def test_reads_of_any_alignment(any_client: NbdClient) -> None:
    """ "Size constraints": the minimum block size is 1, so every offset and length works."""
    content = random.Random(2).randbytes(4 * PAGE)
    await any_client.write(3 * PAGE, content)
    model = bytes(3 * PAGE) + content + bytes(3 * PAGE)
    for offset, length in [
        (0, 1),
        (PAGE - 1, 2),
        (3 * PAGE - 1, 2),
        (3 * PAGE + 1, 511),
        (PAGE + 7, 5 * PAGE),
        (0, len(model)),
    ]:
        assert await any_client.read(offset, length) == model[offset : offset + length]


async def test_fresh_disk_reads_as_zeros(any_client: NbdClient) -> None:
    """A new volume of this product holds zeros, also where nothing has been allocated."""
    assert await any_client.read(7 * MIB + 1, MIB) == bytes(MIB)


async def test_structured_read_covers_data_and_holes(client: NbdClient) -> None:
    """ "Structured replies": content chunks cover the request exactly once, DONE comes last (checked by the client)."""
    await client.write(8 * PAGE, b"d" * PAGE)
    await client.write(64 * PAGE, b"e" * PAGE)
    model = bytearray(80 * PAGE)
    model[8 * PAGE : 9 * PAGE] = b"d" * PAGE
    model[64 * PAGE : 65 * PAGE] = b"e" * PAGE
    reply = await client.call(Command.READ, 100, 80 * PAGE - 200)
    assert reply.data == model[100:-100]
    assert reply.chunks[-1].done
    assert not any(chunk.done for chunk in reply.chunks[:-1])


async def test_structured_read_of_a_hole_carries_no_zeros(client: NbdClient) -> None:
    """NBD_REPLY_TYPE_OFFSET_HOLE: zeros that are known are not sent as data."""
    reply = await client.call(Command.READ, MIB, MIB)
    assert reply.data == bytes(MIB)
    assert [chunk.type for chunk in reply.chunks if chunk.type != ChunkType.NONE] == [ChunkType.OFFSET_HOLE]


async def test_structured_read_prefers_block_boundaries(client: NbdClient) -> None:
    """NBD_CMD_READ: chunks SHOULD have offsets and lengths that are multiples of 512, but for the first and last."""
    await client.write(5 * PAGE + 100, b"odd")
    await client.write(40 * PAGE + 1, b"odd")
    reply = await client.call(Command.READ, 0, 64 * PAGE)
    content = [chunk for chunk in reply.chunks if chunk.type in (ChunkType.OFFSET_DATA, ChunkType.OFFSET_HOLE)]
    assert all(int.from_bytes(chunk.payload[:8], "big") % 512 == 0 for chunk in content)


async def test_structured_reply_even_for_early_errors(client: NbdClient) -> None:
    """ "Structured reply chunk message": MUST NOT use a simple reply for a read, not even for bad flags."""
    for flags in (CommandFlag.NO_HOLE, 1 << 12):
        reply = await client.call(Command.READ, 0, PAGE, flags=flags)
        assert reply.error == Err.EINVAL
        assert not reply.simple
    assert not (await client.call(Command.READ, END, PAGE)).simple


@pytest.mark.parametrize("length", [1, 512, PAGE, 65535, 65536])
async def test_df_works_up_to_64_kib(client: NbdClient, length: int) -> None:
    """NBD_CMD_FLAG_DF: unfragmented reads up to 65,536 bytes MUST be supported, whatever lies there."""
    await client.write(2 * PAGE, b"x" * PAGE)
    await client.write(9 * PAGE, b"y" * 10)
    model = bytearray(65536 + PAGE)
    model[2 * PAGE : 3 * PAGE] = b"x" * PAGE
    model[9 * PAGE : 9 * PAGE + 10] = b"y" * 10
    for offset in (0, 2 * PAGE - 1):
        reply = await client.call(Command.READ, offset, length, flags=CommandFlag.DF)
        assert reply.error == Err.OK
        assert reply.data[: PAGE + 1] == model[offset : offset + length][: PAGE + 1]


async def test_df_over_data_and_hole_is_one_data_chunk(client: NbdClient) -> None:
    """NBD_CMD_FLAG_DF: an area with data and holes MUST come as one OFFSET_DATA with the zeroes in it."""
    await client.write(PAGE, b"z" * PAGE)
    reply = await client.call(Command.READ, 0, 3 * PAGE, flags=CommandFlag.DF)
    assert reply.data == bytes(PAGE) + b"z" * PAGE + bytes(PAGE)
    content = [chunk.type for chunk in reply.chunks if chunk.type in (ChunkType.OFFSET_DATA, ChunkType.OFFSET_HOLE)]
    assert content == [ChunkType.OFFSET_DATA]


async def test_df_of_a_large_read(client: NbdClient) -> None:
    """NBD_CMD_FLAG_DF: a long request gets one content chunk, or NBD_EOVERFLOW and none."""
    await client.write(MIB, b"q" * PAGE)
    reply = await client.call(Command.READ, 0, 8 * MIB, flags=CommandFlag.DF)
    assert reply.error in (Err.OK, Err.EOVERFLOW)
    if reply.error == Err.OK:
        assert reply.data[MIB : MIB + PAGE] == b"q" * PAGE
    else:
        assert not reply.data


async def test_simple_read_error_has_no_payload(simple: NbdClient) -> None:
    """NBD_CMD_READ, "Simple replies": on an error the server MUST NOT send any payload."""
    reply = await simple.submit(Command.READ, END, PAGE)
    follower = await simple.submit(Command.READ, 0, 16)
    await simple.wait_all([reply, follower])
    assert reply.error == Err.EINVAL
    assert follower.data == bytes(16)


async def test_df_without_structured_replies(simple: NbdClient) -> None:
    """NBD_CMD_FLAG_DF: the flag MUST NOT be set unless NBD_FLAG_SEND_DF was; here it gets NBD_EINVAL, no payload."""
    reply = await simple.call(Command.READ, 0, PAGE, flags=CommandFlag.DF)
    assert reply.error == Err.EINVAL
    assert not reply.data
    await simple.still_serves()
