"""proto.md, NBD_CMD_DISC, "Terminating the transmission phase": every way in which a connection ends."""

import pytest

from tests.support.nbd_client import NbdClient
from tests.support.nbd_spec import Command, Err
from tests.support.serving import MIB, Served

PAGE = 4096


async def test_disc_closes_without_a_reply(any_client: NbdClient) -> None:
    """NBD_CMD_DISC: no reply; the server closes the connection in order."""
    await any_client.send_disc()
    await any_client.expect_orderly_close()


async def test_disc_after_idle_traffic(any_client: NbdClient) -> None:
    """NBD_CMD_DISC ends a used connection as it ends a fresh one."""
    await any_client.write(0, b"x")
    await any_client.flush()
    await any_client.send_disc()
    await any_client.expect_orderly_close()


async def test_disc_handles_outstanding_requests(nbd_server: Served, any_client: NbdClient) -> None:
    """NBD_CMD_DISC: the server MUST handle all outstanding requests; in this product they are answered too."""
    replies = [await any_client.submit(Command.WRITE, index * PAGE, payload=b"o" * PAGE) for index in range(64)]
    replies += [await any_client.submit(Command.READ, index * MIB, MIB) for index in range(8)]
    replies.append(await any_client.submit(Command.FLUSH))
    await any_client.send_disc()
    assert {reply.error for reply in await any_client.wait_all(replies)} == {Err.OK}
    await any_client.expect_orderly_close()
    async with nbd_server.attached() as other:
        assert await other.read(0, 64 * PAGE) == b"o" * 64 * PAGE


async def test_disc_unread_replies(nbd_server: Served) -> None:
    """A client that sends NBD_CMD_DISC and closes at once, with replies unread, still had its writes handled."""
    async with nbd_server.attached() as client:
        packet = b"".join(
            client.pack_request(Command.WRITE, index * PAGE, PAGE, cookie=index) + b"u" * PAGE for index in range(16)
        )
        await client.send(packet + client.pack_request(Command.DISC))
        await client.receive_until_close()
    async with nbd_server.attached() as other:
        assert await other.read(0, 16 * PAGE) == b"u" * 16 * PAGE


async def test_requests_after_disc_are_ignored(nbd_server: Served, any_client: NbdClient) -> None:
    """NBD_CMD_DISC: a client MUST NOT send anything after it; what comes anyway does nothing, replies to nothing."""
    after = any_client.pack_request(Command.TRIM, 0, MIB, cookie=1)
    await any_client.write(0, b"k" * PAGE)
    await any_client.send(any_client.pack_request(Command.DISC) + after * 100)
    await any_client.expect_close()
    async with nbd_server.attached() as other:
        assert await other.read(0, PAGE) == b"k" * PAGE


async def test_disc_with_reserved_fields_set(any_client: NbdClient) -> None:
    """NBD_CMD_DISC: length and offset MUST be zero, yet there is no reply to tell a client that they are not."""
    await any_client.send(any_client.pack_request(Command.DISC, PAGE, PAGE))
    await any_client.expect_close()


async def test_half_close_finishes_replies(any_client: NbdClient) -> None:
    """A client that shuts down its sending side still reads: what it asked for is finished and sent."""
    replies = [await any_client.submit(Command.READ, index * MIB, MIB) for index in range(8)]
    replies += [await any_client.submit(Command.WRITE, index * PAGE, payload=b"h" * PAGE) for index in range(8)]
    any_client.half_close()
    assert {reply.error for reply in await any_client.wait_all(replies)} == {Err.OK}
    await any_client.expect_orderly_close()


@pytest.mark.parametrize("cut", [1, 16, 27, 28, 1000])
async def test_half_close_inside_a_message(nbd_server: Served, client: NbdClient, cut: int) -> None:
    """The end of the stream inside a request: the requests before it are answered, the broken one does nothing."""
    whole = await client.submit(Command.WRITE, 0, payload=b"w" * PAGE)
    await client.send((client.pack_request(Command.WRITE, PAGE, PAGE, cookie=9) + b"b" * PAGE)[:cut])
    client.half_close()
    assert (await client.wait(whole)).error == Err.OK
    await client.expect_close()
    async with nbd_server.attached() as other:
        assert await other.read(0, 2 * PAGE) == b"w" * PAGE + bytes(PAGE)


async def test_reset_with_replies_pending_harms_nobody(nbd_server: Served) -> None:
    """ "Terminating the transmission phase": a hard disconnect at any moment is the client's own affair."""
    async with nbd_server.attached() as steady:
        for count in (1, 4, 32):
            async with nbd_server.attached(receive_buffer_bytes=4096) as rude:
                for index in range(count):
                    await rude.submit(Command.READ, index * MIB, MIB)
                rude.reset()
            await steady.write(0, b"steady")
            assert await steady.read(0, 6) == b"steady"


async def test_reset_in_the_middle_of_a_payload(nbd_server: Served) -> None:
    """The same for a client that vanishes while it writes."""
    async with nbd_server.attached() as steady:
        for sent in (0, 1, 5000, MIB):
            async with nbd_server.attached() as rude:
                await rude.send(rude.pack_request(Command.WRITE, 0, 2 * MIB) + bytes(sent))
                rude.reset()
            await steady.still_serves()
        await steady.flush()


async def test_many_connections_come_and_go(nbd_server: Served) -> None:
    """Each connection ends in its own way; the server keeps none of them."""
    for index in range(60):
        async with nbd_server.attached() as client:
            await client.write(index * 512, b"n" * 512)
            if index % 3 == 0:
                await client.send_disc()
                await client.expect_orderly_close()
            elif index % 3 == 1:
                client.reset()
    await nbd_server.others_are_served()
