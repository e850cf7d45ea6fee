"""proto.md, NBD_CMD_WRITE, "Error values", NBD_FLAG_READ_ONLY, "Ordering of messages and writes"."""

import random

import pytest

from tests.support.nbd_client import NbdClient
from tests.support.nbd_spec import Command, CommandFlag, Err, ExportFlag
from tests.support.serving import MIB, Disk, Served

PAGE = 4096
END = Disk().size_bytes
PAST_THE_END = [
    (END, 1),
    (END - 1, 2),
    (END - PAGE, 2 * PAGE),
    (END + MIB, PAGE),
    (1 << 63, PAGE),
    ((1 << 64) - 1, 1),
    ((1 << 64) - PAGE, PAGE),
    ((1 << 64) - PAGE, 2 * PAGE),
]


async def test_writes_of_any_alignment(any_client: NbdClient) -> None:
    """NBD_CMD_WRITE at every offset and length, against a model."""
    dice = random.Random(3)
    model = bytearray(64 * PAGE)
    for _ in range(60):
        offset = dice.randrange(len(model))
        data = dice.randbytes(dice.choice([1, 511, 512, 513, PAGE - 1, PAGE, PAGE + 1, 5 * PAGE]))[
            : len(model) - offset
        ]
        model[offset : offset + len(data)] = data
        await any_client.write(offset, data)
    assert await any_client.read(0, len(model)) == model


@pytest.mark.parametrize(("offset", "length"), PAST_THE_END)
@pytest.mark.parametrize("flags", [0, CommandFlag.FUA])
async def test_write_past_the_end(any_client: NbdClient, offset: int, length: int, flags: int) -> None:
    """ "Error values": NBD_ENOSPC for a write beyond the size; the payload is drained and no part of it written."""
    reply = await any_client.call(Command.WRITE, offset, payload=b"p" * length, flags=flags)
    assert reply.error == Err.ENOSPC
    assert await any_client.read(END - PAGE, PAGE) == bytes(PAGE)


async def test_large_refused_write_is_drained(any_client: NbdClient) -> None:
    """A refused payload that spans many packets is drained too, and requests behind it are answered."""
    refused = await any_client.submit(Command.WRITE, END - PAGE, payload=b"p" * (3 * MIB))
    good = await any_client.submit(Command.WRITE, 0, payload=b"good")
    await any_client.wait_all([refused, good])
    assert (refused.error, good.error) == (Err.ENOSPC, Err.OK)
    assert await any_client.read(0, 4) == b"good"


@pytest.mark.parametrize("kind", ["simple", "structured"])
async def test_read_only_export(read_only: Served, kind: str) -> None:
    """NBD_FLAG_READ_ONLY: flag set, and every write, trim and zero gets NBD_EPERM; the payload is drained."""
    async with read_only.attached(structured=kind == "structured") as client:
        assert client.flags & ExportFlag.READ_ONLY
        for length in (1, PAGE, 2 * MIB):
            assert (await client.call(Command.WRITE, 0, payload=b"p" * length)).error == Err.EPERM
            assert (await client.call(Command.TRIM, 0, length)).error == Err.EPERM
            assert (await client.call(Command.WRITE_ZEROES, 0, length)).error == Err.EPERM
        assert (await client.call(Command.WRITE, 0, payload=b"f", flags=CommandFlag.FUA)).error == Err.EPERM
        assert await client.read(0, PAGE) == bytes(PAGE)


async def test_read_only_export_flushes(read_only: Served) -> None:
    """A flush writes nothing: it succeeds on a read-only export if NBD_FLAG_SEND_FLUSH is set."""
    async with read_only.attached() as client:
        if client.flags & ExportFlag.SEND_FLUSH:
            await client.flush()
        await client.still_serves()


async def test_write_with_fua_reads_back(any_client: NbdClient) -> None:
    """NBD_CMD_FLAG_FUA: the reply comes after the data is persistent; it is visible at once on every connection."""
    await any_client.write(123, b"forced", flags=CommandFlag.FUA)
    assert await any_client.read(123, 6) == b"forced"


async def test_write_read_in_flight_together(any_client: NbdClient) -> None:
    """Overlapping requests in flight have no order, but a read sees each 4 KiB block wholly old or new."""
    await any_client.write(0, b"o" * PAGE)
    pairs = []
    for _ in range(32):
        write = await any_client.submit(Command.WRITE, 0, payload=b"n" * PAGE)
        read = await any_client.submit(Command.READ, 0, PAGE)
        pairs += [write, read]
    await any_client.wait_all(pairs)
    for read in pairs[1::2]:
        assert bytes(read.data) in (b"o" * PAGE, b"n" * PAGE)
    assert await any_client.read(0, PAGE) == b"n" * PAGE


@pytest.mark.parametrize("cut", [1, 27, 28, 29, 5000])
async def test_interrupted_write_writes_nothing(nbd_server: Served, cut: int) -> None:
    """A write whose payload never became complete has not happened; other clients go on."""
    async with nbd_server.attached() as client:
        packet = client.pack_request(Command.WRITE, 0, 2 * PAGE, cookie=1) + b"i" * 2 * PAGE
        await client.send(packet[:cut])
    async with nbd_server.attached() as client:
        assert await client.read(0, 2 * PAGE) == bytes(2 * PAGE)
