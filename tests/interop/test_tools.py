"""fio, nbd-client, and a file system on a loop device over nbdfuse."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.interop.conftest import Export
from tests.support.clients import find, run, running, unavailable
from tests.support.nbd_client import attached
from tests.support.serving import MIB, Disk, serve_peer

MOUNT_SECONDS_MAX = 20.0


@pytest.mark.parametrize(("block", "depth"), [("4k", 32), ("512-64k", 8), ("1m", 4)], ids=["4k", "mixed sizes", "1m"])
async def test_fio_verify(export: Export, tmp_path: Path, block: str, depth: int) -> None:
    """Four jobs, each with its connection and its quarter of the disk; every block is checked by its crc32c."""
    blocks = ["--bsrange=512-64k", "--bs_unaligned=0"] if "-" in block else [f"--bs={block}"]
    await run(
        "fio",
        "--name=verify",
        "--ioengine=nbd",
        f"--uri={export.uri()}",
        "--numjobs=4",
        "--size=6m",
        "--offset_increment=16m",
        "--rw=randwrite",
        *blocks,
        f"--iodepth={depth}",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
        "--fsync=64",
        "--randrepeat=1",
        f"--aux-path={tmp_path}",
    )


async def test_nbd_client_lists_exports(export: Export) -> None:
    """The reference client's list."""
    unix, tcp = export.served.addresses
    if export.transport == "unix":
        listed = await run("nbd-client", "-unix", unix.removeprefix("unix://"), "-l")
    else:
        host, _, port = tcp.removeprefix("tcp://").rpartition(":")
        listed = await run("nbd-client", "-l", host, port)
    assert any(line.partition(":")[0] == "disk" for line in listed.out.splitlines()), listed.out


@asynccontextmanager
async def fuse_file(export: Export, directory: Path) -> AsyncIterator[Path]:
    """The export as a file, by nbdfuse."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        unavailable("/dev/fuse can't be opened: run where FUSE is allowed")
    mount, pid_file = directory / "fuse", directory / "nbdfuse.pid"
    mount.mkdir()
    async with running("nbdfuse", "-P", pid_file, mount, export.uri()) as process:
        async with asyncio.timeout(MOUNT_SECONDS_MAX):
            while not pid_file.exists():
                assert process.returncode is None, "nbdfuse ended before it had mounted"
                await asyncio.sleep(0.02)
        try:
            yield mount / "nbd"
        finally:
            await run("fusermount3", "-u", mount)
            await process.wait()


@asynccontextmanager
async def loop_device(file: Path) -> AsyncIterator[str]:
    """A loop device over a file."""
    attach = await run("losetup", "--find", "--show", file, check=False)
    if attach.code != 0:
        unavailable(f"no loop device can be made: {attach.err.strip()}")
    try:
        yield attach.out.strip()
    finally:
        await run("losetup", "--detach", attach.out.strip())


async def test_file_system_on_a_loop_device(export: Export, tmp_path: Path) -> None:
    """The kernel writes an ext4 file system through nbdfuse; e2fsck and another connection find it whole."""
    find("mkfs.ext4")
    content = os.urandom(3 * MIB)
    (tmp_path / "content").write_bytes(content)
    mount = tmp_path / "mount"
    mount.mkdir()
    async with fuse_file(export, tmp_path) as file, loop_device(file) as device:
        await run("mkfs.ext4", "-q", device)
        mounted = await run("mount", device, mount, check=False)
        if mounted.code == 0:
            try:
                await run("cp", tmp_path / "content", mount / "copy")
                await run("sync", "-f", mount)
            finally:
                await run("umount", mount)
        await run("e2fsck", "-f", "-n", device)
    image = tmp_path / "image.raw"
    await run("nbdcopy", export.uri(), image)
    await run("e2fsck", "-f", "-n", image)
    if mounted.code == 0:
        await run("debugfs", "-R", f"dump /copy {tmp_path / 'dumped'}", image)
        assert (tmp_path / "dumped").read_bytes() == content


@pytest.mark.parametrize("program", ["nbdkit", "qemu-nbd"])
async def test_raw_client_reads_the_text_as_others_do(program: str, tmp_path: Path) -> None:
    """The client of the specification's tests works with foreign servers: its reading of the text is not ours alone."""
    async with serve_peer(program, Disk(), tmp_path) as served:
        async with attached(served.address, contexts=["base:allocation"]) as client:
            await client.write(5000, b"foreign" * 1000)
            assert await client.read(5000, 7000) == b"foreign" * 1000
            await client.flush()
            assert sum(length for length, _ in await client.status(0, 64 * 1024)) > 0
            await client.send_disc()
            await client.expect_orderly_close()
        async with attached(served.address, structured=False) as client:
            assert await client.read(5000, 7) == b"foreign"
