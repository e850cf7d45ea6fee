"""Replies of the transmission phase in their three styles: simple, structured, extended.

One object per style and no state, chosen when a connection enters transmission. The methods that run once per request
write into a buffer of the caller (`put_*`), the rare ones return bytes.
Spec: proto.md, "Simple reply message", "Structured reply chunk message", "Structured reply types"; proto-ext-header.md,
"Extended reply chunk message".
"""

import struct
from collections.abc import Sequence
from itertools import chain
from typing import Final, Protocol

from nbdserver.wire.constants import (
    EXTENDED_REPLY_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    ReplyFlag,
)
from nbdserver.wire.options import text_bytes

SIMPLE = struct.Struct(">IIQ")
"""Magic, error, cookie."""
STRUCTURED = struct.Struct(">IHHQI")
"""Magic, flags, type, cookie, length."""
EXTENDED = struct.Struct(">IHHQQQ")
"""Magic, flags, type, cookie, offset of the request, length."""

_STRUCTURED_DATA = struct.Struct(">IHHQIQ")
_STRUCTURED_HOLE = struct.Struct(">IHHQIQI")
_EXTENDED_DATA = struct.Struct(">IHHQQQQ")
_EXTENDED_HOLE = struct.Struct(">IHHQQQQI")
_ERROR = struct.Struct(">IH")
_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")
_STATUS_EXT = struct.Struct(">II")

assert (SIMPLE.size, STRUCTURED.size, EXTENDED.size) == (16, 20, 32)

HEADER_BYTES_MAX: Final = _EXTENDED_HOLE.size
"""No `put_*` writes more than this."""
ERROR_TEXT_BYTES_MAX: Final = 512
"""Texts of error chunks are cut here; the protocol allows 4096, people read a line."""

_DONE: Final = int(ReplyFlag.DONE)
_NONE: Final = int(Chunk.NONE)
_DATA: Final = int(Chunk.OFFSET_DATA)
_HOLE: Final = int(Chunk.OFFSET_HOLE)

Descriptors = Sequence[tuple[int, int]]
"""Extents of a metadata context: (length in bytes, status flags)."""


class Replies(Protocol):
    """One style of replies. offset: that of the request, which extended headers repeat."""

    chunked: bool
    """Reads may be answered in several chunks, with holes, and errors carry a text."""
    data_header_bytes: int
    """What stands in front of the data of a read."""

    def put_data(self, into: memoryview, at: int, cookie: int, offset: int, length: int) -> None:
        """The header of a successful read whose `length` bytes follow: the only chunk of its reply."""
        ...

    def put_hole(self, into: memoryview, at: int, cookie: int, offset: int, length: int) -> int:
        """The whole reply to a read that found nothing but zeros; returns its length. Chunked styles only."""
        ...

    def put_done(self, into: memoryview, at: int, cookie: int, offset: int) -> int:
        """The whole reply to a request that succeeded and has no data; returns its length."""
        ...

    def done(self, cookie: int, offset: int) -> bytes:
        """As put_done, but fit for every command: also for a read of length 0."""
        ...

    def error(self, cookie: int, offset: int, value: int, text: str) -> bytes:
        """The whole reply to a request that failed."""
        ...

    def chunk(self, kind: int, cookie: int, offset: int, length: int, *, done: bool = False) -> bytes:
        """The header of one chunk with `length` bytes of payload. Chunked styles only."""
        ...

    def status(self, cookie: int, offset: int, context_id: int, extents: Descriptors, *, done: bool) -> bytes:
        """One chunk with the status of a metadata context. Chunked styles only."""
        ...


class SimpleReplies:
    """Before any negotiation: 16 bytes, then the data of a read."""

    chunked = False
    data_header_bytes = SIMPLE.size

    def put_data(self, into: memoryview, at: int, cookie: int, offset: int, length: int) -> None:
        SIMPLE.pack_into(into, at, SIMPLE_REPLY_MAGIC, 0, cookie)

    def put_hole(self, into: memoryview, at: int, cookie: int, offset: int, length: int) -> int:
        raise NotImplementedError("simple replies have no chunks")

    def put_done(self, into: memoryview, at: int, cookie: int, offset: int) -> int:
        SIMPLE.pack_into(into, at, SIMPLE_REPLY_MAGIC, 0, cookie)
        return 16

    def done(self, cookie: int, offset: int) -> bytes:
        return SIMPLE.pack(SIMPLE_REPLY_MAGIC, 0, cookie)

    def error(self, cookie: int, offset: int, value: int, text: str) -> bytes:
        return SIMPLE.pack(SIMPLE_REPLY_MAGIC, value, cookie)

    def chunk(self, kind: int, cookie: int, offset: int, length: int, *, done: bool = False) -> bytes:
        raise NotImplementedError("simple replies have no chunks")

    def status(self, cookie: int, offset: int, context_id: int, extents: Descriptors, *, done: bool) -> bytes:
        raise NotImplementedError("simple replies have no chunks")


class StructuredReplies:
    """After STRUCTURED_REPLY: chunks; success without data is still told in a simple reply, which is shorter."""

    chunked = True
    data_header_bytes = _STRUCTURED_DATA.size

    def put_data(self, into: memoryview, at: int, cookie: int, offset: int, length: int) -> None:
        _STRUCTURED_DATA.pack_into(into, at, STRUCTURED_REPLY_MAGIC, _DONE, _DATA, cookie, length + 8, offset)

    def put_hole(self, into: memoryview, at: int, cookie: int, offset: int, length: int) -> int:
        _STRUCTURED_HOLE.pack_into(into, at, STRUCTURED_REPLY_MAGIC, _DONE, _HOLE, cookie, 12, offset, length)
        return _STRUCTURED_HOLE.size

    def put_done(self, into: memoryview, at: int, cookie: int, offset: int) -> int:
        SIMPLE.pack_into(into, at, SIMPLE_REPLY_MAGIC, 0, cookie)
        return 16

    def done(self, cookie: int, offset: int) -> bytes:
        return STRUCTURED.pack(STRUCTURED_REPLY_MAGIC, _DONE, _NONE, cookie, 0)

    def error(self, cookie: int, offset: int, value: int, text: str) -> bytes:
        payload = error_payload(value, text)
        return self.chunk(Chunk.ERROR, cookie, offset, len(payload), done=True) + payload

    def chunk(self, kind: int, cookie: int, offset: int, length: int, *, done: bool = False) -> bytes:
        return STRUCTURED.pack(STRUCTURED_REPLY_MAGIC, _DONE if done else 0, kind, cookie, length)

    def status(self, cookie: int, offset: int, context_id: int, extents: Descriptors, *, done: bool) -> bytes:
        payload = _U32.pack(context_id) + struct.pack(f">{2 * len(extents)}I", *chain.from_iterable(extents))
        return self.chunk(Chunk.BLOCK_STATUS, cookie, offset, len(payload), done=done) + payload


class ExtendedReplies:
    """After EXTENDED_HEADERS: nothing but chunks with headers of 32 bytes."""

    chunked = True
    data_header_bytes = _EXTENDED_DATA.size

    def put_data(self, into: memoryview, at: int, cookie: int, offset: int, length: int) -> None:
        _EXTENDED_DATA.pack_into(into, at, EXTENDED_REPLY_MAGIC, _DONE, _DATA, cookie, offset, length + 8, offset)

    def put_hole(self, into: memoryview, at: int, cookie: int, offset: int, length: int) -> int:
        _EXTENDED_HOLE.pack_into(into, at, EXTENDED_REPLY_MAGIC, _DONE, _HOLE, cookie, offset, 12, offset, length)
        return _EXTENDED_HOLE.size

    def put_done(self, into: memoryview, at: int, cookie: int, offset: int) -> int:
        EXTENDED.pack_into(into, at, EXTENDED_REPLY_MAGIC, _DONE, _NONE, cookie, offset, 0)
        return 32

    def done(self, cookie: int, offset: int) -> bytes:
        return EXTENDED.pack(EXTENDED_REPLY_MAGIC, _DONE, _NONE, cookie, offset, 0)

    def error(self, cookie: int, offset: int, value: int, text: str) -> bytes:
        payload = error_payload(value, text)
        return self.chunk(Chunk.ERROR, cookie, offset, len(payload), done=True) + payload

    def chunk(self, kind: int, cookie: int, offset: int, length: int, *, done: bool = False) -> bytes:
        return EXTENDED.pack(EXTENDED_REPLY_MAGIC, _DONE if done else 0, kind, cookie, offset, length)

    def status(self, cookie: int, offset: int, context_id: int, extents: Descriptors, *, done: bool) -> bytes:
        payload = _STATUS_EXT.pack(context_id, len(extents))
        payload += struct.pack(f">{2 * len(extents)}Q", *chain.from_iterable(extents))
        return self.chunk(Chunk.BLOCK_STATUS_EXT, cookie, offset, len(payload), done=done) + payload


def style(*, structured: bool, extended: bool) -> Replies:
    """The style that the handshake agreed on; extended headers take precedence."""
    if extended:
        return ExtendedReplies()
    return StructuredReplies() if structured else SimpleReplies()


def error_payload(value: int, text: str) -> bytes:
    """Payload of an ERROR chunk; text is cut to ERROR_TEXT_BYTES_MAX."""
    message = text_bytes(text, ERROR_TEXT_BYTES_MAX)
    return _ERROR.pack(value, len(message)) + message


def error_offset_payload(value: int, text: str, offset: int) -> bytes:
    """Payload of an ERROR_OFFSET chunk."""
    return error_payload(value, text) + _U64.pack(offset)


def data_offset(offset: int) -> bytes:
    """What precedes the data in the payload of an OFFSET_DATA chunk."""
    return _U64.pack(offset)


def hole_payload(offset: int, length: int) -> bytes:
    """Payload of an OFFSET_HOLE chunk."""
    return _U64.pack(offset) + _U32.pack(length)
