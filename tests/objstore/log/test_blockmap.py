"""The block map against a plain list of entries, with checkpoints, eviction and replay mixed in."""

from __future__ import annotations

from array import array
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from objstore.errors import FormatError
from objstore.log import blockmap
from objstore.log.address import BLOCK_BITS, ENTRY_MIN, HOLE, RESERVED, SEGMENT_BLOCKS_MAX, pack
from objstore.log.blockmap import BLOCKS_MAX, BlockMap, NotLoaded, PageRef
from objstore.log.regions import RunTable, decode_region, runs_of
from objstore.units import REGION_BLOCKS

REGIONS = 5
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
    following = zip(entries, entries[1:], strict=False)
    return 1 + sum(after != (before + 1 if before > RESERVED else before) for before, after in following)


lengths = st.one_of(st.integers(1, 4), st.integers(1, 300), st.integers(1, 3 * REGION_BLOCKS))
places = st.one_of(st.integers(0, BLOCKS - 1), st.integers(0, REGIONS - 1).map(lambda r: r * REGION_BLOCKS))


class MapMachine(RuleBasedStateMachine):
    """`entries` is the truth. `table` is the root of the newest checkpoint, `pages` all pages ever written."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(blockmap, "FILL_TALLY_MAX", 2)
        self.patch.setattr(blockmap, "BATCH_MAX", 64)
        self.patch.setattr(blockmap, "DENSE_RUNS_MIN", 6)
        self.map = BlockMap()
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

    def account(self, counts: dict[int, int]) -> None:
        assert all(counts.values())
        self.live.subtract(counts)

    def account_dropped(self) -> None:
        while self.map.dropped:
            before = len(self.map.dropped)
            self.account(self.map.count_dropped(2))
            assert len(self.map.dropped) == max(0, before - 2)
        for ref in self.map.dropped_refs:
            self.account(live(flat(runs_of(decode_region(self.pages[ref]), 0, REGION_BLOCKS))))
        self.map.dropped_refs.clear()

    @initialize(record_blocks=st.sampled_from([0, 0, 20, 255, 4000]), count=st.integers(1, BLOCKS))
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
        self.account(self.map.assign(first, entry, count))
        self.account_dropped()
        self.live[entry >> BLOCK_BITS] += count
        self.entries[first : first + count] = range(entry, entry + count)

    @rule(first=places, count=st.one_of(lengths, st.just(BLOCKS)), kind=st.sampled_from([HOLE, RESERVED]))
    def fill(self, first: int, count: int, kind: int) -> None:
        count = min(count, BLOCKS - first)
        self.load(self.map.missing_edges(first, count))
        self.account(self.map.fill(first, count, kind))
        self.account_dropped()
        self.entries[first : first + count] = [kind] * count

    @rule(first=places)
    def truncate(self, first: int) -> None:
        self.load(self.map.missing_edges(first, BLOCKS_MAX - first))
        self.account(self.map.truncate(first))
        self.account_dropped()
        self.entries[first:] = [HOLE] * (BLOCKS - first)

    @rule(data=st.data(), around=places, width=lengths, count=st.integers(1, 200))
    def replay(self, data: st.DataObject, around: int, width: int, count: int) -> None:
        seed = data.draw(st.integers(0, 1 << 32))
        random = np.random.default_rng(seed)
        lbas = random.integers(around, min(around + width, BLOCKS), count).astype(np.uint64)
        if seed % 3 == 0:
            lbas.sort()
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

    @precondition(lambda self: self.frozen is not None and self.frozen.pages)
    @rule(data=st.data(), count=st.integers(1, REGIONS))
    def take(self, data: st.DataObject, count: int) -> None:
        assert self.frozen is not None
        for _ in range(min(count, len(self.frozen.pages))):
            region = data.draw(st.sampled_from(sorted(self.frozen.pages)))
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

    @precondition(lambda self: self.frozen is not None and not self.frozen.pages)
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
        regions = sum(map(blockmap.slot_bytes, self.map.regions.values()))
        held = self.frozen.held_bytes if self.frozen is not None else 0
        assert self.map.memory_bytes == regions + held
        assert held >= 0

    @invariant()
    def extents_agree(self) -> None:
        first = 0
        while first < BLOCKS:
            try:
                extents = self.map.extents(first, BLOCKS - first, 3)
            except NotLoaded as error:
                assert error.region == first // REGION_BLOCKS
                first = (error.region + 1) * REGION_BLOCKS
                continue
            assert 1 <= len(extents) <= 3
            for before, after in zip(extents, extents[1:], strict=False):
                assert before[0] != after[0]
            for kind, blocks in extents:
                assert {min(entry, ENTRY_MIN) for entry in self.entries[first : first + blocks]} == {kind}
                first += blocks
        assert first == BLOCKS


MapMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestMapMachine = MapMachine.TestCase
