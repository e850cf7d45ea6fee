"""What only one snapshot needs: found by comparing its map with every other that may share something with it."""

from contextlib import AsyncExitStack

from objstore.format.catalog import SnapshotEntry, VdiEntry
from objstore.volume.base import Volume
from objstore.volume.imports import ImportOperations
from objstore.volume.status import SnapshotSpace

Ranges = list[tuple[int, int]]
"""(offset, length) in bytes, ascending, apart from each other."""


class ExclusiveOperations(ImportOperations):
    """What a store says about the space of snapshots. Touched by the event loop only."""

    async def snapshot_space(self, name: str) -> SnapshotSpace:
        """How much of a snapshot's data (NAME@TAG, NAME@INDEX) nothing else needs: no other snapshot, VDI or clone, one
        in the trash neither, as they are at this moment. Costs what has changed between them. NotFound; Corrupt,
        Unavailable: a map can't be read."""
        entry = self.find_snapshot(name)
        async with AsyncExitStack() as stack:
            volume = await self._held_frozen(stack, entry)
            ranges = await _data(volume)
            for other in self._others(entry):
                if not ranges:
                    break
                async with AsyncExitStack() as held:
                    if isinstance(other, SnapshotEntry):
                        ranges = await _changed(volume, await self._held_frozen(held, other), ranges)
                    else:
                        vdi = await held.enter_async_context(self.using(other))
                        ranges = await _changed(volume, vdi, ranges)
        return SnapshotSpace(name=name, exclusive_bytes=sum(length for _, length in ranges))

    async def _held_frozen(self, stack: AsyncExitStack, entry: SnapshotEntry) -> Volume:
        """A snapshot, open until the stack ends."""
        volume = await self._open_frozen(entry)
        volume.attached += 1
        stack.push_async_callback(self.close, volume)
        return volume

    def _others(self, entry: SnapshotEntry) -> list[SnapshotEntry | VdiEntry]:
        """Whatever else has a map in a log that has something to do with that of the snapshot, the nearest first."""
        state = self.catalog.state
        family = {entry.log}
        grown = True
        while grown:
            grown = False
            for vdi in state.vdis.values():
                pair = {vdi.log, state.snapshots[vdi.base].log} if vdi.base else {vdi.log}
                if pair & family and not pair <= family:
                    family |= pair
                    grown = True
        vdis = [v for v in state.vdis.values() if v.log in family and (not v.hidden or v.vdi_id in state.trash)]
        snapshots = [s for s in state.snapshots.values() if s.log in family and s.snapshot_id != entry.snapshot_id]
        snapshots.sort(key=lambda s: (s.log != entry.log, abs(s.position - entry.position)))
        return [*snapshots[:2], *sorted(vdis, key=lambda v: v.log != entry.log), *snapshots[2:]]


async def _data(volume: Volume) -> Ranges:
    found: Ranges = []
    at = 0
    while at < volume.size_bytes:
        for extent in await volume.extents(at, volume.size_bytes - at):
            if not extent.zero:
                _add(found, at, extent.length_bytes)
            at += extent.length_bytes
    return found


async def _changed(volume: Volume, other: Volume, ranges: Ranges) -> Ranges:
    """The parts of the ranges where the other one has something else."""
    found: Ranges = []
    for offset, length in ranges:
        at, end = offset, offset + length
        while at < end:
            for change in await volume.changed(other, at, end - at):
                if change.changed:
                    _add(found, at, change.length_bytes)
                at += change.length_bytes
    return found


def _add(ranges: Ranges, offset: int, length: int) -> None:
    if ranges and sum(ranges[-1]) == offset:
        offset, before = ranges.pop()
        length += before
    ranges.append((offset, length))
