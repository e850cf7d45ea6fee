"""Sizes that every layer shares."""

from typing import Final

BLOCK_BYTES: Final = 4096
BLOCK_SHIFT: Final = 12
BLOCK_MASK: Final = BLOCK_BYTES - 1
REGION_BLOCKS: Final = 1024
REGION_SHIFT: Final = 10
REGION_MASK: Final = REGION_BLOCKS - 1
REGION_BYTES: Final = REGION_BLOCKS * BLOCK_BYTES
KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
TIB: Final = 1 << 40
VDI_BYTES_MAX: Final = 1 << 54
"""Largest VDI: block numbers then fit 42 bits, well inside the 48 of a record."""

assert 1 << BLOCK_SHIFT == BLOCK_BYTES
assert 1 << REGION_SHIFT == REGION_BLOCKS
