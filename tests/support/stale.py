"""Copies of another writer: whole, sealed, of the same number and length, and not what the log means."""

import struct

from crc32c import crc32c

from objstore.units import BLOCK_BYTES

FOOTER_BYTES = 128


def make_stale(image: bytearray) -> None:
    """Other data in every block of a sealed segment's file, with every checksum of its directory right for it."""
    end = len(image) - FOOTER_BYTES
    footer = image[end:]
    assert footer[:8] == b"SHEEPDIR"
    ops, sources, blocks = struct.unpack_from("<III", footer, 72)
    (table_bytes,) = struct.unpack_from("<I", footer, 100)
    table = end - table_bytes
    crcs = table + 16 * ops + 8 * sources
    for block in range(1, blocks):
        at = crcs + 4 * block
        if image[at : at + 4] == bytes(4):
            continue  # a record's header
        data = slice(block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES)
        image[data] = bytes(image[data])[::-1]
        image[at : at + 4] = crc32c(bytes(image[data])).to_bytes(4, "little")
    image[end + 88 : end + 92] = crc32c(bytes(image[table:end])).to_bytes(4, "little")
    image[end + 8 : end + 12] = bytes(4)
    image[end + 8 : end + 12] = crc32c(bytes(image[end:])).to_bytes(4, "little")
