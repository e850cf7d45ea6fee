"""`python -m tests.sim`: run seeds of the crash simulation, or one of them with its whole story."""

import argparse
import os
import sys
import time

from tests.sim.runner import run_many, run_one, show_progress


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many (default 100)")
    parser.add_argument("--start", type=int, default=0, help="the first one (default 0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--trace", action="store_true", help="print every event and system call")
    options = parser.parse_args()
    seeds = range(options.start, options.start + options.seeds)
    if options.trace:
        failed = 0
        for seed in seeds:
            result = run_one(seed, trace=print)
            print(f"seed {seed} digest {result.digest:08x} {result.failure or 'ok'}")
            failed += bool(result.failure)
        return 1 if failed else 0
    started = time.monotonic()
    totals = run_many(seeds, options.jobs, progress=show_progress)
    totals.report(sys.stdout)
    seconds = time.monotonic() - started
    rate = totals.seeds / seconds
    print(f"\n{totals.seeds} seeds, {len(totals.failures)} failed, {seconds:.1f} s, {rate:.1f} seeds/s")
    return 1 if totals.failures or totals.never_met() else 0


if __name__ == "__main__":
    sys.exit(main())
