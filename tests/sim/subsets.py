"""Every subset of a store's zones: what opens without the others, and what it shows.

At the end of a seed, as the last process left things. Each try begins from the same files, which are put back.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import random
from typing import TYPE_CHECKING, Final

from objstore.errors import Corrupt, StoreError, Unavailable
from objstore.volume.vdi import Vdi
from tests.sim.model import Violation
from tests.support.sim_loop import SimLoop, SimStopped

if TYPE_CHECKING:
    from tests.sim.zone_scenario import ZoneScenario

TRIES_MAX: Final = 6


class Subsets:
    """The tries of one seed."""

    def __init__(self, scenario: ZoneScenario, rng: random.Random) -> None:
        self.scenario = scenario
        self.rng = rng
        self.done = False

    def look(self) -> None:
        """Try some of the subsets, all of them in one seed of ten."""
        self.done = True
        scenario, world = self.scenario, self.scenario.world
        given = scenario.given()
        subsets = [set(c) for n in range(1, len(given)) for c in itertools.combinations(given, n)]
        if self.rng.random() > 0.1:
            subsets = self.rng.sample(subsets, min(len(subsets), TRIES_MAX))
        images = [fs.image() for fs in world.zones]
        history, begun = list(scenario.history), dict(scenario.begun)
        former = scenario.epoch, scenario.writing, world.trigger, dict(scenario.logs), world.zone_rots
        unsure, whole = set(scenario.troubles.unsure), scenario.troubles.whole
        world.trigger = None
        for absent in subsets:
            scenario.epoch, scenario.writing = former[0], former[1]
            self._try(absent)
            scenario.history, scenario.begun = list(history), dict(begun)
            scenario.troubles.unsure = set(unsure)
            for fs, image in zip(world.zones, images, strict=True):
                fs.restore(image)
        scenario.epoch, scenario.writing, world.trigger, scenario.logs, world.zone_rots = former
        scenario.troubles.whole = whole

    def _try(self, absent: set[int]) -> None:
        scenario, world = self.scenario, self.scenario.world
        world.zone_rots = True
        world.phase = "open"
        scenario.troubles.absent_zones = set(absent)
        loop = world.start_process([30e-6 for _ in world.zones], scenario.now)
        world.zone_failed = True
        world.note(f"WITHOUT {sorted(absent)}")
        scenario.changing = 0
        try:
            loop.run_until_complete(self._open(loop, absent))
        except SimStopped:
            pass
        finally:
            world.end_process()
            scenario.now = loop.now + 1.0
            scenario.open_models.clear()
            scenario.store = None
            scenario.troubles.absent_zones = set()

    async def _open(self, loop: SimLoop, absent: set[int]) -> None:
        scenario, world = self.scenario, self.scenario.world
        expected = scenario.may_open(absent)
        try:
            store = await scenario.open_with(loop, absent)
        except StoreError as error:
            scenario.judge_refusal(error, expected, absent)
            world.faults["subset-refused"] += 1
            return
        if expected is False:
            raise Violation(f"the store opens without {sorted(absent)}, which its epoch does not allow")
        world.faults["subset-opened"] += 1
        unsure = set(scenario.troubles.unsure)
        out = {int(zone.path.removeprefix("/zone")) for zone in store.epoch.out}
        for name, model in sorted(scenario.models.items()):
            if name not in store.names():
                if model.existence == "yes":
                    raise Violation(f"without {sorted(absent)} there is no VDI {name}")
                continue
            silent = out | scenario.troubles.forgetful
            try:
                volume = await store.open(name)
            except (Unavailable, Corrupt) as error:
                if scenario.has_to_open(model, silent):
                    raise Violation(f"without {sorted(absent)} {name} has to open: {error}") from error
                world.faults["subset-vdi-refused"] += 1
                continue
            assert isinstance(volume, Vdi)
            scenario.open_models[name] = volume
            shown = copy.copy(model)
            if shown.allowed is None:
                shown.crashed()
            try:
                await scenario._verify(shown)
            except (Unavailable, Corrupt) as error:
                if len(silent | unsure) < model.copies_least:
                    raise Violation(f"without {sorted(absent)} {name} has to be readable: {error}") from error
                world.faults["subset-unreadable"] += 1
        await asyncio.sleep(self.rng.random() * 2.0)
        world.die("step")
