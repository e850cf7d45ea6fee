"""Writes the golden files of format version 1 (tests/format/golden/v1/). Run once per format version, never again:

    python -m tests.format.make_golden

A file that differs afterwards means that stores written by earlier programs can't be read any more.
"""

from array import array
from pathlib import Path

import msgspec
import numpy as np
from crc32c import crc32c

from objstore.format.catalog import (
    AttributeEntry,
    DeleteEntry,
    Entry,
    HeadEntry,
    JobEntry,
    PurgedEntry,
    Snapshot,
    StopEntry,
    TailRow,
    TrashEntry,
    VdiEntry,
    encode_entry,
    encode_snapshot,
)
from objstore.format.checkpoint import (
    DEAD,
    LIVE,
    ROOT,
    TABLE,
    CheckpointHeader,
    Footer,
    encode_checkpoint_header,
    encode_footer,
    encode_frame,
)
from objstore.format.document import CatalogHead, Epoch, Known, Member, Outside, Superblock, encode_document
from objstore.format.record import Flag, Kind, encode_header, word
from objstore.format.segment import DirectoryBuilder, SegmentHeader, encode_segment_header
from objstore.log.address import RESERVED, pack
from objstore.log.regions import Region, RunTable, encode_region
from objstore.units import BLOCK_BYTES

GOLDEN = Path(__file__).parent / "golden" / "v1"
STORE_ID = bytes.fromhex("00112233445566778899aabbccddeeff")
ZONES = (b"\xa1" * 16, b"\xb2" * 16)
LOG, SEGMENT, GENERATION = 3, 42, 5
WALL_US = 1_700_000_000_000_000

SEGMENT_HEADER = SegmentHeader(LOG, SEGMENT, GENERATION, 7, bytes(range(16)), 2, 80, WALL_US, ZONES)
BLOCKS = [bytes([letter]) * BLOCK_BYTES for letter in b"ABCDEF"]
OPERATIONS: list[list[tuple[int, int, int, int, list[bytes], list[int]]]] = [
    # (kind, flags, block, count, data, sources) by record
    [
        (Kind.WRITE, 0, 100, 2, BLOCKS[0:2], []),
        (Kind.TRIM, 0, 1 << 41, (1 << 32) - 1, [], []),
        (Kind.ZERO, 0, 7, 9, [], []),
    ],
    [
        (Kind.WRITE, Flag.PART | Flag.FIRST, 200, 1, BLOCKS[2:3], []),
        (Kind.MOVE, 0, 300, 2, BLOCKS[3:5], [pack(LOG, 11, 17), pack(LOG, 12, 4095)]),
        (Kind.WRITE, Flag.LAST, 201, 1, BLOCKS[5:6], []),
    ],
]
CHECKPOINT = CheckpointHeader(LOG, 9, 1000, GENERATION, SEGMENT, 0xDEADBEEF, 2048, WALL_US, 40)
REGIONS: dict[int, Region] = {
    0: pack(LOG, 41, 1),
    5: RunTable("Q", [0, 10, 600, 0, RESERVED, pack(LOG, 40, 2)]),
    (1 << 33) + 5: array("Q", [pack(LOG, 30 + i % 7, 1 + i) for i in range(1024)]),
}
SEGMENTS = [(40, 80, 0x11111111, 424, 3, 4, LIVE), (41, 2112, 0x22222222, 1024, 3, 5, DEAD)]
VDI = VdiEntry(
    vdi_id=2, name="größe", log=LOG, size_bytes=1 << 40, copies=2, mode="writeback", created=1.5, prealloc=True
)
SUSPENDED = msgspec.structs.replace(VDI, suspended="zurück", former_bytes=1 << 41)
TRASH = TrashEntry(vdi_id=2, deleted=1.5, kept_until=86401.5)
HEAD = HeadEntry(
    log=LOG,
    generation=GENERATION,
    tail=[TailRow(40, 0x11111111, 4), TailRow(41, 0x22222222, 5)],
    first_number=42,
    checkpoint=9,
    clean=False,
    epoch=bytes(range(16)).hex(),
    copies=2,
)
ENTRIES: list[Entry] = [VDI, HEAD, DeleteEntry(vdi_id=2), PurgedEntry(log=LOG), StopEntry(wall=2.5)]
ATTRIBUTE = AttributeEntry(vdi_id=2, name="o/wner é", value=b"\0\xff")
JOB = JobEntry(
    job_id=3,
    kind="allocate",
    vdi="größe",
    offset_bytes=5,
    length_bytes=1 << 40,
    state="failed",
    started=1.5,
    noted=2.5,
    bytes_done=4096,
    message="full",
)
NOTES: list[Entry] = [
    ATTRIBUTE,
    msgspec.structs.replace(ATTRIBUTE, value=None),
    msgspec.structs.replace(JOB, state="running", message=""),
    JOB,
]
NOTES_SNAPSHOT = Snapshot(
    next_log=4, next_vdi=3, vdis=[VDI], heads=[], garbage=[], clean=True, attributes=[ATTRIBUTE], jobs=[JOB], next_job=4
)
SNAPSHOT = Snapshot(next_log=4, next_vdi=3, vdis=[VDI], heads=[HEAD], garbage=[1, 2], clean=False)
SUPERBLOCK = Superblock(
    store=STORE_ID.hex(),
    zone=ZONES[0].hex(),
    number=0,
    members=[Known(0, ZONES[0].hex(), "/srv/a"), Known(1, ZONES[1].hex(), "/srv/b")],
    created=1.5,
    features_read=["membership"],
)
EPOCH = Epoch(
    number=7,
    id=bytes(range(16)).hex(),
    parent="0" * 32,
    members=[
        Member(number=0, id=ZONES[0].hex(), path="/srv/a"),
        Member(number=1, id=ZONES[1].hex(), path="/srv/b", weight=2.5, state="draining"),
    ],
    out=[Outside(number=2, id="c3" * 16, path="/srv/c", weight=1.0, state="in", since=6, reason="I/O error")],
    w=1,
    wall=2.5,
    start=True,
    complete=True,
    catalog=CatalogHead(snapshot=6, generation=5, first_number=12, position=34, previous_crc=0xCAFEF00D),
    next_zone=3,
)


def make_segment() -> tuple[bytes, list[int]]:
    """(a sealed segment of two records, the blocks of their headers)."""
    body = bytearray(encode_segment_header(SEGMENT_HEADER, STORE_ID))
    directory = DirectoryBuilder(LOG, SEGMENT, GENERATION, 0x01020304)
    position, previous_crc = 1001, 0x01020304
    starts_of_records = []
    for operations in OPERATIONS:
        block = len(body) // BLOCK_BYTES
        starts_of_records.append(block)
        page = bytearray(BLOCK_BYTES)
        data = [piece for *_, pieces, _ in operations for piece in pieces]
        words = array("Q", [word(kind, lba, flags) for kind, flags, lba, *_ in operations])
        counts = array("I", [count for _, _, _, count, _, _ in operations])
        crcs = array("I", [crc32c(piece) for piece in data])
        sources = array("Q", [source for *_, found in operations for source in found])
        starts = array("I")
        at = block + 1
        for *_, pieces, _ in operations:
            starts.append(at if pieces else 0)
            at += len(pieces)
        crc = encode_header(
            memoryview(page),
            store_id=STORE_ID,
            log=LOG,
            segment=SEGMENT,
            generation=GENERATION,
            block=block,
            position=position,
            position_count=len(operations),
            durable_upto=position - 1,
            previous_crc=previous_crc,
            wall_us=WALL_US,
            words=words,
            counts=counts,
            crcs=crcs,
            sources=sources,
        )
        directory.add(
            block=block,
            crc=crc,
            position=position,
            position_count=len(operations),
            durable_upto=position - 1,
            wall_us=WALL_US,
            words=words,
            counts=counts,
            starts=starts,
            crcs=crcs,
            sources=sources,
        )
        body += page + b"".join(data)
        position += len(operations)
        previous_crc = crc
    return bytes(body) + directory.encode(STORE_ID)[0], starts_of_records


def make_checkpoint() -> bytes:
    """A checkpoint with one region of each form."""
    body = bytearray(encode_checkpoint_header(CHECKPOINT, STORE_ID))
    rows = []
    for region, value in REGIONS.items():
        frame = encode_frame(encode_region(value), store_id=STORE_ID, log=LOG, number=CHECKPOINT.number, region=region)
        rows.append((region, CHECKPOINT.number, len(frame), len(body)))
        body += frame
    root = np.array(rows, ROOT).tobytes()
    table = np.array([(n, b, c, live, z, g, s) for n, b, c, live, z, g, s in SEGMENTS], TABLE).tobytes()
    footer = Footer(len(body), len(rows), len(body) + len(root), len(SEGMENTS), crc32c(root), crc32c(table))
    body += root + table
    return bytes(body) + encode_footer(footer, store_id=STORE_ID, log=LOG, number=CHECKPOINT.number)


def make_all() -> dict[str, bytes]:
    """Contents of every golden file, by name."""
    return {
        "superblock": encode_document("superblock", SUPERBLOCK),
        "epoch": encode_document("epoch", EPOCH),
        "segment": make_segment()[0],
        "checkpoint": make_checkpoint(),
        "catalog-entries": b"".join(encode_entry(entry)[0] for entry in ENTRIES),
        "catalog-notes": b"".join(encode_entry(entry)[0] for entry in NOTES),
        "catalog-notes-snapshot": encode_snapshot(NOTES_SNAPSHOT, STORE_ID, 7),
        "catalog-snapshot": encode_snapshot(SNAPSHOT, STORE_ID, 6),
        "catalog-suspended": encode_entry(SUSPENDED)[0],
        "catalog-trash": encode_entry(TRASH)[0],
    }


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name, data in make_all().items():
        if (GOLDEN / name).exists() and (GOLDEN / name).read_bytes() != data:
            raise SystemExit(f"{name} would change: a changed format needs a new version")
        (GOLDEN / name).write_bytes(data)
