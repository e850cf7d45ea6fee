"""Bytes of the handshake phase <-> values: greeting, options, replies to them.

Spec: proto.md, "Newstyle negotiation", "Fixed newstyle negotiation", "Option types", "Option reply types".
Decoders raise ValueError for data that lies about its own lengths or holds no proper string; they never keep a view of
their input.
"""

import struct
from collections.abc import Sequence
from typing import NamedTuple

from nbdserver.wire.constants import (
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    PASSWD_MAGIC,
    STRING_BYTES_MAX,
    Info,
    OptionReply,
)

GREETING = struct.Struct(">QQH")
CLIENT_FLAGS = struct.Struct(">I")
OPTION_HEADER = struct.Struct(">QII")
"""Magic, option, length of its data."""
OPTION_REPLY_HEADER = struct.Struct(">QIII")
"""Magic, option, reply type, length of its data."""
EXPORT_NAME_REPLY = struct.Struct(">QH")
EXPORT_NAME_ZEROES = bytes(124)

_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")
_INFO_EXPORT = struct.Struct(">HQH")
_INFO_BLOCK_SIZE = struct.Struct(">HIII")

assert OPTION_HEADER.size == 16
assert OPTION_REPLY_HEADER.size == 20
assert _INFO_EXPORT.size == 12
assert _INFO_BLOCK_SIZE.size == 14


class InfoRequest(NamedTuple):
    """Data of INFO and GO. wanted: the requested information types, unknown ones included, repetitions dropped."""

    name: str
    wanted: tuple[int, ...]


class ContextRequest(NamedTuple):
    """Data of LIST_META_CONTEXT and SET_META_CONTEXT."""

    name: str
    queries: tuple[str, ...]


def greeting(handshake_flags: int) -> bytes:
    """What a newstyle server sends first."""
    return GREETING.pack(PASSWD_MAGIC, OPTION_MAGIC, handshake_flags)


def text_bytes(text: str, bytes_max: int = STRING_BYTES_MAX) -> bytes:
    """`text` as a string of the protocol: NUL replaced, cut at a character so that it takes at most bytes_max bytes."""
    encoded = text.replace("\0", "\ufffd").encode("utf-8", "replace")
    if len(encoded) <= bytes_max:
        return encoded
    return encoded[:bytes_max].decode("utf-8", "ignore").encode()


def decode_string(data: bytes) -> str:
    """A string of the protocol: at most 4096 bytes of UTF-8 without NUL. ValueError."""
    if len(data) > STRING_BYTES_MAX:
        raise ValueError(f"string is too long bytes={len(data)} bytes_max={STRING_BYTES_MAX}")
    if 0 in data:
        raise ValueError("string holds a NUL")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"string is not UTF-8: {error.reason} at byte {error.start}") from error


def decode_info_request(data: bytes) -> InfoRequest:
    """Data of INFO or GO. ValueError."""
    name, at = _counted_string(data, 0)
    if len(data) < at + 2:
        raise ValueError("number of information requests is missing")
    (count,) = _U16.unpack_from(data, at)
    if len(data) != at + 2 + 2 * count:
        raise ValueError(f"{count} information requests announced, {len(data) - at - 2} bytes of them present")
    return InfoRequest(name, tuple(dict.fromkeys(struct.unpack_from(f">{count}H", data, at + 2))))


def decode_context_request(data: bytes) -> ContextRequest:
    """Data of LIST_META_CONTEXT or SET_META_CONTEXT. ValueError, also for a query without a namespace."""
    name, at = _counted_string(data, 0)
    if len(data) < at + 4:
        raise ValueError("number of queries is missing")
    (count,) = _U32.unpack_from(data, at)
    at += 4
    if count * 4 > len(data) - at:
        raise ValueError(f"{count} queries announced, {len(data) - at} bytes of them present")
    queries = []
    for _ in range(count):
        query, at = _counted_string(data, at)
        if query.find(":") < 1:
            raise ValueError("query has no namespace")
        queries.append(query)
    if at != len(data):
        raise ValueError(f"{len(data) - at} bytes behind the last query")
    return ContextRequest(name, tuple(queries))


def _counted_string(data: bytes, at: int) -> tuple[str, int]:
    """The string at `at` with its length in front, and the position behind it."""
    if len(data) < at + 4:
        raise ValueError("length of a string is missing")
    (length,) = _U32.unpack_from(data, at)
    at += 4
    if length > len(data) - at:
        raise ValueError(f"string of {length} bytes announced, {len(data) - at} present")
    return decode_string(data[at : at + length]), at + length


def reply(option: int, kind: int, data: bytes = b"") -> bytes:
    """One reply to `option`."""
    return OPTION_REPLY_HEADER.pack(OPTION_REPLY_MAGIC, option, kind, len(data)) + data


def reply_error(option: int, kind: int, text: str) -> bytes:
    """An error reply with a text for people."""
    return reply(option, kind, text_bytes(text))


def reply_server(option: int, name: str, description: str) -> bytes:
    """One export of a list."""
    encoded = name.encode()
    return reply(option, OptionReply.SERVER, _U32.pack(len(encoded)) + encoded + text_bytes(description))


def reply_context(option: int, context_id: int, name: str) -> bytes:
    """One metadata context."""
    return reply(option, OptionReply.META_CONTEXT, _U32.pack(context_id) + name.encode())


def info_export(size_bytes: int, transmission_flags: int) -> bytes:
    """Data of an INFO reply of type EXPORT."""
    return _INFO_EXPORT.pack(Info.EXPORT, size_bytes, transmission_flags)


def info_text(kind: Info, text: str) -> bytes:
    """Data of an INFO reply of type NAME or DESCRIPTION."""
    return _U16.pack(kind) + text_bytes(text)


def info_block_size(sizes_bytes: Sequence[int]) -> bytes:
    """Data of an INFO reply of type BLOCK_SIZE: minimum, preferred, maximum payload."""
    return _INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, *sizes_bytes)


def export_name_reply(size_bytes: int, transmission_flags: int, *, zeroes: bool) -> bytes:
    """The whole answer to EXPORT_NAME."""
    return EXPORT_NAME_REPLY.pack(size_bytes, transmission_flags) + (EXPORT_NAME_ZEROES if zeroes else b"")
