"""Clones: VDIs that begin with the map of a snapshot, in constant time, at any depth; flattening one.

A clone has a log of its own. Its map begins with the snapshot's root, so a read costs what it costs in any VDI, however
many snapshots and clones lie in between; what it writes goes to its own log. It keeps the VDIs open that it descends
from, whose segments and map pages it shares, and nobody can delete the snapshot while it is there.
"""

import logging
from typing import Final

from objstore.errors import Exists, InvalidRequest, NoSpace, NotFound, StoreError
from objstore.format.catalog import SnapshotEntry, VdiEntry
from objstore.log.address import LOG_MAX
from objstore.names import check_name
from objstore.volume.settings import check_mode
from objstore.volume.snapshots import SnapshotOperations
from objstore.volume.starting import Started
from objstore.volume.status import VdiStatus

log = logging.getLogger(__name__)

COPIES_DEFAULT_MAX: Final = 3


class CloneOperations(SnapshotOperations):
    """What a store does with clones. Touched by the event loop only."""

    def __init__(self, started: Started) -> None:
        super().__init__(started)
        self._creating: set[str] = set()
        self._flattening: set[int] = set()
        """By vdi id."""

    async def clone(self, source: str, name: str, *, copies: int | None = None, mode: str | None = None) -> VdiStatus:
        """Create a VDI that begins as a snapshot (VDI@TAG, VDI@INDEX), or as a VDI is now; durable on return.

        copies, mode: default those of the VDI that it comes from. Of a VDI itself a snapshot is taken that nobody sees
        and that goes with the last clone of it. NotFound; Exists; InvalidRequest; NoSpace; Unavailable.
        """
        check_name(name)
        if mode is not None:
            check_mode(mode)
        if copies is not None:
            self._check_copies(copies)
        self._check_open()
        if "@" in source:
            self.find_snapshot(source)
        else:
            self._entry(source)
        self._check_name_free(name)
        self._creating.add(name)
        try:
            await self._own(self._clone(source, name, copies, mode))
        finally:
            self._creating.discard(name)
        return self.vdi(name)

    def vdi(self, name: str) -> VdiStatus:
        """One VDI. NotFound."""
        raise NotImplementedError

    def _check_name_free(self, name: str) -> None:
        state = self.catalog.state
        if name in state.names or name in self._creating:
            raise Exists(f"there is a VDI {name!r} already")
        if state.next_log > LOG_MAX:
            raise NoSpace("the store has used up its log numbers")

    def _check_copies(self, copies: int) -> None:
        epoch = self.membership.epoch
        states = [*(member.state for member in epoch.members), *(zone.state for zone in epoch.out)]
        zones = states.count("in")
        if not 1 <= copies <= zones:
            raise InvalidRequest(f"copies = {copies} is impossible: {zones} zones of the store take data")

    async def _clone(self, source: str, name: str, copies: int | None, mode: str | None) -> None:
        hidden: SnapshotEntry | None = None
        if "@" not in source:
            hidden = await self._take(self._entry(source), hidden=True)
        try:
            async with self._change:
                state = self.catalog.state
                base = self.find_snapshot(source) if hidden is None else state.snapshots[hidden.snapshot_id]
                parent = state.vdis[state.owners[base.log]]
                entry = VdiEntry(
                    vdi_id=state.next_vdi,
                    name=name,
                    log=state.next_log,
                    size_bytes=base.size_bytes,
                    copies=parent.copies if copies is None else copies,
                    mode=parent.mode if mode is None else mode,
                    created=self.env.clock.wall(),
                    prealloc=False,
                    base=base.snapshot_id,
                )
                await self.catalog.commit(entry)
        except StoreError:
            if hidden is not None:
                self._begin(self._drop_hidden(hidden.snapshot_id))
            raise

    def _parent_name(self, entry: VdiEntry) -> str:
        """See VdiStatus.parent."""
        if not entry.base:
            return ""
        base = self.catalog.state.snapshots[entry.base]
        if base.vdi_id == entry.vdi_id:  # it was rolled back
            return ""
        return self.catalog.state.vdis[base.vdi_id].name if base.hidden else self.snapshot_name(base)

    async def _drop_hidden(self, snapshot_id: int) -> None:
        """Delete a snapshot that nobody sees, unless a clone needs it."""

        def find() -> SnapshotEntry:
            snapshot = self.catalog.state.snapshots.get(snapshot_id)
            if snapshot is None or not snapshot.hidden or self.catalog.state.clones_of(snapshot_id):
                raise NotFound("the snapshot is needed, or gone")
            return snapshot

        try:
            await self._delete_found(find, "of a clone")
        except NotFound:
            return
        except StoreError as error:
            log.warning("a snapshot that nobody needs stays until the next start: %s", error)

    def resume_work(self) -> None:
        """Go on with what a former process left undone."""
        super().resume_work()
        for snapshot in self.catalog.state.snapshots.values():
            if snapshot.hidden and not self.catalog.state.clones_of(snapshot.snapshot_id):
                self._begin(self._drop_hidden(snapshot.snapshot_id))
