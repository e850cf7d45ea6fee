"""Whatever is encoded is decoded again as it was."""

from array import array
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from objstore.format.catalog import HeadEntry, TailRow, VdiEntry, decode_entry, encode_entry
from objstore.format.checkpoint import (
    CheckpointHeader,
    Footer,
    decode_checkpoint_header,
    decode_footer,
    decode_frame,
    encode_checkpoint_header,
    encode_footer,
    encode_frame,
)
from objstore.format.record import (
    COUNT_MAX,
    CRC_BYTES,
    DATA_KINDS,
    LBA_MASK,
    OP_BYTES,
    RECORD_DATA_BLOCKS_MAX,
    SOURCE_BYTES,
    TABLE_BYTES_MAX,
    Kind,
    decode_header,
    encode_header,
    word,
)
from objstore.format.segment import (
    DIRECTORY_RESERVE_PAGES,
    FOOTER_BYTES,
    ZONES_MAX,
    DirectoryBuilder,
    SegmentHeader,
    decode_directory,
    decode_segment_header,
    directory_bytes,
    encode_segment_header,
    starts_of,
)
from objstore.format.segment import decode_footer as decode_segment_footer
from objstore.units import BLOCK_BYTES

U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)
STORE = st.binary(min_size=16, max_size=16)


@st.composite
def tables(draw: st.DrawFn) -> dict[str, Any]:
    """Tables that fit one record."""
    words, counts, crcs, sources = [], [], [], []
    room, data = TABLE_BYTES_MAX, RECORD_DATA_BLOCKS_MAX
    for _ in range(draw(st.integers(1, 40))):
        kind = draw(st.sampled_from(Kind))
        count = draw(st.integers(1, 30)) if kind in DATA_KINDS else draw(st.integers(0, COUNT_MAX))
        blocks = count if kind in DATA_KINDS else 0
        moved = count if kind == Kind.MOVE else 0
        room -= OP_BYTES + CRC_BYTES * blocks + SOURCE_BYTES * moved
        data -= blocks
        if room < 0 or data < 0:
            break
        words.append(word(kind, draw(st.integers(0, LBA_MASK)), draw(st.integers(0, 7))))
        counts.append(count)
        crcs += draw(st.lists(U32, min_size=blocks, max_size=blocks))
        sources += draw(st.lists(U64, min_size=moved, max_size=moved))
    return {"words": words, "counts": counts, "crcs": crcs, "sources": sources}


@st.composite
def records(draw: st.DrawFn) -> dict[str, Any]:
    found = draw(tables())
    return {
        "store_id": draw(STORE),
        "log": draw(U32),
        "segment": draw(U32),
        "generation": draw(U64),
        "block": draw(U32),
        "position": draw(U64),
        "position_count": len(found["words"]),
        "durable_upto": draw(U64),
        "previous_crc": draw(U32),
        "wall_us": draw(U64),
        **found,
    }


@given(records())
@settings(max_examples=60)
def test_records(record: dict[str, Any]) -> None:
    page = bytearray(BLOCK_BYTES)
    crc = encode_header(memoryview(page), **record)
    place = {name: record[name] for name in ("store_id", "log", "segment", "block")}
    header = decode_header(page, **place)
    assert header.crc == crc
    assert decode_header(memoryview(page), **place) == header
    for name in record.keys() - {"store_id"}:
        found = getattr(header, name)
        assert (found.tolist() if isinstance(found, array) else found) == record[name], name
    again = bytearray(BLOCK_BYTES)
    encode_header(memoryview(again), **record)
    assert page == again


@given(st.lists(tables(), min_size=1, max_size=6), STORE, U32, U32, U64, U32)
@settings(max_examples=40)
def test_directories(
    found: list[dict[str, Any]], store_id: bytes, log: int, segment: int, generation: int, previous_crc: int
) -> None:
    """A directory made while writing equals one made from the headers, and what is read back."""
    while_writing = DirectoryBuilder(log, segment, generation, previous_crc)
    from_headers = DirectoryBuilder(log, segment, generation, previous_crc)
    position, block = 1, 1
    for table in found:
        page = bytearray(BLOCK_BYTES)
        fields = {"position": position, "position_count": len(table["words"]), "durable_upto": position, "wall_us": 9}
        crc = encode_header(
            memoryview(page),
            store_id=store_id,
            log=log,
            segment=segment,
            generation=generation,
            block=block,
            previous_crc=previous_crc,
            **fields,
            **table,
        )
        header = decode_header(page, store_id=store_id, log=log, segment=segment, block=block)
        from_headers.add_header(header)
        while_writing.add(
            block=block,
            crc=crc,
            words=array("Q", table["words"]),
            counts=array("I", table["counts"]),
            starts=starts_of(header),
            crcs=array("I", table["crcs"]),
            sources=array("Q", table["sources"]),
            **fields,
        )
        previous_crc = crc
        position += len(table["words"])
        block += header.blocks
    data, crc = while_writing.encode(store_id)
    assert (data, crc) == from_headers.encode(store_id)
    assert len(data) % BLOCK_BYTES == 0
    assert len(data) - while_writing.length_bytes < BLOCK_BYTES
    footer = decode_segment_footer(data[-FOOTER_BYTES:], store_id=store_id, log=log, segment=segment)
    assert footer is not None
    table_bytes = data[-FOOTER_BYTES - footer.table_bytes : -FOOTER_BYTES]
    assert decode_directory(footer, table_bytes, log=log, segment=segment) == while_writing.finish(crc)


@given(
    STORE,
    st.builds(
        SegmentHeader,
        U32,
        U32,
        U64,
        U64,
        STORE,
        st.integers(1, 64),
        U32,
        U64,
        st.lists(STORE, max_size=ZONES_MAX).map(tuple),
    ),
)
@settings(max_examples=40)
def test_segment_headers(store_id: bytes, header: SegmentHeader) -> None:
    page = encode_segment_header(header, store_id)
    assert decode_segment_header(page, store_id=store_id, log=header.log, segment=header.segment) == header


@given(
    STORE,
    st.builds(CheckpointHeader, U32, U32, U64, U64, U32, U32, U64, U64, U32),
    st.builds(Footer, U64, U64, U64, U64, U32, U32),
    st.binary(max_size=9000),
    U64,
)
@settings(max_examples=40)
def test_checkpoints(store_id: bytes, header: CheckpointHeader, footer: Footer, page: bytes, region: int) -> None:
    log, number = header.log, header.number
    data = encode_checkpoint_header(header, store_id)
    assert decode_checkpoint_header(data, store_id=store_id, log=log, number=number) == header
    frame = encode_frame(page, store_id=store_id, log=log, number=number, region=region)
    assert decode_frame(frame, store_id=store_id, log=log, number=number, region=region) == page
    data = encode_footer(footer, store_id=store_id, log=log, number=number)
    assert decode_footer(data, store_id=store_id, log=log, number=number) == footer


@given(st.text(max_size=200), st.lists(U32, max_size=2000), U64, st.floats(allow_nan=False))
@settings(max_examples=40)
def test_entries(name: str, numbers: list[int], size: int, created: float) -> None:
    vdi = VdiEntry(
        vdi_id=1, name=name, log=2, size_bytes=size, copies=3, mode="unsafe", created=created, prealloc=False
    )
    rows = [TailRow(number, number ^ 0xFFFF, size) for number in numbers]
    head = HeadEntry(
        log=2, generation=size, tail=rows, first_number=3, checkpoint=4, clean=True, epoch="0" * 32, copies=3
    )
    for entry in (vdi, head):
        data, length = encode_entry(entry)
        assert len(data) % BLOCK_BYTES == 0
        assert decode_entry(data, length) == entry


def test_the_reserve_of_a_segment_bounds_its_directory() -> None:
    """A full segment of the largest size, one block a record: header pages and directory fit what is kept for them."""
    blocks = 4096
    records_max = blocks // 2
    length = directory_bytes(records_max, 0, blocks, records_max)
    assert -(-length // BLOCK_BYTES) <= DIRECTORY_RESERVE_PAGES
