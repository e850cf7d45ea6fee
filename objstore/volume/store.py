"""The store: zones, catalog, the VDIs that are open. What `nbdserver` and administrators talk to."""

import asyncio
import logging
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from objstore.backend.base import Backend
from objstore.backend.directory import DirectoryBackend
from objstore.clock import Clock, SystemClock
from objstore.errors import (
    Busy,
    Exists,
    InvalidRequest,
    NoSpace,
    NotFound,
    Stopping,
    StoreError,
    Unavailable,
)
from objstore.format.catalog import DeleteEntry, HeadEntry, PurgedEntry, StopEntry, VdiEntry
from objstore.format.document import FORMAT_VERSION, CatalogHead, Epoch
from objstore.log.address import LOG_MAX
from objstore.log.checkpoint import checkpoint_folder
from objstore.log.env import Env
from objstore.log.segment import log_folder
from objstore.log.writer import segment_blocks
from objstore.names import check_name
from objstore.replica.members import (
    ZonePlace,
    absolute,
    check_members,
    drop_old_epochs,
    initialise,
    lock_zones,
    look_at_zones,
    newest_epoch,
    next_epoch,
    read_superblock,
    unfinished,
    update_paths,
    write_epoch,
)
from objstore.replica.zone import Executor, ThreadExecutor, Zone, run
from objstore.units import BLOCK_BYTES, BLOCK_SHIFT, VDI_BYTES_MAX, format_size
from objstore.version import VERSION
from objstore.volume.base import Volume, VolumeInfo
from objstore.volume.catalog import Catalog
from objstore.volume.opening import close_disk, drop_garbage, open_disk, purge_log
from objstore.volume.settings import MODES, StoreSettings, check_mode
from objstore.volume.status import StoreStatus, VdiStatus, ZoneStatus
from objstore.volume.vdi import Vdi

log = logging.getLogger(__name__)

COPIES_DEFAULT_MAX: Final = 3


class Store:
    """An open store (VolumeSource). Touched by the event loop only; made by `open_store` or `open_zones`.

    `_open`: VDIs whose log is open, by vdi id. `_opening`: the tasks that open one; a second caller awaits the same.
    """

    def __init__(
        self, env: Env, places: Sequence[ZonePlace], catalog: Catalog, epoch: Epoch, unclean: str | None
    ) -> None:
        self.env = env
        self.catalog = catalog
        self.epoch = epoch
        self.unclean_stop = unclean
        self.started = env.clock.wall()
        self._places = places
        self._open: dict[int, Vdi] = {}
        self._opening: dict[int, asyncio.Task[Vdi]] = {}
        self._failed: dict[int, str] = {}
        self._creating: set[str] = set()
        self._deleting: set[int] = set()
        self._purging: set[asyncio.Task[None]] = set()
        self._stopping = False
        env.reserved_bytes = self._reserved_bytes
        env.map_bytes = lambda: sum(vdi.disk.map.memory_bytes for vdi in self._open.values())

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

    def _entry(self, name: str) -> VdiEntry:
        if self._stopping:
            raise Stopping("the store is closing")
        vdi_id = self.catalog.state.names.get(name)
        if vdi_id is None or vdi_id in self._deleting:
            raise NotFound(f"there is no VDI {name!r}")
        return self.catalog.state.vdis[vdi_id]

    async def _vdi(self, entry: VdiEntry) -> Vdi:
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
            opened = await open_disk(env, entry, self.catalog.state.heads.get(entry.log))
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
        if self._stopping:
            raise Stopping("the store is closing")
        if not 0 < size_bytes <= VDI_BYTES_MAX:
            raise InvalidRequest(f"size {size_bytes} is impossible: 1 byte to {format_size(VDI_BYTES_MAX)}")
        zones = len(self.env.zones)
        if copies is None:
            copies = min(COPIES_DEFAULT_MAX, zones)
        if not 1 <= copies <= zones:
            raise InvalidRequest(f"copies = {copies} is impossible: the store has {zones} zones")
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
        for zone in self.env.zones:
            free = await run(self.env.executor, zone.index, zone.backend.free_bytes)
            if free - self.env.reserve_bytes < size_bytes:
                raise NoSpace(f"{zone!r} has {format_size(free)} free, too little to reserve {format_size(size_bytes)}")

    async def delete_vdi(self, name: str) -> None:
        """Delete a VDI; its space comes back in the background. NotFound; Busy: it is attached."""
        entry = self._entry(name)
        if entry.vdi_id in self._opening:
            await asyncio.wait([self._opening[entry.vdi_id]])
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
        try:
            await self.catalog.commit(DeleteEntry(vdi_id=entry.vdi_id))
        finally:
            self._deleting.discard(entry.vdi_id)
        self._failed.pop(entry.vdi_id, None)
        if vdi is not None:
            del self._open[entry.vdi_id]
            await vdi.abandon(NotFound(f"VDI {entry.name!r} was deleted"))
            for segment in [*vdi.disk.segments.values(), *(segment for segment, _ in vdi.disk.dead.values())]:
                self.env.segments.pop(segment.key, None)
                segment.close_handles()
        self._purge(entry.log)

    def _purge(self, number: int) -> None:
        task = self.env.loop.create_task(self._purge_log(number))
        self._purging.add(task)
        task.add_done_callback(self._purging.discard)

    async def _purge_log(self, number: int) -> None:
        """Give back the space of a deleted VDI's log; what fails is tried again at the next start."""
        folders = [log_folder(number), checkpoint_folder(number)]
        try:
            for zone in self.env.zones:
                await run(self.env.executor, zone.index, purge_log, zone.backend, folders)
            if not self._stopping:
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
        if vdi is not None and vdi.disk.writer.error is not None:
            reason = str(vdi.disk.writer.error)
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
        )

    async def status(self) -> StoreStatus:
        """The store as a whole; the zones are asked for their space outside the event loop."""
        env = self.env
        reasons = [f"VDI {vdi.name}: {vdi.reason}" for vdi in self.vdis() if vdi.state == "failed"]
        reasons += [f"{zone!r}: {zone.error}" for zone in env.zones if zone.error is not None]
        if self.catalog.error is not None:
            reasons.append(f"catalog: {self.catalog.error}")
        stopped = bool(reasons)
        if env.bad_copies:
            reasons.append(f"{env.bad_copies} bad copies were read since the start (checksum wrong)")
        space = await asyncio.gather(*(run(env.executor, zone.index, measure, zone.backend) for zone in env.zones))
        zones = [
            ZoneStatus(
                id=zone.zone_id.hex(),
                path=zone.path,
                state="in" if zone.error is None else "failed",
                reason="" if zone.error is None else str(zone.error),
                used_bytes=used,
                free_bytes=free,
                epoch=self.epoch.number,
            )
            for zone, (used, free) in zip(env.zones, space, strict=True)
        ]
        return StoreStatus(
            store_id=env.store_id.hex(),
            format_version=FORMAT_VERSION,
            health="stopped" if stopped else "degraded" if reasons else "ok",
            reasons=reasons,
            zones=zones,
            epoch=self.epoch.number,
            vdis=len(self.catalog.state.vdis),
            dirty_bytes=env.dirty_bytes,
            dirty_bytes_max=env.dirty_bytes_max,
            unclean_stop=self.unclean_stop,
            started=self.started,
            version=VERSION,
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
        if self._opening:
            await asyncio.wait(list(self._opening.values()))
        if self._purging:
            await asyncio.wait(list(self._purging))
        for vdi in list(self._open.values()):
            try:
                await vdi.close(Stopping("the store is closing"))
                await self.catalog.commit(self._closed_head(vdi))
            except StoreError as error:
                failed.append(f"VDI {vdi.name}: {error}")
        try:
            if not failed:
                await self.catalog.commit(StopEntry(wall=env.clock.wall()))
            await self.catalog.close()
        except StoreError as error:
            failed.append(f"catalog: {error}")
        self._open.clear()
        for segment in env.segments.values():
            segment.close_handles()
        env.segments.clear()
        env.executor.close()
        for place in self._places:
            place.backend.close()
        if failed:
            raise Unavailable("not everything could be made durable: " + "; ".join(failed))

    def _closed_head(self, vdi: Vdi) -> HeadEntry:
        disk, keeper = vdi.disk, vdi.keeper
        start = min(keeper.previous_next_segment, keeper.next_segment)
        numbers = sorted(n for n in (*disk.segments, *disk.dead) if n >= start)
        return HeadEntry(
            log=disk.log,
            generation=disk.writer.generation,
            tail=numbers,
            first_number=disk.writer.next_number,
            checkpoint=keeper.durable_number,
            clean=True,
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
) -> Store:
    """Open the store that these zones make up, (backend, path for messages) each. See `open_store`.

    Blocks in the calling loop while it reads superblocks and epochs: call it before serving.
    """
    clock = clock or SystemClock()
    rng = rng or random.SystemRandom()
    executor = executor or ThreadExecutor()
    if not backends:
        raise InvalidRequest("a store has at least one zone")
    places = look_at_zones(backends)
    owned = [place for place in places if place.superblock is not None]
    if not create and len(owned) < len(places):
        raise NotFound(f"{next(p.path for p in places if p.superblock is None)} is no zone of a store")
    if owned and len(owned) == len(places):
        places = check_members(places)
    lock_zones(places, lock_note)
    if len(owned) < len(places):
        if owned and not unfinished(owned):
            check_members([owned[0], *(place for place in places if place not in owned)])
        places = initialise(places, rng, clock)
    update_paths(places)
    block = places[0].superblock
    assert block is not None
    zones = []
    for number, place in enumerate(places):
        assert place.superblock is not None
        zones.append(Zone(number, bytes.fromhex(place.superblock.zone), place.backend, place.path))
    env = Env(
        store_id=bytes.fromhex(block.store),
        zones=zones,
        executor=executor,
        clock=clock,
        settings=settings or StoreSettings(),
        rng=rng,
    )
    parent, highest = newest_epoch(places)
    catalog = Catalog(env)
    head = (
        parent.catalog
        if parent is not None
        else CatalogHead(snapshot=0, generation=0, first_number=0, position=0, previous_crc=0)
    )
    await catalog.recover(head)
    unclean = _unclean_report(catalog, parent, env)
    epoch = next_epoch(parent, highest + 1, len(places), await catalog.persist(), rng, clock.wall())
    for zone, place in zip(zones, places, strict=True):
        await run(executor, zone.index, write_epoch, place, epoch)
    env.epoch, env.epoch_id = epoch.number, bytes.fromhex(epoch.id)
    await catalog.start()
    for zone, place in zip(zones, places, strict=True):
        await run(executor, zone.index, drop_old_epochs, place)
    store = Store(env, places, catalog, epoch, unclean)
    for number in sorted(catalog.state.garbage):
        store._purge(number)
    return store


def _unclean_report(catalog: Catalog, parent: Epoch | None, env: Env) -> str | None:
    """What the last stop may have cost. The memory that held it is gone, so only its limits are known."""
    if parent is None or catalog.state.clean:
        return None
    return (
        "the last stop was not clean: writes acknowledged but not flushed in the last "
        f"{env.settings.dirty_age_seconds:g} s before it may be lost, at most {format_size(env.dirty_bytes_max)}; "
        "nothing that was flushed"
    )


async def open_store(
    paths: Sequence[Path | str],
    *,
    settings: StoreSettings | None = None,
    create: bool = False,
    lock_note: str = "",
) -> Store:
    """Open the store whose zones are these directories. create: empty or missing directories become a new store.

    lock_note: one line for others to read while this process holds the zones. InvalidRequest: foreign, doubled or
    mixed-up directories; NotFound: no store there; Busy: another process has it (its note is in the message);
    FormatError: a newer format; Unavailable: zones are missing; Corrupt: the catalog is damaged in every zone.
    """
    settings = settings or StoreSettings()
    spares = settings.recycle_bytes_max // (segment_blocks(settings.segment_bytes) * BLOCK_BYTES)
    backends: list[tuple[Backend, str]] = []
    names = [absolute(path) for path in paths]
    for path in names:
        if names.count(path) > 1:
            raise InvalidRequest(f"{path} is given twice")
        if create:
            try:
                os.makedirs(path, exist_ok=True)
            except OSError as error:
                raise InvalidRequest(f"{path} can't be made a zone: {error.strerror}") from error
        _check_directory(path)
    try:
        for path in names:
            backends.append((DirectoryBackend(path, recycle_files_max=spares), path))
        return await open_zones(backends, settings=settings, create=create, lock_note=lock_note)
    except StoreError:
        for backend, _ in backends:
            backend.close()
        raise


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
