"""proto.md, NBD_CMD_CACHE, NBD_CMD_FLUSH and "Ordering of messages and writes"."""

import pytest

from tests.support.nbd_client import NbdClient
from tests.support.nbd_spec import Command, CommandFlag, Err
from tests.support.serving import MIB, Disk, Served

PAGE = 4096
END = Disk().size_bytes


async def test_cache_changes_nothing(any_client: NbdClient) -> None:
    """NBD_CMD_CACHE: apart from performance there MUST NOT be any difference."""
    await any_client.write(PAGE, b"c" * PAGE)
    for offset, length in ((0, 3 * PAGE), (1, 1), (MIB, 64 * MIB), (0, END)):
        assert (await any_client.call(Command.CACHE, offset, length)).error == Err.OK
    assert await any_client.read(0, 3 * PAGE) == bytes(PAGE) + b"c" * PAGE + bytes(PAGE)


@pytest.mark.parametrize(("offset", "length"), [(END, 1), (END - 1, 2), ((1 << 64) - 1, 2), (0, 0xFFFF_FFFF)])
async def test_cache_past_the_end(any_client: NbdClient, offset: int, length: int) -> None:
    """ "Size constraints": NBD_EINVAL for a request that would exceed the export size."""
    assert (await any_client.call(Command.CACHE, offset, length)).error == Err.EINVAL
    await any_client.still_serves()


async def test_flush_after_writes(any_client: NbdClient) -> None:
    """NBD_CMD_FLUSH is answered, with and without anything to flush, as often as it is asked."""
    await any_client.flush()
    await any_client.write(0, b"dirty" * 1000)
    for _ in range(3):
        await any_client.flush()
    assert await any_client.read(0, 5) == b"dirty"


async def test_flushes_among_writes(any_client: NbdClient) -> None:
    """ "Ordering of messages and writes": flushes in flight with other commands; every request gets its reply."""
    replies = []
    for index in range(200):
        replies.append(await any_client.submit(Command.WRITE, index * 512, payload=bytes([index % 255 + 1]) * 512))
        if index % 7 == 0:
            replies.append(await any_client.submit(Command.FLUSH))
        if index % 11 == 0:
            replies.append(await any_client.submit(Command.TRIM, MIB, PAGE, flags=CommandFlag.FUA))
    assert {reply.error for reply in await any_client.wait_all(replies)} == {Err.OK}
    assert await any_client.read(199 * 512, 512) == bytes([200]) * 512


async def test_flush_with_reserved_fields_set(any_client: NbdClient) -> None:
    """NBD_CMD_FLUSH: length and offset are reserved; the server may refuse other values, but announces no payload."""
    reply = await any_client.call(Command.FLUSH, PAGE, PAGE)
    assert reply.error in (Err.OK, Err.EINVAL)
    await any_client.still_serves()


async def test_stalled_writer_delays_nobodys_flush(nbd_server: Served) -> None:
    """A client that announced a payload and stalls has written nothing: flushes of others do not wait for it."""
    async with nbd_server.attached() as stalled, nbd_server.attached() as other:
        await stalled.send(stalled.pack_request(Command.WRITE, 0, MIB, cookie=1) + b"s" * 10_000)
        await other.write(MIB, b"other" * 100)
        await other.flush()
        assert await other.read(0, PAGE) == bytes(PAGE)
        await other.write(MIB, b"other", flags=CommandFlag.FUA)
    async with nbd_server.attached() as later:
        assert await later.read(0, PAGE) == bytes(PAGE)
        await later.flush()
