"""The check's decoders on the golden files: another program's reading of the same bytes."""

import numpy as np
import pytest
from msgspec.structs import astuple

from objstore.check.catalog import snapshot
from objstore.check.checkpoints import ROOT_ENTRY, TABLE_ENTRY
from objstore.check.documents import epoch, superblock
from objstore.check.layout import (
    MOVE,
    PAGE,
    TRIM,
    WRITE,
    ZERO,
    Damaged,
    Owner,
    checkpoint_footer,
    checkpoint_header,
    frame,
    map_page,
    segment_header,
)
from objstore.check.segments import verify_sealed
from tests.format import make_golden as golden

OWNER = Owner(golden.STORE_ID, golden.LOG)


def stored(name: str) -> bytes:
    return (golden.GOLDEN / name).read_bytes()


def test_documents() -> None:
    block = superblock(stored("superblock"))
    assert (block.store, block.zone, block.number) == (golden.STORE_ID, golden.ZONES[0], 0)
    record = epoch(stored("epoch"), golden.EPOCH.number)
    assert record.id.hex() == golden.EPOCH.id
    assert record.catalog.snapshot == golden.EPOCH.catalog.snapshot


def test_segment() -> None:
    data = stored("segment")
    copy = verify_sealed(data, OWNER, golden.SEGMENT)
    assert copy.bad == {}
    assert copy.header is not None
    assert copy.header.zones == golden.ZONES
    operations = copy.directory.operations
    assert operations.kinds.tolist() == [WRITE, TRIM, ZERO, WRITE, MOVE, WRITE]
    assert operations.counts.tolist() == [2, (1 << 32) - 1, 9, 1, 2, 1]
    assert operations.blocks.tolist() == [100, 1 << 41, 7, 200, 300, 201]
    assert operations.places.tolist() == [2, 0, 0, 5, 6, 8]
    assert operations.sources.tolist() == golden.OPERATIONS[1][1][5]


def test_checkpoint() -> None:
    data = stored("checkpoint")
    header = checkpoint_header(data[:PAGE], OWNER, 9)
    assert (header.position, header.next_segment, header.blocks) == (1000, golden.SEGMENT, 2048)
    footer = checkpoint_footer(data[-128:], OWNER, 9, len(data))
    root = np.frombuffer(data, ROOT_ENTRY, footer.root_count, footer.root_offset)
    assert sorted(root["region"].tolist()) == sorted(golden.REGIONS)
    rows = np.frombuffer(data, TABLE_ENTRY, footer.table_count, footer.table_offset)
    assert [tuple(row) for row in rows.tolist()] == golden.SEGMENTS
    for region, _, length, offset in root.tolist():
        entries = map_page(frame(data[offset : offset + length], OWNER, 9, region), {golden.LOG}).tolist()
        assert entries == expected_entries(region)


def expected_entries(region: int) -> list[int]:
    """The golden regions written out by hand."""
    if region == 0:
        return [(3 << 40 | 41 << 12 | 1) + i for i in range(1024)]
    if region == 5:
        return [0] * 10 + [1] * 590 + [(3 << 40 | 40 << 12 | 2) + i for i in range(424)]
    return [3 << 40 | (30 + i % 7) << 12 | 1 + i for i in range(1024)]


def test_catalog_snapshot() -> None:
    data = stored("catalog-snapshot")
    found = snapshot(data, golden.STORE_ID, int.from_bytes(data[16:20], "little"))
    assert [vdi.name for vdi in found.vdis.values()] == ["größe"]
    assert [tuple(row) for row in found.heads[golden.LOG].tail] == [astuple(row) for row in golden.HEAD.tail]
    assert found.heads[golden.LOG].epoch.hex() == golden.HEAD.epoch
    assert found.garbage == {1, 2}
    assert found.next_log == 4


@pytest.mark.parametrize("offset", [0, 9, 13, 17, 33, 37, 41, 49, 60, 73, 75, 77, 90, 110, 3000])
def test_a_header_with_any_byte_changed_is_damaged(offset: int) -> None:
    page = bytearray(stored("segment")[:PAGE])
    page[offset] ^= 4
    with pytest.raises(Damaged):
        segment_header(page, OWNER, golden.SEGMENT)


@pytest.mark.parametrize(
    "page",
    [
        b"",
        bytes(16),
        b"\1\0\1\0\0\0\0\0" + (3 << 40 | 5 << 12 | 4000).to_bytes(8, "little"),
        b"\1\0\1\0\0\0\0\0" + (4 << 40 | 5 << 12 | 1).to_bytes(8, "little"),
        b"\1\0\1\0\0\0\0\0" + (3 << 40 | 5 << 12).to_bytes(8, "little"),
        b"\2\0\2\0\0\0\0\0" + bytes(16) + b"\1\0\2\0",
        b"\2\0\2\0\0\0\0\0" + bytes(16) + b"\0\0\0\0",
        b"\3\0\2\0\0\0\0\0" + bytes(16),
    ],
)
def test_map_pages_that_are_none(page: bytes) -> None:
    with pytest.raises(Damaged):
        map_page(memoryview(page), {3})
