"""README.md keeps up with the command line and the configuration."""

import argparse
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserver.access import ExportRules, Who
from nbdserver.cli import EXIT_CODES, EXIT_INTERRUPTED
from nbdserver.cli_arguments import Parser, build_parser
from nbdserver.cli_check import EXIT_CODES as CHECK_EXIT_CODES
from nbdserver.config import SERVER_BOUNDS, VdiConfig, load
from nbdserver.server import ServerSettings
from nbdserver.tls import TlsSettings
from objstore.volume.settings import MODES, StoreSettings

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLE = ROOT / "systemd" / "sheepfold.toml"


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser and those of all its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for command in action.choices.values():
                assert isinstance(command, Parser)
                yield from parsers(command)


ALL = list(parsers(build_parser()))
LEAVES = [parser.prog for parser in ALL if not any(isinstance(action.choices, dict) for action in parser._actions)]
OPTIONS = sorted({option for parser in ALL for action in parser._actions for option in action.option_strings} - {"-h"})


@pytest.mark.parametrize("command", LEAVES)
def test_every_command_is_described(command: str) -> None:
    assert f"| `{command}" in README


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_is_described(option: str) -> None:
    assert re.search(rf"`[^`\n]*(?<![\w-]){option}(?![\w-])", README)


@pytest.mark.parametrize("code", sorted({0, *EXIT_CODES.values(), *CHECK_EXIT_CODES.values(), EXIT_INTERRUPTED}))
def test_every_exit_code_is_described(code: int) -> None:
    assert re.search(rf"^\| {code} \| \w", README, re.MULTILINE)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_described(mode: str) -> None:
    assert re.search(rf"^\| `{mode}`", README, re.MULTILINE)


CONFIGURATION = [
    *(("[store]", field.name) for field in dataclasses.fields(StoreSettings)),
    *(("[server]", key) for key in SERVER_BOUNDS),
    *(("[tls]", field.name) for field in dataclasses.fields(TlsSettings)),
    *(("[access.NAME]", field.name) for field in dataclasses.fields(ExportRules)),
    *(("[vdi.NAME]", field.name) for field in dataclasses.fields(VdiConfig)),
]


@pytest.mark.parametrize(("table", "key"), CONFIGURATION)
def test_every_configuration_key_is_described(table: str, key: str) -> None:
    assert re.search(rf"^\| `{re.escape(table)}` [^|]*`{key}`", README, re.MULTILINE)


def test_the_example_configuration_is_valid_with_every_key_switched_on(tmp_path: Path) -> None:
    text = EXAMPLE.read_text()
    load(EXAMPLE)
    everything = tmp_path / "all.toml"
    everything.write_text(re.sub(r"^#(?!psk)(?=\w+ = )", "", text, flags=re.MULTILINE))  # psk is refused
    config = load(everything)
    assert config.default == "disk"
    assert config.store == StoreSettings()
    assert config.server == ServerSettings()
    rules = config.access.of("disk")
    assert dataclasses.replace(rules, see=(), read=(), write=()) == ExportRules()
    assert rules.write == [Who(certificate="web", address="10.0.0.0/8"), Who(uid=0)]
    config.access.check(tls=True, certificates=True)
    assert config.tls == TlsSettings("forced", Path("/etc/sheepfold/tls"))
    for _table, key in CONFIGURATION:
        assert re.search(rf"^#?{key} = ", text, re.MULTILINE), f"{key} is not in the example"
