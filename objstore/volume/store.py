"""The store: zones, catalog, the VDIs that are open. What `nbdserver` and administrators talk to."""

import asyncio
import logging
import os
import random
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

import msgspec

from objstore.backend.base import Backend, ZoneFailed
from objstore.backend.directory import DirectoryBackend
from objstore.clock import Clock, SystemClock
from objstore.errors import (
    Busy,
    Exists,
    InvalidRequest,
    NoSpace,
    NotFound,
    ReadOnly,
    Stopping,
    StoreError,
    Unavailable,
)
from objstore.format.catalog import DeleteEntry, HeadEntry, PurgedEntry, StopEntry, VdiEntry
from objstore.format.document import FORMAT_VERSION, Epoch, Member, Outside, Superblock
from objstore.log.address import LOG_MAX
from objstore.log.checkpoint import checkpoint_folder
from objstore.log.damage import Damage
from objstore.log.segment import log_folder
from objstore.log.writer import segment_blocks
from objstore.names import check_name
from objstore.replica.members import absolute, read_superblock
from objstore.replica.zone import Executor, ThreadExecutor, run, run_long
from objstore.units import BLOCK_BYTES, BLOCK_SHIFT, VDI_BYTES_MAX, format_size
from objstore.version import VERSION
from objstore.volume.base import Volume, VolumeInfo
from objstore.volume.opening import close_disk, drop_garbage, min_copies, open_disk, purge_log, tail_rows
from objstore.volume.recovery import Recovery
from objstore.volume.scrub import Scrub
from objstore.volume.settings import MODES, StoreSettings, check_mode
from objstore.volume.starting import Started, start_store
from objstore.volume.status import (
    DamagedRange,
    RecoveryStatus,
    ScrubStatus,
    StoreStatus,
    VdiDamage,
    VdiStatus,
    ZoneStatus,
)
from objstore.volume.vdi import Vdi
from objstore.volume.zones import Reopen, Zones

log = logging.getLogger(__name__)

COPIES_DEFAULT_MAX: Final = 3


class Store:
    """An open store (VolumeSource). Touched by the event loop only; made by `open_store` or `open_zones`.

    `_open`: VDIs whose log is open, by vdi id. `_opening`: the tasks that open one; a second caller awaits the same.
    `_closing`: the tasks that close one which only the store's own work had opened.
    """

    def __init__(self, started: Started, lock_note: str = "", reopen: Reopen | None = None) -> None:
        env = started.env
        self.env = env
        self.membership = started.membership
        self.catalog = started.catalog
        self.unclean_stop = started.unclean
        self.started = env.clock.wall()
        self.places = started.places
        self._force = started.forced
        self._read_only = started.read_only
        self._open: dict[int, Vdi] = {}
        self._opening: dict[int, asyncio.Task[Vdi]] = {}
        self._closing: dict[int, asyncio.Task[None]] = {}
        self._failed: dict[int, str] = {}
        self._damage: dict[int, Damage] = {}
        """By log; it outlives the closing of a VDI."""
        self._creating: set[str] = set()
        self._deleting: set[int] = set()
        self._purging: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._unused: dict[int, asyncio.Future[None]] = {}
        self.scrub = Scrub(self)
        self.recovery = Recovery(self)
        self.zones = Zones(self, self.places, lock_note, reopen)
        env.reserved_bytes = self._reserved_bytes

    @property
    def epoch(self) -> Epoch:
        """The one in force."""
        return self.membership.epoch

    # -- volumes for the network side ---------------------------------------------------------------------------

    def names(self) -> list[str]:
        """See VolumeSource."""
        return sorted(self.catalog.state.names)

    def peek(self, name: str) -> VolumeInfo | None:
        """See VolumeSource."""
        vdi_id = self.catalog.state.names.get(name)
        if vdi_id is None:
            return None
        entry = self.catalog.state.vdis[vdi_id]
        copies = "1 copy" if entry.copies == 1 else f"{entry.copies} copies"
        return VolumeInfo(name, entry.size_bytes, False, f"{entry.mode}, {copies}")

    async def open(self, name: str) -> Volume:
        """See VolumeSource."""
        vdi = await self._vdi(self._entry(name))
        vdi.attached += 1
        self._open_preallocated()
        return vdi

    def _open_preallocated(self) -> None:
        """Open every preallocated VDI in the background: only then its share of the space is known."""
        for entry in self.catalog.state.vdis.values():
            known = self._open.keys() | self._opening.keys() | self._failed.keys() | self._deleting
            if entry.prealloc and entry.vdi_id not in known:
                self._begin_opening(entry)

    def _begin_opening(self, entry: VdiEntry) -> asyncio.Task[Vdi]:
        task = self._opening[entry.vdi_id] = self.env.loop.create_task(self._open_vdi(entry))
        task.add_done_callback(_noted)
        return task

    def _reserved_bytes(self, log_number: int) -> int:
        return sum(vdi.reserved_bytes for vdi in self._open.values() if vdi.disk.log != log_number)

    async def close(self, volume: Volume) -> None:
        """See VolumeSource."""
        assert isinstance(volume, Vdi)
        volume.attached -= 1
        if not volume.attached and volume.disk.writer.error is None:
            volume.disk.writer.request_sync()

    def _check_open(self) -> None:
        if self._stopping:
            raise Stopping("the store is closing")
        if self._read_only:
            raise ReadOnly("the store was opened to look at it only")

    def _entry(self, name: str) -> VdiEntry:
        self._check_open()
        vdi_id = self.catalog.state.names.get(name)
        if vdi_id is None or vdi_id in self._deleting:
            raise NotFound(f"there is no VDI {name!r}")
        return self.catalog.state.vdis[vdi_id]

    # -- VDIs for the store's own work --------------------------------------------------------------------------

    @asynccontextmanager
    async def using(self, entry: VdiEntry) -> AsyncIterator[Vdi]:
        """The VDI, open, for work of the store's own; its deletion waits for the end of it. If nobody had it open
        before and nobody has then, it is closed again. NotFound: it is being deleted."""
        was_open = entry.vdi_id in self._open or entry.vdi_id in self._opening
        vdi = await self._vdi(entry)
        with self.holding(entry.log) as held:
            if held is None:
                raise NotFound(f"VDI {entry.name!r} is being deleted")
            yield vdi
        if not (was_open or vdi.attached or vdi.users or vdi.prealloc or self._stopping or self.leaving(entry.vdi_id)):
            task = self._closing[entry.vdi_id] = self.env.loop.create_task(self._close_vdi(vdi))
            await asyncio.shield(task)

    @contextmanager
    def holding(self, log_number: int) -> Iterator[Vdi | None]:
        """The VDI of a log, if it is open and not being deleted, which waits until this ends; else None."""
        vdi = next((v for i, v in self._open.items() if v.disk.log == log_number and i not in self._deleting), None)
        if vdi is None:
            yield None
            return
        vdi.users += 1
        try:
            yield vdi
        finally:
            vdi.users -= 1
            waiter = self._unused.get(log_number)
            if not vdi.users and waiter is not None and not waiter.done():
                waiter.set_result(None)

    def leaving(self, vdi_id: int) -> bool:
        """Whether work on this VDI should end soon, because it is to be deleted or the store closes."""
        return self._stopping or vdi_id in self._deleting or vdi_id not in self.catalog.state.vdis

    async def _close_vdi(self, vdi: Vdi) -> None:
        """Close one VDI that nobody uses; what goes wrong the next opening puts right."""
        vdi_id = self.catalog.state.names[vdi.name]
        del self._open[vdi_id]
        try:
            await vdi.close(Stopping("the VDI is being closed"))
            await self.catalog.commit(self._closed_head(vdi))
        except StoreError as error:
            log.warning("VDI %s was not closed in good order: %s", vdi.name, error)
        finally:
            self._forget_segments(vdi)
            del self._closing[vdi_id]

    def _forget_segments(self, vdi: Vdi) -> None:
        for segment in [*vdi.disk.segments.values(), *(segment for segment, _ in vdi.disk.dead.values())]:
            self.env.segments.pop(segment.key, None)
            segment.close_handles()

    async def _vdi(self, entry: VdiEntry) -> Vdi:
        while entry.vdi_id in self._closing:
            await asyncio.wait([self._closing[entry.vdi_id]])
        vdi = self._open.get(entry.vdi_id)
        if vdi is not None:
            return vdi
        task = self._opening.get(entry.vdi_id)
        if task is None:
            task = self._begin_opening(entry)
        return await asyncio.shield(task)

    async def _open_vdi(self, entry: VdiEntry) -> Vdi:
        env = self.env
        try:
            head = self.catalog.state.heads.get(entry.log)
            opened = await open_disk(env, self.membership, entry, head, force=self._force)
            try:
                await self.catalog.commit(opened.head)
                await drop_garbage(env, entry.log, opened.garbage)
            except StoreError:
                await close_disk(opened.disk)
                raise
        except StoreError as error:
            self._failed[entry.vdi_id] = str(error)
            raise
        finally:
            del self._opening[entry.vdi_id]
        self._failed.pop(entry.vdi_id, None)
        opened.disk.damage = self._damage.setdefault(entry.log, opened.disk.damage)
        vdi = Vdi(entry, opened.disk, opened.keeper)
        self._open[entry.vdi_id] = vdi
        return vdi

    # -- administration -----------------------------------------------------------------------------------------

    async def create_vdi(
        self, name: str, size_bytes: int, *, copies: int | None = None, mode: str = MODES[0], prealloc: bool = False
    ) -> VdiStatus:
        """Create a VDI; durable on return. copies: default the smaller of 3 and the number of zones.

        Exists; InvalidRequest: name, size, copies or mode; NoSpace: prealloc doesn't fit; Unavailable.
        """
        check_name(name)
        check_mode(mode)
        self._check_open()
        if not 0 < size_bytes <= VDI_BYTES_MAX:
            raise InvalidRequest(f"size {size_bytes} is impossible: 1 byte to {format_size(VDI_BYTES_MAX)}")
        zones = len(self.membership.epoch.members) + len(self.membership.epoch.out)
        if copies is None:
            copies = min(COPIES_DEFAULT_MAX, zones)
        if not 1 <= copies <= zones:
            raise InvalidRequest(f"copies = {copies} is impossible: the store's zones are {zones}")
        state = self.catalog.state
        if name in state.names or name in self._creating:
            raise Exists(f"there is a VDI {name!r} already")
        if state.next_log > LOG_MAX:
            raise NoSpace("the store has used up its log numbers")
        self._creating.add(name)
        try:
            if prealloc:
                await self._check_prealloc(size_bytes)
            entry = VdiEntry(
                vdi_id=state.next_vdi,
                name=name,
                log=state.next_log,
                size_bytes=size_bytes,
                copies=copies,
                mode=mode,
                created=self.env.clock.wall(),
                prealloc=prealloc,
            )
            state.next_vdi += 1
            state.next_log += 1
            await self.catalog.commit(entry)
            if prealloc:
                vdi = await self._vdi(entry)
                await vdi.zero(0, size_bytes, no_hole=True, fua=True)
        finally:
            self._creating.discard(name)
        return self.vdi(name)

    async def _check_prealloc(self, size_bytes: int) -> None:
        for zone in (self.env.zones[z] for z in sorted(self.env.in_service)):
            free = await run(self.env.executor, zone.index, zone.backend.free_bytes)
            if free - self.env.reserve_bytes < size_bytes:
                raise NoSpace(f"{zone!r} has {format_size(free)} free, too little to reserve {format_size(size_bytes)}")

    async def delete_vdi(self, name: str) -> None:
        """Delete a VDI; its space comes back in the background. NotFound; Busy: it is attached."""
        entry = self._entry(name)
        while under_way := self._opening.get(entry.vdi_id) or self._closing.get(entry.vdi_id):
            await asyncio.wait([under_way])
            entry = self._entry(name)  # somebody else may have deleted it meanwhile
        vdi = self._open.get(entry.vdi_id)
        if vdi is not None and vdi.attached:
            raise Busy(f"VDI {name!r} is attached by {vdi.attached} connections")
        self._deleting.add(entry.vdi_id)
        # A task of the store's own: whoever asked may go away, and half a deletion must not stay.
        task = self.env.loop.create_task(self._delete(entry, vdi))
        self._purging.add(task)
        task.add_done_callback(self._purging.discard)
        await asyncio.shield(task)

    async def _delete(self, entry: VdiEntry, vdi: Vdi | None) -> None:
        if vdi is not None and vdi.users:
            waiter = self._unused[entry.log] = self.env.loop.create_future()
            await waiter
            del self._unused[entry.log]
        try:
            await self.catalog.commit(DeleteEntry(vdi_id=entry.vdi_id))
        finally:
            self._deleting.discard(entry.vdi_id)
        self._failed.pop(entry.vdi_id, None)
        self._damage.pop(entry.log, None)
        if vdi is not None:
            del self._open[entry.vdi_id]
            await vdi.abandon(NotFound(f"VDI {entry.name!r} was deleted"))
            self._forget_segments(vdi)
        self._purge(entry.log)

    def _purge(self, number: int) -> None:
        task = self.env.loop.create_task(self._purge_log(number))
        self._purging.add(task)
        task.add_done_callback(self._purging.discard)

    def purge_garbage(self) -> None:
        """Try again what is left of deleted VDIs: zones that had it may be back."""
        if not self.membership.epoch.out:
            for number in sorted(self.catalog.state.garbage):
                self._purge(number)

    async def _purge_log(self, number: int) -> None:
        """Give back the space of a deleted VDI's log; what fails is tried again at the next start."""
        folders = [log_folder(number), checkpoint_folder(number)]
        try:
            for z in sorted(self.env.in_service):
                await run_long(self.env.executor, z, purge_log, self.env.zones[z].backend, folders)
            # Zones that are out may have some of it: it stays noted until they have been purged too.
            if not self._stopping and not self.membership.epoch.out:
                await self.catalog.commit(PurgedEntry(log=number))
        except StoreError as error:
            log.warning("log %d of a deleted VDI could not be removed yet: %s", number, error)

    # -- status -------------------------------------------------------------------------------------------------

    def vdis(self) -> list[VdiStatus]:
        """Every VDI, by name."""
        return [self.vdi(name) for name in self.names()]

    def vdi(self, name: str) -> VdiStatus:
        """One VDI. NotFound."""
        state = self.catalog.state
        if name not in state.names:
            raise NotFound(f"there is no VDI {name!r}")
        entry = state.vdis[state.names[name]]
        vdi = self._open.get(entry.vdi_id)
        reason = self._failed.get(entry.vdi_id, "")
        if vdi is not None:
            error = vdi.disk.writer.error or vdi.disk.writer.short
            reason = str(error) if error is not None else reason
        return VdiStatus(
            name=name,
            vdi_id=entry.vdi_id,
            size_bytes=entry.size_bytes,
            copies=entry.copies,
            mode=entry.mode,
            created=entry.created,
            attached=vdi.attached if vdi is not None else 0,
            state="failed" if reason else "open" if vdi is not None else "closed",
            reason=reason,
            live_bytes=vdi.disk.live_total << BLOCK_SHIFT if vdi is not None else 0,
            dirty_bytes=vdi.disk.writer.dirty_bytes if vdi is not None else 0,
            last_flush=vdi.last_flush if vdi is not None else None,
            log=entry.log,
            damaged_bytes=self._damaged_bytes(entry.log, vdi),
        )

    def _damaged_bytes(self, log_number: int, vdi: Vdi | None) -> int:
        damage = self._damage.get(log_number)
        return 0 if damage is None else damage.count(None if vdi is None else vdi.disk) << BLOCK_SHIFT

    async def damage(self, name: str) -> VdiDamage:
        """What is known to be damaged of a VDI in every copy: by reads and by scrub, since the store was opened.
        NotFound."""
        entry = self._entry(name)
        if not self._damaged_bytes(entry.log, None):
            return VdiDamage(name=name, ranges=[], complete=True)
        async with self.using(entry) as vdi:
            found = await vdi.disk.damage.ranges(vdi.disk)
            ranges = [
                DamagedRange(offset_bytes=offset, length_bytes=min(length, entry.size_bytes - offset))
                for offset, length in found
            ]
            return VdiDamage(name=name, ranges=ranges, complete=not vdi.disk.damage.truncated)

    async def start_scrub(self) -> ScrubStatus:
        """Look at every copy of everything now; `wait_for_scrub` returns when that is done."""
        if self._stopping:
            raise Stopping("the store is closing")
        self.scrub.request()
        return self.scrub.status()

    async def wait_for_scrub(self) -> ScrubStatus:
        """Return when the pass that was asked for has ended, with what it found."""
        await self.scrub.finished()
        return self.scrub.status()

    async def change_zones(
        self, action: str, zone: str, *, path: str | None = None, weight: float | None = None, force: bool = False
    ) -> None:
        """One of `add`, `drain`, `remove`, `replace`, `set-weight` (volume/zones.py). InvalidRequest: there is no such
        action, or what it needs is not given."""
        if self._stopping:
            raise Stopping("the store is closing")
        if action == "add":
            await self.zones.add(zone, weight)
        elif action == "drain":
            await self.zones.drain(zone)
        elif action == "remove":
            await self.zones.remove(zone, force=force)
        elif action == "replace" and path is not None:
            await self.zones.replace(zone, path)
        elif action == "set-weight" and weight is not None:
            await self.zones.set_weight(zone, weight)
        else:
            raise InvalidRequest(f"{action!r} is no change of zones, or something is missing")

    def set_recovery_rate(self, bytes_per_second: int) -> RecoveryStatus:
        """Limit recovery from now on; 0 = no limit. InvalidRequest."""
        self.recovery.pace.set_rate(bytes_per_second)
        return self.recovery.status()

    async def wait_for_recovery(self) -> RecoveryStatus:
        """Return when every copy is where it should be, or nothing more can be done now."""
        await self.recovery.settled()
        return self.recovery.status()

    async def set_copies(self, name: str, copies: int) -> VdiStatus:
        """Change how many zones hold each object of a VDI, whether it is open or not; recovery then makes or removes
        copies. NotFound; InvalidRequest: there are not so many zones."""
        entry = self._entry(name)
        zones = len(self.membership.placeable())
        if not 1 <= copies <= zones:
            raise InvalidRequest(f"copies = {copies} is impossible: the store has {zones} zones")
        while under_way := self._opening.get(entry.vdi_id) or self._closing.get(entry.vdi_id):
            await asyncio.wait([under_way])
            entry = self._entry(name)
        changed = msgspec.structs.replace(entry, copies=copies)
        vdi = self._open.get(entry.vdi_id)
        head = self.catalog.state.heads.get(entry.log)
        if vdi is None or head is None:
            await self.catalog.commit(changed)
        else:
            # Opening judges the end of a log by the fewest copies that anything in this run was given: it must know
            # before the first object gets fewer.
            await self.catalog.commit(changed, msgspec.structs.replace(head, copies=min(head.copies, copies)))
            await vdi.set_copies(copies, min_copies(self.env, copies))
        self.recovery.request()
        return self.vdi(name)

    async def status(self) -> StoreStatus:
        """The store as a whole; the zones are asked for their space outside the event loop."""
        env = self.env
        epoch = self.membership.epoch
        vdis = self.vdis()
        scrub = self.scrub.status()
        reasons = [f"VDI {vdi.name}: {vdi.reason}" for vdi in vdis if vdi.state == "failed"]
        if self.catalog.error is not None:
            reasons.append(f"catalog: {self.catalog.error}")
        failing = {zone.index: zone.error for zone in env.zones if zone.error is not None}
        stopped = bool(reasons) or not failing.keys().isdisjoint(env.in_service)
        reasons += [f"{env.zones[z]!r}: {error}" for z, error in failing.items() if z in env.in_service]
        reasons += [f"zone {zone.path} is out since epoch {zone.since}: {zone.reason}" for zone in epoch.out]
        late = env.watch.late if env.watch is not None else ()
        reasons += [f"{env.zones[z]!r} is late, and can't be done without" for z in sorted(late)]
        reasons += [f"{zone!r} failed {zone.read_errors} reads" for zone in env.zones if zone.read_errors]
        reasons += self._fewer_copies()
        reasons += [
            f"VDI {vdi.name}: {vdi.damaged_bytes} bytes are damaged in every copy (sheepfold vdi damage {vdi.name})"
            for vdi in vdis
            if vdi.damaged_bytes
        ]
        if scrub.copies_unrepaired:
            reasons.append(f"{scrub.copies_unrepaired} bad copies could not be replaced")
        recovery = self.recovery.status()
        if recovery.copies_missing:
            reasons.append(f"{recovery.copies_missing} copies are missing")
        if recovery.objects_unreachable:
            reasons.append(f"{recovery.objects_unreachable} objects have no copy in service")
        reasons += [f"recovery: {problem}" for problem in recovery.problems]
        zones = [
            *(await asyncio.gather(*(self._member_status(member) for member in epoch.members))),
            *(_out_status(zone) for zone in epoch.out),
        ]
        zones.sort(key=lambda zone: zone.number)
        return StoreStatus(
            store_id=env.store_id.hex(),
            format_version=FORMAT_VERSION,
            health="stopped" if stopped else "degraded" if reasons else "ok",
            reasons=reasons,
            zones=zones,
            epoch=epoch.number,
            vdis=len(self.catalog.state.vdis),
            dirty_bytes=env.dirty_bytes,
            dirty_bytes_max=env.dirty_bytes_max,
            map_bytes=env.maps.loaded_bytes,
            map_bytes_max=env.maps.limit_bytes,
            map_waiting=env.maps.waiting,
            unclean_stop=self.unclean_stop,
            started=self.started,
            version=VERSION,
            scrub=scrub,
            recovery=recovery,
        )

    def _fewer_copies(self) -> list[str]:
        """One line for each open VDI that has segments with fewer copies in service than it asks for."""
        env = self.env
        lines = []
        for vdi in self._open.values():
            wanted = vdi.disk.writer.copies
            fewer = sum(len(env.serving(s.zones)) < wanted for s in vdi.disk.segments.values())
            if fewer:
                lines.append(f"VDI {vdi.name}: {fewer} segments have fewer than {wanted} copies in service")
        return lines

    async def _member_status(self, member: Member) -> ZoneStatus:
        env = self.env
        zone = env.zones[member.number]
        try:
            used, free = await run_long(env.executor, member.number, measure, zone.backend)
        except StoreError:
            used = free = 0
        return ZoneStatus(
            number=member.number,
            id=member.id,
            path=member.path,
            state=member.state if zone.error is None else "failed",
            reason="" if zone.error is None else str(zone.error),
            weight=member.weight,
            used_bytes=used,
            free_bytes=free,
            epoch=self.membership.epoch.number,
        )

    # -- the end ------------------------------------------------------------------------------------------------

    async def shutdown(self) -> None:
        """Make everything durable, write checkpoints, give the zones back. Unavailable: a zone failed; all is closed
        nevertheless, and what could not be made durable is named."""
        if self._stopping:
            return
        self._stopping = True
        env = self.env
        failed: list[str] = []
        await self.zones.close()
        await self.recovery.close()
        await self.scrub.close()
        if self._opening:
            await asyncio.wait(list(self._opening.values()))
        if self._closing:
            await asyncio.wait(list(self._closing.values()))
        if self._purging:
            await asyncio.wait(list(self._purging))
        for vdi in list(self._open.values()):
            try:
                await vdi.close(Stopping("the store is closing"))
                await self.catalog.commit(self._closed_head(vdi))
            except StoreError as error:
                failed.append(f"VDI {vdi.name}: {error}")
        try:
            if not failed and not self._read_only:
                await self.catalog.commit(StopEntry(wall=env.clock.wall()))
            await self.catalog.close()
        except StoreError as error:
            failed.append(f"catalog: {error}")
        self._open.clear()
        for segment in env.segments.values():
            segment.close_handles()
        env.segments.clear()
        env.leave()
        env.executor.close()
        for place in self.places:
            # Closing a zone whose calls hang would hang too; the end of the process gives its lock back.
            assert place.superblock is not None
            number = place.superblock.number
            if number in env.in_service or not env.executor.outstanding(number):
                place.backend.close()
        if failed:
            raise Unavailable("not everything could be made durable: " + "; ".join(failed))

    def _head(self, log_number: int) -> HeadEntry | None:
        return self.catalog.state.heads.get(log_number)

    def _closed_head(self, vdi: Vdi) -> HeadEntry:
        disk, keeper = vdi.disk, vdi.keeper
        return HeadEntry(
            log=disk.log,
            generation=disk.writer.generation,
            tail=tail_rows(disk, min(keeper.previous_next_segment, keeper.next_segment)),
            first_number=disk.writer.next_number,
            checkpoint=keeper.durable_number,
            clean=True,
            epoch=self.membership.epoch.id,
            copies=min(disk.writer.copies, head.copies) if (head := self._head(disk.log)) else disk.writer.copies,
        )


def _out_status(zone: Outside) -> ZoneStatus:
    return ZoneStatus(
        number=zone.number,
        id=zone.id,
        path=zone.path,
        state="out",
        reason=zone.reason,
        weight=zone.weight,
        used_bytes=0,
        free_bytes=0,
        epoch=zone.since - 1,
    )


def _noted(task: asyncio.Task[Vdi]) -> None:
    """Why a VDI could not be opened is in its status; whoever waits for it gets the error from the task."""
    if not task.cancelled():
        task.exception()


def measure(backend: Backend) -> tuple[int, int]:
    """In a zone's thread: (bytes used, bytes free); zeros if the zone can't say."""
    try:
        return backend.used_bytes(), backend.free_bytes()
    except StoreError:
        return 0, 0


async def open_zones(
    backends: Sequence[tuple[Backend, str]],
    *,
    settings: StoreSettings | None = None,
    create: bool = False,
    lock_note: str = "",
    clock: Clock | None = None,
    executor: Executor | None = None,
    rng: random.Random | None = None,
    missing: Mapping[str, str] | None = None,
    force: bool = False,
    read_only: bool = False,
    reopen: Reopen | None = None,
) -> Store:
    """Open the store that these zones make up, (backend, path for messages) each. See `open_store`.

    missing: zones that can't be opened, path -> why. reopen: makes a backend of a path, for zones that are added or
    come back. Blocks in the calling loop while it reads superblocks and epochs: call it before serving.
    """
    if not backends:
        raise InvalidRequest("a store has at least one zone")
    threads = executor or ThreadExecutor()
    try:
        started = await start_store(
            backends,
            threads,
            settings=settings or StoreSettings(),
            create=create,
            lock_note=lock_note,
            clock=clock or SystemClock(),
            rng=rng or random.SystemRandom(),
            missing=missing or {},
            force=force,
            read_only=read_only,
        )
    except BaseException:
        if executor is None:
            threads.close()
        raise
    store = Store(started, lock_note, reopen)
    if read_only:
        return store
    for number in sorted(started.catalog.state.garbage):
        store._purge(number)
    store.scrub.start()
    store.recovery.start()
    store.zones.start()
    return store


async def open_store(
    paths: Sequence[Path | str],
    *,
    settings: StoreSettings | None = None,
    create: bool = False,
    lock_note: str = "",
    force: bool = False,
    read_only: bool = False,
) -> Store:
    """Open the store whose zones are these directories. create: empty or missing directories become a new store.
    read_only: to see what there is; no epoch is written, no VDI can be opened, nothing changes.

    Zones that are missing, empty or damaged are done without if those that are here are enough. force: open even if
    they are not, and give up what only the missing ones hold.
    lock_note: one line for others to read while this process holds the zones. InvalidRequest: foreign, doubled or
    mixed-up directories; NotFound: no store there; Busy: another process has it (its note is in the message);
    FormatError: a newer format; Unavailable: too many zones are missing; Corrupt: the catalog is damaged in every zone.
    """
    settings = settings or StoreSettings()
    spares = settings.recycle_bytes_max // (segment_blocks(settings.segment_bytes) * BLOCK_BYTES)
    names = [absolute(path) for path in paths]
    for path in names:
        if names.count(path) > 1:
            raise InvalidRequest(f"{path} is given twice")
    names += _others(names)
    if create and all(_superblock_at(path) is None for path in names):
        for path in names:
            try:
                os.makedirs(path, exist_ok=True)
            except OSError as error:
                raise InvalidRequest(f"{path} can't be made a zone: {error.strerror}") from error
    backends: list[tuple[Backend, str]] = []
    missing: dict[str, str] = {}
    try:
        for path in names:
            try:
                backends.append((DirectoryBackend(path, recycle_files_max=spares), path))
            except NotFound:
                missing[path] = "there is no such directory"
            except ZoneFailed as error:
                missing[path] = str(error)
        if not backends:
            raise NotFound("; ".join(f"{path}: {reason}" for path, reason in missing.items()))
        return await open_zones(
            backends,
            settings=settings,
            create=create,
            lock_note=lock_note,
            missing=missing,
            force=force,
            read_only=read_only,
            reopen=lambda path: DirectoryBackend(path, recycle_files_max=spares),
        )
    except StoreError:
        for backend, _ in backends:
            backend.close()
        raise


def _others(names: Sequence[str]) -> list[str]:
    """Directories of zones of the same store that were not given, as far as they are where they were last seen."""
    here: set[str] = set()
    hints: dict[str, str] = {}
    for path in names:
        block = _superblock_at(path)
        if block is not None:
            here.add(block.zone)
            hints.update({member.id: member.path for member in block.members})
    others = []
    for zone, path in hints.items():
        if zone not in here and path not in names:
            block = _superblock_at(path)
            if block is not None and block.zone == zone:
                others.append(path)
    return others


def _superblock_at(path: str) -> Superblock | None:
    """What the directory says it is; None if that can't be read."""
    try:
        backend = DirectoryBackend(path)
    except StoreError:
        return None
    try:
        return read_superblock(backend, path)
    except StoreError:
        return None
    finally:
        backend.close()


def _check_directory(path: str) -> None:
    if not os.path.isdir(path):
        raise NotFound(f"{path} is no directory")


def zone_paths(zone: Path | str) -> list[Path]:
    """The directories of all zones of the store that this one belongs to. NotFound: it belongs to none."""
    path = absolute(zone)
    _check_directory(path)
    backend = DirectoryBackend(path)
    try:
        block = read_superblock(backend, path)
    finally:
        backend.close()
    if block is None:
        raise NotFound(f"{path} is no zone of a store")
    return [Path(path) if member.id == block.zone else Path(member.path) for member in block.members]


def lock_note(zone: Path | str) -> str | None:
    """The note of the process that has this zone's store open; None if nobody has. NotFound: no such directory."""
    path = absolute(zone)
    _check_directory(path)
    backend = DirectoryBackend(path)
    try:
        return backend.lock_note()
    finally:
        backend.close()


__all__ = ["Store", "lock_note", "open_store", "open_zones", "zone_paths"]
