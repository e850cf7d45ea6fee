"""proto.md, NBD_OPT_INFO, NBD_OPT_GO, NBD_OPT_EXPORT_NAME, NBD_REP_INFO and "Transmission flags"."""

import struct

import pytest

from tests.support.nbd_client import CLIENT_FLAGS, export_request
from tests.support.nbd_spec import Command, ExportFlag, HandshakeFlag, Info, Option, Rep
from tests.support.serving import Served

ALL_INFOS = (Info.EXPORT, Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE)
HAGGLING_ERRORS = (Rep.ERR_INVALID, Rep.ERR_UNKNOWN, Rep.ERR_TOO_BIG, Rep.ERR_POLICY)


@pytest.mark.parametrize("infos", [(), (Info.EXPORT,), ALL_INFOS, ALL_INFOS[::-1]])
async def test_info_describes_the_export(nbd_server: Served, infos: tuple[Info, ...]) -> None:
    """NBD_OPT_INFO: NBD_INFO_EXPORT always comes, asked for or not, and haggling goes on after it."""
    async with nbd_server.connected() as client:
        info = await client.info(infos=infos)
        assert info.accepted
        assert info.size_bytes == nbd_server.disk.size_bytes
        await client.in_step()


@pytest.mark.parametrize("infos", [(), (Info.BLOCK_SIZE,), (Info.NAME, Info.DESCRIPTION), ALL_INFOS, (900, 3)])
@pytest.mark.parametrize("structured", [False, True])
async def test_go_after_info_says_the_same(nbd_server: Served, infos: tuple[int, ...], structured: bool) -> None:
    """NBD_OPT_INFO followed by NBD_OPT_GO with the same parameters MUST give the same information."""
    async with nbd_server.connected() as client:
        if structured:
            await client.structured_replies()
        first = await client.info(infos=infos)
        second = await client.go(infos=infos)
        assert first.accepted
        assert first.raw == second.raw
        await client.still_serves()


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
async def test_unknown_information_requests_are_ignored(nbd_server: Served, option: Option) -> None:
    """NBD_OPT_INFO: the server MUST ignore information requests it does not understand."""
    async with nbd_server.connected() as client:
        request = export_request("", [4, 77, Info.BLOCK_SIZE, 0xFFFF])
        replies = await client.option(option, request)
        assert replies[-1].type == Rep.ACK


async def test_many_information_requests(nbd_server: Served) -> None:
    """An information list of some thousand entries is answered or refused, and the stream stays in step."""
    async with nbd_server.connected() as client:
        info = await client.info(infos=range(100, 2100))
        assert info.accepted or info.final in HAGGLING_ERRORS
        await client.in_step()


LYING_REQUESTS = {
    "no data": b"",
    "short name length": b"\0\0\0",
    "name length only": struct.pack(">I", 0),
    "half an info count": struct.pack(">IB", 0, 0),
    "name length over the data": export_request("disk", [], name_length=5),
    "name length by far over the data": export_request("disk", [3], name_length=0xFFFF_FFFF),
    "name length of 2^31": export_request("disk", [], name_length=1 << 31),
    "more infos than sent": struct.pack(">IHH", 0, 2, 3),
    "65535 infos announced": struct.pack(">IH", 0, 0xFFFF),
    "half an info": struct.pack(">IHB", 0, 1, 0),
    "fewer infos than sent": struct.pack(">IHHH", 0, 1, 3, 1),
    "bytes behind the list": export_request("", [3]) + b"\0\0\0",
}


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
@pytest.mark.parametrize("data", LYING_REQUESTS.values(), ids=LYING_REQUESTS.keys())
async def test_lying_lengths_are_invalid(nbd_server: Served, option: Option, data: bytes) -> None:
    """NBD_REP_ERR_INVALID is for syntactically invalid options; the server stays in step and goes on haggling."""
    async with nbd_server.connected() as client:
        assert [reply.type for reply in await client.option(option, data)] == [Rep.ERR_INVALID]
        await client.in_step()
        assert (await client.go()).accepted


BAD_NAMES = {
    "NUL": b"di\0sk",
    "not UTF-8": b"\xff\xfe\xfd",
    "surrogate": b"\xed\xa0\x80",
    "257 bytes": b"n" * 257,
    "4096 bytes": b"n" * 4096,
    "4097 bytes": b"n" * 4097,
    "60000 bytes": b"n" * 60000,
}


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
@pytest.mark.parametrize("name", BAD_NAMES.values(), ids=BAD_NAMES.keys())
async def test_impossible_names_are_refused(one_named_disk: Served, option: Option, name: bytes) -> None:
    """ "Conventions": strings are UTF-8 without NUL, up to 4096 bytes. Whatever the error, it is one reply, in step."""
    async with one_named_disk.connected() as client:
        (reply,) = await client.option(option, export_request(name))
        assert reply.type in HAGGLING_ERRORS
        await client.in_step()


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
async def test_unknown_export(one_named_disk: Served, option: Option) -> None:
    """NBD_OPT_GO: NBD_REP_ERR_UNKNOWN without NBD_REP_INFO; the client may go on and choose another."""
    async with one_named_disk.connected() as client:
        (reply,) = await client.option(option, export_request("nobody", ALL_INFOS))
        assert reply.type == Rep.ERR_UNKNOWN
        assert (await client.go(one_named_disk.disk.name)).accepted
        await client.still_serves()


async def test_go_sends_nothing_after_its_ack(nbd_server: Served) -> None:
    """NBD_OPT_GO: no zero padding after NBD_REP_ACK, whether or not NO_ZEROES was negotiated."""
    for flags in (CLIENT_FLAGS, HandshakeFlag.FIXED_NEWSTYLE):
        async with nbd_server.connected(flags=flags) as client:
            assert (await client.go()).accepted
            await client.still_serves()  # the next bytes are a reply


@pytest.mark.parametrize("flags", [CLIENT_FLAGS, HandshakeFlag.FIXED_NEWSTYLE])
async def test_export_name_with_and_without_zeroes(nbd_server: Served, flags: HandshakeFlag) -> None:
    """NBD_OPT_EXPORT_NAME: 124 zeroes unless both sides set NO_ZEROES; not one byte more or less."""
    async with nbd_server.connected(flags=flags) as client:
        await client.export_name()
        assert client.size_bytes == nbd_server.disk.size_bytes
        await client.still_serves()


async def test_export_name_after_haggling(nbd_server: Served) -> None:
    """NBD_OPT_EXPORT_NAME gives what NBD_OPT_INFO said, with the state negotiated before it."""
    async with nbd_server.connected() as client:
        await client.structured_replies()
        info = await client.info()
        await client.export_name()
        assert (client.size_bytes, client.flags) == (info.size_bytes, info.flags)
        await client.still_serves()


@pytest.mark.parametrize("name", [b"nobody", b"di\0sk", b"\xff", b"n" * 4096, b"n" * 4097])
async def test_export_name_of_unknown_export_closes(one_named_disk: Served, name: bytes) -> None:
    """NBD_OPT_EXPORT_NAME can't return errors: the server MUST terminate the session."""
    async with one_named_disk.connected() as client:
        await client.send_option(Option.EXPORT_NAME, name)
        await client.expect_close()
    await one_named_disk.others_are_served()


async def test_flags_of_a_writable_export(nbd_server: Served) -> None:
    """ "Transmission flags": everything this server supports is exposed; read-only is not, resize neither."""
    async with nbd_server.connected() as client:
        await client.structured_replies()
        flags = (await client.go()).flags
    wanted = (
        ExportFlag.HAS_FLAGS
        | ExportFlag.SEND_FLUSH
        | ExportFlag.SEND_FUA
        | ExportFlag.SEND_TRIM
        | ExportFlag.SEND_WRITE_ZEROES
        | ExportFlag.SEND_DF
        | ExportFlag.CAN_MULTI_CONN
        | ExportFlag.SEND_CACHE
        | ExportFlag.SEND_FAST_ZERO
    )
    assert flags == wanted


async def test_df_is_exposed_only_with_structured_replies(nbd_server: Served) -> None:
    """NBD_FLAG_SEND_DF: MUST be clear if structured replies have not been negotiated, and set if DF is supported."""
    async with nbd_server.connected() as client:
        assert not (await client.info()).flags & ExportFlag.SEND_DF
        await client.structured_replies()
        assert (await client.info()).flags & ExportFlag.SEND_DF
    async with nbd_server.connected() as client:
        assert not (await client.go()).flags & ExportFlag.SEND_DF
    async with nbd_server.connected() as client:
        await client.export_name()
        assert not client.flags & ExportFlag.SEND_DF


@pytest.mark.parametrize("structured", [False, True])
async def test_block_status_payload_is_not_exposed_without_extended_headers(
    nbd_server: Served, structured: bool
) -> None:
    """NBD_FLAG_BLOCK_STATUS_PAYLOAD: MUST NOT be advertised unless extended headers were negotiated (branch text)."""
    async with nbd_server.connected() as client:
        if structured:
            await client.structured_replies()
        assert not (await client.info()).flags & ExportFlag.BLOCK_STATUS_PAYLOAD
        await client.export_name()
        assert not client.flags & ExportFlag.BLOCK_STATUS_PAYLOAD


async def test_requests_are_no_options_any_more(nbd_server: Served) -> None:
    """NBD_OPT_GO: after NBD_REP_ACK the transmission phase has begun; an option there is a bad request magic."""
    async with nbd_server.attached() as client:
        await client.send_option(Option.LIST)
        await client.send(client.pack_request(Command.READ, 0, 1))
        await client.expect_close()
