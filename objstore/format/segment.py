"""Segments: a header page, records, and at the end of a sealed one a directory of its records. FORMAT.md, "Segment"."""

from __future__ import annotations

import struct
from array import array
from typing import Final, NamedTuple

from crc32c import crc32c

from objstore.errors import FormatError
from objstore.format.record import CRC_BYTES, DATA_KINDS, KIND_SHIFT, OP_BYTES, SOURCE_BYTES, RecordHeader
from objstore.units import BLOCK_BYTES

HEADER_MAGIC: Final = b"SHEEPSEG"
FOOTER_MAGIC: Final = b"SHEEPDIR"
HEADER: Final = struct.Struct("<8sII16sIIQQ16sHHIQ")
FOOTER: Final = struct.Struct("<8sI16sIIQQQQIIIIIIQI24x")
FOOTER_BYTES: Final = 128
ZONE_ID_BYTES: Final = 16
ZONES_MAX: Final = (BLOCK_BYTES - HEADER.size) // ZONE_ID_BYTES
DIRECTORY_RESERVE_PAGES: Final = 64
"""Pages of a segment beyond its data, for record headers and the directory; a segment that runs out of them is sealed
early, so this bounds the directory too."""
BLOCKS_MAX: Final = 4096
"""A map entry has 12 bits for the block inside a segment."""

assert HEADER.size == 88
assert FOOTER.size == FOOTER_BYTES


class SegmentHeader(NamedTuple):
    """Page 0 of every segment: who wrote it, when, and which zones hold it."""

    log: int
    segment: int
    generation: int
    epoch: int
    epoch_id: bytes
    copies: int
    blocks: int
    wall_us: int
    zones: tuple[bytes, ...]


class Directory(NamedTuple):
    """The directory of a sealed segment: all its operations in log order and the CRC of each of its blocks.

    words, counts, starts: one per operation (starts = block of its first data block, 0 without data).
    crcs: one per block of the body, 0 for header pages. sources: one per moved block, in order.
    record_blocks, record_crcs: where each record starts and the CRC of its header.
    """

    log: int
    segment: int
    generation: int
    first_position: int
    last_position: int
    durable_upto: int
    previous_crc: int
    wall_us: int
    crc: int
    words: array[int]
    counts: array[int]
    starts: array[int]
    crcs: array[int]
    sources: array[int]
    record_blocks: array[int]
    record_crcs: array[int]

    @property
    def last_crc(self) -> int:
        """CRC of the header of the last record (of the predecessor if there is none)."""
        return self.record_crcs[-1] if self.record_crcs else self.previous_crc


def encode_segment_header(header: SegmentHeader, store_id: bytes) -> bytes:
    """One page."""
    assert len(header.zones) <= ZONES_MAX
    page = HEADER.pack(
        HEADER_MAGIC,
        0,
        1,
        store_id,
        header.log,
        header.segment,
        header.generation,
        header.epoch,
        header.epoch_id,
        header.copies,
        len(header.zones),
        header.blocks,
        header.wall_us,
    ) + b"".join(header.zones)
    page = page.ljust(BLOCK_BYTES, b"\0")
    return page[:8] + crc32c(page).to_bytes(4, "little") + page[12:]


def decode_segment_header(page: bytes | memoryview, *, store_id: bytes, log: int, segment: int) -> SegmentHeader:
    """FormatError if the page is not the header of that segment."""
    page = bytes(page)
    if len(page) != BLOCK_BYTES or page[:8] != HEADER_MAGIC:
        raise FormatError(f"no segment header log={log} segment={segment}")
    fields = HEADER.unpack_from(page)
    (
        _,
        crc,
        version,
        found_store,
        found_log,
        found_segment,
        generation,
        epoch,
        epoch_id,
        copies,
        zones,
        blocks,
        wall_us,
    ) = fields
    if crc32c(page[:8] + b"\0\0\0\0" + page[12:]) != crc:
        raise FormatError(f"segment header damaged log={log} segment={segment}")
    if version != 1 or (found_store, found_log, found_segment) != (store_id, log, segment) or zones > ZONES_MAX:
        raise FormatError(f"segment header of another place log={log} segment={segment}")
    ids = tuple(page[HEADER.size + i * ZONE_ID_BYTES : HEADER.size + (i + 1) * ZONE_ID_BYTES] for i in range(zones))
    return SegmentHeader(log, segment, generation, epoch, epoch_id, copies, blocks, wall_us, ids)


class DirectoryBuilder:
    """Collects the directory of a segment while its records are written.

    Holds: `length_bytes` is the exact length that `encode` would give before padding.
    """

    def __init__(self, log: int, segment: int, generation: int, previous_crc: int) -> None:
        self.log = log
        self.segment = segment
        self.generation = generation
        self.previous_crc = previous_crc
        self.first_position = 0
        self.last_position = 0
        self.durable_upto = 0
        self.wall_us = 0
        self.words = array("Q")
        self.counts = array("I")
        self.starts = array("I")
        self.crcs = array("I", [0])
        self.sources = array("Q")
        self.record_blocks = array("I")
        self.record_crcs = array("I")

    @property
    def length_bytes(self) -> int:
        """Length of the directory so far, footer included."""
        ops = len(self.words)
        return directory_bytes(ops, len(self.sources), len(self.crcs), len(self.record_crcs))

    def add(
        self,
        *,
        block: int,
        crc: int,
        position: int,
        position_count: int,
        durable_upto: int,
        wall_us: int,
        words: array[int],
        counts: array[int],
        starts: array[int],
        crcs: array[int],
        sources: array[int],
    ) -> None:
        """One more record, whose header lies in `block`, right behind the last one."""
        assert block == len(self.crcs), "records follow each other without a gap"
        if not self.record_crcs:
            self.first_position = position
        self.last_position = position + position_count - 1
        self.durable_upto = max(self.durable_upto, durable_upto)
        self.wall_us = wall_us
        self.words.extend(words)
        self.counts.extend(counts)
        self.starts.extend(starts)
        self.crcs.append(0)
        self.crcs.extend(crcs)
        self.sources.extend(sources)
        self.record_blocks.append(block)
        self.record_crcs.append(crc)

    def add_header(self, header: RecordHeader) -> None:
        """One more record from its decoded header (recovery)."""
        self.add(
            block=header.block,
            crc=header.crc,
            position=header.position,
            position_count=header.position_count,
            durable_upto=header.durable_upto,
            wall_us=header.wall_us,
            words=header.words,
            counts=header.counts,
            starts=starts_of(header),
            crcs=header.crcs,
            sources=header.sources,
        )

    def finish(self, crc: int = 0) -> Directory:
        """The directory as it stands."""
        return Directory(
            self.log,
            self.segment,
            self.generation,
            self.first_position,
            self.last_position,
            self.durable_upto,
            self.previous_crc,
            self.wall_us,
            crc,
            self.words,
            self.counts,
            self.starts,
            self.crcs,
            self.sources,
            self.record_blocks,
            self.record_crcs,
        )

    def encode(self, store_id: bytes) -> tuple[bytes, int]:
        """(the directory, padded at its front to whole pages with the footer as its last 128 bytes; its CRC)."""
        table = b"".join(
            (
                self.words.tobytes(),
                self.sources.tobytes(),
                self.counts.tobytes(),
                self.starts.tobytes(),
                self.crcs.tobytes(),
                self.record_blocks.tobytes(),
                self.record_crcs.tobytes(),
            )
        )
        footer = FOOTER.pack(
            FOOTER_MAGIC,
            0,
            store_id,
            self.log,
            self.segment,
            self.generation,
            self.first_position,
            self.last_position,
            self.durable_upto,
            self.previous_crc,
            len(self.words),
            len(self.sources),
            len(self.crcs),
            len(self.record_crcs),
            crc32c(table),
            self.wall_us,
            len(table),
        )
        crc: int = crc32c(footer)
        footer = footer[:8] + crc.to_bytes(4, "little") + footer[12:]
        body = table + footer
        return body.rjust(-(-len(body) // BLOCK_BYTES) * BLOCK_BYTES, b"\0"), crc


def starts_of(header: RecordHeader) -> array[int]:
    """Block of the first data block of each operation of a record."""
    starts = array("I")
    at = header.block + 1
    for bits, count in zip(header.words, header.counts, strict=True):
        kind = bits >> KIND_SHIFT & 0xFF
        if kind in DATA_KINDS:
            starts.append(at)
            at += count
        else:
            starts.append(0)
    return starts


def directory_bytes(ops: int, sources: int, blocks: int, records: int) -> int:
    """Length of a directory, footer included, before padding to pages."""
    return ops * (OP_BYTES + 4) + sources * SOURCE_BYTES + blocks * CRC_BYTES + records * 8 + FOOTER_BYTES


class Footer(NamedTuple):
    """The last 128 bytes of a sealed segment."""

    generation: int
    first_position: int
    last_position: int
    durable_upto: int
    previous_crc: int
    ops: int
    sources: int
    blocks: int
    records: int
    table_crc: int
    wall_us: int
    table_bytes: int
    crc: int


def decode_footer(footer: bytes | bytearray | memoryview, *, store_id: bytes, log: int, segment: int) -> Footer | None:
    """None if these 128 bytes are not the footer of that segment (then it is not sealed)."""
    footer = bytes(footer)
    if footer[:8] != FOOTER_MAGIC:
        return None
    fields = FOOTER.unpack(footer)
    crc, found_store, found_log, found_segment = fields[1:5]
    if crc32c(footer[:8] + b"\0\0\0\0" + footer[12:]) != crc:
        return None
    if (found_store, found_log, found_segment) != (store_id, log, segment):
        return None
    (generation, first, last, durable, previous, ops, sources, blocks, records, table_crc, wall_us, table_bytes) = (
        fields[5:]
    )
    found = Footer(
        generation, first, last, durable, previous, ops, sources, blocks, records, table_crc, wall_us, table_bytes, crc
    )
    expected = directory_bytes(found.ops, found.sources, found.blocks, found.records) - FOOTER_BYTES
    return found if found.table_bytes == expected else None


def decode_directory(footer: Footer, table: bytes | memoryview, *, log: int, segment: int) -> Directory:
    """The directory from its table (the `footer.table_bytes` in front of the footer). FormatError if damaged."""
    table = bytes(table)
    if len(table) != footer.table_bytes or crc32c(table) != footer.table_crc:
        raise FormatError(f"segment directory damaged log={log} segment={segment}")
    arrays: list[array[int]] = []
    at = 0
    for code, count in (
        ("Q", footer.ops),
        ("Q", footer.sources),
        ("I", footer.ops),
        ("I", footer.ops),
        ("I", footer.blocks),
        ("I", footer.records),
        ("I", footer.records),
    ):
        part = array(code)
        end = at + count * part.itemsize
        part.frombytes(table[at:end])
        arrays.append(part)
        at = end
    words, sources, counts, starts, crcs, record_blocks, record_crcs = arrays
    return Directory(
        log,
        segment,
        footer.generation,
        footer.first_position,
        footer.last_position,
        footer.durable_upto,
        footer.previous_crc,
        footer.wall_us,
        footer.crc,
        words,
        counts,
        starts,
        crcs,
        sources,
        record_blocks,
        record_crcs,
    )
