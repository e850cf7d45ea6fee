"""Deleting VDIs: for good, or into the trash, where they are kept for a while and can be brought back.

A VDI in the trash is a hidden one whose contents stay: its name is free, nobody can open it, and recovery, scrub and
check treat it like any other. Each step is one catalog record. When its time is over it is deleted as without a trash.
"""

import asyncio
import contextlib
import logging
from typing import Final

from msgspec.structs import replace

from objstore.backend.base import Backend
from objstore.errors import Busy, NotFound, StoreError
from objstore.format.catalog import Entry, TrashEntry, VdiEntry
from objstore.log.checkpoint import checkpoint_folder
from objstore.log.segment import log_folder
from objstore.names import check_name
from objstore.replica.zone import run_long
from objstore.volume.flatten import FlattenOperations
from objstore.volume.snapshots import Removal
from objstore.volume.starting import Started
from objstore.volume.status import TrashStatus, VdiStatus

log = logging.getLogger(__name__)

DAY_SECONDS: Final = 86400.0
LOOK_SECONDS_MAX: Final = 3600.0
"""The wall clock may be set meanwhile."""


class TrashOperations(FlattenOperations):
    """What a store does with VDIs that are deleted. Touched by the event loop only."""

    def __init__(self, started: Started) -> None:
        super().__init__(started)
        self._trash_timer: asyncio.TimerHandle | None = None
        self.env.space_hint = self._space_hint

    # -- deleting -----------------------------------------------------------------------------------------------

    async def delete_vdi(self, name: str) -> None:
        """Delete a VDI; its space comes back in the background, or if it is kept in the trash when that is over. Its
        snapshots stay, and what they need. NotFound; Busy: it is attached."""
        entry = self._entry(name)
        while under_way := self._opening.get(entry.vdi_id) or self._closing.get(entry.vdi_id):
            await asyncio.wait([under_way])
            entry = self._entry(name)  # somebody else may have deleted it meanwhile
        vdi = self._open.get(entry.vdi_id)
        if vdi is not None and vdi.attached:
            raise Busy(f"VDI {name!r} is attached by {vdi.attached} connections")
        self._deleting.begin({entry.vdi_id})
        await self._own(self._throw_away(entry) if self.env.settings.trash_days else self._delete(entry))

    async def _delete(self, entry: VdiEntry) -> None:
        state = self.catalog.state
        closing = {entry.vdi_id}
        removal: Removal | None = None
        try:
            while True:
                async with self._change:
                    now = state.vdis[entry.vdi_id]
                    if self._needed(now):
                        hidden = replace(now, hidden=True, prealloc=False)
                        await self.catalog.commit(hidden, *self._not_kept(now.vdi_id))
                        break
                    removal = Removal(self, *self._left_over({entry.vdi_id}, set()))
                    closing.update(vdi.vdi_id for vdi in removal.vdis)
                    self._deleting.begin(closing)
                    if all(self._is_idle(vdi, removal.vdis) for vdi in removal.vdis):
                        await self.catalog.commit(*removal.entries)
                        break
                await self._until_idle(removal.vdis)
                removal = None
        finally:
            self._deleting.end(closing)
        if removal is not None:
            self._removed(removal)
            return
        vdi = self._open.get(entry.vdi_id)
        if vdi is not None:
            vdi.prealloc = False
        self._begin(self._empty(hidden))

    async def _throw_away(self, entry: VdiEntry) -> None:
        """Put a VDI into the trash; if it is open, it is closed again."""
        try:
            async with self._change:
                wall = self.env.clock.wall()
                until = wall + self.env.settings.trash_days * DAY_SECONDS
                now = self.catalog.state.vdis[entry.vdi_id]
                kept = TrashEntry(vdi_id=now.vdi_id, deleted=wall, kept_until=until)
                await self.catalog.commit(kept, replace(now, hidden=True, prealloc=False))
        finally:
            self._deleting.end({entry.vdi_id})
        vdi = self._open.get(entry.vdi_id)
        if vdi is not None:
            vdi.prealloc = False
            if not vdi.users and not self._stopping:
                self._closing[entry.vdi_id] = self.env.loop.create_task(self._close_vdi(vdi))
        self._look_at_trash()

    # -- the trash ----------------------------------------------------------------------------------------------

    async def trash(self) -> list[TrashStatus]:
        """What is in the trash, the oldest first; the zones are asked for its space outside the event loop."""
        entries = self._trashed()
        kept = [self.catalog.state.trash[entry.vdi_id] for entry in entries]
        sizes = await asyncio.gather(*(self._measured(z, entries) for z in sorted(self.env.in_service)))
        return [
            TrashStatus(
                name=entry.name,
                vdi_id=entry.vdi_id,
                size_bytes=entry.size_bytes,
                copies=entry.copies,
                created=entry.created,
                deleted=kept[index].deleted,
                kept_until=kept[index].kept_until,
                file_bytes=sum(zone[index] for zone in sizes),
            )
            for index, entry in enumerate(entries)
        ]

    async def undelete(self, name: str, new: str | None = None, *, vdi_id: int | None = None) -> VdiStatus:
        """Bring a VDI back from the trash, with its attributes, under its name or another: the last deleted one of that
        name, or the one of that number. Space that was reserved for it is not any more. NotFound; Exists: the name, or
        a snapshot of it, is taken; InvalidRequest: the name."""
        self._check_open()
        entry = self._find_trashed(name, vdi_id)
        new = entry.name if new is None else new
        check_name(new)
        self._check_name_free(new)
        self._creating.add(new)
        try:
            await self._own(self._undelete(entry, new))
        finally:
            self._creating.discard(new)
        return self.vdi(new)

    async def _undelete(self, entry: VdiEntry, new: str) -> None:
        async with self._change:
            now = self.catalog.state.vdis.get(entry.vdi_id)
            if now is None or now.vdi_id not in self.catalog.state.trash or now.vdi_id in self._deleting:
                raise NotFound(f"there is no VDI {entry.name!r} in the trash any more")
            if new != now.name:
                self._check_snapshots_fit(now.vdi_id, new)
            await self.catalog.commit(replace(now, name=new, hidden=False))
        vdi = self._open.get(entry.vdi_id)
        if vdi is not None:
            vdi.name = new
        if now.former_bytes:
            self._begin(self._clear_later(now.vdi_id))

    async def purge(self, name: str, *, vdi_id: int | None = None) -> None:
        """Delete a VDI that is in the trash for good: the last deleted one of that name, or the one of that number.
        NotFound."""
        self._check_open()
        entry = self._find_trashed(name, vdi_id)
        self._deleting.begin({entry.vdi_id})
        await self._own(self._purge_trashed(entry))

    async def _purge_trashed(self, entry: VdiEntry) -> None:
        while under_way := self._opening.get(entry.vdi_id) or self._closing.get(entry.vdi_id):
            await asyncio.wait([under_way])
        await self._delete(entry)

    def _not_kept(self, vdi_id: int) -> list[Entry]:
        """What takes a VDI out of the trash, if it is there."""
        inside = vdi_id in self.catalog.state.trash
        return [TrashEntry(vdi_id=vdi_id, deleted=0.0, kept_until=0.0)] if inside else []

    def _trashed(self) -> list[VdiEntry]:
        """What is in the trash and does not just go, in the order in which it was deleted."""
        state = self.catalog.state
        kept = sorted(state.trash.values(), key=lambda each: (each.deleted, each.vdi_id))
        return [state.vdis[each.vdi_id] for each in kept if each.vdi_id not in self._deleting]

    def _find_trashed(self, name: str, vdi_id: int | None) -> VdiEntry:
        found = [v for v in self._trashed() if v.name == name and vdi_id in (None, v.vdi_id)]
        if not found:
            which = "" if vdi_id is None else f" of number {vdi_id}"
            raise NotFound(f"there is no VDI {name!r}{which} in the trash")
        return found[-1]

    async def _measured(self, zone: int, entries: list[VdiEntry]) -> list[int]:
        """Bytes of the files of their logs in a zone; zeros if it can't say."""
        folders = [(log_folder(entry.log), checkpoint_folder(entry.log)) for entry in entries]
        try:
            return await run_long(self.env.executor, zone, _file_bytes, self.env.zones[zone].backend, folders)
        except StoreError:
            return [0] * len(entries)

    def _space_hint(self) -> str:
        count = len(self._trashed())
        if not count:
            return ""
        return f" ({count} deleted {'VDI is' if count == 1 else 'VDIs are'} in the trash: sheepfold trash, vdi purge)"

    # -- its end ------------------------------------------------------------------------------------------------

    def resume_work(self) -> None:
        """Go on with what a former process left undone."""
        super().resume_work()
        self._look_at_trash()

    def _look_at_trash(self) -> None:
        """Delete what has been in the trash long enough, and look again when the next is due."""
        self.stop_trash()
        if self._stopping:
            return
        wall = self.env.clock.wall()
        for entry in self._trashed():
            if self.catalog.state.trash[entry.vdi_id].kept_until <= wall:
                self._deleting.begin({entry.vdi_id})
                self._begin(self._expire(entry))
        left = [self.catalog.state.trash[entry.vdi_id].kept_until - wall for entry in self._trashed()]
        if left:
            seconds = min(min(left) + 0.001, LOOK_SECONDS_MAX)
            self._trash_timer = self.env.loop.call_later(seconds, self._look_at_trash)

    async def _expire(self, entry: VdiEntry) -> None:
        try:
            await self._purge_trashed(entry)
        except StoreError as error:
            log.warning("VDI %s stays in the trash for now: %s", entry.name, error)
            if self._trash_timer is None and not self._stopping:
                self._trash_timer = self.env.loop.call_later(LOOK_SECONDS_MAX, self._look_at_trash)

    def stop_trash(self) -> None:
        """Nothing expires any more in this process. Idempotent."""
        if self._trash_timer is not None:
            self._trash_timer.cancel()
            self._trash_timer = None


def _file_bytes(backend: Backend, folders: list[tuple[str, str]]) -> list[int]:
    """In a zone's thread: bytes of the files in each of these pairs of folders."""
    sizes = []
    for pair in folders:
        total = 0
        for folder in pair:
            with contextlib.suppress(NotFound):
                total += sum(entry.size_bytes for entry in backend.list(folder))
        sizes.append(total)
    return sizes
