"""One seed: a store on simulated zones, clients that use it, and several deaths of its process.

A seed is a sequence of lives. Each life opens the store, shows every VDI whole and compares it with what may be there,
serves clients and administrators for a while and ends: by a crash at a chosen system call or turn of the loop, or by a
clean stop (which a crash may hit too). The last life checks that nothing is left in the zones that no VDI needs.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import math
import random
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import objstore.log.blockmap
import objstore.log.collect
import objstore.log.disk
import objstore.log.env
import objstore.log.keeper
import objstore.log.lane
import objstore.log.mapmemory
from objstore.backend.directory import DirectoryBackend
from objstore.check.report import Severity
from objstore.errors import Busy, InvalidRequest, NoSpace, NotFound, NotSupported, Stopping, Unavailable
from objstore.log.checkpoint import checkpoint_folder, checkpoint_name
from objstore.log.collect import Collector
from objstore.log.keeper import Keeper
from objstore.log.segment import segment_name
from objstore.units import KIB, MIB
from objstore.volume.frozen import FrozenVolume
from objstore.volume.settings import MODES, StoreSettings
from objstore.volume.store import Store, open_zones
from objstore.volume.vdi import Vdi
from tests.sim.changes import Changes
from tests.sim.knobs import Knobs
from tests.sim.model import BLOCK_BYTES, DATA, HOLE, RESERVED, DiskModel, Request, Violation, stamped
from tests.sim.snapshots import Snapshots
from tests.sim.trash import Trash
from tests.sim.world import CHANGE_PHASES, CRASH_CALLS, FAILING_CALLS, PHASES, Failing, Trigger, World
from tests.sim.zone_faults import ZoneFaults
from tests.support.check_zones import check_files
from tests.support.sim_loop import SimClock, SimLoop, SimStopped

OPERATIONS: Final = 300
CRASHES: Final = 3
LIVES_MAX: Final = 60
READS_GONE_WRONG: Final = ("read failed", "directory unreadable", "checksum wrong")
"""Warnings that must not come while every zone is well: the store would go on with another copy."""
PUT_OUT: Final = " failed and is put out"
FELL_BACK: Final = "the one before it"
READ_BYTES_MAX: Final = MIB
CALLS_EXPECTED: Final = {
    "open": 150,
    "recovery": 250,
    "verify": 60,
    "serving": 2500,
    "checkpoint": 150,
    "collection": 200,
    "create": 60,
    "delete": 60,
    "snapshot": 60,
    "rollback": 100,
    "shutdown": 250,
    "change": 60,
    "flatten": 200,
}
"""About as many system calls a phase has: crash points are drawn up to there."""

log = logging.getLogger("objstore")


class Outcome:
    """What a finished seed reports."""

    def __init__(self, world: World) -> None:
        self.digest = world.digest
        self.crashes = world.crashes
        self.faults = world.faults


class Scenario:
    """A seed at work.

    phases: in which the process may die. pauses: means of what clients wait between requests.
    """

    phases: Sequence[str] = PHASES
    pauses: Sequence[float] = (1e-4, 1e-3, 2e-2)

    def __init__(self, world: World, knobs: Knobs, seed: int) -> None:
        self.world = world
        self.rng = rng = world.rng
        self.knobs = knobs
        self.now = 0.0
        self.operations = 0
        self.crashes = 0
        self.models: dict[str, DiskModel] = {}
        self.store: Store | None = None
        self.open_models: dict[str, Vdi] = {}
        self.windows: dict[str, list[int]] = {}
        self.logs: dict[str, int] = {}
        self.rotten: set[str] = set()
        # Reading everything with the other reader takes as long as a short life.
        chance = rng.random()
        self.checks_all, self.checks_end = chance < 0.05, chance < 0.3
        self.copies_max = 1 if random.Random(seed + 2).random() < knobs.seeds_one_copy else world.zones_first
        troubled = self.copies_max > 1 and random.Random(seed + 3).random() < knobs.seeds_zone_faults
        self.snapshots = Snapshots(self, seed)
        self.changes = Changes(self, seed, knobs.seeds_changes if type(self) is Scenario else 0.0)
        if self.changes.enabled:
            self.phases = (*self.phases, *CHANGE_PHASES)
        plain = type(self) is Scenario and not self.changes.enabled and not troubled
        self.trash = Trash(self, seed, enabled=plain)
        self.trouble = ZoneFaults(world, seed, knobs.zone_kinds if troubled else ())
        if troubled:
            self.knobs = knobs = dataclasses.replace(knobs, eio=0.0, seeds_tight=0.0)
        self.copies_min = 2 if troubled else 1
        self.flipping_zone = self.trouble.zone
        self.after_kill = False
        self.names = 0
        self.request_number = 0
        self.recycle = rng.choice((3, 12)) if rng.random() < knobs.seeds_recycled else 0
        self.settings = StoreSettings(
            dirty_bytes_max=MIB,
            dirty_age_seconds=rng.choice((0.05, 0.3, 2.0)),
            trash_days=30.0 if self.trash.enabled else 0.0,
        )
        # Smaller than an administrator may set, so that few operations fill many segments and page the map.
        small = {
            "segment_bytes": rng.choice((64, 128, 256, 256)) * KIB,
            "dirty_bytes_max": rng.choice((128 * KIB, 512 * KIB, 2 * MIB)),
            "map_memory_bytes": rng.choice((1, 20 * KIB, 4 * MIB)),
        }
        for name, value in small.items():
            object.__setattr__(self.settings, name, value)
        self.tight = rng.random() < knobs.seeds_tight
        for fs in world.zones:
            fs.nowait_miss = rng.choice((0.0, 0.1, 0.9))
            fs.takes_dsync = rng.random() < 0.8
            fs.takes_nowait = rng.random() < 0.9
            fs.takes_fallocate = rng.random() < 0.9
            if self.tight:
                fs.capacity_bytes = rng.choice((3, 6, 10)) * MIB
        for index in range(rng.choice((2, 2, 3))):
            mode = rng.choice((*MODES, "writeback", "writeback-always"))
            size = rng.choice((3 * MIB, 9 * MIB + 512, 40 * MIB + 4095, 300 * MIB))
            self._add_model(f"disk{index}", size, mode, rng.randrange(self.copies_min, self.copies_max + 1))

    def _add_model(self, name: str, size_bytes: int, mode: str, copies: int) -> DiskModel:
        model = self.models[name] = DiskModel(name, size_bytes, mode, copies)
        # Where its clients work: few places, so that requests meet.
        self.windows[name] = [self.rng.randrange(model.blocks) for _ in range(self.rng.choice((1, 3, 6)))]
        return model

    # -- lives --------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """All lives. Violation, or whatever else went wrong."""
        world = self.world
        lives = 0
        while self.operations < OPERATIONS or self.crashes < CRASHES:
            lives += 1
            assert lives < LIVES_MAX, "too many lives"
            self._life(last=False)
        self._life(last=True, end="stop")
        self._life(last=True, end="stop")
        if self.checks_end:
            self._check_format()
        return Outcome(world)

    def _life(self, *, last: bool, end: str | None = None) -> None:
        world, rng = self.world, self.rng
        if end is None:
            end = "stop" if rng.random() < 0.2 else "crash"
        world.trigger = None if last or (end == "stop" and rng.random() < 0.7) else self._trigger()
        mode = "kill" if rng.random() < self.knobs.kills else "power"
        if self.after_kill and not last and rng.random() < self.knobs.cut_after_kill:
            # What a killed process left in the page cache was taken for good; the power fails soon after.
            end, mode = "crash", "power"
            world.trigger = Trigger(
                rng.choice(("verify", "serving", "serving", "collection")), "step", rng.randrange(300)
            )
        self.trouble.before_life(last=last)
        if self.trouble.power_fails:
            mode = "power"
        slow = [rng.choice((30e-6, 300e-6, 3e-3)) for _ in world.zones]
        loop = world.start_process(slow, self.now)
        assert world.executor is not None
        if rng.random() < self.knobs.slow_reads:
            world.executor.slow["read"] = rng.choice((0.2, 1.0, 4.0))
            world.faults["slow-reads"] += 1
        if rng.random() < self.knobs.slow_purges:
            world.executor.slow["purge_log"] = 1.0
            world.faults["slow-purges"] += 1
        if not last and rng.random() < self.knobs.eio:
            call = self.knobs.eio_call or rng.choice(FAILING_CALLS)
            # What rots must have a good copy in service, so it is always the same zone that fails.
            lasting = rng.random() < 0.5 and not self.knobs.eio_call
            world.failing = Failing(self.flipping_zone, call, rng.randrange(1, 80), lasting)
        world.note(f"LIFE end={end} trigger={world.trigger} failing={world.failing}")
        try:
            loop.run_until_complete(self._main(loop, end, last))
        except SimStopped:
            pass
        except BaseException:
            world.end_process()
            raise
        self.now = loop.now + 1.0
        self.store = None
        self.open_models.clear()
        self.after_kill = world.dead and mode == "kill"
        if world.dead:
            self.crashes += 1
            world.bury(mode)
            if rng.random() < 0.15:
                self._rot()
            if rng.random() < self.knobs.flips:
                self._flip()
            if self.tight and rng.random() < 0.2:
                # Somebody else's files take what room there was.
                for fs in world.zones:
                    fs.capacity_bytes = fs.taken_bytes + rng.randrange(1200 * KIB)
            self.snapshots.crashed()
            for model in (*self.models.values(), *self.trash.models.values()):
                model.crashed()
        else:
            world.end_process(power=self.trouble.power_fails)
        self.trouble.after_life()
        if self.checks_all:
            self._check_format()

    def _check_format(self) -> None:
        """Whatever a process leaves behind is clean to a reader that knows nothing but the format."""
        try:
            report = check_files(self.world.zones)
        except NotFound:
            if any(model.existence == "yes" for model in self.models.values()):
                raise
            return
        flipped = any(fault.startswith("flip-") for fault in self.world.faults)
        flips = f"/zone{self.flipping_zone}" if flipped else None
        found = [f for f in report.findings if f.severity is not Severity.NOTE and f.name not in self.rotten]
        spoiled = {f.name for f in found if f.zone == flips}
        found = [f for f in found if f.severity is not Severity.FAULT or f.name not in spoiled]
        if flipped:  # a copy that was found bad doesn't count any more, and is not yet replaced
            found = [f for f in found if f.kind != "few-copies"]
        met = {fault.partition("-")[0] for fault in self.world.faults}
        if "eio" in met:  # the zone was put out, and is not yet given what it missed
            found = [f for f in found if f.kind not in ("few-copies", "zone-out", "missing-copy")]
        if "zone" in met:
            found = [f for f in found if f.severity is Severity.DAMAGE]
        if found:
            raise Violation(f"the check finds {report.verdict}: " + "; ".join(map(str, found[:5])))

    def _rot(self) -> None:
        """The newest checkpoint of a VDI rots in every zone: the one before it must do."""
        name = self.rng.choice(sorted(self.models))
        folder = checkpoint_folder(self.logs.get(name, 0))
        holders: dict[str, list[int]] = {}
        for z in range(len(self.world.zones)):
            for path in self.world.files(z):
                if path.startswith(folder):
                    holders.setdefault(path, []).append(z)
        newest = sorted(holders)[-2:]
        if len(newest) < 2 or not self.rotten.isdisjoint(newest):
            return
        for z in holders[newest[1]]:
            self.world.zones[z].damage(f"/zone{z}/{newest[1]}", 20)
        self.rotten.add(newest[1])
        self.world.faults["checkpoint-rotten"] += 1
        self.world.note(f"ROTS {newest[1]}")

    def _flip(self) -> None:
        """A bit rots in one zone, always the same: of everything that has another copy a good one is left."""
        rng, z = self.rng, self.flipping_zone
        safe = {0} | {self.logs[name] for name, model in self.models.items() if model.copies > 1 and name in self.logs}
        paths = [path for path in sorted(self.world.files(z)) if _log_of(path) in safe]
        if not paths:
            return
        path = rng.choice(paths)
        kind = path.partition("/")[0]
        size = self.world.zones[z].size(f"/zone{z}/{path}")
        if not size:
            return
        # Headers, seals and tables are a small part of most files.
        at = rng.choice((rng.randrange(size), rng.randrange(min(size, 4096)), size - 1 - rng.randrange(min(size, 200))))
        self.world.zones[z].damage(f"/zone{z}/{path}", at, 1 << rng.randrange(8))
        self.world.zone_rots = True
        self.world.faults[f"flip-{kind}"] += 1
        self.world.note(f"FLIPS zone {z} {path} {at}")

    async def _flip_later(self) -> None:
        for _ in range(self.rng.randrange(1, 4)):
            await asyncio.sleep(self.rng.random() * 0.3)
            self._flip()

    def _trigger(self) -> Trigger:
        rng = self.rng
        if self.knobs.crash_names:
            return Trigger(None, "fsync", rng.randrange(1, 4), folder=self.knobs.crash_names)
        chance = rng.random()
        phase = self.knobs.crash_phase or rng.choice((*self.phases, "serving", "serving", "recovery"))
        if chance < 0.5:
            call, expected = None, CALLS_EXPECTED[phase]
        elif chance < 0.75:
            call, expected = "step", 2 * CALLS_EXPECTED[phase]
        else:
            call, expected = rng.choice(CRASH_CALLS), max(4, CALLS_EXPECTED[phase] // 8)
            if rng.random() < 0.5 and not self.knobs.crash_phase:
                phase = ""
        count = int(math.exp(rng.random() * math.log(expected))) if rng.random() < 0.5 else rng.randrange(expected)
        return Trigger(phase or None, call, count + 1)

    async def _main(self, loop: SimLoop, end: str, last: bool) -> None:
        world = self.world
        world.phase = "open"
        self.store = store = await self._open_store(loop)
        if self.changes.enabled:
            await self._until_stopped(functools.partial(self.changes.settle, store))
        await self.trash.check(store)
        await self._check_names(store)
        self.snapshots.check_names(store)
        world.phase = "recovery"
        await self._until_stopped(functools.partial(self.trash.come_back, store))
        if self.changes.enabled and not last:
            await self._until_stopped(functools.partial(self.changes.detached, store))
        await self._until_stopped(functools.partial(self.snapshots.roll_back, store))
        for name in sorted(self.models):
            if name.startswith("extra") and not last and self.rng.random() < 0.3:
                await self.delete_disk(store, self.models[name])
        together = self.rng.random() < 0.5
        if together:
            await asyncio.gather(*(self.open_disk(store, self.models[name]) for name in sorted(self.models)))
        for name in sorted(self.models):
            if not together:
                await self.open_disk(store, self.models[name])
        world.phase = "verify"
        for name in sorted(self.models):
            await self._show(self.models[name])
        await self.snapshots.verify(store, 1.0 if last else 0.5)
        if not last:
            world.phase = "serving"
            rots = [self._flip_later()] if self.rng.random() < self.knobs.flips else []
            snapshots = self._until_stopped(functools.partial(self.snapshots.serve, store))
            flattening = functools.partial(self.changes.flatten, store)
            changes = [self._until_stopped(flattening)] if self.changes.enabled else []
            await asyncio.gather(*self._clients(store), *rots, self.trouble.while_serving(), snapshots, *changes)
            for name in sorted(self.models):
                if not world.zone_failed and name in self.open_models:
                    await self._until_stopped(functools.partial(self._compare_all, self.models[name]))
        self._check_counters(store)
        if end == "crash":
            world.die("step")
            return
        late = self._clients(store)[:3] if not last and self.rng.random() < 0.4 else []
        world.phase = "shutdown"
        if last:
            await self.trash.empty(store)
            if end == "stop" and self.rng.random() < 0.7:
                await self.snapshots.delete_all(store)
            await self._come_to_rest(store)
            if not self.snapshots.models:
                self._check_files(store)
        try:
            await store.shutdown()
        except Unavailable:
            if not world.zone_failed:
                raise
            world.die("step")
            return
        world.note("stopped cleanly")
        if late:
            await asyncio.wait(late)
        for model in (*self.models.values(), *self.trash.models.values()):
            model.stopped()
        await self._quiet(store)

    async def _open_store(self, loop: SimLoop) -> Store:
        world = self.world
        while True:
            missing = {f"/zone{self.trouble.zone}": "no such directory"} if self.trouble.absent else {}
            backends = [
                (DirectoryBackend(f"/zone{z}", fs=fs, recycle_files_max=self.recycle), f"/zone{z}")
                for z, fs in enumerate(world.zones)
                if f"/zone{z}" not in missing
            ]
            try:
                store = await open_zones(
                    backends,
                    settings=self.settings,
                    create=True,
                    clock=SimClock(loop),
                    executor=world.executor,
                    rng=self.rng,
                    missing=missing,
                )
            except (NoSpace, Unavailable, InvalidRequest) as error:
                world.note(f"the store can't be opened: {error}")
                if isinstance(error, NoSpace):
                    self.more_space("nospace-open")
                elif self.trouble.behind:
                    self.trouble.opening_refused(error)
                else:
                    raise
                for backend, _ in backends:
                    backend.close()
                world.new_executor(world.slow_seconds)
                continue
            if self.tight and len(store.env.in_service) < len(world.zones):
                # No room for an epoch: the store goes on without that zone, which may have the only copy of a VDI.
                self.more_space("nospace-epoch")
                await store.shutdown()
                world.new_executor(world.slow_seconds)
                continue
            return store

    def more_space(self, fault: str) -> None:
        """What an administrator does about full zones."""
        self.world.faults[fault] += 1
        for fs in self.world.zones:
            fs.capacity_bytes += MIB

    async def _check_names(self, store: Store) -> None:
        """What exists must, what is gone must not; what was under way is settled now."""
        names = set(store.names())
        for name, model in sorted(self.models.items()):
            if model.existence == "maybe" and model.deleting:
                model.existence = "yes" if name in names else "no"
                model.deleting = False
            elif model.existence == "maybe" and name in names:
                model.existence = "yes"
            if (model.existence == "yes") != (name in names) and model.existence != "maybe":
                raise Violation(f"VDI {name} should exist: {model.existence}; the store has {sorted(names)}")
            if model.existence == "no":
                del self.models[name]
        unknown = names - self.models.keys()
        if unknown:
            raise Violation(f"VDIs nobody made: {sorted(unknown)}")
        for name, model in sorted(self.models.items()):
            if name in names:
                entry = store.vdi(name)
                self.logs[name] = entry.log
                shown = (entry.size_bytes, entry.mode, entry.copies)
                if shown != (model.size_bytes, model.mode, model.copies):
                    raise Violation(f"VDI {name} came back as {shown}")
            elif name.startswith("disk"):
                await self._create(store, model)
            else:
                del self.models[name]

    async def _create(self, store: Store, model: DiskModel) -> None:
        world = self.world
        while True:
            model.existence = "maybe"
            world.active["create"] += 1
            try:
                await store.create_vdi(model.name, model.size_bytes, copies=model.copies, mode=model.mode)
            except NoSpace:
                world.active["create"] -= 1
                self.more_space("nospace-create")
                continue
            world.active["create"] -= 1
            model.existence = "yes"
            self.logs[model.name] = store.vdi(model.name).log
            world.note(f"created {model.name} {model.size_bytes} {model.mode} copies={model.copies}")
            return

    async def open_disk(self, store: Store, model: DiskModel) -> None:
        while True:
            try:
                volume = await store.open(model.name)
            except NoSpace as error:
                self.world.note(f"no space to open {model.name}: {error}")
                self.more_space("nospace-recovery")
                continue
            assert isinstance(volume, Vdi)
            self.open_models[model.name] = volume
            if model.allowed is None:
                model.crashed()
            return

    async def _come_to_rest(self, store: Store) -> None:
        """The last life: whatever is under way ends."""
        await self._quiet(store)

    # -- looking at whole disks ---------------------------------------------------------------------------------

    async def _show(self, model: DiskModel) -> None:
        """After opening: what the disk shows is what it is from now on."""
        await self._verify(model)
        model.settle()

    async def _verify(self, model: DiskModel) -> None:
        await self.show(model, self.open_models[model.name])

    async def show(self, model: DiskModel, volume: Vdi | FrozenVolume) -> None:
        """Read everything that may be there; raise unless it is one cut of the log."""
        kinds = await self._kinds(model, volume)
        for first, count in _runs(model.touched()):
            content = await self._content(model, volume, first, count)
            for i in range(count):
                block = first + i
                data = content[i * BLOCK_BYTES : (i + 1) * BLOCK_BYTES]
                model.observe(block, kinds.get(block, HOLE), data)
        self.world.note(f"verified {model.name}")

    async def _compare_all(self, model: DiskModel) -> None:
        """Nobody writes: the disk shows its newest state, everywhere."""
        volume = self.open_models[model.name]
        kinds = await self._kinds(model, volume)
        for first, count in _runs(model.touched()):
            content = await self._content(model, volume, first, count)
            for i in range(count):
                data = content[i * BLOCK_BYTES : (i + 1) * BLOCK_BYTES]
                shown = (kinds.get(first + i, HOLE), data)
                if shown != model.head(first + i):
                    want = model.head(first + i)
                    raise Violation(
                        f"VDI {model.name}: block {first + i} shows {shown[0]} {data[:16].hex()} "
                        f"instead of {want[0]} {want[1][:16].hex()}"
                    )

    async def _kinds(self, model: DiskModel, volume: Vdi | FrozenVolume) -> dict[int, str]:
        """Kind of every block that is no hole."""
        touched = set(model.touched())
        kinds: dict[int, str] = {}
        at = 0
        while at < model.size_bytes:
            for extent in await volume.extents(at, model.size_bytes - at):
                kind = HOLE if extent.hole else RESERVED if extent.zero else DATA
                if kind != HOLE:
                    for block in range(at // BLOCK_BYTES, -(-(at + extent.length_bytes) // BLOCK_BYTES)):
                        if block not in touched:
                            raise Violation(f"VDI {model.name}: block {block} is {kind}, nobody wrote it")
                        kinds[block] = kind
                at += extent.length_bytes
        return kinds

    async def _content(self, model: DiskModel, volume: Vdi | FrozenVolume, first: int, count: int) -> bytes:
        offset = first * BLOCK_BYTES
        length = min(count * BLOCK_BYTES, model.size_bytes - offset)
        into = memoryview(bytearray(b"\xee" * length))
        if await volume.read(offset, length, into) == length:
            return bytes(count * BLOCK_BYTES)
        return into.tobytes().ljust(count * BLOCK_BYTES, b"\0")

    # -- clients ------------------------------------------------------------------------------------------------

    def _clients(self, store: Store) -> list[asyncio.Task[None]]:
        """Tasks that use the store, started."""
        rng = self.rng
        clients = [name for name in sorted(self.models) for _ in range(rng.choice((1, 2, 3)))]
        # Lives that only crashes are wanted of stay short.
        left = max(OPERATIONS - self.operations, OPERATIONS // 10)
        each = min(rng.randrange(30, 170), left * 2 // 3) // len(clients) + 1
        work: list[Callable[[], Coroutine[Any, Any, None]]] = []
        for name in clients:
            if name in self.open_models:
                client = Client(self, store, self.models[name], random.Random(rng.getrandbits(64)))
                work.append(functools.partial(client.run, each))
        work.append(functools.partial(self._administrate, store, random.Random(rng.getrandbits(64))))
        return [asyncio.ensure_future(self._until_stopped(call)) for call in work]

    async def _until_stopped(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await work()
        except Stopping:
            self.world.faults["stopping"] += 1
        except Unavailable:
            if not self.world.zone_failed:
                raise

    async def _administrate(self, store: Store, rng: random.Random) -> None:
        """Make and remove VDIs beside the clients' work."""
        for _ in range(rng.choice((0, 1, 1, 2))):
            await asyncio.sleep(rng.random() * 0.1)
            self.names += 1
            name = f"extra{self.names}"
            mode = rng.choice(MODES)
            copies = rng.randrange(self.copies_min, self.copies_max + 1)
            model = self._add_model(name, rng.choice((MIB, 5 * MIB + 7)), mode, copies)
            await self._create(store, model)
            await self.open_disk(store, model)
            model.settle()
            await Client(self, store, model, rng).run(rng.choice((0, 3, 12)))
            if rng.random() < 0.7:
                await self.delete_disk(store, model)

    async def use(self, store: Store, model: DiskModel, operations: int) -> None:
        """A client works on a disk that is open."""
        await Client(self, store, model, self.rng).run(operations)

    async def delete_disk(self, store: Store, model: DiskModel) -> None:
        world = self.world
        volume = self.open_models.pop(model.name, None)
        if volume is not None:
            await store.close(volume)
        model.existence, model.deleting = "maybe", True
        world.active["delete"] += 1
        while True:
            # Somebody else deletes or opens it at the same moment.
            calls: list[Coroutine[Any, Any, Any]] = [store.delete_vdi(model.name)]
            if self.rng.random() < 0.3:
                calls.append(store.delete_vdi(model.name))
            if self.rng.random() < 0.3:
                calls.insert(self.rng.randrange(len(calls) + 1), store.open(model.name))
            results = await asyncio.gather(*calls, return_exceptions=True)
            opened = [result for result in results if isinstance(result, Vdi)]
            for vdi in opened:
                await store.close(vdi)
            failures = [result for result in results if isinstance(result, BaseException)]
            unexpected = [error for error in failures if not isinstance(error, (NoSpace, NotFound, Busy))]
            if unexpected:
                raise unexpected[0]
            if None in results:
                break
            if any(isinstance(error, NoSpace) for error in failures):
                self.more_space("nospace-delete")
            elif not opened:
                raise Violation(f"nobody could delete VDI {model.name}: {failures}")
        world.active["delete"] -= 1
        world.note(f"deleted {model.name}")
        await self.trash.deleted(store, model)

    # -- what must hold between operations ----------------------------------------------------------------------

    def _check_counters(self, store: Store) -> None:
        if store.env.bad_copies and self.world.zone_rots:
            self.world.faults["bad-copy-read"] += 1
        elif store.env.bad_copies:
            raise Violation(f"{store.env.bad_copies} bad copies were read, though no zone lies")
        if store.env.dirty_bytes < 0:
            raise Violation(f"dirty_bytes is {store.env.dirty_bytes}")

    async def _quiet(self, store: Store) -> None:
        """Wait for what runs in the background."""
        executor = self.world.executor
        assert executor is not None
        while store._purging or store._work or executor.busy:  # noqa: ASYNC110 - time is free here
            await asyncio.sleep(0.05)

    def _check_files(self, store: Store) -> None:
        """Nothing lies in the zones but what the open VDIs need."""
        for z in range(len(self.world.zones)):
            if self.trouble.behind and z == self.trouble.zone:
                continue  # what it still lacks or has too much is a matter of recovery
            found = {name for name in self.world.files(z) if not name.startswith(("epoch/", "catalog/", "spare/"))}
            found -= {"superblock", "lock", "scrub", "recovery"}
            found = {name for name in found if not name.startswith("log/000000/")}
            wanted: set[str] = set()
            needed: set[str] = set()
            for volume in store.open_vdis():
                disk = volume.disk
                frozen = {snapshot.checkpoint for snapshot in store.catalog.state.snapshots_in(disk.log)}
                if volume.keeper.holds.maps.keys() != frozen or (disk.held_blocks and not frozen):
                    raise Violation(f"VDI {volume.name} holds what only deleted snapshots needed")
                dead = [segment for segment, _ in disk.dead.values()]
                needed |= {segment_name(s.log, s.number) for s in disk.segments.values() if z in s.zones}
                wanted |= {segment_name(s.log, s.number) for s in (*dead, *disk.writer._prepared) if z in s.zones}
                wanted |= {
                    checkpoint_name(disk.log, number)
                    for number in volume.keeper.sizes
                    if z in disk.checkpoint_zones(number)
                }
            missing = needed - found
            wanted |= needed
            if found - wanted or missing:
                raise Violation(f"zone {z}: left over {sorted(found - wanted)[:5]}, missing {sorted(missing)[:5]}")


class Client:
    """One connection to one VDI."""

    def __init__(self, scenario: Scenario, store: Store, model: DiskModel, rng: random.Random) -> None:
        self.scenario = scenario
        self.world = scenario.world
        self.store = store
        self.model = model
        self.rng = rng
        self.volume = scenario.open_models[model.name]

    async def run(self, operations: int) -> None:
        rng = self.rng
        for _ in range(operations):
            if rng.random() < 0.5:
                await asyncio.sleep(rng.expovariate(1.0) * rng.choice(self.scenario.pauses))
            if rng.random() < 0.2:
                await asyncio.gather(*(self._one() for _ in range(rng.randrange(2, 6))))
            else:
                await self._one()

    async def _one(self) -> None:
        self.scenario.operations += 1
        rng = self.rng
        action = rng.choices(
            ("write", "read", "flush", "trim", "zero", "reserve", "extents", "cache", "checkpoint", "discard"),
            (50, 16, 8, 4, 3, 3, 4, 1, 2, 0.3),
        )[0]
        if action in ("write", "trim", "zero", "reserve"):
            await self._change(action, *self._range())
        elif action == "discard":
            await self._change("trim", 0, self.model.size_bytes)
        elif action == "read":
            await self._read(*self._range())
        elif action == "extents":
            await self._extents(*self._range())
        elif action == "cache":
            await self.volume.cache(*self._range())
        elif action == "flush":
            asked = self.model.flush_asked()
            await self.volume.flush()
            self.model.flushed(asked)
            self.world.note(f"{self.model.name} flushed {asked}")
        else:
            try:
                await self.volume.keeper.checkpoint()
            except NoSpace:
                self.scenario.more_space("nospace-checkpoint")

    def _range(self) -> tuple[int, int]:
        rng, model = self.rng, self.model
        window = rng.choice(self.scenario.windows[model.name]) * BLOCK_BYTES
        grain = rng.choice((BLOCK_BYTES, BLOCK_BYTES, BLOCK_BYTES, 512, 1))
        offset = (window + rng.randrange(64 * BLOCK_BYTES)) // grain * grain % model.size_bytes
        length = rng.choice((1, 1, 1, 2, 4, 9, 33)) * grain
        if rng.random() < 0.06:
            length = rng.choice((64, 150, 256)) * BLOCK_BYTES
        return offset, min(length, model.size_bytes - offset)

    async def _change(self, action: str, offset: int, length: int) -> None:
        rng, model, volume, world = self.rng, self.model, self.volume, self.world
        self.scenario.request_number += 1
        fua = rng.random() < 0.06
        data = stamped(self.scenario.request_number, offset, length) if action == "write" else b""
        request = Request(action, offset, length, data, fua, stamp=self.scenario.request_number)
        gone = rng.random() < 0.01

        def alive() -> bool:
            if gone:
                return False
            model.taken(request)
            world.note(f"{model.name} takes {request}")
            return True

        try:
            if action == "write":
                if not fua and not gone and volume.write_now(offset, memoryview(data)):
                    model.taken(request)
                    world.note(f"{model.name} takes now {request}")
                else:
                    await volume.write(offset, memoryview(data), fua=fua, alive=alive)
            elif action == "trim":
                await volume.trim(offset, length, fua=fua, alive=alive)
            else:
                fast = rng.random() < 0.3
                no_hole = action == "reserve"
                await volume.zero(offset, length, no_hole=no_hole, fast=fast, fua=fua, alive=alive)
        except NoSpace as error:
            world.note(f"{model.name} no space for {request}: {error}")
            world.faults["nospace-write"] += 1
            model.refused(request)
            if rng.random() < 0.3:
                self.scenario.more_space("more-space")
        except NotSupported:
            model.refused(request)
        except Stopping:
            model.refused(request)
            raise
        except InvalidRequest:
            if not gone:
                raise
            world.faults["connection-gone"] += 1
        else:
            if not request.number:
                if action == "trim":  # nothing to do
                    if fua:
                        model.flushed_once()
                    return
                raise Violation(f"{request} was answered and never had a place in the log")
            model.acked(request)
            world.note(f"{model.name} acks {request}")

    async def _read(self, offset: int, length: int) -> None:
        model, volume = self.model, self.volume
        into = memoryview(bytearray(length))
        low = model.reading()
        self.world.note(f"{model.name} reads {offset}+{length} at {low}")
        zeros = volume.read_now(offset, length, into)
        if zeros < 0:
            zeros = await volume.read(offset, length, into)
        content = bytes(length) if zeros == length else into.tobytes()
        first = offset // BLOCK_BYTES
        for block in range(first, -(-(offset + length) // BLOCK_BYTES)):
            start, end = max(offset, block * BLOCK_BYTES), min(offset + length, (block + 1) * BLOCK_BYTES)
            shown = content[start - offset : end - offset]
            skip = start - block * BLOCK_BYTES
            states = model.states(block, low)
            if not any(state[1][skip : skip + len(shown)] == shown for state in states):
                raise Violation(
                    f"VDI {model.name}: a read of block {block} shows {shown[:16].hex()}, "
                    f"not one of {[(kind, data[:16].hex()) for kind, data in states]}"
                )

    async def _extents(self, offset: int, length: int) -> None:
        model = self.model
        low = model.reading()
        at = offset
        for extent in await self.volume.extents(offset, length):
            kind = HOLE if extent.hole else RESERVED if extent.zero else DATA
            for block in range(at // BLOCK_BYTES, -(-(at + extent.length_bytes) // BLOCK_BYTES)):
                kinds = [state[0] for state in model.states(block, low)]
                if kind not in kinds:
                    raise Violation(f"VDI {model.name}: extents call block {block} {kind}, it is one of {kinds}")
            at += extent.length_bytes
        if not offset < at <= offset + length:
            raise Violation(f"extents of {offset}+{length} end at {at}")


def _log_of(path: str) -> int:
    """Log of an object; 0 for what belongs to the whole store, -1 for what is no object or can't be without."""
    kind, _, rest = path.partition("/")
    if kind in ("log", "checkpoint"):
        return int(rest.partition("/")[0], 16)
    return 0 if kind in ("catalog", "epoch") else -1


def _runs(blocks: list[int]) -> Iterator[tuple[int, int]]:
    """Ascending blocks as (first, count) of neighbours, at most READ_BYTES_MAX each."""
    most = READ_BYTES_MAX // BLOCK_BYTES
    start = previous = -2
    for block in blocks:
        if block == previous + 1 and block - start < most:
            previous = block
            continue
        if start >= 0:
            yield start, previous - start + 1
        start = previous = block
    if start >= 0:
        yield start, previous - start + 1


class _Errors(logging.Handler):
    """Log records of objstore: warnings into the trace; an error there is a violation, as no zone lies here."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.WARNING)
        self.world = world

    def emit(self, record: logging.LogRecord) -> None:
        if self.world.dead:
            return
        message = record.getMessage()
        self.world.note(f"{record.levelname}: {message}")
        bad = record.levelno >= logging.ERROR
        if FELL_BACK in message and self.world.faults["checkpoint-rotten"]:
            bad = False
        if self.world.zone_rots:
            bad = bad and PUT_OUT not in message
        else:
            bad = bad or (message.startswith(READS_GONE_WRONG) and "is out of service" not in message)
        if bad and not self.world.zone_failed and self.world.loop is not None:
            self.world.loop.failures.append({"message": f"logged: {message}"})


@contextmanager
def instrumented(world: World, rng: random.Random) -> Iterator[None]:
    """Small limits, so that a few operations meet all of them; checkpoints and collections under way are counted."""
    limits = [
        (objstore.log.keeper, "SEGMENTS_BETWEEN_MAX", rng.choice((4, 12, 40))),
        (objstore.log.keeper, "OPERATIONS_BETWEEN_MIN", rng.choice((20, 200, 1 << 20))),
        (objstore.log.keeper, "REWRITE_BYTES_MAX", rng.choice((1, 20000, 1 << 24))),
        (objstore.log.collect, "SLACK_SEGMENTS", rng.choice((0, 2, 5))),
        (objstore.log.collect, "TIGHT_SEGMENTS", rng.choice((6, 8))),
        (objstore.log.lane, "JOB_BYTES_MAX", rng.choice((1, 1 << 17, 1 << 24))),
        (objstore.log.env, "READERS_MAX", rng.choice((2, 8, 4096))),
        (objstore.log.env, "CRC_SEGMENTS_MAX", rng.choice((0, 3, 4096))),
        (objstore.log.keeper, "EVICT_AT_ONCE", rng.choice((1, 64))),
        (objstore.log.keeper, "PAGES_AT_ONCE", rng.choice((1, 3, 256))),
        (objstore.log.mapmemory, "PINNED_BYTES_MIN", rng.choice((20, 256)) * KIB),
        (objstore.log.blockmap, "FILL_TALLY_MAX", rng.choice((2, 64))),
        (objstore.log.blockmap, "FILL_STEP", rng.choice((2, 4096))),
        (objstore.log.disk, "FILL_AT_ONCE_BLOCKS", rng.choice((0, 4096 * 1024))),
    ]
    former = [(module, name, getattr(module, name)) for module, name, _ in limits]
    write, collect = Keeper._write, Collector._collect

    async def counted_write(self: Keeper, *args: Any) -> None:
        world.active["checkpoint"] += 1
        try:
            await write(self, *args)
        finally:
            world.active["checkpoint"] -= 1

    async def counted_collect(self: Collector, *args: Any) -> bool:
        world.active["collection"] += 1
        try:
            return await collect(self, *args)
        finally:
            world.active["collection"] -= 1

    handler = _Errors(world)
    propagate = log.propagate
    log.addHandler(handler)
    log.propagate = False
    try:
        for module, name, value in limits:
            setattr(module, name, value)
        Keeper._write, Collector._collect = counted_write, counted_collect  # type: ignore[method-assign]
        yield
    finally:
        Keeper._write, Collector._collect = write, collect  # type: ignore[method-assign]
        for module, name, value in former:
            setattr(module, name, value)
        log.removeHandler(handler)
        log.propagate = propagate


__all__ = ["Outcome", "Scenario", "instrumented"]
