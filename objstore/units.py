"""Sizes that every layer shares, and how people write them."""

import re
from typing import Final

from objstore.errors import InvalidRequest

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

_UNITS: Final = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": TIB}
_SIZE: Final = re.compile(r"([0-9]{1,20})(?:\.([0-9]{1,6}))?([KMGT]?)", re.ASCII)


def parse_size(text: str) -> int:
    """Bytes meant by "4096", "512K", "10G" or "1.5T": K, M, G, T are powers of 1024, in either case.

    A fraction must come out as whole bytes. InvalidRequest quotes the text; no upper limit is checked here.
    """
    match = _SIZE.fullmatch(text.strip().upper())
    if match is None:
        raise InvalidRequest(f"size {text!r} is not a number of bytes with an optional K, M, G or T (e.g. 10G)")
    whole, fraction, unit = match[1], match[2] or "", _UNITS[match[3]]
    scaled = int(whole + fraction) * unit
    size_bytes, rest = divmod(scaled, int("1" + "0" * len(fraction)))
    if rest:
        raise InvalidRequest(f"size {text!r} is not a whole number of bytes")
    return size_bytes


def format_size(size_bytes: int) -> str:
    """For people: "512", "64M", "1.5G"; exact where one decimal suffices, otherwise rounded to one."""
    for suffix in "TGMK":
        unit = _UNITS[suffix]
        if size_bytes >= unit:
            tenths = (size_bytes * 10 + unit // 2) // unit
            return f"{tenths // 10}{suffix}" if tenths % 10 == 0 else f"{tenths / 10:.1f}{suffix}"
    return str(size_bytes)


def check_vdi_bytes(size_bytes: int) -> None:
    """InvalidRequest unless a VDI can have this size."""
    if not 0 < size_bytes <= VDI_BYTES_MAX:
        raise InvalidRequest(
            f"a VDI of {size_bytes} bytes is not possible; 1 byte to {format_size(VDI_BYTES_MAX)} ({VDI_BYTES_MAX}) is"
        )
