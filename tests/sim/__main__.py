"""`python -m tests.sim`: run seeds of the crash simulation, or one of them with its whole story.

With --bugs: run the seeds with each deliberate bug instead and print in how many of them it shows.
"""

import argparse
import dataclasses
import os
import sys
import time
from contextlib import nullcontext
from typing import Any

from tests.sim.bugs import BUGS, count_all, deliberate, knobs_of, report
from tests.sim.knobs import DEFAULT
from tests.sim.runner import knob, run_many, run_one, show_progress


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many (default 100)")
    parser.add_argument("--start", type=int, default=0, help="the first one (default 0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--trace", action="store_true", help="print every event and system call")
    parser.add_argument("--bugs", nargs="*", metavar="BUG", help="deliberate bugs (none named: all of them)")
    parser.add_argument("--knob", action="append", default=[], metavar="NAME=VALUE", help="see knobs.py")
    parser.add_argument("--zone-kinds", metavar="KIND,...", help="what happens to zones, see zone_faults.py")
    options = parser.parse_args()
    values: dict[str, Any] = dict(map(knob, options.knob))
    knobs = dataclasses.replace(DEFAULT, **values)
    if options.zone_kinds:
        knobs = dataclasses.replace(knobs, seeds_zone_faults=1.0, zone_kinds=tuple(options.zone_kinds.split(",")))
    seeds = range(options.start, options.start + options.seeds)
    if options.trace:
        bug = options.bugs[0] if options.bugs else ""
        failed = 0
        with deliberate(bug) if bug else nullcontext():
            for seed in seeds:
                result = run_one(seed, trace=print, knobs=knobs_of(bug) if bug else knobs)
                print(f"seed {seed} digest {result.digest:08x} {result.failure or 'ok'}")
                failed += bool(result.failure)
        return 1 if failed else 0
    started = time.monotonic()
    if options.bugs is not None:
        found = count_all(options.bugs or BUGS, options.jobs, options.seeds)
        report(found)
        print(f"\n{len(found)} bugs, {time.monotonic() - started:.1f} s")
        return 1 if any(not caught.caught for caught in found.values()) else 0
    totals = run_many(seeds, options.jobs, knobs=knobs, progress=show_progress)
    totals.report(sys.stdout)
    seconds = time.monotonic() - started
    rate = totals.seeds / seconds
    print(f"\n{totals.seeds} seeds, {len(totals.failures)} failed, {seconds:.1f} s, {rate:.1f} seeds/s")
    return 1 if totals.failures or totals.never_met() else 0


if __name__ == "__main__":
    sys.exit(main())
