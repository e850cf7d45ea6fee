"""Several zones of a seed in trouble at once, one after the other and overlapping (kinds: zone_faults.py).

The contract decides what may come together. A zone that *forgets* (lie, backup, wiped) loses what it had: only so
many zones at once as every VDI can do without, and only while all zones have all copies. A zone that is silent
(missing, eio, hang) keeps what it has: then the store may refuse to open, or a VDI, or clients may have to wait, and
all is there again when the zone is back.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Final

from objstore.errors import StoreError
from objstore.format.document import Epoch
from objstore.volume.store import Store
from tests.sim.knobs import Knobs
from tests.support.fakefs import Image

if TYPE_CHECKING:
    from tests.sim.zone_scenario import ZoneScenario

FORGETTING: Final = ("lie", "backup", "wiped")
IMAGES_MAX: Final = 3
REFUSALS_MAX: Final = 10


class Troubles:
    """What happens to the zones of a seed. Zones are file systems here, not numbers of the store.

    absent_zones: not there. unsure: silent in this life or since, not yet recovered, or forgetful. forgetful: they lost
    something that recovery has not yet given back. whole: every zone has all that it should.
    """

    def __init__(self, scenario: ZoneScenario, seed: int, knobs: Knobs, *, several: bool) -> None:
        self.scenario = scenario
        self.world = scenario.world
        self.rng = rng = random.Random(seed * 13 + 9)
        self.zones = scenario.world.zones_first
        self.several = several
        self.quiet = not several and rng.random() < 0.5
        self.kinds = () if self.quiet else knobs.zone_kinds if several else ("eio", "hang")
        self.copies_min = 1 if self.quiet else min(3, self.zones) if several and rng.random() < 0.4 else 2
        self.zone = 0
        self.absent = False
        self.plan: dict[int, str] = {}
        self.absent_zones: set[int] = set()
        self.unsure: set[int] = set()
        self.forgetful: set[int] = set()
        self.whole = True
        self.met_any = False
        self.last = False
        self.lied = False
        self._images: list[tuple[int, Image]] = []
        self._refusals = 0

    @property
    def behind(self) -> bool:
        """Whether some zone may lack something."""
        return bool(self.unsure)

    # -- between two processes ------------------------------------------------------------------------------------

    def before_life(self, *, last: bool) -> None:
        """What this life meets."""
        self.last = last
        self.absent_zones.clear()
        self._refusals = 0
        self.plan = {}
        if not self.several or last or self.rng.random() < 0.25:
            return
        self.plan = self._drawn()
        for z, kind in sorted(self.plan.items()):
            self._begin(z, kind)

    def _drawn(self) -> dict[int, str]:
        """Zones and what happens to them: one or two, and now and then any number of missing ones."""
        rng = self.rng
        if "missing" in self.kinds and rng.random() < 0.25:
            return dict.fromkeys(rng.sample(range(self.zones), rng.randrange(1, self.zones)), "missing")
        zones = rng.sample(range(self.zones), 1 if rng.random() < 0.4 else 2)
        return self._allowed({z: rng.choice(self.kinds) for z in zones})

    def _allowed(self, plan: dict[int, str]) -> dict[int, str]:
        """Without what would lose more than the contract covers."""
        epoch = self.scenario.epoch
        images = {z for z, _ in self._images}
        plan = {z: kind for z, kind in plan.items() if kind != "backup" or z in images}
        lost = {z for z, kind in plan.items() if kind in FORGETTING}
        if not lost:
            return plan
        # As many as may be gone while enough others know the epoch in force; and in a life in which one lies, what is
        # flushed while another one is out has that one copy less.
        most = min(self.copies_min, epoch.w if epoch is not None and len(epoch.members) == self.zones else 0) - 1
        touched = set(plan) if "lie" in plan.values() else lost
        if not self.whole or len(touched) > most or self.scenario.writing:
            return {z: kind for z, kind in plan.items() if z not in lost}
        return plan

    def _begin(self, z: int, kind: str) -> None:
        fs = self.world.zones[z]
        self.met_any = self.world.zone_rots = True
        self.met(kind)
        self.unsure.add(z)
        if kind == "missing":
            self.absent_zones.add(z)
            return
        if kind not in FORGETTING:
            return
        self.forgetful.add(z)
        self.whole = False
        if kind == "wiped":
            fs.wipe(f"/zone{z}")
        elif kind == "backup":
            fs.restore(self.rng.choice([image for zone, image in self._images if zone == z]))
        else:
            fs.lies = self.lied = True

    def after_life(self) -> None:
        """What a backup may put back."""
        for fs in self.world.zones:
            fs.lies = False
        if "backup" in self.kinds and self.rng.random() < 0.4:
            z = self.rng.randrange(self.zones)
            self._images.append((z, self.world.zones[z].image()))
            del self._images[:-IMAGES_MAX]

    @property
    def power_fails(self) -> bool:
        """A lie comes out only so."""
        return "lie" in self.plan.values()

    # -- opening --------------------------------------------------------------------------------------------------

    def opening_refused(self, error: StoreError) -> None:
        """An administrator brings zones back, one or all; with all of them there it must do."""
        self._refusals += 1
        if not self.absent_zones or self._refusals > REFUSALS_MAX:
            raise error
        self.met("refused")
        if self.rng.random() < 0.5:
            self.absent_zones.discard(self.rng.choice(sorted(self.absent_zones)))
        else:
            self.absent_zones.clear()

    def opened(self, store: Store) -> None:
        """The store is open."""
        if len(self.unsure) >= self.copies_min or len(self.unsure) > 1:
            self.world.zone_failed = True

    def bring_back(self) -> None:
        """Whatever is missing or hangs is there again."""
        self.absent_zones.clear()
        self.world.failing_zones.clear()

    def epoch_changed(self, epoch: Epoch) -> None:
        """Zones that are out are behind."""
        out = {int(zone.path.removeprefix("/zone")) for zone in epoch.out}
        if out:
            self.whole = False
            self.unsure |= out
            self.met_any = True

    def recovered(self, store: Store) -> None:
        """Recovery has ended with every zone in service and nothing missing."""
        if self.absent_zones or store.epoch.out:
            return
        at_fault = {z for z, kind in self.plan.items() if kind == "lie"}
        self.unsure &= at_fault
        self.forgetful &= at_fault
        self.whole = not at_fault
        self.lied = bool(at_fault)
        for model in self.scenario.models.values():
            model.copies_least = model.copies

    # -- while clients are served ---------------------------------------------------------------------------------

    async def while_serving(self) -> None:
        """The faults that come under way, and their end."""
        store = self.scenario.store
        assert store is not None
        await asyncio.gather(*(self._under_way(store, z, kind) for z, kind in sorted(self.plan.items())))
        if self.several:
            if self.rng.random() < 0.6:
                await self._to_the_end(store)
            return
        for _ in range(0 if self.quiet or self.last else self.rng.choice((0, 1, 1, 2))):
            await asyncio.sleep(self.rng.random())
            if self.unsure or len(store.epoch.members) < 3 or store.epoch.out:
                return
            member = self.rng.choice(store.epoch.members)
            if sum(other.state == "in" for other in store.epoch.members if other is not member) < 2:
                continue
            self.met_any = self.world.zone_rots = True
            z = int(member.path.removeprefix("/zone"))
            kind = self.rng.choice(self.kinds)
            self.met(kind)
            self.unsure.add(z)
            await self._under_way(store, z, kind)
            await self._to_the_end(store)

    async def _to_the_end(self, store: Store) -> None:
        """Every zone comes back, and recovery ends, in this life."""
        await asyncio.sleep(self.rng.random())
        if self.absent_zones:
            self.met("back-while-open")
        self.bring_back()
        if self.rng.random() < 0.7 and not any(kind == "lie" for kind in self.plan.values()):
            await self.scenario.recovered(store)
            self.met("recovered")

    async def _under_way(self, store: Store, z: int, kind: str) -> None:
        rng, world = self.rng, self.world
        if kind == "eio":
            await asyncio.sleep(rng.random() * 0.3)
            world.failing_zones.add(z)
            await asyncio.sleep(rng.random() * 3)
            world.failing_zones.discard(z)
        elif kind == "hang":
            number = next((m.number for m in store.epoch.members if m.path == f"/zone{z}"), None)
            if number is None:
                return
            await asyncio.sleep(rng.random() * 0.3)
            executor = world.executor
            assert executor is not None
            executor.hang(number)
            await asyncio.sleep(rng.random() * rng.choice((1.0, 12.0, 12.0)))
            was_out = number not in store.env.in_service
            executor.release(number)
            if was_out:
                self.met("hung-and-out")

    def met(self, what: str) -> None:
        self.world.faults[f"zone-{what}"] += 1
        self.world.note(f"ZONES: {what}")
