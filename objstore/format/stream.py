"""The stream of a snapshot, or of what differs between two: frames out of ranges, ranges out of frames. STREAM.md.

Pure: no I/O. Every frame's checksum continues that of the one before, so a frame that is damaged, missing, doubled or
from another stream is noticed when it comes, and a stream that was cut short at its end.
"""

from collections.abc import Iterator
from enum import IntEnum
from struct import Struct
from typing import Final, NamedTuple, TypeVar

import msgspec
from crc32c import crc32c

from objstore.errors import FormatError, NewerFormat
from objstore.units import BLOCK_BYTES, KIB, MIB, VDI_BYTES_MAX

MAGIC: Final = b"SHEEPDIF"
VERSION: Final = 1
HEADER: Final = Struct("<8sII")
FRAME: Final = Struct("<IIQQII")
DATA_BYTES_MAX: Final = MIB
TEXT_BYTES_MAX: Final = 64 * KIB

T = TypeVar("T")

assert HEADER.size == 16
assert FRAME.size == 32


class Kind(IntEnum):
    """What a frame is."""

    BEGIN = 1
    DATA = 2
    HOLE = 3
    ZERO = 4
    END = 5
    FINISH = 6


class Begin(msgspec.Struct, frozen=True, kw_only=True):
    """What the ranges that follow make: contents `identity` out of contents `base`.

    base: "" = an empty disk. vdi, tag, index, created, copies, mode: of the snapshot and its VDI where it came from.
    """

    vdi: str
    size_bytes: int
    base: str
    identity: str
    tag: str = ""
    index: int = 0
    created: float = 0.0
    copies: int = 0
    mode: str = ""


class End(msgspec.Struct, frozen=True, kw_only=True):
    """How much there was."""

    data_bytes: int
    zero_bytes: int


class Range(NamedTuple):
    """A range of the disk and what it becomes; data: of DATA, `length_bytes` bytes."""

    kind: Kind
    offset_bytes: int
    length_bytes: int
    data: bytes = b""


class Encoder:
    """One stream, piece by piece: `begin`, then any number of ranges in ascending order, `end`; at last `finish`."""

    def __init__(self) -> None:
        start = HEADER.pack(MAGIC, VERSION, 0)[:12]
        self._crc = crc32c(start)
        self.header: Final = start + self._crc.to_bytes(4, "little")
        self._sections = 0
        self._data_bytes = 0
        self._zero_bytes = 0

    def begin(self, what: Begin) -> bytes:
        """The frame that describes what follows."""
        self._data_bytes = self._zero_bytes = 0
        return self._text(Kind.BEGIN, what)

    def data(self, offset_bytes: int, data: bytes) -> tuple[bytes, bytes]:
        """A frame in two parts; at most DATA_BYTES_MAX."""
        self._data_bytes += len(data)
        return self._frame(Kind.DATA, offset_bytes, len(data), data), data

    def zeros(self, kind: Kind, offset_bytes: int, length_bytes: int) -> bytes:
        """kind: HOLE or ZERO."""
        self._zero_bytes += length_bytes
        return self._frame(kind, offset_bytes, length_bytes, b"")

    def end(self) -> bytes:
        """The end of what `begin` began."""
        self._sections += 1
        return self._text(Kind.END, End(data_bytes=self._data_bytes, zero_bytes=self._zero_bytes))

    def finish(self) -> bytes:
        """The end of the stream."""
        return self._frame(Kind.FINISH, self._sections, 0, b"")

    def _text(self, kind: Kind, value: Begin | End) -> bytes:
        text = msgspec.json.encode(value)
        return self._frame(kind, 0, 0, text) + text

    def _frame(self, kind: Kind, offset: int, length: int, payload: bytes) -> bytes:
        rest = FRAME.pack(0, kind, offset, length, len(payload), 0)[4:]
        self._crc = frame_crc(self._crc, rest, payload)
        return self._crc.to_bytes(4, "little") + rest


def frame_crc(previous: int, rest: bytes, payload: bytes | bytearray | memoryview) -> int:
    """CRC of a frame: over that of the frame before, its own header behind the CRC, and its payload."""
    return crc32c(payload, crc32c(previous.to_bytes(4, "little") + rest))


class Decoder:
    """One stream out of bytes that arrive in pieces of any length. FormatError: it is damaged.

    finished: its end has come, and all of it was as it must be.
    """

    def __init__(self) -> None:
        self.finished = False
        self._input = bytearray()
        self._at = 0
        """Of the input, so much is done with."""
        self._taken = 0
        """Bytes of the stream in front of the input, for messages."""
        self._crc: int | None = None
        self._begun: Begin | None = None
        self._reached = 0
        """End of the last range."""
        self._sections = 0
        self._data_bytes = 0
        self._zero_bytes = 0

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Begin | Range | End]:
        """More bytes of the stream; what they complete. To be used up before the next call."""
        self._taken += self._at
        del self._input[: self._at]
        self._at = 0
        self._input += data
        while (found := self._next()) is not None:
            if not isinstance(found, bool):
                yield found

    def close(self) -> None:
        """No more bytes will come. FormatError: that is too early."""
        if not self.finished:
            raise FormatError(f"the stream ends after {self._taken + len(self._input)} bytes, before its end")

    def _next(self) -> Begin | Range | End | bool | None:
        """One thing out of the input; True: something that nobody is told; None: more bytes are needed."""
        here = len(self._input) - self._at
        if self.finished:
            if here:
                raise self._bad("there are bytes behind its end")
            return None
        if self._crc is None:
            if here < HEADER.size:
                return None
            self._crc = self._header()
            return True
        if here < FRAME.size:
            return None
        crc, number, offset, length, payload_bytes, _ = FRAME.unpack_from(self._input, self._at)
        if payload_bytes > DATA_BYTES_MAX or here < FRAME.size + payload_bytes:
            if payload_bytes > DATA_BYTES_MAX:
                raise self._bad(f"a frame of {payload_bytes} bytes")
            return None
        start = self._at + FRAME.size
        rest = bytes(self._input[self._at + 4 : start])
        payload = bytes(memoryview(self._input)[start : start + payload_bytes])
        if frame_crc(self._crc, rest, payload) != crc:
            raise self._bad("a checksum is wrong")
        try:
            kind = Kind(number)
        except ValueError:
            raise self._bad(f"a frame of unknown kind {number}") from None
        found = self._frame(kind, offset, length, payload)
        self._crc = crc
        self._at = start + payload_bytes
        return found

    def _header(self) -> int:
        magic, version, crc = HEADER.unpack_from(self._input, self._at)
        if magic != MAGIC:
            raise self._bad("it does not begin as one does")
        if crc32c(bytes(self._input[self._at : self._at + 12])) != crc:
            raise self._bad("a checksum is wrong")
        if version != VERSION:
            raise NewerFormat(f"the stream has version {version}, this program knows {VERSION}")
        self._at += HEADER.size
        number: int = crc
        return number

    def _frame(self, kind: Kind, offset: int, length: int, payload: bytes) -> Begin | Range | End | bool:
        begun = self._begun
        if kind is Kind.FINISH:
            if begun is not None or offset != self._sections or length or payload:
                raise self._bad("its end comes at the wrong place")
            self.finished = True
            return True
        if kind is Kind.BEGIN:
            if begun is not None:
                raise self._bad("two beginnings without an end between them")
            self._begun = begun = self._decoded(payload, Begin)
            if not 0 < begun.size_bytes <= VDI_BYTES_MAX or not begun.identity:
                raise self._bad("a beginning that is impossible")
            self._reached = self._data_bytes = self._zero_bytes = 0
            return begun
        if begun is None:
            raise self._bad("a range without a beginning")
        if kind is Kind.END:
            end = self._decoded(payload, End)
            if (end.data_bytes, end.zero_bytes) != (self._data_bytes, self._zero_bytes):
                raise self._bad("ranges are missing")
            self._begun = None
            self._sections += 1
            return end
        if not length or offset < self._reached or offset + length > begun.size_bytes or offset % BLOCK_BYTES:
            raise self._bad(f"an impossible range offset={offset} length={length}")
        if len(payload) != (length if kind is Kind.DATA else 0):
            raise self._bad(f"a range of {length} bytes with {len(payload)} bytes of data")
        self._reached = offset + length
        if kind is Kind.DATA:
            self._data_bytes += length
        else:
            self._zero_bytes += length
        return Range(kind, offset, length, payload)

    def _decoded(self, payload: bytes, kind: type[T]) -> T:
        if len(payload) > TEXT_BYTES_MAX:
            raise self._bad("a description that is too long")
        try:
            return msgspec.json.decode(payload, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self._bad(f"a description can't be read: {error}") from error

    def _bad(self, what: str) -> FormatError:
        return FormatError(f"this is no stream of a disk, or it is damaged: {what} at={self._taken + self._at}")
