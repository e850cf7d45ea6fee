"""Replay of operations on windows of a map, against the slowest way to do it."""

from typing import NamedTuple

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from objstore.check.layout import FIRST, LAST, MOVE, PART, REGION_BLOCKS, TRIM, U32, U64, WRITE, ZERO, Operations
from objstore.check.replay import apply, effects, touched

LOG = 7
BLOCKS = 6 * REGION_BLOCKS
PLACES = [0, 1, 5, REGION_BLOCKS - 2, REGION_BLOCKS, REGION_BLOCKS + 700, 3 * REGION_BLOCKS - 1, 5 * REGION_BLOCKS]


class Op(NamedTuple):
    kind: int
    block: int
    count: int
    flags: int


def model(segments: list[tuple[int, Operations]]) -> dict[int, int]:
    """Block by block, operation by operation."""
    content: dict[int, int] = {}
    parts: list[tuple[int, int, int, int]] = []

    def put(kind: int, block: int, count: int, address: int) -> None:
        for index in range(count):
            if kind == TRIM:
                content.pop(block + index, None)
            else:
                content[block + index] = 1 if kind == ZERO else address + index

    for number, operations in segments:
        moved = 0
        for word, count, place in zip(
            operations.words.tolist(), operations.counts.tolist(), operations.places.tolist(), strict=True
        ):
            block, kind, flags = word & (1 << 48) - 1, word >> 48 & 255, word >> 56
            address = LOG << 40 | number << 12 | place
            if kind == MOVE:
                for index in range(count):
                    if content.get(block + index, 0) == int(operations.sources[moved + index]):
                        content[block + index] = address + index
                moved += count
                continue
            if not flags:
                parts = []
                put(kind, block, count, address)
                continue
            if flags & FIRST:
                parts = []
            parts.append((kind, block, count, address))
            if flags & LAST:
                for part in parts:
                    put(*part)
                parts = []
    return content


@st.composite
def logs(draw: st.DrawFn) -> list[tuple[int, Operations]]:
    """Segments of operations; MOVEs name sources that are sometimes right."""
    segments: list[tuple[int, Operations]] = []
    for number in range(draw(st.integers(1, 4))):
        words, counts, places, sources = [], [], [], []
        at = 1
        for _ in range(draw(st.integers(1, 12))):
            kind = draw(st.sampled_from([WRITE, WRITE, WRITE, TRIM, ZERO, MOVE]))
            block = draw(st.sampled_from(PLACES)) + draw(st.integers(0, 3))
            long = kind in (TRIM, ZERO) and draw(st.booleans())
            count = draw(st.integers(257, 3 * REGION_BLOCKS)) if long else draw(st.integers(1, 6))
            count = min(count, BLOCKS - block)
            flags = 0 if kind == MOVE else draw(st.sampled_from([0, 0, 0, PART | FIRST, PART, LAST, FIRST | LAST]))
            if kind == MOVE:
                before = model([*segments, (number, operations(words, counts, places, sources))])
                right = draw(st.booleans())
                sources += [before.get(block + i, 0) if right else 12345 for i in range(count)]
            words.append(block | kind << 48 | flags << 56)
            counts.append(count)
            places.append(0 if kind in (TRIM, ZERO) else at)
            at += 0 if kind in (TRIM, ZERO) else count
        segments.append((number, operations(words, counts, places, sources)))
    return segments


def operations(words: list[int], counts: list[int], places: list[int], sources: list[int]) -> Operations:
    return Operations(np.array(words, U64), np.array(counts, U32), np.array(places, U32), np.array(sources, U64))


@settings(max_examples=150, deadline=None)
@given(logs(), st.sets(st.integers(0, 5), min_size=1))
def test_windows_of_a_replayed_map(segments: list[tuple[int, Operations]], window: set[int]) -> None:
    regions = np.array(sorted(window), U64)
    entries = np.zeros((len(regions), REGION_BLOCKS), U64)
    apply(regions, entries, effects(LOG, segments))
    expected = model(segments)
    for row, region in enumerate(sorted(window)):
        start = region * REGION_BLOCKS
        assert entries[row].tolist() == [expected.get(start + i, 0) for i in range(REGION_BLOCKS)]


@settings(max_examples=100, deadline=None)
@given(logs())
def test_every_region_that_changes_is_touched(segments: list[tuple[int, Operations]]) -> None:
    regions, changed = touched(LOG, segments, np.zeros(0, U64))
    assert {block // REGION_BLOCKS for block in model(segments)} <= set(regions[changed].tolist())
