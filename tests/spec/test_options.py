"""proto.md, "Fixed newstyle negotiation", "Option types", "Termination of the session during option haggling"."""

import struct

import pytest

from tests.support.nbd_spec import OPTION_HEADER, OPTION_REPLY_HEADER, Option, Rep
from tests.support.serving import Served

UNKNOWN_OPTIONS = [0, Option.PEEK_EXPORT, 12, 255, 0x1_0000, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF]


@pytest.mark.parametrize("number", UNKNOWN_OPTIONS)
@pytest.mark.parametrize("length", [0, 1, 4096])
async def test_unknown_option_is_unsupported_and_skipped(nbd_server: Served, number: int, length: int) -> None:
    """ "Baseline": what a server does not implement MUST get NBD_REP_ERR_UNSUP, and the next message be parsed."""
    async with nbd_server.connected() as client:
        replies = await client.option(number, bytes(length))
        assert [reply.type for reply in replies] == [Rep.ERR_UNSUP]
        assert (await client.go()).accepted


async def test_unknown_option_data_that_looks_like_options_is_skipped(nbd_server: Served) -> None:
    """ "Newstyle negotiation": the option length lets the server skip exactly the data of an unknown option."""
    bait = OPTION_HEADER.pack(0x49484156454F5054, Option.ABORT, 0) * 3
    async with nbd_server.connected() as client:
        assert await client.final(99, bait) == Rep.ERR_UNSUP
        await client.in_step()


async def test_starttls_without_tls(nbd_server: Served) -> None:
    """ "NOTLS mode": NBD_REP_ERR_POLICY, NBD_REP_ERR_UNSUP or another permitted error; haggling goes on."""
    async with nbd_server.connected() as client:
        allowed = (Rep.ERR_UNSUP, Rep.ERR_POLICY, Rep.ERR_PLATFORM, Rep.ERR_INVALID)
        assert await client.final(Option.STARTTLS) in allowed
        assert await client.final(Option.STARTTLS, b"data") in allowed
        assert (await client.go()).accepted


async def test_abort_is_acknowledged(nbd_server: Served) -> None:
    """NBD_OPT_ABORT: the server MUST reply with NBD_REP_ACK; then the session is over."""
    async with nbd_server.connected() as client:
        assert [reply.type for reply in await client.option(Option.ABORT)] == [Rep.ACK]
        await client.expect_orderly_close()


async def test_abort_ignores_data(nbd_server: Served) -> None:
    """NBD_OPT_ABORT: a server SHOULD ignore data rather than reject the request."""
    async with nbd_server.connected() as client:
        assert await client.final(Option.ABORT, b"farewell") == Rep.ACK
        await client.expect_close()


async def test_abort_without_waiting(nbd_server: Served) -> None:
    """NBD_OPT_ABORT: a client that closes without waiting for the reply is handled gracefully."""
    for _ in range(10):
        async with nbd_server.connected() as client:
            await client.send_option(Option.ABORT)
    async with nbd_server.connected() as client:
        await client.send_option(Option.ABORT)
        client.half_close()
        assert (await client.option_replies(Option.ABORT))[-1].type == Rep.ACK
        await client.expect_orderly_close()
    await nbd_server.others_are_served()


async def test_list_ends_with_ack(nbd_server: Served) -> None:
    """NBD_OPT_LIST: NBD_REP_SERVER for each export, then NBD_REP_ACK; it can be asked again."""
    async with nbd_server.connected() as client:
        exports = await client.exports()
        assert len(exports) == 1
        assert exports == await client.exports()


async def test_list_with_data_is_invalid(nbd_server: Served) -> None:
    """NBD_OPT_LIST: the server SHOULD reject a request with data by NBD_REP_ERR_INVALID, and send nothing else."""
    async with nbd_server.connected() as client:
        assert [reply.type for reply in await client.option(Option.LIST, b"x")] == [Rep.ERR_INVALID]
        await client.in_step()


async def test_structured_reply_with_data_is_invalid(nbd_server: Served) -> None:
    """NBD_OPT_STRUCTURED_REPLY: the server SHOULD reject data by NBD_REP_ERR_INVALID, and nothing was negotiated."""
    async with nbd_server.connected() as client:
        assert await client.final(Option.STRUCTURED_REPLY, b"x") == Rep.ERR_INVALID
        assert (await client.go()).accepted
        await client.still_serves()  # by simple replies: the client refuses others


async def test_structured_reply_twice(nbd_server: Served) -> None:
    """ "Fixed newstyle negotiation": a repeated message is acknowledged or NBD_REP_ERR_INVALID; the state stays."""
    async with nbd_server.connected() as client:
        await client.structured_replies()
        assert await client.final(Option.STRUCTURED_REPLY) in (Rep.ACK, Rep.ERR_INVALID)
        assert (await client.go()).accepted
        await client.still_serves()


async def test_options_byte_by_byte(nbd_server: Served) -> None:
    """Options may come in any pieces."""
    async with nbd_server.connected() as client:
        await client.send_slowly(OPTION_HEADER.pack(0x49484156454F5054, Option.STRUCTURED_REPLY, 0))
        assert (await client.option_replies(Option.STRUCTURED_REPLY))[-1].type == Rep.ACK
        client.structured = True
        data = struct.pack(">IHH", 0, 1, 3)
        await client.send_slowly(OPTION_HEADER.pack(0x49484156454F5054, Option.GO, len(data)) + data)
        assert (await client.option_replies(Option.GO))[-1].type == Rep.ACK
        client.size_bytes = nbd_server.disk.size_bytes
        await client.still_serves()


async def test_options_and_requests_in_one_packet(nbd_server: Served) -> None:
    """A client that does not wait ("Fixed newstyle negotiation" forbids it that) is answered in order or dropped."""
    option = OPTION_HEADER.pack(0x49484156454F5054, 77, 3) + b"abc"
    async with nbd_server.connected() as client:
        await client.send(option * 8)
        for _ in range(8):
            assert (await client.option_replies(77))[-1].type == Rep.ERR_UNSUP
        data = struct.pack(">IH", 0, 0)
        request = client.pack_request(0, 0, 512, cookie=5)
        await client.send(OPTION_HEADER.pack(0x49484156454F5054, Option.GO, len(data)) + data + request)
        assert (await client.option_replies(Option.GO))[-1].type == Rep.ACK
        reply = await client.receive(16 + 512, "the read that followed NBD_OPT_GO in its packet")
        assert reply[:16] == struct.pack(">IIQ", 0x67446698, 0, 5)


async def test_option_replies_echo_the_option(nbd_server: Served) -> None:
    """ "Fixed newstyle negotiation": a reply names its option and has the reply magic."""
    async with nbd_server.connected() as client:
        await client.send_option(0xCAFEBABE)
        header = await client.receive(OPTION_REPLY_HEADER.size, "a reply")
        assert OPTION_REPLY_HEADER.unpack(header)[:3] == (0x3E889045565A9, 0xCAFEBABE, Rep.ERR_UNSUP)
