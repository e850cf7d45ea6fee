"""proto.md, NBD_CMD_TRIM and NBD_CMD_WRITE_ZEROES with NO_HOLE and FAST_ZERO."""

import pytest

from tests.support.nbd_client import NbdClient
from tests.support.nbd_spec import STATE_HOLE, STATE_ZERO, Command, CommandFlag, Err
from tests.support.serving import MIB, Disk

PAGE = 4096
END = Disk().size_bytes
PAST_THE_END = [
    (END, 1),
    (END - PAGE, 2 * PAGE),
    (0, END + 1),
    (0, 0xFFFF_FFFF),
    (1 << 63, PAGE),
    ((1 << 64) - PAGE, PAGE),
    ((1 << 64) - 1, 0xFFFF_FFFF),
]


async def fill(client: NbdClient, byte: bytes = b"f", pages: int = 16) -> None:
    await client.write(0, byte * (pages * PAGE))


@pytest.mark.parametrize(("offset", "length"), PAST_THE_END)
async def test_trim_past_the_end(any_client: NbdClient, offset: int, length: int) -> None:
    """ "Error values": NBD_EINVAL for a trim beyond the size; nothing is trimmed."""
    await fill(any_client, pages=1)
    assert (await any_client.call(Command.TRIM, offset, length)).error == Err.EINVAL
    assert await any_client.read(0, PAGE) == b"f" * PAGE


@pytest.mark.parametrize(("offset", "length"), PAST_THE_END)
@pytest.mark.parametrize("flags", [0, CommandFlag.NO_HOLE, CommandFlag.FAST_ZERO])
async def test_zero_past_the_end(any_client: NbdClient, offset: int, length: int, flags: int) -> None:
    """NBD_CMD_WRITE_ZEROES: NBD_ENOSPC for a request beyond the size of the device; nothing is zeroed."""
    await fill(any_client, pages=1)
    allowed = (Err.ENOSPC, Err.ENOTSUP) if flags == CommandFlag.FAST_ZERO else (Err.ENOSPC,)
    assert (await any_client.call(Command.WRITE_ZEROES, offset, length, flags=flags)).error in allowed
    assert await any_client.read(0, PAGE) == b"f" * PAGE


async def test_trimmed_blocks_are_holes_of_zeros(client: NbdClient) -> None:
    """NBD_CMD_TRIM of whole blocks: in this product they read as zeros and are holes."""
    await fill(client)
    assert (await client.call(Command.TRIM, 4 * PAGE, 8 * PAGE)).error == Err.OK
    assert await client.read(0, 16 * PAGE) == b"f" * 4 * PAGE + bytes(8 * PAGE) + b"f" * 4 * PAGE
    assert (await client.status(4 * PAGE, 8 * PAGE))[0] == (8 * PAGE, STATE_HOLE | STATE_ZERO)


@pytest.mark.parametrize(
    ("offset", "length"), [(1, PAGE - 1), (0, PAGE - 1), (PAGE - 1, PAGE + 2), (1, 3 * PAGE), (5, 1)]
)
async def test_trim_leaves_neighbours_alone(any_client: NbdClient, offset: int, length: int) -> None:
    """NBD_CMD_TRIM: bytes outside of the range are untouched; in this product partial blocks inside of it too."""
    await fill(any_client, pages=6)
    assert (await any_client.call(Command.TRIM, offset, length)).error == Err.OK
    first, last = -(-offset // PAGE) * PAGE, (offset + length) // PAGE * PAGE
    model = bytearray(b"f" * 6 * PAGE)
    if first < last:
        model[first:last] = bytes(last - first)
    assert await any_client.read(0, 6 * PAGE) == model


async def test_trim_of_the_whole_export(any_client: NbdClient) -> None:
    """ "Size constraints": a command without payload MAY be longer than the maximum payload; no disconnect."""
    await fill(any_client)
    assert (await any_client.call(Command.TRIM, 0, END)).error == Err.OK
    assert await any_client.read(0, 16 * PAGE) == bytes(16 * PAGE)


ZERO_FLAGS = [0, CommandFlag.NO_HOLE, CommandFlag.FUA, CommandFlag.FUA | CommandFlag.NO_HOLE]
RANGES = [
    (0, PAGE),
    (PAGE, 4 * PAGE),
    (1, 1),
    (PAGE - 1, 2),
    (100, 5 * PAGE),
    (3 * PAGE + 5, 2 * PAGE - 5),
    (7, PAGE - 14),
]


@pytest.mark.parametrize("flags", ZERO_FLAGS)
@pytest.mark.parametrize(("offset", "length"), RANGES)
async def test_zeroes_read_back(any_client: NbdClient, offset: int, length: int, flags: int) -> None:
    """NBD_CMD_WRITE_ZEROES: the area reads as zeros, its neighbours as before, at any alignment; never ENOTSUP."""
    await fill(any_client, pages=8)
    assert (await any_client.call(Command.WRITE_ZEROES, offset, length, flags=flags)).error == Err.OK
    model = bytearray(b"f" * 8 * PAGE)
    model[offset : offset + length] = bytes(length)
    assert await any_client.read(0, 8 * PAGE) == model


async def test_zeroes_over_the_whole_export(any_client: NbdClient) -> None:
    """ "Size constraints": zeroes longer than the maximum payload are served or refused, never a disconnect."""
    await fill(any_client)
    assert (await any_client.call(Command.WRITE_ZEROES, 0, END)).error == Err.OK
    assert await any_client.read(0, 16 * PAGE) == bytes(16 * PAGE)


async def test_no_hole_stays_provisioned(client: NbdClient) -> None:
    """NBD_CMD_FLAG_NO_HOLE: the area MUST be fully provisioned, over data as over a hole."""
    await fill(client, pages=4)
    for offset in (0, MIB):
        reply = await client.call(Command.WRITE_ZEROES, offset, 4 * PAGE, flags=CommandFlag.NO_HOLE)
        assert reply.error == Err.OK
        extents = await client.status(offset, 4 * PAGE)
        assert not any(status & STATE_HOLE for _, status in extents)
        assert await client.read(offset, 4 * PAGE) == bytes(4 * PAGE)


async def test_zeroes_without_no_hole_may_be_a_hole(client: NbdClient) -> None:
    """ "base:allocation": what was zeroed can be reported as zero; whole blocks of it need no space."""
    await fill(client, pages=8)
    await client.call(Command.WRITE_ZEROES, 0, 8 * PAGE)
    assert (await client.status(0, 8 * PAGE))[0] == (8 * PAGE, STATE_HOLE | STATE_ZERO)


async def test_fast_zero_of_whole_blocks(any_client: NbdClient) -> None:
    """NBD_CMD_FLAG_FAST_ZERO: faster than writing wherever only the map changes: whole blocks, any number of them."""
    await fill(any_client)
    reply = await any_client.call(Command.WRITE_ZEROES, 0, END, flags=CommandFlag.FAST_ZERO)
    assert reply.error == Err.OK
    assert await any_client.read(0, 16 * PAGE) == bytes(16 * PAGE)


@pytest.mark.parametrize("flags", [CommandFlag.FAST_ZERO, CommandFlag.FAST_ZERO | CommandFlag.NO_HOLE])
@pytest.mark.parametrize(("offset", "length"), RANGES)
async def test_fast_zero_all_or_nothing(any_client: NbdClient, offset: int, length: int, flags: int) -> None:
    """NBD_CMD_FLAG_FAST_ZERO: success, or NBD_ENOTSUP with the contents unchanged."""
    await fill(any_client, pages=8)
    reply = await any_client.call(Command.WRITE_ZEROES, offset, length, flags=flags)
    assert reply.error in (Err.OK, Err.ENOTSUP)
    model = bytearray(b"f" * 8 * PAGE)
    if reply.error == Err.OK:
        model[offset : offset + length] = bytes(length)
    assert await any_client.read(0, 8 * PAGE) == model


@pytest.mark.parametrize("command", [Command.TRIM, Command.WRITE_ZEROES])
async def test_written_again_after_trim_or_zero(client: NbdClient, command: Command) -> None:
    """NBD_CMD_TRIM: contents are defined again by the next write; and never reported as a hole or zero then."""
    await fill(client, pages=4)
    await client.call(command, 0, 4 * PAGE)
    await client.write(PAGE + 1, b"again")
    assert await client.read(PAGE, 16) == b"\0again" + bytes(10)
    assert (await client.status(PAGE, PAGE))[0][1] == 0
