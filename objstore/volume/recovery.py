"""Recovery: brings every copy of everything to where it should be, after zones failed, came back, joined or drain.

A pass looks at all VDIs, also those that nobody has open, and counts what is misplaced (log/shelves.py). Then it makes
copies: objects with the fewest ones first, over all VDIs. Readers never wait for it: what has one good copy is read
from that one, and what a reader finds bad is repaired by the scrub's own queue. Last, copies that are too many go.

Nothing needs to be remembered: where a pass was interrupted the next one finds what is left. A pass begins when the
membership or the copies of a VDI change, and after a start unless the last pass ended well under the same membership.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager
from typing import Final, Protocol

import msgspec

from objstore.errors import NotFound, StoreError
from objstore.format.catalog import VdiEntry
from objstore.format.document import decode_document, encode_document
from objstore.log.checkpoint import checkpoint_folder
from objstore.log.env import Env
from objstore.log.segment import log_folder
from objstore.log.shelves import Misplaced, Shelves
from objstore.replica.membership import Membership
from objstore.replica.pace import Courtesy, Pace
from objstore.replica.zone import run, run_long
from objstore.units import format_size
from objstore.volume.catalog import Catalog
from objstore.volume.opening import purge_log
from objstore.volume.status import RecoveryStatus
from objstore.volume.vdi import Vdi

log = logging.getLogger(__name__)

NOTE_NAME: Final = "recovery"
PARALLEL: Final = 4
"""Copies under way at once, each of which holds one segment in memory: while one is synced others are read and written.
One at a time made 0.37 of the rate of `cp -r` and a sync."""
CLIENTS_SHARE: Final = 0.1
"""Part of the time that copies are made while clients are active."""
RETRY_SECONDS: Final = 60.0
"""After a pass that could not do everything."""
SETTLE_SECONDS: Final = 2.0
"""From a change of the zones to the first look: several that fail together count as one change."""


class RecoveryNote(msgspec.Struct, frozen=True, kw_only=True):
    """A pass ended with nothing missing while these zones were members: their ids, states and weights."""

    zones: list[tuple[str, str, float]]


class RecoveredStore(Protocol):
    """What recovery needs of the store."""

    env: Env
    catalog: Catalog
    membership: Membership

    def using(self, entry: VdiEntry) -> AbstractAsyncContextManager[Vdi]: ...
    def leaving(self, vdi_id: int) -> bool: ...
    def purge_garbage(self) -> None: ...
    def open_vdis(self) -> list[Vdi]: ...
    async def renew_head(self, vdi: Vdi) -> None: ...


class Recovery:
    """The task that makes passes, and what it knows. Touched by the event loop only.

    missing: copies that should be there and are not, as the last look found them, less those made since. unreachable:
    objects of which no zone in service has a copy. held_bytes: what lies on each zone that should not stay there.
    `_sure`: zones in service ever since a whole look found that their copies are what they should be.
    """

    def __init__(self, store: RecoveredStore) -> None:
        self._store = store
        self._env = store.env
        self.pace = Pace(store.env.clock, store.env.settings.recovery_bytes_max)
        self._courtesy = Courtesy(store.env.clock, lambda: store.env.requests, CLIENTS_SHARE)
        self._wake = asyncio.Event()
        self._closed = False
        self._needed = True
        self._running = False
        self._looked = False
        self._missing = 0
        self._unreachable = 0
        self._total = 0
        self._done = 0
        self._began = 0.0
        self._copied = 0
        self._problems: list[str] = []
        self._held: Counter[int] = Counter()
        self._full: set[int] = set()
        self._sure: set[int] = set()
        self._buffers: list[memoryview] = []
        """Memory of copies, at most PARALLEL, for the time of a pass."""
        self._waiters: list[asyncio.Future[None]] = []
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin."""
        self._store.membership.on_change(self._zones_changed)
        self._task = self._env.loop.create_task(self._run())

    def stop(self) -> None:
        """Begin nothing more. A pass under way ends soon, without having looked at everything."""
        self._closed = True
        self._wake.set()
        self.pace.release()
        self._courtesy.release()

    async def close(self) -> None:
        """End after what is under way."""
        self.stop()
        if self._task is not None:
            await asyncio.wait([self._task])

    def request(self) -> None:
        """Something changed: look again. A pass under way notices too."""
        self._needed = True
        self._wake.set()

    def _zones_changed(self) -> None:
        self._sure &= self._store.membership.in_service
        self.request()

    def holds(self, zone: int) -> bool:
        """Whether something lies on that zone that should not stay there, as far as the last look tells."""
        return self._needed or self._running or not self._looked or bool(self._held[zone])

    async def settled(self) -> None:
        """Return when nothing is to be done any more, or can't be."""
        while (self._needed or self._running) and not self._closed:
            waiter: asyncio.Future[None] = self._env.loop.create_future()
            self._waiters.append(waiter)
            await waiter

    def status(self) -> RecoveryStatus:
        """The pass under way, or what the last one left."""
        seconds_left = None
        left = self._total - self._done
        if self._running and left > 0 and self._done:
            seconds_left = left * (self._env.clock.monotonic() - self._began) / self._done
        return RecoveryStatus(
            running=self._running or self._needed,
            copies_missing=self._missing,
            objects_unreachable=self._unreachable,
            bytes_done=self._done,
            bytes_total=self._total,
            seconds_left=seconds_left,
            bytes_per_second_max=self.pace.rate,
            copies_made=self._copied,
            problems=list(self._problems),
        )

    # -- passes -----------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        if await self._all_was_well():
            self._sure = set(self._env.in_service)
            self._needed = False
            self._looked = True
            self._tell()
        while not self._closed:
            if not self._needed:
                self._tell()
                self._wake.clear()
                await self._wake.wait()
                continue
            await self._write_note(None)
            await self._pause(SETTLE_SECONDS)
            if self._closed:
                break
            self._needed = False
            self._running = True
            try:
                await self._pass()
            except StoreError as error:
                self._problems.append(str(error))
                log.warning("recovery stopped for now: %s", error)
            finally:
                self._running = False
                self._buffers.clear()
            if self._problems and not self._needed and not self._closed:
                self._tell()
                await self._pause(RETRY_SECONDS)
                self._needed = not self._closed
        self._tell()

    def _tell(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    async def _pause(self, seconds: float) -> None:
        self._wake.clear()
        if self._closed:
            return
        timer = self._env.loop.call_later(seconds, self._wake.set)
        await self._wake.wait()
        timer.cancel()

    def _interrupted(self) -> bool:
        return self._closed or self._needed

    async def _pass(self) -> None:
        self._problems.clear()
        self._total = self._done = 0
        self._began = self._env.clock.monotonic()
        copied = self._copied
        await self._purge_strangers()
        levels = await self._look()
        if self._interrupted():
            return
        self._looked = True
        await self._check_space(levels)
        for have in sorted(levels):
            for number in sorted(levels[have]):
                if self._interrupted():
                    return
                await self._each(number, have)
        if self._held or self._missing:
            await self._shed()
            await self._count(copied)
        if not self._interrupted() and not self._missing and not self._unreachable and not self._problems:
            await self._renew_heads()
            await self._write_note(self._members())

    async def _renew_heads(self) -> None:
        """Every copy is made: zones that are gone, and a time of fewer copies, are not missed any more."""
        for vdi in self._store.open_vdis():
            entry = self._store.catalog.state.vdis.get(vdi.vdi_id)
            if entry is None or self._interrupted():
                continue
            async with self._opened(entry) as same:
                if same is vdi:
                    await self._store.renew_head(vdi)

    def _entries(self) -> list[VdiEntry]:
        return sorted(self._store.catalog.state.vdis.values(), key=lambda entry: entry.log)

    async def _look(self) -> dict[int, dict[int, list[Misplaced]]]:
        """What is missing: copies that an object has -> log -> such objects. Only numbers and sizes: a VDI that nobody
        uses is closed again behind the look."""
        levels: dict[int, dict[int, list[Misplaced]]] = {}
        self._missing = self._unreachable = 0
        self._held.clear()
        unsure = self._env.in_service - self._sure
        for entry in self._entries():
            if self._interrupted():
                break
            async with self._opened(entry) as vdi:
                if vdi is None:
                    continue
                shelves = self._shelves(vdi)
                try:
                    found = await shelves.look(unsure)
                except StoreError as error:
                    self._problems.append(f"VDI {entry.name}: {error}")
                    continue
                for z, reason in shelves.unseen.items():
                    self._problems.append(f"VDI {entry.name}: {self._env.zones[z]!r} can't be looked at: {reason}")
                for item in found:
                    self._held.update(item.extra)
                    if not item.have:
                        self._unreachable += 1
                    elif item.missing:
                        levels.setdefault(len(item.have), {}).setdefault(entry.log, []).append(item)
                        self._missing += len(item.missing)
                        self._total += item.size_bytes * len(item.missing)
        if not self._interrupted() and not self._problems:
            self._sure |= unsure
        return levels

    @contextlib.asynccontextmanager
    async def _opened(self, entry: VdiEntry) -> AsyncIterator[Vdi | None]:
        """The VDI, open; None if it can't be, which is noted, or is being deleted."""
        if self._store.leaving(entry.vdi_id):
            yield None
            return
        async with contextlib.AsyncExitStack() as stack:
            vdi: Vdi | None = None
            try:
                vdi = await stack.enter_async_context(self._store.using(entry))
            except NotFound:
                pass
            except StoreError as error:
                self._problems.append(f"VDI {entry.name}: {error}")
            yield vdi

    def _shelves(self, vdi: Vdi) -> Shelves:
        return Shelves(vdi.disk, vdi.keeper, vdi.disk.writer.place, self._buffers)

    async def _check_space(self, levels: dict[int, dict[int, list[Misplaced]]]) -> None:
        """Leave out zones that can't take what they should: they would end full, and clients' writes fail."""
        env = self._env
        wanted: Counter[int] = Counter()
        for logs in levels.values():
            for items in logs.values():
                for item in items:
                    for z in item.missing:
                        wanted[z] += item.size_bytes
        self._full.clear()
        for z in sorted(wanted):
            try:
                free = await run(env.executor, z, env.zones[z].backend.free_bytes)
            except StoreError as error:
                self._problems.append(f"{env.zones[z]!r}: {error}")
                self._full.add(z)
                continue
            if free - env.reserve_bytes < wanted[z]:
                self._full.add(z)
                self._problems.append(
                    f"{env.zones[z]!r} has {format_size(free)} free, too little for the {format_size(wanted[z])} that "
                    "should go there"
                )

    async def _each(self, log_number: int, have: int) -> None:
        """Restore the objects of one log that have so many copies."""
        entry = next((e for e in self._entries() if e.log == log_number), None)
        if entry is None:
            return
        async with self._opened(entry) as vdi:
            if vdi is None:
                return
            shelves = self._shelves(vdi)
            items = [item for item in shelves.misplaced() if item.missing and len(item.have) == have]
            running: set[asyncio.Task[None]] = set()
            copied = self._copied
            for item in items:
                if self._interrupted() or self._store.leaving(entry.vdi_id):
                    break
                targets = tuple(z for z in item.missing if z not in self._full)
                if not targets:
                    continue
                await self.pace.take(item.size_bytes * len(targets))
                began = self._env.clock.monotonic()
                running.add(self._env.loop.create_task(self._restore(shelves, item._replace(missing=targets))))
                while len(running) >= (1 if self._courtesy.crowded() else PARALLEL):
                    _, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                await self._courtesy.make_way(self._env.clock.monotonic() - began)
            if running:
                await asyncio.wait(running)
            if self._copied > copied and not self._closed:
                await vdi.keeper.checkpoint()  # from here on the new copies are listed

    async def _restore(self, shelves: Shelves, item: Misplaced) -> None:
        try:
            done = await shelves.restore(item)
        except StoreError as error:
            self._problems.append(str(error))
            return
        self._missing -= len(done)
        self._copied += len(done)
        self._done += item.size_bytes * len(item.missing)

    async def _shed(self) -> None:
        """Remove copies that are too many."""
        for entry in self._entries():
            if self._interrupted() or not self._held:
                return
            async with self._opened(entry) as vdi:
                if vdi is None:
                    continue
                shelves = self._shelves(vdi)
                await shelves.shed(shelves.misplaced())

    async def _count(self, copied: int) -> None:
        """What is still missing or too many: objects came and went while others were copied. copied: when the pass
        began."""
        missing = 0
        held: Counter[int] = Counter()
        for entry in self._entries():
            if self._interrupted():
                return
            async with self._opened(entry) as vdi:
                if vdi is None:
                    continue
                for item in self._shelves(vdi).misplaced():
                    held.update(item.extra)
                    missing += len(item.missing) if item.have else 0
        self._missing, self._held = missing, held
        if missing and not self._problems:
            if self._copied == copied:
                self._problems.append(f"{missing} copies could not be made: the zones would not take them")
            else:
                self._needed = True

    async def _purge_strangers(self) -> None:
        """Remove what zones keep of VDIs that were deleted while they were away."""
        env, state = self._env, self._store.catalog.state
        for z in sorted(env.in_service):
            for root in ("log/", "checkpoint/"):
                try:
                    entries = await run_long(env.executor, z, env.zones[z].backend.list, root)
                except StoreError as error:
                    log.warning("a zone can't be looked at zone=%r: %s", env.zones[z], error)
                    break
                known = {0, *(vdi.log for vdi in state.vdis.values())}
                for number in sorted(_logs_of(entry.name for entry in entries) - known):
                    if number < state.next_log:
                        folders = [log_folder(number), checkpoint_folder(number)]
                        await run_long(env.executor, z, purge_log, env.zones[z].backend, folders)
        self._store.purge_garbage()

    # -- the note -----------------------------------------------------------------------------------------------------

    def _members(self) -> list[tuple[str, str, float]]:
        return [(member.id, member.state, member.weight) for member in self._store.membership.epoch.members]

    async def _all_was_well(self) -> bool:
        """Whether every member has the note of a pass that ended well, under this very membership."""
        env = self._env
        members = self._members()
        history = self._store.membership.history
        if not history.steady():
            return False  # the note may be older than the change, if the process died soon after that
        for z in sorted(env.in_service):
            if history.forgot(env.zones[z].zone_id.hex()):
                return False  # its note came from the same backup
            try:
                data = await run(env.executor, z, env.zones[z].backend.get, NOTE_NAME)
                note = decode_document(NOTE_NAME, data, RecoveryNote, NOTE_NAME)
            except StoreError:
                return False
            if note.zones != members:
                return False
        return bool(env.in_service) and not self._store.membership.epoch.out

    async def _write_note(self, members: list[tuple[str, str, float]] | None) -> None:
        """None: from now on nothing is known to be well."""
        env = self._env
        data = encode_document(NOTE_NAME, RecoveryNote(zones=members or []))
        for z in sorted(env.in_service):
            with contextlib.suppress(StoreError):  # without it the next start looks
                await run(env.executor, z, env.zones[z].backend.put, NOTE_NAME, data)


def _logs_of(names: Iterable[str]) -> set[int]:
    """Numbers of the logs that object names belong to."""
    found = set()
    for name in names:
        part = name.split("/")[1]
        with contextlib.suppress(ValueError):
            found.add(int(part, 16))
    return found
