"""The order of eviction: new and returning regions are passed over, every call ends."""

from objstore.log.eviction import GHOSTS_MAX, SCAN_MAX, EvictionClock


def test_a_loaded_region_is_passed_once() -> None:
    clock = EvictionClock()
    clock.loaded(1)
    assert clock.candidates([1, 2, 3], lambda _: True, 2) == [2, 3]
    assert clock.candidates([1, 2, 3], lambda _: True, 1) == [1]


def test_a_region_that_returns_is_passed_twice() -> None:
    clock = EvictionClock()
    regions = [1, 2]
    clock.evicted(1)
    clock.loaded(1)
    found = [clock.candidates(regions, lambda _: True, 1) for _ in range(5)]
    assert found == [[2], [2], [1], [2], [1]]


def test_all_have_chances_left() -> None:
    clock = EvictionClock()
    for region in (1, 2):
        clock.evicted(region)
        clock.loaded(region)
    assert sorted(clock.candidates([1, 2], lambda _: True, 5)) == [1, 2]


def test_the_hand_goes_on_where_it_stopped() -> None:
    clock = EvictionClock()
    regions = list(range(6))
    found = [region for _ in range(3) for region in clock.candidates(regions, lambda _: True, 2)]
    assert found == regions


def test_nothing_may_go() -> None:
    clock = EvictionClock()
    clock.loaded(2)
    assert clock.candidates([1, 2, 3], lambda _: False, 2) == []
    assert clock.candidates([], lambda _: True, 2) == []
    assert clock.candidates([1, 2, 3], lambda region: region == 3, 2) == [3]


def test_what_was_evicted_long_ago_is_forgotten() -> None:
    clock = EvictionClock()
    for region in range(GHOSTS_MAX + 1):
        clock.evicted(region)
    clock.loaded(0)
    clock.loaded(1)
    found = [clock.candidates([0, 1], lambda _: True, 1) for _ in range(2)]
    assert found == [[0], [0]]


def test_a_call_looks_at_a_bounded_number_of_regions() -> None:
    clock = EvictionClock()
    regions = range(3 * SCAN_MAX)
    looked: list[int] = []

    def may_go(region: int) -> bool:
        looked.append(region)
        return region == 2 * SCAN_MAX + 5

    assert clock.candidates(regions, may_go, 8) == clock.candidates(regions, may_go, 8) == []
    assert looked == list(range(2 * SCAN_MAX))
    assert clock.candidates(regions, may_go, 8) == [2 * SCAN_MAX + 5]
