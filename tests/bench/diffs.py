"""The difference between two snapshots of a large sparse disk as a stream, before and after its data was collected."""

import asyncio
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import uvloop

import objstore
from objstore.volume.settings import StoreSettings
from tests.bench.servers import ZONES, Server

GIB: Final = 1 << 30
MIB: Final = 1 << 20
DISK_BYTES: Final = 100 * GIB
CHANGED_BYTES: Final = GIB
PIECE_BYTES: Final = 64 << 10
"""What changes lies scattered over all of the disk, in pieces of this length."""
REGION_BYTES: Final = 4 * MIB
SPARSE_BYTES: Final = 8 << 10
"""Of each 4 MiB so much was written before: no part of the map is empty."""


@dataclass
class DiffResult:
    """Seconds of one export each, and the length of the stream."""

    fresh: list[float] = field(default_factory=list)
    collected: list[float] = field(default_factory=list)
    stream_bytes: int = 0
    freed: int = 0
    """Segments that collection emptied and freed between the two."""


def exports(server: Server, rounds: int) -> DiffResult:
    """In the library, in process, on the server's zones."""
    server.wipe()
    server.data.mkdir(parents=True, exist_ok=True)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_exports([server.data / zone for zone in ZONES], rounds))


async def _exports(zones: list[Path], rounds: int) -> DiffResult:
    dice = random.Random(1)
    result = DiffResult()
    pieces = DISK_BYTES // PIECE_BYTES
    async with objstore.connect(zones, create=True, settings=StoreSettings()) as store:
        await store.create("disk", DISK_BYTES)
        async with store.open("disk") as vdi:
            for at in range(0, DISK_BYTES, REGION_BYTES):
                await vdi.write(at, dice.randbytes(SPARSE_BYTES), writeback=True)
            await store.create_snapshot("disk", "a")
            data = dice.randbytes(PIECE_BYTES)
            for piece in dice.sample(range(pieces), CHANGED_BYTES // PIECE_BYTES):
                await vdi.write(piece * PIECE_BYTES, data, writeback=True)
            await store.create_snapshot("disk", "b")
        for _ in range(rounds):
            result.fresh.append(await _seconds(store, result))
        async with store.open("disk") as vdi:
            hot = dice.sample(range(pieces), 4096)
            for _ in range(6):
                for piece in dice.sample(hot, 2048):
                    await vdi.write(piece * PIECE_BYTES, data[: PIECE_BYTES // 2], writeback=True)
            await vdi.flush()
            await vdi.volume.give_back()  # type: ignore[attr-defined]
            result.freed = vdi.volume.keeper.freed  # type: ignore[attr-defined]
        for _ in range(rounds):
            result.collected.append(await _seconds(store, result))
    return result


async def _seconds(store: objstore.Connection, result: DiffResult) -> float:
    began = time.monotonic()
    result.stream_bytes = 0
    async for piece in store.export_diff("disk@a", "disk@b"):
        result.stream_bytes += len(piece)
    return time.monotonic() - began
