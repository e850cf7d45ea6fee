"""The numbers of the NBD protocol and the rules that every reply must keep, written from the specification alone.

Source: proto.md of the NBD project ("Values", "Structured reply types", "Request types") and, for extended headers, the
same file on the branch extension-ext-header. Nothing here comes from the server's code, so that a misreading of the
text in one of the two shows up as a failing test. SpecViolation names the rule that was broken.
"""

import struct
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag

NBDMAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF
EXTENDED_REQUEST_MAGIC = 0x21E41C71
EXTENDED_REPLY_MAGIC = 0x6E8A278C

STRING_BYTES_MAX = 4096
STATUS_EXTENTS_MAX = 1 << 20
DEFAULT_PAYLOAD_BYTES_MAX = 1 << 25
DF_BYTES_ALWAYS = 65536

GREETING = struct.Struct(">QQH")
OPTION_HEADER = struct.Struct(">QII")
OPTION_REPLY_HEADER = struct.Struct(">QIII")
REQUEST = struct.Struct(">IHHQQI")
EXTENDED_REQUEST = struct.Struct(">IHHQQQ")
SIMPLE_REPLY = struct.Struct(">IIQ")
STRUCTURED_REPLY = struct.Struct(">IHHQI")
EXTENDED_REPLY = struct.Struct(">IHHQQQ")


class SpecViolation(AssertionError):
    """The server broke a rule of proto.md that holds for every message."""


def rule(kept: bool, text: str) -> None:
    if not kept:
        raise SpecViolation(text)


class HandshakeFlag(IntFlag):
    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class Option(IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    PEEK_EXPORT = 4
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class Rep(IntEnum):
    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 2**31 + 1
    ERR_POLICY = 2**31 + 2
    ERR_INVALID = 2**31 + 3
    ERR_PLATFORM = 2**31 + 4
    ERR_TLS_REQD = 2**31 + 5
    ERR_UNKNOWN = 2**31 + 6
    ERR_SHUTDOWN = 2**31 + 7
    ERR_BLOCK_SIZE_REQD = 2**31 + 8
    ERR_TOO_BIG = 2**31 + 9
    ERR_EXT_HEADER_REQD = 2**31 + 10


class Info(IntEnum):
    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class ExportFlag(IntFlag):
    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Command(IntEnum):
    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    RESIZE = 8


class CommandFlag(IntFlag):
    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class ChunkType(IntEnum):
    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = 2**15 + 1
    ERROR_OFFSET = 2**15 + 2


REPLY_FLAG_DONE = 1
STATE_HOLE = 1
STATE_ZERO = 2


class Err(IntEnum):
    OK = 0
    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


WRITE_COMMANDS = (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES)


def text_of(raw: bytes, what: str) -> str:
    """Decode a string of the protocol. Section "Conventions": UTF-8, no NUL, at most 4096 bytes."""
    rule(len(raw) <= STRING_BYTES_MAX, f"{what}: {len(raw)} bytes, a string has at most 4096")
    rule(b"\0" not in raw, f"{what}: holds a NUL")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SpecViolation(f"{what}: not UTF-8: {raw[:80]!r}") from error


@dataclass
class OptionReply:
    """One reply of option haggling, checked for the form that its type prescribes ("Option reply types")."""

    option: int
    type: Rep
    data: bytes

    @property
    def is_error(self) -> bool:
        return bool(self.type & 1 << 31)

    @property
    def is_final(self) -> bool:
        return self.is_error or self.type == Rep.ACK

    def check(self) -> None:
        if self.is_error:
            text_of(self.data, "error message of an option reply")
        elif self.type == Rep.ACK:
            rule(not self.data, "NBD_REP_ACK carries no data")
        elif self.type == Rep.SERVER:
            rule(len(self.data) >= 4, "NBD_REP_SERVER shorter than its name length")
            (name_bytes,) = struct.unpack_from(">I", self.data)
            rule(name_bytes <= len(self.data) - 4, "NBD_REP_SERVER: name longer than the reply")
            text_of(self.data[4 : 4 + name_bytes], "export name")
            text_of(self.data[4 + name_bytes :], "export description")
        elif self.type == Rep.META_CONTEXT:
            rule(len(self.data) > 4, "NBD_REP_META_CONTEXT without a name")
            name = text_of(self.data[4:], "metadata context")
            rule(":" in name and not name.startswith(":"), f"metadata context {name!r} lacks a namespace")
        elif self.type == Rep.INFO:
            rule(len(self.data) >= 2, "NBD_REP_INFO shorter than its type")

    def server(self) -> tuple[str, str]:
        """Name and description of an NBD_REP_SERVER."""
        (name_bytes,) = struct.unpack_from(">I", self.data)
        return self.data[4 : 4 + name_bytes].decode(), self.data[4 + name_bytes :].decode()

    def context(self) -> tuple[int, str]:
        """Id and name of an NBD_REP_META_CONTEXT."""
        return struct.unpack_from(">I", self.data)[0], self.data[4:].decode()


@dataclass
class ExportInfo:
    """What the replies to one INFO or GO said."""

    final: Rep
    message: str
    size_bytes: int | None = None
    flags: ExportFlag = field(default_factory=lambda: ExportFlag(0))
    name: str | None = None
    description: str | None = None
    block_sizes: tuple[int, int, int] | None = None
    raw: list[bytes] = field(default_factory=list)
    """The NBD_REP_INFO payloads, sorted: two calls gave the same information if these are equal."""

    @property
    def accepted(self) -> bool:
        return self.final == Rep.ACK

    @classmethod
    def parse(cls, replies: list[OptionReply]) -> "ExportInfo":
        """Check the replies to INFO or GO by the rules of NBD_REP_INFO and put them together."""
        final = replies[-1]
        info = cls(final.type, final.data.decode())
        for reply in replies[:-1]:
            rule(reply.type == Rep.INFO, f"reply type {reply.type} before the end of INFO or GO")
            info._take(reply.data)
        info.raw = sorted(reply.data for reply in replies[:-1])
        kinds = [data[:2] for data in info.raw]
        rule(len(kinds) == len(set(kinds)), "an information type SHOULD appear only once")
        if info.accepted:
            rule(info.size_bytes is not None, "NBD_INFO_EXPORT MUST come before NBD_REP_ACK")
        if info.final == Rep.ERR_UNKNOWN:
            rule(not info.raw, "no NBD_REP_INFO SHOULD precede NBD_REP_ERR_UNKNOWN")
        return info

    def _take(self, data: bytes) -> None:
        (kind,) = struct.unpack_from(">H", data)
        if kind == Info.EXPORT:
            rule(len(data) == 12, "NBD_INFO_EXPORT MUST be 12 bytes long")
            _, self.size_bytes, flags = struct.unpack(">HQH", data)
            self.flags = check_export_flags(flags)
        elif kind == Info.NAME:
            self.name = text_of(data[2:], "NBD_INFO_NAME")
        elif kind == Info.DESCRIPTION:
            self.description = text_of(data[2:], "NBD_INFO_DESCRIPTION")
        elif kind == Info.BLOCK_SIZE:
            rule(len(data) == 14, "NBD_INFO_BLOCK_SIZE MUST be 14 bytes long")
            _, minimum, preferred, maximum = struct.unpack(">HIII", data)
            self.block_sizes = check_block_sizes(minimum, preferred, maximum)


def check_export_flags(value: int) -> ExportFlag:
    """Section "Transmission flags": HAS_FLAGS always; FAST_ZERO only with WRITE_ZEROES; no undefined bit."""
    flags = ExportFlag(value)
    rule(bool(flags & ExportFlag.HAS_FLAGS), "NBD_FLAG_HAS_FLAGS MUST be 1")
    rule(not value >> 13, f"undefined transmission flags {value:#x}")
    if flags & ExportFlag.SEND_FAST_ZERO:
        rule(bool(flags & ExportFlag.SEND_WRITE_ZEROES), "SEND_FAST_ZERO MUST be 0 without SEND_WRITE_ZEROES")
    return flags


def check_block_sizes(minimum: int, preferred: int, maximum: int) -> tuple[int, int, int]:
    """Section "Size constraints"."""
    rule(minimum.bit_count() == 1 and minimum <= 1 << 16, f"minimum block size {minimum}")
    rule(preferred.bit_count() == 1 and preferred >= max(512, minimum), f"preferred block size {preferred}")
    rule(maximum >= preferred, f"maximum payload {maximum} below the preferred block size")
    return minimum, preferred, maximum


@dataclass(eq=False)
class Request:
    """A request as it was sent. length_bytes is the effect length, whatever the header's length field announced."""

    command: int
    flags: int
    cookie: int
    offset_bytes: int
    length_bytes: int


@dataclass
class ReplyError:
    error: Err
    message: str
    offset_bytes: int | None = None


@dataclass
class Chunk:
    flags: int
    type: int
    payload: bytes

    @property
    def done(self) -> bool:
        return bool(self.flags & REPLY_FLAG_DONE)


class Reply:
    """The reply to one request, put together from its chunks; each is checked as it comes."""

    def __init__(self, request: Request, context_ids: frozenset[int], export_bytes: int) -> None:
        self.request = request
        self.simple = False
        self.chunks: list[Chunk] = []
        self.errors: list[ReplyError] = []
        self.data = bytearray()
        self.extents: dict[int, list[tuple[int, int]]] = {}
        self._context_ids = context_ids
        self._export_bytes = export_bytes
        self._content: list[tuple[int, int]] = []

    @property
    def error(self) -> Err:
        return self.errors[0].error if self.errors else Err.OK

    def valid_ranges(self) -> list[tuple[int, int]]:
        """(begin, end) within the request that the client may trust: NBD_CMD_READ, "Structured replies".

        A content chunk is valid up to the first error offset in it; nothing is after an error without an offset.
        """
        offsets = [failure.offset_bytes for failure in self.errors]
        if None in offsets:
            return []
        begin_of_request = self.request.offset_bytes
        ranges = []
        for begin, end in sorted(self._content):
            inside = [where - begin_of_request for where in offsets if where is not None]
            valid_end = min([where for where in inside if begin <= where < end], default=end)
            if valid_end > begin:
                ranges.append((begin, valid_end))
        return ranges

    def take_simple(self, error: int, data: bytes) -> None:
        self.simple = True
        if error:
            self.errors.append(ReplyError(check_error(error), ""))
        self.data[:] = data

    def take(self, chunk: Chunk, *, extended: bool) -> None:
        """One more chunk of a structured or extended reply. Section "Structured reply types"."""
        rule(chunk.flags & ~REPLY_FLAG_DONE == 0, f"undefined reply flags {chunk.flags:#x}")
        self.chunks.append(chunk)
        if chunk.type == ChunkType.NONE:
            rule(chunk.done, "NBD_REPLY_TYPE_NONE MUST be marked done")
            rule(not chunk.payload, "NBD_REPLY_TYPE_NONE has no payload")
        elif chunk.type in (ChunkType.OFFSET_DATA, ChunkType.OFFSET_HOLE):
            self._take_content(chunk)
        elif chunk.type in (ChunkType.BLOCK_STATUS, ChunkType.BLOCK_STATUS_EXT):
            rule((chunk.type == ChunkType.BLOCK_STATUS_EXT) == extended, f"status chunk type {chunk.type}")
            self._take_status(chunk, extended)
        elif chunk.type in (ChunkType.ERROR, ChunkType.ERROR_OFFSET):
            self._take_error(chunk)
        else:
            raise SpecViolation(f"unknown chunk type {chunk.type}")
        if chunk.done:
            self._check_complete()

    def _take_content(self, chunk: Chunk) -> None:
        rule(self.request.command == Command.READ, "content chunk in a reply to something that is no read")
        if chunk.type == ChunkType.OFFSET_DATA:
            rule(len(chunk.payload) >= 9, "NBD_REPLY_TYPE_OFFSET_DATA shorter than 9")
            start, length = struct.unpack_from(">Q", chunk.payload)[0], len(chunk.payload) - 8
        else:
            rule(len(chunk.payload) == 12, "NBD_REPLY_TYPE_OFFSET_HOLE MUST be exactly 12 long")
            start, length = struct.unpack(">QI", chunk.payload)
            rule(length > 0, "hole of no length")
        if not self.data:
            self.data = bytearray(self.request.length_bytes)
        begin = start - self.request.offset_bytes
        end = begin + length
        rule(begin >= 0 and end <= self.request.length_bytes, "content chunk outside of the request")
        for other_begin, other_end in self._content:
            rule(end <= other_begin or begin >= other_end, "content chunks overlap")
        for failure in self.errors:
            where = failure.offset_bytes
            rule(where is None or not start <= where < start + length, "content chunk over an earlier error chunk")
        self._content.append((begin, end))
        if chunk.type == ChunkType.OFFSET_DATA:
            self.data[begin:end] = memoryview(chunk.payload)[8:]
        if self.request.flags & CommandFlag.DF:
            rule(len(self._content) == 1, "more than one content chunk despite NBD_CMD_FLAG_DF")

    def _take_status(self, chunk: Chunk, extended: bool) -> None:
        request = self.request
        rule(request.command == Command.BLOCK_STATUS, "status chunk in a reply to something else")
        head, step = (8, 16) if extended else (4, 8)
        rule(len(chunk.payload) > head and (len(chunk.payload) - head) % step == 0, "length of a status chunk")
        (context_id,) = struct.unpack_from(">I", chunk.payload)
        rule(context_id in self._context_ids, f"status for context id {context_id}, which was not selected")
        rule(context_id not in self.extents, "two status chunks for one context")
        extents = list(struct.iter_unpack(">QQ" if extended else ">II", memoryview(chunk.payload)[head:]))
        if extended:
            (count,) = struct.unpack_from(">I", chunk.payload, 4)
            rule(count == len(extents), "descriptor count differs from the descriptors")
            rule(all(status < 1 << 32 for _, status in extents), "high half of a 32-bit status")
        rule(len(extents) <= STATUS_EXTENTS_MAX, "more than 2^20 extents in a chunk")
        rule(all(length > 0 for length, _ in extents), "extent of no length")
        covered = sum(length for length, _ in extents)
        rule(covered - extents[-1][0] < request.length_bytes, "an extent begins past the request")
        rule(request.offset_bytes + covered <= self._export_bytes, "extents reach past the export")
        if request.flags & CommandFlag.REQ_ONE:
            rule(len(extents) == 1, "NBD_CMD_FLAG_REQ_ONE: exactly one extent")
            rule(covered <= request.length_bytes, "NBD_CMD_FLAG_REQ_ONE: extent longer than the request")
        self.extents[context_id] = extents

    def _take_error(self, chunk: Chunk) -> None:
        tail = 8 if chunk.type == ChunkType.ERROR_OFFSET else 0
        rule(len(chunk.payload) >= 6 + tail, "error chunk too short")
        error, message_bytes = struct.unpack_from(">IH", chunk.payload)
        rule(error != 0, "error chunk MUST have a nonzero error")
        rule(message_bytes <= len(chunk.payload) - 6 - tail, "message longer than its error chunk")
        message = text_of(chunk.payload[6 : 6 + message_bytes], "error message")
        where = None
        if tail:
            (where,) = struct.unpack_from(">Q", chunk.payload, 6 + message_bytes)
            begin = self.request.offset_bytes
            rule(begin <= where < begin + self.request.length_bytes, "error offset outside of the request")
            rule(where not in [failure.offset_bytes for failure in self.errors], "error offset repeated")
        self.errors.append(ReplyError(check_error(error), message, where))

    def _check_complete(self) -> None:
        offsets = [failure.offset_bytes for failure in self.errors]
        if None in offsets:
            rule(len(offsets) == 1, "NBD_REPLY_TYPE_ERROR SHOULD be the only error chunk")
        if self.errors:
            return
        if self.request.command == Command.READ:
            covered = sum(end - begin for begin, end in self._content)
            rule(covered == self.request.length_bytes, "read succeeded without covering the whole request")
        if self.request.command == Command.BLOCK_STATUS:
            rule(self.extents.keys() == self._context_ids, "exactly one status chunk per selected context")


def check_error(error: int) -> Err:
    """Section "Error values": only eight values are allowed."""
    try:
        return Err(error)
    except ValueError as unknown:
        raise SpecViolation(f"error value {error} is not among those allowed") from unknown
