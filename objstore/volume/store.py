"""The store: zones, catalog, the VDIs that are open. What `nbdserver` and administrators talk to."""

import asyncio
import logging
import os
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from objstore.backend.base import Backend, ZoneFailed
from objstore.backend.directory import DirectoryBackend
from objstore.clock import Clock, SystemClock
from objstore.errors import (
    InvalidRequest,
    NoSpace,
    NotFound,
    OutOfRange,
    Stopping,
    StoreError,
    Unavailable,
)
from objstore.format.catalog import Entry, PurgedEntry, StopEntry, VdiEntry
from objstore.format.document import Epoch
from objstore.log.checkpoint import checkpoint_folder
from objstore.log.segment import log_folder
from objstore.log.writer import segment_blocks
from objstore.names import check_name
from objstore.replica.members import absolute
from objstore.replica.zone import Executor, ThreadExecutor, run, run_long
from objstore.units import BLOCK_BYTES, BLOCK_SHIFT, VDI_BYTES_MAX, format_size
from objstore.volume.attributes import Attributes
from objstore.volume.base import VolumeInfo
from objstore.volume.clones import COPIES_DEFAULT_MAX
from objstore.volume.directories import make_directories, other_zones
from objstore.volume.exclusive import ExclusiveOperations
from objstore.volume.info import store_info
from objstore.volume.jobs import Jobs
from objstore.volume.limits import Limits
from objstore.volume.opening import min_copies, purge_log
from objstore.volume.recovery import Recovery
from objstore.volume.scrub import Scrub
from objstore.volume.settings import MODES, StoreSettings, check_mode
from objstore.volume.starting import Started, start_store
from objstore.volume.status import (
    DamagedRange,
    JobStatus,
    LimitStatus,
    RecoveryStatus,
    ScrubStatus,
    StoreInfo,
    StoreStatus,
    VdiDamage,
    VdiStatus,
)
from objstore.volume.summary import store_status
from objstore.volume.vdi import Vdi
from objstore.volume.zones import Reopen, Zones

log = logging.getLogger(__name__)

BALLAST_BYTES: Final = 32 << 20
"""Kept back in each zone, in a file: enough for a start (records, the copies of a short unsealed end) and for deletions
when other programs have filled the file system to the last byte."""


class Store(ExclusiveOperations):
    """An open store (VolumeSource). Touched by the event loop only; made by `open_store` or `open_zones`."""

    def __init__(self, started: Started, lock_note: str = "", reopen: Reopen | None = None) -> None:
        super().__init__(started)
        self.unclean_stop = started.unclean
        self.started = self.env.clock.wall()
        self.places = started.places
        self._purging: set[asyncio.Task[None]] = set()
        self.scrub = Scrub(self)
        self.recovery = Recovery(self)
        self.jobs = Jobs(self.catalog, self.env.clock, self.env.loop)
        self.attributes = Attributes(self.catalog, self._entry)
        self._limits = Limits(self.catalog, self._change, self._entry, self._open.get)
        self.zones = Zones(self, self.places, lock_note, reopen)

    @property
    def epoch(self) -> Epoch:
        """The one in force."""
        return self.membership.epoch

    # -- volumes for the network side ---------------------------------------------------------------------------

    def names(self, *, snapshots: bool = False) -> list[str]:
        """See VolumeSource."""
        state = self.catalog.state
        if not snapshots:
            return sorted(state.names)
        shown = (self.snapshot_name(snapshot) for snapshot in state.snapshots.values() if not snapshot.hidden)
        return sorted([*state.names, *shown])

    def peek(self, name: str) -> VolumeInfo | None:
        """See VolumeSource."""
        if "@" in name:
            found = self.catalog.state.find_snapshot(name)
            if found is None:
                return None
            identity = f"{self.env.store_id.hex()}:s{found.snapshot_id}"
            return VolumeInfo(name, found.size_bytes, True, f"snapshot {found.index}", identity=identity)
        vdi_id = self.catalog.state.names.get(name)
        if vdi_id is None:
            return None
        entry = self.catalog.state.vdis[vdi_id]
        copies = "1 copy" if entry.copies == 1 else f"{entry.copies} copies"
        refused = self.refused(entry)
        line = refused or f"{entry.mode}, {copies}"
        return VolumeInfo(name, entry.size_bytes, False, line, refused, self.identity(entry))

    def tags(self, name: str) -> list[str]:
        """See VolumeSource."""
        vdi, _, _ = name.partition("@")
        itself = self.catalog.state.find_snapshot(name)
        others = (s for s in self.catalog.state.snapshots_named(vdi) if s is not itself and not s.hidden)
        return list(dict.fromkeys(s.tag or str(s.index) for s in others))

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
        if copies is None:
            copies = min(COPIES_DEFAULT_MAX, len(self.membership.epoch.members) + len(self.membership.epoch.out))
        self._check_copies(copies)
        self._check_name_free(name)
        state = self.catalog.state
        self._creating.add(name)
        try:
            if prealloc:
                await self._check_prealloc(size_bytes)
            async with self._change:  # whoever takes numbers from the catalog holds it until they are taken there
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
                raise NoSpace(
                    f"{zone!r} has {format_size(free)} free, too little to reserve {format_size(size_bytes)}"
                    + self.env.space_hint()
                )

    async def _gone(self, entry: VdiEntry) -> None:
        self._failed.pop(entry.vdi_id, None)
        self._damage.drop(entry.log)
        vdi = self._open.pop(entry.vdi_id, None)
        if vdi is not None:
            await vdi.abandon(NotFound(f"VDI {entry.name!r} was deleted"))
            self._forget_segments(vdi)
            await self._leave_parent(entry.vdi_id)
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

    def open_statuses(self) -> list[VdiStatus]:
        """The VDIs that are open."""
        return [self.vdi(vdi.name) for vdi in self.open_vdis() if vdi.name in self.catalog.state.names]

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
            parent=self._parent_name(entry),
            kept_bytes=vdi.disk.held_blocks << BLOCK_SHIFT if vdi is not None else 0,
            damaged_bytes=self._damaged_bytes(entry.log, vdi),
            suspended=entry.suspended,
            importing=self.import_of(entry),
            limits={kind: LimitStatus(rate=one.rate, burst=one.burst) for kind, one in entry.limits.items()},
            weight=entry.weight,
        )

    def _damaged_bytes(self, log_number: int, vdi: Vdi | None) -> int:
        damage = self._damage.get(log_number)
        return 0 if damage is None else damage.count(None if vdi is None else vdi.disk) << BLOCK_SHIFT

    async def set_limits(
        self, name: str, limits: Mapping[str, tuple[int, int]], *, weight: int | None = None
    ) -> VdiStatus:
        """Limit what the clients of a VDI may do in a second, durably, from now on. limits: rate and burst by kind
        (settings.LIMIT_KINDS); rate 0 = none any more, burst 0 = a tenth of a second's worth; what is not named stays.
        weight: its part of the server's time when several VDIs want more than there is, relative to theirs; the default
        is 100. NotFound; InvalidRequest."""
        await self._limits.set(name, limits, weight)
        return self.vdi(name)

    async def damage(self, name: str) -> VdiDamage:
        """What is known to be damaged of a VDI in every copy: by reads and by scrub, since the store was made.
        NotFound."""
        entry = self._entry(name)
        if not self._damaged_bytes(entry.log, None):
            return VdiDamage(name=name, ranges=[], complete=True)
        async with self.using(entry) as vdi:
            found = await vdi.disk.damage.ranges(vdi.disk)
            ranges = [
                DamagedRange(offset_bytes=offset, length_bytes=min(length, entry.size_bytes - offset))
                for offset, length in found
                if offset < entry.size_bytes
            ]
            return VdiDamage(name=name, ranges=ranges, complete=not vdi.disk.damage.truncated)

    async def info(self) -> StoreInfo:
        """What the store is: format, epochs, zones, what lies in them. Writes nothing."""
        return await store_info(self)

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
        while True:
            while under_way := self._opening.get(entry.vdi_id) or self._closing.get(entry.vdi_id):
                await asyncio.wait([under_way])
            async with self._change:
                entry = self._entry(name)
                if entry.vdi_id in self._opening or entry.vdi_id in self._closing:
                    continue
                await self._set_copies(entry, copies)
                break
        self.recovery.request()
        return self.vdi(name)

    async def _set_copies(self, entry: VdiEntry, copies: int) -> None:
        vdi = self._open.get(entry.vdi_id)

        def make() -> list[Entry]:
            changed = msgspec.structs.replace(entry, copies=copies)
            head = self.catalog.state.heads.get(entry.log)
            if vdi is None or head is None:
                return [changed]
            # Opening judges the end of a log by the fewest copies that anything behind the head was given: it must know
            # before the first object gets fewer.
            return [changed, msgspec.structs.replace(head, copies=min(head.copies, copies))]

        await self.catalog.edit(make)
        if vdi is not None:
            await vdi.set_copies(copies, min_copies(self.env, copies))

    async def allocate(self, name: str, offset_bytes: int = 0, length_bytes: int = 0) -> JobStatus:
        """Begin a job that makes reserved zeros of the holes of a range (length 0 = to the end); `jobs.wait` returns
        when it has ended. NotFound; OutOfRange."""
        entry = self._entry(name)
        length_bytes = length_bytes or max(0, entry.size_bytes - offset_bytes)
        if offset_bytes < 0 or length_bytes < 0:
            raise InvalidRequest(f"impossible range offset={offset_bytes} length={length_bytes}")
        if offset_bytes + length_bytes > entry.size_bytes:
            raise OutOfRange(f"past the end offset={offset_bytes} length={length_bytes} size={entry.size_bytes}")

        async def step(offset: int, length: int) -> int:
            if self.leaving(entry.vdi_id) or self.catalog.state.vdis[entry.vdi_id].hidden:
                raise NotFound(f"VDI {name!r} is being deleted")
            async with self.using(self.catalog.state.vdis[entry.vdi_id]) as vdi:
                return await vdi.allocate(offset, length)

        return await self.jobs.start("allocate", name, offset_bytes, length_bytes, step)

    async def status(self, *, thorough: bool = True) -> StoreStatus:
        """The store as a whole; the zones are asked for their space outside the event loop, unless not thorough."""
        return await store_status(self, thorough=thorough)

    # -- the end ------------------------------------------------------------------------------------------------

    async def shutdown(self) -> None:
        """Make everything durable, write checkpoints, give the zones back. Unavailable: a zone failed; all is closed
        nevertheless, and what could not be made durable is named."""
        if self._stopping:
            return
        self._stopping = True
        env = self.env
        failed: list[str] = []
        self.stop_trash()
        await self.jobs.close()
        self.recovery.stop()  # from here on it is refused VDIs, and must not take that for nothing to do
        await self.zones.close()
        await self.recovery.close()
        await self.scrub.close()
        while self._work:
            await asyncio.wait(list(self._work))
        if self._freezing:
            await asyncio.wait(list(self._freezing.values()))
        for volume in list(self._frozen.values()):
            await self._close_frozen(volume, Stopping("the store is closing"))
        if self._opening:
            await asyncio.wait(list(self._opening.values()))
        if self._closing:
            await asyncio.wait(list(self._closing.values()))
        if self._purging:
            await asyncio.wait(list(self._purging))
        for vdi in reversed(list(self._open.values())):  # clones before the VDIs whose snapshots they need
            try:
                await vdi.close(Stopping("the store is closing"))
                await self.catalog.commit(self._closed_head(vdi))
            except StoreError as error:
                failed.append(f"VDI {vdi.name}: {error}")
            await self._leave_parent(vdi.vdi_id)
        try:
            if not self._read_only:
                await self._damage.close()
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
    store.resume_work()
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
    names += other_zones(names)
    made: list[str] = []
    backends: list[tuple[Backend, str]] = []
    missing: dict[str, str] = {}
    try:
        if create:
            make_directories(names, made)
        for path in names:
            try:
                backends.append((DirectoryBackend(path, recycle_files_max=spares, ballast_bytes=BALLAST_BYTES), path))
            except NotFound:
                missing[path] = "there is no such directory"
            except ZoneFailed as error:
                missing[path] = str(error)
        if not backends:
            raise Unavailable(
                "zones are missing: " + "; ".join(f"{path}: {reason}" for path, reason in missing.items())
            )
        return await open_zones(
            backends,
            settings=settings,
            create=create,
            lock_note=lock_note,
            missing=missing,
            force=force,
            read_only=read_only,
            reopen=lambda path: DirectoryBackend(path, recycle_files_max=spares, ballast_bytes=BALLAST_BYTES),
        )
    except StoreError:
        for backend, _ in backends:
            backend.close()
        for path in reversed(made):
            with suppress(OSError):  # something is in it by now
                os.rmdir(path)
        raise
