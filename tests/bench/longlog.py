"""Make a store whose log is long, by the product's own writer, and die by kill -9 where opening it costs the most.

    python -m tests.bench.longlog --bytes 64G --size 72G ZONE...

What is real: the store, its writer, map, checkpoints and collection, all with default settings; every byte of every
file, so that a reader can't tell the store from one that a server left behind. What is not: the data is zeros, which a
file system shim leaves as holes (64 GiB of log then take some hundred MiB), and the same shim does not wait for syncs:
a kill leaves what is in the page cache.

Single blocks are written in random order, each once, in windows of 8 GiB one after the other: so little memory is
pinned by the map, and so few segments are dead, that nothing but the length of the tail makes a checkpoint due, which
is how a tail becomes longest. The end comes in the middle of a checkpoint, when so much more has been written as a slow
device would let clients write meanwhile.
"""

import argparse
import asyncio
import os
import random
import signal
from collections.abc import Sequence
from typing import Final

import numpy as np

from objstore.backend.directory import DirectoryBackend
from objstore.backend.filesystem import OsFileSystem
from objstore.log.checkpoint import CheckpointWriter
from objstore.log.keeper import SEGMENTS_BETWEEN_MAX
from objstore.units import BLOCK_BYTES, BLOCK_SHIFT
from objstore.volume.store import open_zones
from objstore.volume.vdi import Vdi
from tests.bench.servers import EXPORT
from tests.bench.sizes import size

WINDOW_BLOCKS: Final = (8 << 30) >> BLOCK_SHIFT
SLOW_SEGMENTS: Final = SEGMENTS_BETWEEN_MAX // 4
"""Written during the last checkpoint: 1 GiB, as in 5 s at 200 MB/s."""
YIELD_WRITES: Final = 64
ZERO_PAGE: Final = bytes(BLOCK_BYTES)


class HoleFileSystem(OsFileSystem):
    """The operating system, but pages of zeros become holes and syncs return at once. Only for files that are written
    once: a hole must not be what stood there before."""

    @staticmethod
    def posix_fallocate(fd: int, offset: int, length: int, /) -> None:
        os.ftruncate(fd, offset + length)

    @staticmethod
    def pwritev(fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0, /) -> int:
        written = 0
        for buffer in buffers:
            data = bytes(buffer)
            if len(data) % BLOCK_BYTES or offset % BLOCK_BYTES:
                os.pwrite(fd, data, offset + written)
            elif data.count(0) != len(data):
                _write_pages(fd, data, offset + written)
            written += len(data)
        return written

    @staticmethod
    def reopen(fd: int, flags: int, /) -> int:
        return os.open(f"/proc/self/fd/{fd}", flags & ~os.O_DIRECT)

    @staticmethod
    def fdatasync(fd: int, /) -> None:
        return

    @staticmethod
    def fsync(fd: int, /) -> None:
        return

    @staticmethod
    def start_writeback(fd: int, offset: int, length: int, /) -> None:
        return


def _write_pages(fd: int, data: bytes, offset: int) -> None:
    """Runs of pages that are not zeros."""
    pages = np.frombuffer(data, np.uint64).reshape(-1, BLOCK_BYTES // 8).any(axis=1)
    edges = np.flatnonzero(np.diff(pages, prepend=False, append=False)).reshape(-1, 2) * BLOCK_BYTES
    for low, high in edges.tolist():
        os.pwrite(fd, data[low:high], offset + low)


def end_in_a_checkpoint(vdi: Vdi, log_bytes: int) -> None:
    """From `log_bytes` on the next checkpoint is the last thing that happens."""
    finish = CheckpointWriter.finish

    async def finish_late(self: CheckpointWriter, *args: object) -> None:
        writer = vdi.disk.writer
        if self.header.log == vdi.disk.log and vdi.disk.total_blocks << BLOCK_SHIFT >= log_bytes:
            last = self.header.next_segment + SLOW_SEGMENTS
            while writer.next_number < last:  # noqa: ASYNC110 - nobody tells of it
                await asyncio.sleep(0.001)
            tail = writer.next_number - vdi.keeper.next_segment
            print(f"killed with {tail} segments behind checkpoint {vdi.keeper.number}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        await finish(self, *args)  # type: ignore[arg-type]

    CheckpointWriter.finish = finish_late  # type: ignore[method-assign,assignment]


async def make(paths: Sequence[str], log_bytes: int, size_bytes: int, seed: int) -> None:
    """Write until killed."""
    backends = [(DirectoryBackend(path, fs=HoleFileSystem()), path) for path in paths]
    store = await open_zones(backends, create=True)
    await store.create_vdi(EXPORT, size_bytes)
    vdi = await store.open(EXPORT)
    assert isinstance(vdi, Vdi)
    await vdi.flush()
    end_in_a_checkpoint(vdi, log_bytes)
    rng = np.random.default_rng(seed)
    data = memoryview(ZERO_PAGE)
    for first in range(0, size_bytes >> BLOCK_SHIFT, WINDOW_BLOCKS):
        order = rng.permutation(min(WINDOW_BLOCKS, (size_bytes >> BLOCK_SHIFT) - first)) + first
        for low in range(0, len(order), YIELD_WRITES):
            for offset in (order[low : low + YIELD_WRITES] << BLOCK_SHIFT).tolist():
                if not vdi.write_now(offset, data):
                    await vdi.write(offset, data)
            await asyncio.sleep(0)
    raise SystemExit("the disk is too small for so long a log")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.longlog", description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", type=size, default=64 << 30, help="length of the log (default 64G)")
    parser.add_argument("--size", type=size, default=72 << 30, help="size of the disk (default 72G)")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("zones", nargs="+", metavar="ZONE", help="empty directories")
    options = parser.parse_args()
    asyncio.run(make(options.zones, options.bytes, options.size, options.seed))


if __name__ == "__main__":
    main()
