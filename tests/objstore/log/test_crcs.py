"""The CRC of a run of blocks out of the CRCs of the blocks."""

import random
from array import array

import pytest
from crc32c import crc32c

from objstore.log.crcs import beginnings, run_crc, shift
from objstore.units import BLOCK_BYTES

BLOCKS = 70


@pytest.fixture(scope="module")
def data() -> bytes:
    return random.Random(1).randbytes(BLOCKS * BLOCK_BYTES)


@pytest.fixture(scope="module")
def crcs(data: bytes) -> "array[int]":
    return array("I", [crc32c(data[i : i + BLOCK_BYTES]) for i in range(0, len(data), BLOCK_BYTES)])


def test_beginnings(data: bytes, crcs: "array[int]") -> None:
    first = beginnings(crcs)
    assert list(first) == [crc32c(data[: i * BLOCK_BYTES]) for i in range(BLOCKS + 1)]


def test_every_run(data: bytes, crcs: "array[int]") -> None:
    first = beginnings(crcs)
    for block in range(BLOCKS):
        for count in range(BLOCKS - block + 1):
            expected = crc32c(data[block * BLOCK_BYTES : (block + count) * BLOCK_BYTES])
            assert run_crc(first, block, count) == expected


def test_shift_is_appending_zeros() -> None:
    zeros = bytes(BLOCK_BYTES)
    crc = crc32c(b"anything")
    for blocks in (0, 1, 2, 3, 9):
        assert shift(crc, blocks) ^ crc32c(zeros * blocks) == crc32c(b"anything" + zeros * blocks)


def test_a_full_segment() -> None:
    dice = random.Random(2)
    crcs = array("I", [dice.getrandbits(32) for _ in range(4095)])
    first = beginnings(crcs)
    whole = 0
    for crc in crcs:
        whole = shift(whole, 1) ^ crc
    assert first[4095] == whole
    assert run_crc(first, 4094, 1) == crcs[4094]


@pytest.mark.parametrize("count", [1, 8, 64])
def test_a_changed_bit_shows(data: bytes, crcs: "array[int]", count: int) -> None:
    changed = bytearray(data[: count * BLOCK_BYTES])
    changed[len(changed) // 2] ^= 1
    assert crc32c(changed) != run_crc(beginnings(crcs), 0, count)
