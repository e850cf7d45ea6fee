"""The library in this process against the same disk work over NBD: 4 KiB reads and writes, one at a time."""

import asyncio
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import uvloop

import objstore
from tests.bench import fio
from tests.bench.cases import FIO_CASES
from tests.bench.ours import FILL
from tests.bench.servers import ZONES, Server

BLOCK_BYTES: Final = 4096
MIB: Final = 1 << 20
CALLS_BETWEEN_LOOKS: Final = 64
LOADS: Final = ("read", "write")


@dataclass
class LibraryResult:
    """Requests per second of each round, by load."""

    library: dict[str, list[float]]
    nbd: dict[str, list[float]]


def compare(server: Server, rounds: int, seconds: float) -> LibraryResult:
    """Both on the server's zones, in turns: it runs for one half of a round and the library for the other."""
    server.wipe()
    server.start()
    fio.run(server, {**FILL, "size": str(server.size_bytes)})
    result = LibraryResult({load: [] for load in LOADS}, {load: [] for load in LOADS})
    for _ in range(rounds):
        server.flush()
        for load in LOADS:
            case = next(case for case in FIO_CASES if case.name == f"{load}-qd1")
            result.nbd[load].append(fio.run_case(server, case, seconds).value(case))
        server.stop()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            rates = runner.run(_library([server.data / zone for zone in ZONES], server.kind.export, seconds))
        for load in LOADS:
            result.library[load].append(rates[load])
        server.start()
    server.stop()
    return result


async def _library(zones: list[Path], name: str, seconds: float) -> dict[str, float]:
    dice = random.Random(1)
    buffer = bytearray(BLOCK_BYTES)
    data = dice.randbytes(BLOCK_BYTES)
    rates = {}
    async with objstore.connect(zones) as store, store.open(name) as vdi:
        await vdi.flush()  # as the benchmark does over NBD
        blocks = vdi.size_bytes // BLOCK_BYTES
        for load in LOADS:
            done = 0
            began = time.monotonic()
            while time.monotonic() < began + seconds:
                for _ in range(CALLS_BETWEEN_LOOKS):
                    offset = dice.randrange(blocks) * BLOCK_BYTES
                    if load == "read":
                        await vdi.readinto(offset, buffer)
                    else:
                        await vdi.write(offset, data)
                done += CALLS_BETWEEN_LOOKS
            rates[load] = done / (time.monotonic() - began)
    return rates
