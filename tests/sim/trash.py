"""The trash in a scenario: in some seeds disks that are deleted are kept, come back with what they had, or are purged.

A disk is among the models of the scenario, deleted and back with every step that may be cut, or here. What was under
way when the process died is settled by what the store of the next life lists.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from objstore.errors import NoSpace
from tests.sim.model import DiskModel, Violation

if TYPE_CHECKING:
    from objstore.volume.store import Store
    from tests.sim.scenario import Scenario

SEEDS = 0.3


class Trash:
    """What is in the trash of a scenario's store, by name. enabled: deleted disks go there. final: nothing stays."""

    def __init__(self, scenario: Scenario, seed: int, *, enabled: bool) -> None:
        self.scenario = scenario
        self.world = scenario.world
        self.rng = random.Random(seed + 6)
        self.enabled = self.rng.random() < SEEDS and enabled
        self.final = False
        self.models: dict[str, DiskModel] = {}
        self._purging: set[str] = set()

    async def deleted(self, store: Store, model: DiskModel) -> None:
        """The disk was deleted."""
        del self.scenario.models[model.name]
        if not self.enabled:
            return
        self.models[model.name] = model
        if model.name not in await self._names(store):
            raise Violation(f"VDI {model.name} was deleted and is not in the trash")
        chance = self.rng.random()
        if self.final or chance < 0.2:
            await self._purge(store, model.name)
        elif chance < 0.6:
            await self._bring_back(store, model.name)

    async def _names(self, store: Store) -> set[str]:
        return {entry.name for entry in await store.trash()}

    async def check(self, store: Store) -> None:
        """A new life: what must be there is, whole or in the trash."""
        if not self.enabled:
            return
        models, names = self.scenario.models, await self._names(store)
        for name, model in sorted(models.items()):
            if model.existence == "maybe" and model.deleting and name not in store.names():
                if name not in names:
                    raise Violation(f"VDI {name} is neither there nor in the trash")
                self.models[name] = models.pop(name)
        for name in sorted(self.models.keys() - names):
            if name not in self._purging:
                raise Violation(f"VDI {name} is gone from the trash")
            del self.models[name]
        self._purging.clear()
        if names - self.models.keys():
            raise Violation(f"nobody knows what is in the trash: {sorted(names - self.models.keys())}")

    async def come_back(self, store: Store) -> None:
        """Some of what a former life has left comes back."""
        for name in sorted(self.models):
            if self.rng.random() < 0.5:
                await self._bring_back(store, name)

    async def empty(self, store: Store) -> None:
        """Purge everything; what is deleted from now on is purged too."""
        self.final = True
        for name in sorted(self.models):
            await self._purge(store, name)

    async def _bring_back(self, store: Store, name: str) -> None:
        scenario, world = self.scenario, self.world
        model = scenario.models[name] = self.models.pop(name)
        model.existence, model.deleting = "maybe", True  # a crash may leave it where it was
        world.active["delete"] += 1
        while True:
            try:
                await store.undelete(name)
                break
            except NoSpace:
                scenario.more_space("nospace-undelete")
        world.active["delete"] -= 1
        model.existence, model.deleting = "yes", False
        world.note(f"brought {name} back")
        world.faults["undeleted"] += 1
        await scenario.open_disk(store, model)
        volume = scenario.open_models.pop(name)
        await scenario.show(model, volume)
        model.settle()
        await store.close(volume)

    async def _purge(self, store: Store, name: str) -> None:
        self._purging.add(name)
        self.world.active["delete"] += 1
        while True:
            try:
                await store.purge(name)
                break
            except NoSpace:
                self.scenario.more_space("nospace-delete")
        self.world.active["delete"] -= 1
        self._purging.discard(name)
        del self.models[name]
        self.world.note(f"purged {name}")
