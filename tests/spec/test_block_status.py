"""proto.md, NBD_CMD_BLOCK_STATUS, NBD_REPLY_TYPE_BLOCK_STATUS, "base:allocation metadata context".

The client checks each reply: one chunk per context, no empty extent, none that begins past the request or reaches past
the export, exactly one with REQ_ONE.
"""

import itertools
import random

import pytest

from tests.support.nbd_client import NbdClient, whole_map
from tests.support.nbd_spec import STATE_HOLE, STATE_ZERO, Command, CommandFlag, Err
from tests.support.serving import MIB, Disk, Served

PAGE = 4096
END = Disk().size_bytes
HOLE = STATE_HOLE | STATE_ZERO


@pytest.mark.parametrize("structured", [False, True])
async def test_status_without_a_context(nbd_server: Served, structured: bool) -> None:
    """ "Metadata querying": NBD_EINVAL for a client that selected no context."""
    async with nbd_server.attached(structured=structured) as client:
        assert (await client.call(Command.BLOCK_STATUS, 0, PAGE)).error == Err.EINVAL
        reply = await client.call(Command.BLOCK_STATUS, 0, PAGE, flags=CommandFlag.REQ_ONE)
        assert reply.error == Err.EINVAL
        await client.still_serves()


async def test_fresh_disk_is_one_hole(client: NbdClient) -> None:
    """ "base:allocation": nothing is allocated, everything reads as zeros; one merged extent to the end."""
    assert await client.status(0, END) == [(END, HOLE)]


async def test_written_data_is_neither_hole_nor_zero(client: NbdClient) -> None:
    """ "base:allocation": HOLE clear where a write can't meet NBD_ENOSPC; ZERO only where the data is zero."""
    await client.write(8 * PAGE, b"d" * 2 * PAGE)
    await client.write(20 * PAGE, b"d" * PAGE)
    wanted = [(8 * PAGE, HOLE), (2 * PAGE, 0), (10 * PAGE, HOLE), (PAGE, 0), (11 * PAGE, HOLE)]
    assert await whole_map(client, 0, 32 * PAGE) == wanted


async def test_small_writes_count_as_data(client: NbdClient) -> None:
    """ "base:allocation": a byte of data makes its surroundings unknown content, never zero."""
    await client.write(5 * PAGE + 77, b"x")
    extents = await whole_map(client, 5 * PAGE + 77, 5 * PAGE + 78)
    assert extents == [(1, 0)]


@pytest.mark.parametrize("offset", [0, 1, PAGE - 1, 8 * PAGE, 8 * PAGE + 5, END - 1])
@pytest.mark.parametrize("length", [1, 512, PAGE, 3 * PAGE, MIB, 64 * MIB])
async def test_ranges_of_any_alignment(client: NbdClient, offset: int, length: int) -> None:
    """NBD_CMD_BLOCK_STATUS: descriptors begin at the offset asked for; never past the end of the export."""
    await client.write(8 * PAGE, b"d" * 2 * PAGE)
    length = min(length, END - offset)
    end = offset + length
    expected = 0
    for begin, stop in ((8 * PAGE, 10 * PAGE),):
        expected += max(0, min(end, stop) - max(offset, begin))
    extents = await whole_map(client, offset, end)
    assert sum(size for size, _ in extents) == length
    assert sum(size for size, status in extents if not status & STATE_ZERO) == expected


@pytest.mark.parametrize("length", [1, 512, PAGE, 3 * PAGE, END])
async def test_req_one(client: NbdClient, length: int) -> None:
    """NBD_CMD_FLAG_REQ_ONE: exactly one extent, not longer than the request (checked by the client)."""
    await client.write(PAGE, b"d" * PAGE)
    (extent,) = await client.status(0, length, flags=CommandFlag.REQ_ONE)
    assert extent == (min(length, PAGE), HOLE)


async def test_req_one_reaches_the_end(client: NbdClient) -> None:
    """A client that only ever asks for one extent gets through the whole disk."""
    await client.write(PAGE, b"d" * PAGE)
    await client.write(END - PAGE, b"d" * PAGE)
    wanted = [(PAGE, HOLE), (PAGE, 0), (END - 3 * PAGE, HOLE), (PAGE, 0)]
    assert await whole_map(client, 0, END, flags=CommandFlag.REQ_ONE) == wanted


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (END, 1),
        (END - 1, 2),
        (0, END + 1),
        (0, 0xFFFF_FFFF),
        (1 << 63, 1),
        ((1 << 64) - 1, 1),
        ((1 << 64) - 1, 0xFFFF_FFFF),
    ],
)
async def test_status_past_the_end(client: NbdClient, offset: int, length: int) -> None:
    """NBD_CMD_BLOCK_STATUS: NBD_EINVAL for a request beyond the size of the device."""
    assert (await client.call(Command.BLOCK_STATUS, offset, length)).error == Err.EINVAL
    await client.still_serves()


async def test_neighbours_of_one_status_are_merged(client: NbdClient) -> None:
    """NBD_CMD_BLOCK_STATUS: consecutive descriptors SHOULD have different status values."""
    for index in range(40):
        await client.write(index * PAGE, b"m" * PAGE)
    extents = await client.status(0, MIB)
    assert all(one[1] != two[1] for one, two in itertools.pairwise(extents))
    assert extents[0] == (40 * PAGE, 0)


async def test_fragmented_disk_is_described_in_bounded_replies(client: NbdClient) -> None:
    """NBD_REPLY_TYPE_BLOCK_STATUS: at most 2^20 extents in a chunk (checked by the client), and all of the truth."""
    replies = [await client.submit(Command.WRITE, index * 2 * PAGE, payload=b"s" * PAGE) for index in range(1500)]
    await client.wait_all(replies)
    extents = await whole_map(client, 0, 3000 * PAGE)
    assert extents == [(PAGE, 0), (PAGE, HOLE)] * 1500


async def test_reserved_status_bits_are_zero(client: NbdClient) -> None:
    """ "base:allocation": the rest of the flags field SHOULD be all-zero."""
    await client.write(0, b"d")
    await client.call(Command.WRITE_ZEROES, MIB, MIB, flags=CommandFlag.NO_HOLE)
    assert all(status & ~HOLE == 0 for _, status in await whole_map(client, 0, END))


async def test_reported_zeros_are_zeros(client: NbdClient) -> None:
    """ "base:allocation": where ZERO is set the contents read as all zeroes, after any history of the range."""
    dice = random.Random(5)
    for _ in range(120):
        offset, length = dice.randrange(2 * MIB), dice.choice([1, 700, PAGE, 3 * PAGE, 20 * PAGE])
        step = dice.randrange(4)
        if step < 2:
            await client.write(offset, dice.randbytes(length))
        elif step == 2:
            await client.call(Command.TRIM, offset, length)
        else:
            flags = dice.choice([0, CommandFlag.NO_HOLE])
            await client.call(Command.WRITE_ZEROES, offset, length, flags=flags)
    content = await client.read(0, 3 * MIB)
    offset = 0
    for length, status in await whole_map(client, 0, 3 * MIB):
        if status & STATE_ZERO:
            assert not any(content[offset : offset + length])
        offset += length
