"""The cases about copies: scrub against a plain loop, recovery against cp, a store with one zone down."""

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from crc32c import crc32c

from nbdserver.control_client import ControlClient
from tests.bench import fio
from tests.bench.servers import ZONES, Server

CHUNK_BYTES: Final = 1 << 20
POLL_SECONDS: Final = 0.02
FILL: Final = {"rw": "write", "bs": "1m", "iodepth": "8", "end_fsync": "1"}
READ: Final = {"rw": "randread", "bs": "4k", "iodepth": "4"}
WRITE: Final = {"rw": "randwrite", "bs": "4k", "iodepth": "32"}
LIGHT: Final = {"rw": "randrw", "bs": "4k", "iodepth": "4", "rate_iops": "1000,1000"}


@dataclass(frozen=True)
class ScrubResult:
    """Bytes a second; p99 of a light load without and with a scrub beside it."""

    scrub_rates: list[float]
    loop_rates: list[float]
    p99_alone_seconds: float
    p99_beside_seconds: float

    @property
    def ratio(self) -> float:
        return statistics.median(self.scrub_rates) / statistics.median(self.loop_rates)


@dataclass(frozen=True)
class RecoveryResult:
    """Bytes a second of copying one zone; p99 of a light load without and with a recovery beside it."""

    recovery_rate: float
    copy_rate: float
    p99_alone_seconds: float
    p99_beside_seconds: float

    @property
    def ratio(self) -> float:
        return self.recovery_rate / self.copy_rate


@dataclass(frozen=True)
class DegradedResult:
    """Requests a second with all zones and with one of them away."""

    healthy: dict[str, list[float]]
    degraded: dict[str, list[float]]

    def ratio(self, load: str) -> float:
        return statistics.median(self.degraded[load]) / statistics.median(self.healthy[load])


def control(server: Server) -> ControlClient:
    return ControlClient(f"{server.socket}.control")


def filled(server: Server) -> None:
    server.wipe()
    server.start()
    fio.run(server, {**FILL, "size": str(server.size_bytes)})
    server.flush()
    settle(server)


def settle(server: Server) -> None:
    subprocess.run(["sync", "-f", str(server.data)], check=True)


def files(folders: list[Path]) -> Iterator[Path]:
    """Sealed segments and checkpoints: what scrub reads too."""
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.relative_to(folder).parts[0] in ("log", "checkpoint"):
                yield path


def forget(folders: list[Path]) -> None:
    """Out of the page cache with them."""
    for path in files(folders):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def plain_loop(folders: list[Path]) -> float:
    """Bytes a second of reading and checksumming the files one after the other."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    total = 0
    began = time.monotonic()
    for path in files(folders):
        with path.open("rb", buffering=0) as file:
            crc = 0
            while count := file.readinto(buffer):
                crc = crc32c(buffer[:count], crc)
                total += count
    return total / (time.monotonic() - began)


def scrub_once(server: Server) -> float:
    """Bytes a second of a pass that was asked for."""
    client = control(server)
    try:
        began = time.monotonic()
        client.start_scrub()
        while client.scrub_status().running:
            time.sleep(POLL_SECONDS)
        seconds = time.monotonic() - began
        status = client.scrub_status()
        if status.copies_bad:
            raise RuntimeError(f"scrub found {status.copies_bad} bad copies")
        return status.bytes_done / seconds
    finally:
        client.close()


def p99(server: Server, seconds: float, beside: Callable[[], object] | None = None) -> float:
    """Of reads and writes at a fixed rate; `beside` is begun first."""
    if beside is not None:
        beside()
    runtime = {"time_based": "1", "runtime": f"{round(seconds)}s"}
    return fio.run(server, {**LIGHT, **runtime, "size": str(server.size_bytes)}).p99_seconds


def scrub(server: Server, rounds: int, seconds: float) -> ScrubResult:
    """A pass over everything against a plain loop over the same files, neither of them in the page cache."""
    filled(server)
    folders = [server.data / zone for zone in ZONES]
    scrub_rates, loop_rates = [], []
    for number in range(rounds):
        for what in (0, 1) if number % 2 else (1, 0):
            forget(folders)
            if what:
                scrub_rates.append(scrub_once(server))
            else:
                loop_rates.append(plain_loop(folders))
    alone = p99(server, seconds)
    client = control(server)

    def beside() -> None:
        client.start_scrub()

    with_scrub = p99(server, seconds, beside)
    client.close()
    server.stop()
    return ScrubResult(scrub_rates, loop_rates, alone, with_scrub)


def recovery(server: Server, seconds: float) -> RecoveryResult:
    """A zone is lost and a new one takes its place, against `cp -r` of the lost zone and a sync."""
    filled(server)
    server.stop()
    lost, aside = server.data / ZONES[2], server.data / "aside"
    forget([lost])
    began = time.monotonic()
    subprocess.run(["cp", "-r", str(lost), str(aside)], check=True)
    settle(server)
    copied = sum(path.stat().st_size for path in files([aside]))
    copy_rate = copied / (time.monotonic() - began)
    shutil.rmtree(aside)
    shutil.rmtree(lost)
    server.start()
    alone = p99(server, seconds)
    recovery_rate = _replace(server, lost, "new-1")
    server.stop()
    shutil.rmtree(server.data / "new-1")
    server.start()
    beside = p99(server, seconds, lambda: _begin_replacing(server, server.data / "new-1", "new-2"))
    server.stop()
    return RecoveryResult(recovery_rate, copy_rate, alone, beside)


def _begin_replacing(server: Server, lost: Path, name: str) -> None:
    new = server.data / name
    new.mkdir()
    client = control(server)
    client.change_zones("replace", str(lost), path=str(new))
    client.close()


def _replace(server: Server, lost: Path, name: str) -> float:
    """Bytes a second from the first copy that recovery makes to its end, a sync included."""
    _begin_replacing(server, lost, name)
    client = control(server)
    try:
        while not (status := client.recovery_status()).bytes_total:
            time.sleep(POLL_SECONDS)
        began = time.monotonic()
        while status.running:
            time.sleep(POLL_SECONDS)
            status = client.recovery_status()
        if status.copies_missing or status.problems:
            raise RuntimeError(f"recovery did not end well: {status}")
        settle(server)
        return status.bytes_done / (time.monotonic() - began)
    finally:
        client.close()


def degraded(server: Server, rounds: int, seconds: float) -> DegradedResult:
    """The same loads with three zones and with two of them."""
    filled(server)
    away = server.data / "away"
    zone = server.data / ZONES[2]
    healthy: dict[str, list[float]] = {"write": [], "read": []}
    without: dict[str, list[float]] = {"write": [], "read": []}
    for number in range(rounds):
        for gone in (True, False) if number % 2 else (False, True):
            server.stop()
            if gone:
                zone.rename(away)
            server.start()
            server.flush()
            for load, options in (("write", WRITE), ("read", READ)):
                runtime = {"time_based": "1", "runtime": f"{round(seconds)}s", "size": str(server.size_bytes)}
                result = fio.run(server, {**options, **runtime})
                (without if gone else healthy)[load].append(result.requests_per_second)
                server.flush()
                settle(server)
            if gone:
                server.stop()
                away.rename(zone)
    server.stop()
    return DegradedResult(healthy, without)
