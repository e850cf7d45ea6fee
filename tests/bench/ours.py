"""The cases that look into our server alone: opening after a crash, space while overwriting, memory."""

import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import Final

from tests.bench import fio
from tests.bench.servers import REPOSITORY, ZONES, Server

SAMPLE_SECONDS: Final = 0.2
MIB: Final = 1 << 20
FILL: Final = {"rw": "write", "bs": "1m", "iodepth": "8", "end_fsync": "1"}
OVERWRITE: Final = {"rw": "randwrite", "bs": "4k", "iodepth": "32"}
SINGLE_RECORDS: Final = {"rw": "randwrite", "bs": "4k", "iodepth": "1", "end_fsync": "1"}


def open_after_crash(server: Server, data_bytes: int) -> float:
    """Seconds from start to first read after kill -9 behind data_bytes of single-block writes in random order.

    The fsync at the end makes them durable, and the kill comes right after it: what lies behind the newest checkpoint
    then is chance. `open_long` has the worst of it.
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
class OpenResult:
    """Of each round: seconds from start to first read, resident memory at its peak until then."""

    seconds: list[float]
    peak_bytes: list[int]


def open_long(server: Server, log_bytes: int, rounds: int) -> OpenResult:
    """Open what `longlog` leaves behind. Each round has a copy of its own, which is in the page cache as after a kill;
    none is read before."""
    server.wipe()
    made = server.data / "made"
    folders = [made / zone for zone in ZONES]
    for folder in folders:
        folder.mkdir(parents=True)
    sizes = ["--bytes", str(log_bytes), "--size", str(log_bytes + log_bytes // 8 + (8 << 30))]  # a checkpoint more
    command = [sys.executable, "-m", "tests.bench.longlog", *sizes, *map(str, folders)]
    done = subprocess.run(command, cwd=REPOSITORY, check=False)
    if done.returncode != -signal.SIGKILL:
        raise RuntimeError(f"the long log was not made: exit code {done.returncode}")
    result = OpenResult([], [])
    for _ in range(rounds):
        for folder in folders:
            shutil.rmtree(server.data / folder.name)
            subprocess.run(["cp", "-a", "--sparse=always", str(folder), str(server.data)], check=True)
        subprocess.run(["sync", "-f", str(server.data)], check=True)
        result.seconds.append(server.start())
        result.peak_bytes.append(server.rss_bytes()[1])
        server.kill()
    shutil.rmtree(made)
    return result


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
