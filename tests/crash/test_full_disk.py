"""Other programs fill a zone's file system to its last byte; the server is killed, and starts on it all the same."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.server import RealServer
from tests.support.clients import run, unavailable


def fill(folder: Path) -> None:
    """Take every block that is free."""
    for number, size in enumerate((1 << 20, 4096, 512)):
        with contextlib.suppress(OSError), (folder / f"filler{number}").open("ab", buffering=0) as file:
            while file.write(bytes(size)) == size:
                pass


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="full-") as path:
        yield Path(path)


@pytest.mark.slow
async def test_a_store_on_a_full_disk_starts_reads_and_frees(directory: Path) -> None:
    if os.geteuid():
        unavailable("a small file system can be mounted by root only")
    image, mount = directory / "image", directory / "mount"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(400 << 20)
    await run("mkfs.ext4", "-q", "-F", "-m", "0", image)
    await run("mount", "-o", "loop", image, mount)
    server = RealServer(directory, [mount / "zone"], ["disk:100M"])
    try:
        (mount / "zone").mkdir()
        await server.start()
        uri = server.uri("disk")
        await run("qemu-io", "-f", "raw", "-c", "write -P 7 0 20M", "-c", "flush", "-c", "write -P 8 20M 3M", uri)
        server.kill()
        await server.ended()
        fill(mount)
        assert os.statvfs(mount).f_bavail * 1024 < 1 << 16
        await server.start()
        read = await run("qemu-io", "-f", "raw", "-c", "read -P 7 0 20M", uri)
        assert "failed" not in read.out
        refused = await run("qemu-io", "-f", "raw", "-c", "write -P 9 0 1M", uri, check=False)
        assert "No space left on device" in refused.out + refused.err
        read = await run("qemu-io", "-f", "raw", "-c", "read -P 7 0 20M", "-c", "discard 0 20M", "-c", "flush", uri)
        assert "failed" not in read.out
        await server.stop()
        await server.start()
        await run("qemu-io", "-f", "raw", "-c", "read -P 0 0 20M", uri)
        await server.stop()
        await server.check_zones()
    finally:
        await server.close()
        await run("umount", mount)
