"""Deliberate bugs in snapshots and what they keep (see bugs.py)."""

from __future__ import annotations

from typing import Any

import objstore.volume.openvdis
from objstore.log.disk import Disk
from objstore.log.holds import Holds
from objstore.log.keeper import Keeper
from objstore.volume.opening import FrozenAt
from objstore.volume.vdi import Vdi
from tests.sim.bugs_writing import nothing, patch

_EVER = 1 << 60


def _not_held(self: Disk, segment: Any) -> None:
    """Collection frees segments that only a snapshot's map points into."""


def _none_needed(self: Holds, numbers: Any) -> set[int]:
    """Checkpoints that a snapshot's map is made of are removed like others."""
    return set()


async def _without_turn(self: Vdi) -> tuple[int, int]:
    """The point of a snapshot may fall between the parts of a request."""
    while self.keeper._task is not None:
        await self.keeper.next_chance()
    if self.closed is not None:
        raise self.closed
    self.disk._parts, parts = [], self.disk._parts
    self.disk._applying, applying = None, self.disk._applying
    try:
        return self.keeper.begin_snapshot(), self._writer.position
    finally:
        self.disk._parts, self.disk._applying = parts, applying


def _at_the_end(snapshot_id: int, checkpoint: int, position: int) -> FrozenAt:
    """A map that was not written yet is made of the whole log, not of the log up to the snapshot."""
    return FrozenAt(snapshot_id, checkpoint, _EVER)


def _never_released(self: Keeper, number: int) -> None:
    """What only a deleted snapshot needed stays until the VDI is opened again."""


SNAPSHOTS = {
    "snapshot-not-held": [patch(Disk, "hold", _not_held)],
    "snapshot-pages-freed": [patch(Holds, "needed", _none_needed)],
    "snapshot-between-parts": [patch(Vdi, "begin_snapshot", _without_turn)],
    "snapshot-not-flushed": [patch(Vdi, "durable_to", nothing)],
    "snapshot-map-of-the-end": [patch(objstore.volume.openvdis, "FrozenAt", _at_the_end)],
    "snapshot-never-released": [patch(Keeper, "end_snapshot", _never_released)],
}
