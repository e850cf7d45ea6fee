"""Scrub: every copy of everything is read and checked within a period, what is bad is replaced, what is lost is named.

Two tasks. One makes passes: over the catalog, then over every VDI by the number of its log, its segments by theirs, its
checkpoints; spread over the period, or as fast as zones and clients allow when somebody asks. The other repairs what
reads came upon. VDIs that nobody has open are opened for it and closed again.

How far a pass has come is noted in each zone now and then (object `scrub`), so that a server that is restarted every
day doesn't begin at the same end every day. That note is a hint: losing it costs reading some copies again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Final, Protocol

import msgspec

from objstore.backend.base import ZoneFailed
from objstore.errors import NotFound, StoreError
from objstore.format.catalog import VdiEntry
from objstore.format.document import decode_document, encode_document
from objstore.log.checkpoint import checkpoint_folder
from objstore.log.checkpoint_copies import heal_checkpoint
from objstore.log.copies import Healed, heal
from objstore.log.disk import Disk
from objstore.log.env import Env
from objstore.log.segment import Segment, log_folder
from objstore.replica.membership import Membership, epoch_name
from objstore.replica.pace import Courtesy
from objstore.replica.zone import run, run_long
from objstore.volume.catalog import CATALOG_LOG, Catalog
from objstore.volume.status import ScrubStatus
from objstore.volume.vdi import Vdi

log = logging.getLogger(__name__)

NOTE_NAME: Final = "scrub"
NOTE_SECONDS: Final = 600.0
SETTLE_SECONDS: Final = 60.0
"""From opening a store to the first look at anything: clients that reconnect come first."""
AT_ONCE: Final = 2
"""Segments looked at together by a pass that was asked for: while the slowest zone ends one the others go on."""
CLIENTS_SHARE: Final = 0.01
"""Part of the time that a pass that was asked for works while clients are active: what it does to the requests that
meet it, 2 to 4 times their usual latency, stays out of their 99th percentile."""
SPREAD: Final = 0.9
"""Part of the period that a pass takes."""
SUSPECTS_MAX: Final = 1024
"""Segments waiting for repair after a read; what is above that is found by the next pass."""
LOGS_MAX: Final = 1 << 24


class ScrubNote(msgspec.Struct, frozen=True, kw_only=True):
    """Where the pass is: what lies before (log, segment) is done. Times are Unix seconds, 0 = never."""

    started: float = 0.0
    finished: float = 0.0
    log: int = 0
    segment: int = 0


class ScrubbedStore(Protocol):
    """What scrub needs of the store."""

    env: Env
    catalog: Catalog
    membership: Membership

    def using(self, entry: VdiEntry) -> AbstractAsyncContextManager[Vdi]: ...
    def holding(self, log_number: int) -> contextlib.AbstractContextManager[Vdi | None]: ...
    def leaving(self, vdi_id: int) -> bool: ...


class Scrub:
    """The two tasks and what they found. Touched by the event loop only; AT_ONCE segments at a time are looked at.

    Holds: nothing is written to a zone under the name of an object that its log has given up meanwhile: segments are
    pinned, and the deletion of a VDI waits for `using` and `holding`.
    """

    def __init__(self, store: ScrubbedStore) -> None:
        self._store = store
        self._env = store.env
        self._turn = asyncio.Semaphore(AT_ONCE)
        self._courtesy = Courtesy(store.env.clock, lambda: store.env.requests, CLIENTS_SHARE)
        self._wake = asyncio.Event()
        self._closed = False
        self._requested = False
        self._note = ScrubNote()
        self._noted = 0.0
        self._running = False
        self._on_demand = False
        self._total = 0
        self._done = 0
        self._began = 0.0
        self._began_at = 0
        self._checked = 0
        self._bad = 0
        self._repaired = 0
        self._skipped: list[str] = []
        self._read_repairs = 0
        self._unrepaired: dict[str, int] = {}
        """Object name -> bad copies that could not be replaced, or were not yet."""
        self._suspects: dict[Segment, set[int]] = {}
        self._suspected = asyncio.Event()
        self._passes_ended: list[asyncio.Future[None]] = []
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin the two tasks."""
        loop = self._env.loop
        self._noted = self._env.clock.monotonic()
        self._env.on_bad_copy = self.suspect
        self._tasks = [loop.create_task(self._run()), loop.create_task(self._repair())]

    async def close(self) -> None:
        """End both after what they are doing."""
        self._closed = True
        self._courtesy.release()
        self._env.on_bad_copy = lambda segment, zone: None
        self._wake.set()
        self._suspected.set()
        for task in self._tasks:
            await asyncio.wait([task])
        if self._tasks and self._note.started:
            await self._write_note()

    # -- what others ask --------------------------------------------------------------------------------------------

    def request(self) -> None:
        """Make a whole pass now, as fast as the zones allow. One that was asked for and is under way goes on."""
        if not (self._running and self._on_demand):
            self._requested = True
            self._wake.set()

    async def finished(self) -> None:
        """Return when the pass that was asked for has ended."""
        while (self._requested or (self._running and self._on_demand)) and not self._closed:
            waiter: asyncio.Future[None] = self._env.loop.create_future()
            self._passes_ended.append(waiter)
            await waiter

    def suspect(self, segment: Segment, zone: int) -> None:
        """A read found that zone's copy bad or missing: repair it soon."""
        if len(self._suspects) < SUSPECTS_MAX or segment in self._suspects:
            self._suspects.setdefault(segment, set()).add(zone)
            self._suspected.set()

    def status(self) -> ScrubStatus:
        """Counts of the pass under way, or of the last one."""
        estimate = None
        if self._running:
            speed = (self._done - self._began_at) / max(1e-9, self._env.clock.monotonic() - self._began)
            left = self._total - self._done
            estimate = left / speed if speed > 0 and left > 0 else 0.0 if left <= 0 else None
        return ScrubStatus(
            running=self._running or self._requested,
            on_demand=self._requested or self._on_demand,
            bytes_done=min(self._done, self._total),
            bytes_total=self._total,
            seconds_left=estimate,
            started=self._note.started or None,
            finished=self._note.finished or None,
            copies_checked=self._checked,
            copies_bad=self._bad,
            copies_repaired=self._repaired,
            read_repairs=self._read_repairs,
            copies_unrepaired=sum(self._unrepaired.values()),
            skipped=list(self._skipped),
        )

    # -- passes -----------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        await self._read_note()
        await self._pause(SETTLE_SECONDS)
        while not self._closed:
            on_demand, self._requested = self._requested, False
            if on_demand or await self._due():
                try:
                    await self._pass(on_demand)
                except StoreError as error:
                    log.warning("scrub stopped for now: %s", error)
                    await self._pause(SETTLE_SECONDS)
            self._tell()
        self._tell()

    def _tell(self) -> None:
        for waiter in self._passes_ended:
            if not waiter.done():
                waiter.set_result(None)
        self._passes_ended.clear()

    async def _pause(self, seconds: float) -> None:
        """Sleep; woken early by a request and by close."""
        if self._requested or self._closed:
            return
        self._wake.clear()
        timer = self._env.loop.call_later(seconds, self._wake.set)
        await self._wake.wait()
        timer.cancel()

    @property
    def _period(self) -> float:
        return self._env.settings.scrub_days * 86400.0

    async def _due(self) -> bool:
        """Wait until the next pass has to begin; False: something else comes first."""
        note = self._note
        if not self._period:
            left = NOTE_SECONDS
        elif note.log or note.segment or not note.started:
            left = 0.0
        else:
            left = note.started + self._period - self._env.clock.wall()
        if left > 0:
            # Wall clocks jump: never sleep longer than a period at a time, nor trust a start that lies in the future.
            await self._pause(min(left, max(self._period, SETTLE_SECONDS), NOTE_SECONDS))
        return left <= 0 or left > self._period > 0

    async def _pass(self, on_demand: bool) -> None:
        env = self._env
        goes_on = not on_demand and (self._note.log or self._note.segment)
        if not goes_on:
            self._note = ScrubNote(started=env.clock.wall(), finished=self._note.finished)
            self._checked = self._bad = self._repaired = 0
        self._skipped.clear()
        self._on_demand, self._running = on_demand, True
        try:
            weights = await self._weigh()
            self._total = sum(weights.values())
            self._done = sum(weight for number, weight in weights.items() if number < self._note.log)
            self._began, self._began_at = env.clock.monotonic(), self._done
            for number in sorted({CATALOG_LOG, *weights}):
                if number < self._note.log:
                    continue
                before = self._done
                if not await self._turn_comes():
                    return
                if number == CATALOG_LOG:
                    await self._scrub_catalog()
                else:
                    await self._scrub_log(number)
                if self._interrupted():
                    return
                self._done = before + weights.get(number, 0)
                await self._advance(number + 1, 0)
            self._note = ScrubNote(started=self._note.started, finished=env.clock.wall())
            await self._write_note()
        finally:
            self._running = False
            self._on_demand = False

    def _interrupted(self) -> bool:
        """A background pass makes way for one that was asked for; every pass for the end."""
        return self._closed or (self._requested and not self._on_demand)

    async def _turn_comes(self) -> bool:
        """Wait until the pass is so far by the calendar as it is by its bytes. False: it is interrupted."""
        if not self._on_demand and self._total:
            clock = self._env.clock
            share = self._period * SPREAD / self._total
            due = self._began + (self._done - self._began_at) * share
            while (left := due - clock.monotonic()) > 0 and not self._interrupted():
                await self._pause(left)
        return not self._interrupted()

    async def _weigh(self) -> dict[int, int]:
        """Bytes of all copies in all zones, by log."""
        env = self._env
        weights: dict[int, int] = {}
        for number in [CATALOG_LOG, *(entry.log for entry in self._store.catalog.state.vdis.values())]:
            for z in sorted(env.in_service):
                for folder in (log_folder(number), checkpoint_folder(number)):
                    try:
                        entries = await run_long(env.executor, z, env.zones[z].backend.list, folder)
                    except ZoneFailed:
                        continue  # a zone that is put out meanwhile
                    weights[number] = weights.get(number, 0) + sum(entry.size_bytes for entry in entries)
        return weights

    async def _scrub_log(self, number: int) -> None:
        entry = next((e for e in self._store.catalog.state.vdis.values() if e.log == number), None)
        if entry is None or self._store.leaving(entry.vdi_id):
            return
        try:
            async with self._store.using(entry) as vdi:
                await self._scrub_disk(vdi, entry)
        except NotFound:
            return  # deleted meanwhile
        except StoreError as error:
            self._skipped.append(f"VDI {entry.name}: {error}")

    async def _scrub_disk(self, vdi: Vdi, entry: VdiEntry) -> None:
        disk = vdi.disk
        begin = self._note.segment if self._note.log == entry.log else 0
        numbers = sorted(n for n in (*disk.segments, *disk.dead) if n >= begin)
        # A pass of the calendar's is spread anyway, and has a period to keep to.
        courtesy = self._courtesy if self._on_demand else None
        healing: dict[int, asyncio.Task[Healed]] = {}
        try:
            for number in numbers:
                if not await self._turn_comes() or self._store.leaving(entry.vdi_id):
                    return
                segment = disk.segments.get(number) or (disk.dead[number][0] if number in disk.dead else None)
                if segment is not None and segment.sealed and segment.memory is None:
                    healing[number] = self._env.loop.create_task(self._heal(segment, disk, courtesy))
                if len(healing) >= (AT_ONCE if self._on_demand and not self._courtesy.crowded() else 1):
                    oldest = min(healing)
                    await healing.pop(oldest)
                    await self._advance(entry.log, oldest + 1)
        finally:
            if healing:
                await asyncio.wait(healing.values())
        for task in healing.values():
            task.result()
        for number in sorted(vdi.keeper.sizes):
            if not await self._turn_comes() or self._store.leaving(entry.vdi_id):
                return
            if number in vdi.keeper.sizes:
                await self._heal_checkpoint(vdi, number)

    async def _scrub_catalog(self) -> None:
        """The epoch record, the snapshot, and what is sealed of the catalog's log."""
        store, env = self._store, self._env
        epoch = store.membership.epoch
        documents = [(epoch_name(epoch.number), encode_document("epoch", epoch))]
        documents += [store.catalog.snapshot_object] if store.catalog.snapshot_object is not None else []
        for name, wanted in documents:
            for z in sorted(env.in_service):
                found: bytes | None = None
                try:
                    found = await run(env.executor, z, env.zones[z].backend.get, name)
                except NotFound:
                    pass
                except ZoneFailed:
                    continue
                self._checked += 1
                self._done += len(wanted)
                if found != wanted and store.membership.epoch is epoch and z in env.in_service:
                    self._bad += 1
                    log.warning("a copy is bad object=%s zone=%r", name, env.zones[z])
                    try:
                        await run(env.executor, z, env.zones[z].backend.put, name, wanted)
                    except StoreError as error:
                        log.warning("a copy could not be replaced object=%s: %s", name, error)
                        continue
                    self._repaired += 1
        for segment in [s for s in env.segments.values() if s.log == CATALOG_LOG]:
            began = env.clock.monotonic()
            async with store.catalog.steady:
                if env.segments.get(segment.key) is segment and segment.sealed and segment.memory is None:
                    await self._heal(segment, None, None)
            if self._on_demand:
                await self._courtesy.make_way(env.clock.monotonic() - began)

    # -- one object -------------------------------------------------------------------------------------------------

    async def _heal(
        self, segment: Segment, disk: Disk | None, courtesy: Courtesy | None, level: int = logging.WARNING
    ) -> Healed:
        """courtesy: see `heal`. level: of the report of copies that were bad and are replaced."""
        env = self._env
        async with self._turn:
            zones = env.serving(segment.zones)
            healed = await heal(env, segment, zones, courtesy=courtesy)
            self._done += healed.read_bytes
            self._count(segment.name, len(zones), healed.bad, healed.repaired, level)
            lost = healed.lost
            away = set(segment.zones).difference(env.serving(segment.zones))
            if lost != () and disk is not None and not away:  # else a zone that is out may have what is missing here
                try:
                    blocks = await disk.damage.note_segment(disk, segment, healed.directory, lost)
                except StoreError as error:  # a map page is lost too; repair and scrub of the rest go on
                    log.error("the list of damaged blocks is not complete segment=%s: %s", segment.name, error)
                else:
                    log.error("no zone has all of a segment segment=%s blocks_in_use=%d", segment.name, blocks)
            elif lost == () and disk is not None and zones:
                disk.damage.whole(segment)
            return healed

    async def _heal_checkpoint(self, vdi: Vdi, number: int) -> None:
        disk, keeper = vdi.disk, vdi.keeper
        zones = self._env.serving(disk.checkpoint_zones(number))
        began = self._env.clock.monotonic()
        healed = await heal_checkpoint(self._env, disk.log, number, zones)
        if self._on_demand:
            await self._courtesy.make_way(self._env.clock.monotonic() - began)
        self._done += healed.read_bytes
        if number not in keeper.sizes:
            # It was given up meanwhile; what was put back is not in anybody's way, but nobody wants it either.
            keeper.drop_checkpoint(number)
            return
        self._count(f"checkpoint {number} of log {disk.log}", len(zones), healed.bad, healed.repaired)
        if healed.lost:
            await self._write_anew(vdi, number)

    async def _write_anew(self, vdi: Vdi, number: int) -> None:
        """No zone has a whole copy of a checkpoint: take every page that any zone still has into a new one."""
        disk, keeper = vdi.disk, vdi.keeper
        log.error("no zone has a whole checkpoint log=%d checkpoint=%d", disk.log, number)
        for region in keeper.root.in_checkpoint(number):
            if await disk.damage.note_page(disk, region):
                disk.map.write_anew(region)
        await keeper.checkpoint()

    def _count(
        self,
        name: str,
        copies: int,
        bad: dict[int, str],
        repaired: Sequence[int],
        level: int = logging.WARNING,
    ) -> None:
        self._checked += copies
        self._bad += len(bad)
        self._repaired += len(repaired)
        for z, problem in bad.items():
            if z in repaired:
                log.log(level, "a copy is bad, replaced object=%s zone=%r: %s", name, self._env.zones[z], problem)
            else:
                log.warning("a copy is bad, not replaced object=%s zone=%r: %s", name, self._env.zones[z], problem)
        self._unrepaired.pop(name, None)
        if len(bad) > len(repaired):
            self._unrepaired[name] = len(bad) - len(repaired)

    # -- repair of what reads found -----------------------------------------------------------------------------------

    async def _repair(self) -> None:
        while not self._closed:
            await self._suspected.wait()
            self._suspected.clear()
            while self._suspects and not self._closed:
                segment = next(iter(self._suspects))
                zones = self._suspects.pop(segment)
                with self._store.holding(segment.log) as vdi:
                    if vdi is None or self._env.segments.get(segment.key) is not segment:
                        continue
                    if not segment.sealed or segment.memory is not None:
                        continue
                    healed = await self._heal(segment, vdi.disk, None, logging.INFO)  # the read has complained already
                    self._read_repairs += len(healed.repaired)
                    for z in zones:
                        segment.drop_handle(z)  # it may have been opened before somebody else's repair

    # -- the note -----------------------------------------------------------------------------------------------------

    async def _advance(self, log_number: int, segment: int) -> None:
        self._note = ScrubNote(
            started=self._note.started, finished=self._note.finished, log=log_number, segment=segment
        )
        if self._env.clock.monotonic() - self._noted >= NOTE_SECONDS:
            await self._write_note()

    async def _write_note(self) -> None:
        env = self._env
        self._noted = env.clock.monotonic()
        data = encode_document(NOTE_NAME, self._note)
        for z in sorted(env.in_service):
            with contextlib.suppress(StoreError):  # a hint
                await run(env.executor, z, env.zones[z].backend.put, NOTE_NAME, data)

    async def _read_note(self) -> None:
        env = self._env
        for z in sorted(env.in_service):
            try:
                data = await run(env.executor, z, env.zones[z].backend.get, NOTE_NAME)
                found = decode_document(NOTE_NAME, data, ScrubNote, NOTE_NAME)
            except StoreError:
                continue
            self._note = max(self._note, found, key=lambda note: (note.started, note.finished, note.log, note.segment))
