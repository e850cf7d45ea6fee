"""Map pages of the newest checkpoint that no zone has whole: made again from the checkpoint before and the log.

The checkpoint before, its pages and everything written between the two are kept until the next one is complete (rule
14), so what a lost page said follows from them: the region's page in the checkpoint before, and the operations up to
the newest one's position. Nothing is guessed: the log between must be there without a gap, and what comes out must be
as long as the lost page was. A page that the checkpoint before refers to as well is lost.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from objstore.errors import Corrupt, FormatError, NotFound, StoreError
from objstore.format.checkpoint import FRAME
from objstore.format.record import FLAG_SHIFT, KIND_SHIFT, LBA_MASK, Flag, Kind
from objstore.format.segment import Directory
from objstore.log.address import BLOCK_BITS, key_of
from objstore.log.blockmap import BlockMap, PageRef
from objstore.log.checkpoint import Loaded, LostPages, load_pages, read_checkpoint
from objstore.log.disk import Disk
from objstore.log.reader import load_directory
from objstore.log.regions import Region, compact, decode_region, encode_region
from objstore.log.replay import ZERO_KINDS
from objstore.log.root import Root, rebased
from objstore.log.segment import Segment
from objstore.replica.zone import run
from objstore.units import REGION_SHIFT

log = logging.getLogger(__name__)

U64 = npt.NDArray[np.uint64]


async def rebuild_pages(
    disk: Disk,
    lost: Sequence[tuple[int, PageRef]],
    *,
    number: int,
    position: int,
    next_segment: int,
    previous_next_segment: int,
    sizes: Mapping[int, int],
) -> dict[int, Region]:
    """What those of the `lost` regions had in them in checkpoint `number`, the newest, of which that can be told.

    position, next_segment, previous_next_segment: of its header. sizes: all checkpoints that are kept. StoreError: a
    zone that is needed is out of reach.
    """
    wanted = [(region, ref) for region, ref in lost if ref.checkpoint == number]
    if not wanted:
        return {}
    before = await _checkpoint_before(disk, number, previous_next_segment, sizes)
    if before is None:
        return {}  # the first one: what a map begins with is not for this module to know
    chain = await _directories(disk, before, next_segment, position)
    if chain is None:
        log.error("the log behind checkpoint %d is not whole log=%d", before.header.number, disk.log)
        return {}
    scratch = await _pages_before(disk, before, [region for region, _ in wanted])
    regions = np.array(sorted(region for region, _ in wanted if region in scratch), np.uint64)
    applier = _Applier(BlockMap(), regions)
    for region, value in scratch.items():
        if value is not None:
            applier.preset(region, value)
    for directory in chain:
        applier.apply(directory)
    found: dict[int, Region] = {}
    for region, ref in wanted:
        value = applier.value(region) if region in scratch else None
        if value is not None and FRAME.size + len(encode_region(value)) == ref.length:
            found[region] = value
    log.error(
        "map pages of checkpoint %d are whole in no zone; made again from what is before it log=%d pages=%d of %d",
        number,
        disk.log,
        len(found),
        len(lost),
    )
    return found


async def _checkpoint_before(disk: Disk, number: int, next_segment: int, sizes: Mapping[int, int]) -> Loaded | None:
    """The newest checkpoint below `number` whose tail begins at that segment, from any zone that has it whole."""
    env = disk.env
    for older in sorted((n for n in sizes if n < number), reverse=True):
        for z in env.serving(disk.checkpoint_zones(older)):
            try:
                loaded = await run(
                    env.executor, z, read_checkpoint, env.zones[z].backend, env.store_id, disk.log, older
                )
            except (FormatError, NotFound):
                continue
            except StoreError as error:
                env.read_failed(z, error)
                continue
            if loaded.header.next_segment == next_segment:
                return loaded
            break
    return None


async def _directories(disk: Disk, before: Loaded, next_segment: int, position: int) -> list[Directory] | None:
    """Directories of all segments between the two checkpoints, in log order; None if one is missing."""
    first, at, crc = before.header.next_segment, before.header.position, before.header.previous_crc
    segments: dict[int, Segment] = {n: s for n, s in disk.segments.items() if first <= n < next_segment}
    segments.update({n: s for n, (s, _) in disk.dead.items() if first <= n < next_segment})
    found = []
    for segment in segments.values():
        segment.pins += 1
    try:
        for number in sorted(segments):
            try:
                directory = await load_directory(disk.env, segments[number])
            except Corrupt:
                return None
            if directory is None or directory.first_position != at + 1 or directory.previous_crc != crc:
                return None
            at, crc = directory.last_position, directory.last_crc
            found.append(directory)
    finally:
        for segment in segments.values():
            segment.unpin()
    return found if at == position else None


async def _pages_before(disk: Disk, before: Loaded, regions: Sequence[int]) -> dict[int, Region | None]:
    """What the regions had in them at the checkpoint before, None = nothing; without those whose pages are lost too."""
    root = Root(before.root) if disk.base_root is None else rebased(Root(before.root), disk.base_root)
    refs = [(region, ref) for region in regions if (ref := root.get(region)) is not None]
    values: dict[int, Region | None] = {region: None for region in regions if root.get(region) is None}
    try:
        pages = list(await load_pages(disk.env, disk.log, refs, disk.checkpoint_zones)) if refs else []
    except LostPages as error:
        pages = error.found
    values.update({region: decode_region(page) for region, _, page in pages})
    return values


class _Applier:
    """Operations of consecutive segments, as far as they concern a few regions, into a map that has only these."""

    def __init__(self, blocks: BlockMap, regions: U64) -> None:
        """regions: ascending."""
        self._map = blocks
        self._regions = regions
        self._parts: list[tuple[int, int, int, int]] = []

    def preset(self, region: int, value: Region) -> None:
        """What a region begins with."""
        ref = PageRef(0, 0, 0)
        self._map.regions[region] = ref
        self._map.load(region, ref, value)

    def value(self, region: int) -> Region | None:
        """What it has now, in its smallest form; None = nothing but holes."""
        value = self._map.regions.get(region)
        assert not isinstance(value, PageRef)
        return None if value is None else compact(value)

    def apply(self, directory: Directory) -> None:
        """All operations of one segment. Parts of a request count with its last one, as in a replay."""
        words = np.frombuffer(directory.words, np.uint64)
        counts = np.frombuffer(directory.counts, np.uint32).astype(np.uint64)
        kinds = words >> np.uint64(KIND_SHIFT) & np.uint64(0xFF)
        flags = words >> np.uint64(FLAG_SHIFT)
        lbas = words & np.uint64(LBA_MASK)
        first = self._regions.searchsorted(lbas >> np.uint64(REGION_SHIFT))
        last = self._regions.searchsorted((lbas + counts - np.uint64(1)) >> np.uint64(REGION_SHIFT), "right")
        moved = np.where(kinds == Kind.MOVE, counts, 0)
        source_at = (np.cumsum(moved) - moved).astype(np.int64)
        sources = np.frombuffer(directory.sources, np.uint64)
        base = key_of(directory.log, directory.segment) << BLOCK_BITS
        # What has no flags and touches none of the regions can go: the parts of a request that was never finished,
        # which it would drop, are dropped by the next request's first part as well.
        for i in np.flatnonzero((flags > 0) | (last > first)).tolist():
            kind, flag, lba, count = int(kinds[i]), int(flags[i]), int(lbas[i]), int(counts[i])
            entry = base + directory.starts[i]
            if flag:
                if flag & Flag.FIRST:
                    self._parts.clear()
                self._parts.append((kind, lba, count, entry))
                if flag & Flag.LAST:
                    for part in self._parts:
                        self._take(*part)
                    self._parts.clear()
            elif kind == Kind.MOVE:
                at = int(source_at[i])
                self._take(kind, lba, count, entry, sources[at : at + count])
            else:
                self._parts.clear()
                self._take(kind, lba, count, entry)

    def _take(self, kind: int, lba: int, count: int, entry: int, sources: U64 | None = None) -> None:
        low, high = self._regions.searchsorted(
            np.array([lba >> REGION_SHIFT, (lba + count - 1 >> REGION_SHIFT) + 1], np.uint64)
        )
        for region in self._regions[low:high].tolist():
            begin = max(lba, region << REGION_SHIFT)
            end = min(lba + count, (region + 1) << REGION_SHIFT)
            here = entry + begin - lba
            if kind == Kind.WRITE:
                self._map.assign(begin, here, end - begin)
            elif kind in ZERO_KINDS:
                self._map.fill(begin, end - begin, ZERO_KINDS[kind])
            elif sources is not None:
                blocks = np.arange(begin, end, dtype=np.uint64)
                targets = np.arange(here, here + end - begin, dtype=np.uint64)
                self._map.compare_and_assign(blocks, sources[begin - lba : end - lba], targets)
