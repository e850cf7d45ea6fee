"""What an administrator does with the zones of a store while it is open, each change cut off anywhere.

A change is one epoch (replace: two), so after a crash the store shows the zones as they were before it or as they are
behind it; asking again for what is not there yet must do.
"""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

from objstore.errors import Busy, InvalidRequest, NoSpace, NotFound, Unavailable
from objstore.volume.store import Store
from tests.sim.model import Violation

if TYPE_CHECKING:
    from tests.sim.zone_scenario import ZoneScenario

View = frozenset[tuple[str, str, float]]
"""Zones in the store: path, state, weight."""
ZONES_MAX: Final = 48
"""Zones that were ever added; the format has room for 64."""
TRIES: Final = 60


def view_of(store: Store) -> View:
    """The zones as the epoch in force has them."""
    epoch = store.membership.epoch
    return frozenset((zone.path, zone.state, zone.weight) for zone in (*epoch.members, *epoch.out))


class ZoneLife:
    """The administrator of one seed. `views`: what the next opening may show; None: anything (nothing was made yet).

    again: what was cut off, to be asked for once more. leaving: zones that a replacement is to take away.
    """

    def __init__(self, scenario: ZoneScenario, rng: random.Random) -> None:
        self.scenario = scenario
        self.world = scenario.world
        self.rng = rng
        self.views: set[View] | None = None
        self.again: tuple[str, str, str] | None = None
        self.leaving: set[str] = set()

    def opened(self, store: Store) -> None:
        """See what a crash made of the change that was under way."""
        shown = view_of(store)
        if self.views is not None and self._staying(shown) not in map(self._staying, self.views):
            raise Violation(f"the store has the zones {sorted(shown)}, not {[sorted(view) for view in self.views]}")
        if self.again is not None:
            self.world.faults["zone-change-cut"] += 1
        self.views = {shown}
        self.leaving.clear()

    def _staying(self, view: View) -> View:
        """Without the zones that a replacement takes away when they are empty."""
        return frozenset(zone for zone in view if zone[0] not in self.leaving)

    async def run(self, store: Store) -> None:
        """Some changes, one after the other."""
        rng = self.rng
        if self.again is not None and rng.random() < 0.7:
            action, path, other = self.again
            await self._do(store, action, path, other)
        self.again = None
        for _ in range(rng.choice((0, 1, 2, 3))):
            await asyncio.sleep(rng.random() * rng.choice((0.05, 0.5)))
            if len(store.env.zones) >= ZONES_MAX:
                return
            await self._any(store)

    async def finish(self, store: Store) -> None:
        """Let every zone go that is draining."""
        for member in list(store.epoch.members):
            if member.state == "draining":
                await self._remove(store, member.path)

    async def _any(self, store: Store) -> None:
        rng = self.rng
        members = store.epoch.members
        free = [z for z in range(len(self.world.zones)) if f"/zone{z}" not in {path for path, _, _ in view_of(store)}]
        draining = [m.path for m in members if m.state == "draining"]
        staying = [m.path for m in members if m.state == "in"]
        choices = ["weight", "copies", "copies"]
        if free:
            choices += ["add", "add", "replace"]
        if len(staying) > 1:
            choices += ["drain", "drain"]
        if draining:
            choices += ["remove"] * 4
        action = rng.choice(choices)
        if action == "copies":
            await self._set_copies(store)
        elif action == "remove":
            await self._remove(store, rng.choice(draining))
        else:
            path = f"/zone{rng.choice(free)}" if action == "add" else rng.choice(staying)
            other = f"/zone{rng.choice(free)}" if action == "replace" else ""
            await self._do(store, action, path, other)

    async def _do(self, store: Store, action: str, path: str, other: str = "") -> None:
        """One change. Asked for again it may find that there is nothing left to do."""
        rng = self.rng
        before = {zone: (state, weight) for zone, state, weight in view_of(store)}
        weight = rng.choice((0.5, 1.0, 3.0))
        new = other or path
        if action in ("add", "replace"):
            if new in before or (action == "replace" and path not in before):
                return
            if rng.random() < 0.7:
                self.world.zones[int(new.removeprefix("/zone"))].wipe(new)
            added = {**before, new: ("in", weight if action == "add" else before[path][1])}
            if action == "add":
                await self._asked(
                    store, (action, path, ""), [added], lambda: store.change_zones("add", new, weight=weight)
                )
                return
            out = path not in {m.path for m in store.epoch.members}
            views = [added, {**added, path: (before[path][0] if out else "draining", before[path][1])}]
            # It goes when it is empty, which may be soon.
            views.append({zone: shown for zone, shown in added.items() if zone != path})
            self.leaving.add(path)
            await self._asked(
                store, (action, path, other), views, lambda: store.change_zones("replace", path, path=other)
            )
        elif path in before and action == "drain":
            after = {**before, path: ("draining", before[path][1])}
            await self._asked(store, (action, path, ""), [after], lambda: store.change_zones("drain", path))
        elif path in before and action == "weight":
            after = {**before, path: (before[path][0], weight)}
            change = functools.partial(store.change_zones, "set-weight", path, weight=weight)
            await self._asked(store, (action, path, ""), [after], change)

    async def _asked(
        self,
        store: Store,
        change: tuple[str, str, str],
        views: list[dict[str, tuple[str, float]]],
        call: Callable[[], Awaitable[object]],
    ) -> None:
        """Ask for it; until it is done the next opening may show any of these."""
        world = self.world
        known = [frozenset((path, *shown) for path, shown in view.items()) for view in views]
        self.views = {*(self.views or ()), view_of(store), *known}
        self.again = change
        world.note(f"ADMINISTRATOR: {' '.join(change)}")
        world.active["zones"] += 1
        done = False
        try:
            await call()
            done = True
        except InvalidRequest as error:
            world.note(f"refused: {error}")
            self._judge(store, change, error)
        except (Unavailable, NotFound, Busy) as error:
            if not self.scenario.troubles.unsure:
                raise
            world.note(f"not now: {error}")
        world.active["zones"] -= 1
        world.faults[f"change-{change[0]}"] += done
        shown = view_of(store)
        if done and self._staying(shown) not in map(self._staying, known):
            raise Violation(f"{change} was done, and the zones are {sorted(shown)}, not {known}")
        self.again = None
        if change[0] != "replace":
            self.views = {shown, *(view for view in self.views if done is False)}

    def _judge(self, store: Store, change: tuple[str, str, str], error: InvalidRequest) -> None:
        """Only what would leave too few zones may be refused."""
        left = sum(m.state == "in" and m.path != change[1] for m in store.epoch.members)
        most = max((vdi.copies for vdi in store.catalog.state.vdis.values()), default=1)
        out = any(zone.path == change[1] for zone in store.epoch.out)
        if change[0] not in ("drain", "replace") or (left >= most and not out):
            raise Violation(f"{change} was refused: {error}") from error

    async def _remove(self, store: Store, path: str) -> None:
        """When nothing is left on it, a zone can go."""
        world = self.world
        before = {zone: (state, weight) for zone, state, weight in view_of(store)}
        for attempt in range(TRIES):
            if path not in {zone for zone, _, _ in view_of(store)}:
                return  # a replacement has taken it away
            await store.wait_for_recovery()
            before = {zone: (state, weight) for zone, state, weight in view_of(store)}
            after = frozenset((zone, *shown) for zone, shown in before.items() if zone != path)
            self.views = {*(self.views or ()), view_of(store), after}
            self.again = ("remove", path, "")
            world.note(f"ADMINISTRATOR: remove {path}")
            world.active["zones"] += 1
            try:
                await store.change_zones("remove", path)
            except (Busy, InvalidRequest, NotFound, Unavailable) as error:
                world.active["zones"] -= 1
                world.note(f"{path} stays: {error}")
                if isinstance(error, NotFound):
                    return
                if attempt == TRIES - 1:
                    status = store.recovery.status()
                    raise Violation(f"{path} can't be emptied: {error}; {status}") from error
                await asyncio.sleep(0.5)
                continue
            world.active["zones"] -= 1
            world.faults["change-remove"] += 1
            self.views, self.again = {view_of(store)}, None
            self._check_empty(path)
            return

    def _check_empty(self, path: str) -> None:
        left = [
            name
            for name in self.world.files(int(path.removeprefix("/zone")))
            if name.startswith(("log/", "checkpoint/")) and "/000000/" not in name
        ]
        if left:
            raise Violation(f"{path} was removed with {left[:5]} on it")

    async def _set_copies(self, store: Store) -> None:
        """More or fewer copies of one VDI."""
        scenario, world, rng = self.scenario, self.world, self.rng
        names = [name for name in store.names() if name.startswith("disk")]
        zones = len(store.membership.placeable())
        if not names or zones < scenario.copies_min:
            return
        model = scenario.models[rng.choice(names)]
        copies = rng.randrange(scenario.copies_min, zones + 1)
        model.copies_next = copies
        model.copies_least = min(model.copies_least, copies)
        world.note(f"ADMINISTRATOR: {model.name} gets {copies} copies")
        world.active["zones"] += 1
        try:
            await store.set_copies(model.name, copies)
        except (Unavailable, NoSpace, InvalidRequest) as error:
            world.active["zones"] -= 1
            if not scenario.troubles.unsure and len(store.membership.placeable()) >= copies:
                raise
            world.note(f"not now: {error}")
            return
        world.active["zones"] -= 1
        model.copies, model.copies_next = copies, 0
        world.faults["change-copies"] += 1
