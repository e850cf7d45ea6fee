"""Records of a log: one header page, then 4 KiB data blocks. FORMAT.md, "Record".

A record is what one hand-over to the zones appends. Its header carries the operations of the requests in it, in log
order, the CRC of every data block, and a CRC of its own that binds store, log, segment, place and predecessor.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from enum import IntEnum
from typing import Final, NamedTuple

from crc32c import crc32c

from objstore.errors import FormatError
from objstore.units import BLOCK_BYTES

MAGIC: Final = b"SHEEPREC"
HEADER: Final = struct.Struct("<8sHHI16sIIQQIIIIQIIQ32x")
HEADER_BYTES: Final = 128
CRC_OFFSET: Final = 12
RECORD_DATA_BLOCKS_MAX: Final = 256
"""1 MiB of data: about what one write call should carry (DESIGN.md, "Record size")."""
TABLE_BYTES_MAX: Final = BLOCK_BYTES - HEADER_BYTES
OP_BYTES: Final = 12
CRC_BYTES: Final = 4
SOURCE_BYTES: Final = 8
LBA_MASK: Final = (1 << 48) - 1
KIND_SHIFT: Final = 48
FLAG_SHIFT: Final = 56
COUNT_MAX: Final = (1 << 32) - 1

assert HEADER.size == HEADER_BYTES


class Kind(IntEnum):
    """What an operation of a record does to its range of blocks."""

    WRITE = 1
    TRIM = 2
    ZERO = 3
    MOVE = 4
    ENTRY = 5


DATA_KINDS: Final = (Kind.WRITE, Kind.MOVE, Kind.ENTRY)
"""Operations that bring data blocks."""


class Flag(IntEnum):
    """Marks of a request that takes several operations: PART on all but its last, FIRST also on its first, LAST on its
    last. A request of one operation has none. Whatever has PART takes effect only when its LAST is reached."""

    PART = 1
    FIRST = 2
    LAST = 4


class RecordHeader(NamedTuple):
    """A decoded header. words, counts: one per operation; crcs: one per data block; sources: one per moved block."""

    log: int
    segment: int
    generation: int
    block: int
    position: int
    position_count: int
    durable_upto: int
    previous_crc: int
    wall_us: int
    crc: int
    words: array[int]
    counts: array[int]
    crcs: array[int]
    sources: array[int]

    @property
    def blocks(self) -> int:
        """Blocks that the record takes, header included."""
        return 1 + len(self.crcs)

    @property
    def last_position(self) -> int:
        """Position of the record's last request."""
        return self.position + self.position_count - 1


def word(kind: int, lba: int, flags: int = 0) -> int:
    """First 64 bits of an operation: block number 48, kind 8, flags 8."""
    return lba | kind << KIND_SHIFT | flags << FLAG_SHIFT


def encode_header(
    into: memoryview,
    *,
    store_id: bytes,
    log: int,
    segment: int,
    generation: int,
    block: int,
    position: int,
    position_count: int,
    durable_upto: int,
    previous_crc: int,
    wall_us: int,
    words: Sequence[int],
    counts: Sequence[int],
    crcs: Sequence[int],
    sources: Sequence[int],
) -> int:
    """Write one header page into `into` (BLOCK_BYTES long) and return its CRC."""
    table = b"".join(
        (
            array("Q", words).tobytes(),
            array("Q", sources).tobytes(),
            array("I", counts).tobytes(),
            array("I", crcs).tobytes(),
        )
    )
    assert len(table) <= TABLE_BYTES_MAX, "the record's tables must fit its header page"
    head = HEADER.pack(
        MAGIC,
        1,
        0,
        0,
        store_id,
        log,
        segment,
        generation,
        position,
        position_count,
        len(words),
        len(crcs),
        len(sources),
        durable_upto,
        previous_crc,
        block,
        wall_us,
    )
    page = (head + table).ljust(BLOCK_BYTES, b"\0")
    crc: int = crc32c(page)
    into[:] = page
    into[CRC_OFFSET : CRC_OFFSET + 4] = crc.to_bytes(4, "little")
    return crc


def decode_header(page: bytes | memoryview, *, store_id: bytes, log: int, segment: int, block: int) -> RecordHeader:
    """Decode and verify one header page read from `block` of (log, segment). FormatError if it is not that record."""
    if bytes(page[:8]) != MAGIC or len(page) != BLOCK_BYTES:
        raise FormatError(f"no record here log={log} segment={segment} block={block}")
    (
        _,
        pages,
        zero,
        crc,
        found_store,
        found_log,
        found_segment,
        generation,
        position,
        position_count,
        ops,
        data,
        source_count,
        durable_upto,
        previous_crc,
        found_block,
        wall_us,
    ) = HEADER.unpack_from(page)
    checked = bytes(page[:CRC_OFFSET]) + b"\0\0\0\0" + bytes(page[CRC_OFFSET + 4 :])
    if crc32c(checked) != crc:
        raise FormatError(f"record header damaged log={log} segment={segment} block={block}")
    if (found_store, found_log, found_segment, found_block) != (store_id, log, segment, block):
        raise FormatError(f"record of another place log={log} segment={segment} block={block}")
    words_end = HEADER_BYTES + 8 * ops
    sources_end = words_end + 8 * source_count
    counts_end = sources_end + 4 * ops
    crcs_end = counts_end + 4 * data
    if pages != 1 or zero or crcs_end > BLOCK_BYTES or data > RECORD_DATA_BLOCKS_MAX:
        raise FormatError(f"record header impossible log={log} segment={segment} block={block}")
    return RecordHeader(
        log,
        segment,
        generation,
        block,
        position,
        position_count,
        durable_upto,
        previous_crc,
        wall_us,
        crc,
        array("Q", bytes(page[HEADER_BYTES:words_end])),
        array("I", bytes(page[sources_end:counts_end])),
        array("I", bytes(page[counts_end:crcs_end])),
        array("Q", bytes(page[words_end:sources_end])),
    )
