"""proto.md, "Newstyle negotiation", "Handshake flags" and "Client flags": the first bytes of a connection."""

import pytest

from tests.support.nbd_client import CLIENT_FLAGS
from tests.support.nbd_spec import HandshakeFlag, Option, Rep
from tests.support.serving import Served


async def test_greeting_offers_fixed_newstyle_without_zeroes(nbd_server: Served) -> None:
    """ "Handshake flags": FIXED_NEWSTYLE MUST be set, no undefined flag may be (checked by the client)."""
    async with nbd_server.connected(flags=None) as client:
        assert await client.greeting() == HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES


@pytest.mark.parametrize("bit", [2, 3, 7, 15, 16, 31])
async def test_unknown_client_flag_drops_the_connection(nbd_server: Served, bit: int) -> None:
    """ "Client flags": the server MUST drop the connection if the client sets an unknown flag."""
    async with nbd_server.connected(flags=None) as client:
        await client.greeting()
        await client.send_client_flags(CLIENT_FLAGS | 1 << bit)
        await client.expect_close()
    await nbd_server.others_are_served()


@pytest.mark.parametrize("flags", [CLIENT_FLAGS, HandshakeFlag.FIXED_NEWSTYLE])
async def test_both_client_flags_are_optional(nbd_server: Served, flags: HandshakeFlag) -> None:
    """ "Client flags": a client may accept either of the server's flags."""
    async with nbd_server.connected(flags=flags) as client:
        await client.in_step()
        assert (await client.go()).accepted


@pytest.mark.parametrize("flags", [0, HandshakeFlag.NO_ZEROES])
async def test_client_without_fixed_newstyle_may_use_export_name(nbd_server: Served, flags: int) -> None:
    """ "Newstyle negotiation": NBD_OPT_EXPORT_NAME is the one option of a client that is not fixed newstyle."""
    async with nbd_server.connected(flags=flags) as client:
        await client.export_name()
        assert client.size_bytes == nbd_server.disk.size_bytes
        await client.still_serves()


async def test_wrong_option_magic_ends_the_session(nbd_server: Served) -> None:
    """ "Newstyle negotiation": each option begins with IHAVEOPT; nothing can be made of other bytes."""
    async with nbd_server.connected() as client:
        await client.send_option(Option.LIST, magic=0x49484156454F5055)
        await client.expect_close()
    await nbd_server.others_are_served()


async def test_greeting_and_flags_byte_by_byte(nbd_server: Served) -> None:
    """The stream has no message boundaries: flags and options may come in any pieces."""
    async with nbd_server.connected(flags=None) as client:
        await client.greeting()
        await client.send_slowly(b"\0\0\0\x03IHAVEOPT" + b"\0\0\0\x03" + bytes(4))
        assert (await client.option_replies(Option.LIST))[-1].type == Rep.ACK


async def test_client_that_leaves_during_the_greeting(nbd_server: Served) -> None:
    """Connections that end before, in and after the client flags harm nobody."""
    for piece in (b"", b"\0", b"\0\0\0", b"\0\0\0\x03"):
        async with nbd_server.connected(flags=None) as client:
            await client.send(piece)
    await nbd_server.others_are_served()
