"""Imports: a VDI becomes what a snapshot of some other store was, and nobody takes it for whole before it is.

The record that begins one says so (of type `import`); after it, and after any restart, nobody can open or snapshot the
VDI. The record that ends it is that of the snapshot. In between, what the stream says is written to the VDI, from the
beginning of the stream each time, so that an import which was interrupted is repeated, however far it came.
"""

from typing import NamedTuple

from msgspec.structs import replace

from objstore.errors import Busy, Exists, InvalidRequest
from objstore.format.catalog import ImportEntry, SnapshotEntry, VdiEntry
from objstore.names import check_name, check_tag
from objstore.units import VDI_BYTES_MAX, format_size
from objstore.volume.base import Volume
from objstore.volume.clones import COPIES_DEFAULT_MAX
from objstore.volume.settings import MODES, check_mode
from objstore.volume.status import SnapshotStatus
from objstore.volume.trash import TrashOperations
from objstore.volume.vdi import Vdi


class Import(NamedTuple):
    """What is to be imported: contents `identity` on top of contents `base`, "" = on an empty disk. copies, mode: of a
    VDI that has to be made; 0, "" = as usual."""

    base: str
    identity: str
    size_bytes: int
    copies: int = 0
    mode: str = ""


class ImportOperations(TrashOperations):
    """What a store does to import. Touched by the event loop only."""

    def import_of(self, entry: VdiEntry) -> str:
        """See VdiStatus.importing."""
        found = self.catalog.state.imports.get(entry.vdi_id)
        return f"{found.base}..{found.identity}" if found else ""

    def _is_for_import(self, entry: VdiEntry, what: Import) -> bool:
        return self.catalog.state.imports.get(entry.vdi_id) == _marked(entry, what)

    async def begin_import(self, name: str, what: Import) -> Volume:
        """Begin to import into a VDI, or begin again: a volume that nobody else has, to be given what has changed from
        its beginning on. Without `base` the VDI is made. It is closed like any other; `finish_import` comes before.

        NotFound: no such VDI; Exists: there is one already, or what is imported is there; InvalidRequest: it has no
        snapshot of `base`, or is not what that snapshot is any more; Busy: it is attached, or half of another import.
        """
        check_name(name)
        self._check_open()
        if not what.identity or not 0 < what.size_bytes <= VDI_BYTES_MAX:
            raise InvalidRequest(f"size {what.size_bytes} is impossible: 1 byte to {format_size(VDI_BYTES_MAX)}")
        await self._own(self._begin_import(name, what))
        entry = self._entry(name)
        vdi = await self._vdi(entry)
        if vdi.attached or not self._is_for_import(entry, what):
            raise Busy(f"VDI {name!r} is attached")
        vdi.attached += 1
        return vdi

    async def _begin_import(self, name: str, what: Import) -> None:
        entry = None if name not in self.catalog.state.names and not what.base else self._entry(name)
        if entry is None:
            await self._make_for_import(name, what)
            return
        if entry.vdi_id in self.catalog.state.imports:
            if not self._is_for_import(entry, what):
                raise Busy(f"VDI {name!r} is half of what another stream makes of it: {self.import_of(entry)}")
        elif not what.base:
            raise Exists(f"there is a VDI {name!r} already")
        else:
            await self._mark_for_import(entry, what)
        entry = self._entry_of(entry.vdi_id)
        if what.size_bytes > entry.size_bytes:
            await self._grow(entry.vdi_id, what.size_bytes)
        elif what.size_bytes < entry.size_bytes:
            await self._shrink(entry, what.size_bytes)
            async with self._change:
                await self.catalog.commit(replace(self._entry_of(entry.vdi_id), suspended=entry.suspended))

    async def _make_for_import(self, name: str, what: Import) -> None:
        mode = what.mode or MODES[0]
        check_mode(mode)
        zones = len(self.membership.epoch.members) + len(self.membership.epoch.out)
        async with self._change:
            self._check_name_free(name)
            state = self.catalog.state
            entry = VdiEntry(
                vdi_id=state.next_vdi,
                name=name,
                log=state.next_log,
                size_bytes=what.size_bytes,
                copies=min(max(1, what.copies or COPIES_DEFAULT_MAX), zones),
                mode=mode,
                created=self.env.clock.wall(),
                prealloc=False,
            )
            await self.catalog.commit(entry, _marked(entry, what))

    async def _mark_for_import(self, entry: VdiEntry, what: Import) -> None:
        """The record after which nobody takes the VDI for whole."""
        name, vdi_id = entry.name, entry.vdi_id
        state = self.catalog.state
        if any(self.contents_of(s) == what.identity for s in state.snapshots_of(vdi_id)):
            raise Exists(f"VDI {name!r} has what is imported already, as a snapshot")
        base = self._base_of_import(entry, what.base)
        if vdi_id in self._kept_out:
            raise Busy(f"VDI {name!r} is just being changed: {self._kept_out[vdi_id]}")
        self._kept_out[vdi_id] = "an import begins"
        try:
            self._check_detached(entry)
            if entry.size_bytes != base.size_bytes or await self._differs(entry, base):
                raise InvalidRequest(
                    f"VDI {name!r} has changed since {self.snapshot_name(base)}, which the stream builds on: go back to"
                    " that first"
                )
            async with self._change:
                now = self._entry_of(vdi_id)
                if base.snapshot_id not in state.snapshots or now.log != entry.log or vdi_id in state.imports:
                    raise Busy(f"VDI {name!r} is just being changed")
                await self.catalog.commit(_marked(now, what))
        finally:
            del self._kept_out[vdi_id]

    def _base_of_import(self, entry: VdiEntry, identity: str) -> SnapshotEntry:
        state = self.catalog.state
        known = state.snapshots_of(entry.vdi_id)
        if entry.base:
            known.append(state.snapshots[entry.base])
        for snapshot in known:
            if self.contents_of(snapshot) == identity:
                return snapshot
        raise InvalidRequest(
            f"VDI {entry.name!r} has no snapshot with the contents that the stream builds on ({identity})"
        )

    async def _differs(self, entry: VdiEntry, base: SnapshotEntry) -> bool:
        """Whether the VDI, which nobody can write to, is not what that snapshot of it is."""
        since = await self._open_frozen(base)
        since.attached += 1
        try:
            async with self.using(entry) as vdi:
                at = 0
                while at < vdi.size_bytes:
                    for change in await vdi.changed(since, at, vdi.size_bytes - at):
                        if change.changed:
                            return True
                        at += change.length_bytes
            return False
        finally:
            await self.close(since)

    async def finish_import(self, volume: Volume, tag: str = "", *, protected: bool = False) -> SnapshotStatus:
        """All of it was written to the volume of `begin_import`: take the snapshot that it is, with which the VDI is
        whole; durable on return. InvalidRequest: nothing is imported there; Exists: the tag."""
        check_tag(tag)
        if not isinstance(volume, Vdi):
            raise InvalidRequest(f"nothing is imported into {volume.name!r}")
        entry = self._entry_of(volume.vdi_id)
        if entry.vdi_id not in self.catalog.state.imports:
            raise InvalidRequest(f"nothing is imported into VDI {entry.name!r}")
        self._check_tag_free(entry.name, tag)
        return self._snapshot_status(await self._own(self._finish_import(entry, tag, protected)))

    async def _finish_import(self, entry: VdiEntry, tag: str, protected: bool) -> SnapshotEntry:
        identity = self.catalog.state.imports[entry.vdi_id].identity
        async with self._sized(entry.vdi_id):
            return await self._take_sized(entry, tag, protected=protected, origin=identity)


def _marked(entry: VdiEntry, what: Import) -> ImportEntry:
    return ImportEntry(vdi_id=entry.vdi_id, base=what.base, identity=what.identity)
