"""The forms of a region agree with each other, and their pages with the table in the module's docstring."""

from __future__ import annotations

import itertools
import struct
from array import array
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from objstore.errors import FormatError
from objstore.log.address import BLOCK_BITS, ENTRY_MIN, HOLE, RESERVED, SEGMENT_BLOCKS_MAX, pack
from objstore.log.mapbulk import keep_last, tally_regions
from objstore.log.regions import (
    PAGE_BYTES_MAX,
    TABLE_RUNS_MAX,
    Region,
    RunTable,
    compact,
    decode_region,
    encode_region,
    entry_at,
    expand,
    kinds_of,
    runs_of,
    splice,
    tally,
)
from objstore.units import REGION_BLOCKS

BASE = pack(3, 9, 1)


def run_entries(entry: int, blocks: int) -> list[int]:
    return list(range(entry, entry + blocks)) if entry > RESERVED else [entry] * blocks


def listed(value: Region | None) -> list[int]:
    return [entry_at(value, index) for index in range(REGION_BLOCKS)]


def from_list(entries: list[int]) -> Region | None:
    return compact(array("Q", entries))


@st.composite
def region_lists(draw: st.DrawFn) -> list[int]:
    """1,024 entries of 1..200 runs; some runs go on where the last one of their segment stopped."""
    cuts = sorted(draw(st.sets(st.integers(1, REGION_BLOCKS - 1), max_size=draw(st.sampled_from([0, 3, 63, 64, 200])))))
    kinds = draw(st.lists(st.integers(0, 4), min_size=len(cuts) + 1, max_size=len(cuts) + 1))
    entries: list[int] = []
    for number, (low, high, kind) in enumerate(zip([0, *cuts], [*cuts, REGION_BLOCKS], kinds, strict=True)):
        if kind in (HOLE, RESERVED):
            entries += [kind] * (high - low)
        else:
            entry = entries[-1] + 1 if kind == 2 and entries and entries[-1] > RESERVED else pack(kind, number, 1)
            entries += run_entries(entry, high - low)
    return entries


class TestForms:
    def test_the_smallest_form_is_chosen(self) -> None:
        assert from_list([HOLE] * REGION_BLOCKS) is None
        assert from_list([RESERVED] * REGION_BLOCKS) == RESERVED
        assert from_list(run_entries(BASE, REGION_BLOCKS)) == BASE
        scattered = [BASE + 2 * index for index in range(REGION_BLOCKS)]
        assert type(from_list(scattered)) is array
        for runs in (2, TABLE_RUNS_MAX):
            assert type(from_list([*scattered[: runs - 1], *[HOLE] * (REGION_BLOCKS - runs + 1)])) is RunTable
        assert type(from_list([*scattered[:TABLE_RUNS_MAX], *[HOLE] * (REGION_BLOCKS - TABLE_RUNS_MAX)])) is array

    @given(region_lists())
    def test_every_form_holds_the_same_blocks(self, entries: list[int]) -> None:
        value = from_list(entries)
        assert listed(value) == entries
        assert listed(expand(value)) == entries

    @given(region_lists(), st.integers(0, REGION_BLOCKS - 1), st.integers(1, REGION_BLOCKS))
    def test_runs_and_kinds_of_a_part(self, entries: list[int], first: int, count: int) -> None:
        end = min(first + count, REGION_BLOCKS)
        for value in (from_list(entries), array("Q", entries)):
            runs = runs_of(value, first, end)
            assert [entry for run in runs for entry in run_entries(*run)] == entries[first:end]
            for (entry, blocks), (following, _) in itertools.pairwise(runs):
                assert following != run_entries(entry, blocks + 1)[-1]
            kinds = kinds_of(value, first, end)
            expected = [min(entry, ENTRY_MIN) for entry in entries[first:end]]
            expected = [min(entry, ENTRY_MIN) for entry in entries[first:end]]
            assert [kind for kind, blocks in kinds for _ in range(blocks)] == expected
            assert all(before[0] != after[0] for before, after in itertools.pairwise(kinds))

    @given(region_lists(), st.integers(0, REGION_BLOCKS - 1), st.integers(1, REGION_BLOCKS), st.integers(0, 3))
    def test_splice(self, entries: list[int], first: int, count: int, what: int) -> None:
        value = from_list(entries)
        if type(value) is array:
            return
        end = min(first + count, REGION_BLOCKS)
        before = entries[first - 1] if first else HOLE
        entry = [HOLE, RESERVED, pack(9, 9, 9), before + 1 if before > RESERVED else before][what]
        expected = entries[:first] + run_entries(entry, end - first) + entries[end:]
        changed = splice(value, first, end, entry, TABLE_RUNS_MAX)
        assert listed(changed) == expected
        assert listed(value) == entries
        best = from_list(expected)
        assert type(changed) is type(best)
        assert best is None or changed == best

    @given(region_lists(), st.integers(0, REGION_BLOCKS - 1), st.integers(1, REGION_BLOCKS))
    def test_tally(self, entries: list[int], first: int, count: int) -> None:
        end = min(first + count, REGION_BLOCKS)
        for value in (from_list(entries), array("Q", entries)):
            counts: dict[int, int] = {}
            tally(value, first, end, counts)
            assert counts == Counter(entry >> BLOCK_BITS for entry in entries[first:end] if entry > RESERVED)

    @given(st.lists(region_lists(), max_size=4))
    def test_tally_of_many(self, regions: list[list[int]]) -> None:
        values = [value for value in map(from_list, regions) if value is not None]
        expected = Counter(entry >> BLOCK_BITS for entries in regions for entry in entries if entry > RESERVED)
        assert tally_regions(values) == expected

    def test_tally_of_more_arrays_than_one_step_takes(self) -> None:
        scattered = array("Q", [BASE + 2 * index for index in range(REGION_BLOCKS)])
        assert tally_regions([scattered] * 1500) == {BASE >> BLOCK_BITS: 1500 * REGION_BLOCKS}

    @pytest.mark.parametrize("far", [1, 1 << 14])
    def test_tally_of_segments_of_several_logs_and_far_apart(self, far: int) -> None:
        entries = [pack(log, 7 + far * (index % 3), 1 + index) for index in range(512) for log in (3, 9)]
        table = splice(None, 10, 20, pack(1 << 15, 1, 5), TABLE_RUNS_MAX)
        assert table is not None
        expected = Counter(entry >> BLOCK_BITS for entry in entries)
        expected[pack(1 << 15, 1, 5) >> BLOCK_BITS] = 10
        assert tally_regions([array("Q", entries), table]) == expected


def test_the_last_write_to_a_block_is_kept() -> None:
    random = np.random.default_rng(3)
    lbas = random.integers(0, 500, 4000).astype(np.uint64) + np.uint64((1 << 42) - 500)
    entries = np.arange(4000, dtype=np.uint64)
    expected = dict(zip(lbas.tolist(), entries.tolist(), strict=True))
    kept_lbas, kept = keep_last(lbas, entries)
    assert dict(zip(kept_lbas.tolist(), kept.tolist(), strict=True)) == expected
    assert kept_lbas.tolist() == sorted(expected)


class TestPages:
    @given(region_lists())
    def test_a_page_holds_its_region(self, entries: list[int]) -> None:
        value = from_list(entries)
        if value is None:
            return
        page = encode_region(value)
        assert len(page) <= PAGE_BYTES_MAX
        again = decode_region(page)
        assert type(again) is type(value)
        assert again == value
        assert decode_region(memoryview(page)) == value

    def test_layout_of_one_run(self) -> None:
        assert encode_region(BASE) == struct.pack("<BBHIQ", 1, 0, 1, 0, BASE)
        assert encode_region(RESERVED) == struct.pack("<BBHIQ", 1, 0, 1, 0, 1)

    def test_layout_of_a_table(self) -> None:
        page = encode_region(RunTable("Q", [0, 5, 700, BASE, HOLE, RESERVED]))
        assert page == struct.pack("<BBHI3Q3H", 2, 0, 3, 0, BASE, 0, 1, 0, 5, 700)

    def test_layout_of_entries(self) -> None:
        entries = [BASE + 2 * index for index in range(REGION_BLOCKS)]
        assert encode_region(array("Q", entries)) == struct.pack("<BBHI1024Q", 3, 0, 1024, 0, *entries)

    @pytest.mark.parametrize(
        "page",
        [
            b"",
            struct.pack("<BBHI", 1, 0, 1, 0),
            struct.pack("<BBHIQ", 0, 0, 1, 0, BASE),
            struct.pack("<BBHIQ", 4, 0, 1, 0, BASE),
            struct.pack("<BBHIQ", 1, 1, 1, 0, BASE),
            struct.pack("<BBHIQ", 1, 0, 1, 1, BASE),
            struct.pack("<BBHIQ", 1, 0, 2, 0, BASE),
            struct.pack("<BBHIQB", 1, 0, 1, 0, BASE, 0),
            struct.pack("<BBHIQ", 1, 0, 1, 0, HOLE),
            struct.pack("<BBHIQ", 1, 0, 1, 0, 2),
            struct.pack("<BBHIQ", 1, 0, 1, 0, ENTRY_MIN - 1),
            struct.pack("<BBHIQ", 1, 0, 1, 0, BASE - 1),
            struct.pack("<BBHIQ", 1, 0, 1, 0, pack(1, 1, SEGMENT_BLOCKS_MAX - REGION_BLOCKS + 1)),
            struct.pack("<BBHIQH", 2, 0, 1, 0, BASE, 0),
            struct.pack("<BBHI65Q65H", 2, 0, 65, 0, *[HOLE] * 65, *range(65)),
            struct.pack("<BBHI2Q", 2, 0, 2, 0, BASE, HOLE),
            struct.pack("<BBHI2Q2H", 2, 0, 2, 0, BASE, HOLE, 1, 5),
            struct.pack("<BBHI3Q3H", 2, 0, 3, 0, BASE, HOLE, RESERVED, 0, 5, 5),
            struct.pack("<BBHI2Q2H", 2, 0, 2, 0, BASE, HOLE, 0, REGION_BLOCKS),
            struct.pack("<BBHI2Q2H", 2, 0, 2, 0, pack(1, 1, SEGMENT_BLOCKS_MAX - 9), HOLE, 0, 10),
            struct.pack("<BBHI1023Q", 3, 0, 1023, 0, *[BASE] * 1023),
            struct.pack("<BBHI1024Q", 3, 0, 1024, 0, *[BASE] * 1023, 7),
        ],
    )
    def test_what_is_no_page(self, page: bytes) -> None:
        with pytest.raises(FormatError):
            decode_region(page)

    @given(region_lists(), st.data())
    def test_a_damaged_page_is_refused_or_harmless(self, entries: list[int], data: st.DataObject) -> None:
        value = from_list(entries)
        if value is None:
            return
        page = bytearray(encode_region(value))
        for _ in range(data.draw(st.integers(1, 3))):
            page[data.draw(st.integers(0, min(len(page), 200) - 1))] = data.draw(st.integers(0, 255))
        try:
            again = decode_region(bytes(page))
        except FormatError:
            return
        assert len(listed(again)) == REGION_BLOCKS
        assert listed(decode_region(encode_region(again))) == listed(again)
