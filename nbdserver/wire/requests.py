"""Request headers of the transmission phase (proto.md, "Request message"; extended headers: proto-ext-header.md)."""

import struct

from nbdserver.wire.constants import EXTENDED_REQUEST_MAGIC, REQUEST_MAGIC

COMPACT = struct.Struct(">IHHQQI")
"""Magic, flags, command, cookie, offset, length."""
EXTENDED = struct.Struct(">IHHQQQ")

assert COMPACT.size == 28
assert EXTENDED.size == 32

_PAYLOAD_EFFECT_LENGTH = struct.Struct(">Q")


def pack(command: int, flags: int, cookie: int, offset: int, length: int, *, extended: bool = False) -> bytes:
    """A request header as a client sends it (tests and tools; the server only decodes)."""
    if extended:
        return EXTENDED.pack(EXTENDED_REQUEST_MAGIC, flags, command, cookie, offset, length)
    return COMPACT.pack(REQUEST_MAGIC, flags, command, cookie, offset, length)


def decode_status_payload(payload: memoryview) -> tuple[int, tuple[int, ...]]:
    """Effect length and context ids out of the payload of an extended BLOCK_STATUS. ValueError."""
    if len(payload) < 8 or len(payload) % 4:
        raise ValueError(f"payload of a block status request is 8 + 4 n bytes, not {len(payload)}")
    (length,) = _PAYLOAD_EFFECT_LENGTH.unpack_from(payload)
    return length, struct.unpack_from(f">{(len(payload) - 8) // 4}I", payload, 8)
