"""Zones come, go and come back, while the store is open: what an administrator asks for, and the return of failed ones.

Each change is one new epoch; recovery (recovery.py) then moves what has to move. A zone that was out is opened anew and
looked at like a stranger's before it takes part again; what it holds counts only as far as it is what the tables say.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Final, Protocol, TypeVar

from objstore.backend.absent import AbsentBackend
from objstore.backend.base import Backend, ZoneFailed
from objstore.errors import Busy, Exists, InvalidRequest, NotFound, StoreError, Unavailable
from objstore.format.document import Epoch, Known, Member, Outside, Superblock, encode_document
from objstore.log.checkpoint import checkpoint_folder
from objstore.log.env import Env
from objstore.log.segment import log_folder
from objstore.replica.members import (
    FEATURES,
    SUPERBLOCK,
    ZONES_MAX,
    ZonePlace,
    give_epochs,
    note_members,
    read_epochs,
    read_superblock,
)
from objstore.replica.membership import Membership, Plan
from objstore.replica.zone import Zone, run, run_long
from objstore.volume.catalog import CATALOG_LOG, Catalog
from objstore.volume.recovery import Recovery

log = logging.getLogger(__name__)

RETRY_SECONDS: Final = 10.0
RETRY_SECONDS_MAX: Final = 600.0
"""A zone that is out is tried again after 10 s, then after twice as long each time: one that fails again and again
would otherwise stop everybody for a moment every 10 s."""
WEIGHT_MAX: Final = 1e9

T = TypeVar("T")
Reopen = Callable[[str], Backend]


class ZonedStore(Protocol):
    """What changes of zones need of the store."""

    env: Env
    catalog: Catalog
    membership: Membership
    recovery: Recovery


class Zones:
    """Changes of a store's zones; one at a time. Touched by the event loop only."""

    def __init__(self, store: ZonedStore, places: list[ZonePlace], lock_note: str, reopen: Reopen | None) -> None:
        """reopen: makes the backend of a path; None: zones can't be added, and none comes back."""
        self._store = store
        self._env = store.env
        self._places = places
        self._lock_note = lock_note
        self._reopen = reopen
        self._turn = asyncio.Lock()
        self._closed = False
        self._wake = asyncio.Event()
        self._waits: dict[int, float] = {}
        self._tried: dict[int, float] = {}
        self._leaving: set[int] = set()
        self._opened: dict[str, Backend] = {}
        """By path: opened in a zone's thread, and not yet taken over. A zone that answers late leaves it here."""
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """From now on zones that are out are tried again and again."""
        if self._reopen is not None:
            self._task = self._env.loop.create_task(self._run())

    async def close(self) -> None:
        """End after what is under way."""
        self._closed = True
        self._wake.set()
        if self._task is not None:
            await asyncio.wait([self._task])

    def find(self, which: str) -> Member | Outside:
        """The zone of that path, number or beginning of an id (4 digits or more). NotFound; InvalidRequest: several."""
        epoch = self._store.membership.epoch
        known: list[Member | Outside] = [*epoch.members, *epoch.out]
        found = [z for z in known if which in (z.path, str(z.number)) or (len(which) >= 4 and z.id.startswith(which))]
        if not found:
            raise NotFound(f"there is no zone {which!r}; there are {', '.join(z.path for z in known)}")
        if len(found) > 1:
            raise InvalidRequest(f"{which!r} means several zones: {', '.join(z.path for z in found)}")
        return found[0]

    # -- what is asked for ------------------------------------------------------------------------------------------

    async def add(self, path: str, weight: float | None = None) -> int:
        """Make the empty directory a zone, or take one back that was out; its number. InvalidRequest, Exists, Busy."""
        async with self._turn:
            epoch = self._store.membership.epoch
            if any(member.path == path for member in epoch.members):
                raise Exists(f"{path} is a zone already")
            out = next((zone for zone in epoch.out if zone.path == path), None)
            if out is not None:
                await self._take_back(out)
                return out.number
            return await self._add(path, 1.0 if weight is None else _checked(weight), weight is None)

    async def drain(self, which: str) -> None:
        """Move everything off a zone: it gets nothing new, and recovery copies what it has elsewhere."""
        async with self._turn:
            await self._drain(self.find(which))

    async def remove(self, which: str, *, force: bool = False) -> None:
        """Forget a zone on which nothing is left, or one that is out and that nobody needs any more. force: even if
        what only that zone has is lost by it."""
        async with self._turn:
            await self._remove(self.find(which), force=force)

    async def replace(self, which: str, path: str) -> int:
        """Add a zone of the same weight and let the other one go: at once if it is out, else as soon as it is empty.
        The number of the new one."""
        async with self._turn:
            old = self.find(which)
            if any(member.path == path for member in self._store.membership.epoch.members):
                raise Exists(f"{path} is a zone already")
            number = await self._add(path, old.weight, False)
            if isinstance(old, Member):
                await self._drain(old)
            self._leaving.add(old.number)
            self._wake.set()
            return number

    async def set_weight(self, which: str, weight: float) -> None:
        """Change a zone's share of the data."""
        async with self._turn:
            zone, weight = self.find(which), _checked(weight)

            def edit(plan: Plan) -> Plan:
                members, out = dict(plan.members), dict(plan.out)
                if zone.number in members:
                    members[zone.number] = _with(members[zone.number], weight=weight)
                elif zone.number in out:
                    former = out[zone.number]
                    out[zone.number] = Outside(
                        number=former.number,
                        id=former.id,
                        path=former.path,
                        weight=weight,
                        state=former.state,
                        since=former.since,
                        reason=former.reason,
                    )
                return Plan(members, out, plan.catalog)

            await self._store.membership.change(edit)

    # -- how --------------------------------------------------------------------------------------------------------

    async def _add(self, path: str, weight: float, by_capacity: bool) -> int:
        if self._reopen is None:
            raise InvalidRequest("this store's zones are given by its program")
        env, membership = self._env, self._store.membership
        number = len(env.zones)
        if number >= ZONES_MAX:
            raise InvalidRequest(f"the store has had {number} zones; {ZONES_MAX} are possible")
        zone_id = env.rng.randbytes(16).hex()
        block = Superblock(
            store=env.store_id.hex(),
            zone=zone_id,
            number=number,
            members=[*self._known(), Known(number, zone_id, path)],
            created=env.clock.wall(),
            features_read=sorted(FEATURES),
        )
        try:
            backend, capacity = await self._answer(number, path, self._made_zone, path, block, self._ids())
        except StoreError as error:
            if env.executor.outstanding(number):  # it may still answer: its number is used up
                env.zones.append(Zone(number, bytes.fromhex(zone_id), AbsentBackend(path, str(error)), path))
                self._leave(number, error)
            raise
        env.zones.append(Zone(number, bytes.fromhex(zone_id), backend, path))
        new = Member(number=number, id=zone_id, path=path, weight=capacity if by_capacity else weight)

        def edit(plan: Plan) -> Plan:
            return Plan({**plan.members, number: new}, plan.out, plan.catalog)

        try:
            await membership.change(edit)
        except StoreError as error:
            self._leave(number, error)
            raise
        self._places.append(ZonePlace(backend, path, block))
        self._check_came(number)
        await self._complete(number)
        return number

    def _made_zone(self, path: str, block: Superblock, known: set[str]) -> tuple[Backend, float]:
        """In the zone's thread: make a zone of a directory; its capacity in GiB. known: ids of the store's zones."""
        assert self._reopen is not None
        self._close_late(path)
        try:
            backend = self._reopen(path)
        except NotFound as error:
            raise NotFound(f"there is no directory {path}: make an empty one there first") from error
        try:
            former = read_superblock(backend, path)
            if former is not None and (former.store != block.store or former.zone in known):
                raise InvalidRequest(f"{path} belongs to store {former.store[:8]}: give an empty directory")
            backend.lock(self._lock_note)
            backend.put(SUPERBLOCK, encode_document("superblock", block))
            capacity = max(1.0, float((backend.used_bytes() + backend.free_bytes()) >> 30))
        except StoreError:
            backend.close()
            raise
        self._opened[path] = backend
        return backend, capacity

    async def _answer(self, number: int, path: str, function: Callable[..., T], *args: object) -> T:
        """The result of a call that opens a zone. Nobody watches over that zone yet, and all other changes of zones
        wait for this one: Unavailable after zone_deadline_seconds, the call may then still be under way."""
        env = self._env
        try:
            async with asyncio.timeout(env.settings.zone_deadline_seconds):
                result = await run(env.executor, number, function, *args)
        except TimeoutError as error:
            raise Unavailable(f"{path} did not answer in {env.settings.zone_deadline_seconds:g} s") from error
        self._opened.pop(path, None)
        return result

    def _close_late(self, path: str) -> None:
        """In a zone's thread: close what an earlier call has opened when nobody waited for it any more."""
        late = self._opened.pop(path, None)
        if late is not None:
            late.close()

    def _check_came(self, number: int) -> None:
        """ZoneFailed: a zone that was to come in failed on the way."""
        membership = self._store.membership
        if number not in membership.in_service:
            out = membership.epoch.out
            reason = next((zone.reason for zone in out if zone.number == number), "it is put out again")
            error = ZoneFailed(f"{self._env.zones[number]!r} failed while it was taken into service: {reason}")
            self._leave(number, error)
            raise error

    def _leave(self, number: int, error: StoreError) -> None:
        """A zone did not come into service: nobody needs it or what it has open."""
        env = self._env
        env.zones[number].error = error
        env.executor.abandon(number, env.lost(number), [env.zones[number].backend])

    async def _complete(self, number: int) -> None:
        """A zone has just come: it gets the catalog and the epochs that were without it, and every superblock knows
        it."""
        await self._store.catalog.compact()
        env, membership = self._env, self._store.membership
        zone = env.zones[number]
        try:
            lacking = membership.history.lacking(zone.zone_id.hex())
            await run(env.executor, number, give_epochs, zone.backend, lacking)
        except StoreError as error:
            log.warning("%r gets the old epoch records at the next start: %s", zone, error)
        await self._note_members()

    async def _note_members(self) -> None:
        """Every superblock gets to know which zones there are, as far as it can be written now."""
        known = self._known()
        for place in list(self._places):
            if place.superblock is not None and place.superblock.number in self._store.membership.in_service:
                with contextlib.suppress(StoreError):  # it has just been put out
                    await run(self._env.executor, place.superblock.number, note_members, [place], known)

    def _ids(self) -> set[str]:
        return {zone.id for zone in self._known()}

    def _known(self) -> list[Known]:
        epoch = self._store.membership.epoch
        zones: list[Member | Outside] = [*epoch.members, *epoch.out]
        return [Known(zone.number, zone.id, zone.path) for zone in sorted(zones, key=lambda zone: zone.number)]

    async def _drain(self, zone: Member | Outside) -> None:
        if not isinstance(zone, Member):
            raise InvalidRequest(f"{zone.path} is out; remove or replace it")
        left = [m for m in self._store.membership.placeable() if m.number != zone.number]
        self._check_enough(len(left), f"without {zone.path}")

        def edit(plan: Plan) -> Plan:
            members = dict(plan.members)
            if zone.number in members:
                members[zone.number] = _with(members[zone.number], state="draining")
            return Plan(members, plan.out, plan.catalog)

        await self._store.membership.change(edit)

    def _check_enough(self, zones: int, when: str) -> None:
        for vdi in self._store.catalog.state.vdis.values():
            if vdi.copies > zones:
                raise InvalidRequest(
                    f"VDI {vdi.name} has {vdi.copies} copies, and {when} there are {zones} zones for them: add a zone, "
                    "or give it fewer copies"
                )
        if not zones:
            raise InvalidRequest(f"{when} there is no zone left")

    async def _remove(self, zone: Member | Outside, *, force: bool) -> None:
        recovery = self._store.recovery
        if isinstance(zone, Member):
            if zone.state != "draining":
                raise InvalidRequest(f"{zone.path} is in use: drain it first")
            empty = not recovery.holds(zone.number) and await self._is_empty(zone.number)
            if not empty:
                if not recovery.status().running:
                    recovery.request()  # a power cut may have brought back what was removed
                raise Busy(f"{zone.path} is not empty yet: sheepfold recovery tells how far it is")
        elif not force:
            status = recovery.status()
            if status.running or status.copies_missing or status.objects_unreachable or status.problems:
                raise Busy(
                    f"{zone.path} may have what no other zone has: wait for the recovery, or --force gives that up"
                )

        def edit(plan: Plan) -> Plan:
            members, out = dict(plan.members), dict(plan.out)
            members.pop(zone.number, None)
            out.pop(zone.number, None)
            return Plan(members, out, plan.catalog)

        await self._store.membership.change(edit)
        self._leaving.discard(zone.number)
        self._leave(zone.number, ZoneFailed("it was removed"))
        self._places[:] = [p for p in self._places if p.superblock is None or p.superblock.number != zone.number]
        await self._note_members()

    async def _is_empty(self, number: int) -> bool:
        """Whether a zone holds nothing but the catalog."""
        env = self._env
        for root in ("log/", "checkpoint/"):
            entries = await run_long(env.executor, number, env.zones[number].backend.list, root)
            kept = (log_folder(CATALOG_LOG), checkpoint_folder(CATALOG_LOG))
            if any(not entry.name.startswith(kept) for entry in entries):
                return False
        return True

    # -- coming back --------------------------------------------------------------------------------------------------

    async def _take_back(self, zone: Outside) -> None:
        """Open a zone that is out anew and let it take part. Busy: calls from before have not returned. StoreError: it
        is not there, another one, or does not work."""
        env, number = self._env, zone.number
        old = env.zones[number].backend
        env.executor.readmit(number)
        try:
            place, records = await self._answer(number, zone.path, self._opened_anew, old, zone)
        except StoreError:
            env.executor.abandon(number, env.lost(number))
            raise
        env.zones[number].backend = place.backend
        # VDIs that were refused without this zone may be opened now.
        self._store.membership.history.learn(zone.id, [epoch.id for epoch in records])
        self._places[:] = [p for p in self._places if p.superblock is None or p.superblock.number != number]
        self._places.append(place)
        try:
            await self._store.membership.admit(number)
        except StoreError as error:
            self._leave(number, error)
            raise
        self._check_came(number)
        log.warning("%r is back", env.zones[number])
        await self._complete(number)

    def _opened_anew(self, old: Backend, zone: Outside) -> tuple[ZonePlace, list[Epoch]]:
        """In the zone's thread: the zone, and the epoch records that it has."""
        assert self._reopen is not None
        old.close()
        self._close_late(zone.path)
        backend = self._reopen(zone.path)
        try:
            block = read_superblock(backend, zone.path)
            if block is None or block.zone != zone.id or block.store != self._env.store_id.hex():
                raise InvalidRequest(f"{zone.path} is not the zone {zone.id[:8]} that was there")
            backend.lock(self._lock_note)
            backend.check()
            place = ZonePlace(backend, zone.path, block)
            records = read_epochs(place)[0]
        except StoreError:
            backend.close()
            raise
        self._opened[zone.path] = backend
        return place, records

    async def _run(self) -> None:
        while not self._closed:
            self._wake.clear()
            timer = self._env.loop.call_later(RETRY_SECONDS, self._wake.set)
            await self._wake.wait()
            timer.cancel()
            if self._closed:
                return
            async with self._turn:
                await self._look_after()

    async def _look_after(self) -> None:
        """Try the zones that are out, and let go those that are to leave."""
        now = self._env.clock.monotonic()
        epoch = self._store.membership.epoch
        for zone in epoch.out:
            if zone.number in self._leaving or now < self._tried.get(zone.number, 0.0):
                continue
            wait = self._waits[zone.number] = min(RETRY_SECONDS_MAX, self._waits.get(zone.number, RETRY_SECONDS) * 2)
            self._tried[zone.number] = now + wait
            try:
                await self._take_back(zone)
            except StoreError as error:
                log.info("%s stays out: %s", zone.path, error)
        for number in sorted(self._leaving):
            known: list[Member | Outside] = [*epoch.members, *epoch.out]
            leaver = next((zone for zone in known if zone.number == number), None)
            if leaver is None:
                self._leaving.discard(number)
                continue
            try:
                await self._remove(leaver, force=False)
            except Busy:
                continue
            except StoreError as error:
                log.warning("%s could not be removed yet: %s", leaver.path, error)


def _with(member: Member, *, weight: float | None = None, state: str | None = None) -> Member:
    return Member(
        number=member.number,
        id=member.id,
        path=member.path,
        weight=member.weight if weight is None else weight,
        state=member.state if state is None else state,
    )


def _checked(weight: float) -> float:
    if not 0 < weight <= WEIGHT_MAX:
        raise InvalidRequest(f"a weight of {weight:g} is not possible: more than 0, at most {WEIGHT_MAX:g}")
    return weight
