"""Where a block of data lies: a 64-bit entry of the block map and its parts.

    bits 63..40  log number, 1..LOG_MAX       store-wide, never reused; number 0 is the catalog, which no map points to
    bits 39..12  segment number, 0..SEGMENT_MAX   within its log, never reused
    bits 11..0   block, 1..SEGMENT_BLOCKS_MAX - 1, in units of 4 KiB from the start of the segment's file

Two small values are no addresses: HOLE reads as zeros and owns no space, RESERVED reads as zeros and is not a hole for
the client (NO_HOLE, preallocation). Since log numbers start at 1, every address is at least ENTRY_MIN, far above both.
Block 0 of a segment is its header and never holds data, so the addresses of two segments are never consecutive: a run
of entries that grow by one lies in one segment.
"""

from typing import Final

BLOCK_BITS: Final = 12
SEGMENT_BITS: Final = 28
LOG_BITS: Final = 24

SEGMENT_BLOCKS_MAX: Final = 1 << BLOCK_BITS
"""Blocks of a segment file, its header included: 16 MiB."""
BLOCK_IN_SEGMENT_MASK: Final = SEGMENT_BLOCKS_MAX - 1
SEGMENT_MAX: Final = (1 << SEGMENT_BITS) - 1
LOG_MAX: Final = (1 << LOG_BITS) - 1

HOLE: Final = 0
RESERVED: Final = 1
ENTRY_MIN: Final = 1 << (SEGMENT_BITS + BLOCK_BITS)
"""Smallest address: segment 0 of log 1."""

assert LOG_BITS + SEGMENT_BITS + BLOCK_BITS == 64
assert HOLE < RESERVED < 1 << BLOCK_BITS <= ENTRY_MIN, "zeros must differ from addresses and have segment key 0"


def pack(log: int, segment: int, block: int) -> int:
    """The entry of a block. ValueError if a part is out of its range."""
    if not (1 <= log <= LOG_MAX and 0 <= segment <= SEGMENT_MAX and 1 <= block < SEGMENT_BLOCKS_MAX):
        raise ValueError(f"no such address log={log} segment={segment} block={block}")
    return (log << SEGMENT_BITS | segment) << BLOCK_BITS | block


def unpack(entry: int) -> tuple[int, int, int]:
    """(log, segment, block) of an address."""
    return entry >> (SEGMENT_BITS + BLOCK_BITS), entry >> BLOCK_BITS & SEGMENT_MAX, entry & BLOCK_IN_SEGMENT_MASK


def segment_key(entry: int) -> int:
    """Log and segment as one number; 0 for HOLE and RESERVED. Hot loops write `entry >> BLOCK_BITS`."""
    return entry >> BLOCK_BITS


def key_of(log: int, segment: int) -> int:
    """The segment key of a segment."""
    return log << SEGMENT_BITS | segment
