"""Replay gives what carrying the operations out one by one gives, whatever they are and however they are cut."""

import random
from array import array

import pytest
from crc32c import crc32c

from objstore.format.record import FLAG_SHIFT, KIND_SHIFT, LBA_MASK, Flag, Kind, word
from objstore.format.segment import Directory
from objstore.log import replay as replay_module
from objstore.log.address import HOLE, RESERVED, pack
from objstore.log.blockmap import BlockMap, PageRef
from objstore.log.regions import encode_region
from objstore.log.replay import Replay

LOG = 1
BLOCKS = 5000
FILLS = {Kind.TRIM: HOLE, Kind.ZERO: RESERVED}
Operation = tuple[int, int, int, int, list[int]]
"""(kind, flags, block, count, sources)"""


def directory(number: int, operations: list[Operation]) -> Directory:
    """The directory of a segment that holds these operations."""
    words, counts, starts, sources = array("Q"), array("I"), array("I"), array("Q")
    block = 2
    for kind, flags, lba, count, moved in operations:
        words.append(word(kind, lba, flags))
        counts.append(count)
        starts.append(0 if kind in FILLS else block)
        block += 0 if kind in FILLS else count
        sources.extend(moved)
    return Directory(
        LOG, number, 1, 1, len(words), 0, 0, 0, crc32c(b""), words, counts, starts, array("I"), sources,
        array("I"), array("I"),
    )  # fmt: skip


class Model:
    """The map as a plain dictionary, operation by operation."""

    def __init__(self) -> None:
        self.entries: dict[int, int] = {}
        self.parts: list[tuple[int, int, int, int]] = []

    def apply(self, found: Directory) -> None:
        sources = iter(found.sources)
        for bits, count, start in zip(found.words, found.counts, found.starts, strict=True):
            kind, flags, lba = bits >> KIND_SHIFT & 0xFF, bits >> FLAG_SHIFT, bits & LBA_MASK
            entry = pack(LOG, found.segment, start) if start else FILLS[Kind(kind)]
            if kind == Kind.MOVE:
                for i in range(count):
                    if self.entries.get(lba + i, HOLE) == next(sources):
                        self.entries[lba + i] = entry + i
                continue
            if flags & Flag.FIRST or not flags:
                self.parts.clear()
            self.parts.append((lba, count, entry, 1 if start else 0))
            if flags and not flags & Flag.LAST:
                continue
            for part_lba, part_count, part_entry, step in self.parts:
                for i in range(part_count):
                    self.entries[part_lba + i] = part_entry + i * step
            self.parts.clear()


async def nothing_to_load(wanted: list[tuple[int, PageRef]]) -> None:
    assert not wanted


async def replayed(directories: list[Directory]) -> BlockMap:
    blockmap = BlockMap()
    replay = Replay(blockmap, nothing_to_load)
    for found in directories:
        await replay.add(found)
    await replay.finish()
    return blockmap


def assert_equal(blockmap: BlockMap, model: Model) -> None:
    for lba in range(BLOCKS):
        assert blockmap.lookup(lba) == model.entries.get(lba, HOLE), f"block {lba}"


def random_segments(dice: random.Random, count: int) -> list[Directory]:
    """Segments of random operations; moves name right sources, stale ones and wrong ones."""
    model = Model()
    found = []
    for number in range(1, count):
        operations: list[Operation] = []
        for _ in range(dice.randint(0, 40)):
            choice = dice.random()
            count = dice.choice((1, 1, 1, 3, 30))
            lba = dice.randrange(BLOCKS - 40) if dice.random() < 0.5 else dice.randrange(60)
            if choice < 0.5:
                operations.append((Kind.WRITE, 0, lba, count, []))
            elif choice < 0.65:
                kind = dice.choice((Kind.TRIM, Kind.ZERO))
                operations.append((kind, 0, lba, dice.choice((count, 1000)) if lba < 4000 else count, []))
            elif choice < 0.85:
                moved = [model.entries.get(lba + i, HOLE) for i in range(count)]
                if dice.random() < 0.2:
                    moved[dice.randrange(count)] = pack(LOG, 9999, 1)
                operations.append((Kind.MOVE, 0, lba, count, moved))
            else:
                flags = dice.choice((Flag.PART | Flag.FIRST, Flag.PART, Flag.LAST))
                operations.append((dice.choice((Kind.WRITE, Kind.TRIM)), flags, lba, count, []))
        found.append(directory(number, operations))
        model.apply(found[-1])
    return found


@pytest.mark.parametrize("seed", range(12))
async def test_replay_is_like_one_operation_after_the_other(seed: int) -> None:
    found = random_segments(random.Random(seed), 30)
    model = Model()
    for one in found:
        model.apply(one)
    assert_equal(await replayed(found), model)


async def test_writes_are_applied_in_batches_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay_module, "BATCH_BLOCKS_MAX", 7)
    await test_replay_is_like_one_operation_after_the_other(3)


async def test_the_last_write_of_a_block_counts() -> None:
    blockmap = await replayed([directory(1, [(Kind.WRITE, 0, 7, 1, [])] * 50 + [(Kind.WRITE, 0, 5, 4, [])])])
    assert blockmap.lookup(7) == pack(LOG, 1, 2 + 50 + 2)


async def test_a_moved_block_counts_only_from_its_source() -> None:
    first = directory(1, [(Kind.WRITE, 0, 7, 2, [])])
    overwritten = directory(2, [(Kind.WRITE, 0, 8, 1, [])])
    moved = directory(3, [(Kind.MOVE, 0, 7, 2, [pack(LOG, 1, 2), pack(LOG, 1, 3)])])
    blockmap = await replayed([first, overwritten, moved])
    assert blockmap.lookup(7) == pack(LOG, 3, 2)
    assert blockmap.lookup(8) == pack(LOG, 2, 2), "the client's newer write wins"
    blockmap = await replayed([first, moved, overwritten])
    assert blockmap.lookup(8) == pack(LOG, 2, 2)


async def test_parts_take_effect_with_the_last_across_segments_and_moves() -> None:
    first = directory(1, [(Kind.WRITE, 0, 50, 1, [])])
    begun = directory(2, [(Kind.WRITE, Flag.PART | Flag.FIRST, 10, 2, []), (Kind.TRIM, Flag.PART, 50, 1, [])])
    moved = directory(3, [(Kind.MOVE, 0, 50, 1, [pack(LOG, 1, 2)])])
    ended = directory(4, [(Kind.WRITE, Flag.LAST, 12, 1, [])])
    blockmap = await replayed([first, begun, moved])
    assert [blockmap.lookup(lba) for lba in (10, 11, 12, 50)] == [HOLE, HOLE, HOLE, pack(LOG, 3, 2)]
    blockmap = await replayed([first, begun, moved, ended])
    assert [blockmap.lookup(lba) for lba in (10, 11, 12)] == [pack(LOG, 2, 2), pack(LOG, 2, 3), pack(LOG, 4, 2)]
    assert blockmap.lookup(50) == HOLE


@pytest.mark.parametrize("next_one", [(Kind.WRITE, 0, 30, 1, []), (Kind.WRITE, Flag.PART | Flag.FIRST, 30, 1, [])])
async def test_a_request_whose_last_part_never_came_has_no_effect(next_one: Operation) -> None:
    lost = (Kind.WRITE, Flag.PART | Flag.FIRST, 10, 2, [])
    last = (Kind.WRITE, Flag.LAST, 20, 1, [])
    blockmap = await replayed([directory(1, [lost, next_one]), directory(2, [last])])
    assert blockmap.lookup(10) == HOLE
    assert blockmap.lookup(20) == pack(LOG, 2, 2)


async def test_what_is_in_a_checkpoint_is_loaded_where_it_matters() -> None:
    """A write of a whole region needs no page; a write of a part, a trim of a part and a move do."""
    refs = {region: PageRef(1, region, 16) for region in range(4)}
    loads: list[int] = []
    blockmap = BlockMap(refs)

    async def load(wanted: list[tuple[int, PageRef]]) -> None:
        for region, ref in wanted:
            loads.append(region)
            blockmap.load(region, ref, pack(LOG, 1, 1))

    replay = Replay(blockmap, load)
    await replay.add(directory(5, [(Kind.TRIM, 0, 0, 1024, [])]))
    assert loads == []
    await replay.add(directory(6, [(Kind.WRITE, 0, 1024, 1, []), (Kind.TRIM, 0, 2048, 5, [])]))
    await replay.add(directory(7, [(Kind.MOVE, 0, 3072, 1, [pack(LOG, 1, 1)])]))
    await replay.finish()
    assert sorted(loads) == [1, 2, 3]
    assert blockmap.lookup(1025) == pack(LOG, 1, 2)
    assert blockmap.lookup(3072) == pack(LOG, 7, 2)
    assert encode_region(pack(LOG, 1, 1))
