"""The block map against a plain list of entries, with checkpoints, eviction and replay mixed in."""

from __future__ import annotations

import itertools
from array import array
from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from objstore.errors import FormatError
from objstore.log import blockmap, regionmap
from objstore.log.address import BLOCK_BITS, ENTRY_MIN, HOLE, RESERVED, SEGMENT_BLOCKS_MAX, key_of, pack
from objstore.log.blockmap import (
    BLOCKS_MAX,
    EXTENTS_WORK_MAX,
    EXTENTS_WORK_REGION,
    BlockMap,
    Frozen,
    NotLoaded,
    PageRef,
)
from objstore.log.mapmemory import MapMemory
from objstore.log.regions import RunTable, decode_region, runs_of
from objstore.units import REGION_BLOCKS

REGIONS = 4
BLOCKS = REGIONS * REGION_BLOCKS


def u64(values: list[int]) -> np.ndarray:
    return np.array(values, np.uint64)


def live(entries: list[int]) -> Counter[int]:
    return Counter(entry >> BLOCK_BITS for entry in entries if entry > RESERVED)


def flat(runs: list[tuple[int, int]]) -> list[int]:
    found = []
    for entry, blocks in runs:
        found += range(entry, entry + blocks) if entry > RESERVED else [entry] * blocks
    return found


def merged(entries: list[int]) -> int:
    """How many runs a list of entries has."""
    following = itertools.pairwise(entries)
    return 1 + sum(after != (before + 1 if before > RESERVED else before) for before, after in following)


lengths = st.one_of(st.integers(1, 4), st.integers(1, 300), st.integers(1, 3 * REGION_BLOCKS))
places = st.one_of(st.integers(0, BLOCKS - 1), st.integers(0, REGIONS - 1).map(lambda r: r * REGION_BLOCKS))


class MapMachine(RuleBasedStateMachine):
    """`entries` is the truth. `table` is the root of the newest checkpoint, `pages` all pages ever written."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        # Small enough that every form and both ways through each of these come up all the time.
        self.patch.setattr(blockmap, "FILL_TALLY_MAX", 2)
        self.patch.setattr(blockmap, "FILL_STEP", 2)
        self.patch.setattr(regionmap, "EVICTION_BYTES_MIN", 400)
        self.patch.setattr(blockmap, "INSERT_RUNS_MAX", 4)
        self.patch.setattr(blockmap, "BATCH_MAX", 64)
        self.patch.setattr(blockmap, "DENSE_RUNS_MIN", 6)
        self.map = BlockMap()
        self.account = MapMemory(1)
        self.map.join(self.account)
        self.entries = [HOLE] * BLOCKS
        self.live: Counter[int] = Counter()
        self.pages: dict[PageRef, bytes] = {}
        self.table: dict[int, PageRef] = {}
        self.frozen: blockmap.Frozen | None = None
        self.frozen_entries: list[int] = []
        self.frozen_table: dict[int, PageRef | None] = {}
        self.checkpoint = 0
        self.segment = 1
        self.block = 1

    def teardown(self) -> None:
        self.patch.undo()

    def allocate(self, count: int) -> int:
        """Addresses as a log gives them: each after the last, none twice."""
        if self.block + count > SEGMENT_BLOCKS_MAX:
            self.segment += 1
            self.block = 1
        entry = pack(7, self.segment, self.block)
        self.block += count
        return entry

    def load(self, refs: list[tuple[int, PageRef]]) -> None:
        for region, ref in refs:
            assert self.map.load(region, ref, decode_region(self.pages[ref]))

    def subtract(self, counts: dict[int, int]) -> None:
        assert all(counts.values())
        self.live.subtract(counts)

    def account_dropped(self) -> None:
        while self.map.dropped:
            before = len(self.map.dropped)
            self.subtract(self.map.count_dropped(2))
            assert len(self.map.dropped) == max(0, before - 2)
        for region, ref in self.map.dropped_refs:
            assert ref.offset == region
            self.subtract(live(flat(runs_of(decode_region(self.pages[ref]), 0, REGION_BLOCKS))))
        self.map.dropped_refs.clear()

    @initialize(record_blocks=st.sampled_from([0, 4, 20, 255, 4000]), count=st.integers(1, BLOCKS))
    def sequential_fill(self, record_blocks: int, count: int) -> None:
        first = 0
        while record_blocks and first < count:
            self.assign(first, min(record_blocks, count - first))
            self.block += 1
            first += record_blocks

    # Changes

    @rule(block=places)
    def set_one(self, block: int) -> None:
        entry = self.allocate(1)
        self.load(self.map.missing(block, 1))
        assert self.map.set_one(block, entry) == self.entries[block]
        self.live[self.entries[block] >> BLOCK_BITS] -= 1
        self.live[entry >> BLOCK_BITS] += 1
        self.entries[block] = entry

    @rule(block=places, count=st.integers(2, 80), step=st.integers(1, 40))
    def set_many(self, block: int, count: int, step: int) -> None:
        for place in range(block, min(block + count * step, BLOCKS), step):
            self.set_one(place)

    @rule(block=places, kind=st.sampled_from([HOLE, RESERVED]))
    def set_zero(self, block: int, kind: int) -> None:
        self.load(self.map.missing(block, 1))
        assert self.map.set_one(block, kind) == self.entries[block]
        self.live[self.entries[block] >> BLOCK_BITS] -= 1
        self.entries[block] = kind

    @rule(first=places, count=lengths)
    def assign(self, first: int, count: int) -> None:
        count = min(count, BLOCKS - first, SEGMENT_BLOCKS_MAX - 1)
        entry = self.allocate(count)
        self.load(self.map.missing_edges(first, count))
        self.subtract(self.map.assign(first, entry, count))
        self.account_dropped()
        self.live[entry >> BLOCK_BITS] += count
        self.entries[first : first + count] = range(entry, entry + count)

    @rule(first=places, count=st.one_of(lengths, st.just(BLOCKS)), kind=st.sampled_from([HOLE, RESERVED]))
    def fill(self, first: int, count: int, kind: int) -> None:
        count = min(count, BLOCKS - first)
        self.load(self.map.missing_edges(first, count))
        self.subtract(self.map.fill(first, count, kind))
        self.account_dropped()
        self.entries[first : first + count] = [kind] * count

    @rule(first=places)
    def truncate(self, first: int) -> None:
        self.load(self.map.missing_edges(first, BLOCKS_MAX - first))
        self.subtract(self.map.truncate(first))
        self.account_dropped()
        self.entries[first:] = [HOLE] * (BLOCKS - first)

    @rule(
        seed=st.integers(0, 1 << 32),
        around=places,
        width=lengths,
        count=st.one_of(st.integers(1, 12), st.integers(1, 200)),
        order=st.sampled_from(["random", "sorted", "sequential"]),
    )
    def replay(self, seed: int, around: int, width: int, count: int, order: str) -> None:
        lbas = np.random.default_rng(seed).integers(around, min(around + width, BLOCKS), count).astype(np.uint64)
        if order == "sorted":
            lbas.sort()
        elif order == "sequential":
            count = min(width, 200, BLOCKS - around)
            lbas = np.arange(around, around + count, dtype=np.uint64)
        entry = self.allocate(count)
        entries = u64(list(range(entry, entry + count)))
        self.load(self.map.missing_blocks(lbas))
        self.map.apply_writes(lbas, entries)
        for lba, entry in zip(lbas.tolist(), entries.tolist(), strict=True):
            self.entries[lba] = entry
        self.live = live(self.entries)

    @rule(data=st.data(), first=places, width=lengths, count=st.integers(1, 60), repeats=st.booleans())
    def collect(self, data: st.DataObject, first: int, width: int, count: int, repeats: bool) -> None:
        width = min(width, BLOCKS - first)
        random = np.random.default_rng(data.draw(st.integers(0, 1 << 32)))
        count = min(count, width)
        lbas = [int(lba) for lba in random.choice(width, count, replace=False) + first]
        if data.draw(st.booleans()):
            lbas.sort()
        sources = [self.entries[lba] for lba in lbas]
        entry = self.allocate(2 * count)
        targets = list(range(entry, entry + count))
        for place in range(0, count, 5):
            sources[place] += 1  # the client has overwritten this block since
        if repeats:  # a later record moves the same blocks once more
            sources += targets
            targets += range(entry + count, entry + 2 * count)
            lbas += lbas
        expected = []
        for lba, source, target in zip(lbas, sources, targets, strict=True):
            expected.append(self.entries[lba] == source)
            if expected[-1]:
                self.live[source >> BLOCK_BITS] -= 1
                self.live[target >> BLOCK_BITS] += 1
                self.entries[lba] = target
        self.load(self.map.missing_blocks(u64(lbas)))
        assert self.map.compare_and_assign(u64(lbas), u64(sources), u64(targets)).tolist() == expected

    # Checkpoints

    @precondition(lambda self: self.frozen is None)
    @rule()
    def freeze(self) -> None:
        dirty = set(self.map.dirty)
        self.frozen = self.map.freeze()
        assert self.frozen.regions == dirty
        assert not self.map.dirty
        self.checkpoint += 1
        self.frozen_entries = self.entries[:]
        self.frozen_table = {}

    @precondition(lambda self: self.frozen is not None and self.frozen.left)
    @rule(data=st.data(), count=st.integers(1, REGIONS))
    def take(self, data: st.DataObject, count: int) -> None:
        assert self.frozen is not None
        for _ in range(min(count, len(self.frozen.left))):
            region = data.draw(st.sampled_from(sorted(self.frozen.left)))
            page = self.frozen.take(region)
            expected = self.frozen_entries[region * REGION_BLOCKS : (region + 1) * REGION_BLOCKS]
            if not page:
                assert not any(expected)
                self.frozen_table[region] = None
                continue
            assert flat(runs_of(decode_region(page), 0, REGION_BLOCKS)) == expected
            ref = PageRef(self.checkpoint, region, len(page))
            self.pages[ref] = page
            self.frozen_table[region] = ref

    @precondition(lambda self: self.frozen is not None and not self.frozen.left)
    @rule()
    def commit(self) -> None:
        assert self.frozen is not None
        self.frozen.commit()
        self.frozen = None
        for region, ref in self.frozen_table.items():
            self.table.pop(region, None)
            if ref is not None:
                self.table[region] = ref

    @precondition(lambda self: self.frozen is None)
    @rule()
    def checkpoint_at_once(self) -> None:
        self.freeze()
        assert self.frozen is not None
        for region in self.frozen.regions:
            page = self.frozen.take(region)
            self.frozen_table[region] = PageRef(self.checkpoint, region, len(page)) if page else None
            self.pages[PageRef(self.checkpoint, region, len(page))] = page
        self.commit()

    @precondition(lambda self: self.frozen is None)
    @rule()
    def checkpoint_and_evict(self) -> None:
        self.checkpoint_at_once()
        for region, ref in self.table.items():
            if not isinstance(self.map.regions[region], PageRef):
                assert self.map.evict(region, ref)

    @precondition(lambda self: self.frozen is not None)
    @rule()
    def abort(self) -> None:
        assert self.frozen is not None
        dirty = self.map.dirty | self.frozen.regions
        self.frozen.abort()
        self.frozen = None
        assert self.map.dirty == dirty

    # Eviction

    @rule(region=st.integers(0, REGIONS - 1))
    def evict(self, region: int) -> None:
        value = self.map.regions.get(region)
        owed = self.frozen is not None and region in self.frozen.regions
        may = value is not None and not isinstance(value, PageRef) and region not in self.map.dirty and not owed
        assert self.map.evict(region, self.table.get(region, PageRef(0, 0, 0))) == may

    @rule(count=st.integers(1, REGIONS))
    def evict_candidates(self, count: int) -> None:
        found = self.map.eviction_candidates(count)
        assert len(found) == len(set(found)) <= count
        for region in found:
            before = self.map.memory_bytes
            assert self.map.evict(region, self.table[region])
            assert self.map.memory_bytes < before

    @rule(first=places, count=lengths)
    def load_missing(self, first: int, count: int) -> None:
        count = min(count, BLOCKS - first)
        refs = self.map.missing(first, count)
        for region, ref in refs:
            assert not self.map.load(region, ref._replace(checkpoint=ref.checkpoint + 1), RESERVED)
        self.load(refs)
        assert not self.map.missing(first, count)
        assert flat(self.map.runs(first, count)) == self.entries[first : first + count]

    # What must hold

    @invariant()
    def blocks_agree(self) -> None:
        for region in range(REGIONS):
            first = region * REGION_BLOCKS
            expected = self.entries[first : first + REGION_BLOCKS]
            value = self.map.regions.get(region)
            page = self.pages[self.table[region]] if region in self.table else b""
            if isinstance(value, PageRef):
                assert value == self.table[region]
                assert flat(runs_of(decode_region(page), 0, REGION_BLOCKS)) == expected
                with pytest.raises(NotLoaded):
                    self.map.lookup(first)
                with pytest.raises(NotLoaded):
                    self.map.runs(first + 5, 3)
                with pytest.raises(NotLoaded):
                    self.map.extents(first, 1, 1)
                continue
            runs = self.map.runs(first, REGION_BLOCKS)
            assert flat(runs) == expected
            assert len(runs) == merged(expected)
            for index in (0, 1, 511, 1023):
                assert self.map.lookup(first + index) == expected[index]
            if region not in self.map.dirty and (self.frozen is None or region not in self.frozen.regions):
                assert flat(runs_of(decode_region(page), 0, REGION_BLOCKS) if page else [(HOLE, 1024)]) == expected

    @invariant()
    def counts_agree(self) -> None:
        counted = Counter(self.map.count_live())
        for value in self.map.regions.values():
            if isinstance(value, PageRef):
                counted.update(live(flat(runs_of(decode_region(self.pages[value]), 0, REGION_BLOCKS))))
        assert counted == live(self.entries)
        assert +Counter({key: blocks for key, blocks in self.live.items() if key}) == counted

    @invariant()
    def memory_agrees(self) -> None:
        regions = sum(map(regionmap.slot_bytes, self.map.regions.values()))
        held = self.frozen.held_bytes if self.frozen is not None else 0
        assert self.map.memory_bytes == regions + held
        assert held >= 0

    @invariant()
    def the_account_agrees(self) -> None:
        heavy = regionmap.heavy_bytes
        regions = self.map.regions
        loaded = sum(map(heavy, regions.values()))
        pinned = {region: heavy(regions.get(region)) for region in self.map.dirty}
        owed = 0
        if self.frozen is not None:
            loaded += sum(map(heavy, self.frozen._kept.values()))
            owed = sum(heavy(self.frozen._kept.get(r, regions.get(r))) for r in self.frozen.left)
            for region in self.frozen.regions - self.frozen.left:
                pinned.setdefault(region, heavy(regions.get(region)))
        assert self.account.loaded_bytes == self.map.loaded_bytes == loaded
        assert self.account.pinned_bytes == self.map.pinned_bytes == sum(pinned.values()) + owed

    @invariant()
    def extents_agree(self) -> None:
        first = 0
        while first < BLOCKS:
            if isinstance(self.map.regions.get(first // REGION_BLOCKS), PageRef):
                first = (first // REGION_BLOCKS + 1) * REGION_BLOCKS
                continue
            extents = self.map.extents(first, BLOCKS - first, 3)
            assert 1 <= len(extents) <= 3
            for before, after in itertools.pairwise(extents):
                assert before[0] != after[0]
            for kind, blocks in extents:
                assert {min(entry, ENTRY_MIN) for entry in self.entries[first : first + blocks]} == {kind}
                first += blocks
        assert first == BLOCKS


MapMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestMapMachine = MapMachine.TestCase


# One thing at a time


def scattered(blocks: BlockMap, region: int) -> None:
    """Make a region one that needs the array form."""
    for index in range(0, REGION_BLOCKS, 8):
        blocks.set_one(region * REGION_BLOCKS + index, pack(2, region, 1 + index))


def take_all(frozen: Frozen) -> dict[int, bytes]:
    return {region: frozen.take(region) for region in sorted(frozen.left)}


def entries_of(page: bytes) -> list[int]:
    return flat(runs_of(decode_region(page), 0, REGION_BLOCKS))


@pytest.mark.parametrize("how", ["assign", "fill", "drop"])
def test_single_writes_go_to_what_replaced_an_array(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockmap, "FILL_TALLY_MAX", 9 if how == "fill" else 0)
    blocks = BlockMap()
    scattered(blocks, 0)
    if how == "assign":
        blocks.assign(0, pack(5, 5, 5), REGION_BLOCKS)
    else:
        blocks.fill(0, REGION_BLOCKS, RESERVED)
    old = blocks.lookup(7)
    assert blocks.set_one(7, pack(6, 6, 6)) == old
    assert blocks.lookup(7) == pack(6, 6, 6)
    assert blocks.lookup(8) == (pack(5, 5, 13) if how == "assign" else RESERVED)


class TestCheckpoint:
    def test_clean_dirty_frozen_dirty_again_clean(self) -> None:
        blocks = BlockMap()
        assert not blocks.dirty
        scattered(blocks, 3)
        assert blocks.dirty == {3}
        frozen = blocks.freeze()
        assert not blocks.dirty
        assert frozen.regions == {3}
        blocks.set_one(3 * REGION_BLOCKS, pack(9, 9, 9))
        assert blocks.dirty == {3}
        assert entries_of(frozen.take(3))[0] == pack(2, 3, 1)
        frozen.commit()
        assert blocks.dirty == {3}
        frozen = blocks.freeze()
        assert entries_of(frozen.take(3))[0] == pack(9, 9, 9)
        frozen.commit()
        assert not blocks.dirty
        assert blocks.lookup(3 * REGION_BLOCKS) == pack(9, 9, 9)

    def test_freezing_copies_nothing_and_a_change_copies_one_region(self) -> None:
        blocks = BlockMap()
        for region in range(4):
            scattered(blocks, region)
        before = dict(blocks.regions)
        frozen = blocks.freeze()
        assert all(blocks.regions[region] is before[region] for region in range(4))
        assert frozen.held_bytes == 0
        blocks.set_one(5, pack(9, 9, 9))
        assert [blocks.regions[region] is before[region] for region in range(4)] == [False, True, True, True]
        copy = blocks.regions[0]
        blocks.set_one(6, pack(9, 9, 10))
        assert blocks.regions[0] is copy
        assert frozen.held_bytes == regionmap.slot_bytes(copy)
        frozen.take(0)
        assert frozen.held_bytes == 0
        frozen.take(1)
        array_1 = blocks.regions[1]
        blocks.set_one(REGION_BLOCKS, pack(9, 9, 11))
        assert blocks.regions[1] is array_1, "a page that was taken is owed no more"

    @pytest.mark.parametrize("change", ["set_one", "assign", "fill", "drop", "compare_and_assign", "apply_writes"])
    def test_every_change_leaves_the_frozen_view_alone(self, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(blockmap, "FILL_TALLY_MAX", 1)
        blocks = BlockMap()
        for region in range(3):
            scattered(blocks, region)
        expected = [blocks.lookup(block) for block in range(3 * REGION_BLOCKS)]
        frozen = blocks.freeze()
        lbas = u64([0, REGION_BLOCKS + 8, 2 * REGION_BLOCKS + 16])
        new = pack(9, 9, 9)
        if change == "set_one":
            blocks.set_one(8, new)
        elif change == "assign":
            blocks.assign(5, new, 2000)
        elif change in ("fill", "drop"):
            blocks.fill(5 if change == "fill" else 0, 3 * REGION_BLOCKS - 10, RESERVED)
        elif change == "compare_and_assign":
            sources = u64([expected[lba] for lba in lbas.tolist()])
            assert blocks.compare_and_assign(lbas, sources, u64([new, new + 1, new + 2])).all()
        else:
            blocks.apply_writes(lbas, u64([new, new + 1, new + 2]))
        assert blocks.dirty
        assert [entry for page in take_all(frozen).values() for entry in entries_of(page)] == expected

    def test_abort_makes_everything_dirty_again(self) -> None:
        blocks = BlockMap()
        for region in range(3):
            scattered(blocks, region)
        frozen = blocks.freeze()
        frozen.take(1)
        blocks.set_one(5 * REGION_BLOCKS, pack(9, 9, 9))
        frozen.abort()
        assert blocks.dirty == {0, 1, 2, 5}
        assert blocks.freeze().regions == {0, 1, 2, 5}

    def test_what_is_to_be_written_anew_is_pinned_once(self) -> None:
        blocks = BlockMap()
        scattered(blocks, 0)
        pinned = blocks.pinned_bytes
        frozen = blocks.freeze()
        blocks.write_anew(0)
        frozen.abort()
        assert blocks.dirty == {0}
        assert blocks.pinned_bytes == pinned > 0
        take_all(frozen := blocks.freeze())
        blocks.write_anew(0)
        frozen.commit()
        assert blocks.dirty == {0}
        assert blocks.pinned_bytes == pinned

    def test_one_view_at_a_time_and_no_commit_before_all_is_taken(self) -> None:
        blocks = BlockMap()
        blocks.set_one(5, pack(1, 1, 1))
        frozen = blocks.freeze()
        with pytest.raises(RuntimeError, match="not finished"):
            blocks.freeze()
        with pytest.raises(RuntimeError, match="pages=1"):
            frozen.commit()
        frozen.take(0)
        with pytest.raises(KeyError):
            frozen.take(0)
        frozen.commit()
        assert blocks.freeze().regions == frozenset()

    def test_a_discarded_region_has_no_page(self) -> None:
        blocks = BlockMap({4: PageRef(1, 2, 3)})
        blocks.fill(4 * REGION_BLOCKS, REGION_BLOCKS, HOLE)
        frozen = blocks.freeze()
        assert frozen.take(4) == b""
        assert blocks.dropped_refs == [(4, PageRef(1, 2, 3))]

    def test_a_change_outlives_the_smallest_form_of_what_was_frozen(self) -> None:
        blocks = BlockMap()
        for index in range(0, 40, 2):
            blocks.set_one(index, pack(1, 1, index + 1))
        frozen = blocks.freeze()
        blocks.set_one(1, pack(1, 2, 1))
        assert HOLE in entries_of(frozen.take(0))[:2]
        assert blocks.lookup(1) == pack(1, 2, 1)

    def test_a_sparse_array_is_kept_in_its_smallest_form(self) -> None:
        blocks = BlockMap()
        for index in range(0, 40, 2):
            blocks.set_one(index, pack(1, 1, index + 1))
        assert type(blocks.regions[0]) is array
        before = blocks.memory_bytes
        frozen = blocks.freeze()
        frozen.take(0)
        assert type(blocks.regions[0]) is RunTable
        assert blocks.memory_bytes < before // 4
        blocks.set_one(1, pack(1, 2, 1))
        assert blocks.runs(0, 3) == [(pack(1, 1, 1), 1), (pack(1, 2, 1), 1), (pack(1, 1, 3), 1)]


class TestLoading:
    def test_nothing_is_changed_before_its_region_is_loaded(self) -> None:
        blocks = BlockMap({1: PageRef(1, 0, 8)})
        entry = pack(1, 1, 1)
        lbas = u64([0, REGION_BLOCKS + 5])
        for act in (
            lambda: blocks.lookup(REGION_BLOCKS),
            lambda: blocks.set_one(REGION_BLOCKS, entry),
            lambda: blocks.assign(0, entry, REGION_BLOCKS + 1),
            lambda: blocks.assign(2 * REGION_BLOCKS - 1, entry, 100),
            lambda: blocks.fill(0, REGION_BLOCKS + 1, RESERVED),
            lambda: blocks.truncate(REGION_BLOCKS + 1),
            lambda: blocks.runs(0, 2 * REGION_BLOCKS),
            lambda: blocks.apply_writes(lbas, u64([entry, entry + 1])),
            lambda: blocks.compare_and_assign(lbas, u64([0, 0]), u64([entry, entry + 1])),
        ):
            with pytest.raises(NotLoaded) as caught:
                act()
            assert caught.value.region == 1
            assert blocks.regions == {1: PageRef(1, 0, 8)}
            assert not blocks.dirty

    def test_a_whole_region_is_replaced_unread(self) -> None:
        blocks = BlockMap({1: PageRef(1, 0, 8), 2: PageRef(1, 8, 8)})
        assert blocks.missing_edges(REGION_BLOCKS, 2 * REGION_BLOCKS) == []
        assert blocks.assign(REGION_BLOCKS, pack(1, 1, 1), REGION_BLOCKS) == {}
        assert blocks.fill(2 * REGION_BLOCKS, REGION_BLOCKS, RESERVED) == {}
        assert blocks.dropped_refs == [(1, PageRef(1, 0, 8)), (2, PageRef(1, 8, 8))]
        assert blocks.dirty == {1, 2}

    def test_what_must_be_loaded(self) -> None:
        refs = {region: PageRef(1, region, 8) for region in (1, 2, 3)}
        blocks = BlockMap(refs)
        assert blocks.missing(0, REGION_BLOCKS) == []
        assert blocks.missing(REGION_BLOCKS - 1, 2) == [(1, refs[1])]
        assert blocks.missing(0, 10 * REGION_BLOCKS) == list(refs.items())
        assert blocks.missing(REGION_BLOCKS, 0) == blocks.missing_edges(REGION_BLOCKS + 1, 0) == []
        assert blocks.missing_edges(REGION_BLOCKS + 1, 2) == [(1, refs[1])]
        assert blocks.missing_edges(REGION_BLOCKS + 1, 2 * REGION_BLOCKS) == [(1, refs[1]), (3, refs[3])]
        assert blocks.missing_blocks(u64([3 * REGION_BLOCKS, 5, REGION_BLOCKS, 5])) == [(1, refs[1]), (3, refs[3])]

    def test_a_late_load_changes_nothing(self) -> None:
        old, new = PageRef(1, 0, 8), PageRef(2, 0, 8)
        blocks = BlockMap({0: old})
        blocks.assign(0, pack(5, 5, 5), REGION_BLOCKS)
        assert not blocks.load(0, old, pack(1, 1, 1))
        frozen = blocks.freeze()
        frozen.take(0)
        frozen.commit()
        assert blocks.evict(0, new)
        assert not blocks.load(0, old, pack(1, 1, 1))
        assert blocks.load(0, new, pack(5, 5, 5))
        assert blocks.lookup(7) == pack(5, 5, 12)
        assert not blocks.dirty

    def test_only_what_is_clean_and_large_is_proposed(self) -> None:
        blocks = BlockMap({9: PageRef(1, 0, 8)})
        for region in (1, 2):
            scattered(blocks, region)
        blocks.assign(0, pack(1, 1, 1), REGION_BLOCKS)
        assert blocks.eviction_candidates(9) == []
        frozen = blocks.freeze()
        take_all(frozen)
        assert blocks.eviction_candidates(9) == []
        assert not blocks.evict(1, PageRef(2, 0, 0))
        frozen.commit()
        blocks.set_one(REGION_BLOCKS, HOLE)
        assert blocks.eviction_candidates(9) == [2]
        assert not blocks.evict(1, PageRef(2, 0, 0))
        assert blocks.evict(2, PageRef(2, 0, 0))
        assert not blocks.evict(2, PageRef(2, 0, 0))
        assert not blocks.evict(7, PageRef(2, 0, 0))


class TestLargeDisks:
    def test_an_empty_disk_of_any_size_is_described_in_bounded_steps(self) -> None:
        blocks = BlockMap()
        extents = blocks.extents(5, BLOCKS_MAX - 5, 100)
        assert len(extents) == 1
        assert extents[0] == (HOLE, EXTENTS_WORK_MAX * REGION_BLOCKS - 5)

    def test_scattered_regions_are_described_in_bounded_steps(self) -> None:
        blocks = BlockMap()
        for region in range(0, 1000, 2):
            scattered(blocks, region)
        found = blocks.extents(0, BLOCKS_MAX, 1 << 30)
        covered = sum(count for _, count in found) >> 10
        assert EXTENTS_WORK_MAX // EXTENTS_WORK_REGION <= covered < 1000

    def test_a_description_ends_before_a_region_that_is_not_loaded(self) -> None:
        blocks = BlockMap({5: PageRef(1, 0, 8)})
        assert blocks.extents(100, BLOCKS_MAX - 100, 10) == [(HOLE, 5 * REGION_BLOCKS - 100)]

    def test_runs_stop_at_their_maximum(self) -> None:
        blocks = BlockMap()
        scattered(blocks, 0)
        scattered(blocks, 1)
        assert len(blocks.runs(0, 2 * REGION_BLOCKS)) == 512
        assert blocks.runs(0, 2 * REGION_BLOCKS, 300) == blocks.runs(0, 2 * REGION_BLOCKS)[:300]

    @pytest.mark.parametrize("others", [0, 5000])
    def test_discard_of_everything_queues_what_is_to_be_counted(self, others: int) -> None:
        blocks = BlockMap({region: PageRef(1, region, 8) for region in range(2000, 2000 + others)})
        for region in range(100):
            scattered(blocks, region)
        assert blocks.fill(0, 1000 * REGION_BLOCKS, HOLE) == {}
        assert len(blocks.regions) == others
        assert blocks.dirty == set(range(100))
        counts = Counter(blocks.count_dropped(60))
        assert sum(counts.values()) == 60 * 128
        counts.update(blocks.count_dropped(60))
        assert counts == {key_of(2, region): 128 for region in range(100)}
        assert not blocks.dropped
        assert blocks.truncate(1000 * REGION_BLOCKS) == {}
        assert len(blocks.dropped_refs) == others
        assert not blocks.regions
        assert blocks.memory_bytes == 0

    def test_reserving_a_large_range(self) -> None:
        blocks = BlockMap({7: PageRef(1, 0, 8)})
        scattered(blocks, 3)
        assert blocks.fill(10, 1000 * REGION_BLOCKS, RESERVED) == {}
        assert blocks.runs(0, 1001 * REGION_BLOCKS) == [
            (HOLE, 10),
            (RESERVED, 1000 * REGION_BLOCKS),
            (HOLE, REGION_BLOCKS - 10),
        ]
        assert blocks.dropped_refs == [(7, PageRef(1, 0, 8))]
        assert sum(blocks.count_dropped(9).values()) == 128

    def test_replay_of_a_sequential_fill_gives_one_run_a_region(self) -> None:
        blocks = BlockMap()
        lbas = np.arange(500, 500 + 3 * REGION_BLOCKS, dtype=np.uint64)
        blocks.apply_writes(lbas, lbas + np.uint64(pack(2, 1, 1)))
        assert blocks.runs(0, 500 + 3 * REGION_BLOCKS) == [(HOLE, 500), (pack(2, 1, 501), 3 * REGION_BLOCKS)]
        assert [type(blocks.regions[region]) for region in range(4)] == [RunTable, int, int, RunTable]

    def test_replay_of_few_writes_to_many_regions_makes_no_arrays(self) -> None:
        blocks = BlockMap()
        for region in range(0, 300, 3):
            blocks.assign(region * REGION_BLOCKS, pack(1, region, 1), 2 * REGION_BLOCKS)
        lbas = np.random.default_rng(1).integers(0, 300 * REGION_BLOCKS, 1500).astype(np.uint64)
        entries = np.arange(pack(2, 1, 1), pack(2, 1, 1501), dtype=np.uint64)
        expected = dict(zip(lbas.tolist(), entries.tolist(), strict=True))
        blocks.apply_writes(lbas, entries)
        assert array not in set(map(type, blocks.regions.values()))
        for block in range(300 * REGION_BLOCKS):
            index = block % (3 * REGION_BLOCKS)
            old = HOLE if index >= 2 * REGION_BLOCKS else pack(1, block // (3 * REGION_BLOCKS) * 3, 1 + index)
            assert blocks.lookup(block) == expected.get(block, old)


class TestRefusals:
    def test_a_run_beyond_its_segment(self) -> None:
        blocks = BlockMap()
        for entry, count in ((HOLE, 1), (RESERVED, 1), (pack(1, 1, 1) - 1, 1), (pack(1, 1, SEGMENT_BLOCKS_MAX - 1), 2)):
            with pytest.raises(ValueError, match=f"blocks={count}"):
                blocks.assign(0, entry, count)
        with pytest.raises(ValueError, match="kind=2"):
            blocks.fill(0, 1, 2)
        assert not blocks.regions

    def test_replayed_entries_that_are_no_addresses(self) -> None:
        blocks = BlockMap()
        for entry in (2, ENTRY_MIN - 1, pack(1, 1, 1) - 1):
            with pytest.raises(FormatError):
                blocks.apply_writes(u64([1]), u64([entry]))
            with pytest.raises(FormatError):
                blocks.compare_and_assign(u64([1]), u64([0]), u64([entry]))
        assert not blocks.regions

    def test_nothing_to_do(self) -> None:
        blocks = BlockMap()
        nothing = u64([])
        blocks.apply_writes(nothing, nothing)
        assert not len(blocks.compare_and_assign(nothing, nothing, nothing))
        assert blocks.fill(5, 0, RESERVED) == blocks.fill(0, 0, RESERVED) == {}
        assert blocks.fill(5, 3 * REGION_BLOCKS, HOLE) == {}
        assert not blocks.dirty


class TestAccount:
    def test_a_map_counts_only_while_it_belongs_to_the_account(self) -> None:
        blocks = BlockMap()
        scattered(blocks, 0)
        account = MapMemory(1)
        blocks.join(account)
        size_bytes = regionmap.slot_bytes(blocks.regions[0])
        assert (account.loaded_bytes, account.pinned_bytes) == (size_bytes, size_bytes)
        scattered(blocks, 1)
        assert (account.loaded_bytes, account.pinned_bytes) == (2 * size_bytes, 2 * size_bytes)
        frozen = blocks.freeze()
        take_all(frozen)
        frozen.commit()
        assert (account.loaded_bytes, account.pinned_bytes) == (2 * size_bytes, 0)
        blocks.leave()
        blocks.leave()
        scattered(blocks, 2)
        assert (account.loaded_bytes, account.pinned_bytes) == (0, 0)

    def test_what_takes_no_more_than_the_place_of_its_page_does_not_count(self) -> None:
        blocks = BlockMap()
        blocks.assign(0, pack(1, 1, 1), 4000)
        blocks.fill(1 << 20, 1 << 20, RESERVED)
        assert (blocks.loaded_bytes, blocks.pinned_bytes) == (0, 0)

    def test_steps_of_a_large_fill_are_bounded(self) -> None:
        blocks = BlockMap({region: PageRef(1, region, 8) for region in range(3 * blockmap.FILL_STEP)})
        left = []
        for counts in blocks.fill_steps(0, 1 << 32, HOLE):
            assert not counts
            left.append(len(blocks.regions))
        assert max(before - after for before, after in itertools.pairwise([3 * blockmap.FILL_STEP, *left])) == (
            blockmap.FILL_STEP
        )
        assert left[-1] == 0
