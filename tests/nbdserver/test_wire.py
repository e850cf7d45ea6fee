"""Bytes against the tables of proto.md, written out by hand."""

import struct

import pytest

from nbdserver.wire import options, replies, requests
from nbdserver.wire.constants import Chunk, Command, ErrorValue, Info, Option, OptionReply

COOKIE = 0x0102030405060708
OFFSET = 0x1112131415161718


def test_greeting() -> None:
    assert options.greeting(3) == b"NBDMAGICIHAVEOPT\x00\x03"


def test_requests() -> None:
    compact = requests.pack(Command.TRIM, 1, COOKIE, OFFSET, 0x21222324)
    assert compact == bytes.fromhex("25609513 0001 0004 0102030405060708 1112131415161718 21222324")
    extended = requests.pack(Command.WRITE, 32, COOKIE, OFFSET, 0x21222324, extended=True)
    assert extended == bytes.fromhex("21e41c71 0020 0001 0102030405060708 1112131415161718 0000000021222324")


def test_status_payload() -> None:
    payload = struct.pack(">QII", 1 << 40, 1, 7)
    assert requests.decode_status_payload(memoryview(payload)) == (1 << 40, (1, 7))
    assert requests.decode_status_payload(memoryview(payload[:8])) == (1 << 40, ())
    for length in (0, 7, 9, 11, 15):
        with pytest.raises(ValueError, match="8 \\+ 4 n"):
            requests.decode_status_payload(memoryview(payload[:length]))


def put(style: replies.Replies, what: str, length: int = 4096) -> bytes:
    buffer = memoryview(bytearray(200))
    if what == "data":
        style.put_data(buffer, 3, COOKIE, OFFSET, length)
        size = style.data_header_bytes
    elif what == "hole":
        size = style.put_hole(buffer, 3, COOKIE, OFFSET, length)
    else:
        size = style.put_done(buffer, 3, COOKIE, OFFSET)
    assert not any(buffer[:3])
    assert not any(buffer[3 + size :])
    assert size <= replies.HEADER_BYTES_MAX
    return bytes(buffer[3 : 3 + size])


def test_simple_replies() -> None:
    style = replies.style(structured=False, extended=False)
    ok = bytes.fromhex("67446698 00000000 0102030405060708")
    assert put(style, "data") == put(style, "done") == style.done(COOKIE, OFFSET) == ok
    assert style.error(COOKIE, OFFSET, ErrorValue.ENOSPC, "full") == bytes.fromhex("67446698 0000001c 0102030405060708")
    assert not style.chunked
    with pytest.raises(NotImplementedError):
        put(style, "hole")
    with pytest.raises(NotImplementedError):
        style.chunk(Chunk.NONE, COOKIE, OFFSET, 0)
    with pytest.raises(NotImplementedError):
        style.status(COOKIE, OFFSET, 1, [(1, 0)], done=True)


def test_structured_replies() -> None:
    style = replies.style(structured=True, extended=False)
    head = "668e33ef 0001 {} 0102030405060708 {}"
    assert put(style, "data") == bytes.fromhex(head.format("0001", "00001008") + "1112131415161718")
    assert put(style, "hole") == bytes.fromhex(head.format("0002", "0000000c") + "1112131415161718 00001000")
    assert put(style, "done") == bytes.fromhex("67446698 00000000 0102030405060708")
    assert style.done(COOKIE, OFFSET) == bytes.fromhex(head.format("0000", "00000000"))
    error = bytes.fromhex(head.format("8001", "0000000a") + "0000001c 0004") + b"full"
    assert style.error(COOKIE, OFFSET, ErrorValue.ENOSPC, "full") == error
    status = bytes.fromhex(head.format("0005", "00000014") + "00000007 00001000 00000000 00002000 00000003")
    assert style.status(COOKIE, OFFSET, 7, [(4096, 0), (8192, 3)], done=True) == status


def test_extended_replies() -> None:
    style = replies.style(structured=False, extended=True)
    assert isinstance(replies.style(structured=True, extended=True), replies.ExtendedReplies)
    head = "6e8a278c 0001 {} 0102030405060708 1112131415161718 {}"
    assert put(style, "data") == bytes.fromhex(head.format("0001", "0000000000001008") + "1112131415161718")
    assert put(style, "hole") == bytes.fromhex(head.format("0002", "000000000000000c") + "1112131415161718 00001000")
    assert put(style, "done") == style.done(COOKIE, OFFSET) == bytes.fromhex(head.format("0000", "0000000000000000"))
    error = bytes.fromhex(head.format("8001", "000000000000000a") + "0000001c 0004") + b"full"
    assert style.error(COOKIE, OFFSET, ErrorValue.ENOSPC, "full") == error
    status = bytes.fromhex(
        head.format("0006", "0000000000000028")
        + "00000007 00000002 0000000000001000 0000000000000000 0000010000000000 0000000000000003"
    )
    assert style.status(COOKIE, OFFSET, 7, [(4096, 0), (1 << 40, 3)], done=True) == status


def test_chunks_that_are_not_the_last() -> None:
    for style in (replies.StructuredReplies(), replies.ExtendedReplies()):
        assert style.chunk(Chunk.OFFSET_DATA, COOKIE, OFFSET, 8)[4:6] == b"\0\0"
        assert style.status(COOKIE, OFFSET, 1, [(1, 0)], done=False)[4:6] == b"\0\0"


def test_error_payloads() -> None:
    assert replies.error_offset_payload(5, "bad", OFFSET) == bytes.fromhex("00000005 0003 626164 1112131415161718")
    long = replies.error_payload(5, "\u20ac" * 9999)
    (length,) = struct.unpack_from(">H", long, 4)
    assert length == len(long) - 6 <= replies.ERROR_TEXT_BYTES_MAX
    assert long[6:].decode()


def test_option_replies() -> None:
    head = "0003e889045565a9 {:08x} {:08x} {:08x}"
    server = bytes.fromhex(head.format(3, 2, 4 + 4 + 9) + "00000004") + b"diskin memory"
    assert options.reply_server(Option.LIST, "disk", "in memory") == server
    context = bytes.fromhex(head.format(10, 4, 4 + 3) + "00000001") + b"a:b"
    assert options.reply_context(Option.SET_META_CONTEXT, 1, "a:b") == context
    error = bytes.fromhex(head.format(99, 0x80000001, 3)) + b"why"
    assert options.reply_error(99, OptionReply.ERR_UNSUP, "why") == error


def test_info_items() -> None:
    assert options.info_export(OFFSET, 0x0123) == bytes.fromhex("0000 1112131415161718 0123")
    assert options.info_block_size((1, 4096, 1 << 25)) == bytes.fromhex("0003 00000001 00001000 02000000")
    assert options.info_text(Info.NAME, "disk") == b"\0\1disk"
    assert options.export_name_reply(OFFSET, 1, zeroes=False) == bytes.fromhex("1112131415161718 0001")
    assert options.export_name_reply(OFFSET, 1, zeroes=True)[10:] == bytes(124)
