"""What holds for every test: uvloop as event loop, quiet logs, no task or socket left behind.

A log record of WARNING or above fails the test unless it takes `expected_warnings` and says what it expects. Tests
that could not run for want of a program are listed at the end of the run.
"""

import asyncio
import logging
import os
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import pytest
import uvloop
from hypothesis import HealthCheck, settings

from tests.support.clients import missing

# How long an example takes says something about the machine, and nothing about the code.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, object]:
    return {"uvloop": uvloop.new_event_loop}


@dataclass
class ExpectedWarnings:
    """Patterns of log messages that this test provokes on purpose."""

    patterns: list[str] = field(default_factory=list)

    def allow(self, pattern: str) -> None:
        """pattern: a regular expression, searched for in the whole message."""
        self.patterns.append(pattern)

    def covers(self, message: str) -> bool:
        return any(re.search(pattern, message) for pattern in self.patterns)


@pytest.fixture
def expected_warnings() -> ExpectedWarnings:
    return ExpectedWarnings()


class _WarningTrap(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture(autouse=True)
def _quiet_log(expected_warnings: ExpectedWarnings) -> Iterator[None]:
    trap = _WarningTrap()
    root = logging.getLogger()
    root.addHandler(trap)
    yield
    root.removeHandler(trap)
    formatter = logging.Formatter("%(levelname)s %(name)s: %(message)s")
    unexpected = [
        formatter.format(record) for record in trap.records if not expected_warnings.covers(record.getMessage())
    ]
    assert not unexpected, "unexpected log records:\n" + "\n".join(unexpected)


def _open_sockets() -> set[str]:
    """The sockets this process holds, as the kernel names them."""
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
        except FileNotFoundError:
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found


@pytest.fixture
async def _no_task_left() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    own = asyncio.current_task()
    left = [task for task in asyncio.all_tasks() - before if task is not own and not task.done()]
    assert not left, f"tasks left behind: {left}"


@pytest.fixture(autouse=True)
def _clean_end(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test leaves its event loop without tasks, and the process without new sockets.

    Sockets are counted outside of the loop's runs: uvloop makes a pair of its own for each of them.
    """
    before = _open_sockets()
    if request.node.get_closest_marker("asyncio") is not None:
        request.getfixturevalue("_no_task_left")
    yield
    left = _open_sockets() - before
    assert not left, f"sockets left open: {sorted(left)}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if missing.reasons:
        terminalreporter.section("did not run")
        for reason, tests in sorted(missing.reasons.items()):
            terminalreporter.write_line(f"{len(tests)} tests: {reason}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--volume-kind",
        action="append",
        help="what the specification's tests run over: memory (default), or a foreign server: nbdkit, qemu-nbd",
    )
