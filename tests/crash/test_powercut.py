"""Power cuts of the real server: three zones on a disk that forgets what was not synced.

Each life of the server ends when the disk has let a random number of changes through: while it opens the store, or
under load. What it shows in its next life must be a legal cut of what was written (`tests.support.oracle`).
"""

import asyncio
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.load import check_image, write_until_gone
from tests.crash.server import RealServer, ServerEnded
from tests.support.channel import Disconnected
from tests.support.clients import unavailable
from tests.support.oracle import Oracle
from tests.support.powercut_control import PowerCutDisk, why_not
from tests.support.powercut_disk import Cut

SIZE_BYTES = 32 << 20
CUTS_UNDER_LOAD_PER_SEED = 10
SEEDS = range(5)
CHANGES_MAX = (100, 1000, 3000)
"""Upper ends of the number of changes before a cut: an opening store makes a hundred or two, the rest is load."""


@pytest.fixture
def disk() -> Iterator[PowerCutDisk]:
    reason = why_not()
    if reason is not None:
        unavailable(reason)
    with tempfile.TemporaryDirectory(prefix="powercut-") as directory:
        powercut = PowerCutDisk(Path(directory))
        try:
            yield powercut
        finally:
            powercut.close()


async def life(server: RealServer, oracle: Oracle, rng: random.Random, under_load: asyncio.Event) -> None:
    """One life of the server, which somebody else ends; what it shows first is held against the life before."""
    await server.start()
    await check_image(server.address, "disk", oracle)
    under_load.set()
    await write_until_gone(server.address, "disk", oracle, rng, connections=2)


async def live_until_cut(
    server: RealServer, disk: PowerCutDisk, oracle: Oracle, rng: random.Random
) -> tuple[bool, dict[str, int]]:
    """Let the server live until the power fails; whether that came under load, and what it met."""
    changes = rng.randint(1, rng.choice(CHANGES_MAX))
    under_load = asyncio.Event()
    freeze = asyncio.create_task(asyncio.to_thread(disk.freeze, after_changes=changes))
    living = asyncio.create_task(life(server, oracle, rng, under_load))
    try:
        await asyncio.wait({freeze, living}, return_when=asyncio.FIRST_COMPLETED)
        if not freeze.done():
            words = f"before the power failed; disk: {disk.stat()}; the server's log: {server.last_words()}"
            raise AssertionError(words) from living.exception()
        server.kill()
        report = await asyncio.to_thread(disk.cut, rng.choice(list(Cut)), rng.getrandbits(32))
        await server.ended()
        try:
            await living
        except (ServerEnded, Disconnected, ConnectionError):
            assert not under_load.is_set(), "the cut came while the store opened or the image was read"
        return under_load.is_set(), report
    finally:
        living.cancel()
        if not freeze.done():
            # Held requests must be answered before a process in them can end.
            await asyncio.to_thread(disk.freeze)
            await asyncio.to_thread(disk.cut, Cut.DROP, 0)
        await asyncio.gather(freeze, living, return_exceptions=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
async def test_nothing_flushed_is_lost_by_power_cuts(disk: PowerCutDisk, seed: int) -> None:
    rng = random.Random(seed)
    zones = [disk.root / name for name in ("a", "b", "c")]
    for zone in zones:
        zone.mkdir()
    make_durable(disk.root)
    oracle = Oracle(SIZE_BYTES)
    with tempfile.TemporaryDirectory(prefix="crash-") as sockets:
        server = RealServer(Path(sockets), zones, [f"disk:{SIZE_BYTES}"])
        try:
            cuts_under_load = lost = 0
            while cuts_under_load < CUTS_UNDER_LOAD_PER_SEED:
                under_load, report = await live_until_cut(server, disk, oracle, rng)
                await server.check_zones()
                cuts_under_load += under_load
                lost += report["pages_lost"] + report["names_lost"] + report["pages_torn"]
            await server.start()
            await check_image(server.address, "disk", oracle)
            await server.stop()
            await server.check_zones()
        finally:
            await server.close()
    assert lost > 0, "no cut found anything unsynced: this tested nothing"


def make_durable(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
