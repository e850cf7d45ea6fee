"""Placement: deterministic, balanced by weight, and moving no more than it must."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from objstore.replica.placement import choose

KEYS = range(6000)
GOLDEN = [
    ["zone-4", "zone-5", "zone-0"],
    ["zone-2", "zone-6", "zone-5"],
    ["zone-0", "zone-5", "zone-2"],
    ["zone-1", "zone-6", "zone-3"],
]
GOLDEN_BYTES = ["zone-0", "zone-1"]
ZONES = [(f"zone-{number}", 1.0) for number in range(8)]


def test_golden() -> None:
    """Changing the function would move every object of every store: these never change."""
    assert [choose(ZONES, key, 3) for key in (0, 1, 2, (1 << 64) - 1)] == GOLDEN
    assert choose(ZONES, b"log/000001", 2) == GOLDEN_BYTES


@given(st.permutations(ZONES), st.integers(0, (1 << 64) - 1), st.integers(0, 10))
def test_order_of_zones_does_not_matter(zones: list[tuple[str, float]], key: int, copies: int) -> None:
    chosen = choose(zones, key, copies)
    assert chosen == choose(ZONES, key, copies)
    assert len(set(chosen)) == len(chosen) == min(copies, len(ZONES))


@given(st.binary(max_size=40), st.integers(1, 7))
def test_more_copies_extend_fewer(key: bytes, copies: int) -> None:
    assert choose(ZONES, key, copies + 1)[:copies] == choose(ZONES, key, copies)


def test_an_int_key_is_its_eight_bytes() -> None:
    assert choose(ZONES, 0x0102, 3) == choose(ZONES, b"\x02\x01" + bytes(6), 3)


@pytest.mark.parametrize("copies", [1, 3])
def test_balance(copies: int) -> None:
    counts = Counter(zone for key in KEYS for zone in choose(ZONES, key, copies))
    mean = len(KEYS) * copies / len(ZONES)
    assert len(counts) == len(ZONES)
    assert all(0.88 * mean < count < 1.12 * mean for count in counts.values()), counts


def test_weights_share_in_proportion() -> None:
    zones = [("a", 1.0), ("b", 2.0), ("c", 5.0), ("empty", 0.0)]
    counts = Counter(choose(zones, key, 1)[0] for key in KEYS)
    assert set(counts) == {"a", "b", "c"}
    for zone, weight in zones[:3]:
        assert counts[zone] == pytest.approx(len(KEYS) * weight / 8, rel=0.1)
    assert choose(zones, 1, 4) == choose(zones[:3], 1, 3)


def test_scale_of_weights_does_not_matter() -> None:
    big = [(zone, weight * 4096.0) for zone, weight in ZONES]
    assert all(choose(ZONES, key, 3) == choose(big, key, 3) for key in range(500))


def test_a_lost_zone_moves_only_its_keys() -> None:
    lost = "zone-3"
    rest = [zone for zone in ZONES if zone[0] != lost]
    for key in range(1000):
        before, after = choose(ZONES, key, 3), choose(rest, key, 3)
        kept = [zone for zone in before if zone != lost]
        assert [zone for zone in after if zone in before] == kept
        assert len(set(after) - set(before)) == (lost in before)


def test_a_heavier_zone_only_gains() -> None:
    heavier = [*ZONES[:-1], (ZONES[-1][0], 1.5)]
    gained = 0
    for key in range(1000):
        before, after = choose(ZONES, key, 3), choose(heavier, key, 3)
        assert set(after) - set(before) <= {ZONES[-1][0]}
        gained += before != after
    assert 0 < gained < 300


def test_no_zones() -> None:
    assert choose([], 1, 3) == []
    assert choose([("a", 0.0)], 1, 3) == []
