"""proto.md, "Size constraints" and NBD_INFO_BLOCK_SIZE; limits of this product: 32 MiB promised, 64 MiB served."""

import random

import pytest

from tests.support.nbd_client import NbdClient
from tests.support.nbd_spec import DEFAULT_PAYLOAD_BYTES_MAX, Command, CommandFlag, Err, Info
from tests.support.serving import MIB, Disk, Served

PAGE = 4096
SERVED_MAX = 64 * MIB


async def test_block_sizes_are_always_told(nbd_server: Served) -> None:
    """NBD_INFO_BLOCK_SIZE: 1 / 4096 / 32 MiB, whether or not the client asks (qemu and the kernel like to know)."""
    for infos in ((), (Info.NAME,), (Info.BLOCK_SIZE,)):
        async with nbd_server.connected() as client:
            info = await client.info(infos=infos)
            assert info.block_sizes == (1, PAGE, DEFAULT_PAYLOAD_BYTES_MAX)


@pytest.mark.parametrize("length", [DEFAULT_PAYLOAD_BYTES_MAX - 1, DEFAULT_PAYLOAD_BYTES_MAX, SERVED_MAX])
async def test_large_payloads_work(any_client: NbdClient, length: int) -> None:
    """ "Size constraints": up to 2^25 bytes MUST be no attack; this product serves up to 64 MiB in both directions."""
    pattern = random.Random(7).randbytes(MIB + 1)
    data = (pattern * (length // len(pattern) + 1))[:length]
    await any_client.write(3, data)
    assert await any_client.read(3, length) == data
    assert await any_client.read(3 + length, 16) == bytes(16)


@pytest.mark.parametrize("length", [SERVED_MAX + 1, 100 * MIB])
@pytest.mark.parametrize("flags", [0, CommandFlag.FUA])
async def test_read_over_the_limit(any_client: NbdClient, length: int, flags: int) -> None:
    """ "Size constraints": a payload over the maximum is an error or a disconnect; here NBD_EINVAL, without damage."""
    assert (await any_client.call(Command.READ, 0, length, flags=flags)).error == Err.EINVAL
    await any_client.still_serves()


async def test_read_of_the_largest_length(any_client: NbdClient) -> None:
    """A length field of 2^32 - 1 announces nothing that the server must make room for."""
    replies = [await any_client.submit(Command.READ, 0, 0xFFFF_FFFF) for _ in range(8)]
    assert {reply.error for reply in await any_client.wait_all(replies)} == {Err.EINVAL}
    await any_client.still_serves()


@pytest.mark.parametrize("length", [SERVED_MAX + 1, 0x7FFF_FFFF, 0xFFFF_FFFF])
async def test_write_over_the_limit_disconnects(nbd_server: Served, any_client: NbdClient, length: int) -> None:
    """ "Size constraints": a payload that would be denial of service MAY end the session; nothing is written."""
    flags = CommandFlag.PAYLOAD_LEN if any_client.extended else 0
    await any_client.send(any_client.pack_request(Command.WRITE, 0, length, flags=flags, cookie=1))
    await any_client.expect_close()
    async with nbd_server.attached() as other:
        assert await other.read(0, PAGE) == bytes(PAGE)


async def test_replies_before_a_fatal_write_arrive(client: NbdClient) -> None:
    """Requests in front of the one that ends the session were complete: they are answered first."""
    replies = [await client.submit(Command.WRITE, index * PAGE, payload=b"k" * PAGE) for index in range(8)]
    await client.send(client.pack_request(Command.WRITE, 0, 0xFFFF_FFFF))
    assert {reply.error for reply in await client.wait_all(replies)} == {Err.OK}
    await client.expect_close()


@pytest.mark.parametrize("command", [Command.TRIM, Command.WRITE_ZEROES, Command.CACHE, Command.BLOCK_STATUS])
async def test_commands_without_payload_may_be_long(client: NbdClient, command: Command) -> None:
    """ "Size constraints": effect lengths over the maximum payload SHOULD NOT disconnect; here they are served."""
    assert (await client.call(command, 0, Disk().size_bytes)).error == Err.OK
    await client.still_serves()


async def test_limits_hold_on_a_small_export(small_disk: Served) -> None:
    """ "Size constraints": the payload limit is at least 2^25 even if the export is smaller: no disconnect."""
    for structured in (False, True):
        async with small_disk.attached(structured=structured) as client:
            size = small_disk.disk.size_bytes
            payload = bytes(DEFAULT_PAYLOAD_BYTES_MAX)
            assert (await client.call(Command.WRITE, 0, payload=payload)).error == Err.ENOSPC
            assert (await client.call(Command.READ, 0, DEFAULT_PAYLOAD_BYTES_MAX)).error == Err.EINVAL
            await client.write(0, b"s" * size)
            assert await client.read(0, size) == b"s" * size


async def test_export_of_odd_size(small_disk: Served) -> None:
    """ "Size constraints": with a minimum block size of 1 the last bytes of any size can be reached."""
    size = small_disk.disk.size_bytes
    assert size % 512
    async with small_disk.attached(contexts=["base:allocation"]) as client:
        assert client.size_bytes == size
        await client.write(size - 1, b"!")
        assert await client.read(size - 3, 3) == b"\0\0!"
        assert (await client.call(Command.READ, size - 1, 2)).error == Err.EINVAL
        extents = await client.status(0, size)
        assert sum(length for length, _ in extents) == size
        assert (await client.call(Command.WRITE_ZEROES, 0, size)).error == Err.OK
        assert (await client.call(Command.TRIM, 0, size)).error == Err.OK
        assert await client.read(0, size) == bytes(size)
