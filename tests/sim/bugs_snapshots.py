"""Deliberate bugs in snapshots and what they keep (see bugs.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

import objstore.volume.openvdis
import objstore.volume.snapshots
from objstore.format.catalog import VdiEntry
from objstore.log.disk import Disk
from objstore.log.holds import Holds
from objstore.log.keeper import Keeper
from objstore.units import BLOCK_BYTES
from objstore.volume.base import always
from objstore.volume.flatten import FlattenOperations
from objstore.volume.opening import FrozenAt
from objstore.volume.together import Frozen
from objstore.volume.vdi import Vdi
from tests.sim.bugs_writing import nothing, patch

_EVER = 1 << 60


def _not_held(self: Disk, segment: Any) -> None:
    """Collection frees segments that only a snapshot's map points into."""


def _none_needed(self: Holds, numbers: Any) -> set[int]:
    """Checkpoints that a snapshot's map is made of are removed like others."""
    return set()


async def _without_turns(vdis: Sequence[Frozen]) -> list[tuple[int, int]]:
    """The point of a snapshot may fall between the parts of a request."""
    for vdi in vdis:
        while vdi.keeper._task is not None:
            await vdi.keeper.next_chance()
        if vdi.closed is not None:
            raise vdi.closed
    points = []
    for vdi in vdis:
        disk = vdi.disk
        disk._parts, parts = [], disk._parts
        disk._applying, applying = None, disk._applying
        try:
            points.append((vdi.keeper.begin_snapshot(), disk.writer.position))
        finally:
            disk._parts, disk._applying = parts, applying
    return points


def _at_the_end(snapshot_id: int, checkpoint: int, position: int) -> FrozenAt:
    """A map that was not written yet is made of the whole log, not of the log up to the snapshot."""
    return FrozenAt(snapshot_id, checkpoint, _EVER)


def _never_released(self: Keeper, number: int) -> None:
    """What only a deleted snapshot needed stays until the VDI is opened again."""


async def _size_alone(self: Vdi) -> None:
    """What is behind the new end of a disk stays in its map."""
    self.disk.blocks = -(-self.size_bytes // BLOCK_BYTES)


async def _copied_blindly(self: Vdi, first: int, count: int) -> None:
    """A block of a clone is copied over what a client has written since it was read."""
    data = memoryview(bytearray(count * BLOCK_BYTES))
    await self.disk.read(first, count, data)
    async with self._turn:
        await self._append([(first, count, data)], always)


async def _part_at_once(self: FlattenOperations, begun: VdiEntry, vdi: Vdi) -> None:
    """A clone needs nobody once its blocks are copied, whatever is in the checkpoints that an opening begins with."""
    at = 0
    while at < vdi.size_bytes:
        at += await vdi.copy_in(at, vdi.size_bytes - at)
    async with self._change:
        entry = self._still_clone(begun)
        await self.catalog.commit(replace(entry, base=0))
    vdi.disk.base_root = None
    await self._leave_parent(entry.vdi_id)


SNAPSHOTS = {
    "shrunk-not-cleared": [patch(Vdi, "clear_behind", _size_alone)],
    "flattened-blindly": [patch(Vdi, "_copy", _copied_blindly)],
    "flattened-without-checkpoint": [patch(FlattenOperations, "_part", _part_at_once)],
    "snapshot-not-held": [patch(Disk, "hold", _not_held)],
    "snapshot-pages-freed": [patch(Holds, "needed", _none_needed)],
    "snapshot-between-parts": [patch(objstore.volume.snapshots, "begin_together", _without_turns)],
    "snapshot-not-flushed": [patch(Vdi, "durable_to", nothing)],
    "snapshot-map-of-the-end": [patch(objstore.volume.openvdis, "FrozenAt", _at_the_end)],
    "snapshot-never-released": [patch(Keeper, "end_snapshot", _never_released)],
}
