"""Snapshots in a scenario: taken and deleted while clients work, shown whole in every later life.

A snapshot's model is a copy of its disk's: it may show the state after the last request that was answered before the
snapshot was asked for, after the last one that was taken before it was reported, or any in between. What the first look
at it shows is what it must show ever after.
"""

from __future__ import annotations

import asyncio
import copy
import random
from typing import TYPE_CHECKING

from objstore.errors import Busy, NoSpace, NotFound
from objstore.volume.frozen import FrozenVolume
from tests.sim.model import DiskModel, Violation

if TYPE_CHECKING:
    from objstore.volume.store import Store
    from tests.sim.scenario import Scenario

SNAPSHOTS_MAX = 5
CLONES_MAX = 4


class Snapshots:
    """All snapshots of a scenario, by name."""

    def __init__(self, scenario: Scenario, seed: int) -> None:
        self.scenario = scenario
        self.world = scenario.world
        self.rng = random.Random(seed + 4)
        self.group_rng = random.Random(seed + 7)
        self.models: dict[str, DiskModel] = {}
        self._pending: dict[str, tuple[DiskModel, int]] = {}
        """Those that are being taken: model of the disk, and the last request answered before."""
        self._clones: dict[str, tuple[DiskModel, int]] = {}
        """Clones that are being made, likewise; of a snapshot: its model, 0."""
        self._rollback: tuple[str, str, int] | None = None
        """One that is under way: disk, snapshot, the disk's log before."""
        self._group: list[str] = []
        """Snapshots that are being taken at one instant."""
        self._tags = 0

    # -- what may be there --------------------------------------------------------------------------------------

    def _model(self, name: str, disk: DiskModel, low: int) -> DiskModel:
        """What a snapshot of that disk may show now that was asked for behind request `low`."""
        model = copy.copy(disk)
        model.name = name
        model.base = dict(disk.base)
        model.versions = {block: list(versions) for block, versions in disk.versions.items()}
        model.history = list(disk.history)
        model.allowed = sum(1 << k for k in range(low, len(model.history) + 1))
        model.existence = "maybe"
        model.deleting = False
        return model

    def crashed(self) -> None:
        """The process died."""
        for name, (disk, low) in self._pending.items():
            self.models[name] = self._model(name, disk, low)
        self._pending.clear()
        for name, (disk, low) in self._clones.items():
            self._add_clone(name, disk, low)
        self._clones.clear()

    def _add_clone(self, name: str, source: DiskModel, low: int) -> DiskModel:
        """A disk that may begin as a disk was behind request `low` or later, or as a snapshot."""
        allowed = source.allowed
        model = self._model(name, source, low)
        if source.name in self.models:
            model.allowed = allowed if allowed is not None else 1
        model.write_back = model.mode in ("writeback-always", "unsafe")
        model.durable = 0
        self.scenario.models[name] = model
        self.scenario.windows[name] = self.scenario.windows[source.name.partition("@")[0]]
        return model

    def rolled_back_meanwhile(self, store: Store) -> tuple[str, str] | None:
        """The disk and the snapshot of the rollback that was under way, if it has happened."""
        if self._rollback is None:
            return None
        disk, snapshot, log = self._rollback
        return (disk, snapshot) if store.vdi(disk).log != log else None

    def check_names(self, store: Store) -> None:
        """What exists must, what is gone must not; what was under way is settled now."""
        names = {snapshot.name for snapshot in store.snapshots()}
        there = [name for name in self._group if name in names]
        if there and there != self._group:
            raise Violation(f"of the group {self._group} there is only {there}")
        self._group = []
        if self._rollback is not None:
            disk, snapshot, log = self._rollback
            if store.vdi(disk).log != log:
                (undo,) = names - self.models.keys()
                self._rolled_back(disk, snapshot, undo)
            self._rollback = None
        for name, model in list(self.models.items()):
            if model.existence == "yes" and name not in names:
                raise Violation(f"snapshot {name} is gone")
            if model.existence == "no" or name not in names:
                del self.models[name]
                if name in names:
                    raise Violation(f"snapshot {name} was deleted and is there")
                continue
            model.existence = "yes"
        if unknown := names - self.models.keys():
            raise Violation(f"snapshots nobody took: {sorted(unknown)}")

    # -- rolling back -------------------------------------------------------------------------------------------

    async def roll_back(self, store: Store) -> None:
        """Before anybody opens a disk: take one of them back to a snapshot of it."""
        scenario = self.scenario
        known = [
            name
            for name, model in sorted(self.models.items())
            if model.existence == "yes"
            and model.allowed is None
            and (disk := scenario.models.get(name.partition("@")[0])) is not None
            and disk.existence == "yes"
            and store.snapshot(name).vdi_deleted is False
        ]
        if not known or self.rng.random() > 0.3:
            return
        name = self.rng.choice(known)
        disk = name.partition("@")[0]
        self._rollback = disk, name, store.vdi(disk).log
        self.world.active["rollback"] += 1
        while True:
            try:
                force = scenario.changes.forced()
                undo = await store.rollback(name, force=force)
                if force:
                    await store.resume(disk)
                break
            except NoSpace:
                scenario.more_space("nospace-rollback")
        self.world.active["rollback"] -= 1
        self._rollback = None
        self._rolled_back(disk, name, undo.name)
        scenario.logs[disk] = store.vdi(disk).log
        self.world.note(f"rolled back to {name}, before: {undo.name}")

    def _rolled_back(self, disk_name: str, name: str, undo_name: str) -> None:
        disk = self.scenario.models[disk_name]
        if disk.allowed is None:
            disk.crashed()
        allowed = disk.allowed
        undo = self.models[undo_name] = self._model(undo_name, disk, 0)
        undo.existence, undo.allowed = "yes", allowed
        disk.size_bytes = self.models[name].size_bytes
        disk.base = dict(self.models[name].base)
        disk.versions.clear()
        disk.history.clear()
        disk.durable = 0
        disk.allowed = 1

    async def verify(self, store: Store, share: float = 1.0) -> None:
        """Show some snapshots whole."""
        for name in sorted(self.models):
            if self.models[name].existence == "yes" and self.rng.random() < share:
                await self._show(store, name)

    async def _show(self, store: Store, name: str) -> None:
        model = self.models[name]
        while True:
            try:
                volume = await store.open(name)
                break
            except NoSpace:
                self.scenario.more_space("nospace-snapshot-map")
        assert isinstance(volume, FrozenVolume)
        if volume.size_bytes != model.size_bytes:
            raise Violation(f"snapshot {name} has {volume.size_bytes} bytes instead of {model.size_bytes}")
        if model.allowed is None:
            model.allowed = 1
        await self.scenario.show(model, volume)
        model.settle()
        await store.close(volume)

    # -- what administrators do ---------------------------------------------------------------------------------

    async def serve(self, store: Store) -> None:
        """Take and delete snapshots beside the clients' work."""
        rng = self.rng
        for _ in range(rng.choice((0, 1, 2, 4))):
            await asyncio.sleep(rng.random() * 0.15)
            await self.scenario.changes.between_snapshots(store)
            names = sorted(name for name, model in self.models.items() if model.existence == "yes")
            if names and (len(names) >= SNAPSHOTS_MAX or rng.random() < 0.3):
                await self._delete(store, rng.choice(names))
            elif names and rng.random() < 0.3:
                await self.clone(store, rng.choice(names))
            elif len(disks := self.settled()) > 1 and self.group_rng.random() < 0.3:
                await self._take_group(store, self.group_rng.sample(disks, self.group_rng.randrange(2, len(disks) + 1)))
            elif disks:
                disk = rng.choice(disks)
                await (self._take(store, disk) if rng.random() < 0.8 else self.clone(store, disk))

    def settled(self) -> list[str]:
        """Disks that are open and not just being looked at for the first time."""
        models = self.scenario.models
        return sorted(name for name in self.scenario.open_models if name in models and models[name].allowed is None)

    async def _take_group(self, store: Store, disks: list[str]) -> None:
        """Snapshots of several disks at one instant: all of them or none, over a crash too."""
        world, models = self.world, self.scenario.models
        self._tags += 1
        tag = f"t{self._tags}"
        self._group = [f"{disk}@{tag}" for disk in disks]
        lows = {name: models[disk].flush_asked() for name, disk in zip(self._group, disks, strict=True)}
        for name, disk in zip(self._group, disks, strict=True):
            self._pending[name] = models[disk], lows[name]
        world.active["snapshot"] += 1
        world.note(f"taking {' '.join(self._group)}")
        try:
            taken = await store.create_group_snapshot(disks, tag)
        except (NoSpace, NotFound) as error:
            for name in self._group:
                del self._pending[name]
            self._group = []
            if isinstance(error, NoSpace):
                self.scenario.more_space("nospace-snapshot")
            return
        finally:
            world.active["snapshot"] -= 1
        if [snapshot.name for snapshot in taken] != self._group:
            raise Violation(f"the group {self._group} came as {taken}")
        for name in self._group:
            disk, low = self._pending.pop(name)
            model = self.models[name] = self._model(name, disk, low)
            model.existence = "yes"
            disk.durable = max(disk.durable, low)
        world.faults["group-snapshot"] += 1
        self._group = []

    async def _take(self, store: Store, disk_name: str) -> None:
        world, disk = self.world, self.scenario.models[disk_name]
        self._tags += 1
        tag = f"t{self._tags}"
        name = f"{disk_name}@{tag}"
        low = disk.flush_asked()
        self._pending[name] = disk, low
        world.active["snapshot"] += 1
        world.note(f"taking {name} behind {low}")
        try:
            taken = await store.create_snapshot(disk_name, tag)
        except (NoSpace, NotFound) as error:
            del self._pending[name]
            if isinstance(error, NoSpace):
                self.scenario.more_space("nospace-snapshot")
            return
        finally:
            world.active["snapshot"] -= 1
        if not taken.taken or taken.snapshot.name != name:
            raise Violation(f"snapshot {name} came as {taken}")
        model = self.models[name] = self._model(name, disk, low)
        model.existence = "yes"
        del self._pending[name]
        disk.durable = max(disk.durable, low)
        world.note(f"took {name} before {len(disk.history)}")
        if self.rng.random() < 0.4:
            await self._show(store, name)

    async def clone(self, store: Store, source: str) -> None:
        """Clone a snapshot, or a disk as it is; show the clone, and let a client use it."""
        world, scenario = self.world, self.scenario
        if sum(name.startswith("extra") for name in scenario.models) >= CLONES_MAX:
            return
        disk = self.models[source] if "@" in source else scenario.models[source]
        self._tags += 1
        name = f"extra-clone{self._tags}"
        low = 0 if "@" in source else disk.flush_asked()
        self._clones[name] = disk, low
        world.active["snapshot"] += 1
        world.note(f"cloning {source} to {name} behind {low}")
        try:
            await store.clone(source, name)
        except (NoSpace, NotFound) as error:
            del self._clones[name]
            if isinstance(error, NoSpace):
                scenario.more_space("nospace-clone")
            return
        finally:
            world.active["snapshot"] -= 1
        model = self._add_clone(name, disk, low)
        del self._clones[name]
        model.existence = "yes"
        scenario.logs[name] = store.vdi(name).log
        world.note(f"cloned {source} to {name}")
        if self.rng.random() < 0.7:
            await scenario.open_disk(store, model)
            await scenario.show(model, scenario.open_models[name])
            model.settle()
            await scenario.use(store, model, self.rng.choice((0, 3, 12)))

    async def _delete(self, store: Store, name: str) -> bool:
        """False: clones need it."""
        model = self.models[name]
        model.existence = "maybe"
        self.world.active["snapshot"] += 1
        while True:
            try:
                await store.delete_snapshot(name)
                break
            except NoSpace:
                self.scenario.more_space("nospace-delete")
            except Busy as error:
                if "needed by" in str(error):
                    model.existence = "yes"
                    self.world.active["snapshot"] -= 1
                    return False
                await asyncio.sleep(0.01)
        self.world.active["snapshot"] -= 1
        del self.models[name]
        self.world.note(f"deleted {name}")
        return True

    async def delete_all(self, store: Store) -> None:
        """Delete every snapshot, clones first: nothing that only they needed may stay."""
        for name in sorted(name for name in self.scenario.models if name.startswith("extra")):
            await self.scenario.delete_disk(store, self.scenario.models[name])
        while self.models:
            while store._work:  # noqa: ASYNC110 - what only a clone needed goes behind it
                await asyncio.sleep(0.05)
            gone = [await self._delete(store, name) for name in sorted(self.models)]
            if not any(gone):
                raise Violation(f"snapshots that nobody can delete: {sorted(self.models)}")
