"""SCENARIOS.md names only tests that exist, and every test that carries a story's number."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
TEXT = (TESTS / "SCENARIOS.md").read_text()
REFERENCES = sorted(set(re.findall(r"`([\w/]+\.py)::(test_\w+)`", TEXT)))
ROWS = dict(re.findall(r"^\| (\d+) \| (.*) \|$", TEXT, re.MULTILINE))
STORIES = {*range(1, 9), 11, *range(12, 43), 44, 45, 49, 50, 51, 52, 53, 54, 55, 56, 57, 59}
"""Those on basic I/O, zeros, sizes, snapshots, attributes, crash, degraded state, recovery, repair and full disks."""


def test_every_story_has_one_row_and_a_test_or_a_reason() -> None:
    assert {int(number) for number in ROWS} == STORIES
    assert len(ROWS) == len(re.findall(r"^\| \d+ \|", TEXT, re.MULTILINE))
    for number, row in ROWS.items():
        assert "::test_" in row or "| later: " in row, number


def test_every_reference_is_understood() -> None:
    assert len(REFERENCES) == len(set(re.findall(r"`([^`]*::[^`]*)`", TEXT)))


@pytest.mark.parametrize("file", sorted({file for file, _ in REFERENCES}))
def test_named_tests_exist(file: str) -> None:
    source = (TESTS / file).read_text()
    missing = [name for where, name in REFERENCES if where == file and f"def {name}(" not in source]
    assert missing == []


def test_tests_with_a_number_are_named_in_their_row() -> None:
    for path in sorted(TESTS.rglob("test_*.py")):
        for name, number in re.findall(r"def (test_scenario_(\d+)_\w+)", path.read_text()):
            assert f"{path.relative_to(TESTS)}::{name}`" in ROWS[number]
