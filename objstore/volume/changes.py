"""What a VDI's life has besides being made, cloned and deleted: another name, more room, a way back to a snapshot.

Each is one catalog record, so after a crash it has happened or not.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from msgspec.structs import replace

from objstore.errors import Busy, Exists, InvalidRequest, NotFound, StoreError
from objstore.format.catalog import SnapshotEntry, VdiEntry
from objstore.names import check_name
from objstore.units import VDI_BYTES_MAX, format_size
from objstore.volume.clones import CloneOperations
from objstore.volume.status import SnapshotStatus, VdiStatus

log = logging.getLogger(__name__)


class ChangeOperations(CloneOperations):
    """What a store does with VDIs that exist. Touched by the event loop only."""

    # -- renaming -----------------------------------------------------------------------------------------------

    async def rename(self, name: str, new: str) -> VdiStatus:
        """Give a VDI, attached or not, another name; its snapshots and attributes go with it. Who is attached stays so.
        NotFound; Exists: a VDI, or a snapshot that a deleted one left, has that name; InvalidRequest."""
        check_name(new)
        entry = self._entry(name)
        self._check_name_free(new)
        self._creating.add(new)
        try:
            await self._own(self._rename(entry.vdi_id, new))
        finally:
            self._creating.discard(new)
        return self.vdi(new)

    async def _rename(self, vdi_id: int, new: str) -> None:
        async with self._change:
            entry = self._entry_of(vdi_id)
            self._check_snapshots_fit(vdi_id, new)
            await self.catalog.commit(replace(entry, name=new))
        vdi = self._open.get(vdi_id)
        if vdi is not None:
            vdi.name = new

    def _check_snapshots_fit(self, vdi_id: int, new: str) -> None:
        """Exists: one of the VDI's snapshots would be called as another one is, if it had that name."""
        state = self.catalog.state
        ours = [s for s in state.snapshots_of(vdi_id) if not s.hidden]
        for other in state.snapshots_named(new):
            if any(other.index == s.index or (s.tag and s.tag == other.tag) for s in ours):
                raise Exists(f"a deleted VDI has left a snapshot {self.snapshot_name(other)}")

    # -- resizing -----------------------------------------------------------------------------------------------

    async def resize(self, name: str, size_bytes: int, *, force: bool = False, reconnect: bool = False) -> VdiStatus:
        """Make a VDI, attached or not, larger; what is new reads as zeros. Who is attached sees it when it connects
        again. NotFound; InvalidRequest: smaller without `force`, or an impossible size; NoSpace: a preallocated one has
        no room.

        reconnect: then close whatever has the VDI open. force: it may become smaller, and what was behind its new end
        is gone; whatever has it open is closed first, and nobody may open it until `resume`.
        """
        entry = self._entry(name)
        if not 0 < size_bytes <= VDI_BYTES_MAX:
            raise InvalidRequest(f"size {size_bytes} is impossible: 1 byte to {format_size(VDI_BYTES_MAX)}")
        if size_bytes < entry.size_bytes:
            if not force:
                raise InvalidRequest(
                    f"VDI {name!r} has {format_size(entry.size_bytes)}; it is made smaller only by force: what is"
                    " behind its new end is lost"
                )
            await self._own(self._shrink(entry, size_bytes))
        else:
            await self._own(self._grow(entry.vdi_id, size_bytes))
            vdi = self._open.get(entry.vdi_id)
            if reconnect and vdi is not None:
                await self._own(self._give_up(vdi, "it has another size; open it again", orderly=True))
        return self.vdi(name)

    async def _shrink(self, entry: VdiEntry, size_bytes: int) -> None:
        """One record makes it smaller; what is behind the end then is discarded, if not now at the next start, and
        certainly before it is in front of the end again."""
        reason = f"it was made smaller, from {entry.size_bytes} to {size_bytes} bytes"
        vdi_id = entry.vdi_id
        async with (
            self._without_clients(entry, reason),
            self._sized(vdi_id),
            self.using(self._entry_of(vdi_id)) as vdi,
        ):
            async with self._change:
                entry = self._entry_of(vdi_id)
                if size_bytes >= entry.size_bytes:
                    raise Busy(f"VDI {entry.name!r} was made smaller by somebody else")
                smaller = replace(entry, size_bytes=size_bytes, former_bytes=entry.size_bytes, suspended=reason)
                await self.catalog.commit(smaller)
                vdi.shrink(size_bytes)
            try:
                await self._clear_behind(vdi_id)
            except StoreError as error:
                log.warning("what is behind the new end of VDI %s is discarded later: %s", entry.name, error)

    async def _grow(self, vdi_id: int, size_bytes: int) -> None:
        async with self._sized(vdi_id), self.using(self._entry_of(vdi_id)) as vdi:
            async with self._change:
                entry = self._entry_of(vdi_id)
                if size_bytes < entry.size_bytes:
                    raise Busy(f"VDI {entry.name!r} was made larger by somebody else")
                if entry.prealloc:
                    await self._check_prealloc(size_bytes - entry.size_bytes)
                await self.catalog.commit(replace(entry, size_bytes=size_bytes))
                vdi.grow(size_bytes)
            if entry.prealloc and size_bytes > entry.size_bytes:
                await vdi.zero(entry.size_bytes, size_bytes - entry.size_bytes, no_hole=True, fua=True)

    # -- rolling back -------------------------------------------------------------------------------------------

    async def rollback(self, name: str, *, force: bool = False) -> SnapshotStatus:
        """Make a VDI what it was at its snapshot NAME@TAG or NAME@INDEX; the answer is a new snapshot of what it was
        just now, to go back to. NotFound: it is no snapshot, or its VDI was deleted; Busy: the VDI is attached;
        NoSpace; Unavailable.

        force: close first whatever has the VDI open; then nobody may open it until `resume`, since clients that come
        back by themselves have caches of what it was.
        """
        snapshot = self.find_snapshot(name)
        entry = self._entry_of(snapshot.vdi_id)
        if not force:
            self._check_detached(entry)
            undo = await self._own(self._rollback(snapshot.snapshot_id, snapshot.vdi_id))
        else:
            undo = await self._own(self._rollback_forced(entry, snapshot, f"it was rolled back to {name}"))
        return self._snapshot_status(undo)

    async def _rollback_forced(self, entry: VdiEntry, snapshot: SnapshotEntry, reason: str) -> SnapshotEntry:
        async with self._without_clients(entry, reason):
            return await self._rollback(snapshot.snapshot_id, entry.vdi_id, reason)

    async def resume(self, name: str) -> VdiStatus:
        """Let clients open a VDI again that a forced change has suspended. NotFound."""
        entry = self._entry(name)
        await self._own(self._resume(entry.vdi_id))
        return self.vdi(name)

    async def _resume(self, vdi_id: int) -> None:
        async with self._change:
            entry = self._entry_of(vdi_id)
            if entry.suspended:
                await self.catalog.commit(replace(entry, suspended=""))

    async def _rollback(self, snapshot_id: int, vdi_id: int, suspended: str = "") -> SnapshotEntry:
        """A clone of the snapshot takes the VDI's place; what was there stays as a VDI that is deleted and has the
        snapshot to go back to. suspended: the VDI is so from then on, and why; "" = as it was."""
        async with self._sized(vdi_id):
            return await self._rollback_sized(snapshot_id, vdi_id, suspended)

    async def _rollback_sized(self, snapshot_id: int, vdi_id: int, suspended: str) -> SnapshotEntry:
        state = self.catalog.state
        undo = await self._take_sized(self._entry_of(vdi_id), hidden=True)
        try:
            async with self._change:
                entry = self._entry_of(vdi_id)
                self._check_detached(entry)
                target = state.snapshots.get(snapshot_id)
                if target is None or target.vdi_id != vdi_id or target.hidden:
                    raise NotFound("the snapshot was deleted")
                if undo.log != entry.log or vdi_id in self._opening or vdi_id in self._closing:
                    raise Busy(f"VDI {entry.name!r} is in use")
                unfinished = state.imports.get(vdi_id)
                more = [replace(unfinished, identity="")] if unfinished else []
                former = replace(entry, vdi_id=state.next_vdi, hidden=True, prealloc=False, suspended="")
                index = max((s.index for s in state.snapshots_named(entry.name)), default=0) + 1
                tag = f"unfinished-import-{index}" if unfinished else ""
                shown = replace(state.snapshots[undo.snapshot_id], hidden=False, index=index, tag=tag)
                begun = replace(
                    entry,
                    log=state.next_log,
                    base=target.snapshot_id,
                    size_bytes=target.size_bytes,
                    suspended=suspended or entry.suspended,
                )
                with self._changing_place(former.vdi_id, begun):
                    await self.catalog.commit(begun, former, shown, *more)
        except BaseException:
            self._begin(self._drop_hidden(undo.snapshot_id))
            raise
        self._begin(self._empty(former))
        return shown

    @contextmanager
    def _changing_place(self, former_id: int, begun: VdiEntry) -> Iterator[None]:
        """Nobody opens the VDI meanwhile; if the catalog says at the end that its log is another one, what is open
        belongs to the VDI that keeps the former log."""
        vdi_id = begun.vdi_id
        over = self._changing[vdi_id] = self.env.loop.create_future()
        try:
            yield
        finally:
            if self.catalog.state.vdis[vdi_id].log == begun.log:
                vdi = self._open.pop(vdi_id, None)
                if vdi is not None:
                    vdi.vdi_id, vdi.prealloc = former_id, False
                    self._open[former_id] = vdi
                if vdi_id in self._parents:
                    self._parents[former_id] = self._parents.pop(vdi_id)
                self._failed.pop(vdi_id, None)
            del self._changing[vdi_id]
            over.set_result(None)
