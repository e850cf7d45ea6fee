"""Quality of service: whether limits hold, whether a disk gets its share beside a hammered one, and how long its reads
take while writes to another stand at the dirty limit."""

import copy
import dataclasses
import statistics
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from objstore.access import blocking
from tests.bench import fio
from tests.bench.ours import FILL
from tests.bench.servers import Server

OTHER: Final = "other"
LIMIT_SECONDS: Final = 10.0
LIMITS: Final = {
    "iops": ({"rw": "randrw", "bs": "4k", "iodepth": "32"}, 2000),
    "iops-write": ({"rw": "randwrite", "bs": "4k", "iodepth": "32"}, 5000),
    "bytes-read": ({"rw": "read", "bs": "1m", "iodepth": "8"}, 100 << 20),
}
"""What fio does, and what it may in a second."""
OURS: Final = {"rw": "randread", "bs": "4k", "iodepth": "32", "numjobs": "3"}
HAMMER: Final = {"rw": "randread", "bs": "4k", "iodepth": "32", "numjobs": "8", "nice": "19"}
"""fio's processes make way for ours: what is shared is to be the server, not the rest of the machine."""
ONE_READ: Final = {"rw": "randread", "bs": "4k", "iodepth": "1"}
WRITES: Final = {"rw": "randwrite", "bs": "4k", "iodepth": "32", "numjobs": "4", "nice": "19"}
BESIDE_SECONDS: Final = 1.0
"""The other load begins so much earlier and ends so much later."""


def _timed(options: Mapping[str, str], seconds: float, size_bytes: int) -> dict[str, str]:
    return {**options, "time_based": "1", "runtime": f"{max(1, round(seconds * 1000))}ms", "size": str(size_bytes)}


def _other(server: Server) -> Server:
    """The same process, seen as the server of the other disk."""
    other = copy.copy(server)
    other.kind = dataclasses.replace(server.kind, export=OTHER)
    return other


def _start(server: Server) -> Server:
    """Two full disks; the other one."""
    server.wipe()
    server.start()
    with blocking.connect(socket=f"{server.socket}.control") as store:
        store.create(OTHER, server.size_bytes)
    other = _other(server)
    for each in (server, other):
        fio.run(each, {**FILL, "size": str(each.size_bytes)})
    server.rest()
    return other


def limits(server: Server, rounds: int) -> dict[str, list[float]]:
    """For each limit what fio got of it over ten seconds, in parts of the limit."""
    _start(server)
    found: dict[str, list[float]] = {kind: [] for kind in LIMITS}
    for _ in range(rounds):
        for kind, (options, rate) in LIMITS.items():
            _limit(server, kind, rate)
            point = fio.run(server, _timed(options, LIMIT_SECONDS, server.size_bytes))
            _limit(server, kind, 0)
            got = point.bytes_per_second if kind.startswith("bytes") else point.all_requests_per_second
            found[kind].append(got / rate)
            server.flush()
    server.stop()
    return found


def _limit(server: Server, kind: str, rate: int) -> None:
    with blocking.connect(socket=f"{server.socket}.control") as store:
        store.set_limits(server.kind.export, {kind: (rate, 0)})


@dataclass
class SharesResult:
    """Requests per second of each round; p99 in seconds."""

    alone: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    hammer: list[float] = field(default_factory=list)
    p99_idle: list[float] = field(default_factory=list)
    p99_beside: list[float] = field(default_factory=list)

    @property
    def of_share(self) -> float:
        """What was got beside the hammer, in parts of the half that the weights promise."""
        return statistics.median(self.beside) / (statistics.median(self.alone) / 2)

    @property
    def p99_ratio(self) -> float:
        return statistics.median(self.p99_beside) / statistics.median(self.p99_idle)


def shares(server: Server, rounds: int, seconds: float) -> SharesResult:
    """A disk with a few connections beside one with many; then single reads beside writes at the dirty limit."""
    other = _start(server)
    result = SharesResult()
    size = server.size_bytes
    for _ in range(rounds):
        result.alone.append(fio.run(server, _timed(OURS, seconds, size)).requests_per_second)
        ours, theirs = _beside(server, OURS, other, HAMMER, seconds)
        result.beside.append(ours.requests_per_second)
        result.hammer.append(theirs.requests_per_second)
        result.p99_idle.append(fio.run(server, _timed(ONE_READ, seconds, size)).p99_seconds)
        ours, _ = _beside(server, ONE_READ, other, WRITES, seconds)
        result.p99_beside.append(ours.p99_seconds)
        other.flush()
        server.rest()
    server.stop()
    return result


def _beside(
    server: Server, options: Mapping[str, str], other: Server, load: Mapping[str, str], seconds: float
) -> tuple[fio.Measurement, fio.Measurement]:
    size = server.size_bytes
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(fio.run, other, _timed(load, seconds + 2 * BESIDE_SECONDS, size))
        delayed = {**_timed(options, seconds, size), "startdelay": f"{round(BESIDE_SECONDS * 1000)}ms"}
        return fio.run(server, delayed), theirs.result()
