"""Checkpoints: the map of a VDI and the table of its segments, as one object. FORMAT.md, "Checkpoint".

page 0            header: what this is a checkpoint of
pages             one frame per map region written with this checkpoint
root              where the page of every region is, in this checkpoint or an older one
segment table     every live segment below `next_segment`
last 128 bytes    footer: where root and table are, their CRCs
"""

import struct
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from objstore.errors import FormatError
from objstore.units import BLOCK_BYTES

HEADER_MAGIC: Final = b"SHEEPCKP"
FOOTER_MAGIC: Final = b"SHEEPEND"
HEADER: Final = struct.Struct("<8sII16sIIQQIIQQI4x")
FRAME: Final = struct.Struct("<III")
FOOTER: Final = struct.Struct("<8sI16sIIQQQQII52x")
FOOTER_BYTES: Final = 128
ROOT: Final = np.dtype([("region", "<u8"), ("checkpoint", "<u4"), ("length", "<u4"), ("offset", "<u8")])
ROOT_LOG_SHIFT: Final = 40
"""A root's `region` has the log of the page above this bit where it is not the checkpoint's own."""
TABLE: Final = np.dtype(
    [
        ("number", "<u4"),
        ("blocks", "<u4"),
        ("seal_crc", "<u4"),
        ("live", "<u4"),
        ("zones", "<u8"),
        ("generation", "<u4"),
        ("state", "<u4"),
    ]
)
LIVE: Final = 0
DEAD: Final = 1
KEPT: Final = 2

assert FOOTER.size == FOOTER_BYTES
assert ROOT.itemsize == 24
assert TABLE.itemsize == 32


class CheckpointHeader(NamedTuple):
    """position, previous_crc: of the last record whose effect is in the map. next_segment: the tail begins there.
    previous_next_segment: where the tail of the checkpoint before this one begins (the one to fall back on)."""

    log: int
    number: int
    position: int
    generation: int
    next_segment: int
    previous_crc: int
    blocks: int
    wall_us: int
    previous_next_segment: int


class Footer(NamedTuple):
    """The last 128 bytes of a checkpoint."""

    root_offset: int
    root_count: int
    table_offset: int
    table_count: int
    root_crc: int
    table_crc: int


def encode_checkpoint_header(header: CheckpointHeader, store_id: bytes) -> bytes:
    """One page."""
    page = HEADER.pack(
        HEADER_MAGIC,
        0,
        1,
        store_id,
        header.log,
        header.number,
        header.position,
        header.generation,
        header.next_segment,
        header.previous_crc,
        header.blocks,
        header.wall_us,
        header.previous_next_segment,
    ).ljust(BLOCK_BYTES, b"\0")
    return page[:8] + crc32c(page).to_bytes(4, "little") + page[12:]


def decode_checkpoint_header(page: bytes, *, store_id: bytes, log: int, number: int) -> CheckpointHeader:
    """FormatError if the page is not the header of that checkpoint."""
    where = f"log={log} checkpoint={number}"
    if len(page) != BLOCK_BYTES or page[:8] != HEADER_MAGIC:
        raise FormatError(f"no checkpoint header {where}")
    _, crc, version, store, found_log, found_number, *fields = HEADER.unpack_from(page)
    if crc32c(page[:8] + b"\0\0\0\0" + page[12:]) != crc:
        raise FormatError(f"checkpoint header damaged {where}")
    if version != 1 or (store, found_log, found_number) != (store_id, log, number):
        raise FormatError(f"checkpoint of another place {where}")
    return CheckpointHeader(log, number, *fields)


def _frame_crc(store_id: bytes, log: int, number: int, region: int, page: bytes) -> int:
    identity = store_id + struct.pack("<IIQ", log, number, region)
    return int(crc32c(page, crc32c(identity)))


def encode_frame(page: bytes, *, store_id: bytes, log: int, number: int, region: int) -> bytes:
    """One encoded region with its frame: length, CRC over identity and page, and the region's low bits."""
    crc = _frame_crc(store_id, log, number, region, page)
    return FRAME.pack(len(page), crc, region & 0xFFFFFFFF) + page


def decode_frame(frame: bytes | memoryview, *, store_id: bytes, log: int, number: int, region: int) -> bytes:
    """The encoded region of a frame. FormatError unless it is whole and the one asked for."""
    where = f"log={log} checkpoint={number} region={region}"
    if len(frame) < FRAME.size:
        raise FormatError(f"map page too short {where}")
    length, crc, low = FRAME.unpack_from(frame)
    page = bytes(frame[FRAME.size :])
    if length != len(page) or low != region & 0xFFFFFFFF:
        raise FormatError(f"map page of another place {where}")
    if _frame_crc(store_id, log, number, region, page) != crc:
        raise FormatError(f"map page damaged {where}")
    return page


def encode_footer(footer: Footer, *, store_id: bytes, log: int, number: int) -> bytes:
    """128 bytes."""
    packed = FOOTER.pack(FOOTER_MAGIC, 0, store_id, log, number, *footer)
    return packed[:8] + crc32c(packed).to_bytes(4, "little") + packed[12:]


def decode_footer(footer: bytes, *, store_id: bytes, log: int, number: int) -> Footer:
    """FormatError if these bytes are not the footer of that checkpoint."""
    where = f"log={log} checkpoint={number}"
    if len(footer) != FOOTER_BYTES or footer[:8] != FOOTER_MAGIC:
        raise FormatError(f"checkpoint unfinished {where}")
    _, crc, store, found_log, found_number, *fields = FOOTER.unpack(footer)
    if crc32c(footer[:8] + b"\0\0\0\0" + footer[12:]) != crc or (store, found_log, found_number) != (
        store_id,
        log,
        number,
    ):
        raise FormatError(f"checkpoint footer damaged {where}")
    return Footer(*fields)


def decode_root(data: bytes, footer: Footer) -> npt.NDArray[np.void]:
    """The root as an array of ROOT. FormatError if damaged."""
    if crc32c(data) != footer.root_crc or len(data) != footer.root_count * ROOT.itemsize:
        raise FormatError("checkpoint root damaged")
    return np.frombuffer(data, ROOT)


def decode_table(data: bytes, footer: Footer) -> npt.NDArray[np.void]:
    """The segment table as an array of TABLE. FormatError if damaged."""
    if crc32c(data) != footer.table_crc or len(data) != footer.table_count * TABLE.itemsize:
        raise FormatError("checkpoint segment table damaged")
    return np.frombuffer(data, TABLE)
