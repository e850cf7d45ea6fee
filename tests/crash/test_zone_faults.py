"""One of three zones of the real server fails or hangs under load: clients see a pause and no error, and lose nothing.

Each zone is a file system of its own. Afterwards the fault is gone, the server starts again with all three zones, one
of them with an old state, and must show everything.
"""

import asyncio
import errno
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from objstore.log.lane import FULL_RETRY_SECONDS
from objstore.volume.directories import lock_note
from tests.crash.load import check_image, write_until_gone
from tests.crash.server import RealServer
from tests.support.clients import find, run, unavailable
from tests.support.nbd_client import attached
from tests.support.oracle import Oracle
from tests.support.powercut_control import NAMES, SYNCS, WRITES, PowerCutDisk, why_not
from tests.support.serving import eventually

SIZE_BYTES = 32 << 20
DEADLINE_SECONDS = 1.0
REQUESTS_BEFORE, REQUESTS_AFTER = 200, 2000
"""Flushed writes of one client before the fault, and behind it: enough to fill several segments."""
FIO = (
    "--rw=randwrite",
    "--verify_state_save=0",
    "--bs=4k-64k",
    "--iodepth=8",
    "--fsync=16",
    "--verify=crc32c",
    "--size=24m",
    "--rate=4m",
)
CONFIG = f"""
[store]
zone_deadline_seconds = {DEADLINE_SECONDS}
segment_bytes = "1M"
"""


@pytest.fixture
def disks() -> Iterator[list[PowerCutDisk]]:
    reason = why_not()
    if reason is not None:
        unavailable(reason)
    with ExitStack() as stack:
        mounted = []
        for name in ("a", "b", "c"):
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"zone-{name}-")))
            mounted.append(PowerCutDisk(directory))
            stack.callback(mounted[-1].close)
            (mounted[-1].root / "zone").mkdir()
        yield mounted


async def flushed_writes(server: RealServer, count: int, reached: asyncio.Event | None = None) -> float:
    """One write and one flush at a time; the longest that one of them took, in seconds. An error fails the test."""
    longest = 0.0
    async with attached(server.address, "pause") as client:
        for number in range(count):
            if number == REQUESTS_BEFORE and reached is not None:
                reached.set()
            began = time.monotonic()
            await client.write(number % 64 * 4096, bytes([number % 251]) * 4096)
            await client.flush()
            longest = max(longest, time.monotonic() - began)
    return longest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operations", "number"),
    [
        (WRITES, errno.EIO),
        (SYNCS, errno.EIO),
        (WRITES, errno.EROFS),
        (WRITES, 0),
        (SYNCS, 0),
        ((*WRITES, *SYNCS, *NAMES, "read"), 0),
    ],
    ids=["writes-fail", "syncs-fail", "read-only", "writes-hang", "syncs-hang", "all-hangs"],
)
async def test_a_zone_fails_under_load(
    disks: list[PowerCutDisk], operations: Sequence[str], number: int, record_property: Callable[[str, object], None]
) -> None:
    find("fio")
    oracle = Oracle(SIZE_BYTES)
    rng = random.Random(number + len(operations))
    with tempfile.TemporaryDirectory(prefix="crash-") as sockets:
        config = Path(sockets) / "config"
        config.write_text(CONFIG)
        zones = [disk.root / "zone" for disk in disks]
        vdis = [f"{name}:{SIZE_BYTES}" for name in ("oracle", "fio", "pause")]
        server = RealServer(Path(sockets), zones, vdis, config=config)
        try:
            await server.start()
            reached = asyncio.Event()
            fio = ["fio", "--name=faults", "--ioengine=nbd", f"--uri={server.uri('fio')}", *FIO]
            load = asyncio.create_task(write_until_gone(server.address, "oracle", oracle, rng, connections=2))
            pause = asyncio.create_task(flushed_writes(server, REQUESTS_BEFORE + REQUESTS_AFTER, reached))
            verify = asyncio.create_task(run(*fio))
            await reached.wait()
            if number:
                await asyncio.to_thread(disks[1].fault, "zone", operations, number)
            else:
                await asyncio.to_thread(disks[1].hang, "zone", operations)
            record_property("pause_seconds", seconds := await pause)
            print(f"longest write + flush: {seconds:.2f} s")
            await verify
            assert (await server.status()).store.health == "degraded"
            stopping = asyncio.create_task(server.stop())
            await load
            # The store is closed although a call hangs; the kernel lets the process go when that has returned.
            await eventually(lambda: lock_note(zones[0]) is None)
            await asyncio.to_thread(disks[1].clear)
            await stopping
            await server.check_zones(degraded=True)
            await server.start()
            await check_image(server.address, "oracle", oracle)
            await run(*fio, "--verify_only")
            await server.stop()
            await server.check_zones(degraded=True)
        finally:
            for disk in disks:
                await asyncio.to_thread(disk.clear)
            await server.close()


@pytest.mark.slow
async def test_a_zone_finds_no_space_where_it_was_set_aside(disks: list[PowerCutDisk]) -> None:
    """As a file system that copies on write does: the writes are made again, clients wait, nobody is put out."""
    with tempfile.TemporaryDirectory(prefix="crash-") as sockets:
        config = Path(sockets) / "config"
        config.write_text(f'[store]\nzone_deadline_seconds = {DEADLINE_SECONDS}\nsegment_bytes = "16M"\n')
        zones = [disk.root / "zone" for disk in disks]
        server = RealServer(Path(sockets), zones, [f"pause:{SIZE_BYTES}"], config=config)
        try:
            await server.start()
            reached = asyncio.Event()
            writes = asyncio.create_task(flushed_writes(server, REQUESTS_BEFORE + 500, reached))
            await reached.wait()
            await asyncio.to_thread(disks[1].fault, "zone", ("write",), errno.ENOSPC)
            retries = int(3 * DEADLINE_SECONDS / FULL_RETRY_SECONDS)  # it lags far longer than its deadline
            await eventually(lambda: server.last_words().count("a write waits for space") >= retries)
            assert not writes.done()
            await asyncio.to_thread(disks[1].clear)
            await writes
            status = (await server.status()).store
            assert [zone.state for zone in status.zones] == ["in"] * 3
            await server.stop()
            await server.check_zones()
        finally:
            for disk in disks:
                await asyncio.to_thread(disk.clear)
            await server.close()
