"""Bytes of segments, records, checkpoints and map pages, decoded as FORMAT.md lays them out.

Every function takes bytes and returns values, or raises Damaged with what is wrong. Nothing here knows the store's own
decoders: where the two disagree, one of them or FORMAT.md is wrong.
"""

import struct
from collections.abc import Collection, Sequence
from typing import Final, NamedTuple

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

PAGE: Final = 4096
VERSION: Final = 1
FOOTER_BYTES: Final = 128
SEGMENT_BLOCKS_MAX: Final = 4096
SEGMENT_BYTES_MAX: Final = 64 << 20
"""More than a segment's file can have: 16 MiB of blocks, and 1.4 million TRIMs and ZEROs with 16 bytes each."""
RECORD_BLOCKS_MAX: Final = 256
RECORD_TABLE_BYTES: Final = PAGE - 128
MOVE_MAX: Final = 165
REGION_BLOCKS: Final = 1024
RUNS_MAX: Final = 64

WRITE: Final = 1
TRIM: Final = 2
ZERO: Final = 3
MOVE: Final = 4
ENTRY: Final = 5
PART: Final = 1
FIRST: Final = 2
LAST: Final = 4
BLOCK_BITS: Final = 48
BLOCK_MASK: Final = (1 << BLOCK_BITS) - 1

HOLE: Final = 0
RESERVED: Final = 1

U16 = np.dtype("<u2")
U32 = np.dtype("<u4")
U64 = np.dtype("<u8")

Array32 = NDArray[np.uint32]
Array64 = NDArray[np.uint64]
Bytes = bytes | bytearray | memoryview

_SEGMENT_HEADER: Final = struct.Struct("<8sII16sIIQQ16sHHIQ")
_SEGMENT_FOOTER: Final = struct.Struct("<8sI16sIIQQQQIIIIIIQI24x")
_RECORD_HEADER: Final = struct.Struct("<8sHHI16sIIQQIIIIQIIQ32x")
_CHECKPOINT_HEADER: Final = struct.Struct("<8sII16sIIQQIIQQI4x")
_CHECKPOINT_FOOTER: Final = struct.Struct("<8sI16sIIQQQQII52x")
_FRAME_HEADER: Final = struct.Struct("<III")
_FRAME_IDENTITY: Final = struct.Struct("<16sIIQ")
_PAGE_HEADER: Final = struct.Struct("<BBHI")
_CRC_AT_8: Final = 8
_CRC_AT_12: Final = 12

assert _SEGMENT_HEADER.size == 88
assert _SEGMENT_FOOTER.size == _CHECKPOINT_FOOTER.size == FOOTER_BYTES
assert _RECORD_HEADER.size == 128
assert _CHECKPOINT_HEADER.size == 88

ROOT_ENTRY: Final = np.dtype([("region", U64), ("checkpoint", U32), ("length", U32), ("offset", U64)])
TABLE_ENTRY: Final = np.dtype(
    [
        ("number", U32),
        ("blocks", U32),
        ("seal_crc", U32),
        ("live", U32),
        ("zones", U64),
        ("generation", U32),
        ("state", U32),
    ]
)
assert ROOT_ENTRY.itemsize == 24
assert TABLE_ENTRY.itemsize == 32


class Damaged(Exception):
    """Bytes are not what FORMAT.md says; the text says how."""


def crc_without(data: Bytes, at: int) -> int:
    """CRC of `data` whose own checksum of four bytes lies at `at` and counts as zeros."""
    view = memoryview(data)
    return int(crc32c(view[at + 4 :], crc32c(b"\0\0\0\0", crc32c(view[:at]))))


def _checked(data: Bytes, size: int, magic: bytes, crc_at: int, what: str) -> None:
    if len(data) != size:
        raise Damaged(f"{what} is cut short")
    if bytes(data[:8]) != magic:
        raise Damaged(f"{what} does not begin with {magic.decode()}")
    if crc_without(data, crc_at) != int.from_bytes(data[crc_at : crc_at + 4], "little"):
        raise Damaged(f"{what} has a wrong checksum")


class Owner(NamedTuple):
    """Whose an object is: store and log."""

    store: bytes
    log: int


def _belongs(owner: Owner, number: int, found: tuple[bytes, int, int], what: str) -> None:
    if found != (owner.store, owner.log, number):
        store, log, other = found
        if store != owner.store:
            raise Damaged(f"{what} belongs to store {store.hex()}")
        raise Damaged(f"{what} says log {log}, number {other}")


# -- segments ----------------------------------------------------------------------------------------------------


class SegmentHeader(NamedTuple):
    generation: int
    epoch: int
    epoch_id: bytes
    copies: int
    blocks: int
    zones: tuple[bytes, ...]
    page: bytes


def segment_header(page: Bytes, owner: Owner, number: int) -> SegmentHeader:
    """The first page of a segment's file."""
    _checked(page, PAGE, b"SHEEPSEG", _CRC_AT_8, "the header")
    fields = _SEGMENT_HEADER.unpack_from(page)
    _, _, version, store, log, segment, generation, epoch, epoch_id, copies, zones, blocks, _ = fields
    if version != VERSION:
        raise Damaged(f"the header has version {version}")
    _belongs(owner, number, (store, log, segment), "the header")
    if not 1 <= zones <= 250 or not 2 <= blocks <= SEGMENT_BLOCKS_MAX or not copies:
        raise Damaged(f"the header names {zones} zones, {copies} copies, {blocks} blocks")
    ids = tuple(bytes(page[at : at + 16]) for at in range(88, 88 + 16 * zones, 16))
    if len(set(ids)) != zones:
        raise Damaged("the header names a zone twice")
    return SegmentHeader(generation, epoch, epoch_id, copies, blocks, ids, bytes(page))


class Operations(NamedTuple):
    """Operations of one segment or record, in log order.

    words: operation words. counts: in blocks. places: block of the first data block in the file, 0 = none.
    sources: of all moved blocks.
    """

    words: Array64
    counts: Array32
    places: Array32
    sources: Array64

    @property
    def kinds(self) -> Array64:
        return (self.words >> np.uint64(BLOCK_BITS)) & np.uint64(0xFF)

    @property
    def blocks(self) -> Array64:
        return self.words & np.uint64(BLOCK_MASK)

    @property
    def flags(self) -> Array64:
        return self.words >> np.uint64(56)


def check_operations(operations: Operations, *, catalog: bool) -> None:
    """Damaged if an operation is none that FORMAT.md knows."""
    kinds, counts = operations.kinds, operations.counts.astype(np.int64)
    known = kinds == ENTRY if catalog else (kinds >= WRITE) & (kinds <= MOVE)
    if not known.all():
        raise Damaged(f"an operation of kind {int(kinds[~known][0])}")
    has_data = (kinds != TRIM) & (kinds != ZERO)
    limits = np.where(kinds == MOVE, MOVE_MAX, RECORD_BLOCKS_MAX)
    if (counts < 1).any() or (has_data & (counts > limits)).any():
        raise Damaged("an operation whose count is out of bounds")
    if not catalog and (operations.blocks.astype(np.int64) + counts > 1 << BLOCK_BITS).any():
        raise Damaged("an operation behind the last possible block")
    if (operations.flags & ~np.uint64(PART | FIRST | LAST)).any():
        raise Damaged("an operation with unknown flags")


class Record(NamedTuple):
    """A record header. crcs: of its data blocks. block: where the header lies; its data follows."""

    crc: int
    generation: int
    position: int
    ops: int
    data: int
    durable_upto: int
    previous_crc: int
    block: int
    wall_us: int
    operations: Operations
    crcs: Array32

    @property
    def last_position(self) -> int:
        return self.position + self.ops - 1

    @property
    def end(self) -> int:
        """The block behind the record."""
        return self.block + 1 + self.data


def record_header(page: Bytes, owner: Owner, segment: int, block: int) -> Record:
    """The header page of a record that lies at `block` of the segment's file."""
    _checked(page, PAGE, b"SHEEPREC", _CRC_AT_12, "the record header")
    fields = _RECORD_HEADER.unpack_from(page)
    _, pages, _, crc, store, log, number, generation, position, position_count, ops, data, sources = fields[:13]
    durable_upto, previous_crc, at, wall_us = fields[13:]
    _belongs(owner, segment, (store, log, number), "the record header")
    if pages != 1:
        raise Damaged(f"the record header has {pages} pages")
    if at != block:
        raise Damaged(f"the record header says block {at}")
    if 12 * ops + 8 * sources + 4 * data > RECORD_TABLE_BYTES or data > RECORD_BLOCKS_MAX:
        raise Damaged(f"the record header has {ops} operations, {sources} sources, {data} data blocks")
    if position_count != ops or not ops or not position:
        raise Damaged(f"the record header has {ops} operations at {position_count} positions from {position}")
    start = 128
    words = np.frombuffer(page, U64, ops, start)
    moved = np.frombuffer(page, U64, sources, start := start + 8 * ops)
    counts = np.frombuffer(page, U32, ops, start := start + 8 * sources)
    crcs = np.frombuffer(page, U32, data, start + 4 * ops)
    operations = Operations(words, counts, np.zeros(ops, U32), moved)
    check_operations(operations, catalog=owner.log == 0)
    lengths = data_lengths(operations)
    if int(lengths.sum()) != data or int(counts[operations.kinds == MOVE].sum()) != sources:
        raise Damaged("the record header's counts contradict each other")
    places = np.where(lengths > 0, block + 1 + np.cumsum(lengths) - lengths, 0).astype(U32)
    return Record(
        crc,
        generation,
        position,
        ops,
        data,
        durable_upto,
        previous_crc,
        block,
        wall_us,
        operations._replace(places=places),
        crcs,
    )


def data_lengths(operations: Operations) -> NDArray[np.int64]:
    """Data blocks of each operation."""
    kinds = operations.kinds
    return np.where((kinds == TRIM) | (kinds == ZERO), 0, operations.counts.astype(np.int64))


def join(parts: Sequence[Operations]) -> Operations:
    """Operations of several records as one."""
    if not parts:
        return Operations(np.zeros(0, U64), np.zeros(0, U32), np.zeros(0, U32), np.zeros(0, U64))
    return Operations(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def same_operations(ours: Operations, theirs: Operations) -> bool:
    """Whether they are equal in all that they say."""
    return (
        np.array_equal(ours.words, theirs.words)
        and np.array_equal(ours.counts, theirs.counts)
        and np.array_equal(ours.places, theirs.places)
        and np.array_equal(ours.sources, theirs.sources)
    )


class Directory(NamedTuple):
    """A sealed segment's directory. crcs: of each block's data, 0 for page 0 and record headers."""

    seal_crc: int
    generation: int
    first_position: int
    last_position: int
    durable_upto: int
    previous_crc: int
    blocks: int
    wall_us: int
    operations: Operations
    crcs: Array32
    headers: Array32
    header_crcs: Array32
    table_start: int

    @property
    def last_crc(self) -> int:
        """Header CRC of the last record."""
        return int(self.header_crcs[-1])


def directory(end: Bytes, owner: Owner, segment: int, size: int) -> Directory:
    """The directory of a segment's file of `size` bytes. Damaged: the file is not sealed.

    end: the whole file, or as much of its end as holds the table (directory_bytes says how much that is).
    """
    view = memoryview(end)
    if size < PAGE + FOOTER_BYTES:
        raise Damaged("the footer is cut short")
    footer = view[len(view) - FOOTER_BYTES :]
    _checked(footer, FOOTER_BYTES, b"SHEEPDIR", _CRC_AT_8, "the footer")
    fields = _SEGMENT_FOOTER.unpack(footer)
    _, seal_crc, store, log, number, generation, first_position, last_position, durable_upto = fields[:9]
    previous_crc, ops, sources, blocks, records, table_crc, wall_us, table_bytes = fields[9:]
    _belongs(owner, segment, (store, log, number), "the footer")
    if table_bytes != 16 * ops + 8 * sources + 4 * blocks + 8 * records:
        raise Damaged(f"the footer's table_bytes is {table_bytes}")
    table_start = size - FOOTER_BYTES - table_bytes
    if not ops or not 1 <= records < blocks <= SEGMENT_BLOCKS_MAX or table_start < blocks * PAGE or size % PAGE:
        raise Damaged(f"the footer says {ops} operations, {records} records, {blocks} blocks")
    if last_position - first_position + 1 != ops:
        raise Damaged(f"the footer says {ops} operations at positions {first_position} to {last_position}")
    start = len(view) - FOOTER_BYTES - table_bytes
    if start < 0 or crc32c(view[start : len(view) - FOOTER_BYTES]) != table_crc:
        raise Damaged("the directory's table has a wrong checksum")
    words = np.frombuffer(view, U64, ops, start)
    moved = np.frombuffer(view, U64, sources, start := start + 8 * ops)
    counts = np.frombuffer(view, U32, ops, start := start + 8 * sources)
    places = np.frombuffer(view, U32, ops, start := start + 4 * ops)
    crcs = np.frombuffer(view, U32, blocks, start := start + 4 * ops)
    headers = np.frombuffer(view, U32, records, start := start + 4 * blocks)
    operations = Operations(words, counts, places, moved)
    check_operations(operations, catalog=owner.log == 0)
    lengths = data_lengths(operations)
    first, behind = places.astype(np.int64), places.astype(np.int64) + lengths
    if ((lengths > 0) & ((first < 2) | (behind > blocks))).any() or (np.diff(headers.astype(np.int64)) <= 0).any():
        raise Damaged("the directory names places that the segment does not have")
    if int(counts[operations.kinds == MOVE].sum()) != sources or headers[0] != 1 or headers[-1] >= blocks:
        raise Damaged("the directory's counts contradict each other")
    return Directory(
        seal_crc,
        generation,
        first_position,
        last_position,
        durable_upto,
        previous_crc,
        blocks,
        wall_us,
        operations,
        crcs,
        headers,
        np.frombuffer(view, U32, records, start + 4 * records),
        table_start,
    )


def directory_bytes(footer: Bytes) -> int:
    """Bytes of table and footer, if these 128 bytes are a footer at all."""
    if len(footer) != FOOTER_BYTES:
        raise Damaged("the footer is cut short")
    return FOOTER_BYTES + int(_SEGMENT_FOOTER.unpack(footer)[16])


# -- checkpoints -------------------------------------------------------------------------------------------------


class CheckpointHeader(NamedTuple):
    position: int
    generation: int
    next_segment: int
    previous_crc: int
    blocks: int
    wall_us: int
    previous_next_segment: int


def checkpoint_header(page: Bytes, owner: Owner, number: int) -> CheckpointHeader:
    """The first page of a checkpoint."""
    _checked(page, PAGE, b"SHEEPCKP", _CRC_AT_8, "the header")
    fields = _CHECKPOINT_HEADER.unpack_from(page)
    _, _, version, store, log, found, position, generation, next_segment, previous_crc, blocks, wall_us, before = fields
    if version != VERSION:
        raise Damaged(f"the header has version {version}")
    _belongs(owner, number, (store, log, found), "the header")
    return CheckpointHeader(position, generation, next_segment, previous_crc, blocks, wall_us, before)


class CheckpointFooter(NamedTuple):
    root_offset: int
    root_count: int
    table_offset: int
    table_count: int
    root_crc: int
    table_crc: int


def checkpoint_footer(data: Bytes, owner: Owner, number: int, size: int) -> CheckpointFooter:
    """The last 128 bytes of a checkpoint of `size` bytes."""
    _checked(data, FOOTER_BYTES, b"SHEEPEND", _CRC_AT_8, "the footer")
    _, _, store, log, found, *rest = _CHECKPOINT_FOOTER.unpack(data)
    _belongs(owner, number, (store, log, found), "the footer")
    footer = CheckpointFooter(*rest)
    end = size - FOOTER_BYTES
    for offset, count, width in (
        (footer.root_offset, footer.root_count, ROOT_ENTRY.itemsize),
        (footer.table_offset, footer.table_count, TABLE_ENTRY.itemsize),
    ):
        if offset < PAGE or offset + count * width > end:
            raise Damaged("the footer points outside of the file")
    return footer


def frame(data: Bytes, owner: Owner, checkpoint: int, region: int) -> memoryview:
    """The map page in a frame, checked."""
    view = memoryview(data)
    if len(view) < _FRAME_HEADER.size:
        raise Damaged(f"the frame of region {region} is cut short")
    length, crc, low = _FRAME_HEADER.unpack_from(view)
    page = view[_FRAME_HEADER.size :]
    if length != len(page) or low != region & 0xFFFFFFFF:
        raise Damaged(f"the frame of region {region} says region {low}, {length} bytes")
    identity = _FRAME_IDENTITY.pack(owner.store, owner.log, checkpoint, region)
    if crc32c(page, crc32c(identity)) != crc:
        raise Damaged(f"the frame of region {region} has a wrong checksum")
    return page


_IN_REGION: Final = np.arange(REGION_BLOCKS, dtype=U64)


def map_page(page: memoryview, logs: Collection[int]) -> Array64:
    """The entries of a region's blocks, 1024 of them. logs: those that addresses may name."""
    if len(page) < 16:
        raise Damaged("a map page is cut short")
    form, _, n, _ = _PAGE_HEADER.unpack_from(page)
    if form == 1 and n == 1 and len(page) == 16:
        first = np.frombuffer(page, U64, 1, 8)
        if not first[0]:
            raise Damaged("a map page is one run of holes")
        starts = np.zeros(1, np.int64)
        entries = _runs(first, starts)
    elif form == 2 and 2 <= n <= RUNS_MAX and len(page) == 8 + 10 * n:
        first = np.frombuffer(page, U64, n, 8)
        starts = np.frombuffer(page, U16, n, 8 + 8 * n).astype(np.int64)
        if starts[0] or (np.diff(starts) <= 0).any() or starts[-1] >= REGION_BLOCKS:
            raise Damaged("a map page's runs do not rise from block 0")
        entries = _runs(first, starts)
    elif form == 3 and n == REGION_BLOCKS and len(page) == 8 + 8 * REGION_BLOCKS:
        entries = np.frombuffer(page, U64, n, 8)
    else:
        raise Damaged(f"a map page of form {form} with {n} entries in {len(page)} bytes")
    data = entries > RESERVED
    foreign = ~np.isin(entries >> np.uint64(40), np.array(sorted(logs), U64))
    if (data & foreign).any() or (data & (entries & np.uint64(0xFFF) == 0)).any():
        raise Damaged(f"a map page has an entry that is no address of log {', '.join(map(str, sorted(logs)))}")
    return entries


def _runs(first: Array64, starts: NDArray[np.int64]) -> Array64:
    lengths = np.diff(starts, append=REGION_BLOCKS)
    data = first > RESERVED
    if (data & ((first & np.uint64(0xFFF)).astype(np.int64) + lengths > SEGMENT_BLOCKS_MAX)).any():
        raise Damaged("a run of a map page leaves its segment")
    steps = _IN_REGION - np.repeat(starts, lengths).astype(U64)
    return np.repeat(first, lengths) + np.where(np.repeat(data, lengths), steps, np.uint64(0))
