"""Sizes as people write them."""

import pytest

from objstore.errors import InvalidRequest
from objstore.units import GIB, KIB, MIB, TIB, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("1", 1),
        ("4096", 4096),
        ("512K", 512 * KIB),
        (" 10g ", 10 * GIB),
        ("1.5T", TIB + TIB // 2),
        ("0.25K", 256),
        ("64M", 64 * MIB),
    ],
)
def test_sizes_that_are_understood(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "G", "-1", "+1", "1e3", "10GB", "10 G", "1.", ".5G", "0x10", "1_000", "१०", "9" * 21]
)
def test_other_texts_are_quoted_in_the_error(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)


def test_a_fraction_of_a_byte_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="whole number of bytes"):
        parse_size("1.3K")


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0"),
        (1023, "1023"),
        (KIB, "1K"),
        (1536, "1.5K"),
        (10 * GIB, "10G"),
        (10 * GIB + 1, "10G"),
        (3 * TIB // 2, "1.5T"),
    ],
)
def test_sizes_for_people(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text
