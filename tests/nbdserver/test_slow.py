"""The log of slow requests."""

from pathlib import Path

import pytest

from nbdserver.slow import Took
from objstore.stages import stage
from tests.conftest import ExpectedWarnings
from tests.nbdserver.volumes import TestVolume
from tests.support.our_server import OurServed, serve_volume

BLOCK = 4096
ALWAYS = 1e-9


class StagedVolume(TestVolume):
    """Says what its requests wait for."""

    async def _pass(self, call: str) -> None:
        with stage("sync"):
            await super()._pass(call)


def counted(served: OurServed) -> int:
    return served.server.network().counts.slow_requests


async def test_slow_requests_are_logged_with_where_their_time_went(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings.allow("slow request")
    volume = StagedVolume()
    volume.slow = True
    async with serve_volume(volume, tmp_path, slow_request_seconds=ALWAYS) as served, served.attached() as client:
        for _ in range(3):
            await client.write(8192, b"x" * BLOCK)
        await client.read(0, BLOCK)
        await client.flush()
        assert counted(served) == 5
        lines = [line for line in caplog.messages if line.startswith("slow request")]
        assert [line.split()[2:4] for line in lines] == [
            ["export=disk", "command=write"],
            ["export=disk", "command=read"],
            ["export=disk", "command=flush"],
        ]
        assert "offset=8192 length=4096 peer=unix:" in lines[0]


async def test_what_takes_no_longer_than_is_said_is_not_logged(tmp_path: Path) -> None:
    volume = StagedVolume()
    volume.slow = True
    for limit in (0.0, 600.0):
        async with serve_volume(volume, tmp_path, slow_request_seconds=limit) as served, served.attached() as client:
            await client.write(0, b"x" * BLOCK)
            await client.flush()
            assert counted(served) == 0


def test_the_longest_stage_comes_first() -> None:
    assert str(Took(3.0, {"turn": 0.5, "sync": 2.25, "map": 0.0001})) == "sync 2.250 s, turn 0.500 s, else 0.250 s"
