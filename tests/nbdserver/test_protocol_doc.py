"""PROTOCOL.md names every number of the protocol, and only tests that exist."""

import re
from enum import Enum
from pathlib import Path

import pytest

from nbdserver.wire import constants

TESTS = Path(__file__).parents[1]
TEXT = (TESTS.parent / "nbdserver" / "PROTOCOL.md").read_text()
REFERENCES = sorted(set(re.findall(r"`([a-z_]+/test_[a-z_]+\.py)::(test_\w+)`", TEXT)))
ENUMS: list[type[Enum]] = [
    constants.HandshakeFlag,
    constants.ClientFlag,
    constants.TransmissionFlag,
    constants.Option,
    constants.OptionReply,
    constants.Info,
    constants.Command,
    constants.CommandFlag,
    constants.Chunk,
    constants.ErrorValue,
]


def test_there_are_references() -> None:
    assert len(REFERENCES) > 50
    assert len(REFERENCES) == len(set(re.findall(r"`([^`]*::[^`]*)`", TEXT)))


@pytest.mark.parametrize("file", sorted({file for file, _ in REFERENCES}))
def test_named_tests_exist(file: str) -> None:
    source = (TESTS / file).read_text()
    missing = [name for where, name in REFERENCES if where == file and f"def {name}(" not in source]
    assert missing == []


@pytest.mark.parametrize("numbers", ENUMS)
def test_every_number_is_named(numbers: type[Enum]) -> None:
    missing = [name for name in numbers.__members__ if not re.search(rf"\b{name}\b", TEXT)]
    assert missing == []
