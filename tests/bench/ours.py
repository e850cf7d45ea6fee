"""The cases that look into our server alone: opening after a crash, space while overwriting, memory."""

import threading
import time
from dataclasses import dataclass
from typing import Final

from tests.bench import fio
from tests.bench.servers import Server

SAMPLE_SECONDS: Final = 0.2
MIB: Final = 1 << 20
FILL: Final = {"rw": "write", "bs": "1m", "iodepth": "8", "end_fsync": "1"}
OVERWRITE: Final = {"rw": "randwrite", "bs": "4k", "iodepth": "32"}
SINGLE_RECORDS: Final = {"rw": "randwrite", "bs": "4k", "iodepth": "1", "end_fsync": "1"}


def open_after_crash(server: Server, data_bytes: int) -> float:
    """Seconds from start to first read after kill -9 behind data_bytes of single-block writes in random order.

    One request in flight at a time makes one record of each; the fsync at the end puts all of them behind the last
    checkpoint that the server chose to make, and the kill comes right after it.
    """
    server.wipe()
    server.start()
    server.flush()
    fio.run(server, {**SINGLE_RECORDS, "size": str(server.size_bytes), "io_size": str(data_bytes)})
    server.kill()
    seconds = server.start()
    server.stop()
    return seconds


@dataclass(frozen=True)
class SpaceResult:
    """Bytes per zone; latencies in seconds.

    `baseline` is the first quarter of a turn of overwriting, when as yet little is worth collecting.
    """

    live_bytes: int
    bytes_max: dict[str, int]
    bytes_at_end: dict[str, int]
    p99_baseline_seconds: float
    p99_seconds: float
    requests_per_second: float

    @property
    def limit_bytes(self) -> float:
        return 1.65 * self.live_bytes + 128 * MIB


class _Sampler(threading.Thread):
    """Takes the largest disk usage of each zone while it runs."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.bytes_max: dict[str, int] = {}
        self._server = server
        self._end = threading.Event()

    def run(self) -> None:
        while True:
            for zone, used in self._server.zone_bytes().items():
                self.bytes_max[zone] = max(used, self.bytes_max.get(zone, 0))
            if self._end.wait(SAMPLE_SECONDS):
                return

    def end(self) -> None:
        self._end.set()
        self.join()


def space(server: Server, turns: int) -> SpaceResult:
    """Fill the disk, overwrite it `turns` times in random 4K requests at full speed, watch the zones meanwhile."""
    server.wipe()
    server.start()
    size = server.size_bytes
    fio.run(server, {**FILL, "size": str(size)})
    sampler = _Sampler(server)
    sampler.start()
    baseline = fio.run(server, {**OVERWRITE, "size": str(size), "io_size": str(size // 4)})
    rest = fio.run(server, {**OVERWRITE, "size": str(size), "io_size": str(turns * size - size // 4)})
    sampler.end()
    server.flush()
    time.sleep(SAMPLE_SECONDS)
    at_end = server.zone_bytes()
    server.stop()
    return SpaceResult(
        size, sampler.bytes_max, at_end, baseline.p99_seconds, rest.p99_seconds, rest.requests_per_second
    )
