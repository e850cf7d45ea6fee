"""Reading the end of a log from its zones: which records survived, in log order. FORMAT.md, "Opening a log".

Pure but for the blocking reads, which run in the zones' threads. Nothing here writes.

The end of the log is the first record that no zone has whole. It is believed only if no record seen anywhere, also
behind it, says that more was durable; otherwise what was flushed is damaged and the log must not open.
"""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from crc32c import crc32c

from objstore.backend.base import Backend
from objstore.errors import FormatError, NotFound
from objstore.format.record import DATA_KINDS, KIND_SHIFT, MAGIC, Kind, RecordHeader, decode_header
from objstore.format.segment import (
    FOOTER_BYTES,
    Directory,
    SegmentHeader,
    decode_directory,
    decode_footer,
    decode_segment_header,
)
from objstore.log.segment import segment_name
from objstore.units import BLOCK_BYTES


class Seen(NamedTuple):
    """What one zone shows of one segment: its header, its directory if it is sealed, its file's length."""

    header: SegmentHeader | None
    directory: Directory | None
    size_bytes: int


class SurvivingRecord(NamedTuple):
    """One whole record of an unsealed segment, its data verified."""

    header: RecordHeader
    data: memoryview


def look_at(backend: Backend, store_id: bytes, log: int, number: int) -> Seen:
    """Header and directory of a segment in one zone (in a zone's thread). A missing file shows nothing."""
    try:
        handle = backend.open(segment_name(log, number))
    except NotFound:
        return Seen(None, None, 0)
    try:
        size = handle.size_bytes
        header: SegmentHeader | None = None
        if size >= BLOCK_BYTES:
            page = bytearray(BLOCK_BYTES)
            handle.read(0, [memoryview(page)])
            try:
                header = decode_segment_header(bytes(page), store_id=store_id, log=log, segment=number)
            except FormatError:
                header = None
        if size < BLOCK_BYTES + FOOTER_BYTES:
            return Seen(header, None, size)
        end = bytearray(min(size, 16 * BLOCK_BYTES))
        handle.read(size - len(end), [memoryview(end)])
        footer = decode_footer(memoryview(end)[-FOOTER_BYTES:], store_id=store_id, log=log, segment=number)
        if footer is None:
            return Seen(header, None, size)
        whole = footer.table_bytes + FOOTER_BYTES
        if whole > size:
            return Seen(header, None, size)
        if whole > len(end):
            end = bytearray(whole)
            handle.read(size - whole, [memoryview(end)])
        try:
            table = memoryview(end)[len(end) - whole : len(end) - FOOTER_BYTES]
            return Seen(header, decode_directory(footer, table, log=log, segment=number), size)
        except FormatError:
            return Seen(header, None, size)
    finally:
        handle.close()


def seal_of(backend: Backend, store_id: bytes, log: int, number: int, sync: bool) -> int | None:
    """CRC of the seal of a segment in one zone (in a zone's thread), None if it is not sealed there.

    sync: make what is seen durable, and look again around the page cache: if an earlier sync failed, the cache shows
    what never reached the medium and later syncs pass over it. The body is durable, as its sync came before the seal.
    """
    try:
        handle = backend.open(segment_name(log, number))
    except NotFound:
        return None
    try:
        end = bytearray(FOOTER_BYTES)
        if handle.size_bytes < BLOCK_BYTES + FOOTER_BYTES:
            return None
        handle.read(handle.size_bytes - FOOTER_BYTES, [memoryview(end)])
        footer = decode_footer(end, store_id=store_id, log=log, segment=number)
        if footer is None:
            return None
        if sync:
            handle.sync()
            seal = memoryview(mmap.mmap(-1, footer.table_bytes + FOOTER_BYTES))  # aligned: read without a copy
            handle.read_uncached(handle.size_bytes - len(seal), [seal])
            if seal[-FOOTER_BYTES:] != end or crc32c(seal[:-FOOTER_BYTES]) != footer.table_crc:
                return None
        return footer.crc
    finally:
        handle.close()


def read_image(backend: Backend, log: int, number: int) -> memoryview:
    """The whole file of a segment in one zone (in a zone's thread); empty if it is not there.

    In a mapping of its own, which goes back to the system with the last view of it: several segments from all of their
    zones are several hundred MiB.
    """
    try:
        handle = backend.open(segment_name(log, number))
    except NotFound:
        return memoryview(b"")
    try:
        image = memoryview(mmap.mmap(-1, max(1, handle.size_bytes)))[: handle.size_bytes]
        return image[: handle.read(0, [image])]
    finally:
        handle.close()


def records_from(
    images: Sequence[bytes | memoryview],
    *,
    store_id: bytes,
    log: int,
    number: int,
    block: int,
    position: int,
    previous_crc: int,
    generation: int | None,
) -> Iterator[SurvivingRecord]:
    """Records of one segment from `block` on, each from whichever copy has it whole, while the chain holds.

    position, previous_crc: of the last record before. generation: that of the segment, None = any.
    """
    while True:
        found = None
        for image in images:
            found = _whole_record(image, store_id, log, number, block, position, previous_crc, generation)
            if found is not None:
                break
        if found is None:
            return
        yield found
        block += found.header.blocks
        position = found.header.last_position
        previous_crc = found.header.crc


def _whole_record(
    image: bytes | memoryview,
    store_id: bytes,
    log: int,
    number: int,
    block: int,
    position: int,
    previous_crc: int,
    generation: int | None,
) -> SurvivingRecord | None:
    start = block * BLOCK_BYTES
    page = image[start : start + BLOCK_BYTES]
    try:
        header = decode_header(page, store_id=store_id, log=log, segment=number, block=block)
    except FormatError:
        return None
    if header.position != position + 1 or header.previous_crc != previous_crc:
        return None
    if generation is not None and header.generation != generation:
        return None
    data = memoryview(image)[start + BLOCK_BYTES : start + header.blocks * BLOCK_BYTES]
    if len(data) != len(header.crcs) * BLOCK_BYTES:
        return None
    for i, crc in enumerate(header.crcs):
        if crc32c(data[i * BLOCK_BYTES : (i + 1) * BLOCK_BYTES]) != crc:
            return None
    return SurvivingRecord(header, data)


def durable_claim(
    images: Sequence[bytes | memoryview], *, store_id: bytes, log: int, number: int, generation: int | None
) -> int:
    """The highest `durable_upto` of any record header of that segment, wherever it stands in the images."""
    highest = 0
    for image in images:
        for block in range(1, len(image) // BLOCK_BYTES):
            start = block * BLOCK_BYTES
            if image[start : start + 8] != MAGIC:
                continue
            try:
                header = decode_header(
                    image[start : start + BLOCK_BYTES], store_id=store_id, log=log, segment=number, block=block
                )
            except FormatError:
                continue
            if generation is None or header.generation == generation:
                highest = max(highest, header.durable_upto)
    return highest


def data_spans(header: RecordHeader) -> Iterator[tuple[int, int, int, array[int], array[int]]]:
    """For each operation of a record: (word, count, first data block in the record's data, CRCs, sources)."""
    at = source_at = 0
    for bits, count in zip(header.words, header.counts, strict=True):
        kind = bits >> KIND_SHIFT & 0xFF
        blocks = count if kind in DATA_KINDS else 0
        sources = count if kind == Kind.MOVE else 0
        yield bits, count, at, header.crcs[at : at + blocks], header.sources[source_at : source_at + sources]
        at += blocks
        source_at += sources
