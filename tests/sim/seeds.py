"""One seed: which kind of scenario it is, and its run."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

from tests.sim.knobs import DEFAULT, Knobs
from tests.sim.scenario import Outcome, Scenario, instrumented
from tests.sim.world import World
from tests.sim.zone_scenario import ZoneScenario


def run_seed(seed: int, *, trace: Callable[[str], None] | None = None, knobs: Knobs = DEFAULT) -> Outcome:
    """Run one seed; raises what it found."""
    if random.Random(seed * 17 + 1).random() < knobs.seeds_zones:
        zones = random.Random(seed).choice((3, 3, 4, 4, 5))
        world = World(seed, zones, spare=2, trace=trace)
        knobs = dataclasses.replace(
            knobs, eio=0.0, flips=0.0, seeds_tight=0.0, seeds_one_copy=0.0, seeds_zone_faults=0.0
        )
        with instrumented(world, random.Random(seed + 1)):
            return ZoneScenario(world, knobs, seed).run()
    zones = random.Random(seed).choice((2, 3, 3, 4))
    world = World(seed, zones, trace=trace)
    with instrumented(world, random.Random(seed + 1)):
        return Scenario(world, knobs, seed).run()
