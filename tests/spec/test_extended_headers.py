"""proto.md of the branch extension-ext-header: NBD_OPT_EXTENDED_HEADERS and what it changes.

No client of Debian 12 asks for it (qemu does from 8.2, libnbd from 1.18): these tests and the raw client, both written
from that text, are the only check here. The client verifies in each reply the magic, the echoed offset, the chunk types
and the descriptor counts.
"""

import struct
from collections.abc import AsyncIterator, Callable

import pytest

from tests.support.nbd_client import NbdClient, whole_map
from tests.support.nbd_spec import (
    EXTENDED_REQUEST_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    ChunkType,
    Command,
    CommandFlag,
    Err,
    ExportFlag,
    Option,
    Rep,
)
from tests.support.serving import MIB, Disk, Served

PAGE = 4096
END = Disk().size_bytes
ALLOCATION = "base:allocation"
TIB = 1 << 40


async def test_negotiated_without_structured_replies(nbd_server: Served) -> None:
    """NBD_OPT_EXTENDED_HEADERS: SHOULD be supported even if structured replies are not negotiated."""
    async with nbd_server.connected() as client:
        await client.extended_headers()
        assert (await client.go()).accepted
        await client.still_serves()


async def test_negotiated_after_structured_replies(nbd_server: Served) -> None:
    """NBD_OPT_EXTENDED_HEADERS takes precedence over structured replies that were negotiated first."""
    async with nbd_server.connected() as client:
        await client.structured_replies()
        await client.extended_headers()
        assert (await client.go()).accepted
        await client.still_serves()


async def test_option_with_data_is_invalid(nbd_server: Served) -> None:
    """NBD_OPT_EXTENDED_HEADERS: data SHOULD be NBD_REP_ERR_INVALID; nothing was negotiated."""
    async with nbd_server.connected() as client:
        assert await client.final(Option.EXTENDED_HEADERS, b"x") == Rep.ERR_INVALID
        assert (await client.go()).accepted
        await client.still_serves()


async def test_structured_replies_after_extended_headers(nbd_server: Served) -> None:
    """NBD_OPT_STRUCTURED_REPLY: NBD_REP_ERR_EXT_HEADER_REQD once extended headers have been negotiated."""
    async with nbd_server.connected() as client:
        await client.extended_headers()
        assert await client.final(Option.STRUCTURED_REPLY) == Rep.ERR_EXT_HEADER_REQD
        assert (await client.go()).accepted
        await client.still_serves()


async def test_contexts_need_no_structured_replies(nbd_server: Served) -> None:
    """NBD_OPT_SET_META_CONTEXT: structured replies or extended headers; never ERR_EXT_HEADER_REQD for base:."""
    async with nbd_server.connected() as client:
        await client.extended_headers()
        assert ALLOCATION in await client.list_contexts("", [])
        assert await client.set_contexts("", [ALLOCATION]) == Rep.ACK
    async with nbd_server.connected() as client:
        assert await client.set_contexts("", [ALLOCATION]) != Rep.ERR_EXT_HEADER_REQD


async def test_flags_exposed(nbd_server: Served) -> None:
    """SEND_DF with extended headers too; BLOCK_STATUS_PAYLOAD only with them and SHOULD NOT without contexts."""
    async with nbd_server.connected() as client:
        await client.extended_headers()
        flags = (await client.info()).flags
        assert flags & ExportFlag.SEND_DF
        assert not flags & ExportFlag.BLOCK_STATUS_PAYLOAD
        await client.set_contexts("", [ALLOCATION])
        assert (await client.go()).flags & ExportFlag.BLOCK_STATUS_PAYLOAD


@pytest.fixture
async def extended(nbd_server: Served) -> AsyncIterator[NbdClient]:
    async with nbd_server.attached(extended=True, contexts=[ALLOCATION]) as client:
        yield client


async def test_every_reply_is_extended(extended: NbdClient) -> None:
    """ "Extended reply chunk message": no simple replies, even without payload; the offset is the request's."""
    await extended.write(12345, b"e")
    for command in (Command.FLUSH, Command.TRIM, Command.CACHE, Command.WRITE_ZEROES):
        length = 0 if command == Command.FLUSH else PAGE
        reply = await extended.call(command, 0 if command == Command.FLUSH else 7 * PAGE, length)
        assert reply.error == Err.OK
    for refused, offset in ((Command.READ, END), (Command.TRIM, END + 5), (99, 77)):
        assert (await extended.call(refused, offset, 1)).error == Err.EINVAL


async def test_read_in_the_middle(extended: NbdClient) -> None:
    """ "Extended reply chunk message": the header's offset matches the request, also where the chunk's own differs."""
    await extended.write(5 * PAGE, b"r" * PAGE)
    reply = await extended.call(Command.READ, 3 * PAGE + 1, 6 * PAGE)
    assert reply.data == (bytes(2 * PAGE) + b"r" * PAGE + bytes(3 * PAGE + 1))[1:]


async def test_df(extended: NbdClient) -> None:
    """NBD_CMD_FLAG_DF applies to extended replies as well."""
    await extended.write(PAGE, b"r" * PAGE)
    reply = await extended.call(Command.READ, 0, 65536, flags=CommandFlag.DF)
    assert reply.data == bytes(PAGE) + b"r" * PAGE + bytes(65536 - 2 * PAGE)
    assert reply.chunks[0].type == ChunkType.OFFSET_DATA


async def test_compact_request_closes(extended: NbdClient) -> None:
    """NBD_OPT_EXTENDED_HEADERS: the client MUST use 32-byte requests; a compact one is a wrong magic."""
    await extended.send(REQUEST.pack(REQUEST_MAGIC, 0, Command.READ, 1, 0, 512) + bytes(4))
    await extended.expect_close()


@pytest.mark.parametrize("length", [1 << 32, TIB, 1 << 63, (1 << 64) - 1])
@pytest.mark.parametrize("command", [Command.READ, Command.TRIM, Command.CACHE, Command.BLOCK_STATUS])
async def test_long_effect_lengths_past_the_end(extended: NbdClient, command: Command, length: int) -> None:
    """ "Request message": effect lengths have 64 bits; past the end they get NBD_EINVAL, without any allocation."""
    assert (await extended.call(command, 0, length)).error == Err.EINVAL
    assert (await extended.call(command, END - 1, length)).error == Err.EINVAL
    await extended.still_serves()


@pytest.mark.parametrize("length", [1 << 32, TIB, 1 << 63, (1 << 64) - 1])
async def test_long_zeroes_past_the_end(extended: NbdClient, length: int) -> None:
    """NBD_CMD_WRITE_ZEROES: NBD_ENOSPC past the end, at 64 bits."""
    assert (await extended.call(Command.WRITE_ZEROES, 0, length)).error == Err.ENOSPC
    await extended.still_serves()


async def test_effects_over_32_bits(huge_disk: Served) -> None:
    """ "Transmission": with extended messages one command may trim, zero, cache or describe more than 4 GiB."""
    size = huge_disk.disk.size_bytes
    assert size > 1 << 33
    async with huge_disk.attached(extended=True, contexts=[ALLOCATION]) as client:
        await client.write(0, b"start")
        await client.write(size - 5, b"the end"[-5:])
        assert await whole_map(client, PAGE, size - PAGE) == [(size - 2 * PAGE, 3)]
        assert (await client.call(Command.CACHE, 0, size)).error == Err.OK
        assert (await client.call(Command.TRIM, 0, size)).error == Err.OK
        assert await client.read(0, 5) == await client.read(size - 5, 5) == bytes(5)
        await client.write(0, b"start")
        assert (await client.call(Command.WRITE_ZEROES, 0, size)).error == Err.OK
        assert await client.read(0, 5) == bytes(5)
        assert await whole_map(client, 0, size) == [(size, 3)]


async def test_huge_disk_with_32_bit_status(huge_disk: Served) -> None:
    """NBD_REPLY_TYPE_BLOCK_STATUS: without extended headers an extent's length has 32 bits, also on a larger disk."""
    async with huge_disk.attached(contexts=[ALLOCATION]) as client:
        extents = await client.status(0, 0xFFFF_FFFF)
        assert all(status == 3 for _, status in extents)


async def test_write_needs_the_payload_flag(nbd_server: Served, extended: NbdClient) -> None:
    """NBD_CMD_FLAG_PAYLOAD_LEN: MUST be set for WRITE; without it there is no payload, so nothing is to be drained."""
    assert (await extended.call(Command.WRITE, 0, PAGE)).error == Err.EINVAL
    await extended.still_serves()
    assert await extended.read(0, PAGE) == bytes(PAGE)


@pytest.mark.parametrize(
    "command",
    [Command.READ, Command.FLUSH, Command.TRIM, Command.CACHE, Command.WRITE_ZEROES, 99],
)
@pytest.mark.parametrize("length", [1, 28, PAGE, 3 * MIB])
async def test_payload_where_none_belongs(extended: NbdClient, command: int, length: int) -> None:
    """ "Request message": the server SHOULD gracefully consume the payload, reply NBD_EINVAL and go on."""
    await extended.write(0, b"k" * PAGE)
    assert (await extended.call(command, 0, payload=b"p" * length)).error == Err.EINVAL
    assert await extended.read(0, PAGE) == b"k" * PAGE


async def test_payload_on_disc(extended: NbdClient) -> None:
    """NBD_CMD_DISC has no payload form; whatever the server makes of one, the session ends or goes on in step."""
    flags = CommandFlag.PAYLOAD_LEN
    await extended.send(extended.pack_request(Command.DISC, 0, 4, flags=flags, cookie=1) + b"data")
    extended.half_close()
    rest, _ = await extended.receive_until_close()
    assert rest == b"" or struct.unpack_from(">I", rest)[0] == 0x6E8A278C


@pytest.mark.parametrize("command", [Command.WRITE, Command.READ, Command.TRIM, Command.BLOCK_STATUS, 99])
@pytest.mark.parametrize("length", [64 * MIB + 1, 1 << 32, (1 << 64) - 1])
async def test_payload_over_the_limit_disconnects(extended: NbdClient, command: int, length: int) -> None:
    """ "Request message": a payload over the maximum SHOULD be a hard disconnect, whatever the command."""
    await extended.send(extended.pack_request(command, 0, length, flags=CommandFlag.PAYLOAD_LEN, cookie=1))
    await extended.expect_close()


async def test_payload_flag_with_length_zero(extended: NbdClient) -> None:
    """NBD_CMD_FLAG_PAYLOAD_LEN describes a nonzero length; with zero the connection still stays in step."""
    for command in (Command.WRITE, Command.READ, Command.BLOCK_STATUS, 99):
        await extended.call(command, 0, 0, payload=b"")
    await extended.still_serves()


async def test_refused_write_is_drained(extended: NbdClient) -> None:
    """ "Request message": a payload is consumed although the write is refused."""
    for offset, flags, error in ((END, 0, Err.ENOSPC), ((1 << 64) - 1, 0, Err.ENOSPC), (0, 1 << 9, Err.EINVAL)):
        assert (await extended.call(Command.WRITE, offset, payload=b"p" * 100_000, flags=flags)).error == error
        await extended.still_serves()


def context_filter(length: int, *ids: int) -> bytes:
    """Payload of NBD_CMD_BLOCK_STATUS: effect length, then the context ids wanted."""
    return struct.pack(f">Q{len(ids)}I", length, *ids)


async def test_status_filter(extended: NbdClient) -> None:
    """NBD_CMD_BLOCK_STATUS with payload: an answer for the ids named in it, over the effect length in it."""
    (context_id,) = extended.contexts
    await extended.write(4 * PAGE, b"s" * PAGE)
    reply = await extended.submit(
        Command.BLOCK_STATUS, 4 * PAGE, 6 * PAGE, payload=context_filter(6 * PAGE, context_id)
    )
    await extended.wait(reply)
    assert reply.error == Err.OK
    assert reply.extents[context_id][0] == (PAGE, 0)


async def test_status_filter_with_req_one(extended: NbdClient) -> None:
    """NBD_CMD_FLAG_REQ_ONE: one descriptor, no longer than the effect length in the payload."""
    (context_id,) = extended.contexts
    reply = await extended.submit(
        Command.BLOCK_STATUS, 0, PAGE, payload=context_filter(PAGE, context_id), flags=CommandFlag.REQ_ONE
    )
    await extended.wait(reply)
    assert reply.extents[context_id] == [(PAGE, 3)]


@pytest.mark.parametrize(
    "make",
    [
        lambda known: context_filter(PAGE, known, known),
        lambda known: context_filter(PAGE, known + 1),
        lambda known: context_filter(PAGE, known, known + 7),
        lambda known: context_filter(PAGE, known)[:-1],
        lambda known: context_filter(PAGE, known) + b"\0",
        lambda known: b"\0" * 4,
        lambda known: b"\0",
        lambda known: context_filter(PAGE, *range(known + 1, known + 1000)),
        lambda known: context_filter(END + 1, known),
        lambda known: context_filter((1 << 64) - 1, known),
    ],
    ids=[
        "twice",
        "unknown",
        "one unknown",
        "short",
        "long",
        "half a length",
        "one byte",
        "many",
        "past the end",
        "2^64",
    ],
)
async def test_bad_status_filter(extended: NbdClient, make: Callable[[int], bytes]) -> None:
    """NBD_CMD_BLOCK_STATUS: duplicate or unknown ids or a wrong form: payload consumed, then NBD_EINVAL."""
    (context_id,) = extended.contexts
    assert (await extended.call(Command.BLOCK_STATUS, 0, PAGE, payload=make(context_id))).error == Err.EINVAL
    await extended.still_serves()


async def test_status_filter_of_nothing(extended: NbdClient) -> None:
    """NBD_CMD_BLOCK_STATUS: the form 8 + n*4 with n = 0 asks for no context: an empty success or NBD_EINVAL."""
    reply = await extended.call(Command.BLOCK_STATUS, 0, PAGE, payload=context_filter(PAGE), contexts=[])
    assert reply.error in (Err.OK, Err.EINVAL)
    await extended.still_serves()


async def test_status_filter_without_contexts(nbd_server: Served) -> None:
    """NBD_CMD_BLOCK_STATUS: where the payload form is not offered it is consumed and gets NBD_EINVAL."""
    async with nbd_server.attached(extended=True) as client:
        assert (await client.call(Command.BLOCK_STATUS, 0, PAGE, payload=context_filter(PAGE, 0))).error == Err.EINVAL
        await client.still_serves()


async def test_extended_magic_is_that_of_the_text(extended: NbdClient) -> None:
    """ "Reserved Magic values": the swapped magic is a wrong one."""
    swapped = int.from_bytes(EXTENDED_REQUEST_MAGIC.to_bytes(4, "big"), "little")
    await extended.send(extended.pack_request(Command.READ, 0, 1, magic=swapped))
    await extended.expect_close()
