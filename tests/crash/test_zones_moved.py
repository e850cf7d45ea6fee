"""Directories of a running server's zones are removed or change places under load: it goes on without those zones."""

import asyncio
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash.load import check_image, write_until_gone
from tests.crash.server import RealServer
from tests.support.clients import find, run
from tests.support.oracle import Oracle
from tests.support.serving import eventually

SIZE_BYTES = 32 << 20
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


def remove(zones: list[Path]) -> None:
    shutil.rmtree(zones[1])


def swap(zones: list[Path]) -> None:
    """Both are gone at once: segments with a copy in each have one left, and their ends go elsewhere."""
    aside = zones[1].with_name("aside")
    os.rename(zones[1], aside)
    os.rename(zones[2], zones[1])
    os.rename(aside, zones[2])


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "lost"), [(remove, 1), (swap, 2)], ids=["removed", "swapped"])
async def test_directories_go_under_load(fault: Callable[[list[Path]], None], lost: int) -> None:
    find("fio")
    oracle = Oracle(SIZE_BYTES)
    with tempfile.TemporaryDirectory(prefix="crash-") as directory:
        zones = [Path(directory) / name for name in "abcd"]
        server = RealServer(Path(directory), zones, [f"{name}:{SIZE_BYTES}" for name in ("oracle", "fio")])
        try:
            await server.start()
            fio = ["fio", "--name=moved", "--ioengine=nbd", f"--uri={server.uri('fio')}", *FIO]
            load = asyncio.create_task(write_until_gone(server.address, "oracle", oracle, random.Random(1), 2))
            verify = asyncio.create_task(run(*fio))
            await eventually(lambda: sum(1 for _ in (zones[1] / "log").rglob("*")) > 4)
            fault(zones)
            await verify
            status = (await server.status()).store
            assert status.health == "degraded"
            assert [zone.state for zone in status.zones].count("out") == lost
            await server.stop()
            await load
            await server.start()
            await check_image(server.address, "oracle", oracle)
            await run(*fio, "--verify_only")
            await server.stop()
            await server.check_zones(degraded=True)
        finally:
            await server.close()
