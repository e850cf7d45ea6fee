"""A seed in which zones are added, drained, removed, replaced and weighed, fail and come back, while all else goes on.

To what every seed must hold (scenario.py) these add: a change of zones that was cut off anywhere is wholly there or not
at all, and can be asked for again; a store opens exactly when its epochs allow it; once recovery has ended every object
has its copies where it should, and zones hold nothing else; and at the end, with any of its zones missing, the store
opens or refuses as its rules say (subsets.py).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import objstore.volume.recovery
import objstore.volume.zones
from objstore.backend.base import Backend
from objstore.backend.directory import DirectoryBackend
from objstore.check.check import check_store
from objstore.check.report import Severity
from objstore.errors import Corrupt, NotFound, StoreError, Unavailable
from objstore.format.document import Epoch
from objstore.log.checkpoint import checkpoint_name
from objstore.log.segment import segment_name
from objstore.replica.membership import Membership
from objstore.volume.recovery import Recovery
from objstore.volume.store import Store, open_zones
from objstore.volume.vdi import Vdi
from tests.sim.knobs import Knobs
from tests.sim.model import DiskModel, Violation
from tests.sim.scenario import CALLS_EXPECTED, Outcome, Scenario
from tests.sim.snapshots import Snapshots
from tests.sim.subsets import Subsets
from tests.sim.troubles import Troubles
from tests.sim.world import PHASES, ZONE_PHASES, World
from tests.sim.zone_life import ZoneLife
from tests.support.check_zones import files_zone
from tests.support.sim_loop import SimClock, SimLoop, SimStopped

CALLS_EXPECTED.update(zones=80, copying=120)
REST_SECONDS: Final = 600.0
"""So long the last life waits for zones to come back and copies to be made."""
NOT_YET: Final = ("few-copies", "zone-out", "missing-copy")
"""What the check finds while recovery has something to do."""


def path_of(z: int) -> str:
    """The directory on that file system."""
    return f"/zone{z}"


def zone_of(path: str) -> int:
    """The file system of that directory."""
    return int(path.removeprefix("/zone"))


class NoSnapshots(Snapshots):
    """Nobody takes any: what may be refused while zones are away is told for disks alone."""

    async def serve(self, store: Store) -> None:
        """See above."""


class NoClones(Snapshots):
    """Nobody clones, nobody rolls back: what a VDI needs is in its own log. What opens without some zones, and with how
    many copies, is told for such VDIs alone."""

    async def clone(self, store: Store, source: str) -> None:
        """See above."""

    async def roll_back(self, store: Store) -> None:
        """See above."""


class ZoneScenario(Scenario):
    """See above. `epoch`: the newest that came into force; `writing`: another one was on its way when the process died.

    life: what an administrator does with zones, None = nothing. trouble: what becomes of zones.
    """

    phases = (*PHASES, *ZONE_PHASES, *ZONE_PHASES)
    pauses = (1e-4, 1e-3, 2e-2, 0.1)

    def __init__(self, world: World, knobs: Knobs, seed: int) -> None:
        super().__init__(world, knobs, seed)
        rng = random.Random(seed * 11 + 5)
        # Copies move: one that was just chosen for a read may be gone when it comes, which is noted and does no harm.
        world.zone_rots = True
        self.epoch: Epoch | None = None
        self.history: list[Epoch] = []
        self.begun: dict[str, tuple[int, Epoch]] = {}
        """By id: epochs of which it is not known whether they came into force, and how long `history` was then."""
        self.changing = 0
        self._unsure = False
        self.life = ZoneLife(self, random.Random(seed * 11 + 6)) if rng.random() < knobs.zone_changes else None
        self.troubles = self.trouble = Troubles(self, seed, knobs, several=self.life is None)
        self.snapshots = NoClones(self, seed) if self.troubles.quiet else NoSnapshots(self, seed)
        self.subsets = Subsets(self, random.Random(seed * 11 + 7))
        self.copies_min = min(self.troubles.copies_min, self.copies_max)
        for model in self.models.values():
            model.copies = max(model.copies, self.copies_min)
        for name, value in {
            "write_wait_seconds": rng.choice((2.0, 30.0)),
            "recovery_bytes_max": rng.choice((0, 0, 0, 2 << 20)),
        }.items():
            object.__setattr__(self.settings, name, value)
        self.checks_all, self.checks_end = rng.random() < 0.1, rng.random() < 0.5

    def run(self) -> Outcome:
        """See Scenario.run; then every subset of the zones."""
        with watched(self):
            return super().run()

    # -- lives --------------------------------------------------------------------------------------------------

    def _life(self, *, last: bool, end: str | None = None) -> None:
        if last and end == "stop" and not self.subsets.done:
            self.subsets.look()
        self._unsure, self.changing = self.writing, 0
        super()._life(last=last, end=end)
        assert self.world.executor is not None
        if self.world.executor.late:
            raise Violation(f"calls from before reached zones {self.world.executor.late} that had come back")

    @property
    def writing(self) -> bool:
        """Whether a newer epoch than `epoch` was on its way, and may or may not have come into force."""
        return self._unsure or self.changing > 0

    @writing.setter
    def writing(self, writing: bool) -> None:
        self._unsure, self.changing = writing, 0

    def backend(self, path: str) -> Backend:
        """The zone at that path. NotFound: it is not there."""
        z = int(path.removeprefix("/zone"))
        if z in self.troubles.absent_zones:
            raise NotFound(f"there is no directory {path}")
        return DirectoryBackend(path, fs=self.world.zones[z], recycle_files_max=self.recycle)

    def given(self) -> list[int]:
        """The file systems that whoever starts the store names: those that were ever zones of it."""
        world = self.world
        made = any(name.startswith("epoch/") for z in range(len(world.zones)) for name in world.files(z))
        if not made:
            return list(range(world.zones_first))
        known = {m.path for m in (*self.epoch.members, *self.epoch.out)} if self.epoch is not None else set()
        return [z for z in range(len(world.zones)) if "superblock" in world.files(z) or path_of(z) in known]

    async def open_with(self, loop: SimLoop, absent: set[int]) -> Store:
        """Try to open the store without these zones."""
        given = self.given()
        missing = {path_of(z): "there is no such directory" for z in given if z in absent}
        backends: list[tuple[Backend, str]] = []
        for z in given:
            if z not in absent:
                fs = self.world.zones[z]
                backends.append((DirectoryBackend(path_of(z), fs=fs, recycle_files_max=self.recycle), path_of(z)))
        if not backends:
            raise Unavailable("no zone is there")
        try:
            return await open_zones(
                backends,
                settings=self.settings,
                create=True,
                clock=SimClock(loop),
                executor=self.world.executor,
                rng=self.rng,
                missing=missing,
                reopen=self.backend,
            )
        except StoreError:
            for backend, _ in backends:
                backend.close()
            self.world.new_executor(self.world.slow_seconds)
            raise

    def may_open(self, absent: set[int]) -> bool | None:
        """Whether the store has to open without these zones, by the rules for the newest epoch that was in force: more
        than n - w of its members are here and know it. None: the process died while another one was written."""
        epoch = self.epoch
        if epoch is None or self.writing or self.troubles.lied:
            return None  # a disk that lied may hold half a record, which another zone may complete
        witnesses = [m for m in epoch.members if self._knows(int(m.path.removeprefix("/zone")), epoch, absent)]
        return len(witnesses) > len(epoch.members) - epoch.w

    def _knows(self, z: int, epoch: Epoch, absent: set[int]) -> bool:
        name = f"epoch/{epoch.number:08x}"
        if z in absent or name not in self.world.files(z):
            return False
        return epoch.id.encode() in self.world.zones[z].content(f"{path_of(z)}/{name}")

    async def _open_store(self, loop: SimLoop) -> Store:
        while True:
            absent = set(self.troubles.absent_zones)
            expected = self.may_open(absent)
            try:
                store = await self.open_with(loop, absent)
            except StoreError as error:
                self.world.note(f"the store can't be opened: {error}")
                self.judge_refusal(error, expected, absent)
                self.troubles.opening_refused(error)
                continue
            if expected is False:
                raise Violation(f"the store opens without {sorted(absent)}, which epoch {self.epoch} does not allow")
            self.troubles.opened(store)
            if self.life is not None:
                self.life.opened(store)
            return store

    def judge_refusal(self, error: StoreError, expected: bool | None, absent: set[int]) -> None:
        """Opening was refused: it must not have been possible, and names who is missing."""
        if expected:
            raise Violation(f"the store has to open without {sorted(absent)} and does not: {error}") from error
        if not isinstance(error, Unavailable):
            raise error
        known = {m.path for m in (*self.epoch.members, *self.epoch.out)} if self.epoch is not None else set()
        missing = [path_of(z) for z in absent if path_of(z) in known]
        if missing and not any(path in str(error) for path in missing):
            raise Violation(f"the refusal names none of {missing}: {error}")

    def silent(self, copies: int) -> bool:
        """Whether so many zones are in trouble that a VDI of so many copies may be out of reach for now."""
        return len(self.troubles.unsure) >= copies

    def has_to_open(self, model: DiskModel, absent: set[int]) -> bool:
        """Whether the end of the VDI's log shows without these zones: of each epoch since it was opened fewer than
        `copies` of the zones that took data are silent. One that was removed since is not missed. An epoch whose record
        some zone here has may have been in force, whether or not the process knew when it died."""
        newest = self.history[-1]
        known = {zone.id for zone in (*newest.members, *newest.out)}
        maybe = [
            epoch
            for at, epoch in self.begun.values()
            if at >= model.opened_in and any(self._knows(zone_of(m.path), epoch, absent) for m in epoch.members)
        ]
        for epoch in (*self.history[model.opened_in :], *maybe):
            placing = [m for m in epoch.members if m.state == "in"]
            kept = [m for m in placing if m.id in known]
            silent = [m for m in kept if not self._knows(zone_of(m.path), epoch, absent)]
            if silent and len(silent) >= min(len(placing), model.copies_least):
                return False
        return True

    async def open_disk(self, store: Store, model: DiskModel) -> None:
        for _ in range(600):
            out = {int(zone.path.removeprefix("/zone")) for zone in store.epoch.out}
            now = len(self.history) - 1
            try:
                await super().open_disk(store, model)
                model.opened_in = now
                return
            except Unavailable as error:
                if self.has_to_open(model, out | self.troubles.forgetful) and not self.silent(model.copies_least):
                    raise Violation(f"{model.name} has to open without {self.troubles.unsure}: {error}") from error
                self.world.note(f"{model.name} can't be opened: {error}")
                self.troubles.met("vdi-refused")
            self.troubles.bring_back()  # and the store tries the zones that are out again and again
            await asyncio.sleep(0.5)
        raise Violation(f"{model.name} can't be opened though every zone is back")

    async def _create(self, store: Store, model: DiskModel) -> None:
        zones = sum(zone.state == "in" for zone in (*store.epoch.members, *store.epoch.out))
        model.copies = model.copies_least = min(model.copies, zones)
        await super()._create(store, model)

    async def _show(self, model: DiskModel) -> None:
        for _ in range(600):
            try:
                await super()._show(model)
                return
            except (Unavailable, Corrupt) as error:
                if not self.silent(model.copies_least):
                    raise Violation(f"{model.name} is unreadable without {self.troubles.unsure}: {error}") from error
                self.world.note(f"{model.name} can't be read: {error}")
                self.troubles.met("vdi-unreadable")
            self.troubles.bring_back()
            await asyncio.sleep(0.5)
        raise Violation(f"{model.name} can't be read though every zone is back")

    async def _check_names(self, store: Store) -> None:
        for name, model in self.models.items():
            if name in store.names() and model.copies_next:
                shown = store.vdi(name).copies
                if shown not in (model.copies, model.copies_next):
                    raise Violation(f"VDI {name} has {shown} copies, not {model.copies} or {model.copies_next}")
                self.world.note(f"VDI {name} has {shown} copies")
                model.copies, model.copies_next = shown, 0
        await super()._check_names(store)

    def _clients(self, store: Store) -> list[asyncio.Task[None]]:
        tasks = super()._clients(store)
        if self.life is not None:
            life = self.life
            tasks.append(asyncio.ensure_future(self._until_stopped(lambda: life.run(store))))
        return tasks

    # -- what must hold -----------------------------------------------------------------------------------------

    def _rot(self) -> None:
        if self.troubles.quiet:
            super()._rot()

    def _check_format(self) -> None:
        """Of the zones that are in the store only: others may hold what was cut off or never began."""
        epoch = self.epoch
        if epoch is None or self.writing or epoch.out or self.troubles.forgetful:
            return
        zones = [int(m.path.removeprefix("/zone")) for m in epoch.members]
        report = check_store([files_zone(self.world.zones[z], path_of(z)) for z in zones])
        found = [f for f in report.findings if f.severity is not Severity.NOTE and f.name not in self.rotten]
        found = [f for f in found if f.kind not in NOT_YET]
        if self.troubles.met_any:
            found = [f for f in found if f.severity is Severity.DAMAGE]
        if found:
            raise Violation(f"the check finds {report.verdict}: " + "; ".join(map(str, found[:5])))

    async def _come_to_rest(self, store: Store) -> None:
        if self.life is not None:
            await self.life.finish(store)
        await self.recovered(store)
        await self._quiet(store)

    async def recovered(self, store: Store) -> None:
        """Every zone comes back, every copy is where it should be."""
        end = self.world_now() + REST_SECONDS
        while True:
            taken = {member.path for member in store.epoch.members}
            for zone in store.epoch.out:
                if zone.number in store.zones._leaving:
                    continue
                if zone.path in taken:  # replaced before the last restart, which forgot that this one was to go
                    await store.wait_for_recovery()
                    await store.zones.remove(str(zone.number), force=False)
                elif not self.world.files(zone_of(zone.path)):
                    # A new disk where the old one was: a zone of its own, which replaces it.
                    await store.zones.replace(str(zone.number), zone.path)
            await store.wait_for_recovery()
            status = store.recovery.status()
            left = [*status.problems, *(f"{zone.path}: {zone.reason}" for zone in store.epoch.out)]
            if not (left or status.running or status.copies_missing or status.objects_unreachable):
                break
            if self.world_now() > end:
                raise Violation(f"recovery does not end: {left or status}")
            await asyncio.sleep(1.0)
        if self.troubles.lied:
            # Nothing tells a disk that lost what it had said to be safe from one that did not: somebody has to look.
            await store.start_scrub()
            await store.wait_for_scrub()
        self.check_copies(store)
        self.troubles.recovered(store)
        self.world.note("every copy is where it should be")

    def world_now(self) -> float:
        """Virtual seconds."""
        assert self.world.loop is not None
        return self.world.loop.now

    def check_copies(self, store: Store) -> None:
        """Each segment has its copies in the zones that should have them, and the files are there."""
        for name, volume in self.open_models.items():
            disk, writer = volume.disk, volume.disk.writer
            for segment in disk.segments.values():
                wanted = set(writer.place(segment.number))
                if not segment.sealed or segment.memory is not None:
                    continue
                least = min(writer.copies, len(store.membership.placeable()))
                if set(store.env.serving(segment.zones)) != wanted or len(wanted) < least:
                    raise Violation(f"{name}: {segment.name} lies on {segment.zones} instead of {sorted(wanted)}")
                for z in wanted:
                    where = int(store.env.zones[z].path.removeprefix("/zone"))
                    if segment.name not in self.world.files(where):
                        raise Violation(f"{name}: {segment.name} is not in {path_of(where)}")

    def _check_counters(self, store: Store) -> None:
        # Copies move: one that was just chosen for a read may be gone when it comes.
        self.world.faults["bad-copy-read"] += bool(store.env.bad_copies)
        store.env.bad_copies = 0
        super()._check_counters(store)

    def _check_files(self, store: Store) -> None:
        for member in store.epoch.members:
            self._check_zone(store, member.number, int(member.path.removeprefix("/zone")))

    def _check_zone(self, store: Store, z: int, where: int) -> None:
        """Nothing lies in the zone but what the VDIs need there."""
        found = {name for name in self.world.files(where) if name.startswith(("log/", "checkpoint/"))}
        found = {name for name in found if not name.startswith(("log/000000/", "checkpoint/000000/"))}
        wanted: set[str] = set()
        needed: set[str] = set()
        for volume in store.open_vdis():
            disk = volume.disk
            dead = [segment for segment, _ in disk.dead.values()]
            needed |= {s.name for s in disk.segments.values() if z in s.zones}
            wanted |= {segment_name(s.log, s.number) for s in (*dead, *disk.writer._prepared) if z in s.zones}
            wanted |= {checkpoint_name(disk.log, n) for n in volume.keeper.sizes if z in disk.checkpoint_zones(n)}
        if found - wanted - needed or needed - found:
            left, missing = sorted(found - wanted - needed)[:5], sorted(needed - found)[:5]
            raise Violation(f"zone {path_of(where)}: left over {left}, missing {missing}")

    async def _until_stopped(self, work: Any) -> None:
        try:
            await super()._until_stopped(work)
        except (Unavailable, Corrupt) as error:
            if not self.silent(self.copies_min) and not self.world.zone_failed:
                raise
            self.world.note(f"a client ends: {error}")
            self.troubles.met("unavailable")


@contextmanager
def watched(scenario: ZoneScenario) -> Iterator[None]:
    """Epochs that come into force are noted, recovery under way is counted, and what is waited for comes soon."""
    world, rng = scenario.world, scenario.rng
    write, put, in_force, make = Membership._write, Membership._put, Membership._in_force, Recovery._pass

    async def counted_write(self: Membership, *args: Any, **options: Any) -> None:
        scenario.changing += 1
        try:
            await write(self, *args, **options)
        except StoreError:
            scenario.changing -= 1
            scenario._unsure = True
            raise
        scenario.changing -= 1

    async def noted_put(self: Membership, epoch: Epoch) -> dict[int, str]:
        scenario.begun.setdefault(epoch.id, (len(scenario.history), epoch))
        return await put(self, epoch)

    def noted(self: Membership, epoch: Epoch) -> None:
        in_force(self, epoch)
        scenario.begun.pop(epoch.id, None)
        scenario.epoch, scenario._unsure = epoch, False
        scenario.history.append(epoch)
        scenario.troubles.epoch_changed(epoch)

    async def counted_pass(self: Recovery) -> None:
        world.active["copying"] += 1
        try:
            await make(self)
        finally:
            world.active["copying"] -= 1

    limits = [
        (objstore.volume.recovery, "SETTLE_SECONDS", rng.choice((0.01, 0.1, 1.0))),
        (objstore.volume.recovery, "RETRY_SECONDS", 1.0),
        (objstore.volume.recovery, "PARALLEL", rng.choice((1, 4))),
        (objstore.volume.zones, "RETRY_SECONDS", rng.choice((0.2, 1.0))),
        (objstore.volume.zones, "RETRY_SECONDS_MAX", 2.0),
    ]
    former = [(module, name, getattr(module, name)) for module, name, _ in limits]
    try:
        for module, name, value in limits:
            setattr(module, name, value)
        Membership._write, Membership._in_force = counted_write, noted  # type: ignore[method-assign]
        Membership._put = noted_put  # type: ignore[method-assign]
        Recovery._pass = counted_pass  # type: ignore[method-assign]
        yield
    finally:
        Membership._write, Membership._in_force, Recovery._pass = write, in_force, make  # type: ignore[method-assign]
        Membership._put = put  # type: ignore[method-assign]
        for module, name, value in former:
            setattr(module, name, value)


__all__ = ["SimStopped", "Vdi", "ZoneScenario"]
