"""Run a fuzzer: python -m tests.fuzz TARGET [--seconds N] [--seed N], or with atheris if that is installed.

Without atheris inputs are mutations of the seeds and of each other, in the order that --seed gives. An input that fails
is written to a file, named in the last line.
"""

import argparse
import importlib.util
import random
import sys
import time
from pathlib import Path

from tests.fuzz.targets import TARGETS, Target, mutated

POOL_INPUTS_MAX = 256


def run_mutations(name: str, target: Target, seeds: list[bytes], seconds: float, seed: int) -> int:
    """Mutate for a while; returns the exit code."""
    dice = random.Random(seed)
    pool = list(seeds)
    end = time.monotonic() + seconds
    count = 0
    while time.monotonic() < end:
        data = mutated(dice.choice(pool), dice)
        count += 1
        try:
            target(data)
        except BaseException:
            path = Path(f"fuzz-{name}-{seed}-{count}.bin")
            path.write_bytes(data)
            print(f"failed on input {count}; it is in {path}", file=sys.stderr)
            raise
        if len(pool) < POOL_INPUTS_MAX and dice.random() < 0.02:
            pool.append(data)
    print(f"{name}: {count} inputs, none failed")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    target, seeds = TARGETS[arguments.target]
    if importlib.util.find_spec("atheris") is None:
        return run_mutations(arguments.target, target, list(seeds), arguments.seconds, arguments.seed)
    import atheris

    atheris.instrument_all()
    atheris.Setup([sys.argv[0], f"-max_total_time={int(arguments.seconds)}"], target)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
