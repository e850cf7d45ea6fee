"""Deliberate bugs, each switched on for a few seeds: the simulation must catch every one of them.

Each replaces one rule of objstore by what somebody might have written instead; its function says what is broken.
README.md has the table of how many seeds show each.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final, NamedTuple, TextIO

from tests.sim.bugs_opening import OPENING
from tests.sim.bugs_snapshots import SNAPSHOTS
from tests.sim.bugs_writing import WRITING
from tests.sim.bugs_zones import ZONES
from tests.sim.knobs import DEFAULT, Knobs
from tests.sim.runner import run_one

BUGS: Final[dict[str, list[Callable[[], Any]]]] = {**WRITING, **OPENING, **SNAPSHOTS, **ZONES}
_USUAL: Final = dataclasses.replace(DEFAULT, seeds_zone_faults=0.0, seeds_zones=0.0)
"""A zone in trouble would hide what goes wrong in it, and keeps other faults away."""
_KILL_THEN_CUT: Final = dataclasses.replace(_USUAL, kills=0.9, cut_after_kill=0.9, eio=0.0, seeds_one_copy=1.0)
_ZONES: Final = dataclasses.replace(DEFAULT, seeds_zones=1.0)
_CHANGES: Final = dataclasses.replace(_USUAL, eio=0.0, seeds_changes=1.0)
KNOBS: Final = {
    "recovered-not-synced": _KILL_THEN_CUT,
    "seals-not-synced": _KILL_THEN_CUT,
    "head-names-unsure-checkpoint": dataclasses.replace(_KILL_THEN_CUT, crash_names="checkpoint/"),
    "garbage-before-head": dataclasses.replace(_USUAL, crash_phase="recovery", eio=0.0),
    "log-number-again": dataclasses.replace(_USUAL, slow_purges=1.0),
    "seal-before-body": dataclasses.replace(_USUAL, kills=0.1, eio=0.0, seeds_one_copy=1.0),
    "sync-error-forgotten": dataclasses.replace(_USUAL, kills=0.0, eio=1.0, eio_call="fdatasync", seeds_one_copy=1.0),
    "free-despite-readers": dataclasses.replace(_USUAL, slow_reads=1.0, seeds_recycled=1.0, flips=0.0),
    "read-not-verified": dataclasses.replace(_USUAL, flips=0.7),
    "snapshot-not-flushed": dataclasses.replace(_USUAL, crash_phase="snapshot", kills=0.0, eio=0.0),
    "shrunk-not-cleared": _CHANGES,
    "flattened-blindly": _CHANGES,
    "flattened-without-checkpoint": _CHANGES,
    "space-not-set-aside": dataclasses.replace(_USUAL, seeds_tight=1.0, eio=0.0),
}
KNOBS.update(dict.fromkeys(ZONES, _ZONES))
"""Scenarios that meet what a bug needs more often than the usual mix does."""
SEEDS_MAX: Final = 200
_MISFITS: Final = ("AttributeError", "NameError", "TypeError")
"""Not how a broken rule shows itself, but a switch that does not fit the code any more."""


class Caught(NamedTuple):
    """How a bug did. caught: of `seeds` seeds. seed, failure: the first that showed it, and how; -1 = none."""

    bug: str
    seeds: int
    caught: int
    seed: int
    failure: str


@contextmanager
def deliberate(bug: str) -> Iterator[None]:
    """objstore with one of BUGS in it."""
    with ExitStack() as stack:
        for patch in BUGS[bug]:
            stack.enter_context(patch())
        yield


def knobs_of(bug: str) -> Knobs:
    """The scenarios for it."""
    return KNOBS.get(bug, _USUAL)


def look_for(bug: str, seeds: int = SEEDS_MAX, *, all_seeds: bool = False) -> Caught:
    """Run seeds with the bug in this process, until one shows it or (all_seeds) all of them. One that fails without the
    bug too shows nothing. RuntimeError: the bug's switch does not fit the code any more."""
    caught, first, failure = 0, -1, ""
    for seed in range(seeds):
        with deliberate(bug):
            result = run_one(seed, knobs=knobs_of(bug))
        if result.failure.startswith(_MISFITS):
            raise RuntimeError(f"the switch of {bug} breaks by itself: {result.failure}")
        if not result.failure or run_one(seed, knobs=knobs_of(bug)).failure:
            continue
        caught += 1
        if first < 0:
            first, failure = seed, result.failure
        if not all_seeds:
            return Caught(bug, seed + 1, 1, first, failure)
    return Caught(bug, seeds, caught, first, failure)


def look_for_all(bugs: Iterable[str], jobs: int) -> dict[str, Caught]:
    """Until each has shown itself, in `jobs` processes."""
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        return {found.bug: found for found in pool.imap_unordered(look_for, bugs)}


def count_all(bugs: Iterable[str], jobs: int, seeds: int) -> dict[str, Caught]:
    """In how many of so many seeds each shows itself."""
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        calls = [pool.apply_async(look_for, (bug, seeds), {"all_seeds": True}) for bug in bugs]
        return {found.bug: found for found in (call.get() for call in calls)}


def report(found: dict[str, Caught], out: TextIO = sys.stdout) -> None:
    """A Markdown table: README.md has one."""
    print("| deliberate bug | seeds that show it | first | as |", file=out)
    print("| --- | --- | --- | --- |", file=out)
    for bug in BUGS:
        if bug in found:
            _, seeds, caught, seed, failure = found[bug]
            kind = failure.splitlines()[0][:60].replace("|", "/") if failure else "NOT CAUGHT"
            print(f"| {bug} | {caught} of {seeds} | {seed} | {kind} |", file=out)
