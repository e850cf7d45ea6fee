"""Changes of whole disks in a scenario: other names and sizes, attributes, clones that are flattened.

In a share of the seeds. Whatever the process dies in, the next life finds the old state or the new one, never neither.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, NamedTuple

from objstore.errors import Busy, InvalidRequest, NoSpace, NotFound
from objstore.units import MIB
from tests.sim.model import BLOCK_BYTES, DATA, DiskModel, State, Violation

if TYPE_CHECKING:
    from objstore.volume.store import Store
    from tests.sim.scenario import Scenario

KEY = "owner"


class _Pending(NamedTuple):
    """What is under way: of a disk, from one value to another."""

    what: str
    name: str
    old: object
    new: object


class Changes:
    """All of it for one scenario."""

    def __init__(self, scenario: Scenario, seed: int, share: float) -> None:
        self.scenario = scenario
        self.world = scenario.world
        self.rng = random.Random(seed + 5)
        self.enabled = self.rng.random() < share
        self._pending: _Pending | None = None
        self._cloning = False
        self._attributes: dict[str, bytes] = {}

    def forced(self) -> bool:
        """Whether the next rollback is one by force."""
        return self.enabled and self.rng.random() < 0.5

    # -- what a crash may leave ---------------------------------------------------------------------------------

    async def settle(self, store: Store) -> None:
        """At the beginning of a life: what was under way has happened or not; nothing else has."""
        pending = self._pending
        snapshots = self.scenario.snapshots
        if pending is not None and pending.what == "name":
            if (pending.name in store.names()) == (pending.new in store.names()):
                raise Violation(f"VDI {pending.name} is there under both names or under none: {store.names()}")
            if pending.new in store.names():
                await self._rename(store, str(pending.new), pending.name, pending)
        elif pending is not None and pending.what == "size":
            size = store.vdi(pending.name).size_bytes
            if size not in (pending.old, pending.new):
                raise Violation(f"VDI {pending.name} has {size} bytes: {pending}")
            self._resized(self.scenario.models[pending.name], size)
        elif pending is not None and pending.what == "attribute":
            await self._check_attribute(store, pending.name, (pending.old, pending.new))
        rolled_back = snapshots.rolled_back_meanwhile(store)
        if rolled_back is not None:
            disk, snapshot = rolled_back
            self.scenario.models[disk].size_bytes = snapshots.models[snapshot].size_bytes
        for vdi in store.vdis():
            if vdi.suspended:
                if vdi.name not in (pending and pending.name, rolled_back and rolled_back[0]):
                    raise Violation(f"VDI {vdi.name} is suspended: {vdi.suspended}")
                await self._resume(store, vdi.name)
        self._pending = None
        for name in sorted(self._attributes):
            if name in store.names():
                await self._check_attribute(store, name, (self._attributes[name],))
            else:
                del self._attributes[name]

    async def _check_attribute(self, store: Store, name: str, allowed: tuple[object, ...]) -> None:
        try:
            shown: bytes | None = store.attributes.get(name, KEY)
        except NotFound:
            shown = None
        if shown not in allowed:
            raise Violation(f"attribute of {name} is {shown!r}, not one of {allowed}")
        if shown is None:
            self._attributes.pop(name, None)
        else:
            self._attributes[name] = shown

    # -- before anybody opens a disk ----------------------------------------------------------------------------

    async def detached(self, store: Store) -> None:
        """Other names and sizes of disks that nobody has open."""
        rng = self.rng
        for _ in range(rng.choice((0, 1, 1, 2))):
            name = rng.choice(sorted(n for n, m in self.scenario.models.items() if m.existence == "yes"))
            if rng.random() < 0.3:
                other = f"renamed-{name}"
                await self._rename(store, name, other, _Pending("name", name, name, other))
                await self._rename(store, other, name, _Pending("name", name, name, other))
            else:
                await self._resize(store, name)

    async def _rename(self, store: Store, name: str, new: str, pending: _Pending) -> None:
        self._pending = pending
        self.world.active["change"] += 1
        while True:
            try:
                await store.rename(name, new)
                break
            except NoSpace:
                self.scenario.more_space("nospace-change")
        self.world.active["change"] -= 1
        self._pending = None
        self.world.note(f"renamed {name} to {new}")

    async def _resize(self, store: Store, name: str, *, grow: bool = False) -> None:
        model = self.scenario.models[name]
        old = model.size_bytes
        new = self.rng.choice(
            (old + MIB, old + 4097, 3 * old) if grow else (old + MIB, old // 2 + 5, old // 3, 2 * old)
        )
        if not 0 < new < 1 << 30:
            return
        self._pending = _Pending("size", name, old, new)
        self.world.active["change"] += 1
        while True:
            try:
                await store.resize(name, new, force=True)
                break
            except NoSpace:
                self.scenario.more_space("nospace-change")
        if new < old:
            await self._resume(store, name)
        self.world.active["change"] -= 1
        self._pending = None
        self._resized(model, new)
        self.world.note(f"{name} has {new} bytes instead of {old}")

    def _resized(self, model: DiskModel, size_bytes: int) -> None:
        if size_bytes < model.size_bytes:
            self.world.faults["shrunk"] += 1
            model.base = _cut(model.base, size_bytes)
            for block, versions in list(model.versions.items()):
                kept = [(n, cut[block]) for n, state in versions if (cut := _cut({block: state}, size_bytes))]
                if kept:
                    model.versions[block] = kept
                else:
                    del model.versions[block]
        model.size_bytes = size_bytes

    async def _resume(self, store: Store, name: str) -> None:
        while True:
            try:
                await store.resume(name)
                return
            except NoSpace:
                self.scenario.more_space("nospace-change")

    # -- beside the clients' work -------------------------------------------------------------------------------

    async def between_snapshots(self, store: Store) -> None:
        """A disk grows under its clients, or gets an attribute, while no snapshot is being taken."""
        chance = self.rng.random()
        names = sorted(name for name in self.scenario.open_models if name in self.scenario.models)
        if not self.enabled or chance > 0.5 or self._cloning or not names:
            return
        name = self.rng.choice(names)
        try:
            if chance < 0.2:
                await self._resize(store, name, grow=True)
            else:
                await self._set_attribute(store, name)
        except NotFound:  # it was deleted meanwhile
            self.world.active["change"] -= 1
            self._pending = None

    async def _set_attribute(self, store: Store, name: str) -> None:
        old, new = self._attributes.get(name), self.rng.randbytes(self.rng.choice((0, 3, 5000)))
        self._pending = _Pending("attribute", name, old, new)
        self.world.active["change"] += 1
        while True:
            try:
                await store.attributes.set(name, KEY, new)
                break
            except NoSpace:
                self.scenario.more_space("nospace-change")
        self.world.active["change"] -= 1
        self._pending = None
        self._attributes[name] = new

    async def flatten(self, store: Store) -> None:
        """Flatten a clone that clients use, and see what came of it."""
        await asyncio.sleep(self.rng.random() * 0.05)
        scenario = self.scenario
        disks = scenario.snapshots.settled()
        if disks and self._pending is None and self.rng.random() < 0.6:
            self._cloning = True
            await scenario.snapshots.clone(store, self.rng.choice(disks))
            self._cloning = False
        names = [name for name in scenario.snapshots.settled() if name.startswith("extra-clone")]
        if not names or self.rng.random() > 0.8:
            return
        name = self.rng.choice(names)
        using = scenario.use(store, scenario.models[name], self.rng.choice((0, 20)))
        await asyncio.gather(self._flatten(store, name), using)

    async def _flatten(self, store: Store, name: str) -> None:
        self.world.active["flatten"] += 1
        try:
            job = await store.jobs.wait((await store.flatten(name)).job_id)
        except (Busy, InvalidRequest, NotFound) as error:
            self.world.note(f"{name} is not flattened: {error}")
            return
        except NoSpace:
            self.scenario.more_space("nospace-change")
            return
        finally:
            self.world.active["flatten"] -= 1
        self.world.note(f"flattening {name}: {job.state} {job.message}")
        if job.state == "done":
            self.world.faults["flattened"] += 1
            if store.vdi(name).parent:
                raise Violation(f"{name} was flattened and is a clone of {store.vdi(name).parent}")
        elif "can't hold" in job.message or "no space" in job.message or "is full" in job.message:
            self.scenario.more_space("nospace-change")
        elif not self.world.zone_failed and "can't be flattened" not in job.message:
            raise Violation(f"{name} was not flattened: {job.message}")


def _cut(blocks: dict[int, State], size_bytes: int) -> dict[int, State]:
    """What is left of blocks of a disk that has become so large."""
    last, skip = size_bytes // BLOCK_BYTES, size_bytes % BLOCK_BYTES
    kept = {block: state for block, state in blocks.items() if block < last}
    if skip and last in blocks:
        kind, content = blocks[last]
        kept[last] = (kind, content[:skip] + bytes(BLOCK_BYTES - skip)) if kind == DATA else blocks[last]
    return kept
