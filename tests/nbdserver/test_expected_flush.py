"""A flush that a client's rhythm promises is begun before it comes; other patterns pay for none of it."""

import pytest

from nbdserver.dispatch import RHYTHM_MIN
from nbdserver.wire.constants import Command
from tests.nbdserver.test_dispatch import Harness, ask, write
from tests.nbdserver.volumes import TestVolume


class Expecting(TestVolume):
    """Notes what was asked of it. `answered`: whether the reply to the write had left when a flush was expected."""

    def __init__(self) -> None:
        super().__init__()
        self.harness: Harness | None = None
        self.events: list[str] = []
        self.answered: list[bool] = []

    def write_now(self, offset_bytes: int, data: memoryview) -> bool:
        self.events.append("write")
        return super().write_now(offset_bytes, data)

    def sync_soon(self) -> None:
        assert self.harness is not None
        self.events.append("sync")
        self.answered.append(bool(self.harness.sent))

    def flush_state(self) -> int:
        self.events.append("flush")
        return 0


@pytest.fixture
async def volume() -> Expecting:
    made = Expecting()
    made.harness = Harness(made)
    return made


async def play(volume: Expecting, pattern: str) -> list[str]:
    """Batches separated by blanks: w = write, f = flush, r = read. The events that they cause."""
    harness = volume.harness
    assert harness is not None
    volume.events.clear()
    for batch in pattern.split():
        requests = []
        for cookie, letter in enumerate(batch):
            if letter == "w":
                requests.append(write(harness, 0, b"x" * 4096, cookie=cookie))
            else:
                command, length = (Command.FLUSH, 0) if letter == "f" else (Command.READ, 4096)
                requests.append(ask(command, length=length, cookie=cookie))
        await harness.run(*requests)
    return list(volume.events)


RHYTHM = "w f " * RHYTHM_MIN


async def test_who_writes_and_flushes_in_turns_is_expected_to_go_on(volume: Expecting) -> None:
    assert "sync" not in await play(volume, RHYTHM)
    assert await play(volume, "w f w f") == ["write", "sync", "flush"] * 2
    assert volume.answered == [True, True], "the write is answered first"


@pytest.mark.parametrize("pattern", ["w w w w w w w w", "w", "ww f ww f ww f", "w w f w w f w f w f w"])
async def test_one_sync_is_for_nothing_when_the_rhythm_ends(volume: Expecting, pattern: str) -> None:
    await play(volume, RHYTHM)
    assert (await play(volume, pattern)).count("sync") <= 1
    assert (await play(volume, "w w w f f w f w f w")).count("sync") == 0


@pytest.mark.parametrize("pattern", ["w", "w r f", "f", "ww f", "w w f", "r", "wwww wwff"])
async def test_other_patterns_cause_none(volume: Expecting, pattern: str) -> None:
    assert "sync" not in await play(volume, f"{pattern} " * 20)


async def test_a_pattern_that_comes_back_is_found_again(volume: Expecting) -> None:
    await play(volume, RHYTHM + "w w w w w f " + RHYTHM)
    assert await play(volume, "w f") == ["write", "sync", "flush"]
