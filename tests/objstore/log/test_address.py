"""Map entries: parts, limits, and the two zeros that are no addresses."""

import pytest

from objstore.log.address import (
    ENTRY_MIN,
    HOLE,
    LOG_MAX,
    RESERVED,
    SEGMENT_BLOCKS_MAX,
    SEGMENT_MAX,
    key_of,
    pack,
    segment_key,
    unpack,
)


@pytest.mark.parametrize("parts", [(1, 0, 1), (LOG_MAX, SEGMENT_MAX, SEGMENT_BLOCKS_MAX - 1), (5, 77, 300)])
def test_parts_survive(parts: tuple[int, int, int]) -> None:
    entry = pack(*parts)
    assert unpack(entry) == parts
    assert ENTRY_MIN < entry < 1 << 64
    assert segment_key(entry) == key_of(*parts[:2])


@pytest.mark.parametrize(
    "parts",
    [(0, 1, 1), (LOG_MAX + 1, 1, 1), (1, -1, 1), (1, SEGMENT_MAX + 1, 1), (1, 1, 0), (1, 1, SEGMENT_BLOCKS_MAX)],
)
def test_parts_out_of_range(parts: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=f"log={parts[0]} segment={parts[1]} block={parts[2]}"):
        pack(*parts)


def test_zeros_belong_to_no_segment() -> None:
    assert segment_key(HOLE) == segment_key(RESERVED) == 0
    assert key_of(1, 0) == segment_key(ENTRY_MIN) > 0


def test_the_addresses_of_two_segments_are_never_consecutive() -> None:
    assert pack(1, 1, SEGMENT_BLOCKS_MAX - 1) + 1 < pack(1, 2, 1)
