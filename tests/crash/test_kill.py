"""kill -9 of the real server while fio, nbdcopy and our own clients write.

The page cache survives here, so this shows that what was answered as flushed had reached the operating system and that
every unfinished state on the zones can be opened; `test_powercut` shows the rest.
"""

import asyncio
import random
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.crash.load import check_image, write_until_gone
from tests.crash.server import RealServer
from tests.support.clients import find, run
from tests.support.oracle import Oracle

MIB = 1 << 20
SIZE_BYTES = 64 * MIB
KILLS_PER_SEED = 6
SEEDS = range(3)
LIFE_SECONDS = (0.05, 1.5)
"""Between the first request of a life and its end; the exact moment is not what the test rests on."""
FIO_PATTERN = ("--rw=randwrite", "--bs=4k-64k", "--iodepth=16", "--verify=crc32c", "--randseed=7", "--size=24m")


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[RealServer]:
    zones = [tmp_path / name for name in ("a", "b", "c")]
    for zone in zones:
        zone.mkdir()
    vdis = [f"{name}:{SIZE_BYTES}" for name in ("oracle", "fio", "copy", "load")]
    with tempfile.TemporaryDirectory(prefix="crash-") as sockets:
        real = RealServer(Path(sockets), zones, vdis)
        try:
            yield real
        finally:
            await real.close()


async def end_badly(*command: str) -> None:
    """Run a client whose server dies under it: it has to notice."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        assert await process.wait() != 0, f"{command[0]} ended well although its server was killed"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def fio(server: RealServer, export: str, *arguments: str) -> list[str]:
    return ["fio", "--name=kill", "--ioengine=nbd", f"--uri={server.uri(export)}", *arguments]


async def kill_under_load(server: RealServer, oracle: Oracle, rng: random.Random, image: Path) -> None:
    """Three clients write; the server dies; each of them must notice."""
    endless = fio(server, "load", "--rw=randwrite", "--bs=4k", "--iodepth=16", "--time_based", "--runtime=600")
    clients = [
        asyncio.create_task(write_until_gone(server.address, "oracle", oracle, rng, connections=2)),
        asyncio.create_task(end_badly(*endless, "--fsync=64")),
        asyncio.create_task(copy_until_gone(server, image)),
    ]
    try:
        await asyncio.sleep(rng.uniform(*LIFE_SECONDS))
        server.kill()
        await server.ended()
        await asyncio.gather(*clients)
    finally:
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)


async def copy_until_gone(server: RealServer, image: Path) -> None:
    """nbdcopy into the export that the others leave alone, again and again."""
    while (await run("nbdcopy", str(image), server.uri("load"), check=False)).code == 0:
        pass


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
async def test_nothing_flushed_is_lost_by_kills(server: RealServer, tmp_path: Path, seed: int) -> None:
    for program in ("fio", "nbdcopy"):
        find(program)
    rng = random.Random(seed)
    image = tmp_path / "image"
    image.write_bytes(rng.randbytes(SIZE_BYTES))
    oracle = Oracle(SIZE_BYTES)
    await server.start()
    await run("nbdcopy", "--flush", str(image), server.uri("copy"))
    await run(*fio(server, "fio", *FIO_PATTERN, "--do_verify=0", "--end_fsync=1"))
    for _ in range(KILLS_PER_SEED):
        await kill_under_load(server, oracle, rng, image)
        await server.check_zones()
        await server.start()
        await check_image(server.address, "oracle", oracle)
    await run(*fio(server, "fio", *FIO_PATTERN, "--verify_only"))
    copied = tmp_path / "copied"
    await run("nbdcopy", server.uri("copy"), str(copied))
    assert copied.read_bytes() == image.read_bytes(), "a flushed nbdcopy changed under kills"
    await server.stop()
    await server.check_zones()
