"""Requests against a volume that behaves or does not: replies in every style, the table of errors, bounds."""

import asyncio
import logging
import struct
from collections.abc import Sequence
from typing import NamedTuple

import pytest

from nbdserver import dispatch as subject
from nbdserver.buffers import Buffer, BufferPool
from nbdserver.chunks import SPARSE_BYTES_MIN
from nbdserver.complaints import Complaints
from nbdserver.dispatch import (
    BATCH_READ_BYTES_MAX,
    DAMAGED_RANGES_MAX,
    REPLY_AREA_BYTES,
    Dispatch,
)
from nbdserver.exports import CONTEXTS
from nbdserver.failures import ERRORS, error_value, open_volume, option_error
from nbdserver.transmission import Request
from nbdserver.wire import replies as wire
from nbdserver.wire.constants import Chunk, Command, CommandFlag, ErrorValue, OptionReply
from objstore import errors
from objstore.errors import Fenced, Stopping, StoreError
from objstore.units import KIB, MIB
from objstore.volume.base import REQUEST_BYTES_MAX
from objstore.volume.memory import MemorySource
from tests.conftest import ExpectedWarnings
from tests.nbdserver.volumes import TestVolume

STYLES = ["simple", "structured", "extended"]
FUA = int(CommandFlag.FUA)
DF = int(CommandFlag.DF)
PAYLOAD = int(CommandFlag.PAYLOAD_LEN)


class Piece(NamedTuple):
    """A simple reply (kind None) or a chunk."""

    kind: int | None
    cookie: int
    error: int
    payload: bytes
    done: bool


class Harness:
    """A dispatch whose replies are collected and parsed."""

    def __init__(self, volume: TestVolume, style: str = "structured", *, contexts: bool = True) -> None:
        self.sent = bytearray()
        self.finished = False
        self.is_alive = True
        self.pool = BufferPool(256 * MIB)
        self.area = memoryview(bytearray(REPLY_AREA_BYTES))
        self.style = style
        self.extended = style == "extended"
        self.dispatch = Dispatch(
            volume,
            wire.style(structured=style == "structured", extended=self.extended),
            self,
            self.pool,
            self.area,
            extended=self.extended,
            contexts=((1, CONTEXTS["base:allocation"]),) if contexts and style != "simple" else (),
        )
        self._reads: dict[int, int] = {}

    def put(self, views: Sequence[memoryview | bytes], buffer: Buffer | None = None) -> None:
        self.sent += b"".join(views)
        if buffer is not None:
            self.pool.release(buffer)

    def put_area(self, length: int) -> None:
        self.sent += self.area[:length]

    def alive(self) -> bool:
        return self.is_alive

    def task_ended(self) -> None:
        pass

    def finish(self) -> None:
        self.finished = True

    async def run(self, *requests: Request) -> list[Piece]:
        for command, flags, cookie, _, length, _, _ in requests:
            if command == Command.READ:
                self._reads[cookie] = length
            assert flags >= 0
        self.dispatch.run(list(requests))
        await self.dispatch.settle()
        assert self.pool.held_bytes == 0, "every buffer is given back"
        assert self.dispatch.held_bytes == 0
        return self.parsed()

    def parsed(self) -> list[Piece]:
        data, pieces = bytes(self.sent), []
        self.sent.clear()
        while data:
            (magic,) = struct.unpack_from(">I", data)
            if magic == 0x67446698:
                _, error, cookie = wire.SIMPLE.unpack_from(data)
                length = self._reads[cookie] if self.style == "simple" and not error and cookie in self._reads else 0
                pieces.append(Piece(None, cookie, error, data[16 : 16 + length], True))
                data = data[16 + length :]
                continue
            if self.extended:
                _, flags, kind, cookie, _, length = wire.EXTENDED.unpack_from(data)
                head = 32
            else:
                _, flags, kind, cookie, length = wire.STRUCTURED.unpack_from(data)
                head = 20
            payload = data[head : head + length]
            assert len(payload) == length
            error = struct.unpack_from(">I", payload)[0] if kind & 0x8000 else 0
            pieces.append(Piece(kind, cookie, error, payload, bool(flags & 1)))
            data = data[head + length :]
        for cookie in {piece.cookie for piece in pieces}:
            own = [piece.done for piece in pieces if piece.cookie == cookie]
            assert own == [False] * (len(own) - 1) + [True], "the last chunk of a reply, and only it, is marked"
        return pieces


def read(offset: int, length: int, *, flags: int = 0, cookie: int = 1) -> Request:
    return (Command.READ, flags, cookie, offset, length, None, None)


def ask(command: int, offset: int = 0, length: int = 0, *, flags: int = 0, cookie: int = 1) -> Request:
    return (command, flags, cookie, offset, length, None, None)


def write(harness: Harness, offset: int, data: bytes, *, flags: int = 0, cookie: int = 1) -> Request:
    flags |= PAYLOAD if harness.extended else 0
    return (Command.WRITE, flags, cookie, offset, len(data), memoryview(data), None)


def content(pieces: list[Piece], offset: int, length: int) -> bytes:
    """What a read returned, out of data and holes."""
    if pieces[0].kind is None:
        return pieces[0].payload
    found = bytearray(b"?" * length)
    for piece in pieces:
        if piece.kind == Chunk.OFFSET_DATA:
            (at,) = struct.unpack_from(">Q", piece.payload)
            found[at - offset : at - offset + len(piece.payload) - 8] = piece.payload[8:]
        elif piece.kind == Chunk.OFFSET_HOLE:
            at, size = struct.unpack(">QI", piece.payload)
            found[at - offset : at - offset + size] = bytes(size)
    return bytes(found)


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("length", [1, 4096, BATCH_READ_BYTES_MAX, BATCH_READ_BYTES_MAX + 1, 3 * MIB])
async def test_write_and_read(style: str, slow: bool, length: int) -> None:
    volume = TestVolume()
    harness = Harness(volume, style)
    volume.slow = slow
    data = bytes(range(1, 251)) * (length // 250 + 1)
    (done,) = await harness.run(write(harness, 100, data[:length]))
    assert done.error == 0
    pieces = await harness.run(read(100, length))
    assert content(pieces, 100, length) == data[:length]
    assert len(pieces) == 1
    assert bool(volume.calls) == slow


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("length", [1, 4096, 300 * KIB])
async def test_holes(style: str, slow: bool, length: int) -> None:
    volume = TestVolume()
    volume.slow = slow
    harness = Harness(volume, style)
    pieces = await harness.run(read(4096, length))
    assert content(pieces, 4096, length) == bytes(length)
    if style != "simple" and not slow:
        assert [piece.kind for piece in pieces] == [Chunk.OFFSET_HOLE]
    (piece,) = await harness.run(read(4096, length, flags=DF if style != "simple" else FUA))
    assert content([piece], 4096, length) == bytes(length)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("slow", [False, True])
async def test_partly_holes(style: str, slow: bool) -> None:
    volume = TestVolume()
    harness = Harness(volume, style)
    await harness.run(write(harness, MIB, b"d" * 4096))
    await harness.run(write(harness, MIB + 8192, b"e" * 4096))
    volume.slow = slow
    expected = bytes(200 * KIB) + b"d" * 4096 + bytes(4096) + b"e" * 4096 + bytes(4096)
    offset = MIB - 200 * KIB
    for length in (len(expected), 250 * KIB):
        pieces = await harness.run(read(offset, length))
        assert content(pieces, offset, length) == (expected + bytes(100 * KIB))[:length]
        assert len(pieces) == (1 if style == "simple" else 2)
        (whole,) = await harness.run(read(offset, length, flags=FUA if style == "simple" else DF))
        assert content([whole], offset, length) == (expected + bytes(100 * KIB))[:length]
        assert whole.kind in (None, Chunk.OFFSET_DATA)
    assert SPARSE_BYTES_MIN < 200 * KIB


@pytest.mark.parametrize("style", ["structured", "extended"])
async def test_damaged_read_sends_the_good_parts(style: str) -> None:
    volume = TestVolume()
    harness = Harness(volume, style)
    data = bytes(range(256)) * 256
    await harness.run(write(harness, 0, data))
    volume.bad = [(8192, 4096), (20480, 8192)]
    pieces = await harness.run(read(4096, 32768))
    assert [piece.kind for piece in pieces] == [Chunk.OFFSET_DATA] * 3 + [Chunk.ERROR_OFFSET] * 2
    got = content(pieces, 4096, 32768)
    assert got[:4096] == data[4096:8192]
    assert got[4096:8192] == b"?" * 4096, "nothing is sent for a bad block"
    assert got[8192:16384] == data[12288:20480]
    assert got[16384:24576] == b"?" * 8192
    assert got[24576:] == data[28672:36864]
    offsets = [struct.unpack(">Q", piece.payload[-8:])[0] for piece in pieces[3:]]
    assert offsets == [8192, 20480]
    assert {piece.error for piece in pieces[3:]} == {ErrorValue.EIO}
    pieces = await harness.run(read(4096, 32768, flags=DF))
    assert [piece.kind for piece in pieces] == [Chunk.OFFSET_DATA, Chunk.ERROR_OFFSET]
    assert content(pieces, 4096, 32768) == data[4096:8192] + b"?" * 28672
    (only,) = await harness.run(read(8192, 4096))
    assert only.kind == Chunk.ERROR_OFFSET


async def test_damaged_read_in_a_simple_reply_has_no_data() -> None:
    volume = TestVolume()
    harness = Harness(volume, "simple")
    await harness.run(write(harness, 0, b"x" * 8192))
    volume.bad = [(0, 4096)]
    assert await harness.run(read(0, 8192)) == [Piece(None, 1, ErrorValue.EIO, b"", True)]


async def test_too_much_damage_is_one_error() -> None:
    volume = TestVolume()
    harness = Harness(volume)
    await harness.run(write(harness, 0, b"x" * MIB))
    volume.bad = [(at, 512) for at in range(0, 4096 * (DAMAGED_RANGES_MAX + 1), 4096)]
    (piece,) = await harness.run(read(0, MIB))
    assert (piece.kind, piece.error) == (Chunk.ERROR, ErrorValue.EIO)


EVERY_ERROR = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, StoreError)]
TRANSMISSION = {
    errors.OutOfRange: ErrorValue.EINVAL,
    errors.InvalidRequest: ErrorValue.EINVAL,
    errors.ReadOnly: ErrorValue.EPERM,
    errors.NoSpace: ErrorValue.ENOSPC,
    errors.NotSupported: ErrorValue.ENOTSUP,
}
HANDSHAKE = {
    errors.OutOfRange: OptionReply.ERR_INVALID,
    errors.InvalidRequest: OptionReply.ERR_INVALID,
    errors.Busy: OptionReply.ERR_POLICY,
    errors.Suspended: OptionReply.ERR_POLICY,
    errors.Fenced: OptionReply.ERR_POLICY,
    errors.ReadOnly: OptionReply.ERR_POLICY,
    errors.NotSupported: OptionReply.ERR_UNSUP,
    errors.Stopping: OptionReply.ERR_SHUTDOWN,
}


@pytest.mark.parametrize("kind", EVERY_ERROR)
async def test_every_error_of_objstore_has_its_numbers(
    kind: type[StoreError], expected_warnings: ExpectedWarnings
) -> None:
    if kind is StoreError:
        expected_warnings.allow("unexpected reason")
    error = kind("why")
    assert error_value(error, Command.READ) == TRANSMISSION.get(kind, ErrorValue.EIO)
    assert option_error(error)[0] == HANDSHAKE.get(kind, OptionReply.ERR_UNKNOWN)


@pytest.mark.parametrize("command", list(Command))
def test_out_of_range_by_command(command: Command) -> None:
    taking = command in (Command.WRITE, Command.WRITE_ZEROES)
    expected = ErrorValue.ENOSPC if taking else ErrorValue.EINVAL
    assert error_value(errors.OutOfRange("past the end"), command) == expected


def test_only_values_of_the_protocol_leave() -> None:
    assert {row[1] for row in ERRORS} <= set(ErrorValue) - {
        ErrorValue.ESHUTDOWN,
        ErrorValue.ENOMEM,
        ErrorValue.EOVERFLOW,
    }


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("command", [Command.READ, Command.WRITE, Command.FLUSH, Command.TRIM, Command.WRITE_ZEROES])
async def test_errors_are_answered(style: str, slow: bool, command: Command) -> None:
    volume = TestVolume()
    volume.slow = slow
    volume.fails = errors.NoSpace("the zones are full")
    harness = Harness(volume, style)
    request = write(harness, 0, b"x" * 4096) if command == Command.WRITE else ask(command, 0, 4096)
    (piece,) = await harness.run(request)
    assert piece.error == ErrorValue.ENOSPC
    assert (b"zones are full" in piece.payload) == (style != "simple")
    assert harness.dispatch.error_count == 1


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("command", [Command.READ, Command.WRITE])
async def test_a_bug_is_eio_and_logged(slow: bool, command: Command, expected_warnings: ExpectedWarnings) -> None:
    expected_warnings.allow("unexpected reason")
    volume = TestVolume()
    volume.slow = slow
    volume.fails = ZeroDivisionError("oops")
    harness = Harness(volume)
    request = write(harness, 0, b"x") if command == Command.WRITE else read(0, 1)
    (piece,) = await harness.run(request)
    assert piece.error == ErrorValue.EIO


async def test_error_texts_are_bounded() -> None:
    volume = TestVolume()
    volume.fails = errors.Unavailable("\u20ac" * 10_000)
    (piece,) = await Harness(volume).run(read(0, 1))
    assert len(piece.payload) <= 6 + wire.ERROR_TEXT_BYTES_MAX
    assert piece.payload[6:].decode()


@pytest.mark.parametrize("slow", [False, True])
async def test_fenced_is_answered_and_ends_the_connection(slow: bool) -> None:
    volume = TestVolume()
    volume.slow = slow
    volume.fails = Fenced("a later owner has this VDI")
    harness = Harness(volume)
    (piece,) = await harness.run(read(0, 1))
    assert piece.error == ErrorValue.EIO
    assert harness.finished


@pytest.mark.parametrize("slow", [False, True])
async def test_stopping_has_no_reply(slow: bool) -> None:
    volume = TestVolume()
    volume.slow = slow
    volume.fails = Stopping("closing")
    harness = Harness(volume)
    assert await harness.run(read(0, 1), write(harness, 0, b"x")) == []
    assert harness.finished


CALLS = [
    (Command.FLUSH, FUA, "flush"),
    (Command.TRIM, FUA, "trim fua=True"),
    (Command.TRIM, 0, "trim fua=False"),
    (Command.CACHE, FUA, "cache"),
    (Command.WRITE_ZEROES, 0, "zero no_hole=False fast=False fua=False"),
    (Command.WRITE_ZEROES, FUA | CommandFlag.NO_HOLE, "zero no_hole=True fast=False fua=True"),
    (Command.WRITE_ZEROES, CommandFlag.FAST_ZERO, "zero no_hole=False fast=True fua=False"),
    (Command.BLOCK_STATUS, FUA, "extents"),
]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("command", "flags", "call"), CALLS)
async def test_commands_reach_the_volume(style: str, command: Command, flags: int, call: str) -> None:
    volume = TestVolume()
    harness = Harness(volume, style)
    (piece,) = await harness.run(ask(command, 0, 8192, flags=flags))
    if command == Command.BLOCK_STATUS and style == "simple":
        assert piece.error == ErrorValue.EINVAL
        return
    assert piece.error == 0
    assert volume.calls == [call]


@pytest.mark.parametrize("style", STYLES)
async def test_fua_write_waits_for_the_volume(style: str) -> None:
    volume = TestVolume()
    harness = Harness(volume, style)
    (piece,) = await harness.run(write(harness, 0, b"x", flags=FUA))
    assert piece.error == 0
    assert volume.calls == ["write fua=True"]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("command", [*Command, 9, 77, 0xFFFF])
async def test_flags_that_do_not_belong(style: str, command: int) -> None:
    harness = Harness(TestVolume(), style)
    allowed = {int(known): int(flags) for known, flags in subject.FLAGS_ALLOWED.items()}.get(command, 0)
    if style == "simple":
        allowed &= ~DF
    if harness.extended and command in (Command.WRITE, Command.BLOCK_STATUS):
        allowed |= PAYLOAD
    for bit in range(16):
        flags = 1 << bit
        if command == Command.WRITE and harness.extended:
            flags |= PAYLOAD
        refused = harness.dispatch.refusal(command, flags, 0, 4096)
        status_in_vain = command == Command.BLOCK_STATUS and style == "simple"
        if flags & ~allowed or status_in_vain:
            assert refused is not None, f"flag {flags:#x}"
            assert refused[0] == ErrorValue.EINVAL
        else:
            assert refused is None, f"flag {flags:#x}"


SIZE = 1 << 24
END = [
    (Command.READ, ErrorValue.EINVAL),
    (Command.WRITE, ErrorValue.ENOSPC),
    (Command.TRIM, ErrorValue.EINVAL),
    (Command.CACHE, ErrorValue.EINVAL),
    (Command.WRITE_ZEROES, ErrorValue.ENOSPC),
    (Command.BLOCK_STATUS, ErrorValue.EINVAL),
]


@pytest.mark.parametrize(("offset", "length"), [(SIZE, 1), (SIZE - 1, 2), ((1 << 64) - 1, 1), ((1 << 64) - 1, 4096)])
@pytest.mark.parametrize(("command", "expected"), END)
async def test_past_the_end(command: Command, expected: ErrorValue, offset: int, length: int) -> None:
    volume = TestVolume(SIZE)
    harness = Harness(volume)
    request = write(harness, offset, b"x" * length) if command == Command.WRITE else ask(command, offset, length)
    (piece,) = await harness.run(request)
    assert piece.error == expected
    assert volume.calls == []


@pytest.mark.parametrize("command", [Command.WRITE, Command.TRIM, Command.WRITE_ZEROES])
async def test_read_only(command: Command) -> None:
    volume = TestVolume(read_only=True)
    harness = Harness(volume)
    request = write(harness, 0, b"x" * 4096) if command == Command.WRITE else ask(command, 0, 4096)
    (piece,) = await harness.run(request)
    assert piece.error == ErrorValue.EPERM
    assert volume.calls == []


@pytest.mark.parametrize("style", STYLES)
async def test_longest_read(style: str) -> None:
    harness = Harness(TestVolume(2 * REQUEST_BYTES_MAX), style)
    (piece,) = await harness.run(read(0, REQUEST_BYTES_MAX + 1))
    assert piece.error == ErrorValue.EINVAL
    pieces = await harness.run(read(0, REQUEST_BYTES_MAX))
    assert pieces[0].error == 0


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("command", [Command.READ, Command.WRITE, Command.TRIM, Command.CACHE, Command.WRITE_ZEROES])
async def test_length_zero(style: str, command: Command) -> None:
    harness = Harness(TestVolume(), style)
    for offset in (0, 1 << 24):
        request = write(harness, offset, b"") if command == Command.WRITE else ask(command, offset)
        (piece,) = await harness.run(request)
        assert piece.error == 0
        assert piece.payload == b""


@pytest.mark.parametrize("style", ["structured", "extended"])
async def test_block_status(style: str) -> None:
    volume = TestVolume()
    harness = Harness(volume, style)
    for block in range(0, 4096, 2):
        volume.write_now(block * 4096, memoryview(b"x" * 4096))
    (piece,) = await harness.run(ask(Command.BLOCK_STATUS, 0, 16384))
    layout = ">II" if style == "structured" else ">QQ"
    head = 4 if style == "structured" else 8
    assert list(struct.iter_unpack(layout, piece.payload[head:])) == [(4096, 0), (4096, 3)] * 2
    (piece,) = await harness.run(ask(Command.BLOCK_STATUS, 0, 16384, flags=CommandFlag.REQ_ONE))
    assert list(struct.iter_unpack(layout, piece.payload[head:])) == [(4096, 0)]
    (piece,) = await harness.run(ask(Command.BLOCK_STATUS, 0, 1 << 24))
    count = len(list(struct.iter_unpack(layout, piece.payload[head:])))
    assert count == subject.STATUS_EXTENTS_MAX
    await volume.zero(0, 4096, no_hole=True)
    (piece,) = await harness.run(ask(Command.BLOCK_STATUS, 0, 4096))
    assert list(struct.iter_unpack(layout, piece.payload[head:])) == [(4096, 2)]
    assert (await harness.run(ask(Command.BLOCK_STATUS, 0, 0)))[0].error == ErrorValue.EINVAL


async def test_block_status_without_a_context() -> None:
    harness = Harness(TestVolume(), contexts=False)
    (piece,) = await harness.run(ask(Command.BLOCK_STATUS, 0, 4096))
    assert piece.error == ErrorValue.EINVAL


STATUS_PAYLOADS = [
    (struct.pack(">QI", 4096, 1), 0),
    (struct.pack(">QII", 4096, 1, 1), ErrorValue.EINVAL),
    (struct.pack(">QI", 4096, 2), ErrorValue.EINVAL),
    (struct.pack(">Q", 4096), ErrorValue.EINVAL),
    (struct.pack(">QI", 0, 1), ErrorValue.EINVAL),
    (struct.pack(">QI", 1 << 60, 1), ErrorValue.EINVAL),
    (b"short", ErrorValue.EINVAL),
    (b"x" * 13, ErrorValue.EINVAL),
    (None, ErrorValue.EINVAL),
]


@pytest.mark.parametrize(("payload", "expected"), STATUS_PAYLOADS)
async def test_block_status_with_a_filter(payload: bytes | None, expected: int) -> None:
    harness = Harness(TestVolume(), "extended")
    view = None if payload is None else memoryview(payload)
    length = 1 << 20 if payload is None else len(payload)
    (piece,) = await harness.run((Command.BLOCK_STATUS, PAYLOAD, 1, 0, length, view, None))
    assert piece.error == expected
    if not expected:
        assert piece.payload == struct.pack(">IIQQ", 1, 1, 4096, 3)


async def test_extended_write_needs_the_payload_flag() -> None:
    harness = Harness(TestVolume(), "extended")
    (piece,) = await harness.run(ask(Command.WRITE, 0, 4096))
    assert piece.error == ErrorValue.EINVAL


@pytest.mark.parametrize("pooled", [False, True])
async def test_payloads_live_until_the_write_has_ended(pooled: bool) -> None:
    volume = TestVolume()
    volume.slow = True
    volume.gate = asyncio.Event()
    harness = Harness(volume)
    data = bytearray(b"good" * 1024)
    buffer = harness.pool.take(len(data)) if pooled else None
    payload = memoryview(data)
    if buffer is not None:
        buffer.data[: len(data)] = data
        payload = buffer.data[: len(data)]
    harness.dispatch.run([(Command.WRITE, 0, 1, 0, len(data), payload, buffer)])
    data[:] = b"evil" * 1024
    assert harness.dispatch.in_flight == 1
    assert harness.dispatch.held_bytes == 4096
    assert harness.pool.held_bytes >= 4096
    volume.gate.set()
    await harness.dispatch.settle()
    volume.slow = False
    harness.sent.clear()
    assert content(await harness.run(read(0, 4096)), 0, 4096) == b"good" * 1024


@pytest.mark.parametrize("command", [Command.WRITE, Command.TRIM, Command.WRITE_ZEROES])
async def test_changes_of_a_peer_that_is_gone_do_not_happen(command: Command) -> None:
    volume = TestVolume()
    harness = Harness(volume)
    await harness.run(write(harness, 0, b"x" * 4096))
    harness.is_alive = False
    harness.dispatch.cautious = True
    request = write(harness, 0, b"y" * 4096) if command == Command.WRITE else ask(command, 0, 4096)
    assert await harness.run(request) == [], "an error would be believed by a client that only half-closed"
    assert harness.finished
    assert content(await harness.run(read(0, 4096)), 0, 4096) == b"x" * 4096


async def test_cancelled_requests_get_no_reply() -> None:
    volume = TestVolume()
    volume.gate = asyncio.Event()
    harness = Harness(volume)
    harness.dispatch.run([ask(Command.FLUSH), read(0, 0, cookie=2)])
    await asyncio.sleep(0)
    harness.dispatch.cancel()
    await harness.dispatch.settle()
    assert [piece.cookie for piece in harness.parsed()] == [2]


async def test_a_mixed_batch_answers_every_request_once() -> None:
    volume = TestVolume()
    harness = Harness(volume)
    requests = []
    for cookie in range(200):
        kind = cookie % 5
        if kind == 0:
            requests.append(write(harness, cookie * 4096, b"x" * 4096, cookie=cookie))
        elif kind == 1:
            requests.append(ask(Command.FLUSH, cookie=cookie))
        elif kind == 2:
            requests.append(ask(99, cookie=cookie))
        else:
            requests.append(read(cookie * 512, 1024, cookie=cookie))
    pieces = await harness.run(*requests)
    assert sorted(piece.cookie for piece in pieces) == list(range(200))


async def test_opening(expected_warnings: ExpectedWarnings) -> None:
    source = MemorySource({})
    expected_warnings.allow("can't be opened")
    complain = Complaints(logging.getLogger())
    assert await open_volume(source, "x", complain) == (OptionReply.ERR_UNKNOWN, "no such volume name=x")
