"""A bounded run of every fuzz target, the same inputs each time; `python -m tests.fuzz` runs longer."""

import random

import pytest

from tests.fuzz.targets import TARGETS, mutated

MUTATIONS = {
    "handshake": 1500,
    "transmission": 400,
    "dispatch": 120,
    "formats": 1500,
    "entries": 1500,
    "bodies": 1500,
    "texts": 1500,
    "config": 500,
    "stream": 1000,
}


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_mutations(name: str) -> None:
    target, seeds = TARGETS[name]
    dice = random.Random(20)
    for seed in seeds:
        target(seed)
    for number in range(MUTATIONS[name]):
        data = mutated(dice.choice(seeds), dice)
        try:
            target(data)
        except Exception as error:
            raise AssertionError(f"input {number}: {data.hex()}") from error


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_noise(name: str) -> None:
    target, _ = TARGETS[name]
    dice = random.Random(21)
    for _ in range(50):
        target(dice.randbytes(dice.randrange(200)))
