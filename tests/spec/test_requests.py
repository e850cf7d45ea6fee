"""proto.md, "Request message", "Simple reply message", "Command flags", "Error values": rules for all commands."""

import random

import pytest

from tests.support.nbd_client import NbdClient
from tests.support.nbd_spec import Command, CommandFlag, Err, Reply, Request
from tests.support.serving import MIB, Served

PAGE = 4096
ALL_COMMANDS = (
    Command.READ,
    Command.WRITE,
    Command.FLUSH,
    Command.TRIM,
    Command.CACHE,
    Command.WRITE_ZEROES,
    Command.BLOCK_STATUS,
)
BELONGS = {
    Command.WRITE_ZEROES: CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO,
    Command.READ: CommandFlag.DF,
    Command.BLOCK_STATUS: CommandFlag.REQ_ONE,
}
FOREIGN_FLAGS = [
    (command, flag)
    for command in ALL_COMMANDS
    for flag in CommandFlag
    if flag not in (CommandFlag.FUA, CommandFlag.PAYLOAD_LEN) and not flag & BELONGS.get(command, CommandFlag(0))
]


async def send(
    client: NbdClient, command: int, *, offset_bytes: int = 0, flags: int = 0, cookie: int | None = None
) -> Reply:
    """A small request of the command, in the form it needs."""
    if command == Command.WRITE:
        return await client.submit(command, offset_bytes, payload=b"w" * PAGE, flags=flags, cookie=cookie)
    length = 0 if command == Command.FLUSH else PAGE
    return await client.submit(command, offset_bytes, length, flags=flags, cookie=cookie)


def works(client: NbdClient, command: int) -> bool:
    """Block status needs a context, which simple replies can't have."""
    return command != Command.BLOCK_STATUS or bool(client.contexts)


@pytest.mark.parametrize("command", ALL_COMMANDS)
async def test_every_command_is_answered(any_client: NbdClient, command: Command) -> None:
    """ "Request types": one reply to each request, of the negotiated kind (checked by the client)."""
    reply = await any_client.wait(await send(any_client, command))
    assert reply.error == (Err.OK if works(any_client, command) else Err.EINVAL)
    await any_client.still_serves()


@pytest.mark.parametrize("command", ALL_COMMANDS)
async def test_fua_is_accepted_on_every_command(any_client: NbdClient, command: Command) -> None:
    """NBD_CMD_FLAG_FUA: the server MUST accept all commands with this bit, even by ignoring it."""
    reply = await any_client.wait(await send(any_client, command, flags=CommandFlag.FUA))
    assert reply.error == (Err.OK if works(any_client, command) else Err.EINVAL)


@pytest.mark.parametrize("command", [8, 9, 100, 0x7FFF, 0xFFFF])
@pytest.mark.parametrize("length", [0, PAGE, 0xFFFF_FFFF])
async def test_unknown_command(any_client: NbdClient, command: int, length: int) -> None:
    """ "Error values": NBD_EINVAL for an unknown command; its length announces no payload."""
    assert (await any_client.call(command, 0, length)).error == Err.EINVAL
    await any_client.still_serves()


@pytest.mark.parametrize("command", ALL_COMMANDS)
@pytest.mark.parametrize("bit", [6, 9, 15])
async def test_unknown_flag(any_client: NbdClient, command: Command, bit: int) -> None:
    """ "Error values": NBD_EINVAL for an unknown command flag; the payload of a write is swallowed and not written."""
    before = await any_client.read(0, PAGE)
    assert (await any_client.wait(await send(any_client, command, flags=1 << bit))).error == Err.EINVAL
    assert await any_client.read(0, PAGE) == before


@pytest.mark.parametrize(("command", "flag"), FOREIGN_FLAGS)
async def test_flag_of_another_command(any_client: NbdClient, command: Command, flag: CommandFlag) -> None:
    """ "Error values": NBD_EINVAL for a flag that is not documented for the command; nothing is done."""
    before = await any_client.read(0, PAGE)
    assert (await any_client.wait(await send(any_client, command, flags=flag))).error == Err.EINVAL
    assert await any_client.read(0, PAGE) == before


@pytest.mark.parametrize("command", ALL_COMMANDS)
async def test_payload_flag_needs_extended_headers(client: NbdClient, command: Command) -> None:
    """NBD_CMD_FLAG_PAYLOAD_LEN (branch text): MUST NOT be used in compact requests; only WRITE has a payload."""
    assert (await client.wait(await send(client, command, flags=CommandFlag.PAYLOAD_LEN))).error == Err.EINVAL
    await client.still_serves()


@pytest.mark.parametrize("command", ALL_COMMANDS)
async def test_length_zero(any_client: NbdClient, command: Command) -> None:
    """READ, WRITE, TRIM and others: what length 0 does is unspecified, but the server SHOULD NOT disconnect."""
    for offset in (0, 1, MIB, any_client.size_bytes):
        payload = b"" if command == Command.WRITE else None
        reply = await any_client.submit(command, offset, 0, payload=payload)
        await any_client.wait(reply)
    await any_client.still_serves()


@pytest.mark.parametrize("cookie", [0, 1, 0x25609513, 1 << 63, (1 << 64) - 1])
async def test_cookies_are_opaque(any_client: NbdClient, cookie: int) -> None:
    """ "Transmission": the server MUST use the cookie of the request in each reply, treating it as opaque."""
    for command in ALL_COMMANDS:
        await any_client.wait(await send(any_client, command, cookie=cookie))


async def test_duplicate_cookies_are_all_answered(any_client: NbdClient) -> None:
    """ "Transmission": clients SHOULD keep cookies distinct; of those who don't, each request gets a reply."""
    replies = [await any_client.submit(Command.READ, index * PAGE, PAGE, cookie=7) for index in range(16)]
    if any_client.extended or any_client.structured:
        assert await any_client.skip_replies(len(replies)) == [7] * len(replies)
    else:
        await any_client.wait_all(replies)
    await any_client.still_serves()


async def test_many_requests_in_flight(any_client: NbdClient) -> None:
    """ "Transmission": replies in any order, each once, whatever the batch."""
    dice = random.Random(1)
    wanted = {}
    for index in range(256):
        data = dice.randbytes(512)
        wanted[index] = data
        await any_client.submit(Command.WRITE, index * PAGE, payload=data)
    for _ in wanted:
        assert (await any_client.next_reply()).error == Err.OK
    replies = {index: await any_client.submit(Command.READ, index * PAGE, 512) for index in wanted}
    await any_client.wait_all(replies.values())
    assert {index: bytes(reply.data) for index, reply in replies.items()} == wanted


async def test_a_thousand_requests_in_one_packet(any_client: NbdClient) -> None:
    """Any number of requests may arrive at once; none is lost or doubled."""
    packet = bytearray()
    replies = []
    for index in range(1000):
        request_cookie = 0x9000 + index
        packet += any_client.pack_request(Command.READ, index * 512, 512, cookie=request_cookie)

        replies.append(any_client.expect(Request(Command.READ, 0, request_cookie, index * 512, 512)))
    await any_client.send(packet)
    await any_client.wait_all(replies)
    assert any_client.outstanding() == 0


async def test_requests_byte_by_byte(any_client: NbdClient) -> None:
    """The stream has no message boundaries: headers and payloads may come in any pieces."""

    flags = CommandFlag.PAYLOAD_LEN if any_client.extended else 0
    data = bytes(range(200))
    write = any_client.expect(Request(Command.WRITE, flags, 1, 1000, len(data)))
    read = any_client.expect(Request(Command.READ, 0, 2, 1000, len(data)))
    await any_client.send_slowly(any_client.pack_request(Command.WRITE, 1000, len(data), flags=flags, cookie=1) + data)
    await any_client.wait(write)
    await any_client.send_slowly(any_client.pack_request(Command.READ, 1000, len(data), cookie=2))
    assert (await any_client.wait(read)).data == data


BAD_MAGICS = [0, 0x25609512, 0x12560953, 0x25609514, 0x67446698, 0x668E33EF, 0xFFFFFFFF]


@pytest.mark.parametrize("magic", BAD_MAGICS)
async def test_bad_request_magic_closes(any_client: NbdClient, magic: int) -> None:
    """ "Request message": after a wrong magic nothing can be resynchronised, so the server ends the session."""
    await any_client.send(any_client.pack_request(Command.READ, 0, PAGE, magic=magic))
    await any_client.expect_close()


async def test_extended_magic_without_negotiation_closes(client: NbdClient) -> None:
    """ "Reserved Magic values": the extended request magic is valid only after its negotiation."""
    await client.send(client.pack_request(Command.READ, 0, PAGE, magic=0x21E41C71))
    await client.expect_close()


async def test_replies_before_a_bad_magic_arrive(client: NbdClient) -> None:
    """Requests in front of the broken one were complete: they are answered before the connection closes."""
    replies = [await client.submit(Command.WRITE, index * PAGE, payload=b"k" * PAGE) for index in range(8)]
    await client.send(client.pack_request(Command.READ, 0, PAGE, magic=1))
    for reply in await client.wait_all(replies):
        assert reply.error == Err.OK
    await client.expect_close()


@pytest.mark.parametrize("structured", [False, True])
async def test_two_connections_see_each_other(nbd_server: Served, structured: bool) -> None:
    """NBD_FLAG_CAN_MULTI_CONN: what one connection has written and flushed, another reads."""
    async with nbd_server.attached(structured=structured) as one, nbd_server.attached() as two:
        await one.write(5 * PAGE, b"shared" * 100)
        await one.flush()
        assert await two.read(5 * PAGE, 600) == b"shared" * 100
        await two.write(5 * PAGE, b"again!" * 100, flags=CommandFlag.FUA)
        assert await one.read(5 * PAGE, 600) == b"again!" * 100
