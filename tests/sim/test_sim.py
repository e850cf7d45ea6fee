"""The crash simulation as tests: many seeds without a violation, the same seed twice, every deliberate bug caught.

SIM_SEEDS sets how many seeds; SIM_START the first one.
"""

import dataclasses
import os
import subprocess
import sys

import pytest

from tests.sim.bugs import BUGS, Caught, look_for_all, report
from tests.sim.knobs import DEFAULT
from tests.sim.runner import Result, command, knob, run_many, run_one

SEEDS_IN_CI = 1000
SEEDS_HERE = 100


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    """No seed finds a violation, and together they crash in every phase."""
    seeds = int(os.environ.get("SIM_SEEDS") or (SEEDS_IN_CI if os.environ.get("CI") else SEEDS_HERE))
    start = int(os.environ.get("SIM_START") or 0)
    totals = run_many(range(start, start + seeds), os.cpu_count() or 1)
    with capsys.disabled():
        print()
        totals.report(sys.stdout)
    assert not totals.failures, "\n".join(f"{command(result.seed)}\n{result.failure}" for result in totals.failures)
    assert not totals.never_met()


@pytest.fixture(scope="module")
def caught() -> dict[str, Caught]:
    return look_for_all(BUGS, os.cpu_count() or 1)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_deliberate_bugs_are_reported(caught: dict[str, Caught], capsys: pytest.CaptureFixture[str]) -> None:
    """All of them are looked for here, in several processes."""
    with capsys.disabled():
        print()
        report(caught)
    assert caught.keys() == BUGS.keys()


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("bug", BUGS)
def test_deliberate_bug_is_caught(bug: str, caught: dict[str, Caught]) -> None:
    assert caught[bug].caught, f"{caught[bug].seeds} seeds with {bug}, and none failed"


def _digest(seed: int, hash_seed: str) -> str:
    code = f"from tests.sim.runner import run_one; r = run_one({seed}); print(r.failure or f'{{r.digest:08x}}')"
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("seed", [3, 4])
def test_one_seed_one_schedule(seed: int) -> None:
    """Also in processes that hash strings differently."""
    assert _digest(seed, "1") == _digest(seed, "2")


def test_the_command_that_repeats_a_seed_names_its_knobs() -> None:
    knobs = dataclasses.replace(DEFAULT, flips=0.5, crash_phase="recovery", zone_kinds=("eio", "lie"))
    words = command(7, knobs).split()
    given = dict(knob(word) for word in words if "=" in word)
    assert dataclasses.replace(DEFAULT, **given) == knobs  # type: ignore[arg-type]
    assert command(7) == "python -m tests.sim --start 7 --seeds 1 --trace"


def test_few_seeds() -> None:
    """A handful with every run of the tests; the rest are `slow`."""
    failures: list[Result] = [result for seed in range(6) if (result := run_one(seed)).failure]
    assert not failures, "\n".join(f"{command(result.seed)}\n{result.failure}" for result in failures)
