"""Files of format version 1 read field by field, and written again as the same bytes (FORMAT.md)."""

import struct
from array import array

import msgspec
import numpy as np
import pytest
from crc32c import crc32c

from objstore.format.catalog import decode_entry, decode_snapshot, encode_entry
from objstore.format.checkpoint import (
    FOOTER_BYTES as CHECKPOINT_FOOTER_BYTES,
)
from objstore.format.checkpoint import (
    ROOT,
    TABLE,
    decode_checkpoint_header,
    decode_footer,
    decode_frame,
    decode_root,
    decode_table,
)
from objstore.format.document import Epoch, Superblock, decode_document
from objstore.format.record import decode_header
from objstore.format.segment import FOOTER_BYTES, decode_directory, decode_segment_header
from objstore.format.segment import decode_footer as decode_segment_footer
from objstore.log.regions import decode_region
from objstore.units import BLOCK_BYTES
from tests.format import make_golden as golden

FILES = golden.make_all()


def stored(name: str) -> bytes:
    return (golden.GOLDEN / name).read_bytes()


@pytest.mark.parametrize("name", sorted(FILES))
def test_the_same_values_give_the_same_bytes(name: str) -> None:
    assert FILES[name] == stored(name)


def test_nothing_else_is_golden() -> None:
    assert sorted(path.name for path in golden.GOLDEN.iterdir()) == sorted(FILES)


def test_documents() -> None:
    assert decode_document("superblock", stored("superblock"), Superblock, "here") == golden.SUPERBLOCK
    assert decode_document("epoch", stored("epoch"), Epoch, "here") == golden.EPOCH
    line, _, rest = stored("epoch").partition(b"\n")
    assert line == b"SHEEPFOLD epoch 1 crc32c=%08x" % crc32c(rest[:-1])
    assert rest.endswith(b"}\n")


def test_segment_header() -> None:
    page = stored("segment")[:BLOCK_BYTES]
    assert decode_segment_header(page, store_id=golden.STORE_ID, log=3, segment=42) == golden.SEGMENT_HEADER
    assert struct.unpack_from("<8s4xI16sIIQQ16sHHIQ", page) == (
        b"SHEEPSEG", 1, golden.STORE_ID, 3, 42, 5, 7, bytes(range(16)), 2, 2, 80, golden.WALL_US,
    )  # fmt: skip
    assert page[88:120] == b"".join(golden.ZONES)
    assert not any(page[120:])


def test_records() -> None:
    data = stored("segment")
    position, previous_crc, block = 1001, 0x01020304, 1
    for operations in golden.OPERATIONS:
        page = data[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
        header = decode_header(page, store_id=golden.STORE_ID, log=3, segment=42, block=block)
        assert struct.unpack_from("<8sHH4x16sIIQQIIIIQIIQ32x", page) == (
            b"SHEEPREC", 1, 0, golden.STORE_ID, 3, 42, 5, position, 3, 3, len(header.crcs), len(header.sources),
            position - 1, previous_crc, block, golden.WALL_US,
        )  # fmt: skip
        assert crc32c(page[:12] + bytes(4) + page[16:]) == header.crc == int.from_bytes(page[12:16], "little")
        at = block + 1
        for (kind, flags, lba, count, pieces, sources), bits, found in zip(
            operations, header.words, header.counts, strict=True
        ):
            assert bits == lba | kind << 48 | flags << 56
            assert found == count
            for piece in pieces:
                assert data[at * BLOCK_BYTES : (at + 1) * BLOCK_BYTES] == piece
                assert header.crcs[at - block - 1] == crc32c(piece)
                at += 1
            assert not sources or header.sources.tolist() == sources
        assert header.blocks == at - block
        position, previous_crc, block = header.last_position + 1, header.crc, at


def test_segment_directory() -> None:
    data = stored("segment")
    footer = decode_segment_footer(data[-FOOTER_BYTES:], store_id=golden.STORE_ID, log=3, segment=42)
    assert footer is not None
    table = data[-FOOTER_BYTES - footer.table_bytes : -FOOTER_BYTES]
    directory = decode_directory(footer, table, log=3, segment=42)
    assert (directory.first_position, directory.last_position, directory.durable_upto) == (1001, 1006, 1003)
    assert (directory.generation, directory.previous_crc, directory.wall_us) == (5, 0x01020304, golden.WALL_US)
    assert directory.record_blocks.tolist() == golden.make_segment()[1] == [1, 4]
    assert directory.starts.tolist() == [2, 0, 0, 5, 6, 8]
    assert directory.counts.tolist() == [2, (1 << 32) - 1, 9, 1, 2, 1]
    assert [word >> 48 & 0xFF for word in directory.words] == [1, 2, 3, 1, 4, 1]
    assert [word >> 56 for word in directory.words] == [0, 0, 0, 3, 0, 4]
    assert directory.sources.tolist() == [(3 << 28 | 11) << 12 | 17, (3 << 28 | 12) << 12 | 4095]
    for block, crc in enumerate(directory.crcs):
        is_header = block == 0 or block in directory.record_blocks
        assert crc == (0 if is_header else crc32c(data[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]))
    for block, crc in zip(directory.record_blocks, directory.record_crcs, strict=True):
        assert int.from_bytes(data[block * BLOCK_BYTES + 12 : block * BLOCK_BYTES + 16], "little") == crc


def test_checkpoint() -> None:
    data = stored("checkpoint")
    header = decode_checkpoint_header(data[:BLOCK_BYTES], store_id=golden.STORE_ID, log=3, number=9)
    assert header == golden.CHECKPOINT
    assert struct.unpack_from("<8s4xI16sIIQQIIQQI", data) == (
        b"SHEEPCKP", 1, golden.STORE_ID, 3, 9, 1000, 5, 42, 0xDEADBEEF, 2048, golden.WALL_US, 40,
    )  # fmt: skip
    footer = decode_footer(data[-CHECKPOINT_FOOTER_BYTES:], store_id=golden.STORE_ID, log=3, number=9)
    root = decode_root(data[footer.root_offset :][: footer.root_count * ROOT.itemsize], footer)
    table = decode_table(data[footer.table_offset :][: footer.table_count * TABLE.itemsize], footer)
    assert [row.tolist() for row in table] == [tuple(row) for row in golden.SEGMENTS]
    assert root["region"].tolist() == list(golden.REGIONS)
    for region, checkpoint, length, offset in root.tolist():
        assert checkpoint == 9
        frame = data[offset : offset + length]
        page = decode_frame(frame, store_id=golden.STORE_ID, log=3, number=9, region=region)
        assert decode_region(page) == golden.REGIONS[region]
        assert struct.unpack_from("<I4xI", frame) == (length - 12, region & 0xFFFFFFFF)


def test_regions() -> None:
    one, some, full = (FILES["checkpoint"][offset:] for _, _, _, offset in _root().tolist())
    assert struct.unpack_from("<BBHIQ", one[12:]) == (1, 0, 1, 0, (3 << 28 | 41) << 12 | 1)
    assert struct.unpack_from("<BBHIQQQHHH", some[12:]) == (2, 0, 3, 0, 0, 1, (3 << 28 | 40) << 12 | 2, 0, 10, 600)
    assert struct.unpack_from("<BBHI", full[12:]) == (3, 0, 1024, 0)
    assert array("Q", full[20 : 20 + 8192]) == golden.REGIONS[(1 << 33) + 5]


def _root() -> np.ndarray:
    data = stored("checkpoint")
    footer = decode_footer(data[-CHECKPOINT_FOOTER_BYTES:], store_id=golden.STORE_ID, log=3, number=9)
    return np.frombuffer(data, ROOT, footer.root_count, footer.root_offset)


def test_catalog_entries() -> None:
    data = stored("catalog-entries")
    for number, entry in enumerate(golden.ENTRIES):
        block = data[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
        length = encode_entry(entry)[1]
        assert decode_entry(block, length) == entry
        plain = msgspec.msgpack.decode(block[:length])
        assert plain["type"] == ("vdi", "head", "delete", "purged", "stop")[number]
        assert not any(block[length:])


def test_attributes_and_jobs() -> None:
    data = stored("catalog-notes")
    plain = []
    for number, entry in enumerate(golden.NOTES):
        block = data[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
        length = encode_entry(entry)[1]
        assert decode_entry(block, length) == entry
        plain.append(msgspec.msgpack.decode(block[:length]))
    assert [one["type"] for one in plain] == ["attribute", "attribute", "job", "job"]
    assert [one["value"] for one in plain[:2]] == [b"\0\xff", None]
    assert "message" not in plain[2]
    assert plain[3]["message"] == "full"
    assert decode_snapshot(stored("catalog-notes-snapshot"), golden.STORE_ID, 7) == golden.NOTES_SNAPSHOT


def test_a_vdi_that_was_changed_by_force() -> None:
    data = stored("catalog-suspended")
    length = encode_entry(golden.SUSPENDED)[1]
    assert decode_entry(data, length) == golden.SUSPENDED
    plain = msgspec.msgpack.decode(data[:length])
    assert (plain["suspended"], plain["former_bytes"]) == ("zurück", 1 << 41)
    assert (
        not {"suspended", "former_bytes", "hidden"}
        & msgspec.msgpack.decode(stored("catalog-entries")[: encode_entry(golden.VDI)[1]]).keys()
    )


def test_a_vdi_in_the_trash() -> None:
    data = stored("catalog-trash")
    length = encode_entry(golden.TRASH)[1]
    assert decode_entry(data, length) == golden.TRASH
    plain = msgspec.msgpack.decode(data[:length])
    assert plain == {"type": "trash", "vdi_id": 2, "deleted": 1.5, "kept_until": 86401.5}


def test_catalog_snapshot() -> None:
    data = stored("catalog-snapshot")
    assert decode_snapshot(data, golden.STORE_ID, 6) == golden.SNAPSHOT
    assert data[:20] == golden.STORE_ID + (6).to_bytes(4, "little")
    assert int.from_bytes(data[20:24], "little") == crc32c(data[:20] + data[24:])
    assert msgspec.msgpack.decode(data[24:])["next_log"] == 4
