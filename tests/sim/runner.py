"""Runs many seeds in several processes and adds up where they crashed."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TextIO

from tests.sim.knobs import DEFAULT, Knobs
from tests.sim.seeds import run_seed
from tests.sim.world import CHANGE_PHASES, CRASH_CALLS, PHASES, ZONE_PHASES
from tests.sim.zone_faults import KINDS

FAULTS: Final = (
    "bad-copy-read",
    "checkpoint-rotten",
    "crash-kill",
    "crash-power",
    "connection-gone",
    "eio-fdatasync",
    "eio-fsync",
    "eio-pwritev",
    "flip-catalog",
    "flip-checkpoint",
    "flip-epoch",
    "flip-log",
    "nospace-open",
    "nospace-recovery",
    "nospace-write",
    "slow-reads",
    "stopping",
    *(f"zone-{kind}" for kind in KINDS),
    "zone-hang-ended",
    "zone-refused",
)
ZONE_FAULTS: Final = (
    *(f"change-{change}" for change in ("add", "copies", "drain", "remove", "replace", "weight")),
    *(f"subset-{end}" for end in ("opened", "refused", "unreadable", "vdi-refused")),
    "zone-back-while-open",
    "zone-change-cut",
    "zone-hung-and-out",
    "zone-recovered",
)
"""Those of zone_scenario.py."""
RARE_FAULTS: Final = ("zone-vdi-refused",)
"""Must be met in runs of SEEDS_FOR_RARE only. Disks that are refused come 300 times in 1,000 seeds where zones are left
out on purpose, but hardly ever in a life that goes on."""
SEEDS_FOR_ALL: Final = 500
SEEDS_FOR_RARE: Final = 5000
"""From so many seeds on every phase, every system call and every fault must have been met."""
FAILURES_SHOWN: Final = 5


class Result(NamedTuple):
    """One seed. failure: empty, or what went wrong."""

    seed: int
    digest: int
    crashes: Counter[tuple[str, str]]
    faults: Counter[str]
    failure: str


@dataclass
class Totals:
    """All seeds of a run."""

    seeds: int = 0
    knobs: Knobs = DEFAULT
    crashes: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    failures: list[Result] = field(default_factory=list)

    def add(self, result: Result) -> None:
        self.seeds += 1
        self.crashes += result.crashes
        self.faults += result.faults
        if result.failure:
            self.failures.append(result)

    def never_met(self) -> list[str]:
        """Crash points and faults that a run of this size must have met and did not."""
        phases = {phase for phase, _ in self.crashes}
        missing = [f"a crash during {phase}" for phase in PHASES if phase not in phases]
        if self.seeds >= SEEDS_FOR_ALL:
            calls = {call for _, call in self.crashes}
            missing += [f"a crash at {call}" for call in (*CRASH_CALLS, "step") if call not in calls]
            wanted = (*FAULTS, *ZONE_FAULTS) if self.knobs.seeds_zones else FAULTS
            if self.knobs.seeds_zones and self.seeds >= SEEDS_FOR_RARE:
                wanted = (*wanted, *RARE_FAULTS)
            missing += [f"the fault {fault}" for fault in wanted if not self.faults[fault]]
            if self.knobs.seeds_zones:
                missing += [f"a crash during {phase}" for phase in ZONE_PHASES if phase not in phases]
            if self.knobs.seeds_changes:
                missing += [f"a crash during {phase}" for phase in CHANGE_PHASES if phase not in phases]
                missing += [
                    f"a disk that was {change}" for change in ("shrunk", "flattened") if not self.faults[change]
                ]
        return missing

    def report(self, out: TextIO) -> None:
        """Counters as tables, then failures with the command that repeats each."""
        calls = ("step", *CRASH_CALLS)
        print(f"crash points, {self.seeds} seeds (a point counts for everything that was under way)", file=out)
        print(f"{'':16}" + "".join(f"{phase:>11}" for phase in (*PHASES, *CHANGE_PHASES, *ZONE_PHASES)), file=out)
        for call in calls:
            row = "".join(f"{self.crashes[phase, call]:>11}" for phase in (*PHASES, *CHANGE_PHASES, *ZONE_PHASES))
            print(f"{call:16}{row}", file=out)
        print("faults: " + ", ".join(f"{name} {count}" for name, count in sorted(self.faults.items())), file=out)
        for missing in self.never_met():
            print(f"NEVER MET: {missing}", file=out)
        for result in self.failures[:FAILURES_SHOWN]:
            print(
                f"\nseed {result.seed} FAILED; repeat: {command(result.seed, self.knobs)}\n{result.failure}", file=out
            )
        if len(self.failures) > FAILURES_SHOWN:
            print(f"\nfailed seeds: {[result.seed for result in self.failures]}", file=out)


def command(seed: int, knobs: Knobs = DEFAULT) -> str:
    """What to type to see one seed again."""
    words = [f"python -m tests.sim --start {seed} --seeds 1 --trace"]
    for name in (each.name for each in dataclasses.fields(Knobs)):
        value = getattr(knobs, name)
        if value != getattr(DEFAULT, name):
            words.append(f"--knob {name}={','.join(value) if isinstance(value, tuple) else value}")
    return " ".join(words)


def knob(text: str) -> tuple[str, float | str | tuple[str, ...]]:
    """(name, value) of NAME=VALUE. ValueError, AttributeError: there is no such knob, or not with such a value."""
    name, _, value = text.partition("=")
    usual = getattr(DEFAULT, name)
    if isinstance(usual, tuple):
        return name, tuple(value.split(","))
    return name, value if isinstance(usual, str) else float(value)


def run_one(seed: int, *, trace: Callable[[str], None] | None = None, knobs: Knobs = DEFAULT) -> Result:
    """One seed in this process; never raises what the seed found."""
    try:
        outcome = run_seed(seed, trace=trace, knobs=knobs)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - whatever a seed raises is its finding
        text = f"{type(error).__name__}: {error}"
        places = "".join(traceback.format_tb(error.__traceback__)[-3:])
        return Result(seed, 0, Counter(), Counter(), f"{text}\n{places}")
    return Result(seed, outcome.digest, outcome.crashes, outcome.faults, "")


def run_many(
    seeds: Iterable[int],
    jobs: int,
    *,
    knobs: Knobs = DEFAULT,
    progress: Callable[[Totals], None] | None = None,
) -> Totals:
    """All seeds, `jobs` at a time."""
    totals = Totals(knobs=knobs)
    if jobs <= 1:
        for seed in seeds:
            totals.add(run_one(seed, knobs=knobs))
            if progress is not None:
                progress(totals)
        return totals
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for result in pool.imap_unordered(functools.partial(run_one, knobs=knobs), seeds, chunksize=4):
            totals.add(result)
            if progress is not None:
                progress(totals)
    totals.failures.sort()
    return totals


def show_progress(totals: Totals) -> None:
    """A line that is written over, on a terminal."""
    if sys.stderr.isatty():
        print(f"\r{totals.seeds} seeds, {len(totals.failures)} failed ", end="", file=sys.stderr, flush=True)
